"""Copying one large organization into a cell that holds others: cellferry beside its peers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import psycopg
from psycopg import sql
from tests.bench.cells import DATABASE, DESTINATION, LARGE, OWNED, SOURCE, BenchCells, condition
from tests.bench.harness import Bench, Cost, Section, Table, Target, in_turn, median

from cellferry.local.postgres_server import PostgresServer

CELLFERRY = "cellferry, with checkpoints"
PIPE = "psql COPY \\| psql COPY"
PIPES = "psql COPY \\| psql COPY, two tables at once"
EXPORT = "export to a file, import"
NATIVE = "native logical replication, row filters"

#: Rows of these have no column that a publication's row filter could name.
_UNFILTERED = ("label_links", "merge_request_files", "users")

_METHOD = """
One organization between 49 others, interleaved row by row, moves into a cell that holds 20 others
already: 15 owned tables with foreign keys and 36 indexes, two of them without a column that names
the organization, and the users that it refers to. Nobody writes meanwhile. Before each run the
destination is made anew from a template and both servers write a checkpoint; nothing of that is
measured. After each run the rows of every table are counted. All contenders write in the replica
role (no triggers, no foreign-key checks). *The pipe* is one `psql` that reads and one that writes,
table by table in binary, nothing else: no checkpoints, no order, no capture, no lease; two at once,
the largest table first, have as many sessions as cellferry has. *The export* is what `pg_dump`
would write if it could select rows: one script with `COPY … FROM stdin` for each table, then `psql`
runs it. *Native replication* is a publication with row filters and a subscription with `copy_data`
and `binary`, timed until all tables are ready; it leaves out what its filters cannot name, so it is
compared by rows a second. cellferry's figure is the whole copy step: connecting, arming the
capture, counting, copying two tables at once with a checkpoint in each batch's own transaction, and
finding and bringing the users. CPU of the topology's server is in cellferry's total. Not run:
pgcopydb and pgbelt copy whole tables or databases and cannot select an organization's rows.
"""


@dataclass
class _Copies:
    """The contenders, on one pair of cells."""

    bench: Bench
    cells: BenchCells
    sizes: Mapping[str, int]
    """Rows of the organization by table, and the users that it refers to."""
    migration: int = 0
    columns: Mapping[str, str] = field(default_factory=dict)

    # ── the contenders ──────────────────────────────────────────────────────────────────────────

    def cellferry(self) -> Mapping[str, float]:
        """Run the copy step."""
        result = self.cells.run("copy", self.migration)
        return {"batches": result.facts["postgres"]["batches"]}

    def pipe(self) -> None:
        """Pipe table by table, the users first."""
        for table in ("users", *OWNED):
            self._pipe(table)

    def pipes(self) -> None:
        """Pipe two tables at once, the largest first."""
        by_size = sorted(self.sizes, key=self.sizes.__getitem__, reverse=True)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self._pipe, by_size))

    def _pipe(self, table: str) -> None:
        read = subprocess.Popen(
            self._psql(self.cells.source, self._copy_out(table, "binary")),
            stdout=subprocess.PIPE,
            env=self._environment(),
        )
        write = subprocess.run(
            self._psql(self.cells.destination, self._copy_in(table, "binary")),
            stdin=read.stdout,
            env=self._environment(),
            check=False,
        )
        if read.stdout is not None:
            read.stdout.close()
        if read.wait() or write.returncode:
            raise RuntimeError(f"psql failed to copy {table}")

    def export(self) -> None:
        """Write a script of everything, then run it."""
        path = self.bench.root / "export.sql"
        with path.open("wb") as file:
            for table in ("users", *OWNED):
                file.write(f"{self._copy_in(table, 'text')};\n".encode())
                file.flush()
                subprocess.run(
                    self._psql(self.cells.source, self._copy_out(table, "text")),
                    stdout=file,
                    env=self._environment(),
                    check=True,
                )
                file.write(b"\\.\n\n")
                file.flush()
        os.sync()
        subprocess.run(
            [*self._psql(self.cells.destination), "--single-transaction", "--file", str(path)],
            stdout=subprocess.DEVNULL,
            env=self._environment(),
            check=True,
        )

    def native(self) -> None:
        """Subscribe, and wait until every table is ready."""
        tables = ", ".join(
            f"{table} WHERE ({'id' if table == 'organizations' else 'organization_id'} = {LARGE})"
            for table in OWNED
            if table not in _UNFILTERED
        )
        with self.cells.admin(SOURCE) as connection:
            connection.execute(f"CREATE PUBLICATION bench FOR TABLE {tables}".encode())
        with self.cells.admin(DESTINATION) as connection:
            connection.execute(
                sql.SQL(
                    "CREATE SUBSCRIPTION bench CONNECTION {} PUBLICATION bench"
                    " WITH (copy_data = true, binary = true)"
                ).format(sql.Literal(self.cells.source.url(dbname=DATABASE)))
            )
            while True:
                waiting = connection.execute(
                    "SELECT count(*) FROM pg_subscription_rel WHERE srsubstate <> 'r'"
                ).fetchone()
                if waiting == (0,):
                    return
                time.sleep(0.05)

    # ── around them ─────────────────────────────────────────────────────────────────────────────

    def prepare(self, name: str) -> None:
        """Make the destination as it was; plan if cellferry is next."""
        self.unsubscribe()
        self.cells.restore()
        if name == CELLFERRY:
            self.migration = self.cells.plan()

    def unsubscribe(self) -> None:
        """Take down what the native contender made."""
        with self.cells.admin(DESTINATION) as connection:
            connection.execute("DROP SUBSCRIPTION IF EXISTS bench")
        with self.cells.admin(SOURCE) as connection:
            connection.execute("DROP PUBLICATION IF EXISTS bench")

    def check(self, name: str, expected: Mapping[str, int]) -> int:
        """Count what arrived; return it.

        Raises:
            RuntimeError: rows are missing or too many.
        """
        found = self.cells.count(DESTINATION)
        for table, rows in expected.items():
            wanted = 0 if name == NATIVE and table in _UNFILTERED else rows
            if found[table] != wanted:
                raise RuntimeError(f"{name}: {found[table]:,} rows in {table}, not {wanted:,}")
        return sum(found.values())

    def resume(self) -> Mapping[str, float]:
        """Kill a copy at half and run it again; return what was done twice."""
        self.prepare(CELLFERRY)
        first = multiprocessing.get_context("fork").Process(target=self.cellferry, daemon=True)
        first.start()
        with self.cells.admin(DESTINATION) as connection:
            at, seen, batch_s = time.perf_counter(), 0, 0.0
            while first.is_alive():
                done = _committed(connection)
                if done > seen:
                    batch_s, at, seen = time.perf_counter() - at, time.perf_counter(), done
                if done >= self.cells.rows / 2:
                    break
                time.sleep(0.005)
            time.sleep(batch_s / 2)  # into the middle of the next batch
            if first.pid is not None:
                os.kill(first.pid, signal.SIGKILL)
            first.join()
            before = _committed(connection)
        began = time.perf_counter()
        told = self.cells.run("copy", self.migration).facts["postgres"]["recopied"]
        took = time.perf_counter() - began
        self.check(CELLFERRY, self.cells.count(SOURCE))
        with self.cells.admin(DESTINATION) as connection:
            connection.execute("SELECT pg_stat_force_next_flush()")
            sent = connection.execute(
                "SELECT sum(n_tup_ins)::bigint FROM pg_stat_user_tables WHERE schemaname = 'public'"
            ).fetchone()
        again = (sent[0] if sent else 0) - self.cells.rows
        return {"before": before, "again": again, "told": told, "took": took}

    def _psql(self, server: PostgresServer, command: str | None = None) -> list[str]:
        words = [
            str(server.bin_dir / "psql"), "--no-psqlrc", "--quiet", "--set", "ON_ERROR_STOP=1",
            "--dbname", server.url(dbname=DATABASE),
        ]  # fmt: skip
        return [*words, "--command", command] if command else words

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "PGOPTIONS": "-c session_replication_role=replica"}

    def _copy_out(self, table: str, form: str) -> str:
        columns = self._columns(table, "t.")
        return (
            f"COPY (SELECT {columns} FROM {table} AS t WHERE {condition(table)})"
            f" TO STDOUT (FORMAT {form})"
        )

    def _copy_in(self, table: str, form: str) -> str:
        return f"COPY {table} ({self._columns(table, '')}) FROM STDIN (FORMAT {form})"

    def _columns(self, table: str, row: str) -> str:
        if not self.columns:
            with self.cells.admin(SOURCE) as connection:
                self.columns = dict(
                    connection.execute(
                        "SELECT table_name::text, string_agg(quote_ident(column_name), ' '"
                        " ORDER BY ordinal_position) FROM information_schema.columns"
                        " WHERE table_schema = 'public' GROUP BY 1"
                    ).fetchall()
                )
        return ", ".join(row + column for column in self.columns[table].split())


def _committed(connection: psycopg.Connection) -> int:
    row = connection.execute(
        "SELECT coalesce(sum(rows), 0)::bigint FROM cellferry.checkpoint"
    ).fetchone()
    return int(row[0]) if row else 0


def run(bench: Bench) -> Section:
    """Measure all contenders in turn, then a copy that is killed at half."""
    cells = BenchCells.made(bench, bench.size(2_000_000))
    cells.remember()
    expected = cells.count(SOURCE)
    copies = _Copies(bench, cells, expected)
    contenders: dict[str, Callable[[], Mapping[str, float] | None]] = {
        PIPE: copies.pipe,
        PIPES: copies.pipes,
        CELLFERRY: copies.cellferry,
        EXPORT: copies.export,
        NATIVE: copies.native,
    }
    rows: dict[str, int] = {}
    last: list[str] = []

    def check_last() -> None:
        if last:
            name = last.pop()
            rows[name] = copies.check(name, expected)

    def prepare(name: str) -> None:
        check_last()
        copies.prepare(name)
        last.append(name)

    costs = in_turn(contenders, cells.meter(), bench.runs, before_each=prepare, said=bench.say)
    check_last()
    again = copies.resume()
    return _section(costs, rows, again)


def _section(
    costs: Mapping[str, list[Cost]], rows: Mapping[str, int], again: Mapping[str, float]
) -> Section:
    def cpu(name: str) -> float:
        return median(costs[name], lambda one: one.total_cpu_s)

    def rate(name: str) -> float:
        return rows[name] / median(costs[name])

    def part(name: str, of: str) -> float:
        return median(costs[name], lambda one: one.cpu_s[of])

    table = Table(
        ("Contender", "rows", "wall s", "rows/s", "CPU s: client", "source", "destination",
         "topology", "all", "CPU to pipe", "wall to pipe"),
        [
            (name, rows[name], median(costs[name]), rate(name),
             *(part(name, of) for of in ("client", "source", "destination", "topology")),
             cpu(name), cpu(name) / cpu(PIPE) * rows[PIPE] / rows[name],
             median(costs[name]) / median(costs[PIPE]) * rows[PIPE] / rows[name])
            for name in costs
        ],
        "Medians; ratios for the same number of rows",
    )  # fmt: skip
    two_pipes = median(costs[PIPES]) / median(costs[CELLFERRY])
    share = {of: part(CELLFERRY, of) / cpu(CELLFERRY) for of in ("client", "source", "destination")}
    why = (
        f"of cellferry's CPU {share['client']:.0%} is the client's, {share['source']:.0%} the"
        f" source's and {share['destination']:.0%} the destination's; the pipe's client took"
        f" {part(PIPE, 'client'):.2f} s, its source {part(PIPE, 'source'):.2f} s, its destination"
        f" {part(PIPE, 'destination'):.2f} s"
    )
    return Section(
        title="Copy",
        method=_METHOD,
        tables=[table],
        targets=[
            Target(
                "CPU of a copy with checkpoints against the raw pipe",
                1.15,
                cpu(CELLFERRY) / cpu(PIPE),
                why=why,
            ),
            Target(
                "Wall time of a copy with checkpoints against the raw pipe",
                1.1,
                median(costs[CELLFERRY]) / median(costs[PIPE]),
                why="cellferry copies two tables at once; two pipes at once take"
                f" {two_pipes:.2f} times its time",
            ),
            Target(
                "Rows a second against native initial sync",
                1.0,
                rate(CELLFERRY) / rate(NATIVE),
                at_least=True,
                why=(
                    "both copy two tables at once (`max_sync_workers_per_subscription`,"
                    " `copy_lanes`), on two cores that they share with the source; by processor"
                    " time cellferry copies"
                    f" {rows[CELLFERRY] / cpu(CELLFERRY):,.0f} rows a CPU second and native"
                    f" {rows[NATIVE] / cpu(NATIVE):,.0f}"
                ),
            ),
            Target(
                "Rows a second against export and import",
                1.0,
                rate(CELLFERRY) / rate(EXPORT),
                at_least=True,
                why=why,
            ),
        ],
        remarks=_remarks(costs, again),
    )


def _remarks(costs: Mapping[str, list[Cost]], again: Mapping[str, float]) -> list[str]:
    return [
        (
            f"Killed (SIGKILL) with {again['before']:,.0f} rows committed and run again:"
            f" {again['again']:,.0f} rows were sent a second time, counted by the destination's"
            f" statistics ({again['told']:,.0f} at most, says the step); the second run took"
            f" {again['took']:.1f} s."
        ),
        (
            f"cellferry committed {costs[CELLFERRY][0].values['batches']:,.0f} batches, each with"
            " its checkpoint; the pipe commits once a table, the import once."
        ),
        (
            "A publication with row filters makes the application's UPDATE and DELETE fail (42P10)"
            " where the filter's column is not in the replica identity; here nobody writes."
        ),
    ]
