"""Keeps the side without authority equal to the side that has it, until that changes.

`sweep` compares every moved key while the change feeds are already open; `round` brings over what
changed since. The follower is the one writer of the side without authority (see the fence in
`sides`), so it overwrites and removes there, in each state:

* `old`, `dual, read old` (and `dual, read new`, `new` on the way back): a claim is decided and a
  value lives at the source of this follower. Whatever the other side holds is a copy or a mirror.
  A mirror with the token of a claim is equal to its copy; one that comes late, after its claim was
  released, is a leftover: the other side's own feed names it, and it is removed.
* `switching`: values wait. A claim must win at the source first, then at the other side. What the
  other side holds and the source does not was never accepted, so it may go. What a write here
  undoes at the other side belongs to a claim that changed the source *after* the follower had read
  it there: so the source's feed names that key again. `finish` therefore repeats what it wrote
  itself until none of it changed meanwhile; keys that it did not touch are the claims' own
  business, which write both sides.

So after `finish` every key that changed before it began is equal at both sides, and nothing that a
claim won afterwards has been undone. `tests/unit/test_shard_states.py` walks through the orders of
events.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from cellferry.errors import Blocked, NotConverging, TransientError
from cellferry.settings import ConnectionSource
from cellferry.shards.lanes import Lanes
from cellferry.shards.plan import Plan
from cellferry.shards.progress import Check, Report
from cellferry.shards.sides import ChangeFeed, Record
from cellferry.stores.throttle import Throttle

_BARRIER_S = 15.0
_FEW = 1000
_TRIES = 100


@dataclass(slots=True)
class Figures:
    """What a sweep or a round did.

    Attributes:
        compared: keys that were read on both sides.
        brought: keys that were written because they changed or differed.
        removed: keys that were only at the other side; among `brought`.
        size: bytes of the values that were written.
        seconds: how long it took.
    """

    compared: int = 0
    brought: int = 0
    removed: int = 0
    size: int = 0
    seconds: float = 0.0

    def document(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return asdict(self)


class Follower:
    """Follows one source shard. For one thread; after an error make a new one and sweep.

    Args:
        plan: whose direction counts: `plan.turned()` for the way back.
        shard: the source.
        fence: rises with every lease of the set; see `sides`.

    Raises:
        LeaseLost: a newer step moves these keys.
    """

    def __init__(
        self,
        plan: Plan,
        shard: str,
        source: ConnectionSource,
        *,
        fence: int,
        throttle: Throttle | None = None,
        progress: Report | None = None,
        check: Check | None = None,
    ) -> None:
        self.plan = plan
        self.shard = shard
        self._lanes = Lanes(
            plan, shard, source, fence=fence, throttle=throttle, progress=progress, check=check
        )
        self._feed: ChangeFeed | None = None
        self._other_feeds: dict[str, ChangeFeed] = {}
        self._changed: dict[str, set[bytes]] = {name: set() for name in self._lanes.targets}
        """Keys that changed here, by destination."""
        self._touched: dict[str, set[bytes]] = {name: set() for name in self._lanes.targets}
        """Keys that changed at their destination: by us, or by a client's mirror."""

    @property
    def lanes(self) -> Lanes:
        """Its connections."""
        return self._lanes

    def open_feed(self) -> None:
        """Begin to hear of changes at the source. Before `sweep`."""
        if self._feed is None:
            self._feed = self._lanes.origin.feed(f"follow:{self.shard}")

    def sweep(self) -> Figures:
        """Compare every moved key with its other owner, and make that equal.

        Brings over what differs or is missing there, and removes what is only there.

        Raises:
            Blocked: there is so much more at the other side that the source seems to have lost it.
            TransientError: the change feed was lost.
        """
        began = time.monotonic()
        figures = Figures()
        lanes = self._lanes
        self.open_feed()
        total = self.plan.keys_from(self.shard)

        def repair(
            name: str, keys: list[bytes], here: list[Record | None], there: list[Record | None]
        ) -> None:
            figures.compared += len(keys)
            self._repair(name, keys, here, there, figures)
            done = figures.compared
            lanes.reporter.tell("sweep", done, max(total, done), figures.size)

        for page in lanes.origin.scan():
            lanes.compare(lanes.moved(page.keys), repair)
            lanes.reporter.check()
        lanes.rest(repair)
        lanes.settle()
        self._remove_extra(figures)
        self._insist_on_feeds()
        lanes.reporter.tell("sweep", figures.compared, figures.compared, figures.size, final=True)
        figures.seconds = time.monotonic() - began
        return figures

    def pending(self) -> int:
        """Return how many keys the next round has to look at.

        Raises:
            TransientError: a change feed was lost.
        """
        self._gather()
        return sum(map(len, (*self._changed.values(), *self._touched.values())))

    def round(self) -> Figures:
        """Bring over what has changed since the last round.

        Raises:
            TransientError: a change feed was lost.
        """
        began = time.monotonic()
        figures = Figures()
        self._gather()
        changed, touched = self._take()
        self._bring(changed, figures, may_wait=True)
        self._compare(touched, figures, may_wait=True)
        self._insist_on_feeds()
        figures.seconds = time.monotonic() - began
        return figures

    def finish(self) -> Figures:
        """Make every key that has changed so far equal, and leave nothing half-done.

        In `switching`, once every client has acknowledged it. Then `close`, then the next state.

        Raises:
            TransientError: a change feed was lost: go back to the state before.
            NotConverging: the keys written here change all the time.
        """
        began = time.monotonic()
        figures = Figures()
        self._barrier()
        changed, touched = self._take()
        wanted = {name: changed[name] | touched[name] for name in changed}
        for _ in range(_TRIES):
            # Only what this pass wrote can have undone something, so only that is looked at again.
            written = self._compare(wanted, figures, may_wait=False)
            self._barrier()
            changed, touched = self._take()
            wanted = {name: (changed[name] | touched[name]) & written[name] for name in written}
            if not any(wanted.values()):
                figures.seconds = time.monotonic() - began
                return figures
        raise NotConverging(
            f"{sum(map(len, wanted.values()))} keys of shard {self.shard} changed again each time"
            " they were brought over",
            hint="try again when their clients write less often",
        )

    def holds(self, key: bytes) -> bool:
        """Whether `key` has changed and was not brought over yet."""
        self._gather()
        return any(key in keys for keys in (*self._changed.values(), *self._touched.values()))

    def close(self) -> None:
        """End it: nothing of this writes afterwards."""
        for feed in (self._feed, *self._other_feeds.values()):
            if feed is not None:
                feed.close()
        self._feed = None
        self._other_feeds.clear()
        self._lanes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- inside ------------------------------------------------------------------------------

    def _remove_extra(self, figures: Figures) -> None:
        """Remove at each destination what the source does not have."""
        limit = max(_FEW, figures.compared)
        for name, target in self._lanes.targets.items():
            # What changes there from now on was not seen by the scan below.
            if name not in self._other_feeds:
                self._other_feeds[name] = target.feed(f"follow:{self.shard}:other")
            # Fails if the server restarted since its keys were read, perhaps without them.
            target.now()
            extra: list[bytes] = []
            for page in target.scan():
                keys = self._lanes.moved(page.keys).get(name, [])
                here = self._lanes.origin.exist(keys)
                extra += [key for key, exists in zip(keys, here, strict=True) if not exists]
                self._lanes.reporter.check()
                if len(extra) > limit:
                    raise Blocked(
                        f"shard {name} has more than {limit} keys that shard {self.shard} should"
                        f" have and does not; it has {figures.compared}",
                        hint="look whether it lost its data; only then remove them there by hand",
                        where=f"shard {self.shard}",
                    )
            self._compare({name: set(extra)}, figures, may_wait=True)
            figures.removed += len(extra)

    def _repair(
        self,
        name: str,
        keys: list[bytes],
        here: list[Record | None],
        there: list[Record | None],
        figures: Figures,
        *,
        may_wait: bool = True,
    ) -> list[bytes]:
        lanes = self._lanes
        wrong = [
            (key, mine)
            for key, mine, theirs in zip(keys, here, there, strict=True)
            if lanes.differs(name, key, mine, theirs)
        ]
        if not wrong:
            return []
        written = [key for key, _ in wrong]
        before = lanes.size
        lanes.write(name, written, [record for _, record in wrong], may_wait=may_wait)
        figures.brought += len(written)
        figures.size += lanes.size - before
        return written

    def _bring(self, wanted: Mapping[str, set[bytes]], figures: Figures, *, may_wait: bool) -> None:
        lanes = self._lanes
        keys, size = lanes.keys, lanes.size
        for name, some in wanted.items():
            lanes.bring(name, list(some), may_wait=may_wait)
        lanes.settle(may_wait=may_wait)
        figures.brought += lanes.keys - keys
        figures.size += lanes.size - size

    def _compare(
        self, wanted: Mapping[str, Iterable[bytes]], figures: Figures, *, may_wait: bool
    ) -> dict[str, set[bytes]]:
        """Compare keys and repair what differs; return what was written."""
        written: dict[str, set[bytes]] = {name: set() for name in self._lanes.targets}

        def repair(
            name: str, keys: list[bytes], here: list[Record | None], there: list[Record | None]
        ) -> None:
            figures.compared += len(keys)
            written[name].update(self._repair(name, keys, here, there, figures, may_wait=may_wait))

        self._lanes.compare({name: list(keys) for name, keys in wanted.items()}, repair)
        self._lanes.rest(repair)
        self._lanes.settle(may_wait=may_wait)
        return written

    def _gather(self) -> None:
        """Sort what the feeds have by destination; other shards' keys are left out."""
        self._insist_on_feeds()
        if self._feed is not None and (keys := self._feed.take()):
            for name, some in self._lanes.moved(list(keys)).items():
                self._changed[name].update(some)
        for name, feed in self._other_feeds.items():
            if keys := feed.take():
                self._touched[name].update(self._lanes.moved(list(keys)).get(name, ()))

    def _take(self) -> tuple[dict[str, set[bytes]], dict[str, set[bytes]]]:
        changed, touched = self._changed, self._touched
        self._changed = {name: set() for name in changed}
        self._touched = {name: set() for name in touched}
        return changed, touched

    def _barrier(self) -> None:
        """Gather everything that changed before this call."""
        for feed in (self._feed, *self._other_feeds.values()):
            if feed is not None:
                feed.barrier(_BARRIER_S)
        self._gather()

    def _insist_on_feeds(self) -> None:
        for feed in (self._feed, *self._other_feeds.values()):
            if feed is not None and feed.lost is not None:
                raise TransientError(
                    f"the change feed was lost: {feed.lost}",
                    hint="repeat the step: it compares everything again",
                    where=f"shard {self.shard}",
                )
        if self._feed is None:
            raise RuntimeError("open_feed comes first")
