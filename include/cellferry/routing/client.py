"""The route client: where an organization lives, in a microsecond, also without the topology."""

from __future__ import annotations

import os
import random
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import psycopg
from psycopg import conninfo

from cellferry.closing import Closing
from cellferry.model import Route
from cellferry.routing.answers import (
    BeingMoved,
    Moved,
    NotCommitted,
    RouteUnavailable,
    UnknownOrganization,
    UnknownOutcome,
    is_conflict,
    translate,
)
from cellferry.routing.cache import RouteCache
from cellferry.routing.listener import RouteListener
from cellferry.routing.reporter import Reporter

T = TypeVar("T")

#: First pause after "being moved", and the longest, in seconds. A write pause is some 50 ms.
_FIRST_PAUSE_S = 0.005
_LONGEST_PAUSE_S = 0.1
#: An operation that waits asks the topology itself so often, in case an announcement was lost.
_ASK_EVERY_S = 0.5
#: Hops to newer epochs that cost no pause; more in a row means that cells disagree.
_FREE_HOPS = 3
_TOPOLOGY_BACK_OFF_S = (0.25, 5.0)
_ROUTE = "SELECT organization, cell, epoch FROM topology.route WHERE organization = %s"

_clients: weakref.WeakSet[RouteClient] = weakref.WeakSet()


