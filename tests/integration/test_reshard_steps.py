"""Steps of a re-sharding, killed where it hurts and repeated, while clients go on.

The clients keep ledgers; the checker, which shares no code with the mover, decides in the end.
"""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from cellferry.errors import (
    Blocked,
    Breached,
    CellferryError,
    InvalidInput,
    TransientError,
    VerificationFailed,
    WrongState,
)
from cellferry.local.dedup_checker import Seeds, Verdict, check, seed
from cellferry.local.dedup_traffic import DedupClient, Recorder, Spec
from cellferry.local.postgres_server import PostgresServer
from cellferry.shards import points, reshard, switching
from cellferry.shards.client import ShardedStore
from cellferry.shards.context import Context
from cellferry.shards.follower import Follower
from cellferry.shards.points import Point
from cellferry.shards.report import status
from cellferry.shards.states import ShardState
from cellferry.shards.watch import Limits
from fixtures.patience import be_patient
from fixtures.shards import ACTOR, ShardWorld, ring

PAUSE_S = 120.0
THREE, FOUR = [f"shard-{n}" for n in range(3)], [f"shard-{n}" for n in range(4)]


class Crowd:
    """Some clients that work in threads, each with its store and its ledger."""

    def __init__(self, world: ShardWorld, folder: Path, *, clients: int = 3) -> None:
        self.world = world
        self.seeds = Seeds(2_000, round(time.time() * 1000))
        self.shards = {f"shard-{n}": world.urls[f"dedup-{n}"] for n in range(4)}
        seed(self.seeds, self.shards, THREE)
        self.ledgers = [folder / f"client-{n}.jsonl" for n in range(clients)]
        self._stores: list[ShardedStore] = []
        self._clients: list[DedupClient] = []
        self._threads: list[threading.Thread] = []
        begin = time.time()
        for number, ledger in enumerate(self.ledgers):
            spec = Spec(
                set_name="dedup",
                topology="",
                ledger=str(ledger),
                number=number,
                clients=clients,
                ids_per_s=60,
                seeded=self.seeds.count,
                begin=begin,
                lease_s=3.0,
            )
            store = world.store(f"client-{number}", lease_s=3.0, patience_s=40.0)
            client = DedupClient(store, spec, Recorder(ledger))
            thread = threading.Thread(target=client.run, daemon=True)
            self._stores.append(store)
            self._clients.append(client)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Let every client end what it does, and leave."""
        for client in self._clients:
            client.stop()
        for thread in self._threads:
            thread.join(60)
        for store in self._stores:
            store.close()
        self._clients.clear()

    def verdict(self, *, before: Sequence[str], now: Sequence[str], is_clean: bool) -> Verdict:
        """Stop, and compare everything."""
        self.stop()
        return check(
            self.ledgers,
            self.seeds,
            shards=self.shards,
            before=before,
            now=now,
            is_clean=is_clean,
        )


@pytest.fixture
def crowd(shard_world: ShardWorld, tmp_path: Path) -> Iterator[Crowd]:
    crowd = Crowd(shard_world, tmp_path)
    yield crowd
    crowd.stop()


@pytest.fixture
def at(shard_world: ShardWorld) -> Iterator[Context]:
    with Context(shard_world.url, shard_world.urls.get, ACTOR) as at:
        yield at


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a pause take its time on a machine that stands still, unless a test is about that."""
    for step in (reshard.cutover, reshard.roll_back):
        monkeypatch.setitem(step.__kwdefaults__, "pause_s", PAUSE_S)


def begin(at: Context, count: int = 4, ttl_s: float = 0, kind: str = "redis") -> int:
    return reshard.begin(at, reshard.plan(at, ring(count, kind)), ttl_s=ttl_s).id


def up_to_verify(at: Context, id_: int) -> None:
    for shard in ("shard-0", "shard-1", "shard-2"):
        reshard.copy(at, id_, shard)
    reshard.dual_write(at, id_)
    reshard.catch_up(at, id_)
    reshard.verify(at, id_)


def act(
    world: ShardWorld,
    step: str,
    *arguments: Any,
    kill_at: Point | None = None,
    has_warden: bool = True,
    **named: Any,
) -> int:
    """Do a step in a process of its own; return its exit code."""
    if step in {"cutover", "roll_back"}:
        named = {"pause_s": PAUSE_S, **named}
    process = get_context("spawn").Process(
        target=_act,
        args=(world.url, dict(world.urls), step, arguments, named, kill_at, has_warden),
    )
    process.start()
    process.join(200)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    assert code is not None, f"{step} hangs"
    return code


