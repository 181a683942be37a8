"""One organization's part of a schema, and the SQL fragments by which all of the mover names it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import psycopg
from psycopg import sql

from cellferry.errors import UnsupportedSchema
from cellferry.stores.postgres.ownership import owned_by
from cellferry.stores.postgres.rendering import PARAMETER, rendered
from cellferry.stores.postgres.row_keys import is_spelled_once, key_array
from cellferry.stores.postgres.schema import Column, DataMap, Hop, Name, Table

P = ParamSpec("P")
T = TypeVar("T")

#: A primary key in its one form: the texts of its columns, in the key's order.
Key = tuple[str, ...]


@dataclass(frozen=True)
class ChildHop:
    """A table whose rows are owned through their parent."""

    child: Table
    hop: Hop
    is_loose: bool
    """Whether children come to be the organization's, and cease to be, without being changed.

    No constraint ties them to their parent, or none ties that one to its own.
    """


@dataclass(frozen=True)
class Scope:
    """The rows of one organization in the tables of one data map."""

    data_map: DataMap
    organization: str

    @cached_property
    def tables(self) -> tuple[Table, ...]:
        """Owned tables, each after the tables through which it is owned.

        The data map orders by every foreign key and may break a cycle anywhere; here only the
        paths of ownership count, because a delete asks the parents whose a row is.
        """
        ordered: dict[Name, Table] = {}
        visiting: set[Name] = set()

        def place(table: Table) -> None:
            if table.name in ordered or table.name in visiting:
                return
            visiting.add(table.name)
            for path in table.owners:
                for hop in path.hops:
                    parent = self.data_map.by_name.get(hop.parent)
                    if parent is not None and parent in self.data_map.owned:
                        place(parent)
            ordered[table.name] = table

        for table in self.data_map.owned:
            if not table.primary_key:
                raise UnsupportedSchema(
                    f"table {table.name} has no primary key",
                    hint="give it one, or a unique key of NOT NULL columns",
                    where=str(table.name),
                )
            place(table)
        return tuple(ordered.values())

    @cached_property
    def has_tangled_guards(self) -> bool:
        """Whether no order of deletes, table by table, keeps what the guards of others ask.

        `owned` asks the tables through which one is owned, which come before it in `tables` unless
        they own each other in a circle; and whatever a path's condition asks.
        """
        position = {table.name: number for number, table in enumerate(self.tables)}
        return any(
            _asks_others(table)
            or any(
                position.get(hop.parent, -1) > position[table.name]
                for path in table.owners
                for hop in path.hops
            )
            for table in self.tables
        )

    @cached_property
    def entangled(self) -> tuple[Table, ...]:
        """Tables of which no batch of rows may go before the others: what is left is nobody's.

        Those whose guards ask each other in a circle, their own table, or whatever a path's
        condition asks; and all that are owned through them.
        """
        above = {
            table.name: {hop.parent for path in table.owners for hop in path.hops}
            for table in self.tables
        }
        while True:
            farther = {
                name: parents.union(*(above.get(parent, set()) for parent in parents))
                for name, parents in above.items()
            }
            if farther == above:
                break
            above = farther
        core = {
            table.name
            for table in self.tables
            if table.name in above[table.name] or _asks_others(table)
        }
        return tuple(
            table
            for table in self.tables
            if table.name in core or not core.isdisjoint(above[table.name])
        )

    @cached_property
    def by_relation(self) -> dict[str, Table]:
        """Owned and referenced tables by the name that the key log has for them."""
        return {str(table.name): table for table in (*self.tables, *self.data_map.referenced)}

    @cached_property
    def children(self) -> dict[Name, tuple[ChildHop, ...]]:
        """For each table, those whose rows are owned directly through its rows."""
        hops = [
            (child, hop)
            for child in self.tables
            for hop in dict.fromkeys(path.hops[0] for path in child.owners if path.hops)
        ]
        untied = {
            (child.name, hop) for child, hop in hops if not self.data_map.is_tied(child.name, hop)
        }
        # Tables may own each other in a circle, so until no more are found.
        loose: set[Name] = set()
        while (
            more := {
                child.name
                for child, hop in hops
                if (child.name, hop) in untied or hop.parent in loose
            }
            - loose
        ):
            loose |= more
        found: dict[Name, list[ChildHop]] = {}
        for child, hop in hops:
            is_loose = (child.name, hop) in untied or hop.parent in loose
            found.setdefault(hop.parent, []).append(ChildHop(child, hop, is_loose))
        return {name: tuple(some) for name, some in found.items()}

    def loose_children(self, table: Table) -> tuple[ChildHop, ...]:
        """Those of `children` of whose coming and going a key log need not tell."""
        return tuple(hop for hop in self.children.get(table.name, ()) if hop.is_loose)

    @cached_property
    def has_loose_children(self) -> bool:
        """Whether any table has loose children."""
        return any(map(self.loose_children, self.tables))

    def owned(self, table: Table, row: str = "t") -> sql.Composable:
        """Return the condition that the row called `row` is the organization's."""
        return _owned(self, table, row)

    def concerned(self, table: Table, row: str = "t") -> sql.Composable:
        """Return `owned` for an owned table; of a shared one every row counts."""
        return self.owned(table, row) if table.owners else sql.SQL("true")

    @cached_property
    def composed(self) -> dict[tuple[Hashable, ...], Any]:
        """What `once_for_each_scope` keeps."""
        return {}

    def is_owned(self, table: Table) -> bool:
        """Whether `table` is an owned one (and not a referenced one)."""
        return table.name in {owned.name for owned in self.tables}


