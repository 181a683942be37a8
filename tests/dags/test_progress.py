"""Progress is said in words, often enough, and never in the step's way."""

from __future__ import annotations

import time

import pytest

from cellferry.migration import ProgressEvent
from cellferry.orchestration.progress import STATE_KEY, ProgressBoard, describe, duration


def event(done: int, total: int | None = 300_000, phase: str = "copy") -> ProgressEvent:
    return ProgressEvent("acme", "postgres", phase, done, total, "rows")


def test_rate_and_time_left_are_said() -> None:
    assert (
        describe(event(120_000), event(0), 2.0)
        == "copy 120,000 of 300,000 rows (40%), 60,000 rows/s, 3 s left"
    )


def test_an_unknown_total_gives_no_time_left() -> None:
    assert describe(event(7, None), event(0, None), 2.0) == "copy 7 rows, 4 rows/s"


def test_a_resumed_copy_counts_only_its_own_rate() -> None:
    assert "10,000 rows/s" in describe(event(220_000), event(200_000), 2.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3 s"), (600, "10 min"), (9_000, "2.5 h"), (604_800, "7.0 days")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_latest_report_is_remembered_while_the_step_runs() -> None:
    seen: dict[str, dict[str, str]] = {}
    with ProgressBoard(seen.__setitem__, every_s=0.02) as board:
        board(event(150_000))
        deadline = time.monotonic() + 60
        while not seen and time.monotonic() < deadline:
            time.sleep(0.01)
        assert seen[STATE_KEY]["postgres"].startswith("copy 150,000 of 300,000")


def test_the_last_report_is_not_lost() -> None:
    seen: dict[str, dict[str, str]] = {}
    with ProgressBoard(seen.__setitem__, every_s=60) as board:
        board(event(0))
        board(event(300_000))
    assert seen[STATE_KEY]["postgres"].startswith("copy 300,000 of 300,000")


def test_a_store_that_fails_does_not_fail_the_step() -> None:
    def refuse(_key: str, _value: object) -> None:
        raise ConnectionError("the API server is away")

    with ProgressBoard(refuse, every_s=60) as board:
        board(event(1))
