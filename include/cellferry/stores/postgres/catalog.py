"""Reads the PostgreSQL catalog into frozen types; knows nothing of organizations.

Works on servers 15 and later. Definitions are printed with an empty application search path, so
they compare equal between cells that define the same thing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from typing import Any, LiteralString

import psycopg
from psycopg.rows import dict_row

from cellferry.stores.postgres.schema import KEPT_DEFINITIONS, Name

#: Our own objects are never part of the application's schema.
OWN_SCHEMA = "cellferry"
OWN_TRIGGERS = "zz_cellferry"
"""Prefix of the names of our triggers on the application's tables."""


@dataclass(frozen=True)
class CatalogColumn:
    """A column as the catalog has it; `generated` is '' | 's' (stored) | 'v' (virtual)."""

    name: str
    type: str
    type_oid: int
    not_null: bool = False
    generated: str = ""
    identity: str = ""
    expression: str | None = None
    """The default, or the expression of a generated column."""
    collation: str | None = None
    deterministic: bool = True


@dataclass(frozen=True)
class CatalogConstraint:
    """A constraint; `kind` as `pg_constraint.contype`: p, u, x, f, c."""

    name: str
    kind: str
    columns: tuple[str, ...]
    definition: str
    deferrable: bool = False
    validated: bool = True
    enforced: bool = True
    temporal: bool = False
    parent: int | None = None
    parent_columns: tuple[str, ...] = ()
    on_delete: str = "a"
    inherited: bool = False
    index: int = 0
    operators: tuple[str, ...] = ()


@dataclass(frozen=True)
class CatalogIndex:
    """A unique or exclusion index; a column is '' where the index has an expression."""

    oid: int
    name: str
    columns: tuple[str, ...]
    expressions: tuple[str, ...]
    primary: bool = False
    exclusion: bool = False
    deferrable: bool = False
    valid: bool = True
    nulls_equal: bool = False
    predicate: str | None = None
    definition: str = ""


@dataclass(frozen=True)
class CatalogTrigger:
    """An application's trigger or rule; `enabled` is O (origin) | D | R (replica) | A (always)."""

    name: str
    enabled: str
    definition: str = ""


@dataclass(frozen=True)
class Relation:
    """A table, view, materialized view or foreign table; `kind` as `pg_class.relkind`."""

    oid: int
    name: Name
    kind: str
    persistence: str = "p"
    is_partition: bool = False
    root: int | None = None
    parents: tuple[int, ...] = ()
    estimated_rows: int = 0
    row_security: bool = False
    of_extension: bool = False
    partition_key: str | None = None
    partition_bound: str | None = None
    columns: tuple[CatalogColumn, ...] = ()
    constraints: tuple[CatalogConstraint, ...] = ()
    indexes: tuple[CatalogIndex, ...] = ()
    leading_columns: frozenset[str] = frozenset()
    """Columns that some index, not a partial one, begins with."""
    triggers: tuple[CatalogTrigger, ...] = ()
    rules: tuple[CatalogTrigger, ...] = ()

    @cached_property
    def by_column(self) -> Mapping[str, CatalogColumn]:
        """Columns by name."""
        return {column.name: column for column in self.columns}


@dataclass(frozen=True)
class CatalogType:
    """A type outside `pg_catalog`. `kind` as `pg_type.typtype`: e, d, c, r, m, b."""

    oid: int
    schema: str
    name: str
    kind: str
    definition: str
    base: int | None = None
    element: int | None = None
    attributes: tuple[int, ...] = ()
    extension: str | None = None


@dataclass(frozen=True)
class CatalogSequence:
    """A sequence and one column that it fills."""

    name: Name
    relation: int
    column: str
    minimum: int
    maximum: int
    increment: int


@dataclass(frozen=True)
class Database:
    """Settings of the database that change how values compare."""

    name: str
    server_version: int
    encoding: str
    collation: str
    locale_provider: str
    locale: str
    collation_version: str


