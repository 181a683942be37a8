"""The statistics of soak: chance halts nothing, and what is really worse is found."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellferry.client_figures import BUCKETS, Figures, bucket, upper_bound_s
from cellferry.migration.health import (
    Thresholds,
    Verdict,
    error_limit,
    judge_errors,
    judge_lag,
    judge_latency,
    judge_refusals,
    wilson,
)

THRESHOLDS = Thresholds(operations=50)
CELLS = ("cell-2", "cell-1")


def counted(chance: random.Random, operations: int, rate: float) -> Figures:
    failures = sum(chance.random() < rate for _ in range(operations))
    return Figures(operations=operations, failures=failures)


def timed(chance: random.Random, operations: int, median_s: float, spread: float) -> Figures:
    return Figures.of_latencies(
        median_s * chance.lognormvariate(0, spread) for _ in range(operations)
    )


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(),
    rate=st.floats(0, 0.2) | st.floats(0, 1),
    before=st.integers(0, 60) | st.integers(0, 3_000),
    after=st.integers(0, 3_000),
)
def test_a_noisy_but_equal_error_rate_is_never_too_high(
    seed: int, rate: float, before: int, after: int
) -> None:
    chance = random.Random(seed)
    known = counted(chance, before, rate)
    if not known.operations and rate > 0.4:
        return  # nothing is known of before: then half of them may fail
    finding = judge_errors(known, counted(chance, after, rate), THRESHOLDS, *CELLS)
    assert finding.verdict is not Verdict.UNWELL, finding.text


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(),
    median_s=st.floats(0.000_1, 2),
    spread=st.floats(0.05, 2),
    before=st.integers(0, 2_000),
    after=st.integers(0, 2_000),
)
def test_a_noisy_but_equal_latency_is_never_too_long(
    seed: int, median_s: float, spread: float, before: int, after: int
) -> None:
    chance = random.Random(seed)
    finding = judge_latency(
        timed(chance, before, median_s, spread),
        timed(chance, after, median_s, spread),
        THRESHOLDS,
        *CELLS,
    )
    assert finding.verdict is not Verdict.UNWELL, finding.text


@pytest.mark.parametrize("seed", range(20))
def test_many_looks_at_the_same_noise_find_nothing(seed: int) -> None:
    """A soak of an hour looks 3,600 times at windows that overlap."""
    chance = random.Random(seed)
    rate = chance.choice([0.0, 0.001, 0.01, 0.1])
    before = counted(chance, 500, rate)
    outcomes = [chance.random() < rate for _ in range(4_000)]
    for end in range(100, 4_000, 10):
        window = outcomes[max(0, end - 600) : end]
        seen = Figures(operations=len(window), failures=sum(window))
        assert judge_errors(before, seen, THRESHOLDS, *CELLS).verdict is Verdict.WELL


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Figures(1_000, 1), Figures(200, 40)),  # 0.1% → 20%
        (Figures(1_000, 200), Figures(1_000, 700)),  # 20% → 70%
        (Figures(10, 0), Figures(60, 60)),  # little is known, and nothing works
        (None, Figures(100, 90)),  # nothing is known, and nothing works
        (Figures(5_000, 1_000), Figures(200, 199)),  # three times 20% is no bound of its own
    ],
)
def test_a_rise_of_errors_is_found(before: Figures | None, after: Figures) -> None:
    finding = judge_errors(before, after, THRESHOLDS, *CELLS)
    assert finding.verdict is Verdict.UNWELL
    assert finding.returning_helps
    for words in ("in cell-2", "before", "the limit is"):
        assert words in finding.text


def test_a_rise_below_the_floor_is_nobodys_concern() -> None:
    before, after = Figures(1_000_000, 0), Figures(100_000, 700)
    assert judge_errors(before, after, THRESHOLDS, *CELLS).verdict is Verdict.WELL


def test_too_few_operations_are_unknown_not_well() -> None:
    for after in (None, Figures(), Figures(49, 49)):
        assert judge_errors(Figures(500), after, THRESHOLDS, *CELLS).verdict is Verdict.UNKNOWN
        assert judge_latency(None, after, THRESHOLDS, *CELLS).verdict is Verdict.UNKNOWN


def test_a_rise_of_latency_is_found() -> None:
    chance = random.Random(1)
    before = timed(chance, 500, 0.004, 0.5)
    slow = Figures.of_latencies(0.3 + 0.004 * chance.random() for _ in range(80))
    finding = judge_latency(before, slow, THRESHOLDS, *CELLS)
    assert finding.verdict is Verdict.UNWELL
    assert "cell-2" in finding.text
    assert "ms" in finding.text


def test_a_rise_of_latency_by_milliseconds_is_nobodys_concern() -> None:
    before = Figures.of_latencies([0.001] * 500)
    after = Figures.of_latencies([0.02] * 500)
    assert judge_latency(before, after, THRESHOLDS, *CELLS).verdict is Verdict.WELL


@given(hits=st.integers(0, 5_000), more=st.integers(0, 5_000))
def test_wilsons_interval_holds_the_share(hits: int, more: int) -> None:
    of = hits + more
    low, high = wilson(hits, of)
    assert 0 <= low <= high <= 1
    if of:
        assert low - 1e-9 <= hits / of <= high + 1e-9


@given(failures=st.integers(0, 1_000), well=st.integers(0, 1_000), factor=st.floats(1, 100))
def test_the_limit_is_never_below_what_was_nor_out_of_reach(
    failures: int, well: int, factor: float
) -> None:
    before = Figures(failures + well, failures)
    limit = error_limit(before, factor)
    assert limit <= 1
    if before.operations:
        assert limit >= before.failures / before.operations - 1e-9


@given(seconds=st.floats(0, 100))
def test_a_latency_is_in_its_bucket(seconds: float) -> None:
    number = bucket(seconds)
    assert 0 <= number < BUCKETS
    assert seconds <= upper_bound_s(number) * (1 + 1e-9)
    if number:
        assert seconds > upper_bound_s(number - 1) * (1 - 1e-9)


@settings(deadline=None)
@given(
    latencies=st.lists(st.floats(0.000_2, 10), min_size=1, max_size=300),
    share=st.floats(0.01, 0.99),
)
def test_a_quantile_is_right_to_its_bucket(latencies: list[float], share: float) -> None:
    figures = Figures.of_latencies(latencies)
    ranked = sorted(latencies)
    true = ranked[max(0, -(-int(share * len(ranked) * 1e9) // int(1e9)) - 1)]
    found = figures.quantile_s(share)
    assert found is not None
    assert true / 1.5 <= found <= true * 1.5
    bounds = figures.quantile_bounds_s(share, 3.5)
    assert bounds is not None
    assert bounds[0] <= true * 1.001
    assert bounds[1] >= true * 0.999


def test_figures_survive_being_written_down() -> None:
    figures = Figures.of_latencies([0.001, 0.5, 100.0], failures=2)
    assert Figures.from_dict(figures.as_dict()) == figures


@pytest.mark.parametrize(
    ("remaining", "age_s", "trouble", "verdict"),
    [
        ({"postgres": 10}, 1, None, Verdict.WELL),
        ({"postgres": 10}, 1, "cell-1 does not answer", Verdict.UNKNOWN),
        ({"postgres": 10}, 500, "cell-1 does not answer", Verdict.UNWELL),
        ({"postgres": 60_000, "redis": 60_000}, 1, None, Verdict.UNWELL),
    ],
)
def test_a_lag_is_found(
    remaining: dict[str, int], age_s: float, trouble: str | None, verdict: Verdict
) -> None:
    finding = judge_lag(remaining, age_s, Thresholds(), trouble)
    assert finding.verdict is verdict
    assert not finding.returning_helps
    assert (trouble or "") in finding.text


def test_refusals_are_unknown_without_reports_and_never_a_reason_to_return() -> None:
    assert judge_refusals(None, "cell-1", 30).verdict is Verdict.UNKNOWN
    assert judge_refusals(0, "cell-1", 30).verdict is Verdict.WELL
    finding = judge_refusals(3, "cell-1", 30)
    assert (finding.verdict, finding.returning_helps) == (Verdict.UNWELL, False)
