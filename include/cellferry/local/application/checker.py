"""Compares what was acknowledged with what is there. Shares no code with the mover.

The ledger tells each operation's effects in these words, in the order in which a session did
them:

==========  ================================  =====================================================
verb        operands                          meaning
==========  ================================  =====================================================
`make`      part, name, digest[, expiry ms]   the row or key is there from now on, version 0
`change`    part, name, digest                its version rises by one
`drop`      part, name                        it is gone
`add`       part, name, n                     a counter that all sessions share rises by n
`push`      part, queue, job                  the queue gets a job of its own
`pop`       part, queue                       one job leaves the queue; the result says which
`entry`     part, stream, operation           the stream gets an entry
`deliver`   part, stream                      the group is given new entries; the result says which
`ack`       part, stream, entries             these entries are done
==========  ================================  =====================================================

An acknowledged operation must have had its effects exactly once, a refused one not at all, and
one of unknown outcome once or not at all.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import psycopg
import redis

from cellferry.local.application.contents import (
    Contents,
    Stream,
    cell_rows,
    connect,
    count_keys,
    count_rows,
    dangling_rows,
    gate_states,
    read_contents,
)
from cellferry.local.application.ledger import Ledger, Operation, Outcome
from cellferry.local.application.places import Place

_EXAMPLES = 30
_CLOCK_MS = 2_000
"""A key that expires this close to the check may be there or not."""

#: States of a gate under which a cell that has no authority may hold rows.
_HELD_BACK = ("moved", "importing")


@dataclass(frozen=True, slots=True)
class Authority:
    """One entry of a route's history: since `at` (wall clock), `cell` has authority."""

    organization: str
    epoch: int
    cell: str
    at: float


@dataclass(frozen=True)
class Baseline:
    """What the cells held before the first writer began."""

    organizations: Mapping[str, Mapping[str, Any]]
    """Per organization `{"cell", "untouched": {part: [count, hash]}, "hot": {part: {ref: …}}}`."""
    cells: Mapping[str, Mapping[str, Any]]
    """Per cell the hashes of the tables that never move."""


@dataclass(frozen=True)
class Checked:
    """The verdict. All numbers but the first four must be 0.

    Attributes:
        lost: acknowledged effects that are not there, or were undone.
        doubled: effects that are there more often than they were acknowledged.
        phantom: effects of refused writes, or that nobody asked for.
        misplaced: writes acknowledged by a cell without authority at that epoch or time.
        backwards: reads that saw less than an earlier read or acknowledgement.
        changed: tables of moved organizations whose untouched rows or keys differ.
        foreign: the same of organizations that never moved, and tables that never move.
        left_behind: rows and keys in a cell without authority and without a gate; rows whose
            foreign key points nowhere.
        inconsistent: columns that the application's triggers keep and that are wrong.
    """

    acknowledged: int = 0
    refused: int = 0
    unknown: int = 0
    reads: int = 0
    lost: int = 0
    doubled: int = 0
    phantom: int = 0
    misplaced: int = 0
    backwards: int = 0
    changed: int = 0
    foreign: int = 0
    left_behind: int = 0
    inconsistent: int = 0
    refusals: Mapping[str, int] = field(default_factory=dict)
    examples: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def faults(self) -> list[str]:
        """What is not as it should be, in words; empty when all is well."""
        named = {
            name: getattr(self, name)
            for name in (
                "lost", "doubled", "phantom", "misplaced", "backwards", "changed", "foreign",
                "left_behind", "inconsistent",
            )
        }  # fmt: skip
        found = [f"{count} {name.replace('_', ' ')}" for name, count in named.items() if count]
        return found + list(self.examples) if found else []

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {**asdict(self), "ok": self.ok}


