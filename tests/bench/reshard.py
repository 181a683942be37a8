"""How fast keys move between shards: `python -m tests.bench.reshard [--keys 1500000]`.

Three real Valkeys with an append-only file, a fourth added; the runbook's ring. Prints a table and
writes `.local/bench-reshard.json`. The peer is MIGRATE with COPY, in batches and pipelined as
`redis-cli --cluster` sends it, of the same keys, by as many processes, in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cellferry.local.valkey_server import ValkeyServer
from cellferry.shards.cleanup import cleanup
from cellferry.shards.copier import copy, shares
from cellferry.shards.follower import Follower
from cellferry.shards.placement import Ring, Shard
from cellferry.shards.plan import Plan, plan
from cellferry.shards.settings import ShardSet
from cellferry.shards.sides import open_side
from cellferry.shards.verify import verify
from cellferry.stores.redis.wire import Address, Wire
from cellferry.stores.throttle import Throttle

Urls = dict[str, str]
DAY_MS = 24 * 3600 * 1000


def shard_set(count: int) -> ShardSet:
    shards = tuple(Shard(f"shard-{n}") for n in range(count))
    return ShardSet(
        "dedup", "redis", b"dedup:", Ring(shards), {f"shard-{n}": f"c{n}" for n in range(count)}
    )


THREE, FOUR = shard_set(3), shard_set(4)


# --- in the worker processes ------------------------------------------------------------------


def warm(_: int) -> int:
    time.sleep(0.2)
    return os.getpid()


def fill(urls: Urls, first: int, last: int) -> None:
    wires = [Wire(Address.parse(urls[f"c{n}"], f"c{n}"), "bench:fill") for n in range(3)]
    until = int(time.time() * 1000) + 14 * DAY_MS
    for start in range(first, last, 3000):
        keys = [b"dedup:%032x" % (n * 2654435761) for n in range(start, min(start + 3000, last))]
        owners = THREE.owners(keys)
        for index, wire in enumerate(wires):
            mine = [
                ("SET", key, b"token-%010d" % number, "PXAT", until + number % 100_000)
                for number, (key, owner) in enumerate(zip(keys, owners, strict=True), start)
                if owner == index
            ]
            wire.checked(mine)
    for wire in wires:
        wire.close()


def run_copy(
    document: dict[str, Any], shard: str, urls: Urls, rate: float | None, fence: int
) -> int:
    made = Plan.from_document(document)
    return copy(made, shard, urls.get, fence=fence, throttle=Throttle(rate)).sent


def run_until(document: dict[str, Any], shard: str, urls: Urls, rate: float, stop_at: float) -> int:
    """Copy until a moment of the wall clock."""

    def check() -> None:
        if time.time() > stop_at:
            raise TimeoutError

    made = Plan.from_document(document)
    try:
        return copy(made, shard, urls.get, fence=9, throttle=Throttle(rate), check=check).sent
    except TimeoutError:
        return 0


def run_migrate(document: dict[str, Any], shard: str, urls: Urls, batch: int) -> int:
    """SCAN, keep what moves, MIGRATE … COPY REPLACE KEYS; two batches under way."""
    made = Plan.from_document(document)
    side = open_side(made.old, shard, urls.get)
    wire = Wire(Address.parse(urls[made.old.connections[shard]], shard), "bench:migrate")
    to = Address.parse(urls["c3"], "c3")
    count, sent, waiting = 0, 0, list[bytes]()
    where = (to.host, to.port, "", 0, 60_000, "COPY", "REPLACE", "AUTH2", to.user, to.password)

    def migrate(keys: list[bytes]) -> None:
        nonlocal sent
        wire.send([("MIGRATE", *where, "KEYS", *keys)])  # type: ignore[list-item]
        sent += 1
        if sent > 1:
            wire.check(wire.receive(1)[0])

    for page in side.scan():
        waiting += made.moved(shard, page.keys).get("shard-3", [])
        while len(waiting) >= batch:
            migrate(waiting[:batch])
            count += batch
            waiting = waiting[batch:]
    if waiting:
        migrate(waiting)
        count += len(waiting)
    wire.check(wire.receive(1)[0])
    side.close()
    wire.close()
    return count


def run_sweep(document: dict[str, Any], shard: str, urls: Urls) -> int:
    with Follower(Plan.from_document(document), shard, urls.get, fence=20) as follower:
        follower.open_feed()
        figures = follower.sweep()
        follower.finish()
        return figures.compared


def run_verify(document: dict[str, Any], shard: str, urls: Urls) -> int:
    found = verify(Plan.from_document(document), shard, urls.get)
    found.refuse()
    return found.compared


def run_cleanup(document: dict[str, Any], shard: str, urls: Urls) -> int:
    found = cleanup(Plan.from_document(document), shard, urls.get, fence=30)
    if found.kept:
        raise RuntimeError(f"{found.kept} keys were kept")
    return found.removed


# --- the bench --------------------------------------------------------------------------------


class Bench:
    def __init__(self, keys: int, urls: Urls, pool: ProcessPoolExecutor) -> None:
        self.keys = keys
        self.urls = urls
        self.pool = pool
        self.rows: list[dict[str, Any]] = []

    def row(self, what: str, seconds: float | None, keys_s: float | None, note: str = "") -> None:
        self.rows.append({"what": what, "seconds": seconds, "keys_s": keys_s, "note": note})
        print(
            f"{what:44} {'' if seconds is None else f'{seconds:8.2f} s'}"
            f" {'' if keys_s is None else f'{keys_s:10,.0f} keys/s'}  {note}",
            flush=True,
        )

    def all(self, work: Callable[..., int], *arguments: Sequence[Any]) -> tuple[int, float]:
        """Run `work` for each source in a process of its own; returns keys and seconds."""
        began = time.perf_counter()
        total = sum(self.pool.map(work, *arguments))
        return total, time.perf_counter() - began

    def empty_destination(self) -> None:
        with Wire(Address.parse(self.urls["c3"], "c3"), "bench") as wire:
            wire.call("FLUSHALL", "SYNC")

    def arrived(self) -> int:
        with Wire(Address.parse(self.urls["c3"], "c3"), "bench") as wire:
            return int(wire.call("DBSIZE"))

    def run(self) -> None:
        self.fill()
        made = self.plan()
        document = made.document()
        sources = made.sources
        each = ([document] * len(sources), sources, [self.urls] * len(sources))
        self.copies(document, sources, each)
        for rate in (1_000, 20_000):
            self.throttle(made, document, rate)
        self.empty_destination()
        self.all(run_copy, *each, [None] * 3, [10] * 3)
        for what, work in (
            ("sweep: all compared, nothing to bring", run_sweep),
            ("verify all", run_verify),
            ("clean-up", run_cleanup),
        ):
            total, took = self.all(work, *each)
            self.row(what, took, total / took, f"{total} keys")

    def fill(self) -> None:
        step = -(-self.keys // 3)
        starts = range(0, self.keys, step)
        began = time.perf_counter()
        ends = [min(start + step, self.keys) for start in starts]
        list(self.pool.map(fill, [self.urls] * len(starts), starts, ends))
        self.row("(fill)", time.perf_counter() - began, None, f"{self.keys} keys in 3 shards")

    def plan(self) -> Plan:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            made = plan(THREE, FOUR, self.urls.get, throttle_keys_s=1000)
            times.append(time.perf_counter() - began)
        share = made.keys_to_move / made.keys
        note = f"{made.keys_to_move} of {made.keys} move ({share:.1%}), worst of 3"
        self.row("plan", max(times), made.keys / max(times), note)
        return made

    def copies(
        self, document: dict[str, Any], sources: tuple[str, ...], each: tuple[Any, ...]
    ) -> None:
        rates: dict[str, list[float]] = {}
        for fence in (1, 2):
            for name, run in (
                (
                    "copy, 3 processes",
                    lambda f=fence: self.all(run_copy, *each, [None] * 3, [f] * 3),
                ),
                (
                    "peer: MIGRATE COPY, batches of 100",
                    lambda: self.all(run_migrate, *each, [100] * 3),
                ),
                (
                    "peer: MIGRATE COPY, batches of 500",
                    lambda: self.all(run_migrate, *each, [500] * 3),
                ),
            ):
                self.empty_destination()
                total, took = run()
                if self.arrived() < total:
                    raise RuntimeError(f"{name}: {self.arrived()} of {total} arrived")
                rates.setdefault(name, []).append(total / took)
        self.empty_destination()
        began = time.perf_counter()
        total = sum(run_copy(document, name, self.urls, None, 3) for name in sources)
        rates["copy, 1 process, one source after the other"] = [
            total / (time.perf_counter() - began)
        ]
        for name, found in rates.items():
            rate = statistics.mean(found)
            runs = ", ".join(f"{one:,.0f}" for one in found)
            self.row(name, total / rate, rate, f"{total} keys; runs: {runs}")

    def throttle(self, made: Plan, document: dict[str, Any], rate: int) -> None:
        """Count what arrives, from outside, over some seconds in the middle."""
        self.empty_destination()
        parts = shares(made, rate)
        seconds = min(10.0, made.keys_to_move / rate * 0.6)
        stop_at = time.time() + seconds + 4
        names = list(parts)
        running = [
            self.pool.submit(run_until, document, name, self.urls, parts[name], stop_at)
            for name in names
        ]
        while self.arrived() < rate / 2:
            time.sleep(0.01)
        first, began = self.arrived(), time.perf_counter()
        time.sleep(seconds)
        last, took = self.arrived(), time.perf_counter() - began
        for one in running:
            one.result()
        found = (last - first) / took
        self.row(
            f"throttle at {rate:,} moved keys/s", took, found, f"{(found / rate - 1):+.2%} off"
        )


def servers(stack: ExitStack, root: Path) -> Iterator[ValkeyServer]:
    for number in range(4):
        server = ValkeyServer(root / f"shard-{number}", die_with_parent=True)
        stack.callback(server.remove)
        yield server.start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=1_500_000)
    parser.add_argument("--output", type=Path, default=Path(".local/bench-reshard.json"))
    arguments = parser.parse_args()
    with ExitStack() as stack:
        root = Path(tempfile.mkdtemp(prefix="bench-reshard-"))
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        urls = {f"c{n}": one.url() for n, one in enumerate(servers(stack, root))}
        pool = stack.enter_context(ProcessPoolExecutor(3, mp_context=get_context("spawn")))
        list(pool.map(warm, range(3)))
        bench = Bench(arguments.keys, urls, pool)
        bench.run()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    report = {"keys": arguments.keys, "cores": os.cpu_count(), "rows": bench.rows}
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
