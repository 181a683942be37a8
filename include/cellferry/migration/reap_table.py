"""What a run of the reaper says to people: on a terminal, in a log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cellferry.migration.reap import Deed, Reaped


def summary(reaped: Reaped) -> str:
    """Return a run on one line."""
    if reaped.busy:
        return "another reaper is at work; nothing was done"
    counts: dict[str, int] = {}
    for deed in reaped.deeds:
        counts[deed.verb] = counts.get(deed.verb, 0) + 1
    parts = [f"{count} {verb}" for verb, count in counts.items()]
    if reaped.attention:
        parts.append(f"{len(reaped.attention)} for a person to look at")
    if reaped.failed:
        parts.append(f"{len(reaped.failed)} failed")
    text = ", ".join(parts) or "nothing to do"
    return f"dry run: {text}" if reaped.dry_run else text


def rows(reaped: Reaped) -> Iterator[Mapping[str, str]]:
    """Yield one row for each thing done, left to a person, or failed."""
    for deed in reaped.deeds:
        yield _row("would be " + deed.verb if reaped.dry_run else deed.verb, deed)
    for deed in reaped.attention:
        yield _row("TO BE LOOKED AT", deed)
    for deed in reaped.failed:
        yield _row(f"FAILED: {deed.verb}", deed)


def _row(outcome: str, deed: Deed) -> dict[str, str]:
    return {
        "outcome": outcome,
        "where": f"{deed.cell}/{deed.store}" if deed.store else deed.cell,
        "what": deed.what,
        "organization": deed.organization or "",
        "migration": "" if deed.migration is None else str(deed.migration),
        "why": deed.reason,
        "remedy": deed.remedy,
    }


def render(reaped: Reaped, console: Console | None = None) -> None:
    """Print a run as a table, and the remedies below it."""
    out = console or Console(highlight=False)
    found = list(rows(reaped))
    if found:
        table = Table(*(name for name in found[0] if name != "remedy"))
        for row in found:
            table.add_row(*(escape(text) for name, text in row.items() if name != "remedy"))
        out.print(table)
    out.print(summary(reaped))
    for remedy in dict.fromkeys(row["remedy"] for row in found if row["remedy"]):
        out.print(f"remedy: {escape(remedy)}")
