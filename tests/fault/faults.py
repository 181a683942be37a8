"""The faults: what is done to a step, a server or a network while the step is at its phase.

A fault is injected while the step waits at its phase. It says what the step may do then, and
what must be repaired before or after its successor acts.
"""

from __future__ import annotations

import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.fault.stepper import Ended, Silent, StepProcess

if TYPE_CHECKING:
    from tests.fault.world import World

Say = Callable[[str], None]

DOWN_S = 1.0
"""How long a killed server is down."""
STEP_ENDS_S = 150.0
"""A step that met a fault has ended by then, whatever it waited for."""
FULL_S = 3.0
"""How long a disk is full at most."""
SUCCESSOR_AFTER_S = 0.5
"""When somebody takes over from a step that does not move."""


@dataclass(frozen=True)
class Fault(ABC):
    """One column of the matrix."""

    name: str
    through_proxies: bool = False
    standby_of: str | None = None
    """The cell, or `topology`, whose PostgreSQL must have a standby."""

    @abstractmethod
    def strike(self, world: World, step: StepProcess, say: Say) -> None:
        """Do it, and return when a successor may act."""

    def after_successor(self, world: World, step: StepProcess, say: Say) -> Ended | None:
        """What comes when the successor has acted: a zombie wakes. Returns how the step ended."""
        del world, step, say
        return None


@dataclass(frozen=True)
class KillStep(Fault):
    def strike(self, world: World, step: StepProcess, say: Say) -> None:
        step.kill()
        say("the step's process was killed (SIGKILL)")


@dataclass(frozen=True)
class StopStep(Fault):
    """The step sleeps through its succession and then goes on as if nothing had been."""

    def strike(self, world: World, step: StepProcess, say: Say) -> None:
        step.signal(signal.SIGSTOP)
        step.go()
        say("the step's process was stopped (SIGSTOP)")
        time.sleep(SUCCESSOR_AFTER_S)

    def after_successor(self, world: World, step: StepProcess, say: Say) -> Ended | None:
        step.signal(signal.SIGCONT)
        say("the stopped step woke (SIGCONT)")
        ended = step.wait_end(STEP_ENDS_S)
        say(f"the step that woke ended: {ended}")
        return ended


@dataclass(frozen=True)
class KillServer(Fault):
    server: str = ""
    """`topology`, `cell-1 postgres`, `cell-2 valkey`, …"""

    def strike(self, world: World, step: StepProcess, say: Say) -> None:
        place, _, kind = self.server.partition(" ")
        server = world.valkey[place] if kind == "valkey" else world.postgres[place]
        server.kill()
        say(f"{self.server} was killed (SIGKILL)")
        step.go()
        time.sleep(DOWN_S)
        port = server.port
        server.start()
        if server.port != port:
            raise RuntimeError(f"{self.server} lost its port to another program")
        say(f"{self.server} runs again")
        say(f"the step ended: {step.wait_end(STEP_ENDS_S)}")


@dataclass(frozen=True)
class Promote(Fault):
    """A PostgreSQL dies for good; its synchronous standby becomes the primary."""

    def strike(self, world: World, step: StepProcess, say: Say) -> None:
        world.fail_over()
        say(f"{self.standby_of} postgres was killed (SIGKILL) and its standby promoted")
        step.go()
        say(f"the step ended: {step.wait_end(STEP_ENDS_S)}")


@dataclass(frozen=True)
class Cut(Fault):
    place: str = ""

    def strike(self, world: World, step: StepProcess, say: Say) -> None:
        for proxy in world.proxies_to(self.place):
            proxy.cut()
        say(f"the step's connections to {self.place} were reset")
        step.go()
        say(f"the step ended: {step.wait_end(STEP_ENDS_S)}")


@dataclass(frozen=True)
class LoseAnswer(Fault):
    """The topology commits the step's next change; its answer never arrives."""

    def strike(self, world: World, step: StepProcess, say: Say) -> None:
        (proxy,) = world.proxies_to("topology")
        before = proxy.cuts
        proxy.lose_answer()
        say("the answer to the next commit in the topology will be lost")
        step.go()
        say(f"the step ended: {step.wait_end(STEP_ENDS_S)} ({proxy.cuts - before} answers lost)")
        proxy.heal()


@dataclass(frozen=True)
class Hole(Fault):
    """Nothing passes between the step and a place; its successor runs on another machine.

    What was sent into the hole arrives when the successor has acted.
    """

    place: str = ""

    def strike(self, world: World, step: StepProcess, say: Say) -> None:
        for proxy in world.proxies_to(self.place):
            proxy.hold()
        say(f"nothing passes any more between the step and {self.place}")
        step.go()
        try:
            say(f"the step ended: {step.wait_end(SUCCESSOR_AFTER_S)}")
        except Silent:
            say("the step hangs")

    def after_successor(self, world: World, step: StepProcess, say: Say) -> Ended | None:
        for proxy in world.proxies_to(self.place):
            proxy.let_go()
        say(f"what was held between the step and {self.place} passes")
        ended = step.wait_end(STEP_ENDS_S)
        say(f"the step that hung ended: {ended}")
        return ended


@dataclass(frozen=True)
class DiskFull(Fault):
    place: str = "cell-2"

    def strike(self, world: World, step: StepProcess, say: Say) -> None:
        world.fill_disk(self.place)
        say(f"{self.place} has no room any more")
        step.go()
        try:
            say(f"the step ended: {step.wait_end(FULL_S)}")
        except Silent:
            say("the step goes on trying")
        finally:
            world.free_disk(self.place)
        say(f"{self.place} has room again")
        say(f"the step ended: {step.wait_end(STEP_ENDS_S)}")


FAULTS: Sequence[Fault] = (
    KillStep("kill step"),
    StopStep("stop step"),
    KillServer("kill source postgres", server="cell-1 postgres"),
    KillServer("kill destination postgres", server="cell-2 postgres"),
    KillServer("kill topology", server="topology"),
    KillServer("kill source valkey", server="cell-1 valkey"),
    KillServer("kill destination valkey", server="cell-2 valkey"),
    Cut("cut source", through_proxies=True, place="cell-1"),
    Cut("cut destination", through_proxies=True, place="cell-2"),
    Cut("cut topology", through_proxies=True, place="topology"),
    LoseAnswer("lose answer", through_proxies=True),
    Hole("hole source", through_proxies=True, place="cell-1"),
    Hole("hole destination", through_proxies=True, place="cell-2"),
    Hole("hole topology", through_proxies=True, place="topology"),
    DiskFull("disk full"),
    Promote("promote source standby", standby_of="cell-1"),
    Promote("promote destination standby", standby_of="cell-2"),
    Promote("promote topology standby", standby_of="topology"),
)
