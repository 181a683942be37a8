"""Which shard a key belongs to: one interface, three algorithms, also for millions of keys at once.

All of them are pure functions of the key, the shards' names and weights: every client that has the
same settings computes the same owner. None decides where an organization lives; that is the
directory's (a hash may only propose a first placement, see `cellferry.routing`).

Sources: consistent hashing, Karger et al., STOC 1997; jump consistent hash, Lamping and Veach,
arXiv 1406.2294; weighted rendezvous hashing with the score `-w / ln(u)`, Schindelhauer and
Schomaker, SPAA 2005.
"""

from __future__ import annotations

import hashlib
import string
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import mmh3
import numpy as np
import numpy.typing as npt

from cellferry.errors import InvalidInput

Indexes = npt.NDArray[np.intp]

#: Vnodes of a shard of weight 1, as the runbook has it.
VNODES = 150
#: What the runbook does not say: how a vnode is called. `{shard}-{vnode}` is the commonest form.
LABEL = "{shard}-{vnode}"
RING_SIZE = 2**32


@dataclass(frozen=True, slots=True)
class Shard:
    """One server of a sharded store.

    Attributes:
        name: what placement hashes; renaming a shard moves its keys.
        weight: its share relative to the others; 1 is ordinary.
    """

    name: str
    weight: float = 1.0


class Placement(Protocol):
    """Assigns keys to shards."""

    @property
    def shards(self) -> tuple[Shard, ...]:
        """All shards, in the order that `place_many` counts them."""
        ...

    def place(self, key: bytes) -> str:
        """Return the name of the shard that owns `key`."""
        ...

    def place_many(self, keys: Sequence[bytes]) -> Indexes:
        """Return for each of `keys` the index of its owner in `shards`; shape `(len(keys),)`."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what makes it, as JSON's types; equal documents place equally."""
        ...


def check_shards(shards: Sequence[Shard]) -> tuple[Shard, ...]:
    """Return `shards` if they can be placed upon.

    Raises:
        InvalidInput: there are none, two have one name, or a weight is not above 0.
    """
    if not shards:
        raise InvalidInput("there are no shards", hint="name at least one")
    twice = [name for name, times in Counter(one.name for one in shards).items() if times > 1]
    if twice:
        raise InvalidInput(
            f"shard {twice[0]!r} is named twice", hint="each shard has one name and one address"
        )
    for one in shards:
        if not (0 < one.weight < float("inf")):
            raise InvalidInput(
                f"shard {one.name!r} has weight {one.weight}", hint="a weight is above 0"
            )
    return tuple(shards)


def ring_position(key: bytes) -> int:
    """Return where `key` is on the ring: the first four bytes of its SHA-256, big-endian."""
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big")


def ring_positions(keys: Sequence[bytes]) -> npt.NDArray[np.uint32]:
    """Return `ring_position` of each key; shape `(len(keys),)`."""
    sha256 = hashlib.sha256
    digests = b"".join([sha256(key).digest()[:4] for key in keys])
    return np.frombuffer(digests, dtype=">u4").astype(np.uint32)


