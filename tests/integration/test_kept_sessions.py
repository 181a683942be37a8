"""Sessions that one step leaves to the next: as new, at the server that is there, never shared."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus

from cellferry.migration import MoveOptions, steps
from cellferry.model import Side, State
from cellferry.stores.postgres import sessions, store
from fixtures.cells import PATIENT, TwoCells
from fixtures.ferry import Ferry, make_ferry
from fixtures.postgres import FreshDatabases

Connection = psycopg.Connection[Any]


@pytest.fixture
def kept() -> Iterator[sessions.Kept]:
    made = sessions.Kept()
    yield made
    made.close()


@pytest.fixture
def ferry(fresh_databases: Any) -> Ferry:
    databases: FreshDatabases = fresh_databases()
    return make_ferry(databases)


def connected(url: str) -> Connection:
    return sessions.connect(url, purpose="first", autocommit=True)


def settings_of(session: Connection) -> dict[str, str]:
    """All settings, but the name, by which sessions are to differ."""
    found = session.execute(
        "SELECT name, setting FROM pg_settings WHERE name <> 'application_name'"
    )
    return dict(found.fetchall())


def test_what_a_step_did_to_its_session_is_gone(kept: sessions.Kept, fresh_database: str) -> None:
    with psycopg.connect(fresh_database, autocommit=True) as admin:
        name = admin.info.dbname
        admin.execute(f'ALTER DATABASE "{name}" SET synchronous_commit = off'.encode())
    with connected(fresh_database) as fresh:
        expected, prepared_max = settings_of(fresh), fresh.prepared_max
    assert expected["synchronous_commit"] == "on"
    session = connected(fresh_database)
    session.prepared_max = 1_000
    session.execute("CREATE TABLE public.things (id int)")
    for statement in (
        "SET session_replication_role = replica",
        "SET search_path = public",
        "SET plan_cache_mode = force_generic_plan",
        "SET synchronous_commit = off",
        "CREATE TEMPORARY TABLE things (id text)",
        "LISTEN news",
        "SELECT pg_advisory_lock(7)",
    ):
        session.execute(statement)
    for _ in range(2):
        session.execute("SELECT count(*) FROM public.things", prepare=True)
    pid = session.info.backend_pid
    kept.leave(fresh_database, session)
    assert session.execute("SHOW application_name").fetchone() == ("cellferry:kept",)

    again = kept.take(fresh_database, purpose="second")

    assert again is not None
    assert again.info.backend_pid == pid
    assert settings_of(again) == expected
    assert again.prepared_max == prepared_max
    assert again.execute("SHOW application_name").fetchone() == ("cellferry:second",)
    assert again.execute(
        "SELECT (SELECT count(*) FROM pg_prepared_statements),"
        " (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),"
        " (SELECT count(*) FROM pg_listening_channels()),"
        " (SELECT count(*) FROM pg_class WHERE relname = 'things')"
    ).fetchone() == (0, 0, 0, 1)
    # What the client took for prepared is prepared anew.
    for _ in range(2):
        assert again.execute("SELECT count(*) FROM public.things", prepare=True).fetchone() == (0,)
    again.close()


def test_what_one_of_several_steps_prepared_is_not_taken_for_prepared_later(
    kept: sessions.Kept, fresh_database: str
) -> None:
    """psycopg counts on its prepared statements, whoever discards them."""
    session = connected(fresh_database)
    for prepare in (False, True, False, True, True):
        kept.leave(fresh_database, session)
        again = kept.take(fresh_database, purpose="next")
        assert again is session
        for _ in range(2):
            assert again.execute("SELECT 1", prepare=prepare).fetchone() == (1,)
    session.close()


def test_the_newest_session_is_kept_and_taken_once(
    kept: sessions.Kept, fresh_database: str
) -> None:
    first, second = connected(fresh_database), connected(fresh_database)
    kept.leave(fresh_database, first)
    kept.leave(fresh_database, second)
    assert first.closed
    assert not second.closed
    assert kept.take("postgresql://another/", purpose="x") is None
    assert kept.take(fresh_database, purpose="x") is second
    assert kept.take(fresh_database, purpose="x") is None
    second.close()


def test_a_session_in_a_transaction_is_not_kept(kept: sessions.Kept, fresh_database: str) -> None:
    session = connected(fresh_database)
    session.execute("BEGIN")
    assert session.info.transaction_status is TransactionStatus.INTRANS
    kept.leave(fresh_database, session)
    assert session.closed
    assert kept.take(fresh_database, purpose="x") is None


def test_who_waited_connects_anew(
    kept: sessions.Kept, fresh_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = connected(fresh_database)
    kept.leave(fresh_database, session)
    monkeypatch.setattr(sessions.Kept, "LONGEST_S", -1.0)
    assert kept.take(fresh_database, purpose="x") is None
    assert session.closed


def test_a_session_that_was_ended_meanwhile_is_not_taken(
    kept: sessions.Kept, fresh_database: str
) -> None:
    session = connected(fresh_database)
    kept.leave(fresh_database, session)
    with psycopg.connect(fresh_database, autocommit=True) as admin:
        admin.execute("SELECT pg_terminate_backend(%s, 5000)", (session.info.backend_pid,))
    assert kept.take(fresh_database, purpose="x") is None
    assert session.closed


def test_what_nobody_takes_is_closed(fresh_database: str) -> None:
    kept = sessions.Kept()
    session = connected(fresh_database)
    kept.leave(fresh_database, session)
    kept.close()
    assert session.closed


def pids(ferry: Ferry, attempt: int, *, continues: bool = True) -> list[int]:
    """The sessions at both cells of one step."""
    with ferry.opened(ferry.move(attempt=attempt), continues=continues) as move:
        return [move._connection(side).info.backend_pid for side in Side]


def test_steps_that_follow_each_other_use_the_same_sessions(ferry: Ferry) -> None:
    with ferry.store.keeping_sessions():
        first = pids(ferry, 1)
        assert pids(ferry, 2) == first
        with ferry.opened(ferry.move(attempt=3), continues=True) as move:
            assert [move._connection(side).info.backend_pid for side in Side] == first
            for side in Side:
                name = move._connection(side).execute("SHOW application_name").fetchone()
                assert name == ("cellferry:1:3:move",)
            # Another attempt meanwhile has sessions of its own, and ends these.
            others = pids(ferry, 4)
            assert not set(others) & set(first)
            with pytest.raises(psycopg.OperationalError):
                move._connection(Side.SOURCE).execute("SELECT 1")
    assert ferry.store.kept is None
    assert not set(pids(ferry, 5)) & set(others)


def test_who_freezes_asks_for_the_server_that_is_there_now(ferry: Ferry) -> None:
    with ferry.store.keeping_sessions():
        first = pids(ferry, 1)
        assert not set(pids(ferry, 2, continues=False)) & set(first)
        assert ended(ferry, first[0])


def test_a_long_step_leaves_nothing(ferry: Ferry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHORT_STEP_S", -1.0)
    with ferry.store.keeping_sessions():
        first = pids(ferry, 1)
        assert ended(ferry, first[0])


def test_only_steps_before_the_cutover_use_what_others_connected(
    cells: TwoCells, monkeypatch: pytest.MonkeyPatch
) -> None:
    organization = cells.add_organization(7)
    cells.prepare()
    found: list[bool] = []
    take = sessions.Kept.take

    def note(*arguments: Any, **named: Any) -> Connection | None:
        session = take(*arguments, **named)
        found.append(session is not None)
        return session

    monkeypatch.setattr(sessions.Kept, "take", note)
    monkeypatch.setattr(sessions.Kept, "LONGEST_S", 60.0)
    monkeypatch.setattr(store, "SHORT_STEP_S", 60.0)
    with cells.context() as context:
        kept = context.stores["postgres"].kept  # type: ignore[attr-defined]
        options = MoveOptions(strategy="online", ttl_s=0, soak_s=0, **PATIENT)
        plan = steps.plan(context, organization.slug, "cell-2", options=options, record=True)
        assert plan.migration is not None
        assert len(kept._sessions) == 2
        found.clear()
        for step in (steps.copy, steps.sync, steps.verify):
            step(context, plan.migration)
            assert found == [True, True]
            found.clear()
        for last in (steps.cutover, steps.soak, steps.cleanup):
            last(context, plan.migration)
            assert kept._sessions == {}
        assert found == []
    assert cells.migration(plan.migration).state is State.COMPLETED


def test_a_step_that_failed_leaves_nothing(ferry: Ferry) -> None:
    with ferry.store.keeping_sessions():
        first: list[int] = []
        with suppress(ZeroDivisionError), ferry.opened(ferry.move(attempt=1)) as move:
            first.extend(move._connection(side).info.backend_pid for side in Side)
            raise ZeroDivisionError
        assert first
        assert not set(pids(ferry, 2)) & set(first)


def test_without_steps_that_follow_nothing_is_kept(ferry: Ferry) -> None:
    assert ended(ferry, pids(ferry, 1)[0])


def ended(ferry: Ferry, pid: int) -> bool:
    """Whether a session at the source ends soon."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not ferry.run(Side.SOURCE, f"SELECT FROM pg_stat_activity WHERE pid = {pid}"):
            return True
        time.sleep(0.05)
    return False
