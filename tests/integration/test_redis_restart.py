"""Valkey restarted, its last second lost, its tracking connection cut: the move goes on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis

from cellferry.errors import CellferryError, TransientError, WrongState
from cellferry.local.valkey_server import ValkeyServer
from cellferry.model import Finished, GateState
from cellferry.stores.redis.store import RedisMove
from fixtures.redis_organizations import (
    Record,
    admin,
    application,
    attempt,
    contents,
    fill,
    provision,
)
from fixtures.valkey import ValkeyPair

KEYS = "org:{4}:*"
Make = Callable[..., ValkeyServer]


@pytest.fixture(params=["everysec", "always"])
def pair(own_valkey: Make, request: pytest.FixtureRequest) -> ValkeyPair:
    """Two servers of the test's own, with keys of an organization at the source."""
    settings = {"appendfsync": request.param}
    made = ValkeyPair(own_valkey(settings=settings), own_valkey(settings=settings))
    provisioned(made, keys=60)
    return made


def provisioned(pair: ValkeyPair, keys: int = 30) -> None:
    for server in (pair.source, pair.destination):
        provision(server)
    with application(pair.source) as client:
        fill(client, keys=keys)


def restart(server: ValkeyServer) -> None:
    """A crash of the server's process; the machine goes on."""
    server.kill()
    server.start()


def set_back(server: ValkeyServer, *keys: str) -> None:
    """What a crash of the machine may do: the newest changes of some keys are gone."""
    with admin(server) as client:
        client.delete(*keys)


def close(pair: ValkeyPair) -> None:
    assert contents(pair.destination, KEYS) == contents(pair.source, KEYS)


@pytest.mark.parametrize("side", ["source", "destination"])
@pytest.mark.parametrize("moment", ["copied", "synced", "frozen"])
def test_a_restarted_server_delays_the_move_and_loses_nothing(
    pair: ValkeyPair, side: str, moment: str
) -> None:
    server: ValkeyServer = getattr(pair, side)
    with attempt(pair, 1) as move:
        move.open_capture()
        move.copy()
        if moment != "copied":
            move.sync()
        if moment == "frozen":
            move.catch_up()
            move.freeze(60.0)
        with application(pair.source) as client:
            if moment != "frozen":
                client.set("org:{4}:late", "acknowledged")
        restart(server)
        if moment == "frozen" and side == "source":
            # No flip can come before `finish`, which alone makes the freeze durable.
            with application(pair.source) as client:
                client.set("org:{4}:late", "acknowledged")
        verb = move.finish if moment == "frozen" else move.sync
        with pytest.raises(CellferryError):
            verb()
    with attempt(pair, 2) as move:
        move.thaw()
        move.sync()
        move.catch_up()
        move.freeze(60.0)
        move.finish()
        close(pair)
        move.hand_over()
    with application(pair.destination) as client:
        client.set("org:{4}:new", "1")


def test_a_freeze_survives_a_restart_from_finish_on(pair: ValkeyPair) -> None:
    with attempt(pair) as move:
        move.open_capture()
        move.copy()
        move.catch_up()
        move.freeze(60.0)
        move.finish()
    restart(pair.source)
    with application(pair.source) as client, pytest.raises(redis.ResponseError):
        client.set("org:{4}:late", "too late: the route may be flipped by now")
    with attempt(pair, 2) as move:
        move.hand_over()
    close(pair)


def test_a_cut_tracking_connection_is_noticed_and_everything_compared_anew(
    valkey_pair: ValkeyPair,
) -> None:
    pair = valkey_pair
    provisioned(pair)
    with attempt(pair) as move:
        move.open_capture()
        move.copy()
        move.sync()
        with admin(pair.source) as client:
            feeds = [c["id"] for c in client.client_list() if c["name"].endswith(":feed")]
            assert feeds
            for number in feeds:
                client.client_kill_filter(_id=number)
        with application(pair.source) as client:
            client.set("org:{4}:unseen", "acknowledged")
            client.delete("org:{4}:session:1")
        for _ in range(5):
            try:
                move.sync()
            except TransientError:
                continue
            break
        assert move.verify().ok
    close(pair)


def test_a_cut_tracking_connection_under_the_gate_does_not_lose_the_last_keys(
    valkey_pair: ValkeyPair,
) -> None:
    pair = valkey_pair
    provisioned(pair)
    with attempt(pair) as move:
        move.open_capture()
        move.copy()
        move.catch_up()
        with admin(pair.source) as client:
            for found in client.client_list():
                if found["name"].endswith(":feed"):
                    client.client_kill_filter(_id=found["id"])
        with application(pair.source) as client:
            client.set("org:{4}:unseen", "acknowledged")
        move.freeze(60.0)
        move.finish()
        close(pair)


def test_repair_brings_everything_that_differs_and_removes_what_is_too_much(
    valkey_pair: ValkeyPair,
) -> None:
    pair = valkey_pair
    provisioned(pair)
    with attempt(pair) as move:
        move.open_capture()
        move.copy()
    with admin(pair.destination) as client:
        client.delete("org:{4}:session:1")
        client.set("org:{4}:session:2", "older")
        client.set("org:{4}:lost-at-the-source", "1")
    with attempt(pair, 2) as move:
        move.open_capture()
        found = move.repair()
        assert found.repaired >= 3
        assert found.compared >= len(contents(pair.source, KEYS))
        assert move.verify().ok
    close(pair)


