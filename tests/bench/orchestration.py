"""Organizations per hour through Airflow, and where the processor time goes.

A whole local fleet, with Airflow as `make demo` starts it, moves small organizations around its
cells: one run, several runs, and before, while and after a thousand wait for their TTL. Beside it
the library alone, in a few processes, moves the same organizations by the same steps, and the same
Airflow alone does as many tasks that do nothing as there are steps.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import psutil
import psycopg
from tests.bench.harness import Bench, Section, Table, Target

from cellferry import settings
from cellferry.local.airflow_api import ENDED, AirflowApi
from cellferry.local.application import Application, seeding
from cellferry.local.application.seeding import Seed
from cellferry.local.fleet import Fleet
from cellferry.local.run_records import RunRecords
from cellferry.migration import Context, MoveOptions, steps
from cellferry.model import Actor, Organization, State

ROOT = Path(__file__).resolve().parents[2]
DAG, CLEAN_UP = "migrate_organizations", "clean_up_organizations"
EMPTY = "empty_tasks"
"""The DAG beside this file: a task that does nothing for each step of each organization."""
EMPTY_TASKS = 8
ACTOR = Actor("bench", role="operator")
CELLS = ("cell-1", "cell-2", "cell-3")
ROWS, KEYS = 40, 12
RUNS, SIZE = 8, 25
FEW, SMALL = 4, 10
WAITING = 1_000
WAITING_ROWS, WAITING_KEYS = 10, 2
"""Of each organization that waits for its TTL: no step of what is measured reads them."""
#: A wave counts when at least this share of it was moved.
ENOUGH = 0.95
SOAK_S = 2
ALONE_AT_ONCE = 6
"""Processes of the library alone: enough that some work while others wait for a soak."""
WITHIN_S = 1_800

#: Where processor time goes, in the order of the table.
SCHEDULER, SUPERVISION, TASKS = "scheduler", "LocalExecutor: supervision of tasks", "tasks"
API, TRIGGERER, PARSER = "API server", "triggerer", "DAG processor"
METADATA, CELL_POSTGRES, CELL_REDIS = (
    "PostgreSQL: topology, metadata",
    "PostgreSQL: cells",
    "Valkey",
)
REAPER, ALONE = "fleet: watch and reaper", "library"
_PARTS = {"airflow-api-server": API, "airflow-triggerer": TRIGGERER,
          "airflow-dag-processor": PARSER, "topology-postgres": METADATA}  # fmt: skip
_SERVERS = (METADATA, CELL_POSTGRES, CELL_REDIS)


@dataclass(frozen=True)
class Wave:
    """What one wave took.

    Attributes:
        processes: task processes that were started.
        strategies: those that plans chose.
        failed: organizations that were not moved; they do not count.
    """

    name: str
    organizations: int
    wall_s: float
    cpu_s: Mapping[str, float]
    processes: int = 0
    strategies: str = ""
    failed: int = 0

    @property
    def per_hour(self) -> float:
        """Organizations per hour."""
        return 3_600 * self.organizations / self.wall_s

    @property
    def cpu_each_s(self) -> float:
        """Processor seconds of everything, for each organization."""
        return sum(self.cpu_s.values()) / self.organizations

    def each_s(self, part: str) -> float:
        """Processor seconds of one part, for each organization."""
        return self.cpu_s.get(part, 0.0) / self.organizations


# --- processor time by component --------------------------------------------------------------


def _own(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _ended(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.children_user + times.children_system)


def _tree(process: psutil.Process) -> float:
    total = _own(process) + _ended(process)
    for child in process.children(recursive=True):
        with suppress(psutil.Error):
            total += _own(child) + _ended(child)
    return total


def processor_time(fleet: Fleet) -> dict[str, float]:
    """Return the processor seconds that each component of the fleet has used so far.

    The scheduler's children are LocalExecutor's workers, which live as long as it does and
    supervise; theirs are the tasks, whose time a worker inherits when they end.
    """
    found: dict[str, float] = {}
    for name, record in RunRecords(fleet.layout.run).read().items():
        process = record.identity.process()
        if process is None:
            continue
        if name == "airflow-scheduler":
            found[SCHEDULER] = _own(process)
            workers = process.children()
            found[SUPERVISION] = sum(_own(one) for one in workers)
            found[TASKS] = sum(_ended(one) for one in workers)
            for worker in workers:
                with suppress(psutil.Error):
                    found[TASKS] += sum(_tree(task) for task in worker.children())
        elif name == "supervisor":
            # everything else is a child of it that lives; its reaper's processes have ended
            found[REAPER] = _own(process) + _ended(process)
        else:
            part = _PARTS.get(name) or (CELL_REDIS if name.endswith("-redis") else CELL_POSTGRES)
            found[part] = found.get(part, 0.0) + _tree(process)
    return found


def _between(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    return {part: max(0.0, used - before.get(part, 0.0)) for part, used in after.items()}


# --- the fleet and its organizations ----------------------------------------------------------


@dataclass(frozen=True)
class _Took:
    """What runs took that were triggered together, and which of them failed."""

    wall_s: float
    cpu_s: Mapping[str, float]
    processes: int
    failed: Sequence[str]


@dataclass
class Place:
    """A running fleet with small organizations, and the ways to move them."""

    bench: Bench
    fleet: Fleet
    context: Context
    api: AirflowApi
    waiters: Sequence[str]
    """Organizations that no wave moves."""

    def organizations(self, cell: str) -> list[str]:
        """Return the ids of those that live in `cell` and are not on their way."""
        busy = {
            one.organization.id
            for one in self.context.topology.migrations()
            if one.state is not State.COMPLETED
        }
        routes = self.context.topology.routes()
        found = {one.organization for one in routes if one.cell == cell}
        return sorted(found - busy - set(self.waiters), key=int)

    def around(self, count: int) -> tuple[list[str], str]:
        """Return `count` organizations of the fullest cell, and the next cell."""
        homes = {cell: self.organizations(cell) for cell in CELLS}
        source = max(CELLS, key=lambda cell: len(homes[cell]))
        return homes[source][:count], CELLS[(CELLS.index(source) + 1) % len(CELLS)]

    def wave(self, name: str, runs: int, size: int) -> Wave:
        """Move `runs` times `size` organizations, all runs at once, old copies deleted, too."""
        movers, destination = self.around(runs * size)
        known = {one.id for one in self.context.topology.migrations()}
        requests = [
            {
                "organizations": movers[number * size : (number + 1) * size],
                "destination": destination,
                "dry_run": False,
                "soak_s": SOAK_S,
                "ttl_s": 0,
            }
            for number in range(runs)
        ]
        took = self._through(DAG, requests)
        for run in took.failed:
            self.bench.say(f"{run} failed: {self.api.log(DAG, run, 'report')}")
        moved = [one for one in self.context.topology.migrations() if one.id not in known]
        done = [one for one in moved if one.state is State.COMPLETED]
        if len(done) < ENOUGH * runs * size:
            raise RuntimeError(f"{name}: {len(done)} of {runs * size} organizations moved")
        strategies = sorted({str(one.strategy) for one in moved})
        found = Wave(
            name, len(done), took.wall_s, took.cpu_s, took.processes, ", ".join(strategies),
            runs * size - len(done),
        )  # fmt: skip
        self._say(found)
        return found

    def empty(self, runs: int, size: int) -> Wave:
        """Let Airflow do as many empty tasks as `runs` times `size` organizations have steps."""
        name = f"{EMPTY_TASKS} empty tasks each, {runs} runs of {size}"
        request = {"organizations": [str(number) for number in range(size)]}
        took = self._through(EMPTY, [request] * runs)
        if took.failed or took.processes < EMPTY_TASKS * runs * size:
            raise RuntimeError(f"{name}: {took.processes} processes, failed runs: {took.failed}")
        found = Wave(name, runs * size, took.wall_s, took.cpu_s, took.processes)
        self._say(found)
        return found

    def _through(self, dag: str, requests: Sequence[Mapping[str, Any]]) -> _Took:
        """Trigger a run for each request, all at once, and wait until they have ended."""
        before, began = processor_time(self.fleet), time.perf_counter()
        started = [self.api.trigger(dag, one) for one in requests]
        failed = self._wait(dag, started)
        wall_s, after = time.perf_counter() - began, processor_time(self.fleet)
        processes = sum(self._processes(dag, one) for one in started)
        return _Took(wall_s, _between(before, after), processes, failed)

    def _say(self, wave: Wave) -> None:
        self.bench.say(
            f"{wave.name}: {wave.per_hour:,.0f} organizations/h, {wave.cpu_each_s:.2f} CPU-s each"
        )

    def _processes(self, dag: str, run: str) -> int:
        """Return how many tasks of a run had a process; the API gives at most 100 at a time."""
        count, seen, total = 0, 0, 1
        while seen < total:
            answer = self.api._send(
                "GET", f"/api/v2/dags/{dag}/dagRuns/{run}/taskInstances?limit=100&offset={seen}"
            )
            found, total = answer["task_instances"], answer["total_entries"]
            count += sum(one.get("pid") is not None for one in found)
            seen += len(found) or total
        return count

    def _wait(self, dag: str, runs: Sequence[str]) -> list[str]:
        """Wait until all have ended; ask seldom, for the asking costs, too. Return who failed."""
        deadline = time.monotonic() + WITHIN_S
        left, failed = list(runs), []
        while left:
            if (state := self.api.run_state(dag, left[0])) in ENDED:
                run = left.pop(0)
                if state != "success":
                    failed.append(run)
            elif time.monotonic() > deadline:
                raise RuntimeError(f"run {left[0]} is {state} after {WITHIN_S} s")
            else:
                time.sleep(1)
        return failed

    def let_wait(self, organizations: Sequence[str]) -> tuple[list[int], list[str]]:
        """Move organizations without Airflow up to their TTL, and start their clean-up runs.

        Their old copies, gates and records are there, and their clean-up is due in a day. That is
        how the product waits for a TTL of more than an hour.

        Returns:
            The migrations that wait, and their runs.
        """
        with _movers(ALONE_AT_ONCE) as pool:
            jobs = [(one, CELLS[1], False) for one in organizations]
            numbers = list(pool.map(_move_alone, jobs, chunksize=4))
        waiting = {one.id for one in self.context.topology.migrations(states={State.RETAINED})}
        numbers = [one for one in numbers if one in waiting]
        due = (datetime.now(UTC) + timedelta(days=1)).isoformat()
        runs = {
            f"bench-{first}": numbers[first : first + SIZE]
            for first in range(0, len(numbers), SIZE)
        }
        for run, some in runs.items():
            self.api._send(
                "POST",
                f"/api/v2/dags/{CLEAN_UP}/dagRuns",
                json={
                    "dag_run_id": run,
                    "logical_date": None,
                    "run_after": due,
                    "conf": {"migrations": some},
                },
            )
        self.bench.say(f"{len(numbers)} organizations wait for their TTL in {len(runs)} runs")
        return numbers, list(runs)

    def end_waiting(self, migrations: Sequence[int], runs: Sequence[str]) -> None:
        """End the TTL of all that wait, and clean them up without Airflow."""
        for run in runs:
            self.api._send("DELETE", f"/api/v2/dags/{CLEAN_UP}/dagRuns/{run}")
        url = settings.from_environment()(self.fleet.layout.settings().topology.connection)
        assert url is not None
        with psycopg.connect(url) as connection:
            connection.execute(
                "UPDATE topology.migration SET ttl_until = now() WHERE id = ANY(%s)",
                (list(migrations),),
            )
        with _movers(ALONE_AT_ONCE) as pool:
            list(pool.map(_clean_up_alone, migrations, chunksize=4))
        self.bench.say(f"{len(migrations)} organizations were cleaned up")

    def alone(self, count: int, processes: int = ALONE_AT_ONCE) -> Wave:
        """Move `count` organizations by the same steps without Airflow."""
        movers, destination = self.around(count)
        with _movers(processes) as pool:
            workers = [psutil.Process(one) for one in pool._processes]
            before = {**processor_time(self.fleet), ALONE: sum(map(_own, workers))}
            began = time.perf_counter()
            jobs = [(one, destination, True) for one in movers]
            list(pool.map(_move_alone, jobs))
            wall_s = time.perf_counter() - began
            after = {**processor_time(self.fleet), ALONE: sum(map(_own, workers))}
        used = {
            part: spent
            for part, spent in _between(before, after).items()
            if part in (*_SERVERS, ALONE)
        }
        found = Wave(f"library alone, {processes} processes", len(movers), wall_s, used, processes)
        self._say(found)
        return found


@contextmanager
def _movers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Yield so many processes that have imported everything."""
    context = get_context("spawn")
    with ProcessPoolExecutor(count, context, _meet, (context.Barrier(count),)) as pool:
        list(pool.map(abs, range(count)))  # none has one before all are there
        yield pool


