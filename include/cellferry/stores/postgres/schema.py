"""Tables, keys and ownership as frozen types: what the data map says about a schema.

Discovery (`data_map`) fills these in; the gate, the copier and the verifier only read them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property, wraps
from typing import TypeVar

from psycopg import sql

T = TypeVar("T")

#: Data maps or catalogs of which this process keeps what was made.
KEPT_DEFINITIONS = 16


class Placement(StrEnum):
    """What a move does with a table's rows."""

    OWNED = "owned"
    REFERENCED = "referenced"
    GLOBAL = "global"
    CELL_LOCAL = "cell-local"


@dataclass(frozen=True)
class Name:
    """A schema-qualified name, as the catalog has it (unquoted, case kept)."""

    schema: str
    name: str

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"

    @property
    def identifier(self) -> sql.Identifier:
        """The quoted name for SQL."""
        return sql.Identifier(self.schema, self.name)


@dataclass(frozen=True)
class Column:
    """A column. `type` is what `format_type` prints, schema-qualified where needed."""

    name: str
    type: str
    not_null: bool = False
    generated: bool = False
    """A generated column (stored or virtual): never copied, compared on both sides."""
    identity: str = ""
    """'' | 'a' (always) | 'd' (by default)."""
    collation: str | None = None
    """Set for collatable types, when it is not `C` or `POSIX`."""
    deterministic: bool = True
    """Whether texts that are equal under the collation are the same bytes."""
    part_schemas: frozenset[str] = frozenset()
    """Schemas of what the type is made of: a domain's base, an array's element, fields."""

    @property
    def type_schemas(self) -> frozenset[str]:
        """The schemas of the type and of what it is made of, beside pg_catalog."""
        match = _QUALIFIED_TYPE.match(self.type)
        if match is None:
            return self.part_schemas
        found = match.group(1)
        own = found[1:-1].replace('""', '"') if found.startswith('"') else found
        return self.part_schemas | {own}


_QUALIFIED_TYPE = re.compile(r'^("(?:[^"]|"")+"|[^".\s]+)\.')


@dataclass(frozen=True)
class Hop:
    """One step of a foreign-key path, from the child to its parent; no constraint is needed."""

    columns: tuple[str, ...]
    parent: Name
    parent_columns: tuple[str, ...]
    when: str | None = None
    """Condition over the parent's row (alias `{row}`): the parent is polymorphic itself."""


@dataclass(frozen=True)
class OwnerPath:
    """One way from a row to its organization.

    Attributes:
        hops: empty when the row itself carries the organization's key.
        column: the organization's key column in the last hop's parent, or in the row itself.
        when: SQL condition over the row (alias `{row}`) under which this path applies: for
            polymorphic references, `{row}.noteable_type = 'Issue'`. None means always.
    """

    hops: tuple[Hop, ...]
    column: str
    when: str | None = None


@dataclass(frozen=True)
class Unique:
    """A unique index or exclusion constraint; `columns` empty when it is over expressions."""

    name: str
    columns: tuple[str, ...]
    deferrable: bool = False
    predicate: str | None = None
    definition: str = ""
    primary: bool = False
    exclusion: bool = False
    expressions: tuple[str, ...] = ()
    """What is unique: column names or expressions over unqualified columns, as SQL."""
    operators: tuple[str, ...] = ()
    """For an exclusion constraint: the operator of each expression."""
    nulls_equal: bool = False
    """NULLS NOT DISTINCT."""


@dataclass(frozen=True)
class ForeignKey:
    """A foreign key, declared in the catalog or in the data map's file."""

    name: str
    child: Name
    columns: tuple[str, ...]
    parent: Name
    parent_columns: tuple[str, ...]
    deferrable: bool = False
    on_delete: str = "a"
    """As `pg_constraint.confdeltype`: a no action, r restrict, c cascade, n null, d default."""
    declared: bool = True
    trusted: bool = True
    """False when older rows may violate it: NOT VALID or NOT ENFORCED."""
    partial: bool = False
    """Declared for, or pointing at, single partitions only."""
    temporal: bool = False
    """With PERIOD: the last column refers by containment, not by equality."""
    optional: bool = False
    """Leads from referenced rows to rows that belong to them and travel with them, if any."""


@dataclass(frozen=True)
class Table:
    """A table of the application (the root, if it is partitioned)."""

    name: Name
    placement: Placement
    columns: tuple[Column, ...]
    primary_key: tuple[str, ...]
    """Key columns in index order. For a table without one, a NOT NULL unique key, or empty."""
    owners: tuple[OwnerPath, ...] = ()
    """For owned tables; the first that gives an organization wins."""
    uniques: tuple[Unique, ...] = ()
    partitions: tuple[Name, ...] = ()
    """Leaf partitions, if it is partitioned."""
    estimated_rows: int = 0

    def __hash__(self) -> int:
        """By name alone: statements are looked up by table, and the hash of all fields is slow."""
        return hash(self.name)

    def column(self, name: str) -> Column:
        """Return the column called `name`; KeyError when there is none."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> Mapping[str, Column]:
        return {column.name: column for column in self.columns}

    @property
    def copied_columns(self) -> tuple[Column, ...]:
        """The columns that travel: all but generated ones."""
        return tuple(column for column in self.columns if not column.generated)

    @property
    def has_direct_owner(self) -> bool:
        """Whether the row itself carries its organization's key, always."""
        return len(self.owners) == 1 and not self.owners[0].hops and self.owners[0].when is None


