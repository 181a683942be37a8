"""Cutover, switchback, clean-up, and again: one organization under load, and a checker at the end.

`python -m tests.fault.alternations --times 100` starts two cells and a topology of its own, lets
the sample application write to all organizations, and moves one there and back so many times. It
prints how long its writers waited at each flip, and what the ledger's checker found. The exit
status is 0 only if nothing is lost, doubled, changed or left behind. Interrupted, it ends after the
alternation that is under way and reports on what was done.
"""

from __future__ import annotations

import argparse
import json
import secrets
import signal
import statistics
import sys
import tempfile
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import yaml
from psycopg import sql

from cellferry import settings
from cellferry.errors import TransientError
from cellferry.local.application import Application, Checked
from cellferry.local.application.checker import read_history
from cellferry.local.application.ledger import Ledger, Operation
from cellferry.local.postgres_server import DURABLE, FAST, PostgresServer
from cellferry.local.valkey_server import ValkeyServer
from cellferry.migration import Context, MoveOptions, steps
from cellferry.model import Actor, Organization, State

CELLS = ("cell-1", "cell-2")
ROOT = Path(__file__).resolve().parents[2]
ACTOR = Actor("alternations", role="system")
#: A write that waited at a flip overlaps this much time around it, in seconds.
AROUND_FLIP_S = 0.4
#: As often an operator, or Airflow, would try a step that says "try again".
TRIES = 10


@dataclass
class Outcome:
    """What came of it. Pauses are the longest wait of a write at each flip, in seconds."""

    checked: Checked
    pauses: Mapping[str, list[float]]
    left_behind: list[str] = field(default_factory=list)
    retries: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing was lost, doubled, changed or left behind."""
        return self.checked.ok and not self.left_behind

    def lines(self) -> Iterator[str]:
        """Yield the report."""
        for name, found in self.pauses.items():
            yield f"{name:12} {len(found):4} flips   write pause {distribution(found)}"
        yield f"{self.checked.acknowledged:,} acknowledged writes; {self.retries} steps tried again"
        yield from self.checked.faults
        yield from self.left_behind
        yield f"{self.checked.lost} lost, {self.checked.doubled} doubled"


def distribution(pauses: Sequence[float]) -> str:
    """Return p50, p90 and max in milliseconds."""
    if not pauses:
        return "unknown: nobody wrote"
    ordered = sorted(pauses)
    p90 = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
    return (
        f"p50 {statistics.median(ordered) * 1000:.0f} ms, p90 {p90 * 1000:.0f} ms, "
        f"max {ordered[-1] * 1000:.0f} ms"
    )


def alternate(
    times: int,
    *,
    rows: int = 5_000,
    writes_per_s: float = 200,
    durable: bool = True,
    say: Callable[[str], None] = lambda _text: None,
    stop: threading.Event | None = None,
) -> Outcome:
    """Move an organization to the other cell and back `times` times while it is written to.

    With `stop` set it ends after the alternation that is under way, and checks that.
    """
    stop = stop or threading.Event()
    with opened(DURABLE if durable else FAST, rows=rows) as fleet:
        moved = fleet.application.organizations_to_move(1)[0]
        retries = 0
        with fleet.application.start_traffic(writes_per_s, focus=[moved]):
            for number in range(1, times + 1):
                if stop.is_set():
                    break
                retries += there_and_back(fleet.context, moved)
                say(f"{number} of {times}")
            time.sleep(1)
        found = flips(fleet.application.ledger(), moved, fleet.topology_url)
        return Outcome(
            fleet.application.check(),
            {
                kind: [one.longest_s for one in found if one.kind == kind]
                for kind in ("cutover", "switchback")
            },
            left_behind(fleet.context, moved),
            retries,
        )


@dataclass(frozen=True)
class Fleet:
    """Two prepared cells with the sample application's organizations, and their topology."""

    context: Context
    application: Application
    topology_url: str


@contextmanager
def opened(postgres: Mapping[str, str], *, rows: int, sizes: Sequence[int] = ()) -> Iterator[Fleet]:
    """Start two cells and a topology; all ends with the block.

    Args:
        postgres: settings of the servers.
        rows: of the first organization.
        sizes: rows of further organizations, which come last.
    """
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cellferry-alt-")))
        connections = _start(stack, directory, postgres)
        config = directory / "cells.yaml"
        config.write_text(json.dumps(_deployment()), encoding="utf-8")
        context = stack.enter_context(
            Context.from_settings(settings.load(config), connections.get, actor=ACTOR)
        )
        context.topology.install()
        application = Application(
            connections.get, context.topology, cells=CELLS, directory=directory / "application"
        )
        application.provision()
        application.seed(organizations=4, rows=rows, sizes=sizes)
        for cell in CELLS:
            steps.prepare_cell(context, cell)
        yield Fleet(context, application, connections["cellferry-topology"])


def left_behind(context: Context, moved: Organization) -> list[str]:
    """Return what the topology still knows of in the cells, in words."""
    return [
        f"left behind: {one.kind} {one.name} in {one.cell}/{one.store} of migration {found.id}"
        for found in context.topology.migrations(org=moved)
        for one in context.topology.live_resources(found.id)
    ]


