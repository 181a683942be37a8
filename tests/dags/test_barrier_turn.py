"""Barriers take turns on a machine, and a process that dies gives its turn up."""

from __future__ import annotations

import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from cellferry.orchestration import barrier_turn as module
from cellferry.orchestration.barrier_turn import barrier_turn

#: As a task does it: what Airflow does on SIGTERM returns.
ENTER = """
import pathlib, signal, sys
from cellferry.orchestration import barrier_turn
if len(sys.argv) > 2:
    barrier_turn.LONGEST_WAIT_S = float(sys.argv[2])
signal.signal(signal.SIGTERM, lambda *_: None)
print("asks", flush=True)
with barrier_turn.barrier_turn(pathlib.Path(sys.argv[1])):
    print("entered", flush=True)
    sys.stdin.read()
"""


def asking(file: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a process that asks for the turn; return when it has asked."""
    process = subprocess.Popen(
        [sys.executable, "-c", ENTER, file, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"asks\n"
    return process


def has_entered(process: subprocess.Popen[bytes], within_s: float) -> bool:
    found, _, _ = select.select([process.stdout], [], [], within_s)
    return bool(found) and process.stdout is not None and process.stdout.readline() == b"entered\n"


def test_a_second_barrier_waits_for_the_first_even_if_that_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "turn"
    with asking(file) as holder:
        assert has_entered(holder, 60)
        with asking(file) as waiter:
            try:
                assert not has_entered(waiter, 1), "two barriers at once"
                holder.kill()
                assert has_entered(waiter, 60), "a dead process kept its turn"
            finally:
                holder.kill()
                waiter.kill()


def test_a_task_that_is_told_to_end_while_it_waits_never_begins(tmp_path: Path) -> None:
    file = tmp_path / "turn"
    with asking(file) as holder:
        assert has_entered(holder, 60)
        with asking(file) as waiter:
            try:
                assert not has_entered(waiter, 1)
                errors = b""
                for _ in range(60):  # one that comes before it waits is not for it
                    waiter.send_signal(signal.SIGTERM)
                    with suppress(subprocess.TimeoutExpired):
                        _, errors = waiter.communicate(timeout=1)
                        break
                assert waiter.returncode not in (0, None)
                assert b"Cancelled" in errors
            finally:
                holder.kill()
                waiter.kill()


def test_a_turn_that_lasts_for_long_keeps_nobody_from_a_roll_back(tmp_path: Path) -> None:
    file = tmp_path / "turn"
    with asking(file) as holder:
        assert has_entered(holder, 60)
        with asking(file, "0.5") as waiter:
            try:
                assert has_entered(waiter, 60)
                assert holder.poll() is None, "it has its turn still"
            finally:
                holder.kill()
                waiter.kill()


def test_a_task_that_is_tried_again_waits_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The try before it may have been killed, and left its organization frozen."""
    monkeypatch.setattr(module, "LONGEST_WAIT_S", 0.1)
    file = tmp_path / "turn"
    with barrier_turn(file, try_number=1):
        with barrier_turn(file, try_number=2):
            assert caplog.text == ""
        with barrier_turn(file, try_number=1):
            assert "another barrier" in caplog.text


def test_a_barrier_needs_no_turn_where_there_is_none(tmp_path: Path) -> None:
    with barrier_turn(tmp_path / "no folder" / "turn"):
        pass


def test_a_link_in_the_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "turn").symlink_to(tmp_path / "elsewhere")
    with barrier_turn(tmp_path / "turn"):
        pass
    assert not (tmp_path / "elsewhere").exists()
