"""A small discrete-event simulator: lanes of tasks, counted limits, servers that share themselves.

A lane is a generator: it yields a `Task` and gets back when that started and ended; `Together`
waits for lanes of its own, `Begin` starts one and does not wait. Time goes from event to event.

Between two events everything is fluid. A task alone takes `seconds`, and in them asks servers for
its `work`: processor seconds, rows. When a server is asked for more than it has, all who ask are
slowed alike, and what they then leave of other servers goes to others: max-min fairness of speeds,
by progressive filling (Bertsekas and Gallager, Data Networks, 6.5.2; so does SimGrid).

The same input gives the same output, to the last digit.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias


@dataclass(frozen=True, slots=True)
class Task:
    """One thing that a lane does.

    Attributes:
        stage: its name, for people.
        seconds: how long it takes when nobody is in its way.
        work: units that it asks of each server in that time; unknown servers have enough.
        takes: limits of which it takes one each before it starts; unknown ones are unbounded.
        gives: limits of which it gives one each back at its end; None for all that it takes.
        priority: of those that wait, the highest goes first; then who came first.
    """

    stage: str
    seconds: float
    work: Mapping[str, float] = field(default_factory=dict)
    takes: tuple[str, ...] = ()
    gives: tuple[str, ...] | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Together:
    """Start these lanes, and go on when all are over."""

    lanes: Sequence[Lane]


@dataclass(frozen=True, slots=True)
class Begin:
    """Start a lane, and go on at once."""

    lane: Lane


class Span(NamedTuple):
    """When something started and ended, in seconds since the beginning."""

    started: float
    ended: float


Wish: TypeAlias = Task | Together | Begin
Steps: TypeAlias = Generator[Wish, Span, None]


@dataclass(slots=True, eq=False)
class Lane:
    """Things that happen one after the other, under a name."""

    name: str
    steps: Steps
    parent: Lane | None = None
    children: int = 0
    alone_s: float = 0.0
    held: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Done:
    """One task that is over: what it did, and when, in seconds since the beginning."""

    lane: str
    stage: str
    asked: float
    started: float
    ended: float
    work: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulation found.

    Attributes:
        seconds: from the beginning to the end of the last task.
        done: all tasks, in the order in which they ended.
        bound_s: no schedule whatever could be shorter than this.
        bound_by: what says so: a server, a limit, or `one lane`.
        spells: what everybody waited for, from when, until when.
        work: units that each server did.
        peaks: how many of each limit were taken at most.
    """

    seconds: float
    done: Sequence[Done]
    bound_s: float
    bound_by: str
    spells: Sequence[tuple[str, float, float]]
    work: Mapping[str, float]
    peaks: Mapping[str, int]

    def binding(self, since: float = 0.0, until: float = float("inf")) -> dict[str, float]:
        """Return the share of a time for which each thing was what everybody waited for."""
        found: dict[str, float] = defaultdict(float)
        for name, began, ended in self.spells:
            found[name] += max(0.0, min(ended, until) - max(began, since))
        total = sum(found.values())
        ordered = sorted(found.items(), key=lambda one: (-one[1], one[0]))
        return {name: seconds / total for name, seconds in ordered if seconds > 0}

    def used(self, server: str, since: float, until: float) -> float:
        """Return the units that a server did in a time, as if tasks did their work evenly."""
        total = 0.0
        for one in self.done:
            inside = min(one.ended, until) - max(one.started, since)
            if inside > 0 and server in one.work:
                total += one.work[server] * inside / (one.ended - one.started)
        return total


OWN_PACE = "own pace"
"""Nothing was full: the tasks under way took their time."""


def share(
    wants: Sequence[Mapping[str, float]], capacities: Mapping[str, float]
) -> tuple[list[float], list[str | None]]:
    """Return the speed of each task, at most 1, and which server keeps it from being faster.

    Args:
        wants: units a second that each task asks of servers at full speed.
        capacities: units a second that servers have.
    """
    speeds, limits = [1.0] * len(wants), list[str | None]([None] * len(wants))
    left = dict(capacities)
    open_ = list(range(len(wants)))
    while left:
        speed, full = 1.0, None
        for server, room in left.items():
            asked = sum([wants[one].get(server, 0.0) for one in open_])
            if asked > 0 and asked * speed > room:
                speed, full = room / asked, server
        if full is None:
            break
        still = []
        for one in open_:
            if wants[one].get(full, 0.0) > 0:
                speeds[one], limits[one] = speed, full
            else:
                still.append(one)
        for server in left:
            left[server] -= speed * sum(
                [wants[one].get(server, 0.0) for one in open_ if limits[one] == full]
            )
        del left[full]
        open_ = still
    return speeds, limits


