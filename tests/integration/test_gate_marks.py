"""The mark of each gated organization, without which a writer would pass its gate unseen."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from psycopg import IsolationLevel

from cellferry.errors import DrainTimeout
from cellferry.stores.postgres import gate, prepare
from fixtures.ferry import Quiet
from fixtures.gated import GatedCell, eventually, make_gated_cell

MOVED = "CF001"
WRITE = "UPDATE projects SET name = 'x' WHERE id = 1"

TEXT_SCHEMA = """
CREATE TABLE organizations (id text PRIMARY KEY);
CREATE TABLE projects (
    id bigint PRIMARY KEY, organization_id text NOT NULL REFERENCES organizations, name text);
CREATE TABLE issues (id bigint PRIMARY KEY, project_id bigint NOT NULL REFERENCES projects,
    title text);
"""

NAMES = (
    "plain", "", "with.dots", 'a"quote', "it's", "back\\slash", "Üb er", "x" * 60, "x" * 61,
    "x" * 61 + "y", "gate", "line\nbreak", "%I",
)  # fmt: skip


def say_moved(cell: GatedCell, *organizations: str) -> None:
    """Give organizations the gate of one that lives elsewhere."""
    with cell.admin() as admin, admin.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO cellferry.gate (organization, state, armed, migration, attempt, epoch)"
            " VALUES (%s, 'moved', false, 1, 1, 2)",
            [(one,) for one in organizations],
        )


def marks(cell: GatedCell) -> set[str]:
    """Names that triggers look for."""
    return {
        row[0]
        for row in cell.admin().execute(
            "SELECT typname::text FROM pg_type"
            " WHERE typnamespace = 'cellferry'::regnamespace AND starts_with(typname, '@')"
        )
    }


def swept_to(cell: GatedCell, wanted: set[str]) -> bool:
    """Change a gate as if, which sweeps; other snapshots, as autovacuum's, may hold that up."""
    with cell.admin() as admin:
        admin.execute("UPDATE cellferry.gate SET organization = organization")
    return marks(cell) == wanted


@pytest.fixture
def named(fresh_database: str) -> Iterator[GatedCell]:
    """A cell whose organizations have names."""
    parameters = psycopg.conninfo.conninfo_to_dict(fresh_database)
    parameters.update(user="cellferry_mover", password="mover")
    mover = psycopg.conninfo.make_conninfo("", **parameters)
    cell = make_gated_cell(fresh_database, mover, TEXT_SCHEMA)
    with cell.admin() as admin, admin.cursor() as cursor:
        for number, name in enumerate((*NAMES, "PLAIN")):
            cursor.execute("INSERT INTO organizations VALUES (%s)", (name,))
            cursor.execute("INSERT INTO projects VALUES (%s, %s)", (number, name))
            cursor.execute("INSERT INTO issues VALUES (%s, %s)", (number, number))
    yield cell
    cell.close()
    with psycopg.connect(fresh_database, autocommit=True) as admin:
        admin.execute(f"DROP OWNED BY {cell.application}".encode())


def test_a_writer_that_holds_a_lock_but_wrote_nothing_is_waited_for(gated: GatedCell) -> None:
    """It takes no lock any more before it writes, and so need not hear of a new mark."""
    with gated.connect(autocommit=False) as session:
        assert session.execute("UPDATE projects SET name = 'x' WHERE id = -1").rowcount == 0

        with pytest.raises(DrainTimeout, match="the application"):
            gated.arm(arm_deadline_s=0.3)

        session.rollback()
        gated.arm(attempt=2)


def test_one_that_only_reads_is_not_waited_for_and_logs_what_it_writes(gated: GatedCell) -> None:
    with gated.connect(autocommit=False) as session:
        session.execute("SELECT * FROM projects")

        gated.arm(arm_deadline_s=60)

        session.execute(WRITE.encode())
        session.commit()
    assert gated.logged() == {("public.projects", ("1",))}


def test_a_session_that_knows_of_no_gate_learns_of_a_new_one(gated: GatedCell) -> None:
    with gated.connect() as session:
        session.execute(WRITE.encode(), prepare=True)
        say_moved(gated, "1")

        with pytest.raises(psycopg.Error) as refused:
            session.execute(WRITE.encode(), prepare=True)
        assert refused.value.sqlstate == MOVED

        gated.admin().execute("DELETE FROM cellferry.gate")
        session.execute(WRITE.encode(), prepare=True)


