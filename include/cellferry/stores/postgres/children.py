"""The rows that are owned through others, and what joins the two."""

from __future__ import annotations

from psycopg import sql

from cellferry.stores.postgres.row_keys import key_array
from cellferry.stores.postgres.schema import Hop, Table
from cellferry.stores.postgres.scope import ChildHop, Key, Scope, keys_match, keys_relation


def children_of(
    scope: Scope, child: Table, hop: Hop, parent: Table, keys: set[Key]
) -> sql.Composed:
    """Return a query for the keys of the organization's rows of `child` below `keys`."""
    return sql.SQL("SELECT {} FROM {} AS t JOIN {} AS p ON {} JOIN {} ON {} WHERE {}").format(
        key_array(child, "t"),
        child.name.identifier,
        parent.name.identifier,
        tie(hop),
        keys_relation(parent, keys),
        keys_match(parent, "p"),
        scope.owned(child),
    )


def came_now(table: Table, hop: ChildHop, there: set[Key], here: set[Key]) -> set[Key]:
    """Return the rows of `table` under which children may just have become the organization's.

    Args:
        there: keys that the source has a row of the organization of.
        here: those that the destination has one of.
    """
    if set(hop.hop.parent_columns) <= set(table.primary_key):
        return there - here
    return there  # what the children refer to may have changed in a row that stayed


def tie(hop: Hop) -> sql.Composed:
    """Return the condition that `p` is the parent of `t`."""
    return sql.SQL(" AND ").join(
        sql.SQL("{} = {}").format(sql.Identifier("p", theirs), sql.Identifier("t", ours))
        for ours, theirs in zip(hop.columns, hop.parent_columns, strict=True)
    )
