"""The barrier: authority goes from one cell to the other, once, over all stores together.

A cutover and a roll-back are the same barrier with the cells swapped. The order of things is the
table "Cutover" in docs/architecture.md; the numbers in the comments are its steps. Before step 4
every failure is undone: first in the topology, so that no flip of ours can still happen, then at
the gates. After step 4 there is only forward.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

from cellferry.errors import (
    CellferryError,
    DrainTimeout,
    NotConverging,
    OutcomeUnknown,
    TransientError,
    Unreachable,
    WrongState,
)
from cellferry.migration import history
from cellferry.migration.context import Attempt
from cellferry.migration.halts import judge_pause
from cellferry.migration.result import plain
from cellferry.migration.sync import is_small
from cellferry.model import State, Strategy
from cellferry.phases import Phase, reach
from cellferry.stores.base import StoreMove

log = logging.getLogger(__name__)

T = TypeVar("T")

#: How long the topology is asked about a commit whose outcome is unknown, in seconds.
ASK_FOR_S = 60.0
#: How long this process does nothing when the gates have opened, in seconds: all writers that
#: waited want the processors in the same moment.
GIVE_WAY_S = 0.05
#: Rounds right before the freeze, at most.
LAST_ROUNDS = 3
#: One of this length (seconds) leaves no more than the next one would.
SHORT_ROUND_S = 0.05
#: The last part of a pause.
_HAND_OVER = "hand over"
#: How long a hand-over, or a thaw, is tried again within one step, in seconds.
HAND_OVER_FOR_S = 30.0


@dataclass(frozen=True, slots=True)
class Turn:
    """Which way the authority goes, and what the topology calls it.

    Attributes:
        name: in messages: `cutover`, `roll-back`.
        begun: the state from before the first freeze to the flip.
        given_up: the state to which it returns when it gives up before the flip.
        flip: sends the commit point, with facts; raises as `Topology.flip`.
        flipped: whether it has happened; final when it says no, as `Topology.flip_outcome`.
    """

    name: str
    begun: State
    given_up: State
    flip: Callable[[Attempt, Mapping[str, Any]], object]
    flipped: Callable[[Attempt], bool]


def pass_barrier(at: Attempt, turn: Turn) -> Timings:
    """Catch up, then move the authority; return where the pause went.

    Guarantees that on any error before the flip the cell that had authority serves again, or
    that `OutcomeUnknown` says why it cannot, and that after the flip both gates are handed over.

    Raises:
        NotConverging: the predicted pause is over the budget; nothing was frozen.
        DrainTimeout, VerificationFailed, …: undone; the cell that had authority serves on.
        OutcomeUnknown: the topology does not say whether the flip happened; still frozen.
    """
    _catch_up(at)
    reach(Phase.CAUGHT_UP)
    with _uninterrupted(at):
        at.transition(turn.begun)
        reach(Phase.BARRIER_BEGUN)
        timings = Timings()
        try:
            with _signals_wait(), _garbage_waits(), _kept_alive(at):
                _barrier(at, turn, timings)
        finally:
            judge_pause(at, timings.closed_s(at.move.limits.drain_attempt_s))
        return timings


@contextlib.contextmanager
def _uninterrupted(at: Attempt) -> Iterator[None]:
    """From here on a pause or a halt waits for the barrier's end: writers wait for it, too."""
    at.progress.check_now()
    before, at.progress.stoppable = at.progress.stoppable, False
    try:
        yield
    finally:
        at.progress.stoppable = before


def _kept_alive(at: Attempt) -> contextlib.AbstractContextManager[None]:
    """Keep the lease alive while nothing else does, for as long as a barrier may take.

    One that overruns its own deadlines falls silent, and the reaper takes the migration over.
    """
    limits = at.move.limits
    longest_s = len(at.stores) * limits.drain_deadline_s + limits.freeze_deadline_s
    return at.context.topology.kept_alive(
        at.migration.id, at.move.attempt, longest_s=longest_s + HAND_OVER_FOR_S
    )


