"""`cellferry …`: every step and query, without Airflow.

Exit status: 0 done, 1 permanent error, 2 wrong input, 75 try again later.
"""

from __future__ import annotations

import difflib
import getpass
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellferry import __version__
from cellferry.errors import CellferryError, InvalidInput, WrongState
from cellferry.shards.cli import reshard
from cellferry.simulation.cli import simulate

if TYPE_CHECKING:
    from cellferry.migration import Context, ProgressEvent
    from cellferry.model import Actor, Blocker, Migration

Command = Callable[..., Any]

_ORDER = [
    *("plan", "move", "status", "abort", "roll-back", "cleanup"),
    *("pause", "resume", "halts", "halt", "clear-halt", "reap"),
    *("copy", "sync", "verify", "cutover", "soak"),
    *("map", "prepare-cell", "topology", "evidence", "simulate", "reshard"),
]


class _Cli(click.Group):
    """Turns our errors into one plain message and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands as written here: in the order in which one needs them."""
        return sorted(super().list_commands(ctx), key=_ORDER.index)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["cellferry.json"] = "--json" in args  # of whichever command follows
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CellferryError as error:
            if ctx.meta["cellferry.json"]:
                click.echo(
                    json.dumps(
                        {
                            "error": type(error).__name__,
                            "message": error.message,
                            "organization": error.organization,
                            "step": error.step,
                            "where": error.where,
                            "remedy": error.hint,
                        }
                    )
                )
            else:
                click.secho(f"error: {error.message}", fg="red", err=True)
                for name, value in (("organization", error.organization), ("where", error.where)):
                    if value:
                        click.echo(f"  {name}: {value}", err=True)
                if error.hint:
                    click.secho(f"  remedy: {error.hint}", fg="yellow", err=True)
            ctx.exit(error.exit_code)


@click.group(
    cls=_Cli,
    epilog="Exit status: 0 done, 1 a person must act, 2 wrong input, 75 try again later.",
)
@click.version_option(__version__)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="cells.yaml; default: CELLFERRY_CONFIG, else include/config/cells.yaml",
)
@click.pass_context
def main(ctx: click.Context, config: Path | None) -> None:
    """Move organizations between the cells of a SaaS product while they keep working."""
    ctx.obj = config


main.add_command(reshard)  # what they need is imported when they are used
main.add_command(simulate)


def _json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")(command)


def _actor() -> Actor:
    from cellferry.model import Actor

    return Actor(name=getpass.getuser(), role="operator")


@contextmanager
def _context(config: Path | None, *, quiet: bool) -> Iterator[Context]:
    from cellferry import settings
    from cellferry.migration import Context

    loaded = settings.load(config or settings.default_path())
    with Context.from_settings(
        loaded,
        settings.from_environment(),
        actor=_actor(),
        listener=None if quiet else _ProgressLine(),
    ) as context:
        try:
            yield context
        finally:
            if not quiet:
                _ProgressLine.clear()


class _ProgressLine:
    """One line on a terminal that says how far the work is, with rate and time left."""

    EVERY_S = 0.25

    def __init__(self) -> None:
        self._phase: tuple[str, str] | None = None
        self._started = 0.0
        self._first = 0
        self._shown = 0.0

    def __call__(self, event: ProgressEvent) -> None:
        now = time.monotonic()
        if (event.store, event.phase) != self._phase:
            self._phase, self._started, self._first = (event.store, event.phase), now, event.done
            self._shown = 0.0
        if not sys.stderr.isatty() or now - self._shown < self.EVERY_S:
            return
        self._shown = now
        click.echo(f"\r\x1b[2K{self._describe(event, now - self._started)}", nl=False, err=True)

    def _describe(self, event: ProgressEvent, seconds: float) -> str:
        phase = event.phase if event.phase == event.store else f"{event.store} {event.phase}"
        text = f"{event.organization} {phase}: {event.done:,}"
        unfinished = event.total is not None and event.done < event.total
        if unfinished:
            text += f" of {event.total:,}"
        text += f" {event.unit}"
        rate = (event.done - self._first) / max(seconds, 1e-3)
        if rate >= 1 and event.unit != "s":
            text += f", {rate:,.0f}/s"
            if unfinished and event.total is not None:
                text += f", {(event.total - event.done) / rate:,.0f} s left"
        return f"{text} ({event.note})" if event.note else text

    @staticmethod
    def clear() -> None:
        """Make room for what stays."""
        if sys.stderr.isatty():
            click.echo("\r\x1b[2K", nl=False, err=True)


