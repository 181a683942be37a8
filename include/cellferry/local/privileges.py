"""Running a program as an ordinary account, because PostgreSQL refuses to run as root.

Nothing here changes the mode of a folder that is not ours: when the ordinary account cannot
reach a program or a data folder, the caller moves these elsewhere instead.
"""

from __future__ import annotations

import os
import pwd
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cellferry.errors import CellferryError

_CANDIDATES = ("nobody", "daemon")


@dataclass(frozen=True, slots=True)
class Account:
    """An account of the machine."""

    name: str
    uid: int
    gid: int


class NoAccount(CellferryError):
    """The machine has no ordinary account to run PostgreSQL with."""


def service_account() -> Account | None:
    """The account that servers run as: None for our own, which will do unless we are root.

    Raises:
        NoAccount: we are root and the machine has no ordinary account.
    """
    if os.geteuid() != 0:
        return None
    for name in _CANDIDATES:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if entry.pw_uid != 0:
            return Account(name, entry.pw_uid, entry.pw_gid)
    raise NoAccount(f"PostgreSQL does not run as root and none of {_CANDIDATES} exists here")


def popen_arguments(account: Account | None) -> dict[str, object]:
    """Arguments of `subprocess.Popen` that make the child run as `account`."""
    if account is None:
        return {}
    return {"user": account.uid, "group": account.gid, "extra_groups": []}


def runs(account: Account | None, *command: str | Path) -> bool:
    """Whether `account` can run `command` to success; how reachability is really found out."""
    try:
        result = subprocess.run(
            [str(word) for word in command],
            check=False,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=30,
            **popen_arguments(account),  # type: ignore[call-overload]
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return bool(result.returncode == 0)


def can_write(account: Account | None, directory: Path) -> bool:
    """Whether `account` can enter `directory` and make files in it."""
    return runs(account, "/bin/sh", "-c", 'cd "$1" && test -w . && test -x .', "sh", directory)


def give(directory: Path, account: Account | None) -> None:
    """Make `account` the owner of `directory`, which is ours, with mode 700."""
    directory.chmod(0o700)
    if account is not None:
        os.chown(directory, account.uid, account.gid)
