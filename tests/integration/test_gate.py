"""The gate in one cell: what it logs, whom it refuses, whom it never bothers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

from cellferry.errors import (
    AuthorityViolation,
    DrainTimeout,
    LeaseLost,
    TransientError,
    WrongState,
)
from cellferry.local.postgres_server import FAST, PostgresServer
from cellferry.model import Cell, Endpoint, GateState, Move
from cellferry.stores.postgres import gate
from fixtures.gated import (
    GATED_SCHEMA,
    ODD,
    GatedCell,
    eventually,
    make_gated_cell,
    wait_long_at_the_gate,
)
from fixtures.postgres import MakeServer, postgres_versions

MOVED, BEING_MOVED, OTHER_OWNER, NO_TRUNCATE = "CF001", "CF002", "CF003", "CF004"
ISSUES = {("public.issues", (key,)) for key in ("11", "12", "13")}


@pytest.fixture
def armed(gated: GatedCell) -> GatedCell:
    gated.arm()
    return gated


def refusal(cell: GatedCell, *statements: str) -> psycopg.Error:
    """The error that the application gets."""
    with pytest.raises(psycopg.Error) as caught:
        cell.run(*statements)
    return caught.value


# ── what is logged ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("statement", "keys"),
    [
        ("UPDATE projects SET name = 'x'", {("public.projects", ("1",))}),
        ("UPDATE issues SET title = 'x' WHERE id < 20", ISSUES),
        ("DELETE FROM notes WHERE id = 110", {("public.notes", ("110",))}),
        ("INSERT INTO drafts VALUES (5, 1)", {("public.drafts", ("5",))}),
        ("UPDATE drafts SET id = id", set()),
        ("INSERT INTO events VALUES (1, 1500)", {("public.events", ("1", "1500"))}),
        ("INSERT INTO events_low VALUES (1, 77)", {("public.events", ("1", "77"))}),
        (
            "UPDATE events SET id = 1001 WHERE organization_id = 1",  # to another partition
            {("public.events", ("1", "1")), ("public.events", ("1", "1001"))},
        ),
        (
            "UPDATE tags SET name = 'New' WHERE organization_id = 1",  # the key is generated
            {("public.tags", ("1", "tag")), ("public.tags", ("1", "new"))},
        ),
        (
            f"INSERT INTO {ODD} VALUES ('''\"{{}}%s', 1, 2)",
            {("Odd Schema.it's; DROP TABLE users; -- {}%s", ("'\"{}%s",))},
        ),
        ("UPDATE users SET name = 'x' WHERE id = 2", {("public.users", ("2",))}),
        ("UPDATE projects SET name = 'x' WHERE id = 2", set()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_keys_of_changed_rows_are_logged(
    armed: GatedCell, statement: str, keys: set[tuple[str, tuple[str, ...]]]
) -> None:
    armed.run(statement)

    assert armed.logged() == keys


def test_a_changed_key_is_logged_before_and_after(armed: GatedCell) -> None:
    armed.run("UPDATE projects SET id = 100 WHERE id = 1")

    assert {("public.projects", ("1",)), ("public.projects", ("100",))} <= armed.logged()
    assert armed.logged() >= ISSUES, "the foreign key took the children along"


def test_what_a_savepoint_took_back_leaves_no_key(armed: GatedCell) -> None:
    armed.run(
        "SAVEPOINT a", "UPDATE projects SET name = 'x' WHERE id = 1", "ROLLBACK TO a",
        "UPDATE issues SET title = 'y' WHERE id = 11",
    )  # fmt: skip

    assert armed.logged() == {("public.issues", ("11",))}


def test_a_cascade_is_logged_although_the_parent_is_gone(armed: GatedCell) -> None:
    armed.run("DELETE FROM projects WHERE id = 1")

    assert {("public.issues", (str(key),)) for key in (11, 12, 13)} <= armed.logged()
    assert {("public.notes", (str(key),)) for key in (110, 120, 130)} <= armed.logged()


def test_a_row_of_unknown_owner_is_logged_for_every_armed_organization(armed: GatedCell) -> None:
    armed.arm(2)

    armed.run("DELETE FROM projects WHERE id = 3")

    assert {("public.issues", ("31",)), ("public.notes", ("310",))} <= armed.logged(1)
    assert {("public.issues", ("31",)), ("public.notes", ("310",))} <= armed.logged(2)


def test_children_that_come_before_their_parents_are_logged(armed: GatedCell) -> None:
    armed.run(
        "SET CONSTRAINTS ALL DEFERRED",
        "INSERT INTO issues VALUES (99, 50)",
        "INSERT INTO projects VALUES (50, 1)",
    )

    assert ("public.issues", ("99",)) in armed.logged()


def test_parents_of_the_same_statement_are_seen(armed: GatedCell) -> None:
    armed.run(
        "WITH p AS (INSERT INTO projects VALUES (60, 1) RETURNING id)"
        " INSERT INTO issues SELECT 600, id FROM p"
    )

    assert ("public.issues", ("600",)) in armed.logged()


def test_a_key_reads_the_same_whatever_the_session_is_set_to(armed: GatedCell) -> None:
    armed.run(
        "SET LOCAL TimeZone = 'Asia/Kolkata'", "SET LOCAL DateStyle = 'SQL, DMY'",
        "INSERT INTO meetings VALUES (1, '2026-03-01 12:00:00.5+00')",
    )  # fmt: skip

    assert armed.logged() == {("public.meetings", ("1", "2026-03-01T12:00:00.5+00:00"))}


def test_an_unarmed_organization_logs_nothing(gated: GatedCell) -> None:
    gated.run("UPDATE projects SET name = 'x'")

    assert gated.logged() == set()


# ── rows that would change hands ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE projects SET organization_id = 2 WHERE id = 1",
        "UPDATE projects SET organization_id = 1 WHERE id = 2",
        "UPDATE issues SET project_id = 2 WHERE id = 11",
        "UPDATE issues SET project_id = 1 WHERE id = 21",
        "UPDATE notes SET issue_id = 21 WHERE id = 110",
    ],
)
def test_a_row_does_not_change_hands_while_one_of_them_moves(
    armed: GatedCell, statement: str
) -> None:
    assert refusal(armed, statement).sqlstate == OTHER_OWNER


def test_rows_change_hands_freely_between_organizations_that_stay(armed: GatedCell) -> None:
    armed.run("UPDATE projects SET organization_id = 3 WHERE id = 2")


def test_a_row_on_which_nothing_hangs_may_come_from_nobody(armed: GatedCell) -> None:
    armed.run("INSERT INTO drafts VALUES (1, NULL)")
    assert armed.logged() == set()

    armed.run("UPDATE drafts SET organization_id = 1")

    assert armed.logged() == {("public.drafts", ("1",))}


@pytest.mark.parametrize("table", ["projects CASCADE", "events", "events_high", "users CASCADE"])
def test_nothing_is_truncated_while_an_organization_moves(armed: GatedCell, table: str) -> None:
    assert refusal(armed, f"TRUNCATE {table}").sqlstate == NO_TRUNCATE


# ── frozen, moved, importing ────────────────────────────────────────────────────────────────────


@postgres_versions
@pytest.mark.parametrize(
    ("level", "answers"),
    [
        ("READ COMMITTED", [MOVED]),
        ("REPEATABLE READ", ["40001", MOVED]),
        ("SERIALIZABLE", ["40001", MOVED]),
    ],
)
def test_a_writer_that_waits_through_a_freeze_learns_the_new_cell(
    gated_on_each_version: GatedCell, level: str, answers: list[str]
) -> None:
    cell = gated_on_each_version
    wait_long_at_the_gate(cell.url)
    move = cell.arm()
    errors: list[psycopg.Error] = []

    def write() -> None:
        with cell.connect(autocommit=False) as writer:
            for _ in answers:
                try:
                    writer.execute(f"SET TRANSACTION ISOLATION LEVEL {level}".encode())
                    writer.execute("UPDATE issues SET title = 'late' WHERE id = 11")
                except psycopg.Error as error:
                    errors.append(error)
                writer.rollback()

    thread = threading.Thread(target=write)
    with cell.frozen(move):
        thread.start()
        eventually(lambda: waiting(cell) == 1)
        gate.hand_over_source(cell.mover(), move)
    thread.join()

    assert [error.sqlstate for error in errors] == answers
    assert json.loads(errors[-1].diag.message_detail or "") == {
        "organization": "1", "cell": "cell-2", "epoch": 2,
    }  # fmt: skip
    assert cell.run("SELECT title FROM issues WHERE id = 11") == [("issue",)]


def waiting(cell: GatedCell) -> int:
    ((count,),) = (
        cell.admin()
        .execute(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        .fetchall()
    )
    return int(count)


def test_a_writer_does_not_wait_for_ever(armed: GatedCell) -> None:
    """It is answered while the gate is still held: nothing but its own patience ends its wait."""
    with armed.frozen(armed.move()) as barrier:
        error = refusal(armed, "UPDATE projects SET name = 'x' WHERE id = 1")
        assert barrier.lock_held

    assert error.sqlstate == BEING_MOVED


def test_a_frozen_gate_whose_controller_died_refuses_at_once(armed: GatedCell) -> None:
    with armed.frozen(armed.move()):
        pass
    took = []
    for _ in range(5):  # the quickest: a machine that stands still makes none of them quicker
        started = time.monotonic()

        error = refusal(armed, "INSERT INTO notes VALUES (1, 11)")

        took.append(time.monotonic() - started)
        assert error.sqlstate == BEING_MOVED
    assert min(took) < 1, "it waited for a lock that nobody holds"


def test_a_thawed_gate_serves_and_logs_again(armed: GatedCell) -> None:
    with armed.frozen(armed.move()) as barrier:
        barrier.thaw()

    armed.run("UPDATE projects SET name = 'x' WHERE id = 1")

    assert armed.logged() == {("public.projects", ("1",))}


def importing(cell: GatedCell) -> tuple[Move, gate.Connection]:
    """Make the cell the destination of a move; return this and the mover's session there."""
    move, mover = cell.move(), cell.mover()
    gate.take_lease(mover, move)
    gate.import_gate(mover, move)
    return move, mover


