"""Writers of rows that no constraint ties to their parent, while an organization is cut over."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socket import SHUT_RDWR, socket

import psycopg
import pytest

from cellferry.errors import CellferryError, DrainTimeout, TransientError
from cellferry.model import Limits, Side
from cellferry.routing.answers import BeingMoved, translate
from cellferry.stores.postgres import gate
from fixtures.ferry import Ferry, ferry_with
from fixtures.gated import eventually
from fixtures.pages import BY, TABLES, caught_up, cut_over, pages_ferry
from fixtures.postgres import FreshDatabases


@pytest.fixture(params=list(BY))
def ferry(
    fresh_databases: Callable[[], FreshDatabases], tmp_path: Path, request: pytest.FixtureRequest
) -> Ferry:
    return pages_ferry(fresh_databases(), tmp_path / "map.yaml", request.param)


@pytest.mark.parametrize("ends", ["CASCADE", "SET NULL"])
def test_a_cascade_of_a_neighbour_does_not_wait_for_a_writer_of_loose_rows(
    fresh_databases: Callable[[], FreshDatabases], tmp_path: Path, ends: str
) -> None:
    """The parent is gone for the row's trigger, but by the hand of its own transaction."""
    cascade = "NOT NULL REFERENCES public.comments ON DELETE CASCADE"
    ferry = pages_ferry(
        fresh_databases(),
        tmp_path / "map.yaml",
        tables=TABLES.replace(cascade, f"REFERENCES public.comments ON DELETE {ends}"),
    )
    ferry.run(Side.SOURCE, "INSERT INTO reactions VALUES (700, 70, '+')")
    with ferry.opened() as move:
        caught_up(ferry, move)
        with ferry.session(Side.SOURCE) as controller:
            controller.execute("SELECT pg_advisory_lock(%s)", (gate.LOOSE_LOCK,))
            ferry.run(
                Side.SOURCE, "SET statement_timeout = '2s'; DELETE FROM comments WHERE id = 70"
            )
            with pytest.raises(psycopg.DatabaseError, match="the row may belong to") as caught:
                ferry.run(Side.SOURCE, "DELETE FROM comments WHERE id = 90")
    answer = translate(caught.value)
    assert isinstance(answer, BeingMoved)
    assert answer.organization == "", "of no organization in particular: a client tries again"


SWEEP = """
CREATE FUNCTION sweep() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN DELETE FROM comments WHERE id = 90; RETURN NULL; END';
CREATE TRIGGER sweep AFTER INSERT ON pages FOR EACH ROW WHEN (NEW.organization_id = 2)
    EXECUTE FUNCTION sweep();
"""
#: Each changes a comment whose page 9 is not seen yet.
LOOSE_WRITES = {
    "a new comment": "INSERT INTO comments VALUES (95, 'nine', 9, 'its page is not there yet')",
    "a changed comment": "UPDATE comments SET body = 'changed' WHERE id = 90",
    "a deleted comment": "DELETE FROM comments WHERE id = 90",
    "a neighbour's comment that comes": (
        "UPDATE comments SET page_id = 9, page_slug = 'nine' WHERE id = 70"
    ),
    "a comment that a neighbour gets": (
        "UPDATE comments SET page_id = 7, page_slug = 'seven' WHERE id = 90"
    ),
    "a comment that a trigger deletes": "INSERT INTO pages VALUES (77, 2, 'a neighbour''s')",
}


def nine(ferry: Ferry, side: Side) -> list[tuple[int, str]]:
    return ferry.run(side, "SELECT id, body FROM comments WHERE page_id = 9 ORDER BY 1")


