"""What the topology has of shard sets and re-shardings: its rows, and how they are read.

What takes a connection is a part of the caller's transaction.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, LiteralString

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from cellferry.errors import InvalidInput, TransientError
from cellferry.model import Actor
from cellferry.shards.settings import ShardSet
from cellferry.shards.states import Owner, ShardState
from cellferry.topology.document import document, without_secrets

ACKNOWLEDGED = "acknowledged the present state"

OUTCOMES: Mapping[str, ShardState] = {
    "completed": ShardState.NEW,
    "aborted": ShardState.OLD,
    "rolled_back": ShardState.OLD,
}
"""How a re-sharding may end, and the state in which it then is."""


class ClientsBehind(TransientError):
    """Clients have not acknowledged the present state yet.

    Attributes:
        names: whose.
    """

    def __init__(self, message: str, names: Sequence[str] = (), **place: str | None) -> None:
        super().__init__(message, **place)
        self.names = tuple(names)


@dataclass(frozen=True, slots=True)
class Resharding:
    """A change of a set's shards, as the topology knows it.

    Attributes:
        authority: whose values count; in `switching`, whose counted until then.
        epoch: the set's, since this re-sharding's last change.
        ttl_until: until when the old owners keep their copies; None before it became `new`.
        ttl_left_s: how long that was when this was read, on the topology's clock.
        ended: `completed`, `aborted`, `rolled_back`, or None while it is live.
        attempt: the newest controller's number, which rises over all re-shardings of the set;
            `holder` and `step` say who and what.
    """

    id: int
    set_name: str
    old: ShardSet
    new: ShardSet
    state: ShardState
    authority: Owner
    epoch: int
    plan: Mapping[str, Any]
    facts: Mapping[str, Any]
    begun_at: datetime
    ttl_s: float
    ttl_until: datetime | None
    ttl_left_s: float | None = field(compare=False)
    ended: str | None
    ended_at: datetime | None
    attempt: int
    holder: str | None
    step: str | None


@dataclass(frozen=True, slots=True)
class RegisteredClient:
    """A process that acts on a set.

    Attributes:
        session: one run of it; a client that begins anew has another.
        silent_s: since it was last heard of, on the topology's clock: for people only.
    """

    session: uuid.UUID
    name: str
    acknowledged: int
    is_behind: bool
    beat: int
    lease_s: float
    registered_at: datetime
    silent_s: float


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One change of a set or a re-sharding."""

    id: int
    at: datetime
    action: str
    resharding: int | None
    actor: str
    role: str
    from_state: str | None
    to_state: str | None
    epoch: int | None
    attempt: int | None
    reason: str | None
    evidence: Mapping[str, Any]


# --- reading ----------------------------------------------------------------------------------


RESHARDING: LiteralString = """
SELECT id, shard_set, old, new, state, authority, epoch, plan, facts, begun_at, ttl_s, ttl_until,
       extract(epoch FROM ttl_until - clock_timestamp())::float8 AS ttl_left_s,
       outcome, ended_at, attempt, holder, step
FROM topology.resharding
"""


def resharding_of(row: Mapping[str, Any]) -> Resharding:
    """Return the re-sharding that a row of `RESHARDING` is."""
    return Resharding(
        id=row["id"],
        set_name=row["shard_set"],
        old=ShardSet.from_document(row["old"]),
        new=ShardSet.from_document(row["new"]),
        state=ShardState(row["state"]),
        authority=Owner(row["authority"]),
        epoch=row["epoch"],
        plan=row["plan"],
        facts=row["facts"],
        begun_at=row["begun_at"],
        ttl_s=row["ttl_s"],
        ttl_until=row["ttl_until"],
        ttl_left_s=row["ttl_left_s"],
        ended=row["outcome"],
        ended_at=row["ended_at"],
        attempt=row["attempt"],
        holder=row["holder"],
        step=row["step"],
    )


def load(connection: psycopg.Connection[Any], id_: int, *, lock: bool = False) -> Resharding:
    """Return a re-sharding.

    Raises:
        InvalidInput: there is none with this id.
    """
    with connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(
            RESHARDING + "WHERE id = %s" + (" FOR UPDATE" if lock else ""), [id_]
        ).fetchone()
    if row is None:
        raise no_resharding(id_)
    return resharding_of(row)