def test_a_destination_refuses_everybody_until_it_has_authority(gated: GatedCell) -> None:
    move, mover = importing(gated)
    statement = "UPDATE projects SET name = 'x' WHERE id = 1"
    assert refusal(gated, statement).sqlstate == BEING_MOVED

    gate.arm_reverse(mover, move)
    gate.hand_over_destination(mover, move)
    gated.run(statement)

    assert gated.logged() == {("public.projects", ("1",))}, "captured from the first write on"


def test_a_destination_does_not_open_without_the_way_back(gated: GatedCell) -> None:
    move, mover = importing(gated)

    with pytest.raises(WrongState):
        gate.hand_over_destination(mover, move)


@pytest.fixture
def crashing(own_postgres: MakeServer) -> Iterator[tuple[PostgresServer, GatedCell]]:
    """A cell whose server may be killed; what nobody waits for stays long in its memory."""
    server = own_postgres(settings={**FAST, "wal_writer_delay": "10s"})
    cell = make_gated_cell(server.url(), server.url("cellferry_mover", "mover"))
    yield server, cell
    cell.close()


def crash(server: PostgresServer, cell: GatedCell) -> None:
    server.kill()
    server.start()
    cell.url = server.url()  # its port may have changed
    endpoint = Endpoint(url=server.url("cellferry_mover", "mover"), admin_url=server.url())
    cell.cell = Cell("cell-1", {"postgres": endpoint})


