"""The cleanup step: the old copy goes, and everything this migration made."""

from __future__ import annotations

import contextlib

from cellferry.errors import LeaseLost, WrongState
from cellferry.migration.context import Attempt, Context, attempt
from cellferry.migration.result import StepResult, plain
from cellferry.model import Side, State
from cellferry.phases import Phase, reach

ALLOWED = frozenset({State.RETAINED, State.CLEANING})
AFTER_ROLL_BACK = frozenset({State.ROLLED_BACK})


def cleanup(context: Context, migration_id: int) -> StepResult:
    """Delete the copy that the organization left, after the TTL, and release every resource.

    That is the old cell's; after a roll-back it is the new cell's. In paced batches. Guarantees
    that only this organization's rows and keys there are deleted, and only while that cell's gate
    says that this very migration moved them away (hazard 4). May be repeated.

    Raises:
        WrongState: the TTL has not passed on the topology's clock, or the organization returned.
    """
    migration = context.topology.migration(migration_id)
    rolled_back = migration.state is State.ROLLED_BACK
    if migration.state is State.COMPLETED or (
        rolled_back and not context.topology.live_resources(migration_id)
    ):
        return StepResult(
            "cleanup",
            migration_id,
            migration.organization.slug,
            migration.state,
            "cleaned before",
            migration.facts.get("cleaned", {}),
            repeated=True,
        )
    if rolled_back and not migration.facts.get("handed_back"):
        raise WrongState(
            f"migration {migration_id} is rolled back, but {migration.source} was not opened yet",
            organization=migration.organization.slug,
            step="cleanup",
            hint=f"cellferry roll-back {migration.organization.slug}, which finishes that",
        )
    context.topology.may_clean(migration_id)
    # Which copy goes is decided here, and holds only while the migration is on the same side of a
    # roll-back: one that ends meanwhile must not find its own copy deleted.
    allowed = AFTER_ROLL_BACK if rolled_back else ALLOWED
    with attempt(
        context, migration_id, "cleanup", allowed, returning=rolled_back, paced=True
    ) as at:
        context.topology.may_clean(migration_id)
        if not rolled_back:
            _serve_on(at)
        if at.migration.state is State.RETAINED:
            at.transition(State.CLEANING)
        reach(Phase.CLEANUP_BEGUN)
        cleaned = {}
        for kind, store in at.stores.items():
            cleaned[kind] = plain(store.cleanup(Side.SOURCE))
            store.close_capture()
            reach(Phase.CLEANUP_ONE)
        require_released(at)
        reach(Phase.CLEANUP_ALL)
        facts = {"cleaned": cleaned, **at.pace_facts("cleanup")}
        if rolled_back:
            at.record(facts)
        else:
            at.transition(State.COMPLETED, facts)
        return StepResult(
            "cleanup",
            migration_id,
            at.move.organization.slug,
            at.migration.state,
            "deleted "
            + " and ".join(f"{one['deleted']:,} in {kind}" for kind, one in cleaned.items()),
            cleaned,
        )


def _serve_on(at: Attempt) -> None:
    """Open the new cell if a roll-back that gave up left it frozen: nothing flips back any more."""
    turned = at.move.turned()
    resources = at.context.topology.resources(at.migration.id, at.move.attempt)
    for store in at.context.stores.values():
        # Refused where gate or lease are a newer migration's, which looks after them. (An attempt
        # that was really taken over gets no further than its first batch.)
        with (
            store.open(turned, resources, at.progress) as opened,
            contextlib.suppress(WrongState, LeaseLost),
        ):
            opened.thaw()


def require_released(at: Attempt) -> None:
    """Check that nothing which this migration made is left (invariant 9).

    What a restart of its server took away, or an attempt that died meant to make and did not, is
    forgotten: its store is asked.

    Raises:
        WrongState: something is; it is named.
    """
    left = []
    resources = at.context.topology.resources(at.migration.id)
    for one in at.context.topology.live_resources(at.migration.id):
        store = at.stores.get(one.store)
        if store is not None and store.is_gone(one):
            resources.forget(one)
        else:
            left.append(one)
    if left:
        raise WrongState(
            "left behind: "
            + ", ".join(f"{one.kind} {one.name} in {one.cell}/{one.store}" for one in left),
            hint="run the step again; `cellferry status` lists what is left",
        )
