"""`make demo`: from nothing to a report, as a client of everything would do it.

Starts the fleet, prepares the cells, seeds organizations, lets writers loose on all of them,
triggers `migrate_organizations` through Airflow's API, watches, waits through TTL and clean-up,
and lets the checker, which shares no code with the mover, decide. Exit status 0 only when every
number is as it should be.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from cellferry import settings
from cellferry.errors import CellferryError
from cellferry.local.airflow_api import ENDED, AirflowApi
from cellferry.local.application import Application, Checked, Traffic
from cellferry.local.fleet import Fleet
from cellferry.local.processors import withheld_share
from cellferry.local.wishes import is_set, whole_number
from cellferry.migration import Context, steps
from cellferry.model import Actor, Migration, State
from cellferry.readable import size
from cellferry.topology import ProgressRow

DAG = "migrate_organizations"
SOURCE, DESTINATION = "cell-1", "cell-2"
MOVED = 6
TTL_S = 10
RUN_WITHIN_S = 900
LARGE_ROWS = 300_000
PAUSE_P50_S = 0.1
PAUSE_MAX_S = 1.0
#: A host that withholds more than this share of the processors makes pauses longer: worth a word.
WITHHELD_WORTH_SAYING = 0.05
#: Into a pipe, work that goes on in the same state is said again after so many seconds.
REPEAT_AFTER_S = 30.0
#: States in which nobody works on a migration: its last progress is no news.
AT_REST = frozenset({State.PLANNED, State.READY, State.RETAINED, State.COMPLETED, State.ABORTED})


@dataclass(frozen=True)
class Wishes:
    """What the person asked for on the command line of make."""

    organizations: int = 12
    rows: int = LARGE_ROWS
    writes_per_s: int = 370
    keep: bool = False

    @classmethod
    def from_environment(cls) -> Wishes:
        """Read `ORGS`, `ROWS`, `WRITES_PER_S` and `KEEP`.

        Raises:
            InvalidInput: a value is no number or out of bounds.
        """
        return cls(
            organizations=whole_number("ORGS", cls.organizations, MOVED + 2, 200),
            rows=whole_number("ROWS", cls.rows, 1_000, 50_000_000),
            writes_per_s=whole_number("WRITES_PER_S", cls.writes_per_s, 10, 20_000),
            keep=is_set("KEEP"),
        )


@dataclass
class Outcome:
    """Everything the last line and the JSON say."""

    organizations: list[dict[str, Any]] = field(default_factory=list)
    requested: int = MOVED
    moved: int = 0
    acknowledged: int = 0
    lost: int = 0
    pause_p50_s: float = 0.0
    pause_max_s: float = 0.0
    faults: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """The last line of the demo."""
        return (
            f"moved {self.moved} of {self.requested} organizations; lost {self.lost} of "
            f"{self.acknowledged} acknowledged writes; write pause p50 "
            f"{_ms(self.pause_p50_s)}, max {_ms(self.pause_max_s)}"
        )


def main() -> int:
    """Run the demo; return the exit status."""
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    root = Path.cwd()
    fleet = Fleet(root)
    try:
        wishes = Wishes.from_environment()
        outcome = _run(console, fleet, wishes, root)
    except CellferryError as error:
        console.print(f"[red]the demo failed:[/] {escape(str(error))}")
        fleet.down()
        return error.exit_code
    except BaseException:
        fleet.down()
        raise
    if wishes.keep:
        user, password = fleet.airflow_credentials
        console.print(f"Airflow: {fleet.airflow_url}  user {user}  password {password}")
        console.print("everything is left running; `make fleet-down` stops it")
    else:
        fleet.down()
    for fault in outcome.faults:
        console.print(f"[red]not as it should be:[/] {escape(fault)}")
    sys.stdout.flush()
    print(outcome.line)  # noqa: T201 - the line that scripts read
    return 1 if outcome.faults else 0


def _run(console: Console, fleet: Fleet, wishes: Wishes, root: Path) -> Outcome:
    started = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - started:6.1f} s[/]  {text}", soft_wrap=True)

    fleet.down()
    fleet.wipe()
    with ThreadPoolExecutor(1) as pool:
        say("starting three cells, the topology and Airflow")
        fleet.up(airflow=False)
        airflow = pool.submit(fleet.up, airflow=True)  # it takes longest: seed meanwhile
        os.environ.update(fleet.environment())
        loaded = settings.load(settings.default_path())
        connections = settings.from_environment()
        actor = Actor("demo", role="operator")
        with Context.from_settings(loaded, connections, actor=actor) as context:
            context.topology.install()
            application = Application(connections, context.topology)
            application.provision()
            say(f"seeding {wishes.organizations} organizations, the largest {wishes.rows:,} rows")
            application.seed(organizations=wishes.organizations, rows=wishes.rows)
            for cell in loaded.cells:
                steps.prepare_cell(context, cell)
            say("cells prepared: gates, key logs, roles")
            airflow.result()
            say(f"Airflow is up at {fleet.airflow_url}")
            return _move(console, say, fleet, context, application, wishes, root)


def _move(
    console: Console,
    say: Any,
    fleet: Fleet,
    context: Context,
    application: Application,
    wishes: Wishes,
    root: Path,
) -> Outcome:
    movers = application.organizations_to_move(MOVED)
    before = psutil.cpu_times()
    say(f"writers start on all organizations, {wishes.writes_per_s} writes/s")
    traffic = application.start_traffic(writes_per_s=wishes.writes_per_s, focus=movers)
    try:
        with AirflowApi(fleet.airflow_url, *fleet.airflow_credentials) as api:
            api.wait_for_dag(DAG)
            conf = {
                "organizations": [one.slug for one in movers],
                "destination": DESTINATION,
                "dry_run": False,
                "ttl_s": TTL_S,
                "soak_s": 2,
            }
            run = api.trigger(DAG, conf, note="make demo")
            say(f"triggered {DAG} for {', '.join(one.slug for one in movers)}: {run}")
            state = _watch(console, say, context, api, run, traffic)
            say(f"the run ended: {state}")
            report_log = api.log(DAG, run, "report") if state != "success" else ""
    finally:
        traffic.stop()
    say("writers stopped; the checker compares every acknowledged write with the cells")
    checked = application.check()
    outcome = _judge(context, application, checked, state, report_log)
    withheld = withheld_share(before, psutil.cpu_times())
    outcome.details["processors_withheld"] = round(withheld, 3)
    _print_table(console, outcome)
    if withheld > WITHHELD_WORTH_SAYING:
        console.print(
            f"the host of this machine withheld {withheld:.0%} of the processors' time meanwhile; "
            "every figure suffers from that"
        )
    report = root / ".local" / "demo-report.json"
    report.write_text(json.dumps(_report(outcome), indent=2), encoding="utf-8")
    return outcome


def _watch(
    console: Console, say: Any, context: Context, api: AirflowApi, run: str, traffic: Traffic
) -> str:
    """Show where each organization is until the run has ended.

    A terminal shows a table that changes; a pipe gets a line for each change of state, and now and
    then one for what takes long.
    """
    deadline = time.monotonic() + RUN_WITHIN_S
    said: dict[str, tuple[State, float]] = {}
    with Live(console=console, refresh_per_second=2, transient=True) as live:
        while True:
            state = api.run_state(DAG, run)
            if console.is_terminal:
                live.update(_progress_table(context, traffic))
            else:
                _say_changes(say, context, said)
            if state in ENDED:
                return state
            if time.monotonic() > deadline:
                raise CellferryError(f"the run is {state} after {RUN_WITHIN_S} s")
            time.sleep(1)


def _say_changes(say: Any, context: Context, said: dict[str, tuple[State, float]]) -> None:
    """Say a line for each organization whose state has changed, or whose work takes long."""
    now = time.monotonic()
    for migration in _by_name(context):
        slug = migration.organization.slug
        before, at = said.get(slug, (None, 0.0))
        latest = _latest(context, migration)
        if migration.state is before and (latest is None or now - at < REPEAT_AFTER_S):
            continue
        said[slug] = (migration.state, now)
        # just after a change the latest progress is still that of the step before
        work = _work(latest) if migration.state is before else ()
        doing = "  ".join(part for part in work[:-1] if part)
        if work and work[-1]:
            doing += f"  {work[-1]} left"
        say(f"{slug:<12}  {migration.state:<12}  {doing}".rstrip())


def _by_name(context: Context) -> list[Migration]:
    return sorted(context.topology.migrations(), key=lambda one: one.organization.slug)


def _latest(context: Context, migration: Migration) -> ProgressRow | None:
    """What is being done now, None when nothing is."""
    if migration.state in AT_REST:
        return None
    rows = context.topology.progress(migration.id)
    return max(rows, key=lambda row: row.updated_at, default=None)


def _work(latest: ProgressRow | None) -> tuple[str, str, str, str, str]:
    """Return phase, amount, rate, lag and time left in words; each empty when there is none."""
    if latest is None:
        return ("", "", "", "", "")
    phase = latest.phase if latest.phase == latest.store else f"{latest.store} {latest.phase}"
    is_part = latest.total is not None and latest.done <= latest.total
    of = f" of {latest.total:,}" if is_part else ""
    busy = latest.rate_per_s is not None and latest.rate_per_s >= 1 and latest.unit != "s"
    return (
        phase,
        f"{latest.done:,}{of} {latest.unit}",
        f"{latest.rate_per_s:,.0f}/s" if busy else "",
        latest.note,
        f"{latest.eta_s:,.0f} s" if latest.eta_s else "",
    )


def _progress_table(context: Context, traffic: Traffic) -> Table:
    # one line for each organization, also where the terminal is narrow
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True)
    table.add_column("organization", no_wrap=True, min_width=12)
    table.add_column("state", no_wrap=True, min_width=12)
    table.add_column("phase", no_wrap=True, min_width=13)
    table.add_column("done", justify="right", no_wrap=True, min_width=23)
    table.add_column("rate", justify="right", no_wrap=True, min_width=8)
    table.add_column("lag", no_wrap=True, ratio=1)
    table.add_column("left", justify="right", no_wrap=True, min_width=6)
    table.add_column("writes/s", justify="right", no_wrap=True, min_width=8)
    rates: Mapping[str, float] = traffic.rates()
    for migration in _by_name(context):
        table.add_row(
            migration.organization.slug,
            str(migration.state),
            *_work(_latest(context, migration)),
            f"{rates.get(migration.organization.id, 0):,.0f}",
        )
    return table


def _judge(
    context: Context, application: Application, checked: Checked, state: str, report_log: str
) -> Outcome:
    outcome = Outcome()
    pauses: list[float] = []
    for migration in _by_name(context):
        pause = application.write_pause(migration.organization.id)
        outcome.organizations.append(_row(migration, pause))
        if migration.state is State.COMPLETED:
            outcome.moved += 1
        if pause is not None:
            pauses.append(pause)
    outcome.acknowledged = checked.acknowledged
    outcome.lost = checked.lost
    outcome.pause_p50_s = statistics.median(pauses) if pauses else 0.0
    outcome.pause_max_s = max(pauses, default=0.0)
    outcome.details = {
        "checker": checked.as_dict(),
        "writes_per_s_during_cutovers": dict(application.cutover_rates()),
        "run_state": state,
    }
    bounds = (
        (state != "success", f"the run is {state}: {report_log[-2000:]}"),
        (
            outcome.moved != outcome.requested,
            f"moved {outcome.moved} of {outcome.requested} organizations",
        ),
        (
            len(pauses) != outcome.requested,
            f"the write pause is known of {len(pauses)} of {outcome.requested} organizations",
        ),
        (
            outcome.pause_p50_s > PAUSE_P50_S,
            f"write pause p50 {_ms(outcome.pause_p50_s)}, over {_ms(PAUSE_P50_S)}",
        ),
        (
            outcome.pause_max_s > PAUSE_MAX_S,
            f"write pause max {_ms(outcome.pause_max_s)}, over {_ms(PAUSE_MAX_S)}",
        ),
    )
    outcome.faults = [text for wrong, text in bounds if wrong]
    outcome.faults.extend(checked.faults)
    return outcome


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def _row(migration: Migration, pause: float | None) -> dict[str, Any]:
    facts = migration.facts
    copied = facts.get("copied", {})
    verified = facts.get("verified", {})
    postgres, redis = copied.get("postgres", {}), copied.get("redis", {})
    return {
        "organization": migration.organization.slug,
        "id": migration.organization.id,
        "migration": migration.id,
        "state": str(migration.state),
        "strategy": str(migration.strategy),
        "rows": postgres.get("count", 0),
        "keys": redis.get("count", 0),
        "bytes": postgres.get("bytes", 0) + redis.get("bytes", 0),
        "copy_rows_per_s": postgres["count"] / postgres["seconds"]
        if postgres.get("seconds")
        else None,
        "rounds": sum(len(one) for one in facts.get("rounds", {}).values()),
        "pause_s": pause,
        "gate_closed_s": facts.get("pause", {}).get("seconds"),
        "gate_parts_s": facts.get("pause", {}).get("parts"),
        "compared": sum(one.get("compared", 0) for one in verified.values()),
        "mismatches": sum(one.get("mismatch_count", 0) for one in verified.values()),
        "last_error": migration.last_error,
    }


def _print_table(console: Console, outcome: Outcome) -> None:
    table = Table("organization")
    for name in ("rows", "keys", "size", "copy rows/s", "rounds", "write pause", "verification"):
        table.add_column(name, justify="right")
    for one in outcome.organizations:
        table.add_row(
            one["organization"],
            f"{one['rows']:,}",
            f"{one['keys']:,}",
            size(one["bytes"]),
            f"{one['copy_rows_per_s']:,.0f}" if one["copy_rows_per_s"] else "under the gate",
            str(one["rounds"]),
            _ms(one["pause_s"]) if one["pause_s"] is not None else "?",
            f"{one['compared']:,} equal"
            if not one["mismatches"]
            else f"{one['mismatches']} differ",
        )
    console.print(table)


def _report(outcome: Outcome) -> dict[str, Any]:
    return {
        "line": outcome.line,
        "ok": not outcome.faults,
        "requested": outcome.requested,
        "moved": outcome.moved,
        "acknowledged": outcome.acknowledged,
        "lost": outcome.lost,
        "pause_p50_ms": round(outcome.pause_p50_s * 1000, 1),
        "pause_max_ms": round(outcome.pause_max_s * 1000, 1),
        "organizations": outcome.organizations,
        "faults": outcome.faults,
        **outcome.details,
    }


if __name__ == "__main__":
    sys.exit(main())
