"""The one record of truth: its rooms put together, on one connection."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import psycopg

from cellferry.closing import Closing
from cellferry.topology import schema
from cellferry.topology.client_reports import ClientReports
from cellferry.topology.connection import Database
from cellferry.topology.directory import Directory
from cellferry.topology.halts import Halts
from cellferry.topology.heartbeat import Heartbeat
from cellferry.topology.migrations import Migrations
from cellferry.topology.pace import PaceBoard
from cellferry.topology.progress import CHECK_GRACE_S, ProgressBoard, ProgressSink
from cellferry.topology.reaping import Reaping
from cellferry.topology.records import Records
from cellferry.topology.registry import Registry


class Topology(
    Directory,
    Migrations,
    Halts,
    Registry,
    ProgressBoard,
    Records,
    Reaping,
    Heartbeat,
    PaceBoard,
    ClientReports,
    Closing,
):
    """The control plane's database.

    Opens its connection on first use, again when it was lost; closes it on exit. Threads may
    share it (their transactions take turns), a forked process gets its own connection.

    Args:
        dsn: URL or connection string; never shown in a message.
        patience_s: how long a connection that was lost may take to come back, seconds.
    """

    def __init__(self, dsn: str, *, patience_s: float = 5.0) -> None:
        self._database = Database(dsn, patience_s=patience_s)

    def __repr__(self) -> str:
        return f"Topology({self._database.where})"

    def close(self) -> None:
        """Close the connection; a later call opens another."""
        self._database.close()

    def install(self) -> list[str]:
        """Create the schema or bring it up to date; returns the files applied. Repeatable.

        Raises:
            AccessDenied: the role may not create a schema in this database.
            PermanentError: the database belongs to a newer cellferry.
        """
        return self._database.run(schema.install)

    def now(self) -> datetime:
        """Return the topology's clock, in UTC; every absolute time of a migration is on it."""

        def work(connection: psycopg.Connection[Any]) -> datetime:
            row = connection.execute("SELECT clock_timestamp()").fetchone()
            moment: datetime = row[0] if row else datetime.now(UTC)
            return moment.astimezone(UTC)

        return self._database.run(work)

    def progress_sink(
        self, migration_id: int, attempt: int | None = None, *, grace_s: float = CHECK_GRACE_S
    ) -> ProgressSink:
        """Return where the steps of an attempt report; its `check` stops a lost or paused one.

        Args:
            migration_id: the migration.
            attempt: the lease to check; None checks nothing.
            grace_s: how long the topology may be silent before `check` raises, seconds.
        """
        if attempt is None:
            return ProgressSink(self._database, migration_id)
        return ProgressSink(
            self._database,
            migration_id,
            lambda: self.check_lease(migration_id, attempt),
            grace_s=grace_s,
        )
