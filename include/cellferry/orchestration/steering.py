"""Tasks of `steer_organizations`: pause, resume, abort, halt and clear a halt, from the UI."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow.sdk import get_current_context, task

from cellferry.errors import InvalidInput
from cellferry.orchestration.retry_policy import BRIEF, PATIENT
from cellferry.orchestration.step_run import FAILURE, brief, describe_failure, step_context

if TYPE_CHECKING:
    from cellferry.migration import Context
    from cellferry.migration.result import StepResult

log = logging.getLogger(__name__)

#: Actions that cohorts and cells know, too.
HALTING = frozenset({"halt", "clear-halt"})


@task(multiple_outputs=False, **BRIEF)
def validate_steering() -> list[dict[str, Any]]:
    """Check the whole input before anything changes; return what is to be steered."""
    from cellferry.orchestration.params import refuse_unknown, steer_organizations_params

    params = dict(get_current_context()["params"])
    with step_context() as ferry:
        refuse_unknown(params, steer_organizations_params())
        targets = find_targets(ferry, params)
    log.info("%s: %s", params["action"], ", ".join(one["name"] for one in targets))
    return targets


def find_targets(ferry: Context, params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each organization, cohort and cell that `params` names, with its migration.

    Raises:
        InvalidInput: none is named, one is unknown or has never moved, or the action is not for
            cohorts and cells. All faults are named.
    """
    faults: list[str] = []
    targets: list[dict[str, Any]] = []
    if not params["reason"].strip():
        faults.append("a reason is needed")
    if params["action"] not in HALTING and (params["cohorts"] or params["cells"]):
        faults.append(f"{params['action']} is for organizations, not for cohorts and cells")
    for name in params["organizations"]:
        try:
            organization = ferry.topology.organization(name)
        except InvalidInput as error:
            faults.append(f"{error.message} ({error.hint})" if error.hint else error.message)
            continue
        live = ferry.topology.live_migration(organization.id)
        moves = [live] if live else ferry.topology.migrations(org=organization.id, limit=1)
        if not moves:
            faults.append(f"{organization.slug} has never moved")
            continue
        targets.append(
            {"scope": "organization", "name": organization.slug, "migration": moves[0].id}
        )
    targets += [
        {"scope": scope, "name": name, "migration": None}
        for scope in ("cohort", "cell")
        for name in params[f"{scope}s"]
    ]
    if not targets and not faults:
        faults.append("nothing is named")
    if faults:
        raise InvalidInput("; ".join(faults), hint="correct the Params and trigger a new run")
    return targets


@task(
    task_id="steer",
    multiple_outputs=False,
    map_index_template="{{ task.op_kwargs['target']['name'] }}",
    **PATIENT,
)
def steer(*, target: Mapping[str, Any]) -> dict[str, Any]:
    """Do it to one organization, cohort or cell; may be repeated."""
    params = get_current_context()["params"]
    with step_context() as ferry:
        return brief(steer_one(ferry, params["action"], target, params["reason"]))


def steer_one(ferry: Context, action: str, target: Mapping[str, Any], reason: str) -> StepResult:
    """Do `action` to one target.

    Raises:
        InvalidInput: there is no such action.
        WrongState: it is too late for it.
    """
    from cellferry.migration import steps

    if action == "halt":
        return steps.halt(ferry, target["scope"], target["name"], reason)
    if action == "clear-halt":
        return steps.clear_halt(ferry, target["scope"], target["name"], reason)
    actions = {"pause": steps.pause, "resume": steps.resume, "abort": steps.abort}
    if action not in actions:
        raise InvalidInput(f"there is no action {action!r}", hint=f"choose one of {list(actions)}")
    return actions[action](ferry, target["migration"], reason)


@task(multiple_outputs=False, trigger_rule="all_done", **BRIEF)
def report_steering() -> dict[str, int]:
    """Print what became of each and what is halted now, and fail when one failed."""
    from airflow.sdk.exceptions import AirflowFailException

    from cellferry.orchestration import reporting

    airflow = get_current_context()
    ti = airflow["ti"]
    targets = ti.xcom_pull(task_ids="validate_steering")
    if targets is None:
        failure = ti.xcom_pull(task_ids="validate_steering", key=FAILURE) or {}
        raise AirflowFailException(
            f"nothing was changed: {failure.get('message', 'see the log of validate_steering')}"
        )
    rows, failed = [], []
    for index, target in enumerate(targets):
        done = ti.xcom_pull(task_ids="steer", map_indexes=index)
        outcome = done["summary"] if done else "FAILED"
        if done is None:
            failed.append(describe_failure(ti, "steer", index, target["name"]))
        rows.append({"what": f"{target['scope']} {target['name']}", "outcome": outcome})
    log.info("Report\n%s", reporting.table(rows))
    with step_context() as ferry:
        reporting.say_halts(ferry)
    if failed:
        raise AirflowFailException("\n".join(failed))
    return {"steered": len(targets), "failed": 0}
