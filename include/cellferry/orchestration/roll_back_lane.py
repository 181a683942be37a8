"""The lanes of `roll_back_organizations`: back, wait for the TTL, clean up; and its own tasks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk import get_current_context, task, task_group

from cellferry.errors import CellferryError, InvalidInput
from cellferry.model import State
from cellferry.orchestration.barrier_turn import barrier_turn
from cellferry.orchestration.params import LONGEST_TTL_IN_RUN_S
from cellferry.orchestration.retry_policy import BRIEF, PROMPT
from cellferry.orchestration.run_starter import RunStarter, clean_up_request
from cellferry.orchestration.run_tasks import REST, lanes_of, organizations_of, say
from cellferry.orchestration.sensors import TtlSensor
from cellferry.orchestration.step_run import brief, states_of, step_context
from cellferry.orchestration.task_groups import GROUP, ROLL_BACKS_AT_ONCE, cleanup, in_lane

if TYPE_CHECKING:
    from airflow.sdk import Context

    from cellferry.migration import Context as Ferry

log = logging.getLogger(__name__)

ROLL_BACK_STEPS = ("roll_back", "wait_for_ttl", "cleanup")


@task(multiple_outputs=False, **BRIEF)
def validate_roll_back() -> list[dict[str, Any]]:
    """Check the whole input before anything changes; return this run's organizations.

    Fails naming every unknown Param, wrong value, unknown organization, duplicate, and
    organization that cannot be rolled back.
    """
    from cellferry.orchestration.params import read_roll_back_request
    from cellferry.orchestration.validation import split

    airflow = get_current_context()
    params = dict(airflow["params"])
    with step_context() as ferry:
        request = read_roll_back_request(params)
        found = check_roll_back(ferry, request.organizations)
    first, rest = split(found, params, airflow["dag_run"].run_id)
    airflow["ti"].xcom_push(key=REST, value=rest)
    log.info(
        "%d organizations back%s%s",
        len(found),
        ", dry run" if request.dry_run else "",
        f"; this run takes the first {len(first)}" if rest else "",
    )
    return [dict(one) for one in first]


def check_roll_back(ferry: Ferry, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the organizations called `names`, each with the migration that is rolled back.

    One that this very run has brought back is accepted, so that a run which is cleared as a whole
    goes on where it was; so is one that a roll-back which died has left half way. A run that takes
    the rest of a long list leaves out what is back by then, and lets fail in its own lane what
    cannot go back any more.

    Raises:
        InvalidInput: an organization is unknown or named twice, or cannot be rolled back. All
            faults are named.
    """
    from cellferry.migration import steps
    from cellferry.orchestration.validation import takes_rest

    later = takes_rest(str(ferry.actor.dag_run))
    faults: list[str] = []
    found: dict[str, dict[str, Any]] = {}
    named: dict[str, str] = {}
    for name in names:
        try:
            organization = ferry.topology.organization(name)
            if organization.id in found:
                faults.append(f"{name!r} and {named[organization.id]!r} are the same organization")
                continue
            migration = steps.migration_to_roll_back(ferry, organization.id)
            if not later:
                ferry.topology.may_roll_back(migration.id)
        except CellferryError as error:
            faults.append(f"{error.message} ({error.hint})" if error.hint else error.message)
            continue
        is_over = migration.state is State.ROLLED_BACK and migration.facts.get("handed_back")
        if is_over and not _took_part(ferry, migration.id):
            fault = f"{organization.slug} is back in {migration.source} already"
            if later:
                log.warning("left out: %s", fault)
            else:
                faults.append(fault)
            continue
        named[organization.id] = name
        found[organization.id] = {
            "id": organization.id,
            "slug": organization.slug,
            "migration": migration.id,
        }
    if faults:
        raise InvalidInput(
            f"{len(faults)} of {len(names)} organizations cannot be rolled back: "
            + "; ".join(faults),
            hint="correct the list and trigger a new run",
        )
    return list(found.values())


def _took_part(ferry: Ferry, migration: int) -> bool:
    return any(one.dag_run == ferry.actor.dag_run for one in ferry.topology.audit(migration))