@pytest.mark.parametrize("statement", LOOSE_WRITES.values(), ids=LOOSE_WRITES.keys())
def test_a_freeze_waits_for_a_writer_whose_row_becomes_the_organizations_meanwhile(
    ferry: Ferry, statement: str
) -> None:
    for side in Side:
        ferry.run(side, SWEEP)
    with ferry.opened() as move:
        caught_up(ferry, move)
        move.catch_up()
        with ferry.session(Side.SOURCE) as writer:
            writer.execute("BEGIN")
            writer.execute(statement.encode())
            ferry.run(Side.SOURCE, "INSERT INTO pages VALUES (9, 1, 'nine')")
            with pytest.raises(DrainTimeout, match="open for"):
                move.freeze(0.5)
            move.thaw()
            writer.execute("COMMIT")
        cut_over(move)
        assert nine(ferry, Side.DESTINATION) == nine(ferry, Side.SOURCE)


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_a_loose_writer_that_comes_after_a_freeze_looks_again_whose_its_row_is(
    ferry: Ferry, isolation: str
) -> None:
    """It took its snapshot when the page was not there; then the page came, and the freeze."""
    with ferry.opened() as move:
        caught_up(ferry, move)
        move.catch_up()
        with ferry.session(Side.SOURCE) as writer:
            writer.execute(f"BEGIN ISOLATION LEVEL {isolation}".encode())
            writer.execute("SELECT count(*) FROM pages")
            ferry.run(Side.SOURCE, "INSERT INTO pages VALUES (9, 1, 'nine')")
            cut_over(move)
            with pytest.raises(psycopg.DatabaseError) as caught:
                writer.execute("INSERT INTO comments VALUES (95, 'nine', 9, 'late')")
        assert caught.value.sqlstate == ("CF001" if isolation == "READ COMMITTED" else "40001")
        assert nine(ferry, Side.DESTINATION) == nine(ferry, Side.SOURCE)


def test_loose_rows_can_be_written_at_both_cells_in_the_middle_of_a_cutover(ferry: Ferry) -> None:
    with ferry.opened() as move:
        caught_up(ferry, move)
        move.catch_up()
        move.freeze(60.0)
        move.finish()
        for side in Side:
            ferry.run(side, "SET statement_timeout = '2s';"
                      "INSERT INTO comments VALUES (7000, 'x', 12345, 'of nobody')")  # fmt: skip
        move.hand_over()
        move.release()


def is_barrier_waiting(ferry: Ferry) -> bool:
    """Whether a freeze waits for a lock that somebody has."""
    waiting = (
        "SELECT FROM pg_stat_activity WHERE application_name LIKE 'cellferry:%:barrier'"
        " AND wait_event = 'advisory' AND datname = current_database()"
    )
    return bool(ferry.run(Side.SOURCE, waiting))


def test_a_transaction_that_writes_the_child_and_then_its_page_is_waited_for(ferry: Ferry) -> None:
    """The page is the organization's: at its gate the two would wait for each other."""
    move_of = ferry.move(limits=Limits(drain_attempt_s=30.0))
    with ThreadPoolExecutor(1) as pool, ferry.opened(move_of) as move:
        caught_up(ferry, move)
        move.catch_up()
        with ferry.session(Side.SOURCE) as writer:
            writer.execute("BEGIN; SET LOCAL statement_timeout = '20s'")
            writer.execute("INSERT INTO comments VALUES (95, 'nine', 9, 'before its page')")
            freezing = pool.submit(move.freeze, 60.0)
            eventually(lambda: is_barrier_waiting(ferry))
            writer.execute("INSERT INTO pages VALUES (9, 1, 'nine')")
            assert not freezing.done()
            writer.execute("COMMIT")
        freezing.result(60)
        move.finish()
        move.hand_over()
        move.release()
    assert nine(ferry, Side.DESTINATION) == nine(ferry, Side.SOURCE)
    assert len(nine(ferry, Side.DESTINATION)) == 2


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ"])
def test_who_entered_loosely_is_still_refused_by_a_frozen_gate(
    ferry: Ferry, isolation: str
) -> None:
    with ferry.opened() as move:
        caught_up(ferry, move)
        move.catch_up()
        move.freeze(60.0)
        move.finish()
        with ferry.session(Side.SOURCE) as writer:
            writer.execute(f"BEGIN ISOLATION LEVEL {isolation}".encode())
            writer.execute("INSERT INTO comments VALUES (7000, 'x', 12345, 'of nobody')")
            with pytest.raises(psycopg.DatabaseError) as caught:
                writer.execute("INSERT INTO pages VALUES (9, 1, 'nine')")
        assert caught.value.sqlstate == "CF002"
        move.hand_over()
        move.release()
    assert ferry.run(Side.SOURCE, "SELECT FROM pages WHERE id = 9") == []


