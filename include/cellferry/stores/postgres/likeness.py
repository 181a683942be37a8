"""Whether a row here and a row there, with the same key, are the same thing.

Cells number their rows on their own. Two rows with the same key of which every unique value
differs (two users with the same id and different e-mail addresses) are two things.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from psycopg import sql

from cellferry.stores.postgres.row_keys import key_array, key_text
from cellferry.stores.postgres.schema import Table, Unique
from cellferry.stores.postgres.scope import column_list


def telling_uniques(table: Table) -> list[Unique]:
    """Return the unique keys by which rows are known, besides the primary key."""
    return [
        one
        for one in table.uniques
        if not one.exclusion and one.columns and set(one.columns) != set(table.primary_key)
    ]


def outline(table: Table) -> sql.Composed:
    """Return a select list over the row `t`: its key, its hash, and each unique key's values.

    The values are NULL where the unique key does not hold for the row. Conditions of partial
    indexes name bare columns: there must be no other relation with such columns.
    """
    ordered = sorted(table.columns, key=lambda column: column.name)
    return sql.SQL(", ").join(
        [
            key_array(table, "t"),
            sql.SQL("hashtextextended((ROW({}))::text, 0)").format(column_list(ordered)),
            *(
                sql.SQL("CASE WHEN {} THEN ARRAY[{}] END").format(
                    sql.SQL(one.predicate) if one.predicate else sql.SQL("true"),
                    sql.SQL(", ").join(
                        sql.SQL("{}::text").format(key_text(table.column(name), "t"))
                        for name in one.columns
                    ),
                )
                for one in telling_uniques(table)
            ),
        ]
    )


def are_strangers(mine: Sequence[Any], its: Sequence[Any]) -> bool:
    """Whether two rows with the same key are two things, by the unique values of `outline`."""
    pairs = [
        (here, there)
        for here, there in zip(mine, its, strict=True)
        if here is not None and there is not None and None not in here
    ]
    return bool(pairs) and all(here != there for here, there in pairs)
