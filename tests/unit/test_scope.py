"""One organization's part of a schema: the order of its tables, and what is composed only once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cellferry.stores.postgres.schema import (
    Column,
    DataMap,
    ForeignKey,
    Hop,
    Name,
    OwnerPath,
    Placement,
    Table,
)
from cellferry.stores.postgres.scope import (
    Scope,
    array_text,
    keys_relation,
    once_for_each_scope,
    parse_key,
)


def table(name: str, *parents: str) -> Table:
    """A table with a path of ownership of one hop through each of `parents`."""
    return Table(
        Name("public", name),
        Placement.OWNED,
        (Column("id", "bigint"),),
        ("id",),
        owners=tuple(
            OwnerPath((Hop(("parent_id",), Name("public", parent), ("id",)),), "organization_id")
            for parent in parents
        ),
    )


def scope(*tables: Table, organization: str = "1") -> Scope:
    data_map = DataMap(tables, (), (), Name("public", "organizations"), "id", "bigint")
    return Scope(data_map, organization)


@pytest.mark.parametrize(
    ("tables", "circular"),
    [
        ([table("note", "issue"), table("issue", "project"), table("project")], False),
        ([table("folder", "folder"), table("file", "folder")], False),
        ([table("box", "shelf"), table("shelf", "box")], True),
        ([table("a", "b"), table("b", "c"), table("c", "a")], True),
    ],
    ids=["a chain", "a tree", "two that own each other", "three in a circle"],
)
def test_ownership_in_circles_is_seen(tables: list[Table], circular: bool) -> None:
    assert scope(*tables).has_tangled_guards is circular


@pytest.mark.parametrize(
    ("tables", "entangled"),
    [
        ([table("note", "issue"), table("issue", "project"), table("project")], set()),
        ([table("folder", "folder"), table("file", "folder"), table("user")], {"folder", "file"}),
        ([table("box", "shelf"), table("shelf", "box"), table("room")], {"box", "shelf"}),
        ([table("a", "b"), table("b", "c"), table("c", "a"), table("d", "a")], {*"abcd"}),
    ],
    ids=["a chain", "a tree", "two that own each other", "three in a circle"],
)
def test_tables_of_which_no_row_can_go_first_are_told(
    tables: list[Table], entangled: set[str]
) -> None:
    assert {one.name.name for one in scope(*tables).entangled} == entangled


@pytest.mark.parametrize(
    ("condition", "tangled"),
    [("{row}.type = 'Issue'", False), ("EXISTS (SELECT FROM issues WHERE open)", True)],
)
def test_a_condition_that_asks_other_tables_is_seen(condition: str, tangled: bool) -> None:
    path = OwnerPath((), "organization_id", when=condition)
    hop = Hop(("parent_id",), Name("public", "note"), ("id",), when=condition)
    assert scope(replace(table("note"), owners=(path,))).has_tangled_guards is tangled
    through = replace(table("link"), owners=(OwnerPath((hop,), "organization_id"),))
    assert scope(table("note"), through).has_tangled_guards is tangled


def test_what_is_composed_for_one_scope_is_not_another_ones() -> None:
    calls: list[str] = []

    @once_for_each_scope
    def greet(scope: Scope, greeting: str) -> str:
        calls.append(greeting)
        return f"{greeting} {scope.organization}"

    one, two = scope(organization="1"), scope(organization="2")

    assert [greet(one, "hello"), greet(two, "hello"), greet(one, "hello")] == [
        "hello 1",
        "hello 2",
        "hello 1",
    ]
    assert len(calls) == 2


@pytest.mark.parametrize(
    "values", [("",), ("NULL", "null"), ('a"b', "c\\d", "{e,f}", " g "), ("h\n", "ü")]
)
def test_the_text_of_an_array_reads_back(values: tuple[str, ...]) -> None:
    assert parse_key(array_text(values)) == values


def test_an_array_of_nothing_and_null_have_texts_of_their_own() -> None:
    assert array_text([]) == "{}"
    assert array_text([None, "NULL"]) == '{NULL,"NULL"}'


@pytest.mark.parametrize(
    ("column", "once"),
    [
        (Column("id", "bigint"), True),
        (Column("id", "character varying(20)", collation='pg_catalog."default"'), True),
        (Column("id", "timestamp with time zone"), True),
        (Column("id", "numeric(10,2)"), False),
        (Column("id", "extensions.citext"), False),
        (Column("id", "text", collation="public.nocase", deterministic=False), False),
    ],
)
def test_keys_with_two_spellings_are_joined_once(column: Column, once: bool) -> None:
    table = Table(Name("public", "labels"), Placement.OWNED, (column,), ("id",))
    statement = keys_relation(table, [("a",)]).as_string(None)
    assert ("DISTINCT" not in statement) is once
    if column.collation and not once:
        assert f"COLLATE {column.collation}" in statement


def test_what_is_below_a_loose_child_is_loose_also_in_a_circle() -> None:
    """Constraints tie b to a and c to b; nothing ties a, which c owns as well, to its parent."""
    tables = (table("a", "top", "c"), table("b", "a"), table("c", "b"), table("d", "top"))
    keys = tuple(
        ForeignKey(f"{child}_{parent}", Name("public", child), ("parent_id",),
                   Name("public", parent), ("id",))
        for child, parent in (("b", "a"), ("c", "b"), ("a", "c"), ("d", "top"))
    )  # fmt: skip
    data_map = DataMap(
        (table("top"), *tables), keys, (), Name("public", "organizations"), "id", "bigint"
    )
    whole = Scope(data_map, "1")

    loose = {hop.child.name.name for one in whole.tables for hop in whole.loose_children(one)}

    assert loose == {"a", "b", "c"}
