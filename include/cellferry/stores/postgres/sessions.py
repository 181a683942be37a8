"""Connections to a cell's PostgreSQL, and the translation of its errors into the error tree.

Every session of the mover is made here, so that each has a name that an operator recognizes in
`pg_stat_activity`, ends soon when its network is gone, and prints values in one form only.
"""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus

from cellferry.errors import (
    AccessDenied,
    AuthorityViolation,
    CellferryError,
    InvalidInput,
    NotPrepared,
    PermanentError,
    TransientError,
    Unreachable,
)
from cellferry.model import Move

#: The form of every value that is sent, logged, hashed or compared; and names that mean the same
#: whatever a role's settings are. Row-level security must fail instead of hiding rows.
PINNED = {
    "TimeZone": "UTC",
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "xmloption": "content",
    "lc_monetary": "C",
    "standard_conforming_strings": "on",
    "search_path": "pg_catalog",
    "row_security": "off",
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    "default_transaction_deferrable": "off",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "jit": "off",
    # One session of the mover takes one core of a server that others work with.
    "max_parallel_workers_per_gather": "0",
}

#: The server, too, must notice soon that this client is gone: it holds locks for it.
SERVER_LIVENESS = {
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "10000",
    "client_connection_check_interval": "2000",
}

CONNECT_TIMEOUT_S = 10
TCP_USER_TIMEOUT_MS = 10_000


def application_name(purpose: str, move: Move | None = None) -> str:
    """Return the name of a session: `cellferry:<migration>:<attempt>:<purpose>`."""
    if move is None:
        return f"cellferry:{purpose}"[:63]
    return f"cellferry:{move.migration}:{move.attempt}:{purpose}"[:63]


def connect(
    endpoint_url: str,
    *,
    purpose: str,
    move: Move | None = None,
    autocommit: bool = False,
    where: str = "",
) -> psycopg.Connection[tuple[Any, ...]]:
    """Open a session to a cell, straight to the server and never through a pooler.

    Args:
        endpoint_url: URL or key-value string of libpq.
        purpose: what the session is for: `copy`, `barrier`; seen in `pg_stat_activity`.
        move: the attempt it works for, if it does.
        autocommit: as in psycopg.
        where: cell and store, for errors.

    Raises:
        Unreachable: nobody answered.
        AccessDenied: wrong user or password, or not let in.
        InvalidInput: no such database, or not a connection string.
    """
    try:
        parameters: dict[str, Any] = dict(conninfo_to_dict(endpoint_url))
    except psycopg.ProgrammingError as error:
        # The text of the error may show the password.
        raise InvalidInput(
            "the connection is not a PostgreSQL URL",
            hint="write it as postgresql://user:password@host:port/database",
            where=where or None,
        ) from error
    where = f"{where} ({place(parameters)})" if where else place(parameters)
    options = " ".join(
        f"-c {name}={_escape(value)}" for name, value in {**PINNED, **SERVER_LIVENESS}.items()
    )
    parameters = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "tcp_user_timeout": TCP_USER_TIMEOUT_MS,
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        **parameters,
        "options": f"{parameters.get('options') or ''} {options}".strip(),
        "application_name": application_name(purpose, move),
        "client_encoding": "utf8",
    }
    with translate_errors(where):
        connection = psycopg.connect(make_conninfo("", **parameters), autocommit=autocommit)
        try:
            _insist_on_durable_commits(connection)
        except BaseException:
            connection.close()
            raise
    return connection


