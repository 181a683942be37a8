"""Measures what decision 0001 rests on: the gate's cost, its lock, its pause, its capture.

Run it by hand; it starts a server of its own and prints tables in Markdown::

    .venv/bin/python tests/spikes/capture_and_lock.py [cost] [fairness] [drain] [capture]
    .venv/bin/python tests/spikes/capture_and_lock.py --bin-dir /usr/lib/postgresql/15/bin

CPU is that of the server's process, read from the kernel in nanoseconds; variants take turns in
short blocks and their lower quartile counts, because a machine that others use is noisy. Trust
the ratios, and of these only what is outside the difference between `none` and `none again`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg

from cellferry.local.postgres_server import PostgresServer
from cellferry.model import Cell, Endpoint, Limits, Move, Organization
from cellferry.stores.postgres import data_map, data_map_file, gate, prepare, triggers

MOVING, NEIGHBOUR = 7, 3
OTHER_GATES = 2000

SCHEMA = """
CREATE TABLE organizations (id bigint PRIMARY KEY, name text NOT NULL);
INSERT INTO organizations SELECT n, 'organization ' || n FROM generate_series(1, 10) n;
CREATE TABLE projects (
    id bigint PRIMARY KEY, organization_id bigint NOT NULL REFERENCES organizations);
INSERT INTO projects SELECT n, n FROM generate_series(1, 10) n;
"""


def make_table(name: str, owner: int, *, by_path: bool = False, key: bool = True) -> str:
    """SQL of one copy of the measured table, full of one organization's rows."""
    column = "project_id bigint NOT NULL" if by_path else "organization_id bigint NOT NULL"
    reference = "projects" if by_path else "organizations"
    return f"""
    CREATE TABLE {name} (id bigint PRIMARY KEY, {column} {f"REFERENCES {reference}" if key else ""},
        title text NOT NULL, n int NOT NULL, at timestamptz NOT NULL DEFAULT now())
        WITH (fillfactor = 80);
    INSERT INTO {name} SELECT n, {owner}, repeat('x', 80), 0 FROM generate_series(1, 5000) n;
    CREATE INDEX ON {name} ({column.split(maxsplit=1)[0]}, id);
    """


class Quiet:
    """Progress of nobody's interest."""

    def report(self, *_: Any, **__: Any) -> None: ...

    def check(self) -> None: ...


class Bench:
    """One database of a server, with the product's own preparation."""

    def __init__(self, server: PostgresServer, name: str) -> None:
        self.server = server
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
            connection.execute(
                "DO $$ BEGIN CREATE ROLE mover LOGIN PASSWORD 'mover';"
                " EXCEPTION WHEN duplicate_object THEN NULL; END $$"
            )
        self.url = server.url(dbname=name)
        endpoint = Endpoint(url=server.url("mover", "mover", name), admin_url=self.url)
        self.cell = Cell("cell-1", {"postgres": endpoint})
        self.move = Move(
            migration=1,
            organization=Organization(str(MOVING), "moving"),
            source=self.cell,
            destination=replace(self.cell, name="cell-2"),
            epoch=1,
            attempt=1,
            limits=Limits(),
        )

    def session(self, **settings: Any) -> psycopg.Connection[Any]:
        return psycopg.connect(self.url, autocommit=True, **settings)

    def prepare(self) -> Any:
        with self.session() as connection:
            found = data_map.discover(connection, data_map_file.DataMapFile())
            prepare.prepare(connection, found, self.cell, Quiet())
            return found

    def arm(self) -> None:
        with self.session() as connection:
            gate.take_lease(connection, self.move)
            gate.arm(connection, self.move)


def cpu_of(connection: psycopg.Connection[Any]) -> Callable[[], float]:
    """CPU seconds of the backend of `connection`."""
    path = Path(f"/proc/{connection.info.backend_pid}/schedstat")
    return lambda: int(path.read_text().split()[0]) / 1e9


def table(*rows: tuple[Any, ...]) -> None:
    for number, row in enumerate(rows):
        print("| " + " | ".join(map(str, row)) + " |")
        if number == 0:
            print("|" + "---|" * len(row))
    print(flush=True)


# ── what the gate costs ─────────────────────────────────────────────────────────────────────────

#: The lock of `cellferry.enter`, and what else could stand in its place.
PRODUCT_LOCK = "advisory, shared (the product)"
LOCKS = {
    "no lock, log only": "",
    "SELECT … FOR SHARE": (
        "PERFORM FROM cellferry.gate WHERE organization = p_organization FOR SHARE;"
    ),
    "SELECT … FOR KEY SHARE": (
        "PERFORM FROM cellferry.gate WHERE organization = p_organization FOR KEY SHARE;"
    ),
}


