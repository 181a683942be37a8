"""What other organizations of both cells feel of a move: p50 and p99 of their transactions."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized
from typing import Any, Self

import psycopg
from tests.bench.cells import (
    DESTINATION,
    DESTINATION_OTHERS,
    OWNED,
    SOURCE,
    SOURCE_OTHERS,
    BenchCells,
    condition,
)
from tests.bench.harness import Bench, Section, Table, Target, percentile, turning

from cellferry.errors import CellferryError
from cellferry.migration import Context, steps
from cellferry.migration.governor import Aim
from cellferry.model import Actor
from cellferry.settings import Settings

ROWS = 2_000_000
PER_SECOND = 40
"""Transactions each second at each cell: well below what the two cores can do."""
SESSIONS = 4
IDLE_S = 6.0
#: Before anything counts.
WARM_UP_S = 2.0
COPY_S = 24.0
AROUND_CUTOVER_S = 1.0
FIXED_ROWS_PER_S = 5_000
PIECE_ROWS = 100
BURST_S = 0.1
NICE = 10
LIMIT = 1.3
WIDE_MS = 2.0
"""The wide target, above the p95 of idle probes."""

AUTOMATIC, WIDE = "controller", "controller, wide target"
FIXED, PLAIN = "fixed rate", "plain COPY, fixed rate"
CONTENDERS: Mapping[str, Mapping[str, Any]] = {
    AUTOMATIC: {"latency_target_ms": 0},
    WIDE: {},
    "no throttle": {},
    FIXED: {"rows_per_s": FIXED_ROWS_PER_S},
    PLAIN: {},
}
"""The options of each. The first finds its target by itself, and what it found idle makes the wide
one, such as an operator in a hurry would set. The last is no move: what any copy at that rate costs
the neighbours of this machine."""


_METHOD = f"""
Other organizations of both cells (49 at the source, 20 at the destination) do {PER_SECOND} small
transactions a second at each cell, open loop: two reads by index, a one-row UPDATE and an INSERT
through the gates, a durable commit; what one took counts from when it was due. They work alone,
then beside the copy of the large organization, for {COPY_S:.0f} s or until it ends, several times
in turn: without a throttle, with {FIXED_ROWS_PER_S:,} rows/s, and with the latency-driven
controller: once with the target that it finds by itself (a quarter more than an idle cell's p95,
and at least {Aim.LEAST_ROOM_S * 1000:g} ms more), once with a wide one, {WIDE_MS:g} ms more than
idle, for an operator in a hurry. *Plain COPY* is the limit: a script that reads with one COPY and
writes with others, in binary, at the same fixed rate, {PIECE_ROWS} rows at once and a commit each
second, and does nothing else. *Cutover* is that of another copy, made at full speed, until a second
after it; *after* is the {IDLE_S / 2:.0f} s behind that. What this machine has still to write of
such a copy is written first: otherwise neighbours wait for it now and then, as they do without a
throttle. In production the mover runs on another machine; here it shares two cores with both
servers and with the neighbours' clients, and runs at nice {NICE}, while the servers' own processes
that work for it run as all others do.
"""


@dataclass(frozen=True)
class Felt:
    """One transaction of a neighbour: when it was due (monotonic), and how long it took, ms."""

    due: float
    took_ms: float


@dataclass
class Neighbours:
    """Small transactions of other organizations at one cell, in a process of their own.

    Open loop: each is due at its time whether or not those before it have ended, and what it took
    counts from then. One reads an issue and a page of comments by index, changes the issue,
    writes an event, and commits durably, through the gates' triggers.
    """

    url: str
    organizations: Sequence[int]
    per_second: int = PER_SECOND

    def __enter__(self) -> Self:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(self.url, list(self.organizations), self.per_second, theirs),
            daemon=True,
        )
        self._process.start()
        theirs.close()
        self._pipe.recv()  # it is under way
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def take(self) -> list[Felt]:
        """Return the transactions that ended since the last call."""
        self._pipe.send(None)
        return list(self._pipe.recv())


def _serve(url: str, organizations: list[int], per_second: int, pipe: Connection) -> None:
    felt: list[Felt] = []
    lock = threading.Lock()
    begins = threading.Barrier(SESSIONS + 1)

    def work(number: int) -> None:
        chance = random.Random(number)
        with psycopg.connect(url) as connection:
            issues = {
                one: [
                    row[0]
                    for row in connection.execute(
                        "SELECT id FROM issues WHERE organization_id = %s LIMIT 200", (one,)
                    )
                ]
                for one in organizations
            }
            connection.commit()
            for one in organizations:  # plans and pages: nobody's first transaction is in the count
                _transaction(connection, one, chance.choice(issues[one]))
            begins.wait()
            turn, began = number, time.monotonic()
            while True:
                due = began + turn / per_second
                turn += SESSIONS
                if (wait := due - time.monotonic()) > 0:
                    time.sleep(wait)
                one = chance.choice(organizations)
                _transaction(connection, one, chance.choice(issues[one]))
                with lock:
                    felt.append(Felt(due, (time.monotonic() - due) * 1000))

    for number in range(SESSIONS):
        threading.Thread(target=work, args=[number], daemon=True).start()
    begins.wait()
    pipe.send("ready")
    while True:
        pipe.recv()
        with lock:
            told, felt[:] = list(felt), []
        pipe.send(told)


def _transaction(connection: psycopg.Connection[Any], organization: int, issue: int) -> None:
    with connection.transaction():
        connection.execute(
            "SELECT title, project_id, author_id FROM issues WHERE id = %s", (issue,), prepare=True
        )
        connection.execute(
            "SELECT id FROM comments WHERE issue_id = %s LIMIT 20", (issue,), prepare=True
        )
        connection.execute(
            "UPDATE issues SET version = version + 1, updated_at = now() WHERE id = %s",
            (issue,),
            prepare=True,
        )
        connection.execute(
            "INSERT INTO events (organization_id, project_id, author_id, action, created_at)"
            " SELECT organization_id, project_id, author_id, 'edited', now() FROM issues"
            " WHERE id = %s",
            (issue,),
            prepare=True,
        )


@contextlib.contextmanager
def neighbours(cells: BenchCells) -> Iterator[dict[str, Neighbours]]:
    """Let the neighbours of both cells work."""
    with contextlib.ExitStack() as stack:
        yield {
            cell: stack.enter_context(
                Neighbours(cells.server(cell).url("app", "bench", "application"), others)
            )
            for cell, others in (
                (SOURCE, [*SOURCE_OTHERS]),
                (DESTINATION, [*DESTINATION_OTHERS]),
            )
        }


# ── the mover, in a process of its own ──────────────────────────────────────────────────────────


def _move(
    known: Settings, connections: Mapping[str, str], step: str, migration: int, pipe: Connection
) -> None:
    os.nice(NICE)
    actor = Actor("bench", role="system")
    with Context.from_settings(known, connections.get, actor=actor) as context:
        began = time.monotonic()
        trouble = ""
        try:
            getattr(steps, step)(context, migration)
        except CellferryError as error:
            trouble = str(error)
        pipe.send((began, time.monotonic(), trouble))


@contextlib.contextmanager
def moving(
    cells: BenchCells, step: str, migration: int
) -> Iterator[tuple[BaseProcess, Connection]]:
    """Run a step in a process of its own; it is killed at the block's end.

    The connection gives its beginning, its end and what went wrong.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (cells.settings, cells.connections, step, migration, theirs)
    process = context.Process(target=_move, args=arguments, daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()


_HEADER, _TRAILER = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff"
"""Of COPY's binary format."""


def _copy_plainly(source: str, destination: str, copied: Synchronized[int]) -> None:
    """Copy the large organization's tables at the fixed rate, and nothing else."""
    os.nice(NICE)
    due = time.monotonic()
    uncommitted = 0
    with psycopg.connect(source) as here, psycopg.connect(destination) as there:
        there.execute("SET session_replication_role = replica")
        for table in ("users", *OWNED):
            chosen = f"SELECT t.* FROM {table} AS t WHERE {condition(table)}"
            with here.cursor().copy(
                f"COPY ({chosen}) TO STDOUT (FORMAT binary)".encode()
            ) as outlet:
                # One message is one row; the first has the header before it.
                messages = (bytes(one).removeprefix(_HEADER) for one in outlet)
                rows = filter(lambda one: one != _TRAILER, messages)
                while some := list(itertools.islice(rows, PIECE_ROWS)):
                    with there.cursor().copy(
                        f"COPY {table} FROM STDIN (FORMAT binary)".encode()
                    ) as inlet:
                        inlet.write(b"".join((_HEADER, *some, _TRAILER)))
                    copied.value += len(some)
                    uncommitted += len(some)
                    if uncommitted >= FIXED_ROWS_PER_S:
                        there.commit()
                        uncommitted = 0
                    # Who is late does not catch up.
                    due = max(due, time.monotonic() - BURST_S) + len(some) / FIXED_ROWS_PER_S
                    time.sleep(max(0.0, due - time.monotonic()))


@contextlib.contextmanager
def copying_plainly(cells: BenchCells) -> Iterator[tuple[BaseProcess, Synchronized[int]]]:
    """Run the script in a process of its own; the value says how many rows it has copied."""
    context = get_context("spawn")
    copied = context.Value("q", 0)
    ends = tuple(cells.connections[f"{cell}-postgres-admin"] for cell in (SOURCE, DESTINATION))
    process = context.Process(target=_copy_plainly, args=(*ends, copied), daemon=True)
    process.start()
    try:
        yield process, copied
    finally:
        process.kill()
        process.join()


@dataclass
class Found:
    """What was felt, by circumstance and cell, of all runs, and how fast the copies were."""

    took_ms: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)
    decisions: list[Mapping[str, Any]] = field(default_factory=list)
    wide_ms: list[float] = field(default_factory=list)

    def add(self, name: str, felt: Mapping[str, Sequence[Felt]], since: float, to: float) -> None:
        """Keep what was due between two moments."""
        for cell, some in felt.items():
            chosen = [one.took_ms for one in some if since <= one.due < to]
            self.took_ms.setdefault((name, cell), []).extend(chosen)

    def of(self, name: str, cell: str | None = None) -> list[float]:
        """Return what was felt at one cell, or at both."""
        return [
            one
            for (whose, where), some in self.took_ms.items()
            if whose == name and cell in (None, where)
            for one in some
        ]

    def idle_probe_s(self) -> float:
        """Return what the automatic target began with: the p95 of the slower cell's probes."""
        found = [float(one["idle_s"]) for one in self.decisions if one["idle_s"] is not None]
        if not found:
            raise RuntimeError(
                "the copy ended before the controller had probed an idle cell: its target is not"
                " known; run the section with a larger --scale"
            )
        return max(found)

    def p99(self, name: str, cell: str | None = None) -> float:
        """Return the 99th percentile of a circumstance in milliseconds."""
        return percentile(self.of(name, cell), 99)

    def worse(self, name: str) -> str:
        """Return the cell whose neighbours feel it more, against idle."""
        return max((SOURCE, DESTINATION), key=lambda cell: self.times_idle(name, cell))

    def times_idle(self, name: str, cell: str) -> float:
        """Return the 99th percentile at a cell against that of both cells when they are idle.

        Of both, which are alike: that of one cell alone varies by half from run to run.
        """
        return self.p99(name, cell) / self.p99("idle")


