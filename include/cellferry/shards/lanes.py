"""The connections between one source shard and the shards that its keys go to.

Whatever writes keys opens them here, and so becomes their only writer: see the fence in `sides`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from cellferry.closing import Closing
from cellferry.settings import ConnectionSource
from cellferry.shards.plan import Plan
from cellferry.shards.progress import Check, Report, Reporter
from cellferry.shards.settings import check_servers
from cellferry.shards.sides import Record, Side, open_side
from cellferry.stores.throttle import Throttle

BATCH_KEYS = 500
"""Keys that are read or written together: less than a millisecond of a server's time."""
BATCH_BYTES = 1024 * 1024
"""Values that are larger together make the next batches smaller, down to a single key."""
_FIRST_BATCH = 64
_WINDOW = 2
"""Batches under way at a time."""
_PART_OF_A_SECOND = 0.05

Compared = Callable[[str, list[bytes], list[Record | None], list[Record | None]], None]
"""Called with destination, keys, and their records here and there."""


class Lanes(Closing):
    """One source shard and its destinations.

    Args:
        plan: whose direction counts.
        shard: the source, a shard of `plan.origin`.
        source: resolves connections' names.
        fence: become the only writer, with this number; None: only read.
        throttle: in moved keys a second.
        progress, check: see `cellferry.shards.progress`.

    Raises:
        InvalidInput: no such source shard, or two connections lead to one server.
        LeaseLost: a newer step moves these keys.
    """

    def __init__(
        self,
        plan: Plan,
        shard: str,
        source: ConnectionSource,
        *,
        fence: int | None,
        throttle: Throttle | None = None,
        progress: Report | None = None,
        check: Check | None = None,
    ) -> None:
        check_servers((plan.old, plan.new), source)
        self.plan = plan
        self.shard = shard
        self.throttle = throttle or Throttle(None)
        self.reporter = Reporter(progress, check, shard)
        rate = self.throttle.per_second
        # A batch passes as a whole: small ones keep a slow rate even.
        self._pace = BATCH_KEYS if rate is None else max(int(rate * _PART_OF_A_SECOND), 1)
        self._fit = _FIRST_BATCH
        self.origin: Side = open_side(plan.origin, shard, source)
        self.targets: dict[str, Side] = {
            name: open_side(plan.target, name, source) for name in plan.destinations(shard)
        }
        self._reading: deque[tuple[str, list[bytes]]] = deque()
        self._comparing: deque[tuple[str, list[bytes]]] = deque()
        self.keys = 0
        """Keys written."""
        self.size = 0
        """Bytes of their values."""
        self.sent: dict[str, int] = dict.fromkeys(self.targets, 0)
        """Keys written, by destination."""
        self.sizes: dict[str, int] = dict.fromkeys(self.targets, 0)
        try:
            if fence is not None:
                for name, target in self.targets.items():
                    lane = plan.lane(shard, name)
                    self.origin.take_over(lane, fence, writes=False)
                    target.take_over(lane, fence, writes=True)
        except BaseException:
            self.close()
            raise

    def moved(self, keys: list[bytes]) -> dict[str, list[bytes]]:
        """Return those of `keys` that move, by destination."""
        return self.plan.moved(self.shard, keys)

    @property
    def batch(self) -> int:
        """How many keys to bring together now."""
        return min(self._pace, self._fit)

    def _fit_to(self, records: list[Record | None]) -> None:
        """Let the size of the last values decide how many keys the next batch has."""
        size = sum(len(one.value) for one in records if one is not None)
        if size > BATCH_BYTES:
            self._fit = max(min(self._fit, len(records)) * BATCH_BYTES // (2 * size), 1)
        elif size < BATCH_BYTES // 4:
            self._fit = min(self._fit * 2, BATCH_KEYS)

    # --- making equal ------------------------------------------------------------------------

    def bring(self, name: str, keys: list[bytes], *, may_wait: bool = True) -> None:
        """Make `keys` at the destination `name` as they are here; `settle` waits for it."""
        start = 0
        while start < len(keys):
            batch = keys[start : start + self.batch]
            start += len(batch)
            self.origin.ask(batch)
            self._reading.append((name, batch))
            while len(self._reading) > _WINDOW:
                self._pass_on(may_wait=may_wait)

    def settle(self, *, may_wait: bool = True) -> None:
        """Wait until everything that was to be brought is there."""
        while self._reading:
            self._pass_on(may_wait=may_wait)
        for target in self.targets.values():
            target.settle()

    def write(
        self,
        name: str,
        keys: list[bytes],
        records: list[Record | None],
        *,
        may_wait: bool = True,
    ) -> None:
        """Send `records` to the destination `name`, as fast as the throttle lets."""
        if may_wait:
            self.throttle.take(len(keys), while_waiting=self.reporter.check)
        target = self.targets[name]
        target.put(keys, records)
        target.settle(leave=_WINDOW)
        size = sum(len(one.value) for one in records if one is not None)
        self.keys += len(keys)
        self.size += size
        self.sent[name] += len(keys)
        self.sizes[name] += size
        self.reporter.check()

    def _pass_on(self, *, may_wait: bool) -> None:
        name, keys = self._reading.popleft()
        records = self.origin.answers()
        self._fit_to(records)
        self.write(name, keys, records, may_wait=may_wait)

    # --- comparing ---------------------------------------------------------------------------

    def compare(self, wanted: Mapping[str, list[bytes]], then: Compared) -> None:
        """Read keys on both sides at the same time and hand the records over; see `rest`."""
        for name, keys in wanted.items():
            start = 0
            while start < len(keys):
                batch = keys[start : start + self._fit]
                start += len(batch)
                self.origin.ask(batch)
                self.targets[name].ask(batch)
                self._comparing.append((name, batch))
                while len(self._comparing) > _WINDOW:
                    self._hand_over(then)

    def rest(self, then: Compared) -> None:
        """Hand over what `compare` still has under way."""
        while self._comparing:
            self._hand_over(then)

    def differs(self, name: str, key: bytes, here: Record | None, there: Record | None) -> bool:
        """Whether the two records are not the same; asks again where only the form may differ."""
        if self.origin.same(here, there):
            return False
        if here is None or there is None or not (here.is_dump and there.is_dump):
            return True
        return not self.origin.same_at(key, self.targets[name])

    def _hand_over(self, then: Compared) -> None:
        name, keys = self._comparing.popleft()
        here = self.origin.answers()
        self._fit_to(here)
        then(name, keys, here, self.targets[name].answers())
        self.reporter.check()

    # --- ending ------------------------------------------------------------------------------

    def close(self) -> None:
        """Close all connections; nothing of this writes afterwards."""
        self._reading.clear()
        self._comparing.clear()
        for side in (self.origin, *self.targets.values()):
            side.close()