class NoWarden:
    """Does nothing, as a warden whose machine is gone."""

    def watch(self, limit_s: float) -> None: ...
    def dismiss(self) -> None: ...


def _act(
    url: str,
    urls: dict[str, str],
    step: str,
    arguments: Any,
    named: Any,
    kill_at: Point | None,
    has_warden: bool,
) -> None:
    def reached(point: Point) -> None:
        if point is kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    be_patient(pytest.MonkeyPatch())
    points.listen(reached)
    if not has_warden:
        switching._warden = lambda *_: nullcontext(NoWarden())  # type: ignore[assignment]
    with Context(url, urls.get, ACTOR) as at:
        id_ = at.live("dedup").id
        getattr(reshard, step)(at, id_, *arguments, **named)


def killed_and_repeated(
    world: ShardWorld, step: str, *arguments: Any, at_points: Sequence[Point], **named: Any
) -> None:
    for point in at_points:
        assert act(world, step, *arguments, kill_at=point, **named) == -signal.SIGKILL, point
        if point in PAUSED:
            wait_for_the_warden(world)
    if world.control.live("dedup") is not None:
        assert act(world, step, *arguments, **named) == 0


PAUSED = {
    Point.SWITCHING_SET,
    Point.SWITCHING_ACKNOWLEDGED,
    Point.LAST_BROUGHT,
}


def wait_for_the_warden(world: ShardWorld) -> None:
    """Nobody repeats the step, and values are served again all the same."""
    deadline = time.monotonic() + 90
    while (one := world.control.live("dedup")) and one.state is ShardState.SWITCHING:
        assert time.monotonic() < deadline, "nobody went back"
        time.sleep(0.02)


def assert_all_well(verdict: Verdict, *, is_clean: bool = True) -> None:
    assert (verdict.duplicates, verdict.wrongly_refused, verdict.mismatches) == (0, 0, 0), verdict
    assert (verdict.unknown, verdict.undecided) == (0, 0), verdict
    assert not is_clean or verdict.left_behind == 0
    assert verdict.accepted > 50
    assert verdict.refused > 50


SWITCH = (
    Point.FEEDS_OPENED,
    Point.SWEPT,
    Point.SWITCHING_SET,
    Point.SWITCHING_ACKNOWLEDGED,
    Point.LAST_BROUGHT,
    Point.SWITCHED,
)


def test_every_step_before_the_cutover_may_be_killed_and_repeated(
    shard_world: ShardWorld, crowd: Crowd, at: Context
) -> None:
    begin(at)
    killed_and_repeated(shard_world, "copy", "shard-0", at_points=[Point.COPY_BEGUN, Point.COPIED])
    assert act(shard_world, "copy_all") == 0
    killed_and_repeated(shard_world, "dual_write", at_points=[Point.DUAL_SET])
    killed_and_repeated(shard_world, "catch_up", at_points=[Point.FEEDS_OPENED, Point.CAUGHT_UP])
    killed_and_repeated(shard_world, "verify", at_points=[Point.VERIFIED])
    for _ in reshard.run_on(at, at.live("dedup").id, watch_s=0):
        pass
    assert_all_well(crowd.verdict(before=THREE, now=FOUR, is_clean=False), is_clean=False)


def test_the_cutover_and_what_follows_may_be_killed_and_repeated(
    shard_world: ShardWorld, crowd: Crowd, at: Context
) -> None:
    up_to_verify(at, begin(at))
    killed_and_repeated(shard_world, "cutover", at_points=SWITCH)
    assert shard_world.control.live("dedup").state is ShardState.DUAL_READ_NEW
    killed_and_repeated(shard_world, "watch", at_points=[Point.WATCHED, Point.NEW_SET], seconds=0.5)
    killed_and_repeated(
        shard_world, "cleanup", at_points=[Point.CLEANED_ONE, Point.CLEANED], delete_kept=True
    )
    assert shard_world.control.live("dedup") is None
    assert shard_world.control.reshardings("dedup")[0].ended == "completed"
    verdict = crowd.verdict(before=THREE, now=FOUR, is_clean=True)
    assert_all_well(verdict)
    assert verdict.moved > crowd.seeds.count / 5


