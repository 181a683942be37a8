"""The right to work on a re-sharding: one controller has it, until another takes it over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psycopg

from cellferry.errors import LeaseLost, WrongState
from cellferry.model import Actor
from cellferry.shards import record

if TYPE_CHECKING:
    from cellferry.shards.control import ShardControl

_HOLDER = """
SELECT r.attempt, r.step, r.holder, COALESCE((
    SELECT p.number FROM topology.resharding_part AS p
    WHERE p.resharding = r.id AND p.part = %(part)s), 0)
FROM topology.resharding AS r WHERE r.id = %(id)s
"""


class TakenOver(LeaseLost):
    """Another controller works on the re-sharding; this one must do no more."""


@dataclass(frozen=True)
class Lease:
    """The right to work on a re-sharding. Picklable; see `ShardControl.adopt`."""

    resharding: int
    step: str
    attempt: int
    part: str | None = None
    number: int = 0
    _control: ShardControl | None = field(default=None, repr=False, compare=False)

    def check(self) -> None:
        """Return while nobody has taken over.

        Raises:
            TakenOver: another controller has.
        """
        if self._control is None:
            raise WrongState("this lease came from another process", hint="adopt it first")
        self._control.check(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Lease, (self.resharding, self.step, self.attempt, self.part, self.number)


def take(
    connection: psycopg.Connection[Any],
    id_: int,
    step: str,
    owner: str,
    actor: Actor,
    part: str | None,
) -> Lease:
    """Take the re-sharding, or one part of a step, over from whoever has it.

    Raises:
        InvalidInput: there is no such re-sharding.
        WrongState: it has ended.
    """
    row = connection.execute(
        """
        UPDATE topology.resharding
        SET attempt = CASE WHEN %(part)s::text IS NOT NULL AND shared AND step = %(step)s
                      THEN attempt ELSE attempt + 1 END,
            shared = %(part)s::text IS NOT NULL, step = %(step)s, holder = %(owner)s,
            taken_at = now()
        WHERE id = %(id)s AND outcome IS NULL RETURNING shard_set, attempt
        """,
        {"part": part, "step": step, "owner": owner, "id": id_},
    ).fetchone()
    if row is None:
        ended = record.load(connection, id_).ended
        raise WrongState(f"re-sharding {id_} is {ended}", hint="begin another one")
    name, attempt = row
    number = 0
    if part is not None:
        found = connection.execute(
            """
            INSERT INTO topology.resharding_part AS p (resharding, part, number, holder)
            VALUES (%s, %s, 1, %s)
            ON CONFLICT (resharding, part) DO UPDATE
            SET number = p.number + 1, holder = excluded.holder, taken_at = now()
            RETURNING number
            """,
            [id_, part, owner],
        ).fetchone()
        number = int(found[0]) if found else 0
    record.note(
        connection,
        "lease",
        actor,
        name,
        resharding=id_,
        attempt=attempt,
        reason=f"{step}{'' if part is None else f' {part}'} by {owner}",
    )
    return Lease(id_, step, attempt, part, number)


def give_back(connection: psycopg.Connection[Any], lease: Lease) -> None:
    """Let it be seen that nobody works on it; not where somebody has taken over."""
    connection.execute(
        "UPDATE topology.resharding SET holder = NULL"
        " WHERE id = %s AND attempt = %s AND outcome IS NULL",
        [lease.resharding, lease.attempt],
    )


def check(connection: psycopg.Connection[Any], lease: Lease, *, lock: bool = False) -> None:
    """Return while the lease is held.

    Args:
        lock: nobody may take over before the transaction has ended.

    Raises:
        TakenOver: another controller has.
    """
    row = connection.execute(
        _HOLDER + ("FOR SHARE OF r" if lock else ""),
        {"id": lease.resharding, "part": lease.part},
    ).fetchone()
    if row is None:
        raise record.no_resharding(lease.resharding)
    attempt, step, holder, number = row
    if (attempt, number) != (lease.attempt, lease.number):
        raise TakenOver(
            f"re-sharding {lease.resharding} was taken over: {step} by {holder or 'somebody'}",
            hint="let that one go on, or run the step again",
            step=lease.step,
        )
