"""Both kinds of shard answer a client alike."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from cellferry.errors import InvalidInput, Unreachable
from cellferry.shards.claims import Held
from cellferry.shards.postgres_server import QUERIES, PostgresShard
from cellferry.shards.redis_server import RedisShard
from cellferry.shards.server import ShardServer, open_shard
from fixtures.valkey import ValkeyPair

Connect = Callable[[], ShardServer]


@pytest.fixture(params=["redis", "postgres"])
def connect(
    request: pytest.FixtureRequest, valkey_pair: ValkeyPair, fresh_database: str
) -> Iterator[Connect]:
    """Make clients of one empty shard."""
    opened: list[ShardServer] = []
    if request.param == "postgres":
        with psycopg.connect(fresh_database) as connection:
            connection.execute(QUERIES["table"])

    def made() -> ShardServer:
        shard: ShardServer = (
            RedisShard(valkey_pair.source.url(), "shard-0")
            if request.param == "redis"
            else PostgresShard(fresh_database, "shard-0")
        )
        opened.append(shard)
        return shard

    yield made
    for shard in opened:
        shard.close()


@pytest.fixture
def shard(connect: Connect) -> ShardServer:
    return connect()


def test_the_first_claim_wins_and_the_next_is_told_who_did(shard: ShardServer) -> None:
    before = time.time() * 1000
    won = shard.claim(b"id", b"a", ttl_ms=60_000)
    assert won.token == b"a"
    assert won.expires_ms == pytest.approx(before + 60_000, abs=20_000)
    assert shard.claim(b"id", b"b", ttl_ms=1) == won
    assert shard.claim(b"id", b"a", ttl_ms=1) == won, "a claim that is repeated"


def test_an_absolute_expiry_is_kept_to_the_millisecond(shard: ShardServer) -> None:
    at = int(time.time() * 1000) + 1_234_567
    assert shard.claim(b"id", b"a", expires_ms=at) == Held(b"a", at)


def test_an_expired_claim_is_free_again(shard: ShardServer) -> None:
    shard.claim(b"id", b"a", ttl_ms=30)
    until = time.monotonic() + 20
    while shard.claim(b"id", b"b", ttl_ms=60_000).token != b"b":
        assert time.monotonic() < until
        time.sleep(0.01)
    assert shard.get(b"id") == b"b"


def test_of_many_at_once_one_wins(connect: Connect) -> None:
    ready = threading.Barrier(6)

    def contend(name: int) -> set[int]:
        mine, won = connect(), set()
        ready.wait()
        for number in range(200):
            if mine.claim(b"id-%d" % number, b"%d" % name, ttl_ms=60_000).token == b"%d" % name:
                won.add(number)
        return won

    with ThreadPoolExecutor(6) as pool:
        winners = list(pool.map(contend, range(6)))
    assert sorted(number for won in winners for number in won) == list(range(200))


def test_values_come_and_go(shard: ShardServer) -> None:
    assert shard.get(b"\x00\xff") is None
    shard.set(b"\x00\xff", b"\x00\xfe")
    assert shard.get(b"\x00\xff") == b"\x00\xfe"
    shard.set(b"\x00\xff", b"", ttl_ms=60_000)
    assert shard.get(b"\x00\xff") == b""
    assert shard.delete(b"\x00\xff")
    assert not shard.delete(b"\x00\xff")


def test_only_its_holder_releases_a_claim(shard: ShardServer) -> None:
    shard.claim(b"id", b"a", ttl_ms=60_000)
    assert not shard.delete(b"id", token=b"b")
    assert shard.delete(b"id", token=b"a")
    assert shard.get(b"id") is None


def test_a_counter_keeps_the_expiry_that_it_began_with(shard: ShardServer) -> None:
    assert [shard.increment(b"n", 2, ttl_ms=ttl) for ttl in (60_000, 1, 1)] == [2, 4, 6]
    time.sleep(0.05)
    assert shard.increment(b"n", -1) == 5


def test_a_lost_connection_is_said_and_the_next_verb_connects_anew(
    shard: ShardServer, valkey_pair: ValkeyPair, fresh_database: str
) -> None:
    shard.ping()
    if isinstance(shard, RedisShard):
        from cellferry.stores.redis.wire import Address, Wire

        with Wire(Address.parse(valkey_pair.source.url(), "test"), "test") as admin:
            admin.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    else:
        with psycopg.connect(fresh_database) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'cellferry-shards-client'"
                " AND datname = current_database()"
            )
    with pytest.raises(Unreachable, match="shard-0"):
        shard.ping()
    shard.ping()


def test_an_unknown_kind_or_connection_is_named() -> None:
    with pytest.raises(InvalidInput, match="'etcd'"):
        open_shard("etcd", "a", {"a": "x"}, {"x": "redis://127.0.0.1:1"}.get)
    with pytest.raises(InvalidInput, match="connection 'y' is not defined"):
        open_shard("redis", "a", {"a": "y"}, {}.get)


@pytest.mark.parametrize("verb", ["claim", "increment"])
def test_a_row_that_expires_in_the_middle_of_a_statement_gets_no_other_life(
    fresh_database: str, verb: str
) -> None:
    """A clock that goes an hour on at each look: the holder's time is over between two looks."""
    with psycopg.connect(fresh_database, autocommit=True) as connection:
        connection.execute(QUERIES["table"])
        connection.execute("CREATE SEQUENCE looks")
        connection.execute(
            "CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz VOLATILE LANGUAGE sql AS"
            " $$ SELECT statement_timestamp() + nextval('looks') * interval '1 hour' $$"
        )
        connection.execute(
            "INSERT INTO cellferry_shard"
            " VALUES ('id', '7', statement_timestamp() + interval '150 minutes')"
        )
        before = connection.execute("SELECT expires_at FROM cellferry_shard").fetchone()
        url = psycopg.conninfo.make_conninfo(
            fresh_database, options="-csearch_path=public,pg_catalog"
        )
        shard = PostgresShard(url, "shard-0")
        if verb == "claim":
            assert shard.claim(b"id", b"other", ttl_ms=86_400_000).token == b"7"
        else:
            assert shard.increment(b"id", ttl_ms=86_400_000) == 8
        shard.close()
        assert connection.execute("SELECT expires_at FROM cellferry_shard").fetchone() == before
