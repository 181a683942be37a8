"""Forecasts as people read them in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cellferry.simulation.cohorts import Machines, Scenario
from cellferry.simulation.rates import DEFAULT_ORIGIN, Rates
from cellferry.simulation.simulator import Forecast

_BARS = " ▁▂▃▄▅▆▇█"
#: What held everybody up for less than this share is not named.
_WORTH_NAMING = 0.05


def span(seconds: float) -> str:
    """Return a length of time as people say it: `40 s`, `12 min`, `3.4 h`, `18 d`."""
    for limit, unit, name in ((120, 1, "s"), (7_200, 60, "min"), (172_800, 3_600, "h")):
        if seconds < limit:
            return _short(seconds / unit, name)
    return _short(seconds / 86_400, "d")


def _short(value: float, unit: str) -> str:
    return f"{value:.0f} {unit}" if value >= 20 else f"{value:.1f} {unit}"


def held_up_by(shares: Mapping[str, float]) -> str:
    """Return what held everybody up, the longest first."""
    named = [f"{name} {share:.0%}" for name, share in shares.items() if share >= _WORTH_NAMING]
    return ", ".join(named[:3])


def sparkline(values: Sequence[float], most: float) -> str:
    """Return one character for each value; anything over nothing is visible."""
    if most <= 0:
        return " " * len(values)
    top = len(_BARS) - 1
    return "".join(_BARS[max(1, round(one / most * top)) if one > 0 else 0] for one in values)


def render(
    scenario: Scenario, found: Sequence[Forecast], rates: Rates, console: Console | None = None
) -> None:
    """Print a table for each kind of machines, when what happens, and what the rates rest on."""
    out = console or Console(highlight=False)
    for machines in scenario.machines:
        mine = [one for one in found if one.machines == machines.name]
        out.print(f"[bold]{escape(machines.name)}[/] {escape(describe(machines))}")
        out.print(_table(mine))
        for one in mine:
            _timeline(one, out)
    _origins(rates, out)


def describe(machines: Machines) -> str:
    """Return machines and limits in one line."""
    orchestrated = "Airflow" if machines.airflow else "the library alone"
    limits = ", ".join(
        f"{name} {count}"
        for name, count in machines.at_once.model_dump(by_alias=True).items()
        if count is not None
    )
    return (
        f"({orchestrated}: {machines.workers} x {machines.cores:g} cores, "
        f"{machines.workers * machines.slots} slots; {machines.runs_at_once} runs of "
        f"{machines.wave}; at once: {limits})"
    )


def _table(found: Sequence[Forecast]) -> Table:
    table = Table("cohort")
    for name in ("organizations", "moved in", "with clean-up", "an hour"):
        table.add_column(name, justify="right")
    table.add_column("held up by")
    for one in found:
        name = escape(one.cohort)
        if one.given_up:
            name += f" [red]({one.given_up:,} change too fast)[/]"
        table.add_row(
            name,
            f"{one.organizations:,}",
            span(one.moved_s),
            span(one.over_s),
            f"{one.per_hour:,.0f}" if one.per_hour >= 10 else f"{one.per_hour:.1f}",
            escape(held_up_by(one.held_up_by)),
        )
    return table


def _timeline(one: Forecast, out: Console) -> None:
    """Print how many organizations are in each step, from left to right in time."""
    out.print(
        f"{escape(one.cohort)}: {one.rows:,.0f} rows; half of the organizations take up to "
        f"{span(one.median_s)}, one {span(one.longest_s)};\n{one.at_once:,} at once at most; "
        f"{one.busy:.0%} of the cores; {span(one.moved_s)} from left to right:"
    )
    for stage, values in one.stages.items():
        most = max(values)
        out.print(f"  {stage:8}│{sparkline(values, most)}│ up to {most:,.1f}")


def _origins(rates: Rates, out: Console) -> None:
    by_origin: dict[str, list[str]] = {}
    for name, origin in rates.origins.items():
        by_origin.setdefault(origin, []).append(name)
    for origin, names in by_origin.items():
        colour = "yellow" if origin == DEFAULT_ORIGIN else "green"
        out.print(f"rates of {', '.join(names)}: [{colour}]{escape(origin)}[/]")
    if DEFAULT_ORIGIN in by_origin:
        out.print(
            "Defaults are cautious figures for one small machine.\n"
            "`make bench` measures yours; --benchmarks names the folder with its figures."
        )
