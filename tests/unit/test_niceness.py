"""Who goes first on one machine: what yields takes its session along, a cutover leaves it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from cellferry.local.server_process import ServerProcess
from cellferry.niceness import GENTLE, give_way, session_gives_way

AUTOGROUPS = Path("/proc/self/autogroup").exists()
needs_autogroups = pytest.mark.skipif(
    not AUTOGROUPS, reason="this kernel does not share processors between sessions"
)

#: Forks a child that leads a process group, as Airflow does for a task, and goes first there.
#: Prints the pids; ends when it is told, and its child only by the parent's end.
TASK = """
import os, sys, time
from cellferry.niceness import go_first
child = os.fork()
if child == 0:
    os.setpgid(0, 0)
    go_first()
    print(os.getppid(), os.getpid(), flush=True)
    time.sleep(120)
    os._exit(0)
sys.stdin.read()
os._exit(0)
"""
#: As a task: its part of /proc belongs to root, whoever it runs as.
HIDDEN_TASK = """
import ctypes, os, sys
from cellferry.niceness import give_way, go_first
ctypes.CDLL(None).prctl(4, 0)  # PR_SET_DUMPABLE
child = os.fork()
if child == 0:
    os.setpgid(0, 0)
    go_first()
    print(open("/proc/self/autogroup").read().strip(), flush=True)
    give_way()
    print(open("/proc/self/autogroup").read().strip(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""
SLEEP = "print('here', flush=True); import time; time.sleep(120)"


@contextmanager
def started(program: str) -> Iterator[subprocess.Popen[str]]:
    """Run `program` in a session of its own until the block ends."""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    """Return the next line that it prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def autogroup(pid: int) -> tuple[str, int]:
    """Return name and niceness of the group with which a process shares the processors."""
    name, _, niceness = Path(f"/proc/{pid}/autogroup").read_text(encoding="ascii").split()
    return name, int(niceness)


def wait_until_gone(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        deadline = time.monotonic() + 30
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"process {pid} goes on"
            time.sleep(0.02)


@needs_autogroups
def test_what_goes_first_leaves_a_session_that_has_given_way() -> None:
    with started(TASK) as parent:
        first, task = map(int, said(parent).split())
        assert first == parent.pid
        session_gives_way(parent.pid)
        assert os.getsid(task) == os.getpgid(task) == task
        assert autogroup(parent.pid)[1] == GENTLE
        assert autogroup(task)[1] == 0
        assert autogroup(task)[0] != autogroup(parent.pid)[0]


@needs_autogroups
def test_what_went_first_gives_way_afterwards_also_with_its_memory_hidden() -> None:
    with started(HIDDEN_TASK) as parent:
        before, after = (said(parent).split() for _ in range(2))
    assert before[0] == after[0]
    assert (int(before[-1]), int(after[-1])) == (0, GENTLE)


@needs_autogroups
@pytest.mark.parametrize("how", ["it ends", "it is killed"])
def test_what_goes_first_ends_with_its_parent(how: str) -> None:
    with started(TASK) as parent:
        _, task = map(int, said(parent).split())
        if how == "it ends":
            assert parent.stdin is not None
            parent.stdin.close()
        else:
            parent.kill()
        parent.wait(30)
        wait_until_gone(task)


@needs_autogroups
def test_what_leads_a_session_takes_it_along() -> None:
    with started(SLEEP) as process:
        assert said(process) == "here"
        give_way(process.pid)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) >= GENTLE
        assert autogroup(process.pid)[1] == GENTLE


@needs_autogroups
def test_what_does_not_lead_its_session_leaves_it_as_it_is() -> None:
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}])"
    with started(child) as leader:
        assert said(leader) == "here"
        (process,) = psutil.Process(leader.pid).children()
        give_way(process.pid)
        assert process.nice() >= GENTLE
        assert os.getpriority(os.PRIO_PROCESS, leader.pid) == os.getpriority(os.PRIO_PROCESS, 0)
        assert autogroup(process.pid)[1] == 0
        process.kill()


def test_giving_way_is_never_taken_back() -> None:
    with started(f"import os; os.nice(15); {SLEEP}") as process:
        assert said(process) == "here"
        give_way(process.pid)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == min(
            19, os.getpriority(os.PRIO_PROCESS, 0) + 15
        )


def turn_ns(pid: int) -> int | None:
    """Return how long a process may hold a processor at a time, where the kernel says it."""
    try:
        lines = Path(f"/proc/{pid}/sched").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    turns = (line.partition(":")[2] for line in lines if line.startswith("se.slice"))
    return next((int(turn) for turn in turns), None)


@pytest.mark.skipif(turn_ns(os.getpid()) is None, reason="this kernel does not tell its turns")
def test_servers_and_what_they_fork_take_shorter_turns_than_others(tmp_path: Path) -> None:
    forks = "import subprocess, sys, time; time.sleep(0.5); subprocess.run(['sleep', '120'])"
    turns = {}
    for is_prompt in (False, True):
        server = ServerProcess("server", tmp_path / "log", is_prompt=is_prompt)
        server.start([sys.executable, "-c", forks], cwd=tmp_path, environment=dict(os.environ))
        try:
            assert server.pid is not None
            deadline = time.monotonic() + 30
            while not (children := psutil.Process(server.pid).children()):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            turns[is_prompt] = {turn_ns(server.pid), turn_ns(children[0].pid)}
        finally:
            server.kill()
    assert max(turns[True]) < min(turns[False])  # type: ignore[type-var]
