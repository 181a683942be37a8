"""Halts: what may not run, since when and why. Sticky: only a person clears one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, LiteralString

import psycopg

from cellferry.errors import Halted, InvalidInput, WrongState
from cellferry.model import Activity, Actor
from cellferry.topology import audit
from cellferry.topology.connection import Database
from cellferry.topology.directory import check_cell_known
from cellferry.topology.document import document, without_secrets

#: For how long samples of a cell's activity are kept, in seconds.
ACTIVITY_KEPT_S = 3_600


class HaltScope(StrEnum):
    """What a halt stops."""

    MIGRATION = "migration"
    """One migration; its name is its number."""
    COHORT = "cohort"
    """Every migration of one wave."""
    CELL = "cell"
    """Every migration from or to one cell."""


@dataclass(frozen=True, slots=True)
class Halt:
    """A halt that is set: what may not run, who says so, since when and why."""

    scope: HaltScope
    name: str
    reason: str
    by: str | None
    at: datetime | None
    """None for one that was set before cellferry kept this time."""
    organization: str | None = None
    """Slug of the organization of a halted migration."""

    @property
    def what(self) -> str:
        """What is halted, in words."""
        if self.scope is HaltScope.MIGRATION:
            return "the migration"
        return f"{self.scope} {self.name}"

    @property
    def remedy(self) -> str:
        """How to clear it."""
        scope, name = self.scope.value, self.name
        if self.scope is HaltScope.MIGRATION:
            scope, name = "organization", self.organization or self.name
        return f"when its cause is gone: cellferry clear-halt {scope} {name} --reason …"

    def error(self, organization: str | None = None) -> Halted:
        """Return the error that stops a step."""
        return Halted(
            f"{self.what} is halted{_by(self.by)}: {self.reason}",
            organization=organization,
            hint=self.remedy,
        )


@dataclass(frozen=True, slots=True)
class CellSample:
    """What the server of a cell had counted at a moment."""

    cell: str
    at: datetime
    counted: Activity


class Halts:
    """The part of the topology that stops things."""

    _database: Database

    def halt(self, scope: HaltScope | str, name: str, reason: str, actor: Actor) -> bool:
        """Halt a migration (by its number), a cohort or a cell. Running steps stop at a batch.

        Sticky: the first reason stays until a person clears the halt; another one that comes
        meanwhile is in the audit.

        Returns:
            Whether this call set it; False when it was set already.

        Raises:
            InvalidInput: there is no such migration, cohort or cell, or no reason is given.
        """
        wanted = _scope(scope)
        shown = _reason(reason, "halt")

        def work(connection: psycopg.Connection[Any]) -> bool:
            return _halt(connection, wanted, name, shown, actor)

        return self._database.run(work)

    def set_halted(self, migration_id: int, reason: str, actor: Actor) -> bool:
        """Halt one migration; see `halt`."""
        return self.halt(HaltScope.MIGRATION, str(migration_id), reason, actor)

    def clear_halt(
        self, scope: HaltScope | str, name: str, reason: str, actor: Actor
    ) -> Halt | None:
        """Clear a halt, which only a person should do. Of two at once, one clears it.

        The failures of a cohort are counted anew from here on.

        Returns:
            The halt that was cleared; None when there was none.

        Raises:
            InvalidInput: there is no such migration, cohort or cell, or no reason is given.
        """
        wanted = _scope(scope)
        shown = _reason(reason, "clear a halt")

        def work(connection: psycopg.Connection[Any]) -> Halt | None:
            _lock(connection, wanted, name)
            found = _read(connection, wanted, name)
            if not found:
                return None
            connection.execute(_CLEAR[wanted], [name])
            if wanted is HaltScope.COHORT:
                connection.execute("DELETE FROM topology.cohort_failure WHERE cohort = %s", [name])
            _note(connection, wanted, name, "halt cleared", shown, actor, found[0].reason)
            return found[0]

        return self._database.run(work)

    def halts(self) -> list[Halt]:
        """Return every halt that is set, the oldest first."""
        return self._database.run(_read)

    def halts_on(self, migration_id: int) -> list[Halt]:
        """Return the halts that stop one migration: its own, its cohort's, its cells'."""
        return self._database.run(lambda connection: halts_on(connection, migration_id))

    def insist_on_start(self, cells: Sequence[str], cohort: str | None) -> None:
        """Return if a migration between `cells` may start.

        Raises:
            Halted: one of them, or the cohort, is halted.
        """
        self._database.run(lambda connection: check_may_start(connection, cells, cohort))

    def note_failure(
        self, migration_id: int, step: str, reason: str, at_most: int, actor: Actor
    ) -> bool:
        """Count a failed migration against its cohort, once however often it fails.

        Args:
            migration_id: the migration that failed.
            step: where.
            reason: why.
            at_most: with so many failed migrations the cohort is halted.
            actor: for the audit.

        Returns:
            Whether the cohort was halted by this one.
        """
        shown = without_secrets(reason)[:1000]

        def work(connection: psycopg.Connection[Any]) -> bool:
            cohort = _cohort_of(connection, migration_id)
            if cohort is None:
                return False
            # Locked first: of two that fail at once, the later one counts both.
            _lock(connection, HaltScope.COHORT, cohort)
            connection.execute(
                """
                INSERT INTO topology.cohort_failure (cohort, migration, step, reason)
                VALUES (%s, %s, %s, %s) ON CONFLICT (cohort, migration) DO NOTHING
                """,
                [cohort, migration_id, step, shown],
            )
            failed = connection.execute(
                """
                SELECT o.slug, f.step, f.reason FROM topology.cohort_failure AS f
                JOIN topology.migration AS m ON m.id = f.migration
                JOIN topology.organization AS o ON o.id = m.organization
                WHERE f.cohort = %s ORDER BY f.failed_at, f.migration
                """,
                [cohort],
            ).fetchall()
            if len(failed) < at_most:
                return False
            named = "; ".join(f"{slug} at {where}: {why}" for slug, where, why in failed[-3:])
            text = f"{len(failed)} of its migrations failed, the last: {named}"
            return _halt(connection, HaltScope.COHORT, cohort, text[:4000], actor)

        return self._database.run(work)

    def halt_cohort_of(self, migration_id: int, reason: str, actor: Actor) -> str | None:
        """Halt the cohort of a migration; return its name, None where it has none."""
        shown = _reason(reason, "halt")

        def work(connection: psycopg.Connection[Any]) -> str | None:
            cohort = _cohort_of(connection, migration_id)
            if cohort is not None:
                _halt(connection, HaltScope.COHORT, cohort, shown, actor)
            return cohort

        return self._database.run(work)

    def note_activity(self, cell: str, counted: Activity) -> None:
        """Keep a sample of what a cell's server has counted; old ones go."""

        def work(connection: psycopg.Connection[Any]) -> None:
            connection.execute(
                "INSERT INTO topology.cell_activity (cell, counted) VALUES (%s, %s)",
                [cell, document(_counters(counted))],
            )
            connection.execute(
                """
                DELETE FROM topology.cell_activity
                WHERE taken_at < clock_timestamp() - make_interval(secs => %s)
                """,
                [ACTIVITY_KEPT_S],
            )

        self._database.run(work)

    def activity_before(self, cell: str, seconds: float) -> CellSample | None:
        """Return the newest sample of a cell that is at least `seconds` old."""

        def work(connection: psycopg.Connection[Any]) -> CellSample | None:
            row = connection.execute(
                """
                SELECT taken_at, counted FROM topology.cell_activity
                WHERE cell = %s AND taken_at <= clock_timestamp() - make_interval(secs => %s)
                ORDER BY taken_at DESC LIMIT 1
                """,
                [cell, seconds],
            ).fetchone()
            return None if row is None else CellSample(cell, row[0], Activity(**row[1]))

        return self._database.run(work)


