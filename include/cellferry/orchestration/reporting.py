"""What a run's last task says: one table for people, and a failure when an organization failed.

Airflow calls a run a success when its leaf is one, even if an organization failed before it. So
the leaf fails then, and says which, why and what to do.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cellferry.orchestration.progress import duration
from cellferry.readable import size

if TYPE_CHECKING:
    from cellferry.migration import Context
    from cellferry.model import Migration

log = logging.getLogger(__name__)

_ENDED_BADLY = ("failed", "upstream_failed", "removed", None)
#: Tasks that start further runs: nothing else tells that one of these was not started.
START_NEXT_RUN, START_CLEAN_UP_RUN = "start_next_run", "start_clean_up_run"
_STARTERS = {
    START_NEXT_RUN: "the organizations that this run did not take are not handed on",
    START_CLEAN_UP_RUN: "the copies that are kept until the end of the TTL will not be deleted",
}
_NUMBERS = frozenset(
    {"rows", "keys", "size", "copied/s", "rounds", "write pause", "gate closed", "copy", "deleted"}
)


@dataclass(frozen=True, slots=True)
class Lane:
    """How one organization's mapped tasks ended.

    Attributes:
        failed_step: the first step that did not succeed, None when all did.
    """

    index: int
    slug: str
    failed_step: str | None
    state: str | None = None
    message: str = ""
    remedy: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return self.failed_step is None


def lane(
    index: int, slug: str, group: str, steps: Sequence[str], states: Mapping[str, Any]
) -> Lane:
    """Read how the tasks of one map index ended.

    Args:
        states: state of each task instance of the run, by `task_id_mapindex`.
    """
    for step in steps:
        state = states.get(f"{group}.{step}_{index}")
        if state in _ENDED_BADLY:
            return Lane(index, slug, step, state)
    return Lane(index, slug, None)


def plan_row(slug: str, plan: Mapping[str, Any] | None) -> dict[str, str]:
    """Return a dry run's row."""
    if plan is None:
        return {"organization": slug, "outcome": "not planned"}
    totals: Mapping[str, Mapping[str, Any]] = plan.get("totals", {})
    blockers: Sequence[Any] = plan.get("blockers", ())
    return {
        "organization": slug,
        "outcome": f"blocked: {', '.join(dict.fromkeys(blockers))}" if blockers else "can move",
        "from → to": f"{plan['source']} → {plan['destination']}",
        "rows": _count(totals, "rows"),
        "keys": _count(totals, "keys"),
        "size": size(sum(int(found["bytes"]) for found in totals.values())),
        "strategy": str(plan["strategy"]),
        "copy": "about " + duration(float(plan["copy_s"])),
        "write pause": f"about {1000 * float(plan['pause_s']):.0f} ms",
    }


def move_row(one: Lane, migration: Migration | None) -> dict[str, str]:
    """Return the row of a move, from what the topology knows of its migration."""
    if migration is None:
        return {"organization": one.slug, "outcome": _outcome(one, None)}
    facts = migration.facts
    copied: Mapping[str, Mapping[str, Any]] = facts.get("copied", {})
    rounds: Mapping[str, Sequence[Any]] = facts.get("rounds", {})
    pause = facts.get("pause", {}).get("seconds")
    verified: Mapping[str, Mapping[str, Any]] = facts.get("verified", {})
    seconds = sum(float(found.get("seconds", 0)) for found in copied.values())
    count = sum(int(found.get("count", 0)) for found in copied.values())
    cleaned: Mapping[str, Mapping[str, Any]] = facts.get("cleaned", {})
    return {
        "organization": one.slug,
        "outcome": _outcome(one, migration),
        "from → to": f"{migration.source} → {migration.destination}",
        "rows": _of(copied, "postgres", "count"),
        "keys": _of(copied, "redis", "count"),
        "size": size(sum(int(found.get("bytes", 0)) for found in copied.values()))
        if copied
        else "",
        "copied/s": f"{count / seconds:,.0f}" if seconds else "",
        "rounds": str(sum(len(done) for done in rounds.values())) if rounds else "",
        # what the writers waited is a little more: they also have to go to the new cell
        "gate closed": f"{1000 * float(pause):.0f} ms" if pause is not None else "",
        "verified": _verified(migration, verified),
        "deleted": f"{sum(int(found['deleted']) for found in cleaned.values()):,}"
        if cleaned
        else "",
    }


