"""The tasks of `reshard`, one for each step, and one for each source shard of the copy.

A task returns ids and a line for people; the next one takes that as `before`. Truth is in the
topology and at the shards, so every task may be repeated, cleared or killed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import get_current_context, task

from cellferry.errors import Blocked
from cellferry.orchestration.retry_policy import BRIEF, PATIENT, PROMPT
from cellferry.orchestration.sensors import MomentSensor
from cellferry.orchestration.shard_run import (
    RUN,
    brief,
    going_on,
    is_past_the_cutover,
    note,
    past,
    shard_context,
)
from cellferry.orchestration.step_run import FAILURE, states_of

if TYPE_CHECKING:
    from airflow.sdk import Context

    from cellferry.orchestration.reshard_params import ReshardRequest
    from cellferry.shards.plan import Plan
    from cellferry.shards.record import Resharding

log = logging.getLogger(__name__)

#: Tasks of a run, in order.
STEPS = (
    *("validate", "plan", "approve_copy", "begin", "copy", "dual_write", "catch_up", "verify"),
    *("approve_cutover", "cutover", "watch", "wait_for_ttl", "cleanup"),
)
#: Sources that are copied at once, over all runs: each keeps a processor busy.
COPIES_AT_ONCE = 4
#: What else than trying again may be done about a step that failed.
WAY_OUT = "; or trigger roll_back_resharding, which loses nothing"
#: XCom key of a plan's figures.
PLAN = "plan"


def _request() -> ReshardRequest:
    from cellferry.orchestration.reshard_params import read_reshard_request

    return read_reshard_request(dict(get_current_context()["params"]))


@task(task_id="validate", multiple_outputs=False, **BRIEF)
def validate_reshard() -> dict[str, Any]:
    """Check the whole input before anything changes; return the set as it is wanted.

    Fails naming every unknown Param and wrong value, an unknown set or connection, shards that
    cannot be read or share a server, and another re-sharding of the set.
    """
    from cellferry.orchestration.reshard_validation import check_reshard_request

    ti = get_current_context()["ti"]
    with shard_context() as at:
        request = _request()
        target, found = check_reshard_request(
            at, request, str(at.actor.dag_run), lambda run: _is_running(ti, run)
        )
    log.info(
        "%s to the shards %s%s",
        request.shard_set,
        ", ".join(f"{name}={one}" for name, one in target.connections.items()),
        ", dry run" if request.dry_run else "",
    )
    if found is not None:
        log.info("re-sharding %d goes on, in state %s", found.id, found.ended or found.state)
    return {"target": target.document(), "resharding": found.id if found else None}


def _is_running(ti: Any, dag_run: str) -> bool:
    dag_id, _, run_id = dag_run.partition("/")
    try:
        return str(ti.get_dagrun_state(dag_id, run_id)) in ("running", "queued")
    except Exception as error:  # noqa: BLE001 - a run that was deleted, in whatever words
        log.info("nothing is known of the run %s: %s", dag_run, error)
        return False


@task(multiple_outputs=False, **PATIENT)
def plan(*, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Look at every shard and change nothing: what would move, how long, what speaks against it.

    Fails when something blocks it, in a dry run, too.
    """
    from cellferry.orchestration import reshard_reporting
    from cellferry.shards.plan import Plan
    from cellferry.shards.settings import ShardSet

    with shard_context() as at:
        if wanted["resharding"] is not None:
            found = going_on(at, wanted["resharding"])
            planned = Plan.from_document(found.plan)
            log.info("re-sharding %d goes on by its own plan, of %s", found.id, planned.made_at)
        else:
            planned = _plan(at, ShardSet.from_document(wanted["target"]), _request())
        checks = reshard_reporting.plan_checks(planned, at.control.clients(planned.old.name))
        reshard_reporting.say_plan(planned, checks)
        people = reshard_reporting.plan_for_people(planned, checks)
        get_current_context()["ti"].xcom_push(key=PLAN, value=people)
        planned.refuse()
    return {
        **wanted,
        "hash": planned.hash,
        "summary": reshard_reporting.describe_plan(people),
    }


