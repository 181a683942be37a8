"""A few dirty keys, applied in a handful of round trips.

Under the gate writers wait, and on a busy machine each round trip costs a turn of the scheduler
at both ends: some for each table make a pause of tens of milliseconds one of hundreds. So a small
round asks the source for all rows at once and tells the destination everything at once, in
libpq's pipeline mode. COPY knows no pipeline; rows travel as the text that PostgreSQL's own
output functions write and its input functions read, as in a dump. Nearly all statements are
prepared: composed once for each scope and table, parsed and planned at their first use, which for
most tables is in a round before the gate is closed.

Shared rows that the move brought go in the same transaction, once they are locked.

Only the ordinary case is here. Whatever is unusual (a unique value in the way, a child without its
parent, a row of another organization, ownership in circles) is rolled back and left to `apply`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import psycopg
from psycopg import sql

from cellferry.model import Move
from cellferry.stores.postgres import sessions
from cellferry.stores.postgres.applied import Applied, Dirty, Keys, dangling
from cellferry.stores.postgres.children import Ties, children_of_given, tie_columns, turn_of
from cellferry.stores.postgres.deferrable import violations
from cellferry.stores.postgres.ownership import owner_text
from cellferry.stores.postgres.references import (
    Held,
    Needs,
    ReferencedRows,
    leading_out,
)
from cellferry.stores.postgres.rendering import with_parameters
from cellferry.stores.postgres.row_keys import key_array
from cellferry.stores.postgres.schema import Column, ForeignKey, Placement, Table, Unique
from cellferry.stores.postgres.scope import (
    ChildHop,
    Key,
    Scope,
    column_list,
    columns_of,
    given_keys,
    given_rows,
    has_one_spelling,
    keys_match,
    once_for_each_scope,
    row_hash,
)
from cellferry.stores.postgres.taking_over import must_be_replaced
from cellferry.stores.postgres.transactions import write

#: More keys than this are worth a COPY for each table.
MOST_KEYS = 500


class UnusualError(Exception):
    """Something that only the general way can handle; the transaction is to be rolled back."""


#: What says that the general way is needed.
REFUSED = (UnusualError, psycopg.errors.UniqueViolation, psycopg.errors.ExclusionViolation)


@dataclass(frozen=True)
class _Read:
    """What one snapshot of the source says of the keys.

    Attributes:
        rows: the current rows by table and key, as texts.
        digest: by table the number of its rows, and the sum of their hashes.
    """

    rows: Mapping[Table, Mapping[Key, tuple[str | None, ...]]]
    digest: Mapping[Table, tuple[int, int]]


class Delta:
    """Small rounds from one cell to the other.

    Args:
        source: in a REPEATABLE READ transaction whenever keys are applied.
        destination: in autocommit mode with the replica role.
    """

    def __init__(
        self,
        source: psycopg.Connection[Any],
        destination: psycopg.Connection[Any],
        scope: Scope,
        move: Move,
        references: ReferencedRows,
        is_settled: Callable[[], bool],
        *,
        refuses_crossings: bool = True,
    ) -> None:
        self._source = source
        self._destination = destination
        self._scope = scope
        self._move = move
        self._references = references
        self._is_settled = is_settled
        self._refuses_crossings = refuses_crossings

    def apply(self, keys: Keys, before_commit: Callable[[], None] | None) -> Applied | None:
        """Apply `keys` and commit, or change nothing and return None.

        Raises:
            LeaseLost: another attempt took over.
        """
        owned = self._owned(keys)
        if not 0 < sum(map(len, owned.values())) <= MOST_KEYS or self._scope.has_tangled_guards:
            return None
        read = self._read(owned)
        try:
            with write(self._destination, self._move):
                applied = self._write(owned, {}, read)
                if before_commit is not None:
                    before_commit()
        except REFUSED:
            return None
        return applied

    def may_go_with(self, shared: Collection[Table]) -> bool:
        """Whether rows of these shared tables may be written together with owned ones."""
        # Rows that belong to other shared rows may be new to this migration, and only the general
        # way records them. It also compares the keys of both cells on a server.
        return not self._scope.has_tangled_guards and not any(
            self._references.has_holders(table) or not has_one_spelling(table) for table in shared
        )

    def apply_with(self, held: Mapping[Table, Held], keys: Keys) -> Applied:
        """Apply `keys` and make shared rows as they are at the source.

        In the caller's transaction at the destination, which has locked the shared rows before it
        opened the snapshot of the source.

        Raises:
            UnusualError, psycopg.errors.UniqueViolation, psycopg.errors.ExclusionViolation: it
                needs the general way.
        """
        owned = self._owned(keys)
        read = self._read({**owned, **{table: one.keys for table, one in held.items()}})
        return self._write(owned, held, read)

    def _owned(self, keys: Keys) -> Dirty:
        return {table: some for table in self._scope.tables if (some := keys.get(str(table.name)))}

    def _read(self, wanted: Dirty) -> _Read:
        with self._source.pipeline():
            _plan_once(self._source)
            selected = {
                table: _run(self._source, _select(self._scope, table), some)
                for table, some in wanted.items()
            }
        rows: dict[Table, dict[Key, tuple[str | None, ...]]] = {}
        digest = {}
        for table, cursor in selected.items():
            rows[table] = {}
            total = 0
            for key, hashed, *values in cursor:
                rows[table][tuple(key)] = tuple(values)
                total += hashed
            digest[table] = (len(rows[table]), total)
        return _Read(rows, digest)

    def _write(self, owned: Dirty, held: Mapping[Table, Held], read: _Read) -> Applied:
        """Write what was read, see that both sides are equal, and bring what it refers to.

        In the caller's transaction; all but what is missing goes in one message.

        Raises:
            UnusualError, psycopg.errors.UniqueViolation, psycopg.errors.ExclusionViolation: it
                needs the general way.
        """
        if not self._is_settled() and any(
            some - read.rows[table].keys()
            for table, some in owned.items()
            if self._scope.loose_children(table)
        ):
            raise UnusualError  # children may have come without it
        # A shared row that is gone at the source stays: nobody's row is deleted by a move.
        shared = {table: set(rows) for table in held if (rows := read.rows[table])}
        written = {**owned, **shared}
        with self._destination.pipeline():
            _plan_once(self._destination)
            for table in shared:
                self._write_shared(table, held[table].locked, read.rows[table])
            unusual = [
                _run(self._destination, _orphan(table), some)
                for table, some in owned.items()
                if not table.has_direct_owner
            ]
            children = self._children_left(owned, read)
            here = {
                table: _run(self._destination, _present(self._scope, table), some)
                for table, some in owned.items()
                if read.rows[table] and self._scope.loose_children(table)
            }
            # Children first: their guards ask the parents whose they are.
            for table in reversed(list(owned)):
                _run(self._destination, _delete(self._scope, table), owned[table])
            for table in owned:
                if incoming := read.rows[table].values():
                    _run(self._destination, _insert(table), incoming)
            # The replica role does not check deferrable keys; a violation of the others is an
            # error by itself.
            unusual += [
                _run(self._destination, _conflict(table, unique), some)
                for table, some in written.items()
                if read.rows[table]
                for unique in table.uniques
                if unique.deferrable
            ]
            looked_at = {table: self._look_at(table, some) for table, some in written.items()}
        if any(cursor.fetchone() for cursor in unusual) or any(
            not {tuple(key) for (key,) in cursor} <= owned.get(child, set())
            for child, cursor in children
        ):
            raise UnusualError
        for table, cursor in here.items():
            ties = {tuple(key): tuple(values) for key, values in cursor}
            self._insist_on_known_children(table, owned, read, ties)
        digest, missing = self._answers(looked_at)
        applied = _agreed(written, read, digest)
        brought, size = self._references.bring(missing)
        applied.rows += brought
        applied.bytes += size
        return applied

    def _write_shared(
        self, table: Table, locked: set[Key], rows: Mapping[Key, tuple[str | None, ...]]
    ) -> None:
        here = locked & rows.keys()
        if must_be_replaced(table):
            if here:
                _run(self._destination, _delete(self._scope, table), here)
            here = set()
        elif here and (update := _update(table)):
            # A neighbour that is about to refer to one must find it where it is.
            _run(self._destination, update, [rows[key] for key in here])
        if new := sorted(rows.keys() - here):
            _run(self._destination, _insert(table), [rows[key] for key in new])

    def _children_left(self, owned: Dirty, read: _Read) -> list[tuple[Table, psycopg.Cursor[Any]]]:
        """Ask for the children of rows that are gone, where no constraint took them along.

        The application deletes these itself, so that they are dirty as well.
        """
        return [
            (hop.child, self._children(self._destination, table, hop, gone))
            for table, some in owned.items()
            if (gone := some - read.rows[table].keys())
            for hop in self._scope.loose_children(table)
        ]

    def _children(
        self,
        connection: psycopg.Connection[Any],
        table: Table,
        hop: ChildHop,
        keys: set[Key],
        at_most: int | None = None,
    ) -> psycopg.Cursor[Any]:
        """Ask for the keys of the children below `keys`."""
        statement = children_of_given(self._scope, hop.child, hop.hop, table)
        return connection.execute(statement, [*columns_of(keys), at_most], prepare=True)

    def _insist_on_known_children(
        self, table: Table, owned: Dirty, read: _Read, here: Ties
    ) -> None:
        """See that children whose parent comes only now are dirty as well, in both cells.

        Args:
            here: the rows that were here before.

        Raises:
            UnusualError: some are not, or the parent may have lost some.
        """
        numbers = _tie_numbers(self._scope, table)
        there = {
            key: tuple(None if number is None else row[number] for number in numbers)
            for key, row in read.rows[table].items()
        }
        for hop in self._scope.loose_children(table):
            turn = turn_of(
                self._scope,
                table,
                hop,
                there,
                there,
                here,
                is_settled=self._is_settled(),
            )
            if turn.went:
                raise UnusualError
            known = owned.get(hop.child, set())
            sides = (
                (self._source, self._destination) if self._refuses_crossings else (self._source,)
            )
            for connection in sides if turn.came else ():
                found = self._children(connection, table, hop, turn.came, len(known) + 1)
                if not {tuple(key) for (key,) in found} <= known:
                    raise UnusualError

    def _checked(self, table: Table) -> tuple[ForeignKey, ...]:
        """The foreign keys to rows that are not the organization's; its own where refused."""
        return leading_out(self._scope, table, with_crossing=self._refuses_crossings)

    def _look_at(self, table: Table, keys: set[Key]) -> psycopg.Cursor[Any]:
        """Ask for the rows' digest, and for what those of owned tables refer to and is missing."""
        foreign_keys = self._checked(table) if table.owners else ()
        return self._destination.execute(
            _what_is_there(self._scope, table, foreign_keys),
            columns_of(keys) * (1 + len(foreign_keys)),
            prepare=True,
        )

    def _answers(
        self, looked_at: Mapping[Table, Iterable[tuple[int, list[str]]]]
    ) -> tuple[dict[Table, tuple[int, int]], Needs]:
        """Return the digests, and which shared rows are missing.

        Raises:
            UnusualError: something else is missing.
        """
        digest: dict[Table, tuple[int, int]] = {}
        missing: dict[ForeignKey, set[Key]] = {}
        for table, found in looked_at.items():
            for number, values in found:
                if number == 0:
                    digest[table] = (int(values[0]), int(values[1]))
                else:
                    foreign_key = self._checked(table)[number - 1]
                    missing.setdefault(foreign_key, set()).add(tuple(values))
        by_name = self._scope.data_map.by_name
        if any(by_name[one.parent].placement is not Placement.REFERENCED for one in missing):
            raise UnusualError
        return digest, list(missing.items())


