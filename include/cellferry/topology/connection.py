"""One connection to the topology: transactions, reconnecting, and errors in our own words."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import psycopg
from psycopg import conninfo, errors

from cellferry.errors import (
    AccessDenied,
    CellferryError,
    InvalidInput,
    NotPrepared,
    OutcomeUnknown,
    PermanentError,
    Unreachable,
)

T = TypeVar("T")
Row = tuple[Any, ...]
Work = Callable[[psycopg.Connection[Row]], T]

_log = logging.getLogger(__name__)

#: What a connection is opened with unless the DSN says otherwise. Seconds, tcp_user_timeout in ms.
_CONNECT_DEFAULTS: dict[str, Any] = {
    "connect_timeout": 5,
    "application_name": "cellferry-topology",
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
# Durability is part of the promise (hazard 15): an asynchronous default must not apply here.
_SESSION = """
SELECT set_config('TimeZone', 'UTC', false),
       set_config('statement_timeout', '30s', false),
       set_config('lock_timeout', '10s', false),
       set_config('idle_in_transaction_session_timeout', '30s', false),
       set_config('synchronous_commit', CASE WHEN current_setting('synchronous_commit')
                  IN ('off', 'local', 'remote_write') THEN 'on'
                  ELSE current_setting('synchronous_commit') END, false)
"""
_CONFLICTS = ("40001", "40P01")
_MAX_CONFLICTS = 5


class Database:
    """Runs short transactions on one connection; may be shared by threads.

    Args:
        dsn: connection string or URL; never shown.
        patience_s: how long a connection that was lost may take to come back, seconds.
    """

    def __init__(self, dsn: str, *, patience_s: float = 5.0) -> None:
        try:
            given = conninfo.conninfo_to_dict(dsn)
        except psycopg.ProgrammingError as error:
            raise InvalidInput(
                "the topology's connection is not a valid PostgreSQL URL",
                hint="write it as postgresql://user:password@host:port/database",
            ) from error
        self._parameters: dict[str, Any] = {**_CONNECT_DEFAULTS, **given}
        self._where = _place(self._parameters)
        self._patience_s = patience_s
        self._lock = threading.RLock()
        self._connection: psycopg.Connection[Row] | None = None
        self._process = os.getpid()
        self._was_connected = False

    @property
    def where(self) -> str:
        """The server, for messages: host, port and database."""
        return self._where

    @property
    def parameters(self) -> dict[str, Any]:
        """Connection parameters, for a second connection that listens. Holds the password."""
        return dict(self._parameters)

    def close(self) -> None:
        """Close the connection; the next transaction opens another."""
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None and self._process == os.getpid():
                connection.close()

    def run(self, work: Work[T], *, repeatable: bool = True) -> T:
        """Run `work` in one transaction and commit it.

        A connection that breaks before the commit was sent is replaced and `work` runs again:
        the server rolled back. So `work` does nothing but talk to the given connection.

        Args:
            work: called with the connection, inside a transaction.
            repeatable: whether `work` may also run again when the commit's outcome is unknown.

        Raises:
            OutcomeUnknown: the connection broke while committing, and not `repeatable`.
            Unreachable: no connection within the patience.
            AccessDenied: wrong password or missing privilege.
            NotPrepared: the topology's schema is not installed.
        """
        with self._lock:
            deadline = time.monotonic() + self._patience_s
            conflicts = 0
            while True:
                connection = self._connected(deadline)
                committing = False
                try:
                    result = work(connection)
                    committing = True
                    connection.commit()
                    _insist_on_confirmation(connection, self._where)
                except psycopg.Error as error:
                    lost = _is_lost(connection, error)
                    self._reset(connection, lost=lost)
                    if lost and committing and not repeatable:
                        raise OutcomeUnknown(
                            "the connection to the topology broke while a change was committed",
                            hint="ask the topology before anything else; change nothing until then",
                            where=self._where,
                        ) from error
                    if lost and time.monotonic() < deadline:
                        _log.warning("lost the connection to the topology, connecting again")
                        continue
                    if error.sqlstate in _CONFLICTS and conflicts < _MAX_CONFLICTS:
                        conflicts += 1
                        time.sleep(random.uniform(0.005, 0.02) * conflicts)  # noqa: S311 jitter
                        continue
                    raise self._translated(error) from error
                except BaseException:
                    self._reset(connection, lost=False)
                    raise
                return result

    def _connected(self, deadline: float) -> psycopg.Connection[Row]:
        if self._process != os.getpid():
            # A forked child must not speak, nor say goodbye, on its parent's connection.
            self._connection, self._process = None, os.getpid()
        if self._connection is not None and not self._connection.closed:
            return self._connection
        delay = 0.05
        while True:
            try:
                self._connection = connect(self._parameters)
            except psycopg.Error as error:
                translated = self._translated(error)
                patient = self._was_connected and isinstance(translated, Unreachable)
                if not patient or time.monotonic() + delay > deadline:
                    raise translated from None  # its text may quote the connection string
                time.sleep(delay)
                delay = min(delay * 2, 1.0)
            else:
                self._was_connected = True
                return self._connection

    def _reset(self, connection: psycopg.Connection[Row], *, lost: bool) -> None:
        if lost:
            self._connection = None
            connection.close()
            return
        try:
            connection.rollback()
        except psycopg.Error:
            self._connection = None
            connection.close()

    def _translated(self, error: psycopg.Error) -> CellferryError:
        return translated(error, self._where)


def connect(parameters: dict[str, Any]) -> psycopg.Connection[Row]:
    """Open a connection with our session settings; raises psycopg's own errors."""
    connection = psycopg.connect(**parameters)
    heard = _confirmations[connection] = _Confirmations()
    connection.add_notice_handler(heard)
    try:
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        connection.execute(_SESSION)
        connection.commit()
    except BaseException:
        connection.close()
        raise
    return connection


