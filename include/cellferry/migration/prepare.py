"""Preparing a cell for moves, and taking everything out again."""

from __future__ import annotations

from typing import Any

from cellferry.migration.context import Context, StepProgress
from cellferry.migration.result import plain
from cellferry.model import Blocker


def prepare_cell(context: Context, cell: str) -> dict[str, Any]:
    """Install what `cell` needs in each of its stores (gates, roles, ACLs); may be repeated.

    Never stalls production: it gives way to the application's transactions and tries again.

    Raises:
        InvalidInput: no such cell.
        NotPrepared: a prerequisite is missing; the remedy is named.
    """
    resolved = context.settings.cell(cell, context.connections)
    context.topology.register_cell(resolved.name, resolved.region, resolved.legacy)
    progress = StepProgress(context, cell, 0, 0)
    return {
        kind: plain(store.prepare_cell(resolved, progress))
        for kind, store in context.stores.items()
    }


def unprepare_cell(context: Context, cell: str) -> dict[str, Any]:
    """Take everything that `prepare_cell` installed out of `cell` again.

    Raises:
        Blocked: an organization is gated there.
    """
    resolved = context.settings.cell(cell, context.connections)
    progress = StepProgress(context, cell, 0, 0)
    return {
        kind: plain(store.unprepare_cell(resolved, progress))
        for kind, store in context.stores.items()
    }


def check_cell(context: Context, cell: str) -> tuple[Blocker, ...]:
    """Say what `cell` lacks; read-only."""
    resolved = context.settings.cell(cell, context.connections)
    return tuple(
        blocker for store in context.stores.values() for blocker in store.check_cell(resolved)
    )
