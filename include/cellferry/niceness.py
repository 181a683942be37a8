"""Who goes first where movers, servers and their clients share a machine.

A niceness alone does not say: Linux may share the processors between sessions first, each as much
as any other, and then a niceness counts only within its session ("autogroups", sched(7)). So what
yields takes along the session that it leads, and what clients wait for gets a session of its own.
Where processors are not shared so, the niceness says it all.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import subprocess
import sys
import time
from pathlib import Path

from cellferry.parent_process import end_with_parent

#: Niceness of work that nobody waits for: cutovers, servers and their clients go first.
GENTLE = 10

#: Set where all that moves an organization, and its clients, share one machine: the local fleet.
ONE_MACHINE = "CELLFERRY_ONE_MACHINE"

#: What a prompt process may hold a processor for at a time, in nanoseconds; the least there is.
_SHORT_TURN_NS = 100_000
#: For how long to ask. The kernel lets ordinary users, all together, change ten sessions a second.
_ASK_FOR_S = 1.0

#: Number of the system call sched_setattr, for which libc has no function.
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
#: struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period
_SCHED_ATTR = struct.Struct("IIQiIQQQ")


def give_way(pid: int = 0) -> None:
    """Let others go before process `pid` (by default this one); it cannot take that back.

    Raises:
        ProcessLookupError: there is no such process.
    """
    pid = pid or os.getpid()
    os.setpriority(os.PRIO_PROCESS, pid, max(GENTLE, os.getpriority(os.PRIO_PROCESS, pid)))
    if os.getsid(pid) == pid:
        session_gives_way(pid)


def session_gives_way(pid: int) -> None:
    """Let other sessions go before the one of process `pid`, where processors are shared so.

    The processes in it keep their places among each other. Does nothing where it cannot be done.
    """
    deadline = time.monotonic() + _ASK_FOR_S
    while not _ask_for_session(pid) and time.monotonic() < deadline:
        time.sleep(0.05)


def _ask_for_session(pid: int) -> bool:
    """Return whether there is nothing more to be done: False when to be asked again."""
    try:
        Path(f"/proc/{pid}/autogroup").write_text(str(GENTLE), encoding="ascii")
    except BlockingIOError:
        return False
    except PermissionError:
        if pid != os.getpid():
            return True
        # Airflow's tasks hide their memory (PR_SET_DUMPABLE), and their part of /proc is root's
        # then. That ends with another program, and one in the same session may say the same.
        say = f"echo {GENTLE} > /proc/self/autogroup"
        said = subprocess.run(["sh", "-c", say], check=False, stderr=subprocess.DEVNULL)
        return said.returncode == 0
    except OSError:
        return True
    return True


def go_first() -> None:
    """Share the processors as a session of its own, no longer as one of the parent's session.

    For what clients wait for, in a session that has given way. As a session is ended as a whole, it
    ends with its parent process, at once: what it leaves in the middle is for its next try. Does
    nothing where the kernel knows no autogroups.
    """
    if not Path("/proc/self/autogroup").exists():
        return
    parent = os.getppid()
    leads = os.getpgid(0) == os.getpid()
    with contextlib.suppress(OSError):
        if leads:
            # The leader of a process group cannot open a session; it leads its own again at once.
            os.setpgid(0, os.getpgid(parent))
        os.setsid()
    if leads and os.getpgid(0) != os.getpid():
        os.setpgid(0, 0)
    take_short_turns(os.getpid())
    end_with_parent(parent)


def take_short_turns(pid: int) -> None:
    """Let process `pid`, and what it forks from now on, have processors sooner and for less time.

    For servers, and for what clients wait for: it is done in less than a turn. Its share of the
    processors stays the same. Linux 6.12 and later; nothing changes elsewhere.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None or not sys.platform.startswith("linux"):
        return
    wish = _SCHED_ATTR.pack(
        _SCHED_ATTR.size, 0, 0, os.getpriority(os.PRIO_PROCESS, pid), 0, _SHORT_TURN_NS, 0, 0
    )
    # A refusal changes nothing: then it takes turns as long as everybody's.
    ctypes.CDLL(None).syscall(number, pid, wish, 0)