@dataclass(frozen=True)
class Ring:
    """The runbook's consistent-hash ring.

    A key belongs to the first vnode at or behind its position, around the end to the first of
    all. Where two vnodes have one position the one added last counts, as in a map that is
    overwritten.

    Args:
        shards: in the order in which they are added.
        vnodes: of a shard of weight 1; another gets `round(vnodes * weight)`, at least 1.
        label: how a vnode is called, with the fields `{shard}` and `{vnode}` (from 0).

    Raises:
        InvalidInput: see `check_shards`; or a label without both fields.
    """

    shards: tuple[Shard, ...]
    vnodes: int = VNODES
    label: str = LABEL

    def __post_init__(self) -> None:
        check_shards(self.shards)
        if self.vnodes < 1:
            raise InvalidInput(f"vnodes is {self.vnodes}", hint="it is at least 1; 150 is usual")
        try:
            fields = {name for _, name, _, _ in string.Formatter().parse(self.label) if name}
        except ValueError:
            fields = set()
        if fields != {"shard", "vnode"}:
            raise InvalidInput(
                f"the vnode label is {self.label!r}",
                hint=f"it has the fields {{shard}} and {{vnode}}, such as {LABEL!r}",
            )

    @cached_property
    def _points(self) -> tuple[npt.NDArray[np.uint32], Indexes]:
        """Positions in order, and the index of the shard at each."""
        at: dict[int, int] = {}
        for index, shard in enumerate(self.shards):
            for vnode in range(max(1, round(self.vnodes * shard.weight))):
                name = self.label.format(shard=shard.name, vnode=vnode)
                at[ring_position(name.encode())] = index
        positions = np.array(sorted(at), dtype=np.uint32)
        return positions, np.array([at[int(one)] for one in positions], dtype=np.intp)

    @cached_property
    def _lists(self) -> tuple[list[int], list[str]]:
        positions, owners = self._points
        return positions.tolist(), [self.shards[index].name for index in owners]

    def place(self, key: bytes) -> str:
        """Return the name of the shard that owns `key`."""
        positions, names = self._lists
        index = bisect_left(positions, ring_position(key))
        return names[index if index < len(names) else 0]

    def place_many(self, keys: Sequence[bytes]) -> Indexes:
        """Return the owners' indexes; one SHA-256 a key is what it costs."""
        return self.owners_at(ring_positions(keys))

    def owners_at(self, positions: npt.NDArray[np.uint32]) -> Indexes:
        """Return the owners' indexes of positions on the ring."""
        points, owners = self._points
        found = np.searchsorted(points, positions, side="left")
        found[found == len(points)] = 0
        result: Indexes = owners[found]
        return result

    def ranges(self) -> list[tuple[int, int, str]]:
        """Return the arcs of the ring as `(first, last, owner)`, ends included, in order."""
        points, owners = self._points
        arcs: list[tuple[int, int, str]] = []
        first = 0
        for point, owner in zip(points.tolist(), owners.tolist(), strict=True):
            _extend(arcs, first, point, self.shards[owner].name)
            first = point + 1
        if first < RING_SIZE:
            _extend(arcs, first, RING_SIZE - 1, self.shards[int(owners[0])].name)
        return arcs

    def describe(self) -> dict[str, Any]:
        """Return what makes it."""
        return {
            "algorithm": "ring",
            "vnodes": self.vnodes,
            "label": self.label,
            "shards": [[one.name, one.weight] for one in self.shards],
        }


def _extend(arcs: list[tuple[int, int, str]], first: int, last: int, owner: str) -> None:
    if arcs and arcs[-1][2] == owner:
        arcs[-1] = (arcs[-1][0], last, owner)
    else:
        arcs.append((first, last, owner))


def moved_ranges(old: Ring, new: Ring) -> list[tuple[int, int, str, str]]:
    """Return the arcs whose owner changes, as `(first, last, from, to)`, ends included."""
    ends = np.union1d(
        np.array([last for _, last, _ in old.ranges()], dtype=np.uint32),
        np.array([last for _, last, _ in new.ranges()], dtype=np.uint32),
    )
    before, after = old.owners_at(ends), new.owners_at(ends)
    moved: list[tuple[int, int, str, str]] = []
    first = 0
    for last, source, target in zip(ends.tolist(), before.tolist(), after.tolist(), strict=True):
        names = (old.shards[source].name, new.shards[target].name)
        if names[0] != names[1]:
            if moved and moved[-1][1] == first - 1 and moved[-1][2:] == names:
                moved[-1] = (moved[-1][0], last, *names)
            else:
                moved.append((first, last, *names))
        first = last + 1
    return moved


