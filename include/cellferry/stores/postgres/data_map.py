"""Discovers the data map: what a move does with every table of a database.

`discover` reads the catalog and the file that completes it; `build` is the same without a server.
Whatever cannot be moved becomes a `Refusal` with its remedy, never a silent omission.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import psycopg
from psycopg import sql

from cellferry.errors import InvalidInput, TransientError, UnsupportedSchema
from cellferry.stores.postgres import file_names, sessions
from cellferry.stores.postgres.catalog import (
    Catalog,
    CatalogColumn,
    CatalogIndex,
    Relation,
    read_catalog,
)
from cellferry.stores.postgres.data_map_file import DataMapFile
from cellferry.stores.postgres.file_names import Stated
from cellferry.stores.postgres.map_review import render_for_review, show
from cellferry.stores.postgres.owner_paths import Graph, Link, Owners, Reference, find_owners
from cellferry.stores.postgres.ownership import owned_by, owner_text
from cellferry.stores.postgres.schema import (
    KEPT_DEFINITIONS,
    Column,
    DataMap,
    ForeignKey,
    Name,
    Placement,
    Refusal,
    Table,
    Unique,
)
from cellferry.stores.postgres.schema import (
    Sequence as MapSequence,
)
from cellferry.stores.postgres.schema_limits import find_limits
from cellferry.stores.postgres.table_order import parents_first

__all__ = ["build", "discover", "render_for_review", "require_supported", "show"]

#: Collations that every server sorts alike.
_BYTEWISE = frozenset({'pg_catalog."C"', 'pg_catalog."POSIX"'})

#: Of each catalog, the maps that were built of it, by the file and the arguments.
_BUILT: WeakKeyDictionary[Catalog, dict[tuple[str | None, ...], DataMap]] = WeakKeyDictionary()

#: Databases, roles and fingerprints of which `_probe` found every path right.
_FOUND_RIGHT: set[tuple[str | int, ...]] = set()


def discover(
    connection: psycopg.Connection[Any],
    completion: DataMapFile | None = None,
    *,
    organization_table: str | None = None,
    organization_column: str | None = None,
) -> DataMap:
    """Read the schema that `connection` sees and place every table. Changes nothing.

    Args:
        completion: the data map's file, which adds to what the catalog says and overrules it.
        organization_table: instead of the file's, `schema.table`.
        organization_column: instead of the file's.

    Returns:
        The map. What cannot be moved is in `refusals`; see `require_supported`.

    Raises:
        InvalidInput: the file names something that does not exist.
        UnsupportedSchema: the organization's table is not found or not unique.
    """
    file = completion or DataMapFile()
    catalog = read_catalog(connection, ignore_schemas=file.ignore_schemas)
    asked = (file.source, file.model_dump_json(), organization_table, organization_column)
    built = _BUILT.setdefault(catalog, {})
    if asked not in built:
        built[asked] = build(
            catalog,
            file,
            organization_table=organization_table,
            organization_column=organization_column,
        )
    data_map = built[asked]
    probed = _probe(connection, data_map)
    return _with(data_map, refusals=(*data_map.refusals, *probed)) if probed else data_map


def require_supported(data_map: DataMap) -> None:
    """Raise when any table cannot be moved.

    Raises:
        UnsupportedSchema: names each table, the reason and the remedy.
    """
    fatal = [refusal for refusal in data_map.refusals if refusal.fatal]
    if fatal:
        lines = "; ".join(f"{one.table}: {one.reason} ({one.remedy})" for one in fatal)
        raise UnsupportedSchema(
            f"{len(fatal)} reasons keep this schema from being moved: {lines}",
            hint="complete the data map's file or change the schema, see docs/data-map.md",
        )


def build(
    catalog: Catalog,
    file: DataMapFile,
    *,
    organization_table: str | None = None,
    organization_column: str | None = None,
) -> DataMap:
    """Place every table of `catalog`. Same arguments, result and errors as `discover`."""
    relations = {
        relation.name: relation
        for relation in catalog.relations
        if relation.kind in {"r", "p"} and not relation.is_partition and not relation.of_extension
    }
    stated = file_names.resolve(file, catalog, relations)
    organization = _organization(
        catalog, relations, file, stated, organization_table, organization_column
    )
    if organization[0] in stated.placements:
        raise file.fault(
            f"placement.{stated.placements[organization[0]]}",
            f"{organization[0]} holds the organizations and is always owned",
            "take it out of the list",
        )
    foreign_keys = _foreign_keys(catalog, relations, stated)
    owners = _find_owners(relations, foreign_keys, stated, organization)
    for name in stated.owners:
        if name not in owners.paths:
            raise file.fault(
                f"tables.{name}.owners",
                "no path leads from this table to the organization",
                "go through a table that is owned itself",
            )
    placements, unplaced = _place(relations, foreign_keys, owners, stated, file)
    foreign_keys = (*foreign_keys, *_belongings(foreign_keys, placements))
    tables = _in_order(
        [
            _table(catalog, relation, placements[relation.name], owners, stated)
            for relation in relations.values()
        ],
        foreign_keys,
        organization[0],
    )
    key = relations[organization[0]].by_column[organization[1]]
    data_map = DataMap(
        tables=tables,
        foreign_keys=foreign_keys,
        sequences=_sequences(catalog, placements),
        organization_table=organization[0],
        organization_column=organization[1],
        organization_type=key.type,
        materialized_views=tuple(
            relation.name
            for relation in catalog.relations
            if relation.kind == "m" and not relation.of_extension
        ),
    )
    refusals = find_limits(catalog, relations, data_map, owners, stated, unplaced)
    return _with(data_map, refusals=tuple(refusals), fingerprint=_fingerprint(catalog, data_map))


def _with(data_map: DataMap, **changes: Any) -> DataMap:
    # dataclasses.replace would carry nothing over either: cached properties live in __dict__
    fields = {name: getattr(data_map, name) for name in DataMap.__dataclass_fields__}
    return DataMap(**{**fields, **changes})


def _organization(
    catalog: Catalog,
    relations: Mapping[Name, Relation],
    file: DataMapFile,
    stated: Stated,
    table: str | None,
    column: str | None,
) -> tuple[Name, str]:
    """Return the organization's table and key column."""
    if table is not None:
        name = file_names.table_named(table, relations)
        if name is None:
            raise InvalidInput(
                f"there is no table {table!r} that could hold organizations",
                hint="give schema.table as the catalog has it",
            )
    elif stated.organization_table is not None:
        name = stated.organization_table
    else:
        name = _conventional_organization(catalog, relations)
    relation = relations[name]
    wanted = column or file.organization.column
    if wanted is None:
        key = _row_key(relation, None)
        if len(key) != 1:
            raise UnsupportedSchema(
                f"the primary key of {name} is not a single column",
                hint="name the organization's key as organization.column in the data map",
                where=str(name),
            )
        return name, key[0]
    if wanted not in relation.by_column:
        raise InvalidInput(
            f"{name} has no column {wanted!r}",
            hint=f"choose one of {', '.join(relation.by_column)} as organization.column",
            where=str(name),
        )
    if not any(index.columns == (wanted,) for index in _row_keys(relation)):
        raise UnsupportedSchema(
            f"{name}.{wanted} does not identify an organization: it is not NOT NULL and unique",
            hint="choose the primary key or another NOT NULL unique column",
            where=str(name),
        )
    return name, wanted


