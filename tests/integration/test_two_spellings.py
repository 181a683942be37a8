"""Keys that can be written in two ways: one row has two texts of its key in the log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cellferry.model import Side
from cellferry.stores.postgres import delta
from fixtures.ferry import Ferry, ferry_with
from fixtures.postgres import FreshDatabases

KINDS = {
    "citext": ("citext", "'Abc'", "'ABC'"),
    "numeric": ("numeric", "1.0", "1.00"),
    "interval": ("interval", "'24:00:00'", "'1 day'"),
    "jsonb": ("jsonb", "'[1.0]'", "'[1.00]'"),
    "range": ("numrange", "'[1.0,2]'", "'[1.00,2]'"),
}


@pytest.fixture(params=[False, True], ids=["the quick way", "the general way"])
def one_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(delta, "MOST_KEYS", 0)


def make_ferry(databases: FreshDatabases, tmp_path: Path, kind: str) -> Ferry:
    tables = f"""
    CREATE EXTENSION citext;
    CREATE TABLE public.labels (
        code {kind} PRIMARY KEY,
        organization_id bigint NOT NULL REFERENCES public.organizations,
        hue text
    );
    CREATE TABLE public.uses (
        id bigint PRIMARY KEY,
        code {kind} NOT NULL REFERENCES public.labels
    );
    """
    return ferry_with(databases, tables, tmp_path / "map.yaml", "{}")


@pytest.mark.usefixtures("one_way")
@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_is_spelled_anew_arrives(
    fresh_databases: Callable[[], FreshDatabases], tmp_path: Path, kind: str
) -> None:
    column, once, anew = KINDS[kind]
    ferry = make_ferry(fresh_databases(), tmp_path, column)

    def there() -> list[tuple[str, str, int]]:
        return ferry.run(
            Side.DESTINATION,
            "SELECT l.code::text, hue, u.id FROM labels AS l JOIN uses AS u USING (code)",
        )

    spelled_once, spelled_anew = (
        text for (text,) in ferry.run(
            Side.SOURCE,
            f"SELECT unnest(ARRAY[({once}::{column})::text, ({anew}::{column})::text])",
        )
    )  # fmt: skip
    assert spelled_once != spelled_anew, "the test shows nothing"
    ferry.run(Side.SOURCE, f"INSERT INTO labels VALUES ({once}, 1, 'red')")
    ferry.run(Side.SOURCE, f"INSERT INTO uses VALUES (1, {anew})")
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        assert there() == [(spelled_once, "red", 1)]

        ferry.run(Side.SOURCE, f"UPDATE labels SET code = {anew}, hue = 'blue'")
        move.sync()
        assert move.verify().ok
        assert there() == [(spelled_anew, "blue", 1)]

        move.catch_up()
        ferry.run(Side.SOURCE, f"UPDATE labels SET code = {once}, hue = 'green'")
        move.freeze(60.0)
        move.finish()
        move.hand_over()
        move.release()
        assert there() == [(spelled_once, "green", 1)]
        move.cleanup(Side.SOURCE)
    assert ferry.run(Side.SOURCE, "SELECT 1 FROM labels UNION ALL SELECT 2 FROM uses") == []


def test_a_shared_row_that_is_referred_to_in_two_spellings_comes_once(
    fresh_databases: Callable[[], FreshDatabases], tmp_path: Path
) -> None:
    ferry = ferry_with(
        fresh_databases(),
        "CREATE EXTENSION citext;"
        "CREATE TABLE public.people (login citext PRIMARY KEY, name text);"
        "CREATE TABLE public.seats (id bigint PRIMARY KEY, organization_id bigint NOT NULL"
        " REFERENCES public.organizations, login citext NOT NULL REFERENCES public.people)",
        tmp_path / "map.yaml",
        "placement: {referenced: [people]}",
    )
    ferry.run(
        Side.SOURCE,
        "INSERT INTO people VALUES ('Ann', 'Ann'), ('bob', 'Bob');"
        "INSERT INTO seats VALUES (1, 1, 'ann'), (2, 1, 'ANN')",
    )
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        assert ferry.run(Side.DESTINATION, "SELECT login::text FROM people") == [("Ann",)]
        ferry.run(
            Side.SOURCE,
            "INSERT INTO seats VALUES (3, 1, 'Bob'), (4, 1, 'BOB');"
            "UPDATE people SET login = 'ANN', name = 'Anna' WHERE login = 'ann'",
        )
        move.sync()
        assert move.verify().ok
        move.catch_up()
        ferry.run(Side.SOURCE, "UPDATE people SET login = 'aNN' WHERE login = 'ann'")
        move.freeze(60.0)
        move.finish()
        move.hand_over()
        move.release()
    assert ferry.run(
        Side.DESTINATION, "SELECT login::text, name FROM people ORDER BY login"
    ) == [("aNN", "Anna"), ("bob", "Bob")]  # fmt: skip
