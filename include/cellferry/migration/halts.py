"""When something is halted, and what looks for it.

A halt is sticky: cellferry sets it, and only a person clears it, with a reason. A running copy
stops at its next batch, nothing new starts, and a cutover past the beginning of its barrier ends
first. What sets one: a difference between the cells, failed migrations of one wave, a write pause
over its budget, a key log over its budget, and a rise of a cell's errors.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from cellferry.errors import (
    CellferryError,
    Halted,
    InvalidInput,
    LeaseLost,
    PermanentError,
    Stopped,
    VerificationFailed,
    WrongState,
)
from cellferry.migration.options import MoveOptions
from cellferry.migration.result import StepResult
from cellferry.model import LIVE_STATES, Activity, Actor, Migration, State, Strategy
from cellferry.settings import ErrorLimits
from cellferry.topology import Halt, HaltScope
from cellferry.topology.migrations import CAPTURING

if TYPE_CHECKING:
    from cellferry.migration.context import Attempt, Context

log = logging.getLogger(__name__)

#: Steps whose failure counts against the cohort; the others do not put an organization at risk.
COUNTED = frozenset({"copy", "sync", "verify", "cutover", "soak"})
#: A migration that is halted, but not paused, gives its log up at this many times its budget: a
#: person shall have time to clear the halt, and production shall not fill up when nobody comes.
PATIENCE_OF_HALTED = 2
#: A log is given up only when nobody was heard of for so long, in seconds.
QUIET_S = 15.0
#: Fact with what the cells had counted when the migration began.
ACTIVITY = "activity"


# ── by hand ─────────────────────────────────────────────────────────────────────────────────────


def halt(context: Context, scope: str, name: str, reason: str) -> StepResult:
    """Halt an `organization`'s migration, a `cohort` or a `cell`. Repeatable.

    Raises:
        InvalidInput: no such thing, or no reason.
        WrongState: the organization has no migration that could be stopped.
    """
    wanted, target, migration = _target(context, scope, name, halted=False)
    is_new = context.topology.halt(wanted, target, reason, context.actor)
    summary = "halted: running copies stop at their next batch, nothing new starts"
    if not is_new:
        summary = "was halted already; the first reason stays until it is cleared"
    return _result("halt", name, migration, summary, repeated=not is_new)


def clear_halt(context: Context, scope: str, name: str, reason: str) -> StepResult:
    """Clear a halt. What it stopped is not started again: run the step, or clear its task.

    Raises:
        InvalidInput: no such thing, or no reason.
        WrongState: the organization has no migration.
    """
    wanted, target, migration = _target(context, scope, name, halted=True)
    cleared = context.topology.clear_halt(wanted, target, reason, context.actor)
    if cleared is None:
        return _result("clear-halt", name, migration, "is not halted", repeated=True)
    summary = f"no longer halted ({cleared.reason}); run the step that stopped again"
    left = context.topology.halts_on(migration.id) if migration else []
    if left:
        summary += "; still " + " and ".join(f"{one.what} is halted" for one in left)
    return _result("clear-halt", name, migration, summary)


def halts(context: Context) -> list[Halt]:
    """Return every halt that is set, the oldest first."""
    return context.topology.halts()


def _target(
    context: Context, scope: str, name: str, *, halted: bool
) -> tuple[HaltScope, str, Migration | None]:
    if scope != "organization":
        if scope == HaltScope.MIGRATION:
            raise InvalidInput("a migration is halted by its organization")
        return HaltScope(scope), name, None
    organization = context.topology.organization(name)
    moves = context.topology.migrations(org=organization.id)  # newest first
    if halted:
        moves = [one for one in moves if one.halted] or moves
    else:
        moves = [one for one in moves if one.state is not State.COMPLETED]
    if not moves:
        raise WrongState(
            f"organization {organization.slug} has no migration that could be halted",
            organization=organization.slug,
            hint="to keep it from moving at all, halt the cell",
        )
    return HaltScope.MIGRATION, str(moves[0].id), moves[0]


def _result(
    step: str, name: str, migration: Migration | None, summary: str, *, repeated: bool = False
) -> StepResult:
    return StepResult(
        step,
        migration.id if migration else 0,
        migration.organization.slug if migration else name,
        str(migration.state) if migration else "",
        summary,
        repeated=repeated,
    )


# ── by the steps ────────────────────────────────────────────────────────────────────────────────


def judge_failure(context: Context, migration: Migration, step: str, error: Exception) -> None:
    """Halt what a failed step gives reason to halt. Never raises: `error` is being raised.

    A difference between the cells halts the migration and its cohort. Any other failure that will
    not be tried again counts, and `max_failures` of them halt the cohort.
    """
    who = automatic(context)
    with contextlib.suppress(CellferryError):
        if isinstance(error, VerificationFailed):
            halt_for_mismatch(context, migration, step, error.message)
        if step in COUNTED and _is_final(context, error):
            options = MoveOptions.model_validate(dict(migration.options))
            text = error.message if isinstance(error, CellferryError) else type(error).__name__
            context.topology.note_failure(migration.id, step, text, options.max_failures, who)


def halt_for_mismatch(context: Context, migration: Migration, step: str, text: str) -> None:
    """Halt a migration whose cells differ, and its cohort: the cause may be theirs, too."""
    who = automatic(context)
    context.topology.set_halted(migration.id, f"verification failed: {text}", who)
    context.topology.halt_cohort_of(
        migration.id, f"{migration.organization.slug} differs at {step}: {text}", who
    )


def judge_pause(at: Attempt, seconds: float) -> None:
    """Halt the cohort when its writers waited longer than the budget. Never raises."""
    budget_s = at.move.limits.pause_budget_s
    if seconds <= budget_s or at.move.returning:
        return
    with contextlib.suppress(CellferryError):
        at.context.topology.halt_cohort_of(
            at.migration.id,
            f"the write pause of {at.move.organization.slug} was {seconds * 1000:.0f} ms, over its"
            f" budget of {budget_s * 1000:.0f} ms",
            automatic(at.context),
        )


def insist_on_log_budget(at: Attempt, kind: str, waiting: int) -> None:
    """Return if the key log that a round left is within the budget.

    Raises:
        Halted: it is not; the migration is halted.
    """
    if waiting > at.options.log_budget_rows and not at.move.returning:
        text = _over_budget(f"{kind} at {at.move.source.name}", waiting, at.options)
        at.context.topology.set_halted(at.migration.id, text, automatic(at.context))
        found = at.context.topology.halts_on(at.migration.id)
        raise found[0].error(at.move.organization.slug) if found else Halted(text)


def activity_facts(at: Attempt) -> dict[str, Any]:
    """Return what the cells have counted so far, as the fact to judge a rise by; often none."""
    found = {
        name: asdict(counted)
        for name in (at.move.source.name, at.move.destination.name)
        if at.context.settings.cells[name].halts_at is not None
        and (counted := _activity(at.context, name)) is not None
    }
    return {ACTIVITY: {"at": at.context.topology.now(), "cells": found}} if found else {}


def _is_final(context: Context, error: Exception) -> bool:
    if isinstance(error, Stopped | LeaseLost):
        return False
    return isinstance(error, PermanentError) or context.last_try


def automatic(context: Context) -> Actor:
    """Return who halts without being asked to."""
    return replace(context.actor, name="cellferry", role="system")


# ── regularly ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Watched:
    """What a look at the budgets found.

    Attributes:
        looked: migrations whose key log was measured, and cells whose errors were.
        halted: what was halted, with the reason.
        given_up: organizations whose key log was given up.
        failed: what could not be looked at, with the reason.
    """

    looked: int
    halted: tuple[str, ...] = ()
    given_up: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


def watch(context: Context, *, quiet_s: float = QUIET_S) -> Watched:
    """Look at every key log's budget and every cell's errors; halt or give up what is over.

    To be called every minute or so. What cannot be looked at does not keep it from the rest.

    Args:
        quiet_s: a log is given up only when nobody was heard of at its migration for so long.
    """
    from cellferry.migration.pause import give_up_log

    looked = 0
    halted: list[str] = []
    given_up: list[str] = []
    failed: list[str] = []
    live = context.topology.migrations(states=LIVE_STATES, limit=100_000)
    for migration in live:
        if not _may_capture(migration):
            continue
        slug = migration.organization.slug
        try:
            is_stopped = migration.paused or bool(context.topology.halts_on(migration.id))
            over = _log_over_budget(context, migration, is_stopped=is_stopped)
            looked += 1
            if over is None:
                continue
            if not is_stopped:
                context.topology.set_halted(migration.id, over, automatic(context))
                halted.append(f"{slug}: {over}")
            # (Freeze-first has no rounds that could make good a lost log.)
            elif (
                migration.strategy is Strategy.ONLINE
                and _is_quiet(context, migration, quiet_s)
                and give_up_log(context, migration.id, over)
            ):
                given_up.append(f"{slug}: {over}")
        except CellferryError as error:
            failed.append(f"{slug}: {error.message}")
    for name in _watched_cells(context, live):
        try:
            reason = _rise(context, name, live)
            looked += 1
            if reason and context.topology.halt(HaltScope.CELL, name, reason, automatic(context)):
                halted.append(f"cell {name}: {reason}")
        except CellferryError as error:
            failed.append(f"cell {name}: {error.message}")
    for line in (*halted, *given_up):
        log.warning("%s", line)
    return Watched(looked, tuple(halted), tuple(given_up), tuple(failed))


def _may_capture(migration: Migration) -> bool:
    if migration.strategy is Strategy.FREEZE_FIRST:
        return migration.state is State.READY  # a cutover that gave up leaves its capture on
    return migration.state in CAPTURING


def _log_over_budget(context: Context, migration: Migration, *, is_stopped: bool) -> str | None:
    """Say why a migration's key log is too long; None when it is not."""
    options = MoveOptions.model_validate(dict(migration.options))
    bound = options.log_budget_rows
    if is_stopped and migration.facts.get("capture_lost"):
        bound = 0  # it was given up and not closed to the end, or is of no use any more
    elif is_stopped and not migration.paused:
        bound *= PATIENCE_OF_HALTED
    waiting = backlogs(context, migration, bound + 1)
    for kind, rows in waiting.items():
        if rows > bound:
            return _over_budget(f"{kind} at {migration.source}", rows, options)
    return None


