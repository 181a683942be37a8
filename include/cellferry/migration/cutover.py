"""The cutover step: the authority goes to the destination; the barrier does it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cellferry.errors import Blocked
from cellferry.migration import history
from cellferry.migration.barrier import Turn, hand_over, pass_barrier, thaw
from cellferry.migration.context import Attempt, Context, attempt
from cellferry.migration.result import StepResult, plain
from cellferry.migration.sync import run_rounds
from cellferry.migration.verify import HINT, compare_everything
from cellferry.model import State, Strategy

ALLOWED = frozenset({State.READY, State.CUTTING_OVER, State.SOAKING})
DONE = frozenset({State.RETAINED, State.CLEANING, State.COMPLETED})


def cutover(context: Context, migration_id: int) -> StepResult:
    """Move the authority: gate, drain, last delta, flip, open. Pauses this organization's writers.

    Guarantees that exactly one cell accepts writes at any time (invariant 1), that nothing
    acknowledged is lost, and that on any error before the flip the source serves again. It does
    not begin unless a roll-back would work. May be repeated: before the flip it starts anew,
    after it only finishes the hand-over.

    Raises:
        TransientError: a server lost commits since it was last looked at; nothing was frozen, and
            the next try repairs.
        Blocked: a roll-back would lose writes, and the operator did not accept that (`one_way`).
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
            history.restore(at)
            hand_over(at)  # an earlier attempt died between the flip and the hand-over
            at.record({"handed_over": True})
            return _result(context, migration_id, repeated=True)
        serve_again(at)
        at.progress.stoppable = True
        at.progress.check_now()
        history.follow(at, lambda: _verify_again(at))
        _insist_on_return(at)
        timings = pass_barrier(at, TURN)
        at.record({"handed_over": True, "pause": plain(timings.facts())})
        return _result(context, migration_id)


def serve_again(at: Attempt) -> None:
    """Open what an earlier attempt left frozen before the flip. Repeatable.

    It may have died before the flip, or before it had thawed.
    """
    if at.migration.state is State.CUTTING_OVER:
        at.transition(State.READY, reason="an earlier cutover died before the flip")
    thaw(at)


def _flip(at: Attempt, facts: Mapping[str, Any]) -> None:
    at.context.topology.flip(
        at.migration.id, at.move.attempt, at.context.actor, at.options.ttl_s, facts
    )


def _flipped(at: Attempt) -> bool:
    return at.context.topology.flip_outcome(at.migration.id)


TURN = Turn("cutover", State.CUTTING_OVER, State.READY, _flip, _flipped)


def _verify_again(at: Attempt) -> None:
    """Compare everything once more after a repair (invariant 3).

    Raises:
        VerificationFailed: both sides differ; the migration is halted.
    """
    if at.move.strategy is Strategy.FREEZE_FIRST:
        return  # everything is compared under the gate
    for kind, store in at.stores.items():
        run_rounds(at, kind, store)
    at.record({"verified": plain(compare_everything(at, "cutover", HINT))})


def _insist_on_return(at: Attempt) -> None:
    """See that the way back is open, before anything goes there (docs/decisions/0004-roll-back.md).

    Raises:
        Blocked: it is not; what keeps it closed is named.
    """
    if at.options.one_way:
        return
    found = [one for store in at.stores.values() for one in store.check_return() if one.fatal]
    if found:
        raise Blocked(
            "a roll-back would not work: "
            + "; ".join(f"{one.where}: {one.reason}" for one in found),
            hint="; ".join(dict.fromkeys(one.remedy for one in found)),
        )


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
