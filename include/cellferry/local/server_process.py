"""One server program that we start, watch and end: what PostgreSQL and Valkey have in common."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import psutil

from cellferry.errors import CellferryError
from cellferry.local import process_identity
from cellferry.local.privileges import Account, popen_arguments
from cellferry.local.process_identity import ProcessIdentity
from cellferry.niceness import give_way, take_short_turns
from cellferry.parent_process import end_with_parent


class ServerFailed(CellferryError):
    """A server of the local fleet did not start or did not stop; carries the end of its log."""


class ServerProcess:
    """A program in a session and process group of its own, with its output in a file.

    Args:
        name: what messages call it.
        log: file for its output, appended to.
        account: the account it runs as; None for our own.
        die_with_parent: end the program when the thread that started it ends, even by SIGKILL
            (Linux only): for tests. A fleet in the background outlives the command.
        is_prompt: clients wait for its answers: see `niceness.take_short_turns`.
    """

    def __init__(
        self,
        name: str,
        log: Path,
        *,
        account: Account | None = None,
        die_with_parent: bool = False,
        is_prompt: bool = False,
    ) -> None:
        self.name = name
        self.log = log
        self._account = account
        self._die_with_parent = die_with_parent
        self._is_prompt = is_prompt
        self._popen: subprocess.Popen[bytes] | None = None
        self.identity: ProcessIdentity | None = None

    def start(
        self, command: Sequence[str | Path], *, cwd: Path, environment: Mapping[str, str]
    ) -> None:
        """Start `command`; does not wait until it is ready."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._popen = subprocess.Popen(
                [str(word) for word in command],
                cwd=cwd,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # System calls that were looked up before the fork: safe with threads.
                preexec_fn=partial(end_with_parent, os.getpid()) if self._die_with_parent else None,  # noqa: PLW1509
                **popen_arguments(self._account),  # type: ignore[call-overload]
            )
        if self._is_prompt:
            with contextlib.suppress(ProcessLookupError):
                take_short_turns(self._popen.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            self.identity = ProcessIdentity.of(self._popen.pid)

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._popen.pid if self._popen and self._popen.poll() is None else None

    @property
    def is_running(self) -> bool:
        """Whether it runs."""
        return self.pid is not None

    def give_way(self) -> None:
        """Let others go before it and its session; see `niceness.give_way`."""
        if (pid := self.pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                give_way(pid)

    def wait_ready(self, is_ready: Callable[[], bool], timeout: float) -> None:
        """Wait until `is_ready` says so.

        Raises:
            ServerFailed: it ended first, or was not ready after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while not is_ready():
            if not self.is_running:
                raise ServerFailed(f"{self.name} ended while starting: {self.log_tail()}")
            if time.monotonic() > deadline:
                self.kill()
                raise ServerFailed(
                    f"{self.name} was not ready after {timeout:.0f} s: {self.log_tail()}"
                )
            time.sleep(0.03)

    def stop(self, *signals: tuple[signal.Signals, float]) -> None:
        """Send each signal and wait its seconds, until it has ended; SIGKILL is the last."""
        if self._popen is None:
            return
        for number, seconds in signals:
            if self._popen.poll() is not None:
                break
            with contextlib.suppress(ProcessLookupError):
                self._popen.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(seconds)
        self.kill()

    def kill(self) -> None:
        """SIGKILL it, its session and its descendants, and wait until they are gone.

        A task with a session of its own (`niceness.go_first`) ends when its parent, which is of
        the family or of the session, does.
        """
        if self._popen is None:
            return
        family: list[psutil.Process] = []
        if self._popen.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                family = psutil.Process(self._popen.pid).children(recursive=True)
        members = self.identity.session() if self.identity else []
        if self._popen.poll() is None:
            self._popen.kill()
        process_identity.kill_all([*family, *members])
        self._popen.wait(10)
        self._popen = None
        self.identity = None

    def log_tail(self, lines: int = 15) -> str:
        """The end of its log."""
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "(no log)"
        return "\n".join(text.splitlines()[-lines:])
