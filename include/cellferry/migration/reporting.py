"""Plans and states as people read them in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cellferry.migration.plan import Plan
from cellferry.migration.status import Status


def size(count: int) -> str:
    """Return a number of bytes in the unit a person would choose."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"


def render_plan(report: Plan, console: Console | None = None) -> None:
    """Print what would move, the estimates and the blockers."""
    out = console or Console()
    out.print(
        f"[bold]{report.organization.slug}[/] (id {report.organization.id}): "
        f"{report.source} → {report.destination}"
    )
    table = Table("store", "part", "placement", "count", "size")
    for kind, found in report.inventories.items():
        for part in found.parts:
            if part.count:
                table.add_row(kind, part.name, part.placement, f"{part.count:,}", size(part.bytes))
        table.add_row(
            kind, "[bold]all[/]", "", f"[bold]{found.count:,} {found.unit}[/]", size(found.bytes)
        )
    out.print(table)
    out.print(f"strategy: {report.strategy} ({report.strategy_reason})")
    out.print(
        f"estimates: copy {report.copy_s:,.0f} s, write pause {report.pause_s * 1000:,.0f} ms "
        f"({report.basis})"
    )
    for blocker in report.blockers:
        color = "red" if blocker.fatal else "yellow"
        word = "blocks" if blocker.fatal else "note"
        out.print(
            f"[{color}]{word}[/] " + escape(f"{blocker.code}: {blocker.where}: {blocker.reason}")
        )
        out.print(f"       remedy: {escape(blocker.remedy)}")
    if report.migration is not None:
        out.print(f"recorded as migration {report.migration}")
    elif report.fatal:
        out.print("[red]cannot move yet[/]")
    else:
        out.print("[green]nothing blocks it[/]; nothing was changed")


def render_status(found: Status, console: Console | None = None) -> None:
    """Print where an organization is and what comes next."""
    out = console or Console()
    out.print(f"lives in [bold]{found.route.cell}[/] at epoch {found.route.epoch}")
    migration = found.migration
    if migration is not None:
        out.print(
            f"migration {migration.id}: {migration.source} → {migration.destination}, "
            f"[bold]{migration.state}[/] (attempt {migration.attempt}, {migration.strategy})"
        )
        if migration.paused:
            out.print("[yellow]paused[/]")
        if migration.halted:
            out.print(f"[red]halted[/]: {escape(migration.halted)}")
        if migration.last_error:
            out.print(f"[red]last error[/]: {escape(migration.last_error)}")
        if migration.ttl_until:
            out.print(f"clean-up not before {migration.ttl_until:%Y-%m-%d %H:%M:%S} UTC")
    out.print(f"next: {found.next}")
    if found.progress:
        table = Table("store", "phase", "done", "of", "unit", "rate/s", "time left")
        for row in found.progress:
            table.add_row(
                row.store,
                row.phase,
                f"{row.done:,}",
                f"{row.total:,}" if row.total is not None else "",
                row.unit,
                f"{row.rate_per_s:,.0f}" if row.rate_per_s is not None else "",
                f"{row.eta_s:,.0f} s" if row.eta_s is not None else "",
            )
        out.print(table)
    for one in found.resources:
        out.print(f"holds {one.kind} {one.name} in {one.cell}/{one.store}")
