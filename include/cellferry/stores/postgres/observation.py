"""A look at one cell's PostgreSQL, for evidence: where its log stands, what an organization has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from cellferry.model import Cell, Mismatch, Move, Progress
from cellferry.stores.observed import Observed, ObservedPart
from cellferry.stores.postgres import data_map, data_map_file, gate, sessions
from cellferry.stores.postgres.schema import DataMap, Table
from cellferry.stores.postgres.scope import Scope, row_hash
from cellferry.stores.postgres.transactions import snapshot
from cellferry.stores.postgres.verifier import Verifier

KIND = "postgres"

# The timeline is that of the current segment: a checkpoint's may be older after a promotion.
_POSITION = """
SELECT clock_timestamp() AT TIME ZONE 'UTC',
       (SELECT system_identifier::text FROM pg_control_system()),
       CASE WHEN pg_is_in_recovery() THEN (SELECT timeline_id FROM pg_control_checkpoint())
            ELSE ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int END,
       CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
            ELSE pg_current_wal_lsn() END::text,
       pg_is_in_recovery(), current_setting('server_version')
"""


def position(cell: Cell) -> dict[str, Any]:
    """Return where the server of `cell` stands: identity, timeline, LSN, version. Read-only.

    Raises:
        Unreachable, AccessDenied: the server does not answer or refuses.
    """
    with _session(cell) as connection:
        return _position(connection)


def observe(cell: Cell, organization: str, migration: int, data_map_path: Path | None) -> Observed:
    """Count and hash the organization's own rows in `cell`, all in one snapshot. Read-only.

    The hash of a table is that of `Verifier`: equal rows give equal sums in every cell.

    Raises:
        Unreachable, AccessDenied: the server does not answer or refuses.
        UnsupportedSchema: the data map cannot be read from this cell.
    """
    with _session(cell) as connection:
        scope = Scope(_discover(connection, data_map_path), organization)
        with snapshot(connection):
            where = _position(connection)
            parts = tuple(_part(connection, scope, table) for table in scope.tables)
        working = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE %s",
            (f"cellferry:{migration}:%",),
        ).fetchone()
    return Observed("rows", where, parts, int(working[0]) if working else 0)


def compare(
    serving: Cell, kept: Cell, move: Move, data_map_path: Path | None, progress: Progress
) -> tuple[int, int, tuple[Mismatch, ...]] | None:
    """Compare the copy that is kept with the rows of the cell that serves. Read-only.

    What the reverse log of the serving cell names is not a difference: it is to be brought yet.

    Returns:
        Rows compared, how many differ, and examples; None when there is no such log.
    """
    with _session(serving) as ours, _session(kept) as theirs:
        armed = gate.state(ours, move.organization.id)
        if armed is None or not armed.armed:
            return None
        scope = Scope(_discover(ours, data_map_path), move.organization.id)
        _discover(theirs, data_map_path)
        found = Verifier(ours, theirs, scope, move, progress).run()
    return found.compared, found.mismatch_count, found.mismatches


@contextmanager
def _session(cell: Cell) -> Iterator[psycopg.Connection[Any]]:
    where = f"{cell.name}/{KIND}"
    connection = sessions.connect(
        cell.stores[KIND].url, purpose="evidence", autocommit=True, where=where
    )
    try:
        with sessions.translate_errors(where):
            yield connection
    finally:
        connection.close()


def _discover(connection: psycopg.Connection[Any], path: Path | None) -> DataMap:
    """Read the data map, and let operators of the application's types be found, as a move does."""
    found = data_map.discover(connection, data_map_file.load(path) if path else None)
    data_map.require_supported(found)
    connection.execute(
        sql.SQL("SET search_path = pg_catalog, {}").format(
            sql.SQL(", ").join(map(sql.Identifier, found.search_path))
        )
    )
    return found


def _position(connection: psycopg.Connection[Any]) -> dict[str, Any]:
    row = connection.execute(_POSITION).fetchone()
    if row is None:
        return {}
    at, system, timeline, lsn, is_standby, version = row
    return {
        "at": f"{at.isoformat()}+00:00",
        "system_identifier": system,
        "timeline": timeline,
        "lsn": lsn,
        "standby": is_standby,
        "version": f"PostgreSQL {version}",
    }


def _part(connection: psycopg.Connection[Any], scope: Scope, table: Table) -> ObservedPart:
    row = connection.execute(
        sql.SQL("SELECT count(*), COALESCE(sum({}), 0)::text FROM {} AS t WHERE {}").format(
            row_hash(table), table.name.identifier, scope.owned(table)
        )
    ).fetchone()
    count, digest = row or (0, "0")
    return ObservedPart(str(table.name), count, digest)