def there_and_back(context: Context, moved: Organization) -> int:
    """One alternation; returns how many steps had to be tried again."""
    plan = steps.plan(
        context,
        moved.slug,
        CELLS[1],
        options=MoveOptions(strategy="online", ttl_s=0, soak_s=0),
        record=True,
    )
    number = plan.migration
    if number is None:
        raise RuntimeError("the plan was not recorded")
    retries = 0
    for step in (steps.copy, steps.sync, steps.verify, steps.cutover, steps.soak):
        retries += _insist(lambda step=step: step(context, number))  # type: ignore[misc]
    retries += _insist(lambda: steps.roll_back(context, number, "the other way"))
    retries += _insist(lambda: steps.cleanup(context, number))
    if context.topology.migration(number).state is not State.ROLLED_BACK:
        raise RuntimeError(f"migration {number} was not rolled back")
    return retries


def _insist(step: Callable[[], Any]) -> int:
    for tried in range(TRIES):
        try:
            step()
        except TransientError:
            if tried == TRIES - 1:
                raise
            time.sleep(0.2)
        else:
            return tried
    return TRIES


@dataclass(frozen=True)
class Flip:
    """A change of authority, and the write that waited longest around it.

    Attributes:
        kind: `cutover` or `switchback`.
        at: when the topology wrote the new route, just before it committed it; seconds since 1970.
        slowest: None where nobody wrote.
    """

    kind: str
    at: float
    slowest: Operation | None = None

    @property
    def longest_s(self) -> float:
        """How long that write waited."""
        return self.slowest.seconds if self.slowest else 0.0


def flips(ledger: Ledger, moved: Organization, topology: str) -> list[Flip]:
    """Return the flips of an organization, with the slowest write around each."""
    turns = sorted(
        (one.at, one.cell)
        for one in read_history(topology)
        if one.organization == moved.id and one.epoch > 1
    )
    times = [at for at, _ in turns]
    slowest: list[Operation | None] = [None] * len(turns)
    for one in ledger.of(moved.id):
        if one.is_read:
            continue
        index = bisect_left(times, one.wall - AROUND_FLIP_S)
        while index < len(times) and times[index] <= one.wall + one.seconds + AROUND_FLIP_S:
            known = slowest[index]
            if known is None or one.seconds > known.seconds:
                slowest[index] = one
            index += 1
    return [
        Flip("cutover" if cell == CELLS[1] else "switchback", at, one)
        for (at, cell), one in zip(turns, slowest, strict=True)
    ]


def _start(stack: ExitStack, directory: Path, durability: Mapping[str, str]) -> dict[str, str]:
    """Start the servers; return the connections."""
    password = secrets.token_urlsafe(16)
    connections: dict[str, str] = {}
    for name in ("topology", *CELLS):
        postgres = PostgresServer(
            directory / f"{name}-postgres", settings=durability, die_with_parent=True
        )
        stack.callback(postgres.remove)
        postgres.start()
        if name == "topology":
            connections["cellferry-topology"] = postgres.url()
            continue
        with psycopg.connect(postgres.url(), autocommit=True) as connection:
            connection.execute("CREATE DATABASE app")
            connection.execute(
                sql.SQL("CREATE ROLE mover LOGIN PASSWORD {}").format(sql.Literal(password))
            )
        valkey = ValkeyServer(directory / f"{name}-valkey", die_with_parent=True)
        stack.callback(valkey.remove)
        valkey.start()
        connections[f"{name}-postgres-admin"] = postgres.url(dbname="app")
        connections[f"{name}-postgres"] = postgres.url("mover", password, "app")
        connections[f"{name}-redis"] = connections[f"{name}-redis-admin"] = valkey.url()
    return connections


def _deployment() -> dict[str, Any]:
    """The project's own deployment, with two of its cells."""
    source = ROOT / "include" / "config" / "cells.yaml"
    found: dict[str, Any] = yaml.safe_load(source.read_text(encoding="utf-8"))
    found["organization"]["data_map"] = str(source.parent / found["organization"]["data_map"])
    found["cells"] = {name: found["cells"][name] for name in CELLS}
    return found


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    started = time.monotonic()

    def say(text: str) -> None:
        if not quiet:
            print(f"{time.monotonic() - started:7.1f} s  {text}", flush=True)

    yield say


def main() -> int:
    """Run it; print the report."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fault.alternations", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--times", type=int, default=100, help="alternations")
    parser.add_argument("--rows", type=int, default=5_000, help="of the organization that moves")
    parser.add_argument("--writes", type=float, default=200, help="writes per second of all")
    parser.add_argument("--quiet", action="store_true", help="only the report")
    arguments = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with _progress(arguments.quiet) as say:
        outcome = alternate(
            arguments.times,
            rows=arguments.rows,
            writes_per_s=arguments.writes,
            say=say,
            stop=stop,
        )
    print("\n".join(outcome.lines()))
    return 0 if outcome.ok else 1


if __name__ == "__main__":
    sys.exit(main())