@dataclass(frozen=True)
class Sequence:
    """A sequence that fills a column of a moved table."""

    name: Name
    table: Name
    column: str
    minimum: int
    maximum: int
    increment: int


@dataclass(frozen=True)
class Refusal:
    """Why a table cannot be moved, and what would make it movable."""

    table: str
    reason: str
    remedy: str
    fatal: bool = True
    code: str = "unsupported"
    """Stable, kebab-case: `unplaced`, `no-key`, `large-object`, …"""


@dataclass(frozen=True)
class DataMap:
    """The placement of every table of a schema.

    Attributes:
        tables: all tables, owned ones with parents before children (cycles broken anywhere).
        organization_type: SQL type of the organization's key (`bigint`, `uuid`, `text`, …).
        refusals: what discovery cannot handle; non-fatal ones are notes for the reviewer.
        fingerprint: changes when any definition changes that a move depends on.
    """

    tables: tuple[Table, ...]
    foreign_keys: tuple[ForeignKey, ...]
    sequences: tuple[Sequence, ...]
    organization_table: Name
    organization_column: str
    organization_type: str
    materialized_views: tuple[Name, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    fingerprint: str = ""
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def by_name(self) -> Mapping[Name, Table]:
        """Tables by name."""
        return {table.name: table for table in self.tables}

    def placed(self, placement: Placement) -> tuple[Table, ...]:
        """Tables with `placement`, in map order."""
        return tuple(table for table in self.tables if table.placement is placement)

    @property
    def owned(self) -> tuple[Table, ...]:
        """Owned tables, parents before children."""
        return self.placed(Placement.OWNED)

    @property
    def referenced(self) -> tuple[Table, ...]:
        """Tables whose rows are copied if absent and never deleted."""
        return self.placed(Placement.REFERENCED)

    @cached_property
    def beside(self) -> tuple[Table, ...]:
        """Cell-local tables that share a foreign key with tables that move.

        None of their rows moves. A row that refers to one, or that one refers to, must be seen.
        """
        moving = {table.name for table in (*self.owned, *self.referenced)}
        linked = {key.child for key in self.foreign_keys if key.parent in moving} | {
            key.parent for key in self.foreign_keys if key.child in moving
        }
        return tuple(table for table in self.placed(Placement.CELL_LOCAL) if table.name in linked)

    @cached_property
    def type_schemas(self) -> frozenset[str]:
        """Schemas of the columns' types, beside pg_catalog: of extensions and of its own."""
        return frozenset().union(
            *(column.type_schemas for table in self.tables for column in table.columns)
        )

    @cached_property
    def search_path(self) -> tuple[str, ...]:
        """Schemas, behind pg_catalog, where a session finds the operators of all columns.

        Those of an extension type (case-insensitive equality) must be found before those of the
        type that it is cast to.
        """
        own = {table.name.schema for table in self.tables}
        return tuple(sorted(own | self.type_schemas | {"public"}))

    def is_tied(self, child: Name, hop: Hop) -> bool:
        """Whether a constraint keeps a parent for each row of `child` that `hop` leads up from."""
        return (child, hop.columns, hop.parent, hop.parent_columns) in self._ties

    @cached_property
    def _ties(self) -> frozenset[tuple[Name, tuple[str, ...], Name, tuple[str, ...]]]:
        return frozenset(
            (key.child, key.columns, key.parent, key.parent_columns)
            for key in self.foreign_keys
            if key.declared and key.trusted and not key.partial and not key.temporal
        )

    def references(self, table: Table) -> tuple[ForeignKey, ...]:
        """Foreign keys from `table` to referenced tables."""
        return tuple(
            key
            for key in self.foreign_keys
            if key.child == table.name
            and key.parent in self.by_name
            and self.by_name[key.parent].placement is Placement.REFERENCED
        )


def once_for_each_definition(make: Callable[[DataMap], T]) -> Callable[[DataMap], T]:
    """Let `make` work once for all data maps with the same fingerprint.

    Each step of a move discovers the map anew, and what follows from the definitions alone is the
    same again. `make` must read nothing that changes without the fingerprint, such as counts.
    """
    kept: dict[str, T] = {}

    @wraps(make)
    def found(data_map: DataMap) -> T:
        if not data_map.fingerprint:
            return make(data_map)
        known = kept.get(data_map.fingerprint)
        if known is not None:
            return known
        if len(kept) >= KEPT_DEFINITIONS:
            kept.clear()
        made = kept[data_map.fingerprint] = make(data_map)
        return made

    return found
