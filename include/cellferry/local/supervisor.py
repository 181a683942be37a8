"""The fleet's supervisor: a process in the background that starts, watches and stops the rest.

Run as `python -m cellferry.local.supervisor ROOT STATE`; `fleet-up` does.

- Each component gets a session of its own and a record in `.local/run/`.
- A component that ends by itself is started again after a back-off, once everything that it left
  behind is gone: LocalExecutor's children and their tasks, busy backends.
- Airflow goes behind the cells and their clients.
- The reaper runs regularly, whether Airflow lives or not.
- SIGTERM or SIGINT stops everything in order: Airflow, the cells, the topology.
- SIGKILL leaves the components running; the next start, or `fleet-down`, ends them by their
  records. A record names pid, start time and boot, so no other process is ever touched.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Protocol, TextIO

from cellferry.errors import CellferryError
from cellferry.local import airflow_components, roles
from cellferry.local.airflow_components import API_SERVER, AirflowComponent, AirflowHealth
from cellferry.local.fleet_layout import FleetLayout, FleetSecrets
from cellferry.local.ports import free_ports, is_free
from cellferry.local.postgres_server import DURABLE, PostgresServer
from cellferry.local.process_identity import ProcessIdentity
from cellferry.local.regular_reaper import RegularReaper
from cellferry.local.run_records import RunRecord, RunRecords
from cellferry.local.server_process import ServerFailed
from cellferry.local.valkey_server import ValkeyServer

log = logging.getLogger("cellferry.supervisor")

NAME = "supervisor"
TOPOLOGY = "topology-postgres"
AIRFLOW_TIMEOUT_S = 180.0
_LOOK_S = 0.5
_LONGEST_BACKOFF_S = 30.0
_PORT_ATTEMPTS = 3


class Component(Protocol):
    """What the supervisor starts, watches and stops."""

    port: int

    @property
    def log(self) -> Path:
        """File of its output."""

    @property
    def identity(self) -> ProcessIdentity | None:
        """Its main process while it runs."""

    @property
    def is_running(self) -> bool:
        """Whether its main process runs."""

    def start(self) -> object:
        """Start it over whatever it left behind."""

    def stop(self) -> None:
        """End it and all its processes."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened while the fleet starts or stops.

    Attributes:
        kind: starting, ready, failed, restarted, stopped, cleared.
        component: its name; `fleet` and `airflow` stand for all of theirs.
        text: for a person.
        seconds: how long it took.
    """

    kind: str
    component: str
    text: str = ""
    seconds: float | None = None

    def __str__(self) -> str:
        took = f" ({self.seconds:.1f} s)" if self.seconds is not None else ""
        return f"{self.component} {self.kind}{took}" + (f": {self.text}" if self.text else "")


@dataclass(slots=True)
class _Watched:
    component: Component
    directory: Path | None = None
    settled: bool = False
    restarts: int = 0
    failures: int = 0
    started: float = field(default_factory=time.monotonic)
    not_before: float = 0.0


class _PortTaken(Exception):
    """Somebody took the API server's port between asking for it and binding it."""


