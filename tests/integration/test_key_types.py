"""Organizations and rows with keys of any type, sent in either of PostgreSQL's two forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from cellferry.model import Limits, Organization, Side
from cellferry.stores.postgres import copier, store
from cellferry.stores.postgres.wire import wires
from fixtures.ferry import make_ferry
from fixtures.postgres import FreshDatabases, postgres_versions

SCHEMA = """
CREATE SCHEMA "Other Schema";
CREATE TYPE "Other Schema"."Mood" AS ENUM ('glad, "very"', 'sad');
CREATE TABLE organizations (id {type} PRIMARY KEY, name text);
CREATE TABLE "Other Schema"."Things" (
    organization_id {type} NOT NULL REFERENCES organizations,
    at timestamptz NOT NULL,
    day date NOT NULL,
    number numeric NOT NULL,
    token bytea NOT NULL,
    mood "Other Schema"."Mood" NOT NULL,
    label varchar(40) NOT NULL,
    code char(5) NOT NULL,
    what text,
    moods "Other Schema"."Mood"[],
    span int4range,
    PRIMARY KEY (organization_id, at, day, number, token, mood, label, code)
);
CREATE TABLE "Other Schema".parts (
    id uuid PRIMARY KEY,
    organization_id {type} NOT NULL REFERENCES organizations,
    at timestamptz NOT NULL,
    day date NOT NULL,
    number numeric NOT NULL,
    token bytea NOT NULL,
    mood "Other Schema"."Mood" NOT NULL,
    label varchar(40) NOT NULL,
    code char(5) NOT NULL,
    amount money,
    doc json,
    at_all interval
);
"""

ROWS = """
INSERT INTO organizations VALUES ({mine}, 'mine'), ({theirs}, 'theirs');
INSERT INTO "Other Schema"."Things"
    SELECT o.id, '2026-03-29 01:30:00+00'::timestamptz + g * '7 min'::interval, '2026-01-01',
           g / 4.0, decode(md5(g::text), 'hex'),
           (ARRAY['glad, "very"', 'sad'])[g % 2 + 1]::"Other Schema"."Mood",
           E'tab\\t, "quote" \\\\ ' || g, 'c' || g % 10, NULL,
           ARRAY['sad', 'glad, "very"']::"Other Schema"."Mood"[], int4range(g, g + 5)
    FROM organizations AS o, generate_series(1, 60) AS g;
INSERT INTO "Other Schema".parts
    SELECT gen_random_uuid(), organization_id, at, day, number, token, mood, label, code,
           1.25::float8::numeric::money, '{"a": 1}', '1 day 2 hours'
    FROM "Other Schema"."Things";
"""

CHANGES = """
SET TimeZone = 'Asia/Tokyo'; SET DateStyle = 'German'; SET bytea_output = 'escape';
UPDATE "Other Schema"."Things" SET label = label || '!', at = at + interval '1 day'
    WHERE organization_id = {mine} AND number < 5;
DELETE FROM "Other Schema"."Things" WHERE organization_id = {mine} AND number > 12;
UPDATE "Other Schema".parts SET id = gen_random_uuid(), amount = 7.5::numeric::money
    WHERE organization_id = {mine} AND number < 3;
"""

KEYS = {
    "uuid": ("5f6d1a3e-0000-4000-8000-000000000001", "5f6d1a3e-0000-4000-8000-000000000002"),
    "text": ('it\'s, {mine} \\ "x"', "theirs"),
    "integer": ("17", "18"),
    "varchar(20)": ("mine", "theirs"),
}


@pytest.fixture(params=["binary", "text"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How rows travel. Text is for types without a binary form, which few servers have."""
    if request.param == "text":
        monkeypatch.setattr(
            store,
            "wires",
            lambda connection, tables: {
                relation: replace(wire, binary=False)
                for relation, wire in wires(connection, tables).items()
            },
        )


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@postgres_versions
@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.usefixtures("form")
def test_keys_of_any_type_are_copied_logged_and_compared(
    fresh_databases: Callable[[], FreshDatabases], kind: str
) -> None:
    mine, theirs = KEYS[kind]

    def fill(text: str) -> str:
        return (
            text.replace("{type}", kind)
            .replace("{mine}", quoted(mine))
            .replace("{theirs}", quoted(theirs))
        )

    ferry = make_ferry(fresh_databases(), fill(SCHEMA), fill(ROWS), "SELECT 1")
    ferry.organization = Organization(mine, "mine")
    with ferry.opened(ferry.move(limits=Limits(batch_rows=7))) as move:
        move.open_capture()
        move.copy()
        assert move.verify().ok
        ferry.run(Side.SOURCE, fill(CHANGES))
        assert not all("dirty" not in part for part in move.verify().hashes.values())
        while move.sync().remaining:
            pass
        verified = move.verify()
        assert verified.ok, verified.mismatches
        assert not any("dirty" in part for part in verified.hashes.values())

    for table in ('"Other Schema"."Things"', '"Other Schema".parts'):
        rows = [
            ferry.run(
                side,
                f"SELECT t::text FROM {table} AS t WHERE organization_id = {quoted(mine)}"
                " ORDER BY 1",
            )
            for side in Side
        ]
        assert rows[0] == rows[1]
        assert len(rows[1]) > 40
        others = ferry.run(
            Side.DESTINATION,
            f"SELECT count(*) FROM {table} AS t WHERE organization_id <> {quoted(mine)}",
        )
        assert others == [(0,)]