def test_a_setting_does_not_lead_past_the_gate(ferry: Ferry) -> None:
    """Anybody can set it; only the lock counts."""
    with ferry.opened() as move, ferry.session(Side.SOURCE) as controller:
        caught_up(ferry, move)
        key = ferry.run(Side.SOURCE, "SELECT lock_key FROM cellferry.gate")[0][0]
        for lock in (key, gate.LOOSE_LOCK):
            controller.execute("SELECT pg_advisory_lock(%s)", (lock,))
        with pytest.raises(psycopg.DatabaseError, match="organization 1 is being moved"):
            ferry.run(
                Side.SOURCE,
                "BEGIN; SELECT set_config('cellferry.loose', pg_current_xact_id()::text, true);"
                "UPDATE pages SET slug = slug WHERE id = 5; COMMIT",
            )


def test_an_ordinary_writer_holds_the_lock_of_its_gate_alone(ferry: Ferry) -> None:
    with ferry.opened() as move, ferry.session(Side.SOURCE) as writer:
        caught_up(ferry, move)
        (key,) = ferry.run(Side.SOURCE, "SELECT lock_key FROM cellferry.gate")[0]
        writer.execute("BEGIN")
        writer.execute("UPDATE pages SET slug = slug WHERE id = 5")
        held = writer.execute(
            "SELECT classid::bigint << 32 | objid::bigint FROM pg_locks"
            " WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
        ).fetchall()
        assert held == [(key,)]


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("step", ["thaw", "hand_over"])
def test_a_neighbours_loose_writer_does_not_hold_up_the_end_of_a_cutover(
    ferry: Ferry, step: str, isolation: str
) -> None:
    with ThreadPoolExecutor(1) as pool, ferry.opened() as move:
        caught_up(ferry, move)
        move.catch_up()
        move.freeze(60.0)
        move.finish()
        with ferry.session(Side.SOURCE) as writer:
            writer.execute(f"BEGIN ISOLATION LEVEL {isolation}".encode())
            writer.execute("INSERT INTO comments VALUES (7000, 'x', 12345, 'of nobody')")
            ending = pool.submit(getattr(move, step))
            try:
                ending.result(30)
            finally:
                writer.execute("ROLLBACK")
        move.release()


def test_a_deadlock_ends_an_attempt_and_not_the_cutover(ferry: Ferry) -> None:
    move_of = ferry.move(limits=Limits(drain_attempt_s=30.0))
    with ThreadPoolExecutor(1) as pool, ferry.opened(move_of) as move:
        caught_up(ferry, move)
        move.catch_up()
        key = ferry.run(Side.SOURCE, "SELECT lock_key FROM cellferry.gate")[0][0]
        with ferry.session(Side.SOURCE) as writer:
            writer.execute("BEGIN; SET LOCAL deadlock_timeout = '1min'")
            writer.execute("INSERT INTO comments VALUES (95, 'nine', 9, 'of nobody')")
            freezing = pool.submit(move.freeze, 60.0)
            eventually(lambda: is_barrier_waiting(ferry))
            # No trigger does this: it stands for whatever the server may find in its locks.
            writer.execute("SELECT pg_advisory_xact_lock_shared(%s)", (key,))
            writer.execute("COMMIT")
        freezing.result(60)
        move.thaw()