def cost(server: PostgresServer) -> None:
    bench = Bench(server, "cost")
    variants: dict[str, str] = {}
    with bench.session() as connection:
        connection.execute(SCHEMA)

        def add(variant: str, owner: int, **options: Any) -> None:
            variants[variant] = f"measured_{len(variants)}"
            connection.execute(make_table(variants[variant], owner, **options))

        add("none", NEIGHBOUR)
        add("none again", NEIGHBOUR)
        add("gate, unarmed", NEIGHBOUR)
        add("gate by path, unarmed", NEIGHBOUR, by_path=True)
        add(f"armed, {PRODUCT_LOCK}", MOVING)
        add("armed by path", MOVING, by_path=True)
        for lock in LOCKS:
            add(f"armed, {lock}", MOVING)
        add("unarmed, with a SET clause", NEIGHBOUR)
        add("unarmed, caller's rights", NEIGHBOUR)
        add("unarmed, a trigger that does nothing", NEIGHBOUR)
        add("unarmed, WHEN a sequence says so", NEIGHBOUR)
    found = bench.prepare()
    ours = {one.table.name: one for one in triggers.installations(found)}
    with bench.session() as connection:
        for variant in ("none", "none again"):
            connection.execute(f"DROP TRIGGER {triggers.GATE_TRIGGER} ON {variants[variant]}")
        connection.execute("CREATE SCHEMA spike; GRANT ALL ON SCHEMA spike TO PUBLIC")
        for number, (lock, statement) in enumerate(LOCKS.items()):
            use_lock(connection, ours[variants[f"armed, {lock}"]], number, statement)
        for variant, (old, new) in {
            "unarmed, with a SET clause": (
                "SECURITY DEFINER",
                "SECURITY DEFINER SET search_path = pg_catalog, pg_temp",
            ),
            "unarmed, caller's rights": ("SECURITY DEFINER", ""),
        }.items():
            text = ours[variants[variant]].function_sql
            assert old in text
            connection.execute(text.replace(old, new, 1).encode())
        for variant, condition in {
            "unarmed, a trigger that does nothing": "NEW.id < 0",
            # read outside of any snapshot, without a query: false when the cell has no gate at all
            "unarmed, WHEN a sequence says so": (
                "pg_sequence_last_value('spike.gates'::regclass) > 1"
            ),
        }.items():
            one = ours[variants[variant]]
            connection.execute(
                f"""
                CREATE SEQUENCE IF NOT EXISTS spike.gates; SELECT setval('spike.gates', 1);
                DROP TRIGGER {one.trigger} ON {one.table};
                CREATE TRIGGER {one.trigger} BEFORE INSERT OR UPDATE ON {one.table}
                FOR EACH ROW WHEN ({condition}) EXECUTE FUNCTION cellferry.{one.function}()
                """.encode()
            )
        connection.execute("VACUUM ANALYZE")
    bench.arm()
    for others, title in (
        (0, "no other gate row"),
        (OTHER_GATES, f"{OTHER_GATES} other gate rows"),
    ):
        with bench.session() as connection:
            connection.execute(
                "INSERT INTO cellferry.gate (organization, state, armed, migration, attempt, epoch)"
                f" SELECT 'other ' || n, 'moved', false, 100 + n, 1, 2"
                f" FROM generate_series(1, {others}) n"
            )
            connection.execute("VACUUM ANALYZE cellferry.gate")
        print(f"### CPU of a transaction, {title}\n")
        measure(bench, variants)


def use_lock(
    connection: psycopg.Connection[Any],
    installation: triggers.Installation,
    number: int,
    statement: str,
) -> None:
    """Let one table's trigger pass through a copy of `enter` that locks otherwise."""
    enter = connection.execute("SELECT pg_get_functiondef('cellferry.enter'::regproc)").fetchone()[
        0
    ]
    start = enter.index("IF NOT pg_try_advisory_xact_lock_shared")
    end = enter.index("END IF;", start) + len("END IF;")
    name = f"spike.enter_{number}"
    copy = (enter[:start] + statement + enter[end:]).replace("cellferry.enter(", f"{name}(", 1)
    connection.execute(copy.encode())
    connection.execute(installation.function_sql.replace("cellferry.enter(", f"{name}(").encode())


