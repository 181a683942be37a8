"""Keys move between shards exactly: values and absolute expiries, while clients go on writing."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import pytest

from cellferry.errors import Blocked, InvalidInput, LeaseLost, TransientError, Unreachable
from cellferry.shards.checkpoints import FileCheckpoints
from cellferry.shards.cleanup import cleanup
from cellferry.shards.copier import copy, shares
from cellferry.shards.follower import Follower
from cellferry.shards.lanes import Lanes
from cellferry.shards.placement import Jump, Rendezvous
from cellferry.shards.plan import Plan
from cellferry.shards.planning import plan
from cellferry.shards.progress import Moved
from cellferry.shards.settings import ShardSet
from cellferry.shards.sides import Record, open_side
from cellferry.shards.verify import verify
from cellferry.stores.throttle import Throttle
from fixtures.moving_shards import Shards, shard_set

THREE = shard_set(range(3))
FOUR = shard_set(range(4))


def fill(shards: Shards, owners: ShardSet, count: int = 6000) -> dict[bytes, tuple[bytes, int]]:
    """Put `count` keys where `owners` says; returns value and absolute expiry (-1: none)."""
    now = int(time.time() * 1000)
    keys = [b"dedup:id-%d" % number for number in range(count)]
    wanted = {
        key: (b"token-%d" % number, -1 if number % 10 == 0 else now + 3_600_000 + number)
        for number, key in enumerate(keys)
    }
    at: dict[str, list[bytes]] = {}
    for key in keys:
        at.setdefault(owners.owner(key), []).append(key)
    for name, mine in at.items():
        with shards.client(int(name[-1])) as client, client.pipeline(transaction=False) as pipe:
            for key in mine:
                value, expires = wanted[key]
                pipe.set(key, value, pxat=expires if expires > 0 else None)
            pipe.execute()
    return wanted


def held(shards: Shards, number: int) -> dict[bytes, tuple[bytes, int]]:
    """Everything of the set in one server, read without the mover's code."""
    with shards.client(number) as client:
        keys = list(client.scan_iter(match="dedup:*", count=5000))
        pipe = client.pipeline(transaction=False)
        for key in keys:
            pipe.get(key).pexpiretime(key)
        replies = pipe.execute()
    return dict(zip(keys, zip(replies[::2], replies[1::2], strict=True), strict=True))


def expected(wanted: dict[bytes, tuple[bytes, int]], owners: ShardSet, number: int) -> object:
    return {key: one for key, one in wanted.items() if owners.owner(key) == f"shard-{number}"}


def move_all(made: Plan, shards: Shards, fence: int = 1) -> None:
    for name in made.sources:
        copy(made, name, shards.source, fence=fence)


# --- the whole way ----------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(range(3), range(4)), (range(4), range(3))])
def test_every_moved_key_arrives_and_leaves(shards: Shards, before: range, after: range) -> None:
    old, new = shard_set(before), shard_set(after)
    wanted = fill(shards, old)
    made = plan(old, new, shards.source)
    made.refuse()
    moved = sum(old.owner(key) != new.owner(key) for key in wanted)
    assert made.keys_to_move == moved
    assert 0.15 < moved / len(wanted) < 0.35
    results = [copy(made, name, shards.source, fence=1) for name in made.sources]
    assert sum(one.keys for one in results) == moved
    for name in made.sources:
        with Follower(made, name, shards.source, fence=2) as follower:
            follower.open_feed()
            assert follower.sweep().brought == 0
            follower.round()
            follower.finish()
        found = verify(made, name, shards.source)
        assert found.ok
        assert found.compared == made.keys_from(name)
        assert found.bound == 0
    for name in made.sources:
        cleaned = cleanup(made, name, shards.source, fence=3)
        assert cleaned.removed == made.keys_from(name)
        assert cleaned.kept == 0
    for number in range(4):
        here = expected(wanted, new, number) if number in after else {}
        assert held(shards, number) == here


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(
            shard_set(range(3), place=Rendezvous),
            shard_set(range(3), place=Rendezvous, weights={0: 3.0}),
            id="rendezvous: changed weights",
        ),
        pytest.param(
            shard_set(range(3), weights={0: 2.0}), shard_set(range(3)), id="ring: changed weights"
        ),
        pytest.param(
            shard_set(range(2), place=Jump), shard_set(range(4), place=Jump), id="jump: 2 to 4"
        ),
        pytest.param(
            shard_set(range(3)),
            ShardSet(
                "dedup",
                "redis",
                b"dedup:",
                THREE.placement,
                {"shard-0": "c0", "shard-1": "c3", "shard-2": "c2"},
            ),
            id="a replaced shard",
        ),
        pytest.param(shard_set([0, 1]), shard_set([2, 3]), id="all replaced"),
        pytest.param(
            shard_set(range(3)), shard_set(range(3), place=Rendezvous), id="another placement"
        ),
    ],
)
def test_any_change_of_the_set_moves_what_it_must_and_back_again(
    shards: Shards, old: ShardSet, new: ShardSet
) -> None:
    wanted = fill(shards, old, 3000)
    made = plan(old, new, shards.source)
    move_all(made, shards)
    for name in made.sources:
        assert verify(made, name, shards.source).ok
    for name in made.sources:
        assert cleanup(made, name, shards.source, fence=2).kept == 0
    everything = [held(shards, number) for number in range(4)]
    assert sum(map(len, everything)) == len(wanted)
    for key in wanted:
        number = int(new.connections[new.owner(key)][1:])
        assert everything[number][key] == wanted[key]

    back = made.turned()
    move_all(back, shards, 3)
    for name in back.sources:
        assert verify(back, name, shards.source).ok
        cleanup(back, name, shards.source, fence=4)
    for number in range(4):
        assert held(shards, number) == (
            expected(wanted, old, number) if f"shard-{number}" in old.connections else {}
        )


