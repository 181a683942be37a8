"""The bulk copy of one source shard's moved keys to their new owners.

While it works the source has the authority and clients go on writing there. The copy is the one
writer of the other side, so it overwrites and removes there: what is at a new owner is a copy, a
client's mirror of a claim, or left from before, and none of them counts yet. A write that arrives
late may undo a newer mirror; the change at the source that went with it is in the change feed, and
is brought over again, here at the end or by the follower, which compares everything before anything
is decided at the new owners.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from cellferry.settings import ConnectionSource
from cellferry.shards.checkpoints import Checkpoint, Checkpoints, NoCheckpoints
from cellferry.shards.lanes import Lanes
from cellferry.shards.plan import Plan
from cellferry.shards.progress import Check, Report
from cellferry.shards.sides import ChangeFeed
from cellferry.stores.throttle import Throttle

_SAVE_EVERY_S = 0.5
_PAGE_KEYS = 2000
_ROUNDS = 3


@dataclass(frozen=True)
class CopyResult:
    """What a copy did.

    Attributes:
        shard: the source.
        keys: all keys that were sent, by earlier tries too; `size` are the bytes of their values.
        sent: keys that this call sent.
        changed: of these, such as clients changed while they were copied.
        resumed: whether it went on from a checkpoint.
        seconds: of this call.
        pairs: keys by destination.
    """

    shard: str
    keys: int
    size: int
    sent: int
    changed: int
    resumed: bool
    seconds: float
    pairs: Mapping[str, int]

    @property
    def keys_s(self) -> float:
        """Keys a second of this call."""
        return self.sent / self.seconds if self.seconds else 0.0

    def document(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {**asdict(self), "keys_s": round(self.keys_s, 1)}


def copy(
    plan: Plan,
    shard: str,
    source: ConnectionSource,
    *,
    fence: int,
    checkpoints: Checkpoints | None = None,
    throttle: Throttle | None = None,
    progress: Report | None = None,
    check: Check | None = None,
) -> CopyResult:
    """Copy every moved key of `shard` to its new owner. May be repeated after a kill at any line.

    Args:
        fence: rises with every lease of the set; see `sides`.
        checkpoints: where to go on from; none: from the beginning.
        throttle: in moved keys a second, of this source alone; see `shares`.

    Raises:
        InvalidInput: a checkpoint of another plan; two connections to one server.
        LeaseLost: a newer step moves these keys.
        PermanentError: a destination has no memory left.
        Unreachable: repeat it, it goes on.
    """
    with Lanes(
        plan, shard, source, fence=fence, throttle=throttle, progress=progress, check=check
    ) as lanes:
        lanes.reporter.check()  # a server that lost its data has lost the fence as well
        return _Copy(lanes, checkpoints or NoCheckpoints()).run()


def shares(plan: Plan, per_second: float | None) -> dict[str, float | None]:
    """Divide a rate among the sources by what each has to move, so that all end together."""
    if per_second is None:
        return dict.fromkeys(plan.sources, None)
    keys = {name: max(plan.keys_from(name), 1) for name in plan.sources}
    total = sum(keys.values())
    return {name: per_second * count / total for name, count in keys.items()}


class _Copy:
    """One call of `copy`."""

    def __init__(self, lanes: Lanes, checkpoints: Checkpoints) -> None:
        self._lanes = lanes
        self._checkpoints = checkpoints
        plan, identity = lanes.plan, lanes.origin.identity()
        self._points = {
            name: Checkpoint.parse(
                checkpoints.load((lanes.shard, name)),
                plan=plan.hash,
                source=identity,
                destination=target.identity(),
            )
            for name, target in lanes.targets.items()
        }
        # the least of them: what the others have more is sent again
        self._start = min(self._points.values(), key=lambda point: point.step)
        self._step = self._start.step
        self._saved = time.monotonic()
        self._total = plan.keys_from(lanes.shard)

    def run(self) -> CopyResult:
        began = time.monotonic()
        lanes = self._lanes
        changed = 0
        if not self._start.done:
            feed = lanes.origin.feed(f"copy:{lanes.shard}")
            try:
                self._scan()
                changed = self._catch_up(feed)
            finally:
                feed.close()
            self._save("", done=True)
        self._tell(final=True)
        counts = self._counts()
        return CopyResult(
            shard=lanes.shard,
            keys=sum(keys for keys, _ in counts.values()),
            size=sum(size for _, size in counts.values()),
            sent=lanes.keys,
            changed=changed,
            resumed=self._start.step > 0,
            seconds=time.monotonic() - began,
            pairs={name: keys for name, (keys, _) in counts.items()},
        )

    def _scan(self) -> None:
        lanes = self._lanes
        waiting: dict[str, list[bytes]] = {name: [] for name in lanes.targets}
        for page in lanes.origin.scan(self._start.cursor, count=_PAGE_KEYS):
            for name, keys in lanes.moved(page.keys).items():
                queue = waiting[name]
                queue += keys
                whole = len(queue) - len(queue) % lanes.batch
                if whole:
                    lanes.bring(name, queue[:whole])
                    waiting[name] = queue[whole:]
            lanes.reporter.check()
            self._tell()
            if page.after and time.monotonic() - self._saved >= _SAVE_EVERY_S:
                self._flush(waiting)
                self._save(page.after)
        self._flush(waiting)

    def _flush(self, waiting: dict[str, list[bytes]]) -> None:
        for name, queue in waiting.items():
            self._lanes.bring(name, queue)
            waiting[name] = []
        self._lanes.settle()

    def _catch_up(self, feed: ChangeFeed) -> int:
        """Bring over what changed meanwhile; what is missed here is the follower's."""
        before = self._lanes.keys
        for _ in range(_ROUNDS):
            if feed.lost is not None:
                break
            for name, keys in self._lanes.moved(list(feed.take())).items():
                self._lanes.bring(name, keys)
            self._lanes.settle()
        return self._lanes.keys - before

    def _save(self, cursor: str, *, done: bool = False) -> None:
        self._step += 1
        for name, (keys, size) in self._counts().items():
            point = replace(
                self._points[name], step=self._step, cursor=cursor, keys=keys, size=size, done=done
            )
            self._checkpoints.save((self._lanes.shard, name), point.document())
        self._saved = time.monotonic()

    def _counts(self) -> dict[str, tuple[int, int]]:
        lanes = self._lanes
        return {
            name: (point.keys + lanes.sent[name], point.size + lanes.sizes[name])
            for name, point in self._points.items()
        }

    def _tell(self, *, final: bool = False) -> None:
        done = sum(point.keys for point in self._points.values()) + self._lanes.keys
        total = max(self._total, done)
        self._lanes.reporter.tell("copy", done, total, self._lanes.size, final=final)
