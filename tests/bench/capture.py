"""Change capture: rounds over the key log, beside logical decoding of the same changes.

A writer in a process of its own changes rows of one organization at a steady rate. Each rate is
measured three times in turn: nothing captures; a logical slot is read (what a mover that builds on
replication must at least do, without applying anything); cellferry's rounds run, which also read
the rows and apply them. What the first took is subtracted from the other two.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import psycopg
from tests.bench.cells import DESTINATION, LARGE, SOURCE, SOURCE_OTHERS, BenchCells
from tests.bench.harness import Bench, Cost, Meter, Section, Table, median, percentile, turning

from cellferry.migration.context import attempt
from cellferry.migration.sync import ALLOWED
from cellferry.stores.base import StoreMove

RATES = (100, 1000, 5000)
"""Changed rows a second."""

PER_TRANSACTION = {100: 1, 1000: 10, 5000: 50}
NEIGHBOUR = SOURCE_OTHERS[0]
RHYTHM_S = 0.5
"""From the start of a round to the start of the next, if it is done by then."""

IDLE, DECODING, ROUNDS = "no capture", "logical decoding, read only", "rounds, applied"
WRITTEN, WRITTEN_ARMED = "without triggers", "through the armed gate, which logs keys"
BULK = ("issues", "comments", "events", "time_entries")
SLOT = "bench"
_PUBLICATION = f"CREATE PUBLICATION bench FOR TABLE {', '.join(BULK)}"

IDS = 5000
"""Rows that a writer changes in turn; its command line takes no more."""


def run(bench: Bench) -> Section:
    """Measure steady rates, a bulk change, a hot row, and many organizations at once."""
    cells = BenchCells.made(bench, bench.size(1_400_000))
    seconds = max(1.0, min(5.0, 5.0 * bench.scale))
    migration = cells.plan()
    cells.run("copy", migration)
    with cells.admin(SOURCE) as admin:
        admin.execute(_PUBLICATION.encode())
    with _rounds(cells, migration) as store:
        _drain(store)
        bench.say("copied; changes at steady rates")
        steady = _steady(bench, cells, store, seconds)
        bulk = _bulk(bench, cells, store)
        hot = _hot(bench, cells, store, max(50, bench.size(5000)))
    cells.run("sync", migration)
    verified = cells.run("verify", migration)
    bench.say(f"verified: {verified.summary}")
    many = _many(bench, cells, 20, seconds)
    return Section(
        title="Change capture",
        method=(
            "One organization of a cell shared with 49 others is changed by one writer (UPDATEs of"
            " comments by primary key; 1, 10 or 50 rows a transaction). Steady rates: processor"
            " time over that of the same writer without any capture, in a second of writing."
            " Rounds begin every half second and end with their rows durable and compared at the"
            " destination; the peer reads a logical slot of the same cell with pg_recvlogical and"
            " pgoutput, and applies nothing. Lag: from the start of a round to the end of the next,"
            " the age of the oldest change when it arrives. At the end the whole organization is"
            " verified. Bulk, hot row and many: the changes are made first, then captured by each;"
            " what the gate's triggers cost the writer of a bulk change is told beside it, for"
            " logical decoding takes nothing from the writer."
        ),
        tables=[steady, bulk, hot, many],
        remarks=["A slot decodes what all write; the key log holds only keys of those that move."],
    )


# ── what runs ───────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _rounds(cells: BenchCells, migration: int) -> Iterator[StoreMove]:
    """Yield the store of a migration's sync step, whose rounds the bench runs itself."""
    with cells.context() as context, attempt(context, migration, "sync", ALLOWED) as at:
        yield at.stores["postgres"]


def _drain(store: StoreMove) -> int:
    """Run rounds until nothing is left; return the keys applied."""
    applied = 0
    while True:
        done = store.sync()
        applied += done.applied
        if done.remaining == 0:
            return applied


@contextmanager
def _slot(cells: BenchCells) -> Iterator[None]:
    with cells.admin(SOURCE) as admin:
        admin.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (SLOT,))
        try:
            yield
        finally:
            _drop(admin, SLOT)


