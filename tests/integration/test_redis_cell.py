"""What keeps a cell's Valkey server from being part of a move, and how its errors read."""

from __future__ import annotations

import pytest

from cellferry.errors import AccessDenied, Blocked, InvalidInput, NotPrepared, PermanentError
from cellferry.errors import Unreachable as NoAnswer
from cellferry.local.ports import free_ports
from cellferry.model import Cell, Endpoint
from cellferry.stores.redis.store import RedisStore
from fixtures.redis_organizations import (
    Record,
    admin,
    attempt,
    cell,
    fill,
    move,
    provision,
)
from fixtures.valkey import ValkeyPair


@pytest.fixture
def pair(valkey_pair: ValkeyPair) -> ValkeyPair:
    for server in (valkey_pair.source, valkey_pair.destination):
        provision(server)
    return valkey_pair


def codes(pair: ValkeyPair, **changes: object) -> set[str]:
    """Codes of the fatal blockers that plan would show."""
    record = Record()
    with RedisStore().open(move(pair, **changes), record, record) as redis_move:
        return {blocker.code for blocker in redis_move.inventory().blockers if blocker.fatal}


def with_endpoint(url: str, admin_url: str | None) -> Cell:
    options = {"key_prefix": "org:{$organization}:", "application_user": "org-$organization"}
    return Cell("cell-9", {"redis": Endpoint(url, admin_url, options)})


def test_a_ready_pair_has_no_blocker(pair: ValkeyPair) -> None:
    assert codes(pair) == set()


def test_the_inventory_counts_every_key(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        fill(client, keys=40)
        fill(client, "42", keys=40)
        expected = sum(1 for _ in client.scan_iter(match="org:{4}:*"))
    record = Record()
    with RedisStore().open(move(pair), record, record) as redis_move:
        found = redis_move.inventory()
    assert found.count == expected
    assert found.bytes > 0


def test_a_missing_application_user_blocks(pair: ValkeyPair) -> None:
    with admin(pair.destination) as client:
        client.acl_deluser("org-4")
    assert codes(pair) == {"application-user-missing"}


def test_a_missing_application_user_stops_the_capture(pair: ValkeyPair) -> None:
    with admin(pair.destination) as client:
        client.acl_deluser("org-4")
    with attempt(pair) as redis_move, pytest.raises(NotPrepared, match="org-4"):
        redis_move.open_capture()


def test_another_user_who_may_write_the_keys_blocks(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        client.execute_command("ACL", "SETUSER", "worker", "on", ">pw", "~org:*", "+@all")
    assert codes(pair) == {"shared-credentials"}
    trusting = cell("cell-1", pair.source, trusted_users=["worker"])
    assert codes(pair, source=trusting) == set()


def test_a_full_destination_blocks(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        fill(client, keys=100)
    with admin(pair.destination) as client:
        used = client.info("memory")["used_memory"]
        client.config_set("maxmemory", used + 10_000)
        try:
            assert codes(pair) == {"destination-full"}
        finally:
            client.config_set("maxmemory", 0)


def test_a_destination_that_fills_up_during_the_copy_says_so(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        client.mset({f"org:{{4}}:{number}": "x" * 1000 for number in range(3000)})
    with admin(pair.destination) as client, attempt(pair) as redis_move:
        redis_move.open_capture()
        used = client.info("memory")["used_memory"]
        client.config_set("maxmemory", used + 1_000_000)
        try:
            with pytest.raises(PermanentError, match="out of memory"):
                redis_move.copy()
        finally:
            client.config_set("maxmemory", 0)


def test_unexplained_keys_at_the_destination_block(pair: ValkeyPair) -> None:
    with admin(pair.destination) as client:
        client.set("org:{4}:left over", 1)
    assert codes(pair) == {"destination-not-empty"}


def test_an_admin_who_may_not_change_users_blocks(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        client.execute_command("ACL", "SETUSER", "weak", "on", ">pw", "~*", "+@all", "-acl|setuser")
    url = pair.source.url("weak", "pw")
    blockers = RedisStore().check_cell(with_endpoint(pair.source.url(), url))
    assert [blocker.code for blocker in blockers if blocker.fatal] == ["missing-privilege"]
    assert "ACL SETUSER" in next(b.reason for b in blockers if b.fatal)


def test_an_unreachable_cell_is_named(pair: ValkeyPair) -> None:
    nobody = with_endpoint(*[f"redis://u:secret@127.0.0.1:{free_ports(1)[0]}/0"] * 2)
    record = Record()
    redis_move = RedisStore().open(move(pair, destination=nobody), record, record)
    for verb in (lambda _: RedisStore().check_cell(nobody), lambda opened: opened.fence()):
        with redis_move as opened, pytest.raises(NoAnswer) as caught:
            verb(opened)
        assert caught.value.where == "cell-9/redis"
        assert "secret" not in str(caught.value)
        redis_move = RedisStore().open(move(pair, destination=nobody), record, record)


def test_a_wrong_password_is_named_and_never_shown(pair: ValkeyPair) -> None:
    url = pair.source.url("cellferry-admin", "wrong-secret")
    wrong = with_endpoint(url, url)
    assert [b.code for b in RedisStore().check_cell(wrong)] == ["access-denied"]
    record = Record()
    opening = RedisStore().open(move(pair, source=wrong), record, record)
    with opening as redis_move, pytest.raises(AccessDenied) as caught:
        redis_move.fence()
    assert "wrong-secret" not in str(caught.value)
    assert "wrong-secret" not in repr(wrong)


def test_without_an_admin_connection_nothing_is_gated(pair: ValkeyPair) -> None:
    with pytest.raises(NotPrepared, match="admin connection"):
        RedisStore().prepare_cell(with_endpoint(pair.source.url(), None), Record())


def test_cells_with_different_prefixes_are_refused(pair: ValkeyPair) -> None:
    other = cell("cell-2", pair.destination, key_prefix="o:{$organization}:")
    with pytest.raises(InvalidInput, match="key_prefix differs"):
        codes(pair, destination=other)


def test_preparing_is_idempotent_and_installs_nothing(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        before = client.acl_list(), client.dbsize()
        for _ in range(2):
            RedisStore().prepare_cell(cell("cell-1", pair.source), Record())
        assert (client.acl_list(), client.dbsize()) == before


def test_unpreparing_is_refused_while_an_organization_is_gated(pair: ValkeyPair) -> None:
    with attempt(pair) as redis_move:
        redis_move.open_capture()
        with pytest.raises(Blocked, match="importing"):
            RedisStore().unprepare_cell(cell("cell-2", pair.destination), Record())


def test_unpreparing_removes_what_a_killed_attempt_left(pair: ValkeyPair) -> None:
    with admin(pair.source) as client:
        before = client.acl_list(), client.keys()
        record = Record()
        killed = RedisStore().open(move(pair), record, record).__enter__()
        killed.fence()
        killed.open_capture()
        killed._wire(next(iter(killed._gates)), "read")
        assert len(client.acl_list()) > len(before[0])
        RedisStore().unprepare_cell(cell("cell-1", pair.source), Record())
        assert (client.acl_list(), client.keys()) == before
        killed.close()
