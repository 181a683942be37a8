"""Move organizations to another cell while they keep working.

**What it does.** For each organization, in a lane of its own:
`plan → copy → sync → verify → cutover → soak → wait_for_ttl → cleanup`. The organization keeps
writing at its old cell until the cutover, whose write pause is bounded by the pause budget. The
lanes are independent: one may fail while the others go on. The last task, `report`, prints a
table, and fails when an organization failed.

Short steps run in fewer tasks: `plan` also copies and verifies a small organization (up to 10,000
rows and keys), `cutover` also does a soak of up to two seconds, and a small organization's clean-up
that is due. The tasks of the steps that are done are shown as skipped. What cannot be done ahead is
left to its own task.

**Dry run is the default.** Then only `plan` runs: it says what would move, how much, how long,
how long the write pause, and what blocks it, and changes nothing.

**When not to run it.** While a deployment changes the application's schema; towards a cell that
`prepare_cell` has not prepared (`plan` refuses that); towards a cell in another region than the
organization's contract allows (nobody checks that yet).

**Input.** Required: `organizations` (ids or slugs), `destination` (a cell). To move, set
`dry_run` to false. Example:

    {"organizations": ["acme", "globex"], "destination": "cell-2", "dry_run": false}

The first task, `validate`, checks everything before anything changes, and names each unknown
Param, organization or cell. More than 25 organizations are split: this run takes the first 25 and
starts another one for the rest.

**How it resumes.** Every task may be retried or cleared. A failed organization is repeated alone:
clear its failed task (with its map index) and downstream; it goes on from its checkpoints. A task
that fails at once needs a person (its last log lines say what to do); others are retried with
back-off. A run that is cleared as a whole goes on with the migrations that it began.

**Afterwards.** With a TTL of at most an hour the run waits for its end and deletes the old
copies. With a longer one it ends when they are *retained*, and starts a run of
`clean_up_organizations` for the end of the TTL.
"""

from __future__ import annotations

from airflow.sdk import dag

from cellferry.orchestration.params import migrate_organizations_params
from cellferry.orchestration.reporting import START_CLEAN_UP_RUN, START_NEXT_RUN
from cellferry.orchestration.retry_policy import PATIENT
from cellferry.orchestration.run_starter import CleanUpStarter, RunStarter
from cellferry.orchestration.run_tasks import REST, report, validate
from cellferry.orchestration.task_groups import move_organization


@dag(
    dag_id="migrate_organizations",
    dag_display_name="Migrate organizations",
    description="Move organizations to another cell while they keep working.",
    doc_md=__doc__,
    schedule=None,
    params=migrate_organizations_params(),
    max_active_runs=8,
    is_paused_upon_creation=False,
    render_template_as_native_obj=False,
    tags=["cellferry"],
)
def migrate_organizations() -> None:
    """Wire the lanes between the check and the report."""
    organizations = validate()
    lanes = move_organization.expand(organization=organizations)
    next_run = RunStarter(
        task_id=START_NEXT_RUN,
        trigger_dag_id="migrate_organizations",
        request=organizations[REST],
        **PATIENT,
    )
    clean_up_run = CleanUpStarter(
        task_id=START_CLEAN_UP_RUN,
        trigger_dag_id="clean_up_organizations",
        trigger_rule="all_done",
        **PATIENT,
    )
    reported = report()
    lanes >> clean_up_run >> reported
    lanes >> reported
    next_run >> reported


migrate_organizations()
