"""Airflow's components as processes of the fleet: configuration, commands, health."""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import psutil

from cellferry.local.fleet_layout import FleetLayout, FleetSecrets, write_private
from cellferry.local.ports import HOST
from cellferry.local.process_identity import ProcessIdentity
from cellferry.local.roles import METADATA
from cellferry.local.server_process import ServerFailed, ServerProcess
from cellferry.niceness import ONE_MACHINE, session_gives_way

#: Of LocalExecutor, forked when the scheduler starts: 64 MB each, and two cores.
WORKERS = 16

API_SERVER = "airflow-api-server"
SCHEDULER = "airflow-scheduler"
COMMANDS: Mapping[str, tuple[str, ...]] = {
    API_SERVER: ("api-server", "--host", HOST, "--workers", "1"),
    # The log servers of these two would listen on every interface, and nobody needs them here:
    # the API server reads the same files.
    SCHEDULER: ("scheduler", "--skip-serve-logs"),
    "airflow-triggerer": ("triggerer", "--skip-serve-logs"),
    "airflow-dag-processor": ("dag-processor",),
}
HEALTH_KEYS: Mapping[str, str] = {
    SCHEDULER: "scheduler",
    "airflow-triggerer": "triggerer",
    "airflow-dag-processor": "dag_processor",
}
ADMIN = "admin"


def base_url(port: int) -> str:
    """Address of the API server and the UI."""
    return f"http://{HOST}:{port}"


def write_configuration(
    layout: FleetLayout, secrets: FleetSecrets, *, api_port: int, metadata_port: int
) -> None:
    """Write AIRFLOW_HOME: `airflow.cfg` of mode 600, the passwords of the UI, the hooks.

    It is all that Airflow's own command line needs: `AIRFLOW_HOME=.local/airflow airflow …`.
    """
    home = layout.airflow
    (home / "logs").mkdir(parents=True, exist_ok=True)
    written = configparser.RawConfigParser()
    values = _configuration(layout, secrets, api_port=api_port, metadata_port=metadata_port)
    written.read_dict(values)
    beside = home / "airflow.cfg.draft"
    beside.touch(mode=0o600)
    with beside.open("w", encoding="utf-8") as file:
        written.write(file)
    beside.replace(home / "airflow.cfg")
    passwords = json.dumps({ADMIN: secrets.airflow("admin_password")}) + "\n"
    write_private(home / "passwords.json", passwords)
    # Airflow puts AIRFLOW_HOME/config on the path, and finds airflow_local_settings.py there.
    hooks = home / "config"
    if not hooks.is_symlink():
        shutil.rmtree(hooks, ignore_errors=True)
        hooks.symlink_to(layout.config.parent)


def _configuration(
    layout: FleetLayout, secrets: FleetSecrets, *, api_port: int, metadata_port: int
) -> dict[str, dict[str, str]]:
    home = layout.airflow
    url = base_url(api_port)
    password = quote(secrets.airflow("metadata_password"), safe="")
    database = f"{METADATA}:{password}@{HOST}:{metadata_port}/{METADATA}"
    return {
        "core": {
            "dags_folder": str(layout.root / "dags"),
            "plugins_folder": str(layout.root / "plugins"),
            "executor": "LocalExecutor",
            "load_examples": "False",
            "parallelism": str(WORKERS),
            "fernet_key": secrets.airflow("fernet_key"),
            "simple_auth_manager_users": f"{ADMIN}:admin",
            "simple_auth_manager_passwords_file": str(home / "passwords.json"),
            "execution_api_server_url": f"{url}/execution/",
            "hostname_callable": "airflow_local_settings.loopback",
            "default_timezone": "utc",
        },
        "database": {
            "sql_alchemy_conn": f"postgresql+psycopg2://{database}",
            "sql_alchemy_conn_async": f"postgresql+asyncpg://{database}",
        },
        "api": {
            "host": HOST,
            "port": str(api_port),
            "base_url": url,
            "secret_key": secrets.airflow("secret_key"),
        },
        "api_auth": {"jwt_secret": secrets.airflow("jwt_secret")},
        "logging": {
            "base_log_folder": str(home / "logs"),
            "colored_console_log": "False",
            # Nothing serves logs; the default port may be another Airflow's.
            "worker_log_server_port": "1",
            "trigger_log_server_port": "1",
        },
        "secrets": {
            "backend": "airflow.secrets.local_filesystem.LocalFilesystemBackend",
            "backend_kwargs": json.dumps({"connections_file_path": str(layout.connections)}),
        },
        "scheduler": {
            # The default of 20 walks through every waiting task of every run on each pass.
            "max_dagruns_per_loop_to_schedule": "2",
            "max_tis_per_query": "64",
            "scheduler_idle_sleep_time": "0.25",
            # A task whose process vanished is retried soon (hazard 14).
            "task_instance_heartbeat_timeout": "45",
            "task_instance_heartbeat_timeout_detection_interval": "5",
            "orphaned_tasks_check_interval": "20",
            "enable_health_check": "False",
        },
        "dag_processor": {
            "refresh_interval": "60",
            "min_file_process_interval": "300",
        },
        "usage_data_collection": {"enabled": "False"},
    }


