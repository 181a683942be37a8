"""A pace rests for what its share asks, tells its news, and costs nothing at full speed."""

from __future__ import annotations

import time
from typing import Any

import pytest

from cellferry.stores import pace as module
from cellferry.stores.pace import FULL_SPEED, Pace, Paced
from cellferry.stores.throttle import Throttle


class Clock:
    """Time that passes only when somebody works or sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.during_sleep: list[Any] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.during_sleep:
            self.during_sleep.pop(0)()


class Told:
    def __init__(self) -> None:
        self.reports: list[tuple[Any, ...]] = []
        self.checks = 0

    def report(self, *what: Any) -> None:
        self.reports.append(what)

    def check(self) -> None:
        self.checks += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def work(clock: Clock, pace: Pace, pieces: int, seconds: float) -> float:
    """Work in pieces and return the share of the time that was worked."""
    began = clock.now
    for _ in range(pieces):
        clock.now += seconds
        pace.breathe()
    return pieces * seconds / (clock.now - began)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("piece_s", [0.00001, 0.001, 0.1])
def test_the_long_run_share_is_exact(clock: Clock, share: float, piece_s: float) -> None:
    pace = Pace()
    pace.start()
    pace.share = share

    assert work(clock, pace, 5000, piece_s) == pytest.approx(share, rel=0.02)


def test_full_speed_never_sleeps(clock: Clock) -> None:
    pace = Pace()
    pace.start()

    assert work(clock, pace, 100, 1.0) == 1.0
    assert FULL_SPEED.breathe() == 0.0


def test_a_rest_ends_early_when_the_share_rises(clock: Clock) -> None:
    pace = Pace()
    pace.start()
    pace.share = 0.05
    clock.during_sleep = [lambda: setattr(pace, "share", 0.5)]
    clock.now += 0.2

    assert pace.breathe() == pytest.approx(0.2)


def test_a_rest_is_bounded_so_that_no_server_takes_us_for_dead(clock: Clock) -> None:
    pace = Pace()
    pace.start()
    pace.share = 0.05
    clock.now += 60

    assert pace.breathe() <= Pace.LONGEST_S + Pace.SLICE_S


def test_a_long_rest_asks_whether_to_stop(clock: Clock) -> None:
    told = Told()
    pace = Pace("postgres", told)
    pace.start()
    pace.share = 0.05
    clock.now += 0.1
    pace.breathe()

    assert told.checks > 10


def test_waiting_for_the_rate_is_no_work(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    from cellferry.stores import throttle

    monkeypatch.setattr(throttle, "time", clock)
    pace = Pace()
    slow = Throttle(100.0, burst_s=0.0, pace=pace)
    pace.start()
    pace.share = 0.5
    for _ in range(100):
        clock.now += 0.001
        slow.take(10)

    assert pace.rested_s == pytest.approx(0.1, rel=0.1)


def test_work_of_a_moment_begins_nothing_and_is_gentle(clock: Clock) -> None:
    begun: list[Pace] = []
    pace = Pace("postgres", None, begun.append)
    pace.start()
    piece_s = Pace.BEGIN_AFTER_S * Pace.UNSEEN / 10
    assert work(clock, pace, 9, piece_s) == pytest.approx(Pace.UNSEEN, rel=0.02)
    assert begun == []

    work(clock, pace, 3, piece_s)
    assert begun == [pace]


def test_news_are_told_once_by_the_one_who_works(clock: Clock) -> None:
    told = Told()
    pace = Pace("postgres", told)
    pace.share = 0.4
    pace.news = "slowed to 40% by cell-2/postgres: p95 18 ms > 10 ms"
    pace.breathe()
    pace.breathe()

    assert told.reports == [
        (
            "postgres", "pace", 40, None, "% of full speed",
            "slowed to 40% by cell-2/postgres: p95 18 ms > 10 ms",
        )
    ]  # fmt: skip


def test_pieces_of_work_shrink_with_the_share() -> None:
    pace = Pace()
    assert pace.size(50_000, 500) == 50_000
    pace.share = 0.1
    assert pace.size(50_000, 500) == 5_000
    pace.share = 0.001
    assert pace.size(50_000, 500) == 500
    assert pace.size(100, 500) == 100, "never more than was asked for"


def test_a_check_breathes(clock: Clock) -> None:
    told = Told()
    pace = Pace()
    pace.start()
    pace.share = 0.5
    clock.now += 0.05
    began = clock.now

    Paced(told, pace).check()

    assert clock.now - began == pytest.approx(0.05)
    assert told.checks == 1


def test_real_time_agrees() -> None:
    pace = Pace()
    pace.start()
    pace.share = 0.5
    until = time.monotonic() + 0.2
    while time.monotonic() < until:
        time.sleep(0.001)
        pace.breathe()

    assert pace.rested_s > 0.05