_SET: Mapping[HaltScope, LiteralString] = {
    HaltScope.MIGRATION: """
        UPDATE topology.migration
        SET halted = %s, halted_by = %s, halted_at = clock_timestamp(), updated_at = now()
        WHERE id = %s::bigint AND halted IS NULL
    """,
    HaltScope.COHORT: """
        UPDATE topology.cohort SET halted = %s, halted_by = %s, halted_at = clock_timestamp()
        WHERE name = %s AND halted IS NULL
    """,
    HaltScope.CELL: """
        UPDATE topology.cell SET halted = %s, halted_by = %s, halted_at = clock_timestamp()
        WHERE name = %s AND halted IS NULL
    """,
}
_CLEAR: Mapping[HaltScope, LiteralString] = {
    HaltScope.MIGRATION: """
        UPDATE topology.migration
        SET halted = NULL, halted_by = NULL, halted_at = NULL, updated_at = now()
        WHERE id = %s::bigint
    """,
    HaltScope.COHORT: """
        UPDATE topology.cohort SET halted = NULL, halted_by = NULL, halted_at = NULL
        WHERE name = %s
    """,
    HaltScope.CELL: """
        UPDATE topology.cell SET halted = NULL, halted_by = NULL, halted_at = NULL
        WHERE name = %s
    """,
}
_READ: LiteralString = """
SELECT h.scope, h.name, h.reason, h.halted_by, h.halted_at, o.slug
FROM topology.halt AS h
LEFT JOIN topology.migration AS m ON h.scope = 'migration' AND m.id::text = h.name
LEFT JOIN topology.organization AS o ON o.id = m.organization
WHERE (%(scope)s::text IS NULL OR (h.scope, h.name) = (%(scope)s, %(name)s))
ORDER BY h.halted_at NULLS FIRST, h.scope, h.name
"""
#: The narrowest scope comes first.
_READ_FOR_ONE: LiteralString = """
SELECT h.scope, h.name, h.reason, h.halted_by, h.halted_at, o.slug
FROM topology.migration AS m
JOIN topology.organization AS o ON o.id = m.organization
JOIN topology.halt AS h ON (h.scope = 'migration' AND h.name = m.id::text)
    OR (h.scope = 'cohort' AND h.name = m.cohort)
    OR (h.scope = 'cell' AND h.name IN (m.source, m.destination))
WHERE m.id = %s
ORDER BY h.scope DESC, h.name
"""


