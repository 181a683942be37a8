"""Moves beside tables that never move, and with types of extensions in a schema of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cellferry.model import Side
from fixtures.ferry import ferry_with
from fixtures.postgres import FreshDatabases

LOCAL = """
CREATE TABLE public.workers (id int PRIMARY KEY);
CREATE TABLE public.sessions (id bigint PRIMARY KEY, user_id bigint REFERENCES public.users,
    last_project bigint REFERENCES public.projects);
ALTER TABLE public.projects ADD worker_id int REFERENCES public.workers;
"""
EXTENSION = """
CREATE SCHEMA extensions;
CREATE EXTENSION citext SCHEMA extensions;
CREATE DOMAIN public.login AS extensions.citext;
CREATE TABLE public.accounts (
    login {kind} PRIMARY KEY,
    organization_id bigint NOT NULL REFERENCES public.organizations
);
CREATE TABLE public.logins (
    id bigint PRIMARY KEY,
    login {kind} NOT NULL REFERENCES public.accounts (login)
);
"""


@pytest.mark.parametrize("ends", ["clean-up", "abort"])
def test_a_move_ends_beside_cell_local_tables_with_foreign_keys_to_what_moves(
    fresh_databases: Callable[[], FreshDatabases], tmp_path: Path, ends: str
) -> None:
    ferry = ferry_with(
        fresh_databases(),
        LOCAL,
        tmp_path / "map.yaml",
        "placement: {cell-local: [workers, sessions]}",
    )
    ferry.run(Side.SOURCE, "INSERT INTO sessions VALUES (1, 3), (2, 4)")
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        ferry.run(Side.SOURCE, "UPDATE projects SET name = name || '!' WHERE id = 2")
        move.sync()
        assert move.verify().ok
        if ends == "abort":
            move.cleanup(Side.DESTINATION)
            move.close_capture()
            return
        move.catch_up()
        move.freeze(60.0)
        move.finish()
        move.hand_over()
        move.release()
        there = ferry.content(Side.DESTINATION, 1)
        move.cleanup(Side.SOURCE)
        move.close_capture()
    assert ferry.content(Side.DESTINATION, 1) == there
    assert not any(
        rows for table, rows in ferry.content(Side.SOURCE, 1).items() if table != "organizations"
    )


@pytest.mark.parametrize("kind", ["extensions.citext", "public.login"])
def test_an_extension_in_its_own_schema_compares_as_it_does_for_the_application(
    fresh_databases: Callable[[], FreshDatabases], tmp_path: Path, kind: str
) -> None:
    tables = EXTENSION.format(kind=kind)
    ferry = ferry_with(fresh_databases(), tables, tmp_path / "map.yaml", "{}")
    ferry.run(
        Side.SOURCE,
        "INSERT INTO accounts VALUES ('bob', 1), ('Ann', 1), ('eve', 2);"
        "INSERT INTO logins VALUES (1, 'Bob'), (2, 'ann'), (3, 'Eve')",
    )
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        assert ferry.run(Side.DESTINATION, "SELECT id FROM logins ORDER BY 1") == [(1,), (2,)]
        ferry.run(Side.SOURCE, "INSERT INTO logins VALUES (4, 'BOB'), (5, 'EVE')")
        move.sync()
        assert move.verify().ok
        move.catch_up()
        move.freeze(60.0)
        move.finish()
        move.hand_over()
        move.release()
        assert ferry.run(Side.DESTINATION, "SELECT id FROM logins ORDER BY 1") == [
            (1,), (2,), (4,),
        ]  # fmt: skip
        move.cleanup(Side.SOURCE)
    assert ferry.run(Side.SOURCE, "SELECT id FROM logins ORDER BY 1") == [(3,), (5,)]
