"""What keeps the mover's own work small: a rate that the operator sets, and the cells' pace."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

from cellferry.stores.pace import FULL_SPEED, Pace


class Throttle:
    """Lets at most `per_second` units through each second; None lets everything through.

    The bucket may go into debt: a batch that is larger than a second's allowance passes, and the
    next one waits until the debt is paid. So what is taken is never split, and the long-run rate is
    exact. Safe to share by threads.

    Args:
        per_second: units (rows, keys) a second, or None.
        burst_s: how many seconds of unused allowance may be saved up.
        pace: rests after each piece of work besides; full speed by default.
    """

    #: Longest single sleep in seconds, so that a stop is noticed while a debt is paid.
    SLICE_S = 0.25
    #: At a fixed rate work is cut into pieces of this length, in seconds.
    PIECE_S = 0.02

    def __init__(
        self, per_second: float | None, *, burst_s: float = 0.1, pace: Pace = FULL_SPEED
    ) -> None:
        if per_second is not None and per_second <= 0:
            raise ValueError(f"a rate must be positive, not {per_second}")
        self.per_second = per_second
        self.pace = pace
        self._burst_s = burst_s
        self._lock = threading.Lock()
        #: When the bucket's debt is paid, on the monotonic clock.
        self._free_at = time.monotonic()

    def piece(self, full: int, least: int) -> int:
        """Return how much may be done in one go; `sys.maxsize` where nothing asks to be slow.

        At a fixed rate it is what the rate lets through in `PIECE_S`, between the two; less than
        `least` where the rest after it would be longer than `Pace.LONGEST_S`.

        Args:
            full: of work at nearly full speed.
            least: of the slowest work; less would only cost more.
        """
        pieces = []
        if self.pace.share < 1.0:
            pieces.append(self.pace.size(full, least))
        if self.per_second is not None:
            shortest = max(1, min(least, int(self.per_second * Pace.LONGEST_S)))
            pieces.append(max(shortest, min(full, int(self.per_second * self.PIECE_S))))
        return min(pieces, default=sys.maxsize)

    def take(self, n: float, while_waiting: Callable[[], None] | None = None) -> float:
        """Take `n` units, sleeping first while the bucket is in debt; return the seconds slept.

        Args:
            n: units of work that are about to be done, or have just been done.
            while_waiting: called between slices of a long sleep; what it raises ends the wait.
        """
        rested = self.pace.breathe()
        if self.per_second is None:
            return rested
        with self._lock:
            now = time.monotonic()
            start = max(self._free_at, now - self._burst_s)
            self._free_at = start + n / self.per_second
        slept = 0.0
        while (left := start - time.monotonic()) > 0:
            pause = min(left, self.SLICE_S)
            time.sleep(pause)
            slept += pause
            if while_waiting is not None:
                while_waiting()
        if slept:
            self.pace.start()  # waiting is no work
        return rested + slept
