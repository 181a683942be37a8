"""Waiting for the end of a TTL without a worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseSensorOperator

from cellferry.orchestration.params import LONGEST_TTL_IN_RUN_S

if TYPE_CHECKING:
    from airflow.sdk import Context

#: Added to the wait, because two clocks are involved. Clean-up asks the topology's clock again.
MARGIN_S = 1.0


class MomentSensor(BaseSensorOperator):
    """Waits for an absolute time that a step knows. Deferred: the triggerer holds the wait."""

    ui_color = "#e6f1f2"

    def wait(self, left_s: float, until: datetime) -> None:
        """Return at once when nothing is left, else defer; this call does not return then.

        Args:
            left_s: seconds, on the clock that `until` is of.
        """
        from airflow.providers.standard.triggers.temporal import DateTimeTrigger

        from cellferry.orchestration.progress import duration

        if left_s <= 0:
            self.log.info("the TTL was over at %s", until.isoformat())
            return
        self.log.info("the TTL is over at %s, in %s", until.isoformat(), duration(left_s))
        self.defer(
            trigger=DateTimeTrigger(
                # the triggerer's clock runs this wait; the topology's clock said how long it is
                moment=datetime.now(UTC) + timedelta(seconds=left_s + MARGIN_S),
                end_from_trigger=True,
            ),
            method_name="execute_complete",
        )

    def execute_complete(self, context: Context, event: Any = None) -> None:
        """End; the trigger does that itself, unless it is told otherwise."""


class TtlSensor(MomentSensor):
    """Waits until a migration's TTL is over: an absolute time kept in the topology.

    Only reads, so it may be repeated. Deferred: the triggerer holds the wait and ends the task.

    Args:
        organization: the one of this lane, for its name in the UI.
        before: has the migration's number, `migration`; None for the number in the lane's plan.
        in_run: skip, and with it the clean-up, when the run's `ttl_s` is too long to wait for.
    """

    template_fields: Sequence[str] = ("organization", "before")

    def __init__(
        self,
        *,
        organization: Mapping[str, str],
        in_run: bool,
        before: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.organization = organization
        self.before = before
        self.in_run = in_run

    def execute(self, context: Context) -> None:
        """Defer until the TTL is over, or return at once when it is.

        Raises:
            WrongState: the migration has not been flipped.
        """
        from airflow.sdk.exceptions import AirflowSkipException

        from cellferry.migration import steps
        from cellferry.orchestration.progress import duration
        from cellferry.orchestration.step_run import step_context
        from cellferry.orchestration.task_groups import migration_of

        if self.in_run and context["params"]["ttl_s"] > LONGEST_TTL_IN_RUN_S:
            raise AirflowSkipException(
                f"a TTL of {duration(context['params']['ttl_s'])} is not waited for in this run; "
                "a clean-up run starts when it is over"
            )
        number = migration_of(self.before or self.organization)
        with step_context() as ferry:
            until = steps.ttl_until(ferry, number)
            left_s = (until - ferry.topology.now()).total_seconds()
        self.wait(left_s, until)


class LatestTtlSensor(MomentSensor):
    """Waits until the TTL of the last of several migrations is over: once for a whole run.

    Only reads, so it may be repeated. A run that was started for that moment goes on at once.

    Args:
        migrations: each has the migration's number, `migration`; from the task before.
    """

    template_fields: Sequence[str] = ("migrations",)

    def __init__(self, *, migrations: Sequence[Mapping[str, Any]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.migrations = migrations

    def execute(self, context: Context) -> None:  # noqa: ARG002 - Airflow's signature
        """Defer until the last TTL is over, or return at once when it is.

        Raises:
            WrongState: a migration has not been flipped.
        """
        from cellferry.migration import steps
        from cellferry.orchestration.step_run import step_context

        if not self.migrations:
            return
        with step_context() as ferry:
            until = max(steps.ttl_until(ferry, one["migration"]) for one in self.migrations)
            left_s = (until - ferry.topology.now()).total_seconds()
        self.wait(left_s, until)
