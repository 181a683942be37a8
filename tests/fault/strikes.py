"""Faults that strike at random times, and where a step has got to: for the soak.

One thread owns the servers (they end with it) and does everything here: it calls `work`. Threads
that run steps register them, so that there is something to strike, and ask for a fault when a step
waits at a phase.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import queue
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil
from tests.fault.stepper import Ended, Silent, StepProcess

if TYPE_CHECKING:
    from tests.fault.world import World

Say = Callable[[str], None]

SERVERS = ("topology", *(f"{cell} {kind}" for cell in ("cell-1", "cell-2")
                         for kind in ("postgres", "valkey")))  # fmt: skip
PLACES = ("topology", "cell-1", "cell-2")

#: What may strike, and how often compared with the others.
KINDS: Mapping[str, int] = {
    "kill step": 4,
    "stop step": 4,
    "kill server": 5,
    "cut": 3,
    "hole": 3,
    "lose answer": 2,
    "second controller": 4,
}
#: What else may happen to a step that waits at a phase: it is only late.
DAWDLE = "dawdle"

#: How a step may end that is not to be tried again just so: it was killed, another took over or
#: went further, or a person stopped it.
EXPLAINED = frozenset({"killed", "LeaseLost", "WrongState", "Paused", "Halted"})

DOWN_S = (0.3, 3.0)
HOLE_S = (1.0, 12.0)
STOPPED_S = (1.0, 20.0)
LATE_S = (1.0, 12.0)
_LOSE_WITHIN_S = 5.0


@dataclass
class Running:
    """A step's process, as something to be struck.

    Attributes:
        through_proxies: whether its connections can be cut and held.
        suspect_since: when something was done to it after which it may never answer.
    """

    name: str
    migration: int
    process: StepProcess
    through_proxies: bool
    suspect_since: float | None = None
    _identity: psutil.Process | None = None

    def __post_init__(self) -> None:
        with contextlib.suppress(psutil.Error):
            self._identity = psutil.Process(self.process.pid)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless its number is another process's by now."""
        if self._identity is not None:
            with contextlib.suppress(psutil.Error):
                self._identity.send_signal(number)


@dataclass(order=True)
class _Due:
    at: float
    number: int
    act: Callable[[], None] = field(compare=False)


@dataclass
class _Request:
    kind: str
    target: Running
    done: threading.Event = field(default_factory=threading.Event)