def test_an_attempt_that_breaks_off_between_its_locks_leaves_none(ferry: Ferry) -> None:
    move_of = ferry.move(limits=Limits(drain_attempt_s=30.0))
    with ThreadPoolExecutor(1) as pool, ferry.opened(move_of) as move:
        caught_up(ferry, move)
        move.catch_up()
        with ferry.session(Side.SOURCE) as writer:
            writer.execute("BEGIN")
            writer.execute("INSERT INTO comments VALUES (95, 'nine', 9, 'of nobody')")
            freezing = pool.submit(move.freeze, 60.0)
            eventually(lambda: is_barrier_waiting(ferry))
            ferry.run(
                Side.SOURCE,
                "SELECT pg_cancel_backend(pid) FROM pg_stat_activity"
                " WHERE application_name LIKE 'cellferry:%:barrier'"
                " AND datname = current_database()",
            )
            with pytest.raises(TransientError):
                freezing.result(60)
            ferry.run(
                Side.SOURCE,
                "SET statement_timeout = '2s'; UPDATE pages SET slug = slug WHERE id = 5",
            )


def test_a_freeze_whose_connection_broke_does_not_take_effect_after_the_thaw(ferry: Ferry) -> None:
    """The server learns of the broken connection only when it has something to say."""
    move_of = ferry.move(limits=Limits(drain_attempt_s=30.0))
    barriers = (
        "SELECT 1 FROM pg_stat_activity WHERE application_name LIKE 'cellferry:%:barrier'"
        " AND datname = current_database()"
    )
    with ThreadPoolExecutor(1) as pool, ferry.opened(move_of) as move:
        caught_up(ferry, move)
        move.catch_up()
        with ferry.session(Side.SOURCE) as writer:
            writer.execute("BEGIN")
            writer.execute("UPDATE pages SET slug = slug WHERE id = 5")
            freezing = pool.submit(move.freeze, 60.0)
            eventually(lambda: is_barrier_waiting(ferry))
            barrier = move._barrier
            assert barrier is not None
            with socket(fileno=os.dup(barrier.session.fileno())) as connection:
                connection.shutdown(SHUT_RDWR)
            with pytest.raises(CellferryError):
                freezing.result(60)
            move.thaw()
            writer.execute("COMMIT")
        eventually(lambda: not ferry.run(Side.SOURCE, barriers))
        assert ferry.run(Side.SOURCE, "SELECT state FROM cellferry.gate") == [("open",)]


def test_a_row_of_nobody_is_logged_once(ferry: Ferry) -> None:
    with ferry.opened() as move:
        caught_up(ferry, move)
        ferry.run(Side.SOURCE, "INSERT INTO comments VALUES (7000, 'x', 12345, 'of nobody')")
        logged = "SELECT relation, key FROM cellferry.key_log"
        assert ferry.run(Side.SOURCE, logged) == [("public.comments", ["7000"])]


REMARKS = """
CREATE TABLE public.pages (
    id bigint PRIMARY KEY, organization_id bigint NOT NULL REFERENCES public.organizations
);
CREATE TABLE public.remarks (id bigint PRIMARY KEY, kind text, target bigint, body text);
"""


@pytest.mark.parametrize("kind", ["'other'", "NULL"])
def test_a_freeze_waits_for_a_writer_that_takes_away_what_would_become_the_organizations(
    fresh_databases: Callable[[], FreshDatabases], tmp_path: Path, kind: str
) -> None:
    ferry = ferry_with(
        fresh_databases(),
        REMARKS,
        tmp_path / "map.yaml",
        "tables: {remarks: {owners: [{through: pages, columns: [target],"
        """ when: "{row}.kind = 'page'"}]}}""",
    )
    ferry.run(Side.SOURCE, "INSERT INTO pages VALUES (5, 1);"
              "INSERT INTO remarks VALUES (50, 'page', 5, 'a'), (90, 'page', 9, 'b')")  # fmt: skip
    with ferry.opened() as move:
        caught_up(ferry, move)
        move.catch_up()
        with ferry.session(Side.SOURCE) as writer:
            writer.execute("BEGIN")
            writer.execute(f"UPDATE remarks SET kind = {kind} WHERE id = 90".encode())
            ferry.run(Side.SOURCE, "INSERT INTO pages VALUES (9, 1)")
            with pytest.raises(DrainTimeout, match="open for"):
                move.freeze(0.5)
            move.thaw()
            writer.execute("COMMIT")
        cut_over(move)
    assert ferry.run(Side.DESTINATION, "SELECT id FROM remarks") == [(50,)]
