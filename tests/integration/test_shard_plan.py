"""What a plan says, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cellferry.errors import Blocked, InvalidInput, PermanentError, Unreachable
from cellferry.shards.audit import LABELS, audit
from cellferry.shards.copier import copy
from cellferry.shards.placement import Rendezvous, Ring
from cellferry.shards.plan import Plan, duration
from cellferry.shards.planning import plan
from cellferry.shards.settings import ShardSet
from fixtures.moving_shards import Shards, shard_set

THREE = shard_set(range(3))
FOUR = shard_set(range(4))


def fill(shards: Shards, owners: ShardSet, count: int = 3000) -> list[bytes]:
    keys = [b"dedup:id-%d" % number for number in range(count)]
    for number in range(4):
        with shards.client(number) as client, client.pipeline(transaction=False) as pipe:
            for key in keys:
                if owners.connections[owners.owner(key)] == f"c{number}":
                    pipe.set(key, b"x" * 16, px=3_600_000)
            pipe.execute()
    return keys


def everything(shards: Shards) -> list[Any]:
    found = []
    for number in range(4):
        with shards.client(number) as client:
            found.append(sorted(client.keys("*")))
    return found


def test_a_plan_has_what_the_runbooks_plan_has_and_more(shards: Shards) -> None:
    keys = fill(shards, THREE)
    before = everything(shards)
    made = plan(THREE, FOUR, shards.source, throttle_keys_s=100)
    assert everything(shards) == before, "a plan changes nothing"
    document = json.loads(json.dumps(made.document()))
    moved = [key for key in keys if FOUR.owner(key) == "shard-3"]
    assert document["old_topology"] == {"shards": 3, "total_keys": 3000}
    assert document["new_topology"] == {"shards": 4, "total_keys": 3000}
    assert document["total_keys_to_move"] == len(moved)
    assert document["percentage_to_move"] == pytest.approx(len(moved) / 30, abs=0.01)
    assert {(one["from"], one["to"]): one["keys_to_move"] for one in document["migrations"]} == {
        (f"shard-{n}", "shard-3"): sum(THREE.owner(key) == f"shard-{n}" for key in moved)
        for n in range(3)
    }
    first = document["migrations"][0]
    assert first["estimated_seconds"] == pytest.approx(first["keys_to_move"] / 100, abs=0.1)
    assert document["total_bytes_to_move"] > len(moved) * 30
    assert [one["keys_before"] for one in document["shards"]] == [
        sum(THREE.owner(key) == f"shard-{n}" for key in keys) for n in range(3)
    ] + [0]
    assert [one["keys_after"] for one in document["shards"]] == [
        sum(FOUR.owner(key) == f"shard-{n}" for key in keys) for n in range(4)
    ]
    assert sum(last - first + 1 for first, last, _, _ in document["moved_ranges"]) / 2**32 == (
        pytest.approx(len(moved) / 3000, abs=0.05)
    )
    assert {one[3] for one in document["moved_ranges"]} == {"shard-3"}
    assert document["audit"]["fits"]["{shard}-{vnode}"] == 1
    assert document["blockers"] == []
    assert {one["code"] for one in document["warnings"]} == {"no limit"}
    assert all(one["version"] for one in document["shards"])
    again = Plan.from_document(document)
    assert again.document() == document
    assert again.hash == made.hash != made.turned().hash
    assert again.turned().turned().hash == made.hash


def test_a_sampled_plan_says_that_it_estimates(shards: Shards) -> None:
    fill(shards, THREE, 6000)
    exact = plan(THREE, FOUR, shards.source)
    rough = plan(THREE, FOUR, shards.source, sample=500)
    assert rough.is_estimated
    assert not exact.is_estimated
    assert rough.keys == pytest.approx(6000, rel=0.01)
    assert rough.keys_to_move == pytest.approx(exact.keys_to_move, rel=0.4)


def test_an_edited_plan_is_no_plan(shards: Shards) -> None:
    fill(shards, THREE, 100)
    document = plan(THREE, FOUR, shards.source).document()
    document["new"]["placement"]["vnodes"] = 151
    with pytest.raises(InvalidInput, match="its hash was made of"):
        Plan.from_document(document)
    with pytest.raises(InvalidInput, match="not a plan"):
        Plan.from_document({"set": "dedup"})


def test_a_plan_older_than_the_ring_is_refused(shards: Shards) -> None:
    fill(shards, THREE, 100)
    made = plan(THREE, FOUR, shards.source)
    made.check_ring(THREE)
    with pytest.raises(InvalidInput, match=r"older than the ring.*Remedy: make the plan anew"):
        made.check_ring(FOUR)


def test_a_duration_reads_as_a_person_writes_it() -> None:
    assert [duration(s) for s in (0.4, 59, 125, 13_620)] == ["0s", "59s", "2m05s", "3h47m"]


# --- labels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("label", LABELS)
def test_another_known_label_is_named(shards: Shards, label: str) -> None:
    """The set's file says one form, its clients use another."""
    fill(shards, _labelled(range(3), label), 900)
    found = audit(THREE, shards.source)
    assert found.best == label
    assert found.fits[label] == 1
    if label != THREE.placement.label:  # type: ignore[attr-defined]
        assert found.share < 0.6
        with pytest.raises(InvalidInput, match=re.escape(repr(label))):
            plan(THREE, FOUR, shards.source)
    made = plan(_labelled(range(3), label), _labelled(range(4), label), shards.source)
    assert made.blockers == ()