class Findings:
    """Faults found so far, counted and with examples."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: list[str] = []

    def add(self, fault: str, text: str, count: int = 1) -> None:
        """Note `count` faults of one kind."""
        self.counts[fault] += count
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{fault}: {text}")


def take_baseline(places: Mapping[str, Place], routes: Mapping[str, str]) -> Baseline:
    """Read what the cells hold; `routes` says in which cell each organization is."""
    organizations: dict[str, dict[str, Any]] = {}
    cells: dict[str, dict[str, Any]] = {}
    for name, place in places.items():
        with connect(place.postgres) as postgres, _keys_of(place) as client:
            cells[name] = {table: list(one) for table, one in cell_rows(postgres).items()}
            for organization, cell in routes.items():
                if cell == name:
                    found = read_contents(postgres, client, organization)
                    organizations[organization] = {
                        "cell": cell,
                        "untouched": {part: list(one) for part, one in found.untouched.items()},
                        "hot": {
                            part: {ref: list(rows[0]) for ref, rows in rows_of.items()}
                            for part, rows_of in found.tracked.items()
                        },
                    }
    return Baseline(organizations, cells)


def read_history(topology: str) -> tuple[Authority, ...]:
    """Read which cell had authority at which epoch, from the topology's own record."""
    with psycopg.connect(topology, connect_timeout=10) as connection:
        rows = connection.execute(
            "SELECT organization, epoch, cell, extract(epoch FROM changed_at)::float8"
            " FROM topology.route_history ORDER BY organization, epoch"
        ).fetchall()
    return tuple(Authority(*row) for row in rows)


def check(
    ledger: Ledger,
    places: Mapping[str, Place],
    history: Sequence[Authority],
    baseline: Baseline,
) -> Checked:
    """Compare the ledger with the cells. Writers must have stopped; movers may still run."""
    begun = time.monotonic()
    findings = Findings()
    newest: dict[str, Authority] = {}
    for one in history:
        if one.organization not in newest or one.epoch > newest[one.organization].epoch:
            newest[one.organization] = one
    by_organization: dict[str, list[Operation]] = defaultdict(list)
    for operation in ledger.operations:
        by_organization[operation.organization].append(operation)
    check_authority(ledger.operations, history, findings)
    with ExitStack() as stack:
        cells = {
            name: (
                stack.enter_context(connect(place.postgres)),
                stack.enter_context(_keys_of(place)),
            )
            for name, place in places.items()
        }
        for organization, before in baseline.organizations.items():
            route = newest.get(organization)
            if route is None or route.cell not in cells:
                findings.add("lost", f"organization {organization} has no route")
                continue
            contents = read_contents(*cells[route.cell], organization)
            check_contents(organization, by_organization[organization], contents, before, findings)
            check_untouched(organization, contents, before, route.epoch > 1, findings)
            for name, (postgres, client) in cells.items():
                if name != route.cell:
                    _check_elsewhere(organization, name, postgres, client, findings)
        for name, (postgres, _) in cells.items():
            for constraint, rows in dangling_rows(postgres).items():
                findings.add("left_behind", f"{name}: {rows} rows break {constraint}", rows)
            now = {table: list(one) for table, one in cell_rows(postgres).items()}
            for table, one in baseline.cells[name].items():
                if now[table] != list(one):
                    findings.add("foreign", f"{name}: {table} is not what it was")
    return _verdict(ledger, findings, time.monotonic() - begun)


def check_authority(
    operations: Sequence[Operation], history: Sequence[Authority], findings: Findings
) -> None:
    """Each acknowledged write names a cell and an epoch: the history must agree."""
    known = {(one.organization, one.epoch): one for one in history}
    for one in operations:
        if one.outcome is not Outcome.ACKNOWLEDGED or one.is_read or one.epoch is None:
            continue
        authority = known.get((one.organization, one.epoch))
        if authority is None or authority.cell != one.cell:
            findings.add("misplaced", f"{one.id} at {one.cell} under epoch {one.epoch}")
            continue
        successor = known.get((one.organization, one.epoch + 1))
        if successor is not None and one.wall > successor.at:
            findings.add(
                "misplaced",
                f"{one.id} began at {one.cell} {one.wall - successor.at:.3f} s after epoch"
                f" {successor.epoch} of {successor.cell}",
            )


