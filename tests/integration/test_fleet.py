"""The whole local fleet: up, healthy, watched, down, and up again over what a SIGKILL left."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import psycopg
import pytest
import redis

from cellferry import settings
from cellferry.local import ports, process_identity
from cellferry.local.airflow_components import API_SERVER, COMMANDS, WORKERS
from cellferry.local.fleet import Fleet, Health
from cellferry.local.postgres_server import PostgresServer
from cellferry.local.run_records import RunRecord, RunRecords
from cellferry.local.server_process import ServerFailed
from cellferry.local.supervisor import NAME as SUPERVISOR
from cellferry.local.supervisor import TOPOLOGY
from cellferry.niceness import GENTLE

ROOT = Path(__file__).parents[2]
CELLS = ("cell-1", "cell-2", "cell-3")
SERVERS = {TOPOLOGY, *(f"{cell}-{kind}" for cell in CELLS for kind in ("postgres", "redis"))}


@pytest.fixture(scope="module")
def _module_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(ROOT, state=tmp_path_factory.mktemp("fleet"))
    try:
        yield fleet
    finally:
        fleet.wipe()


@pytest.fixture
def fleet(_module_fleet: Fleet) -> Fleet:
    """A running fleet without Airflow."""
    _module_fleet.up(airflow=False)
    return _module_fleet


def records(fleet: Fleet) -> dict[str, RunRecord]:
    return RunRecords(fleet.layout.run).read()


def processes(fleet: Fleet) -> list[psutil.Process]:
    """Everything that the fleet runs."""
    return [one for record in records(fleet).values() for one in record.identity.session()]


def lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def test_every_component_is_healthy(fleet: Fleet) -> None:
    found = {row.name: row.health for row in fleet.status()}
    assert found == dict.fromkeys({SUPERVISOR, *SERVERS}, Health.HEALTHY)


def test_the_deployments_configuration_finds_every_connection(fleet: Fleet) -> None:
    environment = fleet.environment()
    loaded = settings.load(Path(environment["CELLFERRY_CONFIG"]))
    source = settings.from_environment(environment)
    for name in loaded.cells:
        cell = loaded.cell(name, source)
        for role in (cell.stores["postgres"].url, cell.stores["postgres"].admin_url):
            with psycopg.connect(role) as connection:
                assert connection.info.dbname == "app"
        for role in (cell.stores["redis"].url, cell.stores["redis"].admin_url):
            with redis.Redis.from_url(role) as client:
                assert client.ping()
    with psycopg.connect(settings.resolve("cellferry-topology", source)) as connection:
        connection.execute("CREATE TABLE pg_temp.mine (id int)")


def test_the_mover_has_no_superuser(fleet: Fleet) -> None:
    with psycopg.connect(fleet.connections()["cell-1-postgres"]) as connection:
        row = connection.execute(
            "SELECT rolsuper, rolcreaterole, rolbypassrls FROM pg_roles WHERE rolname = user"
        ).fetchone()
    assert row == (False, False, False)


def test_a_cell_keeps_what_it_acknowledges(fleet: Fleet) -> None:
    with psycopg.connect(fleet.connections()["cell-1-postgres"]) as connection:
        names = ("fsync", "synchronous_commit", "full_page_writes")
        found = [connection.execute(f"SHOW {name}").fetchone() for name in names]
    with redis.Redis.from_url(
        fleet.connections()["cell-1-redis-admin"], decode_responses=True
    ) as client:
        kept = client.config_get("appendonly", "appendfsync")
    assert found == [("on",)] * 3
    assert kept == {"appendonly": "yes", "appendfsync": "everysec"}


def test_secrets_are_readable_by_their_owner_only(fleet: Fleet) -> None:
    for path in (fleet.layout.connections, fleet.layout.secrets):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_nothing_listens_beyond_the_loopback(fleet: Fleet) -> None:
    assert_loopback_only(fleet)


def assert_loopback_only(fleet: Fleet) -> None:
    mine = {process.pid for process in processes(fleet)}
    listening = {
        connection.laddr.ip
        for connection in psutil.net_connections()
        if connection.pid in mine and connection.status == psutil.CONN_LISTEN
    }
    assert listening == {ports.HOST}


def test_up_leaves_a_running_fleet_alone(fleet: Fleet) -> None:
    before = {name: record.pid for name, record in records(fleet).items()}
    Fleet(fleet.layout.root, fleet.layout.state).up(airflow=False)
    assert {name: record.pid for name, record in records(fleet).items()} == before


def test_a_killed_server_is_started_again_on_its_port(fleet: Fleet) -> None:
    before = records(fleet)["cell-2-postgres"]
    os.kill(before.pid, signal.SIGKILL)
    wait_for(lambda: records(fleet)["cell-2-postgres"].pid != before.pid, 120)
    row = next(row for row in fleet.status() if row.name == "cell-2-postgres")
    assert (row.health, row.port) == (Health.HEALTHY, before.port)


def test_down_leaves_nothing_running_or_listening(fleet: Fleet) -> None:
    running = processes(fleet)
    listening = [record.port for record in records(fleet).values() if record.port]
    killed = fleet.down()
    assert killed == 0
    assert [one for one in running if lives(one)] == []
    assert [port for port in listening if ports.is_open(port)] == []
    assert records(fleet) == {}


def test_data_ports_and_passwords_stay_over_down_and_up(fleet: Fleet) -> None:
    connections = fleet.connections()
    with redis.Redis.from_url(connections["cell-3-redis-admin"]) as client:
        client.set("kept", "1")
    fleet.down()
    fleet.up(airflow=False)
    assert fleet.connections() == connections
    with redis.Redis.from_url(connections["cell-3-redis-admin"]) as client:
        assert client.get("kept") == b"1"


def test_a_port_that_somebody_took_is_exchanged(fleet: Fleet) -> None:
    taken = records(fleet)["cell-1-postgres"].port
    fleet.down()
    with listener_on(taken):
        fleet.up(airflow=False)
        assert records(fleet)["cell-1-postgres"].port != taken
        with psycopg.connect(fleet.connections()["cell-1-postgres"]) as connection:
            connection.execute("SELECT 1")


def listener_on(port: int):
    import socket

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((ports.HOST, port))
    listener.listen()
    return listener


@pytest.mark.parametrize("clear", ["up", "down"])
def test_what_a_killed_supervisor_left_is_cleared(fleet: Fleet, clear: str) -> None:
    # A backend that is busy outlives its postmaster, in a session of its own.
    busy = psycopg.connect(fleet.connections()["cell-1-postgres-admin"], autocommit=True)
    backend = psutil.Process(busy.info.backend_pid)
    busy.pgconn.send_query(b"SELECT count(*) FROM generate_series(1, 1000000000000)")
    found = records(fleet)
    killed = [psutil.Process(found[name].pid) for name in (SUPERVISOR, "cell-1-postgres")]
    assert process_identity.kill_all(killed) == 2
    left = [
        psutil.Process(record.pid)
        for name, record in found.items()
        if name not in (SUPERVISOR, "cell-1-postgres")
    ]
    assert all(map(lives, [backend, *left]))
    successor = Fleet(fleet.layout.root, fleet.layout.state)
    try:
        if clear == "up":
            successor.up(airflow=False)
            assert {row.health for row in successor.status()} == {Health.HEALTHY}
        else:
            assert successor.down() > 0
        assert [one for one in (backend, *left) if lives(one)] == []
    finally:
        busy.close()
        successor.down()


def test_a_recorded_pid_in_new_hands_is_never_touched(fleet: Fleet) -> None:
    fleet.down()
    with subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
    ) as stranger:
        old = RunRecord(
            name="cell-1-redis",
            pid=stranger.pid,
            started=psutil.Process(stranger.pid).create_time() - 1000,
            boot="an earlier boot",
            port=0,
            log="",
            since="2020-01-01T00:00:00+00:00",
        )
        RunRecords(fleet.layout.run).write(old)
        fleet.up(airflow=False)
        untouched = stranger.poll() is None
        stranger.kill()
    assert untouched


def test_a_fleet_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    fleet = Fleet(ROOT, state=tmp_path)
    blocked = tmp_path / "cells" / "cell-2" / "valkey"
    blocked.mkdir(parents=True)
    (blocked / "users.acl").write_text("this is no ACL\n")
    (blocked / "admin.password").write_text("x\n")
    try:
        with pytest.raises(ServerFailed, match=r"Valkey in .*cell-2"):
            fleet.up(airflow=False)
        assert records(fleet) == {}
    finally:
        fleet.wipe()


def test_wipe_leaves_no_data(tmp_path: Path) -> None:
    fleet = Fleet(ROOT, state=tmp_path)
    fleet.up(airflow=False)
    data = PostgresServer(tmp_path / "topology" / "postgres").data.resolve()
    fleet.wipe()
    assert not data.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A running fleet to which Airflow was added."""
    fleet = Fleet(ROOT, state=tmp_path_factory.mktemp("airflow"))
    try:
        fleet.up(airflow=False)
        fleet.up(airflow=True)
        yield fleet
    finally:
        fleet.wipe()