def test_a_frozen_gate_that_was_kept_survives_a_crash(
    crashing: tuple[PostgresServer, GatedCell],
) -> None:
    server, cell = crashing
    with cell.frozen(cell.arm()) as barrier:
        barrier.keep_frozen()

        crash(server, cell)

    assert refusal(cell, "UPDATE projects SET name = 'x' WHERE id = 1").sqlstate == BEING_MOVED


def test_a_freeze_that_a_crash_took_back_is_not_kept(
    crashing: tuple[PostgresServer, GatedCell],
) -> None:
    """Who was kept out may have written since: such a cutover must not flip."""
    server, cell = crashing
    move = cell.arm()
    with cell.frozen(move) as barrier:
        crash(server, cell)
        cell.run("UPDATE projects SET name = 'written' WHERE id = 1")

        with pytest.raises(TransientError):
            barrier.keep_frozen()
    again = gate.Barrier(cell.cell.stores["postgres"].url, move)
    with pytest.raises(WrongState, match="cannot be kept frozen"):
        again.keep_frozen()
    again.release()


def test_a_writer_that_was_let_in_finds_the_gate_open_after_a_crash(
    crashing: tuple[PostgresServer, GatedCell],
) -> None:
    server, cell = crashing
    move, mover = importing(cell)
    gate.arm_reverse(mover, move)
    gate.hand_over_destination(mover, move, durable=False)
    cell.run("SET LOCAL synchronous_commit = on", "UPDATE projects SET name = 'x' WHERE id = 1")

    crash(server, cell)

    assert cell.run("SELECT name FROM projects WHERE id = 1") == [("x",)]
    cell.run("UPDATE projects SET name = 'y' WHERE id = 1")


