"""The plan step: a dry run that looks at everything and changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cellferry.errors import AccessDenied, Blocked, InvalidInput, NotPrepared
from cellferry.migration import smoke_queries
from cellferry.migration.context import Context, StepProgress
from cellferry.migration.options import MoveOptions
from cellferry.migration.rates import Rates, measured_rates
from cellferry.migration.result import plain
from cellferry.model import (
    Blocker,
    Inventory,
    Move,
    Organization,
    Resource,
    Resources,
    State,
    Strategy,
)

#: Up to this share of the pause budget, moving everything under the gate is the simpler way.
FREEZE_FIRST_SHARE = 0.2
#: Under the gate each table or kind of key costs its round trips, in seconds.
PART_OVERHEAD_S = 0.02


@dataclass(frozen=True, slots=True)
class Plan:
    """What a move would do.

    Attributes:
        migration: the recorded migration, None for a dry run.
        copy_s, pause_s: estimates in seconds; `basis` says what they rest on.
    """

    organization: Organization
    source: str
    destination: str
    strategy: Strategy
    strategy_reason: str
    inventories: Mapping[str, Inventory]
    blockers: tuple[Blocker, ...]
    copy_s: float
    pause_s: float
    basis: str
    migration: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fatal(self) -> tuple[Blocker, ...]:
        """The blockers that keep the move from starting."""
        return tuple(blocker for blocker in self.blockers if blocker.fatal)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON's types, with totals."""
        result: dict[str, Any] = plain(self)
        result["totals"] = {
            kind: {"count": found.count, "unit": found.unit, "bytes": found.bytes}
            for kind, found in self.inventories.items()
        }
        return result


class _Nothing(Resources):
    """A dry run makes nothing."""

    def intend(self, resource: Resource) -> None:
        raise Blocked(f"a dry run must not make {resource}")

    def forget(self, resource: Resource) -> None:
        raise Blocked(f"a dry run must not remove {resource}")


def plan(
    context: Context,
    organization: str,
    destination: str,
    *,
    options: MoveOptions,
    record: bool = False,
) -> Plan:
    """Say what would move, how much, how long, how long the pause, and what blocks it.

    Changes nothing, unless `record` is true and nothing blocks: then the migration is created in
    the topology, as `planned`. Repeating it with `record` returns the live migration.

    Args:
        organization: id or slug.
        destination: name of a cell.

    Raises:
        InvalidInput: unknown organization or cell, the destination is where it lives already, or
            it is being moved.
        Unreachable: a server of either cell does not answer.
        AccessDenied: a cell's PostgreSQL refuses the connection.
        Blocked: `record` was asked for and something blocks; all reasons are named.
        Halted: one of the two cells, or the cohort, is halted.
    """
    topology = context.topology
    found = topology.organization(organization)
    context.settings.cell(destination, context.connections)
    live = topology.live_migration(found.id)
    if live is not None and live.destination == destination and record:
        return _recorded(context, live.id)
    if live is not None:
        # refused here, not only when recorded: a dry run must say so too
        raise already_moving(found, live.id, live.source, live.destination, live.state)
    source = topology.route(found.id).cell
    if source == destination:
        raise InvalidInput(
            f"organization {found.slug} lives in {destination} already",
            organization=found.slug,
            step="plan",
            hint="choose another destination",
        )
    topology.insist_on_start((source, destination), options.cohort)
    queries = smoke_queries.of(context)
    move = context.dry_move(found, source, destination, options)
    inventories: dict[str, Inventory] = {}
    blockers: list[Blocker] = []
    progress = StepProgress(context, found.slug, 0, 0)
    for kind, store in context.stores.items():
        try:
            with store.open(move, _Nothing(), progress, continues=True) as opened:
                inventories[kind] = opened.inventory()
                blockers.extend(inventories[kind].blockers)
                if opened.asks_early:
                    smoke_queries.rehearse(context, kind, opened, queries)
        except (AccessDenied, NotPrepared):
            # What is not prepared cannot be counted; the blockers say what to do.
            unprepared = [*store.check_cell(move.source), *store.check_cell(move.destination)]
            if not any(blocker.fatal for blocker in unprepared):
                raise
            blockers.extend(unprepared)
    rates = measured_rates(topology, context.settings.store_kinds)
    strategy, reason = choose_strategy(options, inventories, rates)
    report = Plan(
        organization=found,
        source=source,
        destination=destination,
        strategy=strategy,
        strategy_reason=reason,
        inventories=inventories,
        blockers=tuple(dict.fromkeys(blockers)),
        copy_s=round(_copy_seconds(inventories, rates, move), 1),
        pause_s=round(_pause_seconds(strategy, inventories, rates), 3),
        basis=rates.basis,
        options=options.model_dump(),
    )
    if not record:
        return report
    if report.fatal:
        raise Blocked(
            f"{_count(len(report.fatal))} the move: "
            + "; ".join(f"{one.where}: {one.reason}" for one in report.fatal),
            organization=found.slug,
            step="plan",
            hint="; ".join(dict.fromkeys(one.remedy for one in report.fatal)),
        )
    created = topology.create_migration(
        found.id,
        destination,
        strategy,
        options.model_dump(),
        report.as_dict(),
        context.actor,
        cohort=options.cohort,
    )
    return replace(report, migration=created.id)