def test_a_roll_back_killed_and_repeated_loses_nothing(
    shard_world: ShardWorld, crowd: Crowd, at: Context
) -> None:
    id_ = begin(at)
    up_to_verify(at, id_)
    reshard.cutover(at, id_)
    time.sleep(1)
    reshard.watch(at, id_, seconds=0.5)
    time.sleep(1)  # clients write at the new owners alone
    killed_and_repeated(
        shard_world,
        "roll_back",
        "it was slow",
        at_points=[Point.WAY_BACK_BEGUN, *SWITCH, Point.OLD_SET],
    )
    assert at.live("dedup").state is ShardState.OLD
    time.sleep(0.5)
    killed_and_repeated(shard_world, "cleanup", at_points=[Point.CLEANED_ONE, Point.CLEANED])
    assert shard_world.control.reshardings("dedup")[0].ended == "rolled_back"
    verdict = crowd.verdict(before=FOUR, now=THREE, is_clean=True)
    assert_all_well(verdict)


def test_there_and_back_and_there_again(shard_world: ShardWorld, crowd: Crowd, at: Context) -> None:
    """The same re-sharding: a roll-back does not end it."""
    id_ = begin(at)
    up_to_verify(at, id_)
    reshard.cutover(at, id_)
    time.sleep(0.5)
    reshard.roll_back(at, id_, "a doubt")
    time.sleep(0.5)
    reshard.dual_write(at, id_)
    reshard.verify(at, id_)
    reshard.cutover(at, id_)
    reshard.watch(at, id_, seconds=0.2)
    reshard.cleanup(at, id_, delete_kept=True)
    assert_all_well(crowd.verdict(before=THREE, now=FOUR, is_clean=True))


def test_four_shards_become_three_and_the_set_is_the_new_one(
    shard_world: ShardWorld, crowd: Crowd, at: Context
) -> None:
    up = begin(at)
    for _ in reshard.run_on(at, up, watch_s=0.2):
        pass
    reshard.cleanup(at, up, delete_kept=True)
    down = begin(at, 3)
    for _ in reshard.run_on(at, down, watch_s=0.2):
        pass
    reshard.cleanup(at, down, delete_kept=True)
    assert tuple(shard_world.control.set("dedup").connections) == tuple(THREE)
    assert_all_well(crowd.verdict(before=FOUR, now=THREE, is_clean=True))


@pytest.mark.parametrize("point", [Point.SWITCHING_SET, Point.LAST_BROUGHT])
def test_whatever_step_comes_next_leaves_the_pause_of_a_dead_machine(
    shard_world: ShardWorld, crowd: Crowd, at: Context, point: Point
) -> None:
    id_ = begin(at)
    up_to_verify(at, id_)
    assert act(shard_world, "cutover", kill_at=point, has_warden=False) == -signal.SIGKILL
    time.sleep(0.5)
    assert at.live("dedup").state is ShardState.SWITCHING
    reshard.cutover(at, id_)
    time.sleep(0.5)
    killed = act(shard_world, "roll_back", "why not", kill_at=point, has_warden=False)
    assert killed == -signal.SIGKILL
    assert at.live("dedup").state is ShardState.SWITCHING
    reshard.verify(at, id_)
    assert at.live("dedup").state is ShardState.DUAL_READ_NEW
    reshard.roll_back(at, id_, "why not")
    reshard.cleanup(at, id_)
    assert_all_well(crowd.verdict(before=FOUR, now=THREE, is_clean=True))


def test_an_abort_removes_the_copies(shard_world: ShardWorld, crowd: Crowd, at: Context) -> None:
    id_ = begin(at)
    up_to_verify(at, id_)
    killed_and_repeated(shard_world, "abort", "not today", at_points=[Point.OLD_SET, Point.CLEANED])
    assert shard_world.control.reshardings("dedup")[0].ended == "aborted"
    assert_all_well(crowd.verdict(before=FOUR, now=THREE, is_clean=True))
    with shard_world.shard("dedup-3") as added:
        assert not list(added.scan_iter("dedup:*"))