def test_a_hand_over_that_a_crash_took_back_refuses_until_it_is_repeated(
    crashing: tuple[PostgresServer, GatedCell],
) -> None:
    server, cell = crashing
    move, mover = importing(cell)
    gate.arm_reverse(mover, move)
    gate.hand_over_destination(mover, move, durable=False)
    statement = "UPDATE projects SET name = 'x' WHERE id = 1"

    crash(server, cell)

    assert refusal(cell, statement).sqlstate == BEING_MOVED
    gate.hand_over_destination(cell.mover(), move)
    crash(server, cell)
    cell.run(statement)


def test_every_change_of_the_gate_may_be_repeated(gated: GatedCell) -> None:
    move = gated.arm()
    mover = gated.mover()
    gate.arm(mover, move)
    with gated.frozen(move) as barrier:
        barrier.freeze(60.0)
        gate.hand_over_source(mover, move)
        gate.hand_over_source(mover, move)
    found = gate.state(mover, "1")
    assert found is not None
    assert (found.state, found.epoch, found.moved_to) == (GateState.MOVED, 2, "cell-2")
    gate.remove(mover, move)
    gate.remove(mover, move)
    assert gate.state(mover, "1") is None


def test_what_was_handed_over_is_not_thawed(armed: GatedCell) -> None:
    mover, move = armed.mover(), armed.move()
    with armed.frozen(move):
        gate.hand_over_source(mover, move)

    with pytest.raises(WrongState):
        gate.thaw(mover, move)


def test_a_frozen_gate_is_not_removed(armed: GatedCell) -> None:
    with armed.frozen(armed.move()):
        pass

    with pytest.raises(WrongState):
        gate.remove(armed.mover(), armed.move())


def test_a_cell_without_authority_is_not_a_source(armed: GatedCell) -> None:
    with armed.frozen(armed.move()):
        gate.hand_over_source(armed.mover(), armed.move())
    later = armed.move()
    other = Move(
        migration=9, organization=later.organization, source=later.source,
        destination=later.destination, epoch=1, attempt=1,
    )  # fmt: skip
    gate.take_lease(armed.mover(), other)

    with pytest.raises(AuthorityViolation, match="cell-2"):
        gate.arm(armed.mover(), other)


