"""What the clients of a shard set saw, counted; the `watch` step compares before with after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from cellferry.client_figures import BUCKETS, Figures, bucket, trimmed


@dataclass(slots=True)
class ShardFigures:
    """Counts of operations.

    Attributes:
        claims: that were decided; `hits` of them found the id taken.
        reads: of values; `found` of them found one.
        writes: of values and counters, releases and deletions.
        failures: operations that raised.
        waits: operations that waited for a state; `waited_s` how long together, in seconds.
        seconds, longest_s: of the operations that succeeded, waiting included.
        latencies: how many of them were in each bucket of `cellferry.client_figures`.
    """

    claims: int = 0
    hits: int = 0
    reads: int = 0
    found: int = 0
    writes: int = 0
    failures: int = 0
    waits: int = 0
    waited_s: float = 0.0
    seconds: float = 0.0
    longest_s: float = 0.0
    latencies: list[int] = field(default_factory=lambda: [0] * BUCKETS)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Read what `as_dict` made."""
        counts = list(value.get("latencies", ()))
        return cls(**{**value, "latencies": counts + [0] * (BUCKETS - len(counts))})

    @classmethod
    def sum(cls, parts: Iterable[ShardFigures]) -> Self:
        """Add several up."""
        total = cls()
        for one in parts:
            total.add(one)
        return total

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {**asdict(self), "latencies": trimmed(self.latencies)}

    def took(self, seconds: float) -> None:
        """Count one operation that succeeded."""
        self.seconds += seconds
        self.longest_s = max(self.longest_s, seconds)
        self.latencies[bucket(seconds)] += 1

    def add(self, other: ShardFigures) -> None:
        """Add another's counts to these."""
        for name in ("claims", "hits", "reads", "found", "writes", "failures", "waits"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.waited_s += other.waited_s
        self.seconds += other.seconds
        self.longest_s = max(self.longest_s, other.longest_s)
        self.latencies = [a + b for a, b in zip(self.latencies, other.latencies, strict=True)]

    @property
    def operations(self) -> int:
        """All operations that ended."""
        return sum(self.latencies) + self.failures

    @property
    def hit_ratio(self) -> float | None:
        """Share of the claims that found the id taken; None without any."""
        return self.hits / self.claims if self.claims else None

    @property
    def error_rate(self) -> float | None:
        """Share of the operations that raised; None without any."""
        return self.failures / self.operations if self.operations else None

    def quantile_s(self, share: float) -> float | None:
        """Return the latency under which `share` of the operations stayed; None without any."""
        counted = Figures(latencies=tuple(self.latencies), longest_s=self.longest_s)
        return counted.quantile_s(share)
