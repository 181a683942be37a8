"""What a key log does not see: tables that are rewritten, truncated or changed during a move.

The physical and logical layout of the moved tables on each side is noted when everything was last
known to be captured or compared, and looked at again under the gate. It changes when a table is
truncated or rewritten, when a partition comes or goes, when a column or a constraint changes.
"""

from __future__ import annotations

from typing import Any, LiteralString

import psycopg

from cellferry.errors import VerificationFailed
from cellferry.model import Side
from cellferry.stores.postgres import checkpoints
from cellferry.stores.postgres.checkpoints import Checkpoint
from cellferry.stores.postgres.scope import Scope

#: Marks the checkpoint that holds a side's layout.
LAYOUT_OF = "layout of "


#: One hash for each moved relation and for each of its columns, constraints and unique indexes;
#: the last argument of each says which. They are summed, for a sum needs no order. The hash is of
#: text: that of a record is linear, and two columns that change their names would not be seen.
_LAYOUT: LiteralString = """
    WITH RECURSIVE moved AS (
        SELECT c.oid, c.relfilenode, c.relkind
        FROM unnest(%s::text[], %s::text[]) AS name (schema, name)
        JOIN pg_namespace AS n ON n.nspname = name.schema
        JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = name.name
        UNION
        SELECT c.oid, c.relfilenode, c.relkind
        FROM moved
        JOIN pg_inherits AS i ON i.inhparent = moved.oid AND NOT i.inhdetachpending
        JOIN pg_class AS c ON c.oid = i.inhrelid
        WHERE moved.relkind = 'p'
    ), line AS (
        SELECT hashtextextended(ROW(m.oid, m.relfilenode, m.relkind)::text, 1) AS hash
        FROM moved AS m
        UNION ALL
        SELECT hashtextextended(
            ROW(a.attrelid, a.attnum, a.attname, a.atttypid, a.atttypmod, a.attnotnull)::text, 2
        )
        FROM pg_attribute AS a
        WHERE a.attrelid = ANY(ARRAY(SELECT oid FROM moved)) AND a.attnum > 0
          AND NOT a.attisdropped
        UNION ALL
        SELECT hashtextextended(ROW(k.conrelid, k.oid, k.convalidated)::text, 3)
        FROM pg_constraint AS k
        WHERE k.conrelid = ANY(ARRAY(SELECT oid FROM moved))
        UNION ALL
        SELECT hashtextextended(ROW(i.indrelid, i.indexrelid, i.indisvalid)::text, 4)
        FROM pg_index AS i
        WHERE i.indrelid = ANY(ARRAY(SELECT oid FROM moved)) AND i.indisunique
    )
    SELECT format('%%s lines, sum %%s', count(*), sum(hash::numeric)) FROM line
"""


def read(connection: psycopg.Connection[Any], scope: Scope) -> str:
    """Return a digest of the layout of all moved tables in this cell. One query, no locks."""
    row = connection.execute(
        _LAYOUT,
        (
            [table.name.schema for table in scope.tables],
            [table.name.name for table in scope.tables],
        ),
        prepare=True,
    ).fetchone()
    return str(row[0]) if row else ""


def note(destination: psycopg.Connection[Any], migration: int, side: Side, layout: str) -> None:
    """Remember the layout of `side`, in the current transaction at the destination."""
    checkpoints.write(destination, migration, Checkpoint(LAYOUT_OF + side, (layout,)))


def noted(destination: psycopg.Connection[Any], migration: int) -> dict[Side, str]:
    """Return what was remembered of each side."""
    marks = checkpoints.read(destination, migration)
    return {
        side: mark.last_key[0]
        for side in Side
        if (mark := marks.get(LAYOUT_OF + side)) is not None and mark.last_key
    }


def insist(side: Side, where: str, before: str | None, now: str) -> None:
    """Compare a layout with the one that was noted.

    Raises:
        VerificationFailed: it changed; what it held then may not have been captured.
    """
    if before is not None and before != now:
        raise VerificationFailed(
            f"a table at the {side} was truncated, rewritten or changed since it was last compared",
            hint="run verify again, which compares everything anew; then the cutover",
            where=where,
        )