def backlogs(context: Context, migration: Migration, at_most: int) -> dict[str, int]:
    """Return how many changes wait in each store's log at the source, up to `at_most`."""
    options = MoveOptions.model_validate(dict(migration.options))
    move = context.dry_move(
        migration.organization, migration.source, migration.destination, options
    )
    resources = context.topology.resources(migration.id)  # nothing is made: it only counts
    found = {}
    for kind, store in context.stores.items():
        with store.open(move, resources, _Silent()) as opened:
            found[kind] = opened.backlog(at_most)
    return found


class _Silent:
    """Progress of a look that nobody waits for."""

    def report(
        self, store: str, phase: str, done: int, total: int | None, unit: str, note: str = ""
    ) -> None:
        """Say nothing."""

    def check(self) -> None:
        """Go on."""


def _over_budget(where: str, rows: int, options: MoveOptions) -> str:
    return (
        f"the key log in {where} holds {rows:,} changes or more, over its budget of"
        f" {options.log_budget_rows:,} (log_budget_rows)"
    )


def _is_quiet(context: Context, migration: Migration, quiet_s: float) -> bool:
    heard: datetime | None = context.topology.lease(migration.id).heartbeat_at
    return heard is None or (context.topology.now() - heard).total_seconds() >= quiet_s


# ── errors of a cell ────────────────────────────────────────────────────────────────────────────


