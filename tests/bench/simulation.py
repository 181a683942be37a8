"""How long cohorts take: `cellferry simulate` with measured rates, checked against a real run."""

from __future__ import annotations

import heapq
import json
import multiprocessing
import os
import random
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import psycopg
from psycopg import sql
from tests.bench import document
from tests.bench.harness import Bench, Meter, Section, Table, Target, pid_of
from tests.fault.world import deployment

from cellferry import settings
from cellferry.errors import TransientError
from cellferry.local.application import seeding
from cellferry.local.application.places import Place, places
from cellferry.local.application.provisioning import provision, provision_organizations
from cellferry.local.application.seeding import Seed
from cellferry.migration import Context, MoveOptions, steps
from cellferry.model import Actor, Organization
from cellferry.simulation import cohorts, rates, simulator
from cellferry.simulation.cohorts import AtOnce, Cell, Machines, Options, Subject
from cellferry.simulation.engine import Outcome
from cellferry.simulation.lanes import CORES, PRIORITIES, Fleet
from cellferry.simulation.rates import Cost, Rates, StageRates
from cellferry.simulation.report import held_up_by, span

SOURCE, DESTINATION = "cell-1", "cell-2"
CELLS = (SOURCE, DESTINATION)
ACTOR = Actor("bench", role="system")
SOAK_S, TTL_S = 1.0, 4.0
STAGES = ("plan", "copy", "sync", "verify", "cutover", "soak", "cleanup")
ROOT = Path(__file__).resolve().parents[2]
_PASSWORD = "bench"  # of servers that live for one run, on loopback

#: Rows and keys of organizations, as draws: most are small, some are not.
_ROWS = cohorts.Spread(median=600, p95=8_000, most=15_000)
_KEYS = cohorts.Spread(median=50, p95=800, most=2_000)
_LARGE = ((400_000, 2_000), (100_000, 20_000))
"""Rows and keys of two more, which say what a million of either costs; the others say the rest."""


# --- in the worker processes ------------------------------------------------------------------

_context: Context
_ATTEMPTS, _PAUSE_S = 4, 0.5


def _open(config: str, connections: Mapping[str, str]) -> None:
    """Be a worker: connect once, as a worker of the library does."""
    global _context
    loaded = settings.load(Path(config))
    _context = Context.from_settings(loaded, connections.get, actor=ACTOR).__enter__()


def _do(step: str, slug: str, migration: int | None, options: MoveOptions) -> tuple[int, float]:
    """Do one step, again when that may help; returns the migration, and the seconds it took."""
    began = time.perf_counter()
    for attempt in range(_ATTEMPTS):
        try:
            if step == "plan":
                found = steps.plan(_context, slug, DESTINATION, options=options, record=True)
                migration = found.migration
            else:
                getattr(steps, step)(_context, migration)
        except TransientError:
            if attempt + 1 == _ATTEMPTS:
                raise
            time.sleep(_PAUSE_S)
        else:
            break
    if migration is None:
        raise RuntimeError(f"plan recorded no migration of {slug}")
    return migration, time.perf_counter() - began


def _warm(_: int) -> int:
    time.sleep(0.3)
    return os.getpid()


# --- cells ------------------------------------------------------------------------------------


