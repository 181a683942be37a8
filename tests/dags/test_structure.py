"""What the DAGs promise to operators by their shape."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from cellferry.orchestration.retry_policy import RETRY_POLICY

LANE = ["plan", "copy", "sync", "verify", "cutover", "soak", "wait_for_ttl", "cleanup"]
GROUPED = [("migrate_organizations", step) for step in LANE]
GROUPED += [("clean_up_organizations", "cleanup")]
WAY_BACK = ["roll_back", "wait_for_ttl", "cleanup"]
GROUPED += [("roll_back_organizations", step) for step in WAY_BACK]
DAGS = [
    *("clean_up_organizations", "migrate_organizations", "prepare_cell", "reverse_rounds"),
    "reap_cells",
    *("steer_organizations", "roll_back_organizations"),
    *("reshard", "roll_back_resharding"),
]


def test_a_lane_is_a_chain_in_order(bag: Any) -> None:
    dag = bag.dags["migrate_organizations"]
    for before, after in pairwise(LANE):
        assert f"organization.{before}" in dag.get_task(f"organization.{after}").upstream_task_ids


@pytest.mark.parametrize(
    ("step", "rule"),
    [
        # copy, sync and verify are skipped when plan did them, and it may do the first of them only
        ("sync", "none_failed"),
        ("verify", "none_failed"),
        ("cutover", "none_failed"),
        ("wait_for_ttl", "none_failed"),  # so is soak, when cutover did it
        ("cleanup", "all_success"),  # one whose TTL is not waited for here must not run
    ],
)
def test_a_skipped_task_stops_its_lane_only_where_it_should(bag: Any, step: str, rule: str) -> None:
    assert bag.dags["migrate_organizations"].get_task(f"organization.{step}").trigger_rule == rule


@pytest.mark.parametrize(("dag_id", "step"), GROUPED)
def test_every_task_of_a_lane_shows_its_organization(bag: Any, dag_id: str, step: str) -> None:
    task = bag.dags[dag_id].get_task(f"organization.{step}")
    assert task.get_closest_mapped_task_group() is not None
    assert "['slug']" in task.map_index_template


@pytest.mark.parametrize(("dag_id", "leaf"), [
    ("migrate_organizations", "report"),
    ("clean_up_organizations", "report_clean_up"),
    ("prepare_cell", "report_cells"),
    ("roll_back_organizations", "report_roll_back"),
    ("steer_organizations", "report_steering"),
    ("reshard", "report"),
    ("roll_back_resharding", "report"),
])  # fmt: skip
def test_the_only_leaf_reports_whatever_happened(bag: Any, dag_id: str, leaf: str) -> None:
    dag = bag.dags[dag_id]
    assert [task.task_id for task in dag.leaves] == [leaf]
    assert dag.get_task(leaf).trigger_rule == "all_done"


@pytest.mark.parametrize("dag_id", DAGS)
def test_permanent_errors_are_not_retried_anywhere(bag: Any, dag_id: str) -> None:
    for task in bag.dags[dag_id].tasks:
        assert task.retry_policy is RETRY_POLICY, task.task_id


@pytest.mark.parametrize(("dag_id", "step"), GROUPED)
def test_a_lane_survives_an_outage_of_minutes(bag: Any, dag_id: str, step: str) -> None:
    task = bag.dags[dag_id].get_task(f"organization.{step}")
    waits = [
        min(task.retry_delay.total_seconds() * 2**n, task.max_retry_delay.total_seconds())
        for n in range(task.retries)
    ]
    assert sum(waits) >= 180


def test_the_way_back_is_a_chain_in_order(bag: Any) -> None:
    dag = bag.dags["roll_back_organizations"]
    for before, after in pairwise(WAY_BACK):
        assert f"organization.{before}" in dag.get_task(f"organization.{after}").upstream_task_ids


@pytest.mark.parametrize(
    ("dag_id", "step"),
    [("migrate_organizations", "cutover"), ("roll_back_organizations", "roll_back")],
)
def test_a_killed_barrier_is_tried_again_within_seconds(bag: Any, dag_id: str, step: str) -> None:
    task = bag.dags[dag_id].get_task(f"organization.{step}")
    assert task.retry_delay.total_seconds() <= 2


@pytest.mark.parametrize(
    "dag_id",
    [
        *("migrate_organizations", "prepare_cell", "roll_back_organizations"),
        *("reshard", "roll_back_resharding"),
    ],
)
def test_dry_run_is_the_default(bag: Any, dag_id: str) -> None:
    assert bag.dags[dag_id].params["dry_run"] is True


@pytest.mark.parametrize("dag_id", DAGS)
def test_dags_start_unpaused(bag: Any, dag_id: str) -> None:
    # a paused clean_up_organizations would keep every old copy for ever
    assert bag.dags[dag_id].is_paused_upon_creation is False


@pytest.mark.parametrize("dag_id", DAGS)
@pytest.mark.parametrize(
    "heading", ["**What it does.**", "**When not to run it.**", "**Input.**", "**How it resumes.**"]
)
def test_the_docstring_is_the_documentation(bag: Any, dag_id: str, heading: str) -> None:
    assert heading in bag.dags[dag_id].doc_md


@pytest.mark.parametrize("dag_id", ["reverse_rounds", "reap_cells"])
def test_a_regular_dag_never_overlaps_or_catches_up(bag: Any, dag_id: str) -> None:
    dag = bag.dags[dag_id]
    assert (dag.max_active_runs, dag.catchup) == (1, False)


def test_a_frozen_organization_waits_a_minute_for_the_reaper_at_most(bag: Any) -> None:
    dag = bag.dags["reap_cells"]
    assert dag.schedule.total_seconds() <= 60
    assert dag.params["dry_run"] is False


def test_a_step_returns_one_xcom_of_ids_and_counts(bag: Any) -> None:
    for task in bag.dags["migrate_organizations"].tasks:
        assert not getattr(task, "multiple_outputs", False), task.task_id
