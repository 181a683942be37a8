"""Two real cells and a topology: one large organization between 49 others, ready to move.

`BenchCells.made(bench, rows)` starts three servers, fills both cells, and prepares them for
cellferry. The large organization lives in cell-1, interleaved row by row with 49 others; cell-2
holds 20 others already. Steps run as the library runs them, without Airflow:

    cells = BenchCells.made(bench, bench.size(2_000_000))
    migration = cells.plan()
    for step in ("copy", "sync", "verify", "cutover"):
        cells.run(step, migration)

`remember` and `restore` bring the destination and the topology back to what they were, at once,
so that each contender finds the same state.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from tests.bench.harness import Bench, Meter, pid_of

from cellferry import settings
from cellferry.local.postgres_server import PostgresServer
from cellferry.migration import Context, MoveOptions, steps
from cellferry.migration.result import StepResult
from cellferry.model import Actor, Organization

SOURCE, DESTINATION = "cell-1", "cell-2"
DATABASE = "application"
TOPOLOGY = "topology"
LARGE = 1
"""Key of the organization that moves; those beside it in cell-1 are 2 to 50."""
SOURCE_OTHERS = range(2, 51)
DESTINATION_OTHERS = range(101, 121)
MOVER, APPLICATION = "mover", "app"
_PASSWORD = "bench"  # of servers that live for one run, on loopback
_ACTOR = Actor("bench", role="system")
_HERE = Path(__file__).parent
_MEMORY = "_remembered"

#: Ids in cell n begin at n times this: they never collide.
RANGE = 1_000_000_000_000

#: Share of the rows that each table has.
SHARES: Mapping[str, float] = {
    "projects": 0.001,
    "labels": 0.004,
    "milestones": 0.002,
    "users": 0.005,
    "issues": 0.13,
    "comments": 0.29,
    "label_links": 0.10,
    "reactions": 0.08,
    "time_entries": 0.07,
    "merge_requests": 0.04,
    "merge_request_files": 0.07,
    "attachments": 0.02,
    "events": 0.16,
    "audit_entries": 0.028,
}

OWNED = (
    "organizations", "memberships", "projects", "labels", "milestones", "issues", "comments",
    "label_links", "reactions", "time_entries", "merge_requests", "merge_request_files",
    "attachments", "events", "audit_entries",
)  # fmt: skip
"""Tables whose rows are an organization's, each after those that it refers to."""

_PATHS: Mapping[str, str] = {
    "organizations": "t.id = {0}",
    "label_links": "EXISTS (SELECT FROM issues AS p WHERE p.id = t.issue_id"
    " AND p.organization_id = {0})",
    "merge_request_files": "EXISTS (SELECT FROM merge_requests AS p"
    " WHERE p.id = t.merge_request_id AND p.organization_id = {0})",
    "users": "t.id IN (SELECT m.user_id FROM memberships AS m WHERE m.organization_id = {0})",
}

_DATA_MAP = """
organization: {table: public.organizations, column: id}
placement: {global: [public.plans]}
"""


def condition(table: str, organization: int = LARGE) -> str:
    """Return SQL, written independently of the product: row `t` of `table` is the organization's.

    For `users`, the rows that it refers to.
    """
    return _PATHS.get(table, "t.organization_id = {0}").format(organization)


