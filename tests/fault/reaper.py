"""The reaper, as the matrix uses it: an aftermath of its own, and what comes last in any."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cellferry.migration.reap import Reaped, reap

if TYPE_CHECKING:
    from tests.fault.world import World, Writers

#: How long a holder must have been silent here. Shorter than in production, to save time.
EXPIRED_AFTER_S = 2.0
#: How often it runs here, seconds.
PERIOD_S = 1.0

#: Faults after which nobody but the reaper may act.
FAULTS = frozenset(
    {"kill step", "stop step", "kill topology", "hole source", "hole destination", "hole topology"}
)


def act(world: World, say: Callable[[str], None]) -> Reaped:
    """One run of the reaper, in this process, straight to the servers."""
    with world.context() as context:
        found = reap(context, expired_after_s=EXPIRED_AFTER_S)
    done = [f"{one.verb} {one.what} {one.cell}".strip() for one in found.deeds]
    say(f"reaper: {', '.join(done) or 'nothing to do'}")
    for one in (*found.attention, *found.failed):
        say(f"reaper could not: {one.verb} {one.what} {one.cell}: {one.reason}")
    return found


def act_alone(world: World, writers: Writers, say: Callable[[str], None], seconds: float) -> None:
    """Nobody else does anything: the reaper runs until every writer has written again.

    Raises:
        TimeoutError: one has not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    time.sleep(EXPIRED_AFTER_S)
    while True:
        time.sleep(PERIOD_S)
        found = act(world, say)
        try:
            writers.wait_for_writes(1, PERIOD_S)
        except TimeoutError:
            if time.monotonic() > deadline:
                raise
        else:
            if not found.failed and not found.busy:
                say("every writer has written again, and nobody but the reaper acted")
                return
