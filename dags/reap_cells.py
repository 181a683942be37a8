"""Finish what controllers that died left behind, and remove what nobody owns.

**What it does.** Every minute: an organization that a killed task left frozen is served again,
before the flip by the old cell, after it by the new one; gates that a failover or a restart of a
cell lost are put back; aborts that died are finished; gates, logs, leases, checkpoints and users
that no migration owns are removed. The budgets of key logs and the cells' error rates are looked
at, too. With nothing to do it is shown as skipped. It **fails** when something needs a person, or a
cell does not answer, and says what; the rest was done all the same.

**When not to run it.** It disturbs no running move. Pausing this DAG means that a frozen
organization waits until somebody repeats the step; `cellferry reap` does the same without Airflow.

**Input.** None is required. `dry_run` only says what would be done. Example:

    {"dry_run": true}

**How it resumes.** Each run looks anew; one at a time, whoever started it.
"""

from __future__ import annotations

from datetime import timedelta

import pendulum
from airflow.sdk import dag

from cellferry.orchestration.params import reap_cells_params
from cellferry.orchestration.reap_tasks import reap


@dag(
    dag_id="reap_cells",
    dag_display_name="Reap cells",
    description="Finish what controllers that died left behind, and remove what nobody owns.",
    doc_md=__doc__,
    schedule=timedelta(minutes=1),
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    catchup=False,
    max_active_runs=1,
    params=reap_cells_params(),
    is_paused_upon_creation=False,
    tags=["cellferry"],
)
def reap_cells() -> None:
    """One task."""
    reap()


reap_cells()
