"""What a cell holds of an organization, and what keeps a cell from being part of a move."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cellferry.errors import AccessDenied, CellferryError, Unreachable
from cellferry.model import Blocker, GateState, Part, Side
from cellferry.stores.redis import acl_users
from cellferry.stores.redis.comparison import scan, server_time_ms
from cellferry.stores.redis.gate import Gate
from cellferry.stores.redis.key_prefix import KeyPrefix
from cellferry.stores.redis.tracking import Feed
from cellferry.stores.redis.wire import Wire

SIZED_KEYS = 20_000
"""Every key is sized up to here, then one in `SIZED_EVERY`."""
SIZED_EVERY = 20
_CLOCK_SKEW_MS = 500
_SPARE_MEMORY = 1.2
_PROBES = (("SET", "x"), ("DEL",), ("LPUSH", "x"), ("HSET", "f", "x"), ("XADD", "*", "f", "x"))
_NEEDED = (
    ("ACL", "SETUSER", "x"),
    ("ACL", "GETUSER", "x"),
    ("ACL", "DELUSER", "x"),
    ("ACL", "USERS"),
    ("ACL", "SAVE"),
    ("CLIENT", "KILL", "USER", "x"),
    ("CLIENT", "TRACKING", "ON"),
    ("COMMAND",),
    ("SCAN", "0"),
    ("MULTI",),
    ("EXEC",),
    ("WATCH", "cellferry:gate:{x}"),
    ("SET", "cellferry:gate:{x}", "x"),
    ("UNLINK", "cellferry:gate:{x}"),
)


def server_facts(admin: Wire) -> dict[str, str]:
    """The reply of INFO: server, memory, replication, persistence, cluster."""
    facts: dict[str, str] = {}
    for section in ("server", "memory", "replication", "persistence", "cluster"):
        for line in admin.call("INFO", section).decode().splitlines():
            if ":" in line:
                name, value = line.split(":", 1)
                facts[name] = value
    return facts


def setting(admin: Wire, name: str) -> str | None:
    """A setting of the server; None where CONFIG GET is not allowed."""
    try:
        reply = admin.call("CONFIG", "GET", name)
    except CellferryError:
        return None
    return reply[1].decode() if reply else None


@dataclass(frozen=True, slots=True)
class Engine:
    """Kind and version of a server."""

    family: str
    version: tuple[int, ...]

    @classmethod
    def of(cls, facts: Mapping[str, str]) -> Engine:
        """Read it from INFO."""
        family = "valkey" if "valkey_version" in facts else "redis"
        text = facts.get(f"{family}_version", "0")
        return cls(family, tuple(int(part) for part in text.split(".") if part.isdigit()))

    def __str__(self) -> str:
        return f"{self.family} {'.'.join(map(str, self.version))}"

    def can_read(self, other: Engine) -> bool:
        """Whether this server understands a DUMP of `other`."""
        if self.family == other.family:
            return self.version[:2] >= other.version[:2]
        if self.family == "valkey":  # it left Redis at 7.2
            return other.version[:2] <= (7, 2)
        return other.version[0] < 9 and self.version[:2] >= (7, 2)


def can_go_back(source: Wire, destination: Wire) -> bool:
    """Whether the source understands what the destination writes."""
    older, newer = Engine.of(server_facts(source)), Engine.of(server_facts(destination))
    return older.can_read(newer)


def cell_blockers(admin: Wire) -> Iterator[Blocker]:
    """What keeps one server from being part of any move. Read-only."""
    where = admin.address.where
    facts = server_facts(admin)
    redis_version = tuple(int(part) for part in facts["redis_version"].split(".")[:2])
    if redis_version < (7, 0):
        yield Blocker(
            "engine-too-old",
            where,
            f"{Engine.of(facts)} has no read-only key patterns in its ACLs",
            "upgrade the server to Redis 7.0 or Valkey 7.2, or newer",
        )
    if facts.get("cluster_enabled") == "1":
        yield Blocker(
            "cluster-unsupported",
            where,
            "the server is in cluster mode, which this store does not support",
            "use servers without cluster mode for these keys",
        )
    if facts.get("role") != "master":
        yield Blocker(
            "not-a-primary",
            where,
            "the server is a replica",
            "let the connection point to the primary",
        )
    if facts.get("connected_slaves", "0") != "0":
        yield Blocker(
            "standby-could-be-promoted",
            where,
            "replicas do not take over ACL changes: one that is promoted would undo a gate",
            "detach the replicas for the move, or switch automatic failover off and say so with "
            "the option failover: manual",
        )
    if setting(admin, "aclfile") == "":
        yield Blocker(
            "acl-not-saved",
            where,
            "the server keeps its ACL users in memory only: a gate would not survive a restart",
            "set aclfile in the server's configuration and restart it",
        )
    yield from _missing_privileges(admin)
    if facts.get("aof_enabled") != "1":
        yield Blocker(
            "not-durable",
            where,
            "the append-only file is off: a restart loses what was written since the last save",
            "set appendonly yes, or accept it: the copy is as durable as the server is",
            fatal=False,
        )
    elif setting(admin, "appendfsync") not in ("always", None):
        yield Blocker(
            "last-second-not-durable",
            where,
            "appendfsync is not always: a killed server may lose its last second of writes",
            "accept it, or set appendfsync always",
            fatal=False,
        )


def _missing_privileges(admin: Wire) -> Iterator[Blocker]:
    user = admin.call("ACL", "WHOAMI")
    missing = []
    for command in _NEEDED:
        verdict = admin.call("ACL", "DRYRUN", user, *command)
        if verdict != b"OK":
            missing.append(" ".join(command[:2]).removesuffix(" x"))
    if missing:
        yield Blocker(
            "missing-privilege",
            admin.address.where,
            f"the admin connection's user {user.decode()!r} may not run {', '.join(missing)}",
            "give it these commands and the keys cellferry:*",
        )


def application_blockers(gate: Gate, trusted: frozenset[str]) -> Iterator[Blocker]:
    """Whether the gate could stop every writer of the organization on this side. Read-only."""
    admin, user = gate.admin, gate.user
    key = gate.prefix.text + "cellferry-probe"
    users = [name.decode() for name in admin.call("ACL", "USERS")]
    if user not in users:
        yield Blocker(
            "application-user-missing",
            gate.where,
            f"there is no ACL user {user!r}: the gate cannot stop its writers",
            "provision the application's user in this cell",
        )
    others = [
        name
        for name in users
        if name != user and name not in trusted and acl_users.attempt_of(name) is None
    ]
    marker = gate.read()
    checked = others + ([user] if user in users else [])
    commands = [
        ("ACL", "DRYRUN", name, probe[0], key, *probe[1:]) for name in checked for probe in _PROBES
    ]
    verdicts = admin.checked(commands) if commands else []
    able = {
        name: b"OK" in verdicts[index * len(_PROBES) : (index + 1) * len(_PROBES)]
        for index, name in enumerate(checked)
    }
    enabled = _enabled(admin, [name for name in others if able[name]])
    if enabled:
        yield Blocker(
            "shared-credentials",
            gate.where,
            f"the gate closes {user!r} only, and {', '.join(enabled[:5])} may also write "
            "this organization's keys",
            "limit these users to other keys, or name them in the option trusted_users if they "
            "never write for the application",
        )
    if user in able and not able[user] and (marker is None or marker.state is GateState.OPEN):
        yield Blocker(
            "application-user-cannot-write",
            gate.where,
            f"user {user!r} may not write the keys {gate.prefix.pattern}",
            "correct its ACL rules",
            fatal=gate.side is Side.DESTINATION,
        )


def _enabled(admin: Wire, names: list[str]) -> list[str]:
    if not names:
        return []
    replies = admin.checked([("ACL", "GETUSER", name) for name in names])
    return [
        name
        for name, reply in zip(names, replies, strict=True)
        if reply is not None and b"on" in dict(zip(reply[::2], reply[1::2], strict=True))[b"flags"]
    ]


def pair_blockers(source: Gate, destination: Gate, size: int) -> Iterator[Blocker]:
    """What the two servers' difference blocks; `size` is the organization's bytes. Read-only."""
    where = destination.where
    here, there = server_facts(source.admin), server_facts(destination.admin)
    old, new = Engine.of(here), Engine.of(there)
    if not new.can_read(old):
        yield Blocker(
            "engine-older",
            where,
            f"{new} does not understand what {old} writes",
            f"upgrade the destination to {old} or newer",
        )
    elif not old.can_read(new):
        yield Blocker(
            "no-way-back",
            source.where,
            f"{old} does not understand what {new} writes: after the cutover the source cannot "
            "follow, and the organization cannot move back",
            "upgrade the source first, or accept it",
            fatal=False,
        )
    yield from _memory_blockers(there, size, where)
    skew = server_time_ms(destination.admin) - server_time_ms(source.admin)
    if abs(skew) > _CLOCK_SKEW_MS:
        yield Blocker(
            "clock-skew",
            where,
            f"the two servers' clocks differ by {skew} ms: keys expire by them",
            "synchronize the clocks",
            fatal=False,
        )
    missing = _functions(source.admin) - _functions(destination.admin)
    if missing:
        yield Blocker(
            "functions-missing",
            where,
            f"function libraries are missing here: {', '.join(sorted(missing)[:5])}",
            "load them with FUNCTION LOAD; they belong to the server and are not moved",
            fatal=False,
        )
    marker = destination.read()
    if marker is None and any(True for _ in scan(destination.admin, destination.prefix)):
        yield Blocker(
            "destination-not-empty",
            where,
            f"there are keys {destination.prefix.pattern} and no gate explains them",
            "find out who writes them; delete them if they are left over",
        )


def _memory_blockers(facts: Mapping[str, str], size: int, where: str) -> Iterator[Blocker]:
    limit = int(facts.get("maxmemory", "0"))
    if limit:
        free = limit - int(facts.get("used_memory", "0"))
        if free < size * _SPARE_MEMORY:
            yield Blocker(
                "destination-full",
                where,
                f"the organization needs about {size} bytes and {max(free, 0)} are free",
                "raise maxmemory or choose another cell",
            )
        policy = facts.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            yield Blocker(
                "destination-evicts",
                where,
                f"maxmemory-policy is {policy}: keys may be evicted while and after they move",
                "set it to noeviction for the move, or accept it",
                fatal=False,
            )


def _functions(admin: Wire) -> set[str]:
    try:
        libraries = admin.call("FUNCTION", "LIST")
    except CellferryError:
        return set()
    return {
        dict(zip(library[::2], library[1::2], strict=True))[b"library_name"].decode()
        for library in libraries
    }


def measure(admin: Wire, prefix: KeyPrefix) -> tuple[Part, ...]:
    """Count the organization's keys by type and size them. Read-only."""
    counts: Counter[str] = Counter()
    sized: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    seen: set[bytes] = set()
    for page in scan(admin, prefix):
        keys = [key for key in dict.fromkeys(page) if key not in seen]
        seen.update(keys)
        kinds = admin.checked([("TYPE", key) for key in keys])
        step = 1 if len(seen) <= SIZED_KEYS else SIZED_EVERY
        weighed = dict(
            zip(
                keys[::step],
                admin.checked([("MEMORY", "USAGE", key) for key in keys[::step]]),
                strict=True,
            )
        )
        for key, kind in zip(keys, kinds, strict=True):
            name = _text(kind)
            if name == "none":
                continue
            counts[name] += 1
            if weighed.get(key):
                sized[name] += 1
                sizes[name] += weighed[key]
    return tuple(
        Part(name, count, sizes[name] * count // max(sized[name], 1))
        for name, count in sorted(counts.items())
    )


def measure_write_rate(admin: Wire, prefix: KeyPrefix, seconds: float = 0.5) -> float:
    """Keys of the organization that change in a second, counted once each."""
    with Feed(admin.address, "cellferry:plan:rate", prefix) as feed:
        time.sleep(seconds)
        feed.barrier(2.0)
        return len(feed) / seconds


def failure_blocker(error: CellferryError, where: str) -> Blocker:
    """A blocker for a server that could not be asked."""
    code = {Unreachable: "unreachable", AccessDenied: "access-denied"}.get(
        type(error), "cannot-check"
    )
    return Blocker(code, where, error.message, error.hint or "check the connection")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