@task(
    multiple_outputs=False,
    **in_lane("roll_back", max_active_tis_per_dag=ROLL_BACKS_AT_ONCE, **PROMPT),
)
def roll_back(*, organization: Mapping[str, Any]) -> dict[str, Any]:
    """Bring the organization back, losing nothing; its writers wait for the write pause.

    In a dry run: say what would keep it, or what would stay behind, and change nothing.
    """
    from cellferry.errors import Blocked
    from cellferry.migration import steps
    from cellferry.orchestration.params import read_roll_back_request

    airflow, number = get_current_context(), organization["migration"]
    request = read_roll_back_request(airflow["params"])
    with step_context(waited_for=not request.dry_run) as ferry:
        if not request.dry_run:
            with barrier_turn(try_number=airflow["ti"].try_number):
                return brief(steps.roll_back(ferry, number, request.reason, ttl_s=request.ttl_s))
        found = steps.examine_return(ferry, number)
        for one in found:
            complain = log.error if one.fatal else log.warning
            complain("%s: %s Remedy: %s", one.where, one.reason, one.remedy)
        fatal = [one for one in found if one.fatal]
        if fatal:
            raise Blocked(
                "; ".join(f"{one.where}: {one.reason}" for one in fatal),
                organization=organization["slug"],
                step="roll-back",
                hint="; ".join(dict.fromkeys(one.remedy for one in fatal)),
            )
    return {"migration": None, "summary": "can go back", "notes": [one.reason for one in found]}


class ReturnTtlSensor(TtlSensor):
    """Waits until the new cell's copy may go; skips after a dry run, or when that is far away."""

    def execute(self, context: Context) -> None:
        """Defer until the TTL is over, or return at once when it is."""
        from airflow.sdk.exceptions import AirflowSkipException

        from cellferry.migration import steps

        number = self.before["migration"] if self.before else None
        if number is None:
            raise AirflowSkipException("a dry run changes nothing; set dry_run to false")
        with step_context() as ferry:
            until = steps.ttl_until(ferry, number)
            left_s = (until - ferry.topology.now()).total_seconds()
        if left_s > LONGEST_TTL_IN_RUN_S:
            raise AirflowSkipException(
                f"the new cell's copy is kept until {until.isoformat()}; a clean-up run starts then"
            )
        super().execute(context)


class ReturnCleanUpStarter(RunStarter):
    """Starts the clean-up run for copies that are kept longer than this run waits.

    Asks the topology which of this run's migrations are rolled back; skipped when there are none.
    """

    def __init__(self, *, trigger_dag_id: str, **kwargs: Any) -> None:
        super().__init__(trigger_dag_id=trigger_dag_id, request={}, **kwargs)

    def execute(self, context: Context) -> None:
        """Find out what is kept, and start its clean-up."""
        if not context["params"]["dry_run"]:
            organizations = context["ti"].xcom_pull(task_ids="validate_roll_back") or []
            with step_context() as ferry:
                now = ferry.topology.now()
                migrations = [ferry.topology.migration(one["migration"]) for one in organizations]
            self.request = clean_up_request(
                [
                    one
                    for one in migrations
                    if one.ttl_until is not None
                    and (one.ttl_until - now).total_seconds() > LONGEST_TTL_IN_RUN_S
                ],
                State.ROLLED_BACK,
            )
        super().execute(context)


@task_group(group_id=GROUP, tooltip="One organization's way back")
def roll_back_organization(organization: Any) -> None:
    """One organization's lane."""
    back: Any = roll_back(organization=organization)
    waited = ReturnTtlSensor(
        organization=organization,
        before=back,
        in_run=False,
        **in_lane("wait_for_ttl", is_sensor=True),
    )
    waited >> cleanup(organization=organization)


@task(multiple_outputs=False, trigger_rule="all_done", **BRIEF)
def report_roll_back() -> dict[str, int]:
    """Print what became of each organization, and fail when one failed, saying what to do."""
    airflow = get_current_context()
    organizations = organizations_of(airflow, "validate_roll_back")
    states = states_of(airflow)
    lanes = lanes_of(airflow, organizations, ROLL_BACK_STEPS, states)
    with step_context() as ferry:
        migrations = [ferry.topology.migration(one["migration"]) for one in organizations]
    from cellferry.orchestration import reporting

    rows = [
        reporting.roll_back_row(lane, migration, dry_run=airflow["params"]["dry_run"])
        for lane, migration in zip(lanes, migrations, strict=True)
    ]
    return say(states, lanes, rows)
