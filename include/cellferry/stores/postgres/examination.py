"""What the checks of a preflight share: both sides, the map, and read-only transactions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import tuple_row

from cellferry.model import Blocker, Cell
from cellferry.stores.postgres.catalog import Catalog
from cellferry.stores.postgres.ownership import owned_by, owner_text
from cellferry.stores.postgres.schema import DataMap, Name, Placement, Table
from cellferry.stores.postgres.sessions import PINNED

#: Settings that change how values are printed or compared.
_PRINTING = (
    "TimeZone", "DateStyle", "IntervalStyle", "extra_float_digits", "bytea_output", "xmloption",
    "lc_monetary", "standard_conforming_strings", "row_security", "jit",
)  # fmt: skip

EXAMPLES = 3
"""How many offending rows a message shows."""

LISTED = 5
"""How many names a message lists."""


@dataclass(frozen=True)
class Site:
    """One side of the move, as preflight sees it."""

    cell: Cell
    connection: psycopg.Connection[Any] = field(repr=False)
    catalog: Catalog = field(repr=False)

    def where(self, table: Name | None = None) -> str:
        """Return the place for a blocker: `cell-2/postgres public.issues`."""
        return f"{self.cell.name}/postgres" + (f" {table}" if table else "")

    @contextmanager
    def reading(self) -> Iterator[psycopg.Cursor[tuple[Any, ...]]]:
        """Give a cursor in a read-only transaction, with all settings pinned.

        The search path holds the schemas of extension types, whose operators (case-insensitive
        equality, say) must be found before those of the type they can be cast to.
        """
        path = ["pg_catalog", *self._type_schemas]
        with (
            self.connection.transaction(),
            self.connection.cursor(row_factory=tuple_row) as cursor,
        ):
            pinned = {name: PINNED[name] for name in _PRINTING}
            pinned["search_path"] = sql.SQL(", ").join(map(sql.Identifier, path)).as_string(None)
            pinned["transaction_read_only"] = "on"
            # in one statement: there are dozens of checks, each with a transaction of its own
            cursor.execute(
                "SELECT set_config(name, value, true)"
                " FROM unnest(%s::text[], %s::text[]) AS pinned (name, value)",
                (list(pinned), list(pinned.values())),
            )
            yield cursor

    @cached_property
    def _type_schemas(self) -> tuple[str, ...]:
        return tuple(
            sorted(
                {
                    found.schema
                    for found in self.catalog.types.values()
                    if found.extension is not None
                }
            )
        )


@dataclass(frozen=True)
class Examination:
    """One preflight: the two sides, the map and whose rows would move."""

    source: Site
    destination: Site
    data_map: DataMap
    organization: str
    unusable: set[Name] = field(default_factory=set)
    """Tables that an earlier check found unreadable or different: their rows are not looked at."""

    @property
    def sites(self) -> tuple[Site, Site]:
        """Source and destination."""
        return self.source, self.destination

    def usable(self, placement: Placement) -> Iterator[Table]:
        """Yield the tables of `placement` whose rows, and whose owners, can be read."""
        for table in self.data_map.placed(placement):
            names = {table.name, *(hop.parent for path in table.owners for hop in path.hops)}
            if not names & self.unusable:
                yield table

    def is_usable(self, name: Name) -> bool:
        """Whether rows of this table, and their owners, can be read."""
        table = self.data_map.by_name[name]
        return any(one is table for one in self.usable(table.placement))

    def owned(self, table: Table, row: str = "t") -> sql.Composed:
        """Condition: the row is this organization's."""
        return owned_by(self.data_map, table, row, self.organization)

    def owner(self, table: Table, row: str = "t") -> sql.Composed:
        """Text expression: whose the row is."""
        return owner_text(table, row)


def examples(rows: list[tuple[Any, ...]]) -> str:
    """Return the first few rows for a message."""
    texts = ["(" + ", ".join(str(value) for value in row) + ")" for row in rows[:EXAMPLES]]
    return ", ".join(texts) + (", …" if len(rows) > EXAMPLES else "")


def listed(names: list[str]) -> str:
    """Return the first few names for a message, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def literally(query: sql.Composable, cursor: psycopg.Cursor[Any]) -> sql.SQL:
    """Return `query` so that its percent signs survive a statement with parameters."""
    return sql.SQL(query.as_string(cursor).replace("%", "%%"))


def warning(code: str, where: str, reason: str, remedy: str) -> Blocker:
    """Return a blocker that blocks nothing."""
    return Blocker(code, where, reason, remedy, fatal=False)
