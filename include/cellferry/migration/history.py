"""The history of a move's servers: notice that one lost commits, and make it good.

A failover to an asynchronous standby, a restored backup or a disk that was set back take commits
away that were acknowledged: of the application, but also log rows, gates and moved rows of ours.
Nothing of it raises an error. So each step first compares where the servers stand with where they
stood (`Landmark`), and so does the barrier before it freezes anything.

What was lost is not guessed. The fact `capture_lost` is recorded, durably, and whoever finds it
arms capture anew, compares everything, repairs what differs, and only then removes the fact. The
same fact is set where the key log was given up.

After the flip the new cell has authority, and what it lost is perhaps only in the old copy. A
repair would delete it there. So a loss there halts the migration, and only a person accepts it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NoReturn

from cellferry.errors import Halted, TransientError, WrongState
from cellferry.migration.context import Attempt
from cellferry.migration.halts import automatic
from cellferry.migration.result import plain
from cellferry.model import Landmark, Migration, Side, State

log = logging.getLogger(__name__)

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
        Halted: it is the new cell, after the flip; a person has to accept that.
        WrongState: so, and the hand-over was not finished: that comes first.
    """
    loss = at.migration.facts.get(LOST)
    if not loss:
        insist(at)
        return False
    if at.move.returning and loss.get("needs_acceptance"):
        _insist_on_acceptance(at, loss)
    repair(at, then)
    return True


def insist(at: Attempt) -> None:
    """See that no server has lost what was committed when it was last looked at.

    Raises:
        TransientError: one has. It is recorded, and repaired by the next try.
        Halted, WrongState: as for `follow`.
    """
    found = _read(at)
    if reasons := _breaks(at, found):
        text = "; ".join(reasons.values())
        if at.move.returning and any(
            where.startswith(f"{at.move.source.name}/") for where in reasons
        ):
            _refuse(at, reasons)
        # The landmarks stay: whoever finishes a hand-over first must see the loss, too.
        at.record({LOST: _loss(reasons)})
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
        facts[LOST] = _loss(reasons)
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
    loss: dict[str, Any] = dict(at.migration.facts.get(LOST) or {})
    known_lost = set(loss.get("stores", ()))
    name, finished = finished_of(at.migration, back=at.move.returning)
    restored: set[str] = set()
    for kind, store in at.stores.items():
        where = f"{at.move.destination.name}/{kind}"
        evidence = evidence_of(finished, kind)
        if not (where in reasons or where in known_lost or store.has_restarted(evidence)):
            continue
        # Where it is open it was handed over, and what it has since counts.
        if store.was_opened():
            log.warning("%s was restarted after it was opened; nothing is brought again", where)
            continue
        try:
            repaired = store.repair()
            again = store.finish()
        except WrongState:
            continue
        restored.add(where)
        evidence = {**evidence, **plain(again.evidence)}
        finished[kind] = {**finished.get(kind, {}), "evidence": evidence}
        at.record({name: finished, "restored": {kind: plain(repaired)}})
    facts: dict[str, Any] = {LANDMARKS: _merged(at, _read(at))}
    if known_lost and known_lost <= restored:
        facts[LOST] = None
    at.record(facts)


def finished_of(migration: Migration, *, back: bool) -> tuple[str, dict[str, Any]]:
    """Return the name of the fact that the last flip left, and by store what it says."""
    name = "finished_back" if back else "finished"
    return name, dict(migration.facts.get(name) or {})


def evidence_of(finished: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """Return what one store said of its last delta."""
    found: Mapping[str, Any] = (finished.get(kind) or {}).get("evidence") or {}
    return found


def _refuse(at: Attempt, reasons: dict[str, str]) -> NoReturn:
    """Keep that the cell with authority lost commits, and halt: nothing is repaired backwards.

    Raises:
        Halted: always, except
        WrongState: where the hand-over was not finished, which makes it good.
    """
    if at.migration.state is State.SOAKING and not at.migration.facts.get("handed_over"):
        raise WrongState(
            f"{'; '.join(reasons.values())}. The hand-over after the flip was not finished",
            hint="run the cutover again: it brings the new cell up to date, then opens it",
        )
    at.record({LOST: {**_loss(reasons), "needs_acceptance": True}})
    _halt(at, at.migration.facts[LOST])


def _insist_on_acceptance(at: Attempt, loss: Mapping[str, Any]) -> None:
    """Return if a person has cleared the halt that said what was lost.

    Raises:
        Halted: not yet; or another halt was in its place, and this one is set only now.
    """
    if not (loss.get("halted") and at.migration.halted is None):
        _halt(at, loss)


def _halt(at: Attempt, loss: Mapping[str, Any]) -> NoReturn:
    topology, new, old = at.context.topology, at.move.source.name, at.move.destination.name
    until = dict(at.migration.facts.get("reversed") or {}).get("at") or "the cutover"
    text = (
        f"{loss['reason']}. {new} has authority, so what it lost cannot be told from what was"
        f" deleted. {old} still has what was there until the last reverse round ({until}); nothing"
        f" is written or deleted there meanwhile. Choose: bring the newer state of {new} back, or"
        f" enter again what is only in {old}; then clear this halt. Clearing it accepts what {new}"
        f" has by then: the next step makes {old} equal to it"
    )
    topology.set_halted(at.migration.id, text, automatic(at.context))
    # An earlier halt stays in its place: who clears that one has not read this.
    if topology.migration(at.migration.id).halted == text:
        at.record({LOST: {**loss, "halted": True}})
    raise Halted(
        text,
        hint=f"cellferry clear-halt organization {at.move.organization.slug} --reason …, but only"
        f" when nothing is missed in {new}",
    )


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


def _loss(reasons: Mapping[str, str]) -> dict[str, Any]:
    return {
        "reason": "; ".join(reasons.values()),
        "at": datetime.now(UTC).isoformat(),
        "store": next(iter(reasons)),
        "stores": list(reasons),
    }