def _meet(barrier: Barrier) -> None:
    """Wait for the others; this module, and what it needs, has been imported by then."""
    barrier.wait(120)


def _move_alone(job: tuple[str, str, bool]) -> int:
    """Move one organization, from the plan to the soak or, if wanted, the clean-up."""
    organization, destination, is_cleaned_up = job
    loaded, connections = settings.load(settings.default_path()), settings.from_environment()
    with Context.from_settings(loaded, connections, actor=ACTOR) as context:
        options = MoveOptions(ttl_s=0, soak_s=SOAK_S)
        if not is_cleaned_up:
            options = MoveOptions(ttl_s=86_400, soak_s=0)
        planned = steps.plan(context, organization, destination, options=options, record=True)
        if planned.migration is None:
            raise RuntimeError(f"{organization} has no migration")
        for step in (steps.copy, steps.sync, steps.verify, steps.cutover, steps.soak):
            step(context, planned.migration)
        if is_cleaned_up:
            steps.cleanup(context, planned.migration)
        return planned.migration


def _clean_up_alone(migration: int) -> None:
    """Delete the copy that an organization left."""
    loaded, connections = settings.load(settings.default_path()), settings.from_environment()
    with Context.from_settings(loaded, connections, actor=ACTOR) as context:
        steps.cleanup(context, migration)


