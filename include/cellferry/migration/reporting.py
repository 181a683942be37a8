"""Plans and states as people read them in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cellferry.migration.plan import Plan
from cellferry.migration.status import Status
from cellferry.model import Migration, State
from cellferry.readable import size
from cellferry.topology import Halt, HaltScope
from cellferry.topology.pace import PaceRow
from cellferry.topology.progress import ProgressRow


def render_plan(report: Plan, console: Console | None = None) -> None:
    """Print what would move, the estimates and the blockers."""
    out = console or Console(highlight=False)
    out.print(
        f"[bold]{report.organization.slug}[/] (id {report.organization.id}): "
        f"{report.source} → {report.destination}"
    )
    table = Table("store", "part", "placement")
    table.add_column("count", justify="right")
    table.add_column("size", justify="right")
    for kind, found in report.inventories.items():
        for part in found.parts:
            if part.count:
                table.add_row(kind, part.name, part.placement, f"{part.count:,}", size(part.bytes))
        table.add_row(
            kind, "[bold]all[/]", "", f"[bold]{found.count:,} {found.unit}[/]", size(found.bytes)
        )
    out.print(table)
    out.print(f"strategy: {report.strategy} ({report.strategy_reason})")
    copy_s = f"{report.copy_s:,.0f}" if report.copy_s >= 1 else "under 1"
    out.print(
        f"estimates: copy {copy_s} s, write pause {report.pause_s * 1000:,.0f} ms ({report.basis})"
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
    out = console or Console(highlight=False)
    out.print(
        f"[bold]{found.organization.slug}[/] (id {found.organization.id}) lives in "
        f"[bold]{found.route.cell}[/] since epoch {found.route.epoch}"
    )
    migration = found.migration
    if migration is not None:
        out.print(
            f"migration {migration.id}: {migration.source} → {migration.destination}, "
            f"[bold]{migration.state}[/] (attempt {migration.attempt}, {migration.strategy})"
        )
        if migration.cohort:
            out.print(f"cohort: {escape(migration.cohort)}")
        if migration.paused:
            out.print(f"[yellow]paused[/]{escape(why_paused(migration))}")
        for halt in found.halts:
            out.print(f"[red]halted[/]: {escape(describe_halt(halt))}")
        if migration.last_error:
            out.print(f"[red]last error[/]: {escape(migration.last_error)}")
        if migration.ttl_until and migration.state in (State.SOAKING, State.RETAINED):
            out.print(f"clean-up not before {migration.ttl_until:%Y-%m-%d %H:%M:%S} UTC")
    out.print(f"next: {found.next}")
    if found.progress:
        out.print(_progress_table(found.progress))
    for pace in found.paces:
        out.print(escape(describe_pace(pace)))
    held: dict[str, list[str]] = {}
    for one in found.resources:
        held.setdefault(f"{one.cell}/{one.store}", []).append(f"{one.kind} {one.name}")
    for place, things in sorted(held.items()):
        out.print(f"holds in {place}: {escape(', '.join(things))}")


def _progress_table(progress: Sequence[ProgressRow]) -> Table:
    table = Table("store", "phase")
    for name in ("done", "rate", "time left"):
        table.add_column(name, justify="right")
    for row in progress:
        unfinished = row.total is not None and row.done < row.total
        has_rate = row.rate_per_s and row.unit != "s" and row.phase != "pace"
        table.add_row(
            "" if row.store == row.phase else row.store,
            row.phase,
            f"{row.done:,}{f' of {row.total:,}' if unfinished else ''} {row.unit}",
            f"{row.rate_per_s:,.0f}/s" if has_rate else "",
            f"{row.eta_s:,.0f} s" if row.eta_s else "",
        )
    return table


def render_migrations(
    migrations: Sequence[Migration],
    console: Console | None = None,
    *,
    halts: Sequence[Halt] = (),
) -> None:
    """Print one line for each migration, and what holds it up."""
    out = console or Console(highlight=False)
    if not migrations:
        out.print("no organization is being moved, and no old copy is kept")
        return
    table = Table(
        "organization", "migration", "from → to", "state", "clean-up from (UTC)", "trouble"
    )
    for one in migrations:
        troubles = (
            f"paused{why_paused(one)}" if one.paused else None,
            *(describe_halt(halt) for halt in halts if _stops(halt, one)),
            one.last_error,
        )
        table.add_row(
            one.organization.slug,
            str(one.id),
            f"{one.source} → {one.destination}",
            str(one.state),
            f"{one.ttl_until:%Y-%m-%d %H:%M:%S}" if one.ttl_until else "",
            escape("; ".join(trouble for trouble in troubles if trouble)),
        )
    out.print(table)


def render_halts(halts: Sequence[Halt], console: Console | None = None) -> None:
    """Print what is halted, by whom, since when and why."""
    out = console or Console(highlight=False)
    if not halts:
        out.print("nothing is halted")
        return
    table = Table("halted", "by", "since (UTC)", "why")
    for one in halts:
        what = one.organization or one.name
        scope = "organization" if one.scope is HaltScope.MIGRATION else one.scope.value
        table.add_row(f"{scope} {what}", one.by or "", _moment(one.at), escape(one.reason))
    out.print(table)
    out.print("to clear one: cellferry clear-halt SCOPE NAME --reason …")


def describe_halt(halt: Halt) -> str:
    """Return a halt with who, when and why, on one line."""
    since = f", {_moment(halt.at)} UTC" if halt.at else ""
    return f"{halt.what} by {halt.by or 'somebody'}{since}: {halt.reason}"


def describe_pace(pace: PaceRow) -> str:
    """Return how fast a mover may work at one cell, and what its probes saw, on one line."""
    parts = [f"{pace.step} at {pace.cell}/{pace.store}: {pace.share:.0%} of full speed"]
    if pace.p95_s is not None:
        aim = "" if pace.target_s is None else f" (target {pace.target_s * 1000:.1f} ms)"
        parts.append(f"p95 {pace.p95_s * 1000:.1f} ms{aim}")
    if pace.lag_s is not None:
        parts.append(f"standby {pace.lag_s:.1f} s behind")
    if pace.log_bytes_s is not None:
        parts.append(f"{size(int(pace.log_bytes_s))}/s of log")
    if pace.active is not None:
        parts.append(f"{pace.active} sessions at work")
    if pace.note:
        parts.append(f"last: {pace.note}")
    return ", ".join(parts)


def why_paused(migration: Migration) -> str:
    """Return who paused a migration, when and why, to stand behind the word."""
    return (
        (f" by {migration.paused_by}" if migration.paused_by else "")
        + (f", {_moment(migration.paused_at)} UTC" if migration.paused_at else "")
        + (f": {migration.paused_reason}" if migration.paused_reason else "")
    )


def _stops(halt: Halt, migration: Migration) -> bool:
    return (
        halt.name
        in {
            HaltScope.MIGRATION: (str(migration.id),),
            HaltScope.COHORT: (migration.cohort,),
            HaltScope.CELL: (migration.source, migration.destination),
        }[halt.scope]
    )


def _moment(at: datetime | None) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}" if at else ""
