"""An organization that moves on while an earlier move of it is retained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cellferry.errors import WrongState
from cellferry.migration import Context, steps
from cellferry.model import Actor, Migration, Move, Organization, Side, State, Strategy
from cellferry.stores.postgres import gate
from cellferry.stores.redis.store import RedisMove
from fixtures.cells import TwoCells
from fixtures.ferry import Ferry


@pytest.fixture
def moved(ferry: Ferry) -> Ferry:
    """The organization is at the destination; migration 1 is retained."""
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        move.catch_up()
        move.freeze(60.0)
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
    with moved.opened(moved.move(attempt=2).turned()) as move:
        arm_onward(moved)
        moved.run(Side.DESTINATION, "UPDATE issues SET title = 'new' WHERE id = 1")
        with pytest.raises(WrongState):
            move.sync()

    assert logged(moved) == 1


def test_a_reverse_round_under_way_leaves_the_log_to_the_next_migration(
    moved: Ferry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with moved.opened(moved.move(attempt=2).turned()) as move:
        hold = gate.hold_retained

        def meanwhile(*arguments: Any) -> None:
            arm_onward(moved)
            hold(*arguments)

        monkeypatch.setattr(gate, "hold_retained", meanwhile)
        moved.run(Side.DESTINATION, "UPDATE issues SET title = 'new' WHERE id = 1")
        with pytest.raises(WrongState):
            move.sync()

    assert logged(moved) == 1


def test_a_reverse_round_says_so_when_nothing_is_captured_any_more(moved: Ferry) -> None:
    arm_onward(moved)
    with moved.session(Side.DESTINATION) as connection:
        gate.disarm(connection, onward(moved))  # as an abort does

    with moved.opened(moved.move(attempt=2).turned()) as move, pytest.raises(WrongState):
        move.sync()


def test_an_abort_ends_where_another_migrations_gate_kept_it_out(moved: Ferry) -> None:
    back = moved.move(migration=2, epoch=2, source=moved.destination, destination=moved.source)
    with moved.opened(back) as move:
        with pytest.raises(WrongState):
            move.open_capture()
        move.thaw()
        move.close_capture()

        assert move.cleanup(Side.DESTINATION).deleted == 0

    kept = moved.run(Side.SOURCE, "SELECT state, migration FROM cellferry.gate")
    assert kept == [("moved", 1)]


# ── whole steps ─────────────────────────────────────────────────────────────────────────────────


def retain(cells: TwoCells, organization: Organization) -> int:
    """Move to cell-2; the copy in cell-1 may be cleaned at once."""
    migration = cells.plan(organization)
    with cells.context() as context:
        for step in (steps.copy, steps.sync, steps.verify, steps.cutover, steps.soak):
            step(context, migration)
    return migration


def begin_onward(context: Context, organization: Organization, to: str = "cell-3") -> Migration:
    context.topology.register_cell("cell-3", "local", False)
    return context.topology.create_migration(
        organization, to, Strategy.ONLINE, {}, {}, Actor("test")
    )


def take_over(context: Context, migration: Migration) -> None:
    """What opening the capture does at the source, cell-2."""
    elsewhere = replace(context.settings.cell("cell-1", context.connections), name="cell-3")
    move = Move(
        migration=migration.id,
        organization=migration.organization,
        source=context.settings.cell("cell-2", context.connections),
        destination=elsewhere,
        epoch=migration.epoch,
        attempt=context.topology.take_lease(migration.id, "test", Actor("test")),
        strategy=Strategy.ONLINE,
    )
    resources = context.topology.resources(migration.id)
    progress = context.topology.progress_sink(migration.id, move.attempt)
    with context.stores["postgres"].open(move, resources, progress) as opened:
        connection = opened._connection(Side.SOURCE)  # type: ignore[attr-defined]
        gate.take_lease(connection, move)
        gate.arm(connection, move)
    with context.stores["redis"].open(move, resources, progress) as opened:
        assert isinstance(opened, RedisMove)
        opened._gate(Side.SOURCE).fence()
        opened._gate(Side.SOURCE).record_source()


def test_the_copy_in_a_cell_left_long_ago_is_cleaned_while_the_organization_moves_on(
    cells: TwoCells,
) -> None:
    acme = cells.add_organization(7, issues=3)
    first = retain(cells, acme)
    with cells.context() as context:
        onward = begin_onward(context, acme)
        take_over(context, onward)

        steps.cleanup(context, first)

        assert context.topology.migration(first).state is State.COMPLETED
    assert not any(cells.rows("cell-1", "7").values())
    assert cells.keys("cell-1", "7") == {}
    with cells.admin("cell-2") as connection:
        kept = connection.execute("SELECT migration, armed FROM cellferry.gate").fetchall()
    assert kept == [(onward.id, True)]
    assert {"cellferry:gate:{7}", "cellferry:lease:{7}"} <= set(
        cells.traces("cell-2")["redis keys"]
    )


def test_a_copy_to_which_the_organization_returns_is_not_cleaned(cells: TwoCells) -> None:
    acme = cells.add_organization(7, issues=3)
    first = retain(cells, acme)
    with cells.context() as context:
        back = begin_onward(context, acme, "cell-1")
        with pytest.raises(WrongState, match=f"migration {back.id}"):
            steps.cleanup(context, first)
    assert any(cells.rows("cell-1", "7").values())
