"""A short soak, with a seed that is printed and in the failure; `FAULT_SEED=n` repeats it.

The long one is `make test-soak`.
"""

from __future__ import annotations

import os
import random

import pytest
from tests.fault.soak import Outcome, soak

SEED = int(os.environ.get("FAULT_SEED") or random.SystemRandom().randrange(10**6))


def told(outcome: Outcome) -> str:
    return "\n".join([*outcome.details(), *outcome.faults, outcome.line()])


@pytest.mark.timeout(900)
def test_whatever_strikes_for_a_minute_nothing_is_lost() -> None:
    print(f"the soak's seed is {SEED}")
    outcome = soak(SEED, 1.0, say=print)
    assert outcome.ok, f"FAULT_SEED={SEED}\n{told(outcome)}"
    assert outcome.moves, "nothing moved: the soak shows nothing"
    assert outcome.strikes, "nothing struck: the soak shows nothing"
    assert outcome.acknowledged


@pytest.mark.timeout(900)
def test_a_broken_product_does_not_survive_a_soak() -> None:
    outcome = soak(2, 2.0, sabotage="whole log is forgotten")  # ends when it is found
    print(told(outcome))
    assert outcome.lost or any("VerificationFailed" in text for text in outcome.faults)
