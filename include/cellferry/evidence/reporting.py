"""Checks of a pack as people read them in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cellferry.evidence.check import Check, Outcome

_COLOURS = {Outcome.SAME: "green", Outcome.DIFFERS: "bold red", Outcome.UNKNOWN: "yellow"}


def render_checks(checks: Sequence[Check], directory: Path, console: Console | None = None) -> None:
    """Print a line for each check, then what it comes to."""
    out = console or Console(highlight=False)
    table = Table("checked", "result", "detail")
    for one in checks:
        colour = _COLOURS[one.outcome]
        table.add_row(escape(one.what), f"[{colour}]{one.outcome.value}[/]", escape(one.detail))
    out.print(table)
    count = {outcome: sum(1 for one in checks if one.outcome is outcome) for outcome in Outcome}
    verdict = "does NOT hold" if count[Outcome.DIFFERS] else "holds"
    out.print(
        escape(f"{directory}: the pack {verdict}: {count[Outcome.SAME]} same, ")
        + escape(f"{count[Outcome.DIFFERS]} differ, {count[Outcome.UNKNOWN]} cannot be recomputed")
    )
