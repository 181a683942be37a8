"""The state machine of a migration: what its table of transitions promises."""

from __future__ import annotations

from collections import deque

import pytest

from cellferry.errors import InvalidInput
from cellferry.model import BEFORE_FLIP, TRANSITIONS, State
from cellferry.topology.migrations import FLIPS, checked_state

AFTER_FLIP = frozenset(State) - BEFORE_FLIP - {State.ABORTED}
ENDS = frozenset({State.COMPLETED, State.ABORTED, State.ROLLED_BACK})


def reachable(start: State) -> frozenset[State]:
    seen = {start}
    queue = deque([start])
    while queue:
        for after in TRANSITIONS[queue.popleft()] - seen:
            seen.add(after)
            queue.append(after)
    return frozenset(seen)


def test_every_state_is_reached_from_planned() -> None:
    assert reachable(State.PLANNED) == frozenset(State)


def test_only_the_ends_are_ends() -> None:
    assert {state for state in State if not TRANSITIONS[state]} == ENDS


@pytest.mark.parametrize("state", sorted(BEFORE_FLIP))
def test_before_the_flip_a_migration_can_always_be_aborted(state: State) -> None:
    assert State.ABORTED in TRANSITIONS[state]


@pytest.mark.parametrize("state", sorted(AFTER_FLIP))
def test_after_the_flip_nothing_leads_back_before_it(state: State) -> None:
    assert not reachable(state) & (BEFORE_FLIP | {State.ABORTED})


def test_the_flip_is_the_only_way_past_the_commit_point() -> None:
    crossings = {
        (before, after)
        for before in BEFORE_FLIP
        for after in TRANSITIONS[before]
        if after in AFTER_FLIP
    }

    assert crossings == {(State.CUTTING_OVER, State.SOAKING)}


def test_a_roll_back_is_a_flip_too_and_can_give_up_before_it() -> None:
    before = {state for state in State if State.ROLLED_BACK in TRANSITIONS[state]}

    assert before == {State.ROLLING_BACK}
    assert State.RETAINED in TRANSITIONS[State.ROLLING_BACK]
    assert {
        (State.CUTTING_OVER, State.SOAKING),
        (State.ROLLING_BACK, State.ROLLED_BACK),
    } == FLIPS


def test_the_source_is_deleted_only_after_retention() -> None:
    assert {state for state in State if State.CLEANING in TRANSITIONS[state]} == {State.RETAINED}


def test_an_unknown_state_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match=r"'copyed'.*planned, copying"):
        checked_state("copyed")
