"""What `roll_back_organizations` accepts and refuses, and which clean-ups follow."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import psycopg
import pytest
from psycopg import sql

from cellferry.errors import InvalidInput
from cellferry.local.postgres_server import PostgresServer
from cellferry.migration import Context
from cellferry.model import Actor, Migration, Organization, Resource, State, Strategy
from cellferry.orchestration.params import read_roll_back_request
from cellferry.orchestration.roll_back_lane import check_roll_back
from cellferry.orchestration.run_starter import clean_up_request
from cellferry.orchestration.validation import check_clean_up
from cellferry.settings import Settings
from cellferry.topology import Topology

RUN = "roll_back_organizations/manual__1"
ACTOR = Actor("ada", dag_run=RUN, try_number=1)
STORES = {"postgres": {"connection": "p"}}
ACME, GLOBEX = Organization("1", "acme"), Organization("2", "globex")
GOOD = {"organizations": ["acme"], "reason": "errors since the move"}


@pytest.fixture
def context(postgres_server: PostgresServer) -> Iterator[Context]:
    settings = Settings.model_validate(
        {"cells": {cell: {"stores": STORES} for cell in ("cell-1", "cell-2")}}
    )
    name = f"test_{secrets.token_hex(4)}"
    with psycopg.connect(postgres_server.url(), autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    with Topology(postgres_server.url(dbname=name)) as topology:
        topology.install()
        for cell in settings.cells:
            topology.register_cell(cell, "eu", False)
        for organization in (ACME, GLOBEX):
            topology.register_organization(organization, "cell-1", ACTOR)
        yield Context(settings, lambda name: f"postgresql://{name}", ACTOR, topology)


def go(context: Context, migration: Migration, path: list[State], actor: Actor = ACTOR) -> None:
    """Take a migration through `path`; the topology alone is asked."""
    topology = context.topology
    attempt = topology.take_lease(migration.id, "test", actor)
    for before, after in pairwise(path):
        if after is State.SOAKING:
            topology.flip(migration.id, attempt, actor, 60, {})
        elif after is State.ROLLED_BACK:
            topology.flip_back(migration.id, attempt, actor, 7_200, {}, "test")
        else:
            topology.transition(migration.id, attempt, before, after, actor, None)


def retained(context: Context, organization: Organization) -> Migration:
    other = Actor("bob", dag_run="migrate_organizations/manual__9")
    made = context.topology.create_migration(organization, "cell-2", Strategy.ONLINE, {}, {}, other)
    path = [State.PLANNED, State.COPYING, State.SYNCING, State.READY, State.CUTTING_OVER]
    go(context, made, [*path, State.SOAKING, State.RETAINED], other)
    return context.topology.migration(made.id)


def rolled_back(context: Context, organization: Organization, actor: Actor = ACTOR) -> Migration:
    made = retained(context, organization)
    go(context, made, [State.RETAINED, State.ROLLING_BACK, State.ROLLED_BACK], actor)
    attempt = context.topology.migration(made.id).attempt
    context.topology.record(made.id, attempt, {"handed_back": True})
    return context.topology.migration(made.id)


def test_retained_organizations_are_taken_by_id_or_slug(context: Context) -> None:
    first, second = retained(context, ACME), retained(context, GLOBEX)
    assert check_roll_back(context, ["globex", "1"]) == [
        {"id": "2", "slug": "globex", "migration": second.id},
        {"id": "1", "slug": "acme", "migration": first.id},
    ]


def test_all_that_cannot_go_back_are_named(context: Context) -> None:
    retained(context, ACME)
    with pytest.raises(InvalidInput) as refused:
        check_roll_back(context, ["acme", "1", "globex", "nobody"])
    text = str(refused.value)
    assert "3 of 4 organizations" in text
    assert "'1' and 'acme' are the same organization" in text
    assert "globex has no migration that could be rolled back" in text
    assert "nobody" in text


def test_a_run_that_is_cleared_as_a_whole_goes_on_where_it_was(context: Context) -> None:
    done = rolled_back(context, ACME)
    assert check_roll_back(context, ["acme"])[0]["migration"] == done.id


def test_what_another_run_brought_back_is_refused(context: Context) -> None:
    rolled_back(context, ACME, Actor("bob", dag_run="roll_back_organizations/manual__8"))
    with pytest.raises(InvalidInput, match="acme is back in cell-1 already"):
        check_roll_back(context, ["acme"])


def test_what_is_back_already_stops_no_others_in_the_rest_of_a_long_list(
    context: Context, caplog: pytest.LogCaptureFixture
) -> None:
    rolled_back(context, ACME, Actor("bob", dag_run="roll_back_organizations/manual__8"))
    other = retained(context, GLOBEX)
    rest = replace(context, actor=Actor("ada", dag_run=f"{RUN}.part-9-of-20", try_number=1))

    with caplog.at_level("WARNING"):
        found = check_roll_back(rest, ["acme", "globex"])

    assert [one["migration"] for one in found] == [other.id]
    assert "left out: acme is back in cell-1 already" in caplog.text


def test_what_a_dead_roll_back_left_half_way_is_taken(context: Context) -> None:
    made = retained(context, ACME)
    path = [State.RETAINED, State.ROLLING_BACK, State.ROLLED_BACK]
    go(context, made, path, Actor("bob", dag_run="roll_back_organizations/manual__8"))
    assert check_roll_back(context, ["acme"])[0]["migration"] == made.id


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"organizations": ["acme"]}, "reason"),
        ({**GOOD, "reason": "x"}, "reason"),
        ({**GOOD, "dryrun": False}, "unknown Param 'dryrun' (did you mean 'dry_run'?)"),
        ({**GOOD, "ttl_s": -1}, "ttl_s"),
        ({**GOOD, "ttl_s": "60"}, "ttl_s"),
        ({**GOOD, "organizations": []}, "organizations"),
        ({**GOOD, "dry_run": "no"}, "dry_run"),
    ],
)
def test_bad_params_are_refused(given: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        read_roll_back_request(given)
    assert says in str(refused.value)


def test_a_dry_run_is_the_default() -> None:
    request = read_roll_back_request(GOOD)
    assert (request.dry_run, request.ttl_s) == (True, None)


def test_the_clean_up_of_a_rolled_back_migration_is_another_run_than_that_of_a_retained_one(
    context: Context,
) -> None:
    kept = retained(context, ACME)
    back = rolled_back(context, GLOBEX)
    assert clean_up_request([kept, back])["conf"] == {"migrations": [kept.id]}
    request = clean_up_request([kept, back], State.ROLLED_BACK)
    assert request["conf"] == {"migrations": [back.id]}
    same = replace(kept, state=State.ROLLED_BACK)
    assert (
        clean_up_request([same], State.ROLLED_BACK)["run_id"] != clean_up_request([kept])["run_id"]
    )


def test_a_rolled_back_migration_is_cleaned_until_nothing_of_it_is_left(context: Context) -> None:
    back = rolled_back(context, ACME)
    assert check_clean_up(context, [back.id]) == []
    context.topology.resources(back.id).intend(Resource("cell-2", "postgres", "gate", "1"))
    assert [one["migration"] for one in check_clean_up(context, [back.id])] == [back.id]
