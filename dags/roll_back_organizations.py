"""Bring organizations back to the cell they came from, losing nothing.

**What it does.** For each organization, in a lane of its own:
`roll_back → wait_for_ttl → cleanup`. Everything that it wrote since the cutover comes back: the
same short write pause as a cutover, in the other direction. Then the new cell's copy waits for its
TTL, and is deleted. The last task, `report_roll_back`, prints a table, and fails when an
organization failed.

**Dry run is the default.** Then it only says what would keep each organization, or stay behind.

**When not to run it.** It works from the cutover to the clean-up of the old copy, and needs both
cells: from a cell that does not answer nothing can be brought back. Not while a deployment changes
the application's schema in one of the cells (it refuses that).

**Input.** Required: `organizations` (ids or slugs) and `reason`. To go back, set `dry_run` to
false. Example:

    {"organizations": ["acme"], "reason": "errors since the move", "dry_run": false}

The first task checks everything before anything changes. More than 25 organizations are split:
this run takes the first 25 and starts another one for the rest.

**How it resumes.** Every task may be retried or cleared. Until the route is back the new cell
serves on, and the migration stays paused, so that no clean-up takes the way back away: clear the
failed task, or, if the organization shall stay, resume the migration (`cellferry resume`).

**Afterwards.** With a TTL of at most an hour the run waits for its end and deletes the new cell's
copy. With a longer one it ends, and starts a run of `clean_up_organizations` for the end of the
TTL. Until then the organization may move to any other cell, but not to this one.
"""

from __future__ import annotations

from airflow.sdk import dag

from cellferry.orchestration.params import roll_back_organizations_params
from cellferry.orchestration.reporting import START_CLEAN_UP_RUN, START_NEXT_RUN
from cellferry.orchestration.retry_policy import PATIENT
from cellferry.orchestration.roll_back_lane import (
    ReturnCleanUpStarter,
    report_roll_back,
    roll_back_organization,
    validate_roll_back,
)
from cellferry.orchestration.run_starter import RunStarter
from cellferry.orchestration.run_tasks import REST


@dag(
    dag_id="roll_back_organizations",
    dag_display_name="Roll organizations back",
    description="Bring organizations back to the cell they came from, losing nothing.",
    doc_md=__doc__,
    schedule=None,
    params=roll_back_organizations_params(),
    # More than of moves: a run whose copies are kept for an hour waits for that, and the next
    # emergency must not wait with it. Its work is bounded by what goes back at once.
    max_active_runs=32,
    is_paused_upon_creation=False,
    render_template_as_native_obj=False,
    tags=["cellferry"],
)
def roll_back_organizations() -> None:
    """Wire the lanes between the check and the report."""
    organizations = validate_roll_back()
    lanes = roll_back_organization.expand(organization=organizations)
    next_run = RunStarter(
        task_id=START_NEXT_RUN,
        trigger_dag_id="roll_back_organizations",
        request=organizations[REST],
        **PATIENT,
    )
    clean_up_run = ReturnCleanUpStarter(
        task_id=START_CLEAN_UP_RUN,
        trigger_dag_id="clean_up_organizations",
        trigger_rule="all_done",
        **PATIENT,
    )
    reported = report_roll_back()
    lanes >> clean_up_run >> reported
    lanes >> reported
    next_run >> reported


roll_back_organizations()
