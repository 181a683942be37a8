"""How fast keys move between shards, when a fourth is added to three by the ring's rule."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import psycopg
from tests.bench.harness import Bench, Cost, Meter, Section, Table, in_turn, median
from tests.bench.migrating import migrate

from cellferry.local.postgres_server import PostgresServer
from cellferry.local.valkey_server import ValkeyServer
from cellferry.shards.cleanup import cleanup
from cellferry.shards.copier import copy, shares
from cellferry.shards.follower import Follower
from cellferry.shards.placement import Ring, Shard
from cellferry.shards.plan import Plan
from cellferry.shards.planning import plan
from cellferry.shards.postgres_server import PostgresShard
from cellferry.shards.settings import ShardSet
from cellferry.shards.sides import open_side
from cellferry.shards.verify import verify
from cellferry.stores.redis.wire import Address, Wire
from cellferry.stores.throttle import Throttle

KEYS = {"redis": 600_000, "postgres": 150_000}
RATES = (1_000, 20_000)
"""Moved keys a second at which the throttle is measured."""
BATCHES = (100, 500)
SOURCES = 3
DAY_MS = 24 * 3600 * 1000

OURS = "copy, a process for each source"
ALONE = "copy, one process, one source after the other"
MIGRATE = {size: f"MIGRATE COPY, batches of {size}, a process for each source" for size in BATCHES}

Urls = dict[str, str]


def shard_set(kind: str, count: int) -> ShardSet:
    """Return the set of the first `count` shards, whose connections are `c0`, `c1` …"""
    shards = tuple(Shard(f"shard-{n}") for n in range(count))
    return ShardSet(
        "dedup", kind, b"dedup:", Ring(shards), {f"shard-{n}": f"c{n}" for n in range(count)}
    )


# --- in the worker processes ------------------------------------------------------------------


def warm(_: int) -> int:
    """Have this module imported, in each process of the pool."""
    time.sleep(0.2)
    return os.getpid()


def fill(kind: str, urls: Urls, first: int, last: int) -> int:
    """Put keys, each with a token and an expiry, where they belong among three shards."""
    three = shard_set(kind, SOURCES)
    until = int(time.time() * 1000) + 14 * DAY_MS
    write = {"redis": _write_redis, "postgres": _write_postgres}[kind]
    for start in range(first, last, 3000):
        numbers = range(start, min(start + 3000, last))
        keys = [b"dedup:%032x" % (number * 2654435761) for number in numbers]
        owners = three.owners(keys)
        for index in range(SOURCES):
            mine = [
                (key, b"token-%010d" % number, until + number % 100_000)
                for number, key, owner in zip(numbers, keys, owners, strict=True)
                if owner == index
            ]
            write(urls[f"c{index}"], mine)
    return last - first


def _write_redis(url: str, rows: list[tuple[bytes, bytes, int]]) -> None:
    with Wire(Address.parse(url, "bench"), "bench:fill") as wire:
        wire.checked([("SET", key, value, "PXAT", until) for key, value, until in rows])


def _write_postgres(url: str, rows: list[tuple[bytes, bytes, int]]) -> None:
    with (
        psycopg.connect(url) as connection,
        connection.cursor() as cursor,
        cursor.copy("COPY cellferry_shard (key, value, expires_at) FROM STDIN") as copy_in,
    ):
        for key, value, until in rows:
            moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(until // 1000))
            row = ("\\x" + key.hex(), "\\x" + value.hex(), f"{moment}.{until % 1000:03}+00")
            copy_in.write_row(row)


def run_copy(
    document: dict[str, Any], shard: str, urls: Urls, rate: float | None, fence: int
) -> int:
    """Copy the moved keys of one source."""
    made = Plan.from_document(document)
    return copy(made, shard, urls.get, fence=fence, throttle=Throttle(rate)).sent


def run_until(
    document: dict[str, Any], shard: str, urls: Urls, rate: float, stop_at: float, fence: int
) -> int:
    """Copy until a moment of the wall clock."""

    def check() -> None:
        if time.time() > stop_at:
            raise TimeoutError

    made = Plan.from_document(document)
    try:
        return copy(made, shard, urls.get, fence=fence, throttle=Throttle(rate), check=check).sent
    except TimeoutError:
        return 0


def run_migrate(document: dict[str, Any], shard: str, urls: Urls, batch: int) -> int:
    """Scan one source, keep what moves, and send it with MIGRATE."""
    made = Plan.from_document(document)
    side = open_side(made.old, shard, urls.get)
    pages = (made.moved(shard, page.keys).get(f"shard-{SOURCES}", []) for page in side.scan())
    with Wire(Address.parse(urls[made.old.connections[shard]], shard), "bench:migrate") as wire:
        count = migrate(wire, Address.parse(urls[f"c{SOURCES}"], "destination"), pages, batch)
    side.close()
    return count


def run_sweep(document: dict[str, Any], shard: str, urls: Urls, fence: int) -> int:
    """Compare everything, as the follower does when it begins."""
    with Follower(Plan.from_document(document), shard, urls.get, fence=fence) as follower:
        follower.open_feed()
        figures = follower.sweep()
        follower.finish()
        return figures.compared


def run_verify(document: dict[str, Any], shard: str, urls: Urls) -> int:
    """Verify everything."""
    found = verify(Plan.from_document(document), shard, urls.get)
    found.refuse()
    return found.compared


def run_cleanup(document: dict[str, Any], shard: str, urls: Urls, fence: int) -> int:
    """Remove the old owner's copies."""
    found = cleanup(Plan.from_document(document), shard, urls.get, fence=fence)
    if found.kept:
        raise RuntimeError(f"{found.kept} keys were kept")
    return found.removed


