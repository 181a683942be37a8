"""What every benchmark shares: processor time by part, contenders in turn, and how results look.

A section is a module of this folder with a function `run(bench)` that returns a `Section`. It
makes servers of its own, measures the product beside its peers in the same run, and says which of
its targets hold. No figure is ever typed by hand: `docs/benchmarks.md` is written from the JSON.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from cellferry.local.postgres_server import PostgresServer
from cellferry.local.valkey_server import ValkeyServer

Value = str | int | float | None


# --- what is measured -------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What one run of one contender took.

    Attributes:
        wall_s: seconds from its beginning to its end.
        cpu_s: processor seconds (user and system) by part: `client`, and the names of the meter.
        values: what the contender itself returned, for example `{"rows": 2_000_000}`.
    """

    wall_s: float
    cpu_s: Mapping[str, float]
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def total_cpu_s(self) -> float:
        """Processor seconds of all parts together."""
        return sum(self.cpu_s.values())


def processor_s(pid: int) -> float:
    """Return processor seconds of a process, the children it has, and those that have ended."""
    total = 0.0
    try:
        root = psutil.Process(pid)
        members = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    for process in members:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def pid_of(server: PostgresServer | ValkeyServer) -> int:
    """Return the process at the top of a running server's tree."""
    if server.identity is None:
        raise RuntimeError(f"{server.directory} does not run")
    return server.identity.pid


@dataclass(frozen=True)
class Meter:
    """Measures wall time and processor time by part.

    Args:
        parts: the process at the top of each part's tree, for example
            `{"source": postmaster_pid, "destination": other_pid}`. This process and its children,
            without those trees, are the part `client`.
    """

    parts: Mapping[str, int] = field(default_factory=dict)

    def now(self) -> dict[str, float]:
        """Return the processor seconds used so far, by part."""
        used = {name: processor_s(pid) for name, pid in self.parts.items()}
        mine = {child.pid for child in psutil.Process().children(recursive=True)}
        ours = sum(used[name] for name, pid in self.parts.items() if pid in mine)
        return {"client": processor_s(os.getpid()) - ours, **used}

    def measure(self, work: Callable[[], Mapping[str, float] | None]) -> Cost:
        """Run `work` once."""
        before, began = self.now(), time.perf_counter()
        values = work()
        wall = time.perf_counter() - began
        after = self.now()
        return Cost(wall, {name: after[name] - before[name] for name in after}, values or {})


def in_turn(
    contenders: Mapping[str, Callable[[], Mapping[str, float] | None]],
    meter: Meter,
    runs: int,
    *,
    before_each: Callable[[str], None] = lambda _: None,
    said: Callable[[str], None] = lambda _: None,
) -> dict[str, list[Cost]]:
    """Run all contenders `runs` times, one after the other, each round in another order.

    So that a machine that grows slower, or a cache that grows warmer, favours nobody.

    Args:
        before_each: called with the contender's name, unmeasured; empties the destination.
        said: takes a line for the person who watches.
    """
    found: dict[str, list[Cost]] = {name: [] for name in contenders}
    for name in turning(contenders, runs):
        before_each(name)
        cost = meter.measure(contenders[name])
        found[name].append(cost)
        said(f"{name}: {cost.wall_s:.2f} s, CPU {cost.total_cpu_s:.2f} s")
    return found


def turning(names: Iterable[str], runs: int) -> Iterator[str]:
    """Yield all names `runs` times, each round in another order."""
    names = list(names)
    for turn in range(runs):
        shift = turn % len(names)
        yield from names[shift:] + names[:shift]


@contextmanager
def timed(owner: Any, method: str, take: Callable[[float], None]) -> Iterator[None]:
    """Give `take` the seconds that each call of `owner`'s method takes meanwhile."""
    plain = getattr(owner, method)

    def measured(*given: Any) -> Any:
        began = time.perf_counter()
        try:
            return plain(*given)
        finally:
            take(time.perf_counter() - began)

    with mock.patch.object(owner, method, measured):
        yield


def median(costs: Sequence[Cost], of: Callable[[Cost], float] = lambda one: one.wall_s) -> float:
    """Return the median of a figure over runs."""
    return statistics.median(of(one) for one in costs)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that `percent` of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = math.ceil(len(ordered) * percent / 100)
    return ordered[max(rank, 1) - 1]


# --- how results look -------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Rows of figures under headings; `None` is an empty field."""

    headings: Sequence[str]
    rows: Sequence[Sequence[Value]]
    title: str = ""


@dataclass(frozen=True)
class Target:
    """One promise of the project beside what was measured.

    Attributes:
        what: the promise, for example "CPU of a copy against the raw pipe".
        limit: the figure promised.
        found: the figure measured, in the same unit.
        unit: `x` for a ratio, "ms", "organizations/h".
        at_least: the figure must reach the limit; otherwise it must not exceed it.
        why: what limits it now; wanted where it does not hold.
    """

    what: str
    limit: float
    found: float
    unit: str = "x"
    at_least: bool = False
    why: str = ""

    @property
    def holds(self) -> bool:
        """Whether the measured figure keeps the promise."""
        return self.found >= self.limit if self.at_least else self.found <= self.limit


@dataclass(frozen=True)
class Section:
    """One part of the benchmarks.

    Attributes:
        title: its heading.
        method: how it was measured, in plain words without figures that were measured.
        tables: what was measured.
        targets: what was promised.
        remarks: sentences with measured figures, made by the code that measured them.
        runs: how often each contender ran, where that is not what the bench was asked for.
    """

    title: str
    method: str
    tables: Sequence[Table]
    targets: Sequence[Target] = ()
    remarks: Sequence[str] = ()
    runs: int | None = None


# --- what a section gets ----------------------------------------------------------------------


POSTGRES = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "shared_buffers": "512MB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
    "wal_level": "logical",
    "max_replication_slots": "20",
    "max_wal_senders": "20",
    "autovacuum_naptime": "15s",
}
"""As a cell in production, within what the machine has; durable commits."""


@dataclass
class Bench:
    """One run of one section.

    Attributes:
        scale: 1.0 for the sizes that the section names; 0.01 to see only that it works.
        runs: how often each contender runs.
    """

    scale: float
    runs: int
    stack: ExitStack
    root: Path
    name: str = ""

    @classmethod
    @contextmanager
    def opened(cls, name: str, scale: float, runs: int) -> Iterator[Bench]:
        """Yield a bench whose servers end, and whose folder goes, when the block ends."""
        with ExitStack() as stack:
            root = Path(tempfile.mkdtemp(prefix="cellferry-bench-"))
            root.chmod(0o755)
            stack.callback(shutil.rmtree, root, ignore_errors=True)
            yield cls(scale, runs, stack, root, name)

    def size(self, full: int, least: int = 1) -> int:
        """Return a size at this bench's scale."""
        return max(least, int(full * self.scale))

    def say(self, line: str) -> None:
        """Tell the person who watches."""
        print(f"  {time.strftime('%H:%M:%S')} {self.name}: {line}", flush=True)

    def postgres(self, name: str, settings: Mapping[str, Any] | None = None) -> PostgresServer:
        """Start a PostgreSQL that ends with the section."""
        given = {key: str(value) for key, value in {**POSTGRES, **(settings or {})}.items()}
        server = PostgresServer(self.root / name, settings=given, die_with_parent=True)
        self.stack.callback(server.remove)
        return server.start()

    def valkey(self, name: str, **given: Any) -> ValkeyServer:
        """Start a Valkey that ends with the section."""
        server = ValkeyServer(self.root / name, die_with_parent=True, **given)
        self.stack.callback(server.remove)
        return server.start()
