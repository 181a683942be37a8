"""Comparing both sides key by key, and repairing what differs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from cellferry.model import Progress
from cellferry.stores.redis import payloads
from cellferry.stores.redis.key_prefix import KeyPrefix
from cellferry.stores.redis.payloads import Snapshot
from cellferry.stores.redis.wire import Wire
from cellferry.stores.throttle import Throttle

BATCH_KEYS = 256
BATCH_BYTES = 1024 * 1024
_REPORT_S = 0.3
_SETTLE_TRIES = 4


def scan(wire: Wire, prefix: KeyPrefix, *, count: int = 1000) -> Iterator[list[bytes]]:
    """Pages of this organization's keys on one side; a key may come twice."""
    cursor = 0
    while True:
        next_cursor, found = wire.call("SCAN", cursor, "MATCH", prefix.pattern, "COUNT", count)
        keys = prefix.owned(found)
        if keys:
            yield keys
        cursor = int(next_cursor)
        if cursor == 0:
            return


def server_time_ms(wire: Wire) -> int:
    """The server's clock, by which its keys expire."""
    seconds, micros = wire.call("TIME")
    return int(seconds) * 1000 + int(micros) // 1000


@dataclass(slots=True)
class Applied:
    """What was brought over: keys changed at the target, bytes sent, keys looked at."""

    keys: int = 0
    size: int = 0
    compared: int = 0
    unequal: list[bytes] = field(default_factory=list)
    """Keys that were still different after they had been applied."""


