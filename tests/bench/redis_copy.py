"""Copy of one organization's keys between two Valkeys, beside MIGRATE COPY and a full sync."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from statistics import median as median_of

from tests.bench import redis_neighbours
from tests.bench.harness import (
    Bench,
    Cost,
    Meter,
    Section,
    Table,
    Target,
    in_turn,
    percentile,
    pid_of,
)
from tests.bench.harness import median as median_cost
from tests.bench.migrating import migrate
from tests.bench.redis_neighbours import Neighbours

from cellferry.local.valkey_server import ValkeyServer
from cellferry.model import (
    Cell,
    Endpoint,
    Limits,
    Move,
    Organization,
    Resource,
    Strategy,
    Throttle,
)
from cellferry.stores.redis import payloads
from cellferry.stores.redis.comparison import scan
from cellferry.stores.redis.key_prefix import KeyPrefix
from cellferry.stores.redis.store import RedisMove, RedisStore
from cellferry.stores.redis.wire import Address, Command, Wire

KEYS = 200_000
OTHERS = 100_000
"""Keys of other organizations at the source; half as many at the destination."""
IDLE_S = 3.0
NICE = 10
OPTIONS = {"key_prefix": "org:{$organization}:", "application_user": "org-$organization"}
PREFIX = KeyPrefix.of(OPTIONS, "4", where="bench")
DAY_MS = 24 * 3600 * 1000

OURS = "cellferry copy"
IDLE = "nothing (idle)"
REPLICA = "full sync of a replica"
BATCHES = (10, 100, 500)
MIGRATE = {size: f"MIGRATE COPY, batches of {size}" for size in BATCHES}


# --- data -------------------------------------------------------------------------------------


def commands(prefix: bytes, count: int, expires_from: int) -> Iterator[Command]:
    """Yield what makes `count` keys of mixed kinds, four of ten with an expiry."""
    chance = random.Random(count)
    text = chance.randbytes(4096).hex().encode()
    for number in range(count):
        name = prefix + b"key:%07d" % number
        part = text[number % 4000 :]
        kind = number % 100
        if kind < 55:
            yield ("SET", name, b"%07d" % number + part[:93])
        elif kind < 70:
            fields = [one for n in range(10) for one in (b"field-%d" % n, part[n : n + 12])]
            yield ("HSET", name, *fields)
        elif kind < 80:
            yield ("RPUSH", name, *(part[n : n + 20] for n in range(20)))
        elif kind < 88:
            yield ("SADD", name, *(part[n : n + 10] for n in range(15)))
        elif kind < 96:
            yield ("ZADD", name, *(one for n in range(15) for one in (n, part[n : n + 10])))
        elif kind < 99:
            for n in range(8):
                yield ("XADD", name, f"{n + 1}-0", "event", part[n : n + 30], "n", n)
        elif number % 2000 == 99:  # large: half a megabyte
            yield ("HSET", name, *(one for n in range(5000) for one in (b"f%d" % n, part[:90])))
        else:
            yield ("SET", name, part[:4000])
        if number % 10 < 4:
            yield ("PEXPIREAT", name, expires_from + number)


def fill(server: ValkeyServer, prefix: bytes, count: int) -> None:
    """Make `count` keys with `prefix`."""
    with Wire(Address.parse(server.url(), "bench"), "bench:fill") as wire:
        waiting: list[Command] = []
        for command in commands(prefix, count, int(time.time() * 1000) + 14 * DAY_MS):
            waiting.append(command)
            if len(waiting) == 1000:
                wire.checked(waiting)
                waiting = []
        wire.checked(waiting)


@dataclass(frozen=True, slots=True)
class Read:
    """An organization's keys as a server holds them: the hash of each value, and its expiry."""

    keys: Mapping[bytes, tuple[bytes, int]]
    size: int

    @classmethod
    def of(cls, url: str) -> Read:
        """Read every key by a walk of its own, which no contender shares."""
        keys: dict[bytes, tuple[bytes, int]] = {}
        size = 0
        with Wire(Address.parse(url, "bench"), "bench:verify") as wire:
            for page in scan(wire, PREFIX, count=700):
                payloads.ask(wire, page)
                for key, one in zip(page, payloads.answers(wire, len(page)), strict=True):
                    if one is not None:
                        size += len(one.payload) if key not in keys else 0
                        value = payloads.settled_value(one.payload)
                        keys[key] = (hashlib.blake2b(value, digest_size=16).digest(), one.expires)
        return cls(keys, size)

    def expiry_shift_ms(self, other: Read, who: str) -> int:
        """Return by how much the expiry of any key differs.

        Raises:
            RuntimeError: a key or a value is missing, too much, or different.
        """
        if self.keys.keys() != other.keys.keys():
            raise RuntimeError(f"{who}: {len(other.keys)} keys of {len(self.keys)} arrived")
        shift = 0
        for key, (value, expires) in self.keys.items():
            theirs, their_expiry = other.keys[key]
            if value != theirs or (expires < 0) != (their_expiry < 0):
                raise RuntimeError(f"{who}: {key!r} differs")
            shift = max(shift, abs(expires - their_expiry))
        return shift


