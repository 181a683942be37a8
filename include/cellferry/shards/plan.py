"""What a re-sharding would move, how long it would take, and what speaks against it.

A plan changes nothing. It names each *lane*, a pair of shards between which keys move, and says of
any key whether it moves and whereto; everything that moves keys asks it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from itertools import islice
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cellferry.errors import Blocked, InvalidInput
from cellferry.settings import ConnectionSource
from cellferry.shards.audit import AUDIT_KEYS, AuditResult, judge
from cellferry.shards.placement import Indexes, Ring, ring_positions
from cellferry.shards.settings import ShardSet, check_servers
from cellferry.shards.sides import Facts, Lane, Side, open_side

USUAL_KEYS_S = 50_000
"""Moved keys a second that an unthrottled copy is expected to reach."""
HEADROOM = 0.5
"""Share of its memory that a shard should have free once its keys are there."""
_SIZES = 1000
_SCAN_COUNT = 10_000


@dataclass(frozen=True, slots=True)
class Pair:
    """Keys that change from one shard to another.

    Attributes:
        old: the shard that owns them before the re-sharding.
        new: the shard that owns them after it.
        keys: how many, when the plan was made.
        size: bytes that they took there, estimated from a sample.
    """

    old: str
    new: str
    keys: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True)
class Finding:
    """What speaks against a plan, or should be known.

    Attributes:
        code: a word that stands for it.
        shard: where.
        text: what was found.
        hint: what to do about it.
    """

    code: str
    shard: str
    text: str
    hint: str


@dataclass(frozen=True, slots=True)
class Load:
    """A shard before and after.

    Attributes:
        shard: its name; `connection` is the name of its connection.
        is_new: whether it is in the new set only.
        keys_before, keys_after: of the set; `misplaced` are keys that another shard owns.
        bytes_before, bytes_after: that these take, estimated.
        used_bytes, limit_bytes: what the server says of its memory now; no limit: 0.
        would_evict: keys that the copy would make it throw away.
        engine, version, evicts: see `Facts`.
    """

    shard: str
    connection: str
    is_new: bool
    keys_before: int
    keys_after: int
    bytes_before: int
    bytes_after: int
    misplaced: int
    used_bytes: int
    limit_bytes: int
    would_evict: int
    engine: str
    version: str
    evicts: str


@dataclass(frozen=True)
class Plan:
    """A re-sharding from `old` to `new`, or, turned, the way back of one.

    Attributes:
        old, new: the set before and after.
        pairs: every pair between which keys can move, also those that have none now.
        loads: each shard before and after.
        audit: how the vnodes' labels fit the live keys.
        blockers, warnings: see `Finding`.
        keys: all keys of the set when the plan was made.
        throttle_keys_s: what the estimate reckons with; None: no throttle.
        is_estimated: whether the numbers of keys come from a sample.
        made_at: when, UTC, ISO 8601.
        is_turned: whether it goes from `new` to `old`.
    """

    old: ShardSet
    new: ShardSet
    pairs: tuple[Pair, ...]
    loads: tuple[Load, ...] = ()
    audit: AuditResult | None = None
    blockers: tuple[Finding, ...] = ()
    warnings: tuple[Finding, ...] = ()
    keys: int = 0
    throttle_keys_s: float | None = None
    is_estimated: bool = False
    made_at: str = ""
    is_turned: bool = False

    # --- where keys go -----------------------------------------------------------------------

    @property
    def origin(self) -> ShardSet:
        """The set whose shards the keys come from, in this plan's direction."""
        return self.new if self.is_turned else self.old

    @property
    def target(self) -> ShardSet:
        """The set whose shards the keys go to."""
        return self.old if self.is_turned else self.new

    def turned(self) -> Plan:
        """Return the plan of the other direction."""
        return replace(self, is_turned=not self.is_turned)

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Shards of `origin` that keys come from, in the set's order."""
        names = {pair.new if self.is_turned else pair.old for pair in self.pairs}
        return tuple(one.name for one in self.origin.placement.shards if one.name in names)

    def destinations(self, source: str) -> tuple[str, ...]:
        """Return the shards of `target` that keys of `source` go to."""
        if self.is_turned:
            return tuple(pair.old for pair in self.pairs if pair.new == source)
        return tuple(pair.new for pair in self.pairs if pair.old == source)

    def lane(self, source: str, destination: str) -> Lane:
        """Return the lane from `source` to `destination`."""
        old, new = (destination, source) if self.is_turned else (source, destination)
        return Lane(self.old.name, old, new)

    def keys_from(self, source: str) -> int:
        """Return how many keys `source` has to give, as the plan was made."""
        if self.is_turned:
            return sum(pair.keys for pair in self.pairs if pair.new == source)
        return sum(pair.keys for pair in self.pairs if pair.old == source)

    def moved(self, source: str, keys: Sequence[bytes]) -> dict[str, list[bytes]]:
        """Return those of `keys` that belong to `source` and move, by destination.

        A key that lies in `source` and belongs to another shard is none of them.
        """
        if not keys:
            return {}
        before, after = self._owners(keys)
        here = self._origin_index[source]
        wanted = np.where(before == here, self._moves[here][after], -1)
        found: dict[str, list[bytes]] = {}
        for index in np.unique(wanted):
            if index >= 0:
                name = self.target.placement.shards[int(index)].name
                found[name] = [keys[at] for at in np.flatnonzero(wanted == index).tolist()]
        return found

    def _owners(self, keys: Sequence[bytes]) -> tuple[Indexes, Indexes]:
        origin, target = self.origin, self.target
        one, other = origin.placement, target.placement
        if isinstance(one, Ring) and isinstance(other, Ring):
            skip = len(origin.key_prefix)  # both sets have one prefix: one hash does for both
            positions = ring_positions([key[skip:] for key in keys] if skip else keys)
            return one.owners_at(positions), other.owners_at(positions)
        return origin.owners(keys), target.owners(keys)

    @cached_property
    def _origin_index(self) -> dict[str, int]:
        return {one.name: at for at, one in enumerate(self.origin.placement.shards)}

    @cached_property
    def _moves(self) -> npt.NDArray[np.intp]:
        """For each shard of `origin` and each of `target`: the latter's index, -1 if it is one."""
        return np.array(
            [
                [
                    at if self.target.connections[b.name] != self.origin.connections[a.name] else -1
                    for at, b in enumerate(self.target.placement.shards)
                ]
                for a in self.origin.placement.shards
            ],
            dtype=np.intp,
        )

    @cached_property
    def moved_ranges(self) -> list[tuple[int, int, str, str]]:
        """The arcs of the ring that move: (first, last, from, to), ends included; else empty."""
        return _moved_arcs(self.origin, self.target)

    # --- what it says ------------------------------------------------------------------------

    @property
    def keys_to_move(self) -> int:
        """All keys that move."""
        return sum(pair.keys for pair in self.pairs)

    @property
    def bytes_to_move(self) -> int:
        """The bytes that these take."""
        return sum(pair.size for pair in self.pairs)

    def seconds(self, keys: int) -> float:
        """Return how long `keys` take at the throttle, or as fast as it goes."""
        rate = min(self.throttle_keys_s or USUAL_KEYS_S, USUAL_KEYS_S)
        return keys / rate

    @cached_property
    def hash(self) -> str:
        """Stands for what decides where each key goes, and for the direction."""
        text = json.dumps([self.origin.document(), self.target.document()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def refuse(self) -> None:
        """Raise if anything blocks the plan.

        Raises:
            Blocked: with every blocker.
        """
        if self.blockers:
            raise Blocked(
                "; ".join(f"shard {one.shard}: {one.text}" for one in self.blockers),
                hint="; ".join(dict.fromkeys(one.hint for one in self.blockers)),
                where=f"shard set {self.old.name}",
            )

    def check_ring(self, current: ShardSet) -> None:
        """See that the plan starts from what the set is now.

        Raises:
            InvalidInput: the set has changed since the plan was made.
        """
        if current.document() != self.old.document():
            raise InvalidInput(
                f"the plan of {self.made_at or 'an unknown time'} is older than the ring of the set"
                f" {current.name!r}",
                hint="make the plan anew",
            )

    def document(self) -> dict[str, Any]:
        """Return it as JSON's types, with what the runbook's plan has."""
        return {
            "set": self.old.name,
            "kind": self.old.kind,
            "hash": self.hash,
            "made_at": self.made_at,
            "is_turned": self.is_turned,
            "is_estimated": self.is_estimated,
            "old": self.old.document(),
            "new": self.new.document(),
            "old_topology": {"shards": len(self.old.connections), "total_keys": self.keys},
            "new_topology": {"shards": len(self.new.connections), "total_keys": self.keys},
            "migrations": [
                {
                    "from": pair.old,
                    "to": pair.new,
                    "keys_to_move": pair.keys,
                    "bytes_to_move": pair.size,
                    "estimated_seconds": round(self.seconds(pair.keys), 1),
                    "estimated_duration": duration(self.seconds(pair.keys)),
                }
                for pair in self.pairs
            ],
            "total_keys_to_move": self.keys_to_move,
            "total_bytes_to_move": self.bytes_to_move,
            "percentage_to_move": round(100 * self.keys_to_move / max(self.keys, 1), 2),
            "throttle_keys_s": self.throttle_keys_s,
            "estimated_seconds": round(self.seconds(self.keys_to_move), 1),
            "estimated_duration": duration(self.seconds(self.keys_to_move)),
            "shards": [asdict(load) for load in self.loads],
            "moved_ranges": [list(one) for one in self.moved_ranges],
            "audit": None if self.audit is None else self.audit.document(),
            "blockers": [asdict(one) for one in self.blockers],
            "warnings": [asdict(one) for one in self.warnings],
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read what `document` wrote.

        Raises:
            InvalidInput: something is missing, or it was changed so that it says of other keys
                that they move.
        """
        try:
            audit = document["audit"]
            plan = cls(
                old=ShardSet.from_document(document["old"]),
                new=ShardSet.from_document(document["new"]),
                pairs=tuple(
                    Pair(one["from"], one["to"], one["keys_to_move"], one["bytes_to_move"])
                    for one in document["migrations"]
                ),
                loads=tuple(Load(**one) for one in document["shards"]),
                audit=None if audit is None else AuditResult.from_document(audit),
                blockers=tuple(Finding(**one) for one in document["blockers"]),
                warnings=tuple(Finding(**one) for one in document["warnings"]),
                keys=document["old_topology"]["total_keys"],
                throttle_keys_s=document["throttle_keys_s"],
                is_estimated=document["is_estimated"],
                made_at=document["made_at"],
                is_turned=document["is_turned"],
            )
            named = document["hash"]
        except (KeyError, TypeError) as error:
            raise InvalidInput(
                f"this is not a plan of a re-sharding: {error}", hint="make the plan anew"
            ) from error
        if named != plan.hash:
            raise InvalidInput(
                "the plan's rings are not those that its hash was made of",
                hint="a plan is not edited; make it anew",
            )
        return plan


def lanes(old: ShardSet, new: ShardSet) -> list[tuple[str, str]]:
    """Return every (old owner, new owner) between which a key can move, in the sets' order."""
    if isinstance(old.placement, Ring) and isinstance(new.placement, Ring):
        found = {(a, b) for _, _, a, b in _moved_arcs(old, new)}
    else:
        found = {
            (a, b)
            for a, mine in old.connections.items()
            for b, theirs in new.connections.items()
            if mine != theirs
        }
    return [
        (a.name, b.name)
        for a in old.placement.shards
        for b in new.placement.shards
        if (a.name, b.name) in found
    ]


def _moved_arcs(old: ShardSet, new: ShardSet) -> list[tuple[int, int, str, str]]:
    one, other = old.placement, new.placement
    if not (isinstance(one, Ring) and isinstance(other, Ring)):
        return []
    ends = np.union1d(
        *(
            np.array([last for _, last, _ in ring.ranges()], dtype=np.uint32)
            for ring in (one, other)
        )
    )
    arcs: list[tuple[int, int, str, str]] = []
    first = 0
    owners = zip(ends.tolist(), one.owners_at(ends), other.owners_at(ends), strict=True)
    for last, before, after in owners:
        names = (one.shards[before].name, other.shards[after].name)
        if old.connections[names[0]] != new.connections[names[1]]:
            if arcs and arcs[-1][1] == first - 1 and arcs[-1][2:] == names:
                arcs[-1] = (arcs[-1][0], last, *names)
            else:
                arcs.append((first, last, *names))
        first = last + 1
    return arcs


def duration(seconds: float) -> str:
    """Write a duration as a person reads it: `45s`, `2m05s`, `3h47m`."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


# --- making it --------------------------------------------------------------------------------


@dataclass(slots=True)
class _Counted:
    """What a scan of one old shard found."""

    facts: Facts
    keys: int = 0
    misplaced: int = 0
    to: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """By index of the new owner: keys that this shard owns."""
    some: list[bytes] = field(default_factory=list)
    size: float = 0.0
    """Bytes of a key, on average."""
    is_complete: bool = True


def plan(
    old: ShardSet,
    new: ShardSet,
    source: ConnectionSource,
    *,
    throttle_keys_s: float | None = None,
    sample: int | None = None,
    headroom: float = HEADROOM,
) -> Plan:
    """Look at every shard and say what the change from `old` to `new` would move.

    Changes nothing. Every key's name is looked at, unless `sample` is given.

    Args:
        throttle_keys_s: moved keys a second, of all sources together; for the estimate.
        sample: keys of each shard to look at instead of all; the rest is estimated.
        headroom: share of a shard's memory that must stay free, 0 to 1.

    Raises:
        InvalidInput: the two sets are not one set before and after a change, two connections lead
            to one server, or another vnode label than the set's fits its keys.
        Blocked: no known vnode label fits the live keys.
        Unreachable, AccessDenied: of a shard, which it names.
    """
    _check_sets(old, new, throttle_keys_s, headroom)
    if sample is not None and sample < 1:
        raise InvalidInput(f"a sample of {sample} keys", hint="give a number from 1, or none")
    check_servers((old, new), source)
    pairs = lanes(old, new)
    draft = Plan(old, new, tuple(Pair(a, b) for a, b in pairs))
    fresh = [
        one.name
        for one in new.placement.shards
        if new.connections[one.name] not in old.connections.values()
    ]
    names = [one.name for one in old.placement.shards]
    with ThreadPoolExecutor(len(names) + len(fresh), "plan") as pool:
        looked = {name: pool.submit(_look, new, name, source) for name in fresh}
        counting = {name: pool.submit(_count, draft, name, source, sample) for name in names}
        facts = {new.connections[name]: one.result() for name, one in looked.items()}
        counted = {name: one.result() for name, one in counting.items()}
    facts |= {old.connections[name]: one.facts for name, one in counted.items()}
    audit = judge(old, {name: one.some for name, one in counted.items()})
    audit.refuse()
    made = _filled(draft, counted)
    loads = tuple(_loads(made, counted, facts))
    blockers, warnings = _findings(made, loads, facts, audit, headroom)
    return replace(
        made,
        loads=loads,
        audit=audit,
        blockers=tuple(blockers),
        warnings=tuple(warnings),
        throttle_keys_s=throttle_keys_s,
        is_estimated=not all(one.is_complete for one in counted.values()),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _check_sets(
    old: ShardSet, new: ShardSet, throttle_keys_s: float | None, headroom: float
) -> None:
    for what, one, other in (
        ("name", old.name, new.name),
        ("kind", old.kind, new.kind),
        ("key_prefix", old.key_prefix, new.key_prefix),
    ):
        if one != other:
            raise InvalidInput(
                f"the {what} changes from {one!r} to {other!r}",
                hint="a re-sharding changes shards, weights and placement only",
            )
    if throttle_keys_s is not None and throttle_keys_s <= 0:
        raise InvalidInput(
            f"the throttle is {throttle_keys_s} keys/s", hint="give a positive number, or none"
        )
    if not 0 <= headroom < 1:
        raise InvalidInput(f"the headroom is {headroom}", hint="give a share from 0 to below 1")
    if not lanes(old, new):
        raise InvalidInput(
            f"nothing moves: the set {old.name!r} is the same before and after",
            hint="give the file of the set as it shall become",
        )


def _look(shard_set: ShardSet, name: str, source: ConnectionSource) -> Facts:
    side = open_side(shard_set, name, source)
    try:
        return side.facts()
    finally:
        side.close()


def _count(draft: Plan, name: str, source: ConnectionSource, sample: int | None) -> _Counted:
    side = open_side(draft.old, name, source)
    try:
        found = _Counted(side.facts())
        found.to = np.zeros(len(draft.new.placement.shards), dtype=np.int64)
        here = draft._origin_index[name]  # noqa: SLF001 - the plan in the making
        for page in side.scan(count=min(_SCAN_COUNT, sample or _SCAN_COUNT)):
            before, after = draft._owners(page.keys)  # noqa: SLF001
            owned = after[before == here]
            found.to += np.bincount(owned, minlength=len(found.to))
            found.keys += len(page.keys)
            found.misplaced += len(page.keys) - len(owned)
            found.some += islice(page.keys, AUDIT_KEYS - len(found.some))
            if sample is not None and found.keys >= sample and page.after:
                _scale(found)
                break
        found.size = _mean_size(side, found.some[:_SIZES])
        return found
    finally:
        side.close()


def _scale(found: _Counted) -> None:
    factor = max(found.facts.keys, found.keys) / found.keys
    found.to = np.round(found.to * factor).astype(np.int64)
    found.misplaced = round(found.misplaced * factor)
    found.keys = round(found.keys * factor)
    found.is_complete = False


def _mean_size(side: Side, keys: list[bytes]) -> float:
    sizes = [size for size in side.sizes(keys) if size] if keys else []
    return sum(sizes) / len(sizes) if sizes else 0.0


def _filled(draft: Plan, counted: Mapping[str, _Counted]) -> Plan:
    index = {one.name: at for at, one in enumerate(draft.new.placement.shards)}
    pairs = []
    for pair in draft.pairs:
        found = counted[pair.old]
        keys = int(found.to[index[pair.new]])
        pairs.append(replace(pair, keys=keys, size=round(keys * found.size)))
    return replace(draft, pairs=tuple(pairs), keys=sum(one.keys for one in counted.values()))


def _loads(
    made: Plan, counted: Mapping[str, _Counted], facts: Mapping[str, Facts]
) -> Iterable[Load]:
    connections = {**made.old.connections}
    shards = list(made.old.connections)
    for name, connection in made.new.connections.items():
        if connection not in connections.values():
            shards.append(name)
    for at, name in enumerate(shards):
        is_new = at >= len(made.old.connections)
        connection = (made.new if is_new else made.old).connections[name]
        of = facts[connection]
        before = _Counted(of) if is_new else counted[name]
        leaves = [p for p in made.pairs if made.old.connections[p.old] == connection]
        comes = [p for p in made.pairs if made.new.connections[p.new] == connection]
        incoming = sum(p.size for p in comes)
        over = of.used_bytes + incoming - of.limit_bytes if of.limit_bytes else 0
        mean = incoming / max(sum(p.keys for p in comes), 1) or before.size
        size = round(before.keys * before.size)
        yield Load(
            shard=name,
            connection=connection,
            is_new=is_new,
            keys_before=before.keys,
            keys_after=before.keys + sum(p.keys for p in comes) - sum(p.keys for p in leaves),
            bytes_before=size,
            bytes_after=size + incoming - sum(p.size for p in leaves),
            misplaced=before.misplaced,
            used_bytes=of.used_bytes,
            limit_bytes=of.limit_bytes,
            would_evict=round(over / mean) if over > 0 and of.evicts and mean else 0,
            engine=of.engine,
            version=of.version,
            evicts=of.evicts,
        )


def _findings(
    made: Plan,
    loads: Sequence[Load],
    facts: Mapping[str, Facts],
    audit: AuditResult,
    headroom: float,
) -> tuple[list[Finding], list[Finding]]:
    blockers: list[Finding] = []
    warnings: list[Finding] = []
    seen: dict[str, str] = {}
    for load in loads:
        of = facts[load.connection]
        comes = sum(p.size for p in made.pairs if made.new.connections[p.new] == load.connection)
        if of.identity in seen:
            blockers.append(
                Finding(
                    "same server",
                    load.shard,
                    f"it is the same server and database as shard {seen[of.identity]}",
                    "a shard named twice would lose its keys at clean-up; correct the connections",
                )
            )
        seen.setdefault(of.identity, load.shard)
        blockers += _server_blockers(load, of, comes, headroom)
        warnings += _server_warnings(load, of)
    if audit.note:
        warnings.append(Finding("audit", "all", audit.note, "look at the audit's figures"))
    return blockers, warnings


def _server_blockers(load: Load, of: Facts, comes: int, headroom: float) -> Iterable[Finding]:
    if not of.is_primary:
        yield Finding(
            "replica", load.shard, "it is a replica", "point the connection at the primary"
        )
    if of.is_cluster:
        yield Finding(
            "cluster",
            load.shard,
            "it is a node of a Redis Cluster, which places keys itself",
            "shards are servers by themselves; a cluster is resharded with its own tools",
        )
    if of.engine == "redis" and _number(of.version) < (7, 0):
        yield Finding(
            "version",
            load.shard,
            f"Redis {of.version} does not know PEXPIRETIME: expiries could not be kept exact",
            "upgrade it to 7.0 or newer",
        )
    if of.limit_bytes and of.evicts:
        would = f"; the copy would make it evict about {load.would_evict} keys"
        yield Finding(
            "eviction",
            load.shard,
            f"maxmemory-policy is {of.evicts}: an evicted id is accepted again"
            + (would if load.would_evict else ""),
            "set maxmemory-policy noeviction",
        )
    if of.limit_bytes and comes:
        after = of.used_bytes + comes
        if after > of.limit_bytes:
            yield Finding(
                "memory",
                load.shard,
                f"it has no memory for {comes} bytes more: {of.used_bytes} of {of.limit_bytes}"
                " are used",
                "raise maxmemory, or add more shards",
            )
        elif after > of.limit_bytes * (1 - headroom):
            yield Finding(
                "headroom",
                load.shard,
                f"{after} of {of.limit_bytes} bytes would be used:"
                f" {1 - after / of.limit_bytes:.0%} headroom, {headroom:.0%} is asked for",
                "raise maxmemory, or ask for less headroom knowingly",
            )


def _server_warnings(load: Load, of: Facts) -> Iterable[Finding]:
    if not of.limit_bytes and of.engine != "postgres":
        yield Finding(
            "no limit",
            load.shard,
            "maxmemory is not set: its headroom cannot be judged",
            "set maxmemory below the memory of its machine",
        )
    if of.evicts and not of.limit_bytes:
        yield Finding(
            "eviction",
            load.shard,
            f"maxmemory-policy is {of.evicts}: with a limit it would evict ids",
            "set maxmemory-policy noeviction",
        )
    if of.evicted:
        yield Finding(
            "evicted",
            load.shard,
            f"it has evicted {of.evicted} keys since it started: these ids are accepted again",
            "set maxmemory-policy noeviction and give it more memory",
        )
    if load.misplaced:
        yield Finding(
            "misplaced",
            load.shard,
            f"{load.misplaced} keys lie there that belong to another shard; they are not moved",
            "left by an earlier change; clean them up",
        )


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