class Pair:
    """The two sides of a comparison; `target` follows `origin`.

    Going back (reverse rounds) it is the same with the sides exchanged.

    Args:
        origin: reads the side that has authority.
        target: reads the other one.
        writer: writes the other one; None where nothing may be written.
        before_deleting: asked after keys were found absent at the origin, and before they are
            deleted at the target; raises where the origin may have lost them.
    """

    def __init__(
        self,
        origin: Wire,
        target: Wire,
        writer: Wire | None,
        *,
        prefix: KeyPrefix,
        throttle: Throttle,
        progress: Progress,
        before_deleting: Callable[[], None] | None = None,
    ) -> None:
        self._before_deleting = before_deleting
        self.origin = origin
        self.target = target
        self.writer = writer
        self.prefix = prefix
        self._throttle = throttle
        self._progress = progress
        self._reported = 0.0
        self.streams: dict[bytes, bytes] = {}
        """Every stream, with the digest of what was copied; empty where that must be done again."""

    # --- reading -----------------------------------------------------------------------------

    def read(self, keys: list[bytes]) -> list[tuple[bytes, Snapshot | None, Snapshot | None]]:
        """Read `keys` on both sides at the same time."""
        payloads.ask(self.origin, keys)
        payloads.ask(self.target, keys)
        ours = payloads.answers(self.origin, len(keys))
        theirs = payloads.answers(self.target, len(keys))
        return list(zip(keys, ours, theirs, strict=True))

    def in_batches(self, keys: Iterable[bytes]) -> Iterator[list[bytes]]:
        """Batches bounded by count, and by bytes as far as the origin can tell."""
        everything = list(keys)
        for start in range(0, len(everything), BATCH_KEYS):
            chunk = everything[start : start + BATCH_KEYS]
            sizes = payloads.sizes(self.origin, chunk)
            batch: list[bytes] = []
            total = 0
            for key, size in zip(chunk, sizes, strict=True):
                if batch and total + size > BATCH_BYTES:
                    yield batch
                    batch, total = [], 0
                batch.append(key)
                total += size
            yield batch

    def same(self, one: Snapshot | None, other: Snapshot | None) -> bool:
        """Whether two snapshots certainly are equal."""
        if one is None or other is None:
            return one is other
        return one.expires == other.expires and payloads.same_value(one.payload, other.payload)

    def has_expired(self, one: Snapshot | None, other: Snapshot | None) -> bool:
        """Whether a key is absent on one side only because its time has come there first."""
        present = one or other
        if (one is not None and other is not None) or present is None or present.expires < 0:
            return False
        return present.expires <= max(server_time_ms(self.origin), server_time_ms(self.target))

    def same_logically(self, key: bytes, *, groups: bool = True) -> bool:
        """Compare one key by the commands of its type."""
        one, other = (
            self.origin.checked([("PEXPIRETIME", key)]),
            self.target.checked([("PEXPIRETIME", key)]),
        )
        return one == other and payloads.logical_value(
            self.origin, key, groups=groups
        ) == payloads.logical_value(self.target, key, groups=groups)

    # --- writing -----------------------------------------------------------------------------

    def complete_pass(self, phase: str) -> Applied:
        """Compare every key of both sides and repair what differs at the target.

        While writers write it leaves behind what changed after it was read: the change feed,
        open since before, names those keys.
        """
        total = Applied()
        seen_streams: set[bytes] = set()
        for page in scan(self.origin, self.prefix):
            for batch in self.in_batches(page):
                self._repair(batch, total, seen_streams)
                self._report(phase, total)
        for page in scan(self.target, self.prefix):
            counts = self.origin.checked([("EXISTS", key) for key in page])
            extra = [key for key, count in zip(page, counts, strict=True) if not count]
            if extra:
                self._repair(extra, total, seen_streams)
            self._progress.check()
        for key in self.streams.keys() - seen_streams:
            del self.streams[key]
        self._report(phase, total, final=True)
        return total

    def bring(self, keys: Iterable[bytes], *, may_wait: bool = True) -> Applied:
        """Make `keys` at the target as they are at the origin, and read them back.

        A stream that is known to be there unchanged is only compared.

        Args:
            keys: dirty keys, deleted ones included.
            may_wait: obey the throttle; not under the gate.
        """
        total = Applied()
        batches = list(self.in_batches(keys)) if may_wait else self._plain_batches(keys)
        for batch in batches:
            payloads.ask(self.origin, batch)
            found = dict(zip(batch, payloads.answers(self.origin, len(batch)), strict=True))
            changed = [
                key
                for key, snapshot in found.items()
                if not (
                    snapshot is not None
                    and snapshot.is_stream
                    and self.streams.get(key) == snapshot.digest()
                )
            ]
            total.compared += len(batch)
            if changed:
                if may_wait:
                    self._throttle.take(len(changed), while_waiting=self._progress.check)
                self._apply({key: found[key] for key in changed}, total)
        return total

    # --- inside ------------------------------------------------------------------------------

    def _plain_batches(self, keys: Iterable[bytes]) -> list[list[bytes]]:
        everything = list(keys)
        return [
            everything[start : start + BATCH_KEYS]
            for start in range(0, len(everything), BATCH_KEYS)
        ]

    def _repair(self, keys: list[bytes], total: Applied, streams: set[bytes]) -> None:
        wrong: dict[bytes, Snapshot | None] = {}
        for key, ours, theirs in self.read(keys):
            total.compared += 1
            if ours is not None and ours.is_stream:
                streams.add(key)
            if not self.same(ours, theirs):
                wrong[key] = ours
            elif ours is not None and ours.is_stream:
                self.streams[key] = ours.digest()
        if wrong:
            self._throttle.take(len(wrong), while_waiting=self._progress.check)
            self._apply(wrong, total)
        self._progress.check()

    def _apply(self, wanted: dict[bytes, Snapshot | None], total: Applied) -> None:
        if self.writer is None:
            raise RuntimeError("this comparison may not write")
        keys = list(wanted)
        if self._before_deleting is not None and None in wanted.values():
            self._before_deleting()
        size = payloads.send(self.writer, keys, list(wanted.values()))
        self.writer.answers(len(keys))
        payloads.ask(self.target, keys)
        there = payloads.answers(self.target, len(keys))
        total.keys += len(keys)
        total.size += size
        for (key, ours), theirs in zip(wanted.items(), there, strict=True):
            equal = (
                self.same(ours, theirs)
                or self.has_expired(ours, theirs)
                or self.same_logically(key)
            )
            if not equal:
                total.unequal.append(key)
            if ours is None or not ours.is_stream:
                self.streams.pop(key, None)
            else:
                # also one that changed meanwhile: the last delta must not forget any stream
                self.streams[key] = ours.digest() if equal else b""

    def _report(self, phase: str, total: Applied, *, final: bool = False) -> None:
        now = time.monotonic()
        if final or now - self._reported >= _REPORT_S:
            self._reported = now
            done = total.compared if final else None
            self._progress.report(
                "redis", phase, total.compared, done, "keys", f"{total.keys} repaired"
            )


def settle(
    candidates: Iterable[bytes],
    differs: Callable[[bytes], bool],
    pause_s: float = 0.05,
) -> list[bytes]:
    """Look again at keys that differed a moment ago; returns those that differ on.

    A key may have expired, or changed, between the reads of the two sides.
    """
    left = list(candidates)
    for attempt in range(_SETTLE_TRIES):
        left = [key for key in left if differs(key)]
        if not left:
            break
        if attempt < _SETTLE_TRIES - 1:
            time.sleep(pause_s * 2**attempt)
    return left
