"""The verify step: everything on both sides is compared, while writers write."""

from __future__ import annotations

from collections.abc import Mapping

from cellferry.errors import VerificationFailed
from cellferry.migration import history
from cellferry.migration.context import Attempt, Context, attempt
from cellferry.migration.halts import halt_for_mismatch
from cellferry.migration.positions import FACT, positions
from cellferry.migration.result import StepResult, plain
from cellferry.migration.watch import take_baseline
from cellferry.model import State, Strategy, Verification
from cellferry.phases import Phase, reach

HINT = (
    "do not force it: look for writers that bypass the gate at the destination, then abort and "
    "start again"
)

ALLOWED = frozenset({State.SYNCING, State.READY})
DONE = frozenset({State.SOAKING, State.RETAINED, State.CLEANING, State.COMPLETED})


def verify(context: Context, migration_id: int) -> StepResult:
    """Compare every row and key; a difference halts the migration.

    Guarantees, with every later round verifying what it applies, that a route flip is preceded
    by a complete verification (invariant 3). Changes nothing in the cells. May be repeated.

    Raises:
        VerificationFailed: the sides differ; the first differences are named.
    """
    migration = context.topology.migration(migration_id)
    if migration.state in DONE:
        return StepResult(
            "verify",
            migration_id,
            migration.organization.slug,
            migration.state,
            "verified before",
            repeated=True,
        )
    with attempt(context, migration_id, "verify", ALLOWED, paced=True, continues=True) as at:
        history.follow(at)
        evidence: Mapping[str, Verification] = {}
        if at.move.strategy is Strategy.ONLINE:
            evidence = compare_everything(at, "verify", HINT)
        facts = {
            "verified": plain(evidence),
            f"{FACT}verified": positions((at.move.source, at.move.destination), at.stores),
            "baseline": take_baseline(at),
            **at.pace_facts("verify"),
        }
        reach(Phase.VERIFY_DONE)
        if at.migration.state is State.SYNCING:
            at.transition(State.READY, facts)
        else:
            at.record(facts)
        summary = (
            "equal: "
            + ", ".join(f"{found.compared:,} in {kind}" for kind, found in evidence.items())
            if evidence
            else "freeze-first: everything is compared under the gate"
        )
        summary = "; ".join(
            [summary, *(remark for found in evidence.values() for remark in found.remarks)]
        )
        return StepResult(
            "verify",
            migration_id,
            at.move.organization.slug,
            at.migration.state,
            summary,
            {
                kind: {"compared": found.compared, "mismatches": 0}
                for kind, found in evidence.items()
            },
        )


def compare_everything(
    at: Attempt, step: str, hint: str, *, fact: str = "verified"
) -> Mapping[str, Verification]:
    """Compare every row and key of every store; return the evidence if all are equal.

    Args:
        at: the attempt, its capture armed.
        step: for the halt's reason.
        hint: what to do about a difference.
        fact: under which name the evidence is kept when there is one.

    Raises:
        VerificationFailed: something differs; the migration and its cohort are halted.
    """
    found = {kind: store.verify() for kind, store in at.stores.items()}
    failed = {kind: one for kind, one in found.items() if not one.ok}
    if failed:
        at.record({fact: plain(found)})
        text = _describe(failed)
        # not left to `attempt`, which lets it be when the topology does not answer
        halt_for_mismatch(at.context, at.migration, step, text)
        raise VerificationFailed(text, hint=hint)
    return found


def _describe(failed: Mapping[str, Verification]) -> str:
    """Return the first few differences in plain words."""
    return "; ".join(
        f"{kind}: {found.mismatch_count} differences, first "
        + ", ".join(f"{one.part} {one.key} {one.reason}" for one in found.mismatches[:5])
        for kind, found in failed.items()
    )
