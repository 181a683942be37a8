"""Starts steps in their own processes and speaks with them: the harness's end of `step`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Silent(Exception):
    """A step said nothing within its time."""


@dataclass
class Ended:
    """How a step ended. `error` is None for success, `killed` for a process that is gone."""

    error: str | None
    text: str = ""
    transient: bool = False
    unexpected: bool = False

    @property
    def ok(self) -> bool:
        return self.error is None

    def __str__(self) -> str:
        if self.ok:
            return f"ok: {self.text}" if self.text else "ok"
        return f"{self.error}: {self.text}"


@dataclass
class StepProcess:
    """A step that runs in another process."""

    pid: int
    _socket: socket.socket = field(repr=False)
    log: Path
    _buffer: bytes = b""
    ended: Ended | None = None
    is_waiting: bool = False

    def wait_at(self, seconds: float) -> bool:
        """Wait until it is at its phase; False when it ended before.

        Raises:
            Silent: neither within `seconds`.
        """
        message = self._hear(time.monotonic() + seconds)
        if message is None or message["event"] != "at":
            return False
        self.is_waiting = True
        return True

    def go(self) -> None:
        """Let it go on from its phase."""
        if self.is_waiting:
            self.is_waiting = False
            with contextlib.suppress(OSError):
                self._socket.sendall(b"{}\n")

    def go_on_without_waiting(self) -> None:
        """Let it go on from its phase, also if it has not got there yet."""
        self.is_waiting = True
        self.go()

    def wait_end(self, seconds: float) -> Ended:
        """Wait until it has ended.

        Raises:
            Silent: it has not within `seconds`.
        """
        deadline = time.monotonic() + seconds
        while self.ended is None:
            self._hear(deadline)
        return self.ended

    def stack(self) -> str:
        """Return where it hangs."""
        before = self.log.stat().st_size
        self.signal(signal.SIGUSR1)
        time.sleep(0.5)
        with self.log.open("rb") as file:
            file.seek(before)
            return file.read().decode(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL it and wait until it is gone."""
        self.signal(signal.SIGKILL)
        with contextlib.suppress(Silent):
            self.wait_end(10)

    def close(self) -> None:
        if self.ended is None:
            self.kill()
        self._socket.close()

    def _hear(self, deadline: float) -> dict[str, Any] | None:
        while b"\n" not in self._buffer:
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                raise Silent(f"process {self.pid} said nothing") from None
            except OSError:
                data = b""
            if not data:
                self.ended = Ended("killed", "its process is gone")
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if message["event"] == "end":
            message.pop("event")
            self.ended = Ended(**message)
            return None
        return message


class Stepper:
    """Starts steps, for any thread. One for each world."""

    def __init__(self, directory: Path, config: Path, sabotage: str | None = None) -> None:
        # A Unix socket's path is short: not below a deep temporary folder.
        self._path = f"/tmp/cellferry-fault-{os.getpid()}-{time.monotonic_ns() % 10**9}.sock"
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(self._path)
        self._door.listen(16)
        self._number = 0
        self._lock = threading.Lock()
        self._log_path = directory / "steps.log"
        self._log = self._log_path.open("ab")
        self._server_process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.fault.step"),
                *("--control", self._path, "--config", str(config)),
                *(("--sabotage", sabotage) if sabotage else ()),
            ],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'include'}"},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        self._server, _ = self._accept(60)

    def start(
        self,
        steps: list[str],
        migration: int,
        connections: Mapping[str, str],
        *,
        halt_at: str | None = None,
        nth: int = 1,
        give_up_at: str | None = None,
        expired_after_s: float | None = None,
    ) -> StepProcess:
        """Start a process that does `steps` in turn."""
        request = {
            "steps": steps,
            "migration": migration,
            "connections": dict(connections),
            "halt_at": halt_at,
            "nth": nth,
            "give_up_at": give_up_at,
            "expired_after_s": expired_after_s,
        }
        with self._lock:
            self._number += 1
            request["id"] = self._number
            self._server.sendall(json.dumps(request).encode() + b"\n")
            connection, hello = self._accept(20)
            if hello["id"] != self._number:
                raise RuntimeError(f"step {hello['id']} answered instead of {self._number}")
        return StepProcess(hello["pid"], connection, self._log_path)

    def close(self) -> None:
        """End every step and the process that forks them."""
        self._server.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._server_process.wait(5)
        self._server_process.kill()
        self._server_process.wait()
        self._door.close()
        self._log.close()
        Path(self._path).unlink(missing_ok=True)

    def _accept(self, seconds: float) -> tuple[socket.socket, dict[str, Any]]:
        self._door.settimeout(seconds)
        connection, _ = self._door.accept()
        connection.settimeout(10)
        said = b""
        while not said.endswith(b"\n"):
            byte = connection.recv(1)
            if not byte:
                raise RuntimeError("the process that forks steps ended; see steps.log")
            said += byte
        return connection, json.loads(said)