def test_a_thaw_opens_a_source_whose_frozen_marker_was_lost(valkey_pair: ValkeyPair) -> None:
    """The rules are saved at once; the marker is in the append-only file's last second."""
    pair = valkey_pair
    for server in (pair.source, pair.destination):
        provision(server)
    with attempt(pair) as move:
        move.open_capture()
        with admin(pair.source) as client:
            before = client.get("cellferry:gate:{4}")
        move.copy()
        move.catch_up()
        move.freeze(60.0)
    with admin(pair.source) as client:
        client.set("cellferry:gate:{4}", before)
    with application(pair.source) as client, pytest.raises(redis.ResponseError):
        client.set("org:{4}:x", "1")
    with attempt(pair, 2) as move:
        move.thaw()
    with application(pair.source) as client:
        client.set("org:{4}:x", "1")


def test_a_hand_over_ends_a_move_whose_frozen_marker_was_lost(valkey_pair: ValkeyPair) -> None:
    pair = valkey_pair
    for server in (pair.source, pair.destination):
        provision(server)
    with attempt(pair) as move:
        move.open_capture()
        with admin(pair.source) as client:
            before = client.get("cellferry:gate:{4}")
        move.copy()
        move.catch_up()
        move.freeze(60.0)
        move.finish()
    with admin(pair.source) as client:
        client.set("cellferry:gate:{4}", before)
    with attempt(pair, 2) as move:
        move.hand_over()
        marker = move._gate(next(iter(move._gates))).read()
        assert marker is not None
        assert marker.state is GateState.MOVED
    with application(pair.source) as client, pytest.raises(redis.ResponseError):
        client.set("org:{4}:x", "1")
    with application(pair.destination) as client:
        client.set("org:{4}:x", "1")


def test_a_source_that_lost_its_marker_and_its_rules_is_not_declared_moved(
    valkey_pair: ValkeyPair,
) -> None:
    """Somebody may have written there since: only a person can tell."""
    pair = valkey_pair
    for server in (pair.source, pair.destination):
        provision(server)
    with attempt(pair) as move:
        move.open_capture()
        with admin(pair.source) as client:
            before = client.get("cellferry:gate:{4}")
        move.copy()
        move.catch_up()
        move.freeze(60.0)
        move.finish()
    with admin(pair.source) as client:
        client.set("cellferry:gate:{4}", before)
    provision(pair.source)
    with attempt(pair, 2) as move, pytest.raises(WrongState, match="cannot become moved"):
        move.hand_over()


def test_a_destination_that_lost_its_gate_is_refused_in_plain_words(
    valkey_pair: ValkeyPair,
) -> None:
    pair = valkey_pair
    for server in (pair.source, pair.destination):
        provision(server)
    record = Record()
    with attempt(pair, 1, record) as move:
        move.open_capture()
        move.copy()
    set_back(pair.destination, "cellferry:gate:{4}")
    with (
        attempt(pair, 2, record) as move,
        pytest.raises(WrongState, match="the server has lost this migration's gate"),
    ):
        move.sync()


def to_finish(move: RedisMove) -> Finished:
    move.open_capture()
    move.copy()
    move.catch_up()
    move.freeze(60.0)
    return move.finish()


def test_a_destination_that_came_back_empty_is_not_opened(valkey_pair: ValkeyPair) -> None:
    pair = valkey_pair
    provisioned(pair)
    with attempt(pair) as move:
        to_finish(move)
        with admin(pair.destination) as client:
            client.flushall()
    with (
        attempt(pair, 2) as move,
        pytest.raises(WrongState, match="came back empty, or an older state"),
    ):
        move.hand_over()


@pytest.mark.parametrize("same_process", [True, False])
def test_a_destination_that_restarted_after_the_last_delta_gets_what_it_lost(
    own_valkey: Make, same_process: bool
) -> None:
    pair = ValkeyPair(own_valkey(), own_valkey())
    provisioned(pair)

    def lose() -> None:
        restart(pair.destination)
        set_back(pair.destination, "org:{4}:session:1", "org:{4}:session:2")

    with attempt(pair) as move:
        finished = to_finish(move)
        assert not move.has_restarted(finished.evidence)
        if same_process:
            lose()
            for _ in range(5):
                try:
                    move.hand_over()
                except TransientError:
                    continue
                break
            close(pair)
    if not same_process:
        lose()
        with attempt(pair, 2) as move:
            assert move.has_restarted(finished.evidence)
            assert not move.was_opened()
            move.repair()  # as `history.restore`
            move.finish()
            close(pair)
            move.hand_over()
            assert move.was_opened()
    with application(pair.destination) as client:
        client.set("org:{4}:x", "1")


@pytest.mark.parametrize("feed", ["open", "new"])
def test_reverse_rounds_do_not_follow_a_new_cell_that_was_emptied(
    valkey_pair: ValkeyPair, feed: str
) -> None:
    pair = valkey_pair
    provisioned(pair)
    with attempt(pair) as move:
        to_finish(move)
        move.hand_over()
    before = contents(pair.source, KEYS)
    assert before
    with attempt(pair, 2, returning=True) as back:
        back.sync()
        if feed == "open":
            with admin(pair.destination) as client:
                client.flushall()
            for _ in range(3):
                with pytest.raises(CellferryError):
                    back.sync()
    if feed == "new":
        with admin(pair.destination) as client:
            client.flushall()
    with (
        attempt(pair, 3, returning=True) as back,
        pytest.raises(WrongState, match=r"gate of .* is absent"),
    ):
        back.sync()
    assert contents(pair.source, KEYS) == before
