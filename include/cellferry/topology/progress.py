"""Progress of long steps: one row for each store and phase, with rate and expected end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg

from cellferry.errors import Stopped, TransientError
from cellferry.topology.connection import Database
from cellferry.topology.document import without_secrets

_log = logging.getLogger(__name__)

#: A phase is written at most so often (its end always), in seconds.
REPORT_INTERVAL_S = 0.25
#: How long `check` believes its last answer while the topology does not answer, in seconds.
CHECK_GRACE_S = 30.0

# The rate is smoothed over the reports (weight of the newest: 0.3), over at least 50 ms each.
_UPSERT = """
INSERT INTO topology.progress AS p (migration, store, phase, done, total, unit, note)
VALUES (%(migration)s, %(store)s, %(phase)s, %(done)s, %(total)s, %(unit)s, %(note)s)
ON CONFLICT (migration, store, phase) DO UPDATE SET
    total = excluded.total, unit = excluded.unit, note = excluded.note, done = excluded.done,
    started_at = CASE WHEN excluded.done < p.done OR excluded.unit <> p.unit
                 THEN excluded.started_at ELSE p.started_at END,
    rate = CASE
        WHEN excluded.done < p.done OR excluded.unit <> p.unit THEN NULL
        WHEN excluded.updated_at - p.updated_at < interval '50 ms' THEN p.rate
        ELSE 0.7 * COALESCE(p.rate, (excluded.done - p.done)
                 / extract(epoch FROM excluded.updated_at - p.updated_at))
           + 0.3 * (excluded.done - p.done)
                 / extract(epoch FROM excluded.updated_at - p.updated_at)
        END,
    updated_at = excluded.updated_at
"""


@dataclass(frozen=True, slots=True)
class ProgressRow:
    """How far one phase of one store is."""

    store: str
    phase: str
    done: int
    total: int | None
    unit: str
    note: str
    rate_per_s: float | None
    """Smoothed units per second; None until two reports came."""
    eta_s: float | None
    """Seconds to the end at this rate; 0 when done, None when nobody can tell."""
    started_at: datetime
    updated_at: datetime


class ProgressSink:
    """`cellferry.model.Progress` of one attempt at one migration.

    A report is for people: one that cannot be written is dropped. `check` is for safety, but
    cells check the lease themselves, so a short silence of the topology stops no copy.
    """

    def __init__(
        self,
        database: Database,
        migration_id: int,
        check: Callable[[], None] | None = None,
        *,
        grace_s: float = CHECK_GRACE_S,
    ) -> None:
        self._database = database
        self._migration_id = migration_id
        self._check = check
        self._grace_s = grace_s
        self._written: dict[tuple[str, str], float] = {}
        self._answered_at = time.monotonic()
        self._quiet_until = 0.0

    def report(
        self, store: str, phase: str, done: int, total: int | None, unit: str, note: str = ""
    ) -> None:
        """Say how far `phase` is: `done` of `total` (None when unknown) in `unit`."""
        now = time.monotonic()
        is_end = total is not None and done >= total
        last = self._written.get((store, phase))
        if now < self._quiet_until:
            return
        if last is not None and not is_end and now - last < REPORT_INTERVAL_S:
            return
        self._written[store, phase] = now
        values = {
            "migration": self._migration_id,
            "store": store,
            "phase": phase,
            "done": done,
            "total": total,
            "unit": unit,
            "note": without_secrets(note),
        }

        def work(connection: psycopg.Connection[Any]) -> None:
            connection.execute("SET LOCAL synchronous_commit = off")
            connection.execute(_UPSERT, values)

        try:
            self._database.run(work)
        except TransientError as error:
            self._quiet_until = time.monotonic() + 1.0
            _log.warning("progress of migration %s was not kept: %s", self._migration_id, error)

    def check(self) -> None:
        """Raise `Paused`, `Halted` or `LeaseLost` when the step must stop; called once a batch.

        Raises:
            Unreachable: the topology was silent for longer than the grace.
        """
        if self._check is None:
            return
        now = time.monotonic()
        within_grace = now - self._answered_at < self._grace_s
        if now < self._quiet_until and within_grace:
            return
        try:
            self._check()
        except TransientError:
            if not within_grace:
                raise
            self._quiet_until = time.monotonic() + 1.0
        except Stopped:
            self._answered_at = time.monotonic()  # an answer all the same
            raise
        else:
            self._answered_at = time.monotonic()


class ProgressBoard:
    """The part of the topology that shows progress."""

    _database: Database

    def progress(self, migration_id: int) -> list[ProgressRow]:
        """Return how far each phase of a migration is, in the order in which they began."""

        def work(connection: psycopg.Connection[Any]) -> list[ProgressRow]:
            rows = connection.execute(
                """
                SELECT store, phase, done, total, unit, note, rate,
                       CASE WHEN done >= total THEN 0
                            WHEN rate > 0 THEN (total - done) / rate END,
                       started_at, updated_at
                FROM topology.progress WHERE migration = %s ORDER BY started_at, store, phase
                """,
                [migration_id],
            )
            return [ProgressRow(*row) for row in rows]

        return self._database.run(work)
