"""How much one mover may work at one cell: the rule, without threads, clocks or servers.

Additive increase, multiplicative decrease, as TCP does it and as Vitess' and Slacker's throttles
do with latencies: the probes' p95 over its target halves the share at once, one far over it goes
to the floor; as long as all is well the share grows a little each second. Movers that follow this
rule at one cell come to equal shares (Chiu and Jain, 1989). The floor keeps work going.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from enum import StrEnum

#: Least share: work goes on, however slow the cell is.
FLOOR = 0.05
#: A share to begin with; it doubles each second until the first complaint, then grows slowly.
FIRST = 0.1
#: What a decrease leaves of the share.
DECREASE = 0.5
#: What is added each second that all is well; movers at one cell divide it between them.
INCREASE = 0.05
#: A p95 so many times over its target leaves the floor only.
FAR = 5.0
#: The share grows while the p95 is below this part of the target.
EASY = 0.85
#: A share while the cell cannot be asked: whether it is slow is not known.
BLIND = 0.5
#: Samples that count, at most: the p95 of 20 is over the target when two of them are.
WINDOW = 20
#: Samples after a change before the share may grow.
ENOUGH = 8
#: A standby that is further behind (seconds) counts as a slow cell. One that was so before the work
#: began may be meant to be (`recovery_min_apply_delay`): it counts if it falls so far behind that.
LAG_LIMIT_S = 10.0


class Act(StrEnum):
    """What a decision did to the share."""

    SLOWED = "slowed"
    RECOVERED = "recovered"
    SHARED = "shared"
    """Another mover came: the budget of both is that of one before."""
    BLINDED = "blinded"
    """The probe does not work."""
    SEEING = "seeing"
    """It works again."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One change of a share."""

    act: Act
    before: float
    after: float
    reason: str


@dataclass(frozen=True, slots=True)
class Aim:
    """The target of a p95, in seconds, and what it was derived from.

    Attributes:
        target_s: what the probes' p95 is kept under.
        idle_s: the p95 that was measured while the mover rested; None for an operator's target.
    """

    target_s: float
    idle_s: float | None = None

    #: An automatic target is this many times the idle p95, and at least so much more (seconds).
    FACTOR = 1.25
    LEAST_ROOM_S = 0.0001

    @classmethod
    def over(cls, idle_s: float) -> Aim:
        """Return the target for a cell whose probes take `idle_s` while the mover rests."""
        return cls(max(idle_s * cls.FACTOR, idle_s + cls.LEAST_ROOM_S), idle_s)


def p95(samples: list[float], window: int = 0) -> float:
    """Return the value that 95 % of the samples do not exceed (nearest rank).

    Args:
        samples: at least one.
        window: with fewer samples than this, the missing ones are taken to be 0: what is said to
            be over a target surely is, whatever comes.
    """
    size = max(len(samples), window)
    over = size - math.ceil(size * 0.95)
    ordered = sorted(samples, reverse=True)
    return ordered[over] if over < len(ordered) else 0.0


