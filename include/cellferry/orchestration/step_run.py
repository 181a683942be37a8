"""What every task does around its one step: who asks, connections, progress, cancellation."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow.sdk import get_current_context

from cellferry.errors import CellferryError
from cellferry.model import Actor
from cellferry.niceness import ONE_MACHINE, give_way, go_first

if TYPE_CHECKING:
    from cellferry.migration import Context, StepResult
    from cellferry.orchestration.connections import AirflowConnections
    from cellferry.orchestration.progress import ProgressBoard

log = logging.getLogger(__name__)

#: XCom key under which a failed try leaves its reason for the report.
FAILURE = "failure"
#: A message for people is cut after this many characters.
LONGEST_MESSAGE = 2_000


@dataclass(frozen=True, slots=True)
class RunningTask:
    """The Airflow task that this process runs.

    Attributes:
        airflow: its context, as Airflow has it.
        connections: resolves connections' names.
        board: shows people how far the step is.
    """

    airflow: Mapping[str, Any]
    connections: AirflowConnections
    board: ProgressBoard


@contextmanager
def running_task(*, waited_for: bool = False) -> Iterator[RunningTask]:
    """Be a task for the block: told to end, it unwinds; its progress and its errors are shown.

    Args:
        waited_for: whether writers wait for this step; all others yield the processors.

    An error that leaves the block is said in plain words in the log and left for the report, with
    secrets masked; then Airflow's retry policy decides.
    """
    from cellferry.orchestration.cancellation import unwinding_when_cancelled
    from cellferry.orchestration.connections import AirflowConnections
    from cellferry.orchestration.progress import ProgressBoard

    if not waited_for:
        give_way()
    elif ONE_MACHINE in os.environ:
        go_first()
    airflow: Mapping[str, Any] = get_current_context()
    state_store = airflow.get("task_state_store")
    connections = AirflowConnections()
    try:
        with (
            unwinding_when_cancelled(),
            ProgressBoard(state_store.set if state_store is not None else None) as board,
        ):
            yield RunningTask(airflow, connections, board)
    except CellferryError as error:
        leave_reason(airflow, connections.hide(error.message), connections.hide(error.hint or ""))
        raise
    except Exception as error:
        leave_reason(airflow, connections.hide(f"{type(error).__name__}: {error}"))
        raise


@contextmanager
def step_context(*, waited_for: bool = False) -> Iterator[Context]:
    """Open everything that a step of a migration needs, as the running Airflow task.

    Args:
        waited_for: see `running_task`.
    """
    from cellferry.migration import Context
    from cellferry.settings import default_path, load

    with (
        running_task(waited_for=waited_for) as task,
        Context.from_settings(
            load(default_path()),
            task.connections,
            actor=actor(task.airflow),
            listener=task.board,
        ) as context,
    ):
        context.last_try = task.airflow["ti"].try_number > task.airflow["ti"].max_tries
        yield context


def leave_reason(airflow: Mapping[str, Any], message: str, remedy: str = "") -> None:
    """Say why the step failed in the log, and leave it for the report."""
    log.error("%s%s", message, f"\nRemedy: {remedy}" if remedy else "")
    failure = {"message": message[:LONGEST_MESSAGE], "remedy": remedy[:LONGEST_MESSAGE]}
    airflow["ti"].xcom_push(key=FAILURE, value=failure)


def describe_failure(ti: Any, task_id: str, map_index: int, name: str) -> str:
    """Return a report's line about a mapped task that failed, with the reason that it left."""
    failure = ti.xcom_pull(task_ids=task_id, key=FAILURE, map_indexes=map_index) or {}
    message = failure.get("message", "no message was left; see the log of its task")
    remedy = f" Remedy: {failure['remedy']}" if failure.get("remedy") else ""
    return f"{name}: {message}{remedy}"


def actor(airflow: Mapping[str, Any]) -> Actor:
    """Return who does this, for the audit: the person who triggered the run, if there is one."""
    run = airflow["dag_run"]
    name = getattr(run, "triggering_user_name", None)
    return Actor(
        name=name or "airflow",
        role="operator" if name else "scheduler",
        dag_run=f"{run.dag_id}/{run.run_id}",
        try_number=airflow["ti"].try_number,
    )


def brief(result: StepResult) -> dict[str, Any]:
    """Return what goes into XCom of a step's result: ids, the state and a line for people."""
    return said(
        result.summary,
        migration=result.migration,
        state=str(result.state),
        repeated=result.repeated,
    )


def said(summary: str, **facts: Any) -> dict[str, Any]:
    """Log a line for people; return it with `facts`, for XCom."""
    log.info("%s", summary)
    return {**facts, "summary": summary}


def states_of(airflow: Any) -> Mapping[str, Any]:
    """Return the state of each task instance of the run, by `task_id` or `task_id_mapindex`."""
    run = airflow["dag_run"]
    states: Mapping[str, Any] = (
        airflow["ti"].get_task_states(dag_id=run.dag_id, run_ids=[run.run_id]).get(run.run_id, {})
    )
    return states
