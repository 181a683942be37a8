"""A few dirty keys, applied in a handful of round trips.

Under the gate writers wait, and on a busy machine each round trip costs a turn of the scheduler
at both ends: some for each table make a pause of tens of milliseconds one of hundreds. So a small
round asks the source for all rows at once and tells the destination everything at once, in
libpq's pipeline mode. COPY knows no pipeline; rows travel as the text that PostgreSQL's own
output functions write and its input functions read, as in a dump.

Only the ordinary case is here. Whatever is unusual (a unique value in the way, a child without its
parent, a row of another organization) is rolled back and left to `apply`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import psycopg
from psycopg import sql

from cellferry.model import Move
from cellferry.stores.postgres.applied import Applied, Dirty, dangling, deletes, digests
from cellferry.stores.postgres.children import children_of
from cellferry.stores.postgres.deferrable import violations
from cellferry.stores.postgres.ownership import owner_text
from cellferry.stores.postgres.references import Needs, ReferencedRows, crossing, outward
from cellferry.stores.postgres.rendering import PARAMETER, rendered, with_parameters
from cellferry.stores.postgres.row_keys import key_array
from cellferry.stores.postgres.schema import Column, ForeignKey, Placement, Table
from cellferry.stores.postgres.scope import (
    Key,
    Scope,
    column_list,
    keys_join,
    keys_match,
    keys_relation,
)
from cellferry.stores.postgres.taking_over import must_be_replaced
from cellferry.stores.postgres.transactions import write

#: More keys than this are worth a COPY for each table.
MOST_KEYS = 500


class _UnusualError(Exception):
    """Something that only the general way can handle; the transaction is rolled back."""


@dataclass(frozen=True)
class _Read:
    """What one snapshot of the source says of the keys.

    Attributes:
        rows: the current rows by table and key, as texts.
        digest: by table's name.
    """

    rows: Mapping[Table, Mapping[Key, tuple[str | None, ...]]]
    digest: Mapping[str, tuple[Any, ...]]


class Delta:
    """Small rounds from one cell to the other.

    Args:
        source: in a REPEATABLE READ transaction when `apply` is called.
        destination: in autocommit mode with the replica role.
    """

    def __init__(
        self,
        source: psycopg.Connection[Any],
        destination: psycopg.Connection[Any],
        scope: Scope,
        move: Move,
        references: ReferencedRows,
        *,
        refuses_crossings: bool = True,
    ) -> None:
        self._source = source
        self._destination = destination
        self._scope = scope
        self._move = move
        self._references = references
        self._refuses_crossings = refuses_crossings

    def apply(
        self, keys: Mapping[str, set[Key]], before_commit: Callable[[], None] | None
    ) -> Applied | None:
        """Apply `keys` and commit, or change nothing and return None.

        Raises:
            LeaseLost: another attempt took over.
        """
        owned = _of(self._scope.tables, keys)
        shared = _of(self._scope.data_map.referenced, keys)
        if not self._fits(owned, shared):
            return None
        followed = {
            table: some
            for table, asked in shared.items()
            if (some := self._references.followed(table, asked))
        }
        read = self._read({**owned, **followed})
        try:
            with write(self._destination, self._move):
                applied = self._write(owned, followed, read)
                if before_commit is not None:
                    before_commit()
        except (_UnusualError, psycopg.errors.UniqueViolation, psycopg.errors.ExclusionViolation):
            return None
        return applied

    def _fits(self, owned: Dirty, shared: Dirty) -> bool:
        count = sum(len(some) for some in (*owned.values(), *shared.values()))
        return (
            0 < count <= MOST_KEYS
            and bool(owned)
            and not any(self._references.has_holders(table) for table in shared)
        )

    def _read(self, wanted: Dirty) -> _Read:
        with self._source.pipeline():
            selected = {
                table: self._source.execute(self._select(table, some), prepare=False)
                for table, some in wanted.items()
            }
            digest = self._source.execute(digests(self._scope, wanted), prepare=False)
        return _Read(
            rows={
                table: {tuple(key): tuple(values) for key, *values in cursor}
                for table, cursor in selected.items()
            },
            digest={row[0]: row[1:] for row in digest},
        )

    def _select(self, table: Table, keys: set[Key]) -> sql.Composed:
        return sql.SQL("SELECT {} FROM {} AS t {} WHERE {}").format(
            _key_and_texts(table),
            table.name.identifier,
            keys_join(table, keys),
            self._scope.owned(table) if table.owners else sql.SQL("true"),
        )

    def _write(self, owned: Dirty, followed: Dirty, read: _Read) -> Applied:
        unusual = []
        # A shared row that is gone at the source stays: nobody's row is deleted by a move.
        present = {table: set(rows) for table in followed if (rows := read.rows[table])}
        written = {**owned, **present}
        with self._destination.pipeline():
            if orphans := self._orphans(owned):
                unusual.append(self._destination.execute(orphans, prepare=False))
            children = [
                (child, self._destination.execute(query, prepare=False))
                for child, query in self._children_left(owned, read)
            ]
            self._destination.execute(deletes(self._scope, owned), prepare=False)
            for table, some in present.items():
                if must_be_replaced(table):
                    self._destination.execute(_delete_shared(table, some), prepare=False)
            for table in written:
                if incoming := read.rows[table].values():
                    columns = [list(values) for values in zip(*incoming, strict=True)]
                    if table in present and not must_be_replaced(table):
                        # A neighbour that is about to refer to one must find it where it is.
                        if update := _update(table):
                            self._destination.execute(update, columns)
                        self._destination.execute(_insert(table, only_absent=True), columns)
                    else:
                        self._destination.execute(_insert(table), columns)
            if conflicts := self._conflicts(written, read):
                unusual.append(self._destination.execute(conflicts, prepare=False))
            checks = self._checks(owned)
            missing = self._missing_references(checks)
            digest = self._destination.execute(digests(self._scope, written), prepare=False)
        if any(cursor.fetchone() for cursor in unusual) or any(
            not {tuple(key) for (key,) in cursor} <= owned.get(child, set())
            for child, cursor in children
        ):
            raise _UnusualError
        there = {row[0]: row[1:] for row in digest}
        if there != {str(table.name): read.digest[str(table.name)] for table in written}:
            raise _UnusualError
        brought, size = self._bring(checks, missing)
        applied = Applied(
            keys=sum(len(some) for some in written.values()),
            rows=brought + sum(len(read.rows[table]) for table in written),
            bytes=size
            + sum(
                len(value)
                for table in written
                for row in read.rows[table].values()
                for value in row
                if value
            ),
            compared=sum(len(some) for some in written.values()),
        )
        for relation, (count, total) in there.items():
            applied.hashes[relation] = {"count": str(count), "hash": str(total)}
        return applied

    def _orphans(self, owned: Dirty) -> sql.Composed | None:
        """A query that finds keys of which the destination cannot tell whose they are."""
        asked = {table: some for table, some in owned.items() if not table.has_direct_owner}
        return _any_of(
            sql.SQL("SELECT {} FROM {} AS t {} WHERE ({}) IS NULL").format(
                key_array(table, "t"),
                table.name.identifier,
                keys_join(table, some),
                owner_text(table, "t"),
            )
            for table, some in asked.items()
        )

    def _children_left(self, owned: Dirty, read: _Read) -> Iterator[tuple[Table, sql.Composed]]:
        """Queries for the children of rows that are gone, where no constraint took them along.

        The application deletes these itself, so that they are dirty as well.
        """
        for table, some in owned.items():
            gone = some - read.rows[table].keys()
            for hop in self._scope.children.get(table.name, ()) if gone else ():
                if not hop.is_enforced:
                    yield hop.child, children_of(self._scope, hop.child, hop.hop, table, gone)

    def _conflicts(self, written: Dirty, read: _Read) -> sql.Composed | None:
        """A query that finds rows with the same value in a deferrable unique key.

        The replica role does not check those; a violation of the others is an error by itself.
        """
        return _any_of(
            violations(table, unique, written[table])
            for table in written
            if read.rows[table]
            for unique in table.uniques
            if unique.deferrable
        )

    def _checks(self, owned: Dirty) -> list[tuple[Table, ForeignKey, set[Key]]]:
        """The foreign keys to rows that are not the organization's; its own where refused."""
        return [
            (table, foreign_key, some)
            for table, some in owned.items()
            for foreign_key in (
                *outward(self._scope, table),
                *(crossing(self._scope, table) if self._refuses_crossings else ()),
            )
        ]

    def _missing_references(
        self, checks: list[tuple[Table, ForeignKey, set[Key]]]
    ) -> Iterable[tuple[Any, ...]]:
        """Ask for rows that refer to shared or global rows which are not there."""
        if not checks:
            return ()
        statement = sql.SQL(" UNION ALL ").join(
            dangling(number, table, foreign_key, keys_join(table, some))
            for number, (table, foreign_key, some) in enumerate(checks)
        )
        return self._destination.execute(statement, prepare=False)

    def _bring(
        self,
        checks: list[tuple[Table, ForeignKey, set[Key]]],
        missing: Iterable[tuple[Any, ...]],
    ) -> tuple[int, int]:
        """Insert the shared rows that are missing; whatever else is missing is unusual."""
        values: dict[int, set[Key]] = {}
        for number, value in missing:
            values.setdefault(number, set()).add(tuple(value))
        needs: Needs = []
        for number, some in values.items():
            _, foreign_key, _ = checks[number]
            if self._scope.data_map.by_name[foreign_key.parent].placement is not (
                Placement.REFERENCED
            ):
                raise _UnusualError
            needs.append((foreign_key, some))
        return self._references.bring(needs)


