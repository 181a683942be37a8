"""Organizations that share users move at once, from one cell to another: a cohort's wave.

Each of their migrations brings a shared row and follows it, whichever of them was the first. When
one has arrived, the row is in use there, and the others leave it alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cellferry import phases
from cellferry.migration import steps
from cellferry.model import Organization, Side
from cellferry.phases import Phase
from cellferry.stores.postgres.delta import Delta
from cellferry.stores.postgres.references import ReferencedRows
from fixtures.cells import NO_TRACES, TwoCells
from fixtures.ferry import Ferry, ferry_with
from fixtures.gated import eventually
from fixtures.postgres import FreshDatabases

USER = 7000001
ARRIVED = ("sync", "verify", "cutover")
ENDED = ("soak", "cleanup")


@pytest.fixture
def shared(cells: TwoCells) -> TwoCells:
    """Organizations 7 and 8 in cell-1 share a user, who has a name."""
    for cell in ("cell-1", "cell-2"):
        with cells.admin(cell) as connection:
            connection.execute("ALTER TABLE users ADD name text NOT NULL DEFAULT 'as made'")
    for one in (7, 8):
        cells.add_organization(one, issues=3)
    with cells.admin("cell-1") as connection:
        connection.execute("INSERT INTO memberships VALUES (8, %s)", (USER,))
    return cells


def plan(cells: TwoCells, **options: Any) -> tuple[int, int]:
    first, second = (cells.plan(Organization(str(one), f"org-{one}"), **options) for one in (7, 8))
    return first, second


def run(cells: TwoCells, migration: int, *names: str) -> None:
    for name in names:
        with cells.context() as context:
            getattr(steps, name)(context, migration)


def abort(cells: TwoCells, migration: int) -> None:
    with cells.context() as context:
        steps.abort(context, migration, "the test wants it")


def rename(cells: TwoCells, cell: str, name: str) -> None:
    with cells.application(cell, autocommit=True) as connection:
        found = connection.execute("UPDATE users SET name = %s WHERE id = %s", (name, USER))
        assert found.rowcount == 1


def name_of(cells: TwoCells, cell: str) -> str | None:
    with cells.admin(cell) as connection:
        row = connection.execute("SELECT name FROM users WHERE id = %s", (USER,)).fetchone()
    return None if row is None else str(row[0])


def was_there(cells: TwoCells) -> None:
    with cells.admin("cell-2") as connection:
        connection.execute("INSERT INTO users VALUES (%s, %s, 'stale')", (USER, f"user{USER}"))


def delete_memberships(cells: TwoCells) -> None:
    with cells.admin("cell-2") as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute("DELETE FROM memberships WHERE user_id = %s", (USER,))


def place(cells: TwoCells) -> str | None:
    """Where in the table the user is: a row that is put in its place is elsewhere."""
    with cells.admin("cell-2") as connection:
        row = connection.execute("SELECT ctid::text FROM users WHERE id = %s", (USER,)).fetchone()
    return None if row is None else str(row[0])


def records(cells: TwoCells) -> list[tuple[Any, ...]]:
    """Which migrations bring the user, and whether it was there."""
    with cells.admin("cell-2") as connection:
        return connection.execute(
            "SELECT migration, was_here FROM cellferry.imported_row WHERE key = %s ORDER BY 1",
            ([str(USER)],),
        ).fetchall()


# --- what changes until the first arrives -------------------------------------------------------


@pytest.mark.parametrize("was_here", [True, False], ids=["was there", "was not there"])
def test_a_user_that_another_brings_is_as_it_was_when_the_organization_arrives(
    shared: TwoCells, was_here: bool
) -> None:
    if was_here:
        was_there(shared)
    first, second = plan(shared)
    run(shared, first, "copy")
    run(shared, second, "copy")
    rename(shared, "cell-1", "renamed")

    run(shared, second, *ARRIVED)

    assert name_of(shared, "cell-2") == "renamed"
    abort(shared, first)
    assert name_of(shared, "cell-2") == "renamed"
    run(shared, second, *ENDED)
    assert name_of(shared, "cell-2") == "renamed"
    assert shared.traces("cell-1") == shared.traces("cell-2") == NO_TRACES


# --- what becomes of it when they give up -------------------------------------------------------


@pytest.mark.parametrize("was_here", [True, False], ids=["was there", "was not there"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first first", "second first"])
def test_the_user_stays_until_the_last_gives_up(
    shared: TwoCells, order: tuple[int, int], was_here: bool
) -> None:
    if was_here:
        was_there(shared)
    both = plan(shared)
    for one in both:
        run(shared, one, "copy")
    assert records(shared) == [(one, was_here) for one in both]
    delete_memberships(shared)  # as if they came only now

    abort(shared, both[order[0]])

    assert records(shared) == [(both[order[1]], was_here)]
    assert name_of(shared, "cell-2") == "as made"
    abort(shared, both[order[1]])
    assert name_of(shared, "cell-2") == ("as made" if was_here else None)
    assert shared.traces("cell-1") == shared.traces("cell-2") == NO_TRACES


def is_waiting(cells: TwoCells, cell: str, role: str) -> bool:
    with cells.admin(cell) as connection:
        row = connection.execute(
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE usename = %s"
            " AND datname = current_database() AND wait_event_type = 'Lock')",
            (role,),
        ).fetchone()
    return row == (True,)


def test_an_abort_beside_a_copy_that_joins_leaves_the_user_to_it(
    shared: TwoCells, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = plan(shared)
    run(shared, first, "copy")
    delete_memberships(shared)  # nothing but a record holds the user
    before = place(shared)
    original = ReferencedRows._record_taken
    with ThreadPoolExecutor(1) as pool:
        aborting: list[Future[None]] = []

        def beside_an_abort(self: ReferencedRows, *arguments: Any) -> None:
            original(self, *arguments)
            if not aborting:
                delete_memberships(shared)
                aborting.append(pool.submit(abort, shared, first))
                eventually(
                    lambda: aborting[0].done() or is_waiting(shared, "cell-2", shared.mover_role),
                    120,
                )
                assert not aborting[0].done(), "it deletes nothing that is locked"

        monkeypatch.setattr(ReferencedRows, "_record_taken", beside_an_abort)
        run(shared, second, "copy")
        aborting[0].result(120)

    assert place(shared) == before, "it was not deleted and brought again"
    assert records(shared) == [(second, False)]


class KilledError(BaseException):
    """The controller's process ends here."""


