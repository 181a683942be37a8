"""The reaper and finisher: what controllers that died left in the middle is finished or undone.

It needs no Airflow: the DAG `reap_cells`, `cellferry reap` and the local fleet's supervisor call
it, as often as they like. Each run does, in this order:

1. gates that a failover or a restart lost or put back are made to say what the topology says;
2. an organization that a dead controller left frozen is served again: thawed before the flip,
   handed over after it;
3. aborts that died are finished, for a bounded time in each run;
4. what no migration owns is removed from the cells, and what is gone is forgotten.

Nothing else is driven forward: a copy waits for its retry. A migration is taken over only when its
holder was silent, and everything in a cell is a compare-and-set on what was found, so that running
migrations are not disturbed. What nobody can decide but a person is reported and left alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from cellferry.errors import CellferryError, LeaseLost, TransientError, Unreachable, WrongState
from cellferry.migration import history
from cellferry.migration.abort import abort
from cellferry.migration.barrier import hand_over
from cellferry.migration.context import Context, StepProgress, attempt
from cellferry.migration.gate_review import (
    Task,
    Verdict,
    expected_moved,
    is_capturing,
    judge,
    judge_absence,
    lost_captures,
)
from cellferry.migration.halts import watch
from cellferry.migration.result import plain
from cellferry.model import (
    Cell,
    GateState,
    Landmark,
    Leftover,
    Migration,
    Move,
    Resource,
    Side,
    State,
)
from cellferry.stores.base import Store
from cellferry.topology.migrations import FLIPS
from cellferry.topology.reaping import Known, Standings

log = logging.getLogger(__name__)

#: A holder that was silent for so many seconds is taken for dead, unless the caller says else.
EXPIRED_AFTER_S = 15.0
#: An abort says less often that it lives: each batch, and a batch may be long.
ABORT_PATIENCE = 4
#: How long one run goes on with aborts, in seconds; the next one goes on from there.
ABORTS_FOR_S = 30.0
#: How long a second reaper waits for the first, in seconds.
WAIT_FOR_OTHER_S = 2.0

#: What else a registered resource may be found as.
_FOUND_AS = {"key_log": ("key_log", "gate"), "checkpoint": ("checkpoint", "imported_row")}

#: States after a flip whose hand-over may be outstanding.
_AFTER_FLIP = frozenset({State.SOAKING, State.RETAINED, State.ROLLED_BACK})
#: States in which a roll-back that gave up may have left the new cell frozen; none flips back.
_SERVES_ON = frozenset({State.SOAKING, State.RETAINED, State.CLEANING})
_GIVEN_UP = {State.CUTTING_OVER: State.READY, State.ROLLING_BACK: State.RETAINED}


@dataclass(frozen=True, slots=True)
class Deed:
    """Something that the reaper did, would do, could not do, or leaves to a person.

    Attributes:
        verb: `thawed`, `handed over`, `abort finished`, `gated again`, `enforced`,
            `marked capture lost`, `removed`, `forgotten`.
    """

    verb: str
    cell: str = ""
    store: str = ""
    what: str = ""
    organization: str | None = None
    migration: int | None = None
    reason: str = ""
    remedy: str = ""


@dataclass
class Reaped:
    """What one run did.

    Attributes:
        busy: another reaper is at work, so this one did nothing.
        dry_run: `deeds` says what would be done; nothing was changed.
        deeds: what was done.
        attention: what only a person can decide.
        failed: what could not be done, or which cell did not answer; the next run tries again.
        watched: what the look at budgets and error rates found.
    """

    dry_run: bool = False
    busy: bool = False
    deeds: list[Deed] = field(default_factory=list)
    attention: list[Deed] = field(default_factory=list)
    failed: list[Deed] = field(default_factory=list)
    watched: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """75 when a part could not be done, 1 when a person must act, else 0."""
        return 75 if self.failed else 1 if self.attention else 0

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        result: dict[str, Any] = plain(self)
        return result


def reap(
    context: Context, *, expired_after_s: float = EXPIRED_AFTER_S, dry_run: bool = False
) -> Reaped:
    """Finish or undo what dead controllers left, and remove what nobody owns. May be repeated.

    Args:
        context: the topology, the stores, who asks.
        expired_after_s: how long a holder must have been silent. A living one that is only slow
            is taken over as well; that is safe, and it ends with `LeaseLost`.
        dry_run: change nothing; say what would be done.

    Raises:
        Unreachable: the topology does not answer. Without it nothing is decided.
    """
    with context.topology.only_reaper(WAIT_FOR_OTHER_S) as alone:
        if not alone:
            return Reaped(dry_run=dry_run, busy=True)
        return _Run(context, expired_after_s, Reaped(dry_run=dry_run)).run()


Survey = Mapping[tuple[str, str], tuple[Leftover, ...]]


class _Run:
    """One run: surveys, verdicts, deeds."""

    def __init__(self, context: Context, expired_after_s: float, reaped: Reaped) -> None:
        self._context = context
        self._topology = context.topology
        self._expired_s = expired_after_s
        self._reaped = reaped
        self._holder = f"{socket.gethostname()}:{os.getpid()}:reap"
        self._cells: dict[str, Cell] = {}
        self._dead: set[tuple[str, str]] = set()
        self._taken: dict[int, int] = {}

    def run(self) -> Reaped:
        self._find_cells()
        survey = self._survey()
        standings = self._standings(survey)
        restored = self._restore(survey, standings)
        self._enforce(survey, standings, restored)
        self._mark_lost(survey, standings)
        self._serve(survey, standings)
        self._forget_users(survey, standings)
        self._finish_aborts(survey, standings)
        if not self._reaped.dry_run:
            survey = self._survey()
            standings = self._standings(survey)
        self._remove(survey, standings)
        self._forget(survey, standings)
        if not self._reaped.dry_run:
            try:
                self._reaped.watched = plain(watch(self._context))
            except CellferryError as error:
                self._fail(Deed("watched"), error)
        return self._reaped

    # ── looking ─────────────────────────────────────────────────────────────────────────────────

    def _find_cells(self) -> None:
        for name in self._context.settings.cells:
            try:
                self._cells[name] = self._context.settings.cell(name, self._context.connections)
            except CellferryError as error:
                self._fail(Deed("looked at", name), error)

    def _survey(self) -> Survey:
        """Ask every store of every cell at once; one that does not answer is left out."""
        wanted = [
            (name, kind)
            for name in self._cells
            for kind in self._context.stores
            if (name, kind) not in self._dead
        ]
        found: dict[tuple[str, str], tuple[Leftover, ...]] = {}
        with ThreadPoolExecutor(max(1, len(wanted))) as pool:
            asked = {
                (name, kind): pool.submit(self._store(kind).leftovers, self._cells[name])
                for name, kind in wanted
            }
            for (name, kind), answer in asked.items():
                try:
                    found[name, kind] = answer.result()
                except CellferryError as error:
                    self._dead.add((name, kind))
                    self._fail(Deed("looked at", name, kind), error)
        return found

    def _standings(self, survey: Survey) -> Standings:
        """Ask the topology, after the cells, so that it is never older than what was found."""
        found = [one for leftovers in survey.values() for one in leftovers]
        return self._topology.standings(
            {one.migration for one in found if one.migration is not None},
            {one.organization for one in found if one.organization is not None},
        )

    def _store(self, kind: str) -> Store:
        return self._context.stores[kind]

    def _gates(
        self, survey: Survey, standings: Standings
    ) -> Iterator[tuple[str, Leftover, Verdict]]:
        for (cell, _), leftovers in survey.items():
            for one in leftovers:
                if one.kind == "gate":
                    route = standings.routes.get(one.organization or "")
                    known = standings.migrations.get(one.migration or 0)
                    yield cell, one, judge(cell, one, route, known)

    # ── 1: what a failover lost ─────────────────────────────────────────────────────────────────

    def _restore(self, survey: Survey, standings: Standings) -> set[tuple[str, str, str]]:
        """Gate again the copies that were left behind; return cell, store, organization."""
        restored: set[tuple[str, str, str]] = set()
        for known in standings.migrations.values():
            expected = expected_moved(known)
            if expected is None:
                continue
            for kind in self._context.stores:
                if (expected.cell, kind) not in survey:
                    continue
                verdict = self._absence(survey, standings, known, kind)
                if verdict.task is not Task.RESTORE:
                    continue
                restored.add((expected.cell, kind, known.organization))
                if expected.waits and known.silent_s < self._expired_s:
                    continue  # a clean-up is at work there
                deed = _deed("gated again", expected.cell, kind, "gate", known, verdict.reason)
                silent_s = self._expired_s if expected.waits else 0.0
                self._do(deed, partial(self._restore_one, known, kind, silent_s))
        return restored

    def _absence(self, survey: Survey, standings: Standings, known: Known, kind: str) -> Verdict:
        expected = expected_moved(known)
        if expected is None:
            return Verdict(Task.KEEP)
        gate = _gate_of(survey.get((expected.cell, kind), ()), known.organization)
        return judge_absence(expected, kind, gate, standings.routes.get(known.organization))

    def _restore_one(self, known: Known, kind: str, silent_s: float) -> bool:
        if not self._is_lost(known, kind):
            return False
        # A copy in two cells is worse than an attempt that must begin again: no silence is
        # awaited where nothing but a failover explains what was found.
        migration, number = self._take_over(known, silent_s)
        if migration.state is not known.state:
            return False
        move = self._context.move(migration, number, returning=known.state is State.ROLLED_BACK)
        return self._reconcile(kind, move, Side.SOURCE, GateState.MOVED)

    def _is_lost(self, known: Known, kind: str) -> bool:
        """Whether a gate is missing, or old, and not only seen so because things move on.

        It is looked at between two looks at the topology that agree: in a state after the flip it
        was frozen before, and until clean-up begins nobody removes it.
        """
        expected = expected_moved(known)
        if expected is None:
            return False
        leftovers = self._store(kind).leftovers(self._cells[expected.cell])
        now = self._topology.standing(known.id)
        if now is None or now.state is not known.state:
            return False
        verdict = judge_absence(
            expected,
            kind,
            _gate_of(leftovers, known.organization),
            self._topology.route(known.organization),
        )
        return verdict.task is Task.RESTORE

    def _enforce(
        self, survey: Survey, standings: Standings, restored: set[tuple[str, str, str]]
    ) -> None:
        """Close gates that nobody owns any more and that should not be open; and users."""
        for cell, gate, verdict in self._gates(survey, standings):
            if (cell, gate.store, gate.organization) in restored:
                continue
            if verdict.task is Task.TURN_AWAY:
                deed = _deed_of("gated again", cell, gate, verdict.reason)
                if self._do(deed, partial(self._turn_away, cell, gate)):
                    remedy = (
                        f"no migration owns the organization's copy in {cell}: compare it with the"
                        " cell that has authority, then delete it"
                    )
                    self._reaped.attention.append(
                        replace(deed, verb="to be looked at", remedy=remedy)
                    )
            elif verdict.task is Task.OBEY:
                deed = _deed_of("enforced", cell, gate, verdict.reason)
                self._do(deed, partial(self._store(gate.store).obey, self._cells[cell], gate))

    def _turn_away(self, cell: str, gate: Leftover) -> bool:
        route = self._topology.route(gate.organization or "")
        known = self._topology.standing(gate.migration or 0)
        if judge(cell, gate, route, known).task is not Task.TURN_AWAY:
            return False
        return self._store(gate.store).turn_away(self._cells[cell], gate, route)

    def _mark_lost(self, survey: Survey, standings: Standings) -> None:
        """Mark migrations whose capture or import gate is gone: changes may have gone by."""
        for known in standings.migrations.values():
            for side, kind in lost_captures(known, self._context.stores):
                cell = known.source if side is Side.SOURCE else known.destination
                if (cell, kind) not in survey or is_capturing(
                    known, side, _gate_of(survey[cell, kind], known.organization)
                ):
                    continue
                reason = f"{cell}/{kind} lost the gate of a migration that is {known.state}"
                deed = _deed("marked capture lost", cell, kind, "gate", known, reason)
                if self._do(
                    deed,
                    partial(self._mark_one, known, side, cell, kind, reason),
                ):
                    self._reaped.attention.append(
                        replace(
                            deed,
                            verb="to be looked at",
                            remedy="run sync again: it captures anew, compares and repairs; or"
                            " abort",
                        )
                    )
                    break

    def _mark_one(self, known: Known, side: Side, cell: str, kind: str, reason: str) -> bool:
        # The gate is made before the state and removed after it: asked in between, it is there.
        gate = _gate_of(self._store(kind).leftovers(self._cells[cell]), known.organization)
        if is_capturing(known, side, gate):
            return False
        now = self._topology.standing(known.id)
        if now is None or (now.state, now.capture_lost) != (known.state, False):
            return False
        return self._topology.mark_capture_lost(known.id, reason, self._context.actor)

    # ── 2: organizations that nobody serves ─────────────────────────────────────────────────────

    def _serve(self, survey: Survey, standings: Standings) -> None:
        """Thaw before the flip, hand over after it, where the holder is silent."""
        wanted: dict[int, tuple[Task, Known, str]] = {}
        for known in standings.migrations.values():
            if known.state in _GIVEN_UP:
                reason = f"{known.state}, and nobody was heard of for {known.silent_s:.0f} s"
                wanted[known.id] = (Task.THAW, known, reason)
            elif (known.state is State.SOAKING and not known.handed_over) or (
                known.state is State.ROLLED_BACK and known.resources and not known.handed_back
            ):
                reason = "the route was flipped, and nobody handed over"
                wanted[known.id] = (Task.HAND_OVER, known, reason)
        for _, _, verdict in self._gates(survey, standings):
            if verdict.known is not None and verdict.task in (Task.THAW, Task.HAND_OVER):
                found = (verdict.task, verdict.known, verdict.reason)
                wanted.setdefault(verdict.known.id, found)
        for task, known, reason in wanted.values():
            if known.silent_s < self._expired_s:
                continue
            if task is Task.THAW:
                deed = _deed("thawed", "", "", "migration", known, reason)
                self._do(deed, partial(self._thaw, known))
            else:
                deed = _deed("handed over", "", "", "migration", known, reason)
                self._do(deed, partial(self._finish_hand_over, known))

    def _thaw(self, known: Known) -> bool:
        """Make a flip impossible in the topology, then let the cell that has authority serve."""
        migration, number = self._take_over(known, self._expired_s)
        if (known.state, migration.state) in FLIPS:
            return self._hand_over(migration)  # it flipped after it was looked at
        if migration.state in _GIVEN_UP:
            migration = self._topology.transition(
                known.id,
                number,
                migration.state,
                _GIVEN_UP[migration.state],
                self._context.actor,
                reason=f"its {_step_of(migration.state)} died before the flip",
            )
            self._topology.set_error(
                known.id,
                f"the {_step_of(known.state)} died before the flip; the organization is served"
                " again where it was. Run it again",
                attempt=number,
            )
        if not (
            migration.state.is_before_flip
            or migration.state is State.ABORTED
            or migration.state in _SERVES_ON
        ):
            return False
        move = self._context.move(migration, number, returning=migration.state in _SERVES_ON)
        self._everywhere(
            lambda kind: self._reconcile(kind, move, Side.SOURCE, GateState.OPEN),
        )
        return True

    def _finish_hand_over(self, known: Known) -> bool:
        migration, _ = self._take_over(known, self._expired_s)
        return migration.state in _AFTER_FLIP and self._hand_over(migration)

    def _hand_over(self, migration: Migration) -> bool:
        """Tell both cells about a flip, and bring a destination that lost commits up to date."""
        back = migration.state is State.ROLLED_BACK
        fact = {"handed_back" if back else "handed_over": True}
        allowed = frozenset({migration.state})
        try:
            with attempt(
                self._context,
                migration.id,
                "reap",
                allowed,
                stoppable=False,
                returning=back,
                taken=partial(self._taken.__setitem__, migration.id),
            ) as at:
                history.restore(at)
                hand_over(at)
                at.record(fact)
        except Unreachable as error:
            now = self._topology.standing(migration.id)
            if now is None or now.attempt != self._taken.get(migration.id):
                raise  # another controller is at it
            self._open_alone(replace(migration, attempt=now.attempt), now.attempt, error)
            raise
        return True

    def _open_alone(self, migration: Migration, number: int, error: Unreachable) -> None:
        """Open the cell that has authority although the one that was left does not answer.

        That one is frozen durably; when it is back it is told. A destination that may have lost
        commits stays closed: only the other cell has them.
        """
        back = migration.state is State.ROLLED_BACK
        move = self._context.move(migration, number, returning=back)
        for kind in self._context.stores:
            with contextlib.suppress(Unreachable):
                self._reconcile(kind, move, Side.SOURCE, GateState.MOVED)
        marks = migration.facts.get(history.LANDMARKS) or {}
        _, finished = history.finished_of(migration, back=back)
        resources = self._topology.resources(migration.id)
        progress = StepProgress(self._context, migration.organization.slug, 0, 0)
        for kind, store in self._context.stores.items():
            earlier = marks.get(kind, {}).get(move.destination.name)
            with store.open(move, resources, progress) as opened:
                now = opened.landmark(Side.DESTINATION)
                evidence = history.evidence_of(finished, kind)
                restarted = opened.has_restarted(evidence) and not opened.was_opened()
            lost = now.break_since(Landmark(**earlier)) if now and earlier else None
            if restarted:
                lost = lost or "it was restarted since the last changes were applied there"
            if lost is not None:
                error.hint = (
                    f"{move.destination.name}/{kind} may have lost commits ({lost}), and only"
                    f" {move.source.name} has them: bring it back"
                )
                return
        for kind in self._context.stores:
            self._reconcile(kind, move, Side.DESTINATION, GateState.OPEN)

    def _take_over(self, known: Known, silent_s: float) -> tuple[Migration, int]:
        number = self._topology.take_over_silent(
            known.id, self._holder, self._context.actor, silent_s
        )
        self._taken[known.id] = number
        return self._topology.migration(known.id), number

    def _everywhere(self, act: Callable[[str], object]) -> None:
        """Act at every store; then raise the first error."""
        errors: list[CellferryError] = []
        for kind in self._context.stores:
            try:
                act(kind)
            except CellferryError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _reconcile(self, kind: str, move: Move, side: Side, wanted: GateState) -> bool:
        resources = self._topology.resources(move.migration)
        return self._store(kind).reconcile(move, side, wanted, resources)

    # ── 3: aborts ───────────────────────────────────────────────────────────────────────────────

    def _finish_aborts(self, survey: Survey, standings: Standings) -> None:
        """Finish aborts that died, for a bounded time: nobody waits for them."""
        wanted = {
            known.id: known
            for known in standings.migrations.values()
            if known.state is State.ABORTED and known.resources
        }
        for _, _, verdict in self._gates(survey, standings):
            if verdict.task is Task.ABORT and verdict.known is not None:
                wanted[verdict.known.id] = verdict.known
        until = time.monotonic() + ABORTS_FOR_S
        for known in wanted.values():
            if known.silent_s < ABORT_PATIENCE * self._expired_s or time.monotonic() > until:
                continue
            deed = _deed("abort finished", "", "", "migration", known, "aborted, not cleaned up")
            self._do(deed, partial(self._finish_abort, known, until))

    def _finish_abort(self, known: Known, until: float) -> bool:
        # Asked anew. A thaw above was a sign of life as well, but it was ours.
        now = self._topology.standing(known.id)
        if now is None or now.attempt != self._taken.get(known.id, known.attempt):
            return False
        try:
            abort(replace(self._context, until=until), known.id, "finished by the reaper")
        except TransientError:
            if time.monotonic() > until:
                return False  # the next run goes on
            raise
        return True

    # ── 4: what nobody owns ─────────────────────────────────────────────────────────────────────

    def _remove(self, survey: Survey, standings: Standings) -> None:
        # Gates first: what a gate closed is open again before anything else goes.
        for cell, gate, verdict in self._gates(survey, standings):
            deed = _deed_of("removed", cell, gate, verdict.reason)
            if verdict.task is Task.REMOVE:
                self._do(deed, partial(self._remove_gate, cell, gate))
            elif verdict.task is Task.REPORT and self._is_still_so(cell, gate):
                self._reaped.attention.append(
                    replace(deed, verb="to be looked at", remedy=verdict.remedy)
                )
        for (cell, _), leftovers in survey.items():
            # What a lease tells the owner of goes before the lease.
            for one in sorted(leftovers, key=lambda one: one.kind == "lease"):
                if one.kind == "closed_user":
                    self._judge_closed_user(cell, one, standings)
                elif one.kind != "gate":
                    self._remove_other(cell, one, standings)

    def _is_still_so(self, cell: str, gate: Leftover) -> bool:
        """Whether a gate that nothing explains is still there, and not only on its way."""
        try:
            if gate not in self._store(gate.store).leftovers(self._cells[cell]):
                return False
        except CellferryError as error:
            self._fail(_deed_of("looked at", cell, gate, ""), error)
            return False
        standings = self._topology.standings([gate.migration or 0], [gate.organization or ""])
        route = standings.routes.get(gate.organization or "")
        known = standings.migrations.get(gate.migration or 0)
        return judge(cell, gate, route, known).task is Task.REPORT

    def _remove_gate(self, cell: str, gate: Leftover) -> bool:
        route = self._topology.route(gate.organization or "")
        known = self._topology.standing(gate.migration or 0)
        if judge(cell, gate, route, known).task is not Task.REMOVE:
            return False
        return self._store(gate.store).remove_leftover(self._cells[cell], gate)

    def _remove_other(self, cell: str, one: Leftover, standings: Standings) -> None:
        if one.migration is None:
            # A log without a gate, a checkpoint without a lease: no attempt can use it.
            reason = "there is no gate or lease any more that it belongs to"
            deed = _deed_of("removed", cell, one, reason)
            self._do(deed, partial(self._store(one.store).remove_leftover, self._cells[cell], one))
            return
        known = standings.migrations.get(one.migration)
        if (
            known is None
            or cell not in (known.source, known.destination)
            or one.organization not in (None, known.organization)
        ):
            deed = _deed_of(
                "to be looked at",
                cell,
                one,
                f"migration {one.migration} is unknown to the topology, or had nothing to do here",
            )
            remedy = (
                "if the topology was restored from a backup, bring its newest state back; else"
                " remove it by hand"
            )
            self._reaped.attention.append(replace(deed, remedy=remedy))
        elif not self._is_owned(known, one):
            reason = f"migration {known.id} is {known.state}"
            if known.owns:
                reason = f"of attempt {one.attempt}; the newest is {known.attempt}"
            self._do(
                _deed_of("removed", cell, one, reason),
                partial(self._remove_unowned, cell, one, known),
            )

    @staticmethod
    def _is_owned(known: Known, one: Leftover) -> bool:
        if one.kind == "acl_user" and (one.attempt or 0) < known.attempt:
            return False  # its password died with that attempt
        return known.owns

    def _remove_unowned(self, cell: str, one: Leftover, known: Known) -> bool:
        now = self._topology.standing(known.id)
        if now is None or self._is_owned(now, one):
            return False
        removed = self._store(one.store).remove_leftover(self._cells[cell], one)
        if removed and one.kind == "acl_user":
            resource = Resource(cell, one.store, one.kind, one.name)
            self._topology.resources(known.id).forget(resource)
        return removed

    def _judge_closed_user(self, cell: str, one: Leftover, standings: Standings) -> None:
        route = standings.routes.get(one.organization or "")
        if route is not None and route.cell == cell:
            deed = _deed_of(
                "to be looked at",
                cell,
                one,
                f"user {one.name} is closed as by a gate, there is no gate, and {cell} has"
                " authority: the organization cannot write",
            )
            remedy = "give the user the rules again that your application gives its users"
            self._reaped.attention.append(replace(deed, remedy=remedy))

    def _forget_users(self, survey: Survey, standings: Standings) -> None:
        """Forget users that are gone: a step that ends would wait for them for ever."""
        self._forget_gone(
            survey,
            standings,
            lambda known, one: one.kind == "acl_user" and known.silent_s >= self._expired_s,
        )

    def _forget(self, survey: Survey, standings: Standings) -> None:
        """Forget what ended migrations had and is not there any more."""
        self._forget_gone(
            survey,
            standings,
            lambda known, _: known.state in _ENDED and known.silent_s >= self._expired_s,
        )

    def _forget_gone(
        self,
        survey: Survey,
        standings: Standings,
        may_forget: Callable[[Known, Resource], bool],
    ) -> None:
        for known in standings.migrations.values():
            for one in sorted(known.resources, key=str):
                found = survey.get((one.cell, one.store))
                if found is None or not may_forget(known, one) or _is_there(known, one, found):
                    continue
                deed = _deed(
                    "forgotten", one.cell, one.store, f"{one.kind} {one.name}", known, "it is gone"
                )
                self._do(deed, partial(self._forget_one, known, one))

    def _forget_one(self, known: Known, resource: Resource) -> bool:
        self._topology.resources(known.id).forget(resource)
        return True

    # ── saying and noting ───────────────────────────────────────────────────────────────────────

    def _do(self, deed: Deed, act: Callable[[], bool]) -> bool:
        """Do it, or in a dry run say so; returns whether it was (or would be) done."""
        if self._reaped.dry_run:
            self._reaped.deeds.append(deed)
            return True
        try:
            if not act():
                return False  # somebody else did it meanwhile
        except (LeaseLost, WrongState) as error:
            # Somebody works on it after all; or the gate says what no crash explains.
            if isinstance(error, WrongState):
                self._fail(deed, error)
            log.info("%s: %s", deed.verb, error)
            return False
        except CellferryError as error:
            self._fail(deed, error)
            return False
        self._reaped.deeds.append(deed)
        self._topology.note_reaped(
            self._context.actor,
            deed.reason,
            migration=deed.migration,
            organization=deed.organization,
            evidence={
                "verb": deed.verb,
                "cell": deed.cell,
                "store": deed.store,
                "what": deed.what,
            },
        )
        return True

    def _fail(self, deed: Deed, error: CellferryError) -> None:
        self._reaped.failed.append(
            replace(deed, reason=f"{error.message}", remedy=error.hint or "")
        )


_ENDED = frozenset({State.COMPLETED, State.ABORTED, State.ROLLED_BACK})


def _step_of(state: State) -> str:
    return "roll-back" if state is State.ROLLING_BACK else "cutover"


def _gate_of(leftovers: Iterable[Leftover], organization: str) -> Leftover | None:
    for one in leftovers:
        if one.kind == "gate" and one.organization == organization:
            return one
    return None


def _is_there(known: Known, resource: Resource, found: Iterable[Leftover]) -> bool:
    kinds = _FOUND_AS.get(resource.kind, (resource.kind,))
    return any(
        one.kind in kinds and one.name == resource.name and one.migration in (None, known.id)
        for one in found
    )


def _deed(verb: str, cell: str, store: str, what: str, known: Known, reason: str) -> Deed:
    return Deed(verb, cell, store, what, known.organization, known.id, reason)


def _deed_of(verb: str, cell: str, one: Leftover, reason: str) -> Deed:
    what = f"{one.kind} {one.name}"
    return Deed(verb, cell, one.store, what, one.organization, one.migration, reason)
