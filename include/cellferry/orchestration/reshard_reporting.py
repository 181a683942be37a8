"""What the tasks of a re-sharding tell people: the plan with its check list, and the end."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cellferry.orchestration import reporting
from cellferry.orchestration.step_run import FAILURE

if TYPE_CHECKING:
    from rich.console import Console

    from cellferry.shards.check_list import Check
    from cellferry.shards.context import Context
    from cellferry.shards.plan import Plan
    from cellferry.shards.record import RegisteredClient, Resharding

log = logging.getLogger(__name__)

_ENDED_BADLY = ("failed", "upstream_failed", "removed")
_NOT_SAID = ("wait_for_ttl", "approve_copy", "approve_cutover")


def plan_checks(planned: Plan, clients: Sequence[RegisteredClient]) -> list[Check]:
    """Return the check list of a plan: what must be so before anything is copied."""
    from cellferry.shards.check_list import Check

    blocked = {one.code: one for one in planned.blockers}

    def line(name: str, codes: Sequence[str], well: str) -> Check:
        found = [blocked[code] for code in codes if code in blocked]
        return Check(
            name,
            not found,
            "; ".join(f"{one.shard}: {one.text}" for one in found) or well,
            "; ".join(dict.fromkeys(one.hint for one in found)),
        )

    audit = planned.audit
    behind = [one.name for one in clients if one.is_behind]
    checks = [
        Check(
            "Ring fits the live keys",
            True,  # a plan is refused when none does
            f"{audit.share:.1%} of {audit.keys:,} looked at" if audit else "not looked at",
        ),
        line("All shards healthy", (), f"{len(planned.loads)} answer"),
        line(
            "Servers can do it",
            ("replica", "cluster", "version", "same server"),
            ", ".join(sorted({f"{one.engine} {one.version}" for one in planned.loads})),
        ),
        line("Memory and headroom", ("memory", "headroom"), "enough is free afterwards"),
        line("Nothing is evicted", ("eviction",), "no shard throws keys away"),
        Check(
            "Clients follow",
            not behind,
            f"{', '.join(behind)} lag"
            if behind
            else f"{len(clients)} registered: {_names(clients)}"
            if clients
            else "none is registered; one that does not use ShardedStore is not waited for",
            "wait, or cellferry reshard status" if behind else "",
        ),
    ]
    known = {"replica", "cluster", "version", "same server", "memory", "headroom", "eviction"}
    checks += [
        Check(one.code, False, f"{one.shard}: {one.text}", one.hint)
        for one in planned.blockers
        if one.code not in known
    ]
    return checks


def _names(clients: Sequence[RegisteredClient]) -> str:
    names = [one.name for one in clients[:5]]
    return ", ".join(names) + (", …" if len(clients) > len(names) else "")


def say_plan(planned: Plan, checks: Sequence[Check]) -> None:
    """Log the plan as the command prints it, and the check list."""
    from cellferry.shards import report

    log.info("Plan\n%s", _printed(lambda console: report.render_plan(planned, console)))
    say_checks(checks)


def say_checks(checks: Sequence[Check]) -> None:
    """Log a check list, with the remedy of each line that is not as it must be."""
    width = max(len(one.name) for one in checks)
    lines = []
    for one in checks:
        lines.append(f"{'✓' if one.ok else '✗'} {one.name:<{width}}  {one.detail}")
        if not one.ok and one.remedy:
            lines.append(f"  {'':<{width}}  remedy: {one.remedy}")
    log.info("Check list\n%s", "\n".join(lines))


def plan_for_people(planned: Plan, checks: Sequence[Check]) -> dict[str, Any]:
    """Return a plan's counts and codes, for the report and for who approves it."""
    return {
        "hash": planned.hash,
        "from": len(planned.old.connections),
        "to": len(planned.new.connections),
        "keys": planned.keys,
        "keys_to_move": planned.keys_to_move,
        "bytes_to_move": planned.bytes_to_move,
        "seconds": round(planned.seconds(planned.keys_to_move), 1),
        "is_estimated": planned.is_estimated,
        "blockers": sorted({one.code for one in planned.blockers}),
        "warnings": sorted({one.code for one in planned.warnings}),
        "checks": [[one.name, one.ok] for one in checks],
        "pairs": [[one.old, one.new, one.keys] for one in planned.pairs],
    }