def _drop(admin: psycopg.Connection[Any], slot: str) -> None:
    """Drop a slot, as soon as the server has noticed that its reader has gone."""
    deadline = time.monotonic() + 30
    while True:
        try:
            admin.execute("SELECT pg_drop_replication_slot(%s)", (slot,))
        except psycopg.errors.ObjectInUse:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def _receiver(cells: BenchCells, slot: str, *until: str) -> subprocess.Popen[bytes]:
    """Start pg_recvlogical on `slot`; it writes nowhere."""
    command = [
        str(cells.source.bin_dir / "pg_recvlogical"),
        "-d", cells.connections[f"{SOURCE}-postgres-admin"], "-S", slot, "--start",
        "-f", "/dev/null", "-o", "proto_version=1", "-o", "publication_names=bench", *until,
    ]  # fmt: skip
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def _decode_all(cells: BenchCells, slot: str) -> None:
    """Read `slot` up to now."""
    with cells.admin(SOURCE) as admin:
        row = admin.execute(
            "SELECT lsn::text FROM pg_logical_emit_message(true, 'bench', 'end') AS lsn"
        ).fetchone()
    process = _receiver(cells, slot, "--endpos", str(row[0]) if row else "", "--no-loop")
    if process.wait(timeout=180) != 0:
        raise RuntimeError(f"pg_recvlogical did not reach the end of slot {slot}")


_WRITER = """
import sys, time, psycopg
url, ids, rate, per, seconds = sys.argv[1], sys.argv[2].split(","), *map(float, sys.argv[3:])
ids, per = [int(one) for one in ids], int(per)
rows, at, began = 0, 0, time.monotonic()
with psycopg.connect(url, autocommit=True, prepare_threshold=0) as connection:
    while (now := time.monotonic() - began) < seconds:
        if rows > rate * now:
            time.sleep(0.002)
            continue
        some = [ids[(at + n) % len(ids)] for n in range(per)]
        at += per
        done = connection.execute(
            "UPDATE comments SET body = body || '.' WHERE id = ANY(%s)", (some,), prepare=True)
        rows += done.rowcount
print(rows)
"""


def _writer(
    cells: BenchCells, ids: Sequence[int], rate: float, per: int, seconds: float
) -> subprocess.Popen[str]:
    """Start a writer that changes `rate` rows a second and prints how many it did."""
    url = cells.server(SOURCE).url("app", "bench", "application")
    given = (url, ",".join(map(str, ids)), rate, per, seconds)
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, *map(str, given)], stdout=subprocess.PIPE, text=True
    )


def _written(writer: subprocess.Popen[str]) -> int:
    told, _ = writer.communicate(timeout=600)
    if writer.returncode != 0 or int(told) == 0:
        raise RuntimeError("the writer failed")
    return int(told)


def _ids(cells: BenchCells, organization: int, at_most: int) -> list[int]:
    with cells.admin(SOURCE) as admin:
        rows = admin.execute(
            "SELECT id FROM comments WHERE organization_id = %s ORDER BY id LIMIT %s",
            (organization, at_most),
        ).fetchall()
    return [int(row[0]) for row in rows]


# ── steady rates ────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Seen:
    """Rounds of one run: when each began and ended, in seconds, and how many keys it applied."""

    times: list[tuple[float, float, int]]

    def figures(self) -> dict[str, float]:
        took = [ended - began for began, ended, _ in self.times]
        pairs = zip(self.times, self.times[1:], strict=False)
        lags = [later[1] - earlier[0] for earlier, later in pairs] or took
        return {
            "round_ms": statistics.median(took) * 1000,
            "lag_ms": percentile(lags, 95) * 1000,
            "keys": sum(keys for _, _, keys in self.times),
        }