class RouteClient(Closing):
    """Tells an application which cell an organization lives in. One for each process.

    A route is served from memory. It is at most `ttl_s` old as long as the topology answers; a
    thread hears of changes at once and confirms all routes before they are too old. While the
    topology is down the last known route is served: the stores' gates make that safe
    (invariant 7). All methods may be called by several threads; a forked process goes on with
    what was known and its own connections.

    Args:
        topology_url: connection URL; the role needs USAGE on schema `topology` and SELECT on
            `topology.route`.
        ttl_s: longest age of a route while the topology answers.
        max_entries: how many organizations are remembered.
        max_stale_s: how long a route is served without the topology; None: without end.
        application: shown in the topology's `pg_stat_activity`.
        listen: False starts no thread; routes are then only as fresh as `ttl_s`.
        report_every_s: report how operations fared to the topology, so often; None: never. The
            role then also needs EXECUTE on `topology.take_client_report`.
    """

    def __init__(
        self,
        topology_url: str,
        *,
        ttl_s: float = 30.0,
        max_entries: int = 10_000,
        max_stale_s: float | None = None,
        application: str = "application",
        listen: bool = True,
        report_every_s: float | None = None,
    ) -> None:
        if ttl_s <= 0:
            raise ValueError(f"ttl_s is {ttl_s}, it must be above 0")
        if report_every_s is not None and report_every_s <= 0:
            raise ValueError(f"report_every_s is {report_every_s}, it must be above 0")
        self._parameters: dict[str, Any] = {
            "connect_timeout": 2,
            "tcp_user_timeout": 3000,
            "keepalives_idle": 10,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "application_name": f"cellferry-routes:{application}",
            "options": "-c statement_timeout=2s -c default_transaction_read_only=on",
            **conninfo.conninfo_to_dict(topology_url),
        }
        self._ttl_s = ttl_s
        self._max_stale_s = max_stale_s
        self._listens = listen
        self._application = application
        self._report_every_s = report_every_s
        self._cache = RouteCache(max_entries)
        self._closed = False
        self._listener: RouteListener | None = None
        self._begin()
        _clients.add(self)

    def _begin(self) -> None:
        """Everything that a forked child needs anew."""
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self._waiting: dict[str, set[threading.Event]] = {}
        self._connection: psycopg.Connection[Any] | None = None
        self._ask_again_at = 0.0
        self._back_off_s = _TOPOLOGY_BACK_OFF_S[0]
        self._listener = None
        self._reporter = (
            None
            if self._report_every_s is None
            else Reporter(self._parameters, self._report_every_s, self._application)
        )

    def close(self) -> None:
        """Stop the thread and close the connections."""
        self._closed = True
        with self._lock:
            listener, self._listener = self._listener, None
        if listener is not None:
            listener.stop()
        if self._reporter is not None:
            self._reporter.stop()
        with self._asking:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @property
    def is_listening(self) -> bool:
        """Whether news of routes arrive now."""
        listener = self._listener
        return listener is not None and listener.connected.is_set()

    def route(self, organization: str) -> Route:
        """Return where `organization` (its id) lives.

        Raises:
            UnknownOrganization: the topology has none with this id.
            RouteUnavailable: the topology does not answer, and the route is not known here.
        """
        entry = self._cache.get(organization)
        if entry is None:
            return self._ask(organization, None)
        if time.monotonic() - entry[1] < self._ttl_s:
            return entry[0]
        return self._ask(organization, entry)

    def learn(self, organization: str, cell: str, epoch: int) -> Route:
        """Take in what a store's answer said; return the newest route known."""
        self._take_in(Route(organization, cell, epoch))
        return self._cache.peek(organization) or Route(organization, cell, epoch)

    def refresh(self, organization: str) -> Route:
        """Ask the topology now; return the last known route if it does not answer.

        Raises:
            UnknownOrganization, RouteUnavailable: as `route`.
        """
        return self._ask(organization, self._cache.get(organization))

    def run(
        self,
        organization: str,
        operation: Callable[[Route], T],
        deadline_s: float = 10.0,
        *,
        idempotent: bool = False,
        retry_lost: bool = False,
    ) -> T:
        """Run `operation` where the organization lives, and again where and when it is told to.

        `operation` gets the route, does its work in that cell, commits, and raises what the store
        raised. It runs again after "moved" (there, at once), after "being moved" (after some
        milliseconds, or when the change is announced) and after a conflict with another
        transaction (40001, 40P01): in all these cases nothing was committed.

        Args:
            organization: its id.
            operation: may be called several times; each call begins from nothing.
            deadline_s: no further try begins after so many seconds.
            idempotent: doing it twice has the effect of doing it once, so it runs again even
                when a commit's outcome is unknown.
            retry_lost: run it again when its connection broke before the commit was sent, as
                `NotCommitted` says: safe if the transaction is all it does.

        Raises:
            Moved, BeingMoved: still so at the deadline; or the answer was about another
                organization.
            UnknownOutcome: a commit's outcome is unknown, and not `idempotent`.
            Exception: whatever else `operation` raised, unchanged.
        """
        attempt = _Attempts(time.monotonic() + deadline_s)
        while True:
            try:
                route = self.route(organization)
            except RouteUnavailable:
                if time.monotonic() >= attempt.deadline:
                    raise
                time.sleep(attempt.next_pause())
                continue
            begun = time.monotonic()
            try:
                result = operation(route)
            except Exception as error:
                answer = translate(error)
                self.observe(route, time.monotonic() - begun, answer)
                again = self._may_run_again(
                    answer, organization, idempotent=idempotent, retry_lost=retry_lost
                )
                if not again or time.monotonic() >= attempt.deadline:
                    if answer is error:
                        raise
                    raise answer from error
            else:
                self.observe(route, time.monotonic() - begun)
                return result
            wakes = isinstance(answer, Moved | BeingMoved)
            if isinstance(answer, Moved):
                newest = self.learn(organization, answer.cell, answer.epoch)
                if newest.epoch > route.epoch:
                    if attempt.may_hop():
                        continue
                    wakes = False  # the news is known already
            self._pause(attempt, route, wakes=wakes)

    def observe(self, route: Route, seconds: float, error: BaseException | None = None) -> None:
        """Count one try in `route.cell` for the reports; `run` does it by itself.

        Does nothing unless `report_every_s` was given.

        Args:
            seconds: how long it took, without waits between tries.
            error: what it raised.
        """
        if self._reporter is not None:
            self._reporter.count(route, seconds, None if error is None else translate(error))

    @staticmethod
    def _may_run_again(
        answer: BaseException, organization: str, *, idempotent: bool, retry_lost: bool
    ) -> bool:
        if isinstance(answer, Moved | BeingMoved):
            return answer.organization in {organization, ""}
        if isinstance(answer, NotCommitted):
            return idempotent or retry_lost
        if isinstance(answer, UnknownOutcome):
            return idempotent
        if is_conflict(answer):
            return True
        # The driver's own words for a broken connection do not tell whether a commit was sent.
        return idempotent and isinstance(answer, psycopg.OperationalError | ConnectionError)

    def _pause(self, attempt: _Attempts, route: Route, *, wakes: bool) -> None:
        seconds = min(attempt.next_pause(), max(0.0, attempt.deadline - time.monotonic()))
        if not wakes:
            time.sleep(seconds)
            return
        if self._wait_for_news(route, seconds):
            attempt.begin_again()
        elif attempt.should_ask():
            try:
                self.refresh(route.organization)
            except (UnknownOrganization, RouteUnavailable):
                return

    def _wait_for_news(self, route: Route, seconds: float) -> bool:
        """Wait until a newer epoch than the route's is known, at most `seconds`."""
        event = threading.Event()
        with self._lock:
            self._waiting.setdefault(route.organization, set()).add(event)
        try:
            known = self._cache.peek(route.organization)
            return (known is not None and known.epoch > route.epoch) or event.wait(seconds)
        finally:
            with self._lock:
                waiting = self._waiting.get(route.organization)
                if waiting is not None:
                    waiting.discard(event)
                    if not waiting:
                        del self._waiting[route.organization]

    def _take_in(self, route: Route, *, only_known: bool = False) -> None:
        if self._cache.put(route, only_known=only_known):
            with self._lock:
                for event in self._waiting.get(route.organization, ()):
                    event.set()

    def _heard(self, route: Route) -> None:
        self._ask_again_at = 0.0  # the topology answers
        self._take_in(route, only_known=True)

    def _ask(self, organization: str, known: tuple[Route, float] | None) -> Route:
        if time.monotonic() < self._ask_again_at:
            return self._last_known(organization, known, None)
        # Whoever knows a route does not queue behind a topology that hangs.
        if not self._asking.acquire(blocking=known is None):
            return self._last_known(organization, known, None)
        try:
            row = self._query(organization)
        except psycopg.Error as error:
            self._ask_again_at = time.monotonic() + self._back_off_s * random.uniform(0.5, 1)  # noqa: S311 jitter
            self._back_off_s = min(self._back_off_s * 2, _TOPOLOGY_BACK_OFF_S[1])
            return self._last_known(organization, known, error)
        finally:
            self._asking.release()
        self._back_off_s = _TOPOLOGY_BACK_OFF_S[0]
        if row is None:
            self._cache.discard(organization)
            raise UnknownOrganization(f"the topology knows no organization {organization!r}")
        self._take_in(Route(*row))
        return self._cache.peek(organization) or Route(*row)

    def _last_known(
        self, organization: str, known: tuple[Route, float] | None, error: Exception | None
    ) -> Route:
        if known is not None and (
            self._max_stale_s is None or time.monotonic() - known[1] < self._max_stale_s
        ):
            return known[0]
        raise RouteUnavailable(
            f"the topology does not answer, and the route of {organization!r} is "
            + ("not known here" if known is None else "too old")
        ) from error

    def _query(self, organization: str) -> tuple[Any, ...] | None:
        self._start_listener()
        for is_last in (False, True):
            connection = self._connection
            is_old = connection is not None and not connection.closed
            if connection is None or connection.closed:
                connection = psycopg.connect(**self._parameters, autocommit=True)
                self._connection = connection
            try:
                return connection.execute(_ROUTE, [organization]).fetchone()
            except psycopg.Error:
                if not connection.closed or is_last or not is_old:
                    raise
        return None

    def _start_listener(self) -> None:
        if not self._listens or self._listener is not None:
            return
        with self._lock:
            if self._listener is None and not self._closed:
                interval_s = min(self._ttl_s / 4, 10.0)
                self._listener = RouteListener(
                    self._parameters,
                    self._heard,
                    self._cache.confirm,
                    self._cache.confirmed_at,
                    interval_s,
                )
                self._listener.start()

    def _forked(self) -> None:
        """In a forked child: neither threads nor connections came along."""
        if self._listener is not None:
            self._listener.close_pipe()
        # Kept, unused: were it collected, libpq would say goodbye on the parent's connection.
        self._parents_connection = self._connection
        self._cache = self._cache.forked()
        self._begin()


class _Attempts:
    """Pauses between the tries of one operation."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self._pause_s = _FIRST_PAUSE_S
        self._hops = 0
        self._asked_at = time.monotonic()

    def next_pause(self) -> float:
        """Return the next pause, jittered, longer each time, in seconds."""
        pause = self._pause_s
        self._pause_s = min(pause * 1.6, _LONGEST_PAUSE_S)
        return pause * random.uniform(0.7, 1.3)  # noqa: S311 jitter

    def begin_again(self) -> None:
        """After news: the new cell opens within milliseconds."""
        self._pause_s = _FIRST_PAUSE_S

    def may_hop(self) -> bool:
        """Whether the next try may begin at once."""
        self._hops += 1
        return self._hops <= _FREE_HOPS

    def should_ask(self) -> bool:
        """Whether it is time to ask the topology itself."""
        if time.monotonic() - self._asked_at < _ASK_EVERY_S:
            return False
        self._asked_at = time.monotonic()
        return True


def _forked() -> None:
    for client in list(_clients):
        client._forked()  # noqa: SLF001 the same module


os.register_at_fork(after_in_child=_forked)