def _project(root: Path) -> Path:
    """Make a project in `root` that is this one and has the benchmark's DAG as well."""
    root.mkdir()
    for folder in ("include", "plugins"):
        (root / folder).symlink_to(ROOT / folder)
    shutil.copytree(ROOT / "dags", root / "dags", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(__file__).parent / "dags" / f"{EMPTY}.py", root / "dags")
    return root


@contextmanager
def _running(bench: Bench, organizations: int, waiting: int) -> Iterator[Place]:
    """Start the fleet, and seed organizations of a few rows; the last are to wait for a TTL."""
    fleet = Fleet(_project(bench.root / "project"), bench.root / "fleet")
    bench.stack.callback(fleet.wipe)
    fleet.up(airflow=False)
    before = dict(os.environ)
    os.environ.update(fleet.environment())
    try:
        loaded, connections = settings.load(settings.default_path()), settings.from_environment()
        with Context.from_settings(loaded, connections, actor=ACTOR) as context:
            context.topology.install()
            application = Application(
                connections, context.topology, directory=bench.root / "application"
            )
            application.provision()
            seeds = [
                Seed(Organization(str(101 + one), f"small-{one + 1}"), CELLS[0], ROWS, KEYS)
                for one in range(organizations)
            ] + [
                Seed(
                    Organization(str(100_001 + one), f"waiting-{one + 1}"), CELLS[0], WAITING_ROWS,
                    WAITING_KEYS,
                )
                for one in range(waiting)
            ]  # fmt: skip
            application._provision_organizations(seeds)
            seeding.seed(application.places, seeds)
            context.topology.register_organizations(
                [(one.organization, one.cell) for one in seeds], ACTOR
            )
            for cell in loaded.cells:
                steps.prepare_cell(context, cell)
            fleet.up(airflow=True)
            bench.say(f"the fleet is up, with {organizations + waiting} organizations")
            with AirflowApi(fleet.airflow_url, *fleet.airflow_credentials) as api:
                for dag in (DAG, CLEAN_UP, EMPTY):
                    api.wait_for_dag(dag)
                waiters = [one.organization.id for one in seeds[organizations:]]
                yield Place(bench, fleet, context, api, waiters)
    finally:
        os.environ.clear()
        os.environ.update(before)


