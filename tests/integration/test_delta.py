"""A few dirty keys go in a handful of round trips; whatever is unusual goes the general way."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest

from cellferry.model import Side
from cellferry.stores.postgres.applied import Applied
from cellferry.stores.postgres.rounds import read_log
from cellferry.stores.postgres.scope import Key, Scope
from cellferry.stores.postgres.store import PostgresMove
from cellferry.stores.postgres.transactions import snapshot
from fixtures.ferry import Ferry, make_ferry
from fixtures.ferry_schema import NEIGHBOUR, ROWS, SCHEMA
from fixtures.postgres import FreshDatabases


@dataclass
class Voyage:
    """A move that has been copied, and a session of the application at the source."""

    ferry: Ferry
    move: PostgresMove
    session: psycopg.Connection[Any]

    def quickly(self) -> Applied | None:
        """Apply what is dirty in the quick way; None where that is left to the general way."""
        applier = self.move._rounds()._applier

        def dirty() -> Mapping[str, set[Key]]:
            return read_log(self.move._source, "1").keys

        if candidates := applier.may_follow(dirty()):
            return applier.apply_and_follow(candidates, dirty, None)
        with snapshot(self.move._source):
            return applier._delta.apply(dirty(), None)

    def is_equal(self) -> bool:
        return self.ferry.content(Side.SOURCE, 1) == self.ferry.content(Side.DESTINATION, 1)


@contextmanager
def sailing(ferry: Ferry) -> Iterator[Voyage]:
    with ferry.session(Side.SOURCE) as session, ferry.opened() as move:
        move.open_capture()
        move.copy()
        yield Voyage(ferry, move, session)


@pytest.fixture
def voyage(ferry: Ferry) -> Iterator[Voyage]:
    with sailing(ferry) as made:
        yield made


@pytest.mark.parametrize(
    "statements",
    [
        "UPDATE slots SET position = 61 - position WHERE organization_id = 1",
        (
            "UPDATE users SET email = 'changed@example.com' WHERE id = 2;"
            " UPDATE issues SET title = 'x' WHERE id = 1"
        ),
        (
            "INSERT INTO plans VALUES (77, 'new plan'); INSERT INTO users VALUES (77, 'new', 77);"
            " INSERT INTO memberships VALUES (1, 77, 'member')"
        ),
        "DELETE FROM projects WHERE id = 40",
        (
            "UPDATE slots SET id = 1002 WHERE organization_id = 1 AND id = 2;"
            " DELETE FROM issues WHERE id = 3"
        ),
    ],
    ids=["deferrable key", "shared row changed", "shared row new", "parent gone", "key changed"],
)
def test_what_applications_do_all_day_goes_the_quick_way(voyage: Voyage, statements: str) -> None:
    voyage.session.execute(statements.encode())

    applied = voyage.quickly()

    assert applied is not None
    assert applied.keys > 0
    assert voyage.is_equal()
    for shared in ("SELECT * FROM users WHERE id IN (2, 77)", "SELECT * FROM plans WHERE id = 77"):
        assert voyage.ferry.run(Side.DESTINATION, shared) == voyage.ferry.run(Side.SOURCE, shared)


def test_a_shared_row_that_was_there_before_stays_as_it_is(voyage: Voyage) -> None:
    voyage.session.execute(
        "UPDATE users SET email = 'one@example.com' WHERE id = 1;"
        " UPDATE issues SET title = 'x' WHERE id = 1"
    )

    assert voyage.quickly() is not None

    emails = voyage.ferry.run(Side.DESTINATION, "SELECT email FROM users WHERE id = 1")
    assert emails == [("user1@example.com",)]


def test_a_value_that_is_taken_in_a_deferrable_key_is_left_to_the_general_way(
    voyage: Voyage,
) -> None:
    # The round sees who took the position, and not who gave it up: the replica role, which checks
    # no deferrable key, would let both have it.
    voyage.session.execute(
        "UPDATE slots SET position = 1002 WHERE organization_id = 1 AND id = 2;"
        " DELETE FROM cellferry.key_log;"
        " UPDATE slots SET position = 2 WHERE organization_id = 1 AND id = 4"
    )
    before = voyage.ferry.content(Side.DESTINATION, 1)

    assert voyage.quickly() is None

    assert voyage.ferry.content(Side.DESTINATION, 1) == before
    voyage.move.sync()
    positions = voyage.ferry.run(
        Side.DESTINATION,
        "SELECT position FROM slots WHERE organization_id = 1 GROUP BY 1 HAVING count(*) > 1",
    )
    assert positions == []


def test_children_that_a_gone_parent_leaves_are_left_to_the_general_way(ferry: Ferry) -> None:
    for side in Side:
        ferry.run(
            side,
            "ALTER TABLE notes DROP CONSTRAINT notes_issue_id_fkey;"
            " ALTER TABLE notes ADD FOREIGN KEY (issue_id) REFERENCES issues"
            " ON DELETE CASCADE NOT VALID",
        )
    for cell in ferry.source, ferry.destination:
        ferry.store.prepare_cell(cell, ferry.progress)
    with sailing(ferry) as voyage:
        # No constraint says that the note went with its issue, and the log does not, either.
        voyage.session.execute(
            "DELETE FROM issues WHERE id = 1;"
            " DELETE FROM cellferry.key_log WHERE relation = 'public.notes'"
        )
        before = ferry.content(Side.DESTINATION, 1)

        assert voyage.quickly() is None

        assert ferry.content(Side.DESTINATION, 1) == before
        voyage.move.sync()
        assert voyage.is_equal()
        notes = ferry.run(Side.DESTINATION, "SELECT FROM notes WHERE issue_id = 1")
        assert notes == []


@pytest.mark.parametrize(
    "statements",
    [
        "UPDATE issues SET title = 'x' WHERE id = 1",
        "UPDATE issues SET title = 'x' WHERE id = 1; UPDATE users SET plan_id = NULL WHERE id = 2",
    ],
    ids=["owned rows", "shared rows as well"],
)
def test_a_scope_with_tangled_guards_takes_the_general_way(
    voyage: Voyage, monkeypatch: pytest.MonkeyPatch, statements: str
) -> None:
    # Which has: `test_scope.py`.
    monkeypatch.setattr(Scope, "has_tangled_guards", True)
    voyage.session.execute(statements.encode())

    assert voyage.quickly() is None

    voyage.move.sync()
    assert voyage.is_equal()


def test_the_quick_way_is_open_again_after_a_refusal(voyage: Voyage) -> None:
    # What was prepared in a pipeline that broke off is not there for the next.
    taken = "UPDATE users SET email = 'taken@example.com' WHERE id = {}"
    voyage.ferry.run(Side.DESTINATION, taken.format(1))
    voyage.session.execute(taken.format(2) + "; UPDATE issues SET title = 'x' WHERE id = 1")
    assert voyage.quickly() is None
    voyage.ferry.run(Side.DESTINATION, "UPDATE users SET email = 'free' WHERE id = 1")

    for _ in range(8):  # more uses than PostgreSQL plans anew by default
        assert voyage.quickly() is not None

    assert voyage.is_equal()


def test_a_table_that_changes_between_two_small_rounds_is_planned_anew(voyage: Voyage) -> None:
    voyage.session.execute("UPDATE issues SET title = 'x' WHERE id = 1")
    assert voyage.quickly() is not None
    for side in Side:
        voyage.ferry.run(
            side,
            "ALTER TABLE issues ADD COLUMN later text DEFAULT 'here';"
            " ALTER TABLE issues ALTER COLUMN iid TYPE bigint;"
            " DROP INDEX notes_issue_id_idx",
        )
    voyage.session.execute(
        "UPDATE issues SET title = 'y' WHERE id = 1; UPDATE notes SET body = 'z' WHERE issue_id = 1"
    )

    assert voyage.quickly() is not None

    assert voyage.is_equal()


def test_names_with_percent_signs_go_the_quick_way(
    fresh_databases: Callable[[], FreshDatabases],
) -> None:
    schema, rows, neighbour = (
        re.sub(r"\bcolor\b", '"a%b"', text)
        .replace('"Key"', '"100%s Key"')
        .replace("Odd Labels", "Odd % Labels")
        for text in (SCHEMA, ROWS, NEIGHBOUR)
    )
    with sailing(make_ferry(fresh_databases(), schema, rows, neighbour)) as voyage:
        voyage.session.execute("INSERT INTO \"Odd % Labels\" VALUES (1, 'new', 'brown')")

        applied = voyage.quickly()

        assert applied is not None
        found = voyage.ferry.run(
            Side.DESTINATION, """SELECT "100%s Key" FROM "Odd % Labels" WHERE "a%b" = 'brown'"""
        )
        assert found == [("new",)]
        assert voyage.move.verify().ok
