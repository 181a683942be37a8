"""A Redis (7.0 or newer) or Valkey server, for bulk work.

Strings, which is what dedup stores hold, are read with MGET and PEXPIRETIME in one transaction of
the server, so that a value and its expiry belong together, and written with SET and PXAT, which any
version understands. Other types go by DUMP and RESTORE.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cellferry.errors import LeaseLost, PermanentError
from cellferry.shards.settings import OWN_KEYS
from cellferry.shards.sides import NO_EXPIRY, Facts, Lane, Page, Record, Side
from cellferry.stores.redis import payloads
from cellferry.stores.redis.comparison import server_time_ms
from cellferry.stores.redis.tracking import Feed
from cellferry.stores.redis.wire import Address, Command, Wire

_FENCE_LIFE_MS = 30 * 24 * 3600 * 1000
#: Stores a fence's number unless a higher one is there; returns the one that is there then.
_FENCE = """
local there = tonumber(redis.call('GET', KEYS[1]) or '-1')
if there > tonumber(ARGV[1]) then return there end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return tonumber(ARGV[1])
"""
_ABSENT = -2


class _Keys:
    """Which pushed keys a feed keeps: those of the set, without ours."""

    def __init__(self, prefix: bytes) -> None:
        self.encoded = prefix

    def marker(self, what: str) -> str:
        """A key that nobody writes: re-sharding has no gate to hear of."""
        return OWN_KEYS.decode() + what

    def owns(self, key: bytes) -> bool:
        """Whether the key is the set's."""
        return key.startswith(self.encoded) and not key.startswith(OWN_KEYS)