@pytest.mark.parametrize("kind", KEYS)
def test_keys_of_any_type_are_repaired(
    fresh_databases: Callable[[], FreshDatabases], kind: str
) -> None:
    """The key log is lost with the changes in it, and the destination loses rows besides."""
    mine, theirs = KEYS[kind]

    def fill(text: str) -> str:
        return (
            text.replace("{type}", kind)
            .replace("{mine}", quoted(mine))
            .replace("{theirs}", quoted(theirs))
        )

    ferry = make_ferry(fresh_databases(), fill(SCHEMA), fill(ROWS), "SELECT 1")
    ferry.organization = Organization(mine, "mine")
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        ferry.run(Side.SOURCE, fill(CHANGES))
        ferry.run(Side.SOURCE, "DELETE FROM cellferry.gate; DELETE FROM cellferry.key_log")
        ferry.run(
            Side.DESTINATION,
            "SET session_replication_role = replica;"
            'DELETE FROM "Other Schema".parts WHERE number BETWEEN 5 AND 10',
        )
        move.open_capture()
        assert move.repair().repaired > 60
        verified = move.verify()
        assert verified.ok, verified.mismatches
        assert not any("dirty" in part for part in verified.hashes.values())


GENERATED = """
CREATE TABLE "Other Schema".marks (
    organization_id {type} NOT NULL REFERENCES organizations,
    number integer NOT NULL,
    half numeric GENERATED ALWAYS AS (number / 2.0) STORED,
    PRIMARY KEY (organization_id, half)
);
"""

MARKS = """
INSERT INTO "Other Schema".marks
    SELECT o.id, g FROM organizations AS o, generate_series(1, 40) AS g;
"""


@postgres_versions
@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.usefixtures("form")
def test_a_copy_goes_on_behind_a_key_of_any_type(
    fresh_databases: Callable[[], FreshDatabases], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copier, "STRETCH_S", 0.0)  # every batch begins behind a checkpoint's key
    mine, theirs = KEYS[kind]

    def fill(text: str) -> str:
        return (
            text.replace("{type}", kind)
            .replace("{mine}", quoted(mine))
            .replace("{theirs}", quoted(theirs))
        )

    ferry = make_ferry(fresh_databases(), fill(SCHEMA + GENERATED), fill(ROWS + MARKS), "SELECT 1")
    ferry.organization = Organization(mine, "mine")
    with ferry.opened(ferry.move(limits=Limits(batch_rows=7))) as move:
        move.open_capture()
        copied = move.copy()
        assert move.verify().ok

    assert copied.count == 1 + 60 + 60 + 40
    assert copied.batches == 1 + 9 + 9 + 6
    with ferry.session(Side.DESTINATION) as connection:
        ends = dict(
            connection.execute("SELECT relation, last_key FROM cellferry.checkpoint").fetchall()
        )
    assert ends["public.organizations"] == [mine]
    assert ends["Other Schema.marks"] == [mine, "20.0000000000000000"]
    things = ferry.run(
        Side.SOURCE,
        'SELECT number::text, label, encode(token, \'hex\') FROM "Other Schema"."Things"'
        f" WHERE organization_id = {quoted(mine)} ORDER BY at DESC LIMIT 1",
    )
    number, label, token = things[0]
    last = ends["Other Schema.Things"]
    assert (last[3], last[6], last[4]) == (number, label, f"\\x{token}")
    assert last[1] == "2026-03-29T08:30:00+00:00"