def test_other_types_and_other_peoples_keys(shards: Shards) -> None:
    """Types that are no strings arrive too; a key without the prefix is nobody's business."""
    names = [b"dedup:type-%d" % n for n in range(400)]
    expires = int(time.time() * 1000) + 3_600_000
    for key in names:
        with shards.client(int(THREE.owner(key)[-1])) as client:
            number = int(key.rpartition(b"-")[2])
            match number % 4:
                case 0:
                    client.sadd(key, *(f"m{n}" for n in range(200)))
                case 1:
                    client.hset(key, mapping={f"f{n}": n for n in range(200)})
                case 2:
                    client.zadd(key, {"a": 1.5, "b": 2})
                case 3:
                    client.xadd(key, {"a": 1})
            client.pexpireat(key, expires + number)
    for number in range(4):
        with shards.client(number) as client:
            client.set("other", number)
    made = plan(THREE, FOUR, shards.source)
    move_all(made, shards)
    for name in made.sources:
        assert verify(made, name, shards.source).ok
        assert cleanup(made, name, shards.source, fence=2).kept == 0
    with shards.client(3) as client:
        moved = [key for key in names if FOUR.owner(key) == "shard-3"]
        assert len(moved) > 50
        for key in moved:
            assert client.pexpiretime(key) == expires + int(key.rpartition(b"-")[2])
            assert client.type(key) != b"none"
        sets = [key for key in moved if int(key.rpartition(b"-")[2]) % 4 == 0]
        assert all(client.scard(key) == 200 for key in sets)
    for number in range(4):
        with shards.client(number) as client:
            assert client.get("other") == b"%d" % number


# --- while clients write ----------------------------------------------------------------------


class Writers:
    """Threads that change values, expiries, and existence of keys at their old owners."""

    def __init__(self, shards: Shards, owners: ShardSet, count: int) -> None:
        self._shards = shards
        self._owners = owners
        self._count = count
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=(n,)) for n in range(2)]
        self.written = 0

    def __enter__(self) -> Self:
        for one in self._threads:
            one.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop.set()
        for one in self._threads:
            one.join()

    def _write(self, seed: int) -> None:
        chance = random.Random(seed)
        clients = [self._shards.client(number) for number in range(3)]
        while not self._stop.is_set():
            key = b"dedup:id-%d" % chance.randrange(self._count + 500)
            client = clients[int(self._owners.owner(key)[-1])]
            match chance.randrange(6):
                case 0:
                    client.delete(key)
                case 1:
                    client.pexpire(key, 3_600_000)
                case 2:
                    client.persist(key)
                case 3:
                    client.set(key, b"new-%d" % self.written, px=chance.choice([30, 3_600_000]))
                case 4:
                    client.set(key, b"newer-%d" % self.written)
                case 5:
                    client.set(key, b"claim-%d" % self.written, px=3_600_000, nx=True)
            self.written += 1
        for client in clients:
            client.close()