# --- the section ------------------------------------------------------------------------------


def run(bench: Bench) -> Section:
    """Measure waves of several sizes, with and without others waiting, and the library alone."""
    size, small = bench.size(SIZE, least=2), bench.size(SMALL, least=2)
    runs, few = bench.size(RUNS, least=2), bench.size(FEW, least=2)
    first, waiting = 2, bench.size(WAITING, least=4)
    moving = first + small + size + few * small + 2 * size + runs * size
    with _running(bench, moving, waiting) as place:
        place.wave("warm-up", 1, first)
        waves = [
            place.wave(f"1 run of {small}", 1, small),
            place.wave(f"1 run of {size}", 1, size),
            place.wave(f"{few} runs of {small}", few, small),
            place.wave(f"2 runs of {size}, one request", 2, size),
            place.wave(f"{runs} runs of {size}", runs, size),
        ]
        full = waves[-1]
        empty = place.empty(runs, size)
        began = processor_time(place.fleet), time.perf_counter()
        time.sleep(bench.size(20, least=3))
        idle = sum(_between(began[0], processor_time(place.fleet)).values()) / (
            time.perf_counter() - began[1]
        )
        migrations, waiting_runs = place.let_wait(place.waiters)
        waiting = len(migrations)
        beside = place.wave(f"{runs} runs of {size}, {waiting:,} wait", runs, size)
        place.end_waiting(migrations, waiting_runs)
        again = place.wave(f"{runs} runs of {size}, none waits any more", runs, size)
        waves += [beside, again]
        without = (full.per_hour + again.per_hour) / 2
        alone = place.alone(bench.size(60, least=4))
    return Section(
        "Orchestration",
        _METHOD,
        [
            Table(
                ("", "organizations", "organizations/h", "wall s", "CPU-s each", "processes each"),
                [
                    [one.name, one.organizations, one.per_hour, one.wall_s, one.cpu_each_s,
                     one.processes / one.organizations if one is not alone else None]
                    for one in (*waves, empty, alone)
                ],
                "Organizations per hour",
            ),
            _where(full, beside, again, empty, alone),
        ],
        [
            Target(
                f"organizations per hour, {runs} runs of {size} on {os.cpu_count()} cores",
                2_000, full.per_hour, "organizations/h", at_least=True,
                why=_limit(full, empty, alone),
            ),
            Target(
                f"the same while {waiting:,} wait for their TTL, against without",
                0.95, beside.per_hour / without, at_least=True,
                why=f"processor time for each organization is {full.cpu_each_s:.2f} s before they"
                f" wait, {beside.cpu_each_s:.2f} s while they do and {again.cpu_each_s:.2f} s after"
                " they have been cleaned up; the target is against the mean of the waves before and"
                " after",
            ),
        ],
        [
            (
                f"The fleet without any run used {idle:.2f} CPU-s per second: Airflow's loops, a"
                " reaper in Airflow and one beside it."
            ),
            (
                f"The {waiting:,} organizations have been cut over: their old copies, of about"
                f" {WAITING_ROWS} rows and {WAITING_KEYS} keys, their gates and their records are"
                f" there. They wait as the product lets them: in {len(waiting_runs)} clean-up runs"
                " whose time is in the future. Airflow filters those in SQL, and no task of theirs"
                " is there before. Only a TTL of an hour or less is waited for by a deferred task."
            ),
            (
                f"A request for more than {SIZE} organizations becomes several runs, so there is no"
                f" run of {2 * size}."
            ),
            f"The strategy that the plan chose: {full.strategies}.",
            *(f"{one.name}: {one.failed} organizations failed." for one in waves if one.failed),
            *_bare(full, alone),
        ],
        runs=1,
    )  # fmt: skip