@dataclass(frozen=True, eq=False)
class Catalog:
    """One database's schema; the same object as long as nothing of it changes."""

    relations: tuple[Relation, ...]
    types: Mapping[int, CatalogType]
    sequences: tuple[CatalogSequence, ...]
    extensions: Mapping[str, str]
    database: Database

    @cached_property
    def by_oid(self) -> Mapping[int, Relation]:
        """Relations by OID."""
        return {relation.oid: relation for relation in self.relations}

    @cached_property
    def by_name(self) -> Mapping[Name, Relation]:
        """Relations by name."""
        return {relation.name: relation for relation in self.relations}

    def root(self, relation: Relation) -> Relation:
        """Return the partitioned table that `relation` is a part of, or itself."""
        return relation if relation.root is None else self.by_oid.get(relation.root, relation)

    def leaves(self, relation: Relation) -> tuple[Relation, ...]:
        """Leaf partitions of `relation`, if it is partitioned."""
        return tuple(
            leaf
            for leaf in self.relations
            if leaf.is_partition and leaf.root == relation.oid and leaf.kind != "p"
        )

    def types_within(self, type_oid: int) -> Iterator[CatalogType]:
        """Yield the type and every type it is made of, if they are outside `pg_catalog`."""
        seen: set[int] = set()
        todo = [type_oid]
        while todo:
            oid = todo.pop()
            if oid in seen or oid not in self.types:
                continue
            seen.add(oid)
            found = self.types[oid]
            yield found
            todo.extend(
                part for part in (found.base, found.element, *found.attributes) if part is not None
            )

    def base_type(self, type_oid: int) -> int:
        """OID of the type below any domains."""
        found = self.types.get(type_oid)
        while found is not None and found.base is not None:
            type_oid = found.base
            found = self.types.get(type_oid)
        return type_oid

    def part_schemas(self, type_oid: int) -> frozenset[str]:
        """Schemas, beside pg_catalog, of all types that a type is made of, and its own."""
        seen: set[int] = set()
        unseen = {type_oid}
        schemas = set()
        while unseen:
            oid = unseen.pop()
            seen.add(oid)
            if (found := self.types.get(oid)) is not None:
                schemas.add(found.schema)
                parts = {found.base, found.element, *found.attributes}
                unseen |= {part for part in parts if part is not None} - seen
        return frozenset(schemas)


@cache
def queries(file: str, package: str = __package__) -> Mapping[str, LiteralString]:
    """Return the named queries of an SQL file in `package` (`-- name: …` starts one)."""
    text = resources.files(package).joinpath(file).read_text(encoding="utf-8")
    found: dict[str, LiteralString] = {}
    for part in text.split("-- name: ")[1:]:
        name, _, query = part.partition("\n")
        found[name.strip()] = query.strip()
    return found


@contextmanager
def qualified_names(connection: psycopg.Connection[Any]) -> Iterator[None]:
    """Within this block every name that the server prints is schema-qualified."""
    with connection.transaction():
        row = connection.execute("SELECT current_setting('search_path')").fetchone()
        before = next(iter(row.values())) if isinstance(row, dict) else row[0] if row else ""
        connection.execute("SELECT set_config('search_path', 'pg_catalog', true)")
        yield
        connection.execute("SELECT set_config('search_path', %s, true)", (before,))


#: Of each database and each choice of schemas, the catalog that was read last, and its state.
_LAST: dict[tuple[str | int | frozenset[str], ...], tuple[str, Catalog]] = {}


