"""The preflight: everything that would make a move fail or do harm, found before it starts.

It changes nothing: every statement only reads. A check that cannot run (a
table that may not be read, or that differs between the cells) is left out for that table only,
and the reason is one of the blockers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import psycopg

from cellferry.model import Blocker, Cell, Part, Side
from cellferry.stores.postgres import (
    cell_conditions,
    collisions,
    crossings,
    schema_differences,
    shared_rows,
)
from cellferry.stores.postgres.catalog import read_catalog
from cellferry.stores.postgres.examination import Examination, Site
from cellferry.stores.postgres.inventory import inventory
from cellferry.stores.postgres.schema import DataMap
from cellferry.stores.postgres.triggers import installations

__all__ = ["inventory", "preflight"]

INDEX_FACTOR = 1.6
"""What indexes and free space add to the bytes of the rows, as a rule of thumb."""


def preflight(
    source: psycopg.Connection[Any],
    destination: psycopg.Connection[Any],
    data_map: DataMap,
    destination_map: DataMap,
    organization: str,
    *,
    source_cell: Cell,
    destination_cell: Cell,
    ignore_schemas: Collection[str] = (),
    parts: Sequence[Part] | None = None,
) -> tuple[Blocker, ...]:
    """Find what blocks the move of `organization`. Repeatable; changes nothing.

    Args:
        source: session of the mover's role at the source, not in a transaction.
        destination: the same at the destination.
        data_map: discovered at the source; says what moves.
        destination_map: discovered at the destination; says what needs a gate there.
        organization: canonical text of its key.
        source_cell: its name is used in messages, its store's options are obeyed.
        destination_cell: the same; option `capacity_bytes` bounds its database.
        ignore_schemas: as in the data map's file.
        parts: the inventory, if the caller has it; it is taken here otherwise.

    Returns:
        Blockers and warnings, the fatal ones first.
    """
    examination = Examination(
        source=Site(source_cell, source, read_catalog(source, ignore_schemas=ignore_schemas)),
        destination=Site(
            destination_cell,
            destination,
            read_catalog(destination, ignore_schemas=ignore_schemas),
        ),
        data_map=data_map,
        organization=organization,
    )
    found = list(_conditions(examination, destination_map))
    unknown = list(cell_conditions.check_organization(examination))
    found.extend(unknown)
    if not unknown:
        found.extend(_rows(examination, parts))
    return tuple(sorted(dict.fromkeys(found), key=lambda blocker: not blocker.fatal))


def _conditions(examination: Examination, destination_map: DataMap) -> Iterator[Blocker]:
    data_map, (source, destination) = examination.data_map, examination.sites
    yield from _refusals(source, data_map, frozenset())
    # The way back goes by the destination's map.
    yield from _refusals(destination, destination_map, {one.table for one in data_map.refusals})
    both = {installations(one): one for one in (data_map, destination_map)}
    yield from cell_conditions.check_cell(examination, source, Side.SOURCE, [data_map])
    yield from cell_conditions.check_cell(examination, destination, Side.DESTINATION, both.values())
    yield from schema_differences.find_differences(examination)
    yield from cell_conditions.check_sequences(examination)


def _refusals(site: Site, data_map: DataMap, told: Collection[str]) -> Iterator[Blocker]:
    for refusal in data_map.refusals:
        if refusal.fatal and refusal.table not in told:
            yield Blocker(
                refusal.code,
                f"{site.cell.name}/postgres {refusal.table}",
                refusal.reason,
                refusal.remedy,
            )


def _rows(examination: Examination, parts: Sequence[Part] | None) -> Iterator[Blocker]:
    yield from crossings.find_unowned(examination)
    yield from crossings.find_crossings(examination)
    yield from collisions.leftovers(examination)
    yield from collisions.find_collisions(examination)
    yield from shared_rows.compare_global(examination)
    yield from shared_rows.compare_referenced(examination)
    if "capacity_bytes" in examination.destination.cell.stores["postgres"].options:
        if parts is None and not examination.unusable:
            parts = inventory(
                examination.source.connection, examination.data_map, examination.organization
            )
        incoming = sum(part.bytes for part in parts or ()) * INDEX_FACTOR
        yield from cell_conditions.check_room(examination.destination, round(incoming))