def halts_on(connection: psycopg.Connection[Any], migration_id: int) -> list[Halt]:
    """See `Halts.halts_on`; inside the caller's transaction."""
    return [_halt_of(row) for row in connection.execute(_READ_FOR_ONE, [migration_id])]


def check_may_start(
    connection: psycopg.Connection[Any], cells: Sequence[str], cohort: str | None
) -> None:
    """See `Halts.insist_on_start`; inside the caller's transaction."""
    row = connection.execute(
        """
        SELECT h.scope, h.name, h.reason, h.halted_by, h.halted_at, NULL
        FROM topology.halt AS h
        WHERE (h.scope = 'cohort' AND h.name = %s) OR (h.scope = 'cell' AND h.name = ANY (%s))
        ORDER BY h.scope DESC, h.name LIMIT 1
        """,
        [cohort, list(cells)],
    ).fetchone()
    if row is not None:
        raise _halt_of(row).error()


def join_cohort(connection: psycopg.Connection[Any], cohort: str | None) -> None:
    """Make a cohort known before a migration refers to it.

    Raises:
        InvalidInput: its name is empty.
    """
    if cohort is None:
        return
    if not cohort.strip():
        raise InvalidInput("a cohort needs a name", hint="leave it out for a move of its own")
    connection.execute(
        "INSERT INTO topology.cohort (name) VALUES (%s) ON CONFLICT (name) DO NOTHING", [cohort]
    )


def halt_migration(
    connection: psycopg.Connection[Any], migration_id: int, reason: str, actor: Actor
) -> None:
    """Halt one migration inside the caller's transaction; see `Halts.halt`."""
    _halt(connection, HaltScope.MIGRATION, str(migration_id), _reason(reason, "halt"), actor)