def test_writers_during_everything_are_followed_to_the_last_change(shards: Shards) -> None:
    fill(shards, THREE, 4000)
    made = plan(THREE, FOUR, shards.source)
    with Writers(shards, THREE, 4000) as writers:
        move_all(made, shards)
        followers = [Follower(made, name, shards.source, fence=2) for name in made.sources]
        for one in followers:
            one.open_feed()
            one.sweep()
        until = time.monotonic() + 60
        for one in followers:
            while one.pending() > 500 and time.monotonic() < until:
                one.round()
            found = verify(made, one.shard, shards.source, follower=one)
            assert found.mismatches == 0, found.names[:3]
        assert writers.written > 50
        writers.stop()
        for one in followers:
            one.finish()
            one.close()
    time.sleep(0.1)  # the short expiries
    for name in made.sources:
        found = verify(made, name, shards.source)
        assert found.ok, found.names[:3]
        assert found.in_flight == 0
    at_old = {k: v for n in range(3) for k, v in held(shards, n).items()}
    assert held(shards, 3) == {
        key: one for key, one in at_old.items() if FOUR.owner(key) == "shard-3"
    }


def test_a_follower_repairs_what_the_requirements_incremental_copy_leaves_wrong(
    shards: Shards,
) -> None:
    """Overwritten, given another expiry, deleted, and new after they were copied."""
    wanted = fill(shards, THREE)
    made = plan(THREE, FOUR, shards.source)
    move_all(made, shards)
    moved = [key for key in wanted if FOUR.owner(key) == "shard-3"]
    for key in moved[:900]:
        with shards.client(int(THREE.owner(key)[-1])) as client:
            number = moved.index(key)
            if number < 300:
                client.set(key, b"overwritten", keepttl=True)
            elif number < 600:
                client.pexpire(key, 1_000_000)
            else:
                client.delete(key)
    wrong = sum(verify(made, name, shards.source).mismatches for name in made.sources)
    assert wrong == 900
    for name in made.sources:
        with Follower(made, name, shards.source, fence=2) as follower:
            follower.open_feed()
            follower.sweep()
        assert verify(made, name, shards.source).ok


def test_rounds_bring_what_changes_after_the_sweep(shards: Shards) -> None:
    wanted = fill(shards, THREE, 2000)
    made = plan(THREE, FOUR, shards.source)
    move_all(made, shards)
    moved = [key for key in wanted if made.moved("shard-0", [key])]
    with Follower(made, "shard-0", shards.source, fence=2) as follower:
        follower.open_feed()
        follower.sweep()
        with shards.client(0) as client:
            client.set(moved[0], b"changed")
            client.delete(moved[1])
            client.pexpire(moved[2], 500_000)
            stays = next(key for key in wanted if FOUR.owner(key) == "shard-0")
            client.set(stays, b"not moved")
        wait_until(lambda: follower.pending() == 3)
        assert follower.round().brought == 3
        with shards.client(3) as client:
            assert client.get(moved[0]) == b"changed"
            assert client.ttl(moved[0]) == -1
            assert not client.exists(moved[1])
            assert client.pttl(moved[2]) < 500_001
            assert not client.exists(stays)


def test_a_mirror_that_comes_late_is_removed_again(shards: Shards) -> None:
    """Its claim was released: the source says nothing any more, only the other side's feed does."""
    wanted = fill(shards, THREE, 500)
    made = plan(THREE, FOUR, shards.source)
    moved = [key for key in wanted if made.moved("shard-1", [key])]
    with shards.client(1) as client:
        client.delete(moved[0])
    move_all(made, shards)
    with Follower(made, "shard-1", shards.source, fence=2) as follower:
        follower.open_feed()
        follower.sweep()
        with shards.client(3) as client:
            client.set(moved[0], b"released-token", px=60_000)
            follower.finish()
            assert not client.exists(moved[0])


