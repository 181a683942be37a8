"""Stop and go: pause, resume or abort migrations, halt organizations, cohorts and cells.

**What it does.** One action, for each organization, cohort or cell that is named, in a task of its
own:

- *pause*: running steps stop at their next batch; the organization goes on where it is, and
  checkpoints and key log are kept. A cutover that has begun ends first. Of a retained migration
  the clean-up waits. A key log over its budget is given up; after the resume everything is compared
  and repaired.
- *resume*: what was paused may go on. Then clear the failed task of its run.
- *abort*: before the flip. The source serves on, the copy is deleted.
- *halt*: as pause, for organizations, whole cohorts or cells, and nothing new starts. Sticky.
- *clear-halt*: by a person who has looked at the cause. Then clear the failed tasks.

cellferry itself halts a migration and its cohort when the cells differ, a cohort when too many of
its organizations failed or a write pause was over its budget, a migration when its key log is over
its budget, and a cell when its error rate rises (if cells.yaml says so).

**When not to run it.** To bring an organization back after its flip: that is a roll-back. *abort*
deletes the copy; to wait, *pause*.

**Input.** Required: `action`, `reason` (it goes into the audit), and at least one organization,
cohort or cell. Example:

    {"action": "pause", "reason": "release tonight", "organizations": ["acme", "globex"]}

**How it resumes.** Every action may be repeated; clear a failed task.
"""

from __future__ import annotations

from airflow.sdk import dag

from cellferry.orchestration.params import steer_organizations_params
from cellferry.orchestration.steering import report_steering, steer, validate_steering


@dag(
    dag_id="steer_organizations",
    dag_display_name="Pause, resume, abort, halt",
    description="Pause, resume or abort migrations; halt organizations, cohorts and cells.",
    doc_md=__doc__,
    schedule=None,
    params=steer_organizations_params(),
    max_active_runs=8,
    is_paused_upon_creation=False,
    tags=["cellferry"],
)
def steer_organizations() -> None:
    """Wire one task for each target between the check and the report."""
    steer.expand(target=validate_steering()) >> report_steering()


steer_organizations()
