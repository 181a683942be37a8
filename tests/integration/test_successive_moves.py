"""An organization that moves on while an earlier move of it is retained."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cellferry.errors import WrongState
from cellferry.model import Move, Side
from cellferry.stores.postgres import gate
from fixtures.ferry import Ferry


@pytest.fixture
def moved(ferry: Ferry) -> Ferry:
    """The organization is at the destination; migration 1 is retained."""
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        move.catch_up()
        move.freeze(5.0)
        move.finish()
        move.hand_over()
        move.release()
    return ferry


def onward(ferry: Ferry) -> Move:
    """Migration 2, from where the organization is now."""
    elsewhere = replace(ferry.source, name="cell-3")
    return ferry.move(migration=2, epoch=2, source=ferry.destination, destination=elsewhere)


def arm_onward(ferry: Ferry) -> None:
    with ferry.session(Side.DESTINATION) as connection:
        gate.take_lease(connection, onward(ferry))
        gate.arm(connection, onward(ferry))


def logged(ferry: Ferry) -> int:
    return int(ferry.run(Side.DESTINATION, "SELECT count(*) FROM cellferry.key_log")[0][0])


def test_a_reverse_round_leaves_the_log_to_the_next_migration(moved: Ferry) -> None:
    with moved.opened(moved.move(attempt=2)) as move:
        arm_onward(moved)
        moved.run(Side.DESTINATION, "UPDATE issues SET title = 'new' WHERE id = 1")
        with pytest.raises(WrongState):
            move.reverse_sync()

    assert logged(moved) == 1


def test_a_reverse_round_under_way_leaves_the_log_to_the_next_migration(
    moved: Ferry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with moved.opened(moved.move(attempt=2)) as move:
        insist = move._insist_on_moved_source

        def meanwhile() -> None:
            arm_onward(moved)
            insist()

        monkeypatch.setattr(move, "_insist_on_moved_source", meanwhile)
        moved.run(Side.DESTINATION, "UPDATE issues SET title = 'new' WHERE id = 1")
        with pytest.raises(WrongState):
            move.reverse_sync()

    assert logged(moved) == 1


def test_a_reverse_round_says_so_when_nothing_is_captured_any_more(moved: Ferry) -> None:
    arm_onward(moved)
    with moved.session(Side.DESTINATION) as connection:
        gate.disarm(connection, onward(moved))  # as an abort does

    with moved.opened(moved.move(attempt=2)) as move, pytest.raises(WrongState):
        move.reverse_sync()
