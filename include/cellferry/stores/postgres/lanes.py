"""Lanes: several threads copy for one step, whose own thread alone speaks to everybody else.

What a lane has to report, and what it asks (may the step go on?), is done by the step's thread
while the lane waits for it. So nothing outside the copy need be safe for threads, and whatever is
raised there (a pause, a lost lease, Ctrl-C) ends all lanes. The first error of all is the step's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import psycopg

from cellferry.stores.postgres.schema import Name, Table

T = TypeVar("T")

#: How often (seconds) the step's thread looks up while no lane sends it on an errand.
LOOK_UP_S = 0.5

#: When the step ends, lanes may finish the batch they are at for so long (seconds). A longer one
#: is blocked, most likely: its statements are cancelled, again and again until it has ended.
LAST_BATCH_S = 0.5

#: A server that takes no request to cancel (seconds) may have gone: keepalives end the session.
CANCEL_TIMEOUT_S = 2.0


class Abandoned(Exception):
    """Ends a lane because its step ends; never leaves this module."""


@dataclass(frozen=True, slots=True)
class _Errand:
    """What a lane wants the step's thread to do."""

    work: Callable[[], Any]
    answer: Future[Any]


@dataclass(frozen=True, slots=True)
class _End:
    """Of one lane; `error` is None when it had nothing left to do."""

    error: BaseException | None = None


class Lane:
    """One thread's side of `Lanes`."""

    def __init__(self, inbox: SimpleQueue[_Errand | _End], ending: threading.Event) -> None:
        self._inbox = inbox
        self._ending = ending
        self._lock = threading.Lock()
        self._connections: tuple[psycopg.Connection[Any], ...] = ()

    def check(self) -> None:
        """Raise when this lane must end; costs nothing."""
        if self._ending.is_set():
            raise Abandoned

    def send(self, work: Callable[[], T]) -> T:
        """Have `work` done by the step's thread and return what it returns.

        What it raises there ends the step; this lane learns only that it must end.
        """
        answer: Future[T] = Future()
        self._inbox.put(_Errand(work, answer))
        self.check()  # behind `put`: from now on somebody looks into the inbox, or it is too late
        try:
            return answer.result()
        except CancelledError as error:
            raise Abandoned from error

    @contextmanager
    def cancellable(self, *connections: psycopg.Connection[Any]) -> Iterator[None]:
        """Let the end of the step cancel what these are doing while the block is open."""
        with self._lock:
            self._connections = connections
        try:
            self.check()
            yield
        finally:
            with self._lock:
                self._connections = ()

    def cancel(self) -> None:
        """Cancel what runs on the lane's connections; for the step's thread."""
        with self._lock:
            for connection in self._connections:
                with suppress(psycopg.Error):
                    connection.cancel_safe(timeout=CANCEL_TIMEOUT_S)


class Lanes:
    """Runs the same work in `count` threads; for one run."""

    def __init__(self, count: int) -> None:
        self._inbox: SimpleQueue[_Errand | _End] = SimpleQueue()
        self._ending = threading.Event()
        self._lanes = [Lane(self._inbox, self._ending) for _ in range(count)]

    def run(
        self,
        work: Callable[[Lane], None],
        meanwhile: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        """Return when every lane has done its `work` to the end; no thread is left.

        Args:
            work: what each lane does. It closes what it opens.
            meanwhile: called here now and then while no lane has anything to say, for instance
                because all are blocked; what it raises ends the step.
            on_end: wakes lanes that wait for each other; called once, however the run ends.

        Raises:
            BaseException: the first that a lane raised, or that an errand of one did here; the
                other lanes have ended.
        """
        threads = [
            threading.Thread(
                target=self._drive, args=(work, lane), name=f"copy lane {number}", daemon=True
            )
            for number, lane in enumerate(self._lanes, start=1)
        ]
        try:
            for thread in threads:
                thread.start()
            self._serve(len(threads), meanwhile)
        finally:
            self._ending.set()
            on_end()
            self._dismiss()
            self._join([thread for thread in threads if thread.ident is not None])

    def _drive(self, work: Callable[[Lane], None], lane: Lane) -> None:
        try:
            work(lane)
        except BaseException as error:  # noqa: BLE001 - the step raises it
            self._inbox.put(_End(error))
        else:
            self._inbox.put(_End())

    def _serve(self, working: int, meanwhile: Callable[[], None]) -> None:
        while working:
            try:
                item = self._inbox.get(timeout=LOOK_UP_S)
            except Empty:
                meanwhile()
                continue
            if isinstance(item, _Errand):
                try:
                    item.answer.set_result(item.work())
                except BaseException:
                    item.answer.cancel()
                    raise
            elif item.error is not None:
                raise item.error
            else:
                working -= 1

    def _dismiss(self) -> None:
        """Turn away who still waits for an answer; who comes later sees that the step ends."""
        with suppress(Empty):
            while True:
                item = self._inbox.get_nowait()
                if isinstance(item, _Errand):
                    item.answer.cancel()

    def _join(self, threads: Sequence[threading.Thread]) -> None:
        for thread in threads:
            thread.join(LAST_BATCH_S)
        while any(thread.is_alive() for thread in threads):
            for lane in self._lanes:
                lane.cancel()
            for thread in threads:
                thread.join(LAST_BATCH_S)


class Agenda:
    """Which table is copied next, for several lanes.

    A table waits for those through which it is owned: of a row whose parent has not come nobody
    can tell whose it is, and so not whether it may give way to another. Of those that need not
    wait the largest goes first, together with what waits for it.

    Args:
        tables: each behind those through which it is owned.
        rows: how many each has, by its name.
    """

    def __init__(self, tables: Sequence[Table], rows: Mapping[Name, int]) -> None:
        self._changed = threading.Condition()
        self._closed = False
        self._waiting = {table.name: table for table in tables}
        self._missing = set(self._waiting)
        self._parents: dict[Name, set[Name]] = {}
        before: set[Name] = set()
        for table in tables:
            # Only what comes before it: where paths run in circles nothing may wait for itself.
            self._parents[table.name] = before & {
                hop.parent for path in table.owners for hop in path.hops
            }
            before.add(table.name)
        self._weight = {table.name: rows.get(table.name, 0) for table in tables}
        for table in reversed(tables):
            for parent in self._parents[table.name]:
                self._weight[parent] = max(
                    self._weight[parent], rows.get(parent, 0) + self._weight[table.name]
                )

    def take(self) -> Table | None:
        """Return a table to copy, when there is one; None when none is left, or at the end."""
        with self._changed:
            while self._waiting and not self._closed:
                ready = [
                    name for name in self._waiting if self._missing.isdisjoint(self._parents[name])
                ]
                if ready:
                    return self._waiting.pop(max(ready, key=lambda name: self._weight[name]))
                self._changed.wait()
            return None

    def done(self, table: Table) -> None:
        """Say that `table` is copied to its end."""
        with self._changed:
            self._missing.discard(table.name)
            self._changed.notify_all()

    def close(self) -> None:
        """Give nothing out any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
