"""Preparing a cell: complete, repeatable, unnoticed by production, and gone without trace."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from psycopg import sql

from cellferry.errors import AccessDenied, Blocked, NotPrepared, TransientError
from cellferry.local.postgres_server import PostgresServer
from cellferry.model import Cell, Endpoint
from cellferry.stores.postgres import data_map, prepare, sessions
from cellferry.stores.postgres.prepare import Patience
from fixtures.ferry import Quiet
from fixtures.gated import GATED_SCHEMA, GatedCell
from fixtures.postgres import FreshDatabases, postgres_versions

PATIENCE = Patience(attempt_s=0.1, deadline_s=200.0, rest_s=0.3)


@dataclass
class Unprepared:
    """A database with the schema, a role for the mover, and nothing of ours yet."""

    url: str
    server: PostgresServer
    mover: str
    cell: Cell = field(init=False)

    def __post_init__(self) -> None:
        name = psycopg.conninfo.conninfo_to_dict(self.url)["dbname"]
        mover_url = self.server.url(self.mover, "mover", str(name))
        self.cell = Cell("cell-1", {"postgres": Endpoint(url=mover_url, admin_url=self.url)})

    @contextmanager
    def admin(self, url: str | None = None) -> Iterator[psycopg.Connection[Any]]:
        with sessions.connect(url or self.url, purpose="prepare", autocommit=True) as connection:
            yield connection

    def prepare(self, patience: Patience = PATIENCE, url: str | None = None) -> dict[str, Any]:
        with self.admin(url) as connection:
            found = data_map.discover(connection, None)
            return dict(prepare.prepare(connection, found, self.cell, Quiet(), patience))

    def unprepare(self, patience: Patience = PATIENCE) -> None:
        with self.admin() as connection:
            prepare.unprepare(connection, self.cell, Quiet(), patience)

    def missing(self) -> list[str]:
        """What the mover itself finds missing."""
        with self.admin(self.cell.stores["postgres"].url) as connection:
            return prepare.is_prepared(connection, data_map.discover(connection, None))

    def run(self, statement: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description is not None else []

    def dump(self) -> list[str]:
        """The whole schema with its grants, and the roles, as pg_dump and pg_dumpall have it."""
        lines = []
        for program, *options in (
            ("pg_dump", "--schema-only", "--dbname", self.url),
            ("pg_dumpall", "--roles-only", "--no-role-passwords", "--dbname", self.server.url()),
        ):
            done = subprocess.run(
                [self.server.bin_dir / program, *options],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            lines += [
                line
                for line in done.stdout.splitlines()
                if line and not line.startswith(("--", "\\restrict", "\\unrestrict"))
            ]
        parameters = self.run("SELECT parname, paracl::text FROM pg_parameter_acl")
        databases = self.run(
            "SELECT datacl::text FROM pg_database WHERE datname = current_database()"
        )
        return [*lines, *(f"{parameters}"), *(f"{databases}")]


@pytest.fixture
def unprepared(fresh_databases: Callable[[], FreshDatabases]) -> Iterator[Unprepared]:
    databases = fresh_databases()
    mover = f"mover_{databases.suffix}"
    made = Unprepared(databases.source, databases.source_server, mover)
    with psycopg.connect(made.url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {mover} LOGIN PASSWORD 'mover'".encode())
        connection.execute(GATED_SCHEMA.encode())
    yield made
    with psycopg.connect(made.url, autocommit=True) as connection:
        connection.execute(f"DROP OWNED BY {mover}".encode())
        connection.execute(f"DROP ROLE {mover}".encode())


@postgres_versions
def test_what_was_prepared_is_taken_out_without_trace(unprepared: Unprepared) -> None:
    unprepared.run(f"GRANT SELECT ON users TO {unprepared.mover}")
    before = unprepared.dump()

    unprepared.prepare()
    assert unprepared.dump() != before
    assert unprepared.missing() == []
    unprepared.unprepare()

    assert unprepared.dump() == before, "grants that were there before stay"
    unprepared.unprepare()


def test_a_second_preparation_touches_nothing(unprepared: Unprepared) -> None:
    query = (
        "SELECT 'trigger', oid, xmin FROM pg_trigger UNION ALL SELECT 'function', oid, xmin"
        " FROM pg_proc WHERE pronamespace = 'cellferry'::regnamespace UNION ALL"
        " SELECT 'table', oid, xmin FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        " ORDER BY 1, 2"
    )
    first = unprepared.prepare()
    before = unprepared.run(query)

    second = unprepared.prepare()

    assert unprepared.run(query) == before
    assert (second["tables gated"], second["grants made"]) == (0, 0)
    assert second["tables right already"] == first["tables gated"] == 10


def test_nothing_is_taken_out_under_a_gated_organization(gated: GatedCell) -> None:
    gated.arm()

    with pytest.raises(Blocked, match=r"1 \(open, migration 1\)"):
        prepare.unprepare(gated.admin(), gated.cell, Quiet())


# ── production goes on (hazard 10) ──────────────────────────────────────────────────────────────


@contextmanager
def traffic(unprepared: Unprepared, *statements: str) -> Iterator[dict[str, int]]:
    """Writers of their own rows; gives how often each has written."""
    writes = dict.fromkeys(statements, 0)
    stop = threading.Event()

    def write(statement: str) -> None:
        with psycopg.connect(unprepared.url, autocommit=True) as connection:
            while not stop.is_set():
                connection.execute(statement.encode())
                writes[statement] += 1

    threads = [threading.Thread(target=write, args=(one,)) for one in statements]
    for thread in threads:
        thread.start()
    try:
        yield writes
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def see_waits(unprepared: Unprepared, times: int) -> None:
    """Return when a preparation has been seen to wait for a table so many times, each time anew."""
    seen = set()
    with psycopg.connect(unprepared.url, autocommit=True) as watcher:
        while len(seen) < times:
            found = watcher.execute(
                "SELECT pid, waitstart FROM pg_locks WHERE NOT granted AND locktype = 'relation'"
                " AND waitstart IS NOT NULL AND mode <> 'RowExclusiveLock'"
            )
            seen.update(found.fetchall())
            time.sleep(0.01)


@pytest.mark.parametrize("held", ["projects", "events_high"])
def test_a_long_transaction_delays_the_preparation_and_nobody_else(
    unprepared: Unprepared, held: str
) -> None:
    results: list[dict[str, Any]] = []
    preparing = threading.Thread(target=lambda: results.append(unprepared.prepare()))
    with (
        psycopg.connect(unprepared.url) as holder,
        traffic(
            unprepared,
            "UPDATE projects SET name = 'x' WHERE id = 2",
            "UPDATE events SET what = 'x' WHERE id = 2",
        ) as writes,
    ):
        holder.execute(f"LOCK TABLE {held} IN ROW EXCLUSIVE MODE".encode())
        preparing.start()
        try:
            for _ in range(3):
                see_waits(unprepared, 2)
                # whoever came behind a preparation that waits is served before the holder ends
                before = dict(writes)
                until = time.monotonic() + 60
                while any(writes[one] < count + 10 for one, count in before.items()):
                    assert time.monotonic() < until, "writers wait for as long as the preparation"
                    time.sleep(0.01)
            assert preparing.is_alive()
        finally:
            holder.commit()
        preparing.join()

    assert results
    assert results[0]["attempts that had to wait"] > 2
    assert unprepared.missing() == []


def test_a_table_that_stays_locked_is_named_with_its_holder(unprepared: Unprepared) -> None:
    with psycopg.connect(unprepared.url, application_name="a long report") as holder:
        holder.execute("LOCK TABLE issues IN ROW EXCLUSIVE MODE")
        with pytest.raises(TransientError) as caught:
            unprepared.prepare(Patience(attempt_s=0.05, deadline_s=0.5))
        assert "public.issues" in str(caught.value)
        assert f"pid {holder.info.backend_pid} (a long report" in str(caught.value)

    again = unprepared.prepare()

    assert again["tables right already"] > 0, "it goes on where it stopped"
    assert unprepared.missing() == []


def test_two_preparations_do_not_meet(unprepared: Unprepared) -> None:
    with psycopg.connect(unprepared.url, autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(%s)", (prepare.LOCK,))

        with pytest.raises(TransientError, match="another session is preparing"):
            unprepared.prepare()


# ── what happens to a schema afterwards ─────────────────────────────────────────────────────────


def test_a_new_partition_is_gated_from_its_first_row(unprepared: Unprepared) -> None:
    unprepared.prepare()
    unprepared.run("CREATE TABLE events_new PARTITION OF events FOR VALUES FROM (2000) TO (3000)")

    assert unprepared.missing() == ["trigger zz_cellferry_truncate on public.events_new"]
    unprepared.prepare()
    assert unprepared.missing() == []


@pytest.mark.parametrize(
    "harm",
    [
        "ALTER TABLE projects DISABLE TRIGGER zz_cellferry_gate",
        "DROP TRIGGER zz_cellferry_gate ON projects",
        "ALTER TABLE events_low DISABLE TRIGGER zz_cellferry_gate",
        "ALTER TABLE users DISABLE TRIGGER ALL",
        "DROP TRIGGER zz_cellferry_truncate ON users",
        "CREATE TABLE extra (id int PRIMARY KEY, organization_id bigint REFERENCES organizations)",
        "ALTER TABLE notes DROP CONSTRAINT notes_pkey, ADD PRIMARY KEY (id, issue_id)",
    ],
)
def test_a_gate_that_is_missing_or_old_is_found_and_repaired(
    unprepared: Unprepared, harm: str
) -> None:
    unprepared.prepare()
    unprepared.run(harm)

    assert unprepared.missing()
    unprepared.prepare()
    assert unprepared.missing() == []


def test_a_table_that_is_not_moved_any_more_loses_its_gate(unprepared: Unprepared) -> None:
    unprepared.prepare()
    unprepared.run("ALTER TABLE drafts DROP COLUMN organization_id")

    with unprepared.admin() as connection:
        found = data_map.discover(connection, None)
        prepare.prepare(connection, found, unprepared.cell, Quiet(), PATIENCE)

    assert unprepared.run(
        "SELECT tgname FROM pg_trigger WHERE tgrelid = 'drafts'::regclass AND NOT tgisinternal"
    ) == []  # fmt: skip
    unprepared.run("INSERT INTO drafts VALUES (1)")


# ── who prepares, and who moves ─────────────────────────────────────────────────────────────────


def test_the_mover_gets_what_it_needs_and_no_more(unprepared: Unprepared) -> None:
    unprepared.run("CREATE TABLE secrets (id int PRIMARY KEY)")
    unprepared.prepare()

    ((attributes,),) = unprepared.run(
        "SELECT ARRAY[rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls]"
        f" FROM pg_roles WHERE rolname = '{unprepared.mover}'"
    )
    assert attributes == [False] * 5
    with psycopg.connect(unprepared.cell.stores["postgres"].url, autocommit=True) as mover:
        mover.execute("SET session_replication_role = replica")
        mover.execute("DELETE FROM notes WHERE id = 110")
        for statement in (
            "UPDATE projects SET name = 'x'",
            "TRUNCATE notes",
            "SELECT * FROM secrets",
            "CREATE TABLE cellferry.mine (id int)",
            "ALTER TABLE notes DISABLE TRIGGER ALL",
            "DROP TRIGGER zz_cellferry_gate ON notes",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                mover.execute(statement.encode())


@pytest.fixture
def owner(unprepared: Unprepared) -> Iterator[str]:
    """URL of a role that owns the tables and is no superuser."""
    name = f"owner_{unprepared.mover}"
    unprepared.run(
        f"CREATE ROLE {name} LOGIN PASSWORD 'owner';"
        f"GRANT CREATE, CONNECT ON DATABASE {sql_database(unprepared)} TO {name}"
        " WITH GRANT OPTION;"
        f"GRANT TEMPORARY ON DATABASE {sql_database(unprepared)} TO {name} WITH GRANT OPTION;"
        f"GRANT USAGE ON SCHEMA public TO {name} WITH GRANT OPTION;"
        f'ALTER SCHEMA "Odd Schema" OWNER TO {name};'
        "DO $$ DECLARE t text; BEGIN FOR t IN SELECT c.oid::regclass FROM pg_class c"
        " WHERE relkind IN ('r', 'p') AND relnamespace IN"
        " ('public'::regnamespace, '\"Odd Schema\"'::regnamespace)"
        f" LOOP EXECUTE 'ALTER TABLE ' || t || ' OWNER TO {name}'; END LOOP; END $$"
    )
    yield unprepared.server.url(name, "owner", sql_database(unprepared))
    unprepared.run(f"REVOKE SET ON PARAMETER session_replication_role FROM {name} CASCADE")
    unprepared.run(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


def sql_database(unprepared: Unprepared) -> str:
    return str(psycopg.conninfo.conninfo_to_dict(unprepared.url)["dbname"])


def test_the_tables_owner_prepares_without_being_superuser(
    unprepared: Unprepared, owner: str
) -> None:
    name = psycopg.conninfo.conninfo_to_dict(owner)["user"]
    unprepared.run(f"GRANT SET ON PARAMETER session_replication_role TO {name} WITH GRANT OPTION")

    unprepared.prepare(url=owner)

    assert unprepared.missing() == []


def test_who_may_not_grant_what_is_needed_is_told(unprepared: Unprepared, owner: str) -> None:
    with pytest.raises(AccessDenied) as caught, sessions.translate_errors("cell-1/postgres"):
        unprepared.prepare(url=owner)

    assert "session_replication_role" in str(caught.value)


def test_a_mover_that_does_not_exist_is_asked_for(unprepared: Unprepared) -> None:
    url = unprepared.server.url("nobody_yet", "x", sql_database(unprepared))
    unprepared.cell = Cell("cell-1", {"postgres": Endpoint(url=url, admin_url=unprepared.url)})

    with pytest.raises(NotPrepared, match="CREATE ROLE nobody_yet LOGIN"):
        unprepared.prepare()


def test_row_security_is_lifted_for_the_mover_alone_and_put_back(unprepared: Unprepared) -> None:
    unprepared.run("ALTER TABLE projects ENABLE ROW LEVEL SECURITY")
    bypass = f"SELECT rolbypassrls FROM pg_roles WHERE rolname = '{unprepared.mover}'"

    unprepared.prepare()
    assert unprepared.run(bypass) == [(True,)]
    unprepared.unprepare()

    assert unprepared.run(bypass) == [(False,)]


def test_grants_name_odd_tables_rightly(unprepared: Unprepared) -> None:
    unprepared.prepare()
    odd = sql.Identifier("Odd Schema", "it's; DROP TABLE users; -- {}%s")

    with psycopg.connect(unprepared.cell.stores["postgres"].url) as mover:
        mover.execute(sql.SQL("SELECT * FROM {}").format(odd))
    assert unprepared.run("SELECT count(*) FROM users") == [(2,)]
