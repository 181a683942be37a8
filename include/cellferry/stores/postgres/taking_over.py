"""Shared rows that the destination has already and that nobody else uses there.

Such a row is of the organization that comes: a copy that an earlier stay of it left, for example.
It becomes as it is at the source, and is recorded as imported, so that rounds bring what changes
later and verification compares it. It is updated where it is and not replaced: who begins to refer
to it meanwhile waits for our lock, and finds it as it is then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg
from psycopg import sql

from cellferry.errors import PermanentError, TransientError
from cellferry.stores.postgres import sessions
from cellferry.stores.postgres.conflicts import (
    WAITING_ROOM,
    Barrier,
    admit,
    barriers,
    waiting_room,
)
from cellferry.stores.postgres.likeness import are_strangers, outline
from cellferry.stores.postgres.row_keys import is_spelled_once, key_array
from cellferry.stores.postgres.schema import Table
from cellferry.stores.postgres.scope import (
    Key,
    Scope,
    column_list,
    keys_join,
    keys_match,
    keys_relation,
    present_keys,
    row_hash,
)
from cellferry.stores.postgres.usage import Usage

#: At most so many rows are locked in one transaction.
BATCH = 1_000

#: Locks rows against whoever is about to refer to them.
_FOR_GOOD = "FOR UPDATE"

#: A transaction that refers to one of the rows may take so long to end (seconds).
LOCK_TIMEOUT_S = 5

#: Copies rows of a table from the source into a target; says how many, and their bytes.
Carry = Callable[[Table, sql.Composable, sql.Composable], tuple[int, int]]


@dataclass(frozen=True)
class _Collision:
    """A row that is here has a unique value of one that comes, by which barrier."""

    name: str
    expressions: tuple[str, ...]
    here: Key
    coming: Key


class TakeOver:
    """Makes rows at the destination the organization's; see `take`.

    Args:
        destination: with the replica role.
        usage: who uses rows of the destination.
        carry: brings rows from the source.
    """

    def __init__(
        self, destination: psycopg.Connection[Any], scope: Scope, usage: Usage, carry: Carry
    ) -> None:
        self._destination = destination
        self._scope = scope
        self._usage = usage
        self._carry = carry

    def unused(self, table: Table, keys: Collection[Key]) -> set[Key]:
        """Return those of `keys` that nobody else uses at the destination."""
        return set(keys) - self._usage.by_others(table, keys)

    def take(self, table: Table, keys: Collection[Key]) -> tuple[set[Key], int, int]:
        """Make those of `keys` equal to the source's that nobody else uses.

        In the caller's transaction at the destination.

        Returns:
            The keys that are the organization's now, how many rows were changed, and the bytes
            that travelled.

        Raises:
            TransientError: a transaction holds one of the rows.
            PermanentError: another row has a unique value that a row has at the source.
        """
        # Locked first: a transaction that refers to a row holds it until it ends, and the next
        # statement sees what it did; one that comes later waits for us.
        locked = self.lock(table, keys, _FOR_GOOD)
        ours = self.unused(table, locked)
        if not ours:
            return set(), 0, 0
        in_the_way: list[_Collision] = []
        with waiting_room(self._destination, table):
            _, size = self._carry(
                table,
                sql.SQL("FROM {} AS t {}").format(table.name.identifier, keys_join(table, ours)),
                WAITING_ROOM,
            )
            ours, different = self._compare(table, ours)
            if different:
                self._leave_waiting(table, different)
                in_the_way = list(_collisions(self._destination, table))
                if all(one.here in different for one in in_the_way):
                    if in_the_way or must_be_replaced(table):
                        self._replace(table, different)
                    else:
                        self._update(table, different)
                    in_the_way.clear()
        if in_the_way:
            return self._take_with(table, locked, in_the_way, different)
        return ours, len(different), size

    def _take_with(
        self, table: Table, keys: set[Key], found: Collection[_Collision], different: set[Key]
    ) -> tuple[set[Key], int, int]:
        """Take `keys` together with rows that have their values: those may change as well.

        Raises:
            PermanentError: others use such a row, or it keeps its value.
        """
        here = {one.here for one in found}
        if here <= keys or self.unused(table, here) != here:
            one = next(one for one in found if one.here not in different)
            raise self._refusal(table, one)
        return self.take(table, keys | here)

    def _refusal(self, table: Table, one: _Collision) -> PermanentError:
        return PermanentError(
            f"key collision: {table.name} row {', '.join(one.coming)} cannot become as it is at"
            f" the source: row {', '.join(one.here)} at the destination has the same {one.name}"
            f" ({', '.join(one.expressions)})",
            hint="make both cells agree on these rows (same key, same unique values),"
            " then run the step again",
            organization=self._scope.organization,
            where=str(table.name),
        )

    def insert_waiting(self, table: Table, count: int) -> tuple[list[Key], set[Key]]:
        """Insert the `count` rows that wait, but for those that others keep out.

        Returns:
            The keys that were inserted, and those of rows that have unique values of the others.
        """
        found: list[_Collision] = []
        arbiter: sql.Composable = sql.SQL("")
        if any(unique.deferrable for unique in table.uniques):
            # ON CONFLICT does not look at these, and the replica role does not check them.
            found = list(_collisions(self._destination, table))
            if found:
                self._leave_waiting(table, self._waiting(table) - {one.coming for one in found})
            arbiter = sql.SQL("({})").format(
                sql.SQL(", ").join(sql.Identifier(name) for name in table.primary_key)
            )
        columns = column_list(table.copied_columns, None)
        inserted: list[Key] = [
            tuple(key)
            for (key,) in self._destination.execute(
                sql.SQL(
                    "INSERT INTO {} AS t ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM {} AS t"
                    " ORDER BY {} ON CONFLICT {} DO NOTHING RETURNING {}"
                ).format(
                    table.name.identifier,
                    columns,
                    columns,
                    WAITING_ROOM,
                    _in_key_order(table),  # two moves that bring the same rows
                    arbiter,
                    key_array(table, "t"),
                )
            ).fetchall()
        ]
        if not found and len(inserted) < count:
            found = list(_collisions(self._destination, table))
        return inserted, {one.here for one in found}

    def _waiting(self, table: Table) -> set[Key]:
        statement = sql.SQL("SELECT {} FROM {} AS t").format(key_array(table, "t"), WAITING_ROOM)
        return {tuple(key) for (key,) in self._destination.execute(statement)}

    def renew(
        self, table: Table, keys: Collection[Key], locked: Collection[Key], *, careful: bool
    ) -> None:
        """Make `keys`, which follow the source, as they are there; those that are gone come back.

        In the caller's transaction, which has the rows in `locked` locked since before it took its
        snapshot of the source; no other row that is here is changed. They are changed where they
        are as well: a neighbour that is about to refer to a row would not find one that was put in
        its place.

        Args:
            careful: whether rows may stand in each other's way, having swapped unique values.

        Raises:
            psycopg.errors.UniqueViolation: another row has one of their unique values, or another
                move has brought one of them just now.
            PermanentError: another row has the value of a deferrable key.
        """
        with waiting_room(self._destination, table):
            self._carry(
                table,
                sql.SQL("FROM {} AS t {}").format(table.name.identifier, keys_join(table, keys)),
                WAITING_ROOM,
            )
            if any(unique.deferrable for unique in table.uniques):
                for one in _collisions(self._destination, table):
                    if one.here not in keys:
                        raise self._refusal(table, one)
            if not must_be_replaced(table):
                try:
                    with self._destination.transaction():
                        self._update(table, locked)
                        self._insert_all_but(table, locked)
                except (psycopg.errors.UniqueViolation, psycopg.errors.ExclusionViolation):
                    if not careful:
                        raise
                else:
                    return
            self._replace(table, set(keys) & set(locked))

    def _insert_all_but(self, table: Table, keys: Collection[Key]) -> None:
        columns = column_list(table.copied_columns, None)
        self._destination.execute(
            sql.SQL(
                "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM {} AS t"
                " WHERE NOT EXISTS (SELECT FROM {} WHERE {}) ORDER BY {}"
            ).format(
                table.name.identifier,
                columns,
                columns,
                WAITING_ROOM,
                keys_relation(table, keys),
                keys_match(table),
                _in_key_order(table),
            ),
            prepare=False,
        )

    def lock(
        self, table: Table, keys: Collection[Key], strength: LiteralString = "FOR NO KEY UPDATE"
    ) -> set[Key]:
        """Lock those of `keys` that are here to the end of the transaction; return them.

        In the order of the key: two moves that lock the same rows wait for each other and no more.

        Args:
            strength: by default one that lets others go on referring to the rows.

        Raises:
            TransientError: a transaction holds one of them.
        """
        statement = sql.SQL("SELECT {} FROM {} AS t {} ORDER BY {} {} OF t").format(
            key_array(table, "t"),
            table.name.identifier,
            keys_join(table, keys),
            _in_key_order(table),
            sql.SQL(strength),
        )
        locked: set[Key] = set()
        try:
            # A row that was replaced while we waited for it is another one, and not locked.
            while locked != set(keys):
                with self._destination.pipeline():
                    sessions.set_locally(self._destination, "lock_timeout", f"{LOCK_TIMEOUT_S}s")
                    found = self._destination.execute(statement, prepare=False)
                    sessions.set_locally(self._destination, "lock_timeout", "0")
                locked = {tuple(key) for (key,) in found}
                if locked == set(keys) or present_keys(self._destination, table, keys) <= locked:
                    break  # a key may be spelt in another way here
        except psycopg.errors.LockNotAvailable as error:
            raise TransientError(
                f"a row of {table.name} that organization {self._scope.organization} refers to is"
                f" locked at the destination for more than {LOCK_TIMEOUT_S} s",
                hint="wait for the transaction that holds it, or end it (pg_locks); then run the"
                " step again, it goes on from here",
                organization=self._scope.organization,
                where=str(table.name),
            ) from error
        return locked

    def _compare(self, table: Table, keys: Collection[Key]) -> tuple[set[Key], set[Key]]:
        """Return which rows are the same thing as those that wait, and which of them differ."""
        shown = outline(table)
        coming = {
            tuple(row[0]): row[1:]
            for row in self._destination.execute(
                sql.SQL("SELECT {} FROM {} AS t").format(shown, WAITING_ROOM), prepare=False
            )
        }
        here = {
            tuple(row[0]): row[1:]
            for row in self._destination.execute(
                sql.SQL("SELECT {} FROM (SELECT t.* FROM {} AS t {}) AS t").format(
                    shown, table.name.identifier, keys_join(table, keys)
                ),
                prepare=False,
            )
        }
        same = {
            key
            for key, row in coming.items()
            if key in here and not are_strangers(row[1:], here[key][1:])
        }
        return same, {key for key in same if coming[key][0] != here[key][0]}

    def _leave_waiting(self, table: Table, keys: Collection[Key]) -> None:
        self._destination.execute(
            sql.SQL("DELETE FROM {} AS t WHERE NOT EXISTS (SELECT FROM {} WHERE {})").format(
                WAITING_ROOM, keys_relation(table, keys), keys_match(table)
            ),
            prepare=False,
        )

    def _update(self, table: Table, keys: Collection[Key]) -> None:
        columns = [
            column
            for column in table.copied_columns
            if column.name not in table.primary_key or not is_spelled_once(column)
        ]
        if not columns:
            return
        self._destination.execute(
            sql.SQL("UPDATE {} AS t SET {} FROM {} AS w, {} WHERE {} AND {} AND {} <> {}").format(
                table.name.identifier,
                sql.SQL(", ").join(
                    sql.SQL("{} = {}").format(
                        sql.Identifier(column.name), sql.Identifier("w", column.name)
                    )
                    for column in columns
                ),
                WAITING_ROOM,
                keys_relation(table, keys),
                keys_match(table),
                _same_key(table),
                row_hash(table, "t"),
                row_hash(table, "w"),
            ),
            prepare=False,
        )

    def _replace(self, table: Table, keys: Collection[Key]) -> None:
        self._destination.execute(
            sql.SQL("DELETE FROM {} AS t USING {} WHERE {}").format(
                table.name.identifier, keys_relation(table, keys), keys_match(table)
            ),
            prepare=False,
        )
        admit(self._destination, table)


def must_be_replaced(table: Table) -> bool:
    """Whether rows cannot be changed where they are: only an insert gives some columns a value."""
    return any(
        column.generated if column.name in table.primary_key else column.identity == "a"
        for column in table.columns
    )


def _in_key_order(table: Table) -> sql.Composed:
    return sql.SQL(", ").join(sql.Identifier("t", column) for column in table.primary_key)


def _same_key(table: Table) -> sql.Composed:
    return sql.SQL(" AND ").join(
        sql.SQL("{} = {}").format(sql.Identifier("t", name), sql.Identifier("w", name))
        for name in table.primary_key
    )


def _collisions(connection: psycopg.Connection[Any], table: Table) -> Iterator[_Collision]:
    """Yield the rows that have unique values of rows that wait.

    Looked for beforehand: the replica role does not check deferrable keys.
    """
    for barrier in barriers(connection, table):
        for here, coming in connection.execute(_colliding(table, barrier)).fetchall():
            yield _Collision(barrier.name, barrier.expressions, tuple(here), tuple(coming))


def _colliding(table: Table, barrier: Barrier) -> sql.Composed:
    names = [sql.Identifier(f"cf_e{number}") for number in range(len(barrier.expressions))]
    values = sql.SQL(", ").join(
        # Printed by the server itself, from its catalog.
        sql.SQL("({}) AS {}").format(sql.SQL(expression), name)
        for expression, name in zip(barrier.expressions, names, strict=True)
    )
    conditions = [
        (
            sql.SQL("t.{} {} s.{}").format(name, sql.SQL(barrier.operators[number]), name)
            if barrier.operators
            else sql.SQL("t.{} IS NOT DISTINCT FROM s.{}").format(name, name)
            if barrier.nulls_equal
            else sql.SQL("t.{} = s.{}").format(name, name)
        )
        for number, name in enumerate(names)
    ]
    return sql.SQL(
        "SELECT DISTINCT {here}, {coming}"
        " FROM (SELECT t.*, {values} FROM {table} AS t {where}) AS t"
        " JOIN (SELECT s.*, {values} FROM {room} AS s {where}) AS s ON {condition}"
        " WHERE {here} <> {coming}"
    ).format(
        here=key_array(table, "t"),
        coming=key_array(table, "s"),
        values=values,
        table=table.name.identifier,
        room=WAITING_ROOM,
        where=sql.SQL("WHERE {}").format(
            sql.SQL(barrier.predicate) if barrier.predicate else sql.SQL("true")
        ),
        condition=sql.SQL(" AND ").join(conditions),
    )
