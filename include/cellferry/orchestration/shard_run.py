"""What a task of a re-sharding does around its one step; see `step_run` for those of a move."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cellferry.errors import WrongState
from cellferry.orchestration.step_run import actor, running_task, said

if TYPE_CHECKING:
    from cellferry.shards.context import Context, Progress, StepResult
    from cellferry.shards.record import Resharding

#: Fact of a re-sharding that names the run which began it.
RUN = "dag_run"
#: Fact of a re-sharding that names the run which brings it back.
WAY_BACK_RUN = "way_back_dag_run"


@contextmanager
def shard_context(*, waited_for: bool = False) -> Iterator[Context]:
    """Open everything that a step of a re-sharding needs, as the running Airflow task.

    Args:
        waited_for: whether clients wait for this step; all others yield the processors.
    """
    from cellferry.migration.context import ProgressEvent
    from cellferry.settings import resolve
    from cellferry.shards.context import Context

    with running_task(waited_for=waited_for) as task:
        may_have_children()

        def tell(told: Progress) -> None:
            note = told.note if not told.shard else ""
            phase = told.note if told.shard else told.step
            where = told.shard or told.step
            task.board(ProgressEvent("", where, phase, told.done, told.total, told.unit, note=note))

        who = actor(task.airflow)
        with Context(
            resolve(_topology(), task.connections),
            task.connections,
            who,
            owner=f"{socket.gethostname()}:{os.getpid()}:{who.dag_run}/{task.airflow['ti'].task_id}",
            listener=tell,
        ) as at:
            yield at


def _topology() -> str:
    """Return the name of the topology's connection; a deployment of shards may have no cells."""
    from cellferry.settings import TopologySettings, default_path, load

    path = default_path()
    return (load(path).topology if path.is_file() else TopologySettings()).connection


def may_have_children() -> None:
    """Let this process start others: a Celery worker's are marked as such that may not.

    The cutover has a child that puts things right should this process be killed.
    """
    multiprocessing.current_process().daemon = False


def ask_connections(at: Context, found: Resharding) -> None:
    """Look up every connection of a re-sharding now, once.

    The steps ask for them in threads; Airflow answers the task's main thread.

    Raises:
        InvalidInput: one is not defined.
    """
    at.urls(found.old, found.new)


def going_on(at: Context, id_: int) -> Resharding:
    """Return a re-sharding that still goes forward, its connections looked up.

    Raises:
        WrongState: it is given up; this run must not take it up again.
    """
    from cellferry.shards.states import ENDING

    found = at.control.resharding(id_)
    ending = found.ended or found.facts.get(ENDING)
    if ending is not None and ending != "completed":
        raise WrongState(
            f"re-sharding {id_} is {str(ending).replace('_', ' ')}: "
            f"{found.facts.get('reason', 'no reason was left')}",
            hint="this run is over; roll_back_resharding removes what is left, "
            "a new run of reshard begins anew",
            where=f"shard set {found.set_name}",
        )
    if found.ended is None:
        ask_connections(at, found)
    return found


def is_past_the_cutover(found: Resharding) -> bool:
    """Whether the new owners have the authority, or clients wait just now for it to change."""
    from cellferry.shards.states import ShardState

    return found.ended is not None or found.state not in (
        ShardState.OLD,
        ShardState.DUAL_READ_OLD,
    )


def brief(result: StepResult) -> dict[str, Any]:
    """Return what goes into XCom of a step's result: the id, the state and a line for people."""
    return said(result.summary, resharding=result.id, state=str(result.state))


def past(found: Resharding) -> dict[str, Any]:
    """Return what goes into XCom of a step that there is no need for any more."""
    summary = f"not needed, the re-sharding is {found.ended or f'in state {found.state}'}"
    return said(summary, resharding=found.id, state=str(found.state))


def note(at: Context, id_: int, step: str, facts: Mapping[str, Any]) -> None:
    """Record facts of a re-sharding."""
    with at.lease(id_, step):
        at.control.record(id_, facts)