_METHOD = f"""
The local fleet (three cells with PostgreSQL and Valkey, the topology and Airflow 3.3.2 with
LocalExecutor, all on this machine) moves organizations of the sample application, of about {ROWS}
rows and {KEYS} keys, with DAG `{DAG}`, `soak_s` {SOAK_S} and `ttl_s` 0, so that each is
copied, verified, cut over, soaked and its old copy deleted. All runs of a line are triggered at
once; the time is from the first trigger to the end of the last run. Processor time is of all
processes of the fleet, so servers, both reapers and Airflow's own loops count. Nobody writes
meanwhile. The library alone does the same steps in {ALONE_AT_ONCE} processes that are warm already.
*Empty tasks* is the same Airflow with a mapped group of {EMPTY_TASKS} tasks in a row that do
nothing, as many as a move has steps, preloaded as the product's tasks are.
"""


def _where(full: Wave, beside: Wave, again: Wave, empty: Wave, alone: Wave) -> Table:
    parts = (TASKS, SUPERVISION, SCHEDULER, API, PARSER, TRIGGERER, METADATA, CELL_POSTGRES,
             CELL_REDIS, REAPER)  # fmt: skip
    rows: list[list[Any]] = [
        [part, full.each_s(part), full.each_s(part) / full.cpu_each_s, beside.each_s(part),
         again.each_s(part), empty.each_s(part),
         alone.each_s(ALONE if part == TASKS else part) or None]
        for part in parts
    ]  # fmt: skip
    rows.append(
        ["all", full.cpu_each_s, 1.0, beside.cpu_each_s, again.cpu_each_s, empty.cpu_each_s,
         alone.cpu_each_s]
    )  # fmt: skip
    return Table(
        (
            "part",
            "CPU-s for each organization",
            "share",
            beside.name,
            again.name,
            empty.name,
            alone.name,
        ),
        rows,
        f"Where the processor time goes: {full.name}",
    )


