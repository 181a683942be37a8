"""The text of the gates: one for each table, deterministic, and safe with any name."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellferry.stores.postgres.schema import (
    KEPT_DEFINITIONS,
    Column,
    DataMap,
    Hop,
    Name,
    OwnerPath,
    Placement,
    Table,
    once_for_each_definition,
)
from cellferry.stores.postgres.triggers import (
    CAPTURE_TRIGGER,
    GATE_TRIGGER,
    Installation,
    function_name,
    installations,
)

ORGANIZATIONS = Table(
    Name("public", "organizations"),
    Placement.OWNED,
    (Column("id", "bigint"),),
    ("id",),
    (OwnerPath((), "id"),),
)


def table(name: str, *owners: OwnerPath, placement: Placement = Placement.OWNED) -> Table:
    columns = (Column("id", "bigint"), Column("parent_id", "bigint"), Column("kind", "text"))
    return Table(Name("public", name), placement, columns, ("id",), owners)


def path(parent: str, when: str | None = None) -> OwnerPath:
    hop = Hop(("parent_id",), Name("public", parent), ("id",))
    return OwnerPath((hop,), "parent_id", when)


def made(*tables: Table) -> dict[str, Installation]:
    found = DataMap((ORGANIZATIONS, *tables), (), (), ORGANIZATIONS.name, "id", "bigint")
    return {one.table.name: one for one in installations(found)}


DIRECT = table("projects", OwnerPath((), "parent_id"))
CHILD = table("issues", path("projects"))


def test_owned_tables_get_a_gate_and_shared_ones_a_capture() -> None:
    found = made(
        DIRECT,
        table("users", placement=Placement.REFERENCED),
        table("plans", placement=Placement.GLOBAL),
        table("jobs", placement=Placement.CELL_LOCAL),
    )

    assert {name: one.trigger for name, one in found.items()} == {
        "organizations": GATE_TRIGGER,
        "projects": GATE_TRIGGER,
        "users": CAPTURE_TRIGGER,
    }


def test_a_shared_rows_capture_refuses_nobody() -> None:
    text = made(table("users", placement=Placement.REFERENCED))["users"].function_sql

    assert "cellferry.enter" not in text
    assert "refuse" not in text


def test_the_common_case_is_one_look_without_a_set_clause() -> None:
    text = made(DIRECT)["projects"].function_sql

    insert = text[text.index("INSERT") : text.index("ELSIF")]
    assert insert.count("PERFORM") == 1
    assert "SET search_path" not in text


def test_every_operator_that_runs_with_the_owners_rights_is_qualified_or_found_safely() -> None:
    """Without a SET clause nothing may be looked up where the caller's path says."""
    text = made(DIRECT)["projects"].function_sql.replace("TG_OP = ", "").replace("TG_OP <> ", "")

    assert " = " not in text


def test_a_path_is_looked_up_under_a_fixed_search_path() -> None:
    assert "SET search_path = pg_catalog, pg_temp" in made(DIRECT, CHILD)["issues"].function_sql


def test_the_schema_of_a_keys_own_type_is_on_that_path() -> None:
    columns = (Column("id", '"Odd ""Types""".ulid'), Column("parent_id", '"Odd ""Types""".ulid'))
    text = made(replace(DIRECT, columns=columns), replace(CHILD, columns=columns))["issues"]

    assert 'pg_catalog, "Odd ""Types""", pg_temp' in text.function_sql


@pytest.mark.parametrize("generated", ["id", "parent_id"])
def test_a_generated_key_or_owner_is_read_after_the_row_is_made(generated: str) -> None:
    columns = tuple(
        replace(column, generated=column.name == generated) for column in DIRECT.columns
    )

    assert made(replace(DIRECT, columns=columns))["projects"].timing == "AFTER"
    assert made(DIRECT)["projects"].timing == "BEFORE"


def test_a_polymorphic_path_is_followed_for_both_rows() -> None:
    text = made(
        DIRECT,
        table("notes", path("projects", "{row}.kind = 'P'"), path("projects", "{row}.kind = 'Q'")),
    )["notes"].function_sql

    assert "NEW.kind = ''P''" in text
    assert "OLD.kind = ''Q''" in text
    assert "COALESCE(" in text


def test_only_a_leaf_may_come_from_nobody() -> None:
    found = made(DIRECT, CHILD)

    assert "ELSIF true THEN" in found["projects"].function_sql
    assert "owner_old IS NOT NULL AND owner_new IS NOT NULL" in found["issues"].function_sql


def test_the_definition_changes_with_what_it_depends_on() -> None:
    before = made(DIRECT)["projects"].definition
    renamed = (Column("key", "bigint"), *DIRECT.columns[1:])

    assert made(DIRECT)["projects"].definition == before
    assert made(replace(DIRECT, columns=renamed, primary_key=("key",)))["projects"].definition != (
        before
    )
    # a table below it makes changes of hands a danger
    assert made(DIRECT, CHILD)["projects"].definition != before


def test_a_table_without_a_key_gets_no_gate() -> None:
    assert "logs" not in made(replace(table("logs", OwnerPath((), "parent_id")), primary_key=()))


@given(st.text(min_size=1, max_size=63).filter(lambda text: "\0" not in text))
def test_any_name_makes_a_short_plain_function_name(name: str) -> None:
    made_name = function_name("gate", Name("public", name))

    assert made_name.isidentifier()
    assert made_name.isascii()
    assert made_name == made_name.lower()
    assert len(made_name) < 63


def test_names_that_share_a_long_beginning_get_functions_of_their_own() -> None:
    long = "x" * 62

    assert function_name("gate", Name("public", long + "a")) != function_name(
        "gate", Name("public", long + "b")
    )


def test_what_follows_from_the_definitions_is_made_once_for_each_fingerprint() -> None:
    found = DataMap((ORGANIZATIONS, DIRECT), (), (), ORGANIZATIONS.name, "id", "bigint")
    one, again = replace(found, fingerprint="a"), replace(found, fingerprint="a")
    wider = replace(found, tables=(*found.tables, CHILD), fingerprint="b")

    assert installations(one) is installations(again)
    assert installations(found) is not installations(found)
    assert len(installations(wider)) == 3


def test_what_is_kept_of_definitions_is_bounded() -> None:
    asked: list[str] = []

    @once_for_each_definition
    def name(data_map: DataMap) -> str:
        asked.append(data_map.fingerprint)
        return data_map.fingerprint

    found = DataMap((ORGANIZATIONS,), (), (), ORGANIZATIONS.name, "id", "bigint")
    names = [str(number) for number in range(KEPT_DEFINITIONS + 1)]
    for one in (*names, names[-1], names[0]):
        assert name(replace(found, fingerprint=one)) == one
    assert asked == [*names, names[0]]
