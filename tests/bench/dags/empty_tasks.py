"""Eight tasks in a row that do nothing, for each organization: what Airflow alone costs.

The orchestration benchmark puts it beside the product's DAGs and runs it in the same shape.
"""

from __future__ import annotations

from airflow.sdk import Param, chain, dag, get_current_context, task, task_group

STEPS = ("plan", "copy", "sync", "verify", "cutover", "soak", "wait_for_ttl", "cleanup")


@task
def listed() -> list[str]:
    """Return the organizations that the run was asked for."""
    organizations: list[str] = get_current_context()["params"]["organizations"]
    return organizations


@task
def nothing(organization: str) -> None:
    """Do nothing."""


@task_group
def lane(organization: str) -> None:
    """Pass through as many tasks as a move has steps."""
    chain(*(nothing.override(task_id=step)(organization) for step in STEPS))


@dag(
    schedule=None,
    params={"organizations": Param([], type="array")},
    max_active_runs=8,
    is_paused_upon_creation=False,
)
def empty_tasks() -> None:
    """Wire one lane for each organization."""
    lane.expand(organization=listed())


empty_tasks()
