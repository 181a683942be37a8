"""The roll-back step: after the flip, back to the old cell, losing nothing.

The same barrier as a cutover, with the cells swapped: reverse capture has logged every change at
the new cell since before it opened, and the old copy has waited behind its gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cellferry.errors import Unreachable, VerificationFailed, WrongState
from cellferry.migration.barrier import Turn, hand_over, pass_barrier, thaw
from cellferry.migration.context import Attempt, Context, attempt
from cellferry.migration.result import StepResult, plain
from cellferry.migration.sync import run_rounds
from cellferry.migration.verify import describe_mismatches
from cellferry.model import Migration, State

ALLOWED = frozenset({State.SOAKING, State.RETAINED, State.ROLLING_BACK, State.ROLLED_BACK})


def roll_back(context: Context, migration_id: int, reason: str) -> StepResult:
    """Bring the organization back to its old cell with everything it wrote since the cutover.

    Guarantees what a cutover does, in the other direction: one cell accepts writes at any time,
    nothing acknowledged is lost, everything is compared once more and every key that changed
    since again under the gate. On any error before its flip the new cell serves on, and the
    migration is paused, so that no clean-up takes the way back away. May be repeated; a killed
    one is finished by the next. The new cell's copy stays, gated, until its clean-up.

    Args:
        reason: why, for the audit.

    Raises:
        WrongState: not between its flip and its clean-up, or the organization has moved on.
        Unreachable: a cell does not answer. From a dead cell nothing can be brought back.
        VerificationFailed: the two cells differ; the differences are named.
        DrainTimeout, NotConverging, OutcomeUnknown: as for `cutover`.
    """
    migration = context.topology.migration(migration_id)
    if migration.state is State.ROLLED_BACK and migration.facts.get("handed_back"):
        return _result(context, migration_id, repeated=True)
    if migration.state not in ALLOWED:
        raise WrongState(
            f"migration {migration_id} is {migration.state}: "
            + (
                "its route was not flipped, so there is nothing to roll back"
                if migration.state.is_before_flip or migration.state is State.ABORTED
                else "its old copy is being deleted or is gone"
            ),
            organization=migration.organization.slug,
            step="roll-back",
            hint="abort it"
            if migration.state.is_before_flip
            else "move the organization back as any other",
        )
    context.topology.may_roll_back(migration_id)
    if migration.state is State.SOAKING and not migration.facts.get("handed_over"):
        from cellferry.migration.cutover import cutover

        cutover(context, migration_id)  # a cutover that was killed after its flip ends first
    try:
        return _roll_back(context, migration_id, reason)
    except Unreachable as error:
        error.hint = (
            f"both cells are needed: the organization's writes since the cutover are in "
            f"{migration.destination}. Bring it back, or fail over inside that cell; then roll "
            "back again. Nothing was changed" + (f" ({error.hint})" if error.hint else "")
        )
        raise


def migration_to_roll_back(context: Context, organization: str) -> Migration:
    """Return the migration that brought an organization (id or slug) where it is now.

    Raises:
        InvalidInput: no such organization.
        WrongState: none of its migrations can be rolled back.
    """
    found = context.topology.organization(organization)
    moves = context.topology.migrations(states=ALLOWED, org=found.id, limit=1)
    if not moves:
        raise WrongState(
            f"organization {found.slug} has no migration that could be rolled back",
            organization=found.slug,
            step="roll-back",
            hint="one that has not flipped is aborted; one that was cleaned up is moved back",
        )
    return moves[0]


def _roll_back(context: Context, migration_id: int, reason: str) -> StepResult:
    with attempt(
        context, migration_id, "roll-back", ALLOWED, stoppable=False, returning=True
    ) as at:
        if at.migration.state is State.ROLLED_BACK:
            hand_over(at)  # an earlier attempt died between the flip and the hand-over
            at.record({"handed_back": True})
            return _result(context, migration_id, repeated=True)
        serve_on(at)
        # Whatever happens now: no clean-up before a person has seen it.
        context.topology.set_paused(
            migration_id, True, context.actor, f"it is being rolled back: {reason}"
        )
        for kind, store in at.stores.items():
            run_rounds(at, kind, store)
        _compare(at)
        timings = pass_barrier(at, turn(reason))
        at.record({"handed_back": True, "pause_back": plain(timings.facts())})
        context.topology.set_paused(migration_id, False, context.actor, "rolled back")
        return _result(context, migration_id)


def serve_on(at: Attempt) -> None:
    """Open what an earlier attempt left frozen before its flip back. Repeatable."""
    if at.migration.state is State.ROLLING_BACK:
        at.transition(State.RETAINED, reason="an earlier roll-back died before the flip")
    thaw(at)


def _compare(at: Attempt) -> None:
    """Compare everything once, as before a cutover (invariant 3).

    Raises:
        VerificationFailed: the cells differ.
    """
    found = {kind: store.verify() for kind, store in at.stores.items()}
    at.record({"verified_back": plain(found)})
    failed = {kind: one for kind, one in found.items() if not one.ok}
    if failed:
        raise VerificationFailed(
            describe_mismatches(failed),
            hint=f"{at.move.source.name} serves on; look for writers that bypass the gate at "
            f"{at.move.destination.name}, then roll back again",
        )


def turn(reason: str) -> Turn:
    """The way back; `reason` goes into the audit with the flip."""

    def flip(at: Attempt, facts: Mapping[str, Any]) -> None:
        at.context.topology.flip_back(
            at.migration.id,
            at.move.attempt,
            at.context.actor,
            at.options.ttl_s,
            {"finished_back": facts.get("finished")},
            reason,
        )

    def flipped(at: Attempt) -> bool:
        return at.context.topology.flip_outcome(at.migration.id, back=True)

    return Turn("roll-back", State.ROLLING_BACK, State.RETAINED, flip, flipped)


def _result(context: Context, migration_id: int, *, repeated: bool = False) -> StepResult:
    migration = context.topology.migration(migration_id)
    pause = migration.facts.get("pause_back", {})
    seconds = pause.get("seconds")
    return StepResult(
        "roll-back",
        migration_id,
        migration.organization.slug,
        migration.state,
        f"authority is back at {migration.source}"
        + (f"; gate closed {seconds * 1000:.0f} ms" if seconds is not None else ""),
        pause,
        repeated=repeated,
    )
