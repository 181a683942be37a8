"""The checker of the re-sharding demo finds what it is there to find.

Clients work on a plain ring of real servers; then a fault is put in, and named.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from cellferry.local.dedup_checker import PREFIX, RunbookRing, Seeds, Verdict, check, seed
from cellferry.local.dedup_traffic import DedupClient, Recorder, Spec
from cellferry.shards.claims import Held
from cellferry.shards.redis_server import RedisShard
from fixtures.valkey import MakeValkey

NAMES = ("shard-0", "shard-1", "shard-2")
SEEDS = Seeds(2_000, 1_900_000_000_000)


class PlainClaim:
    def __init__(self, held: Held, token: bytes) -> None:
        self.accepted = held.token == token
        self.token = token


class PlainStore:
    """A sharded store that never changes its ring."""

    def __init__(self, urls: dict[str, str]) -> None:
        self.ring = RunbookRing(list(urls))
        self.servers = {name: RedisShard(url, name) for name, url in urls.items()}

    def at(self, key: bytes) -> RedisShard:
        return self.servers[self.ring.owner(key)]

    def claim(self, key: bytes, ttl_s: float) -> PlainClaim:
        token = secrets.token_bytes(16)
        return PlainClaim(
            self.at(key).claim(PREFIX + key, token, ttl_ms=round(ttl_s * 1000)), token
        )

    def release(self, key: bytes, token: bytes) -> bool:
        return self.at(key).delete(PREFIX + key, token=token)

    def get(self, key: bytes) -> bytes | None:
        return self.at(key).get(PREFIX + key)

    def set(self, key: bytes, value: bytes, ttl_s: float | None = None) -> None:
        self.at(key).set(PREFIX + key, value, ttl_ms=None if ttl_s is None else round(ttl_s * 1000))

    def delete(self, key: bytes) -> bool:
        return self.at(key).delete(PREFIX + key)

    def increment(self, key: bytes, by: int = 1) -> int:
        return self.at(key).increment(PREFIX + key, by)

    def close(self) -> None:
        for server in self.servers.values():
            server.close()


class Played:
    """Three clients have worked for a second; what they recorded, and where."""

    def __init__(self, urls: dict[str, str], folder: Path) -> None:
        self.urls = urls
        self.ledgers = [folder / f"client-{number}.jsonl" for number in range(3)]

    def check(self, now: tuple[str, ...] = NAMES, *, is_clean: bool = True) -> Verdict:
        return check(
            self.ledgers, SEEDS, shards=self.urls, before=NAMES, now=now, is_clean=is_clean
        )

    def outcomes(self, outcome: str) -> list[tuple[int, bytes]]:
        """Ledger number and id of each shared claim that ended so."""
        found = []
        for number, path in enumerate(self.ledgers):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            for begun, ended in zip(lines[::2], lines[1::2], strict=True):
                if begun[3] == "claim" and ended[3] == outcome:
                    found.append((number, begun[4].encode()))
        return found


@pytest.fixture
def urls(own_valkey: MakeValkey) -> dict[str, str]:
    return {name: own_valkey().url() for name in NAMES}


@pytest.fixture
def played(urls: dict[str, str], tmp_path: Path) -> Iterator[Played]:
    seed(SEEDS, urls, NAMES)
    played = Played(urls, tmp_path)
    begin = time.time()
    clients = []
    for number, path in enumerate(played.ledgers):
        spec = Spec("dedup", "", str(path), number, 3, 400, SEEDS.count, begin, 10)
        store, recorder = PlainStore(urls), Recorder(path)
        client = DedupClient(store, spec, recorder)
        clients.append((client, store, recorder, threading.Thread(target=client.run)))
    for *_, thread in clients:
        thread.start()
    until = time.monotonic() + 120
    while min(path.read_bytes().count(b"\n") for path in played.ledgers) < 1_600:
        assert time.monotonic() < until
        time.sleep(0.1)
    for client, *_ in clients:
        client.stop()
    for _, store, recorder, thread in clients:
        thread.join()
        store.close()
        recorder.close()
    return played


def append(path: Path, *lines: object) -> None:
    with path.open("a") as ledger:
        ledger.writelines(json.dumps(line) + "\n" for line in lines)


def test_nothing_is_wrong_with_a_ring_that_stays(played: Played) -> None:
    verdict = played.check()
    assert (verdict.duplicates, verdict.wrongly_refused, verdict.mismatches) == (0, 0, 0), verdict
    assert verdict.accepted > 100
    assert verdict.refused > 100
    assert verdict.unknown == verdict.undecided == verdict.left_behind == 0
    assert verdict.moved == 0


def an_owned_key(played: Played, key: bytes) -> redis.Redis:
    return redis.Redis.from_url(played.urls[RunbookRing(NAMES).owner(key)])


def overwrite_a_seed(played: Played) -> None:
    with an_owned_key(played, b"pcs-seed-7") as server:
        server.set(PREFIX + b"pcs-seed-7", b"other", keepttl=True)


def prolong_a_seed(played: Played) -> None:
    with an_owned_key(played, b"pcs-seed-7") as server:
        server.pexpireat(PREFIX + b"pcs-seed-7", SEEDS.expires_ms(7) + 1)


def invent_a_counter(played: Played) -> None:
    with an_owned_key(played, b"count-of-nobody") as server:
        server.incrby(PREFIX + b"count-of-nobody", 1)


def count_once_more(played: Played) -> None:
    with an_owned_key(played, b"count-7") as server:
        server.incrby(PREFIX + b"count-7", 1)


def write_an_old_value(played: Played) -> None:
    with an_owned_key(played, b"value-1-7") as server:
        server.set(PREFIX + b"value-1-7", "1:0")


def bring_a_released_id_back(played: Played) -> None:
    with an_owned_key(played, b"own-1-1") as server:
        server.set(PREFIX + b"own-1-1", "somebody")
    now = time.time() * 1000
    append(
        played.ledgers[1],
        ["i", 10**6, now, "claim", "own-1-1", 3600_000],
        ["o", 10**6, now, "accepted", "00"],
        ["i", 10**6, now, "release", "own-1-1", None],
        ["o", 10**6, now, "done", None],
    )


def lose_an_accepted_id(played: Played) -> None:
    _, key = played.outcomes("accepted")[0]
    with an_owned_key(played, key) as server:
        server.unlink(PREFIX + key)


def leave_a_key_at_another_shard(played: Played) -> None:
    key = b"pcs-seed-7"
    other = next(name for name in NAMES if name != RunbookRing(NAMES).owner(key))
    with redis.Redis.from_url(played.urls[other]) as server:
        server.set(PREFIX + key, "left")


@pytest.mark.parametrize(
    "spoil",
    [
        overwrite_a_seed,
        prolong_a_seed,
        invent_a_counter,
        count_once_more,
        write_an_old_value,
        bring_a_released_id_back,
        lose_an_accepted_id,
        leave_a_key_at_another_shard,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_what_differs_is_a_mismatch(played: Played, spoil: Callable[[Played], None]) -> None:
    spoil(played)
    assert played.check().mismatches >= 1


def test_an_id_accepted_twice_is_a_duplicate(played: Played) -> None:
    number, key = next(one for one in played.outcomes("accepted") if one[1].startswith(b"pcs-"))
    now = time.time() * 1000
    append(
        played.ledgers[(number + 1) % 3],
        ["i", 10**6, now, "claim", key.decode(), 3600_000],
        ["o", 10**6, now, "accepted", "00"],
    )
    assert played.check().duplicates == 1


def test_a_seeded_id_that_is_accepted_is_a_duplicate(played: Played) -> None:
    now = time.time() * 1000
    append(
        played.ledgers[0],
        ["i", 10**6, now, "claim", "pcs-seed-9", 3600_000],
        ["o", 10**6, now, "accepted", "00"],
    )
    assert played.check().duplicates == 1


def refuse_a_new_id(played: Played) -> None:
    now = time.time() * 1000
    append(
        played.ledgers[0],
        ["i", 10**6, now, "claim", "pcs-999999", 3600_000],
        ["o", 10**6, now, "refused", "00"],
    )


def refuse_a_released_id(played: Played) -> None:
    now = time.time() * 1000
    append(
        played.ledgers[0],
        ["i", 10**6, now, "claim", "own-0-999999", 3600_000],
        ["o", 10**6, now, "refused", "00"],
    )


@pytest.mark.parametrize("spoil", [refuse_a_new_id, refuse_a_released_id])
def test_an_id_that_nobody_got_was_wrongly_refused(
    played: Played, spoil: Callable[[Played], None]
) -> None:
    spoil(played)
    assert played.check().wrongly_refused == 1


def test_a_killed_client_may_have_won_what_others_are_refused(played: Played) -> None:
    refuse_a_new_id(played)
    append(played.ledgers[1], ["i", 10**6, time.time() * 1000, "claim", "pcs-999999", 3600_000])
    with played.ledgers[1].open("a") as ledger:
        ledger.write('["o", 1000')  # and was killed in the middle of a line
    verdict = played.check()
    assert (verdict.wrongly_refused, verdict.undecided, verdict.unknown) == (0, 1, 1)


def test_a_ring_that_changed_without_moving_keys_misses_a_quarter(
    played: Played, own_valkey: MakeValkey
) -> None:
    played.urls["shard-3"] = own_valkey().url()
    verdict = played.check((*NAMES, "shard-3"), is_clean=False)
    assert verdict.mismatches > SEEDS.count / 5
    assert verdict.moved == 0
