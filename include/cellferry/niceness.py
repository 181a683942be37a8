"""Who goes first where movers, servers and their clients share a machine."""

from __future__ import annotations

import os

#: Niceness of work that nobody waits for: cutovers, servers and their clients go first.
GENTLE = 10


def give_way(pid: int = 0) -> None:
    """Let others go before process `pid` (by default this one); it cannot take that back.

    Raises:
        ProcessLookupError: there is no such process.
    """
    os.setpriority(os.PRIO_PROCESS, pid, max(GENTLE, os.getpriority(os.PRIO_PROCESS, pid)))
