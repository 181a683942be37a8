"""The servers of the local fleet: start, stop, crash, start again."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from cellferry.local import ports, process_identity, shared_memory
from cellferry.local.postgres_server import DURABLE, PostgresServer
from cellferry.local.process_identity import ProcessIdentity
from cellferry.local.valkey_server import ValkeyServer
from fixtures.postgres import PostgresPair, postgres_versions


def lives(process: psutil.Process) -> bool:
    """A zombie that its new parent has not collected yet does not."""
    return not process_identity.wait_gone([process], 0)


@postgres_versions
def test_a_pair_answers_with_the_versions_that_were_asked_for(postgres_pair: PostgresPair) -> None:
    for server in (postgres_pair.source, postgres_pair.destination):
        with psycopg.connect(server.url()) as connection:
            assert connection.info.server_version // 10000 == server.major_version


def test_source_and_destination_databases_are_separate(fresh_databases) -> None:
    databases = fresh_databases()
    with psycopg.connect(databases.source) as connection:
        connection.execute("CREATE TABLE here (id int)")
    with psycopg.connect(databases.destination) as connection:
        row = connection.execute("SELECT to_regclass('here')").fetchone()
    assert row == (None,)


def test_postgres_keeps_commits_over_a_crash(own_postgres) -> None:
    server: PostgresServer = own_postgres(settings=DURABLE)
    with psycopg.connect(server.url()) as connection:
        connection.execute("CREATE TABLE kept (id int)")
    server.kill()
    server.start()
    with psycopg.connect(server.url()) as connection:
        assert connection.execute("SELECT count(*) FROM kept").fetchone() == (0,)


def test_kill_leaves_no_busy_backend(own_postgres) -> None:
    server: PostgresServer = own_postgres()
    busy = psycopg.connect(server.url(), autocommit=True)
    backend = psutil.Process(busy.info.backend_pid)
    busy.pgconn.send_query(b"SELECT count(*) FROM generate_series(1, 1000000000000)")
    server.kill()
    busy.close()
    assert not lives(backend)
    assert process_identity.processes_in(server.data) == []


def test_postgres_starts_over_the_backends_of_a_killed_postmaster(own_postgres) -> None:
    server: PostgresServer = own_postgres()
    busy = psycopg.connect(server.url(), autocommit=True)
    backend = psutil.Process(busy.info.backend_pid)
    busy.pgconn.send_query(b"SELECT count(*) FROM generate_series(1, 1000000000000)")
    postmaster = server.identity
    assert postmaster is not None
    os.kill(postmaster.pid, 9)
    successor = PostgresServer(server.directory, die_with_parent=True)
    # The backend is in a process group of its own and does not look up: it outlives its server.
    assert lives(backend)
    successor.start()
    try:
        assert not lives(backend)
        with psycopg.connect(successor.url()) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
    finally:
        successor.stop()
        busy.close()


def segments_of(postmaster: ProcessIdentity) -> int:
    """Segments of shared memory that `postmaster` has made."""
    listed = Path("/proc/sysvipc/shm").read_text(encoding="ascii").splitlines()[1:]
    return sum(line.split()[4] == str(postmaster.pid) for line in listed)


@pytest.mark.parametrize("killed_by_us", [True, False], ids=["by us", "by somebody"])
def test_a_killed_postmaster_leaves_no_shared_memory(own_postgres, killed_by_us: bool) -> None:
    # A machine has 4,096 segments. Whoever kills servers and deletes their folders uses them up.
    server: PostgresServer = own_postgres()
    postmaster = server.identity
    assert postmaster is not None
    assert segments_of(postmaster) == 1

    if killed_by_us:
        server.kill()
    else:
        os.kill(postmaster.pid, signal.SIGKILL)
        assert segments_of(postmaster) == 1
        server.remove()

    assert segments_of(postmaster) == 0


def test_dynamic_shared_memory_lies_in_the_data_folder(own_postgres) -> None:
    # A killed server leaves it, a megabyte or more each time. There it goes with the folder.
    server: PostgresServer = own_postgres()
    postmaster = server.identity
    assert postmaster is not None
    mapped = Path(f"/proc/{postmaster.pid}/maps").read_text(encoding="utf-8")

    assert f"{server.data.resolve()}/pg_dynshmem/" in mapped
    assert "/dev/shm/PostgreSQL." not in mapped


def test_shared_memory_that_is_anothers_or_in_use_stays(own_postgres) -> None:
    server: PostgresServer = own_postgres()
    postmaster = server.identity
    assert postmaster is not None
    record = server.data / "postmaster.pid"
    text = record.read_text(encoding="utf-8")

    assert not shared_memory.release(server.data)  # it runs
    os.kill(postmaster.pid, signal.SIGKILL)
    process_identity.kill_all(process_identity.processes_in(server.data))
    record.write_text(text.replace(str(postmaster.pid), "1", 1), encoding="utf-8")
    assert not shared_memory.release(server.data)  # another postmaster's
    record.write_text("\n".join(text.splitlines()[:5]), encoding="utf-8")
    assert not shared_memory.release(server.data)  # killed before it had one
    record.write_text(text, encoding="utf-8")
    assert shared_memory.release(server.data)
    assert not shared_memory.release(server.data)


def test_a_taken_port_is_exchanged_for_a_free_one(own_postgres, tmp_path: Path) -> None:
    first: PostgresServer = own_postgres()
    second: PostgresServer = own_postgres(port=first.port)
    assert second.port != first.port


@pytest.mark.parametrize("make", ["own_postgres", "own_valkey"])
def test_a_server_listens_on_the_loopback_only(make: str, request: pytest.FixtureRequest) -> None:
    server = request.getfixturevalue(make)()
    listening = [
        connection.laddr.ip
        for connection in psutil.Process(server.identity.pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening == [ports.HOST]


@pytest.mark.parametrize("make", ["own_postgres", "own_valkey"])
def test_stop_closes_the_port_and_start_opens_it_again(
    make: str, request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue(make)()
    port = server.port
    server.stop()
    assert not ports.is_open(port)
    server.start()
    assert server.port == port
    assert ports.is_open(port)


def test_secrets_are_readable_by_their_owner_only(own_postgres, own_valkey) -> None:
    postgres: PostgresServer = own_postgres()
    valkey: ValkeyServer = own_valkey()
    for secret in (
        postgres.directory / "superuser.password",
        valkey.directory / "admin.password",
        valkey.acl_file,
    ):
        assert stat.S_IMODE(secret.stat().st_mode) & 0o077 == 0, secret


def test_valkey_refuses_clients_without_a_password(own_valkey) -> None:
    server: ValkeyServer = own_valkey()
    with (
        redis.Redis(host=ports.HOST, port=server.port) as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.ping()


def test_valkey_keeps_keys_and_users_over_a_crash(own_valkey) -> None:
    server: ValkeyServer = own_valkey()
    with redis.Redis.from_url(server.url()) as client:
        client.execute_command("ACL", "SETUSER", "org-7", "on", ">secret", "~org:{7}:*", "+@all")
        client.acl_save()
        client.set("org:{7}:x", "1")
    server.kill()
    server.start()
    with redis.Redis.from_url(server.url("org-7", "secret")) as client:
        assert client.get("org:{7}:x") == b"1"


def test_a_server_for_tests_ends_with_its_parent(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import os, sys
        from pathlib import Path
        from cellferry.local.valkey_server import ValkeyServer
        server = ValkeyServer(Path(sys.argv[1]), die_with_parent=True).start()
        print(server.identity.pid, server.port, flush=True)
        os.kill(os.getpid(), 9)
        """
    )
    said = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
    ).stdout
    pid, port = map(int, said.split())
    if psutil.pid_exists(pid):
        assert process_identity.wait_gone([psutil.Process(pid)], 60)
    assert not ports.is_open(port)


def test_a_process_lives_until_the_last_of_its_threads_has_ended() -> None:
    program = textwrap.dedent(
        """
        import ctypes, socket, threading, time
        listener = socket.create_server(("127.0.0.1", 0))
        print(listener.getsockname()[1], flush=True)
        threading.Thread(target=time.sleep, args=(600,)).start()
        ctypes.CDLL(None).pthread_exit(None)
        """
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        process = psutil.Process(server.pid)
        identity = ProcessIdentity.of(server.pid)
        while process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert identity.is_alive
        assert not process_identity.wait_gone([process], 0)
        assert process_identity.kill_all([process]) == 1
        assert not identity.is_alive
        assert not ports.is_open(port)


def test_an_identity_does_not_match_another_process_with_the_same_id() -> None:
    me = ProcessIdentity.of(os.getpid())
    assert me.is_alive
    assert not ProcessIdentity(me.pid, me.started - 1, me.boot).is_alive
    assert not ProcessIdentity(me.pid, me.started, "another boot").is_alive