def measure(bench: Bench, variants: dict[str, str]) -> None:
    updates: dict[str, list[float]] = {variant: [] for variant in variants}
    inserts: dict[str, list[float]] = {variant: [] for variant in variants}
    block, rounds = 150, 24
    with bench.session(prepare_threshold=0) as connection:
        cpu = cpu_of(connection)
        begin, commit = b"BEGIN", b"COMMIT"
        key = random.randrange(10**6, 10**12)
        for number in range(rounds + 1):
            for variant, name in random.sample(list(variants.items()), len(variants)):
                owner, whose = owner_of(variant)
                update = f"UPDATE {name} SET n = n + 1 WHERE id = %s".encode()
                insert = (
                    f"INSERT INTO {name} (id, {owner}, title, n) VALUES (%s, {whose}, 'title', 1)"
                ).encode()
                for into, statement, size in ((updates, update, block), (inserts, insert, block)):
                    for step in range(size + 20):
                        if step == 20:
                            before = cpu()
                        key += 1
                        value = key if into is inserts else key * 7919 % 5000 + 1
                        connection.execute(begin, prepare=True)
                        connection.execute(statement, (value,), prepare=True)
                        connection.execute(commit, prepare=True)
                    if number:
                        into[variant].append((cpu() - before) / size * 1e6)
            connection.execute("TRUNCATE cellferry.key_log")

    def cost_of(blocks: list[float]) -> float:
        return statistics.quantiles(blocks, n=4)[0]

    bases = [cost_of(into["none"] + into["none again"]) for into in (updates, inserts)]
    table(
        ("variant", "UPDATE µs", "times", "INSERT µs", "times"),
        *(
            (
                variant,
                *(
                    text
                    for into, base in zip((updates, inserts), bases, strict=True)
                    for text in (
                        f"{cost_of(into[variant]):.0f}",
                        f"{cost_of(into[variant]) / base:.2f}",
                    )
                ),
            )
            for variant in variants
        ),
    )


def owner_of(variant: str) -> tuple[str, int]:
    column = "project_id" if "path" in variant else "organization_id"
    return column, MOVING if variant.startswith("armed") else NEIGHBOUR


# ── whether a stream of writers starves the cutover ─────────────────────────────────────────────


def fairness(server: PostgresServer) -> None:
    bench = Bench(server, "fairness")
    with bench.session() as connection:
        connection.execute(
            "CREATE TABLE gate (id int PRIMARY KEY, state text);"
            " INSERT INTO gate VALUES (1, 'open')"
        )
    advisory = ("SELECT pg_advisory_xact_lock_shared(42)", "SELECT pg_advisory_xact_lock(42)")
    row = (
        "SELECT FROM gate WHERE id = 1 FOR SHARE",
        "UPDATE gate SET state = 'frozen' WHERE id = 1",
    )
    limit_s = 3.0
    print("### Time to the exclusive side, 8 overlapping writers of 20 ms each\n")
    lines: list[tuple[Any, ...]] = [("lock", "median ms", "max ms", f"gave up after {limit_s} s")]
    for name, (shared, exclusive) in {"advisory lock": advisory, "row lock": row}.items():
        times, lost = [], 0
        with sharers(bench, shared, 8, 0.02):
            for _ in range(8):
                waited = time_exclusive(bench, exclusive, limit_s)
                times.append(waited)
                lost += waited >= limit_s
                time.sleep(0.1)
        lines.append(
            (
                name,
                f"{statistics.median(times) * 1e3:.0f}",
                f"{max(times) * 1e3:.0f}",
                f"{lost} of 8",
            )
        )
    table(*lines)


