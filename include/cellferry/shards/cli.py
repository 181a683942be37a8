"""`cellferry reshard …`: the steps of a re-sharding, one command each.

Imported by the main command line: nothing heavy at module level.
"""

from __future__ import annotations

import getpass
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellferry.errors import InvalidInput

if TYPE_CHECKING:
    from rich.console import Console

    from cellferry.shards.context import Context, Progress, StepResult
    from cellferry.shards.record import Resharding

Command = Callable[..., Any]

_ORDER = (
    *("register", "plan", "begin", "copy", "dual-write", "catch-up", "verify", "cutover"),
    *("watch", "cleanup", "run", "roll-back", "abort", "status", "report"),
)
_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order in which one needs them."""
        return sorted(super().list_commands(ctx), key=_ORDER.index)


class _Duration(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """`90`, `30s`, `5m`, `36h`, `14d` → seconds."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, int | float):
            return float(value)
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", value.strip())
        unit = _UNITS.get(found.group(2) or "s") if found else None
        if found is None or unit is None:
            self.fail(f"{value!r} is no duration: write 90, 30s, 5m, 36h or 14d", param, ctx)
        return float(found.group(1)) * unit


DURATION = _Duration()


@click.group(cls=_Group, short_help="Re-shard a consistent-hash store: 3 → 4 shards, or back.")
@click.option(
    "--topology",
    metavar="NAME",
    help="Connection of the topology; default: that of cells.yaml, else cellferry-topology.",
)
@click.pass_context
def reshard(ctx: click.Context, topology: str | None) -> None:
    """Move keys between the shards of a dedup store while its clients work.

    The order is plan, begin, copy, dual-write, catch-up, verify, cutover, watch, cleanup; `run`
    does all of it but the last. Until the cutover `abort` gives it up, until clean-up `roll-back`
    brings everything back without loss. Each command may be repeated after a kill at any moment.
    """
    ctx.obj = _Site(ctx.obj if isinstance(ctx.obj, Path) else None, topology)


class _Site:
    """Where the topology is."""

    def __init__(self, config: Path | None, topology: str | None) -> None:
        self._config = config
        self._topology = topology

    @contextmanager
    def context(self, *, quiet: bool) -> Iterator[Context]:
        from cellferry import settings
        from cellferry.model import Actor
        from cellferry.shards.context import Context

        source = settings.from_environment()
        url = settings.resolve(self._connection(), source)
        listener = None if quiet or not sys.stderr.isatty() else _ProgressLine()
        with Context(
            url, source, Actor(getpass.getuser(), role="operator"), listener=listener
        ) as at:
            try:
                yield at
            finally:
                if listener is not None:
                    listener.clear()

    def _connection(self) -> str:
        from cellferry import settings

        if self._topology is not None:
            return self._topology
        path = self._config or settings.default_path()
        if self._config is None and not path.is_file():
            return settings.TopologySettings().connection
        return settings.load(path).topology.connection


class _ProgressLine:
    """One line on a terminal: how far all sources together are, with rate and time left."""

    EVERY_S = 0.2

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phase = ""
        self._latest: dict[str, Progress] = {}
        self._began = 0.0
        self._first = 0
        self._shown = 0.0

    def __call__(self, told: Progress) -> None:
        with self._lock:
            now = time.monotonic()
            phase = told.note if told.shard else told.step
            if phase != self._phase:
                self._phase, self._began, self._latest = phase, now, {}
            before = told.shard in self._latest
            self._latest[told.shard] = told
            if not before:  # what was done before we looked is no rate of ours
                self._first = sum(one.done for one in self._latest.values())
                self._began = now
            if now - self._shown >= self.EVERY_S:
                self._shown = now
                text = self._describe(told, now - self._began)
                click.echo(f"\r\x1b[2K{text}", nl=False, err=True)

    def _describe(self, told: Progress, seconds: float) -> str:
        if not told.shard:
            amount = f" {told.done:,}" if told.total or told.done else ""
            of = f" of {told.total:,}" if told.total else ""
            unit = f" {told.unit}" if amount else ""
            return f"{told.step}:{amount}{of}{unit} {told.note}".rstrip()
        done = sum(one.done for one in self._latest.values())
        totals = [one.total for one in self._latest.values()]
        phase = f" ({told.note})" if told.note != told.step else ""
        text = f"{told.step}{phase}: {done:,}"
        total = sum(one or 0 for one in totals) if None not in totals else 0
        if total > done:
            text += f" of {total:,}"
        text += f" {told.unit}"
        rate = (done - self._first) / seconds if seconds > 0.5 else 0.0
        if rate >= 1:
            text += f", {rate:,.0f}/s"
            if total > done:
                text += f", {(total - done) / rate:,.0f} s left"
        return text

    @staticmethod
    def clear() -> None:
        """Make room for what stays."""
        if sys.stderr.isatty():
            click.echo("\r\x1b[2K", nl=False, err=True)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def _json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")(command)