# --- contenders -------------------------------------------------------------------------------


class _Quiet:
    """A registry and a progress sink that keep nothing."""

    def intend(self, resource: Resource) -> None: ...

    def forget(self, resource: Resource) -> None: ...

    def report(
        self, store: str, phase: str, done: int, total: int | None, unit: str, note: str = ""
    ) -> None: ...

    def check(self) -> None: ...


@dataclass
class Servers:
    """The three servers, and each contender's way from the first to another."""

    source: ValkeyServer
    destination: ValkeyServer
    replica: ValkeyServer
    attempt: int = 0
    stack: ExitStack = field(default_factory=ExitStack)
    move: RedisMove | None = None

    def wire(self, server: ValkeyServer, name: str = "bench") -> Wire:
        """Return a connection as the administrator."""
        return Wire(Address.parse(server.url(), server.directory.name), name)

    def before(self, name: str) -> None:
        """Empty the destination, and take what of a move comes before its copy."""
        self.stack.close()
        with self.wire(self.destination) as wire:
            while pages := list(scan(wire, PREFIX)):
                for page in pages:
                    wire.call("UNLINK", *page)
            wire.call("UNLINK", PREFIX.marker("checkpoint"))
        with self.wire(self.replica) as wire:
            wire.checked([("REPLICAOF", "NO", "ONE"), ("FLUSHALL", "SYNC")])
        if name == OURS:
            self.attempt += 1
            quiet = _Quiet()
            opened = RedisStore().open(self._move(), quiet, quiet)
            self.move = self.stack.enter_context(opened)
            self.move.fence()
            self.move.open_capture()

    def _move(self) -> Move:
        cells = [
            Cell(name, {"redis": Endpoint(server.url(), server.url(), OPTIONS)})
            for name, server in (("cell-1", self.source), ("cell-2", self.destination))
        ]
        organization = Organization("4", "four")
        return Move(7, organization, *cells, 1, self.attempt, Strategy.ONLINE, Throttle(), Limits())

    def copy(self) -> int:
        """Copy with cellferry."""
        if self.move is None:
            raise RuntimeError("no move is open")
        return self.move.copy().count

    def migrate(self, batch: int) -> int:
        """Copy with MIGRATE."""
        to = Address.parse(self.destination.url(), "destination")
        with self.wire(self.source, "bench:scan") as scanner, self.wire(self.source) as wire:
            return migrate(wire, to, scan(scanner, PREFIX), batch)

    def synchronize(self) -> int:
        """Copy everything with a full sync; until its append-only file has everything as well."""
        with self.wire(self.source) as wire:
            before = _info(wire)["sync_full"]
        with self.wire(self.replica) as wire:
            wire.call("REPLICAOF", "127.0.0.1", self.source.port)
            until = time.monotonic() + 120
            while time.monotonic() < until:
                found = _info(wire)
                if (
                    found.get("master_link_status") == "up"
                    and found["aof_rewrite_in_progress"] == found["aof_rewrite_scheduled"] == "0"
                ):
                    break
                time.sleep(0.02)
            else:
                raise RuntimeError("the replica did not get ready")
            count = int(wire.call("DBSIZE"))
        with self.wire(self.source) as wire:
            if _info(wire)["sync_full"] == before:
                raise RuntimeError("that was no full sync")
        return count


def _info(wire: Wire) -> dict[str, str]:
    lines = wire.call("INFO", "everything").decode().splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


