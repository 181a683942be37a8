"""What the gate costs a writer whose organization does not move, and one whose organization does.

Processor time of the whole server (its backends, WAL writer, checkpointer) for small transactions
through one connection with prepared statements, in short slices in turn, so that each contender
meets the same noise.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import psycopg
from psycopg import sql
from tests.bench.harness import Bench, Section, Table, Target

from cellferry.local.postgres_server import PostgresServer
from cellferry.model import Cell, Endpoint, Limits, Move, Organization
from cellferry.stores.postgres import data_map, data_map_file, gate, prepare, triggers

MOVING, NEIGHBOUR = 7, 3
ROWS = 4000
BLOCK = 40
"""Transactions in a slice."""

NONE, AGAIN = "no trigger", "no trigger, again"
FLOOR = "a trigger that does nothing"
UNARMED, ARMED = "gate, unarmed", "gate, armed"
UNARMED_PATH, ARMED_PATH = "gate by path, unarmed", "gate by path, armed"
POLICY = "row-level security instead"

CONTENDERS = (NONE, AGAIN, FLOOR, UNARMED, ARMED, UNARMED_PATH, ARMED_PATH, POLICY)
STATEMENTS = ("UPDATE", "INSERT", "DELETE", "UPDATE of 10 rows")

SCHEMA = """
CREATE ROLE mover LOGIN PASSWORD 'mover';
CREATE ROLE app LOGIN PASSWORD 'app';
CREATE TABLE organizations (id bigint PRIMARY KEY, name text NOT NULL);
INSERT INTO organizations SELECT n, 'organization ' || n FROM generate_series(1, 10) n;
CREATE TABLE projects (
    id bigint PRIMARY KEY, organization_id bigint NOT NULL REFERENCES organizations);
INSERT INTO projects SELECT n, n FROM generate_series(1, 10) n;
"""


class _Quiet:
    """Progress of nobody's interest."""

    def report(self, *_: Any, **__: Any) -> None: ...

    def check(self) -> None: ...


@dataclass
class _Contender:
    """One copy of the measured table, full of one organization's rows."""

    name: str
    table: str
    costs: dict[str, list[float]] = field(default_factory=dict)

    @property
    def owner(self) -> tuple[str, int]:
        """The column that says whose a row is, and its value. Project n is organization n's."""
        column = "project_id" if "path" in self.name else "organization_id"
        return column, MOVING if self.name.endswith(" armed") else NEIGHBOUR

    def made(self) -> str:
        """Return SQL that makes and fills the table."""
        column, value = self.owner
        parent = "projects" if column == "project_id" else "organizations"
        return f"""
        CREATE TABLE {self.table} (
            id bigint PRIMARY KEY, {column} bigint NOT NULL REFERENCES {parent},
            title text NOT NULL, n int NOT NULL, at timestamptz NOT NULL DEFAULT now())
            WITH (fillfactor = 80);
        INSERT INTO {self.table}
            SELECT n, {value}, repeat('x', 80), 0 FROM generate_series(1, {ROWS}) n;
        CREATE INDEX ON {self.table} ({column}, id);
        GRANT ALL ON {self.table} TO app;
        """


def run(bench: Bench) -> Section:
    """Measure each contender with each statement."""
    server = bench.postgres("cell", {"autovacuum": "off"})
    contenders = [_Contender(name, f"measured_{n}") for n, name in enumerate(CONTENDERS)]
    others = bench.size(1000)
    _prepare(server, contenders, others)
    rounds = max(2, bench.size(16) * bench.runs)
    bench.say(f"{others} other organizations have gates; {rounds} rounds")
    _measure(bench, server, contenders, rounds)
    return _section(contenders, others, rounds)


# ── the cell ────────────────────────────────────────────────────────────────────────────────────


