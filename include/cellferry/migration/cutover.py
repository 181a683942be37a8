"""The cutover: one barrier over all stores, one commit point.

The order of things is the table "Cutover" in docs/architecture.md; the numbers in the comments
are its steps. Before step 4 every failure is undone: first in the topology, so that no flip of
ours can still happen, then at the gates. After step 4 there is only forward.
"""

from __future__ import annotations

import contextlib
import logging
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
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
from cellferry.migration.context import Attempt, Context, attempt
from cellferry.migration.result import StepResult, plain
from cellferry.migration.sync import is_small
from cellferry.model import State, Strategy
from cellferry.stores.base import StoreMove

log = logging.getLogger(__name__)

T = TypeVar("T")

ALLOWED = frozenset({State.READY, State.CUTTING_OVER, State.SOAKING})
DONE = frozenset({State.RETAINED, State.CLEANING, State.COMPLETED})

#: How long the topology is asked about a commit whose outcome is unknown, in seconds.
ASK_FOR_S = 60.0
#: How long a hand-over is tried again within one step, in seconds.
HAND_OVER_FOR_S = 30.0


def cutover(context: Context, migration_id: int) -> StepResult:
    """Move the authority: gate, drain, last delta, flip, open. Pauses this organization's writers.

    Guarantees that exactly one cell accepts writes at any time (invariant 1), that nothing
    acknowledged is lost, and that on any error before the flip the source serves again. May be
    repeated: before the flip it starts anew, after it only finishes the hand-over.

    Raises:
        DrainTimeout: a transaction of this organization was held longer than the deadline.
        NotConverging: the predicted pause is over the budget; nothing was frozen.
        OutcomeUnknown: the topology did not say whether the flip happened; the organization
            stays frozen until a retry can ask it.
    """
    migration = context.topology.migration(migration_id)
    if migration.state in DONE or (
        migration.state is State.SOAKING and migration.facts.get("handed_over")
    ):
        return _result(context, migration_id, repeated=True)
    # What an earlier attempt left frozen must serve again, whoever paused or halted it since.
    with attempt(context, migration_id, "cutover", ALLOWED, stoppable=False) as at:
        if at.migration.state is State.SOAKING:
            _hand_over(at)  # an earlier attempt died between the flip and the hand-over
            at.record({"handed_over": True})
            return _result(context, migration_id, repeated=True)
        if at.migration.state is State.CUTTING_OVER:
            at.transition(State.READY, reason="an earlier cutover died before the flip")
        # An earlier attempt died before the flip, or before it had thawed: the source may be
        # frozen. It serves first.
        _thaw(at)
        at.progress.stoppable = True
        at.progress.check_now()
        _catch_up(at)
        at.transition(State.CUTTING_OVER)
        with _signals_wait():
            timings = _barrier(at)
        at.record({"handed_over": True, "pause": plain(timings.facts())})
        return _result(context, migration_id)


@dataclass
class _Timings:
    """Seconds of each part of the pause, as the controller saw them."""

    started: float = field(default_factory=time.monotonic)
    parts: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.monotonic)
    finished: dict[str, Any] = field(default_factory=dict)

    def restart(self) -> None:
        """Begin to count here: nobody waits yet."""
        self.started = self.last = time.monotonic()

    def mark(self, name: str) -> None:
        now = time.monotonic()
        self.parts[name] = round(now - self.last, 5)
        self.last = now

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def facts(self) -> dict[str, Any]:
        return {
            "seconds": round(sum(self.parts.values()), 5),
            "parts": self.parts,
            "finished": self.finished,
        }


def _barrier(at: Attempt) -> _Timings:
    """Steps 1 to 6. Raises with the source open again, or goes all the way."""
    timings = _Timings()
    try:
        _freeze_and_finish(at, timings)
    except BaseException as error:
        _undo(at, error)
        raise
    try:
        at.context.topology.flip(  # 4: the commit point
            at.migration.id,
            at.move.attempt,
            at.context.actor,
            at.options.ttl_s,
            {"finished": timings.finished},
        )
    except OutcomeUnknown as error:
        _settle_flip(at, error)
    except BaseException as error:
        _undo(at, error)
        raise
    timings.mark("flip")
    try:
        _hand_over(at)  # 5
        timings.mark("hand over")
    finally:
        _release(at)  # 6
        timings.mark("release")
    return timings