def run(bench: Bench) -> Section:
    """Measure, and say whether the controller keeps its promise."""
    cells = BenchCells.made(bench, bench.size(ROWS))
    cells.remember()
    idle_s, copy_s = max(1.0, IDLE_S * min(bench.scale * 5, 1)), COPY_S * min(bench.scale * 5, 1)
    found = Found()
    for name in turning(CONTENDERS, bench.runs):
        _copying(bench, cells, found, name, idle_s, max(3.0, copy_s))
    for _ in range(bench.runs):
        _cutting_over(bench, cells, found, idle_s)
    return _section(found)


def _copying(
    bench: Bench, cells: BenchCells, found: Found, name: str, idle_s: float, copy_s: float
) -> None:
    """Let the neighbours work alone for a while, then beside a copy."""
    cells.restore()
    options = CONTENDERS[name]
    if name == WIDE:
        found.wide_ms.append(found.idle_probe_s() * 1000 + WIDE_MS)
        options = {"latency_target_ms": found.wide_ms[-1]}
    migration = cells.plan(**options)
    os.sync()  # nobody's commit waits for what was filled in before
    with neighbours(cells) as working:
        time.sleep(WARM_UP_S)
        _discard(working)
        began = time.monotonic()
        time.sleep(idle_s)
        ended = time.monotonic()
        found.add("idle", {cell: one.take() for cell, one in working.items()}, began, ended)
        if name == PLAIN:
            with copying_plainly(cells) as (process, rows):
                felt, since, now, copied = _beside(
                    process, working, copy_s, lambda: int(rows.value)
                )
        else:
            with moving(cells, "copy", migration) as (process, pipe):
                felt, since, now, copied = _beside(process, working, copy_s, lambda: _copied(cells))
                if pipe.poll():
                    _, now, trouble = pipe.recv()
                    if trouble:
                        raise RuntimeError(trouble)
        with cells.context() as context:
            paces = context.topology.paces(migration)
    found.add(name, felt, since, now)
    found.rates.setdefault(name, []).append(copied / (now - since))
    found.decisions += [
        {"cell": one.cell, "share": one.share, "target_s": one.target_s, "idle_s": one.idle_s}
        for one in paces
        if name == AUTOMATIC
    ]
    notes = "; ".join(f"{one.cell} {one.share:.0%} ({one.note})" for one in paces)
    bench.say(
        f"{name}: {copied / (now - since):,.0f} rows/s for {now - since:.0f} s, p99"
        f" {found.p99(name):.1f} ms (idle {found.p99('idle'):.1f} ms) {notes}"
    )


