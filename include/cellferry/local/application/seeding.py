"""Fills cells with organizations: one large, one hot, some tiny, the rest between."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from itertools import islice

import psycopg
import redis
from psycopg import sql

from cellferry.local.application.places import Place, key
from cellferry.model import Organization

#: Rows of each organization that writers change, spread over the range of keys.
HOT_ROWS = 120
_FIRST_ID = 101
_FIRST_SIZED_ID = 5001
_NAMES = (
    "aurora", "breeze", "cobalt", "dune", "ember", "fjord", "grove", "harbor", "islet",
    "juniper", "krill", "lagoon", "meadow", "nimbus", "orchid", "prairie", "quartz", "reef",
    "saffron", "tundra", "umber", "vale", "willow", "xenon", "yarrow", "zephyr",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Seed:
    """An organization to be made.

    Attributes:
        rows: about this many rows in PostgreSQL.
        keys: about this many keys in Redis.
        weight: its share of the traffic, relative to the others'.
    """

    organization: Organization
    cell: str
    rows: int
    keys: int
    weight: float = 1.0


def plan_seeds(
    organizations: int, rows: int, cells: Sequence[str], sizes: Sequence[int] = ()
) -> tuple[Seed, ...]:
    """Decide what to make: the first is the large one, the second hot, every fourth tiny.

    Most live in the first cell; the last quarter is spread over the others, so that a
    destination already holds organizations. Those of the given `sizes` come last.
    """
    settled = max(1, organizations // 4) if len(cells) > 1 and organizations > 3 else 0
    seeds = []
    for index in range(organizations):
        name = _NAMES[index % len(_NAMES)]
        slug = name if index < len(_NAMES) else f"{name}-{index // len(_NAMES) + 1}"
        away = index - (organizations - settled)
        size = rows if index == 0 else 40 + index if index % 4 == 3 else 1_500 + index * 350
        seeds.append(
            Seed(
                Organization(str(_FIRST_ID + index), slug),
                cells[1 + away % (len(cells) - 1)] if away >= 0 else cells[0],
                rows=size,
                keys=max(12, min(20_000, size // 20)),
                weight=4.0 if index == 1 else 2.0 if index == 0 else 1.0,
            )
        )
    for index, size in enumerate(sizes, start=_FIRST_SIZED_ID):
        keys = max(12, min(20_000, size // 20))
        seeds.append(Seed(Organization(str(index), f"sized-{size}"), cells[0], size, keys))
    return tuple(seeds)


def seed_cell(place: Place, seeds: Sequence[Seed]) -> Mapping[str, int]:
    """Make the organizations of one cell; return the number of rows of each."""
    script = resources.files("cellferry.local.application").joinpath("seed_organization.sql")
    made: dict[str, int] = {}
    with psycopg.connect(place.postgres, connect_timeout=10) as connection:
        connection.execute(sql.SQL(script.read_text("utf-8")))
        connection.execute("SET session_replication_role = replica")
        connection.execute("SET work_mem = '64MB'")
        connection.execute("SET synchronous_commit = off")
        for seed in seeds:
            row = connection.execute(
                "SELECT pg_temp.seed_organization(%s, %s, %s, %s)",
                (int(seed.organization.id), seed.organization.slug, seed.rows, HOT_ROWS),
            ).fetchone()
            made[seed.organization.id] = int(row[0]) if row else 0
            connection.commit()
    with psycopg.connect(place.postgres, autocommit=True, connect_timeout=10) as connection:
        connection.execute("CHECKPOINT")
        connection.execute("ANALYZE")
    with redis.Redis.from_url(place.redis) as client:
        for seed in seeds:
            _seed_keys(client, seed)
    return made


def seed(places: Mapping[str, Place], seeds: Sequence[Seed]) -> Mapping[str, int]:
    """Make all organizations, the cells side by side; return the number of rows of each."""
    made: dict[str, int] = {}
    with ThreadPoolExecutor(len(places)) as pool:
        parts = [
            pool.submit(seed_cell, place, [one for one in seeds if one.cell == name])
            for name, place in places.items()
        ]
        for part in parts:
            made.update(part.result())
    return made


def _seed_keys(client: redis.Redis, seed: Seed) -> None:
    """Make keys of every type under `cold`; writers never touch these."""
    commands = _key_commands(seed)
    while batch := list(islice(commands, 500)):
        pipeline = client.pipeline(transaction=False)
        for command in batch:
            pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
        pipeline.execute()


def _key_commands(seed: Seed) -> Iterator[tuple[str | float, ...]]:
    def name(kind: str, number: int) -> str:
        return key(seed.organization.id, "cold", kind, str(number))

    # what writers read together; a group must be there before its first member
    yield "XGROUP", "CREATE", key(seed.organization.id, "live", "stream"), "workers", 0, "MKSTREAM"
    later = int((time.time() + 86_400) * 1000)
    for number in range(seed.keys):
        match number % 10:
            case 0 | 1 | 2 | 3:
                yield "SET", name("session", number), f"user {number} " * 5, "PXAT", later + number
            case 4 | 5:
                yield "HSET", name("profile", number), "name", f"n{number}", "visits", number
            case 6:
                yield "RPUSH", name("queue", number), *(f"job-{one}" for one in range(8))
            case 7:
                scores = (part for one in range(6) for part in (one * 1.5, f"m{one}"))
                yield "ZADD", name("ranking", number), *scores
            case 8:
                yield "SADD", name("members", number), *(f"u{one}" for one in range(10))
            case _:
                yield "INCRBY", name("counter", number), number
    for number in range(min(4, max(1, seed.keys // 500))):
        stream = name("stream", number)
        for entry in range(30):
            yield "XADD", stream, f"{entry + 1}-0", "entry", entry
        yield "XGROUP", "CREATE", stream, "workers", 0
        yield "XREADGROUP", "GROUP", "workers", "w1", "COUNT", 10, "STREAMS", stream, ">"
        yield "XACK", stream, "workers", "1-0", "2-0", "3-0"
