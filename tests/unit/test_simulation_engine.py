"""The simulator's engine: small cases by hand, and what holds for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellferry.simulation.engine import (
    OWN_PACE,
    Begin,
    Lane,
    Outcome,
    Simulation,
    Steps,
    Task,
    Together,
    share,
)

NEAR = 1e-6


def lane(*tasks: Task, name: str = "lane") -> Lane:
    def steps() -> Steps:
        for task in tasks:  # noqa: UP028 - a tuple takes no answers
            yield task

    return Lane(name, steps())


def simulate(
    lanes: Sequence[Lane],
    servers: dict[str, float] | None = None,
    limits: dict[str, int] | None = None,
) -> Outcome:
    return Simulation(servers or {}, limits or {}).run(lanes)


def ends(outcome: Outcome) -> dict[str, float]:
    return {one.lane: one.ended for one in outcome.done}


# --- by hand ----------------------------------------------------------------------------------


def test_a_lane_alone_takes_the_sum_of_its_tasks() -> None:
    outcome = simulate([lane(Task("a", 2), Task("b", 3), Task("c", 0))])
    assert outcome.seconds == 5
    assert (outcome.bound_s, outcome.bound_by) == (5, "one lane")
    assert outcome.binding() == {OWN_PACE: 1.0}


def test_a_queue_for_one_place_is_served_in_order() -> None:
    """D/D/1: the n-th of tasks of 2 s ends after 2n seconds."""
    outcome = simulate(
        [lane(Task("a", 2, takes=("one",)), name=f"{n}") for n in range(5)], limits={"one": 1}
    )
    assert ends(outcome) == {f"{n}": 2 * (n + 1) for n in range(5)}
    assert outcome.bound_by == "one"
    assert outcome.peaks == {"one": 1}


def test_a_queue_for_c_places_goes_in_batches() -> None:
    """D/D/c, all there at once: 7 tasks of 3 s at 2 places take 4 batches."""
    lanes = [lane(Task("a", 3, takes=("two",)), name=f"{n}") for n in range(7)]
    assert simulate(lanes, limits={"two": 2}).seconds == 12


def test_one_server_is_shared_evenly() -> None:
    """M/D/1-PS in a transient: n equal tasks of 1 s and 1 unit at 1 unit/s all end after n s."""
    lanes = [lane(Task("a", 1, {"cpu": 1}), name=f"{n}") for n in range(4)]
    outcome = simulate(lanes, {"cpu": 1})
    assert ends(outcome) == pytest.approx({f"{n}": 4.0 for n in range(4)})
    assert outcome.binding() == {"cpu": 1.0}


def test_a_shorter_task_leaves_its_share_to_the_others() -> None:
    """Two on one core: 1 s and 2 s of work. Both at half speed until 2 s, then the other alone."""
    lanes = [
        lane(Task("a", 1, {"cpu": 1}), name="short"),
        lane(Task("a", 2, {"cpu": 2}), name="long"),
    ]
    assert ends(simulate(lanes, {"cpu": 1})) == pytest.approx({"short": 2.0, "long": 3.0})


def test_a_task_that_hardly_asks_is_not_slowed_by_another_server() -> None:
    """Three at a cell of 2 rows/s, and one that only needs the processor."""
    lanes = [lane(Task("copy", 1, {"rows": 1, "cpu": 0.1}), name=f"{n}") for n in range(4)]
    lanes.append(lane(Task("plan", 1, {"cpu": 0.5}), name="plan"))
    found = ends(simulate(lanes, {"rows": 2, "cpu": 1}))
    assert found["plan"] == pytest.approx(1.0)
    assert found["0"] == pytest.approx(2.0)


def test_what_one_server_holds_back_another_gives_to_others() -> None:
    """A is held to half its speed by its cell; B gets the processor that A cannot use."""
    speeds, limits = share([{"cpu": 1.0, "cell": 1.0}, {"cpu": 1.0}], {"cpu": 1.25, "cell": 0.5})
    assert speeds == pytest.approx([0.5, 0.75])
    assert limits == ["cell", "cpu"]


def test_the_nearer_to_its_end_goes_first() -> None:
    takes = ("one",)
    lanes = [
        lane(Task("x", 1, takes=takes), name="first"),
        lane(Task("x", 1, takes=takes), name="second"),
        lane(Task("x", 1, takes=takes, priority=9), name="urgent"),
    ]
    order = [one.lane for one in simulate(lanes, limits={"one": 1}).done]
    assert order == ["urgent", "first", "second"]


def test_a_limit_may_be_held_over_several_tasks() -> None:
    def move() -> Steps:
        yield Task("copy", 1, takes=("cell", "slot"), gives=("slot",))
        yield Task("cutover", 1, takes=("slot",), gives=("slot", "cell"))

    lanes = [Lane(f"{n}", move()) for n in range(3)]
    outcome = simulate(lanes, limits={"cell": 1, "slot": 5})
    assert ends(outcome) == {"0": 2, "1": 4, "2": 6}
    assert outcome.binding(0, 4) == {"cell": 1.0}


def test_what_a_lane_holds_at_its_end_is_free_again() -> None:
    lanes = [lane(Task("copy", 1, takes=("cell",), gives=()), name=f"{n}") for n in range(2)]
    assert simulate(lanes, limits={"cell": 1}).seconds == 2


def test_a_lane_waits_for_its_own_and_not_for_what_it_begins() -> None:
    seen = []

    def run() -> Steps:
        span = yield Together([lane(Task("a", 2)), lane(Task("a", 3)), lane()])
        seen.append(span.ended)
        yield Begin(lane(Task("later", 10), name="later"))
        span = yield Task("report", 1)
        seen.append(span.ended)
        span = yield Together([])
        seen.append(span.ended)

    assert simulate([Lane("run", run())]).seconds == 13
    assert seen == [3, 4, 4]


def test_a_lane_hears_when_its_task_really_started() -> None:
    spans = []

    def waits() -> Steps:
        span = yield Task("b", 2, takes=("one",))
        spans.append(span)

    simulate([lane(Task("a", 5, takes=("one",))), Lane("w", waits())], limits={"one": 1})
    assert spans == [(5, 7)]


def test_work_without_time_is_refused() -> None:
    with pytest.raises(ValueError, match="has work and takes 0"):
        simulate([lane(Task("a", 0, {"cpu": 1}))], {"cpu": 1})
    with pytest.raises(ValueError, match="must be positive"):
        Simulation({"cpu": 0}, {})


# --- for all of them --------------------------------------------------------------------------

_numbers = st.floats(0.01, 20).map(lambda one: round(one, 3))
_works = st.dictionaries(st.sampled_from(["cpu", "cell"]), _numbers, max_size=2)
_takes = st.sampled_from([(), ("slot",), ("slot", "copy")])
_tasks = st.builds(Task, st.just("a"), _numbers, _works, _takes, st.none(), st.integers(0, 3))
_chains = st.lists(st.lists(_tasks, min_size=1, max_size=5), min_size=1, max_size=8)
_servers = st.fixed_dictionaries({"cpu": st.floats(0.1, 30), "cell": st.floats(0.1, 30)})
_limits = st.fixed_dictionaries({"slot": st.integers(1, 6), "copy": st.integers(1, 3)})
every = settings(max_examples=120, deadline=None)


def lanes_of(chains: Sequence[Sequence[Task]]) -> list[Lane]:
    return [lane(*tasks, name=f"{number}") for number, tasks in enumerate(chains)]


@every
@given(_chains, _servers, _limits)
def test_all_work_is_done_and_no_schedule_beats_the_bound(
    chains: list[list[Task]], servers: dict[str, float], limits: dict[str, int]
) -> None:
    outcome = simulate(lanes_of(chains), servers, limits)
    tasks = [task for chain in chains for task in chain]
    assert len(outcome.done) == len(tasks)
    for server, capacity in servers.items():
        total = sum(task.work.get(server, 0) for task in tasks)
        assert outcome.work.get(server, 0) == pytest.approx(total)
        assert outcome.seconds >= total / capacity * (1 - NEAR)
    for name, count in limits.items():
        held = sum(task.seconds for task in tasks if name in task.takes)
        assert outcome.seconds >= held / count * (1 - NEAR)
        assert outcome.peaks.get(name, 0) <= count
    longest = max(sum(task.seconds for task in chain) for chain in chains)
    assert outcome.seconds >= longest * (1 - NEAR)
    assert outcome.seconds >= outcome.bound_s * (1 - NEAR)
    assert sum(outcome.binding().values()) == pytest.approx(1.0)


@every
@given(_chains, _servers, _limits)
def test_no_task_is_faster_than_alone_and_lanes_keep_their_order(
    chains: list[list[Task]], servers: dict[str, float], limits: dict[str, int]
) -> None:
    outcome = simulate(lanes_of(chains), servers, limits)
    for number, chain in enumerate(chains):
        mine = [one for one in outcome.done if one.lane == f"{number}"]
        before = 0.0
        for done, task in zip(mine, chain, strict=True):
            assert done.asked == pytest.approx(before)
            assert done.started >= done.asked
            assert done.ended - done.started >= task.seconds * (1 - NEAR)
            before = done.ended


@every
@given(_chains, _servers, _limits)
def test_no_limit_is_exceeded_at_any_moment(
    chains: list[list[Task]], servers: dict[str, float], limits: dict[str, int]
) -> None:
    outcome = simulate(lanes_of(chains), servers, limits)
    places = {f"{number}": iter(chain) for number, chain in enumerate(chains)}
    changes = []
    for done in outcome.done:
        task = next(places[done.lane])
        for name in task.takes:
            changes += [(done.started, 1, name), (done.ended, -1, name)]
    held = dict.fromkeys(limits, 0)
    for _, change, name in sorted(changes):
        held[name] += change
        assert held[name] <= limits[name]


@every
@given(_chains, _servers, _limits)
def test_the_same_input_gives_the_same_output(
    chains: list[list[Task]], servers: dict[str, float], limits: dict[str, int]
) -> None:
    first, second = (simulate(lanes_of(chains), servers, limits) for _ in range(2))
    assert (first.seconds, first.done) == (second.seconds, second.done)


@every
@given(
    st.lists(_works, min_size=1, max_size=8),
    _servers,
)
def test_a_server_gives_all_it_has_or_nobody_wants_more(
    wants: list[dict[str, float]], servers: dict[str, float]
) -> None:
    """Max-min fairness: nobody can be faster without slowing one who is no faster."""
    speeds, limits = share(wants, servers)
    used = {
        name: sum(speed * want.get(name, 0) for speed, want in zip(speeds, wants, strict=True))
        for name in servers
    }
    for name, capacity in servers.items():
        assert used[name] <= capacity * (1 + NEAR)
    for speed, limit, want in zip(speeds, limits, wants, strict=True):
        assert 0 < speed <= 1
        if limit is None:
            assert speed == 1
            continue
        assert used[limit] == pytest.approx(servers[limit])
        there = [s for s, w in zip(speeds, wants, strict=True) if w.get(limit, 0) > 0]
        assert speed == pytest.approx(max(there))
        assert want[limit] > 0


@every
@given(
    st.lists(_numbers, min_size=1, max_size=12),
    st.integers(1, 5),
)
def test_a_further_place_never_makes_a_queue_longer(seconds: list[float], places: int) -> None:
    """True of independent tasks in a fixed order; of chains it is not (Graham's anomalies)."""

    def total(count: int) -> Outcome:
        chains = [[Task("a", one, takes=("slot",))] for one in seconds]
        return simulate(lanes_of(chains), limits={"slot": count})

    fewer, more = total(places), total(places + 1)
    assert more.seconds <= fewer.seconds * (1 + NEAR)
    # Graham 1966: a list schedule is at most so much longer than the best one
    assert fewer.seconds <= (2 - 1 / places) * fewer.bound_s * (1 + NEAR)


@every
@given(
    st.lists(st.tuples(_numbers, _numbers), min_size=1, max_size=10),
    st.floats(0.1, 20),
    st.floats(1, 3),
)
def test_a_larger_server_makes_nobody_later(
    tasks: list[tuple[float, float]], capacity: float, more: float
) -> None:
    def found(units: float) -> dict[str, float]:
        chains = [[Task("a", seconds, {"cpu": work})] for seconds, work in tasks]
        return ends(simulate(lanes_of(chains), {"cpu": units}))

    small, large = found(capacity), found(capacity * more)
    for name in small:
        assert large[name] <= small[name] * (1 + NEAR)
