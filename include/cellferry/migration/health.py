"""Whether an organization is as well at its new cell as it was at its old one: the statistics.

A check compares what its clients report now with what they reported before the cutover. Chance
alone must not halt a migration, so each compares bounds of confidence, not figures: the error
rate by Wilson's interval (E. B. Wilson 1927, "Probable inference, the law of succession, and
statistical inference"), the 95th percentile of the latency by order statistics, both at `Z`
standard errors on either side. What is too little to judge is called unknown, never well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cellferry.client_figures import Figures
from cellferry.migration.options import MoveOptions

#: Standard errors: chance passes one of them once in four thousand looks, both together never.
Z = 3.5
QUANTILE = 0.95
#: Rates and differences below these are nobody's concern, whatever they were before.
ERROR_FLOOR = 0.01
LATENCY_FLOOR_S = 0.05
#: What may fail, at most, where nothing is known of before.
ERRORS_WITHOUT_BEFORE = 0.5


class Verdict(StrEnum):
    """What a check found."""

    WELL = "well"
    UNKNOWN = "unknown"
    UNWELL = "unwell"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check at one moment.

    Attributes:
        check: `errors`, `latency`, `refusals`, `lag`, `smoke query …`.
        text: in plain words: the value, what it was before, and the limit.
        returning_helps: whether the old cell would do better, so that going back is a remedy.
    """

    check: str
    verdict: Verdict
    text: str
    value: Any = None
    before: Any = None
    limit: Any = None
    returning_helps: bool = False


@dataclass(frozen=True, slots=True)
class Thresholds:
    """When a difference counts; see the options of the same names."""

    operations: int = 100
    error_factor: float = 2.0
    latency_factor: float = 3.0
    lag_keys: int = 100_000
    lag_s: float = 120.0

    @classmethod
    def of(cls, options: MoveOptions) -> Thresholds:
        """Read them from a move's options."""
        return cls(
            operations=options.soak_operations,
            error_factor=options.soak_error_factor,
            latency_factor=options.soak_latency_factor,
            lag_keys=options.soak_lag_keys,
            lag_s=options.soak_lag_s,
        )


def wilson(hits: int, of: int, z: float = Z) -> tuple[float, float]:
    """Return Wilson's interval for a share of which `hits` were seen among `of`."""
    if of == 0:
        return 0.0, 1.0
    share = hits / of
    squared = z * z
    center = (share + squared / (2 * of)) / (1 + squared / of)
    spread = z / (1 + squared / of) * math.sqrt(share * (1 - share) / of + squared / (4 * of * of))
    return max(0.0, center - spread), min(1.0, center + spread)


def error_limit(before: Figures | None, factor: float) -> float:
    """Return the error rate that is too high: over `factor` times what it may have been before.

    Never so high that only more than all could exceed it: between what it may have been and 100%
    half of the way is enough.
    """
    if before is None or not before.operations:
        return ERRORS_WITHOUT_BEFORE
    may_have_been = wilson(before.failures, before.operations)[1]
    return max(ERROR_FLOOR, min(factor * may_have_been, (1 + may_have_been) / 2))


def judge_errors(
    before: Figures | None, after: Figures | None, thresholds: Thresholds, new: str, old: str
) -> Finding:
    """Compare the error rates of the organization's operations."""
    was = f"{percent(before.error_rate)} in {old} before" if before else "not known before"
    if after is None or after.operations < thresholds.operations:
        return _too_few("errors", after, thresholds.operations)
    limit = error_limit(before, thresholds.error_factor)
    surely = wilson(after.failures, after.operations)[0]
    unwell = surely > limit
    return Finding(
        "errors",
        Verdict.UNWELL if unwell else Verdict.WELL,
        f"{percent(after.error_rate)} of {after.operations:,} operations fail in {new}, {was}"
        + (
            f"; surely over {percent(surely)}, and the limit is {percent(limit)}"
            if unwell
            else f"; the limit is {percent(limit)}"
        ),
        after.error_rate,
        before.error_rate if before else None,
        limit,
        returning_helps=True,
    )


