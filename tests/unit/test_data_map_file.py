"""The data map's file: every mistake is named with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from cellferry.errors import InvalidInput
from cellferry.stores.postgres.data_map_file import load, parse

MISTAKES = {
    "unknown key": ("colour: red", "colour"),
    "unknown key of a table": ("tables: {issues: {owner: []}}", "tables.issues.owner"),
    "wrong type": ("ignore_schemas: audit", "ignore_schemas"),
    "number for a name": ("organization: {table: 5}", "organization.table"),
    "unknown placement": ("placement: {shared: [users]}", "placement.shared"),
    "column and through": (
        "tables: {notes: {owners: [{column: a, through: b}]}}",
        "tables.notes.owners[0]",
    ),
    "neither column nor through": (
        "tables: {notes: {owners: [{when: '{row}.a'}]}}",
        "either column or through",
    ),
    "condition without the row": (
        "tables: {notes: {owners: [{column: a, when: 'kind = 1'}]}}",
        "name the row as {row}",
    ),
    "two statements in a condition": (
        "tables: {notes: {owners: [{column: a, when: '{row}.b; DROP TABLE c'}]}}",
        "one condition",
    ),
    "no owner": ("tables: {notes: {owners: []}}", "tables.notes.owners"),
    "lengths differ": (
        "foreign_keys: [{table: a, columns: [b, c], references: d, referenced_columns: [e]}]",
        "foreign_keys[0]: columns and referenced_columns must have the same length",
    ),
    "a table given twice": ("tables: {a: {}, a: {}}", "'a' is given twice"),
    "not YAML": ("tables: {", "is not YAML"),
    "another version": ("version: 2", "version"),
    "a list": ("- a", "file"),
}


@pytest.mark.parametrize(("text", "expected"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_named_with_its_place(text: str, expected: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse(text, source="maps/app.yaml")
    assert expected in str(caught.value)
    assert "maps/app.yaml" in str(caught.value)


def test_an_empty_file_says_nothing() -> None:
    assert parse("") == parse("version: 1")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nowhere\.yaml"):
        load(tmp_path / "nowhere.yaml")


def test_yaml_cannot_build_objects() -> None:
    with pytest.raises(InvalidInput, match="not YAML"):
        parse("organization: !!python/object/apply:os.getcwd []")