def _find_migration(context: Context, organization: str) -> Migration:
    """The organization's live migration, else its latest.

    Raises:
        InvalidInput: no such organization.
        WrongState: it never moved.
    """
    found = context.topology.organization(organization)
    live = context.topology.live_migration(found.id)
    if live is not None:
        return live
    moves = context.topology.migrations(org=found.id)
    if not moves:
        raise WrongState(
            f"organization {found.slug} has no migration",
            organization=found.slug,
            hint=f"cellferry plan {found.slug} --to CELL --record",
        )
    return moves[0]


def _say(result: Any, as_json: bool, *, with_state: bool = False) -> None:
    """Print what became of one organization, as a line or as JSON."""
    state = f" ({result.state})" if with_state else ""
    line = f"{result.organization}: {result.summary}{state}"
    click.echo(json.dumps(result.as_dict()) if as_json else line)


def _step_command(name: str, text: str) -> None:
    """Add the command for one step of an organization's migration."""

    @main.command(name, help=text, short_help=text)
    @click.argument("organization")
    @_json_option
    @click.pass_obj
    def command(config: Path | None, organization: str, as_json: bool) -> None:
        from cellferry.migration import steps

        with _context(config, quiet=as_json) as context:
            migration = _find_migration(context, organization)
            result = getattr(steps, name)(context, migration.id)
        _say(result, as_json, with_state=True)


for _name, _text in (
    ("copy", "Copy everything; the organization keeps writing."),
    ("sync", "Repeat rounds over what changed since, until one is small."),
    ("verify", "Compare everything on both sides."),
    ("cutover", "Move the authority: a short write pause for this organization."),
    ("soak", "Watch the organization at its new cell."),
    ("cleanup", "Delete the old copy, after the TTL."),
):
    _step_command(_name, _text)