def _freeze_and_finish(at: Attempt, timings: _Timings) -> None:
    """Steps 1 to 3: every store frozen, the last delta applied, verified and committed."""
    if at.move.strategy is Strategy.ONLINE:
        # What changed while the topology committed. The store that drains writers goes last: what
        # becomes dirty between its round and its freeze is what the pause has to carry.
        for store in reversed(list(at.stores.values())):
            store.sync()
        timings.restart()
    for kind, store in at.stores.items():
        store.freeze(at.move.limits.drain_deadline_s)
        timings.mark(f"freeze {kind}")
    timings.finished = plain(_together(at, lambda store: store.finish()))
    timings.mark("finish")
    if timings.elapsed() > at.move.limits.freeze_deadline_s:
        raise DrainTimeout(
            f"the freeze took {timings.elapsed():.1f} s, over its deadline of "
            f"{at.move.limits.freeze_deadline_s:g} s",
            hint="the source serves again; raise freeze_deadline_s or move at a quieter hour",
        )


def _settle_flip(at: Attempt, error: OutcomeUnknown) -> None:
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
            if at.context.topology.flip_outcome(at.migration.id):
                return
            at.transition(State.READY, reason=f"flip undone: {error.message}")
            break
        except WrongState:
            continue  # the commit arrived between the two questions: ask again
        except (Unreachable, OutcomeUnknown) as unanswered:
            if time.monotonic() > deadline:
                _release(at)
                raise OutcomeUnknown(
                    "the topology did not say whether the flip happened; the organization stays "
                    "frozen",
                    hint="bring the topology back, then run the cutover again",
                ) from unanswered
            _pause_briefly()
        except CellferryError:
            _release(at)  # another controller took over; the gates are its business now
            raise
    _thaw(at)
    raise TransientError(
        "the flip's commit was lost and did not happen; the source serves again",
        hint="try the cutover again",
    ) from error


def _undo(at: Attempt, error: BaseException) -> None:
    """Before the flip: first make a flip impossible, then thaw. Keeps `error` as the cause."""
    reason = f"cutover gave up before the flip: {error}"
    try:
        at.transition(State.READY, reason=reason)
    except (Unreachable, OutcomeUnknown) as unanswered:
        # Without the topology nobody flips, and frozen organizations stay frozen.
        _release(at)
        raise OutcomeUnknown(
            f"the cutover failed ({error}) and the topology does not answer; the organization "
            "stays frozen",
            hint="bring the topology back, then run the cutover again: it thaws the source first",
        ) from unanswered
    except CellferryError:
        # Somebody took over (or aborted): the gates are theirs now.
        _release(at)
        raise
    _thaw(at)


def _thaw(at: Attempt) -> None:
    """Let the source serve again at every store that can; then raise what kept another from it."""
    try:
        _together(at, lambda store: _insist(at, store.thaw))
    finally:
        _release(at)


def _release(at: Attempt) -> None:
    for store in at.stores.values():
        with contextlib.suppress(TransientError):
            store.release()  # a lost session has released its lock already


def _hand_over(at: Attempt) -> None:
    """Step 5, at all stores together; tried again for a while, since there is only forward."""
    _together(at, lambda store: _insist(at, store.hand_over))


def _insist(at: Attempt, verb: Callable[[], None]) -> None:
    deadline = time.monotonic() + HAND_OVER_FOR_S
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


def _result(context: Context, migration_id: int, *, repeated: bool = False) -> StepResult:
    migration = context.topology.migration(migration_id)
    pause = migration.facts.get("pause", {})
    seconds = pause.get("seconds")
    return StepResult(
        "cutover",
        migration_id,
        migration.organization.slug,
        migration.state,
        f"authority moved to {migration.destination}"
        + (f"; gate closed {seconds * 1000:.0f} ms" if seconds is not None else ""),
        pause,
        repeated=repeated,
    )
