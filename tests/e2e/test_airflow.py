"""A whole Airflow moves organizations: what an operator does through its API."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cellferry import settings
from cellferry.local.airflow_api import AirflowApi
from cellferry.local.application import Application
from cellferry.local.fleet import Fleet
from cellferry.migration import Context, steps
from cellferry.model import Actor, State

DAG = "migrate_organizations"
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def context(fleet: Fleet) -> Iterator[Context]:
    environment = fleet.environment()
    loaded = settings.load(Path(environment["CELLFERRY_CONFIG"]))
    connections = settings.from_environment(environment)
    with Context.from_settings(loaded, connections, actor=Actor("test")) as made:
        made.topology.install()
        application = Application(connections, made.topology)
        application.provision()
        application.seed(organizations=8, rows=30_000)
        for cell in loaded.cells:
            steps.prepare_cell(made, cell)
        yield made


@pytest.fixture(scope="module")
def api(fleet: Fleet, context: Context) -> Iterator[AirflowApi]:
    with AirflowApi(fleet.airflow_url, *fleet.airflow_credentials) as made:
        made.wait_for_dag(DAG)
        yield made


def slugs_in(context: Context, cell: str) -> list[str]:
    return [
        context.topology.organization(route.organization).slug
        for route in context.topology.routes()
        if route.cell == cell
    ]


def test_a_dry_run_is_the_default_and_changes_nothing(api: AirflowApi, context: Context) -> None:
    slug = slugs_in(context, "cell-1")[0]
    run = api.trigger(DAG, {"organizations": [slug], "destination": "cell-2"})
    assert api.wait_for_run(DAG, run, 400) == "success"
    assert context.topology.migrations() == []
    assert "cell-2" in api.log(DAG, run, "report")


@pytest.mark.parametrize(
    ("conf", "named"),
    [
        ({"organizations": ["nobody"], "destination": "cell-2"}, "nobody"),
        ({"organizations": ["org-1"], "destination": "cell-9"}, "cell-9"),
        ({"organizations": ["org-1"], "destination": "cell-2", "dry_runn": False}, "dry_runn"),
    ],
    ids=["unknown organization", "unknown cell", "unknown Param"],
)
def test_bad_input_fails_in_the_first_task_and_is_named(
    api: AirflowApi, context: Context, conf: dict[str, object], named: str
) -> None:
    if conf["organizations"] == ["org-1"]:
        conf = {**conf, "organizations": slugs_in(context, "cell-1")[:1]}
    run = api.trigger(DAG, conf)
    assert api.wait_for_run(DAG, run, 400) == "failed"
    first = next(one for one in api.tasks(DAG, run) if one.state == "failed")
    assert named in api.log(DAG, run, first.task_id, first.map_index, first.try_number)
    assert context.topology.migrations() == []


def test_a_copy_killed_in_the_middle_is_retried_and_goes_on_from_its_checkpoint(
    api: AirflowApi, context: Context, fleet: Fleet
) -> None:
    route = max(
        (one for one in context.topology.routes() if one.cell == "cell-1"),
        key=lambda one: -int(one.organization),
    )
    slug = context.topology.organization(route.organization).slug
    batch = 500
    conf = {
        "organizations": [slug],
        "destination": "cell-2",
        "dry_run": False,
        "strategy": "online",
        "rows_per_s": 1_500,  # so that the kill surely meets it
        "batch_rows": batch,
        "ttl_s": 2,
    }
    run = api.trigger(DAG, conf)
    _kill_when(context, route.organization, rows=2_500)
    assert api.wait_for_run(DAG, run, 400) == "success", api.log(DAG, run, "report")
    migration = context.topology.migrations(org=route.organization)[0]
    assert migration.state is State.COMPLETED
    copies = [one for one in api.tasks(DAG, run) if one.task_id.endswith(".copy")]
    assert [one.try_number for one in copies] == [2]
    assert migration.facts["copied"]["postgres"]["recopied"] <= batch


def _kill_when(context: Context, organization: str, rows: int) -> None:
    """SIGKILL the process that holds the migration's lease, once it has copied `rows`."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        live = context.topology.live_migration(organization)
        if live is not None and live.state is State.COPYING:
            progress = [
                one for one in context.topology.progress(live.id) if one.store == "postgres"
            ]
            if progress and sum(one.done for one in progress) >= rows:
                holder = context.topology.lease(live.id).holder or ""
                pid = int(holder.split(":")[1])
                assert "airflow" in " ".join(psutil.Process(pid).cmdline())
                os.kill(pid, signal.SIGKILL)
                return
        time.sleep(0.05)
    pytest.fail("the copy never got that far")


def test_clearing_one_failed_organization_reruns_that_one_alone(
    api: AirflowApi, context: Context, fleet: Fleet
) -> None:
    good, bad = slugs_in(context, "cell-1")[:2]
    # A hand-made obstacle: the destination already holds a row with one of its keys.
    obstacle = Obstacle(context, bad)
    obstacle.put()
    conf = {
        "organizations": [good, bad],
        "destination": "cell-3",
        "dry_run": False,
        "strategy": "online",
        "ttl_s": 2,
    }
    run = api.trigger(DAG, conf)
    assert api.wait_for_run(DAG, run, 400) == "failed"
    states = {one.name: one.state for one in api.tasks(DAG, run) if one.task_id.endswith(".plan")}
    assert states == {good: "success", bad: "failed"}
    tries = {
        (one.task_id, one.map_index): one.try_number
        for one in api.tasks(DAG, run)
        if one.name == good
    }
    obstacle.remove()
    failed = next(one for one in api.tasks(DAG, run) if one.name == bad and one.state == "failed")
    api.clear(DAG, run, [(failed.task_id, failed.map_index)])
    assert api.wait_for_run(DAG, run, 400) == "success", api.log(DAG, run, "report", try_number=2)
    again = {
        (one.task_id, one.map_index): one.try_number
        for one in api.tasks(DAG, run)
        if one.name == good
    }
    assert again == tries, "the organization that had succeeded ran again"
    assert set(slugs_in(context, "cell-3")) >= {good, bad}


class Obstacle:
    """A row at the destination that collides with one of the organization's primary keys."""

    def __init__(self, context: Context, slug: str) -> None:
        import psycopg

        organization = context.topology.organization(slug)
        url = {
            name: context.settings.cell(name, context.connections).stores["postgres"].admin_url
            for name in ("cell-1", "cell-3")
        }
        self._connect = psycopg.connect
        self._destination = url["cell-3"]
        with psycopg.connect(url["cell-1"]) as source:
            row = source.execute(
                "SELECT id FROM labels WHERE organization_id = %s LIMIT 1", (organization.id,)
            ).fetchone()
        assert row is not None
        self._id = row[0]

    def put(self) -> None:
        with self._connect(self._destination) as connection:
            connection.execute(
                "INSERT INTO labels (id, organization_id, title, position) "
                "OVERRIDING SYSTEM VALUE "
                "SELECT %s, id, 'obstacle', 1000000 FROM organizations LIMIT 1",
                (self._id,),
            )

    def remove(self) -> None:
        with self._connect(self._destination) as connection:
            connection.execute("DELETE FROM labels WHERE id = %s", (self._id,))