@dataclass
class Cells:
    """Two cells with many organizations in the first, and their topology."""

    bench: Bench
    connections: dict[str, str] = field(default_factory=dict)
    pids: dict[str, int] = field(default_factory=dict)
    places: Mapping[str, Place] = field(default_factory=dict)
    _next: int = 1001

    def start(self) -> None:
        """Start, provision and prepare everything."""
        home = self.bench.postgres("topology", {"shared_buffers": "64MB"})
        self.pids["topology"] = pid_of(home)
        self.connections["cellferry-topology"] = home.url()
        trees: dict[str, list[int]] = {}
        for cell in CELLS:
            postgres = self.bench.postgres(f"{cell}-postgres", {"shared_buffers": "128MB"})
            valkey = self.bench.valkey(f"{cell}-valkey")
            with psycopg.connect(postgres.url(), autocommit=True) as connection:
                connection.execute("CREATE DATABASE app")
                connection.execute(
                    sql.SQL("CREATE ROLE mover LOGIN PASSWORD {}").format(sql.Literal(_PASSWORD))
                )
            self.connections |= {
                f"{cell}-postgres-admin": postgres.url(dbname="app"),
                f"{cell}-postgres": postgres.url("mover", _PASSWORD, "app"),
                f"{cell}-redis": valkey.url(),
                f"{cell}-redis-admin": valkey.url(),
            }
            trees[cell] = [pid_of(postgres), pid_of(valkey)]
        for part, cell in (("source", SOURCE), ("destination", DESTINATION)):
            self.pids[part], self.pids[f"{part} redis"] = trees[cell]
        self.config.write_text(json.dumps(deployment()), encoding="utf-8")
        self.places = places(CELLS, self.connections.get, self.bench.root / "app")
        with self.context() as context:
            context.topology.install()
            for place in self.places.values():
                provision(place)
            for cell in CELLS:
                steps.prepare_cell(context, cell)

    @property
    def config(self) -> Path:
        return self.bench.root / "cells.yaml"

    @contextmanager
    def context(self) -> Iterator[Context]:
        loaded = settings.load(self.config)
        with Context.from_settings(loaded, self.connections.get, actor=ACTOR) as context:
            yield context

    def settle(self, seeds: Sequence[Seed]) -> list[Subject]:
        """Make organizations in the first cell; returns them as the simulator sees them."""
        for place in self.places.values():
            provision_organizations(place, [seed.organization.id for seed in seeds])
        made = seeding.seed_cell(self.places[SOURCE], seeds)
        with self.context() as context:
            context.topology.register_organizations(
                [(seed.organization, SOURCE) for seed in seeds], ACTOR
            )
        options = Options(soak_s=SOAK_S, ttl_s=TTL_S)
        return [
            Subject(
                seed.organization.slug, SOURCE, DESTINATION,
                made[seed.organization.id], seed.keys, 0.0, options,
            )
            for seed in seeds
        ]  # fmt: skip

    def draw(self, count: int, name: str) -> list[Seed]:
        """Draw organizations of mixed sizes, always the same."""
        chance = random.Random(f"bench {name}")
        found = []
        for _ in range(count):
            rows, keys = int(_ROWS.draw(chance)), int(_KEYS.draw(chance))
            found.append(self.seed(max(60, rows), max(12, keys)))
        return found

    def seed(self, rows: int, keys: int) -> Seed:
        """Return the next organization, with so many."""
        organization = Organization(str(self._next), f"org-{self._next}")
        self._next += 1
        return Seed(organization, SOURCE, rows, keys)

    def used(self) -> dict[str, float]:
        """Processor seconds so far, of the mover, both cells and the topology."""
        now = Meter(self.pids).now()
        return {
            "mover": now["client"],
            "source": now["source"] + now["source redis"],
            "destination": now["destination"] + now["destination redis"],
            "topology": now["topology"],
        }


# --- the real run -----------------------------------------------------------------------------


@dataclass
class Timeline:
    """What happened in a run: seconds since its beginning, by organization and step."""

    seconds: float = 0.0
    spans: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    migrations: dict[str, int] = field(default_factory=dict)


