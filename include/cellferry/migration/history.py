"""The history of a move's servers: notice that one lost commits, and make it good.

A failover to an asynchronous standby, a restored backup or a disk that was set back take commits
away that were acknowledged: of the application, but also log rows, gates and moved rows of ours.
Nothing of it raises an error. So each step first compares where the servers stand with where they
stood (`Landmark`), and so does the barrier before it freezes anything.

What was lost is not guessed. The fact `capture_lost` is recorded, durably, and whoever finds it
arms capture anew, compares everything, repairs what differs, and only then removes the fact. The
same fact is set where the key log was given up.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from cellferry.errors import TransientError, WrongState
from cellferry.migration.context import Attempt
from cellferry.migration.result import plain
from cellferry.model import Landmark, Side, State

#: Facts of a migration: why the log is not complete, and where the servers stood.
LOST = "capture_lost"
LANDMARKS = "landmarks"

Marks = dict[str, dict[str, dict[str, Any]]]


def follow(at: Attempt, then: Callable[[], None] | None = None) -> bool:
    """Begin a step: repair what was lost before, or see that nothing was. Repeatable.

    Args:
        at: the step's attempt.
        then: more that must have succeeded before the loss is forgotten.

    Returns:
        Whether it repaired.

    Raises:
        TransientError: a server has lost commits since the last step; the next try repairs.
    """
    if not at.migration.facts.get(LOST):
        insist(at)
        return False
    repair(at, then)
    return True


def insist(at: Attempt) -> None:
    """See that no server has lost what was committed when it was last looked at.

    Raises:
        TransientError: one has. It is recorded, and repaired by the next try.
    """
    found = _read(at)
    if reasons := _breaks(at, found):
        text = "; ".join(reasons.values())
        at.record({LOST: _loss(text, next(iter(reasons))), LANDMARKS: _merged(at, found)})
        raise TransientError(
            f"{text}. Rows, or the log of changed keys, may be missing",
            hint="run the step again: it compares everything and repairs what differs",
        )
    at.record({LANDMARKS: _merged(at, found)})


def mark_losses(at: Attempt) -> None:
    """As `insist`, but only record what was lost: for a step that arms anew itself."""
    found = _read(at)
    facts: dict[str, Any] = {LANDMARKS: _merged(at, found)}
    if reasons := _breaks(at, found):
        facts[LOST] = _loss("; ".join(reasons.values()), next(iter(reasons)))
    at.record(facts)


def note(at: Attempt) -> None:
    """Remember where the servers stand: what is committed by now must be there later."""
    at.record({LANDMARKS: _merged(at, _read(at))})


def repair(at: Attempt, then: Callable[[], None] | None = None) -> None:
    """Arm capture anew, compare everything, make good what differs; then forget the loss.

    A migration that was ready has to be verified again, by `then` or by the step verify.
    """
    at.record({LANDMARKS: _merged(at, _read(at))})
    for store in at.stores.values():
        store.open_capture()
    repaired = {kind: plain(store.repair()) for kind, store in at.stores.items()}
    if then is not None:
        then()
    elif at.migration.state is State.READY:
        at.transition(State.SYNCING, reason="what was verified was lost since, and repaired")
    insist(at)
    at.record({LOST: None, "repaired": repaired})


def restore(at: Attempt) -> None:
    """After the flip, before the hand-over: bring a destination that lost commits up to date.

    The source is closed and has everything up to the freeze. Repeatable; does nothing where no
    destination lost anything, or where it is open already.
    """
    reasons = _breaks(at, _read(at))
    for kind, store in at.stores.items():
        if f"{at.move.destination.name}/{kind}" not in reasons:
            continue
        try:
            repaired = store.repair()
        except WrongState:
            continue  # its gate is open: it was handed over, and what it has since counts
        store.finish()
        at.record({"restored": {kind: plain(repaired)}})
    at.record({LANDMARKS: _merged(at, _read(at))})


def _read(at: Attempt) -> dict[str, dict[str, Landmark]]:
    found: dict[str, dict[str, Landmark]] = {}
    for kind, store in at.stores.items():
        for side in Side:
            mark = store.landmark(side)
            if mark is not None:
                found.setdefault(kind, {})[at.move.cell(side).name] = mark
    return found


def _breaks(at: Attempt, found: dict[str, dict[str, Landmark]]) -> dict[str, str]:
    """Return by cell and store why commits may be gone there."""
    known: Marks = dict(at.migration.facts.get(LANDMARKS) or {})
    reasons: dict[str, str] = {}
    for kind, marks in found.items():
        for cell, mark in marks.items():
            earlier = known.get(kind, {}).get(cell)
            if earlier is None:
                continue
            reason = mark.break_since(Landmark(**earlier))
            if reason is not None:
                where = f"{cell}/{kind}"
                reasons[where] = f"{where} may have lost commits: {reason}"
    return reasons


def _merged(at: Attempt, found: dict[str, dict[str, Landmark]]) -> Marks:
    known: Marks = dict(at.migration.facts.get(LANDMARKS) or {})
    return {
        **known,
        **{
            kind: {
                **known.get(kind, {}),
                **{
                    cell: {
                        "server": mark.server,
                        "timeline": mark.timeline,
                        "position": mark.position,
                    }
                    for cell, mark in marks.items()
                },
            }
            for kind, marks in found.items()
        },
    }


def _loss(reason: str, store: str) -> dict[str, str]:
    return {"reason": reason, "at": datetime.now(UTC).isoformat(), "store": store}
