"""Compares the schemas of two cells, as far as a move depends on them."""

from __future__ import annotations

from collections.abc import Iterator

from cellferry.model import Blocker
from cellferry.stores.postgres.catalog import (
    OWN_TRIGGERS,
    CatalogColumn,
    CatalogConstraint,
    CatalogIndex,
    Relation,
)
from cellferry.stores.postgres.examination import Examination, warning
from cellferry.stores.postgres.schema import Name, Placement

_REMEDY = "run the same schema migrations in both cells, then plan again"

_KINDS = {"p": "primary key", "u": "unique", "x": "exclusion", "f": "foreign key", "c": "check"}

_NEVER_MOVED = frozenset({Placement.CELL_LOCAL})


def find_differences(examination: Examination) -> Iterator[Blocker]:
    """Yield what differs between the cells: database, extensions, types, tables.

    Tables that differ become unusable for the checks of rows.
    """
    yield from _databases(examination)
    yield from _extensions(examination)
    yield from _types(examination)
    for table in examination.data_map.tables:
        if table.placement in _NEVER_MOVED:
            continue
        found = list(_table(examination, table.name))
        if any(blocker.fatal for blocker in found):
            examination.unusable.add(table.name)
        yield from found


def _databases(examination: Examination) -> Iterator[Blocker]:
    source, destination = (site.catalog.database for site in examination.sites)
    where = examination.destination.where()
    if source.encoding != destination.encoding:
        yield Blocker(
            "encoding-differs",
            where,
            f"the database is encoded in {destination.encoding}, the source in {source.encoding}",
            f"make the destination's database with ENCODING {source.encoding}",
        )
    ours = (source.locale_provider, source.collation, source.locale)
    theirs = (destination.locale_provider, destination.collation, destination.locale)
    if ours != theirs:
        yield warning(
            "collation-differs",
            where,
            f"the database sorts text by {_locale(theirs)}, the source by {_locale(ours)}",
            "unique and check constraints over text can decide differently; make the databases"
            " with the same locale",
        )
    elif source.collation_version != destination.collation_version:
        yield warning(
            "collation-differs",
            where,
            f"version {destination.collation_version or 'unknown'} of the collation"
            f" {_locale(theirs)}, the source has {source.collation_version or 'unknown'}",
            "text may sort differently; moves do not depend on it, the application may",
        )
    if destination.server_version // 10_000 < source.server_version // 10_000:
        yield warning(
            "server-version",
            where,
            f"PostgreSQL {destination.server_version // 10_000} is older than the source's"
            f" {source.server_version // 10_000}",
            "upgrade the destination, or make sure that the application runs on both",
        )


def _locale(parts: tuple[str, str, str]) -> str:
    provider = {"c": "libc", "i": "ICU", "b": "builtin"}.get(parts[0], parts[0])
    return f"{provider} {parts[2] or parts[1]}"


def _extensions(examination: Examination) -> Iterator[Blocker]:
    source, destination = (site.catalog for site in examination.sites)
    needed = {
        found.extension
        for table in examination.data_map.tables
        if table.placement not in _NEVER_MOVED
        for column in source.by_name[table.name].columns
        for found in source.types_within(column.type_oid)
        if found.extension is not None
    }
    for name, version in sorted(source.extensions.items()):
        if name not in destination.extensions:
            what = f"extension {name} {version} of the source is missing"
            remedy = f"CREATE EXTENSION {name} in the destination's database"
            where = examination.destination.where()
            if name in needed:
                yield Blocker(
                    "missing-extension", where, f"{what}; columns that move use it", remedy
                )
            else:
                yield warning("missing-extension", where, what, remedy)
        elif destination.extensions[name] != version and name in needed:
            yield warning(
                "extension-version",
                examination.destination.where(),
                f"extension {name} is {destination.extensions[name]}, the source has {version}",
                f"ALTER EXTENSION {name} UPDATE on the older side",
            )


def _types(examination: Examination) -> Iterator[Blocker]:
    source, destination = (site.catalog for site in examination.sites)
    there = {found.name: found for found in destination.types.values()}
    seen: set[str] = set()
    for table in examination.data_map.tables:
        if table.placement in _NEVER_MOVED:
            continue
        for column in source.by_name[table.name].columns:
            for found in source.types_within(column.type_oid):
                if found.name in seen or found.element is not None:
                    continue
                seen.add(found.name)
                other = there.get(found.name)
                if other is not None and other.definition == found.definition:
                    continue
                if found.extension is not None and other is None:
                    continue  # the missing extension is reported
                has = other.definition if other else "missing"
                yield _difference(
                    examination,
                    table.name,
                    f"type {found.name} of column {column.name}",
                    found.definition,
                    has,
                )
                examination.unusable.add(table.name)


def _difference(
    examination: Examination, table: Name, what: str, ours: str, theirs: str
) -> Blocker:
    return Blocker(
        "schema-differs",
        examination.destination.where(table),
        f"{what}: {examination.source.cell.name} has {ours},"
        f" {examination.destination.cell.name} has {theirs}",
        _REMEDY,
    )