@dataclass
class BenchCells:
    """Both cells, filled and prepared, and their topology.

    Attributes:
        home: the server of the topology's database.
        rows: how many rows the large organization has, users that it refers to included.
        counts: rows of each table in cell-1, of all organizations.
    """

    source: PostgresServer
    destination: PostgresServer
    home: PostgresServer
    organization: Organization
    connections: dict[str, str]
    settings: settings.Settings
    rows: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def made(
        cls,
        bench: Bench,
        rows: int,
        *,
        settings_of: Mapping[str, Any] | None = None,
        neighbours: bool = True,
    ) -> BenchCells:
        """Start, fill and prepare both cells.

        Args:
            rows: about so many rows of the large organization.
            settings_of: PostgreSQL settings of both cells, over the bench's.
            neighbours: False leaves the large organization alone in its cell.
        """
        source = bench.postgres("source", settings_of)
        destination = bench.postgres("destination", settings_of)
        home = bench.postgres("topology", {"shared_buffers": "64MB", "wal_level": "replica"})
        connections = {"cellferry-topology": home.url(dbname=TOPOLOGY)}
        for cell, server in ((SOURCE, source), (DESTINATION, destination)):
            connections[f"{cell}-postgres"] = server.url(MOVER, _PASSWORD, DATABASE)
            connections[f"{cell}-postgres-admin"] = server.url(dbname=DATABASE)
        found = cls(
            source, destination, home, Organization(str(LARGE), "large"), connections,
            _settings(bench.root),
        )  # fmt: skip
        began = time.perf_counter()
        total = rows * 4 // 3 if neighbours else rows
        with ThreadPoolExecutor(2) as pool:
            here = pool.submit(_fill, source, 1, total, LARGE, SOURCE_OTHERS if neighbours else ())
            there = pool.submit(_fill, destination, 2, total // 4, None, DESTINATION_OTHERS)
            found.counts = here.result()
            there.result()
        with psycopg.connect(home.url(), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(TOPOLOGY)))
        with found.context() as context:
            context.topology.install()
            for cell in (SOURCE, DESTINATION):
                steps.prepare_cell(context, cell)
            for key in (LARGE, *(SOURCE_OTHERS if neighbours else ())):
                known = found.organization if key == LARGE else Organization(str(key), f"org-{key}")
                context.topology.register_organization(known, SOURCE, _ACTOR)
            for key in DESTINATION_OTHERS:
                context.topology.register_organization(
                    Organization(str(key), f"org-{key}"), DESTINATION, _ACTOR
                )
        found.rows = sum(found.count(SOURCE).values())
        bench.say(f"filled both cells in {time.perf_counter() - began:.0f} s, {found.rows:,} rows")
        return found

    # ── who connects ────────────────────────────────────────────────────────────────────────────

    def server(self, cell: str) -> PostgresServer:
        """Return the server of `cell`."""
        return self.source if cell == SOURCE else self.destination

    def admin(self, cell: str) -> psycopg.Connection[Any]:
        """Connect as the superuser, in autocommit mode."""
        return psycopg.connect(self.connections[f"{cell}-postgres-admin"], autocommit=True)

    def application(self, cell: str, **arguments: Any) -> psycopg.Connection[Any]:
        """Connect as the application, whose writes pass the gate."""
        return psycopg.connect(self.server(cell).url(APPLICATION, _PASSWORD, DATABASE), **arguments)

    @contextmanager
    def context(self) -> Iterator[Context]:
        """Give what the steps need, as each controller has one of its own."""
        with Context.from_settings(self.settings, self.connections.get, actor=_ACTOR) as made:
            yield made

    def meter(self) -> Meter:
        """Return a meter of client, source, destination and topology."""
        servers = {
            "source": self.source, "destination": self.destination, "topology": self.home,
        }  # fmt: skip
        return Meter({name: pid_of(server) for name, server in servers.items()})

    # ── the product's steps ─────────────────────────────────────────────────────────────────────

    def plan(self, organization: str = "large", to: str = DESTINATION, **options: Any) -> int:
        """Record a migration and return its id."""
        chosen = {"strategy": "online", "soak_s": 0, "ttl_s": 0, "route_ttl_s": 0, **options}
        with self.context() as context:
            found = steps.plan(
                context, organization, to, options=MoveOptions(**chosen), record=True
            )
        if found.migration is None:
            raise RuntimeError(f"{organization} cannot move: {found.blockers}")
        return found.migration

    def run(self, step: str, migration: int) -> StepResult:
        """Run `copy`, `sync`, `verify`, `cutover`, `soak`, `cleanup` or `abort`."""
        with self.context() as context:
            if step == "abort":
                return steps.abort(context, migration, "the bench goes on")
            found: StepResult = getattr(steps, step)(context, migration)
            return found

    # ── rows ────────────────────────────────────────────────────────────────────────────────────

    def count(self, cell: str, organization: int = LARGE) -> dict[str, int]:
        """Count an organization's rows and the users that it refers to, by table."""
        with self.admin(cell) as connection:
            return {
                table: _one(
                    connection,
                    f"SELECT count(*) FROM {table} AS t WHERE {condition(table, organization)}",
                )
                for table in (*OWNED, "users")
            }

    def remember(self) -> None:
        """Keep the destination and the topology as they are now, for `restore`."""
        for server, database in ((self.destination, DATABASE), (self.home, TOPOLOGY)):
            _copy_database(server, database, database + _MEMORY)

    def restore(self, *, vacuum: bool = False) -> None:
        """Bring the destination and the topology back, and forget every move at the source.

        Ends with a checkpoint everywhere, so that no contender writes another's pages.
        """
        for server, database in ((self.destination, DATABASE), (self.home, TOPOLOGY)):
            _copy_database(server, database + _MEMORY, database)
        with self.admin(SOURCE) as connection:
            connection.execute(
                "TRUNCATE cellferry.gate, cellferry.key_log, cellferry.lease,"
                " cellferry.checkpoint, cellferry.imported_row"
            )
            if vacuum:
                connection.execute("VACUUM ANALYZE")
            connection.execute("CHECKPOINT")
        with self.admin(DESTINATION) as connection:
            connection.execute("CHECKPOINT")