def _halt(
    connection: psycopg.Connection[Any], scope: HaltScope, name: str, reason: str, actor: Actor
) -> bool:
    _lock(connection, scope, name)
    changed = connection.execute(_SET[scope], [reason, actor.name, name]).rowcount == 1
    earlier = None if changed else _read(connection, scope, name)[0].reason
    if earlier != reason:
        action = "halted" if changed else "halted again"
        _note(connection, scope, name, action, reason, actor, earlier)
    return changed


def _lock(connection: psycopg.Connection[Any], scope: HaltScope, name: str) -> None:
    """Lock what is or will be halted.

    Raises:
        InvalidInput: there is no such thing.
    """
    if scope is HaltScope.CELL:
        check_cell_known(connection, name)
        connection.execute("SELECT FROM topology.cell WHERE name = %s FOR UPDATE", [name])
    elif scope is HaltScope.COHORT:
        found = connection.execute(
            "SELECT FROM topology.cohort WHERE name = %s FOR UPDATE", [name]
        ).rowcount
        if not found:
            names = [
                known
                for (known,) in connection.execute(
                    "SELECT name FROM topology.cohort ORDER BY created_at DESC LIMIT 1000"
                )
            ]
            near = difflib.get_close_matches(name, names, n=3) or names[:3]
            raise InvalidInput(
                f"there is no cohort {name!r}",
                hint=f"did you mean {' or '.join(near)}?" if near else "no migration has one yet",
            )
    else:
        number = int(name) if name.isascii() and name.isdecimal() and len(name) < 19 else 0
        found = connection.execute(
            "SELECT FROM topology.migration WHERE id = %s FOR UPDATE", [number]
        ).rowcount
        if not found:
            raise InvalidInput(f"there is no migration {name}")


def _read(
    connection: psycopg.Connection[Any], scope: HaltScope | None = None, name: str | None = None
) -> list[Halt]:
    rows = connection.execute(_READ, {"scope": scope, "name": name})
    return [_halt_of(row) for row in rows]


def _halt_of(row: Sequence[Any]) -> Halt:
    scope, name, reason, by, at, organization = row
    return Halt(HaltScope(scope), name, reason, by, at, organization)


def _note(
    connection: psycopg.Connection[Any],
    scope: HaltScope,
    name: str,
    action: str,
    reason: str,
    actor: Actor,
    earlier: str | None,
) -> None:
    evidence = {"earlier": earlier} if earlier else {}
    if scope is not HaltScope.MIGRATION:
        evidence = {scope.value: name, **evidence}
        audit.write(connection, f"{scope} {action}", actor, reason=reason, evidence=evidence)
        return
    row = connection.execute(
        "SELECT organization, epoch, attempt FROM topology.migration WHERE id = %s::bigint", [name]
    ).fetchone()
    if row is None:
        raise WrongState(f"migration {name} is gone")
    organization, epoch, attempt = row
    audit.write(
        connection,
        action,
        actor,
        migration=int(name),
        organization=organization,
        epoch=epoch,
        attempt=attempt,
        reason=reason,
        evidence=evidence,
    )


def _cohort_of(connection: psycopg.Connection[Any], migration_id: int) -> str | None:
    row = connection.execute(
        "SELECT cohort FROM topology.migration WHERE id = %s", [migration_id]
    ).fetchone()
    if row is None:
        raise InvalidInput(f"there is no migration {migration_id}")
    return None if row[0] is None else str(row[0])


def _counters(counted: Activity) -> dict[str, int]:
    return {
        "commits": counted.commits,
        "rollbacks": counted.rollbacks,
        "deadlocks": counted.deadlocks,
        "conflicts": counted.conflicts,
    }


def _scope(scope: HaltScope | str) -> HaltScope:
    try:
        return HaltScope(scope)
    except ValueError:
        raise InvalidInput(
            f"there is no scope {scope!r}", hint=f"choose one of {', '.join(HaltScope)}"
        ) from None


def _reason(reason: str, what: str) -> str:
    shown = without_secrets(reason or "").strip()
    if not shown:
        raise InvalidInput(f"to {what} needs a reason", hint="say why; it goes into the audit")
    return shown[:4000]


def _by(name: str | None) -> str:
    return f" by {name}" if name else ""
