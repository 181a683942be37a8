"""Which process we started, so that no other one is ever signalled.

A process id alone may have been given to somebody else by now. An identity is the id together
with the process's start time and the machine's boot: all three match, or it is not ours.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Name of the machine's current boot."""
    if _BOOT_ID.is_file():
        return _BOOT_ID.read_text(encoding="ascii").strip()
    return str(int(psutil.boot_time()))


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process, distinguishable from a later one with the same id.

    Attributes:
        pid: its id.
        started: start time; on Linux clock ticks since boot, which no change of the clock moves.
        boot: name of the boot it belongs to.
    """

    pid: int
    started: float
    boot: str

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity:
        """Identity of process `pid`.

        Raises:
            psutil.NoSuchProcess: there is none.
        """
        return cls(pid, _start_time(pid), boot_id())

    def process(self) -> psutil.Process | None:
        """The process, or None when it has ended; a zombie has ended."""
        if not self._holds_its_pid:
            return None
        try:
            process = psutil.Process(self.pid)
        except psutil.NoSuchProcess:
            return None
        return process if _lives(process) else None

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self.process() is not None

    def session(self) -> list[psutil.Process]:
        """Living members of the session it leads or led: all its descendants that stayed in it.

        Airflow gives each task a process group of its own, but the session stays, except for a
        task that ends with its parent (`niceness.go_first`). The kernel does not give a pid to a
        new process while a session of that number has members, so the session is ours unless its
        number is in new hands.
        """
        if self.boot != boot_id() or (psutil.pid_exists(self.pid) and not self._holds_its_pid):
            return []
        return [process for process in _living() if _session_of(process) == self.pid]

    @property
    def _holds_its_pid(self) -> bool:
        try:
            return self.boot == boot_id() and _start_time(self.pid) == self.started
        except psutil.NoSuchProcess:
            return False


def processes_in(directory: Path) -> list[psutil.Process]:
    """Living processes whose working directory is `directory` or below it.

    A PostgreSQL server and each of its backends work in the data directory, even when the
    postmaster was killed and the backends, each in a process group of its own, were left.
    """
    place = directory.resolve()
    found = []
    for process in _living():
        with contextlib.suppress(psutil.Error, OSError):
            where = Path(process.cwd())
            if where == place or place in where.parents:
                found.append(process)
    return found


def kill_all(processes: Iterable[psutil.Process], timeout: float = 10.0) -> int:
    """SIGKILL the processes and wait until they are gone; returns how many there were.

    psutil compares the start time before it signals, so an id in new hands is safe.
    """
    mine = [process for process in processes if process.pid != os.getpid()]
    for process in mine:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    wait_gone(mine, timeout)
    return len(mine)


def wait_gone(processes: Iterable[psutil.Process], timeout: float) -> bool:
    """Wait up to `timeout` seconds until none of the processes lives; zombies do not live."""
    deadline = time.monotonic() + timeout
    left = list(processes)
    while True:
        left = [process for process in left if _lives(process)]
        if not left:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)


def _start_time(pid: int) -> float:
    stat = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self/stat").is_file():
        return psutil.Process(pid).create_time()
    try:
        # The second field, the program's name in brackets, may itself hold spaces and brackets.
        return float(
            stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        )
    except (OSError, IndexError) as error:
        raise psutil.NoSuchProcess(pid) from error


def _lives(process: psutil.Process) -> bool:
    # A zombie whose other threads have not ended yet still holds its files and ports.
    try:
        return process.is_running() and (
            process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1
        )
    except psutil.NoSuchProcess:
        return False


def _living() -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if _lives(process)]


def _session_of(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return None
