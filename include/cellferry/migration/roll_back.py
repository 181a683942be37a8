"""The roll-back step: after the flip, back to the old cell, losing nothing.

The same barrier as a cutover, with the cells swapped: reverse capture has logged every change at
the new cell since before it opened, and the old copy has waited behind its gate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from cellferry.errors import Blocked, CellferryError, Unreachable, WrongState
from cellferry.migration import history
from cellferry.migration.barrier import Turn, hand_over, pass_barrier, thaw
from cellferry.migration.context import Attempt, Context, StepProgress, attempt
from cellferry.migration.result import StepResult, plain
from cellferry.migration.sync import run_rounds
from cellferry.migration.verify import compare_everything
from cellferry.model import Blocker, Migration, State
from cellferry.topology.migrations import ROLL_BACK_PAUSE

ALLOWED = frozenset({State.SOAKING, State.RETAINED, State.ROLLING_BACK, State.ROLLED_BACK})


def roll_back(
    context: Context, migration_id: int, reason: str, *, ttl_s: float | None = None
) -> StepResult:
    """Bring the organization back to its old cell with everything it wrote since the cutover.

    Guarantees what a cutover does, in the other direction: one cell accepts writes at any time,
    nothing acknowledged is lost, everything is compared once more and every key that changed
    since again under the gate. On any error before its flip the new cell serves on, and the
    migration stays paused, so that no clean-up takes the way back away. May be repeated; a killed
    one is finished by the next. The new cell's copy stays, gated, until its clean-up.

    Args:
        context: the topology, the stores, who asks.
        migration_id: the migration that brought the organization where it is.
        reason: why, for the audit.
        ttl_s: from the flip back to the clean-up of the new cell, seconds; as for the move if None.

    Raises:
        WrongState: not between its flip and its clean-up, or the organization has moved on.
        Blocked: something would be lost or dangle at the old cell; it is named.
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
    if migration.state is not State.ROLLED_BACK:
        # Whatever happens now: no clean-up before a person has seen it. Before the lease is taken:
        # steps that a pause stops (reverse rounds) then leave it to this one.
        context.topology.set_paused(
            migration_id, True, context.actor, f"{ROLL_BACK_PAUSE}: {reason}"
        )
    try:
        if migration.state is State.SOAKING and not migration.facts.get("handed_over"):
            from cellferry.migration.cutover import cutover

            cutover(context, migration_id)  # a cutover that was killed after its flip ends first
        return _roll_back(context, migration_id, reason, ttl_s)
    except WrongState:
        _lift_pause(context, migration)
        raise
    except Unreachable as error:
        error.hint = f"{_without(migration, error)}. Its clean-up is paused until then"
        raise


def _lift_pause(context: Context, before: Migration) -> None:
    """Lift this roll-back's pause where a clean-up was quicker: it would keep that from its end."""
    with contextlib.suppress(CellferryError):
        now = context.topology.migration(before.id)
        is_ours = (now.paused_reason or "").startswith(ROLL_BACK_PAUSE)
        if not before.paused and now.paused and is_ours and now.state not in ALLOWED:
            why = f"it is {now.state} and cannot be rolled back"
            context.topology.set_paused(before.id, False, context.actor, why)


def examine_return(context: Context, migration_id: int) -> tuple[Blocker, ...]:
    """Say what would keep a roll-back from going, and what would stay behind. Changes nothing.

    Raises:
        WrongState: it is not between its flip and its clean-up, or the organization has moved on.
        Unreachable: a cell does not answer; says what that means.
    """
    context.topology.may_roll_back(migration_id)
    migration = context.topology.migration(migration_id)
    move = context.move(migration, migration.attempt, returning=True)
    resources = context.topology.resources(migration_id)
    progress = StepProgress(context, migration.organization.slug, 0, 0)
    found: list[Blocker] = []
    try:
        for store in context.stores.values():
            with store.open(move, resources, progress) as opened:
                found += opened.check_return()
    except Unreachable as error:
        error.hint = _without(migration, error)
        raise
    return tuple(found)