def _settings(root: Path) -> settings.Settings:
    (root / "map.yaml").write_text(_DATA_MAP, encoding="utf-8")
    cells = {
        cell: {
            "stores": {
                "postgres": {
                    "connection": f"{cell}-postgres",
                    "admin_connection": f"{cell}-postgres-admin",
                }
            }
        }
        for cell in (SOURCE, DESTINATION)
    }
    document = {"organization": {"data_map": "map.yaml"}, "cells": cells}
    (root / "cells.yaml").write_text(json.dumps(document), encoding="utf-8")
    return settings.load(root / "cells.yaml")


def _fill(
    server: PostgresServer, number: int, total: int, large: int | None, others: range | tuple[()]
) -> Mapping[str, int]:
    """Make one cell's database with about `total` rows; return the rows of each table."""
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
        for role in (MOVER, APPLICATION):
            connection.execute(
                sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(
                    sql.Identifier(role), sql.Literal(_PASSWORD)
                )
            )
    owner, period = _owner(large, others)
    counts = {
        table: max(period, round(total * share / period) * period)
        for table, share in SHARES.items()
    }
    base = number * RANGE + 1
    with psycopg.connect(server.url(dbname=DATABASE), autocommit=True) as connection:
        connection.execute("SET synchronous_commit = off")
        connection.execute("SET maintenance_work_mem = '256MB'")
        connection.execute("SET max_parallel_maintenance_workers = 0")
        connection.execute(_script("cells_tables.sql"))
        connection.execute(
            "CREATE FUNCTION pg_temp.owner(i bigint) RETURNS bigint LANGUAGE sql IMMUTABLE"
            f" AS $$ SELECT ({owner})::bigint $$"
        )
        rows = _script("cells_rows.sql")
        for name, value in {**counts, "base": base, "period": period}.items():
            rows = rows.replace(f"{{{name}}}", f"{value}::bigint")
        connection.execute(rows)
        connection.execute(_script("cells_keys.sql"))
        for (sequence,) in connection.execute(
            "SELECT sequencename::text FROM pg_sequences WHERE schemaname = 'public'"
        ).fetchall():
            connection.execute(
                sql.SQL("ALTER SEQUENCE {} MINVALUE {} MAXVALUE {} START {} RESTART {}").format(
                    sql.Identifier(sequence),
                    *map(sql.Literal, (base, base + RANGE - 1, base, base + RANGE // 2)),
                )
            )
        connection.execute(
            f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {APPLICATION};"
            f" GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {APPLICATION}"
        )
        connection.execute("VACUUM ANALYZE")
        connection.execute("CHECKPOINT")
    return counts


def _owner(large: int | None, others: range | tuple[()]) -> tuple[str, int]:
    """Return whose row i is, and after how many rows that repeats. The large one has 3 of 4."""
    if not others:
        return str(large), 1
    if large is None:
        return f"{others[0]} + i % {len(others)}", len(others)
    small = f"{others[0]} + i / 4 % {len(others)}"
    return f"CASE WHEN i % 4 < 3 THEN {large} ELSE {small} END", 4 * len(others)


def _script(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _one(connection: psycopg.Connection[Any], statement: str) -> int:
    row = connection.execute(statement.encode()).fetchone()
    return int(row[0]) if row else 0


def _copy_database(server: PostgresServer, template: str, name: str) -> None:
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute(
            sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
        )
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s",
            (template,),
        )
        connection.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )
