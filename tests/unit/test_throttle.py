"""The token bucket of the mover."""

import sys
import time
from types import SimpleNamespace

import pytest

from cellferry.stores import throttle as module
from cellferry.stores.pace import Pace
from cellferry.stores.throttle import Throttle


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds; it goes on only while somebody sleeps."""
    now = [1_000.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    return now


def test_without_a_rate_nothing_waits() -> None:
    assert Throttle(None).take(10**9) == 0.0


@pytest.mark.parametrize(
    ("share", "rate", "piece"),
    [
        (1.0, None, sys.maxsize),
        (0.5, None, 500),
        (0.01, None, 100),
        (1.0, 500.0, 100),
        (1.0, 5.0, 20),
        (1.0, 0.1, 1),
        (1.0, 10_000.0, 200),
        (1.0, 1_000_000.0, 1_000),
        (0.05, 10_000.0, 100),
    ],
)
def test_who_shall_be_slow_works_in_small_pieces(
    share: float, rate: float | None, piece: int
) -> None:
    pace = Pace()
    pace.share = share
    assert Throttle(rate, pace=pace).piece(1_000, 100) == piece


def test_the_long_run_rate_is_kept() -> None:
    throttle = Throttle(1000.0, burst_s=0.0)
    started = time.monotonic()
    for _ in range(5):
        throttle.take(100)
    throttle.take(0)
    assert time.monotonic() - started >= 0.5


def test_a_batch_above_the_rate_passes_and_the_next_one_pays(clock: list[float]) -> None:
    throttle = Throttle(1000.0, burst_s=0.0)
    assert throttle.take(300) == 0.0
    assert throttle.take(1) == pytest.approx(0.3)
    assert clock == [pytest.approx(1_000.3)]


def test_a_stop_is_noticed_while_a_debt_is_paid(clock: list[float]) -> None:
    throttle = Throttle(1.0, burst_s=0.0)
    throttle.take(60)

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        throttle.take(1, while_waiting=stop)
    assert clock[0] < 1_005


def test_a_rate_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        Throttle(0)