def judge_latency(
    before: Figures | None, after: Figures | None, thresholds: Thresholds, new: str, old: str
) -> Finding:
    """Compare the 95th percentiles of the latency of the organization's operations."""
    for figures in (after, before):
        if figures is None or figures.answered < thresholds.operations:
            when = "" if figures is after else " before the cutover"
            return _too_few("latency", figures, thresholds.operations, when)
    bounds_before = before and before.quantile_bounds_s(QUANTILE, Z)
    bounds_after = after and after.quantile_bounds_s(QUANTILE, Z)
    if before is None or after is None or not bounds_before or not bounds_after:
        return _too_few("latency", after, thresholds.operations)
    limit = max(thresholds.latency_factor * bounds_before[1], bounds_before[1] + LATENCY_FLOOR_S)
    unwell = bounds_after[0] > limit
    value, was = after.quantile_s(QUANTILE), before.quantile_s(QUANTILE)
    return Finding(
        "latency",
        Verdict.UNWELL if unwell else Verdict.WELL,
        f"95% of the operations take up to {milliseconds(value)} in {new}, {milliseconds(was)} in "
        f"{old} before"
        + (
            f"; surely over {milliseconds(bounds_after[0])}, and the limit is {milliseconds(limit)}"
            if unwell
            else f"; the limit is {milliseconds(limit)}"
        ),
        value,
        was,
        limit,
        returning_helps=True,
    )


def judge_refusals(refused: int | None, old: str, after_s: float) -> Finding:
    """Say whether clients still go to the cell that the organization left."""
    if refused is None:
        return Finding("refusals", Verdict.UNKNOWN, "no reports of the organization's clients")
    return Finding(
        "refusals",
        Verdict.UNWELL if refused else Verdict.WELL,
        f"{refused:,} tries in {old} were turned away although every route should have been "
        f"renewed: more than {after_s:g} s after the flip",
        refused,
        0,
        0,
    )


def judge_lag(
    remaining: Mapping[str, int], age_s: float, thresholds: Thresholds, trouble: str | None = None
) -> Finding:
    """Say whether the old cell follows: how many changes wait, and since when none came over.

    Args:
        remaining: keys that wait, by store.
        age_s: seconds since the last reverse round ended.
        trouble: why there was none since.
    """
    waiting = sum(remaining.values())
    late = age_s > thresholds.lag_s  # since the round before the one that has just ended
    text = f"{waiting:,} changes wait for the old cell (limit {thresholds.lag_keys:,})"
    if late or trouble:
        text = (
            f"the last reverse round was {age_s:.0f} s ago (limit {thresholds.lag_s:g} s)"
            + (f": {trouble}" if trouble else "")
            + f"; {text}"
        )
    return Finding(
        "lag",
        Verdict.UNWELL
        if late or waiting > thresholds.lag_keys
        else (Verdict.UNKNOWN if trouble else Verdict.WELL),
        text,
        {"keys": waiting, "age_s": round(age_s, 1)},
        None,
        {"keys": thresholds.lag_keys, "age_s": thresholds.lag_s},
    )


def percent(share: float | None) -> str:
    """Return a share as people write it."""
    return "none" if share is None else f"{100 * share:.1f}%"


def milliseconds(seconds: float | None) -> str:
    """Return a latency as people write it."""
    if seconds is None:
        return "unknown"
    return f"{1000 * seconds:.{0 if seconds >= 0.01 else 1}f} ms"


def _too_few(check: str, figures: Figures | None, needed: int, when: str = "") -> Finding:
    count = figures.operations if figures else 0
    text = (
        f"no reports of the organization's clients{when}"
        if figures is None
        else f"too few operations to judge{when}: {count:,} of {needed:,}"
    )
    return Finding(check, Verdict.UNKNOWN, text, count, None, needed)