def read_catalog(
    connection: psycopg.Connection[Any], *, ignore_schemas: Collection[str] = ()
) -> Catalog:
    """Read the schema of the database that `connection` is connected to. Changes nothing.

    Every step of a move asks for it. What this process has read before is returned again if the
    server's catalogs hold the very row versions that they held then.

    Args:
        ignore_schemas: schemas that are not the application's; ours is always left out.
    """
    info = connection.info
    ignored = frozenset({OWN_SCHEMA, *ignore_schemas})
    asked = (info.host, info.hostaddr, info.port, info.dbname, ignored)
    with qualified_names(connection), connection.cursor(row_factory=dict_row) as cursor:
        # Before the reading: what changes meanwhile is then read again the next time.
        state = str(_rows(cursor, "state")[0]["state"])
        if (known := _LAST.get(asked)) is not None and known[0] == state:
            return known[1]
        found = _read(cursor, ignored)
    if asked not in _LAST and len(_LAST) >= KEPT_DEFINITIONS:
        _LAST.clear()
    _LAST[asked] = state, found
    return found


def _rows(
    cursor: psycopg.Cursor[dict[str, Any]], name: str, **arguments: Any
) -> list[dict[str, Any]]:
    return cursor.execute(queries("catalog.sql")[name], arguments).fetchall()


def _read(cursor: psycopg.Cursor[dict[str, Any]], ignored: Collection[str]) -> Catalog:
    found = [row for row in _rows(cursor, "relations") if row["schema"] not in ignored]
    oids = [row["oid"] for row in found]
    parts = {
        name: _by_relation(_rows(cursor, name, relations=oids))
        for name in ("columns", "constraints", "indexes", "leading_columns", "triggers", "rules")
    }
    types = {
        row["oid"]: CatalogType(**{**row, "attributes": tuple(row["attributes"])})
        for row in _rows(cursor, "types")
    }
    sequences = tuple(
        CatalogSequence(
            name=Name(row["schema"], row["name"]),
            **{key: value for key, value in row.items() if key not in {"schema", "name"}},
        )
        for row in _rows(cursor, "sequences", relations=oids)
    )
    return Catalog(
        relations=tuple(_relation(row, parts) for row in found),
        types=types,
        sequences=sequences,
        extensions={row["name"]: row["version"] for row in _rows(cursor, "extensions")},
        database=Database(**_rows(cursor, "database")[0]),
    )


def _by_relation(rows: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    grouped: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(row.pop("relation"), []).append(row)
    return grouped


def _relation(
    row: dict[str, Any], parts: Mapping[str, Mapping[int, list[dict[str, Any]]]]
) -> Relation:
    oid = row["oid"]

    def of(name: str) -> list[dict[str, Any]]:
        return parts[name].get(oid, [])

    return Relation(
        oid=oid,
        name=Name(row["schema"], row["name"]),
        kind=row["kind"],
        persistence=row["persistence"],
        is_partition=row["is_partition"],
        root=row["root"],
        parents=tuple(row["parents"]),
        estimated_rows=row["estimated_rows"],
        row_security=row["row_security"],
        of_extension=row["of_extension"],
        partition_key=row["partition_key"],
        partition_bound=row["partition_bound"],
        columns=tuple(
            CatalogColumn(**{key: value for key, value in found.items() if key != "number"})
            for found in of("columns")
        ),
        constraints=tuple(
            CatalogConstraint(
                **{
                    **found,
                    "columns": tuple(found["columns"]),
                    "parent_columns": tuple(found["parent_columns"]),
                    "operators": tuple(found["operators"]),
                }
            )
            for found in of("constraints")
        ),
        indexes=tuple(
            CatalogIndex(
                oid=found["oid"],
                name=found["name"],
                columns=tuple(found["columns"]),
                expressions=tuple(found["expressions"]),
                primary=found["is_primary"],
                exclusion=found["is_exclusion"],
                deferrable=found["deferrable"],
                valid=found["valid"],
                nulls_equal=found["nulls_equal"],
                predicate=found["predicate"],
                definition=found["definition"],
            )
            for found in of("indexes")
        ),
        leading_columns=frozenset(found["name"] for found in of("leading_columns")),
        triggers=tuple(CatalogTrigger(**found) for found in of("triggers")),
        rules=tuple(CatalogTrigger(**found) for found in of("rules")),
    )
