"""Shared rows that a move brought follow the source beside their neighbours' writes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from cellferry.migration import steps
from cellferry.model import Organization, Side
from cellferry.stores.postgres.delta import Delta
from cellferry.stores.postgres.references import ReferencedRows
from fixtures.cells import TwoCells
from fixtures.ferry import Ferry
from fixtures.gated import eventually

THROUGH = ("sync", "verify", "cutover", "soak", "cleanup")


@pytest.mark.parametrize("email", [False, True], ids=["another column", "a unique column"])
def test_who_refers_to_a_row_while_it_is_brought_up_to_date_finds_it(
    ferry: Ferry, monkeypatch: pytest.MonkeyPatch, quickly: bool, email: bool
) -> None:
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
    change = "email = 'changed'" if email else "plan_id = NULL"
    ferry.run(Side.SOURCE, f"UPDATE users SET {change} WHERE id = 2")
    kind, name = (Delta, "_write") if quickly else (ReferencedRows, "follow")
    original = getattr(kind, name)

    def refer() -> None:
        with ferry.session(Side.DESTINATION) as neighbour:
            neighbour.execute("SET application_name = 'neighbour'")
            neighbour.execute("INSERT INTO memberships VALUES (3, 2, 'member')")

    with ThreadPoolExecutor(1) as pool:
        referring: list[Future[None]] = []

        def beside_a_neighbour(self: Any, *arguments: Any, **named: Any) -> Any:
            result = original(self, *arguments, **named)
            referring.append(pool.submit(refer))
            waits = (
                "SELECT 1 FROM pg_stat_activity"
                " WHERE application_name = 'neighbour' AND wait_event_type = 'Lock'"
            )
            eventually(lambda: referring[0].done() or bool(ferry.run(Side.DESTINATION, waits)), 60)
            return result

        with ferry.opened(ferry.move(attempt=2)) as move:
            monkeypatch.setattr(kind, name, beside_a_neighbour)
            move.sync()
        referring[0].result(60)

    found = ferry.run(Side.DESTINATION, "SELECT email, plan_id FROM users WHERE id = 2")
    assert found == [("changed", 3) if email else ("user2@example.com", None)]


def test_a_row_whose_key_is_spelled_in_another_way_here_is_brought_up_to_date(
    ferry: Ferry,
) -> None:
    # It is found under another text than the log has, and then spelled as at the source.
    for side in Side:
        ferry.run(side, "ALTER TABLE users ALTER COLUMN id TYPE numeric")
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
    ferry.run(Side.DESTINATION, "UPDATE users SET id = 2.0 WHERE id = 2")
    ferry.run(Side.SOURCE, "UPDATE users SET plan_id = NULL WHERE id = 2")

    with ferry.opened(ferry.move(attempt=2)) as move:
        move.sync()

    user = "SELECT id::text, plan_id FROM users WHERE id = 2"
    assert ferry.run(Side.DESTINATION, user) == [("2", None)]


@pytest.fixture
def shared(cells: TwoCells) -> TwoCells:
    """Organizations 7 and 8 in cell-1 share a user, who has a name."""
    for cell in ("cell-1", "cell-2"):
        with cells.admin(cell) as connection:
            connection.execute("ALTER TABLE users ADD name text NOT NULL DEFAULT 'as made'")
    for one in (7, 8):
        cells.add_organization(one, issues=3)
    with cells.admin("cell-1") as connection:
        connection.execute("INSERT INTO memberships VALUES (8, 7000001)")
    return cells


def run(cells: TwoCells, migration: int, *names: str) -> None:
    for name in names:
        with cells.context() as context:
            getattr(steps, name)(context, migration)


@pytest.mark.parametrize("seen", [False, True], ids=["changes after", "changes before"])
@pytest.mark.parametrize("was_here", [True, False], ids=["was there", "was not there"])
@pytest.mark.parametrize("came_from", ["cell-1", "cell-3", None])
def test_what_was_left_to_a_move_that_is_aborted_is_brought_by_the_other(
    shared: TwoCells, was_here: bool, seen: bool, came_from: str | None
) -> None:
    """Two organizations that share a user move at once; one brings it, and gives up."""
    rename = "UPDATE users SET name = 'renamed' WHERE id = 7000001"
    if was_here:
        with shared.admin("cell-2") as connection:
            connection.execute("INSERT INTO users VALUES (7000001, 'user7000001', 'stale')")
    first, second = (shared.plan(Organization(str(one), f"org-{one}")) for one in (7, 8))
    run(shared, first, "copy")
    with shared.admin("cell-2") as connection:  # as if it came from there, or long ago
        connection.execute("UPDATE cellferry.imported_row SET came_from = %s", (came_from,))
    run(shared, second, "copy")
    brought = shared.admin("cell-2").execute("SELECT count(*) FROM cellferry.imported_row")
    assert brought.fetchone() == (7 if came_from == "cell-1" else 6,)

    with shared.application("cell-1", autocommit=True) as writer:
        if seen:
            writer.execute(rename)
            run(shared, second, "sync")
        with shared.context() as context:
            steps.abort(context, first, "the test wants it")
        if not seen:
            writer.execute(rename)
    run(shared, second, *THROUGH)

    with shared.admin("cell-2") as connection:
        found = connection.execute("SELECT name FROM users WHERE id = 7000001").fetchone()
    assert found == ("renamed",)