def _of(tables: tuple[Table, ...], keys: Mapping[str, set[Key]]) -> dict[Table, set[Key]]:
    return {table: some for table in tables if (some := keys.get(str(table.name)))}


def _any_of(queries: Iterable[sql.Composed]) -> sql.Composed | None:
    """Return a query that gives a row when one of `queries` does; None when there are none."""
    parts = [sql.SQL("EXISTS ({})").format(query) for query in queries]
    if not parts:
        return None
    return sql.SQL("SELECT 1 WHERE {}").format(sql.SQL(" OR ").join(parts))


def _delete_shared(table: Table, keys: set[Key]) -> sql.Composed:
    return sql.SQL("DELETE FROM {} AS t USING {} WHERE {}").format(
        table.name.identifier, keys_relation(table, keys), keys_match(table)
    )


@lru_cache(4096)
def _key_and_texts(table: Table) -> sql.Composed:
    columns = (_as_text(column) for column in table.copied_columns)
    return rendered(sql.SQL(", ").join([key_array(table, "t"), *columns]))


def _as_text(column: Column) -> sql.Composed:
    """A text expression: the column as its type's output function writes it, or NULL.

    `concat` calls the output function, where a cast to text may be something else. A composite
    whose fields are all NULL is not NULL; IS NULL would say it is.
    """
    return sql.SQL("CASE WHEN {0} IS DISTINCT FROM NULL THEN pg_catalog.concat({0}) END").format(
        sql.Identifier("t", column.name)
    )


