"""The soak step: watch the organization at its new cell before the old copy is only retained."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from cellferry.errors import (
    AuthorityViolation,
    Breached,
    CellferryError,
    LeaseLost,
    Stopped,
    TransientError,
)
from cellferry.migration import history
from cellferry.migration.context import Attempt, Context, attempt
from cellferry.migration.halts import automatic, judge_failure
from cellferry.migration.health import Finding
from cellferry.migration.options import MoveOptions
from cellferry.migration.result import StepResult, plain
from cellferry.migration.roll_back import roll_back
from cellferry.migration.watch import Watch
from cellferry.model import Migration, Round, State
from cellferry.phases import Phase, reach

DONE = frozenset({State.RETAINED, State.CLEANING, State.COMPLETED})

#: Seconds between two samples, and between two tries to reach a cell that does not answer.
EVERY_S = 1.0
TRY_AGAIN_S = 3.0
#: How far a soak has got is kept so often, in seconds; a killed one goes on from there.
KEEP_S = 10.0


def soak(context: Context, migration_id: int) -> StepResult:
    """Watch for `soak_s`, replaying the organization's new writes to the gated old cell.

    Guarantees that reverse rounds work, so that a return would lose nothing, and that no check
    failed at the end. Changes the old cell's copy. May be repeated; a killed one goes on. When a
    check fails for `breach_s` the migration is halted; with `roll_back_on_breach`, and if the old
    cell would do better, the organization is then rolled back, once.

    Raises:
        Breached: a check failed; says which, the value, what it was before, the limit, and
            whether the organization went back.
        AuthorityViolation: the route no longer points where this migration put it.
        InvalidInput: the file of smoke queries has become wrong.
    """
    migration = context.topology.migration(migration_id)
    if _is_halted_by_breach(migration):
        raise _after_breach(context, migration)
    if migration.state in DONE:
        return StepResult(
            "soak",
            migration_id,
            migration.organization.slug,
            migration.state,
            "soaked before",
            repeated=True,
        )
    watch = Watch(context, migration)
    taken: list[int] = []
    while True:
        try:
            with attempt(
                context,
                migration_id,
                "soak",
                frozenset({State.SOAKING}),
                returning=True,
                taken=taken.append,
            ) as at:
                return _watch(at, watch)
        except Breached:
            halted = context.topology.migration(migration_id)
            raise _after_breach(context, halted, taken[-1]) from None
        except TransientError as error:
            # A cell does not answer, or the topology, without which this raises as well.
            watch.sample_without(error)
            if watch.breach is not None and taken:
                halted = _halt(context, migration, taken[-1], watch, watch.breach)
                breached = _after_breach(context, halted, taken[-1])
                judge_failure(context, migration, "soak", breached)
                raise breached from error
            time.sleep(TRY_AGAIN_S)


def _watch(at: Attempt, watch: Watch) -> StepResult:
    """Take samples until the time is over and nothing is suspicious.

    Raises:
        Breached: something was so for too long; the migration is halted.
    """
    if at.migration.facts.get("breach"):
        at.record({"breach": None})  # of a halt that a person has cleared since
    history.follow(at)
    before_s = float(at.migration.facts.get("soaking", {}).get("watched_s", 0.0))
    started = kept_at = time.monotonic()
    rounds = 0
    while True:
        _check_route(at)
        last = replay(at)
        rounds += 1
        now = time.monotonic()
        watched_s = before_s + now - started
        is_over = watched_s >= at.options.soak_s
        watch.sample(at, last, last=is_over)
        note = watch.note()
        shown_s = min(int(watched_s), int(at.options.soak_s))
        at.progress.report("soak", "soak", shown_s, int(at.options.soak_s), "s", note)
        if watch.breach is not None:
            _halt(at.context, at.migration, at.move.attempt, watch, watch.breach)
            raise Breached(watch.breach.text)
        if is_over and not watch.is_suspicious:
            break
        if now - kept_at >= KEEP_S:
            kept_at = now
            at.record({"soaking": {"watched_s": round(watched_s, 1), **watch.facts()}})
        at.progress.check()
        left_s = at.options.soak_s - watched_s
        time.sleep(min(EVERY_S, left_s) if left_s > 0 else EVERY_S)
    facts = {
        "rounds": rounds,
        "last": plain(last),
        "watched_s": round(watched_s, 1),
        **watch.facts(),
    }
    reach(Phase.SOAKED)
    at.transition(State.RETAINED, {"soaked": facts, "soaking": {}, "breach": None})
    warnings = watch.warnings()
    return StepResult(
        "soak",
        at.migration.id,
        at.move.organization.slug,
        at.migration.state,
        f"{rounds} reverse rounds; {note}; the old cell can take it back"
        + (f". Not judged: {'; '.join(warnings)}" if warnings else ""),
        {**facts, "warnings": warnings},
    )


def _halt(
    context: Context, migration: Migration, number: int, watch: Watch, breach: Finding
) -> Migration:
    """Keep what was found, and halt, at once. A step that is killed before watches again.

    Raises:
        LeaseLost: attempt `number` was superseded; nothing was written.
    """
    options = MoveOptions.model_validate(dict(migration.options))
    goes_back = options.roll_back_on_breach and breach.returning_helps
    text = f"soak: {breach.text}"[:4000].strip()  # as a halt keeps it
    facts: dict[str, Any] = {
        "check": breach.check,
        "text": text,
        "halt": text,
        "finding": plain(breach),
        "roll_back": "begun" if goes_back else "none",
        **watch.facts(),
    }
    return context.topology.record_and_halt(
        migration.id, number, {"breach": facts, "soaking": {}}, text, automatic(context)
    )


def _is_halted_by_breach(migration: Migration) -> bool:
    """Whether it is the breach that halted it, and not a person afterwards, for another reason."""
    breach = migration.facts.get("breach")
    return bool(breach and migration.halted and breach.get("halt") == migration.halted)


def _after_breach(context: Context, migration: Migration, number: int | None = None) -> Breached:
    """Go back if that was decided, then return the error that says what happened.

    A roll-back that was begun and killed is finished, and so is one that something kept from
    its end that may be over; one that failed is not tried again.

    Args:
        context: the topology, the stores, who asks.
        migration: halted.
        number: of the attempt that found the breach; None if that was an earlier soak's.

    Raises:
        LeaseLost: another controller works on it.
    """
    if number is not None:
        with contextlib.suppress(Stopped):  # it is halted; but is it still this soak's?
            context.topology.check_lease(migration.id, number)
    breach: dict[str, Any] = dict(migration.facts["breach"])
    text = str(breach["text"])
    slug, new, old = migration.organization.slug, migration.destination, migration.source
    look = f"find the cause at {new}, then: cellferry clear-halt organization {slug} --reason …"
    if breach["roll_back"] == "begun":
        try:
            result = roll_back(context, migration.id, text)
        except LeaseLost:
            raise
        except TransientError as error:
            text = f"{text}; rolling back automatically is not over: {error}"
        except CellferryError as error:
            breach |= {"roll_back": "failed", "failure": str(error)}
            text = f"{text}; rolling back automatically failed: {error}"
        else:
            breach |= {"roll_back": "done"}
            text = f"{text}; rolled back without loss: {result.summary}"
        if breach["roll_back"] != "begun":
            breach["text"] = text
        with contextlib.suppress(CellferryError):
            newest = context.topology.migration(migration.id).attempt
            context.topology.record(migration.id, newest, {"breach": breach})
            context.topology.set_error(migration.id, text, attempt=newest)
    served, hint = {
        "begun": (
            f"who serves, `cellferry status {slug}` says",
            f"when what it needs answers again: cellferry roll-back {slug}, which thaws or goes on",
        ),
        "done": (f"{old} serves again", look),
        "failed": (
            f"it stays in {new}, which serves on",
            f"do what the second reason says, then: cellferry roll-back {slug}",
        ),
    }.get(
        breach["roll_back"],
        (f"{new} serves on", f"to go back: cellferry roll-back {slug}; to stay: {look}"),
    )
    return Breached(
        f"{text}. The migration is halted; {served}", organization=slug, step="soak", hint=hint
    )


def reverse_round(context: Context, migration_id: int) -> StepResult:
    """One reverse round of a retained migration, so that logs stay short and a return is quick.

    Changes the gated old cell's copy only. May be repeated.

    Raises:
        WrongState: the migration is not retained.
    """
    retained = frozenset({State.RETAINED})
    with attempt(
        context, migration_id, "reverse round", retained, returning=True, paced=True
    ) as at:
        history.follow(at)
        rounds = replay(at)
        return StepResult(
            "reverse round",
            migration_id,
            at.move.organization.slug,
            at.migration.state,
            "; ".join(f"{kind}: {one.applied} keys" for kind, one in rounds.items()),
            plain(rounds),
        )


def replay(at: Attempt) -> dict[str, Round]:
    """One reverse round of every store; keep with the migration what the old cell now has.

    The fact `reversed`: everything acknowledged before `at` is there, unless a round was bounded.
    """
    began = at.context.topology.now()
    rounds = {kind: store.sync() for kind, store in at.stores.items()}
    counts = {kind: one.applied for kind, one in rounds.items()}
    at.record({"reversed": {"at": began.isoformat(), "applied": counts}})
    return rounds


def _check_route(at: Attempt) -> None:
    route = at.context.topology.route(at.move.organization.id)
    if route.cell != at.move.source.name or route.epoch != at.move.epoch:
        raise AuthorityViolation(
            f"the route says {route.cell} at epoch {route.epoch}, and this migration put it at "
            f"{at.move.source.name} at epoch {at.move.epoch}",
            hint="another migration has moved it since; look at `cellferry status`",
        )