def _count(blockers: int) -> str:
    return "1 thing blocks" if blockers == 1 else f"{blockers} things block"


def already_moving(
    organization: Organization, migration: int, source: str, destination: str, state: State
) -> InvalidInput:
    """The error for a second migration of the same organization (invariant 4)."""
    return InvalidInput(
        f"organization {organization.slug} is already moving from {source} to {destination} "
        f"(migration {migration}, {state})",
        organization=organization.slug,
        step="plan",
        hint=f"wait for it, or give it up first: cellferry abort {organization.slug}",
    )


def choose_strategy(
    options: MoveOptions, inventories: Mapping[str, Inventory], rates: Rates
) -> tuple[Strategy, str]:
    """Return the strategy and the reason for it, in plain words."""
    if options.strategy != "auto":
        return Strategy(options.strategy), "set by the operator"
    under_gate = _under_gate_seconds(inventories, rates)
    bound = options.pause_budget_ms / 1_000 * FREEZE_FIRST_SHARE
    if under_gate <= bound:
        return (
            Strategy.FREEZE_FIRST,
            f"so small that everything moves under the gate in about {under_gate * 1000:.0f} ms",
        )
    return (
        Strategy.ONLINE,
        f"under the gate it would take about {under_gate:.1f} s, over {bound * 1000:.0f} ms",
    )


def _under_gate_seconds(inventories: Mapping[str, Inventory], rates: Rates) -> float:
    # everything is copied, then read twice more to be compared
    return sum(
        2 * found.count / rates.copy_per_s[kind] + PART_OVERHEAD_S * len(found.parts)
        for kind, found in inventories.items()
    )


def _copy_seconds(inventories: Mapping[str, Inventory], rates: Rates, move: Move) -> float:
    bounds = {"rows": move.throttle.rows_per_s, "keys": move.throttle.keys_per_s}
    return sum(
        found.count / min(rates.copy_per_s[kind], bounds.get(found.unit) or float("inf"))
        for kind, found in inventories.items()
    )


def _pause_seconds(strategy: Strategy, inventories: Mapping[str, Inventory], rates: Rates) -> float:
    if strategy is Strategy.FREEZE_FIRST:
        return rates.pause_s + _under_gate_seconds(inventories, rates)
    return rates.pause_s


def _recorded(context: Context, migration_id: int) -> Plan:
    """Return the plan of a migration that exists, for a repeated plan step."""
    migration = context.topology.migration(migration_id)
    kept: Mapping[str, Any] = migration.facts.get("plan", {})
    return Plan(
        organization=migration.organization,
        source=migration.source,
        destination=migration.destination,
        strategy=migration.strategy,
        strategy_reason=kept.get("strategy_reason", "as planned before"),
        inventories={},
        blockers=(),
        copy_s=kept.get("copy_s", 0.0),
        pause_s=kept.get("pause_s", 0.0),
        basis=kept.get("basis", "as planned before"),
        migration=migration.id,
        options=migration.options,
    )
