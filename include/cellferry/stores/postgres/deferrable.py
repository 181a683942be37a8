"""Deferrable unique keys and exclusion constraints: the replica role does not check them.

A row that violates another constraint is refused at once. One that violates a deferrable one goes
in, since its check is a trigger, which does not fire for the mover.
"""

from __future__ import annotations

from psycopg import sql

from cellferry.stores.postgres.schema import Table, Unique
from cellferry.stores.postgres.scope import keys_match


def violations(table: Table, unique: Unique, keys: sql.Composable) -> sql.Composed:
    """Return a query that finds rows that conflict with another row of their table.

    Args:
        keys: the keys of the rows, as the relation `k`.
    """
    return sql.SQL(
        "SELECT 1 FROM (SELECT t.*, {values} FROM {table} AS t WHERE {condition}) AS t"
        " JOIN (SELECT t.*, {values} FROM {table} AS t WHERE {condition}) AS s"
        " ON {conflict} AND NOT ({itself}) JOIN {keys} ON {match}"
    ).format(
        values=sql.SQL(", ").join(
            # Printed by the server itself, from its catalog.
            sql.SQL("({}) AS {}").format(sql.SQL(expression), sql.Identifier(f"cf_e{number}"))
            for number, expression in enumerate(unique.expressions)
        ),
        table=table.name.identifier,
        condition=sql.SQL(unique.predicate or "true"),
        conflict=sql.SQL(" AND ").join(
            _conflict(unique, number) for number in range(len(unique.expressions))
        ),
        itself=sql.SQL(" AND ").join(
            sql.SQL("{} = {}").format(sql.Identifier("t", name), sql.Identifier("s", name))
            for name in table.primary_key
        ),
        keys=keys,
        match=keys_match(table, "s"),
    )


def _conflict(unique: Unique, number: int) -> sql.Composed:
    one, other = (sql.Identifier(row, f"cf_e{number}") for row in "ts")
    if unique.operators:
        return sql.SQL("{} {} {}").format(one, sql.SQL(unique.operators[number]), other)
    equal = sql.SQL("{} = {}").format(one, other)
    if unique.nulls_equal:
        return sql.SQL("({} OR ({} IS NULL AND {} IS NULL))").format(equal, one, other)
    return equal
