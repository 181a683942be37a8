"""One PostgreSQL transaction that asserts authority first and says what became of its commit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
from psycopg.pq import TransactionStatus

from cellferry.model import Route
from cellferry.routing.answers import NotCommitted, UnknownOutcome, translate

C = TypeVar("C", bound=psycopg.Connection[Any])


@contextmanager
def transaction(connection: C, route: Route, *, assert_authority: bool = True) -> Iterator[C]:
    """Run the block in one transaction of `route.cell`, and commit it.

    Asserts once that the cell has authority for the organization at `route.epoch`: reads, and
    writes that hit no row, are not gated otherwise, and a stale client would conclude "gone"
    (hazard 8).

    Args:
        connection: idle, to the cell that `route` names.
        route: as `RouteClient.run` gave it.
        assert_authority: False only for a cell that was not prepared yet.

    Raises:
        Moved, BeingMoved: the gate's answer; nothing was committed.
        NotCommitted: the connection broke before the commit was sent; nothing was committed.
        UnknownOutcome: it broke while committing.
        ValueError: a transaction is open on the connection.
    """
    if connection.info.transaction_status is not TransactionStatus.IDLE and not connection.closed:
        raise ValueError("a transaction is already open on this connection")
    committing = False
    try:
        with connection.transaction():
            if assert_authority:
                connection.execute(
                    "SELECT cellferry.assert_authority(%s::text, %s::bigint)",
                    [route.organization, route.epoch],
                )
            yield connection
            committing = True
    except psycopg.Error as error:
        if connection.closed:
            if committing:
                raise UnknownOutcome(
                    f"the connection to {route.cell} broke while committing"
                ) from error
            raise NotCommitted(f"the connection to {route.cell} broke") from error
        answer = translate(error)
        if answer is error:
            raise
        raise answer from error
