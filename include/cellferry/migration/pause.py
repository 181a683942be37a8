"""Pause and resume; and the key log of a migration that stays paused for too long.

A paused migration keeps its checkpoints, and its key log within a budget. Past it the log is given
up: the capture is closed at the source, and after the resume everything is compared and what
differs is repaired, which is much less than copying anew.
"""

from __future__ import annotations

from contextlib import ExitStack

from cellferry.errors import InvalidInput, WrongState
from cellferry.migration.context import Context, StepProgress
from cellferry.migration.halts import automatic
from cellferry.migration.result import StepResult
from cellferry.model import Migration, State

#: Where nothing is left to pause.
OVER = frozenset({State.COMPLETED, State.ABORTED})


def pause(context: Context, migration_id: int, reason: str) -> StepResult:
    """Stop a migration until it is resumed: running steps end at their next batch.

    Before the flip the organization goes on at its source, and checkpoints and key log are kept.
    Of a retained one the clean-up waits. A cutover that has begun ends first. Repeatable.

    Raises:
        WrongState: it is over.
        InvalidInput: no reason.
    """
    _insist_on_reason(reason, "pause")
    before = context.topology.migration(migration_id)
    if before.state in OVER:
        raise WrongState(
            f"migration {migration_id} is {before.state}: there is nothing to pause",
            organization=before.organization.slug,
            step="pause",
        )
    after = context.topology.set_paused(migration_id, True, context.actor, reason)
    return _result("pause", after, _paused(after), repeated=before.paused)


def resume(context: Context, migration_id: int, reason: str) -> StepResult:
    """Let a paused migration go on: run the step that stopped, or clear its task. Repeatable.

    Raises:
        InvalidInput: no reason.
    """
    _insist_on_reason(reason, "resume")
    before = context.topology.migration(migration_id)
    after = context.topology.set_paused(migration_id, False, context.actor, reason)
    summary = "resumed: run the step that stopped again" if before.paused else "is not paused"
    if after.facts.get("capture_lost"):
        summary += "; its key log was given up, so sync compares everything and repairs"
    halts = context.topology.halts_on(migration_id)
    if halts:
        summary += "; but " + " and ".join(f"{one.what} is halted" for one in halts)
    return _result("resume", after, summary, repeated=not before.paused)


def give_up_log(context: Context, migration_id: int, reason: str) -> bool:
    """Close the capture of a stopped migration at the source: gate disarmed, log gone.

    Recorded before it is done, as the fact `capture_lost`; until `sync` has armed again, compared
    everything and repaired it, nothing is verified or cut over. Repeatable.

    Returns:
        Whether it was given up; False for a migration that is not stopped, or has no capture.

    Raises:
        LeaseLost: somebody resumed it meanwhile and goes on; then the log is theirs.
        Unreachable: the source does not answer; to be repeated.
    """
    stopped = context.topology.give_up_capture(migration_id, reason, automatic(context))
    if stopped is None:
        return False
    # With the attempt of that very transaction: a step that begins from here on has a newer one.
    move = context.move(stopped, stopped.attempt)
    progress = StepProgress(
        context, stopped.organization.slug, migration_id, stopped.attempt, stoppable=False
    )
    resources = context.topology.resources(migration_id, stopped.attempt)
    with ExitStack() as stack:
        for store in context.stores.values():
            opened = stack.enter_context(store.open(move, resources, progress))
            opened.fence()
            opened.drop_capture()
    return True


def _paused(migration: Migration) -> str:
    if migration.state is State.CUTTING_OVER:
        return "paused: the cutover that is under way ends first"
    if migration.state.is_before_flip:
        return "paused: the organization goes on at its source; nothing of the copy is lost"
    return "paused: the old copy is not cleaned up before you resume"


def _insist_on_reason(reason: str, what: str) -> None:
    if not reason.strip():
        raise InvalidInput(f"to {what} needs a reason", hint="say why; it goes into the audit")


def _result(step: str, migration: Migration, summary: str, *, repeated: bool) -> StepResult:
    return StepResult(
        step,
        migration.id,
        migration.organization.slug,
        migration.state,
        summary,
        {"reason": migration.paused_reason} if migration.paused_reason else {},
        repeated=repeated,
    )