@main.command(short_help="Say what would move and what blocks it; change nothing.")
@click.argument("organization")
@click.option("--to", "destination", required=True, metavar="CELL", help="The destination cell.")
@click.option("--record", is_flag=True, help="Create the migration if nothing blocks it.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="An option of the move, such as ttl_s=600; may be repeated. docs/dag-reference.md.",
)
@_json_option
@click.pass_obj
def plan(
    config: Path | None,
    organization: str,
    destination: str,
    record: bool,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Say what would move, how long it would take, and what blocks it. Changes nothing."""
    from cellferry.migration import steps
    from cellferry.migration.reporting import render_plan

    options = parse_options(settings)
    with _context(config, quiet=as_json) as context:
        report = steps.plan(context, organization, destination, options=options, record=record)
    if as_json:
        click.echo(json.dumps(report.as_dict()))
    else:
        render_plan(report)
    if report.fatal:
        raise SystemExit(1)


def parse_options(settings: tuple[str, ...]) -> Any:
    """Return `MoveOptions` from `name=value` pairs.

    Raises:
        InvalidInput: an unknown name or a value out of bounds; all faults are named.
    """
    import pydantic

    from cellferry.migration import MoveOptions

    values: dict[str, str] = {}
    for setting in settings:
        name, separator, value = setting.partition("=")
        if not separator:
            raise InvalidInput(
                f"--set {setting!r} is not NAME=VALUE", hint="for example --set batch_rows=10000"
            )
        values[name] = value
    try:
        return MoveOptions.model_validate(values)
    except pydantic.ValidationError as error:
        known = sorted(MoveOptions.model_fields)
        faults = []
        for fault in error.errors():
            name = ".".join(str(part) for part in fault["loc"])
            if fault["type"] == "extra_forbidden":
                near = difflib.get_close_matches(name, known, n=1)
                guess = f" (did you mean {near[0]!r}?)" if near else ""
                faults.append(f"there is no option {name!r}{guess}")
            else:
                faults.append(f"option {name} = {fault['input']!r}: {fault['msg']}")
        raise InvalidInput("; ".join(faults), hint="options: " + ", ".join(known)) from error


@main.command(short_help="Give a migration up, before the flip.")
@click.argument("organization")
@click.option("--reason", default="given up by the operator", help="For the audit.")
@_json_option
@click.pass_obj
def abort(config: Path | None, organization: str, reason: str, as_json: bool) -> None:
    """Give a migration up before the flip: the source serves on, the copy is deleted."""
    from cellferry.migration import steps

    with _context(config, quiet=as_json) as context:
        migration = _find_migration(context, organization)
        result = steps.abort(context, migration.id, reason)
    _say(result, as_json)


@main.command("roll-back", short_help="Bring an organization back after the flip, without loss.")
@click.argument("organization")
@click.option("--reason", default="rolled back by the operator", help="For the audit.")
@click.option(
    "--ttl",
    "ttl_s",
    type=click.FloatRange(0, 90 * 86_400),
    help="Seconds until the new cell's copy may be cleaned up; else as for the move.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would keep it, or stay behind.")
@_json_option
@click.pass_obj
def roll_back(
    config: Path | None,
    organization: str,
    reason: str,
    ttl_s: float | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Bring an organization back to its old cell with everything it wrote since the cutover.

    A short write pause, as a cutover. Works until the old copy is cleaned up. Both cells are
    needed: from a dead cell nothing can be brought back.
    """
    from cellferry.migration import steps

    with _context(config, quiet=as_json) as context:
        migration = steps.migration_to_roll_back(context, organization)
        if dry_run:
            found = steps.examine_return(context, migration.id)
            _show_return(migration, found, as_json)
            if any(one.fatal for one in found):
                raise SystemExit(1)
            return
        result = steps.roll_back(context, migration.id, reason, ttl_s=ttl_s)
    _say(result, as_json, with_state=True)


_reason_option = click.option("--reason", required=True, help="Why; for the audit.")
_scope_argument = click.argument(
    "scope", type=click.Choice(["organization", "cohort", "cell"]), metavar="SCOPE"
)


@main.command(short_help="Stop a migration until it is resumed; nothing of it is lost.")
@click.argument("organization")
@_reason_option
@_json_option
@click.pass_obj
def pause(config: Path | None, organization: str, reason: str, as_json: bool) -> None:
    """Stop a migration at its next batch; the organization goes on where it is.

    Checkpoints and key log are kept; a log over its budget (log_budget_rows) is given up, and the
    resume compares and repairs. A cutover that has begun ends first. Of a retained one the
    clean-up waits.
    """
    from cellferry.migration import steps

    with _context(config, quiet=as_json) as context:
        _say(steps.pause(context, _find_migration(context, organization).id, reason), as_json)


@main.command(short_help="Let a paused migration go on.")
@click.argument("organization")
@_reason_option
@_json_option
@click.pass_obj
def resume(config: Path | None, organization: str, reason: str, as_json: bool) -> None:
    """Let a paused migration go on. Then run the step that stopped, or clear its task."""
    from cellferry.migration import steps

    with _context(config, quiet=as_json) as context:
        _say(steps.resume(context, _find_migration(context, organization).id, reason), as_json)


@main.command(short_help="Halt an organization's migration, a cohort or a cell.")
@_scope_argument
@click.argument("name")
@_reason_option
@_json_option
@click.pass_obj
def halt(config: Path | None, scope: str, name: str, reason: str, as_json: bool) -> None:
    """Halt the migration of an organization, those of a cohort, or those from and to a cell.

    SCOPE is organization, cohort or cell. Running copies stop at their next batch, nothing new
    starts, a cutover that has begun ends first. Lasts until somebody clears it.
    """
    from cellferry.migration import steps

    with _context(config, quiet=as_json) as context:
        _say(steps.halt(context, scope, name, reason), as_json)


@main.command("clear-halt", short_help="Clear a halt, when its cause is gone.")
@_scope_argument
@click.argument("name")
@_reason_option
@_json_option
@click.pass_obj
def clear_halt(config: Path | None, scope: str, name: str, reason: str, as_json: bool) -> None:
    """Clear the halt of an organization's migration, of a cohort or of a cell.

    SCOPE is organization, cohort or cell. What it stopped is not started again by this.
    """
    from cellferry.migration import steps

    with _context(config, quiet=as_json) as context:
        _say(steps.clear_halt(context, scope, name, reason), as_json)


@main.command(short_help="List what is halted: by whom, since when, why.")
@click.option("--watch", is_flag=True, help="First look at key logs and error rates, as the reaper")
@_json_option
@click.pass_obj
def halts(config: Path | None, watch: bool, as_json: bool) -> None:
    """List what is halted: by whom, since when and why."""
    from cellferry.migration import steps
    from cellferry.migration.reporting import render_halts
    from cellferry.migration.result import plain

    with _context(config, quiet=True) as context:
        watched = steps.watch(context) if watch else None
        found = steps.halts(context)
    if as_json:
        click.echo(json.dumps(plain({"halts": found, "watched": watched})))
        return
    render_halts(found)
    if watched is not None:
        for line in (*watched.given_up, *watched.failed):
            click.echo(line)


@main.command(short_help="Finish what dead controllers left; remove what nobody owns.")
@click.option("--dry-run", is_flag=True, help="Change nothing; say what would be done.")
@click.option(
    "--expired-after",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="How long the holder of a migration must have been silent; default 15.",
)
@_json_option
@click.pass_obj
def reap(config: Path | None, dry_run: bool, expired_after: float | None, as_json: bool) -> None:
    """Finish or undo what controllers that died left behind, and remove what nobody owns.

    An organization that is frozen and forgotten is served again. Harmless while moves run; a
    second one at the same time does nothing. Run it every minute, from cron or anything else.
    """
    from cellferry.migration import steps
    from cellferry.migration.reap import EXPIRED_AFTER_S
    from cellferry.migration.reap_table import render

    expired_after_s = EXPIRED_AFTER_S if expired_after is None else expired_after
    with _context(config, quiet=True) as context:
        reaped = steps.reap(context, expired_after_s=expired_after_s, dry_run=dry_run)
    if as_json:
        click.echo(json.dumps(reaped.as_dict()))
    else:
        render(reaped)
    if reaped.exit_code:
        raise SystemExit(reaped.exit_code)


def _show_return(migration: Migration, found: Sequence[Blocker], as_json: bool) -> None:
    """Print what keeps an organization from going back, and what would stay behind."""
    from cellferry.migration.result import plain

    if as_json:
        click.echo(json.dumps({"migration": migration.id, "blockers": plain(list(found))}))
        return
    for one in found:
        word = "blocks" if one.fatal else "stays"
        click.echo(f"{word} {one.code}: {one.where}: {one.reason}\n  remedy: {one.remedy}")
    if not any(one.fatal for one in found):
        way = f"{migration.destination} to {migration.source}"
        click.echo(f"{migration.organization.slug} can go back from {way}; nothing was changed")


@main.command(short_help="Say where an organization is, and what comes next.")
@click.argument("organization", required=False)
@_json_option
@click.pass_obj
def status(config: Path | None, organization: str | None, as_json: bool) -> None:
    """Say where an organization is, what its migration does, and what comes next.

    Without an organization: list the migrations that are not over.
    """
    from cellferry.migration import steps
    from cellferry.migration.reporting import render_migrations, render_status
    from cellferry.migration.result import plain

    if organization is None:
        with _context(config, quiet=True) as context:
            migrations, halts = steps.unfinished(context), steps.halts(context)
        if as_json:
            click.echo(json.dumps(plain(migrations)))
        else:
            render_migrations(migrations, halts=halts)
        return
    with _context(config, quiet=True) as context:
        found = steps.status(context, organization)
    if as_json:
        click.echo(json.dumps(found.as_dict()))
    else:
        render_status(found)


@main.command(short_help="All steps from plan to soak; clean-up waits for the TTL.")
@click.argument("organization")
@click.option("--to", "destination", required=True, metavar="CELL", help="The destination cell.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="An option of the move, such as ttl_s=600; may be repeated. docs/dag-reference.md.",
)
@_json_option
@click.pass_obj
def move(
    config: Path | None,
    organization: str,
    destination: str,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Plan, copy, sync, verify, cut over and soak; clean-up waits for the TTL."""
    from cellferry.migration import steps

    options = parse_options(settings)
    results = []
    with _context(config, quiet=as_json) as context:
        planned = steps.plan(context, organization, destination, options=options, record=True)
        if planned.migration is None:
            raise WrongState("plan recorded no migration", organization=organization)
        for step in (steps.copy, steps.sync, steps.verify, steps.cutover, steps.soak):
            result = step(context, planned.migration)
            results.append(result.as_dict())
            if not as_json:
                _ProgressLine.clear()
                click.echo(f"{result.step}: {result.summary}")
    if as_json:
        click.echo(json.dumps(results))


@main.command("prepare-cell", short_help="Install what a cell needs; may be repeated.")
@click.argument("cell")
@click.option("--remove", is_flag=True, help="Take everything out again.")
@_json_option
@click.pass_obj
def prepare_cell(config: Path | None, cell: str, remove: bool, as_json: bool) -> None:
    """Install what a cell needs: gates, key log, roles, ACLs. May be repeated."""
    from cellferry.migration import steps

    with _context(config, quiet=as_json) as context:
        verb = steps.unprepare_cell if remove else steps.prepare_cell
        done = verb(context, cell)
    click.echo(json.dumps(done) if as_json else f"{cell}: {'removed' if remove else 'prepared'}")


@main.command("map", short_help="Show how each table of a cell is placed.")
@click.argument("cell")
@click.option(
    "--write", type=click.Path(path_type=Path), help="Write the map for review as YAML here."
)
@click.pass_obj
def show_map(config: Path | None, cell: str, write: Path | None) -> None:
    """Show how each table of a cell is placed: owned, referenced, global or cell-local."""
    from cellferry import settings
    from cellferry.migration.map import discover_map
    from cellferry.stores.postgres.map_review import print_map, render_for_review

    loaded = settings.load(config or settings.default_path())
    found = discover_map(loaded, settings.from_environment(), cell)
    if write is None:
        print_map(found)
    else:
        write.write_text(render_for_review(found), encoding="utf-8")
        click.echo(f"written: {write}")
    if any(refusal.fatal for refusal in found.refusals):
        raise SystemExit(1)


@main.group()
def topology() -> None:
    """The control plane's database."""


@topology.command("install", short_help="Create or upgrade the topology's schema.")
@click.pass_obj
def install_topology(config: Path | None) -> None:
    """Create or upgrade the topology's schema and register the configured cells."""
    with _context(config, quiet=True) as context:
        context.topology.install()
        for name, cell in context.settings.cells.items():
            context.topology.register_cell(name, cell.region, cell.legacy)
    click.echo("topology is up to date")


@main.group()
def evidence() -> None:
    """What a migration leaves for people who were not there: packs, and checking them."""


@evidence.command("export", short_help="Write the evidence pack of a migration.")
@click.argument("migration", type=click.IntRange(min=1))
@click.option(
    "--to",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where packs are kept; default: CELLFERRY_EVIDENCE, else ./evidence",
)
@click.option(
    "--writers",
    type=click.Path(path_type=Path),
    help="JSON of what writers waited in the cutover: seconds, as a list or by writer.",
)
@_json_option
@click.pass_obj
def export_evidence(
    config: Path | None, migration: int, to: Path | None, writers: Path | None, as_json: bool
) -> None:
    """Write the evidence pack of a migration: a document, a page, and their hash in the audit.

    While an old copy is kept, both copies are counted and hashed. May be repeated.
    """
    from cellferry.evidence import export_pack

    pauses = _read_pauses(writers) if writers is not None else None
    with _context(config, quiet=as_json) as context:
        pack = export_pack(context, migration, to, writers=pauses)
    if as_json:
        click.echo(json.dumps(pack.as_dict()))
    else:
        click.echo(f"{pack.organization}: {pack.directory}\n  sha256 {pack.hash} (in the audit)")


def _read_pauses(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"{path} cannot be read as JSON: {error}",
            hint="give a JSON list of seconds, or an object of seconds by writer",
        ) from error


@evidence.command("verify", short_help="Check a pack, and recompute what still can be.")
@click.argument("directory", type=click.Path(path_type=Path))
@_json_option
@click.pass_obj
def verify_evidence(config: Path | None, directory: Path, as_json: bool) -> None:
    """Check a pack's files and hash, and recompute what still can be recomputed.

    Exit status 1 when anything differs.
    """
    from cellferry.evidence import Outcome, check_pack
    from cellferry.evidence.reporting import render_checks
    from cellferry.migration.result import plain

    with _context(config, quiet=True) as context:
        checks = check_pack(context, directory)
    holds = all(one.outcome is not Outcome.DIFFERS for one in checks)
    if as_json:
        click.echo(
            json.dumps({"directory": str(directory), "holds": holds, "checks": plain(checks)})
        )
    else:
        render_checks(checks, directory)
    if not holds:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