@dataclass
class Timings:
    """Seconds of each part of the pause, as the controller saw them."""

    started: float = field(default_factory=time.monotonic)
    parts: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.monotonic)
    finished: dict[str, Any] = field(default_factory=dict)

    def restart(self) -> None:
        """Begin to count here: nobody waits yet."""
        self.started = self.last = time.monotonic()

    def mark(self, name: str) -> None:
        """End the part called `name` here."""
        now = time.monotonic()
        self.parts[name] = round(now - self.last, 5)
        self.last = now

    def elapsed(self) -> float:
        """Return the seconds since the beginning."""
        return time.monotonic() - self.started

    def closed_s(self, drain_attempt_s: float) -> float:
        """Return for how long writers waited, seconds; 0 if nothing was frozen.

        While writers in flight drain, the others wait for one attempt at a time.
        """
        draining = next((s for name, s in self.parts.items() if name.startswith("freeze ")), None)
        if draining is None:
            return 0.0
        end = self.last if _HAND_OVER in self.parts else time.monotonic()
        return end - self.started - max(0.0, draining - drain_attempt_s)

    def facts(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {
            "seconds": round(sum(self.parts.values()), 5),
            "parts": self.parts,
            "finished": self.finished,
        }


def _barrier(at: Attempt, turn: Turn, timings: Timings) -> None:
    """Steps 1 to 7. Raises with the gates open again, or goes all the way."""
    try:
        _freeze_and_finish(at, timings)
        reach(Phase.FINISHED)
    except BaseException as error:
        _undo(at, turn, error)
        raise
    try:
        turn.flip(at, {"finished": timings.finished})  # 4: the commit point
    except OutcomeUnknown as error:
        _settle_flip(at, turn, error)
    except BaseException as error:
        _undo(at, turn, error)
        raise
    reach(Phase.FLIPPED)
    timings.mark("flip")
    hand_over(at, timings)


def _freeze_and_finish(at: Attempt, timings: Timings) -> None:
    """Steps 1 to 3: every store frozen, the last delta applied, verified and committed."""
    history.insist(at)
    if at.move.strategy is Strategy.ONLINE:
        # What changed while the topology committed. The store that drains writers goes last: what
        # becomes dirty during its round is what the pause has to carry, so a long one is repeated.
        for _ in range(LAST_ROUNDS):
            rounds = [store.sync() for store in reversed(list(at.stores.values()))]
            if rounds[-1].seconds <= SHORT_ROUND_S:
                break
    timings.restart()
    for kind, store in at.stores.items():
        store.freeze(at.move.limits.drain_deadline_s)
        timings.mark(f"freeze {kind}")
        reach(Phase.FROZEN_ONE)
    reach(Phase.FROZEN_ALL)
    timings.finished = plain(_together(at, lambda store: store.finish()))
    timings.mark("finish")
    if timings.elapsed() > at.move.limits.freeze_deadline_s:
        raise DrainTimeout(
            f"the freeze took {timings.elapsed():.1f} s, over its deadline of "
            f"{at.move.limits.freeze_deadline_s:g} s",
            hint=f"{at.move.source.name} serves again; raise freeze_deadline_s or choose a quieter "
            "hour",
        )


def _settle_flip(at: Attempt, turn: Turn, error: OutcomeUnknown) -> None:
    """Find out whether a flip whose commit got no answer happened; return only if it did.

    An unflipped migration is moved back first, so that a commit still under way cannot succeed
    later: both change the same row, and only one of them finds it as it expects.

    Raises:
        TransientError: it did not happen; the source serves again.
        OutcomeUnknown: the topology does not answer; the organization stays frozen.
    """
    deadline = time.monotonic() + ASK_FOR_S
    while True:
        try:
            if turn.flipped(at):
                return
            at.transition(turn.given_up, reason=f"flip undone: {error.message}")
            break
        except WrongState:
            continue  # the commit arrived between the two questions: ask again
        except (Unreachable, OutcomeUnknown) as unanswered:
            if time.monotonic() > deadline:
                _release(at)
                raise OutcomeUnknown(
                    "the topology did not say whether the flip happened; the organization stays "
                    "frozen",
                    hint=f"bring the topology back, then run the {turn.name} again",
                ) from unanswered
            _pause_briefly()
        except CellferryError:
            _release(at)  # another controller took over; the gates are its business now
            raise
    thaw(at)
    raise TransientError(
        f"the flip's commit was lost and did not happen; {at.move.source.name} serves again",
        hint=f"try the {turn.name} again",
    ) from error


def _undo(at: Attempt, turn: Turn, error: BaseException) -> None:
    """Before the flip: first make a flip impossible, then thaw. Keeps `error` as the cause."""
    reason = f"{turn.name} gave up before the flip: {error}"
    try:
        at.transition(turn.given_up, reason=reason)
    except (Unreachable, OutcomeUnknown) as unanswered:
        # Without the topology nobody flips, and frozen organizations stay frozen.
        _release(at)
        raise OutcomeUnknown(
            f"the {turn.name} failed ({error}) and the topology does not answer; the organization "
            "stays frozen",
            hint=f"bring the topology back, then run the {turn.name} again: it thaws first",
        ) from unanswered
    except CellferryError:
        # Somebody took over (or aborted): the gates are theirs now.
        _release(at)
        raise
    reach(Phase.UNDONE)
    thaw(at)


def thaw(at: Attempt) -> None:
    """Let the source serve again at every store that can; then raise what kept another from it."""
    deadline = time.monotonic() + HAND_OVER_FOR_S

    def at_one(store: StoreMove) -> None:
        _insist(at, store.thaw, deadline)
        reach(Phase.THAWED_ONE)

    try:
        _together(at, at_one)
    finally:
        _release(at)


def _release(at: Attempt) -> None:
    for store in at.stores.values():
        _release_one(store)


def _release_one(store: StoreMove) -> None:
    with contextlib.suppress(TransientError):
        store.release()  # a lost session has released its lock already


def hand_over(at: Attempt, timings: Timings | None = None) -> None:
    """Steps 5 to 7, at all stores together; tried again for a while: there is only forward.

    Who waits at one store goes on as soon as that one is handed over, and before it is durable.

    Args:
        timings: of the barrier under way. None where an earlier attempt died in it: then nobody
            waits who would have to be given way to.

    Raises:
        TransientError: a store did not do it within `HAND_OVER_FOR_S`; a retry goes on.
    """
    deadline = time.monotonic() + HAND_OVER_FOR_S  # for all of it

    def at_one(store: StoreMove) -> None:
        try:
            _insist(at, store.hand_over, deadline)  # 5
            reach(Phase.HANDED_OVER_ONE)
        finally:
            _release_one(store)  # 6

    _together(at, at_one)
    if timings is not None:
        timings.mark(_HAND_OVER)
        time.sleep(GIVE_WAY_S)
    reach(Phase.RELEASED)
    _together(at, lambda store: _insist(at, store.keep_handed_over, deadline))  # 7
    reach(Phase.HAND_OVER_KEPT)


def _insist(at: Attempt, verb: Callable[[], None], deadline: float) -> None:
    while True:
        try:
            verb()
        except TransientError as error:
            if time.monotonic() > deadline:
                raise
            log.warning("migration %s: %s; trying again", at.migration.id, error)
            _pause_briefly()
        else:
            return


def _pause_briefly() -> None:
    time.sleep(0.1 + random.random() * 0.3)  # noqa: S311 - jitter, not a secret


def _together(at: Attempt, verb: Callable[[StoreMove], T]) -> dict[str, T]:
    """Run `verb` at every store at once; wait for all, then raise the first error."""
    with ThreadPoolExecutor(max_workers=len(at.stores)) as pool:
        futures = {kind: pool.submit(verb, store) for kind, store in at.stores.items()}
    return {kind: future.result() for kind, future in futures.items()}


def _catch_up(at: Attempt) -> None:
    """Everything outside the pause, until rounds predict one within the budget (MongoDB's rule).

    Raises:
        NotConverging: they do not; nothing was frozen.
    """
    if at.move.strategy is Strategy.FREEZE_FIRST:
        for store in at.stores.values():
            store.open_capture()
            store.catch_up()
        return
    for store in at.stores.values():
        store.catch_up()
    budget_s = at.move.limits.pause_budget_s / len(at.stores)
    for _ in range(at.options.max_rounds):
        at.progress.check()
        rounds = [store.sync() for store in reversed(list(at.stores.values()))]
        if all(is_small(one, budget_s) for one in rounds):
            return
    raise NotConverging(
        f"the predicted pause is over the budget of {at.move.limits.pause_budget_s * 1000:.0f} ms;"
        " nothing was frozen",
        hint="raise pause_budget_ms or move at a quieter hour",
    )


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Hold back SIGTERM and SIGINT during the barrier, which ends within its own deadlines."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    held = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *args: arrived.append(args)) for number in held}
    try:
        yield
    finally:
        for held_number, handler in before.items():
            signal.signal(held_number, handler)
        for number, _frame in arrived[:1]:
            signal.raise_signal(number)


@contextlib.contextmanager
def _garbage_waits() -> Iterator[None]:
    """Collect no garbage meanwhile: among an Airflow task's objects that takes a tenth of a second.

    Cycles alone wait; what is no longer referred to is freed as ever.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