# ── drain ───────────────────────────────────────────────────────────────────────────────────────


def test_a_transaction_that_does_not_end_makes_the_cutover_give_up(armed: GatedCell) -> None:
    writes = [0]
    stop = threading.Event()
    writer, watching = armed.connect(), armed.admin()

    def neighbour() -> None:
        while not stop.is_set():
            writer.execute("UPDATE projects SET name = name || 'x' WHERE id = 2")
            writer.execute("UPDATE issues SET title = 'x' WHERE id = 21")
            writes[0] += 1

    holder = armed.connect(autocommit=False)
    holder.execute("UPDATE projects SET name = 'held' WHERE id = 1")
    barrier = gate.Barrier(armed.cell.stores["postgres"].url, armed.move())
    waits = []
    with ThreadPoolExecutor(2) as pool:
        freezing = pool.submit(barrier.freeze, 1.5)
        writing = pool.submit(neighbour)
        while not (freezing.done() and writes[0] >= 10):
            waits += watching.execute(
                "SELECT locktype FROM pg_locks WHERE pid = %s AND NOT granted",
                (writer.info.backend_pid,),
            ).fetchall()
            if waits or writing.done():
                holder.rollback()  # so that everything ends
                break
        stop.set()
        writing.result()
        assert waits == [], "another organization waited for the drain"
        with pytest.raises(DrainTimeout, match=f"pid {holder.info.backend_pid} \\(the application"):
            freezing.result()
    barrier.release()

    found = gate.state(armed.mover(), "1")
    assert found is not None
    assert found.state is GateState.OPEN
    armed.run("UPDATE issues SET title = 'served' WHERE id = 11")
    holder.execute("UPDATE issues SET title = 'served, too' WHERE id = 12")
    holder.commit()