def test_airflow_is_healthy_and_on_the_loopback_only(airflow: Fleet) -> None:
    found = {row.name: row.health for row in airflow.status()}
    assert found == dict.fromkeys({SUPERVISOR, *SERVERS, *COMMANDS}, Health.HEALTHY)
    assert_loopback_only(airflow)


def test_airflows_api_takes_a_token_of_the_administrator_only(airflow: Fleet) -> None:
    user, password = airflow.airflow_credentials
    with httpx.Client(base_url=airflow.airflow_url, trust_env=False) as client:
        wrong = client.post("/auth/token", json={"username": user, "password": "wrong"})
        token = client.post("/auth/token", json={"username": user, "password": password})
        header = {"Authorization": f"Bearer {token.json()['access_token']}"}
        assert wrong.status_code == 401
        assert client.get("/api/v2/dags").status_code == 401
        assert client.get("/api/v2/dags", headers=header).status_code == 200


def test_airflow_resolves_the_fleets_connections(airflow: Fleet) -> None:
    program = (
        "from airflow.models import Connection\n"
        "found = Connection.get_connection_from_secrets('cell-1-postgres-admin')\n"
        "print(found.conn_type, found.login, found.schema, found.port)\n"
    )
    from cellferry.local.airflow_components import environment

    said = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(airflow.layout),
        capture_output=True,
        text=True,
        check=True,
        cwd=airflow.layout.state,
    ).stdout.splitlines()[-1]
    port = records(airflow)["cell-1-postgres"].port
    assert said == f"postgres cellferry_admin app {port}"


