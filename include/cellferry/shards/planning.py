"""Making a plan: every shard is looked at, and what speaks against the change is found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice

import numpy as np
import numpy.typing as npt

from cellferry.errors import InvalidInput
from cellferry.settings import ConnectionSource
from cellferry.shards.audit import AUDIT_KEYS, AuditResult, judge
from cellferry.shards.plan import Finding, Load, Pair, Plan, lanes
from cellferry.shards.settings import ShardSet, check_servers
from cellferry.shards.sides import Facts, Side, open_side

HEADROOM = 0.5
"""Share of its memory that a shard should have free once its keys are there."""
_SIZES = 1000
_SCAN_COUNT = 10_000


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
        here = draft.origin_index[name]
        for page in side.scan(count=min(_SCAN_COUNT, sample or _SCAN_COUNT)):
            before, after = draft.owners(page.keys)
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
