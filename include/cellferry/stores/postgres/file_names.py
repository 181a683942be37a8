"""Checks the names in a data map's file against a catalog."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from cellferry.stores.postgres.catalog import Catalog, Relation
from cellferry.stores.postgres.data_map_file import (
    DataMapFile,
    StatedOwner,
    StatedTable,
    near,
)
from cellferry.stores.postgres.schema import ForeignKey, Name, Placement


@dataclass(frozen=True)
class StatedLink:
    """An owner of the file with its names resolved; `parent` is None for a key column."""

    columns: tuple[str, ...]
    parent: Name | None = None
    parent_columns: tuple[str, ...] = ()
    when: str | None = None


@dataclass(frozen=True)
class Stated:
    """The file with every name resolved."""

    organization_table: Name | None
    key_columns: tuple[str, ...]
    placements: Mapping[Name, Placement]
    foreign_keys: tuple[ForeignKey, ...]
    owners: Mapping[Name, tuple[StatedLink, ...]]
    keys: Mapping[Name, tuple[str, ...]]
    plain_numbers: Mapping[Name, frozenset[str]]
    placed_elsewhere: frozenset[Name] = frozenset()
    """Foreign tables and the like that the file places, so that they need no refusal."""


def table_named(text: str, known: Iterable[Name]) -> Name | None:
    """Return the table that `text` names: `schema.table`, or `table` when only one has it."""
    names = list(known)
    exact = [name for name in names if str(name) == text]
    found = exact or [name for name in names if name.name == text]
    return found[0] if len(found) == 1 else None


def resolve(file: DataMapFile, catalog: Catalog, relations: Mapping[Name, Relation]) -> Stated:
    """Resolve every name of `file`.

    Args:
        relations: the tables of the map.

    Raises:
        InvalidInput: a name that does not exist, with its place in the file.
    """
    look = _Lookup(file, catalog, relations)
    tables = {look.table(f"tables.{text}", text): (text, one) for text, one in file.tables.items()}
    if len(tables) < len(file.tables):
        raise file.fault("tables", "one table is named twice, with and without its schema")
    foreign_keys = tuple(look.foreign_keys())
    placements, elsewhere = look.placements()
    for name, (text, one) in tables.items():
        if one.owners and name in placements:
            raise file.fault(
                f"tables.{text}.owners",
                f"{name} is placed as {placements[name]} too",
                "an owned table needs no placement: remove one of the two",
            )
    organization = file.organization.table
    all_columns = {column for relation in relations.values() for column in relation.by_column}
    for column in file.organization.key_columns:
        if column not in all_columns:
            raise file.fault(
                "organization.key_columns",
                f"no table has a column {column!r}{near(column, all_columns)}",
            )
    return Stated(
        organization_table=look.table("organization.table", organization) if organization else None,
        key_columns=tuple(file.organization.key_columns),
        placements=placements,
        foreign_keys=foreign_keys,
        owners={
            name: tuple(
                look.owner(f"tables.{text}.owners[{number}]", name, owner, foreign_keys)
                for number, owner in enumerate(one.owners)
            )
            for name, (text, one) in tables.items()
            if one.owners
        },
        keys={
            name: look.key(f"tables.{text}.key", name, one)
            for name, (text, one) in tables.items()
            if one.key
        },
        plain_numbers={
            name: frozenset(look.columns(f"tables.{text}.plain_numbers", name, one.plain_numbers))
            for name, (text, one) in tables.items()
        },
        placed_elsewhere=elsewhere,
    )


class _Lookup:
    """Finds names, and says where in the file a wrong one stands."""

    def __init__(
        self, file: DataMapFile, catalog: Catalog, relations: Mapping[Name, Relation]
    ) -> None:
        self.file = file
        self.catalog = catalog
        self.relations = relations

    def table(self, place: str, text: str) -> Name:
        found = table_named(text, self.relations)
        if found is not None:
            return found
        same = [str(name) for name in self.relations if name.name == text]
        if same:
            raise self.file.fault(
                place, f"{text!r} is in several schemas: {', '.join(same)}", "write schema.table"
            )
        for relation in self.catalog.relations:
            if text in {str(relation.name), relation.name.name}:
                raise self.file.fault(place, f"{relation.name} is {_kind(relation)}", _KIND_REMEDY)
        known = [str(name) for name in self.relations]
        if "." not in text:
            known = [name.name for name in self.relations]
        raise self.file.fault(
            place, f"there is no table {text!r}{near(text, known)}", "write schema.table"
        )

    def columns(self, place: str, table: Name, columns: Iterable[str]) -> tuple[str, ...]:
        known = self.relations[table].by_column
        found = tuple(columns)
        for column in found:
            if column not in known:
                raise self.file.fault(
                    place,
                    f"{table} has no column {column!r}{near(column, known)}",
                    f"its columns are {', '.join(known)}",
                )
        return found

    def usable_columns(self, place: str, table: Name, columns: Iterable[str]) -> tuple[str, ...]:
        found = self.columns(place, table, columns)
        for column in found:
            if self.relations[table].by_column[column].generated == "v":
                raise self.file.fault(
                    place,
                    f"{table}.{column} is a virtual column, which a trigger does not see",
                    "use the columns that it is generated from",
                )
        return found

    def primary_key(self, place: str, table: Name) -> tuple[str, ...]:
        for index in self.relations[table].indexes:
            if index.primary:
                return index.columns
        raise self.file.fault(
            place, f"{table} has no primary key", "name the columns that are referred to"
        )

    def foreign_keys(self) -> Iterable[ForeignKey]:
        for number, one in enumerate(self.file.foreign_keys):
            place = f"foreign_keys[{number}]"
            child = self.table(f"{place}.table", one.table)
            parent = self.table(f"{place}.references", one.references)
            columns = self.usable_columns(f"{place}.columns", child, one.columns)
            theirs = (
                self.columns(f"{place}.referenced_columns", parent, one.referenced_columns)
                if one.referenced_columns is not None
                else self.primary_key(f"{place}.references", parent)
            )
            if len(columns) != len(theirs):
                raise self.file.fault(
                    place,
                    f"{len(columns)} columns refer to {len(theirs)} columns of {parent}",
                    "name referenced_columns, one for each column",
                )
            yield ForeignKey(
                name=f"{child.name}_{'_'.join(columns)} of the data map",
                child=child,
                columns=columns,
                parent=parent,
                parent_columns=theirs,
                declared=False,
                trusted=False,
            )

    def placements(self) -> tuple[dict[Name, Placement], frozenset[Name]]:
        """Tables by placement; a name beats a glob, two globs that disagree are an error."""
        named: dict[Name, Placement] = {}
        matched: dict[Name, Placement] = {}
        others = [
            relation.name
            for relation in self.catalog.relations
            if relation.name not in self.relations
        ]
        elsewhere: set[Name] = set()
        for placement, patterns in (
            (Placement.GLOBAL, self.file.placement.global_),
            (Placement.CELL_LOCAL, self.file.placement.cell_local),
            (Placement.REFERENCED, self.file.placement.referenced),
        ):
            for number, pattern in enumerate(patterns):
                place = f"placement.{placement}[{number}]"
                exact = table_named(pattern, self.relations)
                if exact is not None:
                    self._put(named, exact, placement, place)
                    continue
                found = [name for name in self.relations if fnmatchcase(str(name), pattern)]
                beside = [name for name in others if fnmatchcase(str(name), pattern)]
                elsewhere.update(beside)
                if not found and not beside:
                    known = [str(name) for name in self.relations]
                    raise self.file.fault(
                        place,
                        f"{pattern!r} matches no table{near(pattern, known)}",
                        "write schema.table or a glob such as audit.*",
                    )
                for name in found:
                    self._put(matched, name, placement, place)
        return {**matched, **named}, frozenset(elsewhere)

    def _put(
        self, into: dict[Name, Placement], name: Name, placement: Placement, place: str
    ) -> None:
        if into.setdefault(name, placement) is not placement:
            raise self.file.fault(
                place, f"{name} is placed as {into[name]} too", "name the table in one list only"
            )

    def owner(
        self, place: str, table: Name, owner: StatedOwner, stated_keys: Iterable[ForeignKey]
    ) -> StatedLink:
        if owner.column is not None:
            columns = self.usable_columns(f"{place}.column", table, [owner.column])
            return StatedLink(columns=columns, when=owner.when)
        parent = self.table(f"{place}.through", owner.through or "")
        if parent == table:
            raise self.file.fault(
                f"{place}.through",
                f"rows of {table} cannot be owned through rows of their own table: how deep they"
                " are is not known, and those farther down would stay behind",
                "give each row the organization's key, or a way through another table",
            )
        if owner.columns is None:
            columns, theirs = self._only_key(place, table, parent, stated_keys)
        else:
            columns = self.usable_columns(f"{place}.columns", table, owner.columns)
            theirs = (
                self.columns(f"{place}.through_columns", parent, owner.through_columns)
                if owner.through_columns is not None
                else self._referred(table, columns, parent, stated_keys)
                or self.primary_key(f"{place}.through", parent)
            )
        if len(columns) != len(theirs):
            raise self.file.fault(
                place,
                f"{len(columns)} columns refer to {len(theirs)} columns of {parent}",
                "name through_columns, one for each column",
            )
        return StatedLink(columns, parent, theirs, owner.when)

    def _keys_between(
        self, table: Name, parent: Name, stated_keys: Iterable[ForeignKey]
    ) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
        target = self.relations[parent].oid
        found = [
            (one.columns, one.parent_columns)
            for one in self.relations[table].constraints
            if one.kind == "f" and one.parent == target and not one.temporal
        ]
        found.extend(
            (key.columns, key.parent_columns)
            for key in stated_keys
            if key.child == table and key.parent == parent
        )
        return list(dict.fromkeys(found))

    def _referred(
        self,
        table: Name,
        columns: tuple[str, ...],
        parent: Name,
        stated_keys: Iterable[ForeignKey],
    ) -> tuple[str, ...] | None:
        for ours, theirs in self._keys_between(table, parent, stated_keys):
            if ours == columns:
                return theirs
        return None

    def _only_key(
        self, place: str, table: Name, parent: Name, stated_keys: Iterable[ForeignKey]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        found = self._keys_between(table, parent, stated_keys)
        if len(found) == 1:
            return found[0]
        raise self.file.fault(
            f"{place}.through",
            f"{len(found)} foreign keys lead from {table} to {parent}",
            "name the columns that refer to it",
        )

    def key(self, place: str, table: Name, one: StatedTable) -> tuple[str, ...]:
        columns = self.columns(place, table, one.key or ())
        relation = self.relations[table]
        if not any(
            set(index.columns) == set(columns)
            and index.predicate is None
            and index.valid
            and not index.deferrable
            and (index.primary or not index.exclusion)
            for index in relation.indexes
        ) or any(not relation.by_column[column].not_null for column in columns):
            raise self.file.fault(
                place,
                f"no unique index of {table} over just these columns identifies every row",
                "it must be unique, not partial, not deferrable, over NOT NULL columns",
            )
        return columns


_KIND_REMEDY = "only ordinary and partitioned tables have a place in the data map"


def _kind(relation: Relation) -> str:
    if relation.of_extension:
        return "a table of an extension"
    if relation.is_partition:
        return "a partition; name its partitioned table instead"
    return {"v": "a view", "m": "a materialized view", "f": "a foreign table"}.get(
        relation.kind, "not a table"
    )
