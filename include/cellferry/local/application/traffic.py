"""One writer process of the sample application.

`python -m cellferry.local.application.traffic --assignment FILE --writer 0 [--duration 60]`

One thread for each session: an organization's wait never keeps another's writers from writing.
Ends its operations in flight when it is told to stop (SIGTERM), or when its parent is gone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from cellferry.local.application.keyspace import Keyspace
from cellferry.local.application.ledger import LedgerWriter
from cellferry.local.application.relational import Relational
from cellferry.local.application.session import RowGone, Session
from cellferry.local.application.writers import Assignment, Share, ledger_path, stats_path
from cellferry.routing import RouteClient

_READS = 0.12
_BACKLOG_S = 0.25
_STATS_EVERY_S = 0.5
_REPORTS_EVERY_S = 5.0


class Writer:
    """A session's thread: picks operations at its rate until it is stopped."""

    def __init__(self, session: Session, relational: Relational, keyspace: Keyspace) -> None:
        self.session = session
        self.relational = relational
        self.keyspace = keyspace
        chances = {**_mix(relational, keyspace), self.close_and_enqueue: 6}
        self._operations = list(chances)
        self._weights = list(chances.values())

    def run(self, rate: float, stop: threading.Event) -> None:
        """Do `rate` writes a second; after a wait it catches up for a moment, no more."""
        self.session.warm_up()
        chance = self.session.random
        due = time.monotonic() + chance.random() / rate
        while not stop.is_set():
            wait = due - time.monotonic()
            if wait > 0 and stop.wait(wait):
                break
            if wait < -_BACKLOG_S:
                due = time.monotonic() - _BACKLOG_S
            # 0.5 to 1.5 of the interval: neither in step with each other nor in bursts
            due += (0.5 + chance.random()) / rate
            before = self.session.tally.writes
            try:
                self.step()
            except RowGone as error:
                print(f"{self.session.name}: {error}", file=sys.stderr, flush=True)  # noqa: T201
                stop.wait(0.5)
            else:
                # an operation of two writes counts as two, one that found nothing to do as none
                due += (self.session.tally.writes - before - 1) / rate

    def step(self) -> None:
        """Do one operation, and sometimes read back what was written."""
        chance = self.session.random
        chance.choices(self._operations, self._weights)[0]()
        if chance.random() < _READS:
            (self.relational if chance.random() < 0.5 else self.keyspace).read_back()

    def close_and_enqueue(self) -> None:
        """PostgreSQL, then Redis: each store's command is tried again on its own (hazard 9)."""
        row = self.relational.edit_issue()
        if row is not None:
            self.keyspace.enqueue(f"{row.ref}@{row.version}")


def main() -> int:
    """Run one writer process until it is told to stop."""
    parser = argparse.ArgumentParser(
        prog="cellferry.local.application.traffic", description=__doc__
    )
    parser.add_argument("--assignment", type=Path, required=True, help="file with what to write")
    parser.add_argument("--writer", type=int, required=True, help="number of this process, from 0")
    parser.add_argument("--duration", type=float, default=None, help="seconds; endless if absent")
    arguments = parser.parse_args()
    assignment = Assignment.read(arguments.assignment)
    stop = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        del number, frame
        stop.set()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    # Threads that wait for servers need the interpreter only for moments.
    sys.setswitchinterval(0.002)
    failures: list[str] = []

    def fail(thread: threading.ExceptHookArgs) -> None:
        # A thread that ends in silence would look like an organization that is not written to.
        failures.append(thread.thread.name if thread.thread else "?")
        threading.__excepthook__(thread)
        stop.set()

    threading.excepthook = fail
    with RouteClient(
        assignment.topology, application="sample", report_every_s=_REPORTS_EVERY_S
    ) as router:
        run(assignment, arguments.writer, router, stop, arguments.duration)
    return 1 if failures else 0


def run(
    assignment: Assignment,
    number: int,
    router: RouteClient,
    stop: threading.Event,
    duration: float | None = None,
) -> None:
    """Start this process's sessions and wait until it is stopped or `duration` seconds are over."""
    directory = Path(assignment.directory)
    parent = os.getppid()
    ends = time.monotonic() + duration if duration is not None else None
    stats = stats_path(directory, assignment.run, number)
    stats.parent.mkdir(parents=True, exist_ok=True)
    with LedgerWriter(ledger_path(directory, assignment.run, number)) as ledger:
        writers = []
        threads = []
        for index, share in enumerate(assignment.shares):
            first = (number + index) % assignment.processes
            for slot in range(first, share.sessions, assignment.processes):
                writer = _writer(assignment, share, slot, router, ledger)
                writers.append(writer)
                threads.append(
                    threading.Thread(
                        target=writer.run,
                        args=(share.writes_per_s / share.sessions, stop),
                        name=writer.session.name,
                    )
                )
        for thread in threads:
            thread.start()
        while not stop.wait(_STATS_EVERY_S):
            _report(stats, writers)
            orphaned = assignment.die_with_parent and os.getppid() != parent
            if orphaned or (ends is not None and time.monotonic() > ends):
                stop.set()
        for thread in threads:
            thread.join()
        _report(stats, writers)
        for writer in writers:
            writer.session.close()


def _writer(
    assignment: Assignment, share: Share, slot: int, router: RouteClient, ledger: LedgerWriter
) -> Writer:
    name = f"r{assignment.run}-{share.organization}-{slot}"
    chance = random.Random(f"{assignment.seed} {name}")  # noqa: S311 - no secrets, and repeatable
    session = Session(name, share.organization, router, share.urls, ledger, chance)
    relational = Relational(session, slot, share.sessions, assignment.run)
    return Writer(session, relational, Keyspace(session))


def _mix(sql: Relational, keys: Keyspace) -> dict[Callable[[], object], int]:
    return {
        sql.open_issue: 10,
        sql.edit_issue: 12,
        sql.delete_issue: 3,
        sql.rekey_issue: 2,
        sql.replace_issue: 2,
        sql.add_note: 6,
        sql.edit_note: 5,
        sql.delete_note: 2,
        sql.make_label: 1,
        sql.swap_labels: 2,
        sql.link_label: 4,
        sql.move_card: 4,
        sql.set_preference: 5,
        sql.view_page: 6,
        sql.open_merge_request: 3,
        sql.add_emoji: 2,
        sql.add_member: 2,
        keys.count: 8,
        keys.tally: 4,
        keys.dequeue: 4,
        keys.rank: 4,
        keys.publish: 5,
        keys.consume: 5,
        keys.log_in: 7,
    }


def _report(path: Path, writers: list[Writer]) -> None:
    organizations: dict[str, dict[str, int]] = {}
    for writer in writers:
        tally = writer.session.tally
        counts = organizations.setdefault(writer.session.organization, {})
        for name in ("acknowledged", "refused", "unknown", "reads"):
            counts[name] = counts.get(name, 0) + getattr(tally, name)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps({"organizations": organizations}), encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