def _plan_once(connection: psycopg.Connection[Any]) -> None:
    """Plan each statement at its first use only: planning takes longer than most of them."""
    sessions.set_locally(connection, "plan_cache_mode", "force_generic_plan")


def _run(
    connection: psycopg.Connection[Any],
    statement: sql.Composed,
    rows: Collection[Sequence[str | None]],
) -> psycopg.Cursor[Any]:
    return connection.execute(statement, columns_of(rows), prepare=True)


def _agreed(written: Dirty, read: _Read, there: Mapping[Table, tuple[int, int]]) -> Applied:
    """Return what was written, if both sides are equal.

    Raises:
        UnusualError: they differ; the general way says how, if it meets the same.
    """
    if there != {table: read.digest[table] for table in written}:
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
    for table in written:
        count, total = read.digest[table]
        applied.hashes[str(table.name)] = {"count": str(count), "hash": str(total)}
    return applied


@once_for_each_scope
def _select(scope: Scope, table: Table) -> sql.Composed:
    """Select keys, hashes and values of the rows given by key, as far as they are owned."""
    return with_parameters(
        sql.SQL("SELECT {}, ({})::bigint, {} FROM {} AS t {} WHERE {}").format(
            key_array(table, "t"),
            row_hash(table),
            sql.SQL(", ").join(_as_text(column) for column in table.copied_columns),
            table.name.identifier,
            _join(table),
            scope.concerned(table),
        )
    )