def _steady(bench: Bench, cells: BenchCells, store: StoreMove, seconds: float) -> Table:
    mine, theirs = _ids(cells, LARGE, IDS), _ids(cells, NEIGHBOUR, IDS)
    parts = dict(cells.meter().parts)
    rows: list[list[Any]] = []
    for rate in RATES:
        per = PER_TRANSACTION[rate]

        def writing(ids: list[int], rate: int = rate, per: int = per) -> subprocess.Popen[str]:
            return _writer(cells, ids, rate, min(per, len(ids)), seconds)

        def idle(writing: Callable[..., Any] = writing) -> Mapping[str, float]:
            return {"rows": _written(writing(theirs))}

        def decoding(writing: Callable[..., Any] = writing) -> Mapping[str, float]:
            receiver = _receiver(cells, SLOT)
            try:
                return {"rows": _written(writing(theirs))}
            finally:
                receiver.terminate()
                receiver.wait(30)

        def rounds(writing: Callable[..., Any] = writing) -> Mapping[str, float]:
            writer, seen = writing(mine), _Seen([])
            while writer.poll() is None:
                began = time.perf_counter()
                done = store.sync()
                seen.times.append((began, time.perf_counter(), done.applied))
                time.sleep(max(0.0, began + RHYTHM_S - time.perf_counter()))
            written = _written(writer)
            seen.times[-1:] = [(*seen.times[-1][:2], seen.times[-1][2] + _drain(store))]
            return {"rows": written, **seen.figures()}

        found: dict[str, list[Cost]] = {IDLE: [], DECODING: [], ROUNDS: []}
        contenders = {IDLE: idle, DECODING: decoding, ROUNDS: rounds}
        for name in turning(contenders, bench.runs):
            with _slot(cells) if name == DECODING else nullcontext():
                found[name].append(Meter(parts).measure(contenders[name]))
        bench.say(f"{rate} rows/s: {', '.join(f'{k} {median(v):.1f} s' for k, v in found.items())}")
        base = found[IDLE]
        for name, costs in found.items():

            def extra(part: str, costs: list[Cost] = costs, base: list[Cost] = base) -> float:
                """Processor milliseconds in a second of writing, over the same without capture."""
                return 1000 * (
                    median(costs, lambda one: one.cpu_s[part]) / seconds
                    - median(base, lambda one: one.cpu_s[part]) / seconds
                )

            own = name == ROUNDS
            rows.append(
                [
                    rate,
                    name,
                    median(costs, lambda one: one.values["rows"] / seconds),
                    median(costs, lambda one: one.values["round_ms"]) if own else None,
                    median(costs, lambda one: one.values["lag_ms"]) if own else None,
                    *(None if name == IDLE else extra(part) for part in ("source", "client")),
                    extra("destination") if own else None,
                ]
            )
    return Table(
        (
            "Rows/s wanted", "", "Rows/s written", "Round, ms", "Lag p95, ms",
            "Source CPU, ms/s", "Client CPU, ms/s", "Destination CPU, ms/s",
        ),
        rows,
        "Steady changes of one organization",
    )  # fmt: skip


# ── a bulk change, a hot row ────────────────────────────────────────────────────────────────────


def _capture_row(what: str, name: str, rows: int, cost: Cost) -> list[Any]:
    return [
        what,
        name,
        rows,
        cost.wall_s,
        rows / cost.wall_s,
        cost.cpu_s["source"],
        cost.cpu_s["destination"],
        cost.cpu_s["client"],
    ]


_CAPTURED = (
    "", "", "Rows changed", "Seconds", "Rows/s", "Source CPU, s", "Destination CPU, s",
    "Client CPU, s",
)  # fmt: skip


def _bulk(bench: Bench, cells: BenchCells, store: StoreMove) -> Table:
    """Change about a million rows in a handful of statements, then capture them."""
    columns = _touchable(cells)
    rows: list[list[Any]] = []
    meter = cells.meter()

    def write(session: psycopg.Connection[Any]) -> Mapping[str, float]:
        changed = 0
        for table in BULK:
            column = columns[table]
            changed += session.execute(
                f"UPDATE {table} SET {column} = {column} WHERE organization_id = %s".encode(),
                (LARGE,),
            ).rowcount
        return {"rows": changed}

    # Without triggers nothing logs keys; each row keeps its values, so the copy stays equal.
    with cells.admin(SOURCE) as session:
        session.execute("SET session_replication_role = replica")
        plain = meter.measure(lambda: write(session))
    with _slot(cells):
        with cells.application(SOURCE, autocommit=True) as session:
            armed = meter.measure(lambda: write(session))
        changed = int(armed.values["rows"])
        bench.say(f"{changed:,} rows changed in {plain.wall_s:.1f} s, armed {armed.wall_s:.1f} s")
        for name, cost in ((WRITTEN, plain), (WRITTEN_ARMED, armed)):
            rows.append(_capture_row("the UPDATE itself", name, changed, cost))
        cost = meter.measure(lambda: _decode_all(cells, SLOT))
        rows.append(_capture_row("bulk", DECODING, changed, cost))
    applied = 0

    def rounds() -> None:
        nonlocal applied
        applied = _drain(store)

    cost = meter.measure(rounds)
    if applied < changed:
        raise RuntimeError(f"{changed} rows changed, {applied} keys applied")
    rows.append(_capture_row("bulk", ROUNDS, changed, cost))
    bench.say(f"bulk: rounds took {cost.wall_s:.1f} s")
    return Table(_CAPTURED, rows, "A bulk UPDATE")