def test_a_killed_scheduler_and_its_children_are_replaced(airflow: Fleet) -> None:
    before = records(airflow)["airflow-scheduler"]
    children = [one for one in before.identity.session() if one.pid != before.pid]
    assert children, "LocalExecutor has its processes"
    os.kill(before.pid, signal.SIGKILL)
    wait_for(lambda: records(airflow)["airflow-scheduler"].pid != before.pid, 120)
    assert [one for one in children if lives(one)] == []
    wait_for(lambda: {row.health for row in airflow.status()} == {Health.HEALTHY}, 60)


def test_the_scheduler_goes_behind_clients_and_its_workers_do_not(airflow: Fleet) -> None:
    # In one of the workers runs a cutover, for which clients wait.
    scheduler = records(airflow)["airflow-scheduler"].pid
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    wait_for(lambda: os.getpriority(os.PRIO_PROCESS, scheduler) == max(GENTLE, ours), 60)
    assert [one.nice() for one in psutil.Process(scheduler).children()] == [ours] * WORKERS


@pytest.mark.skipif(
    not Path("/proc/self/autogroup").exists(),
    reason="this kernel does not share processors between sessions",
)
def test_the_sessions_of_airflow_go_behind_those_of_the_cells(airflow: Fleet) -> None:
    said = {
        name: int(Path(f"/proc/{one.pid}/autogroup").read_text("ascii").split()[-1])
        for name, one in records(airflow).items()
        if name != SUPERVISOR
    }
    assert said == {name: GENTLE if name in COMMANDS else 0 for name in said}
    assert set(COMMANDS) < set(said)


def test_down_stops_airflow_too(airflow: Fleet) -> None:
    running = processes(airflow)
    assert airflow.down() == 0
    assert [one for one in running if lives(one)] == []
    assert not ports.is_open(airflow.layout.read_ports()[API_SERVER])