class _Confirmations:
    """Remembers whether the server said that a standby has not confirmed a commit.

    A wait for a synchronous standby that somebody cancels ends with a warning and without an error:
    the commit is there, and gone if that standby is promoted.
    """

    def __init__(self) -> None:
        self.cancelled = False

    def __call__(self, diagnostic: errors.Diagnostic) -> None:
        # The text is in the server's language.
        if diagnostic.source_function == "SyncRepWaitForLSN":
            self.cancelled = True


#: By connection; psycopg's own has no place for it.
_confirmations: weakref.WeakKeyDictionary[psycopg.Connection[Row], _Confirmations] = (
    weakref.WeakKeyDictionary()
)


def _insist_on_confirmation(connection: psycopg.Connection[Row], where: str) -> None:
    """After a commit: see that the synchronous standby, where there is one, has it.

    Raises:
        OutcomeUnknown: it did not confirm.
    """
    heard = _confirmations.get(connection)
    if heard is not None and heard.cancelled:
        heard.cancelled = False
        raise OutcomeUnknown(
            "the topology's synchronous standby did not confirm a change: it would be lost"
            " if that standby were promoted",
            hint="bring the standby back, or take it out of synchronous_standby_names; then run"
            " the step again",
            where=where,
        )


def translated(error: psycopg.Error, where: str) -> CellferryError:
    """Return the member of our error tree for `error`; never shows a password."""
    state = error.sqlstate or ""
    text = str(error)
    denied = ("password authentication failed", "no password supplied", "no pg_hba.conf entry")
    if state in {"28P01", "28000", "42501"} or any(sign in text for sign in denied):
        return AccessDenied(
            f"the topology refused access ({_reason(error)})",
            hint="check user, password and grants of the topology connection",
            where=where,
        )
    if state == "3D000" or (" database " in text and "does not exist" in text):
        return NotPrepared(
            "the topology's database does not exist", hint="create it, then install", where=where
        )
    if isinstance(error, errors.UndefinedTable | errors.InvalidSchemaName | errors.UndefinedColumn):
        return NotPrepared(
            "the topology's schema is not installed, or is older than this cellferry",
            hint="run `cellferry topology install`",
            where=where,
        )
    if state == "55P03" or isinstance(error, errors.QueryCanceled):
        return Unreachable(
            "the topology did not answer in time: another transaction holds the row",
            hint="try again; if it lasts, look for long transactions in the topology",
            where=where,
        )
    if isinstance(error, psycopg.OperationalError):
        return Unreachable(
            f"the topology does not answer ({_reason(error)})",
            hint="check that the server runs and can be reached from here",
            where=where,
        )
    return PermanentError(f"the topology refused a change: {_reason(error)}", where=where)


def _is_lost(connection: psycopg.Connection[Row], error: psycopg.Error) -> bool:
    return connection.closed or connection.broken or (error.sqlstate or "").startswith("57P0")


def _reason(error: psycopg.Error) -> str:
    # libpq's own messages never hold the password. Its indented lines only explain, and when it
    # tried several addresses the last says what counts.
    text = error.diag.message_primary or str(error)
    lines = [line for line in text.strip().splitlines() if not line.startswith(("\t", " "))]
    return lines[-1 if error.sqlstate is None else 0].strip() if lines else type(error).__name__


def _place(parameters: dict[str, Any]) -> str:
    host = parameters.get("host") or parameters.get("hostaddr") or "localhost"
    port = parameters.get("port") or 5432
    return f"{host}:{port}/{parameters.get('dbname') or parameters.get('user') or ''}"
