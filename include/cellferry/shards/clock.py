"""Time for leases: it never jumps, and it also passes while the machine or the process sleeps."""

from __future__ import annotations

import time


def now_s() -> float:
    """Return seconds since some moment before this process began.

    `time.monotonic()` stands still while a machine is suspended; a lease must not.
    """
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()