def _conventional_organization(catalog: Catalog, relations: Mapping[Name, Relation]) -> Name:
    found = [name for name in relations if name.name.lower() in {"organizations", "organization"}]
    if len(found) == 1:
        return found[0]
    pointed_at: dict[Name, int] = {}
    for relation in relations.values():
        for constraint in relation.constraints:
            parent = catalog.by_oid.get(constraint.parent or 0)
            if constraint.kind == "f" and parent is not None:
                pointed_at[parent.name] = pointed_at.get(parent.name, 0) + 1
    most = sorted(pointed_at, key=lambda name: (-pointed_at[name], str(name)))[:3]
    candidates = found or most
    raise UnsupportedSchema(
        "several tables could hold the organizations"
        if found
        else "no table is called organizations",
        hint="name it as organization.table in the data map"
        + (f"; candidates: {', '.join(str(name) for name in candidates)}" if candidates else ""),
    )


def _foreign_keys(
    catalog: Catalog, relations: Mapping[Name, Relation], stated: Stated
) -> tuple[ForeignKey, ...]:
    """Foreign keys between tables of the map, partitions replaced by their roots."""
    found: dict[tuple[object, ...], ForeignKey] = {}
    for relation in catalog.relations:
        child = catalog.root(relation)
        if child.name not in relations:
            continue
        for constraint in relation.constraints:
            if constraint.kind != "f" or constraint.inherited or constraint.parent is None:
                continue
            target = catalog.by_oid.get(constraint.parent)
            if target is None:
                continue
            parent = catalog.root(target)
            if parent.name not in relations:
                continue
            key = ForeignKey(
                name=constraint.name,
                child=child.name,
                columns=constraint.columns,
                parent=parent.name,
                parent_columns=constraint.parent_columns,
                deferrable=constraint.deferrable,
                on_delete=constraint.on_delete,
                partial=relation is not child or target is not parent,
                temporal=constraint.temporal,
                trusted=constraint.validated and constraint.enforced,
            )
            found.setdefault((key.child, key.columns, key.parent, key.parent_columns), key)
    for key in stated.foreign_keys:
        found.setdefault((key.child, key.columns, key.parent, key.parent_columns), key)
    return tuple(
        sorted(found.values(), key=lambda key: (str(key.child), key.columns, str(key.parent)))
    )


