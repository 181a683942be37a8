"""The same move by two scripts: freeze, dump and load; and native logical replication.

Both in their sensible best form: every session is open before anybody waits, the fence is exact
(an advisory lock that each transaction of the application shares, and a row that says where the
organization went), the route is changed in the table that the application's route client hears of,
and the new cell's side is opened before. Users were brought before anybody was stopped. They are
not crash-safe, and nothing verifies what they moved while writers wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import psycopg
import yaml
from psycopg import sql
from tests.bench.cells import DATABASE, DESTINATION, LARGE, OWNED, SOURCE, BenchCells

#: The application's fence. A transaction shares the lock to its end, then looks who has authority.
FENCE = """
CREATE TABLE bench_fence (organization bigint PRIMARY KEY, cell text, epoch bigint);
CREATE FUNCTION bench_enter(wanted bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    gone bench_fence;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(4711, wanted::int);
    SELECT * INTO gone FROM bench_fence WHERE organization = wanted;
    IF FOUND THEN
        RAISE EXCEPTION 'organization % has moved', wanted USING ERRCODE = 'CF001',
            DETAIL = json_build_object('organization', wanted::text, 'cell', gone.cell,
                                       'epoch', gone.epoch)::text;
    END IF;
END $$;
GRANT ALL ON bench_fence TO app;
"""
ENTER = "SELECT bench_enter(%s::bigint), %s::bigint"

#: Their rows have no column that a publication's row filter could name; the bench has none.
UNFILTERED = ("label_links", "merge_request_files")
TABLES = tuple(table for table in OWNED if table not in UNFILTERED)
_POLL_S = 0.001

STEPS = ("fence", "bring what is left", "flip", "note and open")
"""What a script does while its writers wait."""


@dataclass
class Scripts:
    """Moves the large organization to and fro, without the product.

    Attributes:
        flips: when each changed the route, seconds since 1970.
        fenced: the seconds of each one's `STEPS`.
    """

    cells: BenchCells
    flips: list[float] = field(default_factory=list)
    fenced: list[list[float]] = field(default_factory=list)

    def prepare(self) -> None:
        """Make the fence, and what a row filter asks of the tables, in both cells."""
        data_map = self.cells.settings.organization.data_map
        if data_map is None:
            raise RuntimeError("the bench's cells have no data map")
        map_of = yaml.safe_load(data_map.read_text(encoding="utf-8"))
        map_of["placement"]["cell-local"] = ["public.bench_fence"]
        data_map.write_text(yaml.safe_dump(map_of), encoding="utf-8")
        for cell in (SOURCE, DESTINATION):
            with self.cells.admin(cell) as connection:
                connection.execute(FENCE)
                for table in UNFILTERED:
                    connection.execute(f"TRUNCATE {table}".encode())
                for table, key in _keys(connection).items():
                    if "organization_id" in key or table == "organizations":
                        continue
                    # 42P10 otherwise: an UPDATE of a published table fails where the filter's
                    # column is not part of the replica identity.
                    columns = sql.SQL(", ").join(map(sql.Identifier, ("organization_id", *key)))
                    index = sql.Identifier(f"{table}_identity")
                    name = sql.Identifier(table)
                    connection.execute(
                        sql.SQL("CREATE UNIQUE INDEX {} ON {} ({})").format(index, name, columns)
                    )
                    connection.execute(
                        sql.SQL("ALTER TABLE {} REPLICA IDENTITY USING INDEX {}").format(
                            name, index
                        )
                    )
                connection.execute(
                    sql.SQL("CREATE PUBLICATION bench FOR TABLE {}").format(
                        sql.SQL(", ").join(
                            sql.SQL("{} WHERE ({} = {})").format(
                                sql.Identifier(table),
                                sql.Identifier(
                                    "id" if table == "organizations" else "organization_id"
                                ),
                                sql.Literal(LARGE),
                            )
                            for table in TABLES
                        )
                    )
                )
        self._bring_users()

    def by_replication(self, here: str, there: str, *, durable_apply: bool) -> None:
        """Subscribe, catch up, fence, wait for the LSN, flip, resume."""
        with self.cells.admin(here) as source, self.cells.admin(there) as destination:
            destination.execute(
                sql.SQL(
                    "CREATE SUBSCRIPTION bench CONNECTION {} PUBLICATION bench"
                    " WITH (copy_data, binary, synchronous_commit = {})"
                ).format(
                    sql.Literal(self.cells.server(here).url(dbname=DATABASE)),
                    sql.Literal("on" if durable_apply else "off"),
                )
            )
            try:
                _wait(
                    destination,
                    "SELECT NOT EXISTS (SELECT FROM pg_subscription_rel WHERE srsubstate <> 'r')",
                    poll_s=0.05,
                )
                _wait(source, _CONFIRMED, _position(source))

                def catch_up() -> None:
                    _wait(source, _CONFIRMED, _position(source))

                self._change_hands(source, here, there, catch_up)
            finally:
                destination.execute("DROP SUBSCRIPTION bench")
            _delete(source)

    def by_dump(self, here: str, there: str) -> None:
        """Fence, copy everything, flip, resume."""
        with (
            self.cells.admin(here) as source,
            self.cells.admin(there) as destination,
        ):
            destination.execute("SET session_replication_role = replica")

            def copy() -> None:
                with destination.transaction():
                    for table in TABLES:
                        _copy(source, destination, table)

            self._change_hands(source, here, there, copy)
            _delete(source)

    def _change_hands(
        self,
        source: psycopg.Connection[Any],
        here: str,
        there: str,
        bring: Callable[[], None],
    ) -> None:
        with (
            self.cells.admin(there) as opening,
            psycopg.connect(self.cells.connections["cellferry-topology"]) as topology,
        ):
            epoch = _one(
                topology, "SELECT epoch FROM topology.route WHERE organization = %s", str(LARGE)
            )
            topology.commit()
            opening.execute("DELETE FROM bench_fence WHERE organization = %s", (LARGE,))
            marks = [time.perf_counter()]
            source.execute("SELECT pg_advisory_lock(4711, %s)", (LARGE,))
            marks.append(time.perf_counter())
            try:
                bring()
                marks.append(time.perf_counter())
                topology.execute(
                    "UPDATE topology.route SET cell = %s, epoch = epoch + 1, actor = 'script',"
                    " migration = NULL, changed_at = clock_timestamp() WHERE organization = %s",
                    (there, str(LARGE)),
                )
                topology.commit()
                self.flips.append(time.time())
                marks.append(time.perf_counter())
                source.execute(
                    "INSERT INTO bench_fence VALUES (%s, %s, %s)", (LARGE, there, epoch + 1)
                )
            finally:
                source.execute("SELECT pg_advisory_unlock(4711, %s)", (LARGE,))
            marks.append(time.perf_counter())
            self.fenced.append([later - mark for mark, later in pairwise(marks)])

    def _bring_users(self) -> None:
        with self.cells.admin(SOURCE) as source, self.cells.admin(DESTINATION) as destination:
            rows = source.execute(
                "SELECT u.* FROM users AS u WHERE EXISTS (SELECT FROM memberships AS m"
                " WHERE m.user_id = u.id AND m.organization_id = %s)",
                (LARGE,),
            ).fetchall()
            destination.cursor().executemany(
                "INSERT INTO users OVERRIDING SYSTEM VALUE VALUES (%s, %s, %s, %s)"
                " ON CONFLICT DO NOTHING",
                rows,
            )


_CONFIRMED = (
    "SELECT COALESCE(bool_and(confirmed_flush_lsn >= %s), false) FROM pg_replication_slots"
    " WHERE slot_name = 'bench'"
)


def _position(source: psycopg.Connection[Any]) -> str:
    return str(_one(source, "SELECT pg_current_wal_lsn()::text"))


def _wait(
    connection: psycopg.Connection[Any],
    question: str,
    *values: Any,
    poll_s: float = _POLL_S,
    deadline_s: float = 120.0,
) -> None:
    deadline = time.monotonic() + deadline_s
    while not _one(connection, question, *values):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {deadline_s:.0f} s: {question}")
        time.sleep(poll_s)


def _one(connection: psycopg.Connection[Any], statement: str, *values: Any) -> Any:
    row = connection.execute(statement.encode(), values or None).fetchone()
    return None if row is None else row[0]


def _keys(connection: psycopg.Connection[Any]) -> Mapping[str, list[str]]:
    """Return the primary keys of the tables that the scripts move."""
    return dict(
        connection.execute(
            "SELECT c.relname::text, array_agg(a.attname::text ORDER BY a.attnum)"
            " FROM pg_index AS i"
            " JOIN pg_class AS c ON c.oid = i.indrelid"
            " JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum = ANY(i.indkey)"
            " WHERE i.indisprimary AND c.relname = ANY(%s) GROUP BY c.relname",
            (list(TABLES),),
        )
    )


def _whose(table: str) -> sql.Composed:
    column = "id" if table == "organizations" else "organization_id"
    return sql.SQL("{} = {}").format(sql.Identifier(column), sql.Literal(LARGE))


def _copy(
    source: psycopg.Connection[Any], destination: psycopg.Connection[Any], table: str
) -> None:
    name = sql.Identifier(table)
    with (
        source.cursor().copy(
            sql.SQL("COPY (SELECT * FROM {} WHERE {}) TO STDOUT (FORMAT binary)").format(
                name, _whose(table)
            )
        ) as out,
        destination.cursor().copy(
            sql.SQL("COPY {} FROM STDIN (FORMAT binary)").format(name)
        ) as into,
    ):
        for piece in out:
            into.write(piece)


def _delete(connection: psycopg.Connection[Any]) -> None:
    """Remove the copy that was left behind."""
    connection.execute("SET session_replication_role = replica")
    with connection.transaction():
        for table in reversed(TABLES):
            connection.execute(
                sql.SQL("DELETE FROM {} WHERE {}").format(sql.Identifier(table), _whose(table))
            )
