"""Rows of nobody at the destination, in tables whose rows are owned through others: they stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cellferry.model import Side
from cellferry.stores.postgres import delta
from fixtures.ferry import Ferry, ferry_with
from fixtures.postgres import FreshDatabases

TABLES = """
CREATE TABLE public.pages (
    id bigint PRIMARY KEY,
    organization_id bigint REFERENCES public.organizations
);
CREATE TABLE public.comments (id bigint PRIMARY KEY, page_id bigint, kind text, body text);
CREATE TABLE public.reactions (id bytea PRIMARY KEY, comment_id bigint);
"""
MAP = """
tables:
  public.pages:
    owners: [{column: organization_id}]
  public.comments:
    owners: [{through: public.pages, columns: [page_id], when: "{row}.kind = 'page'"}]
  public.reactions:
    owners: [{through: public.comments, columns: [comment_id], through_columns: [id]}]
"""
#: Of organization 1; between their keys are those of the rows of nobody.
ROWS = """
INSERT INTO pages VALUES (1, 1), (9, 1);
INSERT INTO comments VALUES (10, 1, 'page', 'a'), (90, 9, 'page', 'b');
INSERT INTO reactions VALUES ('\\x01', 10), ('\\x09', 90);
"""
#: Instance-wide pages, comments on nothing or on them, and reactions to these comments.
NOBODYS = """
INSERT INTO pages VALUES (5, NULL);
INSERT INTO comments VALUES (50, NULL, NULL, 'on nothing'), (51, 5, 'page', 'on a page of nobody'),
    (52, 777, 'poll', 'on another kind of thing, which has no path');
INSERT INTO reactions VALUES ('\\x05', NULL), ('\\x06', 50), ('\\x07', 51), ('\\x08', 52);
"""
TABLE_NAMES = ("pages", "comments", "reactions")


@pytest.fixture
def ferry(fresh_databases: Callable[[], FreshDatabases], tmp_path: Path) -> Ferry:
    made = ferry_with(fresh_databases(), TABLES, tmp_path / "map.yaml", MAP)
    made.run(Side.SOURCE, ROWS)
    made.run(Side.DESTINATION, NOBODYS)
    return made


def content(ferry: Ferry, side: Side) -> set[str]:
    return {
        row
        for name in TABLE_NAMES
        for (row,) in ferry.run(side, f"SELECT '{name} ' || t::text FROM {name} AS t")
    }


def test_they_are_not_taken_for_rows_that_lost_their_parents(ferry: Ferry) -> None:
    theirs = content(ferry, Side.DESTINATION)
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        assert move.verify().mismatches == ()
        assert move.repair().repaired == 0
        assert content(ferry, Side.DESTINATION) == theirs | content(ferry, Side.SOURCE)

        move.cleanup(Side.DESTINATION)
        move.close_capture()
    assert content(ferry, Side.DESTINATION) == theirs


@pytest.mark.parametrize("many", [False, True], ids=["the quick way", "the general way"])
def test_a_round_with_their_keys_leaves_them(
    ferry: Ferry, monkeypatch: pytest.MonkeyPatch, many: bool
) -> None:
    """A key may be in the log because a row of nobody at the source had it for a moment."""
    if many:
        monkeypatch.setattr(delta, "MOST_KEYS", 0)
    theirs = content(ferry, Side.DESTINATION)
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        ferry.run(
            Side.SOURCE,
            "INSERT INTO comments VALUES (50, 1, 'page', 'here for a moment');"
            "DELETE FROM comments WHERE id = 50",
        )
        move.sync()
        assert move.verify().mismatches == ()
    assert content(ferry, Side.DESTINATION) == theirs | content(ferry, Side.SOURCE)


def test_rows_that_lost_their_parents_stay_where_no_constraint_ties_them(ferry: Ferry) -> None:
    """Applications leave such rows; only the source can tell that one is the organization's."""
    ferry.run(
        Side.DESTINATION,
        "INSERT INTO comments VALUES (60, 600, 'page', 'its page went');"
        r"INSERT INTO reactions VALUES ('\x0701', 60), ('\x0702', 601)",
    )
    theirs = content(ferry, Side.DESTINATION)
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        assert move.verify().mismatches == ()
        assert move.repair().repaired == 0

        ferry.run(
            Side.DESTINATION,
            "SET session_replication_role = replica; DELETE FROM pages WHERE id = 9",
        )
        lost = [(one.part, one.key, one.reason) for one in move.verify().mismatches]
        assert ("public.comments", "90", "orphan") in lost
        assert {key for _, key, reason in lost if reason == "orphan"} == {"90", r"\x09"}
        move.repair()
        assert move.verify().ok
    assert content(ferry, Side.DESTINATION) == theirs | content(ferry, Side.SOURCE)


@pytest.mark.parametrize("many", [False, True], ids=["the quick way", "the general way"])
def test_a_row_of_nobody_that_both_cells_have_stays(
    ferry: Ferry, monkeypatch: pytest.MonkeyPatch, many: bool
) -> None:
    """As in cells that were cloned from one database."""
    if many:
        monkeypatch.setattr(delta, "MOST_KEYS", 0)
    for side in Side:
        ferry.run(
            side,
            "INSERT INTO comments VALUES (60, 600, 'page', 'its page went');"
            r"INSERT INTO reactions VALUES ('\x0701', 60)",
        )
    theirs = content(ferry, Side.DESTINATION)
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        ferry.run(Side.SOURCE, "UPDATE comments SET body = body WHERE id = 60")
        move.sync()
        assert move.verify().mismatches == ()
    assert content(ferry, Side.DESTINATION) == theirs | content(ferry, Side.SOURCE)