def test_finishing_ends_though_claims_go_on(shards: Shards) -> None:
    """In `switching` claims are written at both owners all the time."""
    fill(shards, THREE, 500)
    made = plan(THREE, FOUR, shards.source)
    move_all(made, shards)
    stop = threading.Event()

    def claim() -> None:
        old, new = shards.client(0), shards.client(3)
        number = 0
        while not stop.is_set():
            key = b"dedup:live-%d" % number
            number += 1
            if made.moved("shard-0", [key]):
                old.set(key, b"mine", px=600_000, nx=True)
                new.set(key, b"mine", pxat=old.pexpiretime(key), nx=True)
        old.close()
        new.close()

    claims = threading.Thread(target=claim)
    with Follower(made, "shard-0", shards.source, fence=2) as follower:
        follower.open_feed()
        follower.sweep()
        claims.start()
        try:
            time.sleep(0.3)
            follower.finish()
        finally:
            stop.set()
            claims.join()
    assert verify(made, "shard-0", shards.source).ok


@pytest.mark.parametrize("meanwhile", ["claimed", "released", "taken over"])
def test_what_changes_between_the_last_read_and_its_write_is_not_undone(
    shards: Shards, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    """`finish` has read a key at the source; it changes there before the write gets through."""
    made = plan(THREE, FOUR, shards.source)
    key = next(
        one for one in (b"dedup:%d" % n for n in range(1000)) if made.moved("shard-0", [one])
    )
    old, new = shards.client(0), shards.client(3)
    with Follower(made, "shard-0", shards.source, fence=1) as follower:
        follower.open_feed()
        follower.sweep()
        if meanwhile == "claimed":
            new.set(key, b"left over")  # so that finish removes it
        else:
            old.set(key, b"first", px=600_000)
        write, writes = Lanes.write, []

        def late(lanes: Lanes, *arguments: Any, **how: Any) -> None:
            if not writes:
                match meanwhile:
                    case "claimed":
                        assert old.set(key, b"second", px=600_000, nx=True)
                        new.set(key, b"second", nx=True)
                    case "released":
                        new.delete(key)
                        old.delete(key)
                        new.delete(key)
                    case "taken over":
                        old.set(key, b"second", px=500_000)
            writes.append(arguments)
            write(lanes, *arguments, **how)

        monkeypatch.setattr(Lanes, "write", late)
        follower.finish()
    assert writes
    assert new.get(key) == old.get(key) == (None if meanwhile == "released" else b"second")
    assert new.pexpiretime(key) == old.pexpiretime(key)
    old.close()
    new.close()


def test_a_source_that_came_back_empty_is_not_followed(shards: Shards) -> None:
    fill(shards, THREE)
    made = plan(THREE, FOUR, shards.source)
    move_all(made, shards)
    before = held(shards, 3)
    with shards.client(0) as client:
        client.flushall()
    with Follower(made, "shard-0", shards.source, fence=2) as follower:
        follower.open_feed()
        limit = "follower._FEW"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"cellferry.shards.{limit}", 100)
            with pytest.raises(Blocked, match="lost its data"):
                follower.sweep()
    assert held(shards, 3) == before


def test_a_lost_feed_is_told(shards: Shards) -> None:
    fill(shards, THREE, 200)
    made = plan(THREE, FOUR, shards.source)
    with Follower(made, "shard-0", shards.source, fence=1) as follower:
        follower.open_feed()
        follower.sweep()
        kill(shards, 0, "cellferry:shards:follow")
        with pytest.raises(TransientError, match="change feed was lost"):
            wait_until(lambda: follower.pending() < 0)
        with pytest.raises(TransientError, match="change feed was lost"):
            follower.finish()


# --- killed and resumed -----------------------------------------------------------------------


def test_a_stopped_copy_goes_on_where_it_was(shards: Shards, tmp_path: Path) -> None:
    wanted = fill(shards, THREE, 9000)
    made = plan(THREE, FOUR, shards.source)
    points = FileCheckpoints(tmp_path / "points")
    stops = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cellferry.shards.copier._SAVE_EVERY_S", 0.0)
        patch.setattr("cellferry.shards.copier._PAGE_KEYS", 100)
        for name in made.sources:
            for budget in (9, 9, None):
                try:
                    result = copy(
                        made, name, shards.source, fence=1, checkpoints=points, check=fuse(budget)
                    )
                except KeyboardInterrupt:
                    stops += 1
            assert result.resumed
            # at most what was under way is sent again
            assert result.sent < made.keys_from(name)
            assert result.keys >= made.keys_from(name)
    assert stops == 6
    for name in made.sources:
        assert verify(made, name, shards.source).ok
    assert held(shards, 3) == expected(wanted, FOUR, 3)
    again = copy(made, "shard-0", shards.source, fence=1, checkpoints=points)
    assert again.sent == 0