class Supervisor:
    """Starts the whole fleet, keeps it running, stops it."""

    def __init__(self, layout: FleetLayout) -> None:
        self._layout = layout
        self._records = RunRecords(layout.run)
        self._watched: dict[str, _Watched] = {}
        self._stopping = threading.Event()
        self._events: TextIO | None = None
        self._saying = threading.Lock()
        self._reaper = RegularReaper(layout)
        self._ports = layout.read_ports()
        self._cells = list(layout.settings().cells)
        self._secrets: FleetSecrets = layout.read_secrets(self._cells)

    def run(self) -> int:
        """Start, watch until told to stop, stop; returns the exit status.

        Airflow is started when it is wanted, from the beginning or later.
        """
        began = time.monotonic()
        with self._layout.events.open("w", encoding="utf-8") as self._events:
            try:
                killed = self._records.clear_leftovers(spare=NAME)
                if killed:
                    self._say("cleared", "fleet", f"{killed} processes that a killed fleet left")
                self._start_everything()
                self._say("ready", "fleet", seconds=time.monotonic() - began)
                self._watch()
            except _Told:
                pass
            except (CellferryError, OSError) as error:
                log.exception("the fleet did not start")
                self._stop_everything()
                self._say("failed", "fleet", str(error))
                return 1
            self._stop_everything()
        return 0

    def stop(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        """Ask it to stop; a signal handler."""
        self._stopping.set()

    def _start_everything(self) -> None:
        topology = PostgresServer(
            self._layout.topology / "postgres", settings=DURABLE, port=self._ports.get(TOPOLOGY)
        )
        airflow = self._layout.airflow_wanted.exists()
        with ThreadPoolExecutor(thread_name_prefix="start") as pool:
            waiting = [pool.submit(self._start_cell, cell) for cell in self._cells]
            with self._started(TOPOLOGY, topology, topology.data):
                topology.start()
                roles.provision_topology(topology, self._secrets)
            if airflow:
                self._prepare_airflow(topology.port)
            for future in waiting:
                future.result()
        self._layout.write_connections(self._connections())
        self._layout.write_ports(self._ports)
        if airflow:
            self._start_airflow(topology.port)

    def _start_cell(self, cell: str) -> None:
        folder = self._layout.cells / cell
        postgres = PostgresServer(
            folder / "postgres", settings=DURABLE, port=self._ports.get(f"{cell}-postgres")
        )
        valkey = ValkeyServer(folder / "valkey", port=self._ports.get(f"{cell}-redis"))
        with self._started(f"{cell}-redis", valkey, valkey.data):
            valkey.start()
        with self._started(f"{cell}-postgres", postgres, postgres.data):
            postgres.start()
            roles.provision_cell(cell, postgres, valkey, self._secrets)

    @contextlib.contextmanager
    def _started(self, name: str, component: Component, directory: Path | None) -> Iterator[None]:
        """Everything about a start but the start: events, the record, the port."""
        self._check_not_told()
        began = time.monotonic()
        self._say("starting", name)
        self._watched[name] = _Watched(component, directory)
        yield
        self._record(name)
        self._ports[name] = component.port
        self._watched[name].settled = True
        self._say("ready", name, seconds=time.monotonic() - began)

    def _prepare_airflow(self, metadata_port: int) -> None:
        began = time.monotonic()
        self._write_airflow_configuration(metadata_port)
        self._say("starting", "airflow-metadata")
        airflow_components.migrate_metadata(self._layout)
        self._say("ready", "airflow-metadata", seconds=time.monotonic() - began)

    def _write_airflow_configuration(self, metadata_port: int) -> None:
        port = self._ports.get(API_SERVER, 0)
        if not port or not is_free(port):
            self._ports[API_SERVER] = port = free_ports(1)[0]
        airflow_components.write_configuration(
            self._layout, self._secrets, api_port=port, metadata_port=metadata_port
        )

    def _start_airflow(self, metadata_port: int) -> None:
        """Start Airflow's components; the metadata and the configuration are there."""
        began = time.monotonic()
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            try:
                self._start_airflow_components()
            except _PortTaken:
                for name in airflow_components.COMMANDS:
                    self._watched[name].component.stop()
                if attempt == _PORT_ATTEMPTS:
                    raise ServerFailed("no free port for Airflow's API server") from None
                self._write_airflow_configuration(metadata_port)
            else:
                break
        for name in airflow_components.COMMANDS:
            self._watched[name].settled = True
        self._layout.write_ports(self._ports)
        self._say("ready", "airflow", seconds=time.monotonic() - began)

    def _add_airflow(self, metadata_port: int) -> None:
        """Start Airflow in a fleet that runs without; a failure leaves the rest running."""
        try:
            self._prepare_airflow(metadata_port)
            self._start_airflow(metadata_port)
        except _Told:
            pass
        except (CellferryError, OSError) as error:
            log.exception("Airflow did not start")
            for name in airflow_components.COMMANDS:
                if name in self._watched:
                    self._stop_one(name)
                    del self._watched[name]
            self._layout.airflow_wanted.unlink(missing_ok=True)
            self._say("failed", "airflow", str(error))

    def _start_airflow_components(self) -> None:
        began = time.monotonic()
        # The metadata's clock is this machine's; a beat is written with whole milliseconds.
        since = datetime.now(UTC) - timedelta(seconds=1)
        waiting: dict[str, AirflowComponent] = {}
        for name in airflow_components.COMMANDS:
            port = self._ports[API_SERVER] if name == API_SERVER else 0
            waiting[name] = AirflowComponent(name, self._layout, port=port)
            self._watched[name] = _Watched(waiting[name])
            self._say("starting", name)
            waiting[name].start()
            self._record(name)
        while waiting:
            self._check_not_told()
            health = AirflowHealth.ask(self._ports[API_SERVER])
            for name, component in list(waiting.items()):
                trouble = health.trouble(name, since)
                if trouble is None:
                    del waiting[name]
                    if name == API_SERVER:
                        airflow_components.warm_up(component.port)
                    self._say("ready", name, seconds=time.monotonic() - began)
                elif not component.is_running:
                    if name == API_SERVER and not is_free(component.port):
                        raise _PortTaken
                    raise ServerFailed(f"{name} ended while starting: {component.log_tail()}")
                elif time.monotonic() - began > AIRFLOW_TIMEOUT_S:
                    raise ServerFailed(
                        f"{name} is not healthy after {AIRFLOW_TIMEOUT_S:g} s:"
                        f" {trouble}: {component.log_tail()}"
                    )
            self._stopping.wait(0.2)

    def _watch(self) -> None:
        with ThreadPoolExecutor(1, thread_name_prefix="airflow") as pool:
            adding: Future[None] | None = None
            while not self._stopping.wait(_LOOK_S):
                self._reaper.look()
                for name, watched in list(self._watched.items()):
                    self._look_at(name, watched)
                if API_SERVER in self._watched or not self._layout.airflow_wanted.exists():
                    continue
                if adding is None or adding.done():
                    adding = pool.submit(self._add_airflow, self._watched[TOPOLOGY].component.port)

    def _look_at(self, name: str, watched: _Watched) -> None:
        if self._stopping.is_set() or not watched.settled:
            return
        if not watched.component.is_running:
            self._revive(name, watched)
            return
        if isinstance(watched.component, AirflowComponent):
            watched.component.yield_the_processor()
        if time.monotonic() - watched.started > 2 * _LONGEST_BACKOFF_S:
            watched.failures = 0

    def _revive(self, name: str, watched: _Watched) -> None:
        if time.monotonic() < watched.not_before:
            return
        component = watched.component
        # Others know it by its port: wait for the port rather than take another one.
        if component.port and not is_free(component.port):
            return
        watched.restarts += 1
        watched.failures += 1
        watched.not_before = time.monotonic() + min(_LONGEST_BACKOFF_S, 2.0**watched.failures)
        watched.started = time.monotonic()
        try:
            component.start()
        except (CellferryError, OSError) as error:
            self._say("failed", name, str(error))
            return
        self._record(name)
        self._say("restarted", name, f"it had ended; restart {watched.restarts}")

    def _stop_everything(self) -> None:
        self._reaper.stop()
        # Tasks that end report to the API server, so it goes after the scheduler.
        for stage in range(4):
            names = [name for name in self._watched if _stop_stage(name) == stage]
            if names:
                with ThreadPoolExecutor(len(names), thread_name_prefix="stop") as pool:
                    list(pool.map(self._stop_one, names))

    def _stop_one(self, name: str) -> None:
        began = time.monotonic()
        self._watched[name].component.stop()
        self._records.remove(name)
        self._say("stopped", name, seconds=time.monotonic() - began)

    def _record(self, name: str) -> None:
        watched = self._watched[name]
        identity = watched.component.identity
        if identity is not None:
            directory = watched.directory.resolve() if watched.directory else None
            self._records.write(
                RunRecord.of(
                    name,
                    identity,
                    port=watched.component.port,
                    log=watched.component.log,
                    directory=directory,
                    restarts=watched.restarts,
                )
            )

    def _connections(self) -> dict[str, str]:
        found = {}
        settings = self._layout.settings()
        topology = self._watched[TOPOLOGY].component
        if isinstance(topology, PostgresServer):
            found[settings.topology.connection] = topology.url(
                roles.TOPOLOGY, self._secrets.topology, roles.TOPOLOGY
            )
        for cell, described in settings.cells.items():
            mover, admin = self._secrets.cell(cell, "mover"), self._secrets.cell(cell, "admin")
            for kind, store in described.stores.items():
                server = self._watched[f"{cell}-{kind}"].component
                if isinstance(server, PostgresServer):
                    urls = (
                        server.url(roles.MOVER, mover, roles.DATABASE),
                        server.url(roles.ADMIN, admin, roles.DATABASE),
                    )
                elif isinstance(server, ValkeyServer):
                    urls = server.url(roles.VALKEY_MOVER, mover), server.url()
                else:
                    continue
                found[store.connection] = urls[0]
                if store.admin_connection:
                    found[store.admin_connection] = urls[1]
        return found

    def _check_not_told(self) -> None:
        if self._stopping.is_set():
            raise _Told

    def _say(self, kind: str, component: str, text: str = "", seconds: float | None = None) -> None:
        event = Event(kind, component, text, seconds)
        log.info("%s", event)
        with self._saying:
            if self._events is not None and not self._events.closed:
                self._events.write(json.dumps(asdict(event)) + "\n")
                self._events.flush()


class _Told(Exception):
    """It was told to stop while it was still starting."""


def _stop_stage(name: str) -> int:
    if name == API_SERVER:
        return 1
    if name in airflow_components.COMMANDS:
        return 0
    return 3 if name == TOPOLOGY else 2


@contextlib.contextmanager
def only_one(layout: FleetLayout) -> Iterator[bool]:
    """Hold the fleet's lock; gives False when another supervisor has it. Dies with the process."""
    layout.run.mkdir(parents=True, exist_ok=True)
    with (layout.run / "supervisor.lock").open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def main() -> int:
    """Run the supervisor in this process."""
    parser = argparse.ArgumentParser(prog="cellferry.local.supervisor")
    parser.add_argument("root", type=Path)
    parser.add_argument("state", type=Path)
    arguments = parser.parse_args()
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)sZ %(levelname)s %(message)s", stream=sys.stderr
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    layout = FleetLayout.of(arguments.root, arguments.state)
    with only_one(layout) as alone:
        if not alone:
            log.error("another supervisor runs this fleet")
            return 75
        records = RunRecords(layout.run)
        supervisor = Supervisor(layout)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, supervisor.stop)
        me = ProcessIdentity.of(os.getpid())
        records.write(RunRecord.of(NAME, me, port=0, log=layout.logs / f"{NAME}.log"))
        try:
            return supervisor.run()
        finally:
            records.remove(NAME)


if __name__ == "__main__":
    sys.exit(main())
