"""Primary keys as arrays of text: the one form in which keys are logged, sent and compared.

Each key column's text is independent of session settings (DateStyle, TimeZone, …), so that an
application's odd settings cannot change what the gate's trigger logs.
"""

from __future__ import annotations

import re
from functools import lru_cache

from psycopg import sql

from cellferry.stores.postgres.rendering import rendered
from cellferry.stores.postgres.schema import Column, Table

#: Types whose plain cast to text depends on no setting.
_STABLE = (
    "smallint", "integer", "bigint", "numeric", "uuid", "text", "character varying", "character",
    "boolean", "oid", "name", "inet", "cidr", "macaddr", "\"char\"",
)  # fmt: skip

#: Types of which equal values have one text, the first word of them.
_SPELLED_ONCE = frozenset({
    "smallint", "integer", "bigint", "uuid", "text", "character", "boolean", "oid", "name", "inet",
    "cidr", "macaddr", "\"char\"", "bytea", "date", "time", "timestamp",
})  # fmt: skip


def is_spelled_once(column: Column) -> bool:
    """Whether equal values of `column` have the same text: not so `citext`, or `numeric` 1.0."""
    return re.split(r"[ (]", column.type)[0] in _SPELLED_ONCE and column.deterministic


@lru_cache(4096)
def key_array(table: Table, row: str) -> sql.Composed:
    """Return a `text[]` expression: the primary key of the row called `row`."""
    return rendered(
        sql.SQL("ARRAY[{}]").format(
            sql.SQL(", ").join(key_text(table.column(name), row) for name in table.primary_key)
        )
    )


def key_text(column: Column, row: str) -> sql.Composed:
    """Return a text expression for one key column of `row`, stable under any settings."""
    record = sql.SQL(row) if row in {"NEW", "OLD"} else sql.Identifier(row)
    value = sql.SQL("{}.{}").format(record, sql.Identifier(column.name))
    if column.type.split("(")[0] in _STABLE:
        return sql.SQL("{}::text").format(value)
    # Names are qualified: the gate's triggers run with their owner's rights, whatever the path is.
    if column.type == "bytea":
        return sql.SQL("('\\x' OPERATOR(pg_catalog.||) pg_catalog.encode({}, 'hex'))").format(value)
    if column.type.startswith("timestamp") and column.type.endswith("with time zone"):
        # in UTC whatever the application's TimeZone is
        return sql.SQL(
            "(CASE WHEN pg_catalog.isfinite({0}) THEN (pg_catalog.to_jsonb("
            "pg_catalog.timezone('UTC', {0})) OPERATOR(pg_catalog.#>>) '{{}}')"
            " OPERATOR(pg_catalog.||) '+00:00' ELSE {0}::text END)"
        ).format(value)
    # to_jsonb writes dates and times in ISO 8601 whatever DateStyle says
    return sql.SQL("(pg_catalog.to_jsonb({}) OPERATOR(pg_catalog.#>>) '{{}}')").format(value)
