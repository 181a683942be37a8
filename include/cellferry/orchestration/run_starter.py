"""Starting another run from a run: the rest of a long list, or the clean-up after a long TTL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator

from cellferry.model import State
from cellferry.orchestration.params import LONGEST_TTL_IN_RUN_S

if TYPE_CHECKING:
    from airflow.sdk import Context

    from cellferry.model import Migration


class RunStarter(TriggerDagRunOperator):
    """Starts the run that takes the rest of a long list; is skipped when nothing is left.

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
            # It would add to the Params, and unknown ones are refused.
            openlineage_inject_parent_info=False,
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


class CleanUpStarter(RunStarter):
    """Starts the clean-up run, for the end of a TTL that is too long to wait for in this run.

    Asks the topology which migrations of this run are retained; skipped when there are none.
    """

    def __init__(self, *, trigger_dag_id: str, **kwargs: Any) -> None:
        super().__init__(trigger_dag_id=trigger_dag_id, request={}, **kwargs)

    def execute(self, context: Context) -> None:
        """Find out what is retained, and start its clean-up."""
        from cellferry.orchestration.step_run import step_context
        from cellferry.orchestration.validation import migrations_of

        params = context["params"]
        if not params["dry_run"] and params["ttl_s"] > LONGEST_TTL_IN_RUN_S:
            organizations = context["ti"].xcom_pull(task_ids="validate") or []
            with step_context() as ferry:
                found = migrations_of(ferry, organizations, params["destination"])
            self.request = clean_up_request([one for one in found.values() if one is not None])
        super().execute(context)


def clean_up_request(
    migrations: Sequence[Migration], state: State = State.RETAINED
) -> dict[str, Any]:
    """Return the request for the clean-up run of those that are retained; empty for none.

    With `state` rolled back it is about the copies at the new cells.

    When an organization is repeated
    later, the larger set gets a run of its own, which leaves out what is cleaned by then.
    """
    from cellferry.orchestration.validation import clean_up_run

    retained = {one.id: one.ttl_until for one in migrations if one.state is state and one.ttl_until}
    if not retained:
        return {}
    name = "clean_up" if state is State.RETAINED else "clean_up_after_roll_back"
    return clean_up_run(name, retained)
