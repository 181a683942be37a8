"""The abort step: before the flip, back to how it was."""

from __future__ import annotations

from cellferry.errors import WrongState
from cellferry.migration.cleanup import require_released
from cellferry.migration.context import Context, attempt
from cellferry.migration.result import StepResult, plain
from cellferry.model import BEFORE_FLIP, Side, State
from cellferry.phases import Phase, reach


def abort(context: Context, migration_id: int, reason: str) -> StepResult:
    """Give a migration up: the topology first, then the source thaws, then the copy goes.

    Guarantees that the source serves and loses nothing. Deletes the destination's copy and every
    resource of the migration. May be repeated; a killed abort is finished by the next.

    Raises:
        WrongState: the route has been flipped; only a roll-back brings it back now.
    """
    migration = context.topology.migration(migration_id)
    if migration.state is State.ABORTED and not context.topology.live_resources(migration_id):
        return StepResult(
            "abort",
            migration_id,
            migration.organization.slug,
            migration.state,
            "aborted before",
            repeated=True,
        )
    if migration.state not in BEFORE_FLIP | {State.ABORTED}:
        raise WrongState(
            f"migration {migration_id} is {migration.state}: the route points at "
            f"{migration.destination} and aborting would lose its writes",
            organization=migration.organization.slug,
            step="abort",
            hint=f"to bring it back: cellferry roll-back {migration.organization.slug}",
        )
    allowed = BEFORE_FLIP | {State.ABORTED}
    with attempt(context, migration_id, "abort", allowed, stoppable=False) as at:
        if at.migration.state is not State.ABORTED:
            at.transition(State.ABORTED, reason=reason)
        reach(Phase.ABORTED)
        for store in at.stores.values():
            store.thaw()
            store.release()
        cleaned = {}
        for kind, store in at.stores.items():
            store.close_capture()
            cleaned[kind] = plain(store.cleanup(Side.DESTINATION))
        at.record({"cleaned": cleaned})
        require_released(at)
        return StepResult(
            "abort",
            migration_id,
            at.move.organization.slug,
            at.migration.state,
            f"the organization stays at {migration.source}; its copy at "
            f"{migration.destination} is gone",
            cleaned,
        )
