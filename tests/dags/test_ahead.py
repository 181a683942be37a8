"""Steps done ahead in one task: the same moves, and what fails is left to its own task."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg import sql

from cellferry import phases
from cellferry.migration import Context, steps
from cellferry.model import Organization, State
from cellferry.orchestration import ahead, barrier_turn, task_groups
from cellferry.orchestration.params import LONGEST_TTL_IN_RUN_S
from cellferry.phases import Phase
from fixtures.cells import TwoCells

AHEAD = ("copy", "sync", "verify")
LONG_TTL_S = LONGEST_TTL_IN_RUN_S + 3_600.0


@pytest.fixture
def acme(cells: TwoCells) -> Organization:
    return cells.add_organization(7)


def plan_of(context: Context, migration: int) -> Any:
    return context.topology.migration(migration).facts["plan"]


def before(cells: TwoCells, migration: int) -> tuple[str, ...]:
    with cells.context() as context:
        return ahead.before_barrier(context, migration, plan_of(context, migration))


def after(cells: TwoCells, migration: int, ttl_s: float) -> tuple[str, ...]:
    with cells.context() as context:
        steps.cutover(context, migration)
        return ahead.after_barrier(context, migration, ttl_s=ttl_s)


@contextmanager
def unreachable_topology(cells: TwoCells) -> Iterator[None]:
    name = sql.Identifier(urlsplit(cells.connections["cellferry-topology"]).path.strip("/"))
    with psycopg.connect(cells.databases.source_server.url(), autocommit=True) as server:

        def allow(connections: bool) -> None:
            server.execute(
                sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}").format(name, connections)
            )

        allow(False)
        server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s",
            (name.as_string().strip('"'),),
        )
        try:
            yield
        finally:
            allow(True)


def test_a_small_organization_is_ready_for_its_cutover_after_one_task(
    cells: TwoCells, acme: Organization
) -> None:
    migration = cells.plan(acme)
    assert before(cells, migration) == AHEAD
    assert cells.migration(migration).state is State.READY


def test_what_fails_is_left_to_its_own_task(cells: TwoCells, acme: Organization) -> None:
    migration = cells.plan(acme)
    with cells.context() as context:
        steps.pause(context, migration, "a test")
    assert before(cells, migration) == ()
    assert cells.migration(migration).state is State.PLANNED


def test_what_comes_after_a_step_that_was_done_is_left_to_its_own_task(
    cells: TwoCells, acme: Organization
) -> None:
    """Why the tasks after a skipped one must run: see what `test_structure` says of them."""
    migration = cells.plan(acme, strategy="online")

    def pause_behind_the_copy(phase: Phase) -> None:
        if phase is Phase.COPY_DONE:
            with cells.context() as other:
                steps.pause(other, migration, "a test")

    phases.listen(pause_behind_the_copy)
    try:
        assert before(cells, migration) == ("copy",)
    finally:
        phases.listen(None)
    assert cells.migration(migration).state is State.SYNCING
    with cells.context() as context:
        steps.resume(context, migration, "a test")
        steps.sync(context, migration)
        steps.verify(context, migration)
    assert cells.migration(migration).state is State.READY


def test_a_failure_ahead_is_no_last_try(cells: TwoCells, acme: Organization) -> None:
    migration = cells.plan(acme)
    with cells.context() as context:
        steps.pause(context, migration, "a test")
        context.last_try = True
        ahead.before_barrier(context, migration, plan_of(context, migration))
        assert context.last_try, "the task's own step is judged as before"


@pytest.mark.parametrize(("count", "copy_s"), [(ahead.SMALL + 1, 1.0), (10, 11.0)])
def test_a_large_or_slow_organization_keeps_its_tasks(count: int, copy_s: float) -> None:
    assert not ahead.is_small({"totals": {"postgres": {"count": count}}, "copy_s": copy_s})


def test_a_plan_without_figures_is_not_small() -> None:
    assert not ahead.is_small({})


def test_the_old_copy_goes_with_the_cutover_when_its_ttl_is_over(
    cells: TwoCells, acme: Organization
) -> None:
    migration = cells.plan(acme, ttl_s=0.0, soak_s=0.0)
    before(cells, migration)
    assert after(cells, migration, 0.0) == ("soak", "wait_for_ttl", "cleanup")
    assert cells.migration(migration).state is State.COMPLETED


def test_a_long_ttl_is_left_to_a_clean_up_run(cells: TwoCells, acme: Organization) -> None:
    migration = cells.plan(acme, ttl_s=LONG_TTL_S, soak_s=0.0)
    before(cells, migration)
    assert after(cells, migration, LONG_TTL_S) == ("soak", "wait_for_ttl", "cleanup")
    assert cells.migration(migration).state is State.RETAINED


def test_a_short_ttl_is_waited_for_by_its_own_task(cells: TwoCells, acme: Organization) -> None:
    migration = cells.plan(acme, ttl_s=50.0, soak_s=0.0)
    before(cells, migration)
    assert after(cells, migration, 50.0) == ("soak",)
    assert cells.migration(migration).state is State.RETAINED


def test_a_topology_that_dies_behind_the_cutover_does_not_fail_it(
    cells: TwoCells, acme: Organization
) -> None:
    migration = cells.plan(acme, ttl_s=0.0, soak_s=0.0)
    before(cells, migration)
    with cells.context() as context:
        steps.cutover(context, migration)
        with unreachable_topology(cells):
            assert ahead.after_barrier(context, migration, ttl_s=0.0) == ()
    assert cells.migration(migration).state is State.SOAKING
    assert after(cells, migration, 0.0) == ("soak", "wait_for_ttl", "cleanup")


@pytest.mark.parametrize(("number", "waits"), [(1, True), (2, False)])
def test_a_cutover_that_is_tried_again_waits_for_nobodys_turn(
    cells: TwoCells,
    acme: Organization,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
    *,
    waits: bool,
) -> None:
    """The try before it may have been killed, and the organization be frozen."""
    migration = cells.plan(acme, soak_s=ahead.SHORT_SOAK_S + 1)
    before(cells, migration)
    airflow = {"ti": SimpleNamespace(try_number=number, map_index=0), "params": {"ttl_s": 0.0}}
    monkeypatch.setattr(task_groups, "get_current_context", lambda: airflow)
    monkeypatch.setattr(task_groups, "step_context", lambda **_: cells.context())
    monkeypatch.setattr(task_groups, "give_way", lambda: None)
    monkeypatch.setattr(barrier_turn, "LONGEST_WAIT_S", 0.2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    with barrier_turn.barrier_turn():  # somebody's
        task_groups.cutover.function(organization={"migration": migration})

    assert ("another barrier" in caplog.text) is waits
    assert cells.migration(migration).state is State.SOAKING


def test_a_long_soak_has_a_task_of_its_own(cells: TwoCells, acme: Organization) -> None:
    migration = cells.plan(acme, ttl_s=0.0, soak_s=ahead.SHORT_SOAK_S + 1)
    before(cells, migration)
    assert after(cells, migration, 0.0) == ()
    assert cells.migration(migration).state is State.SOAKING
