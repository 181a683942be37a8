"""Parents come before children on arbitrary graphs, as far as circles let them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cellferry.stores.postgres.schema import Name
from cellferry.stores.postgres.table_order import parents_first

Parents = dict[Name, set[Name]]


def name(number: int) -> Name:
    return Name("public", f"t{number}")


@st.composite
def graphs(draw: st.DrawFn) -> Parents:
    count = draw(st.integers(1, 7))
    parents: Parents = {name(number): set() for number in range(count)}
    for child, parent in draw(
        st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=12)
    ):
        parents[name(child)].add(name(parent))
    return parents


def leads_to(parents: Parents, start: Name) -> set[Name]:
    found: set[Name] = set()
    todo = [start]
    while todo:
        for one in parents[todo.pop()] - found:
            found.add(one)
            todo.append(one)
    return found


@given(graphs())
def test_every_table_comes_once(parents: Parents) -> None:
    assert sorted(parents_first(parents, {}), key=str) == sorted(parents, key=str)


@given(graphs())
def test_a_parent_comes_first_unless_it_is_in_a_circle_with_its_child(parents: Parents) -> None:
    order = parents_first(parents, {})
    for child, above in parents.items():
        for parent in above:
            if child not in leads_to(parents, parent) and child != parent:
                assert order.index(parent) < order.index(child)


@given(graphs(), graphs())
def test_ownership_keeps_its_order_within_circles(parents: Parents, other: Parents) -> None:
    # ownership that is no circle: only to tables with a lower number
    owners = {
        child: {parent for parent in above if str(parent) < str(child) and parent in parents}
        for child, above in other.items()
        if child in parents
    }
    both = {child: above | owners.get(child, set()) for child, above in parents.items()}
    order = parents_first(both, owners)
    for child, above in owners.items():
        for parent in above:
            assert order.index(parent) < order.index(child)


@given(graphs(), st.randoms(use_true_random=False))
def test_the_order_does_not_depend_on_the_catalogs(parents: Parents, random: object) -> None:
    shuffled = list(parents.items())
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert parents_first(dict(shuffled), {}) == parents_first(parents, {})
