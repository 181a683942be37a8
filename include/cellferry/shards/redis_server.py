"""A shard that is a Redis (7.0 or newer) or Valkey server."""

from __future__ import annotations

from typing import Any

from cellferry.errors import Unreachable
from cellferry.shards.claims import Held
from cellferry.stores.redis.wire import Address, Command, Wire

#: INCRBY keeps an expiry; a counter that begins gets one in the same turn of the server.
_INCREMENT = """
local begins = redis.call('EXISTS', KEYS[1]) == 0
local value = redis.call('INCRBY', KEYS[1], ARGV[1])
if ARGV[2] ~= '' and begins then
    redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return value
"""
_DELETE_IF = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('UNLINK', KEYS[1]) end
return 0
"""


class RedisShard:
    """One connection to one server; see `ShardServer`."""

    def __init__(self, url: str, name: str) -> None:
        self._address = Address.parse(url, f"shard {name}")
        self._name = name
        self._wire: Wire | None = None
        self._connected()

    def claim(
        self, key: bytes, token: bytes, *, ttl_ms: int | None = None, expires_ms: int | None = None
    ) -> Held:
        """SET NX GET and PEXPIRETIME in one transaction of the server."""
        if (ttl_ms is None) == (expires_ms is None):
            raise ValueError("a claim has either a TTL or an absolute expiry")
        life: Command = ("PX", ttl_ms) if ttl_ms is not None else ("PXAT", expires_ms or 0)
        *_, (before, expires) = self._checked(
            [
                ("MULTI",),
                ("SET", key, token, "NX", *life, "GET"),
                ("PEXPIRETIME", key),
                ("EXEC",),
            ]
        )
        held = token if before is None else bytes(before)
        return Held(held, expires if expires >= 0 else None)

    def get(self, key: bytes) -> bytes | None:
        """GET."""
        value = self._checked([("GET", key)])[0]
        return None if value is None else bytes(value)

    def set(self, key: bytes, value: bytes, *, ttl_ms: int | None = None) -> None:
        """SET, with PX."""
        life: Command = () if ttl_ms is None else ("PX", ttl_ms)
        self._checked([("SET", key, value, *life)])

    def increment(self, key: bytes, by: int = 1, *, ttl_ms: int | None = None) -> int:
        """INCRBY; a new counter gets its expiry with it."""
        ttl = "" if ttl_ms is None else str(ttl_ms)
        return int(self._checked([("EVAL", _INCREMENT, 1, key, by, ttl)])[0])

    def delete(self, key: bytes, *, token: bytes | None = None) -> bool:
        """UNLINK; with `token` in a script that compares first."""
        command: Command = ("UNLINK", key) if token is None else ("EVAL", _DELETE_IF, 1, key, token)
        return bool(self._checked([command])[0])

    def ping(self) -> None:
        """PING."""
        self._checked([("PING",)])

    def close(self) -> None:
        """Close the connection."""
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    def _connected(self) -> Wire:
        if self._wire is None or self._wire.is_lost:
            self.close()
            self._wire = Wire(self._address, "cellferry:shards:client")
        return self._wire

    def _checked(self, commands: list[Command]) -> list[Any]:
        try:
            return self._connected().checked(commands)
        except Unreachable:
            self.close()
            raise
