"""What the reaper needs of the topology: to be alone, who is silent, and what is known of whom."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg.rows import dict_row

from cellferry.errors import InvalidInput, LeaseLost
from cellferry.model import LIVE_STATES, Actor, Resource, Route, State, Strategy
from cellferry.topology import audit
from cellferry.topology.connection import Database, connect, translated
from cellferry.topology.migrations import load_migration, lose_capture, note_lease

#: One reaper at a time; away from application keys ("cfreap" in hex).
_LOCK_KEY = 0x6366_7265_6170

#: States in which a migration may still own something in a cell, whatever its resources say.
OPEN_STATES = LIVE_STATES | {State.RETAINED, State.CLEANING}

#: States in which writes are captured at the source and the destination is gated, and in which no
#: barrier looks after that itself.
CAPTURED = frozenset({State.SYNCING, State.READY})


@dataclass(frozen=True, slots=True)
class Known:
    """A migration as the reaper sees it.

    Attributes:
        silent_s: seconds since its holder was last heard of, on the topology's clock. A moment
            that has not come, after the clock was set back, counts as one so long ago.
        resources: what it intended and has not forgotten.
    """

    id: int
    organization: str
    slug: str
    source: str
    destination: str
    state: State
    epoch: int
    attempt: int
    strategy: Strategy
    handed_over: bool
    handed_back: bool
    capture_lost: bool
    silent_s: float
    resources: frozenset[Resource] = frozenset()

    @property
    def owns(self) -> bool:
        """Whether what it made in cells is still its own to use or to remove."""
        return self.state in OPEN_STATES or (
            self.state in {State.ABORTED, State.ROLLED_BACK} and bool(self.resources)
        )


@dataclass(frozen=True, slots=True)
class Standings:
    """What the topology knows of the migrations and organizations that were asked for."""

    routes: Mapping[str, Route] = field(default_factory=dict)
    migrations: Mapping[int, Known] = field(default_factory=dict)


class Reaping:
    """The part of the topology that the reaper works with."""

    _database: Database

    @contextmanager
    def only_reaper(self, wait_s: float) -> Iterator[bool]:
        """Hold the reaper's lock; gives False when another has it for `wait_s` seconds.

        The lock is a session's: it ends with this process. Losing it does no harm, because
        whatever a reaper does is a compare-and-set.
        """
        try:
            session = connect(self._database.parameters)
        except psycopg.Error as error:
            raise translated(error, self._database.where) from None
        with session:
            session.autocommit = True
            deadline = time.monotonic() + wait_s
            while True:
                try:
                    row = session.execute("SELECT pg_try_advisory_lock(%s)", [_LOCK_KEY]).fetchone()
                except psycopg.Error as error:
                    raise translated(error, self._database.where) from error
                is_held = row == (True,)
                if is_held or time.monotonic() >= deadline:
                    break
                time.sleep(0.1)
            yield is_held

    def standings(
        self, migrations: Iterable[int] = (), organizations: Iterable[str] = ()
    ) -> Standings:
        """Return every migration that may own something, and those asked for, with the routes."""
        ids, names = sorted(set(migrations)), set(organizations)

        def work(connection: psycopg.Connection[Any]) -> Standings:
            found = _known(connection, ids, everything=True)
            routes = _routes(connection, names | {one.organization for one in found})
            return Standings(routes, {one.id: one for one in found})

        return self._database.run(work)

    def standing(self, migration_id: int) -> Known | None:
        """Return one migration as it is now; None when there is none with this id."""

        def work(connection: psycopg.Connection[Any]) -> Known | None:
            found = _known(connection, [migration_id], everything=False)
            return found[0] if found else None

        return self._database.run(work)

    def take_over_silent(
        self, migration_id: int, holder: str, actor: Actor, silent_s: float
    ) -> int:
        """Take a lease whose holder was not heard of for `silent_s` seconds; see `take_lease`.

        The question and the answer are one statement: a controller that begins meanwhile keeps it.

        Raises:
            LeaseLost: somebody works on it.
            InvalidInput: there is no such migration.
        """

        def work(connection: psycopg.Connection[Any]) -> int:
            row = connection.execute(
                """
                UPDATE topology.migration
                SET attempt = attempt + 1, holder = %s, taken_at = now(), heartbeat_at = now()
                WHERE id = %s AND abs(extract(epoch FROM clock_timestamp()
                                      - COALESCE(heartbeat_at, created_at))) >= %s
                RETURNING attempt, organization
                """,
                [holder, migration_id, silent_s],
            ).fetchone()
            if row is None:
                raise _busy(connection, migration_id)
            return note_lease(connection, actor, migration_id, holder, *row)

        return self._database.run(work)

    def note_reaped(
        self,
        actor: Actor,
        reason: str,
        *,
        migration: int | None,
        organization: str | None,
        evidence: Mapping[str, Any],
    ) -> None:
        """Write what the reaper did, and why, into the audit."""

        def work(connection: psycopg.Connection[Any]) -> None:
            known = migration is not None and (
                connection.execute(
                    "SELECT FROM topology.migration WHERE id = %s", [migration]
                ).rowcount
                == 1
            )
            audit.write(
                connection,
                "reaped",
                actor,
                migration=migration if known else None,
                organization=organization,
                reason=reason,
                evidence=evidence,
            )

        self._database.run(work)

    def mark_capture_lost(self, migration_id: int, reason: str, actor: Actor) -> bool:
        """Record that changes may have gone by unseen; returns whether that was news.

        One transaction: every older attempt is lost, the fact `capture_lost` is there, and a
        `ready` migration is `syncing` again. `sync` captures anew, compares and repairs.
        """

        def work(connection: psycopg.Connection[Any]) -> bool:
            current = load_migration(connection, migration_id, locked=True)
            if current.facts.get("capture_lost") is not None or current.state not in CAPTURED:
                return False
            row = connection.execute("SELECT clock_timestamp()").fetchone()
            fact = {"reason": reason, "at": row[0] if row else None}
            evidence = {"verb": "marked", "fact": "capture_lost"}
            lose_capture(connection, current, "reaped", "reap", actor, fact, reason, evidence)
            return True

        return self._database.run(work)


def _busy(connection: psycopg.Connection[Any], migration_id: int) -> LeaseLost | InvalidInput:
    row = connection.execute(
        "SELECT holder, organization FROM topology.migration WHERE id = %s", [migration_id]
    ).fetchone()
    if row is None:
        return InvalidInput(f"there is no migration {migration_id}")
    return LeaseLost(
        f"{row[0] or 'somebody'} works on migration {migration_id}",
        organization=row[1],
        hint="nothing to do: it goes on",
    )


def _known(connection: psycopg.Connection[Any], ids: list[int], *, everything: bool) -> list[Known]:
    with connection.cursor(row_factory=dict_row) as cursor:
        cursor.execute(
            """
            SELECT m.id, m.organization, o.slug, m.source, m.destination, m.state, m.epoch,
                   m.attempt, m.strategy,
                   COALESCE((m.facts ->> 'handed_over')::boolean, false) AS handed_over,
                   COALESCE((m.facts ->> 'handed_back')::boolean, false) AS handed_back,
                   m.facts ->> 'capture_lost' IS NOT NULL AS capture_lost,
                   abs(extract(epoch FROM clock_timestamp()
                       - COALESCE(m.heartbeat_at, m.created_at)))::float8 AS silent_s,
                   ARRAY(SELECT ARRAY[r.cell, r.store, r.kind, r.name]
                         FROM topology.resource AS r
                         WHERE r.migration = m.id AND r.forgotten_at IS NULL) AS resources
            FROM topology.migration AS m JOIN topology.organization AS o ON o.id = m.organization
            WHERE m.id = ANY (%(ids)s) OR %(everything)s AND (
                m.state = ANY (%(states)s)
                OR EXISTS (SELECT FROM topology.resource AS r
                           WHERE r.migration = m.id AND r.forgotten_at IS NULL))
            ORDER BY m.id
            """,
            {"ids": ids, "everything": everything, "states": sorted(OPEN_STATES)},
        )
        return [_as_known(row) for row in cursor]


def _as_known(row: Mapping[str, Any]) -> Known:
    values = dict(row)
    values["state"] = State(values["state"])
    values["strategy"] = Strategy(values["strategy"])
    values["resources"] = frozenset(Resource(*one) for one in values["resources"])
    return Known(**values)


def _routes(connection: psycopg.Connection[Any], organizations: set[str]) -> dict[str, Route]:
    rows = connection.execute(
        "SELECT organization, cell, epoch FROM topology.route WHERE organization = ANY (%s)",
        [sorted(organizations)],
    )
    return {row[0]: Route(*row) for row in rows}