def _plan(at: Any, target: Any, request: ReshardRequest) -> Plan:
    from cellferry.shards import reshard as steps

    # asked for here: the plan asks in threads, and Airflow answers the main thread
    at.urls(at.control.set(target.name), target)
    return steps.plan(
        at,
        target,
        throttle_keys_s=request.keys_per_s,
        sample=request.sample,
        headroom=request.headroom,
    )


class Approval(HITLOperator):
    """Asks a person, when the run's `approval` says so; rejected, the step after it is skipped.

    Not Airflow's `ApprovalOperator`: that one leaves no word of who rejected, for the report.

    Args:
        asked_for: values of `approval` with which this one asks.
        before: result of the step before; handed on, with who approved it.
    """

    template_fields: Sequence[str] = ("subject", "body", "before")

    APPROVE = "Approve"
    REJECT = "Reject"

    def __init__(
        self, *, asked_for: Sequence[str], before: Mapping[str, Any], **kwargs: Any
    ) -> None:
        super().__init__(options=[self.APPROVE, self.REJECT], **kwargs)
        self.asked_for = asked_for
        self.before = before

    def execute(self, context: Context) -> Any:
        """Wait for an answer, or return at once."""
        params = context["params"]
        if params["dry_run"] or params["approval"] not in self.asked_for:
            self.log.info("nobody asked for an approval here")
            return dict(self.before)
        self.subject = f"{self.subject}: {params['shard_set']}"
        self.body = self._say(context)
        return super().execute(context)

    def _say(self, context: Context) -> str:
        plan_made: Mapping[str, Any] = context["ti"].xcom_pull(task_ids="plan", key=PLAN)
        lines = [str(self.before["summary"]), ""]
        lines += [f"- {'✓' if ok else '✗'} {name}" for name, ok in plan_made["checks"]]
        lines += [f"- {old} → {new}: {keys:,} keys" for old, new, keys in plan_made["pairs"]]
        return "\n".join(lines)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> Any:
        """Hand on what was answered."""
        answer = super().execute_complete(context, event)
        user = answer["responded_by_user"] or {}
        chosen = answer["chosen_options"][0]
        who = user.get("name") or "somebody"
        self.log.info("%s by %s", chosen, who)
        return {
            **self.before,
            "answer": chosen,
            "answered_by": who,
            "summary": f"{chosen} by {who}",
        }


def insist_on_approval(before: Mapping[str, Any]) -> None:
    """Skip the present task, and with it what follows, when a person rejected it."""
    from airflow.sdk.exceptions import AirflowSkipException

    if before.get("answer") == Approval.REJECT:
        raise AirflowSkipException(str(before["summary"]))


