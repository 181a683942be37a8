"""The ledger: what a writer recorded is there whatever ended it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cellferry.local.application.ledger import (
    Ledger,
    LedgerWriter,
    Operation,
    Outcome,
    read_ledger,
    write_pauses,
    write_rate,
)


def test_an_outcome_is_told_with_its_intent(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with LedgerWriter(path) as writer:
        writer.intend("o1", "s", "7", "postgres", "edit", [["change", "issues", "a", "d"]])
        writer.conclude(
            "o1", Outcome.ACKNOWLEDGED, seconds=0.25, attempts=2, cell="cell-2", epoch=2
        )
    (one,) = read_ledger([path]).operations
    assert (one.outcome, one.cell, one.epoch, one.attempts) == ("acknowledged", "cell-2", 2, 2)
    assert one.effects == [["change", "issues", "a", "d"]]


def test_an_intent_without_an_outcome_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with LedgerWriter(path) as writer:
        writer.intend("o1", "s", "7", "postgres", "edit", [["change", "issues", "a", "d"]])
    assert read_ledger([path]).operations[0].outcome is Outcome.UNKNOWN


def test_a_last_line_that_was_cut_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with LedgerWriter(path) as writer:
        writer.intend("o1", "s", "7", "postgres", "edit", [["change", "issues", "a", "d"]])
    with path.open("ab") as file:
        file.write(b'["o","o1","ackn')
    assert read_ledger([path]).operations[0].outcome is Outcome.UNKNOWN


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b'["o","o1","ackn\n["i"]\n')
    with pytest.raises(ValueError, match=r"ledger\.jsonl:1"):
        read_ledger([path])


def write(wall: float, seconds: float, organization: str = "7", **changes: object) -> Operation:
    one = Operation(
        "o", "s", organization, "postgres", "edit", [["add", "c", "n", 1]], wall,
        outcome=Outcome.ACKNOWLEDGED, seconds=seconds,
    )  # fmt: skip
    for name, value in changes.items():
        setattr(one, name, value)
    return one


def test_the_pause_is_the_longest_wait_of_a_write_that_overlaps_the_window() -> None:
    ledger = Ledger(
        [
            write(1.0, 5.0),  # over before the window
            write(9.5, 0.8),  # began before it
            write(10.5, 0.3),
            write(30.0, 4.0),  # began after it
            write(10.0, 7.0, organization="8"),
            write(10.0, 9.0, effects=[]),  # a read
        ]
    )
    assert write_pauses(ledger, {"7": (10.0, 12.0)}) == {"7": 0.8}


def test_a_write_that_gave_up_waiting_counts_as_a_pause() -> None:
    refused = write(10.0, 30.0, outcome=Outcome.REFUSED)
    assert write_pauses(Ledger([refused]), {"7": (10.0, 12.0)}) == {"7": 30.0}


def test_the_rate_counts_acknowledged_writes_by_when_they_were_acknowledged() -> None:
    ledger = Ledger([write(9.0, 1.5), write(9.0, 0.5), write(10.0, 0.1, outcome=Outcome.UNKNOWN)])
    assert write_rate(ledger, ["7"], 10.0, 12.0) == 0.5
