"""Writers of one organization in processes of their own, who remember how each write fared.

Each transaction asks whether the cell has authority, adds a comment with a text that no other has,
and raises the version of an issue. Who moves the organization is nothing to them: they ask the
route client where it is, and go where they are told to.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from cellferry.model import Route
from cellferry.routing import RouteClient, UnknownOutcome, transaction

DEADLINE_S = 60.0
PROCESSES = 2
SESSIONS = 4
"""In each process."""


@dataclass(frozen=True)
class Assignment:
    """What a writer process is told.

    Attributes:
        urls: of the application's role, by cell.
        enter: SQL with the organization and the epoch that passes the fence, or raises.
        targets: (issue, author) that are written to.
    """

    topology: str
    urls: Mapping[str, str]
    organization: str
    enter: str
    targets: Sequence[tuple[int, int]]
    per_s: float
    name: str
    file: str


@dataclass(frozen=True, slots=True)
class Write:
    """One write: when it began (wall clock), how long its writer waited, what became of it."""

    name: str
    at: float
    seconds: float
    outcome: str


@dataclass
class Written:
    """What all writers did."""

    writes: list[Write] = field(default_factory=list)

    @property
    def acknowledged_per_s(self) -> float:
        """Acknowledged writes per second from the first to the last."""
        good = [one for one in self.writes if one.outcome == "acknowledged"]
        if len(good) < 2:
            return 0.0
        span = max(one.at + one.seconds for one in good) - min(one.at for one in good)
        return len(good) / span

    def longest_around(self, moment: float, around_s: float = 0.4) -> float:
        """Return the longest wait of a write that overlaps this much time around `moment`."""
        return max(
            (
                one.seconds
                for one in self.writes
                if one.at <= moment + around_s and one.at + one.seconds >= moment - around_s
            ),
            default=0.0,
        )

    def faults(self, bodies: Sequence[str]) -> tuple[int, int]:
        """Return how many acknowledged writes are lost and how many are there twice.

        Args:
            bodies: the comments' texts in the cell where the organization is now.
        """
        there = Counter(bodies)
        lost = sum(one.outcome == "acknowledged" and not there[one.name] for one in self.writes)
        doubled = sum(there[one.name] > 1 for one in self.writes)
        return lost, doubled


@contextmanager
def writing(
    directory: Path, topology: str, urls: Mapping[str, str], **told: Any
) -> Iterator[Written]:
    """Let writers write while the block runs; then give what they did."""
    directory.mkdir(parents=True, exist_ok=True)
    per_s = told.pop("per_s")
    stamp = f"{time.time_ns():x}"
    spawn = multiprocessing.get_context("spawn")
    stop, ready = spawn.Event(), spawn.Semaphore(0)
    files, processes = [], []
    for number in range(PROCESSES):
        files.append(directory / f"{stamp}-{number}.jsonl")
        assignment = Assignment(
            topology=topology,
            urls=urls,
            per_s=per_s / PROCESSES,
            name=f"{stamp}-{number}",
            file=str(files[-1]),
            **told,
        )
        processes.append(spawn.Process(target=_write, args=(assignment, stop, ready), daemon=True))
    written = Written()
    for process in processes:
        process.start()
    try:
        for _ in range(PROCESSES * SESSIONS):
            if not ready.acquire(timeout=60):
                raise RuntimeError("a writer did not begin within 60 s")
        yield written
    finally:
        stop.set()
        for process in processes:
            process.join(DEADLINE_S + 10)
            if process.is_alive():
                process.kill()
    for file in files:
        with file.open(encoding="utf-8") as lines:
            written.writes += [Write(*json.loads(line)) for line in lines]
    if any(process.exitcode for process in processes):
        raise RuntimeError("a writer process failed")


def _write(assignment: Assignment, stop: Any, ready: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    failures: list[BaseException] = []
    done: list[list[Write]] = [[] for _ in range(SESSIONS)]
    with RouteClient(assignment.topology, application="bench") as router:

        def session(number: int) -> None:
            try:
                _session(assignment, number, router, done[number], stop, ready)
            except BaseException as error:
                failures.append(error)
                stop.set()
                raise

        threads = [threading.Thread(target=session, args=(number,)) for number in range(SESSIONS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with Path(assignment.file).open("w", encoding="utf-8") as file:
        file.writelines(
            json.dumps(astuple(one)) + "\n" for one in itertools.chain.from_iterable(done)
        )
    if failures:
        raise failures[0]


def _session(
    assignment: Assignment,
    number: int,
    router: RouteClient,
    done: list[Write],
    stop: Any,
    ready: Any,
) -> None:
    chance = random.Random(f"{assignment.name} {number}")
    connections = {
        cell: psycopg.connect(url, autocommit=True, prepare_threshold=2)
        for cell, url in assignment.urls.items()
    }
    interval = SESSIONS / assignment.per_s
    due = time.monotonic() + chance.random() * interval
    while not stop.is_set():
        time.sleep(max(0.0, due - time.monotonic()))
        # After a wait it catches up for a moment, no more.
        due = max(due + (0.5 + chance.random()) * interval, time.monotonic() - 0.25)
        name = f"{assignment.name}-{number}-{len(done)}"
        issue, author = chance.choice(assignment.targets)

        def once(route: Route, name: str = name, issue: int = issue, author: int = author) -> None:
            _once(assignment, connections, route, name, issue, author)

        at, begun, outcome = time.time(), time.monotonic(), "acknowledged"
        try:
            router.run(assignment.organization, once, DEADLINE_S)
        except UnknownOutcome:
            outcome = "unknown"
        done.append(Write(name, at, time.monotonic() - begun, outcome))
        if len(done) == 1:
            ready.release()
    for connection in connections.values():
        connection.close()


def _once(
    assignment: Assignment,
    connections: Mapping[str, psycopg.Connection[Any]],
    route: Route,
    name: str,
    issue: int,
    author: int,
) -> None:
    with transaction(connections[route.cell], route, assert_authority=False) as connection:
        organization = int(assignment.organization)
        connection.execute(assignment.enter.encode(), (assignment.organization, route.epoch))
        connection.execute(
            "INSERT INTO comments (organization_id, issue_id, author_id, body)"
            " VALUES (%s, %s, %s, %s)",
            (organization, issue, author, name),
        )
        connection.execute(
            "UPDATE issues SET version = version + 1, updated_at = now() WHERE id = %s", (issue,)
        )