def _bare(full: Wave, alone: Wave) -> Iterator[str]:
    """Say what a task's process costs besides its steps."""
    each = full.processes / full.organizations
    over = full.each_s(TASKS) - alone.each_s(ALONE)
    yield (
        f"Each organization took {each:.2f} task processes. Their {full.each_s(TASKS):.2f} CPU-s"
        f" are {alone.each_s(ALONE):.2f} for the steps, as in the library alone, and {over:.2f} for"
        f" starts, DAG file, XCom and progress: {over / each:.2f} for a process. Beside that the"
        f" executor's supervision takes {full.each_s(SUPERVISION) / each:.2f}, the API server"
        f" {full.each_s(API) / each:.2f} and the scheduler {full.each_s(SCHEDULER) / each:.2f} for"
        " a process."
    )


def _limit(full: Wave, empty: Wave, alone: Wave) -> str:
    cores = os.cpu_count() or 1
    busy = full.cpu_each_s * full.per_hour / 3_600
    return (
        f"processor time: {full.cpu_each_s:.2f} CPU-s for each organization, of which the steps and"
        f" their servers take {alone.cpu_each_s:.2f} without Airflow, while {EMPTY_TASKS} tasks in"
        f" Airflow that do nothing take {empty.cpu_each_s:.2f}; at most"
        f" {3_600 * cores / full.cpu_each_s:,.0f} organizations/h on {cores} cores, and {busy:.1f}"
        " of them were busy"
    )