def _beside(
    process: BaseProcess,
    working: Mapping[str, Neighbours],
    copy_s: float,
    count: Callable[[], int],
) -> tuple[dict[str, list[Felt]], float, float, int]:
    """Watch a copy for a while, or to its end.

    Returns:
        What the neighbours felt, from and to which moment, and how many rows were copied.
    """
    while process.is_alive() and not count():  # what comes before rows arrive is no copy
        time.sleep(0.05)
    since = time.monotonic()
    _discard(working)
    while time.monotonic() < since + copy_s and process.is_alive():
        time.sleep(0.1)
    now = time.monotonic()
    if not process.is_alive() and process.exitcode:
        raise RuntimeError(f"the copy ended with {process.exitcode}")
    return {cell: one.take() for cell, one in working.items()}, since, now, count()


def _copied(cells: BenchCells) -> int:
    with cells.admin(DESTINATION) as connection:
        row = connection.execute("SELECT sum(rows)::bigint FROM cellferry.checkpoint").fetchone()
    return int(row[0] or 0) if row else 0


def _discard(working: Mapping[str, Neighbours]) -> None:
    for one in working.values():
        one.take()


def _cutting_over(bench: Bench, cells: BenchCells, found: Found, idle_s: float) -> None:
    """Move the organization for good, as fast as it goes, and look at its cutover."""
    cells.restore()
    migration = cells.plan()
    for step in ("copy", "sync", "verify"):
        cells.run(step, migration)
    os.sync()  # what the copy at full speed left to be written is no cost of the cutover
    with neighbours(cells) as working:
        time.sleep(WARM_UP_S)
        with moving(cells, "cutover", migration) as (process, pipe):
            if not pipe.poll(120):
                raise RuntimeError("the cutover did not end")
            began, ended, trouble = pipe.recv()
            if trouble:
                raise RuntimeError(trouble)
            process.join()
        time.sleep(AROUND_CUTOVER_S)
        felt = {cell: one.take() for cell, one in working.items()}
        found.add("cutover", felt, began, ended + AROUND_CUTOVER_S)
        began = time.monotonic()
        time.sleep(idle_s / 2)
        felt = {cell: one.take() for cell, one in working.items()}
        found.add("after", felt, began, time.monotonic())
    bench.say(f"cutover: p99 {found.p99('cutover'):.1f} ms")


