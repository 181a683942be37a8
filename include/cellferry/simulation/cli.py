"""`cellferry simulate`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cellferry.errors import InvalidInput


@click.command(short_help="Say how long cohorts would take; touch nothing.")
@click.argument("file", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--together", is_flag=True, help="All cohorts in one; else each by itself.")
@click.option("--cohort", "only", multiple=True, metavar="NAME", help="Only this; may be repeated.")
@click.option(
    "--machines", "on", multiple=True, metavar="NAME", help="Only these; may be repeated."
)
@click.option(
    "--benchmarks",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("docs/benchmarks"),
    show_default=True,
    help="Folder of the figures that `make bench` measured.",
)
@click.option("--seed", type=int, help="Of the sizes that are drawn; else the file's.")
@click.option(
    "--write",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write cohorts here, to change; simulate nothing.",
)
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
def simulate(
    file: Path | None,
    together: bool,
    only: tuple[str, ...],
    on: tuple[str, ...],
    benchmarks: Path,
    seed: int | None,
    write: Path | None,
    as_json: bool,
) -> None:
    """Say how long cohorts of organizations would take, and what would hold them up.

    FILE names cohorts, cells and machines; without it, those that come with it. Nothing is
    touched: no cell, no topology, no Airflow. The same input gives the same answer.
    """
    from cellferry.simulation import cohorts, rates, report, simulator

    if write is not None:
        _write(write, cohorts.example())
        return
    scenario = cohorts.load(file).narrowed(only, on, seed)
    known = rates.measured(benchmarks).over(rates.defaults())
    used = scenario.rates_over(rates.refined(known, benchmarks))
    found = simulator.forecast(scenario, used, together=together)
    if as_json:
        answer = {"forecasts": [one.as_dict() for one in found], "rates": dict(used.origins)}
        click.echo(json.dumps(answer))
    else:
        report.render(scenario, found, used)


def _write(path: Path, text: str) -> None:
    if path.exists():
        raise InvalidInput(f"{path} is there already", hint="name a file that is not there yet")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidInput(
            f"cannot write {path}: {error.strerror}", hint="name a folder that you may write to"
        ) from error
    click.echo(f"written: {path}")
