"""cellferry's Airflow plugin: what Airflow must know of it besides the DAGs."""

from __future__ import annotations

from airflow.plugins_manager import AirflowPlugin


class CellferryPlugin(AirflowPlugin):
    """Registers cellferry, so that `airflow plugins` shows that this deployment has it."""

    name = "cellferry"