def describe_plan(plan: Mapping[str, Any]) -> str:
    """Return a plan in one line."""
    from cellferry.readable import size
    from cellferry.shards.report import duration

    share = plan["keys_to_move"] / plan["keys"] if plan["keys"] else 0.0
    return (
        f"{plan['from']} → {plan['to']} shards, {plan['keys_to_move']:,} of {plan['keys']:,} keys "
        f"move ({share:.1%}, {size(plan['bytes_to_move'])}), about {duration(plan['seconds'])}"
    )


def pair_rows(plan: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a row for each pair of shards between which keys move."""
    return [
        {"from → to": f"{old} → {new}", "keys": f"{keys:,}"} for old, new, keys in plan["pairs"]
    ]


def say_history(at: Context, found: Resharding) -> None:
    """Log a re-sharding's figures and what happened when."""
    from cellferry.shards import report

    history = at.control.audit(found.set_name)
    log.info("Report\n%s", _printed(lambda console: report.render_report(found, history, console)))


def _printed(render: Any) -> str:
    from rich.console import Console

    text = io.StringIO()
    console: Console = Console(file=text, width=160, highlight=False, soft_wrap=True)
    render(console)
    return text.getvalue().rstrip()


def step_rows(ti: Any, states: Mapping[str, Any], steps: Sequence[str]) -> list[dict[str, str]]:
    """Return a row for each step of a run, mapped ones each: how it ended and what it said."""
    rows = []
    for step in steps:
        for name, index in instances(states, step):
            if step in _NOT_SAID and states[name] == "success":
                continue
            done = ti.xcom_pull(task_ids=step, map_indexes=index)
            said = done.get("summary", "") if isinstance(done, Mapping) else ""
            lane = done.get("lane", "") if isinstance(done, Mapping) else ""
            rows.append(
                {
                    "step": f"{step} {lane or (index if index >= 0 else '')}".rstrip(),
                    "outcome": str(states[name]),
                    "what": said,
                }
            )
    return rows


def instances(states: Mapping[str, Any], step: str) -> list[tuple[str, int]]:
    """Return the names of a task's instances in `states`, each with its map index."""
    if step in states:
        return [(step, -1)]
    found = [
        (name, int(number))
        for name in states
        for head, _, number in [name.rpartition("_")]
        if head == step and number.isdigit()
    ]
    return sorted(found, key=lambda one: one[1])


def complaint(
    ti: Any, states: Mapping[str, Any], steps: Sequence[str], way_out: str = ""
) -> str | None:
    """Return what to tell the operator about the steps that failed; None when none did.

    Args:
        way_out: what else than trying again may be done.
    """
    lines: list[str] = []
    for step in steps:
        for name, index in instances(states, step):
            state = states[name]
            if state not in _ENDED_BADLY:
                continue
            if state == "upstream_failed" and lines:
                continue
            where = step if index < 0 else f"{step} with map index {index}"
            failure = ti.xcom_pull(task_ids=step, key=FAILURE, map_indexes=index) or {}
            lines.append(
                f"- {where}: "
                + failure.get("message", f"it ended as {state} and left no message; see its log")
            )
            if failure.get("remedy"):
                lines.append(f"  Remedy: {failure['remedy']}")
            lines.append(
                f"  Then clear {where} and downstream: it goes on where it stopped{way_out}."
            )
    return "\n".join(["it did not get through:", *lines]) if lines else None


table = reporting.table
