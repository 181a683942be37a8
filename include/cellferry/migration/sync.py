"""The sync step: rounds over what changed since, until a round is small."""

from __future__ import annotations

from typing import Any

from cellferry.errors import NotConverging
from cellferry.migration import history
from cellferry.migration.context import Attempt, Context, attempt
from cellferry.migration.halts import insist_on_log_budget
from cellferry.migration.result import StepResult
from cellferry.model import Round, State, Strategy
from cellferry.phases import Phase, reach
from cellferry.stores.base import StoreMove

ALLOWED = frozenset({State.SYNCING, State.READY})
DONE = frozenset({State.SOAKING, State.RETAINED, State.CLEANING, State.COMPLETED})

#: A round that predicts a pause of up to this share of the budget is small.
SHARE_OF_BUDGET = 0.5
#: A round costs its round trips however few its keys: below so many, time does not follow them.
FEW_KEYS = 100


def sync(context: Context, migration_id: int) -> StepResult:
    """Repeat rounds until each store's last round was short and left little behind.

    Guarantees that the destination equals the source as of a moment within this call. Changes
    the destination's copy only. May be repeated.

    Raises:
        NotConverging: after `max_rounds` the organization still changes faster than rounds do.
    """
    migration = context.topology.migration(migration_id)
    if migration.state in DONE or migration.strategy is Strategy.FREEZE_FIRST:
        return StepResult(
            "sync",
            migration_id,
            migration.organization.slug,
            migration.state,
            "nothing to do",
            repeated=True,
        )
    with attempt(context, migration_id, "sync", ALLOWED, paced=True, continues=True) as at:
        history.follow(at)
        rounds = {kind: run_rounds(at, kind, store) for kind, store in at.stores.items()}
        at.record({"rounds": rounds, **at.pace_facts("sync")})
        summary = "; ".join(
            f"{kind}: {len(done)} rounds, last {done[-1]['applied']} keys in "
            f"{done[-1]['seconds'] * 1000:.0f} ms"
            for kind, done in rounds.items()
        )
        return StepResult(
            "sync", migration_id, at.move.organization.slug, at.migration.state, summary, rounds
        )


def run_rounds(at: Attempt, kind: str, store: StoreMove) -> list[dict[str, Any]]:
    """Repeat rounds of one store until one predicts a pause within the budget.

    Raises:
        NotConverging: they do not get there within `max_rounds`.
    """
    done: list[Round] = []
    budget_s = at.move.limits.pause_budget_s * SHARE_OF_BUDGET
    for number in range(1, at.options.max_rounds + 1):
        at.progress.check()
        done.append(store.sync())
        history.note(at)
        at.progress.report(
            kind, "sync", number, None, "rounds", f"{done[-1].remaining} keys dirty after it"
        )
        reach(Phase.ROUND_DONE)
        insist_on_log_budget(at, kind, done[-1].remaining)
        if is_small(done[-1], budget_s):
            return [_facts(one) for one in done]
    last = done[-1]
    raise NotConverging(
        f"after {len(done)} rounds {last.remaining} keys of {kind} are still dirty and a round "
        f"takes {last.seconds * 1000:.0f} ms",
        hint="make the indexes that plan's warnings name, raise the pause budget, lift the"
        " throttle, or move at a quieter hour",
    )


def is_small(one: Round, budget_s: float) -> bool:
    """Whether the next round, at the pace of `one`, would take at most `budget_s` seconds.

    An organization that keeps writing always leaves about as many dirty keys as arrive during a
    round; so the question is not whether any are left, but how long they take.
    """
    growth = max(1.0, one.remaining / max(one.applied, FEW_KEYS))
    return one.seconds * growth <= budget_s


def _facts(one: Round) -> dict[str, Any]:
    return {
        "applied": one.applied,
        "remaining": one.remaining,
        "bytes": one.bytes,
        "seconds": round(one.seconds, 4),
    }