def migration_to_roll_back(context: Context, organization: str) -> Migration:
    """Return the migration that brought an organization (id or slug) where it is now.

    Raises:
        InvalidInput: no such organization.
        WrongState: that migration cannot be rolled back, or there is none.
    """
    found = context.topology.organization(organization)
    for migration in context.topology.migrations(org=found.id):  # newest first
        if migration.state.is_before_flip or migration.state is State.ABORTED:
            continue
        if migration.state in ALLOWED:
            return migration
        break  # an older one has been overtaken by this one
    raise WrongState(
        f"organization {found.slug} has no migration that could be rolled back",
        organization=found.slug,
        step="roll-back",
        hint="one that has not flipped is aborted; one that was cleaned up is moved back",
    )


def _without(migration: Migration, error: Unreachable) -> str:
    """Say what it means that a server does not answer."""
    new, old = migration.destination, migration.source
    dead = next((cell for cell in (new, old) if (error.where or "").startswith(f"{cell}/")), None)
    if " to " in (error.where or "") or dead is None:
        hint = (
            f"both cells and the topology are needed; see that they answer, then roll back again."
            f" The organization's writes since the cutover are in {new}"
        )
    elif dead == old:
        hint = f"{new} serves on. Bring {old} back, then roll back again"
    else:
        known = migration.facts.get("reversed", {}).get("at")
        hint = (
            f"what the organization wrote since the cutover is in {new}, and from a cell that does"
            f" not answer nothing can be brought back. Bring {new} back, or fail over inside it;"
            " then roll back again"
            + (f". {old} has what was written until {known}" if known else "")
        )
    return hint + (f" ({error.hint})" if error.hint else "")


def _roll_back(context: Context, migration_id: int, reason: str, ttl_s: float | None) -> StepResult:
    with attempt(
        context, migration_id, "roll-back", ALLOWED, stoppable=False, returning=True
    ) as at:
        if at.migration.state is State.ROLLED_BACK:
            history.restore(at)
            hand_over(at)  # an earlier attempt died between the flip and the hand-over
            at.record({"handed_back": True})
            return _result(context, migration_id, repeated=True)
        serve_on(at)
        history.follow(at)
        _insist_on_way(at)
        for kind, store in at.stores.items():
            run_rounds(at, kind, store)
        _compare(at)
        timings = pass_barrier(at, turn(reason, ttl_s))
        at.record({"handed_back": True, "pause_back": plain(timings.facts())})
        return _result(context, migration_id)


def _insist_on_way(at: Attempt) -> None:
    """See that everything can go back; from here on no row may come to refer to others'.

    Raises:
        Blocked: something cannot; it is named.
    """
    found = [blocker for store in at.stores.values() for blocker in store.check_return()]
    at.record({"notes_back": [f"{one.where}: {one.reason}" for one in found if not one.fatal]})
    fatal = [one for one in found if one.fatal]
    if fatal:
        raise Blocked(
            f"it cannot go back yet, and {at.move.source.name} serves on: "
            + "; ".join(f"{one.where}: {one.reason}" for one in fatal),
            hint="; ".join(dict.fromkeys(one.remedy for one in fatal)),
        )


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
    hint = (
        f"{at.move.source.name} serves on; look for writers that bypass the gate at "
        f"{at.move.destination.name}, then roll back again"
    )
    found = compare_everything(at, "roll-back", hint, fact="verified_back")
    at.record({"verified_back": plain(found)})


def turn(reason: str, ttl_s: float | None = None) -> Turn:
    """The way back; `reason` goes into the audit with the flip.

    Args:
        reason: why.
        ttl_s: how long the new cell's copy is kept, seconds; the move's TTL if None.
    """

    def flip(at: Attempt, facts: Mapping[str, Any]) -> None:
        at.context.topology.flip_back(
            at.migration.id,
            at.move.attempt,
            at.context.actor,
            at.options.ttl_s if ttl_s is None else ttl_s,
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
    notes = migration.facts.get("notes_back", ())
    return StepResult(
        "roll-back",
        migration_id,
        migration.organization.slug,
        migration.state,
        f"authority is back at {migration.source}"
        + (f"; gate closed {seconds * 1000:.0f} ms" if seconds is not None else "")
        + "".join(f"; {note}" for note in notes),
        pause,
        repeated=repeated,
    )