def once_for_each_scope(
    make: Callable[Concatenate[Scope, P], T],
) -> Callable[Concatenate[Scope, P], T]:
    """Let `make` work once for each scope and its other arguments: it returns the same each time.

    A scope is equal to another only if all of their tables are, which takes long to find out.
    """

    @wraps(make)
    def kept(scope: Scope, /, *args: P.args, **kwargs: P.kwargs) -> T:
        called = (make, *args, *kwargs.items())
        if called not in scope.composed:
            scope.composed[called] = make(scope, *args, **kwargs)
        result: T = scope.composed[called]
        return result

    return kept


def _asks_others(table: Table) -> bool:
    return any(
        condition is not None and "select" in condition.lower()
        for path in table.owners
        for condition in (path.when, *(hop.when for hop in path.hops))
    )


@once_for_each_scope
def _owned(scope: Scope, table: Table, row: str) -> sql.Composed:
    return rendered(owned_by(scope.data_map, table, row, scope.organization))


def column_list(columns: Collection[Column], row: str | None = "t") -> sql.Composed:
    """Return the quoted names of `columns`, as columns of `row` unless that is None."""
    if row is None:
        return sql.SQL(", ").join(sql.Identifier(column.name) for column in columns)
    return sql.SQL(", ").join(sql.Identifier(row, column.name) for column in columns)


def names(columns: Sequence[str], row: str) -> list[sql.Identifier]:
    """Return the names of `columns` as columns of `row`."""
    return [sql.Identifier(row, column) for column in columns]


@lru_cache(4096)
def row_hash(table: Table, row: str = "t") -> sql.Composed:
    """Return a numeric expression: the hash of the row called `row`, generated columns included.

    The text of an explicit list of columns: equal on all versions of PostgreSQL, where a hash of
    the record is not (it hashes enums by OID, takes 1.1 for 1.10 and fails on `point`).
    """
    return rendered(
        sql.SQL("hashtextextended((ROW({}))::text, 0)::numeric").format(
            column_list(table.columns, row)
        )
    )


def key_hash(table: Table, row: str = "t") -> sql.Composed:
    """Return a bigint expression: the hash of the key's text, the same under every collation."""
    return sql.SQL("hashtextextended(({})::text, 0)").format(key_array(table, row))


def keys_join(table: Table, keys: Collection[Key], row: str = "t") -> sql.Composed:
    """Return `JOIN unnest(…) AS k(…) ON …`: only the rows of `row` whose key is in `keys`."""
    return sql.SQL("JOIN {} ON {}").format(keys_relation(table, keys), keys_match(table, row))


def present_keys(
    connection: psycopg.Connection[Any], table: Table, keys: Collection[Key]
) -> set[Key]:
    """Return those of `keys` of which `connection`'s server has rows."""
    if not keys:
        return set()
    statement = sql.SQL("SELECT {} FROM {} AS t {}").format(
        key_array(table, "t"), table.name.identifier, keys_join(table, keys)
    )
    return {tuple(key) for (key,) in connection.execute(statement, prepare=False)}


def keys_relation(table: Table, keys: Collection[Key]) -> sql.Composed:
    """Return `unnest(…) AS k(k1, k2 …)`: `keys` as a relation of texts, each row's key once."""
    return values_relation([table.column(name) for name in table.primary_key], keys)


