"""Keep the old cells of retained organizations up to date, so that a way back stays short.

**What it does.** Every minute: one reverse round for each retained migration, from the new cell
back to the gated old one. So the new cell's key log stays short, and a switchback is quick. At
most `at_most` migrations in one run, in turn. With none it costs one query, and is shown as
skipped.

**When not to run it.** Pausing this DAG loses nothing; the logs grow meanwhile. A migration whose
TTL is nearly over is left to its clean-up.

**Input.** None is required. `at_most` bounds one run. Example:

    {"at_most": 50}

**How it resumes.** The next run goes on; a failed round is repeated then.
"""

from __future__ import annotations

from datetime import timedelta

import pendulum
from airflow.sdk import dag

from cellferry.orchestration.cell_tasks import replay_back
from cellferry.orchestration.params import reverse_rounds_params


@dag(
    dag_id="reverse_rounds",
    dag_display_name="Reverse rounds",
    description="Keep the old cells of retained organizations able to take them back.",
    doc_md=__doc__,
    schedule=timedelta(minutes=1),
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    catchup=False,
    max_active_runs=1,
    params=reverse_rounds_params(),
    is_paused_upon_creation=False,
    tags=["cellferry"],
)
def reverse_rounds() -> None:
    """One task."""
    replay_back()


reverse_rounds()