def test_an_unknown_label_is_refused(shards: Shards) -> None:
    fill(shards, _labelled(range(3), "ring/{shard}/{vnode:03d}"))
    with pytest.raises(Blocked, match=r"fits \d+\.\d% of 3000 live keys; of 18 known vnode labels"):
        plan(THREE, FOUR, shards.source)


def test_a_placement_without_labels_is_audited_too(shards: Shards) -> None:
    fill(shards, THREE)
    wrong = shard_set(range(3), place=Rendezvous)
    with pytest.raises(Blocked, match="live keys"):
        plan(wrong, shard_set(range(4), place=Rendezvous), shards.source)


def test_an_empty_set_and_a_single_shard_say_that_nothing_is_known(shards: Shards) -> None:
    made = plan(THREE, FOUR, shards.source)
    assert "audit" in {one.code for one in made.warnings}
    fill(shards, shard_set([0]), 100)
    single = plan(shard_set([0]), shard_set([0, 1]), shards.source)
    assert any("one shard" in one.text for one in single.warnings)


def _labelled(numbers: range, label: str) -> ShardSet:
    one = shard_set(numbers)
    return replace(one, placement=Ring(one.placement.shards, label=label))


# --- bad input --------------------------------------------------------------------------------


def test_an_unreachable_shard_is_named(shards: Shards) -> None:
    def source(name: str) -> str | None:
        return "redis://127.0.0.1:1/0" if name == "c1" else shards.source(name)

    with pytest.raises(Unreachable, match="shard shard-1") as caught:
        plan(THREE, FOUR, source)
    assert caught.value.hint


def test_an_undefined_connection_is_named(shards: Shards) -> None:
    with pytest.raises(InvalidInput, match="connection 'c9' is not defined"):
        plan(THREE, shard_set([0, 1, 2, 9]), shards.source)


def test_a_destination_without_memory_is_a_blocker(shards: Shards) -> None:
    fill(shards, THREE)
    with shards.client(3) as client:
        used = client.info("memory")["used_memory"]
        client.config_set("maxmemory", used + 20_000)
    made = plan(THREE, FOUR, shards.source)
    with pytest.raises(Blocked, match=r"shard shard-3: it has no memory for \d+ bytes more"):
        made.refuse()
    with shards.client(3) as client:
        client.config_set("maxmemory", int(used * 1.5))
    tight = plan(THREE, FOUR, shards.source)
    assert [one.code for one in tight.blockers] == ["headroom"]
    with pytest.raises(Blocked, match="headroom, 50% is asked for"):
        tight.refuse()
    plan(THREE, FOUR, shards.source, headroom=0.0).refuse()


def test_a_copy_into_a_full_server_says_so_and_goes_on_later(shards: Shards) -> None:
    fill(shards, THREE)
    made = plan(THREE, FOUR, shards.source)
    with shards.client(3) as client:
        client.config_set("maxmemory", 1)
    with pytest.raises(PermanentError, match="out of memory"):
        copy(made, "shard-0", shards.source, fence=1)
    with shards.client(3) as client:
        client.config_set("maxmemory", 0)
    assert copy(made, "shard-0", shards.source, fence=1).keys == made.keys_from("shard-0")


