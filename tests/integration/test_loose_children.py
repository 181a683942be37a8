"""Rows that no constraint ties to their parent: they come and go with it, without being changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cellferry.errors import DrainTimeout, VerificationFailed
from cellferry.model import Side
from cellferry.stores.postgres import copier, delta
from cellferry.stores.postgres.checkpoints import Checkpoint
from cellferry.stores.postgres.gate import LOOSE_LOCK
from cellferry.stores.postgres.schema import Table
from cellferry.stores.postgres.store import PostgresMove
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


def caught_up(ferry: Ferry, move: PostgresMove) -> None:
    """Copied and compared: from here on a key log alone says what changes."""
    move.open_capture()
    move.copy()
    move.sync()
    assert move.verify().ok


def cut_over(move: PostgresMove) -> None:
    move.freeze(60.0)
    move.finish()
    move.hand_over()
    move.release()


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
    ferry = ferry_with(
        fresh_databases(),
        TABLES,
        tmp_path / "map.yaml",
        "foreign_keys: [{table: comments, columns: [page_slug], references: pages,"
        " referenced_columns: [slug]}]",
    )
    ferry.run(Side.SOURCE, ROWS)
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


@pytest.mark.parametrize("ends", ["CASCADE", "SET NULL"])
def test_a_cascade_of_a_neighbour_does_not_wait_for_a_writer_of_loose_rows(
    fresh_databases: Callable[[], FreshDatabases], tmp_path: Path, ends: str
) -> None:
    """The parent is gone for the row's trigger, but by the hand of its own transaction."""
    ferry = ferry_with(
        fresh_databases(),
        TABLES.replace("NOT NULL REFERENCES public.comments ON DELETE CASCADE",
                       f"REFERENCES public.comments ON DELETE {ends}"),
        tmp_path / "map.yaml",
        "foreign_keys: [{table: comments, columns: [page_id], references: pages}]",
    )  # fmt: skip
    ferry.run(Side.SOURCE, ROWS)
    ferry.run(Side.SOURCE, "INSERT INTO reactions VALUES (700, 70, '+')")
    with ferry.opened() as move:
        caught_up(ferry, move)
        with ferry.session(Side.SOURCE) as controller:
            controller.execute("SELECT pg_advisory_lock(%s)", (LOOSE_LOCK,))
            ferry.run(
                Side.SOURCE, "SET statement_timeout = '2s'; DELETE FROM comments WHERE id = 70"
            )
            with pytest.raises(psycopg.DatabaseError, match="the row may belong to"):
                ferry.run(Side.SOURCE, "DELETE FROM comments WHERE id = 90")


SWEEP = """
CREATE FUNCTION sweep() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN DELETE FROM comments WHERE id = 90; RETURN NULL; END';
CREATE TRIGGER sweep AFTER INSERT ON pages FOR EACH ROW WHEN (NEW.organization_id = 2)
    EXECUTE FUNCTION sweep();
"""
#: Each changes a comment whose page 9 is not seen yet.
LOOSE_WRITES = {
    "a new comment": "INSERT INTO comments VALUES (95, 'nine', 9, 'its page is not there yet')",
    "a changed comment": "UPDATE comments SET body = 'changed' WHERE id = 90",
    "a deleted comment": "DELETE FROM comments WHERE id = 90",
    "a neighbour's comment that comes": (
        "UPDATE comments SET page_id = 9, page_slug = 'nine' WHERE id = 70"
    ),
    "a comment that a neighbour gets": (
        "UPDATE comments SET page_id = 7, page_slug = 'seven' WHERE id = 90"
    ),
    "a comment that a trigger deletes": "INSERT INTO pages VALUES (77, 2, 'a neighbour''s')",
}


def nine(ferry: Ferry, side: Side) -> list[tuple[int, str]]:
    return ferry.run(side, "SELECT id, body FROM comments WHERE page_id = 9 ORDER BY 1")


@pytest.mark.parametrize("statement", LOOSE_WRITES.values(), ids=LOOSE_WRITES.keys())
def test_a_freeze_waits_for_a_writer_whose_row_becomes_the_organizations_meanwhile(
    ferry: Ferry, statement: str
) -> None:
    for side in Side:
        ferry.run(side, SWEEP)
    with ferry.opened() as move:
        caught_up(ferry, move)
        move.catch_up()
        with ferry.session(Side.SOURCE) as writer:
            writer.execute("BEGIN")
            writer.execute(statement.encode())
            ferry.run(Side.SOURCE, "INSERT INTO pages VALUES (9, 1, 'nine')")
            with pytest.raises(DrainTimeout, match="open for"):
                move.freeze(0.5)
            move.thaw()
            writer.execute("COMMIT")
        cut_over(move)
        assert nine(ferry, Side.DESTINATION) == nine(ferry, Side.SOURCE)


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_a_loose_writer_that_comes_after_a_freeze_looks_again_whose_its_row_is(
    ferry: Ferry, isolation: str
) -> None:
    """It took its snapshot when the page was not there; then the page came, and the freeze."""
    with ferry.opened() as move:
        caught_up(ferry, move)
        move.catch_up()
        with ferry.session(Side.SOURCE) as writer:
            writer.execute(f"BEGIN ISOLATION LEVEL {isolation}".encode())
            writer.execute("SELECT count(*) FROM pages")
            ferry.run(Side.SOURCE, "INSERT INTO pages VALUES (9, 1, 'nine')")
            cut_over(move)
            with pytest.raises(psycopg.DatabaseError) as caught:
                writer.execute("INSERT INTO comments VALUES (95, 'nine', 9, 'late')")
        assert caught.value.sqlstate == ("CF001" if isolation == "READ COMMITTED" else "40001")
        assert nine(ferry, Side.DESTINATION) == nine(ferry, Side.SOURCE)


def test_loose_rows_can_be_written_at_both_cells_in_the_middle_of_a_cutover(ferry: Ferry) -> None:
    with ferry.opened() as move:
        caught_up(ferry, move)
        move.catch_up()
        move.freeze(60.0)
        move.finish()
        for side in Side:
            ferry.run(side, "SET statement_timeout = '2s';"
                      "INSERT INTO comments VALUES (7000, 'x', 12345, 'of nobody')")  # fmt: skip
        move.hand_over()
        move.release()


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
def test_comments_of_a_page_that_came_and_went_during_the_copy_do_not_stay(
    ferry: Ferry, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_table = copier._TableCopier.copy

    def copied(self: copier._TableCopier, table: Table, mark: Checkpoint) -> None:
        if table.name.name == "comments":
            ferry.run(Side.SOURCE, "INSERT INTO pages VALUES (9, 1, 'nine')")
        copy_table(self, table, mark)
        if table.name.name == "reactions":
            ferry.run(Side.SOURCE, "DELETE FROM pages WHERE id = 9")

    monkeypatch.setattr(copier._TableCopier, "copy", copied)
    theirs = ferry.run(Side.DESTINATION, "SELECT id FROM comments ORDER BY 1")
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        assert (90,) in ferry.run(Side.DESTINATION, "SELECT id FROM comments"), "shows nothing"
        move.sync()
        assert move.verify().ok
    assert ferry.run(Side.DESTINATION, "SELECT id FROM comments ORDER BY 1") == [
        *theirs, (50,), (51,), (60,),
    ]  # fmt: skip
    assert (900,) not in ferry.run(Side.DESTINATION, "SELECT id FROM reactions")