_set_argument = click.argument("set_name", metavar="SET")
_file_argument = click.argument("file", type=click.Path(path_type=Path))
_throttle_option = click.option(
    "--throttle",
    type=click.FloatRange(min=1),
    metavar="N",
    help="Moved keys a second, of all sources together; default: as fast as it goes.",
)
_reason_option = click.option("--reason", required=True, help="Why; for the audit.")
_hit_ratio_option = click.option(
    "--hit-ratio-drop",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="By how much fewer claims may be found taken after the cutover, of 1.",
)
_pause_option = click.option(
    "--pause-budget",
    type=DURATION,
    default=10.0,
    show_default="10s",
    help="How long the last changes may take while values wait; then it is given up.",
)


def _say(result: StepResult, as_json: bool) -> None:
    from cellferry.shards.report import NAMES

    if as_json:
        click.echo(json.dumps(result.as_dict()))
    else:
        _ProgressLine.clear()
        click.echo(f"{result.set_name}: {result.summary} ({NAMES[result.state]})")


@reshard.command(short_help="Record a set of shards as its clients have it now.")
@_file_argument
@_json_option
@click.pass_obj
def register(site: _Site, file: Path, as_json: bool) -> None:
    """Record the set that FILE describes, once, before its clients follow it."""
    from cellferry.shards import reshard as steps
    from cellferry.shards.settings import load

    shard_set = load(file)
    with site.context(quiet=True) as at:
        at.control.install()
        steps.register(at, shard_set)
    found = {"set": shard_set.name, "shards": list(shard_set.connections)}
    click.echo(
        json.dumps(found)
        if as_json
        else f"{shard_set.name}: registered with shards {', '.join(shard_set.connections)}"
    )


@reshard.command(short_help="What would move, how long it takes, what blocks it.")
@_file_argument
@_throttle_option
@click.option("--output", type=click.Path(path_type=Path), help="Write the plan here, for `begin`.")
@click.option("--sample", type=click.IntRange(min=1), help="Look at so many keys of each shard.")
@click.option(
    "--headroom",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Share of its memory that a shard must have free afterwards.",
)
@_json_option
@click.pass_obj
def plan(
    site: _Site,
    file: Path,
    throttle: float | None,
    output: Path | None,
    sample: int | None,
    headroom: float,
    as_json: bool,
) -> None:
    """Plan the way from the registered set to the one that FILE describes. Changes nothing."""
    from cellferry.shards import report
    from cellferry.shards import reshard as steps
    from cellferry.shards.settings import load

    target = load(file)
    with site.context(quiet=as_json) as at:
        planned = steps.plan(at, target, throttle_keys_s=throttle, sample=sample, headroom=headroom)
    if output is not None:
        _write(output, planned.document())
    if as_json:
        click.echo(json.dumps(planned.document()))
    else:
        console = _console()
        report.render_plan(planned, console)
        if output is not None and not planned.blockers:
            console.print(f"next: cellferry reshard begin {output}")
    if planned.blockers:
        raise SystemExit(1)


def _write(path: Path, document: Any) -> None:
    try:
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidInput(
            f"cannot write {path}: {error.strerror}", hint="choose another place"
        ) from error


@reshard.command(short_help="Record the re-sharding of a plan.")
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.option(
    "--ttl",
    type=DURATION,
    default=14 * 86_400.0,
    show_default="14d",
    help="How long the old owners keep their copies after the watch.",
)
@_json_option
@click.pass_obj
def begin(site: _Site, plan_file: Path, ttl: float, as_json: bool) -> None:
    """Record the re-sharding that PLAN, the file of `plan --output`, describes."""
    from cellferry.shards import reshard as steps
    from cellferry.shards.plan import Plan

    try:
        document = json.loads(plan_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"cannot read the plan {plan_file}: {error}", hint="give a file of plan --output"
        ) from error
    if not isinstance(document, dict):
        raise InvalidInput(f"{plan_file} is no plan", hint="give a file of plan --output")
    with site.context(quiet=as_json) as at:
        _say(steps.begin(at, Plan.from_document(document), ttl_s=ttl), as_json)


@reshard.command(short_help="Copy what moves; or go on with it.")
@_set_argument
@_throttle_option
@click.option("--shard", help="From this source only; default: from all at once.")
@click.option("--processes", type=click.IntRange(min=1), help="At most so many at once.")
@_json_option
@click.pass_obj
def copy(
    site: _Site,
    set_name: str,
    throttle: float | None,
    shard: str | None,
    processes: int | None,
    as_json: bool,
) -> None:
    """Copy every key that moves to its new owner, several sources at once."""
    from cellferry.shards import reshard as steps

    with site.context(quiet=as_json) as at:
        id_ = at.live(set_name).id
        if shard is not None:
            result = steps.copy(at, id_, shard, throttle_keys_s=throttle)
        else:
            result = steps.copy_all(at, id_, throttle_keys_s=throttle, processes=processes)
    _say(result, as_json)


