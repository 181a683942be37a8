"""Temporary folders in memory, where the machine has room: tests make thousands of databases.

A database is some three hundred files. To make them took 0.15 s of a processor on the disk of one
virtual machine, and 0.01 s in memory. What a killed server leaves is the same in both: the kernel
keeps it. Only a machine that loses its power tells them apart, and no test has one.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

MEMORY = Path("/dev/shm")
CONTAINER = Path("/sys/fs/cgroup")
PREFIX = "cellferry-tests-"
#: A run of all tests takes 1 to 2 GiB there.
ROOM = 5 * 1024**3


def use_memory() -> Path | None:
    """Let temporary files of this process and its children live in memory until it ends.

    A `TMPDIR` that is set stays; so do children of a process that called this. Folders of
    processes that were killed are removed.

    Returns:
        The folder; None where they stay: a `TMPDIR` is set, or there is too little room.
    """
    if os.environ.get("TMPDIR") or not _is_fit(MEMORY):
        return None
    around = os.open(MEMORY, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(around, fcntl.LOCK_EX)  # so that nobody takes the new folder for a dead one
        _remove_dead(MEMORY)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=MEMORY))
        folder.chmod(0o1777)  # as root's servers have an account of their own
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # open until this process ends
        fcntl.flock(held, fcntl.LOCK_EX)
    finally:
        os.close(around)
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None
    atexit.register(_remove_own, folder, os.getpid())
    return folder


def _is_fit(where: Path) -> bool:
    try:
        found = os.statvfs(where)
        free = min(found.f_bavail * found.f_frsize, _machine_has(), _container_has())
    except (OSError, ValueError):
        return False
    runs_programs = not found.f_flag & os.ST_NOEXEC
    return runs_programs and os.access(where, os.W_OK) and free >= ROOM


def _machine_has() -> float:
    """Return how much memory may still be used, bytes."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return float(rest.split()[0]) * 1024
    return 0.0


def _container_has() -> float:
    """Return the same of a container's limit; infinity where there is none."""
    limit = CONTAINER / "memory.max"
    if not limit.exists() or (text := limit.read_text(encoding="ascii").strip()) == "max":
        return float("inf")
    return float(text) - float((CONTAINER / "memory.current").read_text(encoding="ascii"))


def _remove_dead(where: Path) -> None:
    """Remove what processes left that do not hold their folder's lock any more."""
    for folder in where.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(held)


def _remove_own(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not in a child that was forked
        shutil.rmtree(folder, ignore_errors=True)
