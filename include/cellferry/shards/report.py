"""Plans, check lists, states and reports of re-shardings as people read them in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cellferry.readable import size
from cellferry.shards.check_list import Check
from cellferry.shards.context import Context
from cellferry.shards.plan import Plan
from cellferry.shards.record import AuditRow, RegisteredClient, Resharding
from cellferry.shards.states import ENDING, ShardState

NAMES: Mapping[ShardState, str] = {
    ShardState.OLD: "OLD",
    ShardState.DUAL_READ_OLD: "DUAL_WRITE (read old)",
    ShardState.SWITCHING: "SWITCHING",
    ShardState.DUAL_READ_NEW: "DUAL_WRITE (read new)",
    ShardState.NEW: "NEW",
}
"""The states as people see them."""


@dataclass(frozen=True)
class Status:
    """Where a set is: its live or latest re-sharding, and its clients."""

    set_name: str
    shards: tuple[str, ...]
    found: Resharding | None
    clients: tuple[RegisteredClient, ...]

    @property
    def next(self) -> str:
        """What a person does now."""
        name, found = self.set_name, self.found
        if found is None or found.ended is not None:
            return "cellferry reshard plan FILE, with the shards as they should be"
        facts = found.facts
        match found.state:
            case ShardState.OLD:
                if facts.get(ENDING):
                    return f"cellferry reshard cleanup {name}, which removes the copies and ends it"
                copied = any(fact.startswith("copied ") for fact in facts)
                return f"cellferry reshard {'dual-write' if copied else 'copy'} {name}"
            case ShardState.DUAL_READ_OLD:
                if (facts.get("verified") or {}).get("complete"):
                    return f"cellferry reshard cutover {name} --dry-run, then without"
                if facts.get("caught_up"):
                    return f"cellferry reshard verify {name}"
                return f"cellferry reshard catch-up {name}"
            case ShardState.SWITCHING:
                back = "roll-back" if facts.get(ENDING) else "cutover"
                return (
                    f"a step is in its short pause; if it was killed, cellferry reshard {back}"
                    f" {name} goes back first and tries again"
                )
            case ShardState.DUAL_READ_NEW:
                if facts.get(ENDING):
                    return f"cellferry reshard roll-back {name} once more; it has not ended"
                return f"cellferry reshard watch {name}"
            case _:
                left = _left(found)
                when = f" in {left}" if left else ""
                return f"cellferry reshard cleanup {name}{when}; roll-back loses nothing until then"

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {
            "set": self.set_name,
            "shards": list(self.shards),
            "resharding": None if self.found is None else describe(self.found),
            "clients": [
                {
                    "name": one.name,
                    "acknowledged": one.acknowledged,
                    "is_behind": one.is_behind,
                    "lease_s": one.lease_s,
                    "silent_s": round(one.silent_s, 3),
                }
                for one in self.clients
            ],
            "next": self.next,
        }


def status(at: Context, set_name: str) -> Status:
    """Return where a set is. Changes nothing.

    Raises:
        InvalidInput: there is no such set.
    """
    shard_set = at.control.set(set_name)
    found = at.control.live(set_name)
    if found is None:
        latest = at.control.reshardings(set_name)
        found = latest[0] if latest else None
    return Status(
        set_name, tuple(shard_set.connections), found, tuple(at.control.clients(set_name))
    )


def describe(found: Resharding) -> dict[str, Any]:
    """Return a re-sharding as JSON's types, without its plan."""
    return {
        "id": found.id,
        "set": found.set_name,
        "old": list(found.old.connections),
        "new": list(found.new.connections),
        "state": str(found.state),
        "epoch": found.epoch,
        "begun_at": found.begun_at.isoformat(),
        "ttl_until": None if found.ttl_until is None else found.ttl_until.isoformat(),
        "ended": found.ended,
        "ended_at": None if found.ended_at is None else found.ended_at.isoformat(),
        "facts": dict(found.facts),
    }


