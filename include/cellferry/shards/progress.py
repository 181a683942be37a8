"""How far the moving of one shard's keys is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

_EVERY_S = 0.3


@dataclass(frozen=True, slots=True)
class Moved:
    """A moment of some long work.

    Attributes:
        phase: `copy`, `sweep`, `round`, `verify` or `cleanup`.
        shard: the source shard.
        done: keys.
        total: None where nobody knows; may turn out wrong by what clients wrote meanwhile.
        size: bytes sent.
    """

    phase: str
    shard: str
    done: int
    total: int | None
    size: int = 0


Report = Callable[[Moved], None]
Check = Callable[[], None]
"""Called once a batch; what it raises ends the work."""


class Reporter:
    """Passes progress on, a few times a second at most."""

    def __init__(self, report: Report | None, check: Check | None, shard: str) -> None:
        self._report = report
        self._check = check
        self._shard = shard
        self._last = 0.0

    def check(self) -> None:
        """Raise if the work must end."""
        if self._check is not None:
            self._check()

    def tell(
        self, phase: str, done: int, total: int | None, size: int = 0, *, final: bool = False
    ) -> None:
        """Say how far `phase` is."""
        now = time.monotonic()
        if self._report is not None and (final or now - self._last >= _EVERY_S):
            self._last = now
            self._report(Moved(phase, self._shard, done, total, size))
