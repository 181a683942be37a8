"""The rows that are owned through others: what joins the two, and when they come and go."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from psycopg import sql

from cellferry.stores.postgres.ownership import owner_text
from cellferry.stores.postgres.rendering import PARAMETER, with_parameters
from cellferry.stores.postgres.row_keys import key_array
from cellferry.stores.postgres.schema import Hop, Table
from cellferry.stores.postgres.scope import (
    ChildHop,
    Key,
    Scope,
    given_keys,
    keys_match,
    keys_relation,
    once_for_each_scope,
)

#: By key, what children refer to in a row beside its key: the texts of `tie_columns`.
Ties = Mapping[Key, tuple[str | None, ...]]


@dataclass(frozen=True)
class Turn:
    """Rows below which children may come to be the organization's, and cease to be."""

    came: set[Key]
    went: set[Key]


def children_of(
    scope: Scope, child: Table, hop: Hop, parent: Table, keys: Collection[Key]
) -> sql.Composed:
    """Return a query for the keys of the organization's rows of `child` below `keys`."""
    return _children_of(scope, child, hop, parent, keys_relation(parent, keys))


@once_for_each_scope
def children_of_given(scope: Scope, child: Table, hop: Hop, parent: Table) -> sql.Composed:
    """Return `children_of` with parameters: `columns_of` the keys, then how many rows at most."""
    return with_parameters(
        sql.SQL("{} LIMIT {}::bigint").format(
            _children_of(scope, child, hop, parent, given_keys(parent)), PARAMETER
        )
    )


def _children_of(
    scope: Scope, child: Table, hop: Hop, parent: Table, keys: sql.Composable
) -> sql.Composed:
    return sql.SQL("SELECT {} FROM {} AS t JOIN {} AS p ON {} JOIN {} ON {} WHERE {}").format(
        key_array(child, "t"),
        child.name.identifier,
        parent.name.identifier,
        tie(hop),
        keys,
        keys_match(parent, "p"),
        scope.owned(child),
    )


def tie_columns(scope: Scope, table: Table) -> tuple[str, ...]:
    """Return the columns to which children refer and that may change in a row that stays."""
    return tuple(
        dict.fromkeys(
            column
            for hop in scope.children.get(table.name, ())
            for column in hop.hop.parent_columns
            if column not in table.primary_key
        )
    )


def turn_of(
    scope: Scope,
    table: Table,
    hop: ChildHop,
    asked: Collection[Key],
    there: Ties,
    here: Ties,
    *,
    is_settled: bool,
) -> Turn:
    """Compare rows of `table` in both cells.

    Args:
        asked: the keys of these rows.
        there: those that the source has a row of the organization of.
        here: those that the destination has one of.
        is_settled: whether the children of rows that are here have come as well. Not before the
            first complete round: a row may have been away while they were copied.
    """
    columns = tie_columns(scope, table)
    ours = [number for number, name in enumerate(columns) if name in hop.hop.parent_columns]
    moved = {
        key
        for key in there.keys() & here.keys()
        if any(there[key][number] != here[key][number] for number in ours)
    }
    came = (there.keys() - here.keys()) | moved if is_settled else set(there)
    return Turn(came, (set(asked) - there.keys()) | moved)


def strays_of(child: Table, hop: Hop, parent: Table, keys: Collection[Key]) -> sql.Composed:
    """Return a query for the rows of `child` below `keys` that nothing tells whose they are.

    By the keys alone, to which the child must refer: the parents are not there.
    """
    return sql.SQL("SELECT {} FROM {} AS t JOIN {} ON {} WHERE ({}) IS NULL").format(
        key_array(child, "t"),
        child.name.identifier,
        keys_relation(parent, keys),
        sql.SQL(" AND ").join(
            sql.SQL("{} = {}::{}").format(
                sql.Identifier("t", ours),
                sql.Identifier("k", f"k{parent.primary_key.index(theirs) + 1}"),
                sql.SQL(parent.column(theirs).type),
            )
            for ours, theirs in zip(hop.columns, hop.parent_columns, strict=True)
        ),
        owner_text(child, "t"),
    )


def tie(hop: Hop) -> sql.Composed:
    """Return the condition that `p` is the parent of `t`."""
    return sql.SQL(" AND ").join(
        sql.SQL("{} = {}").format(sql.Identifier("p", theirs), sql.Identifier("t", ours))
        for ours, theirs in zip(hop.columns, hop.parent_columns, strict=True)
    )
