"""Delete the old copies of moved organizations when their TTL is over.

**What it does.** For each migration whose TTL is over, in a lane of its own: `cleanup`, as in
`migrate_organizations`, which starts a run of this DAG, for the end of the TTL, when the TTL is
longer than an hour. Waits for TTLs of at most ten minutes more; those that last longer get a later
run of this DAG. Deletes in paced batches, only this organization's data, only
while the old cell's gate says that this very migration moved it away.

**When not to run it.** There is no harm in running it too early: TTLs are asked of the topology's
clock. After it an organization can no longer go back without being moved again.

**Input.** Required: `migrations`, the numbers that `cellferry status` shows. Those that are cleaned
already are left out. Example:

    {"migrations": [17, 18]}

**How it resumes.** Every task may be retried or cleared; a failed one is repeated alone, as in
`migrate_organizations`.
"""

from __future__ import annotations

from airflow.sdk import dag

from cellferry.orchestration.params import clean_up_organizations_params
from cellferry.orchestration.reporting import START_NEXT_RUN
from cellferry.orchestration.retry_policy import PATIENT
from cellferry.orchestration.run_starter import RunStarter
from cellferry.orchestration.run_tasks import REST, report_clean_up, validate_clean_up
from cellferry.orchestration.sensors import LatestTtlSensor
from cellferry.orchestration.task_groups import clean_up_organization


@dag(
    dag_id="clean_up_organizations",
    dag_display_name="Clean up organizations",
    description="Delete the old copies of moved organizations when their TTL is over.",
    doc_md=__doc__,
    schedule=None,
    params=clean_up_organizations_params(),
    # one at a time: two runs that name the same migration must not take it from each other
    max_active_runs=1,
    is_paused_upon_creation=False,
    tags=["cellferry"],
)
def clean_up_organizations() -> None:
    """Wire the lanes between the check and the report."""
    needed = validate_clean_up()
    waited = LatestTtlSensor(task_id="wait_for_ttl", migrations=needed, **PATIENT)
    next_run = RunStarter(
        task_id=START_NEXT_RUN,
        trigger_dag_id="clean_up_organizations",
        request=needed[REST],
        **PATIENT,
    )
    reported = report_clean_up()
    waited >> clean_up_organization.expand(organization=needed) >> reported
    next_run >> reported


clean_up_organizations()
