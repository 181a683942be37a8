"""Who else uses shared rows: the answer is the same with an index and without, and costs little."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from cellferry.stores.postgres import data_map
from cellferry.stores.postgres.schema import Table
from cellferry.stores.postgres.scope import Scope
from cellferry.stores.postgres.usage import Usage
from fixtures.ferry_schema import SCHEMA
from fixtures.postgres import FreshDatabases

#: A project, an issue and 2,000 comments of organization 2; user 1 wrote one for organization 1,
#: user 2 one for each, user 3 one for nobody: its issue is not there yet.
ROWS = """
INSERT INTO organizations VALUES (1, 'one'), (2, 'two');
INSERT INTO users SELECT g, 'user' || g FROM generate_series(1, 9) AS g;
INSERT INTO projects (id, organization_id, name) VALUES (1, 1, 'ours'), (2, 2, 'theirs');
INSERT INTO issues (id, project_id, iid, title) VALUES (1, 1, 1, 'ours'), (2, 2, 1, 'theirs');
INSERT INTO notes (issue_id, author_id)
    VALUES (1, 1), (1, 2), (2, 2), (3, 3), (1, 4), (3, 4), (2, 5);
INSERT INTO notes (issue_id, author_id) SELECT 2, 9 FROM generate_series(1, 2000);
ANALYZE;
"""


@pytest.fixture(params=[False, True], ids=["without an index", "with an index"])
def cells(
    request: pytest.FixtureRequest, fresh_databases: Callable[[], FreshDatabases]
) -> Iterator[tuple[psycopg.Connection[Any], psycopg.Connection[Any]]]:
    """The cell that is asked, and the one where the organization comes from."""
    urls = fresh_databases()
    with (
        psycopg.connect(urls.destination, autocommit=True) as cell,
        psycopg.connect(urls.source, autocommit=True) as elsewhere,
    ):
        for connection in (cell, elsewhere):
            connection.execute(SCHEMA.encode())
            if request.param:
                connection.execute("CREATE INDEX ON notes (author_id)")
        cell.execute("SET session_replication_role = replica")
        cell.execute(ROWS)
        yield cell, elsewhere


def usage(cells: tuple[psycopg.Connection[Any], psycopg.Connection[Any]]) -> tuple[Usage, Table]:
    cell, elsewhere = cells
    scope = Scope(data_map.discover(cell), "1")
    (users,) = (table for table in scope.data_map.tables if table.name.name == "users")
    return Usage(cell, elsewhere, scope), users


def test_rows_of_others_and_of_nobody_count_and_ours_do_not(
    cells: tuple[psycopg.Connection[Any], psycopg.Connection[Any]],
) -> None:
    asked, users = usage(cells)
    everybody = {(str(number),) for number in range(1, 10)}

    assert asked.by_others(users, everybody) == {("2",), ("3",), ("4",), ("5",), ("9",)}
    assert asked.by_others(users, {("1",), ("6",)}) == set()


def test_a_row_of_nobody_here_is_ours_if_it_is_ours_elsewhere(
    cells: tuple[psycopg.Connection[Any], psycopg.Connection[Any]],
) -> None:
    asked, users = usage(cells)
    cell, elsewhere = cells
    row = cell.execute("SELECT id FROM notes WHERE issue_id = 3 AND author_id = 4").fetchone()
    assert row is not None
    elsewhere.execute(
        "SET session_replication_role = replica;"
        "INSERT INTO organizations VALUES (1, 'one');"
        "INSERT INTO projects (id, organization_id, name) VALUES (1, 1, 'ours');"
        "INSERT INTO issues (id, project_id, iid, title) VALUES (3, 1, 3, 'under way')"
    )
    elsewhere.execute("INSERT INTO notes (id, issue_id, author_id) VALUES (%s, 3, 4)", row)

    assert asked.by_others(users, {("1",), ("3",), ("4",)}) == {("3",)}


def test_only_of_rows_that_refer_to_the_key_it_is_asked_whose_they_are(
    cells: tuple[psycopg.Connection[Any], psycopg.Connection[Any]],
) -> None:
    """There are 2,000 others in the cell, and each costs a look into two tables."""
    asked, users = usage(cells)
    cell = cells[0]
    looks = (
        "SELECT sum(coalesce(idx_scan, 0) + seq_scan)::int FROM pg_stat_xact_user_tables"
        " WHERE relname IN ('issues', 'projects')"
    )
    with cell.transaction():
        assert asked.by_others(users, {("1",), ("2",)}) == {("2",)}
        row = cell.execute(looks).fetchone()

    assert row is not None
    assert row[0] < 100


def test_a_key_of_columns_with_several_collations_is_told_from_another(
    fresh_databases: Callable[[], FreshDatabases],
) -> None:
    """No collation but bytes tells keys apart: columns may disagree, or take two for equal."""
    urls = fresh_databases()
    with (
        psycopg.connect(urls.destination, autocommit=True) as cell,
        psycopg.connect(urls.source, autocommit=True) as elsewhere,
    ):
        cell.execute(
            "CREATE TABLE organizations (id bigint PRIMARY KEY);"
            "CREATE TABLE projects (id bigint PRIMARY KEY, organization_id bigint NOT NULL"
            " REFERENCES organizations);"
            'CREATE TABLE places (region text COLLATE "C", code text COLLATE "POSIX",'
            " PRIMARY KEY (region, code));"
            "CREATE TABLE visits (id bigint PRIMARY KEY, project_id bigint NOT NULL"
            ' REFERENCES projects, region text COLLATE "C", code text COLLATE "POSIX",'
            " FOREIGN KEY (region, code) REFERENCES places);"
            "INSERT INTO organizations VALUES (1), (2);"
            "INSERT INTO projects VALUES (1, 1), (2, 2);"
            "INSERT INTO places VALUES ('eu', 'A'), ('eu', 'a'), ('eu', 'b');"
            "INSERT INTO visits VALUES (1, 2, 'eu', 'A'), (2, 2, 'eu', 'a'), (3, 1, 'eu', 'b')"
        )
        scope = Scope(data_map.discover(cell), "1")
        (places,) = (table for table in scope.data_map.tables if table.name.name == "places")
        keys = {("eu", "A"), ("eu", "a"), ("eu", "b")}

        found = Usage(cell, elsewhere, scope).by_others(places, keys)

    assert found == {("eu", "A"), ("eu", "a")}
