"""The check list of the cutover: the runbook's, and what it forgets."""

from __future__ import annotations

import time
from dataclasses import dataclass

from cellferry.errors import CellferryError, InvalidInput
from cellferry.shards.context import Context
from cellferry.shards.plan import Plan
from cellferry.shards.record import Resharding
from cellferry.shards.server import open_shard
from cellferry.shards.sides import open_side
from cellferry.shards.states import ShardState

_FULL = 0.9


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the cutover's check list."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def check(at: Context, id_: int) -> list[Check]:
    """Return the check list of the cutover. Changes nothing, and takes no lease."""
    found = at.control.resharding(id_)
    planned = Plan.from_document(found.plan)
    facts = found.facts
    return [
        _check_ring(at, found, planned),
        _check_health(at, found),
        _check_room(at, found),
        Check(
            "Keys copied",
            all(f"copied {shard}" in facts for shard in planned.sources),
            f"{sum(f'copied {shard}' in facts for shard in planned.sources)} of"
            f" {len(planned.sources)} sources",
            f"cellferry reshard copy {found.set_name}",
        ),
        Check(
            "Dual-write active",
            found.state is ShardState.DUAL_READ_OLD,
            f"state {found.state}",
            f"cellferry reshard dual-write {found.set_name}",
        ),
        _check_clients(at, found),
        _check_verified(found),
    ]


def _check_ring(at: Context, found: Resharding, planned: Plan) -> Check:
    try:
        planned.check_ring(at.control.set(found.set_name))
    except InvalidInput as error:
        return Check("Ring topology valid", False, error.message, error.hint or "")
    shards = len(found.new.connections)
    return Check(
        "Ring topology valid", True, f"{len(found.old.connections)} → {shards} shards, plan fits"
    )


def _check_health(at: Context, found: Resharding) -> Check:
    slowest = 0.0
    for one in (found.old, found.new):
        for shard in one.connections:
            begun = time.monotonic()
            try:
                server = open_shard(one.kind, shard, one.connections, at.source)
                try:
                    server.ping()
                finally:
                    server.close()
            except CellferryError as error:
                return Check(
                    "All shards healthy", False, f"{shard}: {error.message}", error.hint or ""
                )
            slowest = max(slowest, time.monotonic() - begun)
    count = len({*found.old.connections.values(), *found.new.connections.values()})
    return Check(
        "All shards healthy", True, f"{count} answer, the slowest in {slowest * 1000:.0f} ms"
    )


def _check_room(at: Context, found: Resharding) -> Check:
    """See that no new owner is full by now, or would throw keys away."""
    worst = ""
    for shard in found.new.connections:
        side = open_side(found.new, shard, at.source)
        try:
            facts = side.facts()
        except CellferryError as error:
            return Check("Memory and eviction", False, f"{shard}: {error.message}")
        finally:
            side.close()
        if facts.evicts and facts.limit_bytes:
            return Check(
                "Memory and eviction",
                False,
                f"{shard} evicts by {facts.evicts}: an evicted id is accepted again",
                "set maxmemory-policy noeviction",
            )
        if facts.limit_bytes and facts.used_bytes > facts.limit_bytes * _FULL:
            return Check(
                "Memory and eviction",
                False,
                f"{shard} uses {facts.used_bytes / facts.limit_bytes:.0%} of its memory",
                "raise maxmemory",
            )
        if not facts.limit_bytes and facts.engine != "postgres":
            worst = "; of some no limit is set"
    return Check("Memory and eviction", True, f"no shard is full or evicts{worst}")


def _check_clients(at: Context, found: Resharding) -> Check:
    clients = at.control.clients(found.id)
    behind = [one.name for one in clients if one.is_behind]
    if behind:
        return Check(
            "State acknowledged by every client",
            False,
            f"{', '.join(behind)} lag",
            f"wait, or cellferry reshard status {found.set_name}",
        )
    return Check(
        "State acknowledged by every client", True, f"{len(clients)} at epoch {found.epoch}"
    )


def _check_verified(found: Resharding) -> Check:
    verified = found.facts.get("verified") or {}
    remedy = f"cellferry reshard verify {found.set_name}"
    if not verified.get("complete") or verified.get("state") != ShardState.DUAL_READ_OLD:
        return Check("No mismatch", False, "not everything was compared in this state", remedy)
    wrong = verified["mismatches"]
    return Check(
        "No mismatch",
        not wrong,
        f"{verified['compared']:,} keys compared at {verified['at'][11:19]} UTC, {wrong:,} differ",
        remedy,
    )
