"""How long writers wait at a cutover, against the size of the organization that moves."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from tests.bench.harness import POSTGRES, Bench, Section, Table, Target
from tests.bench.pause import BEFORE_S, WRITES_PER_S, Passed, alternate, check, in_ms
from tests.fault import alternations

SIZES: Mapping[int, int] = {10_000: 6, 100_000: 5, 1_000_000: 3, 5_000_000: 2}
"""How often an organization of so many rows moves there and back."""

_METHOD = """
Organizations of the sample application, of several sizes and together in one cell, beside four
small ones. Each moves to the other cell and back, one after the other, under the same writers as in
the section before, 85% of whose writes go to the one that moves. The largest moves there and back
only twice, for that takes minutes: its figures are those of four cutovers. The last column is the
longest wait of any write in as long a time, from the seconds before each flip, with the gate open
and whatever the move does then: what the writers of an organization of that size wait for anyway.
"""


def _why(
    found: Mapping[int, Passed],
    seen: Mapping[int, float],
    closed: Mapping[int, float],
    before: Mapping[int, float | None],
) -> str:
    keys = [statistics.median(one.keys) for one in found.values()]
    waits = [wait for wait in before.values() if wait is not None]
    largest = max(found)
    smaller = [wait for rows, wait in seen.items() if rows != largest]
    return (
        "medians of few cutovers, on cores that writers and servers share: without those of"
        f" {largest:,} rows, of which there are {len(found[largest].all)}, it is"
        f" {max(smaller) / min(smaller):.2f}. The gate is closed for"
        f" {min(closed.values()):.0f} to {max(closed.values()):.0f} ms, and the last delta has"
        f" {min(keys):.0f} to {max(keys):.0f} rows: what is written between the last round and the"
        " lock"
    ) + _anyway(waits)


def _anyway(waits: list[float]) -> str:
    if not waits:
        return ""
    return (
        f". In the {BEFORE_S:.0f} s before, with the gate open, the same writers wait"
        f" {min(waits):.0f} to {max(waits):.0f} ms"
    )


def run(bench: Bench) -> Section:
    """Measure the pause of each size."""
    found: dict[int, Passed] = {}
    sizes = {bench.size(rows, 300): bench.size(times, 1) for rows, times in SIZES.items()}
    with alternations.opened(POSTGRES, rows=bench.size(2_000, 500), sizes=list(sizes)) as fleet:
        bench.say("both cells are ready")
        by_slug = {one.slug: one for one in fleet.application.organizations()}
        for rows, times in sizes.items():
            found[rows] = alternate(bench, fleet, by_slug[f"sized-{rows}"], times, WRITES_PER_S)
        checked = check(fleet)
    seen = {rows: statistics.median(in_ms(one.all)) for rows, one in found.items()}
    closed = {rows: statistics.median(one.closed) for rows, one in found.items()}
    finish = {
        rows: statistics.median(in_ms([parts["finish"] for parts in one.parts]))
        for rows, one in found.items()
    }
    before = {
        rows: statistics.median(in_ms(one.before)) if one.before else None
        for rows, one in found.items()
    }
    return Section(
        "Write pause against size",
        _METHOD,
        [
            Table(
                ("rows", "cutovers", "p50 ms", "longest ms", "gate closed, p50 ms",
                 "of which finish, p50 ms", "rows in the last delta, p50",
                 "shortly before, p50 ms"),
                [
                    (rows, len(one.all), seen[rows], max(in_ms(one.all)), closed[rows],
                     finish[rows], statistics.median(one.keys), before[rows])
                    for rows, one in found.items()
                ],
                "as writers and controller saw it",
            ),
        ],
        [
            Target(
                "write pause of the slowest size against the fastest",
                1.5,
                max(seen.values()) / min(seen.values()),
                why=_why(found, seen, closed, before),
            ),
        ],
        [
            (
                f"{checked.acknowledged:,} acknowledged writes: {checked.lost} lost,"
                f" {checked.doubled} doubled."
            ),
        ],
    )  # fmt: skip