@task(multiple_outputs=False, **PATIENT)
def begin(*, before: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Record the re-sharding; return a lane for each source shard. A dry run ends here.

    The plan is made anew, and must say of every key what the one before said.
    """
    from airflow.sdk.exceptions import AirflowSkipException

    from cellferry.shards import reshard as steps
    from cellferry.shards.plan import Plan
    from cellferry.shards.settings import ShardSet

    request = _request()
    if request.dry_run:
        raise AirflowSkipException("a dry run only plans; set dry_run to false to re-shard")
    insist_on_approval(before)
    with shard_context() as at:
        target = ShardSet.from_document(before["target"])
        found = at.control.live(target.name)
        if before["resharding"] is not None:
            found = going_on(at, before["resharding"])
        if found is not None and found.ended is not None:
            raise AirflowSkipException(f"re-sharding {found.id} is {found.ended} already")
        if found is not None and Plan.from_document(found.plan).hash == before["hash"]:
            going_on(at, found.id)  # a try before this one began it, or it is gone on with
            log.info("re-sharding %d goes on, in state %s", found.id, found.state)
        else:
            planned = _plan(at, target, request)
            if planned.hash != before["hash"]:
                raise Blocked(
                    "the set has changed since the plan was made",
                    hint="clear plan and downstream, and look at the new plan",
                    where=f"shard set {target.name}",
                )
            result = steps.begin(at, planned, ttl_s=request.ttl_s)
            log.info("%s", result.summary)
            found = at.control.resharding(result.id)
        mine = {RUN: at.actor.dag_run}
        if "answered_by" in before:
            mine["approved_copy"] = before["answered_by"]
        if any(found.facts.get(name) != value for name, value in mine.items()):
            note(at, found.id, "begin", mine)
    return lanes(found, request.keys_per_s)


def lanes(found: Resharding, keys_per_s: float | None) -> list[dict[str, Any]]:
    """Return what each instance of the copy is to do: one source and its new owners."""
    from cellferry.shards.copier import shares
    from cellferry.shards.plan import Plan

    planned = Plan.from_document(found.plan)
    rates = shares(planned, keys_per_s)
    return [
        {
            "resharding": found.id,
            "shard": shard,
            "name": f"{shard} → {', '.join(planned.destinations(shard))}",
            "keys": planned.keys_from(shard),
            "keys_per_s": rates[shard],
        }
        for shard in planned.sources
    ]


@task(
    multiple_outputs=False,
    map_index_template="{{ task.op_kwargs['lane']['name'] }}",
    max_active_tis_per_dag=COPIES_AT_ONCE,
    **PATIENT,
)
def copy(*, lane: Mapping[str, Any]) -> dict[str, Any]:
    """Copy what moves from one source shard to its new owners; a killed copy goes on."""
    from cellferry.shards import reshard as steps

    with shard_context() as at:
        found = going_on(at, lane["resharding"])
        if is_past_the_cutover(found):
            return {**past(found), "lane": lane["name"]}
        rate = lane["keys_per_s"]
        done = steps.copy(at, found.id, lane["shard"], throttle_keys_s=rate)
        return {**brief(done), "lane": lane["name"]}


@task(multiple_outputs=False, **PATIENT)
def dual_write(*, before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Let clients write claims at both owners, and wait until every one of them does."""
    from cellferry.shards import reshard as steps

    with shard_context() as at:
        found = going_on(at, before[0]["resharding"])
        return past(found) if is_past_the_cutover(found) else brief(steps.dual_write(at, found.id))


@task(multiple_outputs=False, **PATIENT)
def catch_up(*, before: Mapping[str, Any]) -> dict[str, Any]:
    """Compare everything, bring over what differs, and follow until little is left."""
    from cellferry.shards import reshard as steps

    with shard_context() as at:
        found = going_on(at, before["resharding"])
        return past(found) if is_past_the_cutover(found) else brief(steps.catch_up(at, found.id))


@task(multiple_outputs=False, **PATIENT)
def verify(*, before: Mapping[str, Any]) -> dict[str, Any]:
    """Compare value and expiry of every moved key with its copy; a difference ends the run."""
    from cellferry.shards import reshard as steps

    with shard_context() as at:
        found = going_on(at, before["resharding"])
        return past(found) if is_past_the_cutover(found) else brief(steps.verify(at, found.id))


@task(multiple_outputs=False, **PROMPT)
def cutover(*, before: Mapping[str, Any]) -> dict[str, Any]:
    """Give the authority to the new owners, after the check list; values wait for milliseconds."""
    from cellferry.orchestration.reshard_reporting import say_checks
    from cellferry.shards import reshard as steps
    from cellferry.shards.check_list import check
    from cellferry.shards.states import ShardState

    insist_on_approval(before)
    with shard_context(waited_for=True) as at:
        found = going_on(at, before["resharding"])
        if found.ended is not None:
            return past(found)
        who = before.get("answered_by")
        if who is not None and found.facts.get("approved_cutover") != who:
            note(at, found.id, "cutover", {"approved_cutover": who})
        if found.state is ShardState.DUAL_READ_OLD:
            say_checks(check(at, found.id))
        return brief(steps.cutover(at, found.id, pause_s=_request().pause_s))


@task(multiple_outputs=False, **PATIENT)
def watch(*, before: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the clients' hit ratio and errors with before; then end the double writing."""
    from cellferry.shards import reshard as steps
    from cellferry.shards.watch import Limits

    with shard_context() as at:
        found = going_on(at, before["resharding"])
        if found.ended is not None:
            return past(found)
        request = _request()
        limits = Limits(request.hit_ratio_drop, request.error_rise, request.least_claims)
        return brief(steps.watch(at, found.id, seconds=request.watch_s, limits=limits))


class ShardTtlSensor(MomentSensor):
    """Waits until the old owners' copies may go: an absolute time kept in the topology.

    Args:
        before: result of the step before, with the re-sharding's number.
    """

    template_fields: Sequence[str] = ("before",)

    def __init__(self, *, before: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.before = before

    def execute(self, context: Context) -> None:  # noqa: ARG002 - Airflow's signature
        """Defer until the TTL is over, or return at once when it is."""
        from cellferry.shards.reshard import seconds_to_wait

        with shard_context() as at:
            found = at.control.resharding(self.before["resharding"])
            left_s = seconds_to_wait(found)
        if found.ended is None and found.ttl_until is not None:
            self.wait(left_s, found.ttl_until)


@task(multiple_outputs=False, **PATIENT)
def cleanup(*, before: Mapping[str, Any]) -> dict[str, Any]:
    """Delete the old owners' copies in paced batches, and end the re-sharding.

    Only keys that exist at their new owner, or have expired, unless `delete_kept` is on.
    """
    from cellferry.shards import reshard as steps

    with shard_context() as at:
        found = going_on(at, before["resharding"])
        if found.ended is not None:
            return past(found)
        request = _request()
        done = steps.cleanup(
            at,
            found.id,
            batch=request.clean_up_batch,
            throttle_keys_s=request.clean_up_keys_per_s,
            delete_kept=request.delete_kept,
        )
        if done.facts.get("kept"):
            log.warning("kept, among others: %s", ", ".join(done.facts["kept_names"][:5]))
        return brief(done)


@task(multiple_outputs=False, trigger_rule="all_done", **BRIEF)
def report() -> dict[str, Any]:
    """Print what became of each step, and fail when one failed, saying what to do."""
    from airflow.sdk.exceptions import AirflowFailException

    from cellferry.orchestration import reshard_reporting as reporting
    from cellferry.orchestration.reshard_validation import of_run

    airflow = get_current_context()
    ti = airflow["ti"]
    states = states_of(airflow)
    insist_on_input(airflow)
    made = ti.xcom_pull(task_ids="plan", key=PLAN)
    if made is not None:
        log.info("Plan: %s\n%s", reporting.describe_plan(made), reporting.table(
            reporting.pair_rows(made)
        ))  # fmt: skip
    log.info("Steps\n%s", reporting.table(reporting.step_rows(ti, states, STEPS)))
    dry_run = airflow["params"]["dry_run"]
    state = "not begun"
    if not dry_run:
        with shard_context() as at:
            found = of_run(at, airflow["params"]["shard_set"], RUN, str(at.actor.dag_run))
            if found is not None:
                reporting.say_history(at, found)
                state = found.ended or str(found.state)
    if complaint := reporting.complaint(ti, states, STEPS, WAY_OUT):
        log.error("%s", complaint)
        raise AirflowFailException(complaint)
    for step in ("approve_copy", "approve_cutover"):
        said = ti.xcom_pull(task_ids=step) or {}
        if said.get("answer") == Approval.REJECT:
            log.warning(
                "%s: %s. To be asked again, clear %s and downstream%s.",
                step,
                said["summary"],
                step,
                "" if step == "approve_copy" else f"{WAY_OUT}; clients write at both owners",
            )
            state += ", rejected"
    return {"state": "dry run" if dry_run else state}


def insist_on_input(airflow: Any) -> Any:
    """Return what the first task found, or fail because the input was refused."""
    from airflow.sdk.exceptions import AirflowFailException

    found = airflow["ti"].xcom_pull(task_ids="validate")
    if found is not None:
        return found
    failure = airflow["ti"].xcom_pull(task_ids="validate", key=FAILURE) or {}
    complaint = f"nothing was changed: {failure.get('message', 'validate failed')}"
    if failure.get("remedy"):
        complaint += f"\nRemedy: {failure['remedy']}"
    log.error("%s", complaint)
    raise AirflowFailException(complaint)
