"""Shows a data map to people: as a table, and as YAML to review and keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from rich.console import Console, Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from cellferry.stores.postgres.schema import DataMap, OwnerPath, Placement, Table


def render_for_review(data_map: DataMap) -> str:
    """Return the map as a data map file that, when read back, gives the same map.

    Everything that was discovered is written out, so that a reviewer sees it and a later change
    of the schema shows as an error or a difference instead of a silently different move.
    """
    unplaced = {one.table for one in data_map.refusals if one.code == "unplaced"}
    placed = {
        placement.value: sorted(
            {str(table.name) for table in data_map.placed(placement)} - unplaced
        )
        for placement in (Placement.REFERENCED, Placement.GLOBAL, Placement.CELL_LOCAL)
    }
    document: dict[str, Any] = {
        "version": 1,
        "organization": {
            "table": str(data_map.organization_table),
            "column": data_map.organization_column,
        },
        "placement": {placement: tables for placement, tables in placed.items() if tables},
        "foreign_keys": [
            {
                "table": str(key.child),
                "columns": list(key.columns),
                "references": str(key.parent),
                "referenced_columns": list(key.parent_columns),
            }
            for key in data_map.foreign_keys
            if not key.declared and not key.optional
        ],
        "tables": {
            str(table.name): stated for table in data_map.tables if (stated := _stated(table))
        },
    }
    document = {key: value for key, value in document.items() if value}
    remarks = [
        f"# {'REFUSED' if one.fatal else 'note'}: {one.table}: {one.reason}. Remedy: {one.remedy}."
        for one in data_map.refusals
    ]
    local = len(placed[Placement.CELL_LOCAL])
    header = [
        "# The data map, as discovered. Review it, then keep it beside cells.yaml.",
        (
            f"# {len(data_map.owned)} owned, {len(data_map.referenced)} referenced,"
            f" {len(placed[Placement.GLOBAL])} global, {local} cell-local,"
            f" {len(unplaced)} without a place."
        ),
        *remarks,
    ]
    body = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)
    return "\n".join(header) + "\n" + body


def _stated(table: Table) -> Mapping[str, Any]:
    if table.placement is not Placement.OWNED:
        return {}
    owners: list[dict[str, Any]] = []
    for path in table.owners:
        owner: dict[str, Any]
        if path.hops:
            hop = path.hops[0]
            owner = {
                "through": str(hop.parent),
                "columns": list(hop.columns),
                "through_columns": list(hop.parent_columns),
            }
        else:
            owner = {"column": path.column}
        if path.when is not None:
            owner["when"] = path.when
        if owner not in owners:  # paths that part further up are the parent's
            owners.append(owner)
    return {"owners": owners}


def show(data_map: DataMap) -> RenderableType:
    """Return the map for a terminal: every table, whose its rows are, and what is wrong."""
    grid = Grid(title="Data map", title_justify="left")
    for heading in ("table", "placement", "key", "whose rows"):
        grid.add_column(heading, overflow="fold")
    grid.add_column("rows (estimate)", justify="right")
    for table in data_map.tables:
        grid.add_row(
            Text(str(table.name)),
            Text(table.placement.value),
            Text(", ".join(table.primary_key) or "none"),
            Text("\n".join(describe_path(path) for path in table.owners)),
            f"{table.estimated_rows:,}",
        )
    lines: list[RenderableType] = [
        Text(
            f"organizations: {data_map.organization_table}.{data_map.organization_column}"
            f" ({data_map.organization_type})"
        ),
        grid,
    ]
    if data_map.refusals:
        problems = Grid(title="Refused, and notes for the reviewer", title_justify="left")
        for heading in ("", "table", "reason", "remedy"):
            problems.add_column(heading, overflow="fold")
        for one in sorted(data_map.refusals, key=lambda one: (not one.fatal, one.table)):
            problems.add_row(
                Text("refused" if one.fatal else "note", style="red" if one.fatal else ""),
                Text(one.table),
                Text(one.reason),
                Text(one.remedy),
            )
        lines.append(problems)
    return Group(*lines)


def describe_path(path: OwnerPath) -> str:
    """Return a path in words: `issue_id → public.issues, project_id → public.projects: org_id`."""
    steps = [f"{', '.join(hop.columns)} → {hop.parent}" for hop in path.hops]
    text = f"{', '.join(steps)}: {path.column}" if steps else path.column
    return f"{text} when {path.when}" if path.when else text


def print_map(data_map: DataMap, console: Console | None = None) -> None:
    """Print `show` to the terminal."""
    (console or Console()).print(show(data_map))
