"""Who goes first where movers, servers and their clients share a machine.

A niceness alone does not say: Linux may share the processors between sessions first, each as much
as any other, and then a niceness counts only within its session ("autogroups", sched(7)). So what
yields takes along the session that it leads, and what clients wait for gets a session of its own.
Where there are no autogroups, the niceness says it all.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import struct
import sys
import time
from pathlib import Path

#: Niceness of work that nobody waits for: cutovers, servers and their clients go first.
GENTLE = 10

#: Set where all that moves an organization, and its clients, share one machine: the local fleet.
ONE_MACHINE = "CELLFERRY_ONE_MACHINE"

#: What a prompt process may hold a processor for at a time, in nanoseconds; the least there is.
_SHORT_TURN_NS = 100_000
#: The kernel lets an ordinary user change one session every 0.1 s.
_ASK_FOR_S = 2.0

_LIBC = ctypes.CDLL(None, use_errno=True)  # loaded once: what is called after a fork finds it
_PR_SET_PDEATHSIG = 1
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
    niceness = Path(f"/proc/{pid}/autogroup")
    deadline = time.monotonic() + _ASK_FOR_S
    while True:
        try:
            niceness.write_text(str(GENTLE), encoding="ascii")
        except BlockingIOError:
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)
        except OSError:
            return
        else:
            return


def go_first() -> None:
    """Share the processors as a session of its own, no longer as one of the parent's session.

    For what clients wait for, in a session that has given way. It ends with its parent process, as
    a session is ended as a whole. Does nothing where processors are not shared by sessions.
    """
    if not Path("/proc/self/autogroup").exists():
        return
    parent = os.getppid()
    with contextlib.suppress(OSError):
        if os.getpgid(0) == os.getpid():
            # The leader of a process group cannot open a session; it leads its own again at once.
            os.setpgid(0, os.getpgid(parent))
        os.setsid()
    take_short_turns(os.getpid())
    end_with_parent(parent)


def end_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Let the kernel end this process when its parent ends, even if that was killed (Linux only).

    Args:
        parent: its pid. Where it is no longer the parent, it has ended already, and so does this.
        number: the signal that ends this process.
    """
    if not sys.platform.startswith("linux"):
        return
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def take_short_turns(pid: int) -> None:
    """Let process `pid`, and what it forks from now on, have processors sooner and for less time.

    For servers: they answer in less than a turn, and clients wait. Their share of the processors
    stays the same. Linux 6.12 and later; does nothing elsewhere.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None or not sys.platform.startswith("linux"):
        return
    wish = _SCHED_ATTR.pack(
        _SCHED_ATTR.size, 0, 0, os.getpriority(os.PRIO_PROCESS, pid), 0, _SHORT_TURN_NS, 0, 0
    )
    # Refused by older kernels: then it takes turns as long as everybody's.
    _LIBC.syscall(number, pid, wish, 0)