def test_writers_that_come_during_a_drain_go_on_when_it_gives_up(
    armed: GatedCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for one attempt, not for all: each is served while the drain goes on and on."""
    wait_long_at_the_gate(armed.url)
    clock = [0.0]  # for as long as it stands still, the drain goes on
    monkeypatch.setattr(gate, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=time.sleep))
    holder = armed.connect(autocommit=False)
    holder.execute("UPDATE projects SET name = 'held' WHERE id = 1")
    writer, watching = armed.connect(), armed.admin()
    writer.execute("SET statement_timeout = '60s'")
    barrier = gate.Barrier(armed.cell.stores["postgres"].url, armed.move())
    waited = set()
    with ThreadPoolExecutor(2) as pool:
        freezing = pool.submit(barrier.freeze, 1_000.0)
        try:
            while len(waited) < 5:
                writing = pool.submit(writer.execute, "UPDATE issues SET title = 'x' WHERE id = 11")
                while not writing.done():
                    waited |= set(
                        watching.execute(
                            "SELECT waitstart FROM pg_locks WHERE pid = %s AND NOT granted"
                            " AND locktype = 'advisory' AND waitstart IS NOT NULL",
                            (writer.info.backend_pid,),
                        ).fetchall()
                    )
                writing.result()
                assert not freezing.done()
        except BaseException:
            holder.rollback()  # or it would never end
            raise
        finally:
            clock[0] = 2_000.0
        with pytest.raises(DrainTimeout):
            freezing.result()
    barrier.release()
    holder.commit()


# ── arming ──────────────────────────────────────────────────────────────────────────────────────


def test_arming_does_not_wait_for_a_transaction_that_will_see_the_gate(gated: GatedCell) -> None:
    idle = gated.connect(autocommit=False)
    idle.execute("SELECT count(*) FROM projects")  # no snapshot is kept in READ COMMITTED

    gated.arm(arm_deadline_s=60)
    idle.execute("UPDATE projects SET name = 'x' WHERE id = 1")
    idle.commit()

    assert gated.logged() == {("public.projects", ("1",))}


def test_arming_waits_for_a_snapshot_that_does_not_show_the_gate(gated: GatedCell) -> None:
    older = gated.connect(autocommit=False)
    older.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    older.execute("SELECT count(*) FROM projects")

    with pytest.raises(DrainTimeout):
        gated.arm(arm_deadline_s=0.5)
    older.rollback()
    gated.arm(arm_deadline_s=60)


def test_a_stopped_step_does_not_go_on_waiting(gated: GatedCell) -> None:
    older = gated.connect(autocommit=False)
    older.execute("UPDATE projects SET name = 'x' WHERE id = 1")

    class Stop(Exception): ...

    class Stopping:
        def report(self, *_: Any, **__: Any) -> None: ...

        def check(self) -> None:
            raise Stop

    mover, move = gated.mover(), gated.move()
    gate.take_lease(mover, move)
    with pytest.raises(Stop):
        gate.arm(mover, move, Stopping())


@pytest.fixture
def two_phase(own_postgres: MakeServer) -> Iterator[GatedCell]:
    server = own_postgres(settings={"max_prepared_transactions": "5", "fsync": "off"})
    cell = make_gated_cell(server.url(), server.url("cellferry_mover", "mover"))
    yield cell
    cell.close()


def test_arming_waits_for_prepared_transactions(two_phase: GatedCell) -> None:
    older = two_phase.connect()
    older.execute("BEGIN")
    older.execute("UPDATE projects SET name = 'x' WHERE id = 1")
    older.execute("PREPARE TRANSACTION 'in doubt'")

    with pytest.raises(DrainTimeout, match="prepared transaction 'in doubt'"):
        two_phase.arm(arm_deadline_s=0.3)


# ── the lease ───────────────────────────────────────────────────────────────────────────────────


def test_a_takeover_ends_what_the_older_attempt_has_in_flight(gated: GatedCell) -> None:
    old, new = gated.move(), gated.move(attempt=2)
    zombie = gated.mover("copy", old)
    gate.take_lease(zombie, old)
    zombie.execute("BEGIN")
    gate.hold_lease(zombie, old)
    zombie.execute("SET session_replication_role = replica")
    zombie.execute("DELETE FROM public.notes WHERE id = 110")

    gate.take_lease(gated.mover("copy", new), new)

    with pytest.raises(psycopg.OperationalError):
        zombie.execute("COMMIT")
    assert gated.run("SELECT count(*) FROM notes WHERE id = 110") == [(1,)]


def test_an_older_attempt_cannot_change_gate_or_lease(armed: GatedCell) -> None:
    old, new = armed.move(), armed.move(attempt=2)
    mover = armed.mover()
    gate.take_lease(mover, new)

    for change in (gate.take_lease, gate.arm, gate.arm_reverse, gate.hand_over_source):
        with pytest.raises(LeaseLost):
            change(mover, old)
    with mover.transaction(), pytest.raises(LeaseLost):
        gate.hold_lease(mover, old)
    barrier = gate.Barrier(armed.cell.stores["postgres"].url, old)
    with pytest.raises(LeaseLost):
        barrier.freeze(60.0)


def test_another_migrations_sessions_are_left_alone(gated: GatedCell) -> None:
    theirs = gated.mover("copy", gated.move(2))

    gate.take_lease(gated.mover(), gated.move(1, attempt=9))

    theirs.execute("SELECT 1")


# ── bystanders ──────────────────────────────────────────────────────────────────────────────────


def test_very_many_gates_do_not_slow_other_organizations(gated: GatedCell) -> None:
    writer = gated.connect()
    cpu = Path(f"/proc/{writer.info.backend_pid}/schedstat")

    def cost() -> int:
        blocks = []
        for _ in range(7):
            before = int(cpu.read_text().split()[0])
            for number in range(200):
                writer.execute(
                    "UPDATE projects SET name = %s WHERE id = 2", (str(number),), prepare=True
                )
            blocks.append(int(cpu.read_text().split()[0]) - before)
        return min(blocks)  # the rest is what others on the machine cost it

    gated.arm()
    cost()
    alone = cost()
    admin = gated.admin()
    admin.execute(
        "INSERT INTO cellferry.gate (organization, state, armed, migration, attempt, epoch)"
        " SELECT 'other ' || n, 'moved', false, 100 + n, 1, 2 FROM generate_series(1, 2000) n"
    )
    admin.execute("VACUUM ANALYZE cellferry.gate")
    admin.execute("VACUUM projects")

    assert cost() < 1.5 * alone


def test_an_application_cannot_touch_what_gates_it(armed: GatedCell) -> None:
    for statement in (
        "UPDATE cellferry.gate SET state = 'open'",
        "DELETE FROM cellferry.key_log",
        "SELECT * FROM cellferry.key_log",
        "SELECT cellferry.enter('1', 'public.projects', NULL, ARRAY['1'])",
        "SELECT * FROM cellferry.open_transactions()",
    ):
        assert refusal(armed, statement).sqlstate == "42501"


def test_operators_of_the_caller_do_not_act_for_the_gate(armed: GatedCell) -> None:
    """The gate runs with its owner's rights: the caller's search path must not matter to it."""
    admin = armed.admin()
    admin.execute(
        "CREATE SCHEMA trap;"
        "CREATE FUNCTION trap.lie(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT false';"
        "CREATE FUNCTION trap.lie(bigint, bigint) RETURNS boolean LANGUAGE sql AS 'SELECT false';"
        "CREATE OPERATOR trap.= (FUNCTION = trap.lie, LEFTARG = text, RIGHTARG = text);"
        "CREATE OPERATOR trap.= (FUNCTION = trap.lie, LEFTARG = bigint, RIGHTARG = bigint);"
        "GRANT USAGE ON SCHEMA trap TO PUBLIC"
    )
    trap = "SET LOCAL search_path = trap, pg_catalog, public"
    armed.run(trap, "UPDATE projects SET name = 'x'", "UPDATE issues SET title = 'x'")
    assert armed.logged() == {("public.projects", ("1",)), *ISSUES}

    with armed.frozen(armed.move()):
        pass
    assert refusal(armed, trap, "UPDATE projects SET name = 'x'").sqlstate == BEING_MOVED
    assert refusal(armed, trap, "UPDATE issues SET title = 'x'").sqlstate == BEING_MOVED


def test_rows_that_the_application_may_not_see_are_gated(fresh_database: str) -> None:
    """Row-level security hides the parent from the application, not from the gate."""
    parameters = psycopg.conninfo.conninfo_to_dict(fresh_database)
    parameters.update(user="cellferry_mover", password="mover")
    cell = make_gated_cell(
        fresh_database,
        psycopg.conninfo.make_conninfo("", **parameters),
        GATED_SCHEMA + "ALTER TABLE projects ENABLE ROW LEVEL SECURITY;",
    )
    cell.arm()

    cell.run("UPDATE issues SET title = 'x' WHERE id IN (11, 21)")

    assert cell.logged() == {("public.issues", ("11",))}
    with cell.frozen(cell.move()):
        pass
    error = refusal(cell, "UPDATE issues SET title = 'x' WHERE id = 11")
    assert error.sqlstate == BEING_MOVED
    cell.close()
    with psycopg.connect(fresh_database, autocommit=True) as admin:
        admin.execute(f"DROP OWNED BY {cell.application}".encode())
        admin.execute(f"DROP ROLE {cell.application}".encode())
        admin.execute("ALTER ROLE cellferry_mover NOBYPASSRLS")
