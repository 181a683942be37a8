"""Unique values that went from one shared row to another while the organization was away."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cellferry.errors import PermanentError
from cellferry.model import Side
from cellferry.stores.postgres import references
from fixtures.ferry import Ferry, make_ferry
from fixtures.ferry_schema import SCHEMA
from fixtures.postgres import FreshDatabases


@pytest.fixture(params=["", " DEFERRABLE"], ids=["immediate", "deferrable"])
def aged(fresh_databases: Callable[[], FreshDatabases], request: pytest.FixtureRequest) -> Ferry:
    """The destination has old rows of users 2 and 4, whose logins changed since."""
    schema = f"{SCHEMA} ALTER TABLE public.users ADD login text UNIQUE{request.param};"
    made = make_ferry(fresh_databases(), schema)
    made.run(Side.SOURCE, "UPDATE users SET login = 'login ' || id")
    made.run(
        Side.DESTINATION,
        "INSERT INTO users VALUES (2, 'user2@example.com', 1, 'login 4'),"
        " (4, 'user4@example.com', 1, 'login 2')",
    )
    return made


def logins(ferry: Ferry, side: Side) -> dict[int, str]:
    rows = ferry.run(side, "SELECT id, login FROM users WHERE id IN (2, 4, 600) ORDER BY id")
    return dict(rows)


def copy(ferry: Ferry) -> None:
    with ferry.opened() as move:
        assert not [one for one in move.inventory().blockers if one.fatal]
        move.open_capture()
        move.copy()


def test_rows_of_two_batches_that_swapped_a_value_come(
    aged: Ferry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "LOCKED", 1)

    copy(aged)

    assert logins(aged, Side.DESTINATION) == logins(aged, Side.SOURCE)


def test_a_new_row_gets_the_value_of_one_that_comes_later(aged: Ferry) -> None:
    aged.run(
        Side.SOURCE,
        "DELETE FROM memberships WHERE user_id IN (2, 4) AND organization_id = 1;"
        "UPDATE notes SET author_id = 4 WHERE id IN (SELECT n.id FROM notes AS n"
        " JOIN issues AS i ON i.id = n.issue_id JOIN projects AS p ON p.id = i.project_id"
        " WHERE organization_id = 1 LIMIT 1);"
        "UPDATE users SET login = 'another' WHERE id = 4;"
        "INSERT INTO users VALUES (600, 'u600', 1, 'old');"
        "INSERT INTO memberships VALUES (1, 600, '')",
    )
    aged.run(Side.DESTINATION, "UPDATE users SET login = 'old' WHERE id = 4")

    copy(aged)

    assert logins(aged, Side.DESTINATION)[600] == "old"
    assert logins(aged, Side.DESTINATION)[4] == "another"


def test_a_value_of_a_row_that_others_use_is_refused(aged: Ferry) -> None:
    aged.run(
        Side.SOURCE,
        "INSERT INTO users VALUES (600, 'u600', 1, 'nine');"
        "INSERT INTO memberships VALUES (1, 600, '')",
    )
    aged.run(Side.DESTINATION, "UPDATE users SET login = 'nine' WHERE id = 9001")
    with aged.opened() as move:
        assert [one.code for one in move.inventory().blockers if one.fatal] == ["key-collision"]
        move.open_capture()
        with pytest.raises(PermanentError, match=r"key collision: public\.users row 600"):
            move.copy()


def test_a_row_that_follows_gets_no_value_that_another_has(aged: Ferry) -> None:
    copy(aged)
    aged.run(Side.DESTINATION, "UPDATE users SET login = 'nine' WHERE id = 9001")
    aged.run(Side.SOURCE, "UPDATE users SET login = 'nine' WHERE id = 2")

    with (
        aged.opened(aged.move(attempt=2)) as move,
        pytest.raises(PermanentError, match="users_login"),
    ):
        move.sync()

    assert logins(aged, Side.DESTINATION)[2] == "login 2"


def test_rows_that_follow_swap_a_value(aged: Ferry) -> None:
    copy(aged)
    aged.run(
        Side.SOURCE,
        "UPDATE users SET login = NULL WHERE id = 2;"
        "UPDATE users SET login = 'login 2' WHERE id = 4;"
        "UPDATE users SET login = 'login 4' WHERE id = 2",
    )

    with aged.opened(aged.move(attempt=2)) as move:
        move.sync()

    assert logins(aged, Side.DESTINATION) == {2: "login 4", 4: "login 2"}
