"""The soak step: watch the organization at its new cell before the old copy is only retained."""

from __future__ import annotations

import time

from cellferry.errors import AuthorityViolation
from cellferry.migration.context import Attempt, Context, attempt
from cellferry.migration.result import StepResult, plain
from cellferry.model import Round, State
from cellferry.phases import Phase, reach

DONE = frozenset({State.RETAINED, State.CLEANING, State.COMPLETED})


def soak(context: Context, migration_id: int) -> StepResult:
    """Watch for `soak_s`, replaying the organization's new writes to the gated old cell.

    Guarantees that reverse rounds work, so that a return would lose nothing. Changes the old
    cell's copy. May be repeated.

    Raises:
        AuthorityViolation: the route no longer points where this migration put it.
    """
    migration = context.topology.migration(migration_id)
    if migration.state in DONE:
        return StepResult(
            "soak",
            migration_id,
            migration.organization.slug,
            migration.state,
            "soaked before",
            repeated=True,
        )
    with attempt(context, migration_id, "soak", frozenset({State.SOAKING}), returning=True) as at:
        started = time.monotonic()
        rounds = 0
        last: dict[str, Round] = {}
        while True:
            _check_route(at)
            last = replay(at)
            rounds += 1
            elapsed = time.monotonic() - started
            at.progress.report("soak", "soak", int(elapsed), int(at.options.soak_s), "s")
            if elapsed >= at.options.soak_s:
                break
            at.progress.check()
            time.sleep(min(1.0, at.options.soak_s - elapsed))
        facts = {"rounds": rounds, "last": plain(last)}
        reach(Phase.SOAKED)
        at.transition(State.RETAINED, {"soaked": facts})
        return StepResult(
            "soak",
            migration_id,
            at.move.organization.slug,
            at.migration.state,
            f"{rounds} reverse rounds; the old cell can take it back",
            facts,
        )


def reverse_round(context: Context, migration_id: int) -> StepResult:
    """One reverse round of a retained migration, so that logs stay short and a return is quick.

    Changes the gated old cell's copy only. May be repeated.

    Raises:
        WrongState: the migration is not retained.
    """
    retained = frozenset({State.RETAINED})
    with attempt(context, migration_id, "reverse round", retained, returning=True) as at:
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