def test_a_copier_that_is_killed_again_and_again_goes_on(shards: Shards, tmp_path: Path) -> None:
    """SIGKILL in a process of its own, wherever it happens to be."""
    wanted = fill(shards, THREE, 12_000)
    made = plan(THREE, FOUR, shards.source)
    folder = tmp_path / "points"
    urls = {f"c{number}": server.url() for number, server in enumerate(shards.servers)}
    context = get_context("spawn")
    kills = 0
    for name in made.sources:
        for _ in range(2):
            copier = context.Process(
                target=slow_copy, args=(made.document(), name, urls, folder, 1500.0)
            )
            copier.start()
            saved = folder / f"{name.replace('-', '_')}-to-shard_3-*.json"
            before = read(saved)
            wait_until(lambda: read(saved) != before or not copier.is_alive())  # noqa: B023
            kills += copier.is_alive()
            copier.kill()
            copier.join()
        result = copy(made, name, shards.source, fence=1, checkpoints=FileCheckpoints(folder))
        assert result.resumed
    assert kills > 0
    for name in made.sources:
        assert verify(made, name, shards.source).ok
    assert held(shards, 3) == expected(wanted, FOUR, 3)


def slow_copy(
    document: dict[str, Any], name: str, urls: dict[str, str], folder: Path, rate: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cellferry.shards.copier._SAVE_EVERY_S", 0.0)
        patch.setattr("cellferry.shards.copier._PAGE_KEYS", 100)
        copy(
            Plan.from_document(document),
            name,
            urls.get,
            fence=1,
            checkpoints=FileCheckpoints(folder),
            throttle=Throttle(rate),
        )


def read(pattern: Path) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in pattern.parent.glob(pattern.name)]


def test_a_checkpoint_of_another_plan_is_refused(shards: Shards, tmp_path: Path) -> None:
    fill(shards, THREE, 300)
    points = FileCheckpoints(tmp_path)
    copy(plan(THREE, FOUR, shards.source), "shard-0", shards.source, fence=1, checkpoints=points)
    heavier = shard_set(range(4), weights={3: 2.0})
    other = plan(THREE, heavier, shards.source)
    with pytest.raises(InvalidInput, match="checkpoint is one of another plan"):
        copy(other, "shard-0", shards.source, fence=1, checkpoints=points)
    with pytest.raises(InvalidInput, match="checkpoint is one of another plan"):
        copy(other.turned(), "shard-3", shards.source, fence=1, checkpoints=_Renamed(points))


class _Renamed:
    def __init__(self, points: FileCheckpoints) -> None:
        self._points = points

    def load(self, pair: tuple[str, str]) -> object:
        return self._points.load(("shard-0", "shard-3"))

    def save(self, pair: tuple[str, str], checkpoint: object) -> None:
        raise AssertionError("nothing may be saved")


