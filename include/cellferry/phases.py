"""Named points in the steps, at which tests stop, kill, cut off or disturb them.

In production nothing listens and `reach` returns at once. A point says what has happened by then,
in the past tense. In the barrier `FINISHED`, `FLIPPED` and `HAND_OVER_KEPT` are durable; in between
a server that crashes may go a step back. The kill matrix (`tests/fault`) goes through all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class Phase(StrEnum):
    """Every point, in the order in which a migration passes them."""

    COPY_ARMED = "copy: armed"
    """Capture is on in every store; nothing is copied."""
    COPY_BATCH = "copy: a batch committed"
    COPY_DONE = "copy: all copied, the state not changed"
    ROUND_APPLIED = "round: committed at the destination, its log rows not forgotten"
    ROUND_DONE = "round: done"
    VERIFY_DONE = "verify: all equal, the state not changed"
    CAUGHT_UP = "barrier: caught up, the state not changed"
    BARRIER_BEGUN = "barrier: begun in the topology, nobody waits"
    FROZEN_ONE = "barrier: one store frozen"
    FROZEN_ALL = "barrier: all stores frozen"
    FINISHED = "barrier: last delta committed and verified"
    FLIPPED = "barrier: route flipped"
    HANDED_OVER_ONE = "barrier: one store handed over"
    RELEASED = "barrier: all stores handed over and writers released, not durable"
    HAND_OVER_KEPT = "barrier: hand-over durable, not recorded"
    UNDONE = "barrier: given up in the topology, nothing thawed"
    THAWED_ONE = "barrier: given up, one store thawed"
    SOAKED = "soak: watched, the state not changed"
    CLEANUP_BEGUN = "clean-up: begun in the topology"
    CLEANUP_BATCH = "clean-up: a batch deleted"
    CLEANUP_ONE = "clean-up: one store clean"
    CLEANUP_ALL = "clean-up: all stores clean, the state not changed"
    ABORTED = "abort: aborted in the topology, nothing thawed"


Hook = Callable[[Phase], None]

_hook: Hook | None = None


def reach(phase: Phase) -> None:
    """Say that a step has got to `phase`. Does nothing unless a test listens."""
    if _hook is not None:
        _hook(phase)


def listen(hook: Hook | None) -> None:
    """Call `hook` at every point from now on, in the step's own thread; None ends it."""
    global _hook  # noqa: PLW0603 - one listener for the whole process, for tests
    _hook = hook
