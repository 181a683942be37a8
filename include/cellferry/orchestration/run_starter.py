"""Starting another run from a run: the rest of a long list, or the clean-up after a long TTL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator

if TYPE_CHECKING:
    from airflow.sdk import Context


class RunStarter(TriggerDagRunOperator):
    """Starts the one run that `request` describes; is skipped when it describes none.

    The run's name is in the request, so that a retry starts no second one.

    Args:
        request: `run_id`, `conf` and, for a later start, `run_after` (ISO 8601); empty for none.
    """

    template_fields: Sequence[str] = ("request",)

    def __init__(self, *, trigger_dag_id: str, request: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(
            trigger_dag_id=trigger_dag_id,
            logical_date=None,  # several runs of a moment differ by their name only
            skip_when_already_exists=True,
            **kwargs,
        )
        self.request = request

    def execute(self, context: Context) -> None:
        """Start it, and let it run by itself."""
        from airflow.sdk.exceptions import AirflowSkipException

        if not self.request:
            raise AirflowSkipException("no further run is needed")
        self.trigger_run_id = self.request["run_id"]
        self.conf = dict(self.request["conf"])
        if "run_after" in self.request:
            self.run_after = self.request["run_after"]
        super().execute(context)
