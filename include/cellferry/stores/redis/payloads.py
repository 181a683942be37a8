"""What DUMP returns, and when two of them hold the same.

A payload is: one byte for the type, the value, two bytes for the format's version, eight bytes
for a checksum. Exact copies have equal payloads, except that sets and hashes kept in a hash table
come in any order, and that engines of different versions encode differently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from cellferry.stores.redis.wire import Wire

FOOTER = 10
NO_EXPIRY = -1
_ABSENT = -2

_SET, _ZSET, _HASH, _ZSET_2, _STREAMS = 2, 3, 4, 5, frozenset({15, 19, 21})
_VALKEY_HASH_WITH_EXPIRY = 22
_KINDS = {
    0: "string",
    1: "list",
    10: "list",
    14: "list",
    18: "list",
    _SET: "set",
    11: "set",
    20: "set",
    _ZSET: "zset",
    _ZSET_2: "zset",
    12: "zset",
    17: "zset",
    _HASH: "hash",
    9: "hash",
    13: "hash",
    16: "hash",
    15: "stream",
    19: "stream",
    21: "stream",
    22: "hash",
    23: "hash",
    24: "hash",
    25: "hash",
}


# What is sent for every key is written by these templates: to build tuples and pack each takes the
# mover twice as long, and is most of what a copy costs it.
_QUESTION = b"*2\r\n$4\r\nDUMP\r\n$%d\r\n%b\r\n*2\r\n$11\r\nPEXPIRETIME\r\n$%d\r\n%b\r\n"
_SIZE = b"*3\r\n$6\r\nMEMORY\r\n$5\r\nUSAGE\r\n$%d\r\n%b\r\n"
_UNLINK = b"*2\r\n$6\r\nUNLINK\r\n$%d\r\n%b\r\n"
_RESTORE = b"*6\r\n$7\r\nRESTORE\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n"
_RESTORE_HOW = b"\r\n$7\r\nREPLACE\r\n$6\r\nABSTTL\r\n"


class Snapshot(NamedTuple):
    """A key at one moment: its payload and its absolute expiry in milliseconds, -1 for none."""

    payload: bytes
    expires: int

    @property
    def kind(self) -> str:
        """`string`, `list`, `set`, `zset`, `hash`, `stream` or `other`."""
        return _KINDS.get(self.payload[0], "other")

    @property
    def is_stream(self) -> bool:
        """Whether it may be a stream; unknown encodings of newer engines count as one."""
        return self.payload[0] in _STREAMS or self.payload[0] not in _KINDS

    def digest(self) -> bytes:
        """16 bytes that stand for payload and expiry."""
        return hashlib.blake2b(self.payload, digest_size=16, key=b"%d" % self.expires).digest()


def ask(wire: Wire, keys: Sequence[bytes]) -> None:
    """Send for the snapshots of `keys`, two commands each; they are read with `answers`."""
    wire.send_packed(b"".join([_QUESTION % (len(key), key, len(key), key) for key in keys]))


def answers(wire: Wire, count: int) -> list[Snapshot | None]:
    """Read what `ask` sent for about `count` keys; None is an absent key."""
    replies = wire.answers(2 * count)
    return [
        None if payload is None or expires == _ABSENT else Snapshot(payload, expires)
        for payload, expires in zip(replies[::2], replies[1::2], strict=True)
    ]


def sizes(wire: Wire, keys: Sequence[bytes]) -> list[int]:
    """Return how many bytes each of `keys` takes in the server; 0 for an absent one."""
    wire.send_packed(b"".join([_SIZE % (len(key), key) for key in keys]))
    return [size or 0 for size in wire.answers(len(keys))]


def send(wire: Wire, keys: Sequence[bytes], snapshots: Sequence[Snapshot | None]) -> int:
    """Send one command for each key that makes it as its snapshot says; None removes it.

    Returns:
        The bytes of their payloads.
    """
    parts: list[bytes] = []
    size = 0
    for key, snapshot in zip(keys, snapshots, strict=True):
        if snapshot is None:
            parts.append(_UNLINK % (len(key), key))
        else:
            payload, expires = snapshot
            until = b"%d" % max(expires, 0)
            size += len(payload)
            parts.append(_RESTORE % (len(key), key, len(until), until, len(payload)))
            parts.append(payload)
            parts.append(_RESTORE_HOW)
    wire.send_packed(b"".join(parts))
    return size


def same_value(one: bytes, other: bytes) -> bool:
    """Whether two payloads certainly hold the same value; False may be a matter of encoding."""
    if one == other:
        return True
    if one[-FOOTER:-8] != other[-FOOTER:-8] and one[:-FOOTER] == other[:-FOOTER]:
        return True
    if one[0] != other[0] or one[0] not in (_SET, _HASH, _VALKEY_HASH_WITH_EXPIRY):
        return False
    if len(one) != len(other):
        return False
    try:
        return _members(one) == _members(other)
    except (IndexError, ValueError):
        return False


def settled_value(payload: bytes) -> bytes:
    """Return the value in `payload` without what says nothing of it: order, version, checksum."""
    if payload[0] in (_SET, _HASH, _VALKEY_HASH_WITH_EXPIRY):
        try:
            return payload[:1] + b"".join(part for one in _members(payload) for part in one)
        except (IndexError, ValueError):
            pass  # an encoding of a newer engine: as it stands
    return payload[:-FOOTER]


def _members(payload: bytes) -> list[tuple[bytes, ...]]:
    """Members of a set or fields of a hash as they are encoded, sorted."""
    kind = payload[0]
    count, position = _length(payload, 1)
    strings = 1 if kind == _SET else 2
    members = []
    for _ in range(count):
        parts = []
        for _ in range(strings):
            end = _end_of_string(payload, position)
            parts.append(payload[position:end])
            position = end
        if kind == _VALKEY_HASH_WITH_EXPIRY:
            parts.append(payload[position : position + 8])
            position += 8
        members.append(tuple(parts))
    if position != len(payload) - FOOTER:
        raise ValueError("not the layout that was expected")
    members.sort()
    return members


def _length(data: bytes, position: int) -> tuple[int, int]:
    first = data[position]
    match first >> 6:
        case 0:
            return first & 0x3F, position + 1
        case 1:
            return ((first & 0x3F) << 8) | data[position + 1], position + 2
        case 2 if first == 0x80:
            return int.from_bytes(data[position + 1 : position + 5], "big"), position + 5
        case 2 if first == 0x81:
            return int.from_bytes(data[position + 1 : position + 9], "big"), position + 9
    raise ValueError("not a length")


def _end_of_string(data: bytes, position: int) -> int:
    first = data[position]
    if first >> 6 != 3:
        size, start = _length(data, position)
        return start + size
    match first & 0x3F:
        case 0:
            return position + 2
        case 1:
            return position + 3
        case 2:
            return position + 5
        case 3:  # compressed: its length, the original's length, the bytes
            size, start = _length(data, position + 1)
            _, start = _length(data, start)
            return start + size
    raise ValueError("not a string")


def logical_value(wire: Wire, key: bytes, *, groups: bool = True) -> Any:
    """Read `key` by the commands of its type: a value that compares equal across encodings.

    Args:
        groups: include a stream's consumer groups.

    Returns:
        (type, value), or None for an absent key. An unknown type compares by its payload.
    """
    kind = wire.call("TYPE", key)
    name = (kind if isinstance(kind, bytes) else str(kind).encode()).decode()
    match name:
        case "none":
            return None
        case "string":
            return name, wire.call("GET", key)
        case "list":
            return name, wire.call("LRANGE", key, 0, -1)
        case "set":
            return name, frozenset(wire.call("SMEMBERS", key))
        case "hash":
            return name, _hash_value(wire, key)
        case "zset":
            scores = wire.call("ZRANGE", key, 0, -1, "WITHSCORES")
            return name, dict(zip(scores[::2], map(float, scores[1::2]), strict=True))
        case "stream":
            return name, _stream_value(wire, key, groups=groups)
    payload = wire.call("DUMP", key)
    return name, payload[:-FOOTER] if payload else payload


def _hash_value(wire: Wire, key: bytes) -> Any:
    pairs = wire.call("HGETALL", key)
    fields = dict(zip(pairs[::2], pairs[1::2], strict=True))
    expiries: Any = None
    if fields and has_command(wire, "HPEXPIRETIME"):
        names = sorted(fields)
        expiries = wire.call("HPEXPIRETIME", key, "FIELDS", len(names), *names)
    return fields, expiries if expiries and any(moment > 0 for moment in expiries) else None


_VOLATILE = frozenset(
    {b"radix-tree-keys", b"radix-tree-nodes", b"seen-time", b"active-time", b"pel-count"}
)


def _stream_value(wire: Wire, key: bytes, *, groups: bool) -> Any:
    entries = wire.call("XRANGE", key, "-", "+")
    about = _stable(wire.call("XINFO", "STREAM", key, "FULL", "COUNT", 0))
    about.pop(b"entries", None)
    if not groups:
        about.pop(b"groups", None)
    return entries, about


def _stable(reply: list[Any]) -> dict[bytes, Any]:
    """A reply of names and values as a dictionary, without what a copy need not keep."""
    result: dict[bytes, Any] = {}
    for name, value in zip(reply[::2], reply[1::2], strict=True):
        if name in _VOLATILE:
            continue
        if isinstance(value, list) and name in (b"groups", b"consumers"):
            items = [_stable(item) for item in value]
            result[name] = sorted(items, key=lambda item: item[b"name"])
        else:
            result[name] = value
    return result


def has_command(wire: Wire, name: str) -> bool:
    """Whether the server of this connection knows the command `name`; asked once."""
    known: dict[str, bool] = wire.known_commands
    if name not in known:
        # without arguments: the server looks for the command before it counts them
        wire.send([(name,)])
        known[name] = "unknown command" not in str(wire.receive(1)[0])
    return known[name]
