"""Named points in the steps of a re-sharding, at which tests stop or kill them.

In production nothing listens and `reach` returns at once. A point says what is durable by then: its
name is in the past tense.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class Point(StrEnum):
    """Every point, in the order in which a re-sharding passes them."""

    BEGUN = "begin: recorded"
    COPY_BEGUN = "copy: the lease is taken, nothing is copied"
    COPIED = "copy: one source is copied, not recorded"
    DUAL_SET = "dual-write: set, not acknowledged"
    CAUGHT_UP = "catch-up: caught up, not recorded"
    VERIFIED = "verify: all equal, not recorded"
    FEEDS_OPENED = "switch: every feed is open"
    SWEPT = "switch: everything was compared, nobody waits"
    SWITCHING_SET = "switch: switching is set, not acknowledged"
    SWITCHING_ACKNOWLEDGED = "switch: values wait everywhere"
    LAST_BROUGHT = "switch: the last changes are over"
    SWITCHED = "switch: the other side has the authority, not acknowledged"
    SWITCH_DONE = "switch: acknowledged, not recorded"
    GONE_BACK = "switch: given up, the side that had the authority has it"
    WATCHED = "watch: all well, the state not changed"
    NEW_SET = "watch: new is set, not acknowledged"
    WAY_BACK_BEGUN = "roll-back: decided, the state not changed"
    OLD_SET = "roll-back: old is set, not acknowledged"
    CLEANED_ONE = "clean-up: one source is clean"
    CLEANED = "clean-up: all are clean, the re-sharding has not ended"


Hook = Callable[[Point], None]

_hook: Hook | None = None


def reach(point: Point) -> None:
    """Say that a step has got to `point`. Does nothing unless a test listens."""
    if _hook is not None:
        _hook(point)


def listen(hook: Hook | None) -> None:
    """Call `hook` at every point from now on, in the step's own thread; None ends it."""
    global _hook  # noqa: PLW0603 - one listener for the whole process, for tests
    _hook = hook
