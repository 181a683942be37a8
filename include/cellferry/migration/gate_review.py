"""What each gate in a cell should say, by the topology: the route and the migrations.

Pure decisions; `reap` acts on them. A gate is read before the topology is asked, so that what the
topology says is never older than the gate: a state of a migration in which nothing is frozen means
that whoever froze this gate is past giving up, and a gate that knows a higher epoch than the route
means that the topology was put back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum

from cellferry.model import GateState, Leftover, Route, Side, State, Strategy
from cellferry.topology.reaping import CAPTURED, Known

#: States after the flip in which the old cell's copy is there and gated.
_LEFT_SOURCE = frozenset({State.SOAKING, State.RETAINED, State.ROLLING_BACK, State.CLEANING})
#: States in which the barrier itself may have the gate frozen.
_IN_BARRIER = frozenset({State.CUTTING_OVER, State.ROLLING_BACK})


class Task(StrEnum):
    """What is to be done about a gate."""

    KEEP = "keep"
    REMOVE = "remove"
    THAW = "thaw"
    """By its migration: it died between giving up and thawing."""
    HAND_OVER = "hand over"
    """By its migration: after the flip, both gates."""
    RESTORE = "restore"
    """By its migration: the cell lost the `moved` that it had been told."""
    TURN_AWAY = "turn away"
    """As `restore`, where no migration is left to say so."""
    OBEY = "obey"
    ABORT = "abort"
    REPORT = "report"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do about one gate, and why; for a report also what a person can do."""

    task: Task
    known: Known | None = None
    reason: str = ""
    remedy: str = ""


KEEP = Verdict(Task.KEEP)


def judge(cell: str, gate: Leftover, route: Route | None, known: Known | None) -> Verdict:
    """Say what to do about a gate that was found.

    Args:
        cell: where.
        gate: as it was found, before the topology was asked.
        route: of its organization.
        known: the migration that the gate names.
    """
    if (
        route is None
        or known is None
        or known.organization != gate.organization
        or cell not in (known.source, known.destination)
    ):
        return _unknown(cell, gate, route)
    if gate.epoch is not None and gate.epoch > route.epoch:
        return Verdict(
            Task.REPORT,
            known,
            f"the gate knows epoch {gate.epoch}, and the route says {route.cell} at epoch"
            f" {route.epoch}: the topology was put back to an older state",
            "stop moves; bring the topology's newest state back, or correct the route by hand"
            " after comparing both cells",
        )
    here = route.cell == cell
    verdict = {
        GateState.OPEN: _judge_open,
        GateState.FROZEN: _judge_frozen,
        GateState.IMPORTING: _judge_importing,
        GateState.MOVED: _judge_moved,
    }[gate.state or GateState.OPEN](cell, gate, route, known, here)
    # A barrier looks itself whether its freeze holds; whoever is late here would hide it.
    if verdict.task is Task.KEEP and not gate.obeyed and known.state not in _IN_BARRIER:
        if gate.state is GateState.OPEN:
            # A restart may have lost the last second, with the frozen marker: only who holds the
            # lease may open here.
            reason = "the gate is open, and the application's user is closed to writers"
            return Verdict(Task.THAW, known, reason)
        if gate.state is not GateState.FROZEN:
            reason = f"the gate is {gate.state}, and the application's user is open to writers"
            return Verdict(Task.OBEY, known, reason)
    return verdict


def _unknown(cell: str, gate: Leftover, route: Route | None) -> Verdict:
    lives = f"it lives in {route.cell}" if route else "the topology does not know it either"
    return Verdict(
        Task.REPORT,
        None,
        f"the gate of organization {gate.organization} in {cell} is {gate.state} by migration"
        f" {gate.migration}, which the topology does not know; {lives}",
        "if the topology was restored from a backup, bring its newest state back; if this cell"
        " belonged to another topology, remove the gate by hand once you know who has authority",
    )


def _judge_open(_cell: str, gate: Leftover, route: Route, known: Known, here: bool) -> Verdict:
    if here:
        if known.owns:
            return KEEP
        return Verdict(Task.REMOVE, known, f"migration {known.id} is {known.state}")
    if gate.epoch == route.epoch:
        return Verdict(
            Task.REPORT,
            known,
            f"the gate is open at epoch {gate.epoch}, at which {route.cell} has authority",
            "stop the writers of this organization in one of the two cells; compare the copies",
        )
    reason = (
        f"the gate is open at epoch {gate.epoch}, and {route.cell} has authority since epoch"
        f" {route.epoch}: a failover or a restart lost what it had been told"
    )
    return Verdict(Task.TURN_AWAY, known, reason)


def _judge_frozen(cell: str, gate: Leftover, route: Route, known: Known, here: bool) -> Verdict:
    if known.state in _IN_BARRIER:
        return KEEP  # the lease says whether somebody is at it
    if here:
        if known.owns:
            return Verdict(
                Task.THAW,
                known,
                f"migration {known.id} is {known.state} and left {cell} frozen",
            )
        if gate.epoch == route.epoch:
            return Verdict(
                Task.REMOVE,
                known,
                f"migration {known.id} is {known.state}, and {cell} has authority",
            )
        return _unexplained(cell, gate, route, known)
    if known.owns and known.state is not State.ABORTED:
        if _was_told(known):
            return KEEP  # `judge_absence` says what to do
        return Verdict(
            Task.HAND_OVER,
            known,
            f"the route went to {route.cell} and the gate in {cell} is still frozen",
        )
    return Verdict(
        Task.TURN_AWAY,
        known,
        f"migration {known.id} is {known.state}, and {route.cell} has authority",
    )