class Kept:
    """Sessions that one step of this process leaves to the next, made as new in between.

    A new session costs a small step as much as its work: the server starts a process, which reads
    the catalogs anew. What is made as new with DISCARD ALL, as poolers do between clients, has
    nothing of the step before but those catalogs, which the server keeps true.

    Only for steps that follow each other: whoever waited asks for the server that is there now.
    Safe to share by threads.
    """

    #: Longest time (seconds) between two steps.
    LONGEST_S = 2.0
    #: psycopg's own number of prepared statements for each session; a step may have changed it.
    PREPARED = 100

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._number = itertools.count()
        self._sessions: dict[str, tuple[float, psycopg.Connection[Any]]] = {}

    def leave(self, endpoint_url: str, session: psycopg.Connection[Any]) -> None:
        """Keep a session in autocommit mode, as new and in nobody's name; one for each URL.

        One that is at work, or cannot be made as new, is closed.
        """
        is_new = False
        try:
            if session.info.transaction_status is TransactionStatus.IDLE:
                # psycopg forgets what it prepared when it sees this succeed, and looks only at the
                # results of texts that are new to it.
                session.execute(f"DISCARD ALL -- {next(self._number)}".encode())
                session.prepared_max = self.PREPARED
                set_for_session(session, "application_name", application_name("kept"))
                _insist_on_durable_commits(session)
                is_new = True
        except psycopg.Error:
            pass  # ended by a newer attempt, or the server is gone
        finally:
            if not is_new:
                session.close()
        if is_new:
            with self._lock:
                _, older = self._sessions.pop(endpoint_url, (0.0, None))
                self._sessions[endpoint_url] = (time.monotonic(), session)
            if older is not None:
                older.close()

    def take(
        self, endpoint_url: str, *, purpose: str, move: Move | None = None
    ) -> psycopg.Connection[Any] | None:
        """Return the session that was left for this URL; None: connect.

        Args:
            endpoint_url: as `connect` had it.
            purpose: the session's name from now on, as for `connect`.
            move: the same.
        """
        with self._lock:
            left_at, session = self._sessions.pop(endpoint_url, (0.0, None))
        if session is None:
            return None
        is_there = False
        try:
            if time.monotonic() - left_at <= self.LONGEST_S:
                set_for_session(session, "application_name", application_name(purpose, move))
                is_there = True
        except psycopg.Error:
            pass  # an administrator ended it, or the server is gone
        finally:
            if not is_there:
                session.close()
        return session if is_there else None

    def drop(self, endpoint_url: str) -> None:
        """Close the session that was left for this URL, if there is one."""
        with self._lock:
            _, session = self._sessions.pop(endpoint_url, (0.0, None))
        if session is not None:
            session.close()

    def close(self) -> None:
        """Close what nobody took."""
        for endpoint_url in list(self._sessions):
            self.drop(endpoint_url)


def place(parameters: dict[str, Any]) -> str:
    """Say where a connection goes, without its password."""
    host = parameters.get("host") or parameters.get("hostaddr") or "local socket"
    return f"postgres {host}:{parameters.get('port') or 5432}/{parameters.get('dbname') or ''}"


def _insist_on_durable_commits(connection: psycopg.Connection[Any]) -> None:
    # A role or database may commit asynchronously by default; a gate that a crash undoes is none,
    # nor one that a crash of the standby undoes (`remote_write`). What is stronger
    # (`remote_apply`) stays.
    connection.execute(
        "SELECT set_config('synchronous_commit', 'on', false)"
        " WHERE current_setting('synchronous_commit') IN ('off', 'local', 'remote_write')"
    )
    if not connection.autocommit:
        connection.commit()


def _escape(value: str) -> str:
    return re.sub(r"([\\ ])", r"\\\1", value)


def set_locally(connection: psycopg.Connection[Any], name: str, value: str) -> None:
    """Set a parameter until the end of the current transaction."""
    connection.execute("SELECT set_config(%s, %s, true)", (name, value))


def set_for_session(connection: psycopg.Connection[Any], name: str, value: str) -> None:
    """Set a parameter for the session; `name` is a constant of the caller's."""
    connection.execute(sql.SQL("SET {} = {}").format(sql.Identifier(name), sql.Literal(value)))