@dataclass(slots=True, eq=False)
class _Running:
    lane: Lane
    task: Task
    asked: float
    started: float
    wants: Mapping[str, float]
    left: float
    """Seconds it still needs at full speed, as of `since`."""
    since: float
    speed: float = 1.0
    version: int = 0
    """Rises with each change of speed: an older end in the calendar is void."""


@dataclass(slots=True, eq=False)
class _Waiting:
    number: int
    lane: Lane
    task: Task
    asked: float


class Simulation:
    """One run of the simulator; use it once.

    Args:
        servers: units a second that each server has.
        limits: how many of each may be taken at once.

    Raises:
        ValueError: a capacity is not positive.
    """

    def __init__(self, servers: Mapping[str, float], limits: Mapping[str, int]) -> None:
        for name, capacity in {**servers, **limits}.items():
            if not capacity > 0:
                raise ValueError(f"{name}: a capacity must be positive, not {capacity}")
        self._servers = dict(servers)
        self._limits = dict(limits)
        self._free = dict(limits)
        self.now = 0.0
        self._number = 0
        self._queues: dict[tuple[int, tuple[str, ...]], deque[_Waiting]] = {}
        self._calendar: list[tuple[float, int, int, _Running]] = []
        self._running: dict[_Running, None] = {}
        self._changed = False
        self._asked: dict[str, float] = dict.fromkeys(servers, 0.0)
        self._full: str | None = None
        self._done: list[Done] = []
        self._spells: list[tuple[str, float, float]] = []
        self._work: dict[str, float] = defaultdict(float)
        self._held_s: dict[str, float] = defaultdict(float)
        self._longest_s = 0.0
        self._peaks: dict[str, int] = defaultdict(int)

    def run(self, lanes: Sequence[Lane]) -> Outcome:
        """Let all lanes run from time 0 to their ends.

        Raises:
            ValueError: a task takes no time and yet has work, or what it takes can never be free.
        """
        for lane in lanes:
            self._go_on(lane, None)
        while True:
            self._start_waiting()
            self._share()
            if not self._step():
                break
        if self._queues:
            stuck = next(queue[0] for queue in self._queues.values())
            raise ValueError(
                f"{stuck.lane.name}: {stuck.task.stage} waits for ever: {stuck.task.takes} are held"
            )
        bounds = {
            server: work / self._servers[server]
            for server, work in self._work.items()
            if server in self._servers
        }
        bounds |= {name: held / self._limits[name] for name, held in self._held_s.items()}
        bounds["one lane"] = self._longest_s
        by = max(bounds, key=lambda name: bounds[name])
        return Outcome(
            seconds=self.now,
            done=self._done,
            bound_s=bounds[by],
            bound_by=by,
            spells=self._spells,
            work=dict(self._work),
            peaks=dict(self._peaks),
        )

    # --- lanes -------------------------------------------------------------------------------

    def _go_on(self, lane: Lane, span: Span | None) -> None:
        """Ask a lane for what comes next, until it waits for something or is over.

        Args:
            lane: a lane.
            span: of what it waited for; None to start it.
        """
        while True:
            try:
                wanted = next(lane.steps) if span is None else lane.steps.send(span)
            except StopIteration:
                self._end(lane)
                return
            span = Span(self.now, self.now)
            if isinstance(wanted, Task):
                self._ask(lane, wanted)
                return
            if isinstance(wanted, Begin):
                self._go_on(wanted.lane, None)
            elif wanted.lanes:
                # counted before the first starts: one that ends at once must not end the wait
                lane.children = len(wanted.lanes)
                for child in wanted.lanes:
                    child.parent = lane
                for child in wanted.lanes:
                    self._go_on(child, None)
                return

    def _end(self, lane: Lane) -> None:
        for name in lane.held:
            self._give(name)
        lane.held = []
        self._longest_s = max(self._longest_s, lane.alone_s)
        if lane.parent is not None:
            lane.parent.children -= 1
            if lane.parent.children == 0:
                self._go_on(lane.parent, Span(self.now, self.now))

    def _ask(self, lane: Lane, task: Task) -> None:
        if task.seconds < 0 or (task.seconds == 0 and any(task.work.values())):
            raise ValueError(f"{lane.name}: {task.stage} has work and takes {task.seconds} s")
        self._number += 1
        key = (-task.priority, task.takes)
        waiting = _Waiting(self._number, lane, task, self.now)
        self._queues.setdefault(key, deque()).append(waiting)

    # --- limits ------------------------------------------------------------------------------

    def _give(self, name: str) -> None:
        if name in self._free:
            self._free[name] += 1

    def _start_waiting(self) -> None:
        """Start everything that may start, the highest priority first, then who came first."""
        while True:
            first: tuple[int, int] | None = None
            chosen: tuple[int, tuple[str, ...]] | None = None
            for key, queue in self._queues.items():
                rank = (key[0], queue[0].number)
                if (first is None or rank < first) and self._blocked_by(key[1]) is None:
                    first, chosen = rank, key
            if chosen is None:
                return
            queue = self._queues[chosen]
            self._start(queue.popleft())
            if not queue:
                del self._queues[chosen]

    def _blocked_by(self, takes: tuple[str, ...]) -> str | None:
        for name in takes:
            if self._free.get(name, 1) <= 0:
                return name
        return None

    def _start(self, waiting: _Waiting) -> None:
        lane, task = waiting.lane, waiting.task
        for name in task.takes:
            if name in self._free:
                self._free[name] -= 1
                self._peaks[name] = max(self._peaks[name], self._limits[name] - self._free[name])
                lane.held.append(name)
        wants = {
            server: units / task.seconds
            for server, units in task.work.items()
            if units > 0 and server in self._servers
        }
        one = _Running(lane, task, waiting.asked, self.now, wants, task.seconds, self.now)
        if wants:
            self._running[one] = None
            self._changed = True
            for server, rate in wants.items():
                self._asked[server] += rate
        self._number += 1
        heapq.heappush(self._calendar, (self.now + one.left, self._number, 0, one))

    def _finish(self, one: _Running) -> None:
        task, lane = one.task, one.lane
        given = task.takes if task.gives is None else task.gives
        for name in given:
            if name in lane.held:
                lane.held.remove(name)
                self._give(name)
        for name in task.takes:
            if name in self._limits and name in given:
                self._held_s[name] += task.seconds
        for server, units in task.work.items():
            self._work[server] += units
        lane.alone_s += task.seconds
        self._done.append(Done(lane.name, task.stage, one.asked, one.started, self.now, task.work))
        self._go_on(lane, Span(one.started, self.now))

    # --- time --------------------------------------------------------------------------------

    def _share(self) -> None:
        """Give each task its speed, and put the ends that change into the calendar."""
        if not self._changed:
            return
        self._changed = False
        # only what is asked for more than it has can slow anything
        short = {
            name: self._servers[name]
            for name, asked in self._asked.items()
            if asked > self._servers[name]
        }
        if not short and self._full is None:
            return
        speeds, limits = share([one.wants for one in self._running], short)
        lost: dict[str, float] = defaultdict(float)
        for one, speed, limit in zip(self._running, speeds, limits, strict=True):
            if limit is not None:
                lost[limit] += 1 - speed
            if speed != one.speed:
                one.left = max(0.0, one.left - (self.now - one.since) * one.speed)
                one.since, one.speed = self.now, speed
                one.version += 1
                self._number += 1
                end = self.now + one.left / speed
                heapq.heappush(self._calendar, (end, self._number, one.version, one))
        self._full = max(lost, key=lambda name: lost[name]) if lost else None

    def _step(self) -> bool:
        """Go to the next event; False when there is none."""
        while self._calendar:
            until, _, version, one = heapq.heappop(self._calendar)
            if version != one.version:
                continue
            if until > self.now:
                self._note(self._bound_now(), until)
                self.now = until
            if one.wants:
                self._leave(one)
            self._finish(one)
            return True
        return False

    def _leave(self, one: _Running) -> None:
        del self._running[one]
        self._changed = True
        for server, rate in one.wants.items():
            self._asked[server] -= rate
        if not self._running:  # what sums and differences have rounded away is forgotten
            self._asked = dict.fromkeys(self._servers, 0.0)

    def _note(self, name: str, until: float) -> None:
        if self._spells and self._spells[-1][0] == name:
            self._spells[-1] = (name, self._spells[-1][1], until)
        else:
            self._spells.append((name, self.now, until))

    def _bound_now(self) -> str:
        """Return what everybody waits for: a full server, else the limit with the longest queue."""
        if self._full is not None:
            return self._full
        queued: dict[str, int] = defaultdict(int)
        outer: dict[str, int] = defaultdict(int)
        for (_, takes), queue in self._queues.items():
            if (name := self._blocked_by(takes)) is not None:
                # who holds a limit over several tasks starts: it waits outside of the others
                is_outer = queue[0].task.gives is not None
                (outer if is_outer else queued)[name] += len(queue)
        for found in (queued, outer):
            if found:
                return max(found, key=lambda name: found[name])
        return OWN_PACE
