"""Ownership on arbitrary graphs of foreign keys: cycles, self-references, dead ends."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellferry.stores.postgres.owner_paths import (
    MAX_PATHS,
    Graph,
    Link,
    Owners,
    Reference,
    find_owners,
)
from cellferry.stores.postgres.schema import Hop, Name, OwnerPath

ORGANIZATIONS = Name("public", "organizations")


def name(number: int) -> Name:
    return Name("public", f"t{number}")


def table(text: str) -> Name:
    return Name("public", text)


@dataclass(frozen=True)
class Edge:
    child: int
    parent: int | None  # None is the table of organizations
    nullable: bool
    cascades: bool


def graph_of(count: int, edges: list[Edge], closed: frozenset[int] = frozenset()) -> Graph:
    columns: dict[Name, dict[str, bool]] = {ORGANIZATIONS: {"id": True}}
    references = []
    for number in range(count):
        columns[name(number)] = {"id": True}
    for position, edge in enumerate(edges):
        column = f"c{position}"
        columns[name(edge.child)][column] = not edge.nullable
        parent = ORGANIZATIONS if edge.parent is None else name(edge.parent)
        references.append(
            Reference(name(edge.child), (column,), parent, ("id",), cascades=edge.cascades)
        )
    return Graph(
        organization_table=ORGANIZATIONS,
        organization_column="id",
        columns=columns,
        references=references,
        closed=frozenset(name(number) for number in closed),
    )


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    count = draw(st.integers(1, 5))  # few tables and many edges: cycles of nullable keys
    edge = st.builds(
        Edge,
        child=st.integers(0, count - 1),
        # seldom the organization itself: a table that has its key needs no path
        parent=st.integers(-1, count - 1).map(lambda number: None if number < 0 else number),
        nullable=st.booleans(),
        cascades=st.booleans(),
    )
    closed = draw(st.frozensets(st.integers(0, count - 1), max_size=1))
    return graph_of(count, draw(st.lists(edge, min_size=count, max_size=16)), closed)


def open_references(graph: Graph) -> list[Reference]:
    return [
        one
        for one in graph.references
        if one.child not in graph.closed and one.parent not in graph.closed
    ]


def certain_distances(graph: Graph) -> dict[Name, int]:
    """A plain model: steps up to the organization's key over NOT NULL columns only."""
    distance = {ORGANIZATIONS: 0}
    while True:
        before = dict(distance)
        for one in open_references(graph):
            if not graph.columns[one.child][one.columns[0]]:
                continue
            # the reference to the organization is the key itself, no step
            step = 0 if one.parent == ORGANIZATIONS else 1
            if one.parent in before and one.child != one.parent:
                found = before[one.parent] + step
                distance[one.child] = min(distance.get(one.child, found), found)
        if distance == before:
            return distance


def reaching(graph: Graph) -> set[Name]:
    found = {ORGANIZATIONS}
    while True:
        more = {one.child for one in open_references(graph) if one.parent in found} - found
        if not more:
            return found
        found |= more


def hops_of(owners: Owners, one: Name) -> list[tuple[Hop, ...]]:
    return [path.hops for path in owners.paths[one]]


@given(graphs())
def test_owned_are_exactly_the_tables_that_lead_to_the_organization(graph: Graph) -> None:
    assert set(find_owners(graph).paths) == reaching(graph)


@given(graphs())
def test_a_chain_of_not_null_columns_gives_the_one_shortest_path(graph: Graph) -> None:
    owners = find_owners(graph)
    distances = certain_distances(graph)
    assert owners.certain == set(distances)
    for one, distance in distances.items():
        assert [len(hops) for hops in hops_of(owners, one)] == [distance]


@given(graphs())
def test_a_certain_path_passes_no_nullable_column(graph: Graph) -> None:
    owners = find_owners(graph)
    for one in owners.certain:
        (path,) = owners.paths[one]
        at = one
        for hop in path.hops:
            assert all(graph.columns[at][column] for column in hop.columns)
            at = hop.parent
        assert graph.columns[at][path.column]


@given(graphs())
def test_every_hop_is_a_foreign_key_and_no_table_is_visited_twice(graph: Graph) -> None:
    keys = {(one.child, one.columns, one.parent) for one in graph.references}
    for one, paths in find_owners(graph).paths.items():
        for path in paths:
            at = one
            visited = [at]
            for hop in path.hops:
                assert (at, hop.columns, hop.parent) in keys
                at = hop.parent
                visited.append(at)
            assert len(set(visited)) == len(visited)
            assert not set(visited) & graph.closed


@given(graphs(), st.randoms(use_true_random=False))
def test_the_order_of_the_catalog_does_not_matter(graph: Graph, random: object) -> None:
    references = list(graph.references)
    random.shuffle(references)  # type: ignore[attr-defined]
    tables = list(graph.columns)
    random.shuffle(tables)  # type: ignore[attr-defined]
    shuffled = replace(
        graph, references=references, columns={one: graph.columns[one] for one in tables}
    )
    assert find_owners(shuffled) == find_owners(graph)


