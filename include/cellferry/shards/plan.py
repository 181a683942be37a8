"""What a re-sharding would move, how long it would take, and what speaks against it.

A plan changes nothing. It names each *lane*, a pair of shards between which keys move, and says of
any key whether it moves and whereto; everything that moves keys asks it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cellferry.errors import Blocked, InvalidInput
from cellferry.shards.audit import AuditResult
from cellferry.shards.placement import Indexes, Ring, ring_positions
from cellferry.shards.settings import ShardSet
from cellferry.shards.sides import Lane

USUAL_KEYS_S = 50_000
"""Moved keys a second that an unthrottled copy is expected to reach."""


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
        before, after = self.owners(keys)
        here = self.origin_index[source]
        wanted = np.where(before == here, self._moves[here][after], -1)
        found: dict[str, list[bytes]] = {}
        for index in np.unique(wanted):
            if index >= 0:
                name = self.target.placement.shards[int(index)].name
                found[name] = [keys[at] for at in np.flatnonzero(wanted == index).tolist()]
        return found

    def owners(self, keys: Sequence[bytes]) -> tuple[Indexes, Indexes]:
        """Return for each key the index of its shard in `origin`, and of that in `target`."""
        origin, target = self.origin, self.target
        one, other = origin.placement, target.placement
        if isinstance(one, Ring) and isinstance(other, Ring):
            skip = len(origin.key_prefix)  # both sets have one prefix: one hash does for both
            positions = ring_positions([key[skip:] for key in keys] if skip else keys)
            return one.owners_at(positions), other.owners_at(positions)
        return origin.owners(keys), target.owners(keys)

    @cached_property
    def origin_index(self) -> dict[str, int]:
        """The index of each shard of `origin` in its placement."""
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
