"""What moving keys asks of a shard: bulk work, one interface for both kinds of server.

A `Side` is one shard as the mover sees it. Reading and writing are pipelined: `ask` and `put`
send, `answers` and `settle` wait. Values and expiries are exact: `Record.expires` counts in the
kind's own unit (redis: milliseconds, postgres: microseconds since 1970), and `now` does too.

**Fence.** A copier that was stopped for minutes and goes on would overwrite what has become the
authority. So a side writes for one *lane*, the traffic of one pair of shards in either direction,
with a number that rises with every lease; `take_over` stores the number at the server and ends the
older writers' connections there, and a connection made later with a smaller number is refused.
Connections never reconnect, so nothing old can write any more once `take_over` has returned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from cellferry.errors import InvalidInput
from cellferry.settings import ConnectionSource, resolve
from cellferry.shards.server import KINDS
from cellferry.shards.settings import ShardSet

NO_EXPIRY = -1


@dataclass(frozen=True, slots=True)
class Record:
    """A key's value at one moment.

    Attributes:
        value: the bytes of it; of a type other than a string what DUMP says.
        expires: absolute, in the kind's unit; -1 for none.
        is_dump: whether `value` is a DUMP.
    """

    value: bytes
    expires: int = NO_EXPIRY
    is_dump: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """Some keys of a scan, none of them ours, and where the scan goes on behind them.

    A key may come on several pages. `after` is empty on the last page.
    """

    keys: list[bytes]
    after: str


@dataclass(frozen=True, slots=True)
class Lane:
    """The traffic between an old and a new owner, whichever way it goes.

    Attributes:
        set_name: of the shard set.
        old: the shard's name in the placement before the re-sharding.
        new: the shard's name in the one after it.
    """

    set_name: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.set_name}:{self.old}>{self.new}"

    @property
    def digest(self) -> str:
        """Twelve letters that stand for it where a name must be short and plain."""
        text = f"{self.set_name}\0{self.old}\0{self.new}"
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


@dataclass(frozen=True, slots=True)
class Facts:
    """What a plan must know of a server.

    Attributes:
        engine: `redis`, `valkey` or `postgres`.
        version: as the server says it.
        identity: of the server process (redis) or cluster and database (postgres): two shards with
            one identity are one.
        used_bytes: memory (redis) or the database's size (postgres).
        limit_bytes: what it may use; 0 when nobody set a limit.
        evicts: the policy by which it throws keys away when the limit is reached; empty: none.
        evicted: keys that it has thrown away since it started.
        is_primary: whether it takes writes.
        is_cluster: whether it is a node of a Redis Cluster, which places keys itself.
        keys: all keys of the database, of others too; estimated for postgres.
    """

    engine: str
    version: str
    identity: str
    used_bytes: int
    limit_bytes: int
    evicts: str
    evicted: int
    is_primary: bool
    is_cluster: bool
    keys: int


class ChangeFeed(Protocol):
    """Names of keys that changed at one side since it was opened, others' keys among them."""

    @property
    def lost(self) -> str | None:
        """Why changes may have been missed; None while it is complete."""
        ...

    def take(self, limit: int | None = None) -> set[bytes]:
        """Take at most `limit` keys out; those that change again come again."""
        ...

    def barrier(self, timeout: float) -> None:
        """Return when every change made before this call can be taken; `TransientError` if lost."""
        ...

    def close(self) -> None:
        """End it."""
        ...


class Side(Protocol):
    """One shard, for bulk work. Connections open when first used. Not for several threads.

    Everything raises `Unreachable` when a connection is lost: nothing is tried again here.
    """

    @property
    def name(self) -> str:
        """The shard's name, for messages."""
        ...

    def facts(self) -> Facts:
        """Ask the server what a plan must know. Changes nothing."""
        ...

    def identity(self) -> str:
        """Return what a scan's cursor is bound to: another one makes it worthless."""
        ...

    def now(self) -> int:
        """Return the server's clock in the unit of `Record.expires`."""
        ...

    def scan(self, after: str = "", *, count: int = 2000) -> Iterator[Page]:
        """Yield pages of the set's keys; each key that exists throughout comes at least once.

        Args:
            after: `Page.after` of an earlier scan of the same identity.
            count: keys in a page, about.
        """
        ...

    def ask(self, keys: Sequence[bytes]) -> None:
        """Send for the records of `keys`."""
        ...

    def answers(self) -> list[Record | None]:
        """Return what the oldest `ask` sent for; None is an absent or expired key."""
        ...

    def exist(self, keys: Sequence[bytes]) -> list[bool]:
        """Return for each of `keys` whether it exists and has not expired."""
        ...

    def sizes(self, keys: Sequence[bytes]) -> list[int]:
        """Return the bytes that each of `keys` takes in the server; 0 for an absent one."""
        ...

    def same(self, one: Record | None, other: Record | None) -> bool:
        """Whether two records certainly are equal, expiry included."""
        ...

    def same_at(self, key: bytes, other: Side) -> bool:
        """Read `key` at both sides by its type's own commands and compare. Slow."""
        ...

    def take_over(self, lane: Lane, fence: int, *, writes: bool) -> None:
        """Become the only writer of `lane` at this side; see the module.

        Args:
            writes: open a writer; else only end the others.

        Raises:
            LeaseLost: a higher number was here.
        """
        ...

    def put(self, keys: Sequence[bytes], records: Sequence[Record | None]) -> None:
        """Send: make each key as its record says, whatever it was; None removes it."""
        ...

    def settle(self, leave: int = 0) -> None:
        """Wait for all `put`s but the last `leave`.

        Raises:
            PermanentError: one was refused: no memory left, no right.
        """
        ...

    def remove(self, keys: Sequence[bytes]) -> int:
        """Remove `keys` through the writer, and wait; return how many existed."""
        ...

    def purge(self, limit: int) -> int:
        """Remove at most `limit` expired keys that still take room; return how many it were."""
        ...

    def tidy(self) -> None:
        """Remove what feeds left in the server."""
        ...

    def feed(self, purpose: str) -> ChangeFeed:
        """Begin to hear of changed keys."""
        ...

    def close(self) -> None:
        """Close all connections."""
        ...


def open_side(shard_set: ShardSet, shard: str, source: ConnectionSource) -> Side:
    """Return the side of `shard` of `shard_set`; connects when it is first used.

    Raises:
        InvalidInput: unknown shard or connection.
    """
    if shard not in shard_set.connections:
        raise InvalidInput(
            f"there is no shard {shard!r} in the set {shard_set.name!r}",
            hint=f"choose one of {', '.join(shard_set.connections)}",
        )
    url = resolve(shard_set.connections[shard], source)
    if shard_set.kind == "redis":
        from cellferry.shards.redis_side import RedisSide

        return RedisSide(url, shard, shard_set.key_prefix)
    if shard_set.kind == "postgres":
        from cellferry.shards.postgres_side import PostgresSide

        return PostgresSide(url, shard, shard_set.key_prefix)
    raise InvalidInput(
        f"there is no kind of shard {shard_set.kind!r}", hint=f"choose {' or '.join(KINDS)}"
    )