# --- two that write at once ---------------------------------------------------------------------


def test_a_round_that_is_late_puts_nothing_old_in_the_place_of_the_new(
    shared: TwoCells, monkeypatch: pytest.MonkeyPatch, quickly: bool
) -> None:
    first, second = plan(shared)
    for one in (first, second):
        run(shared, one, "copy")
    rename(shared, "cell-1", "renamed once")
    kind, name = (Delta, "_read") if quickly else (ReferencedRows, "carry")
    original = getattr(kind, name)
    with ThreadPoolExecutor(1) as pool:
        other: list[Future[None]] = []

        def beside_the_other(self: Any, *arguments: Any) -> Any:
            read = original(self, *arguments)
            if not other:
                rename(shared, "cell-1", "renamed twice")
                other.append(pool.submit(run, shared, second, "sync"))
                eventually(
                    lambda: other[0].done() or is_waiting(shared, "cell-2", shared.mover_role), 120
                )
            return read

        def die(phase: Phase) -> None:  # no further round makes it good
            if phase is Phase.ROUND_APPLIED and threading.current_thread() is at_first:
                raise KilledError

        monkeypatch.setattr(kind, name, beside_the_other)
        at_first = threading.current_thread()
        phases.listen(die)
        try:
            with pytest.raises(KilledError):
                run(shared, first, "sync")
        finally:
            phases.listen(None)
        other[0].result(120)

    assert name_of(shared, "cell-2") == "renamed twice"
    run(shared, second, "verify")


SHARED = """
UPDATE notes SET author_id = 2 + 2 * (hashtext(id::text) & 1);
"""