def environment(layout: FleetLayout) -> dict[str, str]:
    """Environment of Airflow's processes: the caller's without its Airflow, and ours."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AIRFLOW", "CELLFERRY_", "PG", "PYTEST_"))
    }
    if inherited.pop("PYTHONDONTWRITEBYTECODE", None):
        # Compiling Airflow costs each process 3 s: keep the result, but not beside the sources.
        inherited.setdefault("PYTHONPYCACHEPREFIX", str(layout.state / "pycache"))
    direct = [HOST, "localhost", *filter(None, inherited.get("NO_PROXY", "").split(","))]
    return {
        **inherited,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "AIRFLOW_HOME": str(layout.airflow),
        "CELLFERRY_CONFIG": str(layout.config),
        "CELLFERRY_CONNECTIONS": str(layout.connections),
        # A proxy of the machine is not for the way to ourselves.
        "NO_PROXY": ",".join(direct),
        "no_proxy": ",".join(direct),
        ONE_MACHINE: "1",
        "PYTHONUNBUFFERED": "1",
        "TZ": "UTC",
    }


def migrate_metadata(layout: FleetLayout) -> None:
    """Bring Airflow's metadata database to this version's schema; may be repeated.

    Raises:
        ServerFailed: `airflow db migrate` failed; carries the end of what it said.
    """
    log = layout.logs / "airflow-db-migrate.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        result = subprocess.run(
            [sys.executable, "-P", "-m", "airflow", "db", "migrate"],
            check=False,
            cwd=layout.airflow,
            env=environment(layout),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if result.returncode != 0:
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        raise ServerFailed("airflow db migrate failed: " + "\n".join(said))


class AirflowComponent:
    """One of Airflow's processes and all its children."""

    def __init__(self, name: str, layout: FleetLayout, *, port: int = 0) -> None:
        self.name = name
        self.port = port
        self._layout = layout
        self._process = ServerProcess(name, layout.logs / f"{name}.log")
        self._has_yielded = False

    @property
    def log(self) -> Path:
        """Its log."""
        return self._process.log

    @property
    def identity(self) -> ProcessIdentity | None:
        """The running process."""
        return self._process.identity if self._process.is_running else None

    @property
    def is_running(self) -> bool:
        """Whether its main process runs."""
        return self._process.is_running

    def start(self) -> None:
        """Start it, without waiting; first end what a killed predecessor left of its children."""
        self._process.kill()
        self._has_yielded = False
        command: list[str | Path] = [sys.executable, "-P", "-m", "airflow", *COMMANDS[self.name]]
        if self.name == API_SERVER:
            command += ["--port", str(self.port)]
        self._process.start(
            command, cwd=self._layout.airflow, environment=environment(self._layout)
        )
        self._go_behind_the_cells()

    def _go_behind_the_cells(self) -> None:
        """Give way to them and to their clients: in production they have machines of their own.

        A cutover's task takes its place among the cells by itself (`niceness.go_first`).
        """
        if self.name != SCHEDULER:
            self._process.give_way()
        elif (pid := self._process.pid) is not None:
            session_gives_way(pid)  # and the process itself later

    def yield_the_processor(self) -> None:
        """Let the scheduler itself go behind its workers, once it has them.

        These inherit its niceness and keep it, in one of them runs a cutover, and sessions may not
        count. The other tasks yield by themselves. Repeatable; does nothing until all are there.
        One that is forked later, in the place of a dead one, yields as well.
        """
        pid = self._process.pid
        if self.name != SCHEDULER or pid is None or self._has_yielded:
            return
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if len(psutil.Process(pid).children()) >= WORKERS:
                self._process.give_way()
                self._has_yielded = True

    def stop(self) -> None:
        """End it and every process of its session.

        The scheduler waits a while for its tasks; those that go on longer are killed, and
        retried after the next start.
        """
        patience = 10.0 if self.name == SCHEDULER else 5.0
        self._process.stop((signal.SIGTERM, patience))

    def kill(self) -> None:
        """SIGKILL it and every process of its session."""
        self._process.kill()

    def log_tail(self) -> str:
        """The end of its log."""
        return self._process.log_tail()


def warm_up(port: int, timeout: float = 60.0) -> None:
    """Make the API server build the part that tasks talk to.

    It does so at the first request, which takes seconds; a task's own first request would
    time out on a busy machine. No answer is no error: the tasks retry.
    """
    with (
        contextlib.suppress(httpx.HTTPError),
        httpx.Client(trust_env=False, timeout=timeout) as client,
    ):
        client.get(f"{base_url(port)}/execution/health")


@dataclass(frozen=True, slots=True)
class AirflowHealth:
    """What `/api/v2/monitor/health` said; empty when it did not answer."""

    answer: Mapping[str, Any]

    @classmethod
    def ask(cls, port: int, timeout: float = 5.0) -> AirflowHealth:
        """Ask the API server."""
        try:
            with httpx.Client(trust_env=False, timeout=timeout) as client:
                answer = client.get(f"{base_url(port)}/api/v2/monitor/health")
                return cls(answer.raise_for_status().json())
        except (httpx.HTTPError, ValueError):
            return cls({})

    def trouble(self, component: str, since: datetime | None = None) -> str | None:
        """What is wrong with a component, or None.

        Args:
            component: its name.
            since: a heartbeat older than this is a predecessor's.
        """
        if not self.answer:
            return "the API server does not answer"
        if component == API_SERVER:
            status = self.answer.get("metadatabase", {}).get("status")
            return None if status == "healthy" else "no access to the metadata database"
        key = HEALTH_KEYS[component]
        part: Mapping[str, Any] = self.answer.get(key) or {}
        beat = part.get(f"latest_{key}_heartbeat")
        if not beat:
            return "no heartbeat yet"
        if since is not None and datetime.fromisoformat(beat) < since:
            return "no heartbeat since it was started"
        return None if part.get("status") == "healthy" else f"last heartbeat {beat}"