def check_untouched(
    organization: str,
    contents: Contents,
    before: Mapping[str, Any],
    moved: bool,
    findings: Findings,
) -> None:
    """What no writer touches is exactly what it was."""
    for part, then in before["untouched"].items():
        now = contents.untouched.get(part, (0, "0"))
        if list(now) != list(then):
            findings.add(
                "changed" if moved else "foreign",
                f"organization {organization}: untouched rows of {part}: {then[0]} before,"
                f" {now[0]} now" + (", other contents" if now[0] == then[0] else ""),
            )


def check_contents(
    organization: str,
    operations: Sequence[Operation],
    contents: Contents,
    before: Mapping[str, Any],
    findings: Findings,
) -> None:
    """Everything that the organization's writers did, once."""
    _Fold(organization, before, findings).judge(operations, contents)
    for fault in contents.derived_faults:
        findings.add("inconsistent", f"organization {organization}: {fault}")


#: What a row may be: None (not there), or its version and content (None: any content).
_Possible = tuple[int, str | None] | None


class _Fold:
    """Folds one organization's operations into what its cell must hold."""

    def __init__(self, organization: str, before: Mapping[str, Any], findings: Findings) -> None:
        self._organization = organization
        self._findings = findings
        self._rows: dict[tuple[str, str], list[_Possible]] = {
            (part, ref): [(version, content)]
            for part, rows in before["hot"].items()
            for ref, (version, content) in rows.items()
        }
        self._expiries: dict[str, int] = {}
        self._touched: Counter[tuple[str, str]] = Counter()
        self._sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        self._pushed: dict[str, dict[str, Outcome]] = defaultdict(dict)
        self._popped: dict[str, list[str]] = defaultdict(list)
        self._unknown_pops: Counter[str] = Counter()
        self._entries: dict[str, dict[str, Outcome]] = defaultdict(dict)
        self._delivered: dict[str, list[str]] = defaultdict(list)
        self._unknown_deliveries: Counter[str] = Counter()
        self._done: dict[str, set[str]] = defaultdict(set)
        self._maybe_done: dict[str, set[str]] = defaultdict(set)
        self._seen: dict[tuple[str, str, str], int] = {}

    def judge(self, operations: Sequence[Operation], contents: Contents) -> None:
        """Compare what must be with what is."""
        for operation in operations:
            if operation.is_read:
                self._read(operation)
                continue
            if operation.outcome is Outcome.REFUSED and (operation.reason or "").startswith(
                "RowGone"
            ):
                self._found("backwards", f"{operation.id} {operation.kind}: {operation.reason}")
            for effect in operation.effects:
                self._apply(operation, effect)
        self._judge_rows(contents)
        self._judge_counters(contents)
        for name in {*self._pushed, *self._popped, *contents.queues}:
            self._judge_queue(name, contents.queues.get(name, []))
        for name in {*self._entries, *contents.streams}:
            self._judge_stream(name, contents.streams.get(name, Stream()))

    def _found(self, fault: str, text: str, count: int = 1) -> None:
        self._findings.add(fault, f"organization {self._organization}: {text}", count)

    def _apply(self, operation: Operation, effect: Sequence[Any]) -> None:
        verb, part, name, *rest = effect
        outcome = operation.outcome
        match verb:
            case "make" | "change" | "drop":
                self._apply_to_row(outcome, verb, (part, name), rest)
                if verb == "make" and len(rest) > 1:
                    self._expiries[name] = int(rest[1])
            case "add" if outcome is not Outcome.REFUSED:
                self._sums[part, name][outcome is Outcome.UNKNOWN] += int(rest[0])
            case "push":
                self._pushed[name][rest[0]] = outcome
            case "pop":
                if outcome is Outcome.UNKNOWN:
                    self._unknown_pops[name] += 1
                elif outcome is Outcome.ACKNOWLEDGED and operation.result is not None:
                    self._popped[name].append(operation.result)
            case _:
                self._apply_to_stream(operation, verb, name, rest)

    def _apply_to_stream(
        self, operation: Operation, verb: str, name: str, rest: Sequence[Any]
    ) -> None:
        match verb, operation.outcome:
            case "entry", outcome:
                self._entries[name][rest[0]] = outcome
            case "deliver", Outcome.ACKNOWLEDGED:
                self._delivered[name].extend(operation.result)
            case "deliver", Outcome.UNKNOWN:
                self._unknown_deliveries[name] += 1
            case "ack", Outcome.ACKNOWLEDGED:
                self._done[name].update(rest[0])
            case "ack", Outcome.UNKNOWN:
                self._maybe_done[name].update(rest[0])
            case _:
                pass

    def _apply_to_row(
        self, outcome: Outcome, verb: str, row: tuple[str, str], rest: Sequence[Any]
    ) -> None:
        before = self._rows.setdefault(row, [None])
        if outcome is Outcome.REFUSED:
            return
        self._touched[row] += 1
        after: list[_Possible] = []
        for one in before:
            if verb == "drop":
                after.append(None)
            elif verb == "make":
                after.append((0, rest[0]))
            else:
                after.append(((one[0] if one else 0) + 1, rest[0]))
        self._rows[row] = after if outcome is Outcome.ACKNOWLEDGED else [*before, *after]

    def _read(self, operation: Operation) -> None:
        if operation.outcome is not Outcome.ACKNOWLEDGED:
            return
        for part, name, value, least in operation.result or ():
            key = (operation.session, part, name)
            floor = max(least, self._seen.get(key, 0))
            if value is None or value < floor:
                self._found(
                    "backwards",
                    f"{operation.id} read {part} {name} as {value} after {floor}",
                )
            else:
                self._seen[key] = value

    def _judge_rows(self, contents: Contents) -> None:
        now_ms = time.time() * 1000
        for part, rows in contents.tracked.items():
            for name, found in rows.items():
                if (part, name) not in self._rows:
                    self._found("phantom", f"{part} {name} was never written")
                if len(found) > 1:
                    self._found("doubled", f"{part} {name} is there {len(found)} times")
        for (part, name), possible in self._rows.items():
            rows_found = contents.tracked.get(part, {}).get(name, [])
            actual: _Possible = rows_found[0] if rows_found else None
            expires = self._expiries.get(name)
            if expires is not None and self._judge_expiry(
                name, expires, actual, contents.expiries.get(name), now_ms
            ):
                continue
            if not any(_fits(actual, one) for one in possible):
                self._judge_row(part, name, actual, possible)

    def _judge_expiry(
        self, name: str, expires: int, actual: _Possible, found: int | None, now_ms: float
    ) -> bool:
        """Return whether nothing more is to be said about an expiring key."""
        if actual is None:
            return expires < now_ms + _CLOCK_MS
        if found != expires:
            self._found("changed", f"{name} expires at {found} instead of {expires}")
        return False

    def _judge_row(
        self, part: str, name: str, actual: _Possible, possible: Sequence[_Possible]
    ) -> None:
        wanted = " or ".join(sorted({str(one) for one in possible}))
        text = f"{part} {name} is {actual}, must be {wanted}"
        there = [one for one in possible if one is not None]
        if actual is None:
            self._found("lost", text, 1 + min(one[0] for one in there))
        elif not there:
            # gone for good by an acknowledged write, or only ever refused
            self._found("lost" if self._touched[part, name] else "phantom", text)
        elif actual[0] > max(one[0] for one in there):
            self._found("doubled", text, actual[0] - max(one[0] for one in there))
        else:
            self._found("lost", text, max(1, min(one[0] for one in there) - actual[0]))

    def _judge_counters(self, contents: Contents) -> None:
        for key, (sure, perhaps) in self._sums.items():
            actual = contents.counters.get(key, 0)
            text = f"{key[0]} {key[1]} is {actual}, must be {sure} to {sure + perhaps}"
            if actual < sure:
                self._found("lost", text, sure - actual)
            elif actual > sure + perhaps:
                self._found("doubled", text, actual - sure - perhaps)
        for key, actual in contents.counters.items():
            if actual and key not in self._sums:
                self._found("phantom", f"{key[0]} {key[1]} is {actual}, nobody counted")

    def _judge_queue(self, name: str, jobs: Sequence[str]) -> None:
        pushed = self._pushed[name]
        times = Counter(jobs) + Counter(self._popped[name])
        missing = []
        for job, outcome in pushed.items():
            if times[job] == 0 and outcome is Outcome.ACKNOWLEDGED:
                missing.append(job)
        for job, count in times.items():
            if job not in pushed or pushed[job] is Outcome.REFUSED:
                self._found("phantom", f"{name}: job {job} was never queued")
            elif count > 1:
                self._found("doubled", f"{name}: job {job} {count} times", count - 1)
        # an RPOP whose answer was lost may have taken one each
        for job in missing[self._unknown_pops[name] :]:
            self._found("lost", f"{name}: job {job} is neither queued nor taken")

    def _judge_stream(self, name: str, stream: Stream) -> None:
        entries = self._entries[name]
        times = Counter(operation for _, operation in stream.entries)
        for operation, outcome in entries.items():
            if outcome is Outcome.ACKNOWLEDGED and not times[operation]:
                self._found("lost", f"{name}: entry of {operation}")
        for operation, count in times.items():
            if entries.get(operation, Outcome.REFUSED) is Outcome.REFUSED:
                self._found("phantom", f"{name}: entry of {operation} was never written")
            elif count > 1:
                self._found("doubled", f"{name}: entry of {operation} {count} times", count - 1)
        self._judge_group(name, stream)

    def _judge_group(self, name: str, stream: Stream) -> None:
        delivered = Counter(self._delivered[name])
        for entry, count in delivered.items():
            if count > 1:
                self._found("doubled", f"{name}: {entry} delivered {count} times", count - 1)
        done = self._done[name]
        for entry in stream.pending & done:
            self._found("lost", f"{name}: {entry} is pending, although it was acknowledged")
        for entry in delivered.keys() - done - self._maybe_done[name] - stream.pending:
            self._found("lost", f"{name}: {entry} was delivered and is not pending")
        if self._unknown_deliveries[name]:
            return
        last = _entry_order(stream.last_delivered)
        for entry, _ in stream.entries:
            if (_entry_order(entry) <= last) != (entry in delivered):
                self._found("lost", f"{name}: the group's position {stream.last_delivered} is"
                            f" wrong for {entry}")  # fmt: skip


