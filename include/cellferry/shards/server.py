"""What a shard can do for a client: a handful of verbs, each one round trip.

All times are the server's: an expiry is milliseconds since 1970 on its clock. Keys and values are
bytes. None of the verbs is tried again here; whether that is harmless is the caller's to know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from cellferry.errors import InvalidInput
from cellferry.settings import ConnectionSource, resolve
from cellferry.shards.claims import Held

KINDS = ("redis", "postgres")


class ShardServer(Protocol):
    """One connection to one shard. Not for several threads at once.

    All verbs raise `Unreachable` when the connection is lost; whether the verb was done is unknown
    then, and the next verb connects anew.
    """

    def claim(
        self, key: bytes, token: bytes, *, ttl_ms: int | None = None, expires_ms: int | None = None
    ) -> Held:
        """Set `key` to `token` unless it exists; return who holds it and until when.

        Args:
            ttl_ms: from now; or
            expires_ms: absolute. Exactly one of the two.
        """
        ...

    def get(self, key: bytes) -> bytes | None:
        """Return the value, None for an absent key."""
        ...

    def set(self, key: bytes, value: bytes, *, ttl_ms: int | None = None) -> None:
        """Set the value; None keeps it for ever."""
        ...

    def increment(self, key: bytes, by: int = 1, *, ttl_ms: int | None = None) -> int:
        """Add to a counter and return it; `ttl_ms` counts for a counter that this call begins."""
        ...

    def delete(self, key: bytes, *, token: bytes | None = None) -> bool:
        """Delete the key; with `token` only while that holds it. Returns whether it was there."""
        ...

    def ping(self) -> None:
        """Return if the server answers."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


def open_shard(
    kind: str, name: str, connections: Mapping[str, str], source: ConnectionSource
) -> ShardServer:
    """Connect to the shard called `name`; `connections` has the name of its connection.

    Raises:
        InvalidInput: unknown kind or connection.
        Unreachable, AccessDenied: nobody answers, or wrong password.
    """
    url = resolve(connections[name], source)
    if kind == "redis":
        from cellferry.shards.redis_server import RedisShard

        return RedisShard(url, name)
    if kind == "postgres":
        from cellferry.shards.postgres_server import PostgresShard

        return PostgresShard(url, name)
    raise InvalidInput(f"there is no kind of shard {kind!r}", hint=f"choose {' or '.join(KINDS)}")