@once_for_each_scope
def _what_is_there(
    scope: Scope, table: Table, foreign_keys: tuple[ForeignKey, ...]
) -> sql.Composed:
    """Of the rows given by key select a line 0: their count and hash, as far as they are owned.

    And lines 1, 2 …: the values of the first foreign key, the second … that lead to no row. The
    keys are given once for the former, and once for each foreign key.
    """
    digest = sql.SQL(
        "SELECT 0, ARRAY[count(*)::text, COALESCE(sum({}), 0)::text] FROM {} AS t {} WHERE {}"
    ).format(row_hash(table), table.name.identifier, _join(table), scope.concerned(table))
    return with_parameters(
        sql.SQL(" UNION ALL ").join(
            [
                digest,
                *(
                    dangling(number, table, foreign_key, _join(table))
                    for number, foreign_key in enumerate(foreign_keys, 1)
                ),
            ]
        )
    )


@lru_cache(4096)
def _orphan(table: Table) -> sql.Composed:
    """Find one of the rows given by key of which it cannot be told here whose it is."""
    return with_parameters(
        sql.SQL("SELECT 1 FROM {} AS t {} WHERE ({}) IS NULL LIMIT 1").format(
            table.name.identifier, _join(table), owner_text(table, "t")
        )
    )


@once_for_each_scope
def _present(scope: Scope, table: Table) -> sql.Composed:
    """Select key and `tie_columns` of the rows given by key that are there and owned."""
    return with_parameters(
        sql.SQL("SELECT {}, ARRAY[{}]::text[] FROM {} AS t {} WHERE {}").format(
            key_array(table, "t"),
            sql.SQL(", ").join(_as_text(table.column(name)) for name in tie_columns(scope, table)),
            table.name.identifier,
            _join(table),
            scope.concerned(table),
        )
    )


