"""Shards that are tables in PostgreSQL move their keys through the same steps."""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from cellferry.errors import LeaseLost, TransientError
from cellferry.local.postgres_server import PostgresServer
from cellferry.shards import postgres_server
from cellferry.shards.checkpoints import FileCheckpoints
from cellferry.shards.cleanup import cleanup, tidy
from cellferry.shards.copier import copy
from cellferry.shards.follower import Follower
from cellferry.shards.lanes import Lanes
from cellferry.shards.planning import plan
from cellferry.shards.sides import Record, open_side
from cellferry.shards.verify import verify
from fixtures.moving_shards import shard_set

THREE = shard_set(range(3), kind="postgres")
FOUR = shard_set(range(4), kind="postgres")
Held = dict[bytes, tuple[bytes, Any]]


class Tables:
    """Four databases with an empty table each."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = urls

    def source(self, name: str) -> str | None:
        return self.urls[int(name[1:])]

    def connect(self, number: int) -> psycopg.Connection[Any]:
        return psycopg.connect(self.urls[number], autocommit=True)

    def held(self, number: int) -> Held:
        with self.connect(number) as connection:
            rows = connection.execute(
                "SELECT key, value, expires_at FROM cellferry_shard"
                " WHERE expires_at > clock_timestamp() OR expires_at IS NULL"
            ).fetchall()
        return {bytes(key): (bytes(value), expires) for key, value, expires in rows}

    def everything(self) -> Held:
        return {key: one for number in range(3) for key, one in self.held(number).items()}

    def fill(self, count: int = 3000) -> Held:
        at: dict[str, list[bytes]] = {}
        for number in range(count):
            key = b"dedup:id-%d" % number
            at.setdefault(THREE.owner(key), []).append(key)
        for name, keys in at.items():
            with self.connect(int(name[-1])) as connection:
                connection.execute(
                    "INSERT INTO cellferry_shard SELECT key, key, CASE WHEN n %% 10 > 0 THEN"
                    " clock_timestamp() + n * interval '1 minute 1 microsecond'"
                    " + interval '1 hour' END"
                    " FROM unnest(%s::bytea[]) WITH ORDINALITY AS one (key, n)",
                    [keys],
                )
        return self.everything()


@pytest.fixture
def tables(postgres_server: PostgresServer) -> Iterator[Tables]:
    names = [f"shard_{n}_{secrets.token_hex(4)}" for n in range(4)]
    with psycopg.connect(postgres_server.url(), autocommit=True) as admin:
        for name in names:
            admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    found = Tables([postgres_server.url(dbname=name) for name in names])
    for number in range(3):  # the fourth table is made by the copy
        with found.connect(number) as connection:
            connection.execute(postgres_server_table())
    yield found
    with psycopg.connect(postgres_server.url(), autocommit=True) as admin:
        for name in names:
            admin.execute(
                sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
            )


def postgres_server_table() -> Any:
    return postgres_server.QUERIES["table"]


def test_every_moved_row_arrives_to_the_microsecond_and_leaves(tables: Tables) -> None:
    wanted = tables.fill()
    made = plan(THREE, FOUR, tables.source)
    made.refuse()
    assert made.keys_to_move == sum(FOUR.owner(key) == "shard-3" for key in wanted)
    for name in made.sources:
        assert copy(made, name, tables.source, fence=1).keys == made.keys_from(name)
        with Follower(made, name, tables.source, fence=2) as follower:
            follower.open_feed()
            assert follower.sweep().brought == 0
            follower.finish()
        assert verify(made, name, tables.source).ok
    for name in made.sources:
        cleaned = cleanup(made, name, tables.source, fence=3)
        assert (cleaned.removed, cleaned.kept) == (made.keys_from(name), 0)
    for number in range(4):
        assert tables.held(number) == {
            key: one for key, one in wanted.items() if FOUR.owner(key) == f"shard-{number}"
        }
    tidy(made, tables.source)
    for number in range(4):
        with tables.connect(number) as connection:
            left = connection.execute("SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal")
            assert left.fetchone() == (0,)

    back = made.turned()
    for name in back.sources:
        copy(back, name, tables.source, fence=4)
        assert verify(back, name, tables.source).ok
    assert tables.everything() == wanted


def test_writers_are_followed_to_the_last_change(tables: Tables) -> None:
    tables.fill(2000)
    made = plan(THREE, FOUR, tables.source)
    stop = threading.Event()
    written = []

    def write(seed: int) -> None:
        chance = random.Random(seed)
        connections = [tables.connect(number) for number in range(3)]
        while not stop.is_set():
            key = b"dedup:id-%d" % chance.randrange(2500)
            connection = connections[int(THREE.owner(key)[-1])]
            match chance.randrange(4):
                case 0:
                    connection.execute("DELETE FROM cellferry_shard WHERE key = %s", [key])
                case 1:
                    connection.execute(
                        "UPDATE cellferry_shard SET expires_at = now() + interval '2 hours'"
                        " WHERE key = %s",
                        [key],
                    )
                case _:
                    with connection.transaction():
                        connection.execute(
                            postgres_server.QUERIES["set"],
                            {"key": key, "value": b"%d" % len(written), "ttl_ms": 3_600_000},
                        )
                        time.sleep(chance.choice([0, 0, 0.05]))
            written.append(key)
        for connection in connections:
            connection.close()

    threads = [threading.Thread(target=write, args=(n,)) for n in range(2)]
    for one in threads:
        one.start()
    try:
        for name in made.sources:
            copy(made, name, tables.source, fence=1)
        followers = [Follower(made, name, tables.source, fence=2) for name in made.sources]
        for one in followers:
            one.open_feed()
            one.sweep()
            one.round()
            assert verify(made, one.shard, tables.source, follower=one).mismatches == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert len(written) > 20
    for one in followers:
        one.finish()
        one.close()
        assert verify(made, one.shard, tables.source).ok
    everything = tables.everything()
    assert tables.held(3) == {
        key: one for key, one in everything.items() if FOUR.owner(key) == "shard-3"
    }


def test_a_change_that_commits_late_is_heard_by_every_feed_once(tables: Tables) -> None:
    side = open_side(THREE, "shard-0", tables.source)
    first, second = side.feed("one"), side.feed("two")
    insert = "INSERT INTO cellferry_shard VALUES (%s, 'x')"
    with tables.connect(0) as slow, tables.connect(0) as quick:
        with slow.transaction():
            slow.execute(insert, [b"dedup:slow"])
            quick.execute(insert, [b"dedup:quick"])
            quick.execute(insert, [b"other:quick"])
            assert first.take() == {b"dedup:quick"}
        assert first.take() == {b"dedup:slow"}
        assert first.take() == set()
        assert second.take() == {b"dedup:slow", b"dedup:quick"}
        late = side.feed("three")
        assert late.take() == set()
        quick.execute("DELETE FROM cellferry_shard WHERE key = 'dedup:slow'")
        quick.execute("UPDATE cellferry_shard SET key = 'dedup:new' WHERE key = 'dedup:quick'")
        assert late.take() == {b"dedup:slow", b"dedup:quick", b"dedup:new"}
        quick.execute("TRUNCATE cellferry_shard")
        with pytest.raises(TransientError, match="truncated"):
            late.barrier(1)
    for feed in (first, second, late):
        feed.close()
    side.tidy()
    side.close()


def test_a_feed_whose_log_was_removed_and_made_anew_is_lost(tables: Tables) -> None:
    """A clean-up that was stopped wakes up, and the next feed installs the triggers again."""
    side = open_side(THREE, "shard-0", tables.source)
    feed = side.feed("one")
    side.tidy()
    with tables.connect(0) as client:
        client.execute("INSERT INTO cellferry_shard VALUES ('dedup:unheard', 'x')")
    other = side.feed("two")
    with pytest.raises(TransientError, match="made anew"):
        feed.barrier(1)
    other.barrier(1)
    for one in (feed, other):
        one.close()
    side.close()


def test_the_log_of_changes_does_not_grow_while_nobody_reads_it(tables: Tables) -> None:
    side = open_side(THREE, "shard-0", tables.source)
    side.feed("one").close()
    with tables.connect(0) as client:
        client.execute(
            "INSERT INTO cellferry_shard_changes (key, changed_at)"
            " SELECT 'dedup:x', clock_timestamp() - interval '2 hours' FROM generate_series(1, 400)"
        )
        client.execute(
            "DO $$ BEGIN FOR n IN 1..3000 LOOP"
            " INSERT INTO cellferry_shard VALUES (convert_to('dedup:' || n, 'UTF8'), 'x');"
            " END LOOP; END $$"
        )
        left = client.execute("SELECT count(*) FROM cellferry_shard_changes").fetchone()
    assert left == (3000,)
    side.close()


def test_a_writer_of_an_older_step_writes_no_more(tables: Tables) -> None:
    made = plan(THREE, FOUR, tables.source)
    old = Lanes(made, "shard-0", tables.source, fence=5)
    old.targets["shard-3"].put([b"dedup:early"], [Record(b"early")])
    with Follower(made.turned(), "shard-3", tables.source, fence=6):
        with pytest.raises((LeaseLost, TransientError)):
            old.targets["shard-3"].put([b"dedup:late"], [Record(b"late")])
        with pytest.raises(LeaseLost, match="newer step"):
            copy(made, "shard-0", tables.source, fence=5)
    assert set(tables.held(3)) == {b"dedup:early"}
    old.close()


def test_the_fence_holds_where_the_session_was_not_ended(tables: Tables) -> None:
    """Ending sessions may need a right; the statement itself looks at the number."""
    made = plan(THREE, FOUR, tables.source)
    old = Lanes(made, "shard-0", tables.source, fence=5)
    with tables.connect(3) as connection:
        connection.execute("UPDATE cellferry_shard_fence SET number = 6")
    target = old.targets["shard-3"]
    for write in (
        lambda: target.put([b"dedup:late"], [Record(b"late")]),
        lambda: target.put([b"dedup:late"], [None]),
        lambda: target.remove([b"dedup:late"]),
    ):
        with pytest.raises(LeaseLost, match="newer step"):
            write()
    assert tables.held(3) == {}
    old.close()


def test_rows_whose_time_is_over_count_as_absent_and_go_at_clean_up(tables: Tables) -> None:
    wanted = tables.fill(600)
    made = plan(THREE, FOUR, tables.source)
    mine = [key for key in wanted if made.moved("shard-0", [key])]
    stays = next(key for key in wanted if FOUR.owner(key) == "shard-0")
    over = "UPDATE cellferry_shard SET expires_at = now() - interval '1 s' WHERE key = ANY(%s)"
    with tables.connect(0) as connection:
        connection.execute(over, [[mine[0], stays]])
    result = copy(made, "shard-0", tables.source, fence=1)
    assert result.keys == len(mine) - 1
    with tables.connect(0) as connection:
        connection.execute(over, [mine[:2]])
    with tables.connect(3) as connection:
        connection.execute("DELETE FROM cellferry_shard WHERE key = %s", [mine[2]])
    found = verify(made, "shard-0", tables.source)
    assert {(one["key"].encode(), one["what"]) for one in found.names} == {
        (mine[1], "only there"),
        (mine[2], "missing there"),
    }
    cleaned = cleanup(made, "shard-0", tables.source, fence=2, batch=7)
    assert (cleaned.removed, cleaned.expired, cleaned.kept) == (len(mine) - 3, 3, 1)
    with tables.connect(0) as connection:
        rows = connection.execute("SELECT key FROM cellferry_shard").fetchall()
    left = {bytes(key) for (key,) in rows}
    assert mine[2] in left
    assert stays not in left
    assert not left & {mine[0], mine[1], *mine[3:]}


def test_a_stopped_copy_goes_on_where_it_was(tables: Tables, tmp_path: Path) -> None:
    tables.fill()
    made = plan(THREE, FOUR, tables.source)
    points = FileCheckpoints(tmp_path)
    left = iter(range(9))

    def fuse() -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cellferry.shards.copier._SAVE_EVERY_S", 0.0)
        patch.setattr("cellferry.shards.copier._PAGE_KEYS", 100)
        with pytest.raises(KeyboardInterrupt):
            copy(made, "shard-0", tables.source, fence=1, checkpoints=points, check=fuse)
    result = copy(made, "shard-0", tables.source, fence=1, checkpoints=points)
    assert result.resumed
    assert result.sent < made.keys_from("shard-0")
    assert verify(made, "shard-0", tables.source).ok