@contextmanager
def sharers(bench: Bench, statement: str, count: int, hold_s: float) -> Iterator[None]:
    stop = threading.Event()

    def share(offset: float) -> None:
        with bench.session() as connection:
            time.sleep(offset)
            while not stop.is_set():
                with connection.transaction():
                    connection.execute(statement.encode())
                    time.sleep(hold_s)

    threads = [threading.Thread(target=share, args=(n * hold_s / count,)) for n in range(count)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def time_exclusive(bench: Bench, statement: str, limit_s: float) -> float:
    with bench.session() as connection:
        connection.execute(f"SET statement_timeout = '{round(limit_s * 1e3)}ms'".encode())
        started = time.monotonic()
        try:
            with connection.transaction():
                connection.execute(statement.encode())
                waited = time.monotonic() - started
                raise psycopg.Rollback
        except psycopg.errors.QueryCanceled:
            return limit_s
        return waited


# ── how long writers wait ───────────────────────────────────────────────────────────────────────


def drain(server: PostgresServer) -> None:
    bench = Bench(server, "drain")
    with bench.session() as connection:
        connection.execute(SCHEMA)
        connection.execute(make_table("items", MOVING))
    bench.prepare()
    bench.arm()
    stop = threading.Event()
    longest: dict[int, float] = {}
    count: dict[int, int] = {}

    def write(number: int) -> None:
        with bench.session(prepare_threshold=0) as connection:
            while not stop.is_set():
                started = time.monotonic()
                with connection.transaction():
                    connection.execute(
                        "UPDATE items SET n = n + 1 WHERE id = %s", (random.randrange(1, 5000),)
                    )
                waited = time.monotonic() - started
                longest[number] = max(longest.get(number, 0.0), waited)
                count[number] = count.get(number, 0) + 1
                time.sleep(max(0.0, 0.012 - waited))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    frozen, paused = [], []
    started = time.monotonic()
    before = sum(count.values())
    for _ in range(40):
        barrier = gate.Barrier(bench.cell.stores["postgres"].url, bench.move)
        time.sleep(random.uniform(0.05, 0.15))
        longest.clear()
        begin = time.monotonic()
        barrier.freeze(5)
        frozen.append(time.monotonic() - begin)
        barrier.thaw()
        time.sleep(0.05)
        paused.append(max(longest.values(), default=0.0))
    rate = (sum(count.values()) - before) / (time.monotonic() - started)
    stop.set()
    for thread in threads:
        thread.join()
    print(f"### Freeze and thaw, 40 times, 6 writers, {rate:.0f} transactions/s\n")
    table(
        ("", "p50 ms", "p95 ms", "max ms"),
        *(
            (
                name,
                f"{statistics.median(values) * 1e3:.0f}",
                f"{statistics.quantiles(values, n=20)[-1] * 1e3:.0f}",
                f"{max(values) * 1e3:.0f}",
            )
            for name, values in (
                ("freeze: drain, and `frozen` durable", frozen),
                ("longest write meanwhile", paused),
            )
        ),
    )


# ── key log or logical decoding ─────────────────────────────────────────────────────────────────


def capture(server: PostgresServer) -> None:
    bench = Bench(server, "capture")
    changes, others = 20_000, 80_000
    with bench.session() as connection:
        connection.execute(SCHEMA)
        connection.execute(make_table("items", MOVING))
        connection.execute(make_table("neighbours", NEIGHBOUR))
        connection.execute("CREATE PUBLICATION moving FOR TABLE items (id, organization_id)")
    bench.prepare()
    bench.arm()
    with bench.session() as writer, bench.session() as reader:
        reader.execute("SELECT pg_create_logical_replication_slot('moving', 'pgoutput')")
        for _ in range(changes // 5000):
            writer.execute("UPDATE items SET n = n + 1")
        for _ in range(others // 5000):
            writer.execute("UPDATE neighbours SET n = n + 1")
        cpu = cpu_of(reader)

        def timed(statement: str) -> tuple[int, float, float]:
            before, started = cpu(), time.monotonic()
            rows = reader.execute(statement.encode()).fetchall()
            return len(rows), cpu() - before, time.monotonic() - started

        peek = (
            "SELECT length(data) FROM pg_logical_slot_{}_binary_changes('moving', NULL, NULL,"
            " 'proto_version', '1', 'publication_names', 'moving')"
        )
        lines: list[tuple[Any, ...]] = [("", "rows", "CPU ms", "wall ms")]
        for name, statement in {
            "key log: read and delete": (
                f"WITH gone AS (DELETE FROM cellferry.key_log WHERE organization = '{MOVING}'"
                " RETURNING relation, key) SELECT DISTINCT relation, key FROM gone"
            ),
            "key log: again, empty": (
                f"DELETE FROM cellferry.key_log WHERE organization = '{MOVING}' RETURNING id"
            ),
            "decoding: read": peek.format("peek"),
            "decoding: the same without confirming": peek.format("peek"),
            "decoding: confirm": peek.format("get"),
            "decoding: again, empty": peek.format("get"),
        }.items():
            lines.append((name, *(format_number(one) for one in timed(statement))))
        writer.execute("UPDATE neighbours SET n = n + 1")
        lines.append(
            (
                "decoding: empty, after 5,000 changes of others",
                *(format_number(one) for one in timed(peek.format("get"))),
            )
        )
        reader.execute("SELECT pg_drop_replication_slot('moving')")
    print(f"### Reading {changes:,} changes of one organization among {others:,} of others\n")
    table(*lines)


def format_number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value * 1e3:,.1f}"


SECTIONS = {"cost": cost, "fairness": fairness, "drain": drain, "capture": capture}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=[])
    parser.add_argument("--bin-dir", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        server = PostgresServer(
            Path(folder) / "server",
            bin_dir=options.bin_dir,
            settings={"fsync": "on", "wal_level": "logical", "max_replication_slots": "4"},
            die_with_parent=True,
        )
        try:
            server.start()
            print(f"PostgreSQL {server.major_version}\n", flush=True)
            for section in options.sections or SECTIONS:
                SECTIONS[section](server)
        finally:
            server.remove()


if __name__ == "__main__":
    main(sys.argv[1:])
