"""What an application of keys says; statements of the general way, and one for missing parents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from psycopg import sql

from cellferry.stores.postgres.row_keys import key_text
from cellferry.stores.postgres.schema import ForeignKey, Table
from cellferry.stores.postgres.scope import (
    Key,
    Scope,
    keys_join,
    keys_match,
    keys_relation,
    row_hash,
)

#: Keys by relation, as the key log has them; and by table.
Keys = Mapping[str, set[Key]]
Dirty = Mapping[Table, set[Key]]


@dataclass
class Applied:
    """What one application changed and compared."""

    keys: int = 0
    rows: int = 0
    bytes: int = 0
    compared: int = 0
    hashes: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, more: Applied) -> None:
        """Count what another application did as well."""
        self.keys += more.keys
        self.rows += more.rows
        self.bytes += more.bytes
        self.compared += more.compared
        self.hashes.update(more.hashes)


def deletes(scope: Scope, pending: Dirty) -> sql.Composed:
    """Return one statement that deletes all keys, each guarded by the organization.

    Every part of it sees the tables as before, so the guard of a child still finds its parents,
    whatever the order and whatever cycles there are.
    """
    parts = [
        sql.SQL("{} AS (DELETE FROM {} AS t USING {} WHERE {} AND {})").format(
            sql.Identifier(f"d{number}"),
            table.name.identifier,
            keys_relation(table, some),
            keys_match(table),
            scope.owned(table),
        )
        for number, (table, some) in enumerate(pending.items())
    ]
    return sql.SQL("WITH {} SELECT 1").format(sql.SQL(", ").join(parts))


def digests(scope: Scope, keys: Dirty) -> sql.Composed:
    """Return one query: for each table its name, and count and hash of the keys' rows."""
    return sql.SQL(" UNION ALL ").join(
        sql.SQL(
            "SELECT {}::text, count(*), COALESCE(sum({}), 0)::text FROM {} AS t {} WHERE {}"
        ).format(
            sql.Literal(str(table.name)),
            row_hash(table),
            table.name.identifier,
            keys_join(table, some),
            scope.concerned(table),
        )
        for table, some in keys.items()
    )


def dangling(
    number: int,
    table: Table,
    foreign_key: ForeignKey,
    join: sql.Composable,
    *,
    condition: sql.Composable | None = None,
    select: sql.Composable | None = None,
) -> sql.Composed:
    """Return a SELECT of the rows `t` of `table` whose foreign key leads to no row.

    Args:
        number: what the first column is: which of several such statements a row comes from.
        table: the child.
        foreign_key: one of its foreign keys.
        join: what follows `FROM table AS t`, or nothing.
        condition: which rows; by default all.
        select: the second column; by default the values of the foreign key.
    """
    present = sql.SQL(" AND ").join(
        sql.SQL("{} IS NOT NULL").format(sql.Identifier("t", column))
        for column in foreign_key.columns
    )
    tie = sql.SQL(" AND ").join(
        sql.SQL("{} = {}").format(sql.Identifier("p", theirs), sql.Identifier("t", ours))
        for ours, theirs in zip(foreign_key.columns, foreign_key.parent_columns, strict=True)
    )
    values = sql.SQL("ARRAY[{}]").format(
        sql.SQL(", ").join(key_text(table.column(column), "t") for column in foreign_key.columns)
    )
    return sql.SQL(
        "SELECT DISTINCT {}, {} FROM {} AS t {} WHERE {} AND {}"
        " AND NOT EXISTS (SELECT 1 FROM {} AS p WHERE {})"
    ).format(
        sql.Literal(number),
        values if select is None else select,
        table.name.identifier,
        join,
        sql.SQL("true") if condition is None else condition,
        present,
        foreign_key.parent.identifier,
        tie,
    )
