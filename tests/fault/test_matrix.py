"""A part of the kill matrix, chosen anew each time: every fault once, phases by chance.

The seed is printed and in the test's failure; `FAULT_SEED=n` repeats a run. The whole matrix is
`make test-fault`.
"""

from __future__ import annotations

import os
import random

import pytest
from tests.fault import matrix
from tests.fault.faults import FAULTS
from tests.fault.sabotage import SABOTAGE
from tests.fault.scenario import POINTS, Outcome, scenarios

SEED = int(os.environ.get("FAULT_SEED") or random.SystemRandom().randrange(10**6))
JOBS = 2

#: Where each way to break the product shows: the phase is one at which it matters.
BITES = {
    "abort does not thaw": "cutover: all stores frozen/kill step/abort",
    "unknown flip thaws": "cutover: last delta committed and verified/lose answer/retry",
    "whole log is forgotten": "sync: done/kill step/retry",
    "attempts share a number": "cutover: last delta committed and verified/stop step/retry",
}


def play(names: list[str], seed: int, sabotage: str | None = None) -> list[Outcome]:
    todo = [one for one in scenarios(seed) if one.name in names]
    assert len(todo) == len(names)
    return list(matrix.play(todo, JOBS, sabotage=sabotage))


@pytest.mark.timeout(900)
def test_whatever_dies_nothing_is_lost_and_the_organization_can_write_again() -> None:
    print(f"the kill matrix's seed is {SEED}")
    todo = matrix.sample(scenarios(SEED), len(FAULTS), SEED)
    assert {one.fault.name for one in todo} == {one.name for one in FAULTS}
    outcomes = list(matrix.play(todo, JOBS))
    print(matrix.table(outcomes))
    print(matrix.verdict(outcomes, len(todo)))
    failed = [one for one in outcomes if not one.ok]
    assert not failed, f"FAULT_SEED={SEED}\n" + "\n".join(matrix.story(one) for one in failed)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", SABOTAGE)
def test_a_broken_product_is_found(way: str) -> None:
    (outcome,) = play([BITES[way]], 2, sabotage=way)
    print(matrix.story(outcome))
    assert outcome.faults
    assert not any("the harness failed" in text for text in outcome.faults)


def test_every_phase_has_its_row_and_every_name_is_its_own() -> None:
    from cellferry.phases import Phase

    assert {point.phase for point in POINTS} == set(Phase)
    names = [one.name for one in scenarios(1)]
    assert len(names) == len(set(names))
    assert not any(";" in name for name in names)