@lru_cache(4096)
def _insert(table: Table, *, only_absent: bool = False) -> sql.Composed:
    """Insert rows given as one array of texts for each column."""
    columns = table.copied_columns
    statement = sql.SQL(
        "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM {} WHERE {}"
    ).format(
        table.name.identifier,
        column_list(columns, None),
        sql.SQL(", ").join(_value(table, column) for column in columns),
        _given(table),
        sql.SQL("NOT EXISTS (SELECT FROM {} AS t WHERE {})").format(
            table.name.identifier, _has_given_key(table)
        )
        if only_absent
        else sql.SQL("true"),
    )
    return with_parameters(statement)


@lru_cache(4096)
def _update(table: Table) -> sql.Composed | None:
    """Change rows given as for `_insert`; None where a row is nothing but its key."""
    columns = [column for column in table.copied_columns if column.name not in table.primary_key]
    if not columns:
        return None
    statement = sql.SQL("UPDATE {} AS t SET {} FROM {} WHERE {}").format(
        table.name.identifier,
        sql.SQL(", ").join(
            sql.SQL("{} = {}").format(sql.Identifier(column.name), _value(table, column))
            for column in columns
        ),
        _given(table),
        _has_given_key(table),
    )
    return with_parameters(statement)


def _given(table: Table) -> sql.Composed:
    numbers = range(len(table.copied_columns))
    return sql.SQL("unnest({}) AS v({})").format(
        sql.SQL(", ").join(sql.SQL("{}::text[]").format(PARAMETER) for _ in numbers),
        sql.SQL(", ").join(sql.Identifier(f"c{number}") for number in numbers),
    )


def _value(table: Table, column: Column) -> sql.Composed:
    number = table.copied_columns.index(column)
    return sql.SQL("{}::{}").format(sql.Identifier("v", f"c{number}"), sql.SQL(column.type))


def _has_given_key(table: Table) -> sql.Composed:
    return sql.SQL(" AND ").join(
        sql.SQL("{} = {}").format(sql.Identifier("t", name), _value(table, table.column(name)))
        for name in table.primary_key
    )