def test_after_a_restart_of_the_source_the_scan_begins_anew(
    own_valkey: Callable[..., object], shards: Shards, tmp_path: Path
) -> None:
    """Its cursor means nothing to the new process."""
    server = own_valkey()
    mine = Shards([server, *shards.servers[1:]])  # type: ignore[list-item]
    fill(mine, THREE, 3000)
    made = plan(THREE, FOUR, mine.source)
    points = FileCheckpoints(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cellferry.shards.copier._SAVE_EVERY_S", 0.0)
        patch.setattr("cellferry.shards.copier._PAGE_KEYS", 100)
        with pytest.raises(KeyboardInterrupt):
            copy(made, "shard-0", mine.source, fence=1, checkpoints=points, check=fuse(9))
        assert points.load(("shard-0", "shard-3")) is not None
        server.stop()  # type: ignore[attr-defined]
        server.start()  # type: ignore[attr-defined]
        result = copy(made, "shard-0", mine.source, fence=1, checkpoints=points)
    assert not result.resumed
    assert result.sent == made.keys_from("shard-0")
    assert verify(made, "shard-0", mine.source).ok


# --- one writer -------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
def test_a_copier_that_was_stopped_writes_no_more_when_a_newer_step_has_begun(
    shards: Shards, turned: bool
) -> None:
    """Also when the newer step goes the other way."""
    fill(shards, THREE, 300)
    made = plan(THREE, FOUR, shards.source)
    old = Lanes(made, "shard-0", shards.source, fence=5)
    newer = made.turned() if turned else made
    shard = "shard-3" if turned else "shard-0"
    with Follower(newer, shard, shards.source, fence=6):
        old.targets["shard-3"].put([b"dedup:late"], [Record(b"late")])
        with pytest.raises(Unreachable):
            old.targets["shard-3"].settle()
        with pytest.raises(LeaseLost, match="newer step"):
            Lanes(made, "shard-0", shards.source, fence=5)
    with pytest.raises(LeaseLost, match="newer step"):
        copy(made, "shard-0", shards.source, fence=5)
    with shards.client(3) as client:
        assert not client.exists("dedup:late")
    old.close()


def test_a_clean_up_that_was_stopped_removes_nothing_after_a_roll_back_has_begun(
    shards: Shards,
) -> None:
    wanted = fill(shards, THREE, 300)
    made = plan(THREE, FOUR, shards.source)
    move_all(made, shards)
    stopped = open_side(THREE, "shard-0", shards.source)
    stopped.take_over(made.lane("shard-0", "shard-3"), 2, writes=True)
    with Follower(made.turned(), "shard-3", shards.source, fence=3):
        moved = [key for key in wanted if made.moved("shard-0", [key])]
        with pytest.raises(Unreachable):
            stopped.remove(moved)
        with shards.client(0) as client:
            assert client.exists(*moved) == len(moved)
    stopped.close()


def test_copies_of_several_sources_do_not_end_each_other(shards: Shards) -> None:
    made = plan(THREE, FOUR, shards.source)
    both = [Lanes(made, name, shards.source, fence=7) for name in made.sources]
    for number, one in enumerate(both):
        one.targets["shard-3"].put([b"dedup:%d" % number], [Record(b"here")])
        one.targets["shard-3"].settle()
        one.close()
    with shards.client(3) as client:
        assert client.exists(*(f"dedup:{number}" for number in range(3))) == 3


# --- verify and clean-up ----------------------------------------------------------------------


def test_verify_names_what_is_wrong(shards: Shards) -> None:
    wanted = fill(shards, THREE, 2000)
    made = plan(THREE, FOUR, shards.source)
    move_all(made, shards)
    mine = [key for key in wanted if made.moved("shard-0", [key])]
    extra = next(
        key for key in (b"dedup:extra-%d" % n for n in range(1000)) if made.moved("shard-0", [key])
    )
    with shards.client(3) as client:
        client.delete(mine[0])
        client.set(mine[1], b"x", keepttl=True)
        client.pexpireat(mine[2], int(time.time() * 1000) + 9_000_000)
        client.set(extra, b"nobody's")
    found = verify(made, "shard-0", shards.source)
    assert not found.ok
    assert {(one["key"].encode(), one["what"]) for one in found.names} == {
        (mine[0], "missing there"),
        (mine[1], "another value"),
        (mine[2], "another expiry"),
        (extra, "only there"),
    }
    assert found.mismatches == 4
    assert verify(made, "shard-1", shards.source).ok


def test_one_millisecond_of_an_expiry_is_a_mismatch(shards: Shards) -> None:
    wanted = fill(shards, THREE, 200)
    made = plan(THREE, FOUR, shards.source)
    move_all(made, shards)
    key = next(k for k in wanted if made.moved("shard-0", [k]) and wanted[k][1] > 0)
    with shards.client(3) as client:
        client.pexpireat(key, wanted[key][1] + 1)
    assert [one["what"] for one in verify(made, "shard-0", shards.source).names] == [
        "another expiry"
    ]


def test_a_sample_says_what_it_is_worth(shards: Shards) -> None:
    fill(shards, THREE, 6000)
    made = plan(THREE, FOUR, shards.source)
    move_all(made, shards)
    found = verify(made, "shard-0", shards.source, sample=100)
    assert found.compared == 100
    assert found.total == made.keys_from("shard-0")
    assert found.bound == pytest.approx(1 - 0.05 ** (1 / 100), rel=1e-6)
    with pytest.raises(InvalidInput, match="sample of 0"):
        verify(made, "shard-0", shards.source, sample=0)


def test_clean_up_keeps_what_the_new_owner_does_not_have(shards: Shards) -> None:
    wanted = fill(shards, THREE, 2000)
    made = plan(THREE, FOUR, shards.source)
    move_all(made, shards)
    mine = [key for key in wanted if made.moved("shard-0", [key])]
    stay = {key for key in wanted if FOUR.owner(key) == THREE.owner(key) == "shard-0"}
    with shards.client(3) as client:
        client.delete(*mine[:3])
    told: list[Moved] = []
    cleaned = cleanup(made, "shard-0", shards.source, fence=2, batch=10, progress=told.append)
    assert cleaned.kept == 3
    assert {name.encode() for name in cleaned.kept_names} == set(mine[:3])
    assert cleaned.removed == len(mine) - 3
    assert set(held(shards, 0)) == stay | set(mine[:3])
    assert told[-1].done == cleaned.removed
    again = cleanup(made, "shard-0", shards.source, fence=3)
    assert (again.removed, again.kept) == (0, 3)
    forced = cleanup(made, "shard-0", shards.source, fence=4, delete_kept=True)
    assert (forced.deleted, forced.kept) == (3, 0)
    assert set(held(shards, 0)) == stay


def test_clean_up_does_not_delete_the_last_copies_of_what_a_shard_has_lost(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(shards, THREE, 2000)
    made = plan(THREE, FOUR, shards.source)
    before = held(shards, 0)
    monkeypatch.setattr("cellferry.shards.cleanup._FEW", 50)
    with pytest.raises(Blocked, match="last copies"):
        cleanup(made, "shard-0", shards.source, fence=1, delete_kept=True)
    assert held(shards, 0) == before


# --- pace -------------------------------------------------------------------------------------


def test_the_throttle_counts_moved_keys(shards: Shards) -> None:
    """Never faster than it says; how near it comes is the benchmark's."""
    fill(shards, THREE, 3000)
    made = plan(THREE, FOUR, shards.source)
    began = time.monotonic()
    result = copy(made, "shard-0", shards.source, fence=1, throttle=Throttle(500))
    took = time.monotonic() - began
    assert result.sent == made.keys_from("shard-0")
    assert took > (result.sent - 60) / 500


def test_a_rate_is_shared_by_what_each_source_has_to_move(shards: Shards) -> None:
    fill(shards, THREE, 3000)
    made = plan(THREE, FOUR, shards.source)
    parts = shares(made, 1000.0)
    assert sum(one or 0 for one in parts.values()) == pytest.approx(1000)
    for name, part in parts.items():
        assert part == pytest.approx(1000 * made.keys_from(name) / made.keys_to_move)
    assert set(shares(made, None).values()) == {None}


def test_large_values_go_in_small_batches(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(shards, THREE, 4000)
    with shards.client(0) as client:
        for key in client.scan_iter(count=5000):
            client.set(key, key * 60)
    made = plan(THREE, FOUR, shards.source)
    sizes: list[int] = []
    write = Lanes.write

    def measured(
        lanes: Lanes, name: str, keys: list[bytes], records: list[Any], **how: Any
    ) -> None:
        sizes.append(sum(len(one.value) for one in records))
        write(lanes, name, keys, records, **how)

    monkeypatch.setattr(Lanes, "write", measured)
    monkeypatch.setattr("cellferry.shards.lanes.BATCH_BYTES", 30_000)
    copy(made, "shard-0", shards.source, fence=1)
    assert sizes[0] > 30_000
    assert max(sizes[4:]) < 30_000
    assert verify(made, "shard-0", shards.source).ok


# --- inside -----------------------------------------------------------------------------------


def fuse(budget: int | None) -> Callable[[], None]:
    """A check that ends the work after `budget` batches."""
    left = iter(range(budget)) if budget is not None else None

    def check() -> None:
        if left is not None and next(left, None) is None:
            raise KeyboardInterrupt

    return check


def wait_until(true: Callable[[], bool], seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def kill(shards: Shards, number: int, beginning: str) -> None:
    with shards.client(number) as client:
        for one in client.client_list():
            if one["name"].startswith(beginning):
                client.client_kill_filter(_id=one["id"])