class Governor:
    """Decides the share of one mover at one cell.

    Args:
        place: cell and store, for people: `cell-2/postgres`.
        interval_s: between two probes; one that takes longer stands for those it kept from being
            made, so that a cell that stands still is not seen as one slow sample.
    """

    def __init__(self, place: str, interval_s: float, *, now: float) -> None:
        self.place = place
        self.share = FIRST
        self.aim: Aim | None = None
        self.movers = 1
        self._interval_s = interval_s
        self._samples: deque[float] = deque(maxlen=WINDOW)
        self._grew_at = now
        self._slow_start = True
        self._blind = False
        self._lag_s = 0.0
        self._usual_lag_s: float | None = None

    @property
    def p95_s(self) -> float | None:
        """The p95 of the latest samples, in seconds; None without any."""
        return p95(list(self._samples)) if self._samples else None

    @property
    def is_blind(self) -> bool:
        """Whether the probe does not work."""
        return self._blind

    def sample(self, latency_s: float, now: float) -> list[Decision]:
        """Take a probe's latency into account; return what was decided."""
        decided = []
        if self._blind:
            self._blind = False
            self._grew_at = now
            decided.append(Decision(Act.SEEING, self.share, self.share, "its probe works again"))
        for _ in range(min(WINDOW, max(1, int(latency_s / self._interval_s)))):
            self._samples.append(latency_s)
        return [*decided, *self._decide(now)]

    def waiting(self, age_s: float, now: float) -> list[Decision]:
        """Take a probe into account that has not been answered for `age_s` seconds."""
        if self.aim is None or age_s <= max(self.aim.target_s, 2 * self._interval_s):
            return []
        if self.share <= FLOOR:
            return []
        return self._slow(age_s, now, f"a probe has waited for {_ms(age_s)}")

    def lagging(self, lag_s: float | None, now: float) -> list[Decision]:
        """Take a standby's lag into account, asked about once a second."""
        if lag_s is not None:
            if self._usual_lag_s is None:
                self._usual_lag_s = lag_s if lag_s > LAG_LIMIT_S else 0.0
            self._usual_lag_s = min(self._usual_lag_s, lag_s)
        before, self._lag_s = self._lag_s, lag_s or 0.0
        if self._lag_s <= self._lag_limit_s or self._lag_s < before:
            return []  # fine, or it catches up
        return self._slow(
            None, now, f"a standby is {self._lag_s:.0f} s behind, over {self._lag_limit_s:.0f} s"
        )

    @property
    def _lag_limit_s(self) -> float:
        return (self._usual_lag_s or 0.0) + LAG_LIMIT_S

    def fail(self, reason: str, now: float) -> list[Decision]:
        """The probe does not work: go on, carefully."""
        self._samples.clear()
        self._grew_at = now
        if self._blind:
            return []
        self._blind = True
        before = self.share
        self.share = BLIND if self._slow_start else min(before, BLIND)
        return [Decision(Act.BLINDED, before, self.share, f"its probe fails: {reason}")]

    def meet(self, movers: int, budget: float | None, now: float) -> list[Decision]:
        """Take into account how many movers work at this cell now, this one counted.

        Args:
            movers: how many.
            budget: the sum of the others' shares, when this one has just begun; None later.
        """
        before, known = self.share, self.movers
        self.movers = max(movers, 1)
        if budget is not None and self.movers > 1:
            # A newcomer takes its part of what the others have, and these give it.
            fair = max(FLOOR, budget / self.movers)
            self.share = min(self.share, fair)
            self._slow_start = self._slow_start and fair >= 1.0
        elif self.movers > known and before < 1.0 and not self._slow_start:
            self.share = max(FLOOR, before * known / self.movers)
        if self.share >= before:
            return []
        self._grew_at = now
        return [
            Decision(
                Act.SHARED, before, self.share, f"{self.movers} movers share the cell's budget"
            )
        ]

    def _decide(self, now: float) -> list[Decision]:
        if self.aim is None:
            return []
        found = p95(list(self._samples), WINDOW)
        if found > self.aim.target_s:
            return self._slow(found, now, f"p95 {_ms(found)} > {_ms(self.aim.target_s)}")
        return self._grow(found, now)

    def _slow(self, found_s: float | None, now: float, reason: str) -> list[Decision]:
        before = self.share
        far = found_s is not None and self.aim is not None and found_s > FAR * self.aim.target_s
        self.share = FLOOR if far else max(FLOOR, before * DECREASE)
        self._slow_start = False
        self._grew_at = now
        # What was measured before says nothing of the new share.
        self._samples.clear()
        return [Decision(Act.SLOWED, before, self.share, reason)] if self.share < before else []

    def _grow(self, found_s: float, now: float) -> list[Decision]:
        if self.aim is None or self._lag_s > self._lag_limit_s:
            return []
        elapsed = now - self._grew_at
        if (
            self.share >= 1.0
            or elapsed < 1.0
            or len(self._samples) < ENOUGH
            or found_s > EASY * self.aim.target_s
        ):
            return []
        before = self.share
        if self._slow_start:
            self.share = min(1.0, before * 2)
            self._samples.clear()
        else:
            self.share = min(1.0, before + INCREASE / self.movers)
        self._grew_at = now
        return [
            Decision(
                Act.RECOVERED,
                before,
                self.share,
                f"p95 {_ms(found_s)} of {_ms(self.aim.target_s)}",
            )
        ]


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1000
    return f"{milliseconds:.0f} ms" if milliseconds >= 10 else f"{milliseconds:.1f} ms"
