"""Where the servers of a move stand at a moment: LSNs, replication offsets, who they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cellferry.errors import CellferryError
from cellferry.model import Cell

#: Facts of a migration whose name begins so hold positions.
FACT = "positions_"


def positions(cells: Iterable[Cell], kinds: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return by cell and store where its server stands. Read-only, and never fails.

    A server that does not answer has `error` instead: a step does not fail for its evidence.
    """
    wanted = list(kinds)
    return {cell.name: {kind: _position(cell, kind) for kind in wanted} for cell in cells}


def _position(cell: Cell, kind: str) -> Mapping[str, Any]:
    ask = _source(kind)
    if ask is None:
        return {"error": f"store {kind} does not say where it stands"}
    try:
        return ask(cell)
    except CellferryError as error:
        return {"error": f"{type(error).__name__}: {error.message}"}


def _source(kind: str) -> Callable[[Cell], Mapping[str, Any]] | None:
    if kind == "postgres":
        from cellferry.stores.postgres import observation as postgres

        return postgres.position
    if kind == "redis":
        from cellferry.stores.redis import observation as redis

        return redis.position
    return None