def _watched_cells(context: Context, live: Sequence[Migration]) -> list[str]:
    """Return the cells with limits that take part in a migration and are not halted yet."""
    taking_part = {name for one in live for name in (one.source, one.destination)}
    halted = {one.name for one in context.topology.halts() if one.scope is HaltScope.CELL}
    return [
        name
        for name, cell in context.settings.cells.items()
        if cell.halts_at is not None and name in taking_part and name not in halted
    ]


def _rise(context: Context, name: str, live: Sequence[Migration]) -> str | None:
    """Say what rose at a cell since its migrations began; None when nothing did."""
    limits = context.settings.cells[name].halts_at
    now = _activity(context, name)
    begun = _baseline(name, live)
    if limits is None or now is None or begun is None:
        return None
    sample = context.topology.activity_before(name, limits.over_s)
    context.topology.note_activity(name, now)
    since, before = begun
    reference, at = before, since
    if sample is not None and sample.at > since:
        reference, at = sample.counted, sample.at
    seconds = (context.topology.now() - at).total_seconds()
    return None if seconds < limits.over_s else rise(limits, before, reference, now, seconds)


def rise(
    limits: ErrorLimits, before: Activity, reference: Activity, now: Activity, seconds: float
) -> str | None:
    """Say which error rate rose over its limit; None when none did.

    Args:
        limits: the cell's.
        before: what was counted when the migration began: the share of rollbacks until then is
            the usual one.
        reference: what was counted `seconds` ago.
        now: what is counted now.
        seconds: how long ago `reference` was taken.
    """
    change = Activity(
        now.commits - reference.commits,
        now.rollbacks - reference.rollbacks,
        now.deadlocks - reference.deadlocks,
        now.conflicts - reference.conflicts,
    )
    if min(change.commits, change.rollbacks, change.deadlocks, change.conflicts) < 0:
        return None  # the server began to count anew
    usual, share = _share(before), _share(change)
    if (
        limits.rollbacks_percent is not None
        and change.commits + change.rollbacks >= limits.least_transactions
        and share - usual > limits.rollbacks_percent
    ):
        return (
            f"{share:.1f} % of its transactions were rolled back in the last {seconds:.0f} s, and"
            f" {usual:.1f} % before the migration"
        )
    for what, count, limit in (
        ("deadlocks", change.deadlocks, limits.deadlocks_per_min),
        ("conflicts with recovery", change.conflicts, limits.conflicts_per_min),
    ):
        if limit is not None and count * 60 / seconds > limit:
            return f"{count} {what} in the last {seconds:.0f} s, over {limit:g} a minute"
    return None


def _share(counted: Activity) -> float:
    total = counted.commits + counted.rollbacks
    return 100 * counted.rollbacks / total if total else 0.0


def _baseline(name: str, live: Sequence[Migration]) -> tuple[datetime, Activity] | None:
    """Return what a cell had counted when the first of its migrations began, and when."""
    for migration in reversed(live):  # the oldest first
        found: Mapping[str, Any] = migration.facts.get(ACTIVITY) or {}
        counted = found.get("cells", {}).get(name)
        if counted:
            return datetime.fromisoformat(found["at"]), Activity(**counted)
    return None


def _activity(context: Context, name: str) -> Activity | None:
    cell = context.settings.cell(name, context.connections)
    for store in context.stores.values():
        counted = store.activity(cell)
        if counted is not None:
            return counted
    return None