def _find_owners(
    relations: Mapping[Name, Relation],
    foreign_keys: Iterable[ForeignKey],
    stated: Stated,
    organization: tuple[Name, str],
) -> Owners:
    return find_owners(
        Graph(
            organization_table=organization[0],
            organization_column=organization[1],
            columns={
                name: {
                    column.name: column.not_null
                    for column in relation.columns
                    if column.generated != "v"  # no trigger sees a virtual column's value
                }
                for name, relation in relations.items()
            },
            references=[
                Reference(
                    key.child, key.columns, key.parent, key.parent_columns, key.on_delete == "c"
                )
                for key in foreign_keys
                if not key.temporal and not key.partial
            ],
            stated={
                name: tuple(
                    Link(
                        owner.columns,
                        owner.parent,
                        owner.parent_columns,
                        owner.when,
                    )
                    for owner in links
                )
                for name, links in stated.owners.items()
            },
            closed=frozenset(stated.placements),
            key_columns=stated.key_columns,
        )
    )


def _place(
    relations: Mapping[Name, Relation],
    foreign_keys: Sequence[ForeignKey],
    owners: Owners,
    stated: Stated,
    file: DataMapFile,
) -> tuple[dict[Name, Placement], frozenset[Name]]:
    """Return every table's placement, and the tables that nothing places."""
    placements = dict(stated.placements)
    placements.update(dict.fromkeys(owners.paths, Placement.OWNED))
    moved = [
        name
        for name, placement in placements.items()
        if placement in {Placement.OWNED, Placement.REFERENCED}
    ]
    parents: dict[Name, list[Name]] = {}
    for key in foreign_keys:
        parents.setdefault(key.child, []).append(key.parent)
    while moved:  # what owned rows refer to, and what that refers to
        for parent in parents.get(moved.pop(), ()):
            if parent not in placements:
                placements[parent] = Placement.REFERENCED
                moved.append(parent)
    unplaced = frozenset(name for name in relations if name not in placements)
    default = Placement.GLOBAL if file.unplaced == "global" else Placement.CELL_LOCAL
    placements.update(dict.fromkeys(unplaced, default))
    return placements, unplaced if file.unplaced == "refuse" else frozenset()


