"""What a gate should say: decided by the route, its epoch, and whose migration it names."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cellferry.migration.gate_review import Task, expected_moved, judge, judge_absence
from cellferry.model import GateState, Leftover, Resource, Route, State, Strategy
from cellferry.topology.reaping import Known

HELD = frozenset({Resource("cell-1", "postgres", "gate", "7")})
HELD_AT_BOTH = HELD | {Resource("cell-2", "postgres", "gate", "7")}
AT_SOURCE, AT_DESTINATION = Route("7", "cell-1", 1), Route("7", "cell-2", 2)


def known(state: State, **changes: object) -> Known:
    made = Known(
        *(5, "7", "acme", "cell-1", "cell-2", state, 1, 3, Strategy.ONLINE),
        *(False, False, False, 60.0, HELD_AT_BOTH),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def gate(state: GateState, epoch: int = 1, **changes: object) -> Leftover:
    made = Leftover("postgres", "gate", "7", "7", 5, 3, state, epoch, None, True)
    return replace(made, **changes)  # type: ignore[arg-type]


OPEN, FROZEN, MOVED, IMPORTING = (
    *(GateState.OPEN, GateState.FROZEN, GateState.MOVED, GateState.IMPORTING),
)


@pytest.mark.parametrize(
    ("cell", "found", "route", "state", "task"),
    [
        ("cell-1", gate(OPEN), AT_SOURCE, State.SYNCING, Task.KEEP),
        ("cell-1", gate(FROZEN), AT_SOURCE, State.CUTTING_OVER, Task.KEEP),
        ("cell-1", gate(FROZEN), AT_SOURCE, State.READY, Task.THAW),
        ("cell-1", gate(FROZEN), AT_SOURCE, State.ABORTED, Task.THAW),
        ("cell-2", gate(IMPORTING), AT_SOURCE, State.READY, Task.KEEP),
        ("cell-2", gate(IMPORTING), AT_SOURCE, State.ABORTED, Task.ABORT),
        ("cell-1", gate(FROZEN), AT_DESTINATION, State.SOAKING, Task.HAND_OVER),
        ("cell-2", gate(IMPORTING), AT_DESTINATION, State.SOAKING, Task.HAND_OVER),
        # the old copy is being deleted: it cannot make good what the new one lost
        ("cell-2", gate(IMPORTING), AT_DESTINATION, State.CLEANING, Task.REPORT),
        ("cell-2", gate(FROZEN, 2), AT_DESTINATION, State.RETAINED, Task.THAW),
        ("cell-1", gate(MOVED, 2), AT_DESTINATION, State.RETAINED, Task.KEEP),
        ("cell-1", gate(OPEN), AT_DESTINATION, State.RETAINED, Task.TURN_AWAY),
        ("cell-1", gate(OPEN, 2), AT_DESTINATION, State.RETAINED, Task.REPORT),
        ("cell-2", gate(OPEN, 2), AT_DESTINATION, State.COMPLETED, Task.REMOVE),
        ("cell-2", gate(FROZEN, 2), AT_DESTINATION, State.COMPLETED, Task.REMOVE),
        ("cell-1", gate(MOVED, 2), AT_DESTINATION, State.COMPLETED, Task.REPORT),
        # the topology was put back
        ("cell-2", gate(OPEN, 9), AT_DESTINATION, State.COMPLETED, Task.REPORT),
        ("cell-2", gate(FROZEN, 2), AT_SOURCE, State.READY, Task.REPORT),
    ],
)
def test_a_gate_is_judged(
    cell: str, found: Leftover, route: Route, state: State, task: Task
) -> None:
    resources = frozenset() if state is State.COMPLETED else HELD_AT_BOTH
    assert judge(cell, found, route, known(state, resources=resources)).task is task


@pytest.mark.parametrize(
    ("cell", "route", "migration"),
    [
        ("cell-1", AT_SOURCE, None),
        ("cell-1", None, known(State.READY)),
        ("cell-3", AT_SOURCE, known(State.READY)),
        ("cell-1", AT_SOURCE, known(State.READY, organization="8")),
    ],
    ids=["no migration", "no route", "another cell", "another organization"],
)
def test_what_the_topology_does_not_know_is_left_to_a_person(
    cell: str, route: Route | None, migration: Known | None
) -> None:
    verdict = judge(cell, gate(OPEN), route, migration)
    assert verdict.task is Task.REPORT
    assert verdict.remedy


def test_a_freeze_that_is_not_enforced_is_the_barriers_own_business() -> None:
    found = gate(FROZEN, obeyed=False)
    assert judge("cell-1", found, AT_SOURCE, known(State.CUTTING_OVER)).task is Task.KEEP
    reverted = gate(OPEN, obeyed=False)  # a restart lost the marker, not the rules
    assert judge("cell-1", reverted, AT_SOURCE, known(State.CUTTING_OVER)).task is Task.KEEP
    assert judge("cell-1", reverted, AT_SOURCE, known(State.READY)).task is Task.THAW
    moved = gate(MOVED, 2, obeyed=False)
    assert judge("cell-1", moved, AT_DESTINATION, known(State.RETAINED)).task is Task.OBEY


@pytest.mark.parametrize(
    ("found", "task"),
    [
        (None, Task.RESTORE),
        (gate(OPEN), Task.RESTORE),
        (gate(MOVED, 2), Task.KEEP),
        (gate(IMPORTING, 2), Task.KEEP),
        (gate(FROZEN), Task.RESTORE),
    ],
)
def test_a_copy_that_was_left_behind_must_be_gated(found: Leftover | None, task: Task) -> None:
    expected = expected_moved(known(State.RETAINED, handed_over=True))
    assert expected is not None
    assert expected.cell == "cell-1"
    assert judge_absence(expected, "postgres", found, AT_DESTINATION).task is task
    # this store never had one, or is clean already
    assert judge_absence(expected, "redis", found, AT_DESTINATION).task is Task.KEEP


def test_before_the_flip_nothing_must_be_gated_at_the_source() -> None:
    assert expected_moved(known(State.CUTTING_OVER)) is None
    assert expected_moved(known(State.COMPLETED, resources=frozenset())) is None
    returned = expected_moved(known(State.ROLLED_BACK))
    assert returned is not None
    assert (returned.cell, returned.waits) == ("cell-2", True)