def report(at: Context, found: Resharding) -> dict[str, Any]:
    """Return everything that is known of a re-sharding: plan, facts, what happened when."""
    rows = [one for one in at.control.audit(found.set_name) if one.resharding == found.id]
    return {
        **describe(found),
        "plan": {
            name: found.plan.get(name)
            for name in (
                *("hash", "made_at", "old_topology", "new_topology", "migrations", "shards"),
                *("total_keys_to_move", "percentage_to_move", "total_bytes_to_move"),
            )
        },
        "history": [
            {
                "at": one.at.isoformat(),
                "action": one.action,
                "actor": one.actor,
                "from": one.from_state,
                "to": one.to_state,
                "epoch": one.epoch,
                "reason": one.reason,
            }
            for one in rows
            if one.action != "lease"
        ],
    }


def render_plan(planned: Plan, console: Console) -> None:
    """Print what would move, each shard before and after, and what speaks against it."""
    old, new = planned.old, planned.new
    share = planned.keys_to_move / planned.keys if planned.keys else 0.0
    console.print(
        f"[bold]{escape(old.name)}[/]: {len(old.connections)} → {len(new.connections)} shards;"
        f" {planned.keys_to_move:,} of {planned.keys:,} keys move ({share:.1%},"
        f" {size(planned.bytes_to_move)}){', estimated from a sample' * planned.is_estimated}"
    )
    table = Table("from", "to", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("keys", "size", "time"):
        table.add_column(name, justify="right")
    for pair in planned.pairs:
        took = duration(planned.seconds(pair.keys))
        table.add_row(pair.old, pair.new, f"{pair.keys:,}", size(pair.size), took)
    console.print(table)
    table = Table("shard", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("keys before", "after", "memory", "limit"):
        table.add_column(name, justify="right")
    table.add_column("server")
    for load in planned.loads:
        table.add_row(
            f"{load.shard}{' (new)' if load.is_new else ''}",
            f"{load.keys_before:,}",
            f"{load.keys_after:,}",
            size(load.used_bytes),
            size(load.limit_bytes) if load.limit_bytes else "none",
            f"{load.engine} {load.version}",
        )
    console.print(table)
    if planned.audit is not None:
        console.print(
            f"live keys: {planned.audit.share:.1%} of {planned.audit.keys:,} sampled lie where"
            f" {escape(planned.audit.configured)!r} puts them"
        )
    throttle = planned.throttle_keys_s
    console.print(
        f"estimate: {duration(planned.seconds(planned.keys_to_move))} at"
        + (f" {throttle:,.0f} moved keys/s" if throttle else " full speed")
    )
    for warning in planned.warnings:
        console.print(f"[yellow]note[/] {escape(warning.shard)}: {escape(warning.text)}")
    for blocker in planned.blockers:
        console.print(f"[red]blocks[/] {escape(blocker.shard)}: {escape(blocker.text)}")
        console.print(f"       remedy: {escape(blocker.hint)}")
    if planned.blockers:
        console.print("[red]cannot be re-sharded yet[/]")
    else:
        console.print("[green]nothing blocks it[/]; nothing was changed")


def render_checks(checks: Sequence[Check], console: Console) -> None:
    """Print the check list of the cutover."""
    width = max(len(one.name) for one in checks)
    for one in checks:
        mark = "[green]✓[/]" if one.ok else "[red]✗[/]"
        console.print(f"{mark} {one.name:<{width}}  {escape(one.detail)}")
        if not one.ok and one.remedy:
            console.print(f"  {'':<{width}}  remedy: {escape(one.remedy)}")
    if all(one.ok for one in checks):
        console.print("[green]✓ Ready for cutover[/]; nothing was changed")
    else:
        console.print("[red]✗ Not ready for cutover[/]; nothing was changed")


def render_status(found: Status, console: Console) -> None:
    """Print where a set is and what comes next."""
    one = found.found
    console.print(f"[bold]{escape(found.set_name)}[/]: shards {escape(', '.join(found.shards))}")
    if one is not None:
        ended = f", [bold]{one.ended.replace('_', ' ')}[/]" if one.ended else ""
        console.print(
            f"re-sharding {one.id}: {len(one.old.connections)} → {len(one.new.connections)} shards,"
            f" [bold]{NAMES[one.state]}[/] at epoch {one.epoch}{ended}"
        )
        # Copies work side by side, so nobody knows of the whole that it has ended.
        if one.holder and one.ended is None and one.step != "copy":
            console.print(f"{one.step} is at work: {escape(one.holder)}")
        for line in _facts(one):
            console.print(line)
        if one.state is ShardState.NEW and one.ended is None and one.ttl_until is not None:
            console.print(f"clean-up not before {one.ttl_until:%Y-%m-%d %H:%M:%S} UTC")
    if found.clients:
        table = Table("client", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("epoch", "last heard of", "lease"):
            table.add_column(name, justify="right")
        table.add_column("")
        for client in found.clients:
            table.add_row(
                escape(client.name),
                str(client.acknowledged),
                f"{client.silent_s:.1f} s ago",
                f"{client.lease_s:g} s",
                "[yellow]lags[/]" if client.is_behind else "",
            )
        console.print(table)
    else:
        console.print("no client is registered")
    console.print(f"next: {escape(found.next)}")


def _facts(found: Resharding) -> list[str]:
    facts = found.facts
    lines = []
    copied = [value for name, value in facts.items() if name.startswith("copied ")]
    if copied:
        keys = sum(one["keys"] for one in copied)
        lines.append(f"copied: {keys:,} keys from {', '.join(one['shard'] for one in copied)}")
    if caught_up := facts.get("caught_up"):
        swept = caught_up["swept"]
        lines.append(
            f"caught up: {swept['compared']:,} keys compared, {swept['brought']:,} brought over"
        )
    if verified := facts.get("verified"):
        lines.append(
            f"verified: {verified['compared']:,} keys compared, {verified['mismatches']:,} differ"
        )
    for name, text in (("switched_to_new", "cut over"), ("switched_to_old", "rolled back")):
        if switched := facts.get(name):
            lines.append(f"{text}: values waited at most {switched['pause_s'] * 1000:,.0f} ms")
    if watched := facts.get("watched"):
        lines.append(f"watched: {escape(watched['note'])}")
    if reason := facts.get("reason"):
        lines.append(f"reason: {escape(reason)}")
    if cleaned := facts.get("cleaned"):
        lines.append(
            f"cleaned: {cleaned['removed']:,} old copies removed, {cleaned['kept']:,} kept"
        )
    return lines


def render_report(found: Resharding, history: Sequence[AuditRow], console: Console) -> None:
    """Print what a re-sharding was, and what happened when."""
    share = found.plan.get("percentage_to_move", 0)
    console.print(
        f"re-sharding {found.id} of [bold]{escape(found.set_name)}[/]:"
        f" {len(found.old.connections)} → {len(found.new.connections)} shards,"
        f" {found.plan.get('total_keys_to_move', 0):,} keys planned to move ({share} %)"
    )
    for line in _facts(found):
        console.print(f"  {line}")
    table = Table(
        "when (UTC)", "what", "state", "by", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for one in history:
        if one.resharding != found.id or one.action == "lease":
            continue
        state = NAMES[ShardState(one.to_state)] if one.to_state else ""
        what = one.action + (f": {one.reason}" if one.reason else "")
        table.add_row(f"{one.at.astimezone(UTC):%H:%M:%S.%f}"[:-3], escape(what), state, one.actor)
    console.print(table)
    ended = (found.ended or "still going on").replace("_", " ")
    console.print(f"[bold]{ended}[/], state {NAMES[found.state]}")


def duration(seconds: float) -> str:
    """Return a time as a person would say it: `2 min 5 s`."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    parts = []
    left = round(seconds)
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def _left(found: Resharding) -> str:
    seconds = found.ttl_left_s or 0.0
    return duration(seconds) if seconds > 0 else ""
