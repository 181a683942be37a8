"""The task of `reap_cells`: one run of the reaper, and what it says."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

from airflow.sdk import get_current_context, task

from cellferry.orchestration.retry_policy import BRIEF
from cellferry.orchestration.step_run import leave_reason, step_context

log = logging.getLogger(__name__)


@task(multiple_outputs=False, **{**BRIEF, "retries": 0, "execution_timeout": timedelta(minutes=5)})
def reap() -> dict[str, Any]:
    """Finish, undo, remove; fail when a person must act or a part could not be done."""
    from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

    from cellferry.migration import reap_table, steps
    from cellferry.orchestration import reporting
    from cellferry.orchestration.params import reap_cells_params, refuse_unknown

    airflow = get_current_context()
    params = dict(airflow["params"])
    # Writers may wait for it, as for a cutover.
    with step_context(waited_for=True) as ferry:
        refuse_unknown(params, reap_cells_params())
        reaped = steps.reap(
            ferry,
            expired_after_s=float(params["expired_after_s"]),
            dry_run=bool(params["dry_run"]),
        )
    summary = reap_table.summary(reaped)
    rows = list(reap_table.rows(reaped))
    if rows:
        log.info("Report\n%s", reporting.table(rows))
    if reaped.attention or reaped.failed:
        complaint = "; ".join(deed.reason for deed in (*reaped.attention, *reaped.failed))
        leave_reason(airflow, f"{summary}: {complaint}")
        raise AirflowFailException(f"{summary}: {complaint}")
    if not rows:
        raise AirflowSkipException(summary)
    log.info("%s", summary)
    return {"done": len(reaped.deeds), "dry_run": reaped.dry_run}
