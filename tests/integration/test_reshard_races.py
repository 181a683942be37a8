"""What happens between two lines of a step, or of a client, while somebody else goes on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from cellferry.errors import CellferryError, TransientError, WrongState
from cellferry.local.valkey_server import ValkeyServer
from cellferry.shards import client as client_module
from cellferry.shards import points, reshard
from cellferry.shards.client import ShardedStore
from cellferry.shards.context import Context
from cellferry.shards.follower import Follower
from cellferry.shards.leases import Lease, TakenOver
from cellferry.shards.planning import plan
from cellferry.shards.points import Point
from cellferry.shards.states import ShardState
from cellferry.stores.redis import wire
from fixtures.moving_shards import Shards, shard_set
from fixtures.shards import ACTOR, PREFIX, ShardWorld, ring

SOURCES = ("shard-0", "shard-1", "shard-2")


class Slow(Context):
    """A controller to which something happens between its look at the state and its lease."""

    meanwhile: Callable[[], None] | None = None

    @contextmanager
    def lease(self, id_: int, step: str, *, part: str | None = None) -> Iterator[Lease]:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        with super().lease(id_, step, part=part) as lease:
            yield lease


@pytest.fixture
def at(shard_world: ShardWorld) -> Iterator[Context]:
    with Context(shard_world.url, shard_world.urls.get, ACTOR) as at:
        yield at


@pytest.fixture
def slow(shard_world: ShardWorld) -> Iterator[Slow]:
    with Slow(shard_world.url, shard_world.urls.get, ACTOR) as slow:
        yield slow


@pytest.fixture
def store(shard_world: ShardWorld) -> Iterator[ShardedStore]:
    with shard_world.store() as one:
        yield one


def up_to_verify(at: Context, *, ttl_s: float = 0) -> int:
    id_ = reshard.begin(at, reshard.plan(at, ring(4)), ttl_s=ttl_s).id
    for shard in SOURCES:
        reshard.copy(at, id_, shard)
    reshard.dual_write(at, id_)
    reshard.verify(at, id_)
    return id_


# -- controllers


def test_a_copy_that_was_slow_does_not_overwrite_what_has_become_the_authority(
    shard_world: ShardWorld, store: ShardedStore, at: Context, slow: Slow
) -> None:
    ids = shard_world.moved_ids(20)
    for id_ in ids:
        store.increment(id_)
    id_ = up_to_verify(at)

    def cut_over() -> None:
        reshard.cutover(at, id_)
        for one in ids:
            store.increment(one)
        # A server that has restarted has another identity: its checkpoints count for nothing.
        with psycopg.connect(shard_world.url, autocommit=True) as connection:
            connection.execute("DELETE FROM topology.resharding_checkpoint")

    slow.meanwhile = cut_over
    refused = []
    for shard in SOURCES:
        with suppress(WrongState):
            reshard.copy(slow, id_, shard)
            continue
        refused.append(shard)
    assert [store.get(one) for one in ids] == [b"2"] * len(ids)
    assert refused == list(SOURCES)


def test_a_copy_whose_fence_a_server_has_lost_asks_before_it_writes(
    shard_world: ShardWorld, store: ShardedStore, at: Context
) -> None:
    ids = shard_world.moved_ids(1200)  # more than are read before the first is written
    for id_ in ids:
        store.increment(id_)
    id_ = up_to_verify(at)

    def cut_over(point: Point) -> None:
        if point is not Point.COPY_BEGUN:
            return
        points.listen(None)
        with Context(shard_world.url, shard_world.urls.get, ACTOR) as other:
            reshard.cutover(other, id_)
        for one in ids:
            store.increment(one)
        with psycopg.connect(shard_world.url, autocommit=True) as connection:
            connection.execute("DELETE FROM topology.resharding_checkpoint")
        for name in shard_world.urls:
            with shard_world.shard(name) as server:
                for key in server.scan_iter(match="cellferry:shards:fence:*"):
                    server.delete(key)

    points.listen(cut_over)
    try:
        with pytest.raises(TakenOver):
            reshard.copy(at, id_, "shard-0")
    finally:
        points.listen(None)
    assert [store.get(one) for one in ids] == [b"2"] * len(ids)


@pytest.mark.parametrize("step", ["copy", "cleanup"])
def test_whoever_takes_over_in_the_pause_ends_it(
    shard_world: ShardWorld, at: Context, slow: Slow, step: str
) -> None:
    id_ = up_to_verify(at)
    if step == "cleanup":
        reshard.cutover(at, id_)
        reshard.watch(at, id_, seconds=0)

    def pause() -> None:
        if step == "cleanup":
            shard_world.go(ShardState.DUAL_READ_NEW)
        shard_world.go(ShardState.SWITCHING)

    slow.meanwhile = pause
    if step == "copy":
        reshard.copy(slow, id_, "shard-0")
    else:
        with pytest.raises(WrongState, match="cleanup needs"):
            reshard.cleanup(slow, id_)
    assert at.live("dedup").state is not ShardState.SWITCHING


def test_old_copies_are_kept_by_the_topologys_clock(
    at: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A controller's clock that jumps ahead must not end the time in which a roll-back is free."""
    id_ = up_to_verify(at, ttl_s=3600)
    reshard.cutover(at, id_)
    reshard.watch(at, id_, seconds=0)
    real = reshard.datetime

    class Ahead(real):  # type: ignore[misc, valid-type]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return real.now(tz) + timedelta(days=30)

    monkeypatch.setattr(reshard, "datetime", Ahead)
    with pytest.raises(WrongState, match="old copies are kept"):
        reshard.cleanup(at, id_)


