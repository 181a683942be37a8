"""One scenario: a step meets a fault at a phase, somebody acts after it, and all is well again.

The migration goes to the step, the step stops at its phase, the fault strikes, and then comes the
aftermath: the step is run again, or the migration is aborted, or only the reaper acts. Then the
migration is driven to its end, the writers stop, and the checker compares the cells with what was
acknowledged.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.fault import reaper
from tests.fault.faults import FAULTS, Fault
from tests.fault.stepper import Ended, Silent, StepProcess
from tests.fault.world import CELLS, Cast, World, Writers, longest_gap

from cellferry.migration.barrier import HAND_OVER_FOR_S
from cellferry.model import BEFORE_FLIP, LIVE_STATES, Actor, Migration, State
from cellferry.phases import Phase
from cellferry.topology.audit import AuditEntry

#: How long an organization may be without a write when somebody acts at once, seconds: the
#: deadlines of the drain and of the freeze, and what a killed server takes to come back.
NOT_WRITABLE_S = 30.0
#: The same when only the reaper acts. A step that hangs says that it lives for as long as a
#: barrier may take: the drains, the freeze, the hand-over.
REAPED_S = 2 * 5.0 + 10.0 + HAND_OVER_FOR_S + reaper.EXPIRED_AFTER_S + reaper.PERIOD_S + 10.0
PERSON = Actor("the kill matrix's operator", role="person")
_STEP_S = 120.0
_KEEP_TRYING_S = 60.0
_OPTIONS: Mapping[str, Any] = {
    "batch_rows": 100,
    "soak_s": 0.0,
    # longer than a route may be old while its topology restarts
    "ttl_s": 4.0,
    "pause_budget_ms": 2_000,
    "drain_deadline_s": 5.0,
    "freeze_deadline_s": 10.0,
    "max_rounds": 200,
}


@dataclass(frozen=True)
class Point:
    """One row of the matrix: a phase, and the step that reaches it.

    Attributes:
        lead: steps that bring the migration there.
        nth: the pass through the phase that counts; a range is chosen from.
        give_up_at: where the step is made to give up, to reach phases of giving up.
        freeze_first: whether the strategy without a copy before the gate passes here, too.
    """

    phase: Phase
    step: str
    lead: tuple[str, ...]
    nth: range = range(1, 2)
    give_up_at: Phase | None = None
    before_flip: bool = False
    freeze_first: bool = True

    @property
    def name(self) -> str:
        """Unique; what `ONLY` names."""
        _, _, text = self.phase.partition(": ")
        return f"{self.step.replace('_', '-')}: {text}"


_COPIED = ("copy",)
_SYNCED = ("copy", "sync")
_READY = ("copy", "sync", "verify")
_MOVED = (*_READY, "cutover")
_SOAKED = (*_MOVED, "soak")
_BACK = (*_MOVED, "roll_back")

_BEFORE = (
    Phase.CAUGHT_UP,
    Phase.BARRIER_BEGUN,
    Phase.FROZEN_ONE,
    Phase.FROZEN_ALL,
    Phase.FINISHED,
)
_AFTER = (Phase.FLIPPED, Phase.HANDED_OVER_ONE, Phase.RELEASED, Phase.HAND_OVER_KEPT)


def _barrier(step: str, lead: tuple[str, ...], *, may_abort: bool) -> list[Point]:
    def gives_up(phase: Phase, nth: int) -> Point:
        # Each attempt begins with a thaw of what an earlier one may have left: two stores.
        at = Phase.FINISHED
        return Point(phase, step, lead, range(nth, nth + 1), at, may_abort)

    return [
        *(Point(phase, step, lead, before_flip=may_abort) for phase in _BEFORE),
        gives_up(Phase.UNDONE, 1),
        gives_up(Phase.THAWED_ONE, 3),
        *(Point(phase, step, lead) for phase in _AFTER),
    ]


POINTS: Sequence[Point] = (
    Point(Phase.COPY_ARMED, "copy", (), before_flip=True, freeze_first=False),
    Point(Phase.COPY_BATCH, "copy", (), range(1, 12), before_flip=True, freeze_first=False),
    Point(Phase.COPY_DONE, "copy", (), before_flip=True),
    Point(Phase.ROUND_APPLIED, "sync", _COPIED, before_flip=True, freeze_first=False),
    Point(Phase.ROUND_DONE, "sync", _COPIED, before_flip=True, freeze_first=False),
    Point(Phase.VERIFY_DONE, "verify", _SYNCED, before_flip=True),
    *_barrier("cutover", _READY, may_abort=True),
    Point(Phase.ABORTED, "abort", _READY),
    Point(Phase.ROUND_APPLIED, "soak", _MOVED),
    Point(Phase.SOAKED, "soak", _MOVED),
    Point(Phase.CLEANUP_BEGUN, "cleanup", _SOAKED),
    Point(Phase.CLEANUP_BATCH, "cleanup", _SOAKED, range(1, 6)),
    Point(Phase.CLEANUP_ONE, "cleanup", _SOAKED),
    Point(Phase.CLEANUP_ALL, "cleanup", _SOAKED),
    *_barrier("roll_back", _MOVED, may_abort=False),
    Point(Phase.CLEANUP_BATCH, "cleanup", _BACK, range(1, 6)),
)


@dataclass(frozen=True)
class Scenario:
    """One cell of the matrix, with one aftermath."""

    point: Point
    fault: Fault
    aftermath: str
    """`retry`, `abort` or `reap`."""
    seed: int

    @property
    def name(self) -> str:
        """What `ONLY` names."""
        back = " after roll-back" if "roll_back" in self.point.lead else ""
        return f"{self.point.name}{back}/{self.fault.name}/{self.aftermath}"

    @property
    def row(self) -> str:
        """The row of the table."""
        return self.name.split("/", maxsplit=1)[0]


@dataclass
class Outcome:
    """What became of a scenario. All is well when `faults` is empty."""

    name: str
    row: str
    fault: str
    aftermath: str
    seed: int
    faults: list[str] = field(default_factory=list)
    not_writable_s: float = 0.0
    neighbour_s: float = 0.0
    seconds: float = 0.0
    lost: int = 0
    doubled: int = 0
    left_behind: int = 0
    acknowledged: int = 0
    state: str = ""
    strategy: str = ""
    step_said: str = ""
    timeline: list[str] = field(default_factory=list)
    audit: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all is as it should be."""
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON; the audit only of what failed."""
        told = asdict(self)
        if self.ok:
            del told["audit"]
        return told


def scenarios(
    seed: int, *, points: Sequence[Point] = POINTS, faults: Sequence[Fault] = FAULTS
) -> list[Scenario]:
    """Return the whole matrix; `seed` only chooses what may be chosen within a scenario."""
    made = []
    for point in points:
        for fault in faults:
            aftermaths = ["retry"]
            if point.before_flip:
                aftermaths.append("abort")
            if fault.name in reaper.FAULTS:
                aftermaths.append("reap")
            made += [Scenario(point, fault, one, seed) for one in aftermaths]
    return made


def next_step(
    migration: Migration, live_resources: Callable[[], object], *, goes_back: bool
) -> str | None:
    """Return the step that brings a migration on, whatever state it was left in; None at its end.

    Args:
        live_resources: asked what it still has.
        goes_back: whether it shall be rolled back once the route is flipped.
    """
    match migration.state:
        case State.PLANNED | State.COPYING:
            return "copy"
        case State.SYNCING:
            is_synced = migration.facts.get("rounds") or migration.strategy == "freeze-first"
            return "verify" if is_synced else "sync"
        case State.READY | State.CUTTING_OVER:
            return "cutover"
        case State.SOAKING:
            if not migration.facts.get("handed_over"):
                return "cutover"
            return "roll_back" if goes_back else "soak"
        case State.RETAINED:
            return "roll_back" if goes_back else "cleanup"
        case State.ROLLING_BACK:
            return "roll_back"
        case State.ROLLED_BACK:
            if not migration.facts.get("handed_back"):
                return "roll_back"
            return "cleanup" if live_resources() else None
        case State.CLEANING:
            return "cleanup"
        case State.ABORTED:
            return "abort" if live_resources() else None
        case _:
            return None


class _Run:
    """One run of one scenario."""

    def __init__(self, world: World, scenario: Scenario) -> None:
        self.world = world
        self.scenario = scenario
        self.chance = random.Random(f"{scenario.seed} {scenario.name}")
        self.outcome = Outcome(
            scenario.name, scenario.row, scenario.fault.name, scenario.aftermath, scenario.seed
        )
        self.migration = 0
        self._begun = time.monotonic()
        self._steps: list[StepProcess] = []
        self._cleared_halt = False
        # A share goes back after all, so that roll-backs meet what faults left behind.
        self.goes_back = scenario.point.step == "roll_back" or (
            scenario.point.step in {"copy", "sync", "verify", "cutover", "soak"}
            and self.chance.random() < 0.25
        )

    def say(self, text: str) -> None:
        self.outcome.timeline.append(
            f"{time.strftime('%H:%M:%S', time.gmtime())} +{time.monotonic() - self._begun:6.2f} s"
            f"  {text}"
        )

    def fail(self, text: str) -> None:
        self.outcome.faults.append(text)
        self.say(f"FAULT: {text}")

    def run(self) -> Outcome:
        world = self.world
        before = world.traces()
        cast = world.cast()
        self._plan(cast)
        number = int(cast.moved.id)
        self._writers = writers = Writers(world.directory / "ledger" / f"{number}.jsonl")
        try:
            writers.start(world, cast.parts, number)
            self._strike()
            self._finish()
            writers.wait_for_writes(3)
            self.say("every writer has written again")
        except Exception as error:
            self.fail(f"{type(error).__name__}: {error}")
            if isinstance(error, Silent):
                for step in self._steps:
                    if step.ended is None:
                        self.say(f"process {step.pid} hangs here:\n{step.stack()}")
        finally:
            stopped = time.time()
            world.heal()
            for step in self._steps:
                step.close()
            writers.stop()
        for failure in writers.failures:
            self.fail(f"a writer failed: {failure}")
        self._judge(cast, writers, before, stopped)
        return self.outcome

    def _plan(self, cast: Cast) -> None:
        freeze_first = self.scenario.point.freeze_first and self.chance.random() < 0.2
        strategy = "freeze-first" if freeze_first else "online"
        self.outcome.strategy = strategy
        self.migration = self.world.plan(cast.moved, **{**_OPTIONS, "strategy": strategy})
        self.say(f"migration {self.migration} of organization {cast.moved.id}, {strategy}")

    def _strike(self) -> None:
        scenario, point, fault = self.scenario, self.scenario.point, self.scenario.fault
        if point.lead:
            self._lead(point.lead)
        urls = (
            self.world.connections_through_proxies
            if fault.through_proxies
            else self.world.connections
        )
        step = self._start(
            [point.step],
            urls,
            halt_at=point.phase,
            nth=self.chance.choice(point.nth),
            give_up_at=point.give_up_at,
        )
        if not step.wait_at(_STEP_S):
            raise RuntimeError(f"{point.step} never came to '{point.phase}': {step.ended}")
        self.say(f"{point.step} is at '{point.phase}'")
        fault.strike(self.world, step, self.say)
        self._act_after()
        woken = fault.after_successor(self.world, step, self.say)
        ended = woken or step.ended
        self.outcome.step_said = str(ended).partition(" Remedy:")[0][:300]
        if ended is not None and ended.unexpected:
            self.fail(f"the step ended with an error that is not cellferry's: {ended}")
        del scenario

    def _lead(self, lead: tuple[str, ...]) -> None:
        steps = list(lead)
        if self.scenario.point.step == "cleanup":
            ended = self._start(steps, self.world.connections).wait_end(_STEP_S)
            if ended.ok:
                self._wait_for_ttl()
        else:
            ended = self._start(steps, self.world.connections).wait_end(_STEP_S)
        if not ended.ok:
            # Rounds may not converge on a busy machine; each step may be repeated.
            self.say(f"{', '.join(steps)}: {ended}")
            if not ended.transient:
                raise RuntimeError(f"the way to the phase failed: {ended}")
            again = self._start(steps, self.world.connections).wait_end(_STEP_S)
            if not again.ok:
                raise RuntimeError(f"the way to the phase failed twice: {again}")
            self._wait_for_ttl()
        self.say(f"{', '.join(steps)} done")

    def _act_after(self) -> None:
        match self.scenario.aftermath:
            case "retry":
                self._repeat(self.scenario.point.step)
            case "abort":
                ended = self._insist("abort")
                if ended.error == "WrongState":
                    # The step had gone through the flip by itself: there is only forward.
                    if self._state() in BEFORE_FLIP | {State.ABORTED}:
                        self.fail(f"abort was refused before the flip: {ended}")
                elif not ended.ok:
                    self.fail(f"abort: {ended}")
            case "reap":
                reaper.act_alone(self.world, self._writers, self.say, REAPED_S)

    def _repeat(self, step: str) -> None:
        """Run the step again, as Airflow does, until it is through or the state goes past it."""
        if step == "verify" and self._state() not in {State.SYNCING, State.READY}:
            step = "cutover"
        ended = self._insist(step)
        if not ended.ok:
            self.fail(f"{step} again: {ended}")

    def _insist(self, step: str) -> Ended:
        """Run a step until it ends with something else than a transient error."""
        deadline = time.monotonic() + _KEEP_TRYING_S
        while True:
            ended = self._start([step], self.world.connections).wait_end(_STEP_S)
            self.say(f"{step}: {ended}")
            if ended.unexpected:
                self.fail(f"{step} ended with an error that is not cellferry's: {ended}")
            if ended.error == "Halted" and self._clear_halt_of_failover():
                continue
            if ended.ok or not ended.transient or time.monotonic() > deadline:
                return ended
            time.sleep(0.2)

    def _clear_halt_of_failover(self) -> bool:
        """Do what the halt asks a person for: a synchronous standby had everything.

        A cell that has authority and was failed over halts the migration; nothing else may. Once:
        a halt that comes again would be a fault.
        """
        if self.scenario.fault.standby_of is None or self._cleared_halt:
            return False
        with self.world.context() as context:
            found = context.topology.halts_on(self.migration)
            if len(found) != 1 or "may have lost commits" not in found[0].reason:
                return False
            context.topology.clear_halt(
                found[0].scope, found[0].name, "the standby was synchronous", PERSON
            )
        self._cleared_halt = True
        self.say("a person cleared the halt: the standby was synchronous, nothing is lost")
        return True

    def _finish(self) -> None:
        """Drive the migration to its end, whatever state the aftermath left it in."""
        for _ in range(20):
            migration = self._migration()
            step = self._next_step(migration)
            if step is None:
                return
            if step == "cleanup":
                self._wait_for_ttl()
            ended = self._insist(step)
            if not ended.ok:
                raise RuntimeError(f"{step}: {ended}")
        raise RuntimeError(f"the migration does not end: it is {self._state()}")

    def _next_step(self, migration: Migration) -> str | None:
        return next_step(migration, self._live_resources, goes_back=self.goes_back)

    def _judge(self, cast: Cast, writers: Writers, before: frozenset[str], stopped: float) -> None:
        outcome, world = self.outcome, self.world
        reaper.act(world, self.say)
        migration = self._migration()
        outcome.state = migration.state
        if migration.state in LIVE_STATES | {State.RETAINED, State.CLEANING}:
            self.fail(f"the migration is still {migration.state}")
        with world.context() as context:
            route = context.topology.route(cast.moved.id)
            outcome.audit = [_told(one) for one in context.topology.audit(self.migration)]
        expected = CELLS[1] if migration.state is State.COMPLETED else CELLS[0]
        if route.cell != expected:
            self.fail(f"the route says {route.cell} although the migration is {migration.state}")
        left = sorted(world.traces() - before)
        left += [f"topology: {one}" for one in self._live_resources()]
        outcome.left_behind = len(left)
        for one in left[:8]:
            self.fail(f"left behind: {one}")
        ledger = writers.ledger()
        checked = world.check(ledger, cast.baseline)
        outcome.lost, outcome.doubled = checked.lost, checked.doubled
        outcome.acknowledged = checked.acknowledged
        for one in checked.faults:
            self.fail(one)
        gap, since = longest_gap(ledger, cast.moved.id, stopped)
        outcome.not_writable_s = round(gap, 2)
        outcome.neighbour_s = round(longest_gap(ledger, cast.neighbour.id, stopped)[0], 2)
        allowed = REAPED_S if self.scenario.aftermath == "reap" else NOT_WRITABLE_S
        if gap > allowed:
            self.fail(f"not writable for {gap:.1f} s of {allowed:.0f} s allowed, from {since} on")
        outcome.seconds = round(time.monotonic() - self._begun, 1)

    # --- small things --------------------------------------------------------------------------

    def _start(self, steps: list[str], urls: Mapping[str, str], **halt: Any) -> StepProcess:
        step = self.world.stepper.start(steps, self.migration, urls, **halt)
        self._steps.append(step)
        return step

    def _migration(self) -> Migration:
        with self.world.context() as context:
            return context.topology.migration(self.migration)

    def _state(self) -> State:
        return self._migration().state

    def _live_resources(self) -> list[Any]:
        with self.world.context() as context:
            return list(context.topology.live_resources(self.migration))

    def _wait_for_ttl(self) -> None:
        migration = self._migration()
        if migration.ttl_until is not None:
            time.sleep(max(0.0, migration.ttl_until.timestamp() - time.time() + 0.05))


def _told(one: AuditEntry) -> str:
    change = f"{one.from_state} -> {one.to_state}" if one.to_state else ""
    holder = str(one.evidence.get("holder", ""))
    parts = (one.action, change, f"attempt {one.attempt}", holder, one.reason or "")
    return f"{one.at:%H:%M:%S.%f} " + " ".join(part for part in parts if part)[:220]


def run(world: World, scenario: Scenario) -> Outcome:
    """Run one scenario in a world, and leave the world fit for the next."""
    return _Run(world, scenario).run()
