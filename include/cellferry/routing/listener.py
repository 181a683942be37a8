"""A thread that hears of route changes, and asks for those it missed; it survives the topology.

Whatever the number of routes that are remembered, one small query confirms them all: the routes
that changed since the last confirmation, and somewhat before (a change becomes visible a little
after its time).
"""

from __future__ import annotations

import json
import logging
import os
import random
import select
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import psycopg

from cellferry.model import Route

_log = logging.getLogger(__name__)

_LONGEST_BACK_OFF_S = 5.0
#: Longer than any transaction of the topology between writing a route and its commit, seconds.
_OVERLAP_S = 90.0
_CHANGED = """
SELECT organization, cell, epoch FROM topology.route
WHERE changed_at > now() - make_interval(secs => %s)
"""


class RouteListener:
    """Listens on channel `cellferry_route`, and asks at intervals for what changed.

    Args:
        parameters: connection parameters of the topology.
        heard: called with each route that was announced or has changed lately.
        confirmed: called with a time (monotonic): every change before it was given to `heard`.
        complete_since: until when changes are known already (monotonic).
        interval_s: how often to ask.
    """

    def __init__(
        self,
        parameters: Mapping[str, Any],
        heard: Callable[[Route], None],
        confirmed: Callable[[float], None],
        complete_since: float,
        interval_s: float,
    ) -> None:
        self._parameters = dict(parameters)
        self._heard = heard
        self._confirmed = confirmed
        self._complete_since = complete_since
        self._interval_s = interval_s
        self._stopping = threading.Event()
        self._wake_read, self._wake_write = os.pipe()
        self.connected = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cellferry-routes", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop the thread and close its connection."""
        self._stopping.set()
        os.write(self._wake_write, b"x")
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self.close_pipe()

    def close_pipe(self) -> None:
        """Close what wakes the thread up; also for a forked child, where the thread is not."""
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                with psycopg.connect(**self._parameters, autocommit=True) as connection:
                    # Announcements may arrive among the answers of a query.
                    connection.add_notify_handler(lambda notify: self._announced(notify.payload))
                    connection.execute("LISTEN cellferry_route")
                    self._ask(connection)
                    self.connected.set()
                    failures = 0
                    self._listen(connection)
            except (psycopg.Error, OSError) as error:
                if failures == 0:
                    _log.warning("no news of routes, trying again: %s", type(error).__name__)
            finally:
                self.connected.clear()
            failures += 1
            back_off = min(0.1 * 2 ** min(failures, 10), _LONGEST_BACK_OFF_S)
            self._stopping.wait(back_off * random.uniform(0.5, 1.0))  # noqa: S311 jitter

    def _listen(self, connection: psycopg.Connection[Any]) -> None:
        pgconn = connection.pgconn
        poll = select.poll()  # not select(): an application may have thousands of open files
        poll.register(pgconn.socket, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        next_question = time.monotonic() + self._interval_s
        while not self._stopping.is_set():
            wait_s = max(0.0, next_question - time.monotonic())
            if any(file == pgconn.socket for file, _ in poll.poll(wait_s * 1000)):
                pgconn.consume_input()
                while (notification := pgconn.notifies()) is not None:
                    self._announced(notification.extra)
            if time.monotonic() >= next_question:
                self._ask(connection)  # tells in time, too, when the server is gone
                next_question = time.monotonic() + self._interval_s

    def _announced(self, text: str | bytes) -> None:
        try:
            news = json.loads(text)
            route = Route(str(news["organization"]), str(news["cell"]), int(news["epoch"]))
        except (ValueError, KeyError, TypeError):
            _log.warning("an announcement of a route could not be read")
            return
        self._heard(route)

    def _ask(self, connection: psycopg.Connection[Any]) -> None:
        asked_at = time.monotonic()
        window_s = asked_at - self._complete_since + _OVERLAP_S
        for organization, cell, epoch in connection.execute(_CHANGED, [window_s]):
            self._heard(Route(organization, cell, epoch))
        self._complete_since = asked_at
        self._confirmed(asked_at)