def no_resharding(id_: int) -> InvalidInput:
    """Return the error for an id that no re-sharding has."""
    return InvalidInput(
        f"there is no re-sharding {id_}", hint="`cellferry reshard status` lists them"
    )


def load_set(connection: psycopg.Connection[Any], name: str) -> ShardSet:
    """Return a set as it is recorded.

    Raises:
        InvalidInput: there is none of this name.
    """
    row = connection.execute(
        "SELECT document FROM topology.shard_set WHERE name = %s", [name]
    ).fetchone()
    if row is None:
        raise _no_set(name)
    return ShardSet.from_document(row[0])


def _no_set(name: str) -> InvalidInput:
    return InvalidInput(
        f"there is no shard set {name!r} in the topology", hint="register it with its file first"
    )


def lock_set(connection: psycopg.Connection[Any], name: str) -> int:
    """Return a set's epoch; until the transaction ends nobody changes or confirms it."""
    row = connection.execute(
        "SELECT epoch FROM topology.shard_set WHERE name = %s FOR UPDATE", [name]
    ).fetchone()
    if row is None:
        raise _no_set(name)
    return int(row[0])


def raise_epoch(
    connection: psycopg.Connection[Any], name: str, epoch: int, changed: ShardSet | None = None
) -> int:
    """Raise a locked set's epoch, after everybody has acknowledged this one; return the new."""
    behind = [one for one in clients(connection, name) if one.is_behind]
    if behind:
        raise clients_behind(name, behind, ACKNOWLEDGED)
    connection.execute(
        """
        UPDATE topology.shard_set
        SET epoch = %s, document = COALESCE(%s, document), changed_at = clock_timestamp()
        WHERE name = %s
        """,
        [epoch + 1, None if changed is None else Jsonb(changed.document()), name],
    )
    return epoch + 1


def clients(connection: psycopg.Connection[Any], name: str) -> list[RegisteredClient]:
    """Return the clients of a set by name."""
    rows = connection.execute(
        """
        SELECT c.session, c.name, c.acknowledged, c.acknowledged < s.epoch, c.beat, c.lease_s,
               c.registered_at, extract(epoch FROM clock_timestamp() - c.seen_at)::float8
        FROM topology.shard_client AS c JOIN topology.shard_set AS s ON s.name = c.shard_set
        WHERE s.name = %s ORDER BY c.name, c.registered_at
        """,
        [name],
    )
    return [RegisteredClient(*row) for row in rows]


def clients_behind(name: str, awaited: Sequence[RegisteredClient], what: str) -> ClientsBehind:
    """Return the error that names clients which have not done `what`."""
    who = ", ".join(f"{one.name} (last heard of {one.silent_s:.1f} s ago)" for one in awaited)
    return ClientsBehind(
        f"{len(awaited)} client(s) have not {what}: {who}",
        [one.name for one in awaited],
        hint="wait; a client that is gone is passed over when its lease has run out",
        where=f"shard set {name}",
    )


# --- the audit --------------------------------------------------------------------------------

_AUDIT = """
INSERT INTO topology.audit (action, shard_set, resharding, actor, role, from_state, to_state, epoch,
                            attempt, reason, evidence, dag_run, try_number, request)
VALUES (%(action)s, %(shard_set)s, %(resharding)s, %(actor)s, %(role)s, %(from_state)s,
        %(to_state)s, %(epoch)s, %(attempt)s, %(reason)s, %(evidence)s, %(dag_run)s,
        %(try_number)s, %(request)s)
"""


def note(
    connection: psycopg.Connection[Any],
    action: str,
    actor: Actor,
    shard_set: str,
    *,
    resharding: int | None = None,
    from_state: ShardState | None = None,
    to_state: ShardState | None = None,
    epoch: int | None = None,
    attempt: int | None = None,
    reason: str = "",
    evidence: Mapping[str, Any] | None = None,
    request: uuid.UUID | None = None,
) -> None:
    """Write what happens into the audit."""
    connection.execute(
        _AUDIT,
        {
            "action": action,
            "shard_set": shard_set,
            "resharding": resharding,
            "actor": actor.name,
            "role": actor.role,
            "from_state": from_state,
            "to_state": to_state,
            "epoch": epoch,
            "attempt": attempt,
            "reason": without_secrets(reason) or None,
            "evidence": document(evidence),
            "dag_run": actor.dag_run,
            "try_number": actor.try_number,
            "request": request,
        },
    )
