"""A table in PostgreSQL, for bulk work.

A cursor is a key, so it outlives a restart of the server. The fence is a row that each write reads
and locks in its own statement. Changes are logged by triggers, which a feed installs and clean-up
removes; a feed sees each transaction's changes once it has committed, however long it took.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psycopg
from psycopg import errors

from cellferry.errors import LeaseLost, NotPrepared, TransientError
from cellferry.shards import postgres_server
from cellferry.shards.sides import Facts, Lane, Page, Record, Side
from cellferry.stores.postgres import sessions
from cellferry.stores.postgres.catalog import queries

QUERIES = queries("postgres_side.sql", __package__)

_LOCK_TRIES = 10
_LOCK_TIMEOUT = "1s"
_FORGET_EVERY_S = 300.0
_TOO_LONG_S = 1800.0
"""A feed that nobody has asked for so long counts as lost: changes are forgotten after an hour."""


class PostgresSide:
    """See `Side`. One session for reading, one for writing.

    Args:
        url: of the connection.
        name: of the shard.
        prefix: what the set's keys begin with.
    """

    def __init__(self, url: str, name: str, prefix: bytes) -> None:
        self.name = name
        self._url = url
        self._prefix = prefix
        self._where = f"shard {name}"
        self._sessions: dict[str, psycopg.Connection[Any]] = {}
        self._answers: deque[list[Record | None]] = deque()
        self._lane: dict[str, Any] = {}

    # --- facts -------------------------------------------------------------------------------

    def facts(self) -> Facts:
        """Version, size and the planner's number of rows."""
        version, is_standby, size, rows = self._one("facts")
        keys = int(rows) if rows >= 0 else int(self._one("count")[0])
        return Facts(
            engine="postgres",
            version=version,
            identity=self.identity(),
            used_bytes=int(size),
            limit_bytes=0,
            evicts="",
            evicted=0,
            is_primary=not is_standby,
            is_cluster=False,
            keys=keys,
        )

    def identity(self) -> str:
        """The cluster's identifier and the database's name."""
        return str(self._one("identity")[0])

    def now(self) -> int:
        """The server's clock, in microseconds."""
        return int(self._one("now")[0])

    # --- reading -----------------------------------------------------------------------------

    def scan(self, after: str = "", *, count: int = 2000) -> Iterator[Page]:
        """Pages in the order of the keys."""
        last = bytes.fromhex(after) if after else None
        while True:
            rows = self._rows(
                "scan from the beginning" if last is None else "scan",
                after=last,
                prefix=self._prefix,
                count=count,
            )
            keys = [bytes(key) for (key,) in rows]
            if len(keys) < count:
                yield Page(keys, "")
                return
            last = keys[-1]
            yield Page(keys, last.hex())

    def ask(self, keys: Sequence[bytes]) -> None:
        """Select the living rows, at once."""
        found = {
            bytes(key): Record(bytes(value), int(expires))
            for key, value, expires in self._rows("read", keys=list(keys))
        }
        self._answers.append([found.get(key) for key in keys])

    def answers(self) -> list[Record | None]:
        """What was selected."""
        return self._answers.popleft()

    def exist(self, keys: Sequence[bytes]) -> list[bool]:
        """Select the living keys."""
        found = {bytes(key) for (key,) in self._rows("exist", keys=list(keys))}
        return [key in found for key in keys]

    def sizes(self, keys: Sequence[bytes]) -> list[int]:
        """Row and index entry."""
        found = {bytes(key): int(size) for key, size in self._rows("sizes", keys=list(keys))}
        return [found.get(key, 0) for key in keys]

    def same(self, one: Record | None, other: Record | None) -> bool:
        """Equal bytes and expiries."""
        return one == other

    def same_at(self, key: bytes, other: Side) -> bool:  # noqa: ARG002 - the interface's
        """There is one form only, so what differs differs."""
        return False

    # --- writing -----------------------------------------------------------------------------

    def take_over(self, lane: Lane, fence: int, *, writes: bool) -> None:
        """Store the number, after what older writers have under way; then end their sessions."""
        purpose = f"shards:writer:{lane.digest}:"
        session = self._connect(f"{purpose}{fence}" if writes else "shards:fence")
        try:
            with sessions.translate_errors(self._where):
                with session.transaction():
                    session.execute(QUERIES["one at a time"])
                    for query in (postgres_server.QUERIES["table"], QUERIES["fence table"]):
                        session.execute(query)
                facts = {"lane": str(lane), "number": fence}
                row = session.execute(QUERIES["raise fence"], facts).fetchone()
                there = fence if row is None else int(row[0])
                self._insist(there <= fence, lane, there, fence)
                name = sessions.application_name(purpose)
                session.execute(QUERIES["end others"], {"names": _literally(name) + "%"})
        except BaseException:
            session.close()
            raise
        if writes:
            if "writer" in self._sessions:
                self._sessions["writer"].close()
            self._sessions["writer"] = session
            self._lane = facts
        else:
            session.close()

    def put(self, keys: Sequence[bytes], records: Sequence[Record | None]) -> None:
        """Upsert and delete in one statement, which the fence lets through or not."""
        pairs = list(zip(keys, records, strict=True))
        held = {key: one for key, one in pairs if one is not None}
        row = self._write(
            "write",
            gone=[key for key, one in pairs if one is None],
            keys=list(held),
            values=[one.value for one in held.values()],
            expiries=[one.expires for one in held.values()],
        )
        self._insist_on_fence(row[0])

    def settle(self, leave: int = 0) -> None:
        """Do nothing: every `put` has ended."""

    def remove(self, keys: Sequence[bytes]) -> int:
        """Delete the rows."""
        if not keys:
            return 0
        fenced, gone = self._write("remove", keys=list(keys))
        self._insist_on_fence(fenced)
        return int(gone)

    def purge(self, limit: int) -> int:
        """Delete rows whose time is over."""
        fenced, gone = self._write("purge", prefix=self._prefix, count=limit)
        self._insist_on_fence(fenced)
        return int(gone)

    def tidy(self) -> None:
        """Remove the triggers and the log of changes."""
        self._change_table(QUERIES["tidy"])

    def feed(self, purpose: str) -> PostgresFeed:
        """Install the triggers unless they are there, and begin to listen."""
        if not self._one("is fed")[0]:
            self._change_table(QUERIES["change log"])
        return PostgresFeed(self._connect(f"shards:{purpose}"), self._prefix, self._where)

    def close(self) -> None:
        """Close all sessions."""
        while self._sessions:
            self._sessions.popitem()[1].close()
        self._answers.clear()

    # --- inside ------------------------------------------------------------------------------

    def _connect(self, purpose: str) -> psycopg.Connection[Any]:
        with sessions.translate_errors(self._where):
            return psycopg.connect(
                self._url,
                autocommit=True,
                connect_timeout=sessions.CONNECT_TIMEOUT_S,
                application_name=sessions.application_name(purpose),
                tcp_user_timeout=sessions.TCP_USER_TIMEOUT_MS,
                prepare_threshold=2,
            )

    def _session(self) -> psycopg.Connection[Any]:
        if "reader" not in self._sessions:
            self._sessions["reader"] = self._connect("shards:reader")
        return self._sessions["reader"]

    def _rows(self, query: str, **facts: Any) -> list[tuple[Any, ...]]:
        session = self._session()
        with sessions.translate_errors(self._where):
            try:
                return session.execute(QUERIES[query], facts, binary=True).fetchall()
            except errors.UndefinedTable as error:
                raise NotPrepared(
                    "there is no table cellferry_shard",
                    hint="check the connection's database; a shard's table is made when keys are"
                    " first copied to it",
                    where=self._where,
                ) from error

    def _one(self, query: str, **facts: Any) -> tuple[Any, ...]:
        return self._rows(query, **facts)[0]

    def _write(self, query: str, **facts: Any) -> tuple[Any, ...]:
        if "writer" not in self._sessions:
            raise RuntimeError(f"shard {self.name} was not taken over: nothing may write there")
        with sessions.translate_errors(self._where):
            row = self._sessions["writer"].execute(QUERIES[query], {**self._lane, **facts})
            return row.fetchone() or (0, 0)

    def _insist_on_fence(self, fenced: int) -> None:
        if not fenced:
            raise LeaseLost(
                f"a newer step moves the keys of {self._lane['lane']}; this one is"
                f" {self._lane['number']}",
                hint="nothing to do: the newer one goes on",
                where=self._where,
            )

    def _insist(self, holds: bool, lane: Lane, there: int, fence: int) -> None:
        if not holds:
            raise LeaseLost(
                f"a newer step ({there}) moves the keys of {lane}; this one is {fence}",
                hint="nothing to do: the newer one goes on",
                where=self._where,
            )

    def _change_table(self, statements: Any) -> None:
        """Change the table's triggers without making its clients wait for a long transaction."""

        def change() -> None:
            with session.transaction():
                sessions.set_locally(session, "lock_timeout", _LOCK_TIMEOUT)
                session.execute(QUERIES["one at a time"])
                for statement in _statements(statements):
                    session.execute(statement)

        session = self._session()
        with sessions.translate_errors(self._where):
            _insistently(change)


