"""Comparing one organization in two cells: cellferry beside an aggregate and a full compare."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psycopg
from tests.bench.cells import DESTINATION, OWNED, SOURCE, BenchCells, condition
from tests.bench.harness import Bench, Cost, Section, Table, Target, in_turn, median, timed

from cellferry.errors import VerificationFailed
from cellferry.stores.postgres.verifier import Verifier

CELLFERRY = "cellferry verify"
AGGREGATE = "md5 aggregate, both sides"
COMPARE = "full compare at the client"

#: The verifier's methods, in words: where its time goes.
PARTS = {
    "_compare": "rows compared",
    "_references": "foreign keys at the destination",
    "_orphans": "orphans at the destination",
    "_imported": "shared rows that came along",
}

_METHOD = """
The same organization as in the copy, copied and caught up; nobody writes. *cellferry* runs the
verify step: counts and hashes in buckets on both sides at once, then orphans and every foreign key
of the organization's rows at the destination, which neither peer looks at. *The aggregate* is
`md5(string_agg(md5(row), '' ORDER BY key))` of each table, on both sides at once: it says which
table differs, and not which row. *The full compare* reads both sides in the order of the key in
binary and compares row by row in Python. The peers compare the same tables; none of the three is
given more than one session a cell, nor parallel workers. At the end one row is changed at the
destination behind everybody's back, and each contender must find it. reladiff, which hashes
segments of keys with MD5 in the database and fetches those that differ, is not run: it is not among
the project's dependencies.
"""


@dataclass
class _Comparisons:
    """The contenders; each returns the tables or rows in which it found a difference."""

    cells: BenchCells
    migration: int
    keys: dict[str, str] = field(default_factory=dict)
    parts_s: list[Mapping[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        with self.cells.admin(SOURCE) as connection:
            self.keys = dict(
                connection.execute(
                    "SELECT c.relname::text, string_agg(format('t.%I', a.attname), ', '"
                    " ORDER BY array_position(i.indkey::smallint[], a.attnum))"
                    " FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indrelid"
                    " JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum = ANY(i.indkey)"
                    " WHERE i.indisprimary AND c.relnamespace = 'public'::regnamespace GROUP BY 1"
                ).fetchall()
            )

    def cellferry(self) -> list[str]:
        """Run the verify step."""
        with _timed() as parts:
            try:
                self.cells.run("verify", self.migration)
            except VerificationFailed as error:
                return [str(error)]
        self.parts_s.append(parts)
        return []

    def aggregate(self) -> list[str]:
        """Compare one md5 of each table."""
        with (
            self._peer(SOURCE) as here,
            self._peer(DESTINATION) as there,
            ThreadPoolExecutor(2) as pool,
        ):
            different = []
            for table in OWNED:
                digest = f"md5(string_agg(md5(t::text), '' ORDER BY {self.keys[table]}))"
                statement = (
                    f"SELECT count(*), {digest} FROM {table} AS t WHERE {condition(table)}"
                ).encode()
                one, other = pool.map(
                    lambda side, statement=statement: side.execute(statement).fetchone(),
                    (here, there),
                )
                if one != other:
                    different.append(table)
        return different

    def compare(self) -> list[str]:
        """Read both sides in the order of the key, and compare row by row."""
        different = []
        with self._peer(SOURCE) as here, self._peer(DESTINATION) as there:
            for table in OWNED:
                sides = self._rows(here, table), self._rows(there, table)
                different += [table for one, other in zip(*sides, strict=True) if one != other]
        return different

    def _peer(self, cell: str) -> psycopg.Connection[Any]:
        """Connect as a peer, which has one server process a cell, as cellferry has."""
        connection = self.cells.admin(cell)
        connection.execute("SET max_parallel_workers_per_gather = 0")
        return connection

    def _rows(self, connection: psycopg.Connection, table: str) -> Iterator[bytes]:
        statement = (
            f"COPY (SELECT t.* FROM {table} AS t WHERE {condition(table)}"
            f" ORDER BY {self.keys[table]}) TO STDOUT (FORMAT binary)"
        ).encode()
        with connection.cursor() as cursor, cursor.copy(statement) as stream:
            for message in stream:
                yield bytes(message)


@contextmanager
def _timed() -> Iterator[dict[str, float]]:
    """Yield the seconds that verifiers spend in each of their parts meanwhile."""
    spent = dict.fromkeys(PARTS, 0.0)

    def add(name: str, seconds: float) -> None:
        spent[name] += seconds

    with ExitStack() as stack:
        for name in PARTS:
            stack.enter_context(timed(Verifier, name, partial(add, name)))
        yield spent


def run(bench: Bench) -> Section:
    """Measure on equal sides, then let each contender find one changed row."""
    cells = BenchCells.made(bench, bench.size(2_000_000))
    migration = cells.plan()
    cells.run("copy", migration)
    cells.run("sync", migration)
    bench.say("copied")
    with cells.admin(DESTINATION) as connection:
        connection.execute("VACUUM ANALYZE")
    comparisons = _Comparisons(cells, migration)
    contenders = {
        CELLFERRY: comparisons.cellferry,
        AGGREGATE: comparisons.aggregate,
        COMPARE: comparisons.compare,
    }

    def insist_on_equal(name: str) -> None:
        if found := contenders[name]():
            raise RuntimeError(f"{name} finds a difference where there is none: {found}")

    costs = in_turn(
        {name: lambda name=name: insist_on_equal(name) for name in contenders},
        cells.meter(),
        bench.runs,
        said=bench.say,
    )
    with cells.admin(DESTINATION) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute(
            "UPDATE time_entries SET hours = hours + 0.25 WHERE id ="
            " (SELECT max(id) FROM time_entries WHERE organization_id = 1)"
        )
    found = {name: contender() for name, contender in contenders.items()}
    for name, told in found.items():
        if len(told) != 1 or "time_entries" not in told[0]:
            raise RuntimeError(f"{name} does not find the changed row: {told}")
    rows = cells.rows - cells.count(SOURCE)["users"]
    parts = {name: statistics.median(one[name] for one in comparisons.parts_s) for name in PARTS}
    return _section(costs, rows, found, parts)


def _section(
    costs: Mapping[str, list[Cost]],
    rows: int,
    found: Mapping[str, list[str]],
    parts: Mapping[str, float],
) -> Section:
    def cpu(name: str) -> float:
        return median(costs[name], lambda one: one.total_cpu_s)

    def part(name: str, of: str) -> float:
        return median(costs[name], lambda one: one.cpu_s[of])

    def wall(name: str) -> float:
        return median(costs[name])

    table = Table(
        ("Contender", "rows", "wall s", "rows/s", "CPU s: client", "source", "destination",
         "topology", "all", "rows per CPU s"),
        [
            (name, rows, wall(name), rows / wall(name),
             *(part(name, of) for of in ("client", "source", "destination", "topology")),
             cpu(name), rows / cpu(name))
            for name in costs
        ],
        "Medians; rows are counted once, and read on both sides",
    )  # fmt: skip
    whole = wall(CELLFERRY)
    rest = whole - sum(parts.values())
    profile = Table(
        ("part of cellferry's verify", "wall s", "share"),
        [
            *((words, parts[name], parts[name] / whole) for name, words in PARTS.items()),
            ("everything else: sessions, lease, snapshots, key log, reports", rest, rest / whole),
        ],
        "Where its time goes",
    )
    share = {of: part(CELLFERRY, of) / cpu(CELLFERRY) for of in ("client", "source", "destination")}
    why = (
        f"{parts['_compare']:.1f} s compare rows; the rest is for what no peer does, of which"
        f" foreign keys take {parts['_references']:.1f} s, one after the other on one session;"
        f" of cellferry's CPU {share['source']:.0%} is the source's, {share['destination']:.0%} the"
        f" destination's and {share['client']:.0%} the client's"
    )
    return Section(
        title="Verify",
        method=_METHOD,
        tables=[table, profile],
        targets=[
            Target(
                "Wall time of verify against a full compare",
                1.0,
                wall(CELLFERRY) / wall(COMPARE),
                why=why,
            ),
            Target(
                "Wall time of verify against an md5 aggregate",
                1.0,
                wall(CELLFERRY) / wall(AGGREGATE),
                why=why,
            ),
        ],
        remarks=[
            (
                "One changed row at the destination was found by all. cellferry names the row"
                f" (“{_short(found[CELLFERRY][0])}”), the aggregate the table"
                f" ({found[AGGREGATE][0]})."
            )
        ],
    )


def _short(text: str) -> str:
    return text.split("; ", maxsplit=1)[0].split(" [", maxsplit=1)[0][:160]
