"""Compares every moved key of one source shard with its other owner: value and absolute expiry.

All keys are the default and the only gate of a cutover. A sample is for a look at the progress: of
10,000 keys without a fault it says no more than that, with 95% confidence, fewer than 0.03% are
wrong, and the result says so.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from cellferry.errors import InvalidInput, VerificationFailed
from cellferry.settings import ConnectionSource
from cellferry.shards.follower import Follower
from cellferry.shards.lanes import Lanes
from cellferry.shards.plan import Plan
from cellferry.shards.progress import Check, Report
from cellferry.shards.sides import ChangeFeed, Record

CONFIDENCE = 0.95
NAMES = 100
"""Mismatches that are named."""
_LOOKS = 5
_PAUSE_S = 0.05


@dataclass(frozen=True)
class VerifyResult:
    """What a comparison found.

    Attributes:
        shard: the source.
        compared: keys that were read on both sides.
        mismatches: keys that differ, are missing at the other side, or are only there.
        names: some of these, with what is wrong.
        in_flight: keys that differed and changed meanwhile, so that nothing is known of them.
        total: moved keys that there are.
        sample: how many were asked for; None: all.
        bound: the share of wrong keys that is not exceeded with `confidence`; of all keys the
            share itself.
        seconds: how long it took.
    """

    shard: str
    compared: int
    mismatches: int
    names: list[dict[str, str]]
    in_flight: int
    total: int
    sample: int | None
    bound: float
    seconds: float
    confidence: float = CONFIDENCE

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return self.mismatches == 0

    def refuse(self) -> None:
        """Raise if anything is wrong.

        Raises:
            VerificationFailed: names some of the keys.
        """
        if not self.ok:
            some = ", ".join(f"{one['key']} ({one['what']})" for one in self.names[:5])
            raise VerificationFailed(
                f"{self.mismatches} of {self.compared} keys differ: {some}",
                hint="run catch-up again, then verify; if they stay, look at who writes there",
                where=f"shard {self.shard}",
            )

    def document(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {**asdict(self), "ok": self.ok}


def verify(
    plan: Plan,
    shard: str,
    source: ConnectionSource,
    *,
    sample: int | None = None,
    follower: Follower | None = None,
    progress: Report | None = None,
    check: Check | None = None,
) -> VerifyResult:
    """Compare the moved keys of `shard` with their other owners. Changes nothing by itself.

    Args:
        sample: so many keys, drawn at random; None: all, and what is only at the other side.
        follower: one that has swept; it brings over what clients change meanwhile, so that those
            keys can be compared too. Without one they count as `in_flight`.

    Raises:
        InvalidInput: a sample of less than one key.
    """
    if sample is not None and sample < 1:
        raise InvalidInput(f"a sample of {sample} keys", hint="give a number from 1")
    with Lanes(plan, shard, source, fence=None, progress=progress, check=check) as lanes:
        return _Comparison(lanes, follower).run(sample)


@dataclass(slots=True)
class _Comparison:
    lanes: Lanes
    follower: Follower | None
    compared: int = 0
    total: int = 0
    suspects: dict[str, dict[bytes, str]] = field(default_factory=dict)
    """By destination: keys that differed, and how."""

    def run(self, sample: int | None) -> VerifyResult:
        began = time.monotonic()
        feeds = self._feeds()
        try:
            if sample is None:
                self._compare_all()
            else:
                self._compare_some(sample)
            in_flight = self._look_again(feeds)
        finally:
            for feed in feeds:
                feed.close()
        wrong = [
            {"key": _text(key), "what": what, "from": self.lanes.shard, "to": name}
            for name, keys in self.suspects.items()
            for key, what in keys.items()
        ]
        self.lanes.reporter.tell("verify", self.compared, self.compared, final=True)
        return VerifyResult(
            shard=self.lanes.shard,
            compared=self.compared,
            mismatches=len(wrong),
            names=wrong[:NAMES],
            in_flight=in_flight,
            total=self.total,
            sample=sample,
            bound=upper_bound(len(wrong), self.compared, self.total),
            seconds=time.monotonic() - began,
        )

    def _feeds(self) -> list[ChangeFeed]:
        if self.follower is not None:
            return []
        lanes = self.lanes
        return [
            side.feed(f"verify:{lanes.shard}") for side in (lanes.origin, *lanes.targets.values())
        ]

    def _compare_all(self) -> None:
        lanes = self.lanes
        expected = lanes.plan.keys_from(lanes.shard)
        for page in lanes.origin.scan():
            lanes.compare(lanes.moved(page.keys), self._note)
            lanes.reporter.tell("verify", self.compared, max(expected, self.compared))
            lanes.reporter.check()
        lanes.rest(self._note)
        self.total = self.compared
        for name, target in lanes.targets.items():
            for page in target.scan():
                keys = lanes.moved(page.keys).get(name, [])
                for key, exists in zip(keys, lanes.origin.exist(keys), strict=True):
                    if not exists:
                        self.suspects.setdefault(name, {})[key] = "only there"
                lanes.reporter.check()

    def _compare_some(self, sample: int) -> None:
        lanes = self.lanes
        everything: list[tuple[str, bytes]] = []
        for page in lanes.origin.scan():
            for name, keys in lanes.moved(page.keys).items():
                everything += [(name, key) for key in keys]
            lanes.reporter.check()
        self.total = len(everything)
        chosen: dict[str, list[bytes]] = {}
        drawn = random.SystemRandom().sample(everything, min(sample, len(everything)))
        for name, key in drawn:
            chosen.setdefault(name, []).append(key)
        lanes.compare(chosen, self._note)
        lanes.rest(self._note)

    def _note(
        self, name: str, keys: list[bytes], here: list[Record | None], there: list[Record | None]
    ) -> None:
        self.compared += len(keys)
        for key, mine, theirs in zip(keys, here, there, strict=True):
            if self.lanes.differs(name, key, mine, theirs):
                self.suspects.setdefault(name, {})[key] = _how(mine, theirs)

    def _look_again(self, feeds: list[ChangeFeed]) -> int:
        """Read the suspects again: one may have changed, or expired, between the two reads."""
        changed: set[bytes] = set()
        for look in range(_LOOKS):
            if not any(self.suspects.values()):
                break
            if self.follower is not None:
                self.follower.round()
            elif look:
                time.sleep(_PAUSE_S * 2**look)
            self._compare_suspects()
            for feed in feeds:
                changed |= feed.take()
        in_flight = 0
        for keys in self.suspects.values():
            for key in list(keys):
                moving = self.follower.holds(key) if self.follower is not None else key in changed
                if moving or any(feed.lost is not None for feed in feeds):
                    del keys[key]
                    in_flight += 1
        return in_flight

    def _compare_suspects(self) -> None:
        suspects, self.suspects = self.suspects, {}
        compared = self.compared
        now = max(side.now() for side in (self.lanes.origin, *self.lanes.targets.values()))

        def note(
            name: str, keys: list[bytes], here: list[Record | None], there: list[Record | None]
        ) -> None:
            for key, mine, theirs in zip(keys, here, there, strict=True):
                alone = mine or theirs
                if (mine is None) != (theirs is None) and alone and 0 <= alone.expires <= now:
                    continue  # its time has come at one server a moment before the other
                if self.lanes.differs(name, key, mine, theirs):
                    self.suspects.setdefault(name, {})[key] = _how(mine, theirs)

        self.lanes.compare({name: list(keys) for name, keys in suspects.items()}, note)
        self.lanes.rest(note)
        self.compared = compared


def _how(here: Record | None, there: Record | None) -> str:
    if there is None:
        return "missing there"
    if here is None:
        return "only there"
    return "another value" if here.value != there.value else "another expiry"


def _text(key: bytes) -> str:
    return key.decode("utf-8", "backslashreplace")


def upper_bound(wrong: int, compared: int, total: int, confidence: float = CONFIDENCE) -> float:
    """Return the share of wrong keys that is not exceeded with `confidence`.

    Exact for a binomial (Clopper and Pearson, Biometrika 1934), one-sided; without a wrong key
    among n about 3 / n, the rule of three. Nothing compared: 1.
    """
    if compared >= total:
        return wrong / total if total else 0.0
    if compared == 0 or wrong >= compared:
        return 1.0
    low, high = wrong / compared, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _at_most(wrong, compared, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def _at_most(wrong: int, drawn: int, share: float) -> float:
    """Return the chance of at most `wrong` among `drawn` when `share` of all are wrong."""
    if share >= 1.0:
        return 0.0
    chance = 0.0
    for count in range(wrong + 1):
        ways = math.lgamma(drawn + 1) - math.lgamma(count + 1) - math.lgamma(drawn - count + 1)
        chance += math.exp(ways + count * math.log(share) + (drawn - count) * math.log1p(-share))
    return chance
