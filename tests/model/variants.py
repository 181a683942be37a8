"""Broken variants of the protocol: each leaves one precaution out, and must lose something.

A model that finds nothing wrong says little unless it finds what is wrong. Each variant names the
precaution (a name in `Model.broken`), where it is explored, and the invariant that it breaks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.model import scenarios
from tests.model.protocol import (
    EPOCHS,
    LEDGER,
    LEFTOVERS,
    ONE_CELL,
    RETURN,
    VERIFIED,
    WRITABLE,
    Scripts,
)
from tests.model.scenarios import ONE, RC, Scenario


@dataclass(frozen=True)
class Variant:
    """A protocol without one precaution.

    Attributes:
        name: the precaution that is left out, as `protocol.py` calls it.
        what: what the variant does instead, in a sentence.
        scenario: where it is explored.
        breaks: the invariant that does not hold.
    """

    name: str
    what: str
    scenario: Scenario
    breaks: str


def _variant(
    name: str,
    what: str,
    scenario: Scenario,
    breaks: str,
    *,
    faults: int = 0,
    scripts: Scripts | None = None,
    **bounds: Any,
) -> Variant:
    # Only this invariant is asserted: what matters is what becomes of the data and of the service,
    # not which precaution is the first to be missed.
    bounded = scenario.bounded(
        name,
        faults,
        scripts or scenario.model.scripts,
        broken=frozenset({name}),
        watches=frozenset({breaks}),
        **bounds,
    )
    return Variant(name, what, bounded, breaks)


TWICE = ((RC, ("a+", "a+")),)
TWO_ROWS = ((RC, ("a+",)), (RC, ("b+",)))

VARIANTS = (
    _variant(
        "arming does not wait",
        "the copy starts although a transaction older than the gate's row is open",
        scenarios.CAPTURE,
        LEDGER,
    ),
    _variant(
        "stale snapshot passes",
        "a REPEATABLE READ writer trusts the gate that its snapshot shows",
        scenarios.CUTOVER,
        ONE_CELL,
    ),
    _variant(
        "forgets up to the highest",
        "a round deletes the log rows up to the highest id that it saw",
        scenarios.CUTOVER,
        LEDGER,
        scripts=TWO_ROWS,
    ),
    _variant(
        "two snapshots",
        "a round reads the rows and the log in two snapshots",
        scenarios.CUTOVER,
        LEDGER,
        scripts=TWICE,
    ),
    _variant(
        "forgets before it applies",
        "a round deletes log rows before the destination has committed their rows",
        scenarios.CUTOVER,
        LEDGER,
        faults=1,
        scripts=ONE,
    ),
    _variant(
        "cuts over unverified",
        "the cutover begins without the verify step",
        scenarios.CAPTURE,
        VERIFIED,
        scripts=ONE,
    ),
    _variant(
        "flips before the freeze",
        "the route flips before the freeze is durable",
        scenarios.CUTOVER,
        ONE_CELL,
        scripts=ONE,
    ),
    _variant(
        "freeze does not drain",
        "the gate is frozen without waiting for the writers that passed it",
        scenarios.CUTOVER,
        ONE_CELL,
        scripts=ONE,
    ),
    _variant(
        "gate not on the standby",
        "the freeze is not confirmed by the standby that is promoted",
        scenarios.CUTOVER,
        ONE_CELL,
        faults=1,
        scripts=ONE,
    ),
    _variant(
        "flip not on the standby",
        "the flip is not confirmed by the topology's standby that is promoted",
        scenarios.CUTOVER,
        ONE_CELL,
        faults=1,
        scripts=ONE,
    ),
    _variant(
        "rows not on the standby",
        "what a round or the delta commits is not confirmed by the standby that is promoted",
        scenarios.CUTOVER,
        LEDGER,
        faults=1,
        scripts=ONE,
    ),
    _variant(
        "opens before the flip",
        "the destination opens before the commit point",
        scenarios.CUTOVER,
        ONE_CELL,
        faults=1,
        scripts=ONE,
    ),
    _variant(
        "thaws on an unknown commit",
        "a flip whose commit got no answer is taken for one that failed",
        scenarios.CUTOVER,
        LEDGER,
        faults=1,
        scripts=ONE,
    ),
    _variant(
        "asks without the lock",
        "the topology is asked without waiting for a commit in flight, and believed",
        scenarios.CUTOVER,
        LEDGER,
        faults=1,
        scripts=ONE,
    ),
    _variant(
        "aborts at the cells first",
        "an abort thaws the source before the topology knows of it",
        scenarios.CUTOVER,
        LEDGER,
        faults=1,
        scripts=ONE,
    ),
    _variant(
        "no lease in the topology",
        "the flip does not compare the attempt (hazard 1)",
        scenarios.CUTOVER,
        LEDGER,
        faults=1,
        scripts=ONE,
    ),
    _variant(
        "no lease at the rows",
        "a round is applied without holding the lease (hazard 1)",
        scenarios.CUTOVER,
        LEDGER,
        faults=1,
        scripts=TWICE,
    ),
    _variant(
        "no lease at the gate",
        "a change of the gate does not compare the attempt (hazard 1)",
        scenarios.CUTOVER,
        LEDGER,
        faults=1,
        scripts=ONE,
    ),
    _variant(
        "thaws whatever it finds",
        "a thaw is no compare-and-set on epoch and state",
        scenarios.CUTOVER,
        EPOCHS,
        faults=1,
        scripts=ONE,
    ),
    _variant(
        "old sessions live on",
        "a takeover does not end the sessions of older attempts",
        scenarios.CUTOVER,
        WRITABLE,
        faults=1,
        scripts=ONE,
        goals=("forward",),
    ),
    _variant(
        "no check after the fence",
        "an attempt that stopped before its fence does not ask the topology again after it",
        scenarios.CAPTURE,
        LEFTOVERS,
        faults=1,
        scripts=ONE,
        goals=("forward", "abort"),
    ),
    _variant(
        "opens before it is armed",
        "the destination opens before it logs for the way back",
        scenarios.CUTOVER,
        RETURN,
        scripts=ONE,
    ),
    _variant(
        "switchback without a freeze",
        "the way back does not freeze the new cell",
        scenarios.SWITCHBACK,
        LEDGER,
        scripts=ONE,
    ),
    _variant(
        "reverse round without the lease",
        "a reverse round is applied without holding the lease",
        scenarios.SWITCHBACK,
        LEDGER,
        faults=1,
        scripts=TWICE,
    ),
    _variant(
        "no gate stays behind",
        "the hand-over removes the source's gate",
        scenarios.CUTOVER,
        ONE_CELL,
        scripts=ONE,
    ),
    _variant(
        "cleans before the TTL",
        "the old copy goes while clients still have old routes",
        scenarios.CLEANUP,
        ONE_CELL,
        scripts=ONE,
    ),
    _variant(
        "cleans without asking the gate",
        "a batch of the clean-up does not ask whether the gate says that the copy is dead",
        scenarios.CLEANUP,
        LEDGER,
        faults=1,
        scripts=ONE,
    ),
    _variant(
        "the pause is lifted",
        "a person resumes a migration while it is being rolled back, and an old clean-up goes on",
        scenarios.CLEANUP,
        LEDGER,
        faults=1,
        scripts=ONE,
    ),
)
