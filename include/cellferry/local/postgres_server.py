"""A PostgreSQL server of our own: real programs, its own data folder, 127.0.0.1 only."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import psycopg

from cellferry.local import postgres_binaries, process_identity, shared_memory
from cellferry.local.ports import HOST, free_ports, is_free
from cellferry.local.privileges import (
    Account,
    can_write,
    give,
    popen_arguments,
    service_account,
)
from cellferry.local.process_identity import ProcessIdentity
from cellferry.local.server_process import ServerFailed, ServerProcess

SUPERUSER = "postgres"

DURABLE: Mapping[str, str] = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
}
"""What a cell promises: an acknowledged commit survives a crash (hazard 15)."""

FAST: Mapping[str, str] = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_wal_size": "128MB",  # the data of tests may live in memory
}
"""For tests that do not crash the machine. A killed server still loses nothing that it wrote
to the operating system, but `synchronous_commit = off` may lose the last commits."""

_BASE: Mapping[str, str] = {
    "shared_buffers": "64MB",
    "max_connections": "200",
    "max_wal_size": "1GB",
    # In the data folder, so that what a killed server leaves goes with it.
    "dynamic_shared_memory_type": "mmap",
    "unix_socket_directories": "",
    "listen_addresses": HOST,
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %q%u@%d %a ",
    "log_lock_waits": "on",
    "jit": "off",
}
_ATTEMPTS = 5


class PostgresServer:
    """A PostgreSQL server in `directory`.

    As root the server runs as an ordinary account. Where that account cannot reach `directory`,
    the data live in the temporary folder and `directory/data` is a link to them; where it cannot
    reach the programs, it gets a copy of them.

    Args:
        directory: its folder; made if absent. Holds the data, the log and the superuser's
            password, and can be started again.
        bin_dir: programs of another PostgreSQL than the wheel's.
        settings: server settings over the defaults; `FAST` if None, give `DURABLE` or your own
            for a server that must keep what it acknowledged.
        port: a port to prefer, if it is free.
        die_with_parent: the server ends with the thread that started it, for tests.
    """

    def __init__(
        self,
        directory: Path,
        *,
        bin_dir: Path | None = None,
        settings: Mapping[str, str] | None = None,
        port: int | None = None,
        die_with_parent: bool = False,
    ) -> None:
        self.directory = directory
        self.port = port or 0
        self._given_bin_dir = bin_dir or postgres_binaries.wheel_bin_dir()
        self._settings = {**_BASE, **(FAST if settings is None else settings)}
        self._account: Account | None = service_account()
        self._process = ServerProcess(
            f"PostgreSQL in {directory}",
            directory / "server.log",
            account=self._account,
            die_with_parent=die_with_parent,
            is_prompt=True,
        )

    @property
    def bin_dir(self) -> Path:
        """The programs it runs."""
        return postgres_binaries.reachable(self._given_bin_dir, self._account)

    @property
    def major_version(self) -> int:
        """Major version, for example 18."""
        return postgres_binaries.major_version(self._given_bin_dir)

    @property
    def data(self) -> Path:
        """The data folder, or the link to it."""
        return self.directory / "data"

    @property
    def log(self) -> Path:
        """The server's log."""
        return self._process.log

    @property
    def identity(self) -> ProcessIdentity | None:
        """The running postmaster."""
        return self._process.identity if self._process.is_running else None

    @property
    def is_running(self) -> bool:
        """Whether the postmaster runs."""
        return self._process.is_running

    @property
    def superuser_password(self) -> str:
        """Password of the superuser `postgres`, kept in a file of mode 600."""
        return (self.directory / "superuser.password").read_text(encoding="ascii").strip()

    def url(
        self,
        user: str = SUPERUSER,
        password: str | None = None,
        dbname: str = "postgres",
    ) -> str:
        """Connection URL; for the superuser when no `user` is given."""
        secret = self.superuser_password if user == SUPERUSER and password is None else password
        credentials = quote(user, safe="")
        if secret is not None:
            credentials += ":" + quote(secret, safe="")
        return f"postgresql://{credentials}@{HOST}:{self.port}/{quote(dbname, safe='')}"

    def start(self, timeout: float = 60.0) -> Self:
        """Initialize the data folder if needed, start, and wait until a query is answered.

        What a killed predecessor left of itself in the data folder is ended first.

        Raises:
            ServerFailed: it did not start; carries the end of its log.
        """
        if self.is_running:
            return self
        self.directory.mkdir(parents=True, exist_ok=True)
        self._place_data()
        if not (self.data / "PG_VERSION").is_file():
            self._initialize()
        self.clear_leftovers()
        for attempt in range(1, _ATTEMPTS + 1):
            if not self.port or not is_free(self.port):
                self.port = free_ports(1)[0]
            try:
                self._launch(timeout)
            except ServerFailed:
                # Somebody may have taken the port between asking for it and binding it.
                if attempt == _ATTEMPTS or is_free(self.port):
                    raise
                self.port = 0
            else:
                break
        return self

    def follow(self, primary: PostgresServer, name: str, timeout: float = 60.0) -> Self:
        """Start as a streaming standby of `primary`, a copy of it as it is now.

        Asynchronous, unless the primary's `synchronous_standby_names` has its name.

        Args:
            primary: a running server of the same programs.
            name: the standby's `application_name`, as the primary sees it.
            timeout: seconds to be ready in.

        Raises:
            ServerFailed: it could not be copied, or did not start.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self._place_data()
        secret = self.directory / "superuser.password"
        secret.touch(mode=0o600)
        secret.write_text(primary.superuser_password + "\n", encoding="ascii")
        source = f"{primary.url(dbname='')}?application_name={quote(name, safe='')}"
        self._run_program(
            *("pg_basebackup", "--dbname", source, "--wal-method", "stream"),
            *("--checkpoint", "fast", "--write-recovery-conf", "--no-sync"),
        )
        return self.start(timeout)

    def promote(self) -> None:
        """Make a standby a primary, and wait until it takes writes.

        Raises:
            ServerFailed: it did not become one.
        """
        with psycopg.connect(self.url(), autocommit=True) as connection:
            row = connection.execute("SELECT pg_promote(true, 30)").fetchone()
        if row != (True,):
            raise ServerFailed(f"{self.directory} was not promoted; see {self.log}")

    def stop(self) -> None:
        """Fast shutdown: sessions are disconnected, everything acknowledged is kept."""
        self._process.stop((signal.SIGINT, 20.0), (signal.SIGQUIT, 5.0))

    def kill(self) -> None:
        """SIGKILL the postmaster and every backend, as a crash would."""
        left = process_identity.processes_in(self.data)
        self._process.kill()
        process_identity.kill_all(left)
        shared_memory.release(self.data)

    def clear_leftovers(self) -> int:
        """SIGKILL what still works in the data folder; returns how many processes it was.

        A killed postmaster's busy backends go on until they look up, and would hold the shared
        memory that the next postmaster needs.
        """
        if self.is_running or not self.data.exists():
            return 0
        killed = process_identity.kill_all(process_identity.processes_in(self.data))
        shared_memory.release(self.data)
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        return killed

    def remove(self) -> None:
        """Stop and delete everything, also what lives in the temporary folder."""
        self.kill()
        if self.data.is_symlink():
            shutil.rmtree(self.data.resolve(), ignore_errors=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _place_data(self) -> None:
        if self.data.exists():  # a link to a folder that is gone does not exist
            return
        self.data.unlink(missing_ok=True)
        self.data.mkdir()
        give(self.data, self._account)
        if not can_write(self._account, self.data):
            self.data.rmdir()
            elsewhere = Path(tempfile.mkdtemp(prefix="cellferry-data-"))
            give(elsewhere, self._account)
            self.data.symlink_to(elsewhere)

    def _initialize(self) -> None:
        password = secrets.token_urlsafe(24)
        secret = self.directory / "superuser.password"
        secret.touch(mode=0o600)
        secret.write_text(password + "\n", encoding="ascii")
        with tempfile.NamedTemporaryFile("w", prefix="cellferry-", suffix=".pw") as handed:
            handed.write(password)
            handed.flush()
            if self._account is not None:
                os.chown(handed.name, self._account.uid, self._account.gid)
            self._run_program(
                *("initdb", "--username", SUPERUSER, "--pwfile", handed.name),
                *("--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C.UTF-8"),
                "--no-sync",
            )

    def _run_program(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs on the data folder, as its account.

        Raises:
            ServerFailed: it failed; with what it said.
        """
        result = subprocess.run(
            [self.bin_dir / program, "--pgdata", self.data.resolve(), *arguments],
            check=False,
            cwd=self.data.resolve(),
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            **popen_arguments(self._account),  # type: ignore[call-overload]
        )
        if result.returncode != 0:
            said = f"{result.stdout}{result.stderr}"
            raise ServerFailed(f"{program} in {self.data} failed: {said}")

    def _launch(self, timeout: float) -> None:
        command: list[str | Path] = [self.bin_dir / "postgres", "-D", self.data.resolve()]
        for name, value in {**self._settings, "port": str(self.port)}.items():
            command += ["-c", f"{name}={value}"]
        self._process.start(command, cwd=self.data.resolve(), environment=self._environment())
        self._process.wait_ready(self._answers, timeout)

    def _answers(self) -> bool:
        try:
            with psycopg.connect(self.url(), connect_timeout=2, autocommit=True) as connection:
                row = connection.execute("SELECT current_setting('data_directory')").fetchone()
        except psycopg.OperationalError:
            return False
        # Another server may sit on the port we asked for.
        return row is not None and Path(row[0]) == self.data.resolve()

    def _environment(self) -> dict[str, str]:
        return {"PATH": os.defpath, "LC_ALL": "C.UTF-8", "TZ": "UTC", "HOME": "/"}