class Driver:
    """Moves organizations with worker processes under the limits that the simulator knows.

    The same order as the DAG and the simulator: waves are runs, a step goes to a worker when the
    limits allow, first what is nearest to its end, then who came first.
    """

    def __init__(
        self, pool: ProcessPoolExecutor, machines: Machines, say: Callable[[str], None]
    ) -> None:
        self._pool = pool
        self._say = say
        self._options = MoveOptions(strategy="online", soak_s=SOAK_S, ttl_s=TTL_S)
        self._slots = machines.slots
        self._runs = machines.runs_at_once
        self._wave = machines.wave
        self._at_once = {
            name: count
            for name, count in machines.at_once.model_dump(by_alias=True).items()
            if count is not None
        }

    def run(self, names: Sequence[str]) -> Timeline:
        """Move all of them, clean-up included."""
        self._line = Timeline()
        self._began = time.perf_counter()
        self._number = 0
        self._waiting: list[tuple[int, int, str, str]] = []
        self._timers: list[tuple[float, str]] = []
        self._under_way: dict[Future[tuple[int, float]], tuple[str, str, float]] = {}
        self._busy: Counter[str] = Counter()
        self._run_of: dict[str, int] = {}
        self._left: Counter[int] = Counter()
        waves = deque(
            names[start : start + self._wave] for start in range(0, len(names), self._wave)
        )
        number = 0
        while waves or self._waiting or self._timers or self._under_way:
            while waves and sum(1 for left in self._left.values() if left) < self._runs:
                number += 1
                wave = waves.popleft()
                self._left[number] = len(wave)
                for name in wave:
                    self._run_of[name] = number
                    self._ask(name, "plan")
            self._submit()
            self._wait()
        self._line.seconds = time.perf_counter() - self._began
        return self._line

    def _ask(self, name: str, stage: str) -> None:
        self._number += 1
        heapq.heappush(self._waiting, (-PRIORITIES[stage], self._number, name, stage))

    def _submit(self) -> None:
        kept = []
        while self._waiting and len(self._under_way) < self._slots:
            entry = heapq.heappop(self._waiting)
            _, _, name, stage = entry
            if self._busy[stage] >= self._at_once.get(stage, self._slots):
                kept.append(entry)
                continue
            self._busy[stage] += 1
            known = self._line.migrations.get(name)
            done = self._pool.submit(_do, stage, name, known, self._options)
            self._under_way[done] = name, stage, self._now()
        for entry in kept:
            heapq.heappush(self._waiting, entry)

    def _wait(self) -> None:
        timeout = max(0.0, self._timers[0][0] - self._now()) if self._timers else None
        if self._under_way:
            done = wait(self._under_way, timeout, return_when=FIRST_COMPLETED).done
        else:
            time.sleep(timeout or 0.0)
            done = set()
        for one in done:
            name, stage, started = self._under_way.pop(one)
            self._busy[stage] -= 1
            self._line.migrations[name], _ = one.result()
            self._line.spans[name, stage] = started, self._now()
            self._next(name, stage)
            if stage == "cleanup" and not sum(self._left.values()) % 25:
                over = sum(1 for one in self._line.spans if one[1] == stage)
                self._say(f"{over} organizations moved, {self._now():.0f} s")
        while self._timers and self._timers[0][0] <= self._now():
            self._ask(heapq.heappop(self._timers)[1], "cleanup")

    def _next(self, name: str, stage: str) -> None:
        if stage == "cleanup":
            self._left[self._run_of[name]] -= 1
        elif stage == "soak":
            flipped = self._line.spans[name, "cutover"][1]
            heapq.heappush(self._timers, (flipped + TTL_S, name))
        else:
            self._ask(name, STAGES[STAGES.index(stage) + 1])

    def _now(self) -> float:
        return time.perf_counter() - self._began


# --- rates ------------------------------------------------------------------------------------


def calibrate(
    cells: Cells, pool: ProcessPoolExecutor, subjects: Sequence[Subject]
) -> dict[str, StageRates]:
    """Move organizations one after the other and fit what each step costs to their sizes."""
    options = MoveOptions(strategy="online", soak_s=0, ttl_s=0)
    costs: dict[str, list[dict[str, float]]] = defaultdict(list)
    for subject in subjects:
        migration: int | None = None
        for stage in STAGES:
            before = cells.used()
            migration, seconds = pool.submit(_do, stage, subject.name, migration, options).result()
            after = cells.used()
            costs[stage].append(
                {"seconds": seconds, **{part: after[part] - before[part] for part in after}}
            )
    sizes = np.array([(1.0, one.rows / 1e6, one.keys / 1e6) for one in subjects])
    found = {}
    for stage in STAGES:
        fitted = {
            name: _fit(sizes, np.array([cost[name] for cost in costs[stage]]))
            for name in rates.COST_FIELDS
        }
        found[stage] = StageRates(
            **{
                of: Cost(**{name: fitted[name][index] for name in rates.COST_FIELDS})
                for index, of in enumerate(StageRates.model_fields)
            }
        )
    return found


def _fit(sizes: np.ndarray[Any, Any], costs: np.ndarray[Any, Any]) -> list[float]:
    """Return least squares without negative coefficients."""
    used = [0, 1, 2]
    while True:
        solved, *_ = np.linalg.lstsq(sizes[:, used], costs, rcond=None)
        if (solved >= 0).all() or len(used) == 1:
            break
        used.pop(int(np.argmin(solved)))
    found = [0.0, 0.0, 0.0]
    for index, value in zip(used, solved, strict=True):
        found[index] = max(0.0, float(value))
    return found


def scaled(stages: Mapping[str, StageRates], factors: Mapping[str, float]) -> dict[str, StageRates]:
    """Return rates with the processor seconds of each part times a factor."""

    def cost(one: Cost) -> Cost:
        return Cost(
            seconds=one.seconds, **{part: getattr(one, part) * factors[part] for part in factors}
        )

    return {
        stage: StageRates(**{of: cost(getattr(one, of)) for of in StageRates.model_fields})
        for stage, one in stages.items()
    }


