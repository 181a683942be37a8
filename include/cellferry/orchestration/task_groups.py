"""The lanes that DAGs are made of: one mapped instance for each organization.

A task is a short function that calls one step, and those after it that are short enough to be
done ahead (`ahead`). It returns ids, counts and a line for people; the migration's number is in the
result of `plan`. Truth is in the topology and in the cells, so every task may be repeated, cleared
or killed.

Arguments are passed by keyword: Airflow renders the name of a lane from them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from airflow.sdk import get_current_context, task, task_group

from cellferry.niceness import give_way
from cellferry.orchestration import ahead
from cellferry.orchestration.barrier_turn import barrier_turn
from cellferry.orchestration.retry_policy import PATIENT, PROMPT
from cellferry.orchestration.sensors import TtlSensor
from cellferry.orchestration.step_run import brief, step_context

log = logging.getLogger(__name__)

GROUP = "organization"
#: Steps of a lane, in order.
MOVE_STEPS = ("plan", "copy", "sync", "verify", "cutover", "soak", "wait_for_ttl", "cleanup")
CLEAN_UP_STEPS = ("cleanup",)

#: Tasks of one kind at once, over all runs: a cell's servers have other work to do, too.
COPIES_AT_ONCE = 4
#: Of these one at a time is at its barrier (`barrier_turn`); others start, or soak for a while.
CUTOVERS_AT_ONCE = 4
ROLL_BACKS_AT_ONCE = 1
CLEAN_UPS_AT_ONCE = 2

#: Tasks after ones that may have been done ahead: those are skipped then.
_AFTER_SKIPPED = {"trigger_rule": "none_failed"}

#: What is nearer to its end goes first, so that organizations spend little time half moved.
_PRIORITY = {step: number for number, step in enumerate(MOVE_STEPS, start=1)} | {
    "cutover": 20,
    "roll_back": 20,
}

_NAMES_A_TASK = "{{ task.op_kwargs['organization']['slug'] }}"
_NAMES_A_SENSOR = "{{ task.organization['slug'] }}"


def _step(name: str, **more: Any) -> dict[str, Any]:
    """Return the arguments that the task of step `name` has in common with all others."""
    return {
        "task_id": name,
        "map_index_template": _NAMES_A_TASK,
        "priority_weight": _PRIORITY[name],
        "weight_rule": "absolute",
        **PATIENT,
        **more,
    }


def in_lane(name: str, *, is_sensor: bool = False, **more: Any) -> dict[str, Any]:
    """Return what a task of step `name` in another lane has in common with those here."""
    template = _NAMES_A_SENSOR if is_sensor else _NAMES_A_TASK
    return {**_step(name, **more), "map_index_template": template}


@task(multiple_outputs=False, **_step("plan", max_active_tis_per_dag=COPIES_AT_ONCE))
def plan(*, organization: Mapping[str, str]) -> dict[str, Any]:
    """Look at everything and change nothing; unless it is a dry run, record the migration.

    Fails when something blocks the move, in a dry run, too. A small organization is also copied
    and verified here. A dry run ends here.
    """
    from cellferry.errors import Blocked
    from cellferry.migration import steps
    from cellferry.orchestration.params import read_move_request
    from cellferry.orchestration.validation import started_by, wave

    airflow = get_current_context()
    done: tuple[str, ...] = MOVE_STEPS[1:]
    with step_context() as ferry:
        request = read_move_request(airflow["params"])
        found = ferry.topology.organization(organization["id"])
        begun = started_by(ferry, found, request.destination, str(ferry.actor.dag_run))
        if begun is not None:
            log.info("migration %d of this run goes on", begun)
            return {"migration": begun, "repeated": True}
        report = steps.plan(
            ferry,
            organization["id"],
            request.destination,
            options=request.options_of(wave(airflow["dag_run"].run_id)),
            record=not request.dry_run,
        )
        planned = report.as_dict()
        kept = _plan_for_people(planned)
        airflow["ti"].xcom_push(key="plan", value=kept)
        log.info(
            "%s → %s, %s: %s", report.source, report.destination, report.strategy,
            report.strategy_reason,
        )  # fmt: skip
        for blocker in report.blockers:
            say = log.error if blocker.fatal else log.warning
            say("%s: %s Remedy: %s", blocker.where, blocker.reason, blocker.remedy)
        if report.fatal:
            raise Blocked(
                "; ".join(f"{one.where}: {one.reason}" for one in report.fatal),
                organization=report.organization.slug,
                step="plan",
                hint="; ".join(dict.fromkeys(one.remedy for one in report.fatal)),
            )
        if report.migration is None:
            log.info("a dry run only plans; set dry_run to false to move")
        else:
            done = ahead.before_barrier(ferry, report.migration, planned)
    result = {"migration": report.migration, "repeated": False}
    ahead.skip_done(airflow["ti"], GROUP, result, done)
    return result


def _plan_for_people(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the counts and codes of a plan, without its texts."""
    kept = {
        key: plan[key]
        for key in ("source", "destination", "strategy", "copy_s", "pause_s", "totals", "migration")
    }
    blockers = [blocker["code"] for blocker in plan["blockers"] if blocker["fatal"]]
    return {**kept, "blockers": blockers}