# --- the section ------------------------------------------------------------------------------


def run(bench: Bench) -> Section:
    """Measure the copy of an organization's keys."""
    keys, others = bench.size(KEYS, 2000), bench.size(OTHERS, 1000)
    servers = Servers(
        bench.valkey("source", settings={"repl-diskless-sync-delay": "0"}),
        bench.valkey("destination"),
        bench.valkey("replica", settings={"repl-diskless-load": "on-empty-db"}),
    )
    bench.stack.callback(lambda: servers.stack.close())
    with servers.wire(servers.replica) as wire:
        login = Address.parse(servers.source.url(), "source")
        wire.checked(
            [
                ("CONFIG", "SET", "masteruser", login.user or ""),
                ("CONFIG", "SET", "masterauth", login.password or ""),
            ]
        )
    fill(servers.source, PREFIX.encoded, keys)
    for server, count in ((servers.source, others), (servers.destination, others // 2)):
        fill(server, b"org:{5}:", count)
        with servers.wire(server) as wire:
            redis_neighbours.fill(wire)
    for server in (servers.source, servers.destination):
        with servers.wire(server) as wire:
            _provision(wire)
    expected = Read.of(servers.source.url())
    with servers.wire(servers.source) as wire:
        everything = int(wire.call("DBSIZE"))
    bench.say(f"{len(expected.keys)} keys, {expected.size / 2**20:.0f} MiB of payloads")

    near = bench.stack.enter_context(Neighbours(servers.source.url()))
    far = bench.stack.enter_context(Neighbours(servers.destination.url()))
    bench.stack.enter_context(_yielding())
    latencies: dict[str, list[tuple[list[float], list[float]]]] = {}
    shifts: dict[str, int] = {}

    def watched(name: str, work: Callable[[], int]) -> Callable[[], Mapping[str, float]]:
        def measured() -> Mapping[str, float]:
            near.take()
            far.take()
            count = work()
            latencies.setdefault(name, []).append((near.take(), far.take()))
            return {"keys": count}

        return measured

    def idle() -> int:
        time.sleep(max(IDLE_S * min(bench.scale, 1), 0.3))
        return 0

    works: dict[str, Callable[[], int]] = {OURS: servers.copy}
    works |= {name: _migrating(servers, size) for size, name in MIGRATE.items()}
    works |= {REPLICA: servers.synchronize, IDLE: idle}

    order: list[str] = []

    def check_last() -> None:
        if order and order[-1] != IDLE:
            there = servers.replica if order[-1] == REPLICA else servers.destination
            found = expected.expiry_shift_ms(Read.of(there.url()), order[-1])
            shifts[order[-1]] = max(found, shifts.get(order[-1], 0))

    def before(name: str) -> None:
        check_last()
        servers.before(name)
        order.append(name)
        time.sleep(0.3)  # for neighbours to have caught up

    meter = Meter(
        {
            "source": pid_of(servers.source),
            "destination": pid_of(servers.destination),
            "replica": pid_of(servers.replica),
            "neighbours": near.pid,
            "neighbours at the destination": far.pid,
        }
    )
    found = in_turn(
        {name: watched(name, work) for name, work in works.items()},
        meter,
        bench.runs,
        before_each=before,
        said=bench.say,
    )
    check_last()
    return _section(found, latencies, shifts, expected, everything, near.per_second)


@contextmanager
def _yielding() -> Iterator[None]:
    """Let servers and neighbours go first, as the task of a copy does; for every contender."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, max(NICE, before))
    try:
        yield
    finally:
        with suppress(PermissionError):  # only root may take it back
            os.setpriority(os.PRIO_PROCESS, 0, before)


def _migrating(servers: Servers, batch: int) -> Callable[[], int]:
    return lambda: servers.migrate(batch)


def _provision(wire: Wire) -> None:
    """Make the user of the organization's application, as a cell has it."""
    user: Command = ("ACL", "SETUSER", "org-4", "reset", "on", ">application", "~org:{4}:*")
    rights: Command = ("%R~cellferry:gate:{4}", "+@all", "-@dangerous", "-@admin")
    wire.call(*user, *rights)
    wire.call("ACL", "SAVE")


def _section(
    costs: Mapping[str, list[Cost]],
    latencies: Mapping[str, list[tuple[list[float], list[float]]]],
    shifts: Mapping[str, int],
    expected: Read,
    everything: int,
    per_second: int,
) -> Section:
    rates = {
        name: median_cost(found, lambda one: one.values["keys"] / one.wall_s)
        for name, found in costs.items()
    }
    p99 = {
        name: [median_of(percentile(run[side], 99) for run in found) for side in (0, 1)]
        for name, found in latencies.items()
    }
    p50 = {
        name: [median_of(percentile(run[side], 50) for run in found) for side in (0, 1)]
        for name, found in latencies.items()
    }

    def part(found: list[Cost], *names: str) -> float:
        return median_cost(found, lambda one: sum(one.cpu_s[name] for name in names))

    used = ("client", "source", "destination")
    speed = Table(
        ("Contender", "Keys", "Seconds", "Keys/s", "CPU client s", "CPU source s",
         "CPU destination s", "CPU µs/key"),
        [
            (
                name,
                int(found[0].values["keys"]),
                median_cost(found),
                rates[name],
                part(found, "client"),
                part(found, "source"),
                part(found, "destination", "replica"),
                part(found, *used, "replica")
                / found[0].values["keys"]
                * 1e6,
            )
            for name, found in costs.items()
            if name != IDLE
        ],
        "Speed",
    )  # fmt: skip
    gentle = Table(
        ("During", "Source p50 ms", "Source p99 ms", "Destination p50 ms", "Destination p99 ms"),
        [
            (
                name,
                p50[name][0],
                p99[name][0],
                None if name == REPLICA else p50[name][1],
                None if name == REPLICA else p99[name][1],
            )
            for name in latencies
        ],
        "Neighbours' commands",
    )
    best = max(MIGRATE.values(), key=lambda name: rates[name])
    gentlest = min(MIGRATE.values(), key=lambda name: p99[name][0])
    ours = max(p99[OURS])
    theirs = max(p99[best])
    return Section(
        "Redis: copying an organization's keys",
        f"""{len(expected.keys):,} keys of one organization (strings, hashes, lists, sets, sorted
        sets, streams; four of ten with an expiry; some of half a megabyte) in a Valkey among
        {everything - len(expected.keys):,} keys of others, to a Valkey that has others' keys.
        Append-only files, synced each second. The peers are MIGRATE COPY REPLACE KEYS with two
        commands under way, and the full sync of an empty replica, without delay and without a
        file between, which copies everything. Meanwhile a process at each server sends
        {per_second:,} small commands a second for other organizations. Timed is the copy alone:
        cellferry's connections, lease and change capture are made before. The client
        yields the processor to servers and neighbours, as the task of a copy does. After each run
        the keys of both sides are read, and counts, values and expiries compared.""",
        (speed, gentle),
        (
            Target(
                "Redis copy: rate against MIGRATE COPY at its fastest batch size",
                0.95,
                rates[OURS] / rates[best],
                at_least=True,
                why=""
                if rates[OURS] >= 0.95 * rates[best]
                else f"servers and client share {os.cpu_count()} cores, and the client uses"
                f" {part(costs[OURS], 'client') / part(costs[OURS], *used):.0%} of the copy's time",
            ),
            Target(
                "Redis copy: neighbours' p99 against MIGRATE COPY at that batch size",
                1.0,
                ours / theirs,
                why=""
                if ours <= theirs
                else f"servers, client and neighbours share {os.cpu_count()} cores: a command"
                " waits for the processor as well; without any copy the p99 is"
                f" {max(p99[IDLE]):.2f} ms",
            ),
        ),
        (
            (
                f"MIGRATE was fastest in “{best}”; the gentlest to neighbours at the source was"
                f" “{gentlest}” with {rates[gentlest]:,.0f} keys/s and a p99 of"
                f" {p99[gentlest][0]:.2f} ms there."
            ),
            (
                f"Largest difference of an expiry after the copy: cellferry {shifts[OURS]} ms,"
                f" MIGRATE {max(shifts[name] for name in MIGRATE.values())} ms (it sends how long"
                f" a key has left), full sync {shifts[REPLICA]} ms."
            ),
            (
                "A full sync takes every organization's keys, empties the destination first, and"
                " serves nobody there meanwhile."
            ),
        ),
    )
