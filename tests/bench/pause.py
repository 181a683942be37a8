"""How long writers wait at a cutover: the distribution, where it goes, and beside two scripts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import psutil
import psycopg
from tests.bench.cells import APPLICATION, DATABASE, DESTINATION, LARGE, SOURCE, BenchCells
from tests.bench.harness import POSTGRES, Bench, Section, Table, Target, percentile, timed, turning
from tests.bench.moving_scripts import ENTER, STEPS, Scripts
from tests.bench.steady_writers import Written, writing
from tests.fault import alternations

from cellferry.local.application import Checked
from cellferry.local.application.checker import read_history
from cellferry.local.application.ledger import Operation, Outcome
from cellferry.model import Organization
from cellferry.stores.postgres import gate
from cellferry.stores.postgres.delta import Delta
from cellferry.stores.postgres.rounds import Rounds
from cellferry.stores.postgres.store import PostgresMove

WRITES_PER_S = 600
"""Asked of the writers; the target speaks of 500 acknowledged, and 85% go to who moves."""
FEW_PER_S = 60
"""Asked where the controller is to have the processors nearly to itself."""

#: As long a time as counts at a flip, seconds.
_SPAN_S = 2 * alternations.AROUND_FLIP_S
BEFORE_S = 6.0

_METHOD = """
Writers in two processes of their own send transactions to four organizations of the sample
application, 85% of them to the one that moves, in both of its stores (PostgreSQL and Valkey,
durable commits); the library moves it to the other cell and rolls the move back, again and again:
half of the cutovers are the roll-backs', which pass the same barrier. The pause of one cutover is
the longest time that any write of the organization waited from its first attempt to its
acknowledgement, of all writes that overlap the 400 ms before and after the flip; refused attempts,
hops and reconnections are in it, and so is whatever else held a write up then: the same figure for
moments away from every flip says how much that is. Afterwards the application's checker compares
every recorded write with both cells. The scripts move an organization of the bench's own schema,
PostgreSQL alone, with the same writers as cellferry beside them, in a turning order: *native
replication* is a publication with row filters and a subscription, caught up; then fence, wait until
the slot has confirmed the LSN, flip, resume. *Dump and load* fences first and copies every table in
binary. Both scripts keep all sessions open, have an exact fence that asks one lock and one row of
each transaction, bring users before, leave out what a row filter cannot name and sequences (each
cell has its own range), compare nothing, and record nothing by which another process could finish
or undo what they began.
"""


@dataclass
class Passed:
    """Pauses of one organization, in seconds, and where the controller saw them go.

    Attributes:
        flips: cutovers and roll-backs, each with the write that waited longest around it.
        quiet: the longest wait in as long a time as counts at a flip, away from every flip.
        before: the same, of the last `BEFORE_S` seconds before each flip.
        longest: of any write of it, at whatever time.
        retries: steps that had to be tried again.
        parts: of the barrier, for each flip.
        keys: rows of PostgreSQL that the last delta had to bring, for each flip.
        finishing: parts of `finish` in PostgreSQL, for each flip.
        per_s: acknowledged writes per second, and of those the organization's that moves.
        busy: share of the processors that was busy, over whole moves.
    """

    flips: Sequence[alternations.Flip]
    quiet: Sequence[float]
    before: Sequence[float]
    longest: float
    retries: int
    parts: list[Mapping[str, float]]
    keys: list[int]
    finishing: list[Mapping[str, float]]
    per_s: tuple[float, float]
    busy: float

    @property
    def all(self) -> list[float]:
        """The longest wait at each flip."""
        return [one.longest_s for one in self.flips]

    def of(self, kind: str) -> list[float]:
        """The longest wait at each flip of a kind."""
        return [one.longest_s for one in self.flips if one.kind == kind]

    @property
    def closed(self) -> list[float]:
        """For how long the controller had the gate closed, ms."""
        return in_ms([sum(parts.values()) for parts in self.parts])


def run(bench: Bench) -> Section:
    """Measure the pause."""
    at_rates, checks = _distribution(bench)
    passed, few = at_rates[WRITES_PER_S], at_rates[FEW_PER_S]
    peers = _beside_scripts(bench)
    pauses = in_ms(passed.all)
    why = _why(passed, few)
    medians = {name: statistics.median(in_ms(found)) for name, found in peers.pauses.items()}
    ratio = 0.0
    if not peers.ended:
        ratio = min(medians[_NATIVE], medians[_NATIVE_DURABLE]) / medians[_CELLFERRY]
    return Section(
        "Write pause",
        _METHOD,
        [
            Table(
                ("", "flips", "p50 ms", "p95 ms", "longest ms"),
                [
                    _row("cutover", passed.of("cutover")),
                    _row("roll-back", passed.of("switchback")),
                    _row("together", passed.all),
                    _row("as long a time without a flip", passed.quiet),
                    _row(f"together, with {few.per_s[0]:.0f} writes/s", few.all),
                ],
                f"cellferry, {passed.per_s[0]:.0f} acknowledged writes/s,"
                f" {passed.per_s[1]:.0f} of them to who moves, as the writers saw it",
            ),
            _where(passed, few),
            _inside_finish(passed),
            _slowest(passed),
            Table(
                ("", "flips", "p50 ms", "p95 ms", "longest ms", "p50 against cellferry"),
                [
                    (*_row(name, found), medians[name] / medians.get(_CELLFERRY, medians[name]))
                    for name, found in peers.pauses.items()
                ],
                f"beside scripts, {peers.rows:,} rows, {peers.per_s:.0f} acknowledged writes/s",
            ),
            Table(
                ("", *(f"{step}, p50 ms" for step in STEPS)),
                [
                    (name, *(statistics.median(in_ms(step)) for step in zip(*found, strict=True)))
                    for name, found in peers.fenced.items()
                ],
                "where a script's time goes",
            ),
        ],
        [
            Target("p50 of the write pause", 50, statistics.median(pauses), "ms", why=why),
            Target("longest write pause", 300, max(pauses), "ms", why=why),
            Target(
                "native replication's p50 against cellferry's",
                3,
                ratio,
                at_least=True,
                why=peers.ended or _why_not_shorter(passed, peers),
            ),
        ],
        [
            (
                f"{sum(one.acknowledged for one in checks):,} acknowledged writes of the sample"
                f" application: {sum(one.lost for one in checks)} lost,"
                f" {sum(one.doubled for one in checks)} doubled."
            ),
            (
                f"Steps that had to be tried again: {passed.retries}. The longest that any write"
                " to who moves waited, at whatever time of its moves, is"
                f" {passed.longest * 1000:.0f} ms."
            ),
            (
                "Beside the scripts: "
                + "; ".join(
                    f"{name} {found.writes:,} writes, {found.lost} lost, {found.doubled} doubled"
                    for name, found in peers.faults.items()
                )
                + "."
            ),
            (
                f"Over whole moves the processors were {passed.busy:.0%} busy with"
                f" {passed.per_s[0]:.0f} writes/s and {few.busy:.0%} with {few.per_s[0]:.0f}:"
                " writers, servers and controller together."
            ),
            *([f"The scripts were not measured to the end: {peers.ended}"] if peers.ended else []),
        ],
    )


# ── the distribution ────────────────────────────────────────────────────────────────────────────


def _distribution(bench: Bench) -> tuple[dict[int, Passed], list[Checked]]:
    """Return what writers waited by the rate asked of them, in cells of their own each."""
    found, checks = {}, []
    for rate, times in ((WRITES_PER_S, bench.size(50, 2)), (FEW_PER_S, bench.size(10, 2))):
        with alternations.opened(POSTGRES, rows=bench.size(2_000, 500)) as fleet:
            moved = fleet.application.organizations_to_move(1)[0]
            found[rate] = alternate(bench, fleet, moved, times, rate)
            checks.append(check(fleet))
    return found, checks


def alternate(
    bench: Bench, fleet: alternations.Fleet, moved: Organization, times: int, rate: int
) -> Passed:
    """Move `moved` there and back `times` times, while so many writes/s are asked for."""
    retries = 0
    psutil.cpu_percent(None)
    began = time.time()
    with fleet.application.start_traffic(rate, focus=[moved]), _profiled() as finishing:
        for number in range(1, times + 1):
            retries += alternations.there_and_back(fleet.context, moved)
            if number == times or number % 10 == 0:
                bench.say(f"{moved.slug}: there and back {number} of {times}, {rate} writes/s")
        time.sleep(1)
    busy = psutil.cpu_percent(None) / 100
    ledger = fleet.application.ledger()
    flips = alternations.flips(ledger, moved, fleet.topology_url)
    passed = [
        facts
        for migration in fleet.context.topology.migrations(org=moved)
        for name in ("pause", "pause_back")
        if (facts := migration.facts.get(name))
    ]
    writes = [one for one in ledger.operations if not one.is_read and one.wall >= began]
    done = [one for one in writes if one.outcome is Outcome.ACKNOWLEDGED]
    took = max(one.wall + one.seconds for one in done) - min(one.wall for one in done)
    of_moved = [one for one in done if one.organization == moved.id]
    away = _away_from([one.at for one in flips], of_moved)
    return Passed(
        flips=flips,
        quiet=list(away.values()),
        before=[
            longest
            for number, longest in away.items()
            if any(0 < one.at - number * _SPAN_S < BEFORE_S for one in flips)
        ],
        longest=max(one.seconds for one in writes if one.organization == moved.id),
        retries=retries,
        parts=[one["parts"] for one in passed],
        keys=[int(one["finished"]["postgres"]["applied"]) for one in passed],
        finishing=finishing,
        per_s=(len(done) / took, len(of_moved) / took),
        busy=busy,
    )


def _away_from(flips: Sequence[float], writes: Sequence[Operation]) -> dict[int, float]:
    """Return the longest waits in spans as long as one around a flip, but away from all of them.

    By number: the first begins at the epoch.
    """
    near = {int((at + shift) / _SPAN_S) for at in flips for shift in (-_SPAN_S, 0, _SPAN_S)}
    longest: dict[int, float] = {}
    for one in writes:
        first, last = one.wall, one.wall + one.seconds
        for number in range(int(first / _SPAN_S), int(last / _SPAN_S) + 1):
            if number not in near:
                longest[number] = max(longest.get(number, 0.0), one.seconds)
    return longest


def check(fleet: alternations.Fleet) -> Checked:
    """Let the application compare what it recorded with both cells.

    Raises:
        RuntimeError: something is lost, doubled or changed.
    """
    checked = fleet.application.check()
    if not checked.ok:
        raise RuntimeError("; ".join(checked.faults))
    return checked


# ── where it goes ───────────────────────────────────────────────────────────────────────────────

#: Parts of the barrier in the order of time: their names in a migration's facts, and in words.
_BARRIER = {
    "freeze redis": "freeze Valkey",
    "freeze postgres": "freeze PostgreSQL: lock the gate, drain, write `frozen`",
    "finish": "finish: last delta to both stores of the other cell, compared, committed;"
    " beside it, the disk has the frozen gate",
    "flip": "flip: the topology commits the new route",
    "hand over": "hand over: the gates learn it, and then writers that wait there",
}
#: What `finish` does in PostgreSQL, one after the other.
_FINISH: Mapping[str, tuple[Any, str]] = {
    "read the log": (Rounds, "_read_log"),
    "read the rows": (Delta, "_read"),
    "write them, compare hashes, look for what they refer to": (Delta, "_write"),
    "arm the way back": (gate, "arm_reverse"),
}


@contextmanager
def _profiled() -> Iterator[list[Mapping[str, float]]]:
    """Yield the seconds of each part of every `finish` meanwhile; "all" is the whole."""
    found: list[Mapping[str, float]] = []
    current: dict[str, float] | None = None
    whole = PostgresMove.finish

    def add(name: str, seconds: float) -> None:
        if current is not None:
            current[name] = current.get(name, 0.0) + seconds

    def finish(move: PostgresMove) -> Any:
        nonlocal current
        current = dict.fromkeys(_FINISH, 0.0)
        began = time.perf_counter()
        try:
            return whole(move)
        finally:
            found.append({**current, "all": time.perf_counter() - began})
            current = None

    with ExitStack() as stack:
        for name, (owner, method) in _FINISH.items():
            stack.enter_context(timed(owner, method, partial(add, name)))
        stack.enter_context(mock.patch.object(PostgresMove, "finish", finish))
        yield found


def _where(passed: Passed, few: Passed) -> Table:
    parts, unhurried = _parts(passed), _parts(few)
    rows: list[list[str | float | None]] = [
        [
            words,
            statistics.median(parts[name]),
            max(parts[name]),
            statistics.median(unhurried[name]) if name in unhurried else None,
        ]
        for name, words in _BARRIER.items()
        if name in parts
    ]
    rows.append(
        ["all", statistics.median(passed.closed), max(passed.closed), statistics.median(few.closed)]
    )
    return Table(
        ("part", "p50 ms", "longest ms", f"p50 ms with {few.per_s[0]:.0f} writes/s"),
        rows,
        f"where the controller saw it go, {passed.per_s[0]:.0f} writes/s",
    )


def _inside_finish(passed: Passed) -> Table:
    whole = [one["all"] for one in passed.finishing]
    rest = [2 * one["all"] - sum(one.values()) for one in passed.finishing]
    return Table(
        ("part", "p50 ms", "longest ms"),
        [
            *(
                (name, *_median_and_most([one[name] for one in passed.finishing]))
                for name in _FINISH
            ),
            (
                "begin and commit at both, mark it; the frozen gate's disk, layouts, a standby",
                *_median_and_most(rest),
            ),
            ("all", *_median_and_most(whole)),
        ],
        "inside finish, PostgreSQL",
    )


def _slowest(passed: Passed) -> Table:
    """The write that waited longest at each flip: where, and what it did meanwhile."""
    rows: list[list[str | float | None]] = []
    for store, words in (("postgres", "PostgreSQL"), ("redis", "Valkey")):
        found = [
            (flip.at, flip.slowest)
            for flip in passed.flips
            if flip.slowest is not None and flip.slowest.store == store
        ]
        if found:
            before = [at - one.wall for at, one in found]
            after = [one.wall + one.seconds - at for at, one in found]
            rows.append(
                [
                    words,
                    len(found),
                    statistics.median(one.attempts for _, one in found),
                    statistics.median(in_ms(before)),
                    statistics.median(in_ms(after)),
                ]
            )
    return Table(
        ("store", "flips", "attempts, p50", "began before the flip, ms, p50",
         "acknowledged after it, ms, p50"),
        rows,
        "the write that waited longest around each flip",
    )  # fmt: skip


def _median_and_most(seconds: Sequence[float]) -> tuple[float, float]:
    return statistics.median(in_ms(seconds)), max(in_ms(seconds))


def _parts(passed: Passed) -> Mapping[str, list[float]]:
    names = dict.fromkeys(name for one in passed.parts for name in one)
    return {name: in_ms([one[name] for one in passed.parts if name in one]) for name in names}


def _why(passed: Passed, few: Passed) -> str:
    parts = {name: statistics.median(found) for name, found in _parts(passed).items()}
    longest = ", ".join(
        f"{name} {parts[name]:.0f} ms" for name in sorted(parts, key=lambda one: -parts[one])[:3]
    )
    return (
        f"medians of the largest parts: {longest}; the gate is closed for"
        f" {statistics.median(passed.closed):.0f} ms, and for"
        f" {statistics.median(few.closed):.0f} ms with {few.per_s[0]:.0f} writes/s: the rest is a"
        " longer delta, and turns on the processors that writers and servers have as well"
    )


def _why_not_shorter(passed: Passed, peers: _Peers) -> str:
    finish = statistics.median(one["all"] for one in passed.finishing) * 1000
    whole = statistics.median(sum(one) for one in peers.fenced[_NATIVE_DURABLE]) * 1000
    waited = statistics.median(in_ms(peers.pauses[_NATIVE_DURABLE]))
    return (
        "the better of the two settings of the subscription counts. Its fence is closed for"
        f" {whole:.0f} ms: replication has applied everything but the last commits before, and the"
        f" flip is one UPDATE. Even so its writers waited {waited:.0f} ms in the median:"
        f" {waited - whole:.0f} ms more than the fence was closed, which a shorter fence would not"
        f" take away. In cellferry the last delta alone takes {finish:.0f} ms: it reads"
        " log and rows, writes them, compares both sides by hash, arms the way back, and leaves"
        " in both cells and the topology what another process needs to finish or undo it"
    )


# ── beside scripts ──────────────────────────────────────────────────────────────────────────────

_CELLFERRY = "cellferry"
_NATIVE = "native replication"
_NATIVE_DURABLE = "native replication, synchronous_commit of the subscription on"
_DUMP = "dump and load, frozen first"


@dataclass
class _Faults:
    writes: int = 0
    lost: int = 0
    doubled: int = 0


@dataclass
class _Peers:
    rows: int
    per_s: float = 0.0
    ended: str = ""
    pauses: dict[str, list[float]] = field(default_factory=dict)
    fenced: dict[str, list[list[float]]] = field(default_factory=dict)
    faults: dict[str, _Faults] = field(default_factory=dict)


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
    flips: list[float] = []
    try:
        scripts.prepare()
        for name in turning(contenders, bench.runs):
            enter, count, move = contenders[name]
            flips = []
            with _writers(bench, cells, enter) as written:
                for _ in range(count):
                    move()
                    here, there = there, here
                    time.sleep(0.6)
            rates.append(written.acknowledged_per_s)
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
            faults = found.faults.setdefault(name, _Faults())
            faults.writes += len(written.writes)
            faults.lost += lost
            faults.doubled += doubled
            if scripts.fenced:
                found.fenced.setdefault(name, []).extend(scripts.fenced)
                scripts.fenced.clear()
            pauses = [written.longest_around(moment) for moment in flips]
            found.pauses.setdefault(name, []).extend(pauses)
            bench.say(f"{name}: {', '.join(f'{one:.0f}' for one in in_ms(pauses))} ms")
    except Exception as error:
        # What was measured is told, and why there is no more.
        found.ended = f"{type(error).__name__}: {error}"
        bench.say(f"beside scripts: {found.ended}")
    ours = found.faults.get(_CELLFERRY, _Faults())
    if ours.lost or ours.doubled:
        raise RuntimeError(f"cellferry lost {ours.lost} writes and doubled {ours.doubled}")
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
    found = in_ms(seconds)
    return name, len(found), statistics.median(found), percentile(found, 95), max(found)


def in_ms(seconds: Sequence[float]) -> list[float]:
    return [one * 1000 for one in seconds]