def migration_of(organization: Mapping[str, Any]) -> int:
    """Return the number of this lane's migration: a clean-up run has it, else `plan` knows it.

    Raises:
        AirflowSkipException: nothing was recorded, because it was a dry run.
    """
    from airflow.sdk.exceptions import AirflowSkipException

    if "migration" in organization:
        return int(organization["migration"])
    ti = get_current_context()["ti"]
    planned = ti.xcom_pull(task_ids=f"{GROUP}.plan", map_indexes=ti.map_index)
    if planned["migration"] is None:
        raise AirflowSkipException("a dry run only plans; set dry_run to false to move")
    return int(planned["migration"])


@task(multiple_outputs=False, **_step("copy", max_active_tis_per_dag=COPIES_AT_ONCE))
def copy(*, organization: Mapping[str, Any]) -> dict[str, Any]:
    """Copy everything while the organization writes; a killed copy goes on from its checkpoint."""
    from cellferry.migration import steps

    number = migration_of(organization)
    with step_context() as ferry:
        return brief(steps.copy(ferry, number))


@task(multiple_outputs=False, **_step("sync", **_AFTER_SKIPPED))
def sync(*, organization: Mapping[str, Any]) -> dict[str, Any]:
    """Repeat rounds over what changed since, until a round is small."""
    from cellferry.migration import steps

    number = migration_of(organization)
    with step_context() as ferry:
        return brief(steps.sync(ferry, number))


@task(
    multiple_outputs=False,
    **_step("verify", max_active_tis_per_dag=COPIES_AT_ONCE, **_AFTER_SKIPPED),
)
def verify(*, organization: Mapping[str, Any]) -> dict[str, Any]:
    """Compare every row and key; a difference halts the migration."""
    from cellferry.migration import steps

    number = migration_of(organization)
    with step_context() as ferry:
        return brief(steps.verify(ferry, number))


@task(
    multiple_outputs=False,
    **_step("cutover", max_active_tis_per_dag=CUTOVERS_AT_ONCE, **PROMPT, **_AFTER_SKIPPED),
)
def cutover(*, organization: Mapping[str, Any]) -> dict[str, Any]:
    """Move the authority behind one barrier; its writers wait for the write pause.

    A short soak goes with it, and the clean-up of a small organization whose TTL is over then.
    """
    from cellferry.migration import steps

    airflow, number = get_current_context(), migration_of(organization)
    with ExitStack() as turn:
        # before the connections: to open them is work, too, beside somebody's barrier
        turn.enter_context(barrier_turn(try_number=airflow["ti"].try_number))
        with step_context(waited_for=True) as ferry:
            result = brief(steps.cutover(ferry, number))
            turn.close()
            give_way()
            done = ahead.after_barrier(ferry, number, ttl_s=airflow["params"]["ttl_s"])
    ahead.skip_done(airflow["ti"], GROUP, result, done)
    return result


@task(multiple_outputs=False, **_step("soak"))
def soak(*, organization: Mapping[str, Any]) -> dict[str, Any]:
    """Watch the organization at its new cell, and replay its writes to the old one."""
    from cellferry.migration import steps

    airflow, number = get_current_context(), migration_of(organization)
    with step_context() as ferry:
        result = brief(steps.soak(ferry, number))
        done = ahead.after_barrier(ferry, number, ttl_s=airflow["params"]["ttl_s"])
    ahead.skip_done(airflow["ti"], GROUP, result, done)
    return result


@task(multiple_outputs=False, **_step("cleanup", max_active_tis_per_dag=CLEAN_UPS_AT_ONCE))
def cleanup(*, organization: Mapping[str, Any]) -> dict[str, Any]:
    """Delete the old copy in paced batches, and everything that the migration made."""
    from cellferry.migration import steps

    number = migration_of(organization)
    with step_context() as ferry:
        return brief(steps.cleanup(ferry, number))


@task_group(group_id=GROUP, tooltip="One organization's move")
def move_organization(organization: Any) -> None:
    """One organization's lane through a move."""
    planned: Any = plan(organization=organization)
    copied: Any = copy(organization=organization)
    synced: Any = sync(organization=organization)
    verified: Any = verify(organization=organization)
    cut_over: Any = cutover(organization=organization)
    soaked: Any = soak(organization=organization)
    waited = TtlSensor(
        organization=organization,
        in_run=True,
        **in_lane("wait_for_ttl", is_sensor=True, **_AFTER_SKIPPED),
    )
    cleaned: Any = cleanup(organization=organization)
    planned >> copied >> synced >> verified >> cut_over >> soaked >> waited >> cleaned


@task_group(group_id=GROUP, tooltip="One organization's clean-up")
def clean_up_organization(organization: Any) -> None:
    """One retained organization's lane through its clean-up."""
    cleanup(organization=organization)
