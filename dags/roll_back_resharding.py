"""Bring a re-sharding back to the shards it came from, losing nothing.

**What it does.** `bring_back → remove_copies`. After the cutover: everything that changed at the
new owners comes back, values and counters wait for milliseconds, claims go on, and the old owners
have the authority again. Before the cutover: the re-sharding is aborted. Then the copies are
deleted, and it ends. The last task, `report`, prints what happened, and fails when something
failed.

**Dry run is the default.** Then it only says where the re-sharding is and what would be done.

**When not to run it.** It works until the clean-up has begun. Afterwards run `reshard` with the
shards as they were. From a new shard that does not answer nothing can be brought back.

**Input.** Required: `shard_set` and `reason`. To go back, set `dry_run` to false. Example:

    {"shard_set": "dedup", "reason": "the hit ratio fell since the cutover", "dry_run": false}

**How it resumes.** Every task may be retried or cleared. It takes the work away from a run of
`reshard` that is still under way: the next task of that one fails and says so. Until the authority
is back the new owners serve on.
"""

from __future__ import annotations

from typing import Any

from airflow.sdk import dag

from cellferry.orchestration.reshard_params import roll_back_resharding_params
from cellferry.orchestration.reshard_return import (
    bring_back,
    remove_copies,
    report_way_back,
    validate_way_back,
)


@dag(
    dag_id="roll_back_resharding",
    dag_display_name="Roll a re-sharding back",
    description="Bring a re-sharding back to the shards it came from, losing nothing.",
    doc_md=__doc__,
    schedule=None,
    params=roll_back_resharding_params(),
    max_active_runs=4,
    is_paused_upon_creation=False,
    render_template_as_native_obj=False,
    tags=["cellferry"],
)
def roll_back_resharding() -> None:
    """Wire the steps between the check and the report."""
    back: Any = bring_back(before=validate_way_back())
    removed: Any = remove_copies(before=back)
    reported: Any = report_way_back()
    removed >> reported


roll_back_resharding()