@pytest.fixture
def ferries(fresh_databases: Callable[[], FreshDatabases], tmp_path: Path) -> Ferry:
    """Organizations 1 and 2 share users 2 and 4, who have e-mail addresses."""
    made = ferry_with(
        fresh_databases(),
        "CREATE TABLE public.user_emails (id bigint PRIMARY KEY,"
        " user_id bigint NOT NULL REFERENCES public.users, address text NOT NULL UNIQUE)",
        tmp_path / "map.yaml",
        "placement: {referenced: [user_emails]}",
    )
    made.run(Side.SOURCE, SHARED)
    return made


def moves(ferry: Ferry, attempt: int) -> tuple[Any, Any]:
    return (
        ferry.move(1, attempt),
        ferry.move(2, attempt, organization=Organization("2", "two")),
    )


def copy_both(ferry: Ferry) -> None:
    for one in moves(ferry, 1):
        with ferry.opened(one) as move:
            move.open_capture()
            move.copy()


@contextmanager
def locking(ferry: Ferry, user: int) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(ferry.url(Side.DESTINATION)) as connection:
        connection.execute("SELECT FROM users WHERE id = %s FOR NO KEY UPDATE", (user,))
        yield connection


def waiting(ferry: Ferry) -> int:
    rows = ferry.run(
        Side.DESTINATION,
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        " AND datname = current_database() AND application_name LIKE 'cellferry:%'",
    )
    return int(rows[0][0])


def test_two_that_follow_the_same_rows_lock_them_in_one_order(
    ferries: Ferry, monkeypatch: pytest.MonkeyPatch, quickly: bool
) -> None:
    copy_both(ferries)
    for user in (4, 2):  # the order of the log is another one than that of the key
        ferries.run(Side.SOURCE, f"UPDATE users SET plan_id = 1 WHERE id = {user}")

    def sync(one: Any) -> None:
        with ferries.opened(one) as move:
            move.sync()

    with ThreadPoolExecutor(2) as pool:
        with locking(ferries, 2) as blocker:
            both = [pool.submit(sync, one) for one in moves(ferries, 2)]
            eventually(lambda: waiting(ferries) == 2, 60)
            # Neither holds what comes later in the order while it waits.
            ferries.run(Side.DESTINATION, "SELECT FROM users WHERE id = 4 FOR NO KEY UPDATE NOWAIT")
            blocker.commit()
        for one in both:
            one.result(60)

    found = ferries.run(Side.DESTINATION, "SELECT id, plan_id FROM users WHERE id IN (2, 4)")
    assert sorted(found) == [(2, 1), (4, 1)]


def test_what_changes_after_the_shared_rows_were_read_comes_with_the_next_round(
    ferries: Ferry, monkeypatch: pytest.MonkeyPatch, quickly: bool
) -> None:
    copy_both(ferries)
    change = "UPDATE users SET email = '{}' WHERE id = 2"
    ferries.run(Side.SOURCE, change.format("once"))
    kind, name = (Delta, "_read") if quickly else (ReferencedRows, "follow")
    original = getattr(kind, name)

    def read_and_change(self: Any, *arguments: Any, **named: Any) -> Any:
        read = original(self, *arguments, **named)
        ferries.run(Side.SOURCE, change.format("twice"))
        return read

    with ferries.opened(moves(ferries, 2)[0]) as move:
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, read_and_change)
            move.sync()
        assert ferries.run(Side.DESTINATION, "SELECT email FROM users WHERE id = 2") == [("once",)]
        move.sync()

    assert ferries.run(Side.DESTINATION, "SELECT email FROM users WHERE id = 2") == [("twice",)]


def addresses(ferry: Ferry) -> list[tuple[Any, ...]]:
    return ferry.run(Side.DESTINATION, "SELECT id, address FROM user_emails ORDER BY id")