@once_for_each_scope
def _tie_numbers(scope: Scope, table: Table) -> tuple[int | None, ...]:
    """Return which of `copied_columns` the `tie_columns` are; None for generated ones."""
    columns = [column.name for column in table.copied_columns]
    return tuple(
        columns.index(name) if name in columns else None for name in tie_columns(scope, table)
    )


@once_for_each_scope
def _delete(scope: Scope, table: Table) -> sql.Composed:
    """Delete the rows given by key, as far as they are owned."""
    return with_parameters(
        sql.SQL("DELETE FROM {} AS t USING {} WHERE {} AND {}").format(
            table.name.identifier,
            given_keys(table),
            keys_match(table),
            scope.concerned(table),
        )
    )


@lru_cache(4096)
def _conflict(table: Table, unique: Unique) -> sql.Composed:
    """Find one of the rows given by key that has the value of another in a deferrable key."""
    return with_parameters(
        sql.SQL("{} LIMIT 1").format(violations(table, unique, given_keys(table)))
    )


def _join(table: Table) -> sql.Composed:
    return sql.SQL("JOIN {} ON {}").format(given_keys(table), keys_match(table))


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
        given_rows(len(table.copied_columns)),
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
        given_rows(len(table.copied_columns)),
        _has_given_key(table),
    )
    return with_parameters(statement)


def _value(table: Table, column: Column) -> sql.Composed:
    number = table.copied_columns.index(column) + 1
    return sql.SQL("{}::{}").format(sql.Identifier("k", f"k{number}"), sql.SQL(column.type))


def _has_given_key(table: Table) -> sql.Composed:
    return sql.SQL(" AND ").join(
        sql.SQL("{} = {}").format(sql.Identifier("t", name), _value(table, table.column(name)))
        for name in table.primary_key
    )
