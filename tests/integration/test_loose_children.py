"""Rows that no constraint ties to their parent: they come and go with it, without being changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cellferry.model import Side
from cellferry.stores.postgres import delta
from fixtures.ferry import Ferry, ferry_with
from fixtures.postgres import FreshDatabases

TABLES = """
CREATE TABLE public.pages (
    id bigint PRIMARY KEY,
    organization_id bigint NOT NULL REFERENCES public.organizations,
    slug text NOT NULL UNIQUE
);
CREATE TABLE public.comments (id bigint PRIMARY KEY, page_slug text, page_id bigint, body text);
CREATE TABLE public.reactions (
    id bigint PRIMARY KEY,
    comment_id bigint NOT NULL REFERENCES public.comments ON DELETE CASCADE,
    what text
);
"""
ROWS = """
INSERT INTO pages VALUES (5, 1, 'five'), (6, 1, 'six'), (7, 2, 'seven');
INSERT INTO comments VALUES (50, 'five', 5, 'a'), (51, 'five', 5, 'b'), (60, 'six', 6, 'c'),
    (70, 'seven', 7, 'd'), (90, 'nine', 9, 'before its page');
INSERT INTO reactions VALUES (500, 50, '+'), (510, 51, '-'), (600, 60, '+'), (900, 90, '+');
"""
#: How a comment finds its page: by a key that never changes in a row, or by one that may.
BY = {"id": ("page_id", "id"), "slug": ("page_slug", "slug")}


@pytest.fixture(params=list(BY))
def ferry(
    fresh_databases: Callable[[], FreshDatabases], tmp_path: Path, request: pytest.FixtureRequest
) -> Ferry:
    column, referred = BY[request.param]
    made = ferry_with(
        fresh_databases(),
        TABLES,
        tmp_path / "map.yaml",
        f"foreign_keys: [{{table: comments, columns: [{column}], references: pages,"
        f" referenced_columns: [{referred}]}}]",
    )
    made.run(Side.SOURCE, ROWS)
    return made


def comments(ferry: Ferry, side: Side) -> list[tuple[int, list[int]]]:
    """Comments under pages of organization 1, each with its reactions."""
    return ferry.run(
        side,
        "SELECT c.id, array_agg(r.id ORDER BY r.id) FROM comments AS c"
        " LEFT JOIN reactions AS r ON r.comment_id = c.id"
        " JOIN pages AS p ON p.id = c.page_id WHERE p.organization_id = 1 GROUP BY 1 ORDER BY 1",
    )


@pytest.fixture(params=["the quick way", "the general way"])
def quickly(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "the general way":
        monkeypatch.setattr(delta, "MOST_KEYS", 0)


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("last", ["a round", "the last delta"])
def test_children_of_a_page_that_is_restored_come_with_it(ferry: Ferry, last: str) -> None:
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        move.sync()
        assert move.verify().ok
        assert comments(ferry, Side.DESTINATION) == [(50, [500]), (51, [510]), (60, [600])]

        ferry.run(Side.SOURCE, "DELETE FROM pages WHERE id = 5")
        move.sync()
        assert comments(ferry, Side.DESTINATION) == [(60, [600])]
        assert ferry.run(Side.DESTINATION, "SELECT id FROM reactions") == [(600,)], "none is left"

        move.catch_up()
        ferry.run(Side.SOURCE, "INSERT INTO pages VALUES (5, 1, 'five')")
        if last == "a round":
            move.sync()
            assert move.verify().ok
        move.freeze(60.0)
        move.finish()
        move.hand_over()
        move.release()

    assert comments(ferry, Side.DESTINATION) == [(50, [500]), (51, [510]), (60, [600])]


@pytest.mark.usefixtures("quickly")
def test_children_that_were_there_before_their_page_come_with_it(ferry: Ferry) -> None:
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        ferry.run(Side.SOURCE, "INSERT INTO comments VALUES (91, 'nine', 9, 'also before')")
        move.sync()
        ferry.run(Side.SOURCE, "INSERT INTO pages VALUES (9, 1, 'nine')")
        move.sync()
        assert move.verify().ok

    assert [found for found, _ in comments(ferry, Side.DESTINATION)] == [50, 51, 60, 90, 91]
    assert (900,) in ferry.run(Side.DESTINATION, "SELECT id FROM reactions")


@pytest.mark.usefixtures("quickly")
def test_a_page_whose_children_are_known_needs_no_other_way(
    ferry: Ferry, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    insist = delta.Delta._insist_on_known_children

    def spied(self: delta.Delta, *arguments: Any) -> None:
        insist(self, *arguments)
        asked.append("passed")

    monkeypatch.setattr(delta.Delta, "_insist_on_known_children", spied)
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        move.catch_up()
        ferry.run(
            Side.SOURCE,
            "INSERT INTO pages VALUES (8, 1, 'eight');"
            "INSERT INTO comments VALUES (80, 'eight', 8, 'its own change is in the log')",
        )
        move.freeze(60.0)
        move.finish()
        move.hand_over()
        move.release()

    assert asked == (["passed"] if delta.MOST_KEYS else [])
    assert 80 in [found for found, _ in comments(ferry, Side.DESTINATION)]
