"""Clean-up deletes one side's copy of one organization, only while that copy is dead."""

from __future__ import annotations

import pytest

from cellferry.errors import Blocked, WrongState
from cellferry.model import Side
from cellferry.stores.postgres import cleaner
from fixtures.ferry import Ferry


def leftovers(ferry: Ferry, side: Side) -> dict[str, int]:
    tables = ("gate", "key_log", "lease", "checkpoint", "imported_row")
    return {
        table: ferry.run(side, f"SELECT count(*) FROM cellferry.{table}")[0][0] for table in tables
    }


NOTHING = {"gate": 0, "key_log": 0, "lease": 0, "checkpoint": 0, "imported_row": 0}


@pytest.fixture
def moved(ferry: Ferry) -> Ferry:
    """Organization 1 lives at the destination; its old copy is retained."""
    cut_over(ferry)
    return ferry


def cut_over(ferry: Ferry, attempt: int = 1) -> None:
    with ferry.opened(ferry.move(attempt=attempt)) as move:
        move.open_capture()
        move.copy()
        assert move.verify().ok
        move.catch_up()
        move.freeze(60.0)
        move.finish()
        move.hand_over()
        move.release()


def clean_up(ferry: Ferry, attempt: int = 9) -> int:
    with ferry.opened(ferry.move(attempt=attempt)) as move:
        deleted = move.cleanup(Side.SOURCE).deleted
        move.close_capture()
        return deleted


def test_the_old_copy_goes_and_everybody_elses_rows_stay(moved: Ferry) -> None:
    neighbour = moved.content(Side.SOURCE, 2)
    users = moved.content(Side.SOURCE)["users"]
    here = moved.content(Side.DESTINATION)

    assert clean_up(moved) > 2000

    assert not any(moved.content(Side.SOURCE, 1).values())
    assert moved.content(Side.SOURCE, 2) == neighbour
    assert moved.content(Side.SOURCE)["users"] == users
    assert moved.content(Side.DESTINATION) == here


def test_nothing_of_the_migration_is_left_in_either_cell(moved: Ferry) -> None:
    clean_up(moved)

    assert leftovers(moved, Side.SOURCE) == NOTHING
    assert leftovers(moved, Side.DESTINATION) == NOTHING
    assert moved.registry.live == set()


def test_the_application_writes_on_at_the_destination_after_clean_up(moved: Ferry) -> None:
    clean_up(moved)
    moved.run(Side.DESTINATION, "UPDATE issues SET title = 'goes on' WHERE id = 1")
    assert leftovers(moved, Side.DESTINATION)["key_log"] == 0


def test_clean_up_may_be_repeated(moved: Ferry) -> None:
    clean_up(moved)
    assert clean_up(moved, attempt=10) == 0
    assert moved.registry.live == set()


def test_an_interrupted_clean_up_goes_on(moved: Ferry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaner, "BATCH", 100)
    checks = iter(range(10))

    def stop() -> None:
        if next(checks, None) is None:
            raise InterruptedError

    moved.progress.on_check = stop
    with pytest.raises(InterruptedError):
        clean_up(moved)
    moved.progress.on_check = None
    assert any(moved.content(Side.SOURCE, 1).values())

    clean_up(moved, attempt=10)

    assert not any(moved.content(Side.SOURCE, 1).values())


def test_a_late_clean_up_does_not_delete_an_organization_that_came_back(moved: Ferry) -> None:
    # The organization returned: the old cell serves it again, under a later epoch.
    moved.run(Side.SOURCE, "UPDATE cellferry.gate SET state = 'open', epoch = 3")
    before = moved.content(Side.SOURCE)

    with pytest.raises(WrongState, match="must not be deleted"):
        clean_up(moved)

    assert moved.content(Side.SOURCE) == before


def test_a_return_stops_a_clean_up_at_its_next_batch(
    moved: Ferry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleaner, "BATCH", 100)
    checks = iter(range(5))

    def come_back() -> None:
        if next(checks, None) is None:
            moved.run(Side.SOURCE, "UPDATE cellferry.gate SET migration = 99, state = 'importing'")
            moved.progress.on_check = None

    moved.progress.on_check = come_back
    with pytest.raises(WrongState):
        clean_up(moved)

    assert len(moved.content(Side.SOURCE, 1)["issues"]) > 0


def test_a_row_of_somebody_else_that_refers_to_a_deleted_row_blocks(moved: Ferry) -> None:
    moved.run(Side.SOURCE, "UPDATE projects SET parent_id = 2 WHERE id = 1")
    before = moved.content(Side.SOURCE)

    with pytest.raises(Blocked, match=r"row 1 of public\.projects stays and refers to row 2"):
        clean_up(moved)

    assert moved.content(Side.SOURCE) == before


def abort(ferry: Ferry, attempt: int = 9) -> tuple[str, ...]:
    with ferry.opened(ferry.move(attempt=attempt)) as move:
        move.thaw()
        move.release()
        move.close_capture()
        return move.cleanup(Side.DESTINATION).notes


def test_an_abort_leaves_both_cells_as_they_were(ferry: Ferry) -> None:
    before = ferry.content(Side.SOURCE), ferry.content(Side.DESTINATION)
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        move.sync()

    abort(ferry)

    assert (ferry.content(Side.SOURCE), ferry.content(Side.DESTINATION)) == before
    assert leftovers(ferry, Side.SOURCE) == NOTHING
    assert leftovers(ferry, Side.DESTINATION) == NOTHING
    assert ferry.registry.live == set()


def test_an_abort_keeps_a_shared_row_that_somebody_refers_to_meanwhile(ferry: Ferry) -> None:
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
    ferry.run(Side.DESTINATION, "INSERT INTO memberships VALUES (3, 2, 'guest')")

    notes = abort(ferry)

    assert any("public.users" in note for note in notes)
    users = ferry.run(Side.DESTINATION, "SELECT id FROM users ORDER BY id")
    assert users == [(1,), (2,), (9001,)]


def test_an_abort_may_be_repeated(ferry: Ferry) -> None:
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
    abort(ferry)
    abort(ferry, attempt=10)
    assert ferry.registry.live == set()


def test_a_writer_goes_on_after_an_abort_and_leaves_no_log(ferry: Ferry) -> None:
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
    abort(ferry)

    ferry.run(Side.SOURCE, "UPDATE issues SET title = 'goes on' WHERE id = 1")

    assert leftovers(ferry, Side.SOURCE) == NOTHING


def test_the_destinations_copy_is_not_deleted_once_it_serves(moved: Ferry) -> None:
    before = moved.content(Side.DESTINATION)
    with pytest.raises(WrongState), moved.opened(moved.move(attempt=9)) as move:
        move.cleanup(Side.DESTINATION)
    assert moved.content(Side.DESTINATION) == before