def _belongings(
    foreign_keys: Sequence[ForeignKey], placements: Mapping[Name, Placement]
) -> list[ForeignKey]:
    """Foreign keys from referenced rows back to rows that belong to them.

    A table that the file places as referenced although no moved table refers to it (the e-mail
    addresses of shared users) travels with the referenced rows that it refers to.
    """
    moved = {Placement.OWNED, Placement.REFERENCED}
    reached = {key.parent for key in foreign_keys if placements.get(key.child) in moved}
    return [
        ForeignKey(
            name=f"rows of {key.child} that belong to {key.parent}",
            child=key.parent,
            columns=key.parent_columns,
            parent=key.child,
            parent_columns=key.columns,
            declared=False,
            trusted=False,
            optional=True,
        )
        for key in foreign_keys
        if placements.get(key.child) is Placement.REFERENCED
        and key.child not in reached
        and placements.get(key.parent) is Placement.REFERENCED
        and key.child != key.parent
        and not key.temporal
        and not key.partial
    ]


def _table(
    catalog: Catalog,
    relation: Relation,
    placement: Placement,
    owners: Owners,
    stated: Stated,
) -> Table:
    leaves = catalog.leaves(relation)
    operators = {
        constraint.index: constraint.operators
        for constraint in relation.constraints
        if constraint.kind == "x"
    }
    return Table(
        name=relation.name,
        placement=placement,
        columns=tuple(_column(catalog, column) for column in relation.columns),
        primary_key=_row_key(relation, stated.keys.get(relation.name)),
        owners=owners.paths.get(relation.name, ()) if placement is Placement.OWNED else (),
        uniques=tuple(
            Unique(
                name=index.name,
                columns=index.columns if all(index.columns) else (),
                deferrable=index.deferrable,
                predicate=index.predicate,
                definition=index.definition,
                primary=index.primary,
                exclusion=index.exclusion,
                expressions=index.expressions,
                operators=operators.get(index.oid, ()),
                nulls_equal=index.nulls_equal,
            )
            for index in relation.indexes
            if index.valid
        ),
        partitions=tuple(leaf.name for leaf in leaves),
        estimated_rows=max(relation.estimated_rows, sum(leaf.estimated_rows for leaf in leaves)),
    )


def _column(catalog: Catalog, column: CatalogColumn) -> Column:
    collation = column.collation
    if collation == 'pg_catalog."default"' and (
        catalog.database.locale_provider == "c" and catalog.database.collation in {"C", "POSIX"}
    ):
        collation = None
    return Column(
        name=column.name,
        type=column.type,
        not_null=column.not_null,
        generated=bool(column.generated),
        identity=column.identity,
        collation=None if collation in _BYTEWISE else collation,
        deterministic=column.deterministic,
        part_schemas=catalog.part_schemas(column.type_oid),
    )


def _row_keys(relation: Relation) -> list[CatalogIndex]:
    """Indexes that identify every row, the primary key first, then the fewest columns."""
    usable = [
        index
        for index in relation.indexes
        if index.valid
        and not index.deferrable
        and index.predicate is None
        and (index.primary or not index.exclusion)
        and all(name and relation.by_column[name].not_null for name in index.columns)
    ]

    def preference(index: CatalogIndex) -> tuple[bool, bool, int, str]:
        # the gate of a table with a generated key fires later than others
        generated = any(relation.by_column[name].generated for name in index.columns)
        return not index.primary, generated, len(index.columns), index.name

    return sorted(usable, key=preference)


