"""The layout of the moved tables changes with every definition that a key log does not see."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg
import pytest

from cellferry.stores.postgres import layout
from cellferry.stores.postgres.data_map import discover
from cellferry.stores.postgres.scope import Scope
from fixtures.postgres import FreshDatabases, postgres_versions

SCHEMA = """
CREATE TABLE organizations (id bigint PRIMARY KEY, name text);
CREATE TABLE projects (
    id bigint PRIMARY KEY,
    organization_id bigint NOT NULL REFERENCES organizations,
    slug varchar(40) NOT NULL,
    points int
);
CREATE UNIQUE INDEX projects_slug ON projects (organization_id, slug);
CREATE TABLE events (
    organization_id bigint NOT NULL REFERENCES organizations,
    id bigint NOT NULL,
    what text,
    PRIMARY KEY (organization_id, id)
) PARTITION BY HASH (organization_id);
CREATE TABLE events_0 PARTITION OF events FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE events_1 PARTITION OF events FOR VALUES WITH (MODULUS 2, REMAINDER 1)
    PARTITION BY RANGE (id);
CREATE TABLE events_1_0 PARTITION OF events_1 FOR VALUES FROM (0) TO (100);
CREATE TABLE unrelated (id bigint PRIMARY KEY);
INSERT INTO organizations VALUES (1, 'acme');
INSERT INTO projects VALUES (1, 1, 'one', 1);
"""

CHANGES = {
    "a table is emptied": "TRUNCATE projects",
    "a table is rewritten": "CLUSTER projects USING projects_pkey",
    "a partition of a partition is emptied": "TRUNCATE events_1_0",
    "a partition comes": "CREATE TABLE events_1_1 PARTITION OF events_1 DEFAULT",
    "a partition is about to go": (
        "UPDATE pg_inherits SET inhdetachpending = true WHERE inhrelid = 'events_0'::regclass"
    ),
    "a partition goes": "ALTER TABLE events DETACH PARTITION events_0",
    "a partition of a partition goes": "DROP TABLE events_1_0",
    "a table is made anew": (
        "DROP TABLE events; CREATE TABLE events (organization_id bigint NOT NULL REFERENCES"
        " organizations, id bigint NOT NULL, what text, PRIMARY KEY (organization_id, id))"
    ),
    "a column comes": "ALTER TABLE projects ADD COLUMN more int",
    "a column goes": "ALTER TABLE projects DROP COLUMN points",
    "a column has another name": "ALTER TABLE projects RENAME COLUMN points TO score",
    "two columns change names": (
        "ALTER TABLE projects ADD COLUMN a int, ADD COLUMN b int;",
        (
            "ALTER TABLE projects RENAME a TO c; ALTER TABLE projects RENAME b TO a;"
            "ALTER TABLE projects RENAME c TO b"
        ),
    ),
    "a column is wider": "ALTER TABLE projects ALTER slug TYPE varchar(80)",
    "a column may be NULL": "ALTER TABLE projects ALTER slug DROP NOT NULL",
    "a column must not be NULL": "ALTER TABLE events_0 ALTER what SET NOT NULL",
    "a constraint comes": "ALTER TABLE projects ADD CHECK (points > 0)",
    "a constraint goes": "ALTER TABLE projects DROP CONSTRAINT projects_organization_id_fkey",
    "a constraint is validated": (
        "ALTER TABLE projects ADD CONSTRAINT positive CHECK (points > 0) NOT VALID",
        "ALTER TABLE projects VALIDATE CONSTRAINT positive",
    ),
    "a unique index comes": "CREATE UNIQUE INDEX projects_points ON projects (points)",
    "a unique index goes": "DROP INDEX projects_slug",
    "a unique index is not valid any more": (
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'projects_slug'::regclass"
    ),
}

NO_CHANGES = {
    "rows are written": "INSERT INTO projects VALUES (2, 1, 'two', 2); DELETE FROM projects",
    "statistics are made": "ANALYZE",
    "an index that is not unique comes": "CREATE INDEX projects_points ON projects (points)",
    "another table changes": "ALTER TABLE unrelated ADD COLUMN more int; TRUNCATE unrelated",
    "what is done is undone": "BEGIN; TRUNCATE projects; ROLLBACK",
}


@pytest.fixture
def read(fresh_databases: Callable[[], FreshDatabases]) -> Iterator[Callable[[str | None], str]]:
    with psycopg.connect(fresh_databases().source, autocommit=True) as connection:
        connection.execute(SCHEMA)
        scope = Scope(discover(connection), "1")

        def change_and_read(statements: str | None) -> str:
            if statements is not None:
                connection.execute(statements)
            return layout.read(connection, scope)

        yield change_and_read


@postgres_versions
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_of_a_moved_table_is_seen(
    read: Callable[[str | None], str], change: str | tuple[str, str]
) -> None:
    before, change = change if isinstance(change, tuple) else (None, change)
    first = read(before)
    assert read(None) == first
    assert read(change) != first


@postgres_versions
@pytest.mark.parametrize("change", NO_CHANGES.values(), ids=NO_CHANGES.keys())
def test_what_a_key_log_sees_or_is_not_moved_changes_nothing(
    read: Callable[[str | None], str], change: str
) -> None:
    first = read(None)
    assert read(change) == first


@postgres_versions
def test_both_ways_to_plan_give_the_same(read: Callable[[str | None], str]) -> None:
    assert read(None) == read("SET plan_cache_mode = force_generic_plan")
