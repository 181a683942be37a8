"""What an application saw of one organization in one cell, counted.

Applications report these figures (`cellferry.routing`), the topology keeps them for a while, and
soak compares those after a cutover with those before. Latencies go into a histogram whose bounds
grow by the square root of 2, so that a quantile is right to 41% whatever its size, in 44 numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

#: Upper bound of the first bucket, in seconds; the last begins at about five minutes.
FIRST_S = 0.000_1
BUCKETS = 44


def bucket(seconds: float) -> int:
    """Return the number of the bucket that counts a latency."""
    if seconds <= FIRST_S:
        return 0
    return min(BUCKETS - 1, math.ceil(2 * math.log2(seconds / FIRST_S)))


def upper_bound_s(number: int) -> float:
    """Return the longest latency that belongs into bucket `number`, in seconds."""
    return float(FIRST_S * 2 ** (number / 2))


@dataclass(frozen=True, slots=True)
class Figures:
    """Counts of tries of one organization in one cell under one epoch.

    Attributes:
        operations: tries that the cell did or failed to do; what the gate turned away, and what
            lost against another transaction, is not among them.
        failures: those of the operations that raised.
        conflicts: tries that lost against another transaction.
        moved, being_moved: tries that the gate turned away.
        seconds, longest_s: of the operations that succeeded.
        latencies: how many operations that succeeded were in each bucket.
    """

    operations: int = 0
    failures: int = 0
    conflicts: int = 0
    moved: int = 0
    being_moved: int = 0
    seconds: float = 0.0
    longest_s: float = 0.0
    latencies: tuple[int, ...] = ()

    @classmethod
    def of_latencies(cls, seconds: Iterable[float], failures: int = 0) -> Self:
        """Return the figures of operations that took so many seconds each."""
        counts = [0] * BUCKETS
        taken = list(seconds)
        for one in taken:
            counts[bucket(one)] += 1
        return cls(
            operations=len(taken) + failures,
            failures=failures,
            seconds=sum(taken),
            longest_s=max(taken, default=0.0),
            latencies=tuple(counts),
        )

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Read what `as_dict` made."""
        return cls(**{**value, "latencies": tuple(value.get("latencies", ()))})

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {**asdict(self), "latencies": list(self.latencies)}

    @property
    def answered(self) -> int:
        """Operations whose latency is known."""
        return sum(self.latencies)

    @property
    def error_rate(self) -> float | None:
        """Share of the operations that failed; None without any."""
        return self.failures / self.operations if self.operations else None

    def quantile_s(self, share: float) -> float | None:
        """Return the latency under which `share` of the operations stayed; None without any."""
        total = self.answered
        if not total:
            return None
        return min(upper_bound_s(self._bucket_of_rank(share * total)), self.longest_s)

    def quantile_bounds_s(self, share: float, z: float) -> tuple[float, float] | None:
        """Return between which latencies the true quantile lies, `z` standard errors around.

        Needs no assumption about how latencies are distributed: the rank of a quantile in a
        sample is binomial (David and Nagaraja, Order Statistics, 7.1). The lower bound is the
        lower bound of its bucket, the upper one the upper bound.
        """
        total = self.answered
        if not total:
            return None
        spread = z * math.sqrt(total * share * (1 - share))
        low = self._bucket_of_rank(max(share * total - spread, 0))
        high = self._bucket_of_rank(min(share * total + spread + 1, total))
        return (
            0.0 if low == 0 else upper_bound_s(low - 1),
            max(upper_bound_s(high), self.longest_s if high == BUCKETS - 1 else 0.0),
        )

    def _bucket_of_rank(self, rank: float) -> int:
        seen = 0
        last = 0
        for number, count in enumerate(self.latencies):
            if count:
                seen += count
                last = number
                if seen >= rank:
                    break
        return last


def trimmed(counts: Sequence[int]) -> list[int]:
    """Return `counts` without the zeros at its end."""
    length = len(counts)
    while length and not counts[length - 1]:
        length -= 1
    return list(counts[:length])
