"""How fast moves have been: the base of plan's estimates."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cellferry.model import State
from cellferry.topology import Topology

#: Before any move has been measured: half of the lower figures of the prototypes, per second.
UNMEASURED = {"postgres": 25_000.0, "redis": 15_000.0}
#: Before any cutover has been measured, in seconds.
UNMEASURED_PAUSE_S = 0.2


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured rates; `basis` says of how many migrations, in plain words."""

    copy_per_s: Mapping[str, float]
    pause_s: float
    basis: str


def measured_rates(topology: Topology, kinds: tuple[str, ...], latest: int = 20) -> Rates:
    """Return the medians over the latest completed copies and cutovers."""
    flipped = {State.SOAKING, State.RETAINED, State.CLEANING, State.COMPLETED}
    done = topology.migrations(states=flipped, limit=latest)
    copies: dict[str, list[float]] = {kind: [] for kind in kinds}
    pauses: list[float] = []
    for migration in done:
        copied: Mapping[str, Any] = migration.facts.get("copied", {})
        for kind in kinds:
            one = copied.get(kind)
            # A tiny copy measures its overhead, not its rate.
            if one and one.get("count", 0) >= 1_000 and one.get("seconds", 0) > 0:
                copies[kind].append(one["count"] / one["seconds"])
        seconds = migration.facts.get("pause", {}).get("seconds")
        if seconds:
            pauses.append(float(seconds))
    return Rates(
        copy_per_s={
            kind: statistics.median(found) if found else UNMEASURED.get(kind, 1_000.0)
            for kind, found in copies.items()
        },
        pause_s=statistics.median(pauses) if pauses else UNMEASURED_PAUSE_S,
        basis=f"measured in {len(pauses)} earlier moves"
        if pauses
        else "not measured yet: cautious figures",
    )
