"""The rows that are owned through others, and what joins the two."""

from __future__ import annotations

from psycopg import sql

from cellferry.stores.postgres.row_keys import key_array
from cellferry.stores.postgres.schema import Hop, Table
from cellferry.stores.postgres.scope import Key, Scope, keys_match, keys_relation


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


def tie(hop: Hop) -> sql.Composed:
    """Return the condition that `p` is the parent of `t`."""
    return sql.SQL(" AND ").join(
        sql.SQL("{} = {}").format(sql.Identifier("p", theirs), sql.Identifier("t", ours))
        for ours, theirs in zip(hop.columns, hop.parent_columns, strict=True)
    )
