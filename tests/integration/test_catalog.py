"""A catalog is read again when anything of it has changed, and only then."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import psutil
import psycopg
import pytest

from cellferry.local.postgres_binaries import available
from cellferry.stores.postgres import catalog as module
from cellferry.stores.postgres.catalog import Catalog, read_catalog
from cellferry.stores.postgres.data_map import discover
from cellferry.stores.postgres.data_map_file import parse
from fixtures.postgres import FreshDatabases, MakeServer, postgres_versions

Connection = psycopg.Connection[tuple[Any, ...]]

SCHEMA = """
CREATE SCHEMA cellferry;
CREATE TYPE cellferry."@8" AS ();
CREATE SCHEMA more;
CREATE SCHEMA extensions;
CREATE EXTENSION citext SCHEMA extensions;
CREATE TYPE mood AS ENUM ('sad', 'glad');
CREATE TYPE place AS (street text, town text);
CREATE TYPE span AS RANGE (subtype = numeric);
CREATE DOMAIN score AS int CHECK (VALUE > 0);
CREATE SEQUENCE numbers;
CREATE SEQUENCE spare OWNED BY NONE;
CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE FUNCTION plain(text) RETURNS text IMMUTABLE LANGUAGE sql AS 'SELECT lower($1)';
CREATE TEXT SEARCH CONFIGURATION words (COPY = pg_catalog.simple);
CREATE TABLE organizations (id bigint PRIMARY KEY, name text);
CREATE TABLE projects (
    id bigserial PRIMARY KEY,
    organization_id bigint NOT NULL REFERENCES organizations,
    number bigint DEFAULT nextval('numbers'),
    slug varchar(40) DEFAULT 'none',
    points score,
    now mood,
    home place,
    period span,
    search tsvector GENERATED ALWAYS AS (to_tsvector('words', 'x')) STORED,
    CHECK (points < 1000)
);
CREATE UNIQUE INDEX projects_slug ON projects (plain(slug)) WHERE points > 5;
CREATE INDEX projects_number ON projects (number);
CREATE TRIGGER touched BEFORE UPDATE ON projects FOR EACH ROW EXECUTE FUNCTION touch();
CREATE RULE nothing AS ON DELETE TO projects WHERE OLD.id < 0 DO INSTEAD NOTHING;
CREATE TABLE rooms (id int PRIMARY KEY, during span, EXCLUDE USING gist (during WITH &&));
CREATE TABLE events (organization_id bigint, id bigint, PRIMARY KEY (organization_id, id))
    PARTITION BY RANGE (organization_id);