def test_a_destination_that_came_back_empty_during_a_sweep_is_noticed(
    own_valkey: Callable[..., ValkeyServer], shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its keys were compared, and before its own changes are heard of."""
    server = own_valkey()
    mine = Shards([*shards.servers[:3], server])
    old, new = shard_set(range(3)), shard_set(range(4))
    keys = [b"dedup:id-%d" % number for number in range(2000)]
    keys = [key for key in keys if old.owner(key) == "shard-0"]
    with mine.client(0) as client:
        for key in keys:
            client.set(key, b"token", px=600_000)
    made = plan(old, new, mine.source)
    real = Follower._remove_extra

    def restarts_first(self: Follower, figures: Any) -> None:
        with mine.client(3) as client:
            assert client.dbsize() > 0
            client.config_set("save", "")
            client.config_set("appendonly", "no")
        server.kill()
        for file in server.data.rglob("*"):
            if file.is_file() and file.suffix in {".rdb", ".aof", ".manifest"}:
                file.unlink()
        server.start()
        with mine.client(3) as client:
            assert client.dbsize() == 0
        real(self, figures)

    monkeypatch.setattr(Follower, "_remove_extra", restarts_first)
    with Follower(made, "shard-0", mine.source, fence=1) as follower:
        follower.open_feed()
        with pytest.raises(TransientError):
            follower.sweep()


# -- clients


def test_a_claim_that_fails_at_the_second_owner_keeps_nothing_at_the_first(
    shard_world: ShardWorld, store: ShardedStore
) -> None:
    [id_] = shard_world.moved_ids(1)
    shard_world.begin()
    shard_world.go_until(ShardState.SWITCHING)
    with shard_world.shard("dedup-3") as new:
        new.config_set("maxmemory", 1)
        try:
            with pytest.raises(CellferryError, match="out of memory"):
                store.claim(id_, 60)
        finally:
            new.config_set("maxmemory", 0)
    assert shard_world.where(id_) == []
    assert store.claim(id_, 60).accepted


def test_a_claim_waits_for_a_shard_that_becomes_a_primary_again(
    shard_world: ShardWorld, store: ShardedStore
) -> None:
    """In a failover a server takes no writes for a moment, and says so."""
    [id_] = shard_world.moved_ids(1)
    owner = ring(3).connections[ring(3).owner(PREFIX + id_)]
    accepted: list[bool] = []
    with shard_world.shard(owner) as old:
        old.replicaof("127.0.0.1", "1")
        try:
            claiming = threading.Thread(
                target=lambda: accepted.append(store.claim(id_, 60).accepted)
            )
            claiming.start()
            claiming.join(0.5)
            assert claiming.is_alive()
        finally:
            old.replicaof("NO", "ONE")
    claiming.join()
    assert accepted == [True]


def test_a_new_owner_that_hangs_does_not_make_every_claim_wait(
    shard_world: ShardWorld, store: ShardedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    real = client_module.open_shard

    def counted(kind: str, name: str, *rest: Any) -> Any:
        tried.append(name)
        return real(kind, name, *rest)

    monkeypatch.setattr(client_module, "open_shard", counted)
    monkeypatch.setattr(wire, "REPLY_TIMEOUT_S", 0.7)
    # far above `_REST_S`, whatever stands still meanwhile
    monkeypatch.setattr(client_module, "_REST_FACTOR", 100)
    ids = shard_world.moved_ids(2)
    shard_world.begin()
    shard_world.go_until(ShardState.DUAL_READ_OLD)
    with shard_world.shard("dedup-3") as new:
        process = new.info()["process_id"]
    os.kill(process, signal.SIGSTOP)
    try:
        assert store.claim(ids[0], 60).accepted
        time.sleep(1.2)
        assert store.claim(ids[1], 60).accepted
    finally:
        os.kill(process, signal.SIGCONT)
    assert tried.count("shard-3") == 1


def test_a_counter_that_was_kept_for_ever_is_not_given_a_life(
    shard_world: ShardWorld, store: ShardedStore
) -> None:
    store.increment(b"n")
    assert store.increment(b"n", ttl_s=5) == 2
    store.increment(b"brief", ttl_s=5)
    for id_, lives in ((b"n", False), (b"brief", True)):
        [where] = shard_world.where(id_)
        with shard_world.shard(where) as one:
            assert (one.pttl(PREFIX + id_) > 0) is lives
