"""The copy step: capture from now on, then everything once."""

from __future__ import annotations

from cellferry.migration import history
from cellferry.migration.context import Context, attempt
from cellferry.migration.halts import activity_facts
from cellferry.migration.result import StepResult, plain
from cellferry.model import State, Strategy
from cellferry.phases import Phase, reach

ALLOWED = frozenset({State.PLANNED, State.COPYING})
DONE = frozenset(State) - ALLOWED - {State.ABORTED, State.ROLLED_BACK}


def copy(context: Context, migration_id: int) -> StepResult:
    """Start change capture at the source and copy everything, resuming where it stopped.

    Guarantees that afterwards every row and key is at the destination, or is recorded as dirty.
    Changes the destination's copy and cellferry's own records; the organization keeps writing at
    the source. May be repeated; a killed copy goes on from its checkpoints. If capture was lost
    meanwhile it is armed again, and the fact `capture_lost` stays for `sync`, which repairs.

    Raises:
        WrongState: the migration was aborted.
        DrainTimeout: a transaction older than the capture does not end; it is named.
        LeaseLost, Paused, Halted: this attempt must stop.
    """
    migration = context.topology.migration(migration_id)
    if migration.state in DONE:
        return StepResult(
            "copy",
            migration_id,
            migration.organization.slug,
            migration.state,
            "copied before",
            migration.facts.get("copied", {}),
            repeated=True,
        )
    with attempt(context, migration_id, "copy", ALLOWED, paced=True, continues=True) as at:
        if at.migration.state is State.PLANNED:
            at.transition(State.COPYING, activity_facts(at))
        copied = {}
        if at.move.strategy is Strategy.ONLINE:
            history.mark_losses(at)
            for store in at.stores.values():
                store.open_capture()
            history.note(at)
            reach(Phase.COPY_ARMED)
            for kind, store in at.stores.items():
                copied[kind] = plain(store.copy())
            summary = "copied " + " and ".join(
                f"{result['count']:,} in {kind}" for kind, result in copied.items()
            )
        else:
            summary = "nothing to copy before the gate: freeze-first copies under it"
        reach(Phase.COPY_DONE)
        at.transition(State.SYNCING, {"copied": copied, **at.pace_facts("copy")})
        return StepResult(
            "copy", migration_id, at.move.organization.slug, at.migration.state, summary, copied
        )
