"""The tasks of `roll_back_resharding`: back to the old owners, from wherever a re-sharding is."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow.sdk import get_current_context, task

from cellferry.errors import WrongState
from cellferry.orchestration.reshard_lane import insist_on_input
from cellferry.orchestration.retry_policy import BRIEF, PATIENT, PROMPT
from cellferry.orchestration.shard_run import (
    WAY_BACK_RUN,
    ask_connections,
    brief,
    note,
    past,
    shard_context,
)
from cellferry.orchestration.step_run import states_of

if TYPE_CHECKING:
    from cellferry.orchestration.reshard_params import RollBackReshardingRequest
    from cellferry.shards.context import Context, StepResult
    from cellferry.shards.record import Resharding

log = logging.getLogger(__name__)

STEPS = ("validate", "bring_back", "remove_copies")


def _request() -> RollBackReshardingRequest:
    from cellferry.orchestration.reshard_params import read_roll_back_resharding_request

    return read_roll_back_resharding_request(dict(get_current_context()["params"]))


@task(task_id="validate", multiple_outputs=False, **BRIEF)
def validate_way_back() -> dict[str, Any]:
    """Check the input before anything changes; return the re-sharding that is brought back.

    Fails naming every unknown Param and wrong value, an unknown set, and a set without a
    re-sharding that could be brought back.
    """
    from cellferry.orchestration.reshard_validation import check_way_back

    with shard_context() as at:
        found = check_way_back(at, _request().shard_set, str(at.actor.dag_run))
    log.info("re-sharding %d, in state %s: %s", found.id, found.state, what_is_done(found))
    return {"resharding": found.id, "summary": what_is_done(found)}


def is_rolled_back(found: Resharding) -> bool:
    """Whether the way back is that of a re-sharding past its cutover; else it is an abort."""
    from cellferry.shards.states import ENDING, Owner, ShardState

    if found.facts.get(ENDING) == "rolled_back":
        return True
    return found.state in (ShardState.DUAL_READ_NEW, ShardState.NEW) or (
        found.state is ShardState.SWITCHING and found.authority is Owner.NEW
    )


def what_is_done(found: Resharding) -> str:
    """Return in words what bringing it back means."""
    if found.ended is not None:
        return f"it was {found.ended} already".replace("_", " ")
    if is_rolled_back(found):
        return (
            "roll back: everything that changed at the new owners comes back, values wait for "
            "some milliseconds, then the copies are removed"
        )
    return "abort: the old owners have the authority; the copies are removed"


@task(multiple_outputs=False, **PROMPT)
def bring_back(*, before: Mapping[str, Any]) -> dict[str, Any]:
    """Give the authority back to the old owners, losing nothing; or abort, before the cutover.

    In a dry run: say which of them it would be, and change nothing.
    """
    request = _request()
    with shard_context(waited_for=not request.dry_run) as at:
        found = at.control.resharding(before["resharding"])
        if found.ended is not None:
            return past(found)
        if request.dry_run:
            return {"resharding": found.id, "summary": f"would {what_is_done(found)}"}
        ask_connections(at, found)
        if found.facts.get(WAY_BACK_RUN) != at.actor.dag_run:
            # the lease, too: whoever still takes it forward does no more
            note(at, found.id, "way back", {WAY_BACK_RUN: at.actor.dag_run})
        return brief(go_back(at, found.id, request.reason, request.pause_s))


def go_back(at: Context, id_: int, reason: str, pause_s: float) -> StepResult:
    """Roll back or abort, whichever fits; a cutover may end while this begins.

    Raises:
        WrongState: it can no longer be brought back.
    """
    from cellferry.shards import reshard as steps

    if is_rolled_back(at.control.resharding(id_)):
        return steps.roll_back(at, id_, reason, pause_s=pause_s)
    try:
        return steps.abort(at, id_, reason)
    except WrongState:
        if not is_rolled_back(at.control.resharding(id_)):
            raise
    return steps.roll_back(at, id_, reason, pause_s=pause_s)


@task(multiple_outputs=False, **PATIENT)
def remove_copies(*, before: Mapping[str, Any]) -> dict[str, Any]:
    """Delete the new owners' copies in paced batches, and end the re-sharding."""
    from airflow.sdk.exceptions import AirflowSkipException

    from cellferry.shards import reshard as steps
    from cellferry.shards.states import ENDING

    request = _request()
    if request.dry_run:
        raise AirflowSkipException("a dry run changes nothing; set dry_run to false to go back")
    with shard_context() as at:
        found = at.control.resharding(before["resharding"])
        if found.ended is not None:
            return past(found)
        if found.facts.get(ENDING) is None:
            raise WrongState(
                f"re-sharding {found.id} goes forward again",
                hint="trigger a new run of roll_back_resharding, if it shall go back",
                where=f"shard set {found.set_name}",
            )
        ask_connections(at, found)
        done = steps.cleanup(
            at,
            found.id,
            batch=request.clean_up_batch,
            throttle_keys_s=request.clean_up_keys_per_s,
        )
        return brief(done)


@task(task_id="report", multiple_outputs=False, trigger_rule="all_done", **BRIEF)
def report_way_back() -> dict[str, Any]:
    """Print what became of it, and fail when a step failed, saying what to do."""
    from airflow.sdk.exceptions import AirflowFailException

    from cellferry.orchestration import reshard_reporting as reporting

    airflow = get_current_context()
    ti = airflow["ti"]
    states = states_of(airflow)
    number = insist_on_input(airflow)["resharding"]
    log.info("Steps\n%s", reporting.table(reporting.step_rows(ti, states, STEPS)))
    with shard_context() as at:
        found = at.control.resharding(number)
        reporting.say_history(at, found)
    if complaint := reporting.complaint(ti, states, STEPS):
        log.error("%s", complaint)
        raise AirflowFailException(complaint)
    return {"resharding": number, "state": found.ended or str(found.state)}
