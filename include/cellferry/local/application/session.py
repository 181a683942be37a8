"""One sequential writer of one organization: how it reaches cells, and what it records.

A session does one operation at a time. Each is recorded in the ledger before it is sent and
after its outcome is known. The session knows cells only through the route client: it asks where its
organization is, asserts the authority it was told once in each transaction, and goes elsewhere
when a store says so.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cellferry.local.application.ledger import Effect, LedgerWriter, Outcome
from cellferry.model import Route
from cellferry.routing import (
    NotCommitted,
    RouteClient,
    UnknownOutcome,
    redis_answers,
    transaction,
)

Cursor = psycopg.Cursor[tuple[Any, ...]]

DEADLINE_S = 30.0
"""How long an operation is tried before its writer gives up."""

ISOLATION = {
    "read committed": psycopg.IsolationLevel.READ_COMMITTED,
    "repeatable read": psycopg.IsolationLevel.REPEATABLE_READ,
    "serializable": psycopg.IsolationLevel.SERIALIZABLE,
}


class RowGone(Exception):
    """A row that this session had been told is there is not."""


@dataclass(slots=True)
class Tally:
    """What a session has done; read by another thread."""

    acknowledged: int = 0
    refused: int = 0
    unknown: int = 0
    reads: int = 0

    @property
    def writes(self) -> int:
        """Writes that were tried, whatever became of them."""
        return self.acknowledged + self.refused + self.unknown


@dataclass(slots=True)
class Result:
    """Outcome of one operation."""

    outcome: Outcome
    value: Any = None

    @property
    def ok(self) -> bool:
        """Whether it was acknowledged."""
        return self.outcome is Outcome.ACKNOWLEDGED


@dataclass(slots=True)
class Session:
    """One sequential writer.

    Attributes:
        name: unique among all writers; begins its operations' ids.
        urls: of the application, per cell: PostgreSQL and this organization's Redis user.
    """

    name: str
    organization: str
    router: RouteClient
    urls: Mapping[str, tuple[str, str]]
    ledger: LedgerWriter
    random: random.Random
    tally: Tally = field(default_factory=Tally)
    _number: int = 0
    _postgres: dict[str, psycopg.Connection[tuple[Any, ...]]] = field(default_factory=dict)
    _redis: dict[str, redis.Redis] = field(default_factory=dict)
    _asserts: dict[str, bool] = field(default_factory=dict)

    def next_id(self) -> str:
        """Return a new operation id."""
        self._number += 1
        return f"{self.name}.{self._number}"

    def warm_up(self) -> None:
        """Connect to every cell, as a pool for each would: the first write after a move waits less.

        A cell that does not answer is left for later.
        """
        for cell in self.urls:
            with contextlib.suppress(NotCommitted):
                self._connect(cell)

    def close(self) -> None:
        """Close all connections."""
        for connection in self._postgres.values():
            connection.close()
        for client in self._redis.values():
            client.close()

    def sql(
        self,
        kind: str,
        operation: str,
        effects: Sequence[Effect],
        work: Callable[[Cursor], Any],
        isolation: str = "read committed",
    ) -> Result:
        """Run `work` in one transaction and record it; reads have no effects."""
        return self._record(
            "postgres",
            kind,
            operation,
            effects,
            lambda route: self._transaction(route, work, isolation),
        )

    def command(
        self,
        kind: str,
        operation: str,
        effects: Sequence[Effect],
        work: Callable[[redis.Redis], Any],
        *,
        repeatable: bool,
    ) -> Result:
        """Send a Redis command and record it.

        Args:
            repeatable: sending it twice has the effect of sending it once, so that it may be
                sent again after a lost connection. All others are then of unknown outcome.
        """
        return self._record(
            "redis",
            kind,
            operation,
            effects,
            lambda route: self._command(route, work, repeatable=repeatable),
        )

    def look(self, kind: str, work: Callable[[redis.Redis], Any]) -> Result:
        """Read from Redis where the organization is, not from a copy that was left behind."""
        return self._record(
            "redis",
            kind,
            self.next_id(),
            (),
            lambda route: self._command(route, work, repeatable=True, gated=True),
        )

    def _record(
        self,
        store: str,
        kind: str,
        operation: str,
        effects: Sequence[Effect],
        attempt: Callable[[Route], Any],
    ) -> Result:
        self.ledger.intend(operation, self.name, self.organization, store, kind, effects)
        attempts = 0
        seen: Route | None = None

        def counted(route: Route) -> Any:
            nonlocal attempts, seen
            attempts += 1
            seen = route
            return attempt(route)

        begun = time.monotonic()
        value: Any = None
        reason: str | None = None
        try:
            value = self.router.run(self.organization, counted, DEADLINE_S, retry_lost=True)
            outcome = Outcome.ACKNOWLEDGED
        except UnknownOutcome as error:
            outcome, reason = Outcome.UNKNOWN, str(error)
        except Exception as error:  # noqa: BLE001 - whatever it was, it goes into the ledger
            outcome, reason = Outcome.REFUSED, f"{type(error).__name__}: {error}"[:300]
        self.ledger.conclude(
            operation,
            outcome,
            seconds=time.monotonic() - begun,
            attempts=attempts,
            cell=seen.cell if seen else None,
            epoch=seen.epoch if seen else None,
            result=value,
            reason=reason,
        )
        self._count(outcome, is_read=not effects)
        return Result(outcome, value)

    def _count(self, outcome: Outcome, *, is_read: bool) -> None:
        if is_read:
            self.tally.reads += 1
        elif outcome is Outcome.ACKNOWLEDGED:
            self.tally.acknowledged += 1
        elif outcome is Outcome.UNKNOWN:
            self.tally.unknown += 1
        else:
            self.tally.refused += 1

    def _transaction(self, route: Route, work: Callable[[Cursor], Any], isolation: str) -> Any:
        connection = self._connect(route.cell)
        connection.isolation_level = ISOLATION[isolation]
        with transaction(connection, route, assert_authority=self._asserts[route.cell]):
            return work(connection.cursor())

    def _connect(self, cell: str) -> psycopg.Connection[tuple[Any, ...]]:
        connection = self._postgres.get(cell)
        if connection is not None and not connection.closed:
            return connection
        try:
            connection = psycopg.connect(
                self.urls[cell][0],
                autocommit=True,
                connect_timeout=5,
                application_name=f"sample {self.name}",
                prepare_threshold=2,
            )
            row = connection.execute(
                "SELECT to_regprocedure('cellferry.assert_authority(text, bigint)') IS NOT NULL"
            ).fetchone()
        except psycopg.OperationalError as error:
            raise NotCommitted(str(error)) from error
        self._asserts[cell] = bool(row and row[0])
        self._postgres[cell] = connection
        return connection

    def _command(
        self,
        route: Route,
        work: Callable[[redis.Redis], Any],
        *,
        repeatable: bool,
        gated: bool = False,
    ) -> Any:
        client = self._redis.get(route.cell)
        if client is None:
            client = redis.Redis.from_url(
                self.urls[route.cell][1],
                decode_responses=True,
                socket_timeout=5,
                socket_connect_timeout=5,
                # The client would otherwise send a command again after a lost connection, by
                # itself, and count twice.
                retry=Retry(NoBackoff(), 0),
                single_connection_client=False,
            )
            self._redis[route.cell] = client
        try:
            with redis_answers(client, self.organization, assert_authority=gated):
                return work(client)
        except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
            # Surely nothing happened; and a gate that refused a moment ago is open by now.
            raise NotCommitted(str(error)) from error
        except (redis.ConnectionError, redis.TimeoutError) as error:
            if repeatable:
                raise NotCommitted(str(error)) from error
            raise UnknownOutcome(str(error)) from error