def expected(stages: Mapping[str, StageRates], subjects: Sequence[Subject]) -> dict[str, float]:
    """Return the processor seconds by part that moves of these should take."""
    found = dict.fromkeys(rates.PARTS, 0.0)
    for subject in subjects:
        for stage in STAGES:
            cost = stages[stage].cost(subject.rows, subject.keys)
            for part in found:
                found[part] += getattr(cost, part)
    return found


def predict(
    subjects: Sequence[Subject], stages: Mapping[str, StageRates], machines: Machines
) -> Any:
    """Simulate exactly these organizations."""
    fleet = Fleet(machines, {cell: Cell() for cell in CELLS}, Rates(stages=stages))
    cohort = cohorts.Cohort(
        name="real", count=len(subjects), source=SOURCE, destinations=(DESTINATION,), rows=1
    )
    return simulator.run(fleet, [cohort], {"real": subjects})


# --- the section ------------------------------------------------------------------------------


def ratio(predicted: float, real: float) -> float:
    """Return how far apart they are, at least 1."""
    return max(predicted / real, real / predicted)


def run(bench: Bench) -> Section:
    """Measure rates, predict a real run, compare; then the cohorts of the requirements."""
    cells = Cells(bench)
    cells.start()
    cores = psutil.cpu_count() or 1
    wide = Machines(
        name="6 workers", cores=cores, slots=6, cells_here=True, airflow=False, runs_at_once=2,
        at_once=AtOnce(cutover=1),
    )  # fmt: skip
    narrow = wide.model_copy(
        update={"name": "2 workers, waves of 10, one after the other", "slots": 2, "wave": 10,
                "runs_at_once": 1}
    )  # fmt: skip
    groups = {
        "one after the other": [
            *cells.draw(bench.size(16, 6), "alone"),
            *(cells.seed(bench.size(rows, 60), bench.size(keys, 12)) for rows, keys in _LARGE),
        ],
        "busy": cells.draw(bench.size(24, 6), "busy"),
        wide.name: cells.draw(bench.size(104, 8), "wide"),
        narrow.name: cells.draw(bench.size(16, 4), "narrow"),
    }
    subjects = {}
    made = cells.settle([seed for group in groups.values() for seed in group])
    for name, group in groups.items():
        subjects[name], made = made[: len(group)], made[len(group) :]
    bench.say(f"{sum(map(len, groups.values()))} organizations are in {SOURCE}")
    spawned = multiprocessing.get_context("spawn")
    given = (str(cells.config), cells.connections)
    rows: list[list[Any]] = []
    with ProcessPoolExecutor(1, spawned, _open, given) as pool:
        list(pool.map(_warm, range(1)))
        alone = calibrate(cells, pool, subjects["one after the other"])
    bench.say("rates are measured, one organization after the other")
    with ProcessPoolExecutor(wide.slots, spawned, _open, given) as pool:
        list(pool.map(_warm, range(wide.slots)))
        before = cells.used()
        Driver(pool, wide, bench.say).run([one.name for one in subjects["busy"]])
        after = cells.used()
        wanted = expected(alone, subjects["busy"])
        factors = {
            part: (after[part] - before[part]) / wanted[part] if wanted[part] else 1.0
            for part in rates.PARTS
        }
        stages = scaled(alone, factors)
        bench.say(f"processors when busy, to alone: {_factors(factors)}")
        compared: dict[str, tuple[float, float]] = {}
        for machines in (wide, narrow):
            mine = subjects[machines.name]
            outcome = predict(mine, stages, machines)
            before = cells.used()
            line = Driver(pool, machines, bench.say).run([one.name for one in mine])
            spent = sum(cells.used().values()) - sum(before.values())
            compared[machines.name] = outcome.seconds, line.seconds
            rows.append(_compare(machines, mine, outcome, line, spent))
            bench.say(f"{machines.name}: {outcome.seconds:.1f} s simulated, {line.seconds:.1f} s")
    found = _forecasts(stages)
    real = len(subjects[wide.name])
    predicted, measured = compared[wide.name]
    return Section(
        title="Simulation",
        method=f"""`cellferry simulate` predicts how long cohorts take. Two real cells
        (PostgreSQL and Valkey each) and a topology on this machine hold small organizations of
        mixed sizes, and larger ones of
        {" and ".join(f"{bench.size(rows, 60):,}" for rows, _ in _LARGE)} rows. These and a part of
        the small ones are moved one after the other, and each step's seconds and
        processor seconds are fitted to rows and keys (least squares, nothing negative); a
        second part is moved by {wide.slots} worker processes at once, which says how much more
        processor time the same steps take on a busy machine. With these rates the simulator
        predicts how long the other {real} take, before they are moved by the same worker
        processes under the limits of the DAG (soak {SOAK_S:g} s, TTL {TTL_S:g} s, clean-up
        included); then others on fewer workers. Airflow has no part in it. The cohorts of the
        requirements follow, with the rates of this run, and those of other sections where they
        have been measured. *Held up by* is the share of the time in which a thing was full, or
        had the longest queue: *slots of the workers* are Airflow's, *schedulers* its
        schedulers' processors, *runs at once* the DAG's limit, *turns at the barrier* the
        cutovers that may be under way at once, *rows/s* and *moves at once in legacy* what the
        cell that all leave may be asked for; *own pace*: nothing was full, the steps took their
        time.""",
        tables=(
            Table(
                ("workers", "organizations", "rows", "simulated s", "real s", "ratio",
                 "CPU s simulated", "CPU s real", "busiest step at once: simulated", "real",
                 "held up by"),
                rows, "A real run and its simulation",
            ),
            Table(rates.ROW_HEADINGS, rates.to_rows(stages), rates.TABLE),
            _table(found),
        ),
        targets=(
            Target(
                f"Simulated to real duration of {real} organizations (or the inverse)", 1.25,
                ratio(predicted, measured),
                why=""
                if ratio(predicted, measured) <= 1.25
                else f"simulated {predicted:.0f} s, real {measured:.0f} s: the machine gave the "
                f"run other processor time than it gave the calibration ({_factors(factors)})",
            ),
        ),
        runs=1,
        remarks=(
            (
                f"On the busy machine the same steps used {_factors(factors)} times the processor "
                "seconds that they use alone; the table of rates includes that."
            ),
            *(f"Rates of {', '.join(names)}: {origin}." for origin, names in found[1].items()),
            (
                "Sizes of the requirements' organizations, cells and machines are assumptions of "
                "`include/cellferry/simulation/cohorts.yaml`; only the counts are given."
            ),
        ),
    )  # fmt: skip


