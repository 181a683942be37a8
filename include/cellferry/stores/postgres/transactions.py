"""The two kinds of transaction that the mover has: a snapshot to read, a lease to write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from cellferry.model import Move
from cellferry.stores.postgres import gate


@contextmanager
def snapshot(connection: psycopg.Connection[Any]) -> Iterator[None]:
    """Read everything inside as of one moment. The connection is in autocommit mode."""
    with _committed(connection):
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        yield


@contextmanager
def write(connection: psycopg.Connection[Any], move: Move) -> Iterator[None]:
    """Write as this attempt only: the lease is held to the end of the transaction (hazard 1).

    Raises:
        LeaseLost: another attempt took over; nothing was written.
    """
    with _committed(connection):
        with connection.pipeline():  # writers may be waiting
            connection.execute("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE")
            lease = gate.ask_for_lease(connection, move)
        gate.insist_on_lease(lease, move)
        yield


@contextmanager
def _committed(connection: psycopg.Connection[Any]) -> Iterator[None]:
    try:
        yield
        connection.execute("COMMIT")
    except BaseException as error:
        if not connection.closed:
            try:
                connection.rollback()
            except psycopg.Error:
                connection.close()  # in the middle of a message; the server rolls back
        interruption = _interruption_behind(error)
        if interruption is not None:
            raise interruption from None
        raise


def _interruption_behind(error: BaseException) -> BaseException | None:
    """Return what told this process to end, if a pipeline covered it with an error of its own."""
    behind = error.__context__
    while behind is not None and isinstance(behind, Exception):
        behind = behind.__context__
    return behind if isinstance(error, psycopg.Error) else None
