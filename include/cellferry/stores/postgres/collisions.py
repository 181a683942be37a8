"""Unique values of the moving rows that other rows at the destination have already.

First a range check, which is quick where ids are numbers; then, where ranges overlap, an exact
one: the values travel in batches to the destination, which looks them up by its own index.
Nothing is written, not even a temporary table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import psycopg
from psycopg import sql

from cellferry.model import Blocker
from cellferry.stores.postgres.examination import (
    EXAMPLES,
    Examination,
    Site,
    examples,
    listed,
    literally,
)
from cellferry.stores.postgres.schema import Placement, Table, Unique

BATCH = 20_000

_INTEGERS = frozenset({"smallint", "integer", "bigint"})


def find_collisions(examination: Examination) -> Iterator[Blocker]:
    """Yield a blocker for each unique key and exclusion constraint with collisions."""
    for table in examination.usable(Placement.OWNED):
        for unique in table.uniques:
            if not _holds_organization(examination, table, unique):
                yield from _collide(examination, table, unique)


def _holds_organization(examination: Examination, table: Table, unique: Unique) -> bool:
    """Whether two organizations can never have the same value.

    True when the organization's key is a part of it, or the reference to an owned parent, whose
    own key is checked.
    """
    if len(table.owners) != 1 or table.owners[0].when is not None:
        return False
    if unique.exclusion and not unique.primary:
        equal = {
            column
            for column, operator in zip(unique.columns, unique.operators, strict=True)
            if operator.endswith(".=)")
        }
    else:
        equal = set(unique.columns)
    path = table.owners[0]
    if not path.hops:
        return path.column in equal and table.name != examination.data_map.organization_table
    hop = path.hops[0]
    parent = examination.data_map.by_name[hop.parent]
    refers_to_key = any(
        set(one.columns) == set(hop.parent_columns) and one.predicate is None
        for one in parent.uniques
    )
    return set(hop.columns) <= equal and refers_to_key


def _collide(examination: Examination, table: Table, unique: Unique) -> Iterator[Blocker]:
    is_number = len(unique.columns) == 1 and table.column(unique.columns[0]).type in _INTEGERS
    if is_number and not _ranges_overlap(examination, table, unique.columns[0]):
        return
    found: list[tuple[Any, ...]] = []
    with examination.source.reading() as ours:
        stream = _incoming(examination, table, unique, ours)
        with examination.destination.reading() as theirs:
            types = _types(theirs, table, unique)
            for batch in stream:
                found.extend(_look_up(examination, theirs, table, unique, types, batch))
                if len(found) > EXAMPLES:
                    break
    if not found:
        return
    owners = sorted({str(row[-1]) for row in found})
    kind = (
        "primary key"
        if unique.primary
        else "exclusion constraint"
        if unique.exclusion
        else "unique key"
    )
    yield Blocker(
        "key-collision",
        examination.destination.where(table.name),
        f"{kind} {unique.name} ({', '.join(unique.expressions)}): values of organization"
        f" {examination.organization} belong to rows of"
        f" {'organizations ' if len(owners) > 1 else 'organization '}{', '.join(owners)}"
        f" already, for example {examples([row[:-1] for row in found])}",
        "change the values on one side; to make it impossible, give each cell its own range of"
        " ids (ALTER SEQUENCE … MINVALUE … MAXVALUE …) or put the organization's key into the"
        " constraint",
    )


def _ranges_overlap(examination: Examination, table: Table, column: str) -> bool:
    with examination.source.reading() as cursor:
        lowest, highest = cursor.execute(
            sql.SQL("SELECT min({0}), max({0}) FROM {1} AS t WHERE {2}").format(
                sql.Identifier("t", column), table.name.identifier, examination.owned(table)
            )
        ).fetchone() or (None, None)
    if lowest is None:
        return False
    with examination.destination.reading() as cursor:
        return (
            cursor.execute(
                sql.SQL("SELECT 1 FROM {} AS t WHERE {} BETWEEN {} AND {} LIMIT 1").format(
                    table.name.identifier,
                    sql.Identifier("t", column),
                    sql.Literal(lowest),
                    sql.Literal(highest),
                )
            ).fetchone()
            is not None
        )


def _expressions(unique: Unique) -> list[sql.Composable]:
    # printed by the server itself: a quoted column, or an expression over columns
    return [sql.SQL("({})").format(sql.SQL(one)) for one in unique.expressions]


def _where(unique: Unique, *more: sql.Composable) -> sql.Composed:
    conditions: list[sql.Composable] = list(more)
    if unique.predicate:
        conditions.append(sql.SQL("({})").format(sql.SQL(unique.predicate)))
    return sql.SQL(" AND ").join(conditions)


def _incoming(
    examination: Examination,
    table: Table,
    unique: Unique,
    cursor: psycopg.Cursor[tuple[Any, ...]],
) -> Iterator[list[tuple[str | None, ...]]]:
    """Yield the organization's values of `unique` as texts, in batches."""
    values = _expressions(unique)
    conditions: list[sql.Composable] = [examination.owned(table)]
    if not unique.nulls_equal:
        conditions.extend(sql.SQL("{} IS NOT NULL").format(value) for value in values)
    query = sql.SQL("SELECT {} FROM {} AS t WHERE {}").format(
        sql.SQL(", ").join(sql.SQL("{}::text").format(value) for value in values),
        table.name.identifier,
        _where(unique, *conditions),
    )
    with cursor.connection.cursor(
        name="cellferry_incoming", row_factory=psycopg.rows.tuple_row
    ) as (stream):
        stream.itersize = BATCH
        stream.execute(query)
        while batch := stream.fetchmany(BATCH):
            yield batch


