"""What the first task accepts and refuses, asked of a real topology."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import psycopg
import pytest
from psycopg import sql

from cellferry.errors import InvalidInput
from cellferry.local.postgres_server import PostgresServer
from cellferry.migration import Context
from cellferry.model import Actor, Migration, Organization, State, Strategy
from cellferry.orchestration.cell_tasks import LEAVE_TO_CLEAN_UP, in_turn, wants_reverse_round
from cellferry.orchestration.params import read_move_request
from cellferry.orchestration.run_starter import clean_up_request
from cellferry.orchestration.validation import (
    check_clean_up,
    check_move_request,
    leave_for_later,
    migrations_of,
    run_name,
    started_by,
)
from cellferry.settings import Settings
from cellferry.topology import Topology

RUN = "migrate_organizations/manual__1"
ACTOR = Actor("ada", dag_run=RUN, try_number=1)
STORES = {"postgres": {"connection": "p"}}
ACME, GLOBEX = Organization("1", "acme"), Organization("2", "globex")


@pytest.fixture(scope="module")
def template(postgres_server: PostgresServer) -> str:
    """Name of a database with an empty topology."""
    name = f"template_{secrets.token_hex(4)}"
    with psycopg.connect(postgres_server.url(), autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    with Topology(postgres_server.url(dbname=name)) as topology:
        topology.install()
    return name


@pytest.fixture
def context(postgres_server: PostgresServer, template: str) -> Iterator[Context]:
    settings = Settings.model_validate(
        {"cells": {cell: {"stores": STORES} for cell in ("cell-1", "cell-2", "cell-3")}}
    )
    name = f"test_{secrets.token_hex(4)}"
    with psycopg.connect(postgres_server.url(), autocommit=True) as admin:
        admin.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )
    with Topology(postgres_server.url(dbname=name)) as topology:
        for cell in settings.cells:
            topology.register_cell(cell, "eu", False)
        for organization in (ACME, GLOBEX):
            topology.register_organization(organization, "cell-1", ACTOR)
        yield Context(settings, lambda name: f"postgresql://{name}", ACTOR, topology)


def check(context: Context, *names: str, to: str = "cell-2") -> list[dict[str, str]]:
    request = read_move_request({"organizations": list(names), "destination": to})
    return check_move_request(context, request, RUN)


def begin(
    context: Context, organization: Organization, to: str = "cell-2", run: str = RUN
) -> Migration:
    return context.topology.create_migration(
        organization, to, Strategy.ONLINE, {}, {}, Actor("ada", dag_run=run)
    )


def retain(context: Context, migration: Migration, ttl_s: float) -> Migration:
    """Take a migration through all states to retained."""
    topology = context.topology
    attempt = topology.take_lease(migration.id, "test", ACTOR)
    path = [State.PLANNED, State.COPYING, State.SYNCING, State.READY, State.CUTTING_OVER]
    for before, after in pairwise(path):
        topology.transition(migration.id, attempt, before, after, ACTOR, None)
    topology.flip(migration.id, attempt, ACTOR, ttl_s, {})
    topology.transition(migration.id, attempt, State.SOAKING, State.RETAINED, ACTOR, None)
    return topology.migration(migration.id)


def test_ids_and_slugs_are_both_names(context: Context) -> None:
    assert check(context, "acme", "2") == [
        {"id": "1", "slug": "acme"},
        {"id": "2", "slug": "globex"},
    ]


@pytest.mark.parametrize(
    ("names", "to", "says"),
    [
        (["acmee"], "cell-2", "acmee"),
        (["acme", "1"], "cell-2", "'1' and 'acme' are the same organization"),
        (["acme"], "cell-1", "acme lives in cell-1 already"),
        (["acme"], "cell-9", "there is no cell 'cell-9'"),
    ],
)
def test_what_does_not_exist_or_fit_is_refused(
    context: Context, names: list[str], to: str, says: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        check(context, *names, to=to)
    assert says in str(refused.value)
    assert refused.value.hint


def test_all_organizations_that_cannot_be_taken_are_named(context: Context) -> None:
    with pytest.raises(InvalidInput) as refused:
        check(context, "nobody", "acme", "nowhere")
    assert "2 of 3 organizations" in str(refused.value)
    assert "nobody" in str(refused.value)
    assert "nowhere" in str(refused.value)


def test_one_that_moves_elsewhere_is_refused(context: Context) -> None:
    begin(context, ACME, to="cell-3", run="someone/else")
    with pytest.raises(InvalidInput, match="acme is already moving from cell-1 to cell-3"):
        check(context, "acme")


def test_what_became_of_one_meanwhile_stops_no_others_in_the_rest_of_a_long_list(
    context: Context, caplog: pytest.LogCaptureFixture
) -> None:
    begin(context, GLOBEX, to="cell-3", run="someone/else")
    retain(context, begin(context, ACME, run="someone/else"), 60)
    rest = f"{RUN}.part-9-of-20"
    request = read_move_request({"organizations": ["acme", "globex"], "destination": "cell-2"})

    with caplog.at_level("WARNING"):
        found = check_move_request(context, request, rest)

    assert found == [{"id": "2", "slug": "globex"}], "its own lane fails, and says why"
    assert "left out: acme lives in cell-2 already" in caplog.text
    with pytest.raises(InvalidInput, match="globex is already moving from cell-1 to cell-3"):
        check_move_request(context, request, RUN)


def test_one_that_moves_there_already_is_taken_over(context: Context) -> None:
    begin(context, ACME, run="someone/else")
    assert check(context, "acme") == [{"id": "1", "slug": "acme"}]


def test_a_run_that_is_cleared_takes_what_it_has_moved_already(context: Context) -> None:
    migration = retain(context, begin(context, ACME), 60)
    assert check(context, "acme") == [{"id": "1", "slug": "acme"}]
    assert started_by(context, ACME, "cell-2", RUN) == migration.id


def test_another_run_is_told_that_it_is_there(context: Context) -> None:
    retain(context, begin(context, ACME, run="migrate_organizations/manual__0"), 60)
    request = read_move_request({"organizations": ["acme"], "destination": "cell-2"})
    with pytest.raises(InvalidInput, match="acme lives in cell-2 already"):
        check_move_request(context, request, "migrate_organizations/manual__9")


def test_a_run_knows_its_own_migrations_only(context: Context) -> None:
    mine = begin(context, ACME)
    begin(context, GLOBEX, run="someone/else")
    found = migrations_of(
        context, [{"id": "1", "slug": "acme"}, {"id": "2", "slug": "globex"}], "cell-2"
    )
    assert {key: one and one.id for key, one in found.items()} == {"1": mine.id, "2": None}


def test_a_clean_up_takes_the_retained(context: Context) -> None:
    migration = retain(context, begin(context, ACME), 60)
    assert check_clean_up(context, [migration.id]) == [
        {"id": "1", "slug": "acme", "migration": migration.id}
    ]


def test_a_clean_up_refuses_what_has_not_moved(context: Context) -> None:
    migration = begin(context, ACME)
    with pytest.raises(InvalidInput, match=f"migration {migration.id} of acme is planned"):
        check_clean_up(context, [migration.id])


def test_a_clean_up_refuses_what_does_not_exist(context: Context) -> None:
    with pytest.raises(InvalidInput, match="999"):
        check_clean_up(context, [999])


def test_the_clean_up_run_starts_when_the_last_ttl_is_over(context: Context) -> None:
    first = retain(context, begin(context, ACME), 7_200)
    last = retain(context, begin(context, GLOBEX), 9_000)
    request = clean_up_request([last, first])
    assert request["conf"] == {"migrations": [first.id, last.id]}
    assert last.ttl_until is not None
    assert datetime.fromisoformat(request["run_after"]) == last.ttl_until
    assert request["run_id"] == clean_up_request([first, last])["run_id"]
    assert request["run_id"] != clean_up_request([first])["run_id"]


def test_a_clean_up_run_leaves_long_ttls_to_a_later_one(context: Context) -> None:
    due = retain(context, begin(context, ACME), 60)
    kept = retain(context, begin(context, GLOBEX), 86_400)
    needed = check_clean_up(context, [due.id, kept.id])

    now, later = leave_for_later(context, needed)

    assert [one["migration"] for one in now] == [due.id]
    assert later["conf"] == {"migrations": [kept.id]}
    assert kept.ttl_until is not None
    assert datetime.fromisoformat(later["run_after"]) == kept.ttl_until
    assert later == leave_for_later(context, needed)[1], "a retry starts it once"
    # One that is too early would not start itself again.
    assert later["run_id"] != clean_up_request([kept])["run_id"]
    assert later["run_id"] == run_name(later["run_id"])
    assert leave_for_later(context, now) == (now, {})


def test_no_clean_up_run_for_what_failed_before_its_flip(context: Context) -> None:
    assert clean_up_request([begin(context, ACME)]) == {}


def test_reverse_rounds_leave_a_migration_to_its_clean_up(context: Context) -> None:
    soon = LEAVE_TO_CLEAN_UP.total_seconds()
    assert wants_reverse_round(context, retain(context, begin(context, ACME), soon + 60))
    assert not wants_reverse_round(context, retain(context, begin(context, GLOBEX), soon - 10))


def test_reverse_rounds_leave_what_a_newer_migration_took_over(context: Context) -> None:
    first = retain(context, begin(context, ACME), 3_600)
    begin(context, ACME, to="cell-3")
    assert not wants_reverse_round(context, first)


def test_over_the_minutes_each_migration_has_its_turn() -> None:
    class Numbered:
        def __init__(self, number: int) -> None:
            self.id = number

    all_of_them = [Numbered(number) for number in range(7)]
    start = datetime(2026, 1, 1, tzinfo=UTC)
    for first in range(10):
        seen = {
            one.id
            for minute in range(first, first + 3)
            for one in in_turn(all_of_them, 3, start + timedelta(minutes=minute))
        }
        assert seen == set(range(7))