def _touchable(cells: BenchCells) -> Mapping[str, str]:
    """Return for each table of the bulk change a column that is nobody's key."""
    with cells.admin(SOURCE) as admin:
        found = admin.execute(
            "SELECT DISTINCT ON (a.attrelid) a.attrelid::regclass::text, a.attname::text"
            " FROM pg_attribute AS a WHERE a.attrelid = ANY(%s::regclass[]) AND a.attnum > 0"
            " AND NOT a.attisdropped AND a.attgenerated = '' AND NOT EXISTS (SELECT FROM pg_index"
            " AS i WHERE i.indrelid = a.attrelid AND a.attnum = ANY(i.indkey))"
            " ORDER BY a.attrelid, a.attnum",
            (list(BULK),),
        ).fetchall()
    columns = dict(found)
    if missing := [table for table in BULK if table not in columns]:
        raise RuntimeError(f"no column to change in {missing}")
    return columns


def _hot(bench: Bench, cells: BenchCells, store: StoreMove, times: int) -> Table:
    """Change one row very often, each time in a transaction of its own."""
    hot = _ids(cells, LARGE, 1)[0]
    rows: list[list[Any]] = []
    meter = cells.meter()
    with _slot(cells):
        with cells.application(SOURCE, autocommit=True) as session:
            session.execute("SET synchronous_commit = off")
            for _ in range(times):
                session.execute(
                    "UPDATE comments SET body = 'hot' WHERE id = %s", (hot,), prepare=True
                )
        cost = meter.measure(lambda: _decode_all(cells, SLOT))
        rows.append(_capture_row("hot row", DECODING, times, cost))

    applied = 0

    def rounds() -> None:
        nonlocal applied
        applied = _drain(store)

    cost = meter.measure(rounds)
    if applied < 1:
        raise RuntimeError(f"one row was hot, {applied} keys applied")
    rows.append(_capture_row("hot row", ROUNDS, times, cost))
    bench.say(f"hot row: {times} changes in one round of {cost.wall_s * 1000:.0f} ms")
    return Table(_CAPTURED, rows, "One row, changed again and again")


# ── many organizations at once ──────────────────────────────────────────────────────────────────


def _many(bench: Bench, cells: BenchCells, count: int, seconds: float) -> Table:
    """Arm many organizations of one cell; each is changed, then captured."""
    organizations = list(SOURCE_OTHERS)[:count]
    migrations = {}
    with cells.admin(SOURCE) as admin:
        admin.execute("DROP PUBLICATION bench")
    for key in organizations:
        migrations[key] = cells.plan(f"org-{key}", DESTINATION)
        cells.run("copy", migrations[key])
        cells.run("sync", migrations[key])
    bench.say(f"{count} organizations armed")
    slots = [f"bench_{number}" for number in range(count)]  # one of them decodes for all
    each = max(10, int(1000 * seconds / count))
    changed = 0
    rows: list[list[Any]] = []
    meter = cells.meter()
    with cells.admin(SOURCE) as admin:
        admin.execute(_PUBLICATION.encode())
        wanted = count + 4
        row = admin.execute("SELECT current_setting('max_replication_slots')::int").fetchone()
        slots = slots[: min(count, (int(row[0]) if row else wanted) - 2)]
        for slot in slots:
            admin.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (slot,))
    with cells.application(SOURCE, autocommit=True) as session:
        for key in organizations:
            for some in _parts(_ids(cells, key, each), 10):
                changed += session.execute(
                    "UPDATE comments SET body = body || '!' WHERE id = ANY(%s)", (some,)
                ).rowcount

    cost = meter.measure(lambda: _decode_all(cells, slots[0]))
    rows.append(_capture_row(f"{count} organizations, one slot for all", DECODING, changed, cost))

    def decode() -> None:
        for slot in slots[1:]:
            _decode_all(cells, slot)

    cost = meter.measure(decode)
    decoded = changed * (len(slots) - 1) // count
    rows.append(
        _capture_row(f"{len(slots) - 1} organizations, a slot for each", DECODING, decoded, cost)
    )
    with cells.admin(SOURCE) as admin:
        for slot in slots:
            _drop(admin, slot)
    applied, spent = 0, []
    for key in organizations:
        with _rounds(cells, migrations[key]) as store:

            def rounds(store: StoreMove = store) -> None:
                nonlocal applied
                applied += _drain(store)

            spent.append(meter.measure(rounds))
    if applied < changed:
        raise RuntimeError(f"{changed} rows changed, {applied} keys applied")
    total = Cost(
        sum(one.wall_s for one in spent),
        {part: sum(one.cpu_s[part] for one in spent) for part in spent[0].cpu_s},
    )
    rows.append(_capture_row(f"{count} organizations, one log", ROUNDS, changed, total))
    return Table(
        _CAPTURED,
        rows,
        "Many organizations of one cell, armed at once and captured one after the other",
    )


def _parts(ids: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]