def test_what_fails_in_the_pause_goes_back(
    shard_world: ShardWorld, crowd: Crowd, at: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    id_ = begin(at)
    up_to_verify(at, id_)

    def fails(_: Follower) -> None:
        raise TransientError("the feed was lost")

    with monkeypatch.context() as broken:
        broken.setattr(Follower, "finish", fails)
        with pytest.raises(TransientError, match="feed was lost"):
            reshard.cutover(at, id_)
    assert at.live("dedup").state is ShardState.DUAL_READ_OLD
    time.sleep(0.5)
    reshard.cutover(at, id_)
    assert at.live("dedup").state is ShardState.DUAL_READ_NEW
    assert_all_well(crowd.verdict(before=THREE, now=FOUR, is_clean=False), is_clean=False)


def test_a_pause_that_is_too_long_goes_back(
    shard_world: ShardWorld, at: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    id_ = begin(at)
    up_to_verify(at, id_)
    monkeypatch.setattr(switching, "_warden", lambda *_: nullcontext(NoWarden()))
    with shard_world.store() as store:
        with pytest.raises(TransientError, match="longer than values"):
            reshard.cutover(at, id_, pause_s=0)
        store.set(b"a", b"1")  # served again
    assert at.live("dedup").state is ShardState.DUAL_READ_OLD


def test_the_check_list_stops_a_cutover(shard_world: ShardWorld, at: Context) -> None:
    id_ = begin(at)
    by_name = {one.name: one for one in reshard.check(at, id_)}
    assert {name for name, one in by_name.items() if not one.ok} == {
        "Keys copied",
        "Dual-write active",
        "No mismatch",
    }
    assert by_name["Keys copied"].detail == "0 of 3 sources"
    with pytest.raises(WrongState, match="in state old, and cutover needs dual_write_read_old"):
        reshard.cutover(at, id_)
    reshard.dual_write(at, id_)
    with pytest.raises(Blocked, match="Keys copied: 0 of 3 sources; No mismatch: not everything"):
        reshard.cutover(at, id_)
    assert at.live("dedup").state is ShardState.DUAL_READ_OLD


def test_a_full_or_evicting_shard_stops_a_cutover(shard_world: ShardWorld, at: Context) -> None:
    id_ = begin(at)
    up_to_verify(at, id_)
    assert all(one.ok for one in reshard.check(at, id_))
    with shard_world.shard("dedup-3") as added:
        added.config_set("maxmemory", "1gb")
        added.config_set("maxmemory-policy", "allkeys-lru")
        try:
            with pytest.raises(Blocked, match="shard-3 evicts by allkeys-lru"):
                reshard.cutover(at, id_)
        finally:
            added.config_set("maxmemory-policy", "noeviction")
            added.config_set("maxmemory", "0")


def test_a_key_that_differs_stops_the_verification(shard_world: ShardWorld, at: Context) -> None:
    """Of a key that the follower knows nothing of, written past every client."""
    (id_key,) = shard_world.moved_ids(1)
    with shard_world.store() as store:
        store.set(id_key, b"right")
    id_ = begin(at)
    up_to_verify(at, id_)
    with (
        wrong_after_the_sweep(shard_world, b"dedup:" + id_key),
        pytest.raises(VerificationFailed, match=r"1 of .* compared keys differ") as caught,
    ):
        reshard.verify(at, id_)
    assert "(another value)" in str(caught.value)
    assert not next(one for one in reshard.check(at, id_) if one.name == "No mismatch").ok
    reshard.verify(at, id_)  # which brings it over first


class wrong_after_the_sweep:  # noqa: N801 - a context manager
    """Overwrites a key at its new owner behind the follower's back, once it has swept."""

    def __init__(self, world: ShardWorld, key: bytes) -> None:
        self.world, self.key = world, key
        self.sweep, self.gather = Follower.sweep, Follower._gather

    def __enter__(self) -> None:
        world, key, sweep = self.world, self.key, self.sweep

        def swept(follower: Follower) -> Any:
            figures = sweep(follower)
            with world.shard("dedup-3") as added:
                added.set(key, b"wrong")
            return figures

        def deaf(follower: Follower) -> None:
            follower._insist_on_feeds()

        Follower.sweep, Follower._gather = swept, deaf  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        Follower.sweep, Follower._gather = self.sweep, self.gather  # type: ignore[method-assign]


def test_worse_off_clients_stop_the_watch(
    shard_world: ShardWorld, crowd: Crowd, at: Context
) -> None:
    id_ = begin(at)
    up_to_verify(at, id_)
    until = time.monotonic() + 120
    while shard_world.control.figures("dedup").claims < 100:  # to compare with
        assert time.monotonic() < until
        time.sleep(0.1)
    reshard.cutover(at, id_)
    with pytest.raises(Breached, match="the hit ratio fell from") as caught:
        reshard.watch(at, id_, seconds=200, limits=Limits(hit_ratio_drop=-1.0, least_claims=20))
    assert "roll-back dedup" in str(caught.value.hint)
    assert at.live("dedup").state is ShardState.DUAL_READ_NEW
    reshard.roll_back(at, id_, "fewer hits")
    reshard.cleanup(at, id_)
    assert_all_well(crowd.verdict(before=FOUR, now=THREE, is_clean=True))


@pytest.mark.parametrize(
    ("step", "match"),
    [
        (lambda at, id_: reshard.roll_back(at, id_, " "), "to roll back needs a reason"),
        (lambda at, id_: reshard.abort(at, id_, ""), "to abort needs a reason"),
        (lambda at, id_: reshard.roll_back(at, id_, "x"), "roll-back needs dual_write_read_new"),
        (lambda at, id_: reshard.watch(at, id_, seconds=1), "watch needs dual_write_read_new"),
        (lambda at, id_: reshard.cleanup(at, id_), "nothing to clean"),
        (lambda at, id_: reshard.copy(at, id_, "shard-9"), "nothing moves from shard 'shard-9'"),
        (lambda at, id_: reshard.catch_up(at, 99), "there is no re-sharding 99"),
    ],
)
def test_steps_out_of_order_are_refused(
    shard_world: ShardWorld, at: Context, step: Callable[[Context, int], Any], match: str
) -> None:
    id_ = begin(at)
    with pytest.raises(CellferryError, match=match):
        step(at, id_)


def test_after_the_cutover_it_is_too_late_to_abort_and_after_cleanup_to_roll_back(
    shard_world: ShardWorld, at: Context
) -> None:
    id_ = begin(at, ttl_s=3600)
    up_to_verify(at, id_)
    reshard.cutover(at, id_)
    with pytest.raises(WrongState, match="past its cutover"):
        reshard.abort(at, id_, "no")
    reshard.watch(at, id_, seconds=0)
    with pytest.raises(WrongState, match="the old copies are kept until"):
        reshard.cleanup(at, id_)
    assert act(shard_world, "cleanup", kill_at=Point.CLEANED_ONE, wait_s=0) == -signal.SIGKILL
    with pytest.raises(WrongState, match="clean-up has begun"):
        reshard.roll_back(at, id_, "too late")
    reshard.cleanup(at, id_, wait_s=0)
    with pytest.raises(InvalidInput, match="older than the set"):
        shard_world.control.begin("dedup", ring(3), {}, ACTOR, 0, planned_on=ring(3))


def test_the_status_says_what_comes_next(shard_world: ShardWorld, at: Context) -> None:
    def next_step() -> str:
        return status(at, "dedup").next

    assert "reshard plan" in next_step()
    id_ = begin(at)
    assert "reshard copy" in next_step()
    for shard in THREE:
        reshard.copy(at, id_, shard)
    assert "reshard dual-write" in next_step()
    reshard.dual_write(at, id_)
    assert "reshard catch-up" in next_step()
    reshard.catch_up(at, id_)
    assert "reshard verify" in next_step()
    reshard.verify(at, id_)
    assert "reshard cutover" in next_step()
    reshard.cutover(at, id_)
    assert "reshard watch" in next_step()
    reshard.watch(at, id_, seconds=0)
    assert "reshard cleanup" in next_step()
    reshard.cleanup(at, id_)
    assert "reshard plan" in next_step()


def test_postgres_shards_go_the_same_way(
    fresh_database: str, postgres_server: PostgresServer
) -> None:
    names = [f"shards_{secrets.token_hex(4)}_{number}" for number in range(4)]
    urls = {f"dedup-{n}": postgres_server.url(dbname=name) for n, name in enumerate(names)}
    with psycopg.connect(postgres_server.url(), autocommit=True) as server:
        for name in names:
            server.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            _re_shard_postgres(fresh_database, urls)
        finally:
            for name in names:
                server.execute(
                    sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name))
                )


def _re_shard_postgres(topology: str, urls: dict[str, str]) -> None:
    ids = [b"id-%d" % number for number in range(300)]
    with Context(topology, urls.get, ACTOR) as at:
        at.control.install()
        reshard.register(at, ring(3, "postgres"))
        with ShardedStore(topology, "dedup", urls.get, client_name="one", lease_s=5) as store:
            tokens = {one: store.claim(one, 3600).token for one in ids}
            store.increment(b"n", 3)
            id_ = begin(at, kind="postgres")
            up_to_verify(at, id_)
            store.increment(b"n", 4)
            assert store.release(ids[0], tokens[ids[0]])
            reshard.cutover(at, id_)
            assert [store.claim(one, 3600).accepted for one in ids] == [True] + [False] * 299
            assert store.increment(b"n", 5) == 12
            reshard.roll_back(at, id_, "a doubt")
            assert not any(store.claim(one, 3600).accepted for one in ids)
            assert store.get(b"n") == b"12"
            for _ in reshard.run_on(at, id_, watch_s=0):
                pass
            assert reshard.cleanup(at, id_).facts["kept"] == 0
            assert not any(store.claim(one, 3600).accepted for one in ids)
            assert store.get(b"n") == b"12"
