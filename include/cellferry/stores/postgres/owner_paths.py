"""Finds whose a table's rows are: the ways from each table up to the organization.

A table is owned *certainly* when a chain of NOT NULL columns leads to the organization's key; the
shortest such chain is its one path. Where only nullable columns lead there, every way is a
candidate, tried in order for each row. Cycles and self-references are harmless: a certain path
always goes to a table that is nearer, and a candidate path never visits a table twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cellferry.stores.postgres.schema import Hop, Name, OwnerPath

#: More ways than this make a trigger slow and a reviewer blind: the file must choose.
MAX_PATHS = 12


@dataclass(frozen=True)
class Link:
    """One way up from a table: its own key column (`parent` is None), or a parent."""

    columns: tuple[str, ...]
    parent: Name | None = None
    parent_columns: tuple[str, ...] = ()
    when: str | None = None


@dataclass(frozen=True)
class Reference:
    """A foreign key as an edge of the graph."""

    child: Name
    columns: tuple[str, ...]
    parent: Name
    parent_columns: tuple[str, ...]
    cascades: bool = False
    """ON DELETE CASCADE: the child is a part of the parent."""


@dataclass(frozen=True)
class Graph:
    """What ownership is found from.

    Attributes:
        columns: usable columns of each candidate table and whether they are NOT NULL, in order.
            Virtual columns are left out: a trigger does not see their value.
        stated: links that the file gives; they replace what would be found.
        closed: tables that the file places otherwise; no path starts or passes there.
        key_columns: names that always mean the organization's key.
    """

    organization_table: Name
    organization_column: str
    columns: Mapping[Name, Mapping[str, bool]]
    references: Sequence[Reference]
    stated: Mapping[Name, tuple[Link, ...]] = field(default_factory=dict)
    closed: frozenset[Name] = frozenset()
    key_columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Owners:
    """What was found.

    Attributes:
        paths: owned tables and their paths, best first.
        links: the first steps of these paths, as the file would state them.
        certain: tables whose every row has an owner, by NOT NULL columns.
        ambiguous: tables with several columns that could hold the organization, equally good.
        crowded: tables with more than `MAX_PATHS` ways.
    """

    paths: Mapping[Name, tuple[OwnerPath, ...]]
    links: Mapping[Name, tuple[Link, ...]]
    certain: frozenset[Name]
    ambiguous: Mapping[Name, tuple[str, ...]]
    crowded: frozenset[Name]


def find_owners(graph: Graph) -> Owners:
    """Return every table that leads to the organization, with its paths."""
    search = _Search(graph)
    search.find_direct()
    search.find_certain()
    search.find_candidates()
    paths: dict[Name, tuple[OwnerPath, ...]] = {}
    crowded: set[Name] = set()
    for table in sorted(search.links, key=str):
        found = _expand(search.links, table, frozenset({table}), MAX_PATHS + 1)
        if len(found) > MAX_PATHS:
            crowded.add(table)
        if found:
            paths[table] = tuple(found[:MAX_PATHS])
    return Owners(
        paths=paths,
        links={table: links for table, links in search.links.items() if table in paths},
        certain=frozenset(search.level),
        ambiguous=search.ambiguous,
        crowded=frozenset(crowded),
    )


class _Search:
    """The search in three passes; each only adds to `links`."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.links: dict[Name, tuple[Link, ...]] = {}
        self.level: dict[Name, int] = {}
        self.ambiguous: dict[Name, tuple[str, ...]] = {}
        self.usable = [
            reference
            for reference in graph.references
            if reference.child in graph.columns
            and reference.parent in graph.columns
            and reference.child != reference.parent
            and not {reference.child, reference.parent} & graph.closed
            and all(column in graph.columns[reference.child] for column in reference.columns)
        ]

    def find_direct(self) -> None:
        """Tables whose rows carry the organization's key themselves."""
        graph = self.graph
        table = graph.organization_table
        self.links[table] = (Link(columns=(graph.organization_column,)),)
        self.level[table] = 0
        keys: dict[Name, set[str]] = {table: {graph.organization_column}}
        for name, columns in graph.columns.items():
            if name != table and name not in graph.closed:
                keys[name] = {column for column in graph.key_columns if column in columns}
        changed = True
        while changed:  # a composite key can pass the organization's key on from table to table
            changed = False
            for reference in self.usable:
                if reference.child == table:
                    continue
                for ours, theirs in zip(reference.columns, reference.parent_columns, strict=True):
                    if theirs in keys[reference.parent] and ours not in keys[reference.child]:
                        keys[reference.child].add(ours)
                        changed = True
        for name in sorted(keys, key=str):
            if name == table or name in graph.stated or not keys[name]:
                continue
            self._choose_key(name, keys[name])

    def _choose_key(self, name: Name, keys: set[str]) -> None:
        columns = self.graph.columns[name]
        conventional = _conventional_names(
            self.graph.organization_table.name, self.graph.organization_column
        )

        def rank(column: str) -> tuple[bool, bool, bool]:
            return (
                column not in self.graph.key_columns,
                not columns[column],
                column.lower() not in conventional,
            )

        order = list(columns)
        ranked = sorted(keys, key=lambda column: (rank(column), order.index(column)))
        best = [column for column in ranked if rank(column) == rank(ranked[0])]
        if len(best) > 1:
            self.ambiguous[name] = tuple(best)
        self.links[name] = (Link(columns=(ranked[0],)),)
        if columns[ranked[0]]:
            self.level[name] = 0

    def find_certain(self) -> None:
        """Tables that NOT NULL columns lead to the organization; nearest first."""
        upward: dict[Name, list[Reference]] = {}
        for reference in self.usable:
            if all(self.graph.columns[reference.child][column] for column in reference.columns):
                upward.setdefault(reference.child, []).append(reference)
        depth = 0
        while True:
            found = {
                name: links
                for name, links in self.graph.stated.items()
                if name not in self.level and self._is_certain(name, links)
            }
            for name, references in upward.items():
                if name in self.level or name in self.graph.stated:
                    continue
                ready = [one for one in references if one.parent in self.level]
                if ready:
                    best = min(ready, key=lambda one: self._preference(one, self.level))
                    found[name] = (_link(best),)
            if not found:
                return
            depth += 1
            self.links.update(found)
            self.level.update(dict.fromkeys(found, depth))

    def _is_certain(self, name: Name, links: tuple[Link, ...]) -> bool:
        if len(links) != 1 or links[0].when is not None:
            return False
        link = links[0]
        columns = self.graph.columns[name]
        return all(columns.get(column, False) for column in link.columns) and (
            link.parent is None or link.parent in self.level
        )

    def find_candidates(self) -> None:
        """Tables that only nullable columns lead to the organization: every way is a candidate."""
        for name, links in self.graph.stated.items():
            self.links[name] = links
        distance = {name: self.level.get(name, 0) for name in self.links}
        upward: dict[Name, list[Reference]] = {}
        for reference in self.usable:
            if reference.child not in self.links:
                upward.setdefault(reference.child, []).append(reference)
        while True:
            found = {
                name: 1 + min(distance[one.parent] for one in references if one.parent in distance)
                for name, references in upward.items()
                if name not in distance and any(one.parent in distance for one in references)
            }
            if not found:
                break
            distance.update(found)
        for name, references in upward.items():
            ways = sorted(
                (one for one in references if one.parent in distance),
                key=lambda one: (
                    not all(self.graph.columns[name][column] for column in one.columns),
                    self._preference(one, distance),
                ),
            )
            if ways:
                self.links[name] = tuple(dict.fromkeys(_link(one) for one in ways))

    def _preference(
        self, reference: Reference, distance: Mapping[Name, int]
    ) -> tuple[int, bool, tuple[int, ...], str]:
        order = list(self.graph.columns[reference.child])
        return (
            distance[reference.parent],
            not reference.cascades,
            tuple(order.index(column) for column in reference.columns),
            str(reference.parent),
        )


