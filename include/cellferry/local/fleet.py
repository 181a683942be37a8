"""The local fleet: three cells, a topology and an Airflow, up and down by one call each."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil
import psycopg
import redis

from cellferry.local import airflow_components, postgres_binaries, process_identity
from cellferry.local.airflow_components import API_SERVER, AirflowHealth
from cellferry.local.fleet_layout import FleetLayout
from cellferry.local.ports import is_open
from cellferry.local.run_records import RunRecord, RunRecords
from cellferry.local.server_process import ServerFailed
from cellferry.local.supervisor import NAME as SUPERVISOR
from cellferry.local.supervisor import TOPOLOGY, Event

OnEvent = Callable[[Event], None]
_UP_TIMEOUT_S = 420.0
_DOWN_TIMEOUT_S = 90.0


class Health(StrEnum):
    """What a health check found."""

    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class ComponentStatus:
    """One component as `fleet-status` shows it.

    Attributes:
        name: of the component.
        pid: its main process, None when it does not run.
        port: where it listens on 127.0.0.1, None for nowhere.
        health: what its check found: a query, a PING, Airflow's monitor.
        detail: what is wrong, or how often it was started again.
        uptime_seconds: since its last start.
        log: file of its output.
    """

    name: str
    pid: int | None
    port: int | None
    health: Health
    detail: str
    uptime_seconds: float | None
    log: Path


class Fleet:
    """The fleet of the project in `root`. Any process may hold one; the state is in files.

    Args:
        root: the project's folder.
        state: the fleet's own folder, `.local` in `root` if None.
    """

    def __init__(self, root: Path, state: Path | None = None) -> None:
        self.layout = FleetLayout.of(root, state)
        self._records = RunRecords(self.layout.run)
        self._supervisor: subprocess.Popen[bytes] | None = None

    def up(self, airflow: bool = True, on_event: OnEvent | None = None) -> None:
        """Start everything in the background and return when all of it is healthy.

        A fleet that runs already is left alone; Airflow is added to one that runs without it.
        What a killed fleet left is ended first. When a start fails or is interrupted, nothing
        of it is left running.

        Args:
            airflow: start Airflow too. False does not stop one that runs.
            on_event: called for each thing that happens meanwhile.

        Raises:
            ServerFailed: a component did not start; carries the end of its log.
        """
        say = on_event or _ignore
        layout = self.layout
        log = layout.logs / f"{SUPERVISOR}.log"
        if self._runs(with_airflow=airflow):
            say(Event("ready", "fleet", "it runs already"))
        elif self._runs(with_airflow=False):
            seen = len(list(self._events_after(0)))
            layout.airflow_wanted.touch()
            self._follow(say, log, until="airflow", seen=seen)
        else:
            self.down()  # one that is half there, still starting or killed
            layout.run.mkdir(parents=True, exist_ok=True)
            layout.logs.mkdir(exist_ok=True)
            layout.events.unlink(missing_ok=True)
            if airflow:
                layout.airflow_wanted.touch()
            self._start_supervisor(log)
            try:
                self._follow(say, log, until="fleet")
            except BaseException:
                self.down()
                raise

    def down(self, on_event: OnEvent | None = None) -> int:
        """Stop everything; returns how many processes had to be killed.

        With a living supervisor that is an orderly stop and the answer is 0; what a killed
        supervisor left is killed by its records.
        """
        say = on_event or _ignore
        record = self._records.read().get(SUPERVISOR)
        process = record.identity.process() if record else None
        if process is None and self._supervisor is not None and self._supervisor.poll() is None:
            process = psutil.Process(self._supervisor.pid)
        if process is not None:
            began = time.monotonic()
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
            if not process_identity.wait_gone([process], _DOWN_TIMEOUT_S):
                process_identity.kill_all([process])
            say(Event("stopped", SUPERVISOR, seconds=time.monotonic() - began))
        if self._supervisor is not None:
            self._supervisor.wait(10)
            self._supervisor = None
        self.layout.airflow_wanted.unlink(missing_ok=True)
        killed = self._records.clear_leftovers()
        if killed:
            say(Event("cleared", "fleet", f"{killed} processes that a killed fleet left"))
        return killed

    def wipe(self) -> None:
        """Stop everything and delete the fleet's data, also what is in the temporary folder."""
        self.down()
        for link in (
            *self.layout.cells.glob("*/postgres/data"),
            self.layout.topology / "postgres" / "data",
        ):
            if link.is_symlink():
                shutil.rmtree(link.resolve(), ignore_errors=True)
        layout = self.layout
        for folder in (layout.cells, layout.topology, layout.airflow, layout.run, layout.logs):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (layout.connections, layout.secrets, layout.ports):
            file.unlink(missing_ok=True)
        postgres_binaries.remove_copies()

    def status(self) -> list[ComponentStatus]:
        """Ask every component how it is; those that were recorded and do not run included."""
        records = self._records.read()
        api = records.get(API_SERVER)
        health = AirflowHealth.ask(api.port) if api and api.identity.is_alive else AirflowHealth({})
        return [self._status_of(record, health) for record in sorted(records.values(), key=_order)]

    @property
    def airflow_url(self) -> str:
        """Address of Airflow's UI and API."""
        return airflow_components.base_url(self.layout.read_ports()[API_SERVER])

    @property
    def airflow_credentials(self) -> tuple[str, str]:
        """User and password of Airflow's administrator."""
        secrets = self.layout.read_secrets([])
        return airflow_components.ADMIN, secrets.airflow("admin_password")

    def connections(self) -> dict[str, str]:
        """Name → URL of every connection."""
        return self.layout.read_connections()

    def environment(self) -> dict[str, str]:
        """Variables that make the command line or the traffic use this fleet."""
        return {
            "CELLFERRY_CONFIG": str(self.layout.config),
            "CELLFERRY_CONNECTIONS": str(self.layout.connections),
        }

    def _start_supervisor(self, log: Path) -> None:
        command = [sys.executable, "-P", "-m", "cellferry.local.supervisor"]
        with log.open("ab") as output:
            self._supervisor = subprocess.Popen(
                [*command, self.layout.root, self.layout.state],
                cwd=self.layout.state,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _follow(self, say: OnEvent, log: Path, *, until: str, seen: int = 0) -> None:
        """Pass on what the supervisor says until the component `until` is ready or failed."""
        deadline = time.monotonic() + _UP_TIMEOUT_S
        while True:
            ended = not self._supervisor_runs()
            for event in self._events_after(seen):
                seen += 1
                say(event)
                if event.component == until and event.kind == "ready":
                    return
                if event.component == until and event.kind == "failed":
                    raise ServerFailed(event.text, hint=f"see {log}")
            if ended:
                raise ServerFailed("the supervisor ended while starting", hint=f"see {log}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"not up after {_UP_TIMEOUT_S:g} s", hint=f"see {log}")
            time.sleep(0.1)

    def _supervisor_runs(self) -> bool:
        if self._supervisor is not None:
            return self._supervisor.poll() is None
        record = self._records.read().get(SUPERVISOR)
        return record is not None and record.identity.is_alive

    def _events_after(self, read: int) -> Iterator[Event]:
        if not self.layout.events.is_file():
            return
        text = self.layout.events.read_text(encoding="utf-8")
        for line in text[: text.rfind("\n") + 1].splitlines()[read:]:
            yield Event(**json.loads(line))

    def _runs(self, *, with_airflow: bool) -> bool:
        """Whether the supervisor said that everything is ready, and all of it lives."""
        records = self._records.read()
        names = {TOPOLOGY, SUPERVISOR}
        for cell, described in self.layout.settings().cells.items():
            names |= {f"{cell}-{kind}" for kind in described.stores}
        ready = {"fleet"}
        if with_airflow:
            names |= set(airflow_components.COMMANDS)
            ready.add("airflow")
        said = {event.component for event in self._events_after(0) if event.kind == "ready"}
        return ready <= said and all(
            name in records and records[name].identity.is_alive for name in names
        )

    def _status_of(self, record: RunRecord, health: AirflowHealth) -> ComponentStatus:
        alive = record.identity.is_alive
        trouble = self._trouble(record, health) if alive else "it does not run"
        restarts = f"started again {record.restarts} times" if record.restarts else ""
        found = Health.STOPPED
        if alive:
            found = Health.HEALTHY if trouble is None else Health.UNHEALTHY
        return ComponentStatus(
            name=record.name,
            pid=record.pid if alive else None,
            port=record.port or None,
            health=found,
            detail=trouble or restarts,
            uptime_seconds=record.uptime_seconds if alive else None,
            log=Path(record.log),
        )

    def _trouble(self, record: RunRecord, health: AirflowHealth) -> str | None:
        if record.name == SUPERVISOR:
            return None
        if record.name in airflow_components.COMMANDS:
            return health.trouble(record.name)
        connections = self.connections()
        if record.name == TOPOLOGY:
            url = connections.get(self.layout.settings().topology.connection)
        else:
            url = connections.get(record.name)
        if url is None:
            return None if is_open(record.port) else "its port is closed"
        return _ask_postgres(url) if url.startswith("postgresql") else _ask_valkey(url)


def _ask_postgres(url: str) -> str | None:
    try:
        with psycopg.connect(url, connect_timeout=3) as connection:
            connection.execute("SELECT 1")
    except psycopg.Error as error:
        return str(error).strip().splitlines()[0]
    return None


def _ask_valkey(url: str) -> str | None:
    try:
        with redis.Redis.from_url(url, socket_timeout=3, socket_connect_timeout=3) as client:
            client.ping()
    except redis.RedisError as error:
        return str(error)
    return None


def _order(record: RunRecord) -> tuple[int, str]:
    if record.name == SUPERVISOR:
        return 0, record.name
    return (1 if record.name == TOPOLOGY else 3 if record.name.startswith("airflow") else 2), (
        record.name
    )


def _ignore(_event: Event) -> None:
    pass
