"""One organization that moves to and fro while things fail: it drives, as Airflow's retries do.

It also does what people do: it aborts, rolls back, pauses and resumes, and clears a halt that says
why, audited as a person.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tests.fault.scenario import POINTS, next_step
from tests.fault.stepper import Ended, Silent
from tests.fault.strikes import DAWDLE, KINDS, Running, Strikes, is_wrong
from tests.fault.world import CELLS, World

from cellferry.errors import Blocked, CellferryError, TransientError
from cellferry.migration import Context, steps
from cellferry.model import BEFORE_FLIP, Actor, Organization, State
from cellferry.phases import Phase

Say = Callable[[str], None]
T = TypeVar("T")

PERSON = Actor("soak's operator", role="person")
#: A migration that is not over after so many seconds, all faults included, never will be.
LASTS_S = 400.0
#: A step that nothing was done to ends within this.
STEP_S = 150.0
#: How long the driver waits for a step that may be dead before it starts another.
PATIENCE_S = (0.3, 10.0)
#: How often nobody tries again for so many seconds, so that the reaper must heal.
AWAY, AWAY_S = 0.35, (8.0, 16.0)
_ASK_S = 90.0
_POLL_S = 0.1

_PHASES: dict[str, list[tuple[Phase, range]]] = {}
for _point in POINTS:
    _PHASES.setdefault(_point.step, []).append((_point.phase, _point.nth))


@dataclass(frozen=True)
class Aim:
    """How a migration shall end.

    Attributes:
        abort_at, back_at: the first state in which it is aborted, or rolled back.
    """

    name: str
    abort_at: State | None = None
    back_at: State | None = None


AIMS: Sequence[tuple[Aim, int]] = (
    (Aim("to go there"), 8),
    (Aim("to come back from soak", back_at=State.SOAKING), 2),
    (Aim("to come back from retention", back_at=State.RETAINED), 4),
    (Aim("to be aborted while it copies", abort_at=State.COPYING), 1),
    (Aim("to be aborted while it syncs", abort_at=State.SYNCING), 1),
    (Aim("to be aborted when it is ready", abort_at=State.READY), 1),
    (Aim("to be aborted while it cuts over", abort_at=State.CUTTING_OVER), 1),
)


class Failed(Exception):
    """Something that no fault explains."""


class Journey:
    """An organization's journeys. `run` is for a thread of its own, and may be run again.

    Attributes:
        ends: how many migrations ended in which state.
        cleared: halts that the operator cleared, by their reason's first words.
        wrong: what no fault explains.
    """

    def __init__(
        self, world: World, strikes: Strikes, organization: Organization, seed: int, say: Say
    ) -> None:
        self.organization = organization
        self.ends: Counter[State] = Counter()
        self.errors: Counter[str] = Counter()
        self.cleared: Counter[str] = Counter()
        self.migrations: list[int] = []
        self.wrong: list[str] = []
        self._world = world
        self._strikes = strikes
        self._chance = random.Random(f"{seed} {organization.id}")
        self._say = say
        self._paused_until: float | None = None
        self._pause_at: float | None = None

    def run(self, enough: threading.Event) -> None:
        """Move until `enough` is set; the migration under way then is driven to its end."""
        try:
            while not enough.is_set() and not self.wrong:
                self._move()
                enough.wait(self._chance.uniform(0, 2))
        except Exception as error:
            self.wrong.append(
                f"organization {self.organization.id}: {type(error).__name__}: {error}"
            )

    # --- one migration -------------------------------------------------------------------------

    def _move(self) -> None:
        aim = self._chance.choices([one for one, _ in AIMS], [weight for _, weight in AIMS])[0]
        options = {
            "strategy": "freeze-first" if self._chance.random() < 0.15 else "online",
            "batch_rows": 100,
            "soak_s": round(self._chance.uniform(0, 2), 1),
            # longer than a route may be old while its topology restarts
            "ttl_s": round(self._chance.uniform(4, 8), 1),
            "pause_budget_ms": 2_000,
            "drain_deadline_s": 5.0,
            "freeze_deadline_s": 10.0,
            "max_rounds": 200,
        }
        number = self._plan(options)
        self.migrations.append(number)
        self._tell(number, f"shall go, {options['strategy']}, {aim.name}")
        deadline = time.monotonic() + LASTS_S
        while (step := self._next_step(number, aim)) is not None:
            ended = self._run_step(step, number)
            self._heed(number, step, ended)
            if time.monotonic() > deadline:
                state = self._ask(lambda context: context.topology.migration(number)).state
                raise Failed(
                    f"migration {number} does not end: {state}, {step} ended last with {ended}"
                )
        state = self._ask(lambda context: context.topology.migration(number)).state
        self.ends[state] += 1
        self._tell(number, f"ended: {state}")

    def _plan(self, options: dict[str, object]) -> int:
        deadline = time.monotonic() + _ASK_S
        while True:
            try:
                route = self._ask(lambda context: context.topology.route(self.organization.id))
                there = next(cell for cell in CELLS if cell != route.cell)
                return self._world.plan(self.organization, there, **options)
            except (TransientError, Blocked) as error:
                self.errors[f"plan: {type(error).__name__}"] += 1
                self._say(f"organization {self.organization.id}: plan: {error}")
                if time.monotonic() > deadline:
                    raise Failed(f"cannot be planned: {error}") from error
                time.sleep(0.5)

    def _next_step(self, number: int, aim: Aim) -> str | None:
        migration = self._ask(lambda context: context.topology.migration(number))
        state = migration.state
        goes_back = aim.back_at is not None and (
            state is not State.SOAKING or aim.back_at is State.SOAKING
        )
        step = next_step(
            migration,
            lambda: self._ask(lambda context: list(context.topology.live_resources(number))),
            goes_back=goes_back,
        )
        if step is None:
            return None
        if state in BEFORE_FLIP and _is_reached(aim.abort_at, state):
            return "abort"
        if state is State.RETAINED and self._chance.random() < 0.3:
            return "reverse_round"
        if step == "cleanup" and migration.ttl_until is not None:
            self._sleep_until(migration.ttl_until.timestamp() + 0.05)
        return step

    def _sleep_until(self, wall: float) -> None:
        while (left := wall - time.time()) > 0:
            time.sleep(min(left, 0.5))

    # --- one step ------------------------------------------------------------------------------

    def _run_step(self, step: str, number: int) -> Ended:
        chance, strikes = self._chance, self._strikes
        halt: dict[str, object] = {}
        if not strikes.is_calm and chance.random() < 0.35 and step in _PHASES:
            phase, passes = chance.choice(_PHASES[step])
            halt = {"halt_at": phase, "nth": chance.choice(passes)}
        if not strikes.is_calm and chance.random() < 0.08:
            self._pause_at = time.monotonic() + chance.uniform(0, 1.5)
        patience = chance.uniform(*PATIENCE_S)
        running = strikes.start(
            step, number, through_proxies=chance.random() < 0.75 and not strikes.is_calm, **halt
        )
        ended = self._await(running, patience, number)
        if ended is None:
            self._tell(number, f"{step} may be dead; the next try begins")
            strikes.leave_alone(running)
            return Ended("abandoned", "it did not answer", transient=True)
        strikes.forget(running)
        self._tell(number, f"{step}: {str(ended).partition(' Remedy:')[0][:300]}")
        return ended

    def _await(self, running: Running, patience: float, number: int) -> Ended | None:
        """Wait for the end of a step; None when it was struck and does not answer."""
        begun = time.monotonic()
        process = running.process
        struck = False
        while process.ended is None:
            self._pause_or_resume(number)
            with contextlib.suppress(Silent):
                if struck:
                    process.wait_end(_POLL_S)
                elif process.wait_at(_POLL_S):
                    struck = True
                    kinds = {**KINDS, DAWDLE: 3}
                    kind = self._chance.choices(list(kinds), list(kinds.values()))[0]
                    self._strikes.strike_at_phase(kind, running)
            now = time.monotonic()
            if running.suspect_since is not None and now > running.suspect_since + patience:
                return None
            if now > begun + STEP_S + patience:
                self._say(f"process {process.pid} hangs here:\n{process.stack()}")
                raise Failed(f"{running.name} of migration {number} does not end by itself")
        return process.ended

    def _heed(self, number: int, step: str, ended: Ended) -> None:
        if ended.ok:
            return
        self.errors[f"{step}: {ended.error}"] += 1
        if is_wrong(ended):
            raise Failed(f"{step} of migration {number} ended with {ended}")
        if ended.error == "Halted":
            self._clear_halts(number)
        elif ended.error == "Paused" and self._paused_until is None:
            self._resume(number, "the operator goes on")
        while self._paused_until is not None:
            self._pause_or_resume(number)
            time.sleep(_POLL_S)
        if ended.error in {"killed", "abandoned"} and self._chance.random() < AWAY:
            self._tell(number, "nobody tries again for a while")
            time.sleep(self._chance.uniform(*AWAY_S))
        time.sleep(self._chance.uniform(0.1, 0.8))

    # --- what people do ------------------------------------------------------------------------

    def _pause_or_resume(self, number: int) -> None:
        now = time.monotonic()
        if self._pause_at is not None and now > self._pause_at:
            self._pause_at = None
            with contextlib.suppress(CellferryError):  # it may be over; the topology may be down
                with self._context() as context:
                    steps.pause(context, number, "the soak pauses")
                self._paused_until = now + self._chance.uniform(0.5, 4)
                self._tell(number, "paused by the operator")
        if self._paused_until is not None and now > self._paused_until:
            if self._chance.random() < 0.3:
                with contextlib.suppress(CellferryError), self._context() as context:
                    given_up = steps.give_up_log(context, number, "the soak gives it up")
                    self._tell(number, f"key log given up: {given_up}")
            self._resume(number, "the soak resumes")
            self._paused_until = None

    def _resume(self, number: int, reason: str) -> None:
        self._ask(lambda context: steps.resume(context, number, reason))
        self._tell(number, f"resumed: {reason}")

    def _clear_halts(self, number: int) -> None:
        for one in self._ask(lambda context: context.topology.halts_on(number)):
            self.cleared[one.reason[:60]] += 1
            if "verification failed" in one.reason or "differs" in one.reason:
                raise Failed(f"migration {number} is halted: {one.reason}")
            self._tell(number, f"the operator clears the halt: {one.reason}")
            self._ask(
                lambda context, one=one: context.topology.clear_halt(  # type: ignore[misc]
                    one.scope, one.name, "looked at; the soak goes on", PERSON
                )
            )

    # --- small things --------------------------------------------------------------------------

    def _ask(self, question: Callable[[Context], T]) -> T:
        """Ask the topology, straight, until it answers."""
        deadline = time.monotonic() + _ASK_S
        while True:
            try:
                with self._context() as context:
                    return question(context)
            except TransientError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def _context(self) -> contextlib.AbstractContextManager[Context]:
        return self._world.context()

    def _tell(self, number: int, text: str) -> None:
        self._say(f"migration {number} of organization {self.organization.id}: {text}")


def _is_reached(wanted: State | None, state: State) -> bool:
    order = (State.PLANNED, State.COPYING, State.SYNCING, State.READY, State.CUTTING_OVER)
    return wanted is not None and order.index(state) >= order.index(wanted)
