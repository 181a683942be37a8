"""What moves ask of machines and cells: organizations as lanes of tasks, waves as runs.

The same order, limits and priorities as the DAG `migrate_organizations`: waves of at most 25 are
runs, so many runs at once; each step is a task, but a small organization's steps share tasks; a
short TTL is waited for in the run, a longer one is left to a run of `clean_up_organizations`, one
at a time.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from cellferry.simulation.cohorts import Cell, Machines, Options, Subject
from cellferry.simulation.engine import Begin, Lane, Span, Steps, Task, Together, Wish
from cellferry.simulation.rates import Cost, Rates

CORES = "cores of the workers"
SLOTS = "slots of the workers"
SCHEDULERS = "schedulers"
RUNS = "runs at once"
BARRIERS = "turns at the barrier"
CLEAN_UP_RUNS = "clean-up runs at once"
WAIT = "wait_for_ttl"

#: What is nearer to its end goes first, and the cutover before everything, as in the DAG.
PRIORITIES = {
    name: number
    for number, name in enumerate(
        ("validate", "plan", "copy", "sync", "verify", "cutover", "soak", WAIT, "cleanup", "report")
    )
} | {"cutover": 20}

#: Rounds of one sync before it gives up, and what share of the pause budget is short enough.
MAX_ROUNDS = 50
SHARE_OF_BUDGET = 0.5
_MILLION = 1e6


@dataclass
class Fleet:
    """Machines, cells and rates, and the lanes that they give to organizations.

    Attributes:
        given_up: organizations that change faster than rounds follow.
        pauses_s: the write pause of each organization that was cut over, in seconds.
    """

    machines: Machines
    cells: Mapping[str, Cell]
    rates: Rates
    given_up: list[str] = field(default_factory=list)
    pauses_s: dict[str, float] = field(default_factory=dict)

    @property
    def servers(self) -> dict[str, float]:
        """Units a second of everything that shares itself."""
        found: dict[str, float] = {CORES: self.machines.workers * self.machines.cores}
        for name, cell in self.cells.items():
            for what, capacity in (
                ("cores", None if self.machines.cells_here else cell.cores),
                ("rows/s", cell.rows_per_s),
                ("keys/s", cell.keys_per_s),
            ):
                if capacity is not None:
                    found[f"{what} of {name}"] = capacity
        return found

    @property
    def limits(self) -> dict[str, int]:
        """How many of each thing may be at once."""
        found = {
            SLOTS: self.machines.workers * self.machines.slots,
            SCHEDULERS: self.machines.schedulers,
            RUNS: self.machines.runs_at_once,
            BARRIERS: self.machines.barriers,
            CLEAN_UP_RUNS: 1,
        }
        for name, count in self.machines.at_once.model_dump(by_alias=True).items():
            if count is not None:
                found[_at_once(name)] = count
        for name, cell in self.cells.items():
            if cell.moves_at_once is not None:
                found[_moves(name)] = cell.moves_at_once
        return found

    # --- runs --------------------------------------------------------------------------------

    def runs(self, subjects: Iterable[Subject]) -> Iterator[Lane]:
        """Yield a run for each wave."""
        left = iter(subjects)
        number = 0
        while wave := list(islice(left, self.machines.wave)):
            number += 1
            name = f"run {number} from {wave[0].name}"
            yield Lane(name, self._run(name, wave))

    def _run(self, name: str, wave: Sequence[Subject]) -> Steps:
        yield self._around("validate", takes=(RUNS, SLOTS), gives=(SLOTS,))
        later: list[Subject] = []
        yield Together([Lane(one.name, self.move(one, later)) for one in wave])
        if later:
            yield Begin(Lane(f"clean-up of {name}", self._clean_up_run(later)))
        yield self._around("report", takes=(SLOTS,), gives=(SLOTS, RUNS))

    def _clean_up_run(self, wave: Sequence[Subject]) -> Steps:
        yield Task(WAIT, max(one.options.ttl_s for one in wave))
        yield self._around("validate", takes=(CLEAN_UP_RUNS, SLOTS), gives=(SLOTS,))
        yield Together([Lane(one.name, self._clean_up(one)) for one in wave])
        yield self._around("report", takes=(SLOTS,), gives=(SLOTS, CLEAN_UP_RUNS))

    def _around(self, stage: str, takes: tuple[str, ...], gives: tuple[str, ...]) -> Task:
        seconds = self.rates.orchestration.run_s / 2 if self.machines.airflow else 0.0
        work = {CORES: seconds} if seconds else {}
        return Task(stage, seconds, work, takes, gives, PRIORITIES[stage])

    # --- one organization --------------------------------------------------------------------

    def move(self, subject: Subject, later: list[Subject]) -> Steps:
        """Take an organization from plan to retained, and to its clean-up if the TTL is short.

        Args:
            subject: the organization.
            later: gets it when its clean-up is left to a run of its own.
        """
        options, rows, keys = subject.options, subject.rows, subject.keys
        under_gate = options.strategy == "freeze-first"
        copied = (0.0, 0.0) if under_gate else (rows, keys)
        cells = (_moves(subject.source), _moves(subject.destination))
        # steps that are short are done in the task of the step before them
        small = self.machines.airflow and rows + keys <= self.machines.small
        task = "plan" if small else None
        cost = self._cost("plan", rows, keys)
        first = cells if small else ()  # who holds a slot must never wait for a cell
        yield from self._step("plan", subject, cost, takes_too=first, ends=not small)
        cost = self._cost("copy", *copied, options)
        first = () if small else cells
        span = yield from self._step(
            "copy", subject, cost, *copied, takes_too=first, within=task, ends=not small
        )
        changed = self._changed(subject, span.ended - span.started)
        if changed is None:
            self.given_up.append(subject.name)
            return
        cost = self._cost("sync", changed, 0)
        synced = yield from self._step("sync", subject, cost, changed, within=task, ends=not small)
        cost = self._cost("verify", *copied)
        verified = yield from self._step("verify", subject, cost, within=task)
        last = min(subject.changed_rows_per_s * (verified.ended - synced.ended), rows)
        cost, moved = self._cost("cutover", 0, 0), (last, 0.0)
        pause_s = cost.seconds
        if under_gate:
            moved = (rows, keys)
            everything = self._cost("copy", rows, keys, options).plus(
                self._cost("verify", rows, keys)
            )
            cost = cost.plus(everything)
            pause_s = cost.seconds
        else:
            cost = cost.plus(self.rates.of("sync").per_million_rows, last / _MILLION)
        self.pauses_s[subject.name] = pause_s
        soaks = self.machines.airflow and options.soak_s <= self.machines.short_soak_s
        flipped = yield from self._step(
            "cutover", subject, cost, *moved,
            takes_too=(BARRIERS,), gives_too=(BARRIERS, *cells), ends=not soaks,
        )  # fmt: skip
        soak = self._cost("soak", 0, 0).plus(Cost(seconds=options.soak_s))
        soaked = yield from self._step("soak", subject, soak, within="cutover" if soaks else None)
        if options.ttl_s > self.machines.wait_in_run_s:
            later.append(subject)
            return
        yield Task(WAIT, max(0.0, options.ttl_s - (soaked.ended - flipped.ended)))
        yield from self._clean_up(subject)

    def _clean_up(self, subject: Subject) -> Steps:
        rows, keys = subject.rows, subject.keys
        cost = self._cost("cleanup", rows, keys, subject.options)
        yield from self._step("cleanup", subject, cost, rows, keys, only_source=True)

    def _changed(self, subject: Subject, copy_s: float) -> float | None:
        """Return how many changed rows the rounds of sync bring; None if they never get short.

        Each round brings what changed during the one before (iterative pre-copy), the first one
        what changed during the copy.
        """
        rates, rows_per_s = self.rates.of("sync"), subject.changed_rows_per_s
        short_s = subject.options.pause_budget_ms / 1_000 * SHARE_OF_BUDGET
        total, window = 0.0, copy_s
        for _ in range(MAX_ROUNDS):
            dirty = min(rows_per_s * window, subject.rows)
            total += dirty
            window = max(
                rates.per_million_rows.seconds * dirty / _MILLION,
                dirty / (subject.options.rows_per_s or float("inf")),
            )
            if window <= short_s:
                return total
        return None

    def _cost(self, stage: str, rows: float, keys: float, throttle: Options | None = None) -> Cost:
        """Return what a step costs, not faster than the throttle lets it."""
        rates = self.rates.of(stage)
        cost = rates.cost(rows, keys)
        if throttle is None:
            return cost
        seconds = rates.fixed.seconds
        for count, own, bound in (
            (rows, rates.per_million_rows.seconds, throttle.rows_per_s),
            (keys, rates.per_million_keys.seconds, throttle.keys_per_s),
        ):
            seconds += max(count / _MILLION * own, count / bound if bound else 0.0)
        return cost.model_copy(update={"seconds": seconds})

    def _step(
        self,
        stage: str,
        subject: Subject,
        cost: Cost,
        rows: float = 0.0,
        keys: float = 0.0,
        *,
        takes_too: tuple[str, ...] = (),
        gives_too: tuple[str, ...] = (),
        only_source: bool = False,
        within: str | None = None,
        ends: bool = True,
    ) -> Generator[Wish, Span, Span]:
        """Be scheduled, then do the step; returns when it started and ended.

        Args:
            stage, subject, cost, rows, keys: what is done, to whom, for what.
            takes_too, gives_too: limits beside those of its task.
            only_source: it works in the source alone.
            within: the step in whose task it is done; None for a task of its own.
            ends: whether its task ends with it.
        """
        around = self.rates.orchestration
        priority = PRIORITIES[stage]
        begins = within is None
        airflow = self.machines.airflow and begins
        if airflow and around.latency_s:
            yield Task("latency", around.latency_s)
        if airflow and around.scheduler_s:
            work = {} if self.machines.scheduler_apart else {CORES: around.scheduler_s}
            yield Task("scheduling", around.scheduler_s, work, (SCHEDULERS,), priority=priority)
        worker_s = around.task_s if airflow else 0.0
        holds = (SLOTS, _at_once(within or stage))
        # a step is one process, and one session in each cell: none uses two cores
        seconds = worker_s + max(cost.seconds, cost.mover, cost.source, cost.destination)
        work = self._work(subject, cost, worker_s, rows, keys, only_source=only_source)
        span = yield Task(
            stage,
            seconds,
            work if seconds else {},  # what nobody measured costs nothing
            (*(holds if begins else ()), *takes_too),
            (*(holds if ends else ()), *gives_too),
            priority,
        )
        return span

    def _work(
        self,
        subject: Subject,
        cost: Cost,
        worker_s: float,
        rows: float,
        keys: float,
        *,
        only_source: bool,
    ) -> dict[str, float]:
        source, destination = subject.source, subject.destination
        work = {CORES: cost.mover + worker_s}
        if self.machines.cells_here:
            work[CORES] += cost.source + cost.destination + cost.topology
        else:
            work[f"cores of {source}"] = cost.source
            work[f"cores of {destination}"] = cost.destination
        for cell in (source,) if only_source else (source, destination):
            work[f"rows/s of {cell}"] = rows
            work[f"keys/s of {cell}"] = keys
        return {server: units for server, units in work.items() if units}


def _at_once(stage: str) -> str:
    return f"{stage} tasks at once"


def _moves(cell: str) -> str:
    return f"moves at once in {cell}"