def _section(found: Found) -> Section:
    order = ("idle", *CONTENDERS, "cutover", "after")
    rows = []
    for name in order:
        rates = found.rates.get(name)
        rows.append(
            [
                name,
                len(found.of(name)),
                percentile(found.of(name), 50),
                found.p99(name, SOURCE),
                found.p99(name, DESTINATION),
                found.p99(name),
                found.p99(name) / found.p99("idle"),
                statistics.median(rates) if rates else None,
            ]
        )
    free = found.p99("no throttle") / found.p99("idle")
    fast = statistics.median(found.rates["no throttle"])
    shares = [one["share"] for one in found.decisions]
    table = Table(
        ("While", "transactions", "p50, ms", "p99 at the source, ms", "p99 at the destination, ms",
         "p99, ms", "times idle", "rows copied/s"),
        rows,
    )  # fmt: skip
    wide_ms = " to ".join(f"{one:.1f}" for one in sorted({min(found.wide_ms), max(found.wide_ms)}))
    remarks = [
        f"With {target} the controller copied {statistics.median(found.rates[name]) / fast:.0%} as"
        f" fast as no throttle did, at {found.p99(name) / found.p99('idle'):.2f} times the idle p99"
        f" instead of {free:.2f} times."
        for name, target in (
            (AUTOMATIC, "its own target"),
            (WIDE, f"a target of {wide_ms} ms"),
        )
    ]
    if shares:
        remarks.append(
            f"At the end of its runs the controller with its own target let the mover work"
            f" {min(shares):.0%} to {max(shares):.0%} of the time."
        )
    return Section(
        title="Neighbours",
        method=_METHOD,
        tables=[table],
        targets=[
            Target(
                "Neighbours' p99 at the worse cell during a copy with the controller, against idle",
                LIMIT,
                found.times_idle(AUTOMATIC, found.worse(AUTOMATIC)),
                why=_why(found),
            )
        ],
        remarks=remarks,
    )


def _why(found: Found) -> str:
    worse = found.worse(AUTOMATIC)
    felt = (
        f"at the {'source' if worse == SOURCE else 'destination'}"
        f" {found.p99(AUTOMATIC, worse):.1f} ms, idle {found.p99('idle'):.1f} ms"
    )
    if found.times_idle(AUTOMATIC, worse) <= LIMIT:
        return felt
    plain = found.times_idle(PLAIN, found.worse(PLAIN))
    return (
        f"{felt}: both servers, the mover and the clients share two cores, and a piece of the"
        " mover's work that has begun in a server is not taken back; a plain COPY at"
        f" {FIXED_ROWS_PER_S:,} rows/s, which does nothing else, costs them {plain:.2f} times idle"
    )