@dataclass(frozen=True)
class Jump:
    """Jump consistent hash: no memory, the evenest load; only the last shard can be added or go.

    Raises:
        InvalidInput: see `check_shards`; or weights, which it does not know.
    """

    shards: tuple[Shard, ...]

    def __post_init__(self) -> None:
        check_shards(self.shards)
        if any(one.weight != 1.0 for one in self.shards):
            raise InvalidInput(
                "jump hash knows no weights", hint="use rendezvous, or the ring with weights"
            )

    def place(self, key: bytes) -> str:
        """Return the name of the shard that owns `key`."""
        return self.shards[int(self.place_many([key])[0])].name

    def place_many(self, keys: Sequence[bytes]) -> Indexes:
        """Return the owners' indexes, all keys a step at a time."""
        state = key_hashes(keys)
        bucket = np.zeros(len(state), dtype=np.int64)
        jump = np.zeros(len(state), dtype=np.int64)
        going = np.arange(len(state))
        count = len(self.shards)
        while going.size:
            bucket[going] = jump[going]
            state[going] = state[going] * np.uint64(2862933555777941757) + np.uint64(1)
            ratio = float(1 << 31) / ((state[going] >> np.uint64(33)) + np.uint64(1)).astype(float)
            jump[going] = ((bucket[going] + 1) * ratio).astype(np.int64)
            going = going[jump[going] < count]
        return bucket.astype(np.intp)

    def describe(self) -> dict[str, Any]:
        """Return what makes it."""
        return {"algorithm": "jump", "shards": [[one.name, one.weight] for one in self.shards]}


@dataclass(frozen=True)
class Rendezvous:
    """Weighted rendezvous hashing: the highest of `-w / ln(u)`; any shard can come or go.

    `u` is uniform in (0, 1), from the hashes of key and shard. (Multiplying the weight into the
    hash, as the requirements have it, gives a shard of weight 2 three quarters of the keys.)

    Raises:
        InvalidInput: see `check_shards`.
    """

    shards: tuple[Shard, ...]
    _seeds: npt.NDArray[np.uint64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_shards(self.shards)
        seeds = np.array([_hash64(one.name.encode()) for one in self.shards], dtype=np.uint64)
        object.__setattr__(self, "_seeds", seeds)

    def place(self, key: bytes) -> str:
        """Return the name of the shard that owns `key`."""
        return self.shards[int(self.place_many([key])[0])].name

    def place_many(self, keys: Sequence[bytes]) -> Indexes:
        """Return the owners' indexes."""
        hashes = key_hashes(keys)
        best = np.full(len(hashes), -np.inf)
        owner = np.zeros(len(hashes), dtype=np.intp)
        for index, shard in enumerate(self.shards):
            mixed = _mix(hashes ^ self._seeds[index])
            # 53 bits: exactly what a float holds; never 0 and never 1
            uniform = ((mixed >> np.uint64(11)).astype(float) + 0.5) / 2.0**53
            score = -shard.weight / np.log(uniform)
            better = score > best
            best[better] = score[better]
            owner[better] = index
        return owner

    def describe(self) -> dict[str, Any]:
        """Return what makes it."""
        return {
            "algorithm": "rendezvous",
            "shards": [[one.name, one.weight] for one in self.shards],
        }


def key_hashes(keys: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    """Return MurmurHash3 (x64, 128 bits) of each key, its first half; shape `(len(keys),)`."""
    return np.array([_hash64(key) for key in keys], dtype=np.uint64)


def _hash64(key: bytes) -> int:
    return int(mmh3.hash64(key, 0, True, signed=False)[0])


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64 bits without collisions: SplitMix64's finalizer (Steele et al., 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


def placement(document: dict[str, Any]) -> Placement:
    """Return the placement that `Placement.describe` wrote down.

    Raises:
        InvalidInput: no such algorithm.
    """
    shards = tuple(Shard(name, float(weight)) for name, weight in document["shards"])
    match document.get("algorithm"):
        case "ring":
            return Ring(shards, int(document["vnodes"]), str(document["label"]))
        case "jump":
            return Jump(shards)
        case "rendezvous":
            return Rendezvous(shards)
        case other:
            raise InvalidInput(
                f"there is no placement {other!r}", hint="choose ring, jump or rendezvous"
            )
