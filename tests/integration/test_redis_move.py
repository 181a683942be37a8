"""An organization's keys move between two real Valkey servers."""

from __future__ import annotations

import json
import shutil
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from cellferry.errors import AccessDenied, AuthorityViolation, LeaseLost, TransientError, WrongState
from cellferry.local.valkey_server import ValkeyServer
from cellferry.model import Organization, Side, Strategy, Throttle
from cellferry.stores import throttle
from cellferry.stores.redis.store import RedisMove, RedisStore
from fixtures.redis_organizations import (
    Record,
    Writers,
    admin,
    application,
    attempt,
    contents,
    fill,
    move,
    provision,
)
from fixtures.valkey import MakeValkey, ValkeyPair

KEYS = "org:{4}:*"


@pytest.fixture
def pair(valkey_pair: ValkeyPair) -> ValkeyPair:
    for server in (valkey_pair.source, valkey_pair.destination):
        for organization in ("4", "42"):
            provision(server, organization)
    return valkey_pair


def cut_over(redis_move: RedisMove) -> None:
    redis_move.catch_up()
    redis_move.freeze(60.0)
    redis_move.finish()
    redis_move.hand_over()
    redis_move.release()


def move_everything(redis_move: RedisMove) -> None:
    redis_move.open_capture()
    redis_move.copy()
    cut_over(redis_move)


# --- copy --------------------------------------------------------------------------------------


