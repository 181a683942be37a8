"""The planner gets to know what a move brought, where that weighs; neighbours cost nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from cellferry.model import Side
from cellferry.stores.postgres import statistics
from cellferry.stores.postgres.schema import Column, Name, Placement, Table
from fixtures.ferry import Ferry

ROWS = 10_000


def table(name: str) -> Table:
    return Table(Name("public", name), Placement.OWNED, (Column("id", "bigint"),), ("id",))


PLAIN, PARTED, NEW = table("plain"), table("Parted"), table("new")


@pytest.fixture
def connection(fresh_database: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(fresh_database, autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE plain (id bigint PRIMARY KEY) WITH (autovacuum_enabled = off);"
            'CREATE TABLE "Parted" (id bigint PRIMARY KEY) PARTITION BY RANGE (id);'
            'CREATE TABLE low PARTITION OF "Parted" FOR VALUES FROM (0) TO (100000)'
            " WITH (autovacuum_enabled = off);"
            'CREATE TABLE high PARTITION OF "Parted" FOR VALUES FROM (100000) TO (200000)'
            " WITH (autovacuum_enabled = off)"
        )
        for name in ("plain", '"Parted"'):
            add(connection, name, 1, ROWS)
            connection.execute(f"ANALYZE {name}".encode())
        yield connection


def add(connection: psycopg.Connection[Any], name: str, first: int, count: int) -> None:
    connection.execute(
        f"INSERT INTO {name} SELECT generate_series(%s::bigint, %s)".encode(),
        (first, first + count - 1),
    )
    connection.execute("SELECT pg_stat_force_next_flush()")
    connection.execute("SELECT 1")


def outdated(connection: psycopg.Connection[Any], **planned: int) -> list[str]:
    by_name = {f"public.{name}": rows for name, rows in planned.items()}
    found = statistics.outdated(connection, (PLAIN, PARTED), by_name)
    return [one.name.name for one in found]


def test_a_few_rows_between_many_are_left_to_autovacuum(
    connection: psycopg.Connection[Any],
) -> None:
    add(connection, "plain", 50_001, 500)
    add(connection, '"Parted"', 100_001, 500)

    assert outdated(connection, plain=500) == []


def test_a_table_that_grew_by_a_share_is_analyzed(connection: psycopg.Connection[Any]) -> None:
    add(connection, "plain", 50_001, 1_500)
    assert outdated(connection) == ["plain"]

    add(connection, '"Parted"', 100_001, 1_500)
    assert outdated(connection) == ["plain", "Parted"]


def test_the_table_s_own_settings_count(connection: psycopg.Connection[Any]) -> None:
    add(connection, "plain", 50_001, 500)
    connection.execute("ALTER TABLE plain SET (autovacuum_analyze_scale_factor = 0.01)")

    assert outdated(connection) == ["plain"]


def test_a_partitioned_table_is_analyzed_though_its_parts_were(
    connection: psycopg.Connection[Any],
) -> None:
    """As autovacuum does it: it never looks at the whole."""
    add(connection, '"Parted"', 100_001, 5_000)
    connection.execute("ANALYZE high")

    assert outdated(connection) == ["Parted"]


def test_what_the_plan_counted_counts_where_the_server_forgot(
    connection: psycopg.Connection[Any],
) -> None:
    """As after a crash, though a part has been looked at since."""
    add(connection, "plain", 50_001, 5_000)
    add(connection, '"Parted"', 100_001, 5_000)
    connection.execute("SELECT pg_stat_reset()")
    connection.execute("ANALYZE low")

    assert outdated(connection) == []
    assert outdated(connection, plain=500, Parted=500) == []
    assert outdated(connection, plain=5_000, Parted=5_000) == ["plain", "Parted"]


def test_rows_that_went_do_not_hide_those_that_came(connection: psycopg.Connection[Any]) -> None:
    connection.execute("DELETE FROM low WHERE id <= 4000")
    add(connection, '"Parted"', 100_001, 4_000)
    connection.execute("VACUUM ANALYZE low")
    connection.execute("ANALYZE high")

    assert outdated(connection, Parted=4_000) == ["Parted"]


def test_a_table_that_was_never_analyzed_is(connection: psycopg.Connection[Any]) -> None:
    connection.execute("CREATE TABLE new (id bigint PRIMARY KEY) WITH (autovacuum_enabled = off)")

    assert [one.name.name for one in statistics.outdated(connection, (NEW,), {})] == ["new"]
    assert statistics.outdated(connection, (table("elsewhere"),), {}) == []


def wait_for_counts(connection: psycopg.Connection[Any], name: str) -> None:
    """A server counts what a session changed when that has ended, shortly after it was closed."""
    changed = "SELECT n_mod_since_analyze FROM pg_stat_user_tables WHERE relname = %s"
    deadline = time.monotonic() + 60
    while connection.execute(changed, (name,)).fetchone() in {None, (0,)}:
        connection.commit()
        assert time.monotonic() < deadline, f"nothing arrived in {name}"
        time.sleep(0.05)
    connection.commit()


def test_before_its_cutover_only_tables_that_changed_a_lot_are_analyzed(ferry: Ferry) -> None:
    analyzed = (
        "SELECT relname FROM pg_stat_user_tables WHERE last_analyze > %s::timestamptz"
        " AND schemaname = 'public' ORDER BY 1"
    )
    with ferry.session(Side.DESTINATION) as destination:
        destination.execute(
            "SET session_replication_role = replica;"
            "INSERT INTO issues (id, project_id, iid, title)"
            " SELECT g, -1, g, 'a neighbour' FROM generate_series(100001, 200000) AS g;"
            "SELECT pg_stat_force_next_flush()"
        )
        destination.commit()  # what is counted later than it was looked at counts as a change
        destination.execute("ANALYZE")
        destination.commit()
        row = destination.execute("SELECT clock_timestamp()").fetchone()
        destination.commit()
        assert row is not None
        with ferry.opened() as move:
            move.open_capture()
            move.copy()
        wait_for_counts(destination, "events_0")
        with ferry.opened(ferry.move(attempt=2)) as move:
            move.catch_up()
        found = {name for (name,) in destination.execute(analyzed, row)}

    assert "issues" not in found
    assert "events" in found
