"""Tasks about cells rather than one organization's move: preparing them, replaying back."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import get_current_context, task

from cellferry.orchestration.retry_policy import BRIEF, PATIENT
from cellferry.orchestration.step_run import FAILURE, describe_failure, leave_reason, step_context

if TYPE_CHECKING:
    from cellferry.migration import Context
    from cellferry.model import Migration

log = logging.getLogger(__name__)

#: A migration whose TTL ends within this time is left to its clean-up: a reverse round that took
#: it over then would take it from the clean-up.
LEAVE_TO_CLEAN_UP = timedelta(minutes=2)
#: One run of reverse rounds starts no further round after this many seconds.
ROUNDS_FOR_S = 50.0


@task(multiple_outputs=False, **BRIEF)
def validate_cells() -> list[str]:
    """Check the whole input before anything changes; return the cells."""
    from cellferry.orchestration.params import prepare_cell_params, refuse_unknown

    params = dict(get_current_context()["params"])
    with step_context() as ferry:
        refuse_unknown(params, prepare_cell_params())
        for cell in params["cells"]:
            ferry.settings.cell(cell, ferry.connections)
    return list(params["cells"])


@task(
    task_id="prepare",
    multiple_outputs=False,
    map_index_template="{{ task.op_kwargs['cell'] }}",
    max_active_tis_per_dag=2,
    **PATIENT,
)
def prepare(*, cell: str) -> dict[str, Any]:
    """Install what the cell lacks; in a dry run, only say what that is."""
    from cellferry.migration import steps

    dry_run = get_current_context()["params"]["dry_run"]
    with step_context() as ferry:
        if not dry_run:
            done = steps.prepare_cell(ferry, cell)
            for kind, what in done.items():
                log.info("%s: %s", kind, what)
        lacks = steps.check_cell(ferry, cell)
    for one in lacks:
        say = log.error if one.fatal else log.warning
        say("%s: %s Remedy: %s", one.where, one.reason, one.remedy)
    fatal = [one.code for one in lacks if one.fatal]
    return {"cell": cell, "prepared": not dry_run, "lacks": fatal}


@task(multiple_outputs=False, trigger_rule="all_done", **BRIEF)
def report_cells() -> dict[str, int]:
    """Print what each cell lacks or got, and fail when one could not be prepared."""
    from airflow.sdk.exceptions import AirflowFailException

    from cellferry.orchestration import reporting

    airflow = get_current_context()
    ti = airflow["ti"]
    cells = ti.xcom_pull(task_ids="validate_cells")
    if cells is None:
        failure = ti.xcom_pull(task_ids="validate_cells", key=FAILURE) or {}
        raise AirflowFailException(
            f"nothing was changed: {failure.get('message', 'validate_cells failed, see its log')}"
        )
    rows, failed = [], []
    for index, cell in enumerate(cells):
        done = ti.xcom_pull(task_ids="prepare", map_indexes=index)
        if done is None:
            failed.append(describe_failure(ti, "prepare", index, cell))
        rows.append({"cell": cell, "outcome": _outcome(done)})
    log.info("Report\n%s", reporting.table(rows))
    if failed:
        raise AirflowFailException("\n".join(failed))
    return {"cells": len(cells), "failed": 0}


def _outcome(done: dict[str, Any] | None) -> str:
    if done is None:
        return "FAILED"
    if done["lacks"]:
        return "lacks: " + ", ".join(dict.fromkeys(done["lacks"]))
    return "prepared" if done["prepared"] else "prepared already"


@task(multiple_outputs=False, **{**BRIEF, "retries": 0})
def replay_back() -> dict[str, int]:
    """One reverse round for each retained migration, in turn; skipped when there is none."""
    from airflow.sdk.exceptions import AirflowSkipException

    from cellferry.errors import CellferryError
    from cellferry.migration import steps
    from cellferry.model import State

    airflow = get_current_context()
    at_most = airflow["params"]["at_most"]
    failed: list[str] = []
    keys = rounds = 0
    with step_context() as ferry:
        retained = ferry.topology.migrations(states=[State.RETAINED], limit=100_000)
        started = time.monotonic()
        for migration in in_turn(retained, at_most, airflow["dag_run"].run_after):
            if time.monotonic() - started > ROUNDS_FOR_S:
                log.info("the rest is left to the next run")
                break
            # asked for each one anew: rounds take time
            if not wants_reverse_round(ferry, migration):
                continue
            try:
                result = steps.reverse_round(ferry, migration.id)
            except CellferryError as error:
                log.warning("%s", error)
                failed.append(f"{migration.organization.slug}: {error.message}")
                continue
            rounds += 1
            keys += sum(int(one["applied"]) for one in result.facts.values())
    if failed:
        leave_reason(airflow, "; ".join(failed))
        raise RuntimeError(f"{len(failed)} reverse rounds failed: {'; '.join(failed)}")
    if not rounds:
        raise AirflowSkipException("no retained migration needs a reverse round")
    log.info("%d rounds, %d keys", rounds, keys)
    return {"rounds": rounds, "keys": keys}


def wants_reverse_round(ferry: Context, migration: Migration) -> bool:
    """Whether a retained migration is neither stopped, near its clean-up nor taken over."""
    from cellferry.model import State

    migration = ferry.topology.migration(migration.id)
    if migration.state is not State.RETAINED or migration.paused:
        return False
    if ferry.topology.halts_on(migration.id):
        return False
    until = migration.ttl_until
    if until is None or until - ferry.topology.now() < LEAVE_TO_CLEAN_UP:
        return False
    return ferry.topology.superseded_by(migration.id) is None


def in_turn(migrations: Any, at_most: int, moment: datetime) -> list[Any]:
    """Return at most `at_most` of `migrations`; over successive minutes each has its turn."""
    ordered = sorted(migrations, key=lambda one: one.id)
    if len(ordered) <= at_most:
        return ordered
    minute = int(moment.astimezone(UTC).timestamp() // 60)
    start = minute * at_most % len(ordered)
    return (ordered + ordered)[start : start + at_most]
