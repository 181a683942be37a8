"""A process that ends with the one that started it, even when that is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
#: Looked up once, so that nothing is loaded or searched after a fork.
_prctl = ctypes.CDLL(None).prctl if sys.platform.startswith("linux") else None


def end_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Let the kernel end this process when its parent ends, even if that was killed (Linux only).

    Args:
        parent: its pid. Where it is no longer the parent, it has ended already, and so does this.
        number: the signal that ends this process.
    """
    if _prctl is None:
        return
    _prctl(_PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:
        os.kill(os.getpid(), number)