def _table(examination: Examination, name: Name) -> Iterator[Blocker]:
    source = examination.source.catalog.by_name[name]
    destination = examination.destination.catalog.by_name.get(name)

    def differs(what: str, ours: str, theirs: str) -> Blocker:
        return _difference(examination, name, what, ours, theirs)

    if destination is None or destination.kind not in {"r", "p"}:
        yield Blocker(
            "schema-differs",
            examination.destination.where(name),
            f"the table is missing in {examination.destination.cell.name}",
            _REMEDY,
        )
        return
    if source.partition_key != destination.partition_key:
        yield differs(
            "partitioning", source.partition_key or "none", destination.partition_key or "none"
        )
    if source.persistence != destination.persistence:
        yield differs(
            "storage", _persistence(source.persistence), _persistence(destination.persistence)
        )
    yield from _columns(examination, source, destination)
    ours, theirs = _rules_of(source), _rules_of(destination)
    for rule in sorted(ours.keys() - theirs.keys()):
        yield differs(f"{rule[0]} {rule[1]}", f"it as {ours[rule]}", "no such")
    for rule in sorted(theirs.keys() - ours.keys()):
        yield differs(f"{rule[0]} {rule[1]}", "no such", f"it as {theirs[rule]}")
    yield from _partitions(examination, source, destination)
    yield from _triggers(examination, source, destination)


def _persistence(letter: str) -> str:
    return {"p": "logged", "u": "unlogged"}.get(letter, letter)


def _columns(
    examination: Examination, source: Relation, destination: Relation
) -> Iterator[Blocker]:
    for column in source.columns:
        other = destination.by_column.get(column.name)
        ours = _describe(column)
        theirs = _describe(other) if other else "no such column"
        if ours != theirs:
            yield _difference(examination, source.name, f"column {column.name}", ours, theirs)
    for column in destination.columns:
        if column.name not in source.by_column:
            yield _difference(
                examination,
                source.name,
                f"column {column.name}",
                "no such column",
                _describe(column),
            )


def _describe(column: CatalogColumn) -> str:
    text = column.type
    if column.collation and column.collation != 'pg_catalog."default"':
        text += f" COLLATE {column.collation}"
    if column.not_null:
        text += " NOT NULL"
    if column.generated:
        how = "VIRTUAL" if column.generated == "v" else "STORED"
        text += f" GENERATED AS ({column.expression}) {how}"
    if column.identity:
        text += " GENERATED " + ("ALWAYS" if column.identity == "a" else "BY DEFAULT")
        text += " AS IDENTITY"
    return text


def _rules_of(relation: Relation) -> dict[tuple[str, str], str]:
    """Constraints and unique indexes by kind and definition, without their names."""
    found: dict[tuple[str, str], str] = {}
    backing = set()
    for constraint in relation.constraints:
        if constraint.inherited:
            continue  # the clones of a key for each partition
        found[_KINDS[constraint.kind], _definition(constraint)] = constraint.name
        backing.add(constraint.index)
    for index in relation.indexes:
        if index.oid not in backing and index.valid:
            found["unique index", _index_definition(index)] = index.name
    return found


def _definition(constraint: CatalogConstraint) -> str:
    return constraint.definition


def _index_definition(index: CatalogIndex) -> str:
    text = f"({', '.join(index.expressions)})"
    if index.nulls_equal:
        text += " NULLS NOT DISTINCT"
    if index.predicate:
        text += f" WHERE {index.predicate}"
    return text


def _partitions(
    examination: Examination, source: Relation, destination: Relation
) -> Iterator[Blocker]:
    theirs = {leaf.partition_bound for leaf in examination.destination.catalog.leaves(destination)}
    for leaf in examination.source.catalog.leaves(source):
        if leaf.partition_bound in theirs:
            continue
        reason = (
            f"partition {leaf.name} {leaf.partition_bound} is missing in"
            f" {examination.destination.cell.name}"
        )
        where = examination.destination.where(source.name)
        if "DEFAULT" in theirs:
            yield warning(
                "partition-missing",
                where,
                f"{reason}; its rows go to the default partition",
                "make the partition before the move",
            )
        else:
            yield Blocker("partition-missing", where, reason, "make the partition, then plan again")


def _triggers(
    examination: Examination, source: Relation, destination: Relation
) -> Iterator[Blocker]:
    ours, theirs = (
        {one.name for one in side.triggers if not one.name.startswith(OWN_TRIGGERS)}
        for side in (source, destination)
    )
    for name in sorted(ours ^ theirs):
        has = examination.source if name in ours else examination.destination
        yield warning(
            "trigger-differs",
            examination.destination.where(source.name),
            f"trigger {name} exists in {has.cell.name} only",
            "run the same schema migrations in both cells",
        )
