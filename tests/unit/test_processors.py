"""What the host withholds of the processors is said as a share of what could have been used."""

from __future__ import annotations

from typing import NamedTuple

import psutil
import pytest

from cellferry.local.processors import withheld_share


class TimesElsewhere(NamedTuple):
    user: float
    nice: float
    system: float
    idle: float


class Times(NamedTuple):
    user: float
    nice: float
    system: float
    idle: float
    iowait: float
    irq: float
    softirq: float
    steal: float


def test_idle_time_is_not_withheld() -> None:
    before = Times(10, 0, 5, 100, 1, 0, 0, 3)
    after = Times(14, 1, 6, 200, 9, 0.5, 0.5, 5)
    # 4 + 1 + 1 + 0.5 + 0.5 seconds were used, 2 withheld; 108 nobody wanted
    assert withheld_share(before, after) == pytest.approx(2 / 9)


def test_nothing_is_withheld_where_nothing_ran() -> None:
    times = Times(10, 0, 5, 100, 1, 0, 0, 3)
    assert withheld_share(times, times) == 0


def test_a_system_that_does_not_say_withholds_nothing() -> None:
    assert withheld_share(TimesElsewhere(1, 0, 1, 5), TimesElsewhere(4, 0, 2, 9)) == 0


def test_it_takes_what_this_machine_says() -> None:
    assert 0 <= withheld_share(psutil.cpu_times(), psutil.cpu_times()) <= 1
