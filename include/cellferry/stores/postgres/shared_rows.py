"""Rows that organizations share: global tables must be equal, referenced rows must agree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, LiteralString

import psycopg
from psycopg import sql

from cellferry.model import Blocker
from cellferry.stores.postgres.examination import (
    Examination,
    examples,
    literally,
    warning,
)
from cellferry.stores.postgres.likeness import are_strangers, outline, telling_uniques
from cellferry.stores.postgres.row_keys import key_array
from cellferry.stores.postgres.schema import ForeignKey, Placement, Table
from cellferry.stores.postgres.scope import Key, Scope
from cellferry.stores.postgres.usage import Usage

BATCH = 10_000


def compare_global(examination: Examination) -> Iterator[Blocker]:
    """Yield a blocker for each global table whose rows differ between the cells."""
    for table in examination.usable(Placement.GLOBAL):
        columns = sql.SQL(", ").join(
            sql.Identifier("t", column.name)
            for column in sorted(table.columns, key=lambda column: column.name)
        )
        query = sql.SQL(
            "SELECT count(*), coalesce(sum(hashtextextended((ROW({}))::text, 0)::numeric), 0)"
            " FROM {} AS t"
        ).format(columns, table.name.identifier)
        found = []
        for site in examination.sites:
            with site.reading() as cursor:
                found.append(cursor.execute(query).fetchone() or (0, 0))
        if found[0] != found[1]:
            yield Blocker(
                "global-differs",
                examination.destination.where(table.name),
                f"the global table has {found[1][0]:,} rows, {examination.source.cell.name} has"
                f" {found[0][0]:,}" + ("" if found[0][0] != found[1][0] else " with other content"),
                "make both cells equal, or place the table as referenced or cell-local in the"
                " data map",
            )


def compare_referenced(examination: Examination) -> Iterator[Blocker]:
    """Yield what keeps referenced rows from being shared: other rows under the same values."""
    for table, keys in needed_rows(examination).items():
        if not keys:
            continue
        comparison = _Comparison()
        ordered = sorted(keys)
        for start in range(0, len(ordered), BATCH):
            _compare(examination, table, ordered[start : start + BATCH], comparison)
        yield from comparison.blockers(examination, table)


def needed_rows(examination: Examination) -> dict[Table, set[Key]]:
    """Return the referenced rows that the organization's rows need, directly or through others."""
    data_map = examination.data_map
    needed: dict[str, set[Key]] = {}
    tables = {str(table.name): table for table in examination.usable(Placement.REFERENCED)}
    todo: list[tuple[Table, set[Key]]] = []

    def add(parent: Table, keys: set[Key]) -> None:
        fresh = keys - needed.setdefault(str(parent.name), set())
        needed[str(parent.name)] |= fresh
        if fresh:
            todo.append((parent, fresh))

    for child in examination.usable(Placement.OWNED):
        for key in data_map.references(child):
            if str(key.parent) in tables and not key.temporal:
                add(tables[str(key.parent)], _from_owned(examination, child, key))
    while todo:
        child, keys = todo.pop()
        for key in data_map.references(child):
            if str(key.parent) in tables and not key.temporal:
                add(tables[str(key.parent)], _from_referenced(examination, child, key, keys))
    return {tables[name]: keys for name, keys in needed.items()}


def _from_owned(examination: Examination, child: Table, key: ForeignKey) -> set[Key]:
    parent = examination.data_map.by_name[key.parent]
    with examination.source.reading() as cursor:
        return {
            tuple(row)
            for (row,) in cursor.execute(
                sql.SQL(
                    "SELECT {} FROM {} AS p WHERE ({}) IN (SELECT {} FROM {} AS c WHERE {})"
                ).format(
                    key_array(parent, "p"),
                    parent.name.identifier,
                    _columns(key.parent_columns, "p"),
                    _columns(key.columns, "c"),
                    child.name.identifier,
                    examination.owned(child, "c"),
                )
            )
        }


def _from_referenced(
    examination: Examination, child: Table, key: ForeignKey, keys: set[Key]
) -> set[Key]:
    parent = examination.data_map.by_name[key.parent]
    found: set[Key] = set()
    ordered = sorted(keys)
    with examination.source.reading() as cursor:
        for start in range(0, len(ordered), BATCH):
            rows = _with_keys(
                cursor,
                child,
                ordered[start : start + BATCH],
                sql.SQL("SELECT {} FROM {} AS p WHERE ({}) IN (SELECT {} ").format(
                    key_array(parent, "p"),
                    parent.name.identifier,
                    _columns(key.parent_columns, "p"),
                    _columns(key.columns, "t"),
                ),
                after=")",
            )
            found.update(tuple(row) for (row,) in rows)
    return found


def _columns(columns: tuple[str, ...], alias: str) -> sql.Composed:
    return sql.SQL(", ").join(sql.Identifier(alias, column) for column in columns)


def _with_keys(
    cursor: psycopg.Cursor[tuple[Any, ...]],
    table: Table,
    keys: list[Key],
    before: sql.Composable,
    after: LiteralString = "",
) -> list[tuple[Any, ...]]:
    """Run `before FROM table AS t JOIN keys after`: the rows of `table` with these keys."""
    names = [sql.Identifier(f"cellferry_{number}") for number in range(len(table.primary_key))]
    match = sql.SQL(" AND ").join(
        sql.SQL("{} = k.{}::{}").format(
            sql.Identifier("t", column), name, sql.SQL(table.column(column).type)
        )
        for column, name in zip(table.primary_key, names, strict=True)
    )
    arrays = sql.SQL(", ").join(sql.SQL("%s::text[]") for _ in names)
    query = sql.Composed(
        [
            literally(
                sql.SQL("{} FROM {} AS t JOIN unnest(").format(before, table.name.identifier),
                cursor,
            ),
            arrays,
            literally(
                sql.SQL(") AS k ({}) ON {}").format(sql.SQL(", ").join(names), match),
                cursor,
            ),
            sql.SQL(after),
        ]
    )
    return cursor.execute(query, list(map(list, zip(*keys, strict=True)))).fetchall()