class RedisSide:
    """See `Side`. One connection for each of scanning, reading and writing.

    Args:
        url: of the connection.
        name: of the shard.
        prefix: what the set's keys begin with.
    """

    def __init__(self, url: str, name: str, prefix: bytes) -> None:
        self.name = name
        self._address = Address.parse(url, f"shard {name}")
        self._keys = _Keys(prefix)
        self._wires: dict[str, Wire] = {}
        self._asked: deque[list[bytes]] = deque()
        self._put: deque[int] = deque()

    # --- facts -------------------------------------------------------------------------------

    def facts(self) -> Facts:
        """INFO and DBSIZE."""
        info = self._info()
        limit = int(info.get("maxmemory", "0"))
        policy = info.get("maxmemory_policy", "noeviction")
        valkey = info.get("valkey_version")
        return Facts(
            engine="valkey" if valkey else "redis",
            version=valkey or info.get("redis_version", "0"),
            identity=f"{info['run_id']}/{self._address.database}",
            used_bytes=int(info.get("used_memory", "0")),
            limit_bytes=limit,
            evicts="" if policy == "noeviction" else policy,
            evicted=int(info.get("evicted_keys", "0")),
            is_primary=info.get("role", "master") in {"master", "primary"},
            is_cluster=info.get("cluster_enabled", "0") == "1",
            keys=int(self._wire("reader").call("DBSIZE")),
        )

    def identity(self) -> str:
        """The server process's `run_id`: its cursors mean nothing to another process."""
        return f"{self._info()['run_id']}/{self._address.database}"

    def now(self) -> int:
        """TIME, in milliseconds."""
        return server_time_ms(self._wire("reader"))

    # --- reading -----------------------------------------------------------------------------

    def scan(self, after: str = "", *, count: int = 2000) -> Iterator[Page]:
        """SCAN; the next page is under way while one is worked on."""
        wire = self._wire("scanner")
        match = ("MATCH", _glob(self._keys.encoded) + b"*") if self._keys.encoded else ()
        cursor = after or "0"
        wire.send([("SCAN", cursor, *match, "COUNT", count)])
        # MATCH has left only keys with the prefix; ours are among them if it is one of ours too.
        mixed = OWN_KEYS.startswith(self._keys.encoded) or self._keys.encoded.startswith(OWN_KEYS)
        owns = self._keys.owns
        while True:
            found_cursor, found = wire.check(wire.receive(1)[0])
            cursor = found_cursor.decode()
            is_last = cursor == "0"
            if not is_last:
                wire.send([("SCAN", cursor, *match, "COUNT", count)])
            try:
                keys = [key for key in found if owns(key)] if mixed else found
                yield Page(keys, "" if is_last else cursor)
            except GeneratorExit:  # a page is under way that nobody will read
                self._wires.pop("scanner", wire).close()
                raise
            if is_last:
                return

    def ask(self, keys: Sequence[bytes]) -> None:
        """MGET and PEXPIRETIME in one transaction."""
        wire = self._wire("reader")
        asked = list(keys)
        if asked:
            wire.send(
                [("MULTI",), ("MGET", *asked), *[("PEXPIRETIME", k) for k in asked], ("EXEC",)]
            )
        self._asked.append(asked)

    def answers(self) -> list[Record | None]:
        """What is no string is read again with DUMP."""
        wire = self._wire("reader")
        keys = self._asked.popleft()
        if not keys:
            return []
        *queued, done = wire.receive(len(keys) + 3)
        for reply in queued[:3]:
            wire.check(reply)
        values, *expiries = wire.check(done)
        found: list[Record | None] = [
            None if value is None else Record(value, expires)
            for value, expires in zip(values, expiries, strict=True)
        ]
        others = [
            index
            for index, (value, expires) in enumerate(zip(values, expiries, strict=True))
            if value is None and expires != _ABSENT
        ]
        if others:
            self._dumps(keys, others, found)
        return found

    def exist(self, keys: Sequence[bytes]) -> list[bool]:
        """EXISTS."""
        return [bool(n) for n in self._wire("reader").checked([("EXISTS", k) for k in keys])]

    def sizes(self, keys: Sequence[bytes]) -> list[int]:
        """MEMORY USAGE."""
        return payloads.sizes(self._wire("reader"), keys)

    def same(self, one: Record | None, other: Record | None) -> bool:
        """Equal bytes, or dumps that hold the same in another order."""
        if one is None or other is None:
            return one is other
        if one.expires != other.expires or one.is_dump != other.is_dump:
            return False
        if one.value == other.value:
            return True
        return one.is_dump and payloads.same_value(one.value, other.value)

    def same_at(self, key: bytes, other: Side) -> bool:
        """Compare by the commands of the key's type: encodings of versions differ."""
        if not isinstance(other, RedisSide):
            return False
        mine, theirs = self._wire("slow"), other._wire("slow")  # noqa: SLF001 - one class
        question: Command = ("PEXPIRETIME", key)
        return bool(
            mine.call(*question) == theirs.call(*question)
            and payloads.logical_value(mine, key) == payloads.logical_value(theirs, key)
        )

    # --- writing -----------------------------------------------------------------------------

    def take_over(self, lane: Lane, fence: int, *, writes: bool) -> None:
        """Store the number, then end the other writers by their connections' names."""
        purpose = f"writer:{lane.digest}:"
        name = f"cellferry:shards:{purpose}{fence}:{lane}"
        wire = Wire(self._address, name if writes else f"cellferry:shards:fence:{lane}")
        try:
            self._raise_fence(wire, lane, fence)
            self._end_others(wire, f"cellferry:shards:{purpose}")
        except BaseException:
            wire.close()
            raise
        if writes:
            self._replace("writer", wire)
        else:
            wire.close()

    def put(self, keys: Sequence[bytes], records: Sequence[Record | None]) -> None:
        """SET with PXAT, RESTORE REPLACE ABSTTL, UNLINK."""
        commands = [_written(key, one) for key, one in zip(keys, records, strict=True)]
        self._writer().send(commands)
        self._put.append(len(commands))

    def settle(self, leave: int = 0) -> None:
        """Read the replies."""
        wire = self._writer()
        while len(self._put) > leave:
            for reply in wire.receive(self._put.popleft()):
                if reply != b"OK" and not isinstance(reply, int):
                    wire.check(reply)

    def remove(self, keys: Sequence[bytes]) -> int:
        """UNLINK."""
        self.settle()
        return int(self._writer().call("UNLINK", *keys)) if keys else 0

    def purge(self, limit: int) -> int:  # noqa: ARG002 - the interface's
        """Do nothing: the server itself removes what has expired."""
        return 0

    def tidy(self) -> None:
        """Do nothing: a feed ends with its connection, and fences expire."""

    def feed(self, purpose: str) -> Feed:
        """CLIENT TRACKING in broadcast mode, for the set's prefix."""
        return Feed(self._address, f"cellferry:shards:{purpose}", self._keys)

    def close(self) -> None:
        """Close all connections."""
        while self._wires:
            self._wires.popitem()[1].close()
        self._asked.clear()
        self._put.clear()

    # --- inside ------------------------------------------------------------------------------

    def _wire(self, purpose: str) -> Wire:
        if purpose not in self._wires:
            self._wires[purpose] = Wire(self._address, f"cellferry:shards:{purpose}")
        return self._wires[purpose]

    def _writer(self) -> Wire:
        if "writer" not in self._wires:
            raise RuntimeError(f"shard {self.name} was not taken over: nothing may write there")
        return self._wires["writer"]

    def _replace(self, purpose: str, wire: Wire) -> None:
        if purpose in self._wires:
            self._wires[purpose].close()
        self._wires[purpose] = wire
        self._put.clear()

    def _info(self) -> Mapping[str, str]:
        text = self._wire("reader").call("INFO")
        lines = (line.partition(":") for line in text.decode().splitlines())
        return {name: value for name, colon, value in lines if colon}

    def _dumps(self, keys: list[bytes], others: list[int], found: list[Record | None]) -> None:
        wire = self._wire("slow")
        asked = [keys[index] for index in others]
        payloads.ask(wire, asked)
        for index, dump in zip(others, payloads.answers(wire, len(asked)), strict=True):
            found[index] = None if dump is None else Record(dump.payload, dump.expires, True)

    def _raise_fence(self, wire: Wire, lane: Lane, fence: int) -> None:
        key = OWN_KEYS + b"fence:" + lane.digest.encode()
        there = int(wire.call("EVAL", _FENCE, 1, key, fence, _FENCE_LIFE_MS))
        if there > fence:
            raise LeaseLost(
                f"a newer step ({there}) moves the keys of {lane}; this one is {fence}",
                hint="nothing to do: the newer one goes on",
                where=self._address.where,
            )

    @staticmethod
    def _end_others(wire: Wire, name: str) -> None:
        own = int(wire.call("CLIENT", "ID"))
        for line in bytes(wire.call("CLIENT", "LIST")).decode(errors="replace").splitlines():
            client: dict[str, Any] = dict(part.partition("=")[::2] for part in line.split(" "))
            if client.get("name", "").startswith(name) and int(client["id"]) != own:
                wire.send([("CLIENT", "KILL", "ID", client["id"])])
                wire.receive(1)  # 0 or an error: it has gone by itself


def _written(key: bytes, record: Record | None) -> Command:
    if record is None:
        return ("UNLINK", key)
    if record.is_dump:
        return ("RESTORE", key, max(record.expires, 0), record.value, "REPLACE", "ABSTTL")
    if record.expires == NO_EXPIRY:
        return ("SET", key, record.value)
    if record.expires < 1:
        raise PermanentError(f"an expiry of {record.expires} cannot be written")
    return ("SET", key, record.value, "PXAT", record.expires)


def _glob(prefix: bytes) -> bytes:
    """Write `prefix` so that MATCH takes it literally."""
    return b"".join(
        b"\\" + one if one in b"*?[]\\^-" else one for one in (bytes([code]) for code in prefix)
    )
