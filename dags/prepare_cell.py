"""Install in cells what a move needs: gates, roles with least privilege, ACLs.

**What it does.** For each cell, in a lane of its own: prepares every store with the admin
connection, and registers the cell in the topology. It gives way to the application: each change
waits for a lock only for a moment, lets go, and tries again later, so that production never
stalls. What is there already is left alone.

**Dry run is the default.** Then it only says what each cell lacks.

**When not to run it.** While the application's schema is being changed in that cell. Run it again
after each change of the schema: new tables need their triggers.

**Input.** Required: `cells`, as cells.yaml calls them. To install, set `dry_run` to false. Example:

    {"cells": ["cell-2", "cell-3"], "dry_run": false}

**How it resumes.** May be repeated at any time; clear a failed cell's task.
"""

from __future__ import annotations

from airflow.sdk import dag

from cellferry.orchestration.cell_tasks import prepare, report_cells, validate_cells
from cellferry.orchestration.params import prepare_cell_params


@dag(
    dag_id="prepare_cell",
    dag_display_name="Prepare a cell",
    description="Install in cells what a move needs: gates, roles, ACLs.",
    doc_md=__doc__,
    schedule=None,
    params=prepare_cell_params(),
    max_active_runs=1,
    is_paused_upon_creation=False,
    tags=["cellferry"],
)
def prepare_cell() -> None:
    """Wire one task for each cell between the check and the report."""
    prepare.expand(cell=validate_cells()) >> report_cells()


prepare_cell()