class PostgresFeed:
    """Keys that changed since it was made, or since they were last taken.

    Args:
        session: its own; closed with it.
    """

    def __init__(self, session: psycopg.Connection[Any], prefix: bytes, where: str) -> None:
        self._session = session
        self._prefix = prefix
        self._where = where
        self._lost: str | None = None
        self._kept: set[bytes] = set()
        self._asked = self._forgot = time.monotonic()
        with sessions.translate_errors(where):
            row = session.execute(QUERIES["snapshot"]).fetchone()
        self._last = "" if row is None else str(row[0])
        self._log: int | None = None if row is None else row[1]

    @property
    def lost(self) -> str | None:
        """Why changes may have been missed."""
        return self._lost

    def take(self, limit: int | None = None) -> set[bytes]:
        """Take the keys of all transactions that have committed."""
        self._look()
        if limit is None or len(self._kept) <= limit:
            taken, self._kept = self._kept, set()
        else:
            taken = {self._kept.pop() for _ in range(limit)}
        return taken

    def barrier(self, timeout: float) -> None:  # noqa: ARG002 - the interface's
        """Look: whatever has committed is in the log.

        Raises:
            TransientError: the feed is lost.
        """
        self._look()
        if self._lost is not None:
            raise TransientError(
                f"the change feed was lost: {self._lost}",
                hint="the step compares everything again when it is repeated",
                where=self._where,
            )

    def close(self) -> None:
        """Close the session; the triggers stay until clean-up."""
        self._session.close()

    def _look(self) -> None:
        if self._lost is not None:
            return
        now = time.monotonic()
        if now - self._asked > _TOO_LONG_S:
            self._lost = "nobody asked it for half an hour, and old changes are forgotten"
            return
        self._asked = now
        try:
            rows = self._session.execute(
                QUERIES["changes"], {"last": self._last}, binary=True
            ).fetchall()
            if now - self._forgot > _FORGET_EVERY_S:
                self._forgot = now
                self._session.execute(QUERIES["forget changes"])
        except psycopg.Error as error:
            self._lost = sessions.translated(error, self._where).message
            return
        self._last = str(rows[0][0])
        for _, is_change, key, log in rows:
            if log != self._log:
                self._lost = "the log of changes was removed meanwhile, and made anew"
            elif is_change and key is None:
                self._lost = "the table was truncated"
            elif is_change and bytes(key).startswith(self._prefix):
                self._kept.add(bytes(key))


def _insistently(change: Callable[[], None]) -> None:
    for left in reversed(range(_LOCK_TRIES)):
        try:
            change()
        except (errors.LockNotAvailable, errors.DeadlockDetected):
            if not left:
                raise
            time.sleep(0.2)
        else:
            return


def _statements(script: Any) -> Iterator[Any]:
    """Split a script of ours at the semicolons that end lines outside of a function's body."""
    part: list[str] = []
    for line in script.splitlines():
        part.append(line)
        text = "\n".join(part)
        if line.rstrip().endswith(";") and text.count("$$") % 2 == 0:
            yield text
            part = []
    if any(line.strip() for line in part):
        yield "\n".join(part)


def _literally(name: str) -> str:
    return name.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