def _types(cursor: psycopg.Cursor[tuple[Any, ...]], table: Table, unique: Unique) -> list[sql.SQL]:
    """Return the type of each expression, as the destination prints it."""
    cursor.execute(
        sql.SQL("SELECT {} FROM {} AS t LIMIT 0").format(
            sql.SQL(", ").join(_expressions(unique)), table.name.identifier
        )
    )
    oids = [column.type_code for column in cursor.description or ()]
    rows = cursor.execute(
        "SELECT format_type(u.oid, NULL) FROM unnest(%s::oid[]) WITH ORDINALITY AS u (oid, n)"
        " ORDER BY u.n",
        (oids,),
    ).fetchall()
    return [sql.SQL(name) for (name,) in rows]


def _look_up(
    examination: Examination,
    cursor: psycopg.Cursor[tuple[Any, ...]],
    table: Table,
    unique: Unique,
    types: Sequence[sql.SQL],
    batch: Sequence[tuple[str | None, ...]],
) -> list[tuple[Any, ...]]:
    """Return the values of `batch` that rows of others have, with whose these are."""
    values = _expressions(unique)
    names = [sql.Identifier(f"cellferry_{number}") for number in range(len(values))]

    def compare(number: int) -> sql.Composed:
        theirs = sql.SQL("k.{}::{}").format(names[number], types[number])
        if unique.operators and not unique.primary:
            return sql.SQL("{} {} {}").format(
                values[number], sql.SQL(unique.operators[number]), theirs
            )
        same = "{} IS NOT DISTINCT FROM {}" if unique.nulls_equal else "{} = {}"
        return sql.SQL(same).format(values[number], theirs)

    owner = examination.owner(table)
    before = sql.SQL("SELECT {}, coalesce({}, 'nobody') FROM unnest(").format(
        sql.SQL(", ").join(sql.SQL("k.{}").format(name) for name in names), owner
    )
    after = sql.SQL(") AS k ({}) JOIN {} AS t ON {} WHERE {} LIMIT {}").format(
        sql.SQL(", ").join(names),
        table.name.identifier,
        sql.SQL(" AND ").join(compare(number) for number in range(len(values))),
        _where(
            unique,
            sql.SQL("{} IS DISTINCT FROM {}").format(owner, sql.Literal(examination.organization)),
        ),
        sql.Literal(EXAMPLES + 1),
    )
    arrays = sql.SQL(", ").join(sql.SQL("%s::text[]") for _ in names)
    query = sql.Composed([literally(before, cursor), arrays, literally(after, cursor)])
    return cursor.execute(query, list(map(list, zip(*batch, strict=True)))).fetchall()


def leftovers(examination: Examination) -> Iterator[Blocker]:
    """Yield a blocker when the destination has rows of the organization already.

    Rows that a live migration is importing are expected.
    """
    site: Site = examination.destination
    state, migration = _gate(examination)
    if state == "importing":
        return
    tables: list[str] = []
    for table in examination.usable(Placement.OWNED):
        with site.reading() as cursor:
            found = cursor.execute(
                sql.SQL("SELECT 1 FROM {} AS t WHERE {} LIMIT 1").format(
                    table.name.identifier, examination.owned(table)
                )
            ).fetchone()
        if found:
            tables.append(str(table.name))
    if tables and state == "moved":
        yield Blocker(
            "retained-copy",
            site.where(),
            f"the copy that migration {migration} left behind is retained here, in"
            f" {listed(tables)}",
            f"clean up migration {migration} first: cellferry cleanup, after its TTL",
        )
    elif tables:
        yield Blocker(
            "leftover-rows",
            site.where(),
            f"rows of organization {examination.organization} that no live migration put there are"
            f" in {listed(tables)}",
            "clean up the migration that left them; if the application wrote them there, decide"
            " which copy is right before anything moves",
        )


def _gate(examination: Examination) -> tuple[str | None, int | None]:
    """State of the organization's gate at the destination, and the migration that set it."""
    try:
        with examination.destination.reading() as cursor:
            found = cursor.execute(
                "SELECT state, migration FROM cellferry.gate WHERE organization = %s",
                (examination.organization,),
            ).fetchone()
    except (psycopg.errors.UndefinedTable, psycopg.errors.InsufficientPrivilege):
        return None, None  # not prepared, which is reported as such
    return (found[0], found[1]) if found else (None, None)
