"""How much an organization has: rows and bytes of every table, on one side."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import tuple_row

from cellferry.model import Part
from cellferry.stores.postgres.ownership import owned_by
from cellferry.stores.postgres.schema import DataMap, ForeignKey, Placement, Table

SAMPLE_ROWS = 1_000
"""Rows whose size is measured; the others are assumed to be like them."""

#: A row's header, its place in the page and its primary-key index entry.
ROW_OVERHEAD_BYTES = 28


def inventory(
    connection: psycopg.Connection[Any], data_map: DataMap, organization: str
) -> tuple[Part, ...]:
    """Count the organization's rows exactly, and estimate their bytes. Changes nothing.

    Referenced tables count the rows that owned rows refer to directly.

    Args:
        organization: canonical text of its key.

    Returns:
        One part for each owned and each referenced table, in map order.
    """
    parts: list[Part] = []
    for table in (*data_map.owned, *data_map.referenced):
        condition = shared_or_owned(data_map, table, organization)
        if condition is None:
            continue
        with (
            connection.transaction(),
            connection.cursor(row_factory=tuple_row) as cursor,
        ):
            cursor.execute("SELECT set_config('transaction_read_only', 'on', true)")
            counted = cursor.execute(
                sql.SQL("SELECT count(*) FROM {} AS t WHERE {}").format(
                    table.name.identifier, condition
                )
            ).fetchone()
            count: int = counted[0] if counted else 0
            size = _row_bytes(cursor, table, condition) if count else 0.0
        parts.append(
            Part(
                name=str(table.name),
                count=count,
                bytes=round(count * (size + ROW_OVERHEAD_BYTES)),
                placement=table.placement.value,
            )
        )
    return tuple(parts)


def _row_bytes(
    cursor: psycopg.Cursor[tuple[Any, ...]], table: Table, condition: sql.Composable
) -> float:
    """Average size of a row, of the first that are found."""
    found = cursor.execute(
        sql.SQL(
            "SELECT avg(pg_column_size(s.*))::float8"
            " FROM (SELECT t.* FROM {} AS t WHERE {} LIMIT {}) AS s"
        ).format(table.name.identifier, condition, sql.Literal(SAMPLE_ROWS))
    ).fetchone()
    return float(found[0]) if found and found[0] is not None else 0.0


def shared_or_owned(data_map: DataMap, table: Table, organization: str) -> sql.Composable | None:
    """Return a condition on the row called `t`: owned by the organization, or referred to by it.

    None for a table that is neither owned nor referred to.
    """
    if table.placement is Placement.OWNED:
        return owned_by(data_map, table, "t", organization)
    keys = [
        key
        for key in data_map.foreign_keys
        if key.parent == table.name
        and not key.temporal
        and data_map.by_name[key.child].placement is Placement.OWNED
    ]
    if len(keys) < 2:
        return _referred(data_map, keys[0], "t", organization) if keys else None
    # Each way is joined by itself: an OR of them would be tested row by row, and where one yields
    # more keys than fit into work_mem, it would be read anew for every row.
    return sql.SQL("(t.tableoid, t.ctid) IN ({})").format(
        sql.SQL(" UNION ").join(
            sql.SQL("SELECT p.tableoid, p.ctid FROM {} AS p WHERE {}").format(
                table.name.identifier, _referred(data_map, key, "p", organization)
            )
            for key in keys
        )
    )


def _referred(data_map: DataMap, key: ForeignKey, row: str, organization: str) -> sql.Composed:
    child = data_map.by_name[key.child]

    def columns(names: tuple[str, ...], alias: str) -> sql.Composed:
        return sql.SQL(", ").join(sql.Identifier(alias, name) for name in names)

    return sql.SQL("({}) IN (SELECT {} FROM {} AS c WHERE {})").format(
        columns(key.parent_columns, row),
        columns(key.columns, "c"),
        child.name.identifier,
        owned_by(data_map, child, "c", organization),
    )