@lru_cache(4096)
def keys_match(table: Table, row: str = "t") -> sql.Composed:
    """Return the condition that the key of `row` equals that of `k`."""
    return rendered(texts_match([table.column(name) for name in table.primary_key], row))


def texts_relation(values: Collection[Key], width: int) -> sql.Composed:
    """Return `unnest(…) AS k(k1, k2 …)`: tuples of `width` texts as a relation."""
    columns = list(zip(*values, strict=True)) if values else [()] * width
    return _relation([text_array(column) for column in columns])


def _relation(columns: Sequence[sql.Composable]) -> sql.Composed:
    return sql.SQL("unnest({}) AS k({})").format(
        sql.SQL(", ").join(sql.SQL("{}::text[]").format(column) for column in columns),
        sql.SQL(", ").join(sql.Identifier(f"k{number}") for number, _ in enumerate(columns, 1)),
    )


def values_relation(columns: Sequence[Column], values: Collection[Key]) -> sql.Composed:
    """Return `texts_relation` without those `values` of `columns` that equal others.

    Two texts can be one value, or a row would be joined to both: a letter's case changes in a
    `citext`, and the key log has the key before and the key after.
    """
    return _each_once(texts_relation(values, len(columns)), columns)


def has_one_spelling(table: Table) -> bool:
    """Whether rows with equal keys have the same texts as keys, so that sets of these compare."""
    return all(is_spelled_once(table.column(name)) for name in table.primary_key)


def _each_once(relation: sql.Composed, columns: Sequence[Column]) -> sql.Composed:
    if all(is_spelled_once(column) for column in columns):
        return relation
    values = [
        sql.SQL("k{}::{}{}").format(
            sql.SQL(str(number)),
            sql.SQL(column.type),
            sql.SQL(f" COLLATE {column.collation}" if column.collation else ""),
        )
        for number, column in enumerate(columns, start=1)
    ]
    return sql.SQL("(SELECT DISTINCT ON ({}) * FROM {}) AS k").format(
        sql.SQL(", ").join(values), relation
    )


def texts_columns(width: int) -> sql.Composed:
    """Return `k.k1, k.k2 …`: the columns of a relation of `width` texts."""
    return sql.SQL(", ").join(sql.Identifier("k", f"k{number}") for number in range(1, width + 1))


def texts_match(columns: Sequence[Column], row: str = "t") -> sql.Composed:
    """Return the condition that `columns` of `row` equal `k1, k2 …` of `k`."""
    return sql.SQL(" AND ").join(
        sql.SQL("{} = {}::{}").format(
            sql.Identifier(row, column.name),
            sql.Identifier("k", f"k{number}"),
            sql.SQL(column.type),
        )
        for number, column in enumerate(columns, start=1)
    )


def text_array(values: Sequence[str]) -> sql.Composable:
    """Return `values` as the literal of a text array."""
    return sql.Literal(array_text(values))


def array_text(values: Iterable[str | None]) -> str:
    """Return `values` as PostgreSQL writes an array of texts.

    One value, written here: adapting each of fifty thousand elements costs a second.
    """
    elements = (
        "NULL" if value is None else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        for value in values
    )
    return "{" + ",".join(elements) + "}"


def given_keys(table: Table) -> sql.Composed:
    """Return `keys_relation` with a `PARAMETER` for each column; `columns_of` gives the values."""
    columns = [table.column(name) for name in table.primary_key]
    return _each_once(given_rows(len(columns)), columns)


def given_rows(width: int) -> sql.Composed:
    """Return `unnest(…) AS k(k1, k2 …)` with a `PARAMETER` for each of `width` columns."""
    return _relation([PARAMETER] * width)


def columns_of(rows: Collection[Sequence[str | None]]) -> list[str]:
    """Return `rows`, of which there must be one, as one text of an array for each column."""
    return [array_text(column) for column in zip(*rows, strict=True)]


def parse_key(literal: str) -> Key:
    """Return the elements of a text array's literal, as `key_array(…)::text` prints it."""
    elements: list[str] = []
    current: list[str] = []
    quoted = False
    position = 1
    while position < len(literal) - 1:
        character = literal[position]
        if character == "\\":
            position += 1
            current.append(literal[position])
        elif character == '"':
            quoted = not quoted
        elif character == "," and not quoted:
            elements.append("".join(current))
            current = []
        else:
            current.append(character)
        position += 1
    elements.append("".join(current))
    return tuple(elements)
