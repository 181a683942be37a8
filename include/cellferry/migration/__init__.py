"""The steps of a migration. Each is idempotent and usable without Airflow.

::

    with Context.from_settings(settings, connections, actor=Actor("me")) as context:
        plan = steps.plan(context, "acme", "cell-2", options=MoveOptions(), record=True)
        steps.copy(context, plan.migration)
        …
"""

from cellferry.migration import steps
from cellferry.migration.context import Context, ProgressEvent
from cellferry.migration.options import MoveOptions
from cellferry.migration.plan import Plan
from cellferry.migration.result import StepResult

__all__ = ["Context", "MoveOptions", "Plan", "ProgressEvent", "StepResult", "steps"]
