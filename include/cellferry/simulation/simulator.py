"""Simulates cohorts on machines, and says how long each takes and what holds it up."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cellferry.simulation.cohorts import Cohort, Machines, Scenario, Subject, draw
from cellferry.simulation.engine import Done, Lane, Outcome, Simulation, Steps, Together
from cellferry.simulation.lanes import CORES, Fleet
from cellferry.simulation.rates import Rates

SHOWN_STAGES = ("plan", "copy", "sync", "verify", "cutover", "soak")


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the simulation of one cohort on some machines found. Times in seconds.

    Attributes:
        moved_s: from its first plan to its last cutover and soak.
        over_s: to the end of its last clean-up.
        per_hour: organizations an hour, over `moved_s`.
        median_s, longest_s: from an organization's plan to its cutover.
        pause_s: the longest write pause that is predicted.
        at_once: organizations under way at most, between the start of plan and the end of cutover.
        held_up_by: shares of `moved_s` in which each thing was what everybody waited for.
        busy: share of the workers' cores that was used, over `moved_s`.
        given_up: organizations that change faster than rounds follow.
        stages: organizations in each step on average, over equal parts of `moved_s`.
    """

    machines: str
    cohort: str
    organizations: int
    rows: float
    moved_s: float
    over_s: float
    per_hour: float
    median_s: float
    longest_s: float
    pause_s: float
    at_once: int
    held_up_by: Mapping[str, float]
    busy: float
    given_up: int
    stages: Mapping[str, Sequence[float]]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return asdict(self)


def forecast(
    scenario: Scenario, rates: Rates, *, together: bool = False, parts: int = 48
) -> list[Forecast]:
    """Simulate every cohort on all machines of the scenario.

    Args:
        scenario: who and on what.
        rates: what steps cost.
        together: all cohorts in one simulation, each begun when those that it comes `after` are
            over; otherwise each by itself.
        parts: into how many parts of time `stages` is divided.
    """
    found = []
    for machines in scenario.machines:
        groups = [list(scenario.cohorts)] if together else [[one] for one in scenario.cohorts]
        for cohorts in groups:
            subjects = {one.name: list(draw(one, scenario.seed)) for one in cohorts}
            fleet = Fleet(machines, scenario.cells, rates)
            outcome = run(fleet, cohorts, subjects)
            found += [
                _summarize(fleet, outcome, machines, one, subjects[one.name], parts)
                for one in cohorts
            ]
    return found


def run(
    fleet: Fleet, cohorts: Sequence[Cohort], subjects: Mapping[str, Sequence[Subject]]
) -> Outcome:
    """Simulate cohorts on a fleet, in one simulation."""
    simulation = Simulation(fleet.servers, fleet.limits)
    return simulation.run([Lane("all", _in_order(fleet, cohorts, subjects))])


def _in_order(
    fleet: Fleet, cohorts: Sequence[Cohort], subjects: Mapping[str, Sequence[Subject]]
) -> Steps:
    ranks: dict[str, int] = {}
    for one in cohorts:
        ranks[one.name] = max((ranks[name] + 1 for name in one.after if name in ranks), default=0)
    for rank in range(max(ranks.values()) + 1):
        yield Together(
            [
                lane
                for one in cohorts
                if ranks[one.name] == rank
                for lane in fleet.runs(subjects[one.name])
            ]
        )


def _summarize(
    fleet: Fleet,
    outcome: Outcome,
    machines: Machines,
    cohort: Cohort,
    subjects: Sequence[Subject],
    parts: int,
) -> Forecast:
    names = {one.name for one in subjects}
    done = [one for one in outcome.done if one.lane in names]
    planned = {one.lane: one.started for one in done if one.stage == "plan"}
    flipped = {one.lane: one.ended for one in done if one.stage == "cutover"}
    took = [flipped[name] - planned[name] for name in flipped]
    began = min(planned.values())
    moved = max((one.ended for one in done if one.stage in SHOWN_STAGES), default=began)
    over = max(one.ended for one in done)
    given_up = [name for name in fleet.given_up if name in names]
    changes = [(planned[name], 1) for name in planned]
    changes += [(flipped[name], -1) for name in flipped]
    at_once = most = 0
    for _, change in sorted(changes):
        at_once += change
        most = max(most, at_once)
    moved_s = moved - began
    spent = _cores_used(fleet, outcome, began, moved)
    return Forecast(
        machines=machines.name,
        cohort=cohort.name,
        organizations=cohort.count,
        rows=sum(one.rows for one in subjects),
        moved_s=moved_s,
        over_s=over - began,
        per_hour=len(flipped) / moved_s * 3600 if moved_s else 0.0,
        median_s=statistics.median(took) if took else 0.0,
        longest_s=max(took, default=0.0),
        pause_s=max((fleet.pauses_s.get(name, 0.0) for name in names), default=0.0),
        at_once=most,
        held_up_by=outcome.binding(began, moved),
        busy=spent,
        given_up=len(given_up),
        stages=_averages(done, began, moved, parts),
    )


def _cores_used(fleet: Fleet, outcome: Outcome, began: float, ended: float) -> float:
    """Return the share of the workers' cores that was used between two moments."""
    if ended <= began:
        return 0.0
    return outcome.used(CORES, began, ended) / (fleet.servers[CORES] * (ended - began))


def _averages(
    done: Sequence[Done], began: float, ended: float, parts: int
) -> dict[str, list[float]]:
    found = {stage: [0.0] * parts for stage in SHOWN_STAGES}
    width = (ended - began) / parts
    if width <= 0:
        return found
    for one in done:
        if one.stage not in found:
            continue
        first = int((one.started - began) / width)
        last = min(int((one.ended - began) / width), parts - 1)
        for part in range(max(first, 0), last + 1):
            since, until = began + part * width, began + (part + 1) * width
            inside = min(one.ended, until) - max(one.started, since)
            found[one.stage][part] += max(0.0, inside) / width
    return found
