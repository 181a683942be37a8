"""Removes moved keys from their old owner, once nobody looks for them there any more.

A key goes only when it exists at its new owner, or when its own time is over. What the new owner
does not have is kept and named: a client deleted it since, or it was lost; a person decides
(`delete_kept`).
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from cellferry.errors import Blocked
from cellferry.settings import ConnectionSource
from cellferry.shards.lanes import Lanes
from cellferry.shards.plan import Plan
from cellferry.shards.progress import Check, Report
from cellferry.shards.sides import Lane, Side, open_side
from cellferry.stores.throttle import Throttle

NAMES = 100
"""Kept keys that are named."""
_FEW = 1000
"""So many keys are no sign that a server has lost its data."""


@dataclass(frozen=True)
class CleanupResult:
    """What a clean-up did.

    Attributes:
        shard: whose keys went.
        removed: keys that exist at their new owner, and are gone here.
        expired: keys whose time was over and that still took room here.
        kept: keys that the new owner does not have; `kept_names` are some of them.
        deleted: such keys that were removed all the same, as was asked.
        seconds: how long it took.
    """

    shard: str
    removed: int
    expired: int
    kept: int
    kept_names: list[str]
    deleted: int
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
    delete_kept: bool = False,
    throttle: Throttle | None = None,
    progress: Report | None = None,
    check: Check | None = None,
) -> CleanupResult:
    """Remove from `shard` the keys that the plan moved away. May be repeated after a kill.

    In `new`, after the TTL; or with the plan turned, after a roll-back, for the new owners' copies.

    Args:
        fence: rises with every lease of the set; see `sides`.
        batch: keys that are removed together.
        delete_kept: remove in the end also what the new owner does not have.
        throttle: in removed keys a second.

    Raises:
        LeaseLost: a newer step moves these keys.
        Blocked: `delete_kept`, and the new owner has so little that it seems to have lost its data.
    """
    began = time.monotonic()
    with (
        Lanes(plan, shard, source, fence=None, progress=progress, check=check) as lanes,
        _Removers(lanes, source, fence) as removers,
    ):
        work = _Cleanup(lanes, removers, batch, throttle or Throttle(None))
        work.remove_moved()
        if delete_kept:
            work.delete_kept()
        expired = work.purge()
        lanes.origin.tidy()
        lanes.reporter.tell("cleanup", work.removed, work.removed, final=True)
        kept = [key for keys in work.kept.values() for key in keys]
        return CleanupResult(
            shard=shard,
            removed=work.removed,
            expired=expired,
            kept=len(kept),
            kept_names=[key.decode("utf-8", "backslashreplace") for key in kept[:NAMES]],
            deleted=work.deleted,
            seconds=time.monotonic() - began,
        )


def tidy(plan: Plan, source: ConnectionSource) -> None:
    """Remove what feeds left in the shards that keys came to: followers listen there too.

    Once every source is clean. Otherwise each change there would be logged, and never read.
    """
    for name in dict.fromkeys(to for shard in plan.sources for to in plan.destinations(shard)):
        side = open_side(plan.target, name, source)
        try:
            side.tidy()
        finally:
            side.close()


class _Removers(dict[str, Side]):
    """A writer at the source for each lane: whoever takes a lane over can end it by its name."""

    def __init__(self, lanes: Lanes, source: ConnectionSource, fence: int) -> None:
        super().__init__()
        try:
            for name, target in lanes.targets.items():
                lane: Lane = lanes.plan.lane(lanes.shard, name)
                target.take_over(lane, fence, writes=False)
                self[name] = open_side(lanes.plan.origin, lanes.shard, source)
                self[name].take_over(lane, fence, writes=True)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close them all."""
        for side in self.values():
            side.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class _Cleanup:
    lanes: Lanes
    removers: _Removers
    batch: int
    throttle: Throttle
    removed: int = 0
    deleted: int = 0
    kept: dict[str, list[bytes]] = field(default_factory=dict)
    """By destination: keys that it does not have."""

    def remove_moved(self) -> None:
        """Remove every key that its new owner has."""
        lanes = self.lanes
        expected = lanes.plan.keys_from(lanes.shard)
        for page in lanes.origin.scan(count=max(self.batch, 100)):
            for name, keys in lanes.moved(page.keys).items():
                there = lanes.targets[name].exist(keys)
                pairs = list(zip(keys, there, strict=True))
                self.removed += self._remove(name, [key for key, exists in pairs if exists])
                self._keep(name, [key for key, exists in pairs if not exists])
            lanes.reporter.tell("cleanup", self.removed, max(expected, self.removed))
            lanes.reporter.check()

    def delete_kept(self) -> None:
        """Remove what was kept, if that is not suspiciously much."""
        for name, keys in self.kept.items():
            if len(keys) > _FEW and len(keys) > self._held(name):
                raise Blocked(
                    f"shard {name} does not have {len(keys)} keys of shard {self.lanes.shard},"
                    " more than it has of them",
                    hint="look whether it lost its data: these are the last copies",
                    where=f"shard {self.lanes.shard}",
                )
        for name, keys in self.kept.items():
            self.deleted += self._remove(name, keys)
        self.kept = {}

    def purge(self) -> int:
        """Remove expired keys that the server itself does not remove; return how many it were."""
        expired = 0
        for side in list(self.removers.values())[:1]:
            while count := side.purge(self.batch):
                expired += count
                self.throttle.take(count, while_waiting=self.lanes.reporter.check)
                self.lanes.reporter.check()
        return expired

    def _remove(self, name: str, keys: list[bytes]) -> int:
        count = 0
        for start in range(0, len(keys), self.batch):
            some = keys[start : start + self.batch]
            self.throttle.take(len(some), while_waiting=self.lanes.reporter.check)
            count += self.removers[name].remove(some)
            self.lanes.reporter.check()
        return count

    def _keep(self, name: str, keys: list[bytes]) -> None:
        """Keep those that have not expired here too meanwhile."""
        if keys:
            here = self.lanes.origin.exist(keys)
            missing = [key for key, exists in zip(keys, here, strict=True) if exists]
            self.kept.setdefault(name, []).extend(missing)

    def _held(self, name: str) -> int:
        """Count the keys that came to `name` from this shard."""
        pages = self.lanes.targets[name].scan()
        return sum(len(self.lanes.moved(page.keys).get(name, ())) for page in pages)
