"""Where keys belong: the runbook's ring, jump hash, weighted rendezvous."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellferry.errors import InvalidInput
from cellferry.shards.placement import (
    RING_SIZE,
    Jump,
    Placement,
    Rendezvous,
    Ring,
    Shard,
    moved_ranges,
    placement,
    ring_position,
)

KEYS = [f"pcs:{number}".encode() for number in range(40_000)]


def shards(count: int, *weights: float) -> tuple[Shard, ...]:
    given_weights = weights or (1.0,) * count
    return tuple(Shard(f"shard-{n}", weight) for n, weight in enumerate(given_weights))


ALL: list[type[Ring | Jump | Rendezvous]] = [Ring, Jump, Rendezvous]


def share(one: Placement) -> dict[str, float]:
    counts = Counter(one.place_many(KEYS).tolist())
    return {shard.name: counts[n] / len(KEYS) for n, shard in enumerate(one.shards)}


def moved(old: Placement, new: Placement) -> list[tuple[str, str]]:
    before = [old.shards[n].name for n in old.place_many(KEYS)]
    after = [new.shards[n].name for n in new.place_many(KEYS)]
    return [(a, b) for a, b in zip(before, after, strict=True) if a != b]


def pick_as_the_runbook_does(names: list[str], key: bytes, label: str) -> str:
    """The Go code of the runbook, step by step."""

    def hashed(data: bytes) -> int:
        return int.from_bytes(hashlib.sha256(data).digest()[:4], "big")

    hash_map = {}
    for name in names:
        for vnode in range(150):
            hash_map[hashed(label.format(shard=name, vnode=vnode).encode())] = name
    ring = sorted(hash_map)
    for point in ring:
        if point >= hashed(key):
            return hash_map[point]
    return hash_map[ring[0]]


@pytest.mark.parametrize("label", ["{shard}-{vnode}", "{vnode}:{shard}"])
def test_the_ring_is_the_runbooks(label: str) -> None:
    ring = Ring(shards(3), label=label)
    for key in KEYS[:200]:
        assert ring.place(key) == pick_as_the_runbook_does(
            ["shard-0", "shard-1", "shard-2"], key, label
        )


@pytest.mark.parametrize("kind", ALL)
@given(keys=st.lists(st.binary(max_size=40), max_size=30), count=st.integers(1, 6))
def test_many_keys_are_placed_as_each_alone(
    kind: type[Placement], keys: list[bytes], count: int
) -> None:
    one = kind(shards(count))  # type: ignore[call-arg]
    assert [one.shards[n].name for n in one.place_many(keys)] == [one.place(key) for key in keys]


@pytest.mark.parametrize("kind", ALL)
def test_growing_moves_keys_to_the_new_shard_only(kind: type[Placement]) -> None:
    gone = moved(kind(shards(3)), kind(shards(4)))  # type: ignore[call-arg]
    assert {target for _, target in gone} == {"shard-3"}
    assert 0.2 < len(gone) / len(KEYS) < 0.3


@pytest.mark.parametrize("kind", [Ring, Rendezvous])
def test_shrinking_moves_the_removed_shards_keys_only(kind: type[Placement]) -> None:
    four = shards(4)
    gone = moved(kind(four), kind((four[0], *four[2:])))  # type: ignore[call-arg]
    assert {source for source, _ in gone} == {"shard-1"}
    # Not a third, as the requirements say: about a quarter.
    assert 0.2 < len(gone) / len(KEYS) < 0.3


def test_a_weight_of_two_gets_twice_the_keys() -> None:
    found = share(Rendezvous(shards(2, 1.0, 2.0)))
    assert found["shard-1"] == pytest.approx(2 / 3, abs=0.01)
    assert share(Ring(shards(2, 1.0, 2.0)))["shard-1"] == pytest.approx(2 / 3, abs=0.08)


def test_a_changed_weight_moves_only_what_it_must() -> None:
    gone = moved(Rendezvous(shards(3)), Rendezvous(shards(3, 1.0, 1.0, 2.0)))
    assert {target for _, target in gone} == {"shard-2"}
    assert len(gone) / len(KEYS) == pytest.approx(1 / 2 - 1 / 3, abs=0.01)


def test_another_label_misplaces_most_keys() -> None:
    gone = moved(Ring(shards(4)), Ring(shards(4), label="{shard}:{vnode}"))
    assert len(gone) / len(KEYS) > 0.7


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 30))
def test_moved_ranges_are_what_moves(before: int, after: int, vnodes: int) -> None:
    old, new = Ring(shards(before), vnodes), Ring(shards(after), vnodes)
    ranges = moved_ranges(old, new)
    for key in KEYS[:300]:
        position = ring_position(key)
        found = [(a, b) for first, last, a, b in ranges if first <= position <= last]
        owners = (old.place(key), new.place(key))
        assert found == ([owners] if owners[0] != owners[1] else [])


@given(st.integers(1, 5), st.integers(1, 40))
def test_the_arcs_cover_the_ring_once(count: int, vnodes: int) -> None:
    arcs = Ring(shards(count), vnodes).ranges()
    assert arcs[0][0] == 0
    assert arcs[-1][1] == RING_SIZE - 1
    assert all(a[1] + 1 == b[0] for a, b in itertools.pairwise(arcs))


@pytest.mark.parametrize("kind", ALL)
def test_a_description_makes_the_same_placement(kind: type[Placement]) -> None:
    one = kind(shards(3))  # type: ignore[call-arg]
    assert np.array_equal(placement(one.describe()).place_many(KEYS), one.place_many(KEYS))


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: Ring(()), "no shards"),
        (lambda: Ring((Shard("a"), Shard("a"))), "'a' is named twice"),
        (lambda: Ring((Shard("a", 0.0),)), "weight 0.0"),
        (lambda: Rendezvous((Shard("a", float("nan")),)), "weight nan"),
        (lambda: Ring(shards(1), vnodes=0), "vnodes is 0"),
        (lambda: Ring(shards(1), label="{shard}"), "label is '{shard}'"),
        (lambda: Ring(shards(1), label="{shard"), "label is '{shard'"),
        (lambda: Jump(shards(2, 1.0, 2.0)), "knows no weights"),
        (lambda: placement({"algorithm": "modulo", "shards": [["a", 1]]}), "'modulo'"),
    ],
)
def test_bad_input_is_named(made: object, says: str) -> None:
    with pytest.raises(InvalidInput, match=says.replace("{", r"\{")):
        made()  # type: ignore[operator]