def test_a_new_address_of_a_shared_user_follows_in_both(ferries: Ferry) -> None:
    copy_both(ferries)
    ferries.run(Side.SOURCE, "INSERT INTO user_emails VALUES (20, 2, 'new@2')")
    first, second = moves(ferries, 2)
    for one in (first, second):
        with ferries.opened(one) as move:
            move.sync()
    ferries.run(Side.SOURCE, "UPDATE user_emails SET address = 'changed@2' WHERE id = 20")

    with ferries.opened(second) as move:
        move.sync()

    assert addresses(ferries) == [(20, "changed@2")]
    for one in moves(ferries, 3):
        with ferries.opened(one) as move:
            move.close_capture()
            move.cleanup(Side.DESTINATION)
    assert addresses(ferries) == []
    assert ferries.run(Side.DESTINATION, "SELECT id FROM users ORDER BY 1") == [(1,), (9001,)]


def test_an_address_that_two_bring_at_once_is_as_at_the_source(
    ferries: Ferry, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_both(ferries)
    ferries.run(Side.SOURCE, "INSERT INTO user_emails VALUES (20, 2, 'new@2')")
    original = ReferencedRows.follow
    first, second = moves(ferries, 2)
    with ThreadPoolExecutor(1) as pool:
        other: list[Future[None]] = []

        def sync() -> None:
            with ferries.opened(second) as move:
                move.sync()

        def beside_the_other(self: ReferencedRows, *arguments: Any, **named: Any) -> Any:
            found = original(self, *arguments, **named)
            if not other:
                other.append(pool.submit(sync))
                eventually(lambda: other[0].done() or waiting(ferries) > 0, 60)
            return found

        monkeypatch.setattr(ReferencedRows, "follow", beside_the_other)
        with ferries.opened(first) as move:
            move.sync()
        other[0].result(60)

    assert addresses(ferries) == [(20, "new@2")]
    assert ferries.run(
        Side.DESTINATION,
        "SELECT migration, was_here FROM cellferry.imported_row"
        " WHERE relation = 'public.user_emails' ORDER BY 1",
    ) == [(1, False), (2, False)]


# --- when one of them has arrived ---------------------------------------------------------------


@pytest.mark.parametrize("then", [(), ENDED], ids=["retained", "cleaned up"])
@pytest.mark.parametrize("late", [False, True], ids=["in a round", "under the gate"])
def test_what_the_one_that_arrived_changes_there_stays(
    shared: TwoCells, monkeypatch: pytest.MonkeyPatch, late: bool, then: tuple[str, ...]
) -> None:
    first, second = plan(shared)
    for one in (first, second):
        run(shared, one, "copy")
    run(shared, second, *ARRIVED, *then)
    rename(shared, "cell-2", "there")

    if late:
        run(shared, first, "sync", "verify")
        finish = PostgresMoveFinish(monkeypatch, lambda: rename(shared, "cell-1", "here"))
        run(shared, first, "cutover")
        assert finish.called
    else:
        rename(shared, "cell-1", "here")
        run(shared, first, *ARRIVED)

    assert name_of(shared, "cell-2") == "there"
    for one in (first, second):
        if one == first or not then:
            run(shared, one, *ENDED)
    assert shared.traces("cell-1") == shared.traces("cell-2") == NO_TRACES


class PostgresMoveFinish:
    """Does something right before the last delta of the next cutover."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, before: Callable[[], None]) -> None:
        from cellferry.stores.postgres.store import PostgresMove

        original = PostgresMove.finish
        self.called = False

        def finish(move: PostgresMove) -> Any:
            if not self.called:
                self.called = True
                before()
            return original(move)

        monkeypatch.setattr(PostgresMove, "finish", finish)


def test_when_the_one_that_arrived_is_rolled_back_the_other_brings_the_user_again(
    shared: TwoCells,
) -> None:
    first, second = plan(shared, soak_s=3600, ttl_s=3600)
    for one in (first, second):
        run(shared, one, "copy")
    run(shared, second, *ARRIVED)
    rename(shared, "cell-1", "renamed")
    run(shared, first, "sync")
    assert name_of(shared, "cell-2") == "as made", "it is the other's as well"

    with shared.context() as context:
        steps.roll_back(context, second, "the test wants it")
    run(shared, first, *ARRIVED)

    assert name_of(shared, "cell-2") == "renamed"
