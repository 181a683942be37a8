"""A small client of Airflow's public REST API: what a person's scripts would use."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from cellferry.errors import AccessDenied, CellferryError, InvalidInput, Unreachable

ENDED = frozenset({"success", "failed"})


@dataclass(frozen=True, slots=True)
class TaskInstance:
    """One task of a run; `name` is what the UI shows for a mapped one."""

    task_id: str
    map_index: int
    state: str | None
    name: str | None
    try_number: int
    pid: int | None


class AirflowApi:
    """Airflow's API v2 as one logged-in user. Use as a context manager."""

    def __init__(self, url: str, user: str, password: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=30)
        self._user = user
        self._password = password

    def __enter__(self) -> Self:
        answer = self._send(
            "POST", "/auth/token", json={"username": self._user, "password": self._password}
        )
        self._client.headers["Authorization"] = f"Bearer {answer['access_token']}"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    def _send(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        try:
            answer = self._client.request(method, path, **arguments)
        except httpx.TransportError as error:
            raise Unreachable(f"Airflow does not answer: {error}", where=path) from error
        if answer.status_code in {401, 403}:
            raise AccessDenied(f"Airflow refused {method} {path}: {answer.status_code}")
        if answer.is_client_error:
            raise InvalidInput(f"Airflow refused {method} {path}: {answer.text}")
        if answer.is_server_error:
            raise Unreachable(f"Airflow failed at {method} {path}: {answer.status_code}")
        content: dict[str, Any] = answer.json() if answer.content else {}
        return content

    def wait_for_dag(self, dag_id: str, seconds: float = 120) -> None:
        """Wait until Airflow has parsed `dag_id`, and let it run.

        Raises:
            CellferryError: it has not been parsed within `seconds`; import errors are named.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                self._send("PATCH", f"/api/v2/dags/{dag_id}", json={"is_paused": False})
            except (InvalidInput, Unreachable):
                if time.monotonic() > deadline:
                    faults = self._send("GET", "/api/v2/importErrors").get("import_errors", [])
                    raise CellferryError(
                        f"Airflow has no DAG {dag_id} after {seconds:g} s",
                        hint="; ".join(str(fault.get("stack_trace")) for fault in faults)
                        or "see the DAG processor's log",
                    ) from None
                time.sleep(0.5)
            else:
                return

    def trigger(self, dag_id: str, conf: Mapping[str, Any], note: str | None = None) -> str:
        """Start a run of `dag_id` and return its id."""
        answer = self._send(
            "POST",
            f"/api/v2/dags/{dag_id}/dagRuns",
            json={"logical_date": None, "conf": dict(conf), "note": note},
        )
        return str(answer["dag_run_id"])

    def run_state(self, dag_id: str, run_id: str) -> str:
        """Return the state of a run."""
        return str(self._send("GET", f"/api/v2/dags/{dag_id}/dagRuns/{run_id}")["state"])

    def runs(self, dag_id: str) -> list[dict[str, Any]]:
        """Return the latest runs of a DAG, newest first."""
        answer = self._send("GET", f"/api/v2/dags/{dag_id}/dagRuns?order_by=-run_after&limit=50")
        found: list[dict[str, Any]] = answer["dag_runs"]
        return found

    def wait_for_run(self, dag_id: str, run_id: str, seconds: float) -> str:
        """Wait until a run has ended and return its state.

        Raises:
            CellferryError: it has not ended within `seconds`.
        """
        deadline = time.monotonic() + seconds
        while (state := self.run_state(dag_id, run_id)) not in ENDED:
            if time.monotonic() > deadline:
                raise CellferryError(f"run {run_id} is {state} after {seconds:g} s")
            time.sleep(1)
        return state

    def tasks(self, dag_id: str, run_id: str) -> list[TaskInstance]:
        """Return the task instances of a run."""
        answer = self._send(
            "GET", f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances?limit=1000"
        )
        return [
            TaskInstance(
                one["task_id"],
                one["map_index"],
                one["state"],
                one.get("rendered_map_index"),
                one["try_number"],
                one.get("pid"),
            )
            for one in answer["task_instances"]
        ]

    def log(
        self, dag_id: str, run_id: str, task_id: str, map_index: int = -1, try_number: int = 1
    ) -> str:
        """Return the log of one try of a task as text."""
        answer = self._send(
            "GET",
            f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/logs/{try_number}"
            f"?map_index={map_index}&full_content=true",
        )
        content = answer.get("content", "")
        if isinstance(content, str):
            return content
        return "\n".join(
            str(line.get("event", line)) if isinstance(line, dict) else str(line)
            for line in content
        )

    def add_connection(self, name: str, url: str) -> None:
        """Add an Airflow Connection, or replace it."""
        parts = urlsplit(url)
        body = {
            "connection_id": name,
            "conn_type": parts.scheme,
            "host": parts.hostname,
            "port": parts.port,
            "login": parts.username,
            "password": parts.password,
            "schema": parts.path.strip("/") or None,
        }
        self._send(
            "PATCH",
            "/api/v2/connections",
            json={
                "actions": [
                    {"action": "create", "entities": [body], "action_on_existence": "overwrite"}
                ]
            },
        )

    def answer(self, dag_id: str, run_id: str, task_id: str, option: str) -> None:
        """Answer a task that waits for a person."""
        self._send(
            "PATCH",
            f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/-1/hitlDetails",
            json={"chosen_options": [option]},
        )

    def clear(
        self, dag_id: str, run_id: str, tasks: Sequence[tuple[str, int]], *, downstream: bool = True
    ) -> int:
        """Clear mapped instances (`(task id, map index)`) and what follows; return how many."""
        answer = self._send(
            "POST",
            f"/api/v2/dags/{dag_id}/clearTaskInstances",
            json={
                "dry_run": False,
                "dag_run_id": run_id,
                "task_ids": [list(one) for one in tasks],
                "include_downstream": downstream,
                "only_failed": False,
                "reset_dag_runs": True,
            },
        )
        return int(answer["total_entries"])