def _factors(factors: Mapping[str, float]) -> str:
    return ", ".join(f"{part} {factor:.2f}" for part, factor in factors.items())


def _compare(
    machines: Machines, subjects: Sequence[Subject], outcome: Outcome, line: Timeline, spent: float
) -> list[Any]:
    return [
        machines.name,
        len(subjects),
        int(sum(one.rows for one in subjects)),
        outcome.seconds,
        line.seconds,
        ratio(outcome.seconds, line.seconds),
        outcome.work[CORES],
        spent,
        _busiest({(one.lane, one.stage): (one.started, one.ended) for one in outcome.done}),
        _busiest(line.spans),
        held_up_by(outcome.binding()),
    ]


def _busiest(spans: Mapping[tuple[str, str], tuple[float, float]]) -> str:
    """Return the step that took most time of all organizations together, and its share of them."""
    total: dict[str, float] = defaultdict(float)
    for (_, stage), (started, ended) in spans.items():
        if stage in STAGES and stage != "soak":
            total[stage] += ended - started
    stage = max(total, key=lambda name: total[name])
    return f"{stage} {total[stage] / sum(total.values()):.0%}"


def _forecasts(stages: Mapping[str, StageRates]) -> tuple[list[Any], dict[str, list[str]], Any]:
    """Simulate the cohorts of the requirements with these rates and what others have measured."""
    scenario = cohorts.load(None)
    own = Rates(stages=stages, origins=dict.fromkeys(stages, "measured in this run"))
    used = own.over(rates.measured(document.FOLDER)).over(rates.defaults())
    used = rates.refined(used, document.FOLDER)
    origins: dict[str, list[str]] = {}
    for name, origin in used.origins.items():
        origins.setdefault(origin, []).append(name)
    return simulator.forecast(scenario, used), origins, scenario


def _table(found: tuple[list[Any], dict[str, list[str]], Any]) -> Table:
    forecasts, _, scenario = found
    names = {one.name: one.what for one in scenario.cohorts}
    return Table(
        ("machines", "cohort", "organizations", "million rows", "moved in", "with clean-up",
         "organizations/h", "one takes", "the longest", "at once", "cores used", "held up by"),
        [
            (
                one.machines, f"{one.cohort}: {names[one.cohort]}", one.organizations,
                one.rows / 1e6, span(one.moved_s), span(one.over_s), one.per_hour,
                span(one.median_s), span(one.longest_s), one.at_once, f"{one.busy:.0%}",
                held_up_by(one.held_up_by),
            )
            for one in forecasts
        ],
        "The cohorts of the requirements, each by itself, simulated",
    )  # fmt: skip
