"""The throttle's rule: back off at once, recover slowly, share, never stop, forgive one sample."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellferry.migration.governor import (
    BLIND,
    FIRST,
    FLOOR,
    INCREASE,
    LAG_LIMIT_S,
    WINDOW,
    Act,
    Aim,
    Decision,
    Governor,
    p95,
)

EVERY_S = 0.1
TARGET_S = 0.010
GOOD_S = 0.004
BAD_S = 0.020


class Cell:
    """A governor with its own clock: each probe is one step of it."""

    def __init__(self, share: float = 1.0, *, slow_start: bool = False) -> None:
        self.now = 0.0
        self.governor = Governor("cell-2/postgres", EVERY_S, now=0.0)
        self.governor.aim = Aim(TARGET_S)
        if not slow_start:
            # as after a complaint long ago
            self.governor.share = 2 * share
            self.probe([BAD_S, BAD_S])
            assert self.governor.share == share

    @property
    def share(self) -> float:
        return self.governor.share

    def probe(self, latencies: Iterable[float]) -> list[Decision]:
        made = []
        for latency in latencies:
            self.now += EVERY_S
            made += self.governor.sample(latency, self.now)
        return made


def good(seconds: float) -> Iterator[float]:
    return itertools.repeat(GOOD_S, round(seconds / EVERY_S))


def test_two_slow_probes_halve_the_share_and_one_does_not() -> None:
    cell = Cell(0.8)
    list(good(3))
    cell.probe(good(0.5))

    assert cell.probe([BAD_S]) == []
    (decision,) = cell.probe([BAD_S])

    assert (decision.act, decision.before, decision.after) == (Act.SLOWED, 0.8, 0.4)
    assert decision.reason == "p95 20 ms > 10 ms"


def test_one_outlier_in_a_window_is_forgiven() -> None:
    cell = Cell(0.8)

    made = cell.probe([*good(2), 0.011, *good(2), 0.011, *good(2)])

    assert {one.act for one in made} == {Act.RECOVERED}


def test_what_was_measured_before_a_decrease_does_not_count_again() -> None:
    cell = Cell(0.8)
    cell.probe([BAD_S, BAD_S])

    assert cell.probe([BAD_S]) == []
    assert len(cell.probe([BAD_S])) == 1


def test_far_over_the_target_leaves_the_floor_only() -> None:
    cell = Cell(0.8)

    (decision,) = cell.probe([0.08, 0.08])

    assert decision.after == FLOOR


def test_one_probe_that_took_long_stands_for_those_it_kept_from_being_made() -> None:
    cell = Cell(0.8)

    (decision,) = cell.probe([3 * EVERY_S])

    assert decision.after == FLOOR


def test_a_probe_without_an_answer_counts_while_it_waits() -> None:
    cell = Cell(0.8)

    assert cell.governor.waiting(EVERY_S, cell.now) == []
    decisions = [
        one
        for age in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
        for one in cell.governor.waiting(age, cell.now + age)
    ]

    assert decisions[0].act is Act.SLOWED
    assert cell.share == FLOOR
    assert len(decisions) < 6, "at the floor there is nothing more to say"


def test_it_recovers_by_the_same_small_amount_each_second() -> None:
    cell = Cell(0.4)

    made = cell.probe(good(4.05))

    assert [one.act for one in made] == [Act.RECOVERED] * len(made)
    assert len(made) in (3, 4)
    for one in made:
        assert one.after - one.before == pytest.approx(INCREASE)


def test_it_recovers_more_slowly_than_it_backs_off() -> None:
    cell = Cell(1.0)
    down = 0
    while cell.share > 0.5:
        cell.probe([BAD_S])
        down += 1
    up = 0
    while cell.share < 1.0:
        cell.probe([GOOD_S])
        up += 1

    assert up > 20 * down


def test_below_the_target_but_not_easily_it_stays_as_it_is() -> None:
    cell = Cell(0.4)

    assert cell.probe([0.0095] * 100) == []


def test_it_begins_low_and_doubles_until_the_first_complaint() -> None:
    cell = Cell(slow_start=True)
    assert cell.share == FIRST

    made = cell.probe(good(2.2))
    assert [one.after for one in made] == pytest.approx([FIRST * 2, FIRST * 4])

    cell.probe([BAD_S, BAD_S])
    (later,) = cell.probe(good(1.1))
    assert later.after - later.before == pytest.approx(INCREASE)


def test_a_standby_that_falls_behind_counts_until_it_catches_up() -> None:
    cell = Cell(0.8)
    lag = LAG_LIMIT_S

    assert cell.governor.lagging(lag, cell.now) == []
    (first,) = cell.governor.lagging(lag + 5, cell.now)
    assert cell.governor.lagging(lag + 3, cell.now) == [], "it catches up"
    (second,) = cell.governor.lagging(lag + 4, cell.now)
    assert (first.after, second.after) == (0.4, 0.2)
    assert "standby is 15 s behind" in first.reason

    assert cell.probe(good(5)) == [], "nothing grows while it is behind"
    cell.governor.lagging(0.1, cell.now)
    assert cell.probe(good(5))


def test_a_dead_probe_halves_the_speed_once_and_is_no_reason_to_stop() -> None:
    cell = Cell(1.0)

    decisions = [one for _ in range(10) for one in cell.governor.fail("no answer", cell.now)]

    assert [one.act for one in decisions] == [Act.BLINDED]
    assert cell.share == BLIND
    assert "no answer" in decisions[0].reason
    assert [one.act for one in cell.probe([GOOD_S])] == [Act.SEEING]


def test_a_cell_that_can_never_be_asked_is_worked_at_half_speed() -> None:
    governor = Governor("cell-2/postgres", EVERY_S, now=0.0)

    governor.fail("no answer", 1.0)

    assert governor.share == BLIND


def test_a_newcomer_takes_its_part_and_the_others_give_it() -> None:
    old, new = Cell(0.6), Cell(slow_start=True)
    new.governor.share = 1.0

    (taken,) = new.governor.meet(2, 0.6, new.now)
    (given,) = old.governor.meet(2, None, old.now)

    assert (taken.act, given.act) == (Act.SHARED, Act.SHARED)
    assert new.share + old.share == pytest.approx(0.6)
    assert old.governor.meet(2, None, old.now) == [], "only once"


def test_movers_recover_together_as_slowly_as_one() -> None:
    alone, together = Cell(0.4), Cell(0.4)
    together.governor.meet(1, None, together.now)
    together.governor.movers = 4

    alone.probe(good(4.05))
    together.probe(good(4.05))

    assert (together.share - 0.4) * 4 == pytest.approx(alone.share - 0.4)


def test_movers_at_one_slow_cell_come_to_equal_shares() -> None:
    """Chiu and Jain: whatever they begin with."""
    cells = [Cell(1.0), Cell(0.1)]
    for cell in cells:
        cell.governor.movers = 2
    for _ in range(1000):
        latency = BAD_S if sum(cell.share for cell in cells) > 0.8 else GOOD_S
        for cell in cells:
            cell.probe([latency])

    assert cells[0].share == pytest.approx(cells[1].share, abs=0.15)


def test_an_aim_leaves_room_over_a_fast_cell() -> None:
    assert Aim.over(0.0002).target_s == pytest.approx(0.0002 + Aim.LEAST_ROOM_S)
    assert Aim.over(0.020).target_s == pytest.approx(0.020 * Aim.FACTOR)


def test_p95_is_the_nearest_rank() -> None:
    samples = [float(number) for number in range(1, 101)]

    assert p95(samples) == 95.0
    assert p95([5.0, 1.0], window=WINDOW) == 1.0
    assert p95([5.0], window=WINDOW) == 0.0, "19 good ones may come"


@given(
    st.lists(
        st.one_of(
            st.floats(0, 30),
            st.just("fail"),
            st.floats(0, 100).map(lambda lag: ("lag", lag)),
            st.floats(0, 100).map(lambda age: ("wait", age)),
            st.tuples(st.integers(0, 300), st.none() | st.floats(0, 300)),
        ),
        max_size=200,
    )
)
def test_whatever_comes_the_share_stays_between_the_floor_and_full_speed(
    events: list[object],
) -> None:
    governor = Governor("cell-1/redis", EVERY_S, now=0.0)
    governor.aim = Aim(TARGET_S)
    now = 0.0
    for event in events:
        now += EVERY_S
        before = governor.share
        if event == "fail":
            made = governor.fail("x", now)
        elif isinstance(event, float | int):
            made = governor.sample(event, now)
        elif isinstance(event, tuple) and event[0] == "lag":
            made = governor.lagging(event[1], now)
        elif isinstance(event, tuple) and event[0] == "wait":
            made = governor.waiting(event[1], now)
        else:
            assert isinstance(event, tuple)
            made = governor.meet(event[0], event[1], now)
        assert FLOOR <= governor.share <= 1.0
        told = [one for one in made if one.before != one.after]
        assert bool(told) == (governor.share != before), "every change is told"
