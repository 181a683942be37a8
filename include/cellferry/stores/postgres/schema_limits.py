"""What keeps a table from being moved, or what a reviewer should know about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cellferry.stores.postgres.catalog import OWN_TRIGGERS, Catalog, Relation
from cellferry.stores.postgres.file_names import Stated
from cellferry.stores.postgres.owner_paths import MAX_PATHS, Owners
from cellferry.stores.postgres.schema import DataMap, Name, Placement, Refusal, Table

LARGE_TABLE_ROWS = 10_000
"""Estimated rows from which a missing index is worth a note."""

_MOVED = frozenset({Placement.OWNED, Placement.REFERENCED})

#: Base types of an organization's key for which equal values have equal text, under any setting.
_KEY_TYPES = frozenset(
    {
        "smallint", "integer", "bigint", "uuid", "text", "character varying", "character", "name",
        "boolean", "date",
    }
)  # fmt: skip


def find_limits(
    catalog: Catalog,
    relations: Mapping[Name, Relation],
    data_map: DataMap,
    owners: Owners,
    stated: Stated,
    unplaced: frozenset[Name],
) -> Iterator[Refusal]:
    """Yield every reason, in map order; the fatal ones keep the whole schema from being moved."""
    yield from _organization_key(catalog, relations, data_map)
    for table in data_map.tables:
        relation = relations[table.name]
        if table.name in unplaced:
            yield _unplaced(table, data_map)
            continue
        if table.placement is not Placement.CELL_LOCAL:
            yield from _indexes_to_shared_rows(table, relation, data_map)
        if table.placement not in _MOVED:
            continue
        yield from _row_key(table, relation)
        yield from _columns(table, relation, catalog, stated)
        yield from _storage(relation, catalog)
        yield from _triggers(relation)
        yield from _uniques(table)
        if table.placement is Placement.OWNED:
            yield from _ownership(table, data_map, owners)
            yield from _indexes(table, relation)
        elif not _is_reached(table, data_map):
            yield Refusal(
                table=str(table.name),
                reason="it is placed as referenced, but no moved row refers to it, nor does it"
                " refer to referenced rows",
                remedy="state the foreign key that leads to it in foreign_keys, or place it as"
                " global or cell-local",
            )
        yield from _references(table, data_map, relation, catalog)
    yield from _other_relations(catalog, stated)


def _organization_key(
    catalog: Catalog, relations: Mapping[Name, Relation], data_map: DataMap
) -> Iterator[Refusal]:
    column = relations[data_map.organization_table].by_column[data_map.organization_column]
    base = _base_name(catalog, column.type_oid, column.type)
    if base not in _KEY_TYPES or not column.deterministic:
        yield Refusal(
            table=str(data_map.organization_table),
            reason=f"the organization's key {column.name} is {column.type}"
            + ("" if column.deterministic else " with a nondeterministic collation")
            + ": equal keys can be written in different ways, so a writer could miss its gate",
            remedy="choose another unique column as organization.column in the data map, of type"
            " integer, uuid or text",
        )


def _base_name(catalog: Catalog, oid: int, printed: str) -> str:
    base = catalog.base_type(oid)
    if base == oid:
        return printed.partition("(")[0]
    found = catalog.types.get(base)
    return found.name if found else _BUILT_IN.get(base, "another type")


#: OIDs of built-in types never change; below a domain the catalog gives the OID only.
_BUILT_IN = {
    16: "boolean", 19: "name", 20: "bigint", 21: "smallint", 23: "integer", 25: "text",
    26: "oid", 1042: "character", 1043: "character varying", 1082: "date", 2950: "uuid",
    24: "regproc", 2202: "regprocedure", 2203: "regoper", 2204: "regoperator", 2205: "regclass",
    2206: "regtype", 3734: "regconfig", 3769: "regdictionary", 4089: "regnamespace",
    4096: "regrole", 4191: "regcollation",
}  # fmt: skip


def _unplaced(table: Table, data_map: DataMap) -> Refusal:
    to_referenced = [
        str(key.parent)
        for key in data_map.foreign_keys
        if key.child == table.name
        and key.parent in data_map.by_name
        and data_map.by_name[key.parent].placement is Placement.REFERENCED
    ]
    reason = "no key column, foreign key or rule of the data map says whose its rows are"
    if to_referenced:
        reason += f"; it only refers to {', '.join(sorted(set(to_referenced)))}"
    columns = [column.name for column in table.columns]
    hint = [name for name in columns if name in {"organization_id", "org_id", "tenant_id"}]
    remedy = f"place it as global or cell-local in the data map, or give tables.{table.name}.owners"
    if hint:
        remedy += f", or list {hint[0]} in organization.key_columns"
    return Refusal(table=str(table.name), reason=reason, remedy=remedy, code="unplaced")


def _row_key(table: Table, relation: Relation) -> Iterator[Refusal]:
    if table.primary_key:
        return
    why = "it has no primary key"
    for index in relation.indexes:
        if index.primary and index.deferrable:
            why = f"its primary key {index.name} is DEFERRABLE, which a move cannot rely on"
    yield Refusal(
        table=str(table.name),
        reason=f"{why}, and no unique index over NOT NULL columns can stand in",
        remedy="add a primary key, or a unique index over NOT NULL columns that is neither partial"
        " nor deferrable",
    )


def _columns(
    table: Table, relation: Relation, catalog: Catalog, stated: Stated
) -> Iterator[Refusal]:
    plain = stated.plain_numbers.get(table.name, frozenset())
    for column in relation.columns:
        base = _base_name(catalog, column.type_oid, column.type)
        if column.name in plain:
            continue
        if base == "oid" or column.type.endswith(".lo"):
            yield Refusal(
                table=str(table.name),
                reason=f"column {column.name} is {column.type}: large objects do not move",
                remedy="store the content as bytea or in object storage; if it is a plain number,"
                f" list it in tables.{table.name}.plain_numbers of the data map",
            )
        elif base.startswith("reg") and base in _BUILT_IN.values():
            yield Refusal(
                table=str(table.name),
                reason=f"column {column.name} is {column.type}, a number that means something in"
                " this database only",
                remedy="store the name as text, or list it in"
                f" tables.{table.name}.plain_numbers of the data map if it may change its meaning",
            )


def _storage(relation: Relation, catalog: Catalog) -> Iterator[Refusal]:
    name = str(relation.name)
    children = [
        other
        for other in catalog.relations
        if relation.oid in other.parents and not other.is_partition
    ]
    if relation.parents or children:
        other = (
            f"inherits from {catalog.by_oid[relation.parents[0]].name}"
            if relation.parents and relation.parents[0] in catalog.by_oid
            else f"is inherited by {children[0].name}"
            if children
            else "inherits from another table"
        )
        yield Refusal(
            table=name,
            reason=f"it {other}: a statement on the parent changes rows of the child, and keys are"
            " not unique across them",
            remedy="ALTER TABLE … NO INHERIT, or turn the hierarchy into declarative partitions",
        )
    for leaf in catalog.leaves(relation):
        if leaf.kind == "f":
            yield Refusal(
                table=name,
                reason=f"its partition {leaf.name} is a foreign table, whose rows are elsewhere",
                remedy="detach the partition, or move its rows into a local one",
            )
    if relation.persistence == "u":
        yield _note(
            name,
            "it is unlogged: a crash of the destination empties it, and a standby never has it",
            "ALTER TABLE … SET LOGGED if its rows must survive",
        )
    if relation.row_security:
        yield _note(
            name,
            "it has row-level security: a role that it applies to sees no rows",
            "give the mover's role BYPASSRLS; plan checks it",
        )


def _triggers(relation: Relation) -> Iterator[Refusal]:
    for kind, found in (("trigger", relation.triggers), ("rule", relation.rules)):
        for one in found:
            if one.enabled in {"A", "R"} and not one.name.startswith(OWN_TRIGGERS):
                word = "ALWAYS" if one.enabled == "A" else "REPLICA"
                yield Refusal(
                    table=str(relation.name),
                    reason=f"{kind} {one.name} is ENABLE {word}: it would fire for every row that"
                    " is moved",
                    remedy=f"ALTER TABLE … ENABLE {kind.upper()} {one.name}"
                    " (fires for the application only), or DISABLE it",
                )


def _uniques(table: Table) -> Iterator[Refusal]:
    for unique in table.uniques:
        if unique.deferrable:
            yield _note(
                str(table.name),
                f"{unique.name} is DEFERRABLE: it is not enforced for moved rows",
                "plan and verify check it; nothing to do",
            )
        elif unique.exclusion and not unique.primary:
            yield _note(
                str(table.name),
                f"{unique.name} is an exclusion constraint: rows of other organizations at the"
                " destination can conflict",
                "plan checks it; include the organization's key in it if it is meant so",
            )


def _ownership(table: Table, data_map: DataMap, owners: Owners) -> Iterator[Refusal]:
    name = str(table.name)
    if table.name in owners.ambiguous:
        yield Refusal(
            table=name,
            reason="several columns refer to an organization: "
            + ", ".join(owners.ambiguous[table.name]),
            remedy=f"say which one owns the row: tables.{name}.owners in the data map",
        )
    if table.name in owners.crowded:
        yield Refusal(
            table=name,
            reason=f"more than {MAX_PATHS} ways lead to the organization",
            remedy=f"choose: tables.{name}.owners in the data map",
        )
    if table.name in owners.certain or table.name == data_map.organization_table:
        return
    if len(table.owners) == 1 and not table.owners[0].hops:
        why = f"{table.owners[0].column} is nullable"
    elif len(table.owners) == 1:
        why = "its only path is nullable"
    else:
        why = f"{len(table.owners)} candidate paths are tried in order"
    yield _note(
        name,
        f"{why}: a row without an owner is nobody's and does not move",
        f"review tables.{name}.owners; plan counts such rows",
    )


def _indexes(table: Table, relation: Relation) -> Iterator[Refusal]:
    if table.estimated_rows < LARGE_TABLE_ROWS:
        return
    for path in table.owners:
        columns = path.hops[0].columns if path.hops else (path.column,)
        if not relation.leading_columns.intersection(columns):
            yield _note(
                str(table.name),
                f"no index begins with {' or '.join(columns)}: plan, copy, verify and clean-up read"
                " the whole table for each organization",
                "CREATE INDEX CONCURRENTLY on it, in every cell",
            )


def _indexes_to_shared_rows(
    table: Table, relation: Relation, data_map: DataMap
) -> Iterator[Refusal]:
    if table.estimated_rows < LARGE_TABLE_ROWS:
        return
    for key in data_map.foreign_keys:
        if key.child != table.name or key.temporal:
            continue
        parent = data_map.by_name[key.parent]
        if parent.placement is not Placement.REFERENCED:
            continue
        if not relation.leading_columns.intersection(key.columns):
            yield _note(
                str(table.name),
                f"no index begins with {' or '.join(key.columns)}: whenever rows of {parent.name}"
                " are brought or change, the whole table is read to find out who else uses them;"
                " rounds may never become short enough for a cutover",
                "CREATE INDEX CONCURRENTLY on it, in every cell",
            )


def _is_reached(table: Table, data_map: DataMap) -> bool:
    return any(
        key.parent == table.name
        and key.child != table.name
        and data_map.by_name[key.child].placement in _MOVED
        for key in data_map.foreign_keys
    )


def _references(
    table: Table, data_map: DataMap, relation: Relation, catalog: Catalog
) -> Iterator[Refusal]:
    name = str(table.name)
    for constraint in relation.constraints:
        if constraint.kind != "f" or constraint.inherited:
            continue
        target = catalog.by_oid.get(constraint.parent or 0)
        if target is None or target.of_extension:
            yield Refusal(
                table=name,
                reason=f"foreign key {constraint.name} leads to a table of an ignored schema or"
                " an extension",
                remedy="take the schema out of ignore_schemas and place its tables",
            )
    for key in data_map.foreign_keys:
        if key.child != table.name or key.optional:
            continue
        parent = data_map.by_name[key.parent]
        what = f"{key.name} ({', '.join(key.columns)} to {key.parent})"
        if key.partial:
            yield _note(
                name,
                f"{what} is declared for single partitions: it is checked, but gives no ownership",
                f"state tables.{name}.owners if it should",
            )
        if key.temporal:
            yield _note(
                name,
                f"{what} has a PERIOD: it gives no ownership",
                f"state tables.{name}.owners if it should",
            )
        if parent.placement is Placement.CELL_LOCAL:
            yield _note(
                name,
                f"{what} leads to a cell-local table: plan refuses rows that use it",
                "place the table as global or referenced, or clear the column",
            )
        if table.placement is Placement.REFERENCED and parent.placement is Placement.OWNED:
            yield _note(
                name,
                f"{what} leads from rows that stay to rows that move: plan refuses rows that"
                " would dangle",
                "clear the column before the move, or give the table an owner",
            )


def _other_relations(catalog: Catalog, stated: Stated) -> Iterator[Refusal]:
    for relation in catalog.relations:
        if relation.of_extension or relation.is_partition:
            continue
        if relation.kind == "f" and relation.name not in stated.placed_elsewhere:
            yield Refusal(
                table=str(relation.name),
                reason="it is a foreign table: its rows are in another server",
                remedy="place it as cell-local in the data map if every cell reaches its own",
            )
        elif relation.kind == "m":
            yield _note(
                str(relation.name),
                "it is a materialized view: it is not moved",
                "REFRESH MATERIALIZED VIEW at the destination after the move",
            )


def _note(table: str, reason: str, remedy: str) -> Refusal:
    return Refusal(table=table, reason=reason, remedy=remedy, fatal=False)
