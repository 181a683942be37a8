"""What is going on with an organization, in the words an operator needs at 3 am."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cellferry.migration.context import Context
from cellferry.migration.result import plain
from cellferry.model import LIVE_STATES, Migration, Organization, Resource, Route, State
from cellferry.topology import Halt
from cellferry.topology.pace import PaceRow

NEXT = {
    State.PLANNED: "copy starts; aborting costs nothing",
    State.COPYING: "the copy goes on from its checkpoints; abort deletes the partial copy",
    State.SYNCING: "rounds, then verification; abort deletes the copy",
    State.READY: "cutover; abort deletes the copy and the source serves on",
    State.CUTTING_OVER: "the cutover is under way or died: run it again, or abort to thaw",
    State.SOAKING: "the route points at the destination; run soak. Instead of abort there is now"
    " cellferry roll-back",
    State.RETAINED: "the old copy waits for the TTL, then cleanup deletes it; until then cellferry"
    " roll-back brings the organization back",
    State.CLEANING: "the old copy is being deleted; run cleanup again if it stopped",
    State.COMPLETED: "done",
    State.ABORTED: "given up; the organization stayed where it was",
    State.ROLLING_BACK: "the roll-back is under way or died: run it again; the new cell serves",
    State.ROLLED_BACK: "the organization is back in its old cell; after the TTL cleanup deletes the"
    " new cell's copy",
}


@dataclass(frozen=True, slots=True)
class Status:
    """An organization's route, its latest migration, and what comes next."""

    organization: Organization
    route: Route
    migration: Migration | None
    next: str
    progress: Sequence[Any]
    resources: Sequence[Resource]
    halts: Sequence[Halt] = ()
    paces: Sequence[PaceRow] = ()
    """How fast its movers may work, as each cell sees it, while they do."""

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        result: dict[str, Any] = plain(self)
        return result


def status(context: Context, organization: str) -> Status:
    """Return what the topology knows of `organization` (id or slug).

    Raises:
        InvalidInput: no such organization.
    """
    topology = context.topology
    found = topology.organization(organization)
    moves = topology.migrations(org=found.id)
    latest = moves[0] if moves else None
    return Status(
        organization=found,
        route=topology.route(found.id),
        migration=latest,
        next=NEXT[latest.state]
        if latest
        else f"it has never moved; cellferry plan {found.slug} --to CELL says what that would take",
        progress=topology.progress(latest.id) if latest else (),
        resources=topology.live_resources(latest.id) if latest else (),
        halts=topology.halts_on(latest.id) if latest else (),
        paces=topology.paces(latest.id) if latest else (),
    )


def unfinished(context: Context) -> list[Migration]:
    """Return the migrations that are not over, oldest first: something of them is in a cell."""
    ended = {State.ABORTED, State.ROLLED_BACK}
    states = LIVE_STATES | ended | {State.RETAINED, State.CLEANING}
    return [
        one
        for one in context.topology.migrations(states=states)[::-1]
        if one.state not in ended or context.topology.live_resources(one.id)
    ]
