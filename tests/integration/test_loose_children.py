"""Rows that no constraint ties to their parent: they come and go with it, without being changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cellferry.errors import VerificationFailed
from cellferry.model import Side
from cellferry.stores.postgres import copier, delta
from cellferry.stores.postgres.checkpoints import Checkpoint
from cellferry.stores.postgres.schema import Table
from fixtures.ferry import Ferry
from fixtures.pages import BY, caught_up, comments, cut_over, pages_ferry
from fixtures.postgres import FreshDatabases


@pytest.fixture(params=list(BY))
def ferry(
    fresh_databases: Callable[[], FreshDatabases], tmp_path: Path, request: pytest.FixtureRequest
) -> Ferry:
    return pages_ferry(fresh_databases(), tmp_path / "map.yaml", request.param)


@pytest.fixture(params=["the quick way", "the general way"])
def quickly(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "the general way":
        monkeypatch.setattr(delta, "MOST_KEYS", 0)


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("last", ["a round", "the last delta"])
def test_children_of_a_page_that_is_restored_come_with_it(ferry: Ferry, last: str) -> None:
    with ferry.opened() as move:
        caught_up(ferry, move)
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
        cut_over(move)

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
        cut_over(move)

    # pages, and comments: what is below a loose child is loose as well
    assert asked == (["passed"] * 2 if delta.MOST_KEYS else [])
    assert 80 in [found for found, _ in comments(ferry, Side.DESTINATION)]


#: Comments that are written to in the transaction in which they come and go with their page.
WRITTEN = {
    "a page that is restored": (
        "DELETE FROM pages WHERE id = 6",
        "INSERT INTO pages VALUES (6, 1, 'six'); UPDATE comments SET body = 'r' WHERE id = 60",
        [(50, [500]), (51, [510]), (60, [600])],
    ),
    "a comment that is adopted": (
        "",
        "UPDATE comments SET page_id = 6, page_slug = 'six' WHERE id = 90",
        [(50, [500]), (51, [510]), (60, [600]), (90, [900])],
    ),
    "a page that is deleted": (
        "",
        (
            "UPDATE comments SET body = 'bye' WHERE id = 50; DELETE FROM pages WHERE id = 5;"
            "UPDATE comments SET body = 'bye' WHERE id = 51"
        ),
        [(60, [600])],
    ),
}


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("case", WRITTEN.values(), ids=WRITTEN.keys())
def test_what_is_below_a_child_that_is_written_to_comes_and_goes_with_it(
    ferry: Ferry, case: tuple[str, str, list[tuple[int, list[int]]]]
) -> None:
    """A constraint ties it to the child, but nothing ties the child to its page."""
    first, then, left = case
    with ferry.opened() as move:
        caught_up(ferry, move)
        if first:
            ferry.run(Side.SOURCE, first)
            move.sync()
        move.catch_up()
        ferry.run(Side.SOURCE, then)
        cut_over(move)
    assert comments(ferry, Side.DESTINATION) == left
    assert {key for (key,) in ferry.run(Side.DESTINATION, "SELECT id FROM reactions")} == {
        reaction for _, reactions in left for reaction in reactions
    }


@pytest.mark.usefixtures("quickly")
def test_a_page_that_was_away_while_its_comments_were_copied_gets_them(
    ferry: Ferry, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_table = copier._TableCopier.copy

    def copied(self: copier._TableCopier, table: Table, mark: Checkpoint) -> None:
        if table.name.name == "comments":
            ferry.run(Side.SOURCE, "DELETE FROM pages WHERE id = 5")
        copy_table(self, table, mark)
        if table.name.name == "reactions":
            ferry.run(Side.SOURCE, "INSERT INTO pages VALUES (5, 1, 'five')")

    monkeypatch.setattr(copier._TableCopier, "copy", copied)
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        assert comments(ferry, Side.DESTINATION) == [(60, [600])], "the test shows nothing"
        move.sync()
        assert move.verify().ok
    assert comments(ferry, Side.DESTINATION) == [(50, [500]), (51, [510]), (60, [600])]


@pytest.mark.usefixtures("quickly")
def test_comments_of_a_page_that_takes_another_name_are_left_behind(
    fresh_databases: Callable[[], FreshDatabases], tmp_path: Path
) -> None:
    """They are nobody's now: a neighbour's page of the old name must not get them."""
    ferry = pages_ferry(fresh_databases(), tmp_path / "map.yaml", "slug")
    with ferry.opened() as move:
        caught_up(ferry, move)
        ferry.run(Side.SOURCE, "UPDATE pages SET slug = 'cinq' WHERE id = 5")
        move.sync()
        assert ferry.run(Side.DESTINATION, "SELECT id FROM comments") == [(60,)]
        assert ferry.run(Side.DESTINATION, "SELECT id FROM reactions") == [(600,)]

        move.catch_up()
        ferry.run(
            Side.SOURCE,
            "UPDATE comments SET page_slug = 'nine' WHERE id = 50;"
            "UPDATE pages SET slug = 'nine' WHERE id = 5",
        )
        cut_over(move)
    assert ferry.run(Side.DESTINATION, "SELECT id FROM comments ORDER BY 1") == [
        (50,), (60,), (90,),
    ]  # fmt: skip


def test_a_page_that_changes_does_not_bring_its_comments_again(ferry: Ferry) -> None:
    with ferry.opened() as move:
        caught_up(ferry, move)
        ferry.run(Side.SOURCE, "UPDATE pages SET slug = slug WHERE id = 5")
        assert move.sync().applied == 1


@pytest.mark.usefixtures("quickly")
def test_a_row_of_the_new_cell_is_not_taken_when_a_page_arrives_above_it(ferry: Ferry) -> None:
    ferry.run(Side.DESTINATION, "INSERT INTO comments VALUES (9999, 'nine', 9, 'of the cell')")
    with ferry.opened() as move:
        caught_up(ferry, move)
        move.catch_up()
        ferry.run(Side.SOURCE, "INSERT INTO pages VALUES (9, 1, 'nine')")
        move.freeze(60.0)
        with pytest.raises(VerificationFailed, match=r"row 9999 of public\.comments"):
            move.finish()
        move.thaw()
        ferry.run(Side.DESTINATION, "DELETE FROM comments WHERE id = 9999")
        cut_over(move)
    assert (90,) in ferry.run(Side.DESTINATION, "SELECT id FROM comments")


@pytest.mark.usefixtures("quickly")
def test_an_orphan_that_stayed_does_not_stop_the_way_back(ferry: Ferry) -> None:
    """Its page comes at the new cell; the old cell has it already, below nothing."""
    with ferry.opened() as move:
        caught_up(ferry, move)
        move.catch_up()
        cut_over(move)
    with ferry.opened(ferry.move().turned()) as back:
        back.open_capture()
        back.sync()
        ferry.run(Side.DESTINATION, "INSERT INTO pages VALUES (9, 1, 'nine')")
        back.sync()
        assert ferry.run(Side.SOURCE, "SELECT id FROM pages WHERE id = 9") == [(9,)]


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("ferry", ["id"], indirect=True)
@pytest.mark.parametrize("ends", ["a round", "an abort"])
@pytest.mark.parametrize(
    "besides",
    [
        "UPDATE reactions SET what = 'x' WHERE id = 900",
        "UPDATE comments SET body = body WHERE id = 90; UPDATE reactions SET what = what",
    ],
    ids=["a reaction changed", "both are in the log"],
)
def test_comments_of_a_page_that_came_and_went_during_the_copy_do_not_stay(
    ferry: Ferry, monkeypatch: pytest.MonkeyPatch, ends: str, besides: str
) -> None:
    ferry.run(
        Side.DESTINATION,
        "INSERT INTO comments VALUES (9999, 'nine', 9, 'of the cell');"
        "INSERT INTO reactions VALUES (99990, 9999, '+'), (99991, 9999, '-')",
    )
    copy_table = copier._TableCopier.copy

    def copied(self: copier._TableCopier, table: Table, mark: Checkpoint) -> None:
        if table.name.name == "comments":
            ferry.run(Side.SOURCE, "INSERT INTO pages VALUES (9, 1, 'nine')")
        copy_table(self, table, mark)
        if table.name.name == "reactions":
            ferry.run(Side.SOURCE, f"DELETE FROM pages WHERE id = 9; {besides}")

    monkeypatch.setattr(copier._TableCopier, "copy", copied)
    theirs = ferry.run(Side.DESTINATION, "SELECT id FROM comments ORDER BY 1")
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        assert (90,) in ferry.run(Side.DESTINATION, "SELECT id FROM comments"), "shows nothing"
        if ends == "a round":
            move.sync()
            assert move.verify().ok
        else:
            move.close_capture()
            move.cleanup(Side.DESTINATION)
    came = ends == "a round"
    assert ferry.run(Side.DESTINATION, "SELECT id FROM comments ORDER BY 1") == [
        *([(50,), (51,), (60,)] if came else []), *theirs,
    ]  # fmt: skip
    assert ferry.run(Side.DESTINATION, "SELECT id FROM reactions ORDER BY 1") == [
        *([(500,), (510,), (600,)] if came else []), (99990,), (99991,),
    ]  # fmt: skip
