"""Steps done ahead: a small organization's next steps, in the task that is running already.

A task of Airflow costs about as much processor time as all steps of a small organization. So a
task goes on with the steps after its own, and skips their tasks. That saves time and changes
nothing else: a step that cannot be done ahead, for whatever reason, is left to its own task, which
repeats it and has its own retries, messages and place in the report.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import DownstreamTasksSkipped

from cellferry.orchestration.params import LONGEST_TTL_IN_RUN_S

if TYPE_CHECKING:
    from cellferry.migration import Context

log = logging.getLogger(__name__)

#: An organization of at most so many rows and keys is small,
SMALL = 10_000
#: if the plan also says that its copy takes at most so many seconds.
SMALL_COPY_S = 10.0
#: A soak of at most so many seconds goes with the cutover: its task is one of a few at once.
SHORT_SOAK_S = 2.0
BEFORE_BARRIER = ("copy", "sync", "verify")
AT_THE_END = ("wait_for_ttl", "cleanup")


def is_small(plan: Mapping[str, Any]) -> bool:
    """Whether the steps of what is planned are short.

    Args:
        plan: as `Plan.as_dict` gives it, and the topology keeps it.
    """
    totals: Mapping[str, Mapping[str, Any]] = plan.get("totals") or {}
    count = sum(int(one["count"]) for one in totals.values())
    return bool(totals) and count <= SMALL and float(plan["copy_s"]) <= SMALL_COPY_S


def before_barrier(ferry: Context, migration: int, plan: Mapping[str, Any]) -> tuple[str, ...]:
    """Do what a small organization needs before its cutover; return the steps to skip."""
    return _do(ferry, migration, BEFORE_BARRIER) if is_small(plan) else ()


def after_barrier(ferry: Context, migration: int, *, ttl_s: float) -> tuple[str, ...]:
    """Do what comes after the cutover, as far as it needs no waiting; return the steps to skip.

    Args:
        ttl_s: of the run; a clean-up run is started for one that is too long to wait for.
    """
    try:
        return _after_barrier(ferry, migration, ttl_s)
    except Exception as error:  # noqa: BLE001 - what was done before is done, and no failure
        log.warning("left to their own tasks: %s", error)
        return ()


def _after_barrier(ferry: Context, migration: int, ttl_s: float) -> tuple[str, ...]:
    found = ferry.topology.migration(migration)
    soaked: tuple[str, ...] = ()
    if not found.facts.get("soaked"):
        if float(found.options.get("soak_s", 0)) > SHORT_SOAK_S:
            return ()
        soaked = _do(ferry, migration, ("soak",))
        if not soaked:
            return ()
    if ttl_s > LONGEST_TTL_IN_RUN_S:
        log.info("a clean-up run starts when the TTL is over")
        return (*soaked, *AT_THE_END)
    is_over = found.ttl_until is not None and found.ttl_until <= ferry.topology.now()
    if is_over and is_small(found.facts.get("plan", {})) and _do(ferry, migration, ("cleanup",)):
        return (*soaked, *AT_THE_END)
    return soaked


def _do(ferry: Context, migration: int, names: Iterable[str]) -> tuple[str, ...]:
    """Do the steps in order; return those that were done."""
    from cellferry.migration import steps

    done = []
    last_try, ferry.last_try = ferry.last_try, False  # its own task tries it again
    try:
        for name in names:
            result = getattr(steps, name)(ferry, migration)
            log.info("%s: %s", name, result.summary)
            done.append(name)
    except Exception as error:  # noqa: BLE001 - the step's own task meets it again, and says so
        log.warning("left to its own task: %s", error)
    finally:
        ferry.last_try = last_try
    return tuple(done)


def skip_done(ti: Any, group: str, result: Mapping[str, Any], names: Iterable[str]) -> None:
    """End this task with `result`, and skip the tasks of the steps that are done in its lane.

    Returns when there are none: the caller then returns its result as ever.

    Raises:
        DownstreamTasksSkipped: Airflow skips them, and this task is a success.
    """
    tasks = [(f"{group}.{name}", ti.map_index) for name in names]
    if tasks:
        ti.xcom_push(key="return_value", value=dict(result))
        raise DownstreamTasksSkipped(tasks=tasks)  # type: ignore[no-untyped-call]
