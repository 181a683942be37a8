"""Asks a cell's PostgreSQL how it does: a small write with its commit, and a small read."""

from __future__ import annotations

import time
from contextlib import suppress

import psycopg

from cellferry.model import Cell, Move
from cellferry.stores.pace import Load, Probe, Reading
from cellferry.stores.postgres import sessions

#: Rows of `cellferry.probe`: movers that meet on one wait for a commit of each other at most. Each
#: mover takes them in turn: while a snapshot lasts, a dump's for hours, no version of a row goes,
#: and an update passes all that its row has. With one row that would soon be over the target.
SLOTS = 64

#: A probe that takes longer (milliseconds) is given up, and counts as having taken so long.
LONGEST_MS = 5_000


class PostgresProbe(Probe):
    """Writes and reads one row of `cellferry.probe`, as the mover's role.

    The connection is made at the first reading, and again after one that failed.

    Args:
        move: names the session; its migration chooses the first row.
    """

    def __init__(self, cell: Cell, move: Move) -> None:
        self._cell = cell
        self._move = move
        self._where = f"{cell.name}/postgres"
        self._connection: psycopg.Connection[tuple[object, ...]] | None = None
        self._slot = move.migration % SLOTS

    def read(self) -> Reading:
        """See `Probe.read`."""
        slot = self._slot = (self._slot + 1) % SLOTS
        with sessions.translate_errors(self._where):
            connection = self._connected()
            began = time.monotonic()
            try:
                done = connection.execute(
                    "UPDATE cellferry.probe SET probed_at = clock_timestamp() WHERE slot = %s",
                    (slot,),
                    prepare=True,
                )
                written = time.monotonic()
                if done.rowcount != 1:
                    # Somebody emptied the table: an update of nothing commits nothing.
                    raise psycopg.errors.UndefinedTable("cellferry.probe has lost its rows")
                connection.execute(
                    "SELECT probed_at FROM cellferry.probe WHERE slot = %s", (slot,), prepare=True
                )
            except psycopg.errors.QueryCanceled:
                return Reading(time.monotonic() - began, 0.0)
            return Reading(written - began, time.monotonic() - written)

    def load(self) -> Load:
        """See `Probe.load`."""
        with sessions.translate_errors(self._where):
            try:
                row = (
                    self._connected()
                    .execute("SELECT lag_s, log_bytes, active FROM cellferry.load()", prepare=True)
                    .fetchone()
                )
            except psycopg.errors.QueryCanceled:
                return Load()
        if row is None:
            return Load()
        lag_s, log_bytes, active = row
        return Load(
            None if lag_s is None else float(str(lag_s)), int(str(log_bytes)), int(str(active))
        )

    def _connected(self) -> psycopg.Connection[tuple[object, ...]]:
        if self._connection is None or self._connection.closed or self._connection.broken:
            self.close()
            self._connection = sessions.connect(
                self._cell.stores["postgres"].url,
                purpose="probe",
                move=self._move,
                autocommit=True,
                where=self._where,
            )
            sessions.set_for_session(self._connection, "statement_timeout", str(LONGEST_MS))
        return self._connection

    def close(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(psycopg.Error):
                connection.close()