def _row_key(relation: Relation, wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    keys = [index.columns for index in _row_keys(relation)]
    if wanted is not None:
        keys = [columns for columns in keys if set(columns) == set(wanted)]
    return keys[0] if keys else ()


def _sequences(catalog: Catalog, placements: Mapping[Name, Placement]) -> tuple[MapSequence, ...]:
    found: dict[tuple[Name, Name, str], MapSequence] = {}
    for sequence in catalog.sequences:
        table = catalog.root(catalog.by_oid[sequence.relation])
        if placements.get(table.name) not in {Placement.OWNED, Placement.REFERENCED}:
            continue
        found.setdefault(
            (sequence.name, table.name, sequence.column),
            MapSequence(
                name=sequence.name,
                table=table.name,
                column=sequence.column,
                minimum=sequence.minimum,
                maximum=sequence.maximum,
                increment=sequence.increment,
            ),
        )
    return tuple(found.values())


def _in_order(
    tables: Sequence[Table], foreign_keys: Sequence[ForeignKey], organization: Name
) -> tuple[Table, ...]:
    """Parents before children."""
    by_name = {table.name: table for table in tables}
    owners = {
        table.name: {path.hops[0].parent for path in table.owners if path.hops} for table in tables
    }
    parents = {name: set(above) for name, above in owners.items()}
    for key in foreign_keys:
        if not key.optional:
            parents[key.child].add(key.parent)
    parents[organization] = set()
    return tuple(by_name[name] for name in parents_first(parents, owners))


def _fingerprint(catalog: Catalog, data_map: DataMap) -> str:
    """Hash of every definition that a move depends on; equal in cells that define the same."""
    blocks = [f"organization {data_map.organization_table} {data_map.organization_column}"]
    for table in data_map.tables:
        if table.placement is Placement.CELL_LOCAL:
            continue
        relation = catalog.by_name[table.name]
        lines = [f"{index.definition}" for index in relation.indexes]
        # a key to a partitioned table has a clone for each partition, named as the server likes
        lines.extend(
            f"{one.name} {one.definition}" for one in relation.constraints if not one.inherited
        )
        for column in relation.columns:
            lines.append(
                f"{column.name} {column.type} {column.not_null} {column.generated!r}"
                f" {column.identity!r} {column.collation}"
                f" {column.expression if column.generated else ''}"
            )
            lines.extend(
                f"{found.name} {found.definition}"
                for found in catalog.types_within(column.type_oid)
            )
        blocks.append(
            f"{table.name} {table.placement} {table.primary_key} {table.owners}"
            f" {relation.partition_key}\n" + "\n".join(sorted(lines))
        )
    return hashlib.sha256("\n\n".join(sorted(blocks)).encode()).hexdigest()


def _are_valid(connection: psycopg.Connection[Any], queries: Sequence[sql.Composed]) -> bool:
    """Whether the server plans all of them. Asked in one statement, as each step of a move asks."""
    columns = sql.SQL(", ").join(sql.SQL("EXISTS ({})").format(one) for one in queries)
    try:
        with connection.transaction():
            connection.execute(sql.SQL("SELECT {}").format(columns))
    except psycopg.Error as error:
        if error.sqlstate is None:
            raise  # the connection is to blame
        return False  # the caller asks for one after the other
    return True


def _probe(connection: psycopg.Connection[Any], data_map: DataMap) -> list[Refusal]:
    """Let the server check the ownership of every table: types that do not compare, bad SQL.

    What this database has found right is not asked again by this process, for each step discovers
    the map anew. A function or an operator that goes away later fails the statement that uses it.
    """
    info = connection.info
    asked = (info.host, info.port, info.dbname, info.user, data_map.fingerprint)
    if asked in _FOUND_RIGHT:
        return []
    # no value is compared: LIMIT 0 plans the statement and ends
    queries = [
        sql.SQL("SELECT {} FROM {} AS t WHERE {} LIMIT 0").format(
            owner_text(table, "t"), table.name.identifier, owned_by(data_map, table, "t", None)
        )
        for table in data_map.owned
    ]
    if _are_valid(connection, queries):
        if len(_FOUND_RIGHT) >= KEPT_DEFINITIONS:
            _FOUND_RIGHT.clear()
        _FOUND_RIGHT.add(asked)
        return []
    refused: list[Refusal] = []
    for table, query in zip(data_map.owned, queries, strict=True):
        try:
            with connection.transaction():
                connection.execute(query)
        except psycopg.errors.InsufficientPrivilege:
            continue  # plan reports privileges, with their remedy
        except psycopg.Error as error:
            if error.sqlstate is None or isinstance(
                sessions.translated(error, str(table.name)), TransientError
            ):
                raise  # the server or the connection is to blame, not the path
            refused.append(
                Refusal(
                    table=str(table.name),
                    reason="the path to its organization is not valid SQL: "
                    + str(error).splitlines()[0],
                    remedy="give the key columns one type, or correct tables."
                    f"{table.name}.owners in the data map",
                )
            )
    return refused