def _prepare(server: PostgresServer, contenders: list[_Contender], others: int) -> None:
    url = server.url()
    endpoint = Endpoint(url=server.url("mover", "mover"), admin_url=url)
    cell = Cell("cell-1", {"postgres": endpoint})
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(SCHEMA)
        for one in contenders:
            connection.execute(one.made().encode())
        found = data_map.discover(connection, data_map_file.DataMapFile())
        prepare.prepare(connection, found, cell, _Quiet())
        for one in contenders:
            if one.name in (NONE, AGAIN, FLOOR, POLICY):
                connection.execute(
                    sql.SQL("DROP TRIGGER {} ON {}").format(
                        sql.Identifier(triggers.GATE_TRIGGER), sql.Identifier(one.table)
                    )
                )
            if one.name == FLOOR:
                connection.execute(
                    "CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER"
                    " AS 'BEGIN IF TG_OP = ''DELETE'' THEN RETURN OLD; END IF; RETURN NEW; END';"
                    f" CREATE TRIGGER zz BEFORE INSERT OR UPDATE OR DELETE ON {one.table}"
                    " FOR EACH ROW EXECUTE FUNCTION nothing()".encode()
                )
            if one.name == POLICY:
                condition = "organization_id = current_setting('app.organization')::bigint"
                connection.execute(
                    f"ALTER TABLE {one.table} ENABLE ROW LEVEL SECURITY;"
                    f" CREATE POLICY own ON {one.table} USING ({condition})".encode()
                )
        connection.execute(
            "INSERT INTO cellferry.gate (organization, state, armed, migration, attempt, epoch)"
            " SELECT (1000 + n)::text, 'moved', false, 100 + n, 1, 2"
            " FROM generate_series(1, %s) n",
            (others,),
        )
        move = Move(
            migration=1,
            organization=Organization(str(MOVING), "moving"),
            source=cell,
            destination=replace(cell, name="cell-2"),
            epoch=1,
            attempt=1,
            limits=Limits(),
        )
        gate.take_lease(connection, move)
        gate.arm(connection, move)
        connection.execute("VACUUM ANALYZE")
        connection.execute("CHECKPOINT")


# ── measuring ───────────────────────────────────────────────────────────────────────────────────


def _clock(postmaster: int) -> Callable[[], float]:
    """Return a clock of the processor seconds that a server's processes have used.

    In nanoseconds' steps where the kernel tells them: a slice is shorter than a tick is exact.
    """

    def used() -> float:
        total = 0
        for process in psutil.Process(postmaster).children():
            try:
                text = Path(f"/proc/{process.pid}/schedstat").read_text(encoding="ascii")
            except (FileNotFoundError, ProcessLookupError):
                continue
            total += int(text.split()[0])
        return total / 1e9

    return used


def _measure(
    bench: Bench, server: PostgresServer, contenders: list[_Contender], rounds: int
) -> None:
    if server.identity is None:
        raise RuntimeError("the server does not run")
    clock = _clock(server.identity.pid)
    choose = random.Random(5)
    with (
        psycopg.connect(server.url("app", "app"), autocommit=True, prepare_threshold=0) as session,
        psycopg.connect(server.url(), autocommit=True) as admin,
    ):
        session.execute(f"SET app.organization = '{NEIGHBOUR}'".encode())
        before = {one.name: _counted(admin, one) for one in contenders}
        for number in range(rounds + 1):
            for statement in STATEMENTS:
                for one in choose.sample(contenders, len(contenders)):
                    _slice(session, one, statement, choose, number, 5)
                    began = clock()
                    _slice(session, one, statement, choose, number, BLOCK)
                    if number:  # the first warms caches and plans
                        cost = (clock() - began) / BLOCK
                        one.costs.setdefault(statement, []).append(cost)
            logged = admin.execute("SELECT count(*) FROM cellferry.key_log").fetchone()
            if not logged or logged[0] == 0:
                raise RuntimeError("the armed gate logged nothing")
            admin.execute("TRUNCATE cellferry.key_log")
            if number % 8 == 0:
                admin.execute("VACUUM")
                bench.say(f"round {number} of {rounds}")
        for one in contenders:
            if _counted(admin, one) != before[one.name]:
                raise RuntimeError(f"{one.name}: what was inserted is not what was deleted")