@contextmanager
def translate_errors(where: str) -> Iterator[None]:
    """Turn errors of psycopg into those of `cellferry.errors`; our own pass through.

    Args:
        where: cell, store and table, for the operator.
    """
    try:
        yield
    except CellferryError:
        raise
    except psycopg.Error as error:
        raise translated(error, where) from error


#: By SQLSTATE, or by its class (two characters).
_BY_STATE: dict[str, tuple[type[CellferryError], str | None]] = {
    "08": (Unreachable, "check that the server runs and can be reached from here; then try again"),
    "28": (AccessDenied, "check the user, the password and pg_hba.conf of this cell"),
    "3D000": (InvalidInput, "correct the database's name in the connection"),
    "42501": (AccessDenied, "run `cellferry prepare-cell`: it grants what a move needs"),
    "53100": (PermanentError, "make room on the server's disk; then retry, it goes on from here"),
    "53200": (TransientError, "the server is out of memory or lock space; look at its load"),
    "53300": (Unreachable, "the server has no connection to spare; raise max_connections"),
    "53": (TransientError, None),
    "25P03": (Unreachable, "this process stood still in a transaction; try again"),
    "25006": (PermanentError, "the connection leads to a standby; point it at the primary"),
    "40": (TransientError, None),
    "55P03": (TransientError, "another transaction holds the lock; see pg_locks"),
    "55006": (TransientError, None),
    "57014": (TransientError, None),
    "57P": (Unreachable, "the server ended the session or is starting; try again"),
    "58": (PermanentError, "the server cannot read or write its files; see its log"),
    "XX": (PermanentError, "the server reports damage or an internal error; see its log"),
    "CF001": (AuthorityViolation, None),
    "CF002": (AuthorityViolation, None),
    "CF003": (AuthorityViolation, None),
    "CF004": (AuthorityViolation, None),
}

#: Columns of our own tables that a cell lacks which an older version prepared.
_OUR_LATER_COLUMNS = ("was_here", "came_from")

#: What libpq says of a connection that was not made; it gives no SQLSTATE then.
_BY_TEXT: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"password authentication failed|no password supplied"), "28P01"),
    (re.compile(r"authentication failed|no pg_hba.conf entry|not permitted to log in"), "28000"),
    (re.compile(r'role ".*" does not exist'), "28000"),
    (re.compile(r'database ".*" does not exist'), "3D000"),
    (re.compile(r"permission denied for database"), "42501"),
    (re.compile(r"too many (clients|connections)|remaining connection slots"), "53300"),
)


def translated(error: psycopg.Error, where: str) -> CellferryError:
    """Return `error` as one of our own errors; see `translate_errors`."""
    text = _message(error)
    state = error.sqlstate or _state_from_text(error, text)
    if (state in {"3F000", "42P01", "42883"} and "cellferry" in text) or (
        state == "42703" and any(name in text for name in _OUR_LATER_COLUMNS)
    ):
        return NotPrepared(
            f"{where} is not prepared: {text}",
            hint="run `cellferry prepare-cell` on this cell",
            where=where,
        )
    for key in (state, state[:3], state[:2]):
        if key in _BY_STATE:
            kind, hint = _BY_STATE[key]
            return kind(text, hint=hint, where=where)
    return PermanentError(f"{text} (SQLSTATE {state or 'none'})", where=where)


def _message(error: psycopg.Error) -> str:
    lines = [error.diag.message_primary or str(error).strip() or type(error).__name__]
    if error.diag.message_detail:
        lines.append(error.diag.message_detail)
    text = " ".join(" ".join(lines).split()).removeprefix("connection failed: ")
    return text.partition(" Is the server running on that host")[0]


def _state_from_text(error: psycopg.Error, text: str) -> str:
    for pattern, state in _BY_TEXT:
        if pattern.search(text):
            return state
    # Without a SQLSTATE it is libpq that speaks: no connection, or one that broke.
    return "08006" if isinstance(error, psycopg.OperationalError) else ""
