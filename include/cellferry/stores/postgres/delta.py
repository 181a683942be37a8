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
from cellferry.stores.postgres.references import (
    Held,
    Needs,
    ReferencedRows,
    crossing,
    outward,
)
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


class UnusualError(Exception):
    """Something that only the general way can handle; the transaction is to be rolled back."""


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
        owned = {table: some for table in self._scope.tables if (some := keys.get(str(table.name)))}
        if not 0 < sum(map(len, owned.values())) <= MOST_KEYS:
            return None
        read = self._read(owned)
        try:
            with write(self._destination, self._move):
                applied = self._write(owned, read)
                if before_commit is not None:
                    before_commit()
        except (UnusualError, psycopg.errors.UniqueViolation, psycopg.errors.ExclusionViolation):
            return None
        return applied

    def can_follow(self, held: Mapping[Table, Held]) -> bool:
        """Whether so many shared rows, of these tables, may go this way."""
        return sum(len(one.keys) for one in held.values()) <= MOST_KEYS and not any(
            self._references.has_holders(table) for table in held
        )

    def follow(self, held: Mapping[Table, Held]) -> Applied:
        """Make shared rows as they are at the source; in the caller's transaction.

        Raises:
            UnusualError, psycopg.errors.UniqueViolation: it needs the general way.
        """
        read = self._read({table: one.keys for table, one in held.items()})
        # A shared row that is gone at the source stays: nobody's row is deleted by a move.
        present = {table: set(rows) for table in held if (rows := read.rows[table])}
        unusual = []
        if not present:
            return Applied()
        with self._destination.pipeline():
            for table in present:
                rows = read.rows[table]
                here = {key: row for key, row in rows.items() if key in held[table].locked}
                if must_be_replaced(table):
                    if here:
                        self._destination.execute(_delete_shared(table, set(here)), prepare=False)
                    here = {}
                elif here and (update := _update(table)):
                    # A neighbour that is about to refer to one must find it where it is.
                    self._destination.execute(update, _columns(here.values()))
                if must_be_replaced(table) or len(here) < len(rows):
                    new = [rows[key] for key in sorted(rows.keys() - here.keys())]
                    self._destination.execute(_insert(table), _columns(new))
            if conflicts := self._conflicts(present, read):
                unusual.append(self._destination.execute(conflicts, prepare=False))
            digest = self._destination.execute(digests(self._scope, present), prepare=False)
        if any(cursor.fetchone() for cursor in unusual):
            raise UnusualError
        return self._agreed(present, read, digest)

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

    def _write(self, owned: Dirty, read: _Read) -> Applied:
        unusual = []
        with self._destination.pipeline():
            if orphans := self._orphans(owned):
                unusual.append(self._destination.execute(orphans, prepare=False))
            children = [
                (child, self._destination.execute(query, prepare=False))
                for child, query in self._children_left(owned, read)
            ]
            self._destination.execute(deletes(self._scope, owned), prepare=False)
            for table in owned:
                if incoming := read.rows[table].values():
                    self._destination.execute(_insert(table), _columns(incoming))
            if conflicts := self._conflicts(owned, read):
                unusual.append(self._destination.execute(conflicts, prepare=False))
            checks = self._checks(owned)
            missing = self._missing_references(checks)
            digest = self._destination.execute(digests(self._scope, owned), prepare=False)
        if any(cursor.fetchone() for cursor in unusual) or any(
            not {tuple(key) for (key,) in cursor} <= owned.get(child, set())
            for child, cursor in children
        ):
            raise UnusualError
        applied = self._agreed(owned, read, digest)
        brought, size = self._bring(checks, missing)
        applied.rows += brought
        applied.bytes += size
        return applied

    def _agreed(self, written: Dirty, read: _Read, digest: Iterable[tuple[Any, ...]]) -> Applied:
        """Compare both sides, and say what was written."""
        there = {row[0]: row[1:] for row in digest}
        if there != {str(table.name): read.digest[str(table.name)] for table in written}:
            raise UnusualError
        applied = Applied(
            keys=sum(len(some) for some in written.values()),
            rows=sum(len(read.rows[table]) for table in written),
            bytes=sum(
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
                raise UnusualError
            needs.append((foreign_key, some))
        return self._references.bring(needs)


def _columns(rows: Iterable[tuple[str | None, ...]]) -> list[list[str | None]]:
    """Return `rows` as one list of texts for each column."""
    return [list(values) for values in zip(*rows, strict=True)]


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
def _insert(table: Table) -> sql.Composed:
    """Insert rows given as one array of texts for each column."""
    columns = table.copied_columns
    statement = sql.SQL("INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM {}").format(
        table.name.identifier,
        column_list(columns, None),
        sql.SQL(", ").join(_value(table, column) for column in columns),
        _given(table),
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