def _slice(
    session: psycopg.Connection[Any],
    one: _Contender,
    statement: str,
    choose: random.Random,
    number: int,
    size: int,
) -> None:
    """Run `size` transactions. A DELETE's slice deletes what the round's INSERTs brought."""
    column, value = one.owner
    text, keys = {
        "UPDATE": (
            f"UPDATE {one.table} SET n = n + 1 WHERE id = %s",
            [choose.randrange(1, ROWS + 1) for _ in range(size)],
        ),
        "INSERT": (
            f"INSERT INTO {one.table} (id, {column}, title, n) VALUES (%s, {value}, 'new', 1)",
            range(_first(number, size), _first(number, size) + size),
        ),
        "DELETE": (
            f"DELETE FROM {one.table} WHERE id = %s",
            range(_first(number, size), _first(number, size) + size),
        ),
        "UPDATE of 10 rows": (
            f"UPDATE {one.table} SET n = n + 1 WHERE id BETWEEN %s AND %s + 9",
            [choose.randrange(1, ROWS - 9) for _ in range(size)],
        ),
    }[statement]
    query, rows = text.encode(), 10 if "10" in statement else 1
    for key in keys:
        session.execute(b"BEGIN", prepare=True)
        done = session.execute(query, [key] * text.count("%s"), prepare=True)
        if done.rowcount != rows:
            raise RuntimeError(f"{one.name}: {statement} met {done.rowcount} rows")
        session.execute(b"COMMIT", prepare=True)


def _first(number: int, size: int) -> int:
    return 1_000_000 + number * 1000 + size


def _counted(connection: psycopg.Connection[Any], one: _Contender) -> int:
    row = connection.execute(f"SELECT count(*) FROM {one.table}".encode()).fetchone()
    return int(row[0]) if row else 0


# ── what it says ────────────────────────────────────────────────────────────────────────────────


def _times(contenders: list[_Contender], name: str, statement: str) -> float:
    """Return the median, over rounds, of a contender's cost against both without a trigger."""
    by_name = {one.name: one.costs[statement] for one in contenders}
    return statistics.median(
        cost / ((first + second) / 2)
        for cost, first, second in zip(by_name[name], by_name[NONE], by_name[AGAIN], strict=True)
    )


def _section(contenders: list[_Contender], others: int, rounds: int) -> Section:
    def times(name: str, statement: str = "UPDATE") -> float:
        return _times(contenders, name, statement)

    rows = [
        [
            one.name,
            *(
                figure
                for statement in STATEMENTS
                for figure in (
                    round(statistics.median(one.costs[statement]) * 1e6),
                    times(one.name, statement),
                )
            ),
        ]
        for one in contenders
    ]
    headings = ["", *(text for name in STATEMENTS for text in (f"{name}, µs", "times"))]
    floor = times(FLOOR) - 1
    noise = abs(times(NONE) - times(AGAIN))
    why = (
        f"Of {times(UNARMED) - 1:.1%}, {floor:.1%} is what any row trigger in PL/pgSQL costs that"
        f" does nothing: the row is locked before it fires, the function entered and left. The rest"
        f" is one expression, made ready anew in every transaction. Noise here: {noise:.1%}."
    )
    return Section(
        title="Gate",
        method=(
            "Processor time of the whole server for one transaction (BEGIN, one statement by"
            " primary key, COMMIT; durable) through one connection with prepared statements, each"
            " contender with a table of its own, in short slices in random turn. Times: against"
            " the mean of both contenders without a trigger in the same round, median over rounds."
            " By path: the row's parent knows the organization. Armed: the lock, and one row of the"
            " key log. Other organizations of the cell have gates meanwhile, as while they wait for"
            " the end of their TTL."
        ),
        tables=[Table(headings, rows)],
        targets=[
            Target(
                "CPU of a one-row UPDATE of an unarmed organization, against no trigger",
                1.08,
                times(UNARMED),
                why=why,
            ),
            Target(
                "CPU of a one-row UPDATE of an armed organization, against no trigger",
                1.8,
                times(ARMED),
            ),
        ],
        remarks=[
            f"{others:,} other gates; {rounds} rounds of {BLOCK} transactions each.",
            why,
            (
                "The target is for tables with the organization's own column. By path an unarmed"
                f" organization's UPDATE takes {times(UNARMED_PATH):.2f} times: as soon as any"
                " organization of the cell has a gate, the trigger looks the row's parent up, one"
                " look into an index for each row, to learn whose it is."
            ),
        ],
    )
