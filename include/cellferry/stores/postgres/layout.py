"""What a key log does not see: tables that are rewritten, truncated or changed during a move.

The physical and logical layout of the moved tables on each side is noted when everything was last
known to be captured or compared, and looked at again under the gate. It changes when a table is
truncated or rewritten, when a partition comes or goes, when a column or a constraint changes.
"""

from __future__ import annotations

from typing import Any

import psycopg

from cellferry.errors import VerificationFailed
from cellferry.model import Side
from cellferry.stores.postgres import checkpoints
from cellferry.stores.postgres.checkpoints import Checkpoint
from cellferry.stores.postgres.scope import Scope

#: Marks the checkpoint that holds a side's layout.
LAYOUT_OF = "layout of "


def read(connection: psycopg.Connection[Any], scope: Scope) -> str:
    """Return the hash of the layout of all moved tables in this cell. One query, no locks."""
    row = connection.execute(
        """
        WITH moved AS (
            SELECT COALESCE(leaf.relid, root.oid::regclass) AS relid
            FROM unnest(%s::text[], %s::text[]) AS name(schema, name)
            JOIN pg_namespace AS n ON n.nspname = name.schema
            JOIN pg_class AS root ON root.relnamespace = n.oid AND root.relname = name.name
            LEFT JOIN LATERAL pg_partition_tree(root.oid::regclass) AS leaf ON true
        ), lines AS (
            SELECT format('%%s %%s %%s', c.oid, c.relfilenode, c.relkind) AS line
            FROM moved JOIN pg_class AS c ON c.oid = moved.relid
            UNION ALL
            SELECT format('%%s.%%s %%s %%s %%s %%s', a.attrelid, a.attnum, a.attname, a.atttypid,
                          a.atttypmod, a.attnotnull)
            FROM moved JOIN pg_attribute AS a ON a.attrelid = moved.relid
            WHERE a.attnum > 0 AND NOT a.attisdropped
            UNION ALL
            SELECT format('%%s %%s %%s', k.conrelid, k.oid, k.convalidated)
            FROM moved JOIN pg_constraint AS k ON k.conrelid = moved.relid
            UNION ALL
            SELECT format('%%s %%s %%s', i.indrelid, i.indexrelid, i.indisvalid)
            FROM moved JOIN pg_index AS i ON i.indrelid = moved.relid
            WHERE i.indisunique
        )
        SELECT md5(string_agg(line, E'\n' ORDER BY line COLLATE "C")) FROM lines
        """,
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