def _plain_step(name: str, function: str, text: str) -> None:
    """Add the command for a step without options."""

    @reshard.command(name, help=text, short_help=text)
    @_set_argument
    @_json_option
    @click.pass_obj
    def command(site: _Site, set_name: str, as_json: bool) -> None:
        from cellferry.shards import reshard as steps

        with site.context(quiet=as_json) as at:
            result = getattr(steps, function)(at, at.live(set_name).id)
        _say(result, as_json)


_plain_step("dual-write", "dual_write", "Let clients write claims at both owners.")
_plain_step("catch-up", "catch_up", "Bring over what has changed since the copy, in rounds.")


@reshard.command(short_help="Compare every moved key with its copy.")
@_set_argument
@click.option("--sample", type=click.IntRange(min=1), help="So many of each source only.")
@_json_option
@click.pass_obj
def verify(site: _Site, set_name: str, sample: int | None, as_json: bool) -> None:
    """Compare value and expiry of every moved key; a sample is for a look at the progress."""
    from cellferry.shards import reshard as steps

    with site.context(quiet=as_json) as at:
        result = steps.verify(at, at.live(set_name).id, sample=sample)
    _say(result, as_json)


@reshard.command(short_help="Give the authority to the new owners.")
@_set_argument
@click.option("--dry-run", is_flag=True, help="Print the check list; change nothing.")
@_pause_option
@_json_option
@click.pass_obj
def cutover(site: _Site, set_name: str, dry_run: bool, pause_budget: float, as_json: bool) -> None:
    """Give the authority to the new owners, when everything of the check list is as it must be."""
    from dataclasses import asdict

    from cellferry.shards import report
    from cellferry.shards import reshard as steps
    from cellferry.shards.check_list import check

    with site.context(quiet=as_json) as at:
        id_ = at.live(set_name).id
        if not dry_run:
            _say(steps.cutover(at, id_, pause_s=pause_budget), as_json)
            return
        checks = check(at, id_)
    if as_json:
        click.echo(json.dumps([asdict(one) for one in checks]))
    else:
        report.render_checks(checks, _console())
    if not all(one.ok for one in checks):
        raise SystemExit(1)


@reshard.command(short_help="Compare clients' hit ratio and errors with before the cutover.")
@_set_argument
@click.option("--for", "seconds", type=DURATION, default=60.0, show_default="60s", help="How long.")
@_hit_ratio_option
@click.option(
    "--error-rise",
    type=click.FloatRange(0, 1),
    default=0.001,
    show_default=True,
    help="By how much more operations may fail, of 1.",
)
@_json_option
@click.pass_obj
def watch(
    site: _Site,
    set_name: str,
    seconds: float,
    hit_ratio_drop: float,
    error_rise: float,
    as_json: bool,
) -> None:
    """Watch the clients after the cutover; all well, they use the new owners alone."""
    from cellferry.shards import reshard as steps
    from cellferry.shards.watch import Limits

    with site.context(quiet=as_json) as at:
        limits = Limits(hit_ratio_drop, error_rise)
        result = steps.watch(at, at.live(set_name).id, seconds=seconds, limits=limits)
    _say(result, as_json)


@reshard.command("roll-back", short_help="Bring everything back to the old owners, without loss.")
@_set_argument
@_reason_option
@_pause_option
@_json_option
@click.pass_obj
def roll_back(site: _Site, set_name: str, reason: str, pause_budget: float, as_json: bool) -> None:
    """After the cutover: give the authority back, with every change that was made since."""
    from cellferry.shards import reshard as steps

    with site.context(quiet=as_json) as at:
        result = steps.roll_back(at, at.live(set_name).id, reason, pause_s=pause_budget)
    _say(result, as_json)


@reshard.command(short_help="Give it up before the cutover.")
@_set_argument
@_reason_option
@_json_option
@click.pass_obj
def abort(site: _Site, set_name: str, reason: str, as_json: bool) -> None:
    """Before the cutover: stop, remove the copies, and end the re-sharding."""
    from cellferry.shards import reshard as steps

    with site.context(quiet=as_json) as at:
        result = steps.abort(at, at.live(set_name).id, reason)
    _say(result, as_json)


