"""The tasks of a run that belong to no single organization: check, split, hand on, report."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from airflow.sdk import get_current_context, task

from cellferry.orchestration.retry_policy import BRIEF
from cellferry.orchestration.step_run import FAILURE, states_of, step_context
from cellferry.orchestration.task_groups import CLEAN_UP_STEPS, GROUP, MOVE_STEPS

log = logging.getLogger(__name__)

#: XCom key under which `validate` leaves the request for the run that takes the rest.
REST = "rest"


@task(multiple_outputs=False, **BRIEF)
def validate() -> list[dict[str, str]]:
    """Check the whole input before anything changes; return this run's organizations.

    Fails naming every unknown Param, wrong value, unknown organization or cell, duplicate, and
    organization that is there already or moving elsewhere.
    """
    from cellferry.orchestration.params import read_move_request
    from cellferry.orchestration.validation import check_move_request, split

    airflow = get_current_context()
    run = airflow["dag_run"]
    params = dict(airflow["params"])
    with step_context() as ferry:
        request = read_move_request(params)
        organizations = check_move_request(ferry, request, str(ferry.actor.dag_run))
    first, rest = split(organizations, params, run.run_id)
    airflow["ti"].xcom_push(key=REST, value=rest)
    log.info(
        "%d organizations to %s%s%s",
        len(organizations),
        request.destination,
        ", dry run" if request.dry_run else "",
        f"; this run takes the first {len(first)}" if rest else "",
    )
    return [dict(one) for one in first]


@task(multiple_outputs=False, **BRIEF)
def validate_clean_up() -> list[dict[str, Any]]:
    """Check the migrations before anything changes; return those that still need a clean-up.

    Those whose TTL lasts for long are left to a later run.
    """
    from cellferry.orchestration.params import clean_up_organizations_params, refuse_unknown
    from cellferry.orchestration.validation import check_clean_up, leave_for_later

    airflow = get_current_context()
    params = dict(airflow["params"])
    with step_context() as ferry:
        refuse_unknown(params, clean_up_organizations_params())
        needed = check_clean_up(ferry, params["migrations"])
        due, later = leave_for_later(ferry, needed)
    airflow["ti"].xcom_push(key=REST, value=later)
    log.info("%d of %d migrations need a clean-up", len(needed), len(params["migrations"]))
    if later:
        log.info("%d of them in a run at %s", len(needed) - len(due), later["run_after"])
    return due


@task(multiple_outputs=False, trigger_rule="all_done", **BRIEF)
def report() -> dict[str, int]:
    """Print what became of each organization, and fail when one failed, saying what to do."""
    from cellferry.orchestration import reporting
    from cellferry.orchestration.validation import migrations_of

    airflow = get_current_context()
    params = airflow["params"]
    organizations = organizations_of(airflow, "validate")
    states = states_of(airflow)
    lanes = lanes_of(airflow, organizations, MOVE_STEPS, states)
    rows = []
    if params["dry_run"]:
        for one in lanes:
            plan = airflow["ti"].xcom_pull(
                task_ids=f"{GROUP}.plan", key="plan", map_indexes=one.index
            )
            rows.append(reporting.plan_row(one.slug, plan))
    else:
        with step_context() as ferry:
            migrations = migrations_of(ferry, organizations, params["destination"])
            reporting.keep_evidence(ferry, [one.id for one in migrations.values() if one])
            reporting.say_halts(ferry)
        for one, organization in zip(lanes, organizations, strict=True):
            rows.append(reporting.move_row(one, migrations[organization["id"]]))
    return say(states, lanes, rows)


@task(multiple_outputs=False, trigger_rule="all_done", **BRIEF)
def report_clean_up() -> dict[str, int]:
    """Print what was deleted, and fail when a clean-up failed, saying what to do."""
    from cellferry.orchestration import reporting

    airflow = get_current_context()
    organizations = organizations_of(airflow, "validate_clean_up")
    states = states_of(airflow)
    lanes = lanes_of(airflow, organizations, CLEAN_UP_STEPS, states)
    with step_context() as ferry:
        rows = [
            reporting.clean_up_row(one, ferry.topology.migration(organization["migration"]))
            for one, organization in zip(lanes, organizations, strict=True)
        ]
        reporting.keep_evidence(
            ferry, [organization["migration"] for organization in organizations]
        )
    return say(states, lanes, rows)


def organizations_of(airflow: Any, task_id: str) -> Sequence[Mapping[str, Any]]:
    """Return the run's lanes, or fail because the input was refused."""
    from airflow.sdk.exceptions import AirflowFailException

    organizations: Sequence[Mapping[str, Any]] | None = _pull(airflow, task_id)
    if organizations is None:
        failure = airflow["ti"].xcom_pull(task_ids=task_id, key=FAILURE) or {}
        remedy = failure.get("remedy")
        complaint = f"nothing was changed: {failure.get('message', f'{task_id} failed')}" + (
            f"\nRemedy: {remedy}" if remedy else ""
        )
        log.error("%s", complaint)
        raise AirflowFailException(complaint)
    return organizations


def lanes_of(
    airflow: Any,
    organizations: Sequence[Mapping[str, Any]],
    steps: Sequence[str],
    states: Mapping[str, Any],
) -> Any:
    """Read how each lane ended, and the reasons that failed tasks left."""
    from dataclasses import replace

    from cellferry.orchestration import reporting

    ti = airflow["ti"]
    lanes = []
    for index, one in enumerate(organizations):
        lane = reporting.lane(index, one["slug"], GROUP, steps, states)
        if lane.failed_step is not None:
            failure = (
                ti.xcom_pull(task_ids=f"{GROUP}.{lane.failed_step}", key=FAILURE, map_indexes=index)
                or {}
            )
            lane = replace(
                lane, message=failure.get("message", ""), remedy=failure.get("remedy", "")
            )
        lanes.append(lane)
    return lanes


def say(states: Mapping[str, Any], lanes: Any, rows: Sequence[Mapping[str, str]]) -> dict[str, int]:
    """Print the table; fail with what to do when a lane failed, or no further run was started."""
    from airflow.sdk.exceptions import AirflowFailException

    from cellferry.orchestration import reporting

    if rows:
        log.info("Report\n%s", reporting.table(rows))
    else:
        log.info("nothing was left to do")
    handing_on = reporting.not_handed_on(states)
    if complaint := reporting.complaint(lanes, GROUP, handing_on):
        log.error("%s", complaint)
        raise AirflowFailException(complaint)
    return {"organizations": len(lanes), "failed": 0}


def _pull(airflow: Any, task_id: str, key: str = "return_value") -> Any:
    return airflow["ti"].xcom_pull(task_ids=task_id, key=key)
