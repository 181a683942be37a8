"""Complete verification of both sides while writers write.

It shares no enumeration with the copier: it walks both sides by itself and repairs nothing. What
the change feed calls dirty at that moment is not a mismatch; everything else must be equal.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cellferry.model import Mismatch, Progress, Verification
from cellferry.stores.redis.comparison import Pair, scan, settle
from cellferry.stores.redis.payloads import FOOTER, Snapshot

_EXAMPLES = 100
_SCAN_COUNT = 700  # not the copier's
_REPORT_S = 0.3
_MODULUS = 2**128


@dataclass(slots=True)
class _Sum:
    """Order-independent sum of hashes of one kind of key."""

    count: int = 0
    source: int = 0
    destination: int = 0


class Verifier:
    """Compares everything.

    Args:
        pair: reads both sides; never asked to write.
        is_dirty: whether the feed has named a key since; asked after a barrier.
        barrier: returns when the feed is up to date.
    """

    def __init__(
        self,
        pair: Pair,
        *,
        is_dirty: Callable[[bytes], bool],
        barrier: Callable[[], None],
        progress: Progress,
    ) -> None:
        self._pair = pair
        self._is_dirty = is_dirty
        self._barrier = barrier
        self._progress = progress
        self._sums: defaultdict[str, _Sum] = defaultdict(_Sum)
        self._compared = 0
        self._reported = 0.0

    def run(self) -> Verification:
        """Walk the source, then the destination for what the source has not."""
        started = time.monotonic()
        differing: list[bytes] = []
        seen: set[bytes] = set()
        for page in scan(self._pair.origin, self._pair.prefix, count=_SCAN_COUNT):
            fresh = [key for key in dict.fromkeys(page) if key not in seen]
            seen.update(fresh)
            for batch in self._pair.in_batches(fresh):
                differing += self._compare(batch)
        for page in scan(self._pair.target, self._pair.prefix, count=_SCAN_COUNT):
            # what the first walk did not see has appeared since, or is too much here
            extra = [key for key in dict.fromkeys(page) if key not in seen]
            seen.update(extra)
            if extra:
                differing += self._compare(extra)
        self._barrier()
        left = settle((key for key in differing if not self._is_dirty(key)), self._differs)
        for key in left:
            self._add(*self._pair.read([key])[0])
        self._report(final=True)
        return Verification(
            store="redis",
            compared=self._compared,
            mismatch_count=len(left),
            mismatches=tuple(self._describe(key) for key in left[:_EXAMPLES]),
            hashes={
                kind: {
                    "count": total.count,
                    "source": f"{total.source:032x}",
                    "destination": f"{total.destination:032x}",
                }
                for kind, total in sorted(self._sums.items())
            }
            | {"changed meanwhile": {"count": len(differing) - len(left)}},
            seconds=time.monotonic() - started,
        )

    def _compare(self, keys: list[bytes]) -> list[bytes]:
        differing = []
        for key, ours, theirs in self._pair.read(keys):
            if ours is None and theirs is None:
                continue
            self._compared += 1
            if not self._pair.same(ours, theirs):
                differing.append(key)
            else:
                self._add(key, ours, ours)
        self._progress.check()
        self._report()
        return differing

    def _add(self, key: bytes, ours: Snapshot | None, theirs: Snapshot | None) -> None:
        """Sum up a key that was compared; one equal in another encoding counts as the source's."""
        present = ours or theirs
        if present is None:
            return
        total = self._sums[present.kind]
        total.count += 1
        total.source = (total.source + _hash(key, ours)) % _MODULUS
        total.destination = (total.destination + _hash(key, theirs)) % _MODULUS

    def _differs(self, key: bytes) -> bool:
        (_, ours, theirs), *_ = self._pair.read([key])
        if self._pair.same(ours, theirs) or self._pair.has_expired(ours, theirs):
            return False
        stream = ours is not None and ours.is_stream
        # groups of a stream change without a word; they are verified under the gate
        if (
            ours is not None
            and theirs is not None
            and self._pair.same_logically(key, groups=not stream)
        ):
            return False
        self._barrier()
        return not self._is_dirty(key)

    def _describe(self, key: bytes) -> Mismatch:
        (_, ours, theirs), *_ = self._pair.read([key])
        present = ours or theirs
        if theirs is None:
            reason = "missing at destination"
        elif ours is None:
            reason = "extra at destination"
        elif ours.expires != theirs.expires:
            reason = "differs in its expiry"
        else:
            reason = "differs"
        return Mismatch(
            present.kind if present else "other", key.decode(errors="backslashreplace"), reason
        )

    def _report(self, *, final: bool = False) -> None:
        now = time.monotonic()
        if final or now - self._reported >= _REPORT_S:
            self._reported = now
            total: Any = self._compared if final else None
            self._progress.report("redis", "verify", self._compared, total, "keys")


def _hash(key: bytes, snapshot: Snapshot | None) -> int:
    if snapshot is None:
        return 0
    digest = hashlib.blake2b(snapshot.payload[:-FOOTER], digest_size=16, key=key[-64:])
    digest.update(b"%d %d " % (snapshot.expires, len(key)) + key)
    return int.from_bytes(digest.digest(), "big")
