"""How long writers wait at a cutover: the distribution, beside two scripts, and against size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import psutil
import psycopg
from tests.bench.cells import APPLICATION, DATABASE, DESTINATION, LARGE, SOURCE, BenchCells
from tests.bench.harness import POSTGRES, Bench, Section, Table, Target, percentile
from tests.bench.moving_scripts import ENTER, Scripts
from tests.bench.steady_writers import Written, writing
from tests.fault import alternations

from cellferry.local.application import Checked
from cellferry.local.application.checker import read_history
from cellferry.local.application.ledger import Outcome
from cellferry.model import Organization

WRITES_PER_S = 580
"""Asked of the writers; the target speaks of 500 acknowledged."""
SIZES: Mapping[int, int] = {10_000: 6, 100_000: 5, 1_000_000: 3, 5_000_000: 1}
"""How often an organization of so many rows moves there and back."""
FEW_PER_S = 60
"""Asked where the controller is to have the processors nearly to itself."""

_METHOD = """
Writers in two processes of their own send transactions to four organizations of the sample
application, 85% of them to the one that moves, in both of its stores (PostgreSQL and Valkey,
durable commits); the library moves it to the other cell and takes it back, again and again: each
passes the same barrier. The pause of one cutover is the longest time that any write of the
organization waited from its first attempt to its acknowledgement, of all writes that overlap the
400 ms before and after the flip; refused attempts, hops and reconnections are in it, and so is
whatever else held a write up then. Afterwards the application's checker compares every recorded
write with both cells. The scripts move an organization of the bench's own schema, PostgreSQL
alone, with the same writers as cellferry beside them, in turn: *native replication* is a
publication with row filters and a subscription, caught up; then fence, wait until the slot has
confirmed the LSN, flip, resume. *Dump and load* fences first and copies every table in binary.
Both scripts keep all sessions open, have a fence that is exact and costs nothing, bring users
before, leave out what a row filter cannot name and sequences (each cell has its own range), verify
nothing while writers wait, and would not survive a crash. Sizes: organizations of the sample
application together in two further cells, each moved to and fro.
"""


@dataclass
class _Passed:
    """Pauses of one organization, in seconds, and where the controller saw them go.

    Attributes:
        per_s: acknowledged writes per second.
        busy: share of the processors that was busy meanwhile.
    """

    there: Sequence[float]
    back: Sequence[float]
    parts: list[Mapping[str, float]] = field(default_factory=list)
    per_s: float = 0.0
    busy: float = 0.0

    @property
    def all(self) -> list[float]:
        """Both directions."""
        return [*self.there, *self.back]


def run(bench: Bench) -> Section:
    """Measure the pause."""
    at_rates, checks = _distribution(bench)
    passed, few = at_rates[WRITES_PER_S], at_rates[FEW_PER_S]
    of_size = _sizes(bench, checks)
    peers = _beside_scripts(bench)
    all_pauses = _ms(passed.all)
    why = _why(passed, few)
    medians = {name: statistics.median(_ms(found)) for name, found in peers.pauses.items()}
    native = [medians[name] for name in (_NATIVE, _NATIVE_DURABLE) if name in medians]
    ratio = min(native) / medians[_CELLFERRY] if native and _CELLFERRY in medians else 0.0
    by_size = {rows: statistics.median(_ms(one.all)) for rows, one in of_size.items()}
    closed = {rows: statistics.median(_closed(one)) for rows, one in of_size.items()}
    flat = max(by_size.values()) / min(by_size.values())
    return Section(
        "Write pause",
        _METHOD,
        [
            Table(
                ("", "cutovers", "p50 ms", "p95 ms", "longest ms"),
                [
                    _row("there", passed.there),
                    _row("back", passed.back),
                    _row("together", passed.all),
                ],
                f"cellferry, {passed.per_s:.0f} acknowledged writes/s, as the writers saw it",
            ),
            _where(passed, few),
            Table(
                ("", "cutovers", "p50 ms", "p95 ms", "longest ms", "p50 against cellferry"),
                [
                    (*_row(name, found), medians[name] / medians.get(_CELLFERRY, medians[name]))
                    for name, found in peers.pauses.items()
                ],
                f"beside scripts, {peers.rows:,} rows, {peers.per_s:.0f} acknowledged writes/s",
            ),
            Table(
                ("rows", "cutovers", "p50 ms", "longest ms", "gate closed, p50 ms"),
                [
                    (rows, len(one.all), by_size[rows], max(_ms(one.all)), closed[rows])
                    for rows, one in of_size.items()
                ],
                "against size",
            ),
        ],
        [
            Target(
                "p50 of the write pause",
                50,
                statistics.median(all_pauses),
                "ms",
                why=why,
            ),
            Target("longest write pause", 300, max(all_pauses), "ms", why=why),
            Target(
                "native replication's p50 against cellferry's",
                3,
                ratio,
                at_least=True,
                why=peers.ended
                or "the better of the two settings of the subscription counts; the script does less"
                " under the fence: it verifies nothing and leaves nothing durable for a crash",
            ),
            Target(
                "pause of the slowest size against the fastest",
                1.5,
                flat,
                why="medians of few cutovers, on cores that the writers share",
            ),
        ],
        [
            (
                f"{sum(one.acknowledged for one in checks):,} acknowledged writes of the sample"
                f" application: {sum(one.lost for one in checks)} lost,"
                f" {sum(one.doubled for one in checks)} doubled."
            ),
            (
                f"Beside the scripts: {peers.writes:,} writes, {peers.lost} lost, {peers.doubled}"
                " doubled."
            ),
            (
                f"The processors were {passed.busy:.0%} busy at {passed.per_s:.0f} writes/s, and"
                f" {few.busy:.0%} at {few.per_s:.0f}: writers, servers and controller together."
            ),
            *([f"The scripts were not measured to the end: {peers.ended}"] if peers.ended else []),
        ],
    )


# ── the distribution, and sizes ─────────────────────────────────────────────────────────────────


def _distribution(bench: Bench) -> tuple[dict[int, _Passed], list[Checked]]:
    """Return what writers waited by the rate asked of them, in cells of their own each."""
    found, checks = {}, []
    for rate, times in ((WRITES_PER_S, bench.size(50, 2)), (FEW_PER_S, bench.size(10, 2))):
        with alternations.opened(POSTGRES, rows=bench.size(2_000, 500)) as fleet:
            moved = fleet.application.organizations_to_move(1)[0]
            found[rate] = _alternate(bench, fleet, moved, times, rate)
            checks.append(_checked(fleet))
    return found, checks


def _sizes(bench: Bench, checks: list[Checked]) -> dict[int, _Passed]:
    """Return what writers waited by the size of the organization that moved."""
    found = {}
    sizes = {bench.size(rows, 300): bench.size(times, 1) for rows, times in SIZES.items()}
    with alternations.opened(POSTGRES, rows=bench.size(2_000, 500), sizes=list(sizes)) as fleet:
        bench.say("cells with all sizes are ready")
        by_slug = {one.slug: one for one in fleet.application.organizations()}
        for rows, times in sizes.items():
            found[rows] = _alternate(bench, fleet, by_slug[f"sized-{rows}"], times, WRITES_PER_S)
        checks.append(_checked(fleet))
    return found


def _alternate(
    bench: Bench, fleet: alternations.Fleet, moved: Organization, times: int, rate: int
) -> _Passed:
    psutil.cpu_percent(None)
    began = time.time()
    with fleet.application.start_traffic(rate, focus=[moved]):
        for number in range(1, times + 1):
            alternations.there_and_back(fleet.context, moved)
            if number == times or number % 10 == 0:
                bench.say(f"{moved.slug}: there and back {number} of {times}, {rate} writes/s")
        time.sleep(1)
    busy = psutil.cpu_percent(None) / 100
    ledger = fleet.application.ledger()
    found = alternations.longest_waits(ledger, moved, fleet.topology_url)
    parts = [
        facts["parts"]
        for migration in fleet.context.topology.migrations(org=moved)
        for name in ("pause", "pause_back")
        if (facts := migration.facts.get(name))
    ]
    done = [
        one.wall + one.seconds
        for one in ledger.operations
        if one.outcome is Outcome.ACKNOWLEDGED and not one.is_read and one.wall >= began
    ]
    per_s = len(done) / (max(done) - min(done))
    return _Passed(found["cutover"], found["switchback"], parts, per_s, busy)


def _checked(fleet: alternations.Fleet) -> Checked:
    checked = fleet.application.check()
    if not checked.ok:
        raise RuntimeError("; ".join(checked.faults))
    return checked


def _where(passed: _Passed, few: _Passed) -> Table:
    parts, unhurried = _parts(passed), _parts(few)
    rows: list[list[str | float | None]] = [
        [
            name,
            statistics.median(found),
            max(found),
            statistics.median(unhurried[name]) if name in unhurried else None,
        ]
        for name, found in parts.items()
    ]
    closed, closed_few = _closed(passed), _closed(few)
    rows.append(
        ["gate closed", statistics.median(closed), max(closed), statistics.median(closed_few)]
    )
    seen, seen_few = statistics.median(_ms(passed.all)), statistics.median(_ms(few.all))
    rows.append(["as a writer saw it", seen, max(_ms(passed.all)), seen_few])
    return Table(
        ("part", "p50 ms", "longest ms", f"p50 ms at {few.per_s:.0f} writes/s"),
        rows,
        f"where the controller saw it go, {passed.per_s:.0f} writes/s",
    )


def _closed(passed: _Passed) -> list[float]:
    return _ms([sum(parts.values()) for parts in passed.parts])


def _parts(passed: _Passed) -> Mapping[str, list[float]]:
    names = dict.fromkeys(name for one in passed.parts for name in one)
    return {name: _ms([one[name] for one in passed.parts if name in one]) for name in names}


def _why(passed: _Passed, few: _Passed) -> str:
    parts = {name: statistics.median(found) for name, found in _parts(passed).items()}
    longest = ", ".join(
        f"{name} {parts[name]:.0f} ms" for name in sorted(parts, key=lambda one: -parts[one])[:3]
    )
    return (
        f"medians of the largest parts: {longest}; {passed.per_s:.0f} writes/s and the three"
        f" servers share the two cores, {passed.busy:.0%} busy: with {few.per_s:.0f} writes/s the"
        f" same steps make a p50 of {statistics.median(_ms(few.all)):.0f} ms"
    )


# ── beside scripts ──────────────────────────────────────────────────────────────────────────────

_CELLFERRY = "cellferry"
_NATIVE = "native replication"
_NATIVE_DURABLE = "native replication, synchronous_commit of the subscription on"
_DUMP = "dump and load, frozen first"


@dataclass
class _Peers:
    rows: int
    per_s: float = 0.0
    writes: int = 0
    lost: int = 0
    doubled: int = 0
    ended: str = ""
    pauses: dict[str, list[float]] = field(default_factory=dict)


def _beside_scripts(bench: Bench) -> _Peers:
    cells = BenchCells.made(bench, bench.size(20_000, 2_000))
    scripts = Scripts(cells)
    found = _Peers(rows=sum(cells.count(SOURCE).values()))
    rates = []
    here, there = SOURCE, DESTINATION

    def product() -> None:
        migration = cells.plan(to=there)
        for step in ("copy", "sync", "verify", "cutover", "soak", "cleanup"):
            cells.run(step, migration)
        history = read_history(cells.connections["cellferry-topology"])
        flips.append(max(one.at for one in history if one.organization == str(LARGE)))

    def script(way: Callable[[], None]) -> None:
        way()
        flips.append(scripts.flips[-1])

    contenders: Mapping[str, tuple[str, int, Callable[[], None]]] = {
        _CELLFERRY: (_ENTER_CELLFERRY, 2, product),
        _NATIVE: (
            ENTER, 2,
            lambda: script(lambda: scripts.by_replication(here, there, durable_apply=False)),
        ),
        _NATIVE_DURABLE: (
            ENTER, 2,
            lambda: script(lambda: scripts.by_replication(here, there, durable_apply=True)),
        ),
        _DUMP: (ENTER, 1, lambda: script(lambda: scripts.by_dump(here, there))),
    }  # fmt: skip
    order = [name for _ in range(bench.runs) for name in contenders]
    flips: list[float] = []
    try:
        scripts.prepare()
        for name in order:
            enter, count, move = contenders[name]
            flips = []
            with _writers(bench, cells, enter) as written:
                for _ in range(count):
                    move()
                    here, there = there, here
                    time.sleep(0.6)
            rates.append(written.acknowledged_per_s)
            found.writes += len(written.writes)
            with cells.admin(here) as connection:
                bodies = [
                    body
                    for (body,) in connection.execute(
                        "SELECT body FROM comments WHERE organization_id = %s", (LARGE,)
                    )
                ]
                _forget(connection)
            with cells.admin(there) as connection:
                _forget(connection)
            lost, doubled = written.faults(bodies)
            found.lost += lost
            found.doubled += doubled
            pauses = [written.longest_around(moment) for moment in flips]
            found.pauses.setdefault(name, []).extend(pauses)
            bench.say(f"{name}: {', '.join(f'{one:.0f}' for one in _ms(pauses))} ms")
    except Exception as error:
        # What was measured is told, and why there is no more.
        found.ended = f"{type(error).__name__}: {error}"
        bench.say(f"beside scripts: {found.ended}")
    found.per_s = statistics.median(rates) if rates else 0.0
    return found


_ENTER_CELLFERRY = "SELECT cellferry.assert_authority(%s::text, %s::bigint)"


def _writers(bench: Bench, cells: BenchCells, enter: str) -> AbstractContextManager[Written]:
    here = SOURCE if any(cells.count(SOURCE).values()) else DESTINATION
    with cells.admin(here) as connection:
        targets = connection.execute(
            "SELECT id, author_id FROM issues WHERE organization_id = %s ORDER BY id LIMIT 200",
            (LARGE,),
        ).fetchall()
    return writing(
        bench.root / "writes",
        cells.connections["cellferry-topology"],
        {
            cell: cells.server(cell).url(APPLICATION, "bench", DATABASE)
            for cell in (SOURCE, DESTINATION)
        },
        organization=str(LARGE),
        enter=enter,
        targets=targets,
        per_s=WRITES_PER_S,
    )


def _forget(connection: psycopg.Connection[Any]) -> None:
    """Let nothing of one contender's moves be there for the next."""
    connection.execute(
        "TRUNCATE cellferry.gate, cellferry.key_log, cellferry.lease, cellferry.checkpoint,"
        " cellferry.imported_row, bench_fence"
    )


def _row(name: str, seconds: Sequence[float]) -> tuple[str, int, float, float, float]:
    found = _ms(seconds)
    return name, len(found), statistics.median(found), percentile(found, 95), max(found)


def _ms(seconds: Sequence[float]) -> list[float]:
    return [one * 1000 for one in seconds]
