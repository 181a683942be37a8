"""What the application does in Redis. Each function is one operation of one session.

Only commands that may be sent twice are sent again after a lost connection; a job is queued
together with a marker of its operation, so that it may be queued again safely (hazard 9).
"""

from __future__ import annotations

import time
from typing import Any

import redis

from cellferry.local.application.places import key
from cellferry.local.application.session import Session

GROUP = "workers"
_MARKER_MS = 600_000
_ENTRIES_AT_ONCE = 5


class Keyspace:
    """The Redis half of a session's work."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._members: list[str] = []
        self._logins: list[str] = []
        self._delivered: list[str] = []
        self._count_seen = 0

    def count(self) -> None:
        """INCR a counter that all sessions share."""
        name = self._key("counter", "requests")
        result = self._session.command(
            "count",
            self._session.next_id(),
            [["add", "counter", name, 1]],
            lambda client: client.incr(name),
            repeatable=False,
        )
        if result.ok:
            self._count_seen = max(self._count_seen, int(result.value))

    def tally(self) -> None:
        """HINCRBY a field that all sessions share."""
        name = self._key("usage")
        self._session.command(
            "tally",
            self._session.next_id(),
            [["add", "hash", name, 2]],
            lambda client: client.hincrby(name, "bytes", 2),
            repeatable=False,
        )

    def enqueue(self, job: str | None = None) -> None:
        """Put a job in the queue exactly once, whatever happens on the way."""
        operation = self._session.next_id()
        job = job or operation
        queue, marker = self._key("queue"), self._key("done", job)

        def work(client: redis.Redis) -> str:
            with client.pipeline() as pipeline:
                while True:
                    try:
                        pipeline.watch(marker)  # type: ignore[no-untyped-call]
                        if pipeline.exists(marker):
                            return "was queued"
                        pipeline.multi()
                        pipeline.set(marker, 1, px=_MARKER_MS)
                        pipeline.lpush(queue, job)
                        pipeline.execute()
                    except redis.WatchError:
                        continue
                    return "queued"

        self._session.command(
            "enqueue", operation, [["push", "queue", queue, job]], work, repeatable=True
        )

    def dequeue(self) -> None:
        """Take a job; the answer says which."""
        queue = self._key("queue")
        self._session.command(
            "dequeue",
            self._session.next_id(),
            [["pop", "queue", queue]],
            lambda client: client.rpop(queue),
            repeatable=False,
        )

    def rank(self) -> None:
        """Add a member to a sorted set, or remove one."""
        session, ranking = self._session, self._key("ranking")
        operation = session.next_id()
        if len(self._members) > 20:
            member = self._members.pop(session.random.randrange(len(self._members)))
            session.command(
                "unrank",
                operation,
                [["drop", "zset", f"{ranking} {member}"]],
                lambda client: client.zrem(ranking, member),
                repeatable=True,
            )
            return
        score = session.random.randrange(1_000_000) / 4
        result = session.command(
            "rank",
            operation,
            [["make", "zset", f"{ranking} {operation}", repr(score)]],
            lambda client: client.zadd(ranking, {operation: score}),
            repeatable=True,
        )
        if result.ok:
            self._members.append(operation)

    def publish(self) -> None:
        """Append an entry to the stream."""
        operation, stream = self._session.next_id(), self._key("stream")
        self._session.command(
            "publish",
            operation,
            [["entry", "stream", stream, operation]],
            lambda client: client.xadd(stream, {"operation": operation}),
            repeatable=False,
        )

    def consume(self) -> None:
        """Read new entries as a member of the consumer group, or acknowledge earlier ones."""
        session, stream = self._session, self._key("stream")
        operation = session.next_id()
        if self._delivered:
            done, self._delivered = self._delivered, []
            session.command(
                "finish_entries",
                operation,
                [["ack", "stream", stream, done]],
                lambda client: client.xack(stream, GROUP, *done),
                repeatable=True,
            )
            return

        def read(client: redis.Redis) -> list[str]:
            answer: Any = client.xreadgroup(
                GROUP, session.name, {stream: ">"}, count=_ENTRIES_AT_ONCE
            )
            pairs = answer.items() if isinstance(answer, dict) else (answer or [])
            return [entry for _, entries in pairs for entry in _entry_ids(entries)]

        result = session.command(
            "read_entries", operation, [["deliver", "stream", stream]], read, repeatable=False
        )
        if result.ok:
            self._delivered = list(result.value)

    def log_in(self) -> None:
        """Store a session with an absolute expiry, or delete one."""
        session = self._session
        operation = session.next_id()
        if len(self._logins) > 30:
            name = self._logins.pop(session.random.randrange(len(self._logins)))
            session.command(
                "log_out",
                operation,
                [["drop", "string", name]],
                lambda client: client.delete(name),
                repeatable=True,
            )
            return
        name = self._key("session", operation)
        # some expire while the organization moves, most do not
        lives_s = session.random.choice((8, 20, 3600, 7200, 7200))
        expires = int((time.time() + lives_s) * 1000)
        result = session.command(
            "log_in",
            operation,
            [["make", "string", name, operation, expires]],
            lambda client: client.set(name, operation, pxat=expires),
            repeatable=True,
        )
        if result.ok and lives_s >= 3600:
            self._logins.append(name)

    def read_back(self) -> None:
        """Read the shared counter; it may not go backwards."""
        name = self._key("counter", "requests")
        seen = self._count_seen

        def work(client: redis.Redis) -> list[list[Any]]:
            return [["counter", name, int(client.get(name) or 0), seen]]

        result = self._session.look("read_back", work)
        if result.ok:
            self._count_seen = max(self._count_seen, result.value[0][2])

    def _key(self, *parts: str) -> str:
        return key(self._session.organization, "live", *parts)


def _entry_ids(entries: Any) -> list[str]:
    # RESP3 wraps the list of a stream's entries once more than RESP2
    flat = entries[0] if entries and isinstance(entries[0], list) else entries
    return [str(entry[0]) for entry in flat]