class Strikes:
    """What strikes. Made, and worked, by the thread that made the world.

    Args:
        world: whose servers, proxies and steps are struck.
        seed: decides when and what; timing decides whom.
        every_s: average time between two strikes that nobody asked for, seconds.
        say: told what happens.
    """

    def __init__(self, world: World, seed: int, every_s: float, say: Say) -> None:
        self._world = world
        self._chance = random.Random(f"{seed} strikes")
        self._every_s = every_s
        self._say = say
        self._due: list[_Due] = []
        self._numbers = itertools.count()
        self._requests: queue.Queue[_Request] = queue.Queue()
        self._lock = threading.Lock()
        self._running: list[Running] = []
        self._left_alone: list[Running] = []
        self._down: set[str] = set()
        self._held: str | None = None
        self._next = 0.0
        self._is_calm = True
        self.counts: Counter[str] = Counter()

    # --- for the threads that run steps --------------------------------------------------------

    def start(self, name: str, migration: int, *, through_proxies: bool, **halt: Any) -> Running:
        """Start a step in a process of its own that may be struck."""
        world = self._world
        urls = world.connections_through_proxies if through_proxies else world.connections
        process = world.stepper.start([name], migration, urls, **halt)
        running = Running(name, migration, process, through_proxies)
        with self._lock:
            self._running.append(running)
        return running

    def forget(self, running: Running) -> None:
        """The step has ended."""
        with self._lock:
            if running in self._running:
                self._running.remove(running)
        running.process.close()

    def leave_alone(self, running: Running) -> None:
        """Nobody waits for this step any more; it may wake up and go on (a zombie)."""
        running.process.go_on_without_waiting()
        with self._lock:
            if running in self._running:
                self._running.remove(running)
            self._left_alone.append(running)

    def strike_at_phase(self, kind: str, running: Running) -> None:
        """Let a fault strike while `running` waits at its phase; it goes on then, or later."""
        request = _Request(kind, running)
        self._requests.put(request)
        while not request.done.wait(0.1):
            if self._is_calm:
                break
        if kind == DAWDLE:
            return
        running.process.go()

    @property
    def is_calm(self) -> bool:
        """Whether nothing strikes now."""
        return self._is_calm

    # --- for the thread that owns the servers --------------------------------------------------

    def work(self, seconds: float, *, calm: bool = False) -> None:
        """Strike, and undo what was done, for so long. `calm`: only undo."""
        ends = time.monotonic() + seconds
        if self._is_calm and not calm:
            self._next = time.monotonic() + self._pause()
        self._is_calm = calm
        while (now := time.monotonic()) < ends:
            while self._due and self._due[0].at <= now:
                heapq.heappop(self._due).act()
            try:
                request = self._requests.get(timeout=0.05)
            except queue.Empty:
                pass
            else:
                if not calm:
                    self._strike(request.kind, request.target, "at its phase")
                elif request.kind == DAWDLE:
                    request.target.process.go()
                request.done.set()
            if not calm and time.monotonic() >= self._next:
                self._next = time.monotonic() + self._pause()
                self._strike_somebody()

    def make_calm(self) -> None:
        """Strike no more; undo everything that was done, now."""
        self._is_calm = True
        while self._due:
            heapq.heappop(self._due).act()
        self._world.heal()
        self.work(0.2, calm=True)

    def wait_for_zombies(self, seconds: float) -> list[str]:
        """Wait for the steps that were left alone; return what is wrong with them."""
        wrong = []
        with self._lock:
            left, self._left_alone = self._left_alone, []
        deadline = time.monotonic() + seconds
        for running in left:
            name = f"{running.name} of migration {running.migration}, left alone,"
            try:
                ended = running.process.wait_end(max(0.1, deadline - time.monotonic()))
            except Silent:
                wrong.append(f"{name} does not end; it hangs here:\n{running.process.stack()}")
            else:
                self._say(f"{name} ended: {ended}")
                if is_wrong(ended):
                    wrong.append(f"{name} ended with {ended}")
            running.process.close()
        return wrong

    def _pause(self) -> float:
        return self._chance.expovariate(1 / self._every_s)

    def _strike_somebody(self) -> None:
        kind = self._chance.choices(list(KINDS), list(KINDS.values()))[0]
        with self._lock:
            targets = [one for one in self._running if one.process.ended is None]
        target = self._chance.choice(targets) if targets else None
        if target is None and kind in {"kill step", "stop step", "second controller"}:
            return
        self._strike(kind, target, "at a random time")

    def _strike(self, kind: str, target: Running | None, when: str) -> None:
        whom = f"{target.name} of migration {target.migration}" if target else "nobody"
        match kind:
            case "kill step" if target is not None:
                target.signal(signal.SIGKILL)
                self._note(kind, f"{whom} was killed {when}")
            case "stop step" if target is not None:
                seconds = self._between(STOPPED_S)
                target.signal(signal.SIGSTOP)
                target.suspect_since = time.monotonic()
                self._later(seconds, lambda: self._wake(target))
                self._note(kind, f"{whom} was stopped for {seconds:.1f} s {when}")
            case "kill server":
                self._kill_server(when)
            case "cut":
                place = self._chance.choice(PLACES)
                for proxy in self._world.proxies_to(place):
                    proxy.cut()
                self._note(kind, f"connections to {place} were reset {when}")
            case "hole":
                self._hold(when)
            case "lose answer":
                (proxy,) = self._world.proxies_to("topology")
                proxy.lose_answer()
                self._later(_LOSE_WITHIN_S, proxy.lose_no_answer)
                self._note(kind, f"the topology's next answer will be lost {when}")
            case "second controller" if target is not None and target.name != "reap":
                self._second(target, when)
            case _ if kind == DAWDLE and target is not None:
                seconds = self._between(LATE_S)
                target.suspect_since = time.monotonic()
                self._later(seconds, target.process.go)
                self._note(kind, f"{whom} is {seconds:.1f} s late {when}")

    def _kill_server(self, when: str) -> None:
        name = self._chance.choice(SERVERS)
        seconds = self._between(DOWN_S)
        if self._down:
            return  # one at a time: what is down at once with another is not promised
        place, _, kind = name.partition(" ")
        server = self._world.valkey[place] if kind == "valkey" else self._world.postgres[place]
        port = server.port
        server.kill()
        self._down.add(name)
        self._note(f"kill {kind or 'topology'}", f"{name} was killed for {seconds:.1f} s {when}")

        def start() -> None:
            server.start()
            self._down.discard(name)
            if server.port != port:
                raise RuntimeError(f"{name} lost its port to another program")
            self._say(f"{name} runs again")

        self._later(seconds, start)

    def _hold(self, when: str) -> None:
        place, seconds = self._chance.choice(PLACES), self._between(HOLE_S)
        if self._held is not None:
            return
        self._held = place
        for proxy in self._world.proxies_to(place):
            proxy.hold()
        with self._lock:
            for one in self._running:
                if one.through_proxies and one.suspect_since is None:
                    one.suspect_since = time.monotonic()
        self._note("hole", f"nothing passes to {place} for {seconds:.1f} s {when}")

        def let_go() -> None:
            for proxy in self._world.proxies_to(place):
                proxy.let_go()
            self._held = None
            self._say(f"what was held before {place} passes")

        self._later(seconds, let_go)

    def _second(self, target: Running, when: str) -> None:
        """Start the same step once more, on another machine; or give the migration up there."""
        name = "abort" if self._chance.random() < 0.15 else target.name
        second = self.start(name, target.migration, through_proxies=False)
        self.leave_alone(second)
        self._note(
            "second controller",
            f"a second controller began {name} beside {target.name} of migration"
            f" {target.migration} {when}",
        )

    def _wake(self, target: Running) -> None:
        target.signal(signal.SIGCONT)
        self._say(f"{target.name} of migration {target.migration} wakes")

    def _note(self, kind: str, text: str) -> None:
        self.counts[kind] += 1
        self._say(text)

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._due, _Due(time.monotonic() + seconds, next(self._numbers), act))

    def _between(self, bounds: tuple[float, float]) -> float:
        return self._chance.uniform(*bounds)


def is_wrong(ended: Ended) -> bool:
    """Whether no fault explains how a step ended, so that nobody would try it again."""
    if ended.ok or ended.transient:
        return False
    return ended.unexpected or ended.error not in EXPLAINED
