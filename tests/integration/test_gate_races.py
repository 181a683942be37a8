"""The gate against writers and controllers that meet it at the wrong moment."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from cellferry.model import Side
from fixtures.ferry import Ferry, make_ferry
from fixtures.postgres import FreshDatabases, postgres_versions


@postgres_versions
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_writer_with_an_older_snapshot_does_not_pass_a_gate_that_froze_since(
    fresh_databases: Callable[[], FreshDatabases], level: str
) -> None:
    ferry = make_ferry(fresh_databases())
    with ferry.opened() as move, ferry.session(Side.SOURCE) as writer:
        move.open_capture()
        writer.execute(f"BEGIN ISOLATION LEVEL {level}".encode())
        writer.execute("SELECT count(*) FROM projects")
        move.freeze(60.0)
        move.release()

        with pytest.raises(psycopg.errors.SerializationFailure):
            writer.execute("UPDATE organizations SET name = 'late' WHERE id = 1")


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_caller_with_an_older_snapshot_is_not_told_that_it_has_authority(
    ferry: Ferry, level: str
) -> None:
    with ferry.opened() as move, ferry.session(Side.SOURCE) as reader:
        move.open_capture()
        reader.execute(f"BEGIN ISOLATION LEVEL {level}".encode())
        reader.execute("SELECT count(*) FROM projects")
        move.freeze(60.0)
        move.release()

        with pytest.raises(psycopg.errors.SerializationFailure):
            reader.execute("SELECT cellferry.assert_authority('1', 1)")


@postgres_versions
@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_a_caller_that_only_reads_may_ask_while_the_gate_is_armed(
    fresh_databases: Callable[[], FreshDatabases], level: str
) -> None:
    ferry = make_ferry(fresh_databases())
    begin = f"BEGIN ISOLATION LEVEL {level} READ ONLY".encode()
    with ferry.opened() as move, ferry.session(Side.SOURCE) as reader:
        move.open_capture()
        reader.execute(begin)
        reader.execute("SELECT cellferry.assert_authority('1', 1)")
        assert reader.execute("SELECT count(*) FROM projects").fetchone() != (0,)
        reader.execute("COMMIT")

        move.freeze(60.0)
        move.release()
        reader.execute(begin)
        with pytest.raises(psycopg.Error) as refused:
            reader.execute("SELECT cellferry.assert_authority('1', 1)")
        assert refused.value.sqlstate == "CF002"


def test_a_writer_with_an_older_snapshot_does_not_pass_when_an_attempt_came_between(
    ferry: Ferry,
) -> None:
    with ferry.opened() as move:
        move.open_capture()
    with ferry.session(Side.SOURCE) as writer:
        writer.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        writer.execute("SELECT count(*) FROM projects")
        with ferry.opened(ferry.move(attempt=2)) as move:
            move.freeze(60.0)
            move.release()

            with pytest.raises(psycopg.errors.SerializationFailure):
                writer.execute("UPDATE organizations SET name = 'late' WHERE id = 1")


def test_a_new_attempt_does_not_wait_for_writers_with_an_older_snapshot(ferry: Ferry) -> None:
    with ferry.opened() as move:
        move.open_capture()
    with ferry.session(Side.SOURCE) as writer:
        writer.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        writer.execute("UPDATE organizations SET name = 'in flight' WHERE id = 1")

        with ferry.opened(ferry.move(attempt=2)):
            writer.execute("UPDATE organizations SET name = 'goes on' WHERE id = 1")
            writer.execute("COMMIT")

    assert ferry.run(Side.SOURCE, "SELECT name FROM organizations WHERE id = 1") == [("goes on",)]
