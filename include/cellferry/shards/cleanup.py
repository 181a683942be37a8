"""Removes moved keys from their old owner, once nobody looks for them there any more.

A key goes only when it exists at its new owner, or when its own time is over. What the new owner
does not have is kept and named: a client deleted it since, or it was lost; a person decides.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from cellferry.settings import ConnectionSource
from cellferry.shards.lanes import Lanes
from cellferry.shards.plan import Plan
from cellferry.shards.progress import Check, Report
from cellferry.shards.sides import Side, open_side
from cellferry.stores.throttle import Throttle

NAMES = 100
"""Kept keys that are named."""


@dataclass(frozen=True)
class CleanupResult:
    """What a clean-up did.

    Attributes:
        shard: whose keys went.
        removed: keys that exist at their new owner, and are gone here.
        expired: keys whose time was over and that still took room here.
        kept: keys that the new owner does not have; `kept_names` are some of them.
        seconds: how long it took.
    """

    shard: str
    removed: int
    expired: int
    kept: int
    kept_names: list[str]
    seconds: float

    def document(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return asdict(self)


def cleanup(
    plan: Plan,
    shard: str,
    source: ConnectionSource,
    *,
    fence: int,
    batch: int = 1000,
    throttle: Throttle | None = None,
    progress: Report | None = None,
    check: Check | None = None,
) -> CleanupResult:
    """Remove from `shard` the keys that the plan moved away. May be repeated after a kill.

    In `new`, after the TTL; or with the plan turned, after a roll-back, for the new owners' copies.

    Args:
        fence: rises with every lease of the set; see `sides`.
        batch: keys that are removed together.
        throttle: in removed keys a second.

    Raises:
        LeaseLost: a newer step moves these keys.
    """
    began = time.monotonic()
    throttle = throttle or Throttle(None)
    removed = kept = 0
    names: list[str] = []
    removers: dict[str, Side] = {}
    with Lanes(plan, shard, source, fence=None, progress=progress, check=check) as lanes:
        try:
            for name, target in lanes.targets.items():
                lane = plan.lane(shard, name)
                target.take_over(lane, fence, writes=False)
                # one writer a lane: whoever takes a lane over can end it by its name
                removers[name] = open_side(plan.origin, shard, source)
                removers[name].take_over(lane, fence, writes=True)
            for page in lanes.origin.scan(count=max(batch, 100)):
                for name, keys in lanes.moved(page.keys).items():
                    there = lanes.targets[name].exist(keys)
                    gone = [key for key, exists in zip(keys, there, strict=True) if exists]
                    missing = [key for key, exists in zip(keys, there, strict=True) if not exists]
                    if missing:  # it may have expired meanwhile, here too
                        here = lanes.origin.exist(missing)
                        missing = [k for k, exists in zip(missing, here, strict=True) if exists]
                    kept += len(missing)
                    names += [
                        key.decode("utf-8", "backslashreplace")
                        for key in missing[: NAMES - len(names)]
                    ]
                    for start in range(0, len(gone), batch):
                        some = gone[start : start + batch]
                        throttle.take(len(some), while_waiting=lanes.reporter.check)
                        removed += removers[name].remove(some)
                        lanes.reporter.check()
                lanes.reporter.tell("cleanup", removed, plan.keys_from(shard))
            expired = _purge(lanes, removers, batch, throttle)
            lanes.origin.tidy()
        finally:
            for side in removers.values():
                side.close()
        lanes.reporter.tell("cleanup", removed, removed, final=True)
    return CleanupResult(shard, removed, expired, kept, names, time.monotonic() - began)


def _purge(lanes: Lanes, removers: dict[str, Side], batch: int, throttle: Throttle) -> int:
    """Remove expired keys that the server itself does not remove."""
    expired = 0
    for side in list(removers.values())[:1]:
        while count := side.purge(batch):
            expired += count
            throttle.take(count, while_waiting=lanes.reporter.check)
            lanes.reporter.check()
    return expired