def test_a_mark_stays_while_a_snapshot_still_shows_its_gate(gated: GatedCell) -> None:
    say_moved(gated, "1")
    with gated.connect(autocommit=False) as session:
        session.isolation_level = IsolationLevel.REPEATABLE_READ
        session.execute("SELECT * FROM projects")
        gated.admin().execute("DELETE FROM cellferry.gate WHERE organization = '1'")
        say_moved(gated, "2")  # every change sweeps
        assert marks(gated) == {"@1", "@2"}

        with pytest.raises(psycopg.Error) as refused:
            session.execute(WRITE.encode())
        assert refused.value.sqlstate == MOVED
        session.rollback()

    eventually(lambda: swept_to(gated, {"@2"}))
    gated.run(WRITE)


def test_a_gate_that_comes_back_keeps_its_mark(gated: GatedCell) -> None:
    say_moved(gated, "1")
    with gated.admin() as admin, admin.transaction():
        admin.execute("DELETE FROM cellferry.gate")
        admin.execute(
            "INSERT INTO cellferry.gate (organization, state, armed, migration, attempt, epoch)"
            " VALUES ('1', 'moved', false, 2, 1, 2)"
        )
    say_moved(gated, "2")

    assert marks(gated) == {"@1", "@2"}
    with pytest.raises(psycopg.Error, match="has moved"):
        gated.run(WRITE)


def test_a_gate_that_is_made_in_the_replica_role_has_a_mark(gated: GatedCell) -> None:
    with gated.admin() as admin:
        admin.execute("SET session_replication_role = replica")
        admin.execute(
            "INSERT INTO cellferry.gate (organization, state, armed, migration, attempt, epoch)"
            " VALUES ('1', 'moved', false, 1, 1, 2)"
        )

    assert marks(gated) == {"@1"}


def test_organizations_of_any_name_are_found(named: GatedCell) -> None:
    application = named.connect()
    for number in range(len(NAMES)):
        application.execute("UPDATE projects SET name = 'x' WHERE id = %s", (number,))
        application.execute("UPDATE issues SET title = 'x' WHERE id = %s", (number,))

    say_moved(named, *NAMES)

    for number, name in enumerate(NAMES):
        for statement in (
            "UPDATE projects SET name = 'y' WHERE id = %(number)s",
            "UPDATE issues SET title = 'y' WHERE id = %(number)s",
            "INSERT INTO projects VALUES (100 + %(number)s, %(name)s)",
            "INSERT INTO issues VALUES (100 + %(number)s, %(number)s)",
            "DELETE FROM issues WHERE id = %(number)s",
        ):
            with pytest.raises(psycopg.Error) as refused:
                application.execute(statement.encode(), {"number": number, "name": name})
            assert refused.value.sqlstate == MOVED, (name, statement)
    application.execute("UPDATE projects SET name = 'y' WHERE organization_id = 'PLAIN'")


def test_prepare_marks_gates_that_an_older_version_made(gated: GatedCell) -> None:
    gated.run(WRITE)
    with gated.admin() as admin:
        admin.execute("DROP TRIGGER keep_marks ON cellferry.gate; DROP TABLE cellferry.mark")
        admin.execute("UPDATE cellferry.installed SET definition = 'older' WHERE what = 'schema'")
    say_moved(gated, "1")
    assert not marks(gated)

    with gated.admin() as admin:
        prepare.prepare(admin, gated.data_map, gated.cell, Quiet())

    assert marks(gated) == {"@1"}
    with pytest.raises(psycopg.Error, match="has moved"):
        gated.run(WRITE)


@pytest.mark.parametrize(
    "harm",
    ['DROP TYPE cellferry."@1"', "ALTER TABLE cellferry.gate DISABLE TRIGGER keep_marks"],
)
def test_what_keeps_marks_is_checked_and_repaired(gated: GatedCell, harm: str) -> None:
    say_moved(gated, "1")
    mover = gated.mover()
    assert prepare.is_prepared(mover, gated.data_map) == []
    gated.admin().execute(harm.encode())

    assert prepare.is_prepared(mover, gated.data_map) == ["the mark of a gate"]
    with gated.admin() as admin:
        prepare.prepare(admin, gated.data_map, gated.cell, Quiet())

    assert prepare.is_prepared(mover, gated.data_map) == []
    assert marks(gated) == {"@1"}


def test_a_disarmed_organization_costs_no_look_again(gated: GatedCell) -> None:
    move = gated.arm()
    assert marks(gated) == {"@1"}
    gate.disarm(gated.mover(), move)

    gated.arm(2)

    eventually(lambda: swept_to(gated, {"@2"}))
