"""What the planner knows of tables, and when it should get to know rows that a move brought.

A table's statistics are made for the table as a whole, and looking at a sample of a large one takes
a second. So a move has them made anew where it changed a table by as much as the server's own
settings say, and leaves the rest to them: autovacuum would come to the same conclusion, but only a
minute later, and for a partitioned table never.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import psycopg
from psycopg import sql

from cellferry.stores.postgres.schema import Table

_TABLES = """
    WITH wanted AS (
        SELECT n.number, n.planned, c.oid, c.relkind, c.reltuples, c.reloptions
        FROM unnest(%(names)s::text[], %(planned)s::bigint[])
            WITH ORDINALITY AS n (name, planned, number)
        JOIN pg_class AS c ON c.oid = to_regclass(n.name)
    ), parts AS (
        SELECT number, oid AS part FROM wanted WHERE relkind <> 'p'
        UNION ALL
        SELECT number, relid FROM wanted, pg_partition_tree(wanted.oid)
        WHERE relkind = 'p' AND isleaf
    ), held AS (
        SELECT number, sum(greatest(c.reltuples, 0)) AS rows,
               sum(pg_stat_get_mod_since_analyze(part)) AS changed
        FROM parts JOIN pg_class AS c ON c.oid = part GROUP BY number
    )
    SELECT wanted.number
    FROM wanted JOIN held USING (number)
    WHERE wanted.reltuples < 0
       -- a partitioned table is not counted itself: its parts may have been looked at since
       OR greatest(planned, changed
                   + CASE WHEN relkind = 'p' THEN abs(rows - wanted.reltuples) ELSE 0 END)
        > coalesce((SELECT option_value::float8 FROM pg_options_to_table(reloptions)
                    WHERE option_name = 'autovacuum_analyze_threshold'),
                   current_setting('autovacuum_analyze_threshold')::float8)
          + wanted.reltuples
            * coalesce((SELECT option_value::float8 FROM pg_options_to_table(reloptions)
                        WHERE option_name = 'autovacuum_analyze_scale_factor'),
                       current_setting('autovacuum_analyze_scale_factor')::float8)
    ORDER BY wanted.number
"""


def outdated(
    connection: psycopg.Connection[Any], tables: Sequence[Table], planned: Mapping[str, int]
) -> list[Table]:
    """Return those of `tables` that nobody has looked at, or that have changed a lot since.

    Args:
        planned: rows that a move brings into each, by name. A server forgets how many have changed
            when it crashes, and one that was a standby has never known.
    """
    names = [table.name.identifier.as_string(connection) for table in tables]
    rows = [planned.get(str(table.name), 0) for table in tables]
    found = connection.execute(_TABLES, {"names": names, "planned": rows}).fetchall()
    return [tables[number - 1] for (number,) in found]


def estimate_rows(
    connection: psycopg.Connection[Any], table: Table, condition: sql.Composable
) -> int:
    """Return the planner's estimate of how many rows of `table` meet `condition`; reads none.

    Args:
        condition: on the row called `t`.
    """
    (((plan,),),) = connection.execute(
        sql.SQL("EXPLAIN (FORMAT JSON) SELECT FROM {} AS t WHERE {}").format(
            table.name.identifier, condition
        )
    ).fetchall()
    return int(plan["Plan"]["Plan Rows"])
