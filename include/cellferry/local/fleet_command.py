"""`python -m cellferry.local.fleet_command up|down|status|wipe`: what the Makefile calls."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from cellferry.errors import CellferryError
from cellferry.local.fleet import ComponentStatus, Fleet, Health
from cellferry.local.supervisor import Event

_COLORS = {Health.HEALTHY: "green", Health.UNHEALTHY: "yellow", Health.STOPPED: "red"}


@click.group()
@click.option(
    "--root",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=".",
    envvar="CELLFERRY_ROOT",
    help="The project's folder.",
)
@click.pass_context
def fleet(context: click.Context, root: Path) -> None:
    """Three cells, a topology and an Airflow on this machine."""
    context.obj = Fleet(root)


@fleet.command()
@click.option("--airflow/--no-airflow", default=True, help="Start Airflow too.")
@click.pass_obj
def up(found: Fleet, airflow: bool) -> None:
    """Start everything in the background; returns when all of it is healthy."""
    console = Console()

    def show(event: Event) -> None:
        if event.kind != "starting":
            console.print(f"  {event}", highlight=False, markup=False)

    found.up(airflow=airflow, on_event=show)
    if airflow:
        user, password = found.airflow_credentials
        console.print(f"Airflow: {found.airflow_url}  user {user}, password {password}")
    for name, value in found.environment().items():
        console.print(f"export {name}={value}", soft_wrap=True, highlight=False)


@fleet.command()
@click.pass_obj
def down(found: Fleet) -> None:
    """Stop everything; the data stay."""
    found.down(on_event=lambda event: click.echo(f"  {event}"))


@fleet.command()
@click.pass_obj
def wipe(found: Fleet) -> None:
    """Stop everything and delete the data."""
    found.wipe()


@fleet.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def status(found: Fleet, as_json: bool) -> None:
    """Show every component; exit status 1 unless all are healthy."""
    rows = found.status()
    if as_json:
        click.echo(json.dumps([asdict(row) | {"log": str(row.log)} for row in rows], indent=1))
    elif rows:
        Console(width=None if sys.stdout.isatty() else 140).print(table(rows))
    else:
        click.echo("The fleet does not run.")
    if not rows or any(row.health is not Health.HEALTHY for row in rows):
        sys.exit(1)


def table(rows: list[ComponentStatus]) -> Table:
    """The status table."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("component", no_wrap=True)
    shown.add_column("pid", justify="right")
    shown.add_column("port", justify="right")
    shown.add_column("health")
    shown.add_column("uptime", justify="right")
    shown.add_column("log", overflow="fold")
    here = Path.cwd()
    for row in rows:
        color = _COLORS[row.health]
        up_for = (
            str(timedelta(seconds=round(row.uptime_seconds)))
            if row.uptime_seconds is not None
            else ""
        )
        log = row.log.relative_to(here) if row.log.is_relative_to(here) else row.log
        said = f"{row.health.value}: {row.detail}" if row.detail else row.health.value
        shown.add_row(
            row.name,
            str(row.pid or ""),
            str(row.port or ""),
            f"[{color}]{said}[/]",
            up_for,
            str(log),
        )
    return shown


def main() -> None:
    """Run a command; an error is one line with its remedy."""
    try:
        fleet.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except CellferryError as error:
        click.echo(f"cellferry: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
