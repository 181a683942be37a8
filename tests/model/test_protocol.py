"""The protocol's model: every invariant holds in every state, and no precaution is superfluous."""

from __future__ import annotations

import pytest
from tests.model.explore import explore
from tests.model.protocol import ACTIONS, steps
from tests.model.scenarios import SCENARIOS, WHOLE, Scenario
from tests.model.variants import VARIANTS, Variant

#: How many states each scenario has. Another number means that the model says something else now:
#: look whether that was meant, then write it here and in docs/protocol-model.md.
STATES = {
    "capture": 91_689,
    "cutover": 279_160,
    "cutover, two faults": 136_249,
    "switchback": 300_481,
    "switchback, two faults": 109_466,
    "clean-up": 212_515,
    "whole life": 50_279,
}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: one.name)
def test_every_invariant_holds_in_every_state(scenario: Scenario) -> None:
    found = explore(scenario.model, scenario.start)

    assert not found.broken, "\n".join([found.broken, *found.trace])
    assert found.states == STATES[scenario.name]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda one: one.name)
def test_without_this_precaution_an_invariant_breaks(variant: Variant) -> None:
    found = explore(variant.scenario.model, variant.scenario.start)

    assert found.broken == variant.breaks
    assert found.trace, "it is broken from the start"


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda one: one.name)
def test_with_the_precaution_the_same_bounds_are_safe(variant: Variant) -> None:
    """The counterexample is the missing precaution's fault, not that of a scenario's bounds."""
    scenario = variant.scenario.bounded(
        "honest", variant.scenario.start.faults, variant.scenario.model.scripts, broken=frozenset()
    )

    found = explore(scenario.model, scenario.start)

    assert not found.broken, "\n".join([found.broken, *found.trace])


def test_every_action_of_the_honest_protocol_happens() -> None:
    """An action that is never reached would be modelled in vain."""
    happened: set[str] = set()
    seen, level = {WHOLE.start}, [WHOLE.start]
    while level:
        following = []
        for state in level:
            happened |= {c.at for c in state.controllers}
            for step in steps(WHOLE.model, state):
                if step.state not in seen:
                    seen.add(step.state)
                    following.append(step.state)
        level = following

    assert happened == HONEST


#: Every action but those that only variants have.
HONEST = set(ACTIONS) - {
    "aborted late",
    "arm late",
    "catch-up apply log",
    "finish apply log",
    "open early",
    "soak apply log",
    "thaw first",
    "undo late",
    "unverified",
}