CREATE TABLE events_0 PARTITION OF events FOR VALUES FROM (0) TO (10);
CREATE TABLE events_1 (organization_id bigint NOT NULL, id bigint NOT NULL);
CREATE TABLE parents (id int);
CREATE TABLE children (id int, own int) INHERITS (parents);
CREATE VIEW names AS SELECT name FROM organizations;
INSERT INTO organizations SELECT n, 'o' FROM generate_series(1, 500) AS n;
ANALYZE organizations;
"""

CHANGES = {
    "a table comes": "CREATE TABLE further (id int)",
    "a table goes": "DROP TABLE rooms",
    "a table has another name": "ALTER TABLE rooms RENAME TO halls",
    "a table is in another schema": "ALTER TABLE rooms SET SCHEMA more",
    "a table is unlogged": "ALTER TABLE rooms SET UNLOGGED",
    "a table has row security": "ALTER TABLE rooms ENABLE ROW LEVEL SECURITY",
    "a table is an extension's": "ALTER EXTENSION citext ADD TABLE rooms",
    "a table has more rows, says ANALYZE": "DELETE FROM organizations; ANALYZE organizations",
    "a schema has another name": (
        "CREATE TABLE more.further ()",
        "ALTER SCHEMA more RENAME TO other",
    ),
    "the schema public has another name": "ALTER SCHEMA public RENAME TO private",
    "a partition comes": (
        "ALTER TABLE events ATTACH PARTITION events_1 FOR VALUES FROM (10) TO (20)"
    ),
    "a partition goes": "ALTER TABLE events DETACH PARTITION events_0",
    "a child goes": "ALTER TABLE children NO INHERIT parents",
    "a column comes": "ALTER TABLE rooms ADD COLUMN more int",
    "a column goes": "ALTER TABLE projects DROP COLUMN home",
    "a column has another name": "ALTER TABLE projects RENAME COLUMN slug TO path",
    "a column has another type": "ALTER TABLE projects ALTER slug TYPE varchar(50)",
    "a column has another collation": 'ALTER TABLE projects ALTER slug TYPE text COLLATE "C"',
    "a column must not be NULL": "ALTER TABLE projects ALTER slug SET NOT NULL",
    "a column has another default": "ALTER TABLE projects ALTER slug SET DEFAULT 'some'",
    "a column is an identity": ("ALTER TABLE events_1 ALTER id ADD GENERATED ALWAYS AS IDENTITY"),
    "a constraint comes": "ALTER TABLE projects ADD CHECK (points > 7)",
    "a constraint has another name": (
        "ALTER TABLE projects RENAME CONSTRAINT projects_points_check TO low"
    ),
    "a constraint goes": "ALTER TABLE projects DROP CONSTRAINT projects_organization_id_fkey",
    "a constraint may wait": (
        "ALTER TABLE projects ALTER CONSTRAINT projects_organization_id_fkey DEFERRABLE"
    ),
    "an index comes": "CREATE UNIQUE INDEX further ON organizations (name, id)",
    "an index goes": "DROP INDEX projects_number",
    "an index is not valid any more": (
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'projects_slug'::regclass"
    ),
    "an index's function has another name": "ALTER FUNCTION plain(text) RENAME TO simple",
    "an index has another name": "ALTER INDEX projects_slug RENAME TO slugs",
    "a trigger comes": (
        "CREATE TRIGGER again AFTER INSERT ON projects FOR EACH ROW EXECUTE FUNCTION touch()"
    ),
    "a trigger is off": "ALTER TABLE projects DISABLE TRIGGER touched",
    "a trigger goes": "DROP TRIGGER touched ON projects",
    "a trigger's function has another name": "ALTER FUNCTION touch() RENAME TO tap",
    "a rule goes": "DROP RULE nothing ON projects",
    "a rule is off": "ALTER TABLE projects DISABLE RULE nothing",
    "a type has another name": "ALTER TYPE mood RENAME TO feeling",
    "a type is in another schema": "ALTER TYPE mood SET SCHEMA more",
    "an enum has one more value": "ALTER TYPE mood ADD VALUE 'mad' BEFORE 'sad'",
    "an enum's value has another name": "ALTER TYPE mood RENAME VALUE 'sad' TO 'blue'",
    "a composite type has one more part": "ALTER TYPE place ADD ATTRIBUTE country text",
    "a range comes": "CREATE TYPE further AS RANGE (subtype = int)",
    "a domain has one more constraint": "ALTER DOMAIN score ADD CHECK (VALUE < 500)",
    "a domain must not be NULL": "ALTER DOMAIN score SET NOT NULL",
    "a sequence has another range": "ALTER SEQUENCE numbers MAXVALUE 1000",
    "a sequence has another name": "ALTER SEQUENCE numbers RENAME TO digits",
    "a sequence is a column's": "ALTER SEQUENCE spare OWNED BY projects.points",
    "a sequence is a column's no more": "ALTER SEQUENCE projects_id_seq OWNED BY NONE; "
    "ALTER TABLE projects ALTER id DROP DEFAULT",
    "an extension comes": "CREATE EXTENSION hstore",
    "an extension goes": "DROP EXTENSION citext",
    "an extension is in another schema": "ALTER EXTENSION citext SET SCHEMA more",
    "an operator is in another schema": (
        (
            "CREATE OPERATOR more.=== (LEFTARG = int, RIGHTARG = int, FUNCTION = int4eq,"
            " COMMUTATOR = OPERATOR(more.===));"
            "CREATE OPERATOR CLASS more.same FOR TYPE int USING hash AS OPERATOR 1 more.===,"
            " FUNCTION 1 hashint4(int);"
            "ALTER TABLE rooms ADD EXCLUDE USING hash (id more.same WITH OPERATOR(more.===))"
        ),
        "ALTER OPERATOR more.=== (int, int) SET SCHEMA public",
    ),
    "an operator class has another name": (
        (
            "CREATE OPERATOR CLASS more.same FOR TYPE int USING hash AS OPERATOR 1 =,"
            " FUNCTION 1 hashint4(int);"
            "ALTER TABLE rooms ADD EXCLUDE USING hash (id more.same WITH =)"
        ),
        "ALTER OPERATOR CLASS more.same USING hash RENAME TO alike",
    ),
    "a collation has another name": (
        'CREATE COLLATION plain FROM "C"; ALTER TABLE projects ALTER slug TYPE text COLLATE plain',
        "ALTER COLLATION plain RENAME TO simple",
    ),
    "a text search configuration has another name": (
        "ALTER TEXT SEARCH CONFIGURATION words RENAME TO terms"
    ),
    "a text search dictionary has another name": (
        (
            "CREATE TEXT SEARCH DICTIONARY plain (TEMPLATE = simple);"
            "ALTER TABLE rooms ADD CHECK (ts_lexize('public.plain'::regdictionary, 'x') IS NULL)"
        ),
        "ALTER TEXT SEARCH DICTIONARY plain RENAME TO bare",
    ),
    "texts are printed otherwise": (
        r"ALTER TABLE organizations ADD CHECK (name ~ '^\w+$')",
        "SET standard_conforming_strings = off",
    ),
    "moments are printed otherwise": (
        "ALTER TABLE projects ADD COLUMN since timestamptz DEFAULT '2020-01-01 12:00+00'",
        "SET TimeZone = 'Asia/Tokyo'",
    ),
}

NO_CHANGES = {
    "rows are written": "INSERT INTO projects (organization_id) VALUES (1); TABLE projects",
    "a sequence goes on": "SELECT nextval('numbers')",
    "a temporary table comes and goes": (
        "BEGIN; CREATE TEMP TABLE room (id serial PRIMARY KEY, note text) ON COMMIT DROP; COMMIT"
    ),
    "a gate comes": 'CREATE TYPE cellferry."@7" AS ()',
    "a gate goes": 'DROP TYPE cellferry."@8"',
    "what is done is undone": "BEGIN; ALTER TABLE rooms ADD COLUMN more int; ROLLBACK",
}


@pytest.fixture
def database(fresh_databases: Callable[[], FreshDatabases]) -> Iterator[Connection]:
    with psycopg.connect(fresh_databases().source, autocommit=True) as connection:
        connection.execute(SCHEMA)
        yield connection


def read_anew(connection: Connection) -> Catalog:
    module._LAST.clear()
    return read_catalog(connection)


@postgres_versions
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_is_seen(database: Connection, change: str | tuple[str, str]) -> None:
    before, change = change if isinstance(change, tuple) else ("SELECT 1", change)
    database.execute(before)
    known = read_anew(database)
    assert read_catalog(database) is known

    database.execute(change)
    now = read_catalog(database)
    assert asdict(now) != asdict(known), "this changes nothing that a catalog holds"
    assert asdict(now) == asdict(read_anew(database))


@postgres_versions
@pytest.mark.parametrize("change", NO_CHANGES.values(), ids=NO_CHANGES.keys())
def test_what_changes_no_definition_costs_no_reading(database: Connection, change: str) -> None:
    known = read_anew(database)
    database.execute(change)
    assert read_catalog(database) is known


def test_what_is_not_committed_is_seen_where_it_is_done_alone(
    database: Connection,
) -> None:
    known = read_anew(database)
    with psycopg.connect(database.info.dsn, password=database.info.password) as other:
        other.execute("ALTER TABLE rooms ADD COLUMN more int")
        assert columns(read_catalog(other)) == ["id", "during", "more"]
        other.execute("ALTER TABLE rooms ADD COLUMN again int")
        assert columns(read_catalog(other)) == ["id", "during", "more", "again"]
        other.rollback()
    assert asdict(read_catalog(database)) == asdict(known)


def columns(found: Catalog) -> list[str]:
    (rooms,) = (one for one in found.relations if one.name.name == "rooms")
    return [column.name for column in rooms.columns]


def test_what_changes_while_a_catalog_is_read_is_seen_the_next_time(
    database: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    module._LAST.clear()
    read = module._read

    def changing(*arguments: Any) -> Catalog:
        found = read(*arguments)
        with psycopg.connect(database.info.dsn, password=database.info.password) as other:
            other.execute("ALTER TABLE rooms ADD COLUMN more int")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(module, "_read", changing)
        assert columns(read_catalog(database)) == ["id", "during"]
    assert columns(read_catalog(database)) == ["id", "during", "more"]


def test_databases_and_ignored_schemas_are_told_apart(
    fresh_databases: Callable[[], FreshDatabases],
) -> None:
    with (
        psycopg.connect(fresh_databases().source, autocommit=True) as one,
        psycopg.connect(fresh_databases().source, autocommit=True) as other,
    ):
        one.execute(SCHEMA)
        known = read_anew(one)
        assert read_catalog(other) is not known
        assert not read_catalog(other).relations
        assert not read_catalog(one, ignore_schemas=["public"]).relations
        assert read_catalog(one) is known


def test_a_database_that_was_made_anew_is_asked_anew(fresh_database: str) -> None:
    with psycopg.connect(fresh_database, autocommit=True) as connection:
        name = connection.info.dbname
        administration = connection.info.dsn, connection.info.password
        known = read_anew(connection)
    with psycopg.connect(
        administration[0], password=administration[1], dbname="postgres", autocommit=True
    ) as other:
        other.execute(f"DROP DATABASE {name}")
        other.execute(f"CREATE DATABASE {name}")
    with psycopg.connect(fresh_database, autocommit=True) as connection:
        assert read_catalog(connection) is not known


@pytest.mark.parametrize("version", available())
@pytest.mark.parametrize("crash", [False, True], ids=["stopped", "a session was killed"])
def test_a_server_that_was_started_again_is_asked_anew(
    own_postgres: MakeServer, crash: bool, version: int
) -> None:
    server = own_postgres(bin_dir=available()[version])
    url = server.url()
    with psycopg.connect(server.url(), autocommit=True) as connection:
        known = read_anew(connection)
        assert read_catalog(connection) is known
        pid = connection.info.backend_pid
        if crash:
            # The postmaster lives on; what was not durable is gone all the same.
            os.kill(pid, signal.SIGKILL)
            while psutil.pid_exists(pid):
                time.sleep(0.05)
    if not crash:
        server.stop()
        server.start()
    assert server.url() == url
    with connect_in_the_end(url) as connection:
        assert read_catalog(connection) is not known


def connect_in_the_end(url: str) -> Connection:
    deadline = time.monotonic() + 60
    while True:
        try:
            return psycopg.connect(url, autocommit=True)
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def test_the_state_is_of_every_catalog_that_is_read() -> None:
    queries = module.queries("catalog.sql")
    of_tables = {
        name: set(re.findall(r"\b(?:FROM|JOIN) (pg_[a-z_]+)", text))
        for name, text in queries.items()
    }
    state = of_tables.pop("state")
    assert set().union(*of_tables.values()) <= state


def test_a_map_is_built_once_of_a_catalog_and_a_file(database: Connection) -> None:
    module._LAST.clear()
    file = "organization: {table: public.organizations}\nunplaced: cell-local\n"
    first = discover(database, parse(file))
    assert discover(database, parse(file)) is first
    other = discover(database, parse(file + "placement: {global: [projects]}\n"))
    assert other.by_name != first.by_name
    database.execute("ALTER TABLE projects ADD COLUMN more int")
    assert discover(database, parse(file)).fingerprint != first.fingerprint
