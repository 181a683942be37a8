"""The data map on real servers: products' difficult features, and what is refused."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from rich.console import Console

from cellferry.errors import InvalidInput, UnsupportedSchema
from cellferry.stores.postgres.data_map import (
    _probe,
    _with,
    discover,
    render_for_review,
    require_supported,
    show,
)
from cellferry.stores.postgres.data_map_file import DataMapFile, load, parse
from cellferry.stores.postgres.ownership import owned_by, owner_text
from cellferry.stores.postgres.schema import DataMap, Name, Placement
from fixtures.postgres import FreshDatabases, postgres_versions

SCHEMAS = Path(__file__).parent / "schemas"
PRODUCTS = sorted(path.stem for path in SCHEMAS.glob("*.sql"))

Connection = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture
def database(fresh_database: str) -> Iterator[Connection]:
    with psycopg.connect(fresh_database, autocommit=True) as connection:
        yield connection


def install(connection: Connection, product: str) -> DataMapFile:
    connection.execute((SCHEMAS / f"{product}.sql").read_text())
    connection.execute("SET search_path = pg_catalog")
    return load(SCHEMAS / f"{product}.yaml")


def owners(connection: Connection, data_map: DataMap, table: str) -> dict[str, str | None]:
    """Whose each row is, by the text of its key."""
    one = next(one for one in data_map.owned if str(one.name) == table)
    key = sql.SQL(", ").join(sql.Identifier("t", column) for column in one.primary_key)
    rows = connection.execute(
        sql.SQL("SELECT concat_ws(' ', {}), {} FROM {} AS t").format(
            key, owner_text(one, "t"), one.name.identifier
        )
    ).fetchall()
    return dict(rows)


def placements(data_map: DataMap, placement: Placement) -> set[str]:
    return {table.name.name for table in data_map.placed(placement)}


def reasons(connection: Connection, text: str = "") -> dict[str, str]:
    """What is refused, by table."""
    found = discover(connection, parse(text)).refusals
    return {one.table: f"{one.reason} REMEDY {one.remedy}" for one in found if one.fatal}


def notes(connection: Connection, text: str = "") -> dict[str, str]:
    found = discover(connection, parse(text)).refusals
    return {one.table: one.reason for one in found if not one.fatal}


# products


@pytest.mark.parametrize("product", PRODUCTS)
def test_the_products_schema_is_handled(database: Connection, product: str) -> None:
    file = install(database, product)
    require_supported(discover(database, file))


@pytest.mark.parametrize("product", PRODUCTS)
def test_every_row_is_owned_by_the_one_that_its_owner_says(
    database: Connection, product: str
) -> None:
    data_map = discover(database, install(database, product))
    organizations = [
        text
        for (text,) in database.execute(
            sql.SQL("SELECT {}::text FROM {}").format(
                sql.Identifier(data_map.organization_column),
                data_map.organization_table.identifier,
            )
        )
    ]
    for table in data_map.owned:
        for organization in organizations:
            wrong = database.execute(
                sql.SQL("SELECT count(*) FROM {} AS t WHERE ({}) IS DISTINCT FROM ({})").format(
                    table.name.identifier,
                    sql.SQL("coalesce({}, false)").format(
                        owned_by(data_map, table, "t", organization)
                    ),
                    sql.SQL("coalesce({} = {}, false)").format(
                        owner_text(table, "t"), sql.Literal(organization)
                    ),
                )
            ).fetchone()
            assert wrong == (0,), table.name


@pytest.mark.parametrize("product", PRODUCTS)
def test_the_map_written_for_review_gives_the_same_map(database: Connection, product: str) -> None:
    data_map = discover(database, install(database, product))
    again = discover(database, parse(render_for_review(data_map)))
    assert again.tables == data_map.tables
    assert again.foreign_keys == data_map.foreign_keys
    assert again.fingerprint == data_map.fingerprint


@pytest.mark.parametrize("product", PRODUCTS)
def test_parents_come_before_the_rows_they_own(database: Connection, product: str) -> None:
    data_map = discover(database, install(database, product))
    order = [table.name for table in data_map.tables]
    for table in data_map.owned:
        for path in table.owners:
            if path.hops:
                assert order.index(path.hops[0].parent) < order.index(table.name)


@postgres_versions
@pytest.mark.parametrize("product", PRODUCTS)
def test_two_cells_with_the_same_schema_have_the_same_fingerprint(
    fresh_databases: Callable[[], FreshDatabases], product: str
) -> None:
    databases = fresh_databases()
    found = []
    for url in (databases.source, databases.destination):
        with psycopg.connect(url, autocommit=True) as connection:
            found.append(discover(connection, install(connection, product)))
    assert found[0].fingerprint == found[1].fingerprint
    assert found[0].tables == found[1].tables


def test_forge_remarks_follow_their_polymorphic_subject(database: Connection) -> None:
    data_map = discover(database, install(database, "code_forge"))
    assert owners(database, data_map, "public.remarks") == {"1": "1", "2": "2", "3": "1", "4": "2"}


def test_forge_reactions_follow_the_polymorphic_remark(database: Connection) -> None:
    data_map = discover(database, install(database, "code_forge"))
    assert owners(database, data_map, "public.remark_reactions") == {
        "1 1 +1": "1",
        "2 1 +1": "2",
        "4 2 -1": "2",
    }


def test_forge_partitions_are_handled_at_their_root(database: Connection) -> None:
    data_map = discover(database, install(database, "code_forge"))
    activity = data_map.by_name[Name("public", "activity")]
    assert {one.name for one in activity.partitions} == {"activity_2025_0", "activity_2025_1"}
    assert not [table for table in data_map.tables if table.name.schema == "builds_parts"]
    assert owners(database, data_map, "public.jobs") == {"1 100": "1", "2 101": "2"}


def test_forge_activity_tries_each_nullable_path(database: Connection) -> None:
    data_map = discover(database, install(database, "code_forge"))
    assert owners(database, data_map, "public.activity") == {
        "1 2025-03-01": "1",
        "2 2025-03-01": "2",
        "3 2025-03-01": None,
    }


def test_forge_addresses_travel_with_the_shared_people(database: Connection) -> None:
    data_map = discover(database, install(database, "code_forge"))
    people = data_map.by_name[Name("public", "people")]
    assert [str(key.parent) for key in data_map.references(people)] == ["public.people_emails"]


def test_chat_is_found_through_undeclared_keys(database: Connection) -> None:
    data_map = discover(database, install(database, "team_chat"))
    assert owners(database, data_map, "public.inbox") == {
        f"{'a' * 26} {'m' * 26}": "1",
        f"{'b' * 26} {'n' * 26}": "2",
    }


def test_chat_a_unique_key_stands_in_for_a_primary_key(database: Connection) -> None:
    data_map = discover(database, install(database, "team_chat"))
    table = data_map.by_name[Name("public", "preferences")]
    assert table.primary_key == ("member_id", "category", "name")


def test_identity_server_reaches_three_steps(database: Connection) -> None:
    data_map = discover(database, install(database, "identity_server"))
    notes_table = data_map.by_name[Name("public", "SESSION_NOTE")]
    (path,) = notes_table.owners
    assert [str(hop.parent) for hop in path.hops] == ["public.USER_SESSION", "public.USER_ENTITY"]
    assert set(owners(database, data_map, "public.SESSION_NOTE").values()) == {"0b5c", "%s it's"}


def test_suite_rows_without_a_company_are_nobodys(database: Connection) -> None:
    data_map = discover(database, install(database, "business_suite"))
    assert owners(database, data_map, "public.partner") == {"1": "1", "2": "2", "3": None}


def test_suite_rows_never_belong_to_their_author(database: Connection) -> None:
    data_map = discover(database, install(database, "business_suite"))
    sale = data_map.by_name[Name("public", "sale")]
    assert [(path.hops, path.column) for path in sale.owners] == [((), "company_id")]


def test_suite_attachments_belong_to_what_they_hang_on(database: Connection) -> None:
    data_map = discover(database, install(database, "business_suite"))
    assert owners(database, data_map, "public.attachment") == {
        "1": "1",
        "2": "2",
        "3": "1",
        "4": "2",
    }


def test_tracker_takes_the_organization_from_a_composite_key(database: Connection) -> None:
    data_map = discover(database, install(database, "error_tracker"))
    table = data_map.by_name[Name("core", "release_project")]
    assert [(path.hops, path.column) for path in table.owners] == [((), "organization_id")]


def test_tracker_finds_its_organization_by_convention(database: Connection) -> None:
    data_map = discover(database, install(database, "error_tracker"))
    assert (str(data_map.organization_table), data_map.organization_type) == (
        "core.organization",
        "core.org_id",
    )


# keys of the organization

KEY_TYPES = {
    "bigint": "7",
    "uuid": "'6f1c0000-0000-0000-0000-000000000001'",
    "text": "'a''b %s {}'",
    "varchar(20)": "'acme'",
    "smallint": "3",
    "char(5)": "'ab'",
}


@pytest.mark.parametrize(("kind", "value"), KEY_TYPES.items(), ids=KEY_TYPES)
def test_the_organizations_key_may_be_of_any_type(
    database: Connection, kind: str, value: str
) -> None:
    database.execute(
        f"CREATE TABLE organizations (id {kind} PRIMARY KEY);"
        f"CREATE TABLE things (id int PRIMARY KEY, org {kind} NOT NULL REFERENCES organizations);"
        f"INSERT INTO organizations VALUES ({value}); INSERT INTO things VALUES (1, {value});"
    )
    data_map = discover(database)
    require_supported(data_map)
    (organization,) = owners(database, data_map, "public.organizations").values()
    things = data_map.by_name[Name("public", "things")]
    assert database.execute(
        sql.SQL("SELECT id FROM things AS t WHERE {}").format(
            owned_by(data_map, things, "t", organization)
        )
    ).fetchall() == [(1,)]


@pytest.mark.parametrize("kind", ["citext", "numeric", "double precision", "timestamptz"])
def test_a_key_that_can_be_written_in_two_ways_is_refused(database: Connection, kind: str) -> None:
    database.execute("CREATE EXTENSION IF NOT EXISTS citext")
    database.execute(f"CREATE TABLE organizations (id {kind} PRIMARY KEY)")
    assert "different ways" in reasons(database)["public.organizations"]


def test_another_unique_column_can_be_the_organizations_key(database: Connection) -> None:
    database.execute(
        "CREATE TABLE organizations (id int PRIMARY KEY, public_id uuid NOT NULL UNIQUE);"
        "CREATE TABLE things (id int PRIMARY KEY, org int NOT NULL REFERENCES organizations);"
        "INSERT INTO organizations VALUES (1, '6f1c0000-0000-0000-0000-000000000001');"
        "INSERT INTO things VALUES (5, 1)"
    )
    data_map = discover(database, organization_column="public_id")
    assert owners(database, data_map, "public.things") == {
        "5": "6f1c0000-0000-0000-0000-000000000001"
    }


def test_no_table_of_organizations_names_candidates(database: Connection) -> None:
    database.execute(
        "CREATE TABLE tenants (id int PRIMARY KEY);"
        "CREATE TABLE things (id int PRIMARY KEY, t int REFERENCES tenants)"
    )
    with pytest.raises(UnsupportedSchema, match=r"candidates: public\.tenants"):
        discover(database)


def test_two_tables_of_organizations_are_ambiguous(database: Connection) -> None:
    database.execute(
        "CREATE SCHEMA b; CREATE TABLE organizations (id int PRIMARY KEY);"
        "CREATE TABLE b.organizations (id int PRIMARY KEY)"
    )
    with pytest.raises(UnsupportedSchema, match="several tables"):
        discover(database)


def test_a_column_that_identifies_nothing_is_no_key(database: Connection) -> None:
    database.execute("CREATE TABLE organizations (id int PRIMARY KEY, name text NOT NULL)")
    with pytest.raises(UnsupportedSchema, match="does not identify"):
        discover(database, organization_column="name")


# what is refused, with its remedy

ORGANIZATIONS = "CREATE TABLE organizations (id int PRIMARY KEY);"
THINGS = f"""{ORGANIZATIONS}
CREATE TABLE things (id int PRIMARY KEY, org int NOT NULL REFERENCES organizations);"""
FUNCTION = "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"

REFUSED = {
    "no primary key": (
        f"{ORGANIZATIONS} CREATE TABLE things (org int NOT NULL REFERENCES organizations)",
        "no primary key",
    ),
    "a unique key with NULL": (
        (
            f"{ORGANIZATIONS} CREATE TABLE things (org int NOT NULL REFERENCES organizations,"
            " n int UNIQUE)"
        ),
        "no primary key",
    ),
    "a partial unique key": (
        (
            f"{ORGANIZATIONS} CREATE TABLE things (org int NOT NULL REFERENCES organizations,"
            " n int NOT NULL); CREATE UNIQUE INDEX ON things (n) WHERE n > 0"
        ),
        "no primary key",
    ),
    "a deferrable primary key": (
        (
            f"{ORGANIZATIONS} CREATE TABLE things (org int NOT NULL REFERENCES organizations,"
            " n int PRIMARY KEY DEFERRABLE)"
        ),
        "DEFERRABLE",
    ),
    "a large object": (f"{THINGS} ALTER TABLE things ADD picture oid", "plain_numbers"),
    "a large object behind a domain": (
        f"{THINGS} CREATE DOMAIN lo AS oid; ALTER TABLE things ADD picture lo",
        "large objects",
    ),
    "a name of this database": (f"{THINGS} ALTER TABLE things ADD c regclass", "regclass"),
    "a parent by inheritance": (
        f"{THINGS} CREATE TABLE special () INHERITS (things)",
        "inherited by public.special",
    ),
    "a child by inheritance": (
        (
            f"{ORGANIZATIONS} CREATE TABLE base (id int);"
            " CREATE TABLE things (PRIMARY KEY (id), org int NOT NULL REFERENCES organizations)"
            " INHERITS (base)"
        ),
        "inherits from public.base",
    ),
    "a trigger that always fires": (
        (
            f"{THINGS} {FUNCTION}"
            "CREATE TRIGGER audit AFTER INSERT ON things EXECUTE FUNCTION f();"
            "ALTER TABLE things ENABLE ALWAYS TRIGGER audit"
        ),
        "trigger audit is ENABLE ALWAYS",
    ),
    "a trigger for replicas": (
        (
            f"{THINGS} {FUNCTION}"
            "CREATE TRIGGER audit AFTER INSERT ON things EXECUTE FUNCTION f();"
            "ALTER TABLE things ENABLE REPLICA TRIGGER audit"
        ),
        "trigger audit is ENABLE REPLICA",
    ),
    "a rule that always fires": (
        (
            f"{THINGS} CREATE RULE keep AS ON DELETE TO things DO INSTEAD NOTHING;"
            "ALTER TABLE things ENABLE ALWAYS RULE keep"
        ),
        "rule keep is ENABLE ALWAYS",
    ),
    "a table of nobody": (f"{ORGANIZATIONS} CREATE TABLE things (id int PRIMARY KEY)", "place it"),
    "a key column without a constraint": (
        f"{ORGANIZATIONS} CREATE TABLE things (id int PRIMARY KEY, organization_id int)",
        "list organization_id in organization.key_columns",
    ),
    "two organizations": (
        f"{THINGS} ALTER TABLE things ADD giver int NOT NULL REFERENCES organizations",
        "several columns refer to an organization",
    ),
    "a key into an ignored schema": (
        (
            f"{THINGS} CREATE SCHEMA cellferry; CREATE TABLE cellferry.x (id int PRIMARY KEY);"
            "ALTER TABLE things ADD x int REFERENCES cellferry.x"
        ),
        "ignored schema",
    ),
}


@pytest.mark.parametrize(("schema", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_move_is_refused(database: Connection, schema: str, expected: str) -> None:
    database.execute(schema)
    assert expected in reasons(database)["public.things"]


def test_a_foreign_table_is_refused_unless_it_is_placed(database: Connection) -> None:
    database.execute(
        f"{ORGANIZATIONS} CREATE EXTENSION file_fdw; CREATE SERVER s FOREIGN DATA WRAPPER file_fdw;"
        "CREATE FOREIGN TABLE things (id int) SERVER s OPTIONS (filename '/dev/null')"
    )
    assert "foreign table" in reasons(database)["public.things"]
    assert not reasons(database, "placement: {cell-local: ['public.thing?']}")


def test_a_refusal_names_table_reason_and_remedy(database: Connection) -> None:
    database.execute(f"{ORGANIZATIONS} CREATE TABLE things (id int PRIMARY KEY)")
    with pytest.raises(UnsupportedSchema, match=r"public\.things: no key column.*place it as"):
        require_supported(discover(database))


def test_a_key_of_another_type_is_refused_with_the_servers_reason(database: Connection) -> None:
    database.execute(
        f"{ORGANIZATIONS} CREATE TABLE things (id int PRIMARY KEY, on_id text NOT NULL)"
    )
    found = reasons(
        database, "foreign_keys: [{table: things, columns: [on_id], references: organizations}]"
    )
    assert "operator does not exist" in found["public.things"]


def test_a_condition_that_is_not_sql_is_refused(database: Connection) -> None:
    database.execute(THINGS)
    found = reasons(
        database, "tables: {things: {owners: [{column: org, when: '{row}.colour = 1'}]}}"
    )
    assert "colour" in found["public.things"]


# what is handled or noted


def test_an_oid_column_may_be_a_plain_number(database: Connection) -> None:
    database.execute(f"{THINGS} ALTER TABLE things ADD backend oid")
    assert not reasons(database, "tables: {things: {plain_numbers: [backend]}}")


NOTED = {
    "unlogged": ("ALTER TABLE things SET UNLOGGED", "unlogged"),
    "row-level security": ("ALTER TABLE things ENABLE ROW LEVEL SECURITY", "row-level security"),
    "a deferrable unique key": (
        "ALTER TABLE things ADD n int, ADD UNIQUE (n) DEFERRABLE",
        "DEFERRABLE",
    ),
    "an exclusion constraint": (
        "ALTER TABLE things ADD during int4range, ADD EXCLUDE USING gist (during WITH &&)",
        "exclusion constraint",
    ),
    "a nullable owner": ("ALTER TABLE things ALTER org DROP NOT NULL", "org is nullable"),
}


@pytest.mark.parametrize(("change", "expected"), NOTED.values(), ids=NOTED.keys())
def test_what_a_reviewer_should_know_is_noted(
    database: Connection, change: str, expected: str
) -> None:
    database.execute(f"{THINGS} {change}")
    assert not reasons(database)
    assert expected in notes(database)["public.things"]


def test_a_large_table_without_an_index_on_its_owner_is_noted(database: Connection) -> None:
    database.execute(
        f"{THINGS} INSERT INTO organizations VALUES (1);"
        "INSERT INTO things SELECT n, 1 FROM generate_series(1, 20000) n; ANALYZE"
    )
    assert "no index begins with org" in notes(database)["public.things"]
    database.execute("CREATE INDEX ON things (org)")
    assert "public.things" not in notes(database)


def test_a_large_table_without_an_index_on_shared_rows_is_noted(database: Connection) -> None:
    database.execute(
        "CREATE TABLE users (id int PRIMARY KEY); INSERT INTO users VALUES (1);"
        f"{THINGS} CREATE INDEX ON things (org);"
        "ALTER TABLE things ADD author int REFERENCES users;"
        "INSERT INTO organizations VALUES (1);"
        "INSERT INTO things SELECT n, 1, 1 FROM generate_series(1, 20000) n; ANALYZE"
    )
    assert "no index begins with author" in notes(database)["public.things"]
    assert "public.users" in notes(database)["public.things"]
    database.execute("CREATE INDEX ON things (author)")
    assert "public.things" not in notes(database)


def test_a_materialized_view_is_noted(database: Connection) -> None:
    database.execute(f"{THINGS} CREATE MATERIALIZED VIEW sizes AS SELECT count(*) FROM things")
    assert "materialized" in notes(database)["public.sizes"]
    assert discover(database).materialized_views == (Name("public", "sizes"),)


def test_views_and_temporary_tables_are_ignored(database: Connection) -> None:
    database.execute(
        f"{THINGS} CREATE VIEW seen AS SELECT 1; CREATE TEMPORARY TABLE t (id int PRIMARY KEY)"
    )
    data_map = discover(database)
    assert {table.name.name for table in data_map.tables} == {"organizations", "things"}
    assert not data_map.refusals


def test_tables_of_extensions_are_ignored(database: Connection) -> None:
    database.execute(f"{THINGS} CREATE TABLE lookup (id int PRIMARY KEY)")
    database.execute("CREATE EXTENSION citext")
    database.execute("ALTER EXTENSION citext ADD TABLE lookup")
    assert not reasons(database)


def test_ignored_schemas_are_left_out(database: Connection) -> None:
    database.execute(f"{THINGS} CREATE SCHEMA audit; CREATE TABLE audit.log (id int)")
    assert "audit.log" in reasons(database)
    assert not reasons(database, "ignore_schemas: [audit]")


def test_unplaced_tables_can_have_a_default(database: Connection) -> None:
    database.execute(f"{THINGS} CREATE TABLE countries (id int)")
    data_map = discover(database, parse("unplaced: global"))
    assert placements(data_map, Placement.GLOBAL) == {"countries"}


def test_generated_columns_do_not_travel(database: Connection) -> None:
    database.execute(
        f"{THINGS} ALTER TABLE things ADD a int, ADD b int GENERATED ALWAYS AS (a + 1) STORED"
    )
    table = discover(database).by_name[Name("public", "things")]
    assert [column.name for column in table.copied_columns] == ["id", "org", "a"]


def test_virtual_generated_columns_do_not_travel(database: Connection) -> None:
    if database.info.server_version < 180_000:
        pytest.skip("virtual generated columns are new in PostgreSQL 18")
    database.execute(
        f"{THINGS} ALTER TABLE things ADD a int, ADD b int GENERATED ALWAYS AS (a + 1) VIRTUAL"
    )
    table = discover(database).by_name[Name("public", "things")]
    assert [column.name for column in table.copied_columns] == ["id", "org", "a"]


def test_a_generated_column_can_be_the_key(database: Connection) -> None:
    database.execute(
        f"{ORGANIZATIONS} CREATE TABLE things (org int NOT NULL REFERENCES organizations,"
        " n int GENERATED ALWAYS AS (org * 2) STORED PRIMARY KEY)"
    )
    data_map = discover(database)
    require_supported(data_map)
    assert data_map.by_name[Name("public", "things")].primary_key == ("n",)


def test_sequences_of_all_kinds_are_found(database: Connection) -> None:
    database.execute(
        f"{ORGANIZATIONS} CREATE SEQUENCE shared MINVALUE 100 MAXVALUE 200 START 100;"
        "CREATE TABLE things (id bigserial PRIMARY KEY,"
        " n int GENERATED ALWAYS AS IDENTITY (INCREMENT 5),"
        " m bigint DEFAULT nextval('shared'),"
        " org int NOT NULL REFERENCES organizations);"
        "SELECT nextval('shared')"
    )
    found = {
        (one.name.name, one.column): (one.minimum, one.maximum, one.increment)
        for one in discover(database).sequences
    }
    assert found == {
        ("things_id_seq", "id"): (1, 2**63 - 1, 1),
        ("things_n_seq", "n"): (1, 2**31 - 1, 5),
        ("shared", "m"): (100, 200, 1),
    }


def test_what_owned_rows_refer_to_is_referenced(database: Connection) -> None:
    database.execute(
        f"{THINGS} CREATE TABLE countries (id int PRIMARY KEY);"
        "CREATE TABLE users (id int PRIMARY KEY, country int REFERENCES countries);"
        "ALTER TABLE things ADD maker int REFERENCES users"
    )
    assert placements(discover(database), Placement.REFERENCED) == {"countries", "users"}


def test_a_placement_stops_ownership_from_passing(database: Connection) -> None:
    database.execute(
        f"{ORGANIZATIONS} CREATE TABLE users (id int PRIMARY KEY,"
        " home int REFERENCES organizations);"
        "CREATE TABLE notes (id int PRIMARY KEY, org int NOT NULL REFERENCES organizations,"
        " author int NOT NULL REFERENCES users)"
    )
    assert placements(discover(database), Placement.OWNED) == {"organizations", "users", "notes"}
    data_map = discover(database, parse("placement: {referenced: [users]}"))
    assert placements(data_map, Placement.OWNED) == {"organizations", "notes"}


def test_the_fingerprint_changes_with_a_definition(database: Connection) -> None:
    database.execute(THINGS)
    before = discover(database).fingerprint
    database.execute("ALTER TABLE things ADD CHECK (id > 0)")
    assert discover(database).fingerprint != before


def test_the_fingerprint_is_not_changed_by_data(database: Connection) -> None:
    database.execute(THINGS)
    before = discover(database).fingerprint
    database.execute("INSERT INTO organizations VALUES (1); INSERT INTO things VALUES (1, 1)")
    database.execute("ANALYZE")
    assert discover(database).fingerprint == before


def test_discovery_needs_no_privilege_on_the_tables(database: Connection) -> None:
    database.execute(THINGS)
    expected = discover(database)
    database.execute("BEGIN; CREATE ROLE test_nobody; SET LOCAL ROLE test_nobody")
    try:
        assert discover(database).tables == expected.tables
    finally:
        database.execute("ROLLBACK")


def test_the_map_can_be_shown(database: Connection) -> None:
    data_map = discover(database, install(database, "code_forge"))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(show(data_map))
    text = console.export_text()
    assert "subject_id → public.tickets" in text
    assert "materialized view" in text


# mistakes in the file, against a real catalog

WRONG = {
    "unknown table": ("tables: {thingz: {}}", r"tables\.thingz: .*did you mean.*things"),
    "unknown column": (
        "tables: {things: {owners: [{column: orgg}]}}",
        r"owners\[0\]\.column: public\.things has no column 'orgg'; did you mean org\?",
    ),
    "unknown parent": (
        "tables: {things: {owners: [{through: nowhere}]}}",
        r"owners\[0\]\.through: there is no table",
    ),
    "a glob for nothing": ("placement: {global: ['audit.*']}", "matches no table"),
    "two placements": (
        "placement: {global: [users], cell-local: [users]}",
        "is placed as global too",
    ),
    "owned and placed": (
        "{placement: {global: [things]}, tables: {things: {owners: [{column: org}]}}}",
        "is placed as global too",
    ),
    "no foreign key leads there": (
        "tables: {things: {owners: [{through: users}]}}",
        "0 foreign keys lead from",
    ),
    "a dead end": (
        "tables: {things: {owners: [{through: users, columns: [org]}]}}",
        "no path leads",
    ),
    "a tree": (
        "tables: {things: {owners: [{column: org}, {through: things, columns: [id]}]}}",
        "through rows of their own table",
    ),
    "no such key column": ("organization: {key_columns: [tenant]}", "no table has a column"),
    "a key that is none": ("tables: {things: {key: [org]}}", "identifies every row"),
    "columns that do not match": (
        "foreign_keys: [{table: things, columns: [id, org], references: users}]",
        "2 columns refer to 1",
    ),
    "the organization placed": ("placement: {global: [organizations]}", "always owned"),
    "a view": ("tables: {seen: {}}", "is a view"),
    "a table in two schemas": ("tables: {twice: {}}", "several schemas"),
    "a table twice": ("tables: {things: {}, public.things: {}}", "named twice"),
}


@pytest.mark.parametrize(("text", "expected"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_name_in_the_file_is_an_error(
    database: Connection, text: str, expected: str
) -> None:
    database.execute(
        f"{THINGS} CREATE TABLE users (id int PRIMARY KEY); CREATE VIEW seen AS SELECT 1;"
        "CREATE SCHEMA other; CREATE TABLE twice (id int); CREATE TABLE other.twice (id int)"
    )
    with pytest.raises(InvalidInput, match=expected):
        discover(database, parse(text, source="app.yaml"))


def test_a_server_that_ends_the_session_is_not_taken_for_a_wrong_path(
    database: Connection, fresh_database: str
) -> None:
    data_map = discover(database, install(database, PRODUCTS[0]))
    with psycopg.connect(fresh_database, autocommit=True) as dying:
        database.execute("SELECT pg_terminate_backend(%s, 5000)", (dying.info.backend_pid,))
        with pytest.raises(psycopg.OperationalError):
            _probe(dying, _with(data_map, fingerprint="not asked about before"))
        assert _probe(dying, data_map) == [], "what was found right is not asked again"
