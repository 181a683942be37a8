"""Which rows stand in the way of incoming ones: unique keys and exclusion constraints.

Incoming rows wait in a temporary table meanwhile. A row of the same organization that stands in
the way is stale (the source, read in one snapshot, cannot hold both) and may be deleted: rounds
bring it back as it is now. A row of anybody else is a collision, which only a person can solve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from cellferry.errors import PermanentError
from cellferry.stores.postgres.ownership import owner_text
from cellferry.stores.postgres.row_keys import key_array
from cellferry.stores.postgres.schema import Table
from cellferry.stores.postgres.scope import (
    Key,
    Scope,
    column_list,
    keys_match,
    keys_relation,
)

WAITING_ROOM = sql.Identifier("pg_temp", "cellferry_incoming")


@dataclass(frozen=True)
class Barrier:
    """A unique index or an exclusion constraint, as expressions over the bare row."""

    name: str
    expressions: tuple[str, ...]
    operators: tuple[str, ...]
    predicate: str | None
    nulls_equal: bool
    deferrable: bool


def barriers(connection: psycopg.Connection[Any], table: Table) -> tuple[Barrier, ...]:
    """Read the barriers of `table` from the catalog."""
    rows = connection.execute(
        """
        SELECT c.relname,
               ARRAY(SELECT pg_get_indexdef(i.indexrelid, n, true)
                     FROM generate_series(1, i.indnkeyatts) AS n ORDER BY n),
               COALESCE(ARRAY(SELECT format('OPERATOR(%%I.%%s)', ns.nspname, o.oprname)
                     FROM unnest(x.conexclop) WITH ORDINALITY AS u(oid, n)
                     JOIN pg_operator AS o ON o.oid = u.oid
                     JOIN pg_namespace AS ns ON ns.oid = o.oprnamespace ORDER BY u.n), '{}'),
               pg_get_expr(i.indpred, i.indrelid, true),
               COALESCE((to_jsonb(i) ->> 'indnullsnotdistinct')::boolean, false),
               NOT i.indimmediate
        FROM pg_index AS i
        JOIN pg_class AS c ON c.oid = i.indexrelid
        LEFT JOIN pg_constraint AS x ON x.conindid = i.indexrelid AND x.contype = 'x'
        WHERE i.indrelid = %s::regclass AND i.indislive
          AND (i.indisunique OR i.indisexclusion)
        ORDER BY i.indisprimary DESC, c.relname
        """,
        (table.name.identifier.as_string(None),),
    ).fetchall()
    return tuple(
        Barrier(name, tuple(expressions), tuple(operators), predicate, nulls, deferrable)
        for name, expressions, operators, predicate, nulls, deferrable in rows
    )


@contextmanager
def waiting_room(connection: psycopg.Connection[Any], table: Table) -> Iterator[sql.Identifier]:
    """Give a temporary table like `table`, for the current transaction."""
    connection.execute(
        sql.SQL("CREATE TEMPORARY TABLE {} (LIKE {} INCLUDING GENERATED) ON COMMIT DROP").format(
            WAITING_ROOM, table.name.identifier
        )
    )
    yield WAITING_ROOM
    connection.execute(sql.SQL("DROP TABLE {}").format(WAITING_ROOM))


def admit(connection: psycopg.Connection[Any], table: Table) -> None:
    """Insert what waits into `table`."""
    columns = column_list(table.copied_columns, None)
    connection.execute(
        sql.SQL("INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM {}").format(
            table.name.identifier, columns, columns, WAITING_ROOM
        )
    )


def clear_the_way(
    connection: psycopg.Connection[Any],
    scope: Scope,
    table: Table,
    before: Callable[[set[Key]], None] | None = None,
) -> set[Key]:
    """Delete the organization's own rows that conflict with what waits; return their keys.

    Args:
        before: called with these keys before their rows are deleted, if there are any.

    Raises:
        PermanentError: a row that is not the organization's stands in the way.
    """
    cleared: set[Key] = set()
    for barrier in barriers(connection, table):
        found = connection.execute(_conflicting(table, barrier)).fetchall()
        for key, owner in found:
            if owner == scope.organization:
                cleared.add(tuple(key))
                continue
            whose = f"organization {owner}" if owner else "no organization that can be told"
            raise PermanentError(
                f"key collision: row {', '.join(key)} of {table.name} at the destination belongs"
                f" to {whose} and has the same {barrier.name}"
                f" ({', '.join(barrier.expressions)}) as a row of organization"
                f" {scope.organization}",
                hint="change the key on one side, or give the cells disjoint ranges of keys;"
                " then run the step again",
                organization=scope.organization,
                where=str(table.name),
            )
    if cleared:
        if before is not None:
            before(cleared)
        connection.execute(
            sql.SQL("DELETE FROM {} AS t USING {} WHERE {} AND {}").format(
                table.name.identifier,
                keys_relation(table, cleared),
                keys_match(table),
                scope.owned(table),
            )
        )
    return cleared


def _conflicting(table: Table, barrier: Barrier) -> sql.Composed:
    numbers = range(len(barrier.expressions))
    names = [sql.Identifier(f"cf_e{number}") for number in numbers]
    values = sql.SQL(", ").join(
        # Printed by the server itself, from its catalog.
        sql.SQL("({}) AS {}").format(sql.SQL(expression), name)
        for expression, name in zip(barrier.expressions, names, strict=True)
    )
    where = sql.SQL("WHERE {}").format(
        sql.SQL(barrier.predicate) if barrier.predicate else sql.SQL("true")
    )

    def compare(number: int) -> sql.Composed:
        left = sql.SQL("t.{}").format(names[number])
        right = sql.SQL("s.{}").format(names[number])
        if barrier.operators:
            return sql.SQL("{} {} {}").format(left, sql.SQL(barrier.operators[number]), right)
        equal = sql.SQL("{} = {}").format(left, right)
        if barrier.nulls_equal:
            return sql.SQL("({} OR ({} IS NULL AND {} IS NULL))").format(equal, left, right)
        return equal

    return sql.SQL(
        "SELECT DISTINCT {key}, {owner} FROM (SELECT t.*, {values} FROM {table} AS t {where}) AS t"
        " JOIN (SELECT {values} FROM {room} {where}) AS s ON {condition}"
    ).format(
        key=key_array(table, "t"),
        owner=owner_text(table, "t") if table.owners else sql.SQL("NULL::text"),
        values=values,
        table=table.name.identifier,
        room=WAITING_ROOM,
        where=where,
        condition=sql.SQL(" AND ").join(compare(number) for number in numbers),
    )