def contents(kind: str, url: str) -> dict[bytes, tuple[bytes, int]]:
    """Read every key of a shard with its value and expiry, by commands that no contender uses."""
    if kind == "postgres":
        with psycopg.connect(url) as connection:
            rows = connection.execute(
                "SELECT key, value, (extract(epoch FROM expires_at) * 1000000)::bigint"
                " FROM cellferry_shard"
            )
            return {bytes(key): (bytes(value), expires) for key, value, expires in rows}
    found: dict[bytes, tuple[bytes, int]] = {}
    with Wire(Address.parse(url, "bench"), "bench:verify") as wire:
        cursor = b"0"
        while True:
            cursor, keys = wire.call("SCAN", cursor, "MATCH", "dedup:*", "COUNT", 5000)
            values = wire.checked([("GET", key) for key in keys])
            expiries = wire.checked([("PEXPIRETIME", key) for key in keys])
            found |= dict(zip(keys, zip(values, expiries, strict=True), strict=True))
            if cursor == b"0":
                return found


# --- one kind of server -----------------------------------------------------------------------


@dataclass
class Shards:
    """Three filled servers of one kind, an empty fourth, and the plan that adds it."""

    kind: str
    servers: Sequence[ValkeyServer | PostgresServer]
    urls: Urls
    pool: ProcessPoolExecutor
    keys: int
    meter: Meter
    plan: Plan = field(init=False)
    shift_ms: dict[str, int] = field(default_factory=dict)
    _fences: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def fill(self) -> None:
        """Make the keys."""
        step = -(-self.keys // SOURCES)
        starts = range(0, self.keys, step)
        ends = [min(start + step, self.keys) for start in starts]
        if self.kind == "postgres":
            for name, url in self.urls.items():
                shard = PostgresShard(url, name)
                shard.install()
                shard.close()
        self.for_each(fill, [self.kind] * len(starts), [self.urls] * len(starts), starts, ends)

    def make_plan(self) -> Mapping[str, float]:
        """Look at every key, and plan."""
        three, four = shard_set(self.kind, SOURCES), shard_set(self.kind, SOURCES + 1)
        self.plan = plan(three, four, self.urls.get, throttle_keys_s=1000)
        return {"keys": self.plan.keys}

    def for_each(self, work: Callable[..., int], *arguments: Sequence[Any]) -> Mapping[str, float]:
        """Run `work` in the pool, once for each element of the arguments."""
        return {"keys": sum(self.pool.map(work, *arguments))}

    def each_source(self, work: Callable[..., int], *more: Any) -> Mapping[str, float]:
        """Run `work` for each source in a process of its own."""
        document, sources = self.plan.document(), self.plan.sources
        given = [[one] * len(sources) for one in (document, self.urls, *more)]
        return self.for_each(work, given[0], sources, *given[1:])

    def copy(self) -> Mapping[str, float]:
        """Copy, all sources at once."""
        return self.each_source(run_copy, None, self.fence())

    def copy_alone(self) -> Mapping[str, float]:
        """Copy, one source after the other."""
        document, fence = self.plan.document(), self.fence()
        one_by_one = (
            self.pool.submit(run_copy, document, name, self.urls, None, fence).result()
            for name in self.plan.sources
        )
        return {"keys": sum(one_by_one)}

    def fence(self) -> int:
        """Return a number above all before."""
        return next(self._fences)

    def empty_destination(self) -> None:
        """Make the added shard as it was before anything was copied."""
        url = self.urls[f"c{SOURCES}"]
        if self.kind == "postgres":
            with psycopg.connect(url) as connection:
                connection.execute("TRUNCATE cellferry_shard")
        else:
            with Wire(Address.parse(url, "bench"), "bench") as wire:
                wire.call("FLUSHALL", "SYNC")

    def arrived(self) -> int:
        """Count the keys of the added shard."""
        url = self.urls[f"c{SOURCES}"]
        if self.kind == "postgres":
            with psycopg.connect(url) as connection:
                row = connection.execute("SELECT count(*) FROM cellferry_shard").fetchone()
                return row[0] if row else 0
        with Wire(Address.parse(url, "bench"), "bench") as wire:
            return int(wire.call("DBSIZE"))

    def check_arrived(self, who: str) -> None:
        """Compare what is there with the sources, key by key.

        Raises:
            RuntimeError: a key or a value is missing, too much, or different.
        """
        here: dict[bytes, tuple[bytes, int]] = {}
        for number in range(SOURCES):
            found = contents(self.kind, self.urls[f"c{number}"])
            moved = self.plan.moved(f"shard-{number}", list(found))
            here |= {key: found[key] for key in moved.get(f"shard-{SOURCES}", [])}
        there = contents(self.kind, self.urls[f"c{SOURCES}"])
        if {key: one for key, (one, _) in here.items()} != {
            key: one for key, (one, _) in there.items()
        }:
            raise RuntimeError(f"{who}: {len(there)} keys arrived of {len(here)}, or differ")
        shift = max((abs(here[key][1] - there[key][1]) for key in here), default=0)
        if shift and who in (OURS, ALONE):
            raise RuntimeError(f"{who}: expiries differ by up to {shift}")
        self.shift_ms[who] = max(shift, self.shift_ms.get(who, 0))

    def throttled(self, rate: int) -> tuple[float, float]:
        """Copy at a rate; return seconds in the middle of it, and keys that arrived in each."""
        self.empty_destination()
        parts, document, fence = shares(self.plan, rate), self.plan.document(), self.fence()
        seconds = min(8.0, self.plan.keys_to_move / rate * 0.5)
        stop_at = time.time() + seconds + 4
        running = [
            self.pool.submit(run_until, document, name, self.urls, part, stop_at, fence)
            for name, part in parts.items()
        ]
        while self.arrived() < min(rate / 2, self.plan.keys_to_move / 4):
            time.sleep(0.01)
        first, began = self.arrived(), time.perf_counter()
        time.sleep(seconds)
        last, took = self.arrived(), time.perf_counter() - began
        for one in running:
            one.result()
        return took, (last - first) / took


def _opened(bench: Bench, kind: str) -> Shards:
    servers: list[ValkeyServer | PostgresServer] = []
    urls: Urls = {}
    parts: dict[str, int] = {}
    for number in range(SOURCES + 1):
        name = f"{kind}-{number}"
        server: ValkeyServer | PostgresServer
        if kind == "redis":
            server = bench.valkey(name)
            urls[f"c{number}"] = server.url()
        else:
            server = bench.postgres(name, {"shared_buffers": "64MB"})
            urls[f"c{number}"] = server.url()
        if server.identity is None:
            raise RuntimeError(f"{name} does not run")
        parts[name] = server.identity.pid
        servers.append(server)
    pool = bench.stack.enter_context(ProcessPoolExecutor(SOURCES, mp_context=get_context("spawn")))
    list(pool.map(warm, range(SOURCES)))
    made = Shards(kind, servers, urls, pool, bench.size(KEYS[kind], 3000), Meter(parts))
    made.fill()
    return made


# --- the section ------------------------------------------------------------------------------


def run(bench: Bench) -> Section:
    """Measure every step that touches keys, for both kinds of shard."""
    tables, remarks = [], []
    for kind, title in (("redis", "Valkey shards"), ("postgres", "PostgreSQL shards")):
        shards = _opened(bench, kind)
        bench.say(f"{shards.keys} keys in {kind}")
        found = _measured(bench, shards)
        tables.append(_table(title, shards, found))
        if kind == "redis":
            remarks.append(_against_migrate(shards, found))
        remarks += _throttled(bench, shards)
    return Section(
        "Re-sharding",
        f"""A fourth shard is added to three, placed by the ring
        (decision 0005); keys of 38 bytes with a token and an expiry. Valkeys with append-only
        files, {bench.size(KEYS["redis"], 3000):,} keys, and PostgreSQL tables,
        {bench.size(KEYS["postgres"], 3000):,}. Plan, sweep and verification look at every key;
        the rest at those that move. The peer is MIGRATE COPY of the same keys by as many
        processes, two commands under way in each. After each copy keys, values and expiries of
        both sides are compared.""",
        tables,
        remarks=remarks,
    )


def _measured(bench: Bench, shards: Shards) -> dict[str, list[Cost]]:
    found = in_turn({"plan": shards.make_plan}, shards.meter, bench.runs, said=bench.say)
    copies: dict[str, Callable[[], Mapping[str, float] | None]] = {
        OURS: shards.copy,
        ALONE: shards.copy_alone,
    }
    if shards.kind == "redis":
        copies |= {name: _migrating(shards, size) for size, name in MIGRATE.items()}
    order: list[str] = []

    def before(name: str) -> None:
        if order:
            shards.check_arrived(order[-1])
        order.append(name)
        shards.empty_destination()

    found |= in_turn(copies, shards.meter, bench.runs, before_each=before, said=bench.say)
    shards.check_arrived(order[-1])
    shards.empty_destination()
    shards.copy()
    looks = {
        "sweep: all compared, nothing to bring": lambda: shards.each_source(
            run_sweep, shards.fence()
        ),
        "verify": lambda: shards.each_source(run_verify),
    }
    found |= in_turn(looks, shards.meter, bench.runs, said=bench.say)
    return found


def _migrating(shards: Shards, batch: int) -> Callable[[], Mapping[str, float]]:
    return lambda: shards.each_source(run_migrate, batch)


def _table(title: str, shards: Shards, found: Mapping[str, list[Cost]]) -> Table:
    added = f"{shards.kind}-{SOURCES}"
    rows = []
    for name, costs in found.items():
        keys = median(costs, lambda one: one.values["keys"])
        parts = [
            median(costs, lambda one: one.cpu_s["client"]),
            median(
                costs,
                lambda one: sum(
                    used for part, used in one.cpu_s.items() if part not in ("client", added)
                ),
            ),
            median(costs, lambda one: one.cpu_s[added]),
        ]
        rate = median(costs, lambda one: one.values["keys"] / one.wall_s)
        rows.append((name, int(keys), median(costs), rate, *parts))
    return Table(
        ("Step", "Keys", "Seconds", "Keys/s", "CPU client s", "CPU sources s", "CPU new shard s"),
        rows,
        title,
    )


def _against_migrate(shards: Shards, found: Mapping[str, list[Cost]]) -> str:
    rates = {
        name: median(costs, lambda one: one.values["keys"] / one.wall_s)
        for name, costs in found.items()
    }
    best = max(MIGRATE.values(), key=lambda name: rates[name])
    return (
        f"The copy has {rates[OURS] / rates[best]:.2f} times the rate of MIGRATE COPY at its"
        f" fastest (“{best}”). Largest difference of an expiry afterwards: cellferry"
        f" {shards.shift_ms[OURS]} ms, MIGRATE {shards.shift_ms[best]} ms."
    )


def _throttled(bench: Bench, shards: Shards) -> list[str]:
    """Measure the throttle, then the clean-up, which ends what can be measured."""
    remarks = []
    if shards.kind == "redis":
        for rate in RATES:
            took, found = shards.throttled(rate)
            remarks.append(
                f"Throttled to {rate:,} moved keys/s, {found:,.0f} arrived in each of"
                f" {took:.1f} s ({found / rate - 1:+.1%})."
            )
            bench.say(remarks[-1])
    shards.empty_destination()
    shards.copy()
    cost = shards.meter.measure(lambda: shards.each_source(run_cleanup, shards.fence()))
    removed = cost.values["keys"]
    remarks.append(
        f"Clean-up of {shards.kind} shards: {removed:,.0f} keys compared once more and removed in"
        f" {cost.wall_s:.2f} s, {removed / cost.wall_s:,.0f} keys/s (one run)."
    )
    return remarks
