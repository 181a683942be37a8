"""Says how operations fared: counts for each organization and cell, sent every few seconds.

Off unless asked for. An operation pays some microseconds for it, never waits for it and never
fails because of it. What cannot be sent is dropped: the counts are for a soak to look at.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

import psycopg

from cellferry.client_figures import BUCKETS, bucket, trimmed
from cellferry.model import Route
from cellferry.routing.answers import BeingMoved, Moved, is_conflict

_log = logging.getLogger(__name__)

#: Organizations and cells in one report; those beyond it are left out of it.
MOST = 10_000
_LONGEST_BACK_OFF_S = 60.0
_CLOSING_S = 2.0
_SEND = "SELECT topology.take_client_report(%s, %s, %s)"


class _Tally:
    """Counts since the last report."""

    __slots__ = (
        "being_moved",
        "conflicts",
        "failures",
        "latencies",
        "longest_s",
        "moved",
        "operations",
        "seconds",
    )

    def __init__(self) -> None:
        self.operations = self.failures = self.conflicts = self.moved = self.being_moved = 0
        self.seconds = self.longest_s = 0.0
        self.latencies = [0] * BUCKETS


class Reporter:
    """Counts, and a thread that sends the counts. Thread-safe.

    Args:
        parameters: connection parameters of the topology.
        every_s: seconds between two reports.
        application: name of the application, for people.
    """

    def __init__(self, parameters: Mapping[str, Any], every_s: float, application: str) -> None:
        self._parameters = {
            **parameters,
            "application_name": f"cellferry-reports:{application}",
            "options": f"{parameters.get('options') or ''} -c default_transaction_read_only=off"
            " -c synchronous_commit=off -c statement_timeout=2s",
        }
        self._every_s = every_s
        self._client = f"{application}@{socket.gethostname()}:{os.getpid()}"
        self._lock = threading.Lock()
        self._tallies: dict[tuple[str, str, int], _Tally] = {}
        self._since = time.monotonic()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def count(self, route: Route, seconds: float, answer: BaseException | None) -> None:
        """Count one try in `route.cell`: how long it took, and what it raised, translated."""
        with self._lock:
            key = (route.organization, route.cell, route.epoch)
            tally = self._tallies.get(key)
            if tally is None:
                if len(self._tallies) >= MOST:
                    return
                tally = self._tallies[key] = _Tally()
                if self._thread is None:
                    self._start()
            if answer is None:
                tally.operations += 1
                tally.seconds += seconds
                tally.longest_s = max(tally.longest_s, seconds)
                tally.latencies[bucket(seconds)] += 1
            elif isinstance(answer, Moved):
                tally.moved += 1
            elif isinstance(answer, BeingMoved):
                tally.being_moved += 1
            elif is_conflict(answer):
                tally.conflicts += 1
            else:
                tally.operations += 1
                tally.failures += 1

    def stop(self) -> None:
        """Send what is left, if that is soon done, and end the thread."""
        self._stopping.set()
        thread = self._thread
        if thread is not None:
            thread.join(_CLOSING_S)

    def _start(self) -> None:
        if self._stopping.is_set():
            return
        thread = threading.Thread(target=self._run, name="cellferry-reports", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads, or the interpreter ends: the operation goes on
            return
        self._thread = thread

    def _run(self) -> None:
        connection: psycopg.Connection[Any] | None = None
        failures = 0
        while True:
            pause_s = self._every_s * random.uniform(0.8, 1.2)  # noqa: S311 jitter
            if failures:
                pause_s = max(pause_s, min(2.0**failures, _LONGEST_BACK_OFF_S))
            is_last = self._stopping.wait(pause_s)
            window_s, rows = self._take()
            try:
                if rows and not (is_last and failures):
                    if connection is None or connection.closed:
                        connection = psycopg.connect(**self._parameters, autocommit=True)
                    connection.execute(_SEND, [self._client, window_s, json.dumps(rows)])
                failures = 0
            except (psycopg.Error, OSError) as error:
                if not failures:
                    _log.warning("reports of operations are dropped: %s", type(error).__name__)
                failures += 1
            if is_last:
                break
        if connection is not None:
            connection.close()

    def _take(self) -> tuple[float, list[dict[str, Any]]]:
        now = time.monotonic()
        with self._lock:
            tallies, self._tallies = self._tallies, {}
            since, self._since = self._since, now
        return now - since, [
            {
                "organization": organization,
                "cell": cell,
                "epoch": epoch,
                "operations": tally.operations,
                "failures": tally.failures,
                "conflicts": tally.conflicts,
                "moved": tally.moved,
                "being_moved": tally.being_moved,
                "seconds": round(tally.seconds, 6),
                "longest_s": round(tally.longest_s, 6),
                "latencies": trimmed(tally.latencies),
            }
            for (organization, cell, epoch), tally in tallies.items()
        ]
