"""A task that is told to end unwinds instead of being killed.

Airflow sends SIGTERM to a task that somebody marks or clears, and SIGKILL five seconds later.
Its own handler does nothing for a plain function. Ours raises, so that a step in progress rolls
its transaction back, a cutover before the flip opens the source again, and connections close.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Cancelled(BaseException):
    """The task was told to end. No `Exception`, so that no retry loop swallows it."""


@contextmanager
def unwinding_when_cancelled() -> Iterator[None]:
    """Raise `Cancelled` in this block on SIGTERM or SIGINT."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def cancel(number: int, _frame: FrameType | None) -> None:
        # once: what unwinds must not be interrupted by an impatient second signal
        for each in held:
            signal.signal(each, signal.SIG_IGN)
        raise Cancelled(f"told to end by {signal.Signals(number).name}")

    held = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, cancel) for number in held}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