def _fits(actual: _Possible, wanted: _Possible) -> bool:
    if actual is None or wanted is None:
        return actual is wanted
    return actual[0] == wanted[0] and wanted[1] in (None, actual[1])


def _entry_order(entry: str) -> tuple[int, int]:
    milliseconds, _, number = entry.partition("-")
    return int(milliseconds), int(number or 0)


def _check_elsewhere(
    organization: str,
    cell: str,
    postgres: psycopg.Connection[tuple[Any, ...]],
    client: redis.Redis,
    findings: Findings,
) -> None:
    """A cell without authority holds nothing, unless its gates keep everybody out."""
    row_gate, key_gate = gate_states(postgres, client, organization)
    rows, keys = count_rows(postgres, organization), count_keys(client, organization)
    if rows and row_gate not in _HELD_BACK:
        findings.add(
            "left_behind",
            f"organization {organization}: {rows} rows in {cell}, whose gate is {row_gate}",
            rows,
        )
    if keys and not any(f'"{state}"' in (key_gate or "") for state in _HELD_BACK):
        findings.add(
            "left_behind",
            f"organization {organization}: {keys} keys in {cell}, whose gate is {key_gate}",
            keys,
        )


def _keys_of(place: Place) -> redis.Redis:
    return redis.Redis.from_url(place.redis, decode_responses=True, socket_timeout=60)


def _verdict(ledger: Ledger, findings: Findings, seconds: float) -> Checked:
    writes = [one for one in ledger.operations if not one.is_read]
    outcomes = Counter(one.outcome for one in writes)
    refusals = Counter(
        f"{one.kind}: {one.reason}"[:120] for one in writes if one.outcome is Outcome.REFUSED
    )
    return Checked(
        acknowledged=outcomes[Outcome.ACKNOWLEDGED],
        refused=outcomes[Outcome.REFUSED],
        unknown=outcomes[Outcome.UNKNOWN],
        reads=len(ledger.operations) - len(writes),
        refusals=dict(refusals.most_common(10)),
        examples=tuple(findings.examples),
        seconds=seconds,
        **findings.counts,
    )