def roll_back_row(one: Lane, migration: Migration, *, dry_run: bool) -> dict[str, str]:
    """Return the row of a roll-back; in a dry run it says whether it would go."""
    facts = migration.facts
    pause = facts.get("pause_back", {}).get("seconds")
    deleted = facts.get("cleaned", {}).values() if migration.state == "rolled_back" else ()
    return {
        "organization": one.slug,
        "outcome": (("can go back" if one.ok else "cannot go back") if dry_run else "")
        or _outcome(one, migration),
        "from → to": f"{migration.destination} → {migration.source}",
        "gate closed": f"{1000 * float(pause):.0f} ms" if pause is not None else "",
        "stays behind": "; ".join(facts.get("notes_back", ())),
        "deleted": f"{sum(int(found['deleted']) for found in deleted):,}" if deleted else "",
    }


def clean_up_row(one: Lane, migration: Migration) -> dict[str, str]:
    """Return the row of a clean-up."""
    row = move_row(one, migration)
    return {key: row[key] for key in ("organization", "outcome", "from → to", "deleted")}


def _outcome(one: Lane, migration: Migration | None) -> str:
    state = str(migration.state).replace("_", " ") if migration is not None else "not started"
    if migration is not None and migration.paused:
        state += ", paused"
    if migration is not None and migration.halted:
        state += ", halted"
    return state if one.ok else f"FAILED at {one.failed_step}, {state}"


def _verified(migration: Migration, verified: Mapping[str, Mapping[str, Any]]) -> str:
    if verified:
        different = sum(int(found.get("mismatch_count", 0)) for found in verified.values())
        return "equal" if not different else f"{different:,} differ"
    # freeze-first compares everything under the gate, as part of the cutover
    return "equal" if migration.facts.get("pause") else ""


def _of(facts: Mapping[str, Mapping[str, Any]], kind: str, name: str) -> str:
    return f"{int(facts[kind][name]):,}" if kind in facts else ""


def _count(totals: Mapping[str, Mapping[str, Any]], unit: str) -> str:
    return f"{sum(int(one['count']) for one in totals.values() if one['unit'] == unit):,}"


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return `rows` as an aligned table; columns that are empty everywhere are left out."""
    columns = [
        column
        for column in dict.fromkeys(key for row in rows for key in row)
        if any(row.get(column) for row in rows)
    ]
    widths = {
        column: max(len(column), *(len(row.get(column, "")) for row in rows)) for column in columns
    }

    def line(cells: Mapping[str, str]) -> str:
        parts = [
            cells.get(column, "").rjust(widths[column])
            if column in _NUMBERS
            else cells.get(column, "").ljust(widths[column])
            for column in columns
        ]
        return "  ".join(parts).rstrip()

    rule = {column: "-" * widths[column] for column in columns}
    return "\n".join([line({column: column for column in columns}), line(rule), *map(line, rows)])


def not_handed_on(states: Mapping[str, Any]) -> list[str]:
    """Return which of the tasks that start further runs ended badly, and what that means.

    Args:
        states: as for `lane`.
    """
    return [
        f"{task} ended as {states[task]}: {meaning}. Clear {task}: it starts the run once."
        for task, meaning in _STARTERS.items()
        if task in states and states[task] in _ENDED_BADLY
    ]


def complaint(lanes: Sequence[Lane], group: str, handing_on: Sequence[str] = ()) -> str | None:
    """Return what to tell the operator about what failed; None when all went well.

    Args:
        handing_on: what `not_handed_on` found.
    """
    failed = [one for one in lanes if not one.ok]
    if not failed:
        return "\n".join(handing_on) or None
    lines = [*handing_on, f"{len(failed)} of {len(lanes)} organizations failed:"]
    for one in failed:
        reason = one.message or (
            f"the task ended as {one.state or 'never started'} and left no message; see its log"
        )
        lines.append(f"- {one.slug} at {one.failed_step}: {reason}")
        if one.remedy:
            lines.append(f"  Remedy: {one.remedy}")
        lines.append(
            f"  Then clear {group}.{one.failed_step} with map index {one.index} and downstream: "
            "it goes on where it stopped, the others are not touched."
        )
    return "\n".join(lines)


def say_halts(ferry: Context) -> None:
    """Log what is halted now: by whom, since when, why, and how it is cleared."""
    from cellferry.migration.reporting import describe_halt

    for halt in ferry.topology.halts():
        log.warning("Halted: %s\nRemedy: %s", describe_halt(halt), halt.remedy)


def keep_evidence(ferry: Context, migrations: Sequence[int]) -> None:
    """Write each migration's evidence pack where the deployment keeps them, if it does.

    A pack that cannot be written fails nothing: it can be exported at any time.
    """
    from cellferry.errors import CellferryError
    from cellferry.evidence import export_pack, is_kept

    for migration in migrations if is_kept() else ():
        try:
            pack = export_pack(ferry, migration)
        except (CellferryError, OSError) as error:
            log.warning("no evidence pack of migration %s: %s", migration, error)
        else:
            log.info("evidence: %s, sha256 %s", pack.directory, pack.hash)