def _judge_importing(cell: str, gate: Leftover, route: Route, known: Known, here: bool) -> Verdict:
    if here:
        # In a later state the old copy is being deleted, and cannot make good what was lost.
        if known.state in {State.SOAKING, State.RETAINED} and cell == known.destination:
            return Verdict(
                Task.HAND_OVER,
                known,
                f"{cell} has authority since epoch {route.epoch} and its gate was not opened",
            )
        return _unexplained(cell, gate, route, known)
    if known.state.is_before_flip:
        return KEEP
    if known.state is State.ABORTED:
        return Verdict(Task.ABORT, known, "aborted, and its copy is still there")
    return _unexplained(cell, gate, route, known)


def _judge_moved(cell: str, gate: Leftover, route: Route, known: Known, here: bool) -> Verdict:
    if here:
        if known.state is State.ROLLED_BACK and cell == known.source and not _was_told(known):
            return Verdict(
                Task.HAND_OVER,
                known,
                f"{cell} has authority again since epoch {route.epoch} and was not opened",
            )
        return _unexplained(cell, gate, route, known)
    if known.owns:
        return KEEP
    return Verdict(
        Task.REPORT,
        known,
        f"the gate says moved to {gate.moved_to}, and migration {known.id}, which made it, is"
        f" {known.state}: the copy behind it belongs to nobody",
        f"look whether rows of the organization are in {cell}; delete them, then the gate, before"
        " the organization is to come back there",
    )


def _unexplained(cell: str, gate: Leftover, route: Route, known: Known) -> Verdict:
    return Verdict(
        Task.REPORT,
        known,
        f"the gate in {cell} is {gate.state} at epoch {gate.epoch} by migration {known.id}, which"
        f" is {known.state}; the route says {route.cell} at epoch {route.epoch}",
        "no crash of cellferry leaves this: a server was put back to an older state. Compare both"
        " cells before anything is opened",
    )


def _was_told(known: Known) -> bool:
    """Whether both cells were told of the last flip."""
    return known.handed_back if known.state is State.ROLLED_BACK else known.handed_over


@dataclass(frozen=True, slots=True)
class Expected:
    """A gate that must be in a cell: `moved`, by a migration that took its organization away.

    Attributes:
        waits: whether a clean-up may be removing it just now.
    """

    known: Known
    cell: str
    waits: bool


def expected_moved(known: Known) -> Expected | None:
    """Return the gate that a migration must have where its organization left a copy."""
    waits = known.state in {State.CLEANING, State.ROLLED_BACK}
    if known.state in _LEFT_SOURCE:
        left = known.source
    elif known.state is State.ROLLED_BACK:
        left = known.destination
    else:
        return None
    is_held = any(one.cell == left and one.kind == "gate" for one in known.resources)
    return Expected(known, left, waits) if is_held else None


def judge_absence(
    expected: Expected, store: str, gate: Leftover | None, route: Route | None
) -> Verdict:
    """Say what to do where a copy that was left behind has no gate, or an older, open one."""
    known, cell = expected.known, expected.cell
    if route is None or route.cell == cell:
        return KEEP
    if not any((one.cell, one.store, one.kind) == (cell, store, "gate") for one in known.resources):
        return KEEP  # this store is clean already
    if gate is None:
        reason = f"{cell} has no gate any more, and {route.cell} has authority"
    elif gate.state is GateState.OPEN and (gate.epoch or 0) < route.epoch:
        reason = f"the gate in {cell} is open at epoch {gate.epoch}, and {route.cell} has authority"
    elif (
        gate.state is GateState.FROZEN and gate.migration == known.id and _was_told(known)
    ):  # closed all the same, but writers shall learn where to go
        reason = f"the gate in {cell} is frozen, and {route.cell} has authority"
    else:
        return KEEP
    return Verdict(
        Task.RESTORE,
        known,
        f"{reason} since epoch {route.epoch}: a failover or a restart lost what it had been told",
    )


def lost_captures(known: Known, kinds: Collection[str]) -> Iterator[tuple[Side, str]]:
    """Yield the sides and stores where a migration must have a gate while it captures."""
    if known.state not in CAPTURED or known.strategy is not Strategy.ONLINE or known.capture_lost:
        return
    for kind in kinds:
        yield Side.DESTINATION, kind
        if kind == "postgres":  # the others follow a feed of their own, and compare when it broke
            yield Side.SOURCE, kind


def is_capturing(known: Known, side: Side, gate: Leftover | None) -> bool:
    """Whether the gate on one side is as a migration that captures has it."""
    if gate is None or gate.migration != known.id:
        return False
    if side is Side.DESTINATION:
        return gate.state is GateState.IMPORTING
    return gate.armed