@pytest.mark.parametrize("number", [0, 3])
def test_a_policy_that_would_evict_is_a_blocker(shards: Shards, number: int) -> None:
    fill(shards, THREE)
    with shards.client(number) as client:
        used = client.info("memory")["used_memory"]
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("maxmemory", used * 10)
    roomy = plan(THREE, FOUR, shards.source)
    with pytest.raises(Blocked, match=f"shard shard-{number}: maxmemory-policy is allkeys-lru"):
        roomy.refuse()
    assert all(load.would_evict == 0 for load in roomy.loads)


def test_a_plan_counts_what_would_be_evicted(shards: Shards) -> None:
    fill(shards, THREE)
    with shards.client(3) as client:
        client.config_set("maxmemory-policy", "volatile-ttl")
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 30_000)
    made = plan(THREE, FOUR, shards.source)
    (load,) = (one for one in made.loads if one.shard == "shard-3")
    assert 0 < load.would_evict <= made.keys_to_move
    assert any("would make it evict about" in one.text for one in made.blockers)


def test_a_policy_without_a_limit_is_a_warning(shards: Shards) -> None:
    with shards.client(0) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
    made = plan(THREE, FOUR, shards.source)
    assert made.blockers == ()
    assert ("eviction", "shard-0") in {(one.code, one.shard) for one in made.warnings}


def test_a_replica_is_a_blocker(own_valkey: Callable[..., Any], shards: Shards) -> None:
    replica = own_valkey()
    with shards.client(0) as primary:
        primary.ping()
    mine = Shards([*shards.servers[:3], replica])
    with mine.client(3) as client:
        client.replicaof("127.0.0.1", 1)
    made = plan(THREE, FOUR, mine.source)
    assert [one.code for one in made.blockers] == ["replica"]


def test_a_shard_named_twice_is_refused(shards: Shards) -> None:
    def aliased(name: str) -> str | None:
        url = shards.source("c0" if name == "c3" else name)
        return url.replace("127.0.0.1", "localhost") if name == "c3" and url else url

    with pytest.raises(InvalidInput, match=r"'c0' and 'c3' are both"):
        plan(THREE, FOUR, aliased)
    with pytest.raises(InvalidInput, match=r"'c0' and 'c3' are both"):
        copy(
            Plan.from_document(plan(THREE, FOUR, shards.source).document()),
            "shard-0",
            aliased,
            fence=1,
        )


def test_two_names_of_one_server_are_found_by_the_server_itself(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that only the network knows to be the same."""

    def aliased(name: str) -> str | None:
        return shards.source("c0" if name == "c3" else name)

    monkeypatch.setattr("cellferry.shards.planning.check_servers", lambda *_: None)
    made = plan(THREE, FOUR, aliased)
    with pytest.raises(Blocked, match="same server and database as shard shard-0"):
        made.refuse()


@pytest.mark.parametrize(
    ("old", "new", "arguments", "message"),
    [
        (THREE, THREE, {}, "nothing moves"),
        (THREE, shard_set(range(4), prefix=b"other:"), {}, "key_prefix changes"),
        (THREE, shard_set(range(4), kind="postgres"), {}, "kind changes"),
        (THREE, replace(FOUR, name="other"), {}, "name changes"),
        (THREE, FOUR, {"throttle_keys_s": 0}, "throttle is 0"),
        (THREE, FOUR, {"headroom": 1.5}, "headroom is 1.5"),
        (THREE, FOUR, {"sample": 0}, "sample of 0"),
    ],
)
def test_sets_that_make_no_sense_together_are_refused(
    shards: Shards, old: ShardSet, new: ShardSet, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        plan(old, new, shards.source, **arguments)


def test_keys_that_lie_wrong_are_told_and_left_alone(shards: Shards) -> None:
    keys = fill(shards, THREE)
    stray = next(key for key in keys if THREE.owner(key) == "shard-1")
    with shards.client(0) as client:
        client.set(stray, "old copy")
    made = plan(THREE, FOUR, shards.source)
    assert ("misplaced", "shard-0") in {(one.code, one.shard) for one in made.warnings}
    assert made.keys_to_move == sum(FOUR.owner(key) == "shard-3" for key in keys)