@dataclass
class _Comparison:
    """What was found about one referenced table.

    Attributes:
        kept: rows with other content that others use at the destination.
        taken_over: rows with other content that nobody else uses there.
        strangers: other things under the same key.
        collisions: by unique key, rows at the destination and the values they have that come.
        changing: by unique key, rows at the destination that will lose their value.
    """

    kept: list[Key] = field(default_factory=list)
    taken_over: list[Key] = field(default_factory=list)
    strangers: list[Key] = field(default_factory=list)
    collisions: dict[str, list[tuple[Key, tuple[Any, ...]]]] = field(default_factory=dict)
    changing: dict[str, set[Key]] = field(default_factory=dict)

    def blockers(self, examination: Examination, table: Table) -> Iterator[Blocker]:
        where = examination.destination.where(table.name)
        if self.strangers:
            yield Blocker(
                "referenced-row-differs",
                where,
                f"{len(self.strangers)} rows that organization {examination.organization} refers to"
                " have the key of other rows here (every unique value differs), for example"
                f" {examples(list(self.strangers))}",
                "give each cell its own range of ids for this table, or make the rows agree",
            )
        if self.kept:
            yield warning(
                "referenced-row-differs",
                where,
                f"{len(self.kept)} rows that organization {examination.organization} refers to"
                " exist here with other content and are used by others; they stay as they are"
                f" here, for example {examples(list(self.kept))}",
                "make them agree if the application expects so",
            )
        if self.taken_over:
            yield warning(
                "referenced-row-taken-over",
                where,
                f"{len(self.taken_over)} rows that organization {examination.organization} refers"
                " to exist here with other content, and nobody else uses them; the copy makes them"
                f" as they are in {examination.source.cell.name}, for example"
                f" {examples(list(self.taken_over))}",
                "nothing, unless the content here must be kept: then see that a row of another"
                " organization here refers to them",
            )
        for name, found in self.collisions.items():
            rows = [values for key, values in found if key not in self.changing.get(name, ())]
            if rows:
                yield Blocker(
                    "key-collision",
                    where,
                    f"unique key {name}: {len(rows)} referenced rows cannot come because another"
                    f" row has the value, for example {examples(rows)}",
                    "make both cells agree on these rows: same key, same unique values",
                )


def _compare(
    examination: Examination, table: Table, keys: list[Key], comparison: _Comparison
) -> None:
    uniques = telling_uniques(table)
    select = sql.SQL("SELECT {}").format(outline(table))
    with examination.source.reading() as cursor:
        ours = {tuple(row[0]): row[1:] for row in _with_keys(cursor, table, keys, select)}
    site = examination.destination
    with examination.source.reading(), site.reading() as cursor:
        theirs = {tuple(row[0]): row[1:] for row in _with_keys(cursor, table, keys, select)}
        different = {key for key, row in ours.items() if theirs.get(key, row)[0] != row[0]}
        strangers = {key for key in different if are_strangers(ours[key][1:], theirs[key][1:])}
        used = _usage(examination).by_others(table, different - strangers)
        taken_over = different - strangers - used
        comparison.strangers.extend(sorted(strangers))
        comparison.kept.extend(sorted(used))
        comparison.taken_over.extend(sorted(taken_over))
        absent = ours.keys() - theirs.keys()
        for number, one in enumerate(uniques, start=1):
            changing = {key for key in taken_over if ours[key][number] != theirs[key][number]}
            comparison.changing.setdefault(one.name, set()).update(changing)
            coming = [ours[key][number] for key in sorted(absent | changing)]
            values = [value for value in coming if value and None not in value]
            if values:
                taken = _taken(cursor, table, one.columns, one.predicate, values)
                comparison.collisions.setdefault(one.name, []).extend(taken)


def _usage(examination: Examination) -> Usage:
    return Usage(
        examination.destination.connection,
        examination.source.connection,
        Scope(examination.data_map, examination.organization),
        came_from=examination.source.cell.name,
        looks_at=lambda table: examination.is_usable(table.name),
    )


def _taken(
    cursor: psycopg.Cursor[tuple[Any, ...]],
    table: Table,
    columns: tuple[str, ...],
    predicate: str | None,
    values: list[list[str]],
) -> list[tuple[Key, tuple[Any, ...]]]:
    names = [sql.Identifier(f"cellferry_{number}") for number in range(len(columns))]
    match = sql.SQL(" AND ").join(
        sql.SQL("{} = k.{}::{}").format(
            sql.Identifier("t", column), name, sql.SQL(table.column(column).type)
        )
        for column, name in zip(columns, names, strict=True)
    )
    query = sql.Composed(
        [
            literally(
                sql.SQL("SELECT {}, k.* FROM {} AS t JOIN unnest(").format(
                    key_array(table, "t"), table.name.identifier
                ),
                cursor,
            ),
            sql.SQL(", ").join(sql.SQL("%s::text[]") for _ in names),
            literally(
                sql.SQL(") AS k ({}) ON {} WHERE {}").format(
                    sql.SQL(", ").join(names),
                    match,
                    sql.SQL(predicate) if predicate else sql.SQL("true"),
                ),
                cursor,
            ),
        ]
    )
    found = cursor.execute(query, list(map(list, zip(*values, strict=True)))).fetchall()
    return [(tuple(row[0]), row[1:]) for row in found]