def test_every_type_arrives_with_its_value_and_its_exact_expiry(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        fill(client)
        client.execute_command("HSET", "org:{4}:fields", "a", 1, "b", 2)
        client.execute_command("HPEXPIRE", "org:{4}:fields", 3_600_000, "FIELDS", 1, "a")
    with attempt(pair) as redis_move:
        move_everything(redis_move)
    assert contents(pair.destination, KEYS) == contents(pair.source, KEYS)


def test_pending_entries_of_a_consumer_group_arrive(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        fill(client, keys=10)
    with attempt(pair) as redis_move:
        move_everything(redis_move)
    with admin(pair.destination) as client:
        pending = client.xpending("org:{4}:events:0", "workers")
        assert pending["pending"] == 7
        assert pending["consumers"] == [{"name": b"worker-1", "pending": 7}]


def test_group_changes_that_no_feed_reports_arrive(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        fill(client, keys=10)
        with attempt(pair) as redis_move:
            redis_move.open_capture()
            redis_move.copy()
            redis_move.catch_up()
            client.xreadgroup("workers", "late", {"org:{4}:events:1": ">"}, count=3)
            redis_move.freeze(60.0)
            redis_move.finish()
    with admin(pair.destination) as client:
        assert client.xpending("org:{4}:events:1", "workers")["pending"] == 3


def test_a_key_that_expires_while_it_moves_is_no_mismatch(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        for number in range(500):
            client.set(f"org:{{4}}:short:{number}", 1, px=100 + number * 3)
    with attempt(pair) as redis_move:
        redis_move.open_capture()
        redis_move.copy()
        redis_move.sync()
        assert redis_move.verify().ok
        cut_over(redis_move)
    time.sleep(1.6)
    assert contents(pair.destination, KEYS) == {}


def test_writers_lose_nothing_through_a_cutover(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        fill(client, keys=500)
    with Writers(pair.source) as writers, attempt(pair) as redis_move:
        redis_move.open_capture()
        redis_move.copy()
        writers.wait_for(200)
        redis_move.sync()
        writers.wait_for(writers.confirmed + 200)
        redis_move.sync()
        assert redis_move.verify().ok
        cut_over(redis_move)
        deadline = time.monotonic() + 60
        while len(writers.refused_at) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(writers.refused_at) == 3
    writers.require_all_at(pair.destination)
    assert contents(pair.destination, KEYS) == contents(pair.source, KEYS)


def test_keys_deleted_during_the_copy_do_not_come_back(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        fill(client, keys=50)
        with attempt(pair) as redis_move:
            redis_move.open_capture()
            redis_move.copy()
            client.delete("org:{4}:blob:1", "org:{4}:wide")
            redis_move.catch_up()
            client.rename("org:{4}:blob:2", "org:{4}:renamed")
            redis_move.freeze(60.0)
            redis_move.finish()
    assert contents(pair.destination, KEYS) == contents(pair.source, KEYS)


def test_another_organizations_keys_are_untouched(pair: ValkeyPair) -> None:
    for server in (pair.source, pair.destination):
        with admin(server) as client:
            fill(client, "42", keys=30)
    with admin(pair.source) as client:
        fill(client, keys=30)
    before = contents(pair.source, "org:{42}:*"), contents(pair.destination, "org:{42}:*")
    with attempt(pair) as redis_move:
        move_everything(redis_move)
        redis_move.cleanup(Side.SOURCE)
        redis_move.close_capture()
    after = contents(pair.source, "org:{42}:*"), contents(pair.destination, "org:{42}:*")
    assert after == before


@pytest.mark.parametrize("organization", ["a*b", "a?b", "[ab]", "a\\b", "ä{ö}", "q\"uo'te", "a^-("])
def test_an_id_with_the_patterns_own_letters_moves_alone(
    valkey_pair: ValkeyPair, organization: str
) -> None:
    for server in (valkey_pair.source, valkey_pair.destination):
        provision(server, organization)
    with admin(valkey_pair.source) as client:
        client.set(f"org:{{{organization}}}:mine", 1)
        for other in ("aXb", "a", "b", "axxb"):
            client.set(f"org:{{{other}}}:theirs", 1)
    with attempt(valkey_pair, organization=Organization(organization, "odd")) as redis_move:
        move_everything(redis_move)
        redis_move.cleanup(Side.SOURCE)
        redis_move.close_capture()
    assert list(contents(valkey_pair.destination)) == [f"org:{{{organization}}}:mine".encode()]
    assert len(contents(valkey_pair.source)) == 4
    with admin(valkey_pair.destination) as client:
        client.execute_command("ACL", "LOAD")  # what was saved can be read


def strings(server: ValkeyServer) -> dict[bytes, bytes]:
    with admin(server) as client:
        keys = sorted(client.scan_iter(match=KEYS, count=1000))
        return dict(zip(keys, client.mget(keys), strict=True))


def test_a_stopped_copy_goes_on_from_its_checkpoint(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        client.mset({f"org:{{4}}:k:{number}": number for number in range(6000)})
    record = Record()
    record.stop, record.stop_after = TransientError("stopped"), 4
    with attempt(pair, 1, record) as redis_move:
        redis_move.open_capture()
        with pytest.raises(TransientError, match="stopped"):
            redis_move.copy()
    arrived = len(strings(pair.destination))
    assert 0 < arrived < 6000
    with attempt(pair, 2) as redis_move:
        copied = redis_move.copy()
    assert copied.recopied <= 1100
    assert copied.count < 6000 + 1100
    assert strings(pair.destination) == strings(pair.source)


def test_the_throttle_holds_the_rate(pair: ValkeyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    slept = [0.0]  # a clock that goes on only in the throttle's own sleeps

    def sleep(seconds: float) -> None:
        slept[0] += seconds

    monkeypatch.setattr(throttle, "time", SimpleNamespace(monotonic=lambda: slept[0], sleep=sleep))
    with admin(pair.source) as client:
        client.mset({f"org:{{4}}:k:{number}": number for number in range(3000)})
    with attempt(pair, throttle=Throttle(keys_per_s=2000)) as redis_move:
        redis_move.open_capture()
        redis_move.copy()
    # the bucket lets its last batch go into debt
    assert 1700 <= (3000 - 1000) / slept[0] <= 3500


def test_freeze_first_copies_and_verifies_under_the_gate(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        fill(client, keys=50)
    with attempt(pair, strategy=Strategy.FREEZE_FIRST) as redis_move:
        redis_move.open_capture()
        redis_move.freeze(60.0)
        finished = redis_move.finish()
        redis_move.hand_over()
    assert finished.compared == len(contents(pair.source, KEYS))
    assert contents(pair.destination, KEYS) == contents(pair.source, KEYS)


def test_under_the_gate_nobody_waits_for_a_rate(
    pair: ValkeyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    with admin(pair.source) as client:
        fill(client, keys=50)
    rates: set[float | None] = set()
    take = throttle.Throttle.take

    def note(self: throttle.Throttle, *arguments: Any, **named: Any) -> float:
        rates.add(self.per_second)
        return take(self, *arguments, **named)

    monkeypatch.setattr(throttle.Throttle, "take", note)
    slow = Throttle(keys_per_s=100_000)
    with attempt(pair, strategy=Strategy.FREEZE_FIRST, throttle=slow) as redis_move:
        redis_move.open_capture()
        redis_move.freeze(60.0)
        redis_move.finish()
        redis_move.hand_over()
    assert rates == {None}


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="no second engine here")
def test_an_organization_leaves_an_older_engine_under_live_writers(own_valkey: MakeValkey) -> None:
    older = own_valkey(binary=Path(str(shutil.which("redis-server"))))
    servers = ValkeyPair(older, own_valkey())
    for server in (servers.source, servers.destination):
        provision(server)
    with admin(servers.source) as client:
        fill(client, keys=100)
    with Writers(servers.source) as writers, attempt(servers) as redis_move:
        assert "no-way-back" in {blocker.code for blocker in redis_move.inventory().blockers}
        redis_move.open_capture()
        redis_move.copy()
        writers.wait_for(200)
        redis_move.sync()
        assert redis_move.verify().ok
        cut_over(redis_move)
    writers.require_all_at(servers.destination)
    assert contents(servers.destination, KEYS) == contents(servers.source, KEYS)


# --- the feed ----------------------------------------------------------------------------------


def kill_feed(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        for entry in client.client_list():
            if entry["name"].endswith(":feed"):
                client.client_kill_filter(_id=entry["id"])


def test_a_lost_feed_is_made_up_for_by_a_complete_comparison(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        fill(client, keys=50)
        with attempt(pair) as redis_move:
            redis_move.open_capture()
            redis_move.copy()
            redis_move.sync()
            kill_feed(pair)
            client.set("org:{4}:unseen", 1)
            deadline = time.monotonic() + 60
            while redis_move._feed.lost is None and time.monotonic() < deadline:
                time.sleep(0.01)
            redis_move.sync()
    assert contents(pair.destination, KEYS) == contents(pair.source, KEYS)


def test_a_feed_lost_just_before_the_freeze_loses_nothing(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        fill(client, keys=50)
        with attempt(pair) as redis_move:
            redis_move.open_capture()
            redis_move.copy()
            redis_move.catch_up()
            kill_feed(pair)
            client.set("org:{4}:unseen", 1)
            redis_move.freeze(60.0)
            finished = redis_move.finish()
    assert "feed_lost" in finished.evidence
    assert contents(pair.destination, KEYS) == contents(pair.source, KEYS)


def test_a_lost_feed_gives_the_cutover_up_when_comparing_is_too_slow(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        fill(client, keys=50)
    with attempt(pair) as redis_move:
        redis_move.open_capture()
        redis_move.copy()
        redis_move.catch_up()
        redis_move._pass_s = 60.0
        kill_feed(pair)
        redis_move.freeze(60.0)
        with pytest.raises(TransientError, match="pause budget"):
            redis_move.finish()
        redis_move.thaw()
    with application(pair.source) as client:
        client.set("org:{4}:again", 1)


def test_verify_finds_what_was_changed_behind_its_back(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        fill(client, keys=50)
    with attempt(pair) as redis_move:
        redis_move.open_capture()
        redis_move.copy()
        redis_move.sync()
        with admin(pair.destination) as client:
            client.set("org:{4}:blob:3", "wrong")
            client.delete("org:{4}:ranking")
            client.set("org:{4}:extra", 1)
            client.pexpire("org:{4}:session:9", 10_000_000)
        verification = redis_move.verify()
    assert {(found.key, found.reason) for found in verification.mismatches} == {
        ("org:{4}:blob:3", "differs"),
        ("org:{4}:ranking", "missing at destination"),
        ("org:{4}:extra", "extra at destination"),
        ("org:{4}:session:9", "differs in its expiry"),
    }


# --- the gate ----------------------------------------------------------------------------------


def test_a_frozen_organization_reads_and_does_not_write(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        fill(client, keys=10)
    with application(pair.source) as writer, attempt(pair) as redis_move:
        queued = writer.pipeline(transaction=True)
        writer.set("org:{4}:k", "before")
        redis_move.open_capture()
        redis_move.freeze(60.0)
        assert writer.get("org:{4}:k") == b"before"
        for command in (
            ("SET", "org:{4}:k", "after"),
            ("EVAL", "return redis.call('SET', KEYS[1], 'after')", 1, "org:{4}:k"),
            ("XREADGROUP", "GROUP", "workers", "w", "STREAMS", "org:{4}:events:1", ">"),
        ):
            with pytest.raises(redis.exceptions.ResponseError):
                writer.execute_command(*command)
        with pytest.raises(redis.exceptions.ResponseError):
            queued.set("org:{4}:k", "after").execute()
        assert json.loads(writer.get("cellferry:gate:{4}"))["state"] == "frozen"


def test_a_client_that_waits_in_a_blocking_command_takes_nothing(pair: ValkeyPair) -> None:
    with attempt(pair) as redis_move:
        redis_move.open_capture()
        outcome: list[object] = []

        def wait() -> None:
            with application(pair.source) as client:
                try:
                    outcome.append(client.blpop("org:{4}:queue", 250))
                except redis.RedisError as error:
                    outcome.append(error)

        waiter = threading.Thread(target=wait)
        waiter.start()
        with admin(pair.source) as client:
            while "b" not in {flag for one in client.client_list() for flag in one["flags"]}:
                time.sleep(0.01)  # until it is blocked
        redis_move.freeze(60.0)
        waiter.join(60)
        assert isinstance(outcome[0], redis.exceptions.ConnectionError)


def test_another_organization_writes_on_while_one_is_frozen(pair: ValkeyPair) -> None:
    with attempt(pair) as redis_move, application(pair.source, "42") as other:
        redis_move.open_capture()
        redis_move.freeze(60.0)
        other.set("org:{42}:k", 1)


def test_an_importing_destination_refuses_the_application(pair: ValkeyPair) -> None:
    with attempt(pair) as redis_move, application(pair.destination) as rogue:
        redis_move.open_capture()
        with pytest.raises(redis.exceptions.NoPermissionError):
            rogue.set("org:{4}:k", 1)
        with pytest.raises(redis.exceptions.NoPermissionError):
            rogue.get("org:{4}:k")  # it must not conclude that the key is gone


def test_thaw_restores_exactly_the_users_rules(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        client.execute_command(
            "ACL",
            "SETUSER",
            "org-4",
            "%W~org:{4}:w:*",
            "&news:*",
            "-xreadgroup",
            "+xreadgroup",
            "-function|load",
            "(%R~shared:* +get +mget)",
            "(~org:{4}:x:* &more:* -@all +@hash)",
        )
        before = client.acl_list()
        with attempt(pair) as redis_move:
            redis_move.open_capture()
            redis_move.freeze(60.0)
            assert client.acl_list() != before
            redis_move.thaw()
            after = [rule for rule in client.acl_list() if "cellferry-7" not in rule]
    assert after == before


def test_a_password_changed_during_the_freeze_stays_changed(pair: ValkeyPair) -> None:
    with admin(pair.source) as client, attempt(pair) as redis_move:
        redis_move.open_capture()
        redis_move.freeze(60.0)
        client.execute_command("ACL", "SETUSER", "org-4", "resetpass", ">new")
        redis_move.thaw()
    with redis.Redis.from_url(pair.source.url("org-4", "new")) as client:
        client.set("org:{4}:k", 1)


def test_keys_given_back_by_somebody_during_the_freeze_stop_the_cutover(pair: ValkeyPair) -> None:
    with attempt(pair) as redis_move:
        redis_move.open_capture()
        redis_move.copy()
        redis_move.catch_up()
        redis_move.freeze(60.0)
        provision(pair.source)
        with pytest.raises(AuthorityViolation):
            redis_move.finish()


def test_a_gate_survives_a_killed_server(own_valkey: MakeValkey) -> None:
    servers = ValkeyPair(own_valkey(), own_valkey())
    for server in (servers.source, servers.destination):
        provision(server)
    with attempt(servers) as redis_move:
        redis_move.open_capture()
        redis_move.copy()
        redis_move.catch_up()
        time.sleep(1.2)  # appendfsync everysec
        redis_move.freeze(60.0)
        redis_move.finish()
        servers.source.kill()
        servers.source.start()
        with (
            application(servers.source) as writer,
            pytest.raises(redis.exceptions.NoPermissionError),
        ):
            writer.set("org:{4}:k", 1)
    with attempt(servers, 2) as redis_move:
        redis_move.thaw()
        with application(servers.source) as writer:
            writer.set("org:{4}:k", 1)


# --- zombies, returns, the end -----------------------------------------------------------------


def test_an_older_attempt_may_not_write_any_more(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        fill(client, keys=50)
    with attempt(pair, 1) as zombie:
        zombie.open_capture()
        zombie.copy()
        zombie.sync()
        with attempt(pair, 2):
            for verb in (
                zombie.copy,
                zombie.sync,
                zombie.open_capture,
                zombie.catch_up,
                lambda: zombie.freeze(60.0),
                zombie.finish,
                zombie.thaw,
                zombie.hand_over,
                lambda: zombie.cleanup(Side.DESTINATION),
                zombie.fence,
            ):
                with pytest.raises(LeaseLost):
                    verb()


def test_an_older_attempts_open_connection_is_cut(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        fill(client, keys=10)
    with attempt(pair, 1) as zombie:
        zombie.open_capture()
        zombie.copy()
        writer = zombie._wire(Side.DESTINATION, "write", writer=True)
        with attempt(pair, 2), pytest.raises((TransientError, AccessDenied)):
            writer.call("SET", "org:{4}:k", "of a zombie")
    with admin(pair.destination) as client:
        assert client.get("org:{4}:k") is None


def test_the_movers_user_cannot_touch_another_organization(pair: ValkeyPair) -> None:
    with attempt(pair) as redis_move:
        redis_move.open_capture()
        writer = redis_move._wire(Side.DESTINATION, "write", writer=True)
        with pytest.raises(AccessDenied):
            writer.call("UNLINK", "org:{42}:k")
        reader = redis_move._wire(Side.SOURCE, "read")
        with pytest.raises(AccessDenied):
            reader.call("UNLINK", "org:{4}:k")


def test_a_late_cleanup_after_a_return_deletes_nothing(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        fill(client, keys=30)
    with attempt(pair, 1) as there:
        move_everything(there)
    back = ValkeyPair(pair.destination, pair.source)
    names = {"migration": 8, "epoch": 2}
    with attempt(back, 1, **names) as returning:
        move_everything(returning)
    before = contents(pair.source, KEYS)
    with attempt_without_fence(pair, 2) as late, pytest.raises((WrongState, LeaseLost)):
        late.cleanup(Side.SOURCE)
    assert contents(pair.source, KEYS) == before
    with application(pair.source) as client:
        client.set("org:{4}:home", 1)


def test_a_late_cleanup_is_refused_by_the_gate_alone(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        fill(client, keys=30)
    with attempt(pair, 1) as there:
        move_everything(there)
    with attempt(ValkeyPair(pair.destination, pair.source), 1, migration=8, epoch=2) as back:
        move_everything(back)
    for server in (pair.source, pair.destination):
        with admin(server) as client:
            client.delete("cellferry:lease:{4}")  # a crash may lose the last second
    before = contents(pair.source, KEYS)
    with attempt(pair, 2) as late, pytest.raises(WrongState, match="may not delete"):
        late.cleanup(Side.SOURCE)
    assert contents(pair.source, KEYS) == before


def attempt_without_fence(pair: ValkeyPair, number: int) -> AbstractContextManager[RedisMove]:
    record = Record()
    return RedisStore().open(move(pair, number), record, record)


def test_a_return_before_the_cleanup_takes_the_retained_copy_over(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        fill(client, keys=30)
    with attempt(pair, 1) as there:
        move_everything(there)
    with application(pair.destination) as client:
        client.set("org:{4}:written there", 1)
        client.delete("org:{4}:blob:1")
    with attempt(ValkeyPair(pair.destination, pair.source), 1, migration=8, epoch=2) as back:
        move_everything(back)
    assert contents(pair.source, KEYS) == contents(pair.destination, KEYS)


def test_reverse_rounds_keep_the_source_able_to_take_over(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        fill(client, keys=30)
    with attempt(pair, 1) as redis_move:
        move_everything(redis_move)
        with application(pair.destination) as client:
            client.set("org:{4}:written there", 1)
            client.delete("org:{4}:blob:1")
    with attempt(pair, 2, returning=True) as redis_move:
        assert redis_move.sync().applied == 2
    assert contents(pair.source, KEYS) == contents(pair.destination, KEYS)


def test_reverse_rounds_need_a_source_that_was_handed_over(pair: ValkeyPair) -> None:
    with attempt(pair, 1) as redis_move:
        redis_move.open_capture()
    with attempt(pair, 2, returning=True) as redis_move, pytest.raises(WrongState):
        redis_move.sync()


def test_cleanup_of_a_source_that_still_serves_is_refused(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        fill(client, keys=10)
    before = contents(pair.source, KEYS)
    with attempt(pair, 1) as redis_move:
        redis_move.open_capture()
        redis_move.copy()
        redis_move.freeze(60.0)
        with pytest.raises(WrongState):
            redis_move.cleanup(Side.SOURCE)
    assert contents(pair.source, KEYS) == before


def test_a_finished_move_leaves_no_trace(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        fill(client, keys=30)
    users = admin(pair.source).acl_list(), admin(pair.destination).acl_list()
    record = Record()
    with attempt(pair, 1, record) as redis_move:
        move_everything(redis_move)
    with attempt(pair, 2, record) as redis_move:
        redis_move.cleanup(Side.SOURCE)
        redis_move.close_capture()
    assert contents(pair.source) == {}
    assert list(contents(pair.destination, "cellferry*")) == []
    assert (admin(pair.source).acl_list(), admin(pair.destination).acl_list()) == users
    assert record.live == set()


def test_an_abort_leaves_no_trace_and_the_source_serves(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        fill(client, keys=30)
    before = contents(pair.source)
    users = admin(pair.source).acl_list(), admin(pair.destination).acl_list()
    record = Record()
    with attempt(pair, 1, record) as redis_move:
        redis_move.open_capture()
        redis_move.copy()
        redis_move.catch_up()
        redis_move.freeze(60.0)
    for number in (2, 3):  # repeating an abort is harmless
        with attempt(pair, number, record) as redis_move:
            redis_move.thaw()
            redis_move.close_capture()
            redis_move.cleanup(Side.DESTINATION)
    assert contents(pair.source) == before
    assert contents(pair.destination) == {}
    assert (admin(pair.source).acl_list(), admin(pair.destination).acl_list()) == users
    assert record.live == set()


def test_handing_over_twice_is_harmless(pair: ValkeyPair) -> None:
    with attempt(pair, 1) as redis_move:
        move_everything(redis_move)
    with attempt(pair, 2) as redis_move:
        redis_move.hand_over()
    with application(pair.destination) as client:
        client.set("org:{4}:k", 1)
        assert json.loads(client.get("cellferry:gate:{4}"))["epoch"] == 2
    with application(pair.source) as client:
        assert json.loads(client.get("cellferry:gate:{4}"))["cell"] == "cell-2"


def test_a_handed_over_source_is_not_thawed(pair: ValkeyPair) -> None:
    with attempt(pair, 1) as redis_move:
        move_everything(redis_move)
        with pytest.raises(WrongState):
            redis_move.thaw()