@given(graphs())
def test_what_was_found_can_be_stated_and_gives_the_same(graph: Graph) -> None:
    found = find_owners(graph)
    stated = replace(
        graph, stated={one: links for one, links in found.links.items() if one != ORGANIZATIONS}
    )
    assert find_owners(stated).paths == found.paths


def test_a_part_prefers_the_parent_that_deletes_it() -> None:
    edges = [
        Edge(0, None, nullable=False, cascades=False),
        Edge(1, None, nullable=False, cascades=False),
        Edge(2, 0, nullable=False, cascades=False),
        Edge(2, 1, nullable=False, cascades=True),
    ]
    (path,) = find_owners(graph_of(3, edges)).paths[name(2)]
    assert path.hops[0].parent == name(1)


def test_a_cycle_of_nullable_keys_is_walked_once() -> None:
    edges = [
        Edge(0, None, nullable=True, cascades=False),
        Edge(1, 0, nullable=True, cascades=False),
        Edge(1, 2, nullable=True, cascades=False),
        Edge(2, 1, nullable=True, cascades=False),
    ]
    paths = find_owners(graph_of(3, edges)).paths
    assert [[hop.parent for hop in path.hops] for path in paths[name(1)]] == [[name(0)]]
    assert [[hop.parent for hop in path.hops] for path in paths[name(2)]] == [[name(1), name(0)]]


def test_a_self_reference_alone_owns_nothing() -> None:
    assert name(0) not in find_owners(graph_of(1, [Edge(0, 0, False, False)])).paths


def test_a_cycle_without_the_organization_owns_nothing() -> None:
    edges = [Edge(0, 1, False, False), Edge(1, 0, False, False)]
    assert set(find_owners(graph_of(2, edges)).paths) == {ORGANIZATIONS}


def test_a_composite_key_passes_the_organization_on() -> None:
    projects, issues = table("projects"), table("issues")
    graph = Graph(
        organization_table=ORGANIZATIONS,
        organization_column="id",
        columns={
            ORGANIZATIONS: {"id": True},
            projects: {"org": True, "id": True},
            issues: {"tenant": True, "project_id": True},
        },
        references=[
            Reference(projects, ("org",), ORGANIZATIONS, ("id",)),
            Reference(issues, ("tenant", "project_id"), projects, ("org", "id")),
        ],
    )
    assert find_owners(graph).paths[issues] == (OwnerPath((), "tenant"),)


def test_two_equally_good_key_columns_are_ambiguous() -> None:
    transfers = table("transfers")
    graph = Graph(
        organization_table=ORGANIZATIONS,
        organization_column="id",
        columns={ORGANIZATIONS: {"id": True}, transfers: {"giver": True, "taker": True}},
        references=[
            Reference(transfers, ("giver",), ORGANIZATIONS, ("id",)),
            Reference(transfers, ("taker",), ORGANIZATIONS, ("id",)),
        ],
    )
    assert find_owners(graph).ambiguous == {transfers: ("giver", "taker")}


@pytest.mark.parametrize("column", ["organization_id", "organizationid", "organization"])
def test_the_conventional_name_wins_among_key_columns(column: str) -> None:
    grants = table("grants")
    graph = Graph(
        organization_table=ORGANIZATIONS,
        organization_column="id",
        columns={ORGANIZATIONS: {"id": True}, grants: {"to_org": True, column: True}},
        references=[
            Reference(grants, ("to_org",), ORGANIZATIONS, ("id",)),
            Reference(grants, (column,), ORGANIZATIONS, ("id",)),
        ],
    )
    owners = find_owners(graph)
    assert owners.paths[grants] == (OwnerPath((), column),)
    assert not owners.ambiguous


def test_a_polymorphic_parent_hands_its_condition_to_the_child() -> None:
    issues, notes, awards = table("issues"), table("notes"), table("awards")
    graph = Graph(
        organization_table=ORGANIZATIONS,
        organization_column="id",
        columns={
            ORGANIZATIONS: {"id": True},
            issues: {"id": True, "organization_id": True},
            notes: {"id": True, "on_id": True},
            awards: {"note_id": True},
        },
        references=[
            Reference(issues, ("organization_id",), ORGANIZATIONS, ("id",)),
            Reference(awards, ("note_id",), notes, ("id",)),
        ],
        stated={notes: (Link(("on_id",), issues, ("id",), when="{row}.kind = 'Issue'"),)},
    )
    owners = find_owners(graph)
    assert owners.paths[awards] == (
        OwnerPath(
            (
                Hop(("note_id",), notes, ("id",), when="{row}.kind = 'Issue'"),
                Hop(("on_id",), issues, ("id",)),
            ),
            "organization_id",
        ),
    )
    assert awards not in owners.certain


def test_more_ways_than_a_reviewer_can_follow_are_reported() -> None:
    # every table refers to all before it: the number of ways doubles with each
    edges = [Edge(0, None, True, False)]
    edges += [Edge(child, parent, True, False) for child in range(8) for parent in range(child)]
    owners = find_owners(graph_of(8, edges))
    assert name(7) in owners.crowded
    assert len(owners.paths[name(7)]) == MAX_PATHS
