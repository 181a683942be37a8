"""A shard that is a table in PostgreSQL.

`cellferry reshard register` makes the table, and the copier that of a shard that is added. A row
whose time is over counts as absent; whoever claims it takes it over.
"""

from __future__ import annotations

from typing import Any

import psycopg

from cellferry.errors import PermanentError
from cellferry.shards.claims import Held
from cellferry.stores.postgres import sessions
from cellferry.stores.postgres.catalog import queries

QUERIES = queries("postgres_server.sql", __package__)


class PostgresShard:
    """One connection to one database; see `ShardServer`."""

    def __init__(self, url: str, name: str) -> None:
        self._url = url
        self._where = f"shard {name}"
        self._connection: psycopg.Connection[Any] | None = None
        self._connected()

    def install(self) -> None:
        """Make the table, unless it is there."""
        self._one("table")

    def claim(
        self, key: bytes, token: bytes, *, ttl_ms: int | None = None, expires_ms: int | None = None
    ) -> Held:
        """One upsert, which keeps a living holder."""
        if (ttl_ms is None) == (expires_ms is None):
            raise ValueError("a claim has either a TTL or an absolute expiry")
        row = self._one("claim", key=key, value=token, ttl_ms=ttl_ms, expires_ms=expires_ms)
        if row is None:
            raise PermanentError("a claim returned no row", where=self._where)
        return Held(bytes(row[0]), row[1])

    def get(self, key: bytes) -> bytes | None:
        """Select the living row."""
        row = self._one("get", key=key)
        return None if row is None else bytes(row[0])

    def set(self, key: bytes, value: bytes, *, ttl_ms: int | None = None) -> None:
        """Upsert."""
        self._one("set", key=key, value=value, ttl_ms=ttl_ms)

    def increment(self, key: bytes, by: int = 1, *, ttl_ms: int | None = None) -> int:
        """Upsert with a sum."""
        row = self._one("increment", key=key, by=by, ttl_ms=ttl_ms)
        return 0 if row is None else int(row[0])

    def delete(self, key: bytes, *, token: bytes | None = None) -> bool:
        """Delete the row."""
        row = self._one("delete", key=key, token=token)
        return row is not None and bool(row[0])

    def ping(self) -> None:
        """Select something."""
        self._one("ping")

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connected(self) -> psycopg.Connection[Any]:
        if self._connection is None or self._connection.closed:
            with sessions.translate_errors(self._where):
                self._connection = psycopg.connect(
                    self._url,
                    autocommit=True,
                    connect_timeout=5,
                    application_name="cellferry-shards-client",
                    prepare_threshold=2,
                )
        return self._connection

    def _one(self, query: str, **facts: Any) -> tuple[Any, ...] | None:
        with sessions.translate_errors(self._where):
            cursor = self._connected().execute(QUERIES[query], facts)
            return cursor.fetchone() if cursor.description else None
