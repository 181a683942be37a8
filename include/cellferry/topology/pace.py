"""Who works at which cell now, and at what pace: how movers share a cell's budget."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg

from cellferry.topology.connection import Database, connect

log = logging.getLogger(__name__)

#: A mover that has told nothing for so long (seconds) is not counted any more.
LIVE_S = 10.0
#: What a cell's probes took while no mover worked there is believed for so long (seconds).
IDLE_KNOWN_S = 3_600.0
#: Rows are kept for so long (seconds) after the last word.
KEPT_S = 86_400.0

# Only the lease's holder counts, and an attempt that was replaced cannot speak for a newer one.
_TELL = """
WITH told AS (
    INSERT INTO topology.pace AS p (
        cell, store, migration, attempt, step, share, target_s, p95_s, idle_s, idle_at, lag_s,
        log_bytes_s, active, note, decided_at, told_at, live_until)
    VALUES (
        %(cell)s, %(store)s, %(migration)s, %(attempt)s, %(step)s, %(share)s, %(target_s)s,
        %(p95_s)s, %(idle_s)s, CASE WHEN %(idle_s)s::float8 IS NOT NULL THEN clock_timestamp() END,
        %(lag_s)s, %(log_bytes_s)s, %(active)s, %(note)s,
        CASE WHEN %(decided)s THEN clock_timestamp() END,
        clock_timestamp(), clock_timestamp() + make_interval(secs => %(live_s)s))
    ON CONFLICT (cell, store, migration) DO UPDATE SET
        attempt = excluded.attempt, step = excluded.step, share = excluded.share,
        target_s = excluded.target_s, p95_s = excluded.p95_s,
        idle_s = COALESCE(excluded.idle_s, p.idle_s),
        idle_at = CASE WHEN COALESCE(excluded.idle_s = p.idle_s, excluded.idle_s IS NULL)
                  THEN p.idle_at ELSE excluded.idle_at END,
        lag_s = excluded.lag_s, log_bytes_s = excluded.log_bytes_s, active = excluded.active,
        note = excluded.note, decided_at = COALESCE(excluded.decided_at, p.decided_at),
        told_at = excluded.told_at, live_until = excluded.live_until
    WHERE p.attempt <= excluded.attempt
)
SELECT count(*) FILTER (WHERE live), COALESCE(sum(share) FILTER (WHERE live), 0),
       COALESCE(bool_or(share < 1) FILTER (WHERE live), false),
       percentile_cont(0.5) WITHIN GROUP (ORDER BY idle_s)
           FILTER (WHERE idle_at > clock_timestamp() - make_interval(secs => %(known_s)s))
FROM (
    SELECT other.share, other.idle_s, other.idle_at, other.migration <> %(migration)s
           AND other.live_until > clock_timestamp() AND lease.attempt = other.attempt AS live
    FROM topology.pace AS other JOIN topology.migration AS lease ON lease.id = other.migration
    WHERE other.cell = %(cell)s AND other.store = %(store)s) AS known
"""
_LEAVE = """
UPDATE topology.pace SET live_until = clock_timestamp()
WHERE migration = %(migration)s AND attempt = %(attempt)s AND store = %(store)s
"""
_PRUNE = """
DELETE FROM topology.pace WHERE ctid = ANY (ARRAY(
    SELECT old.ctid FROM topology.pace AS old
    WHERE old.told_at < clock_timestamp() - make_interval(secs => %(kept_s)s)
    LIMIT 1000 FOR UPDATE SKIP LOCKED))
"""
_SHOWN = """
SELECT p.cell, p.store, p.migration, p.step, p.share, p.target_s, p.p95_s, p.idle_s, p.lag_s,
       p.log_bytes_s, p.active, p.note, p.decided_at
FROM topology.pace AS p JOIN topology.migration AS m ON m.id = p.migration
WHERE p.live_until > clock_timestamp() AND p.attempt = m.attempt
  AND (%(migration)s::bigint IS NULL OR p.migration = %(migration)s)
ORDER BY p.cell, p.store, p.migration
"""


@dataclass(frozen=True, slots=True)
class PaceRow:
    """One mover at one cell's store, as it told last. Durations in seconds."""

    cell: str
    store: str
    migration: int
    step: str
    share: float
    """Of its time that it may work, as this cell sees it; 1 is full speed."""
    target_s: float | None = None
    p95_s: float | None = None
    idle_s: float | None = None
    lag_s: float | None = None
    log_bytes_s: float | None = None
    """Growth of the server's log of changes, bytes a second."""
    active: int | None = None
    """Sessions at work there, movers not counted."""
    note: str = ""
    """The last decision."""
    decided_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Company:
    """Who else works at a cell's store.

    Attributes:
        others: movers besides the one that asks.
        budget: the sum of their shares.
        limited: whether one of them is not at full speed.
        idle_s: p95 of the probes when no mover worked there, of the last hour; None if unknown.
    """

    others: int = 0
    budget: float = 0.0
    limited: bool = False
    idle_s: float | None = None


class PaceTeller:
    """Tells the topology what one step of one attempt does at its cells, and asks who else does.

    On a connection of its own, so that the step never waits for it. For one thread. What cannot
    be told is left out: a mover that hears nothing goes on by its own probes.
    """

    def __init__(
        self, parameters: dict[str, Any], migration: int, attempt: int, store: str
    ) -> None:
        self._parameters = parameters
        self._values = {"migration": migration, "attempt": attempt, "store": store}
        self._session: psycopg.Connection[tuple[Any, ...]] | None = None

    def tell(self, row: PaceRow, *, decided: bool) -> Company | None:
        """Tell one cell's row; return who else is there, or None if the topology is silent."""
        values = {
            **self._values,
            "cell": row.cell,
            "step": row.step,
            "share": row.share,
            "target_s": row.target_s,
            "p95_s": row.p95_s,
            "idle_s": row.idle_s,
            "lag_s": row.lag_s,
            "log_bytes_s": row.log_bytes_s,
            "active": row.active,
            "note": row.note,
            "decided": decided,
            "live_s": LIVE_S,
            "known_s": IDLE_KNOWN_S,
        }
        try:
            found = self._connected().execute(_TELL, values).fetchone()
        except psycopg.Error as error:
            log.warning(
                "the pace of migration %s was not told: %s", self._values["migration"], error
            )
            self._drop()
            return None
        return None if found is None else Company(*found)

    def close(self) -> None:
        """Say that the step has ended, and close the connection."""
        if self._session is not None:
            with suppress(psycopg.Error):
                self._session.execute(_LEAVE, self._values)
        self._drop()

    def _connected(self) -> psycopg.Connection[tuple[Any, ...]]:
        if self._session is None or self._session.closed:
            session = connect(self._parameters)
            session.autocommit = True
            session.execute("SET synchronous_commit = off")
            session.execute(_PRUNE, {"kept_s": KEPT_S})
            self._session = session
        return self._session

    def _drop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            with suppress(psycopg.Error):
                session.close()


class PaceBoard:
    """The part of the topology that knows who works where, and how fast."""

    _database: Database

    def pace_teller(self, migration_id: int, attempt: int, store: str) -> PaceTeller:
        """Return what one step tells its paces with."""
        return PaceTeller(self._database.parameters, migration_id, attempt, store)

    def paces(self, migration_id: int | None = None) -> list[PaceRow]:
        """Return the movers that work now: of one migration, or all, by cell and store."""

        def work(connection: psycopg.Connection[Any]) -> list[PaceRow]:
            rows = connection.execute(_SHOWN, {"migration": migration_id})
            return [PaceRow(*row) for row in rows]

        return self._database.run(work)
