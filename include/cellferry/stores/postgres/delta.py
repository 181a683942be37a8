"""A few dirty keys, applied in a handful of round trips.

Under the gate writers wait, and on a busy machine each round trip costs a turn of the scheduler
at both ends: some for each table make a pause of tens of milliseconds one of hundreds. So a small
round asks the source for all rows at once and tells the destination everything at once, in
libpq's pipeline mode. COPY knows no pipeline; rows travel as the text that PostgreSQL's own
output functions write and its input functions read, as in a dump.

Only the ordinary case is here. Whatever is unusual (a unique value in the way, a shared row that
is missing, a child without its parent) is rolled back and left to `apply`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from cellferry.model import Move
from cellferry.stores.postgres.applied import Applied, Dirty, dangling, deletes, digests
from cellferry.stores.postgres.ownership import owner_text
from cellferry.stores.postgres.references import ReferencedRows, crossing, outward
from cellferry.stores.postgres.row_keys import key_array
from cellferry.stores.postgres.schema import Column, Table
from cellferry.stores.postgres.scope import Key, Scope, keys_join
from cellferry.stores.postgres.transactions import write

#: More keys than this are worth a COPY for each table.
MOST_KEYS = 500


class _UnusualError(Exception):
    """Something that only the general way can handle; the transaction is rolled back."""


@dataclass(frozen=True)
class _Read:
    """What one snapshot of the source says of the keys."""

    rows: Mapping[Table, list[tuple[str | None, ...]]]
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
        if any(self._references.took_along(table, some) for table, some in shared.items()):
            return None
        read = self._read(owned)
        if any(
            len(read.rows[table]) < len(some) and self._leaves_children(table)
            for table, some in owned.items()
        ):
            return None
        try:
            with write(self._destination, self._move):
                applied = self._write(owned, shared, read)
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
            and not any(unique.deferrable for table in owned for unique in table.uniques)
            and not any(self._references.has_holders(table) for table in shared)
        )

    def _leaves_children(self, table: Table) -> bool:
        """Whether a row that is gone may leave children that no constraint took with it."""
        return any(not hop.is_enforced for hop in self._scope.children.get(table.name, ()))

    def _read(self, owned: Dirty) -> _Read:
        with self._source.pipeline():
            selected = {
                table: self._source.execute(self._select(table, some), prepare=False)
                for table, some in owned.items()
            }
            digest = self._source.execute(digests(self._scope, owned), prepare=False)
        return _Read(
            rows={table: cursor.fetchall() for table, cursor in selected.items()},
            digest={row[0]: row[1:] for row in digest},
        )

    def _select(self, table: Table, keys: set[Key]) -> sql.Composed:
        return sql.SQL("SELECT {} FROM {} AS t {} WHERE {}").format(
            sql.SQL(", ").join(_as_text(column) for column in table.copied_columns),
            table.name.identifier,
            keys_join(table, keys),
            self._scope.owned(table),
        )

    def _write(self, owned: Dirty, shared: Dirty, read: _Read) -> Applied:
        unusual = []
        with self._destination.pipeline():
            if orphans := self._orphans(owned):
                unusual.append(self._destination.execute(orphans, prepare=False))
            if imported := self._imported(shared):
                unusual.append(self._destination.execute(imported, prepare=False))
            self._destination.execute(deletes(self._scope, owned), prepare=False)
            for table, rows in read.rows.items():
                if rows:
                    self._destination.execute(
                        _insert(table), [list(values) for values in zip(*rows, strict=True)]
                    )
            if missing := self._missing_references(owned):
                unusual.append(self._destination.execute(missing, prepare=False))
            digest = self._destination.execute(digests(self._scope, owned), prepare=False)
        if any(cursor.fetchone() for cursor in unusual):
            raise _UnusualError
        there = {row[0]: row[1:] for row in digest}
        if there != read.digest:
            raise _UnusualError
        applied = Applied(
            keys=sum(len(some) for some in owned.values()),
            rows=sum(len(rows) for rows in read.rows.values()),
            bytes=sum(
                len(value) for rows in read.rows.values() for row in rows for value in row if value
            ),
            compared=sum(len(some) for some in owned.values()),
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

    def _imported(self, shared: Dirty) -> sql.Composed | None:
        """A query that finds shared rows that this migration brought, and that changed."""
        return _any_of(self._references.imported(table, some) for table, some in shared.items())

    def _missing_references(self, owned: Dirty) -> sql.Composed | None:
        """A query that finds rows that refer to shared or global rows which are not there.

        Or, where that is to be refused, to other organizations' rows.
        """
        return _any_of(
            dangling(number, table, foreign_key, keys_join(table, some))
            for number, (table, some, foreign_key) in enumerate(
                (table, some, foreign_key)
                for table, some in owned.items()
                for foreign_key in (
                    *outward(self._scope, table),
                    *(crossing(self._scope, table) if self._refuses_crossings else ()),
                )
            )
        )


def _of(tables: tuple[Table, ...], keys: Mapping[str, set[Key]]) -> dict[Table, set[Key]]:
    return {table: some for table in tables if (some := keys.get(str(table.name)))}


def _any_of(queries: Any) -> sql.Composed | None:
    """Return a query that gives a row when one of `queries` does; None when there are none."""
    parts = [sql.SQL("EXISTS ({})").format(query) for query in queries]
    if not parts:
        return None
    return sql.SQL("SELECT 1 WHERE {}").format(sql.SQL(" OR ").join(parts))


def _as_text(column: Column) -> sql.Composed:
    """A text expression: the column as its type's output function writes it, or NULL.

    `concat` calls the output function, where a cast to text may be something else. A composite
    whose fields are all NULL is not NULL; IS NULL would say it is.
    """
    return sql.SQL("CASE WHEN {0} IS DISTINCT FROM NULL THEN pg_catalog.concat({0}) END").format(
        sql.Identifier("t", column.name)
    )


def _insert(table: Table) -> sql.Composed:
    """Insert rows given as one array of texts for each column."""
    columns = table.copied_columns
    aliases = [sql.Identifier("v", f"c{number}") for number in range(len(columns))]
    return sql.SQL(
        "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM unnest({}) AS v({})"
    ).format(
        table.name.identifier,
        sql.SQL(", ").join(sql.Identifier(column.name) for column in columns),
        sql.SQL(", ").join(
            sql.SQL("{}::{}").format(alias, sql.SQL(column.type))
            for alias, column in zip(aliases, columns, strict=True)
        ),
        sql.SQL(", ").join(sql.SQL("%s::text[]") for _ in columns),
        sql.SQL(", ").join(sql.Identifier(f"c{number}") for number in range(len(columns))),
    )