def _link(reference: Reference) -> Link:
    return Link(reference.columns, reference.parent, reference.parent_columns)


def _expand(
    links: Mapping[Name, tuple[Link, ...]], table: Name, visited: frozenset[Name], limit: int
) -> list[OwnerPath]:
    """Return at most `limit` paths from `table`; none visits a table of `visited` again."""
    found: list[OwnerPath] = []
    for link in links.get(table, ()):
        if len(found) >= limit:
            break
        if link.parent is None:
            found.append(OwnerPath(hops=(), column=link.columns[0], when=link.when))
            continue
        if link.parent in visited:
            continue
        for path in _expand(links, link.parent, visited | {link.parent}, limit - len(found)):
            hop = Hop(link.columns, link.parent, link.parent_columns, when=path.when)
            found.append(OwnerPath((hop, *path.hops), path.column, link.when))
    return found


def _conventional_names(table: str, column: str) -> frozenset[str]:
    """Names by which other tables usually call the organization's key."""
    base = table.lower()
    singular = (
        f"{base[:-3]}y"
        if base.endswith("ies")
        else base[:-1]
        if base.endswith("s") and not base.endswith("ss")
        else base
    )
    key = column.lower()
    return frozenset(
        {f"{singular}_{key}", f"{base}_{key}", f"{singular}{key}", f"{base}{key}", key}
        | ({singular} if key == "id" else set())
    )
