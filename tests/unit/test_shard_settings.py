"""A set's file is read as it is meant, or refused with its place and a remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cellferry.errors import InvalidInput
from cellferry.shards.placement import Jump, Rendezvous, Ring, Shard
from cellferry.shards.settings import ShardSet, check_servers, load

WHOLE = """
name: dedup
kind: redis
key_prefix: "dedup:"
placement: {algorithm: ring, vnodes: 150, label: "{shard}#{vnode}"}
shards:
  shard-0: {connection: dedup-0}
  shard-1: {connection: dedup-1, weight: 2}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "dedup.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_whole_file(tmp_path: Path) -> None:
    one = load(written(tmp_path, WHOLE))
    assert one.placement == Ring((Shard("shard-0"), Shard("shard-1", 2.0)), 150, "{shard}#{vnode}")
    assert (one.name, one.kind, one.key_prefix) == ("dedup", "redis", b"dedup:")
    assert one.connections == {"shard-0": "dedup-0", "shard-1": "dedup-1"}
    again = ShardSet.from_document(json.loads(json.dumps(one.document())))
    assert again == one


@pytest.mark.parametrize(("algorithm", "kind"), [("jump", Jump), ("rendezvous", Rendezvous)])
def test_other_placements_survive_the_topology(
    tmp_path: Path, algorithm: str, kind: type[object]
) -> None:
    text = f"name: d\nkind: postgres\nplacement: {{algorithm: {algorithm}}}\n"
    one = load(written(tmp_path, text + "shards: {a: {connection: x}, b: {connection: y}}"))
    assert isinstance(one.placement, kind)
    assert ShardSet.from_document(one.document()).document() == one.document()


def test_the_id_is_placed_not_the_prefix(tmp_path: Path) -> None:
    one = load(written(tmp_path, WHOLE))
    ids = [b"%d" % number for number in range(200)]
    keys = [one.stored(id_) for id_ in ids]
    assert keys[7] == b"dedup:7"
    assert [one.owner(key) for key in keys] == [one.placement.place(id_) for id_ in ids]
    names = [shard.name for shard in one.placement.shards]
    assert [names[index] for index in one.owners(keys)] == [one.owner(key) for key in keys]
    assert one.owns(b"dedup:7")
    assert not one.owns(b"session:7")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: redis", "kind: mongo", "kind: .*'redis' or 'postgres'"),
        ("key_prefix", "key_prefx", "key_prefx: there is no such setting, did you mean 'key_pr"),
        ("weight: 2", "wieght: 2", r"shards\.shard-1\.wieght: there is no such setting, did"),
        ("weight: 2", "weight: 0", r"shards\.shard-1\.weight: .*greater than 0"),
        ("weight: 2", "weight: .inf", r"shards\.shard-1\.weight: .*finite"),
        ("vnodes: 150", "vnodes: 0", r"placement\.vnodes: .*greater than or equal to 1"),
        ("{shard}#{vnode}", "{shard}", "the vnode label is '{shard}'"),
        ("algorithm: ring", "algorithm: jump", "jump has neither vnodes nor a label"),
        ("algorithm: ring", "algorithm: modulo", r"placement\.algorithm"),
        ("shard-1:", "shard-0:", "'shard-0' is given twice, again in line 8"),
        ("dedup-1", "dedup-0", "'shard-0' and 'shard-1' are both connection 'dedup-0'"),
        ("name: dedup", "name: a b", "name: .*pattern"),
        ("shards:", "shards: {}\nothers:", "others: there is no such setting"),
        (WHOLE, "", "is empty"),
        (WHOLE, "- a", "holds a list"),
        (WHOLE, "a: [", "is not YAML"),
    ],
)
def test_a_fault_is_named_with_its_place_and_remedy(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in WHOLE
    path = written(tmp_path, WHOLE.replace(old, new))
    with pytest.raises(InvalidInput, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"cannot read .*none\.yaml"):
        load(tmp_path / "none.yaml")


def test_a_shard_needs_its_connection() -> None:
    placed = Ring((Shard("a"), Shard("b")))
    with pytest.raises(InvalidInput, match="'b' has no connection"):
        ShardSet("d", "redis", b"", placed, {"a": "x"})
    with pytest.raises(InvalidInput, match="for shard 'c', which is not placed"):
        ShardSet("d", "redis", b"", placed, {"a": "x", "b": "y", "c": "z"})


@pytest.mark.parametrize(
    ("kind", "urls"),
    [
        ("redis", ["redis://one:pw1@localhost:6379/0", "redis://two:pw2@127.0.0.1"]),
        ("postgres", ["postgresql://a:pw1@db:5432/x", "host=DB dbname=x password=pw2"]),
    ],
)
def test_two_connections_to_one_server_are_refused(kind: str, urls: list[str]) -> None:
    before = ShardSet("d", kind, b"", Ring((Shard("a"),)), {"a": "x"})
    after = ShardSet("d", kind, b"", Ring((Shard("b"),)), {"b": "y"})
    known = dict(zip(("x", "y"), urls, strict=True))
    with pytest.raises(InvalidInput, match="'x' and 'y' are both server") as caught:
        check_servers((before, after), known.get)
    assert "pw" not in str(caught.value)
    check_servers((before, before), known.get)
    with pytest.raises(InvalidInput, match="connection 'y' is not defined"):
        check_servers((before, after), {"x": urls[0]}.get)


def test_two_databases_of_one_server_are_two_shards() -> None:
    placed = Ring((Shard("a"), Shard("b")))
    one = ShardSet("d", "redis", b"", placed, {"a": "x", "b": "y"})
    check_servers((one,), {"x": "redis://h:1/0", "y": "redis://h:1/1"}.get)


def test_keys_that_would_be_taken_for_our_own_are_refused() -> None:
    """They are never moved: a re-sharding would leave them behind."""
    placed, connections = Ring((Shard("shard-0"),)), {"shard-0": "dedup-0"}
    with pytest.raises(InvalidInput, match="key_prefix begins with 'cellferry:shards:'"):
        ShardSet("dedup", "redis", b"cellferry:shards:mine:", placed, connections)
    for prefix, id_ in ((b"", b"cellferry:shards:a"), (b"cellferry:", b"shards:a")):
        one = ShardSet("dedup", "redis", prefix, placed, connections)
        with pytest.raises(InvalidInput, match="give the set a key_prefix"):
            one.stored(id_)
        assert one.stored(b"a") == prefix + b"a"
