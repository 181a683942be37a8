"""Change the shards of a consistent-hash store while its clients go on.

**What it does.** `plan → approve → begin → copy → dual_write → catch_up → verify → approve →
cutover → watch → wait_for_ttl → cleanup`. `copy` is one task for each source shard, named by where
its keys go. Clients (`ShardedStore`) follow by themselves: each state is acknowledged by every one
of them before the next. At the cutover values and counters wait for milliseconds; claims go on.
The last task, `report`, prints every step and the history, and fails when something failed.

**Dry run is the default.** Then only `plan` runs: it says what would move, each shard's load
before and after, and the check list with what speaks against it, and changes nothing.

**When not to run it.** While a client uses the shards without `ShardedStore`: nothing waits for
it. Before every client has the connections of the new shards. While shards fail over.

**Input.** Required: `shard_set`, a set that `cellferry reshard register` has recorded, and
`shards`: all shards as they should be. A name alone stays as it is; a new one needs its Airflow
Connection. To re-shard, set `dry_run` to false. Example:

    {"shard_set": "dedup", "shards": ["shard-0", "shard-1", "shard-2", "shard-3=dedup-3"],
     "dry_run": false, "approval": "cutover"}

The first task, `validate`, checks everything before anything changes, and names each unknown
Param, shard or connection. With `approval` the run waits for a person where it says so.

**How it resumes.** Every task may be retried or cleared: clear the failed task and downstream, it
goes on from its checkpoints. A task that fails at once needs a person (its last log lines say what
to do); others are retried with back-off. A run that is cleared as a whole, or a new one with the
same shards, goes on with the re-sharding that was begun.

**Going back.** `roll_back_resharding`, at any time until the clean-up: before the cutover it
aborts, after it every change since comes back. It takes the work away from this run, whose next
task fails and says so.

**Afterwards.** The run waits for the end of the TTL (two weeks, unless you say otherwise) without
a worker, deletes the old owners' copies of what moved, and ends the re-sharding.
"""

from __future__ import annotations

from typing import Any

from airflow.sdk import dag

from cellferry.orchestration.reshard_lane import (
    Approval,
    ShardTtlSensor,
    begin,
    catch_up,
    cleanup,
    copy,
    cutover,
    dual_write,
    plan,
    report,
    validate_reshard,
    verify,
    watch,
)
from cellferry.orchestration.reshard_params import reshard_params
from cellferry.orchestration.retry_policy import BRIEF, PATIENT


@dag(
    dag_id="reshard",
    dag_display_name="Re-shard",
    description="Change the shards of a consistent-hash store while its clients go on.",
    doc_md=__doc__,
    schedule=None,
    params=reshard_params(),
    # of a set one is live; a run that waits for its TTL counts, too
    max_active_runs=16,
    is_paused_upon_creation=False,
    render_template_as_native_obj=False,
    tags=["cellferry"],
)
def reshard() -> None:
    """Wire the steps between the check and the report."""
    planned: Any = plan(wanted=validate_reshard())
    may_copy = Approval(
        task_id="approve_copy",
        subject="Copy keys to their new shards",
        asked_for=("copy", "both"),
        before=planned,
        **BRIEF,
    )
    lanes: Any = begin(before=may_copy.output)
    copied: Any = copy.expand(lane=lanes)
    doubled: Any = dual_write(before=copied)
    caught_up: Any = catch_up(before=doubled)
    verified: Any = verify(before=caught_up)
    may_cut_over = Approval(
        task_id="approve_cutover",
        subject="Give the authority to the new shards",
        asked_for=("cutover", "both"),
        before=verified,
        **BRIEF,
    )
    cut_over: Any = cutover(before=may_cut_over.output)
    watched: Any = watch(before=cut_over)
    waited = ShardTtlSensor(task_id="wait_for_ttl", before=watched, **PATIENT)
    cleaned: Any = cleanup(before=watched)
    reported: Any = report()
    waited >> cleaned >> reported


reshard()