@reshard.command(short_help="Remove the old copies once their TTL is over; ends it.")
@_set_argument
@click.option("--wait-ttl", type=DURATION, help="Wait until so long after the watch, as 14d.")
@click.option("--batch-size", type=click.IntRange(1, 100_000), default=1000, show_default=True)
@click.option(
    "--throttle", type=click.FloatRange(min=1), metavar="N", help="Keys a second, of each source."
)
@click.option(
    "--delete-kept", is_flag=True, help="Remove too what was deleted at its new owner meanwhile."
)
@_json_option
@click.pass_obj
def cleanup(
    site: _Site,
    set_name: str,
    wait_ttl: float | None,
    batch_size: int,
    throttle: float | None,
    delete_kept: bool,
    as_json: bool,
) -> None:
    """Remove moved keys at their old owners: only such as exist at the new one, or have expired."""
    from cellferry.shards import reshard as steps

    with site.context(quiet=as_json) as at:
        result = steps.cleanup(
            at,
            at.live(set_name).id,
            batch=batch_size,
            throttle_keys_s=throttle,
            wait_s=wait_ttl,
            delete_kept=delete_kept,
        )
    _say(result, as_json)
    if not as_json and result.facts.get("kept"):
        names = ", ".join(result.facts["kept_names"][:5])
        click.echo(f"kept, among others: {names}")


@reshard.command(short_help="plan, begin, copy … watch, one after the other.")
@_file_argument
@_throttle_option
@click.option("--ttl", type=DURATION, default=14 * 86_400.0, show_default="14d")
@click.option("--watch-for", type=DURATION, default=60.0, show_default="60s")
@_hit_ratio_option
@click.option("--yes", is_flag=True, help="Do not ask before the cutover.")
@_json_option
@click.pass_obj
def run(
    site: _Site,
    file: Path,
    throttle: float | None,
    ttl: float,
    watch_for: float,
    hit_ratio_drop: float,
    yes: bool,
    as_json: bool,
) -> None:
    """Do everything up to clean-up; started again after a failure, it goes on where it was."""
    from cellferry.shards import report
    from cellferry.shards import reshard as steps
    from cellferry.shards.settings import load
    from cellferry.shards.watch import Limits

    target = load(file)
    with site.context(quiet=as_json) as at:
        live = at.control.live(target.name)
        if live is None:
            planned = steps.plan(at, target, throttle_keys_s=throttle)
            if not as_json:
                _ProgressLine.clear()
                report.render_plan(planned, _console())
            result = steps.begin(at, planned, ttl_s=ttl)
            _say(result, as_json)
            live = at.control.resharding(result.id)
        elif live.new.document() != target.document():
            raise InvalidInput(
                f"re-sharding {live.id} of {target.name} goes to other shards than {file}",
                hint=f"cellferry reshard status {target.name}",
            )
        for result in steps.run_on(
            at,
            live.id,
            throttle_keys_s=throttle,
            watch_s=watch_for,
            limits=Limits(hit_ratio_drop),
            may_cut_over=lambda checks: _may_cut_over(checks, yes=yes, as_json=as_json),
        ):
            _say(result, as_json)


def _may_cut_over(checks: Any, *, yes: bool, as_json: bool) -> bool:
    from cellferry.shards import report

    if not as_json:
        _ProgressLine.clear()
        report.render_checks(checks, _console())
    return yes or (sys.stdin.isatty() and click.confirm("cut over now?", err=True))


@reshard.command(short_help="Where a set is, who lags, what comes next.")
@click.argument("set_name", metavar="[SET]", required=False)
@_json_option
@click.pass_obj
def status(site: _Site, set_name: str | None, as_json: bool) -> None:
    """Print the state, the clients, and what comes next; of all sets, when none is named."""
    from cellferry.shards import report

    with site.context(quiet=True) as at:
        names = [set_name] if set_name else [one.name for one in at.control.sets()]
        found = [report.status(at, name) for name in names]
    if as_json:
        documents = [one.as_dict() for one in found]
        click.echo(json.dumps(documents[0] if set_name else documents))
        return
    console = _console()
    for one in found:
        report.render_status(one, console)
    if not found:
        console.print("no set is registered: cellferry reshard register FILE")


@reshard.command("report", short_help="What a re-sharding moved, and what happened when.")
@_set_argument
@click.option("--id", "id_", type=int, help="Which; default: the latest of the set.")
@_json_option
@click.pass_obj
def report_command(site: _Site, set_name: str, id_: int | None, as_json: bool) -> None:
    """Print the figures and the history of a re-sharding."""
    from cellferry.shards import report

    with site.context(quiet=True) as at:
        found = at.control.resharding(id_) if id_ is not None else _latest(at, set_name)
        if as_json:
            click.echo(json.dumps(report.report(at, found)))
        else:
            report.render_report(found, at.control.audit(found.set_name), _console())


def _latest(at: Context, set_name: str) -> Resharding:
    found = at.control.reshardings(set_name)
    if not found:
        at.control.set(set_name)
        raise InvalidInput(
            f"{set_name} was never re-sharded", hint="cellferry reshard plan FILE begins one"
        )
    return found[0]
