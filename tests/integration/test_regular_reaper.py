"""The supervisor's reaper: one at a time, never waited for, ended when it hangs."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cellferry.local import regular_reaper
from cellferry.local.fleet_layout import FleetLayout
from cellferry.local.regular_reaper import RegularReaper


def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have runs hang at their beginning until the file that is returned is there."""
    go, script = tmp_path / "go", tmp_path / "python"
    script.write_text(
        f'#!/bin/sh\nwhile [ ! -e "{go}" ]; do sleep 0.05; done\nexec "{sys.executable}" "$@"\n'
    )
    script.chmod(0o700)
    monkeypatch.setattr(regular_reaper, "sys", SimpleNamespace(executable=str(script)))
    return go


def wait_until_over(reaper: RegularReaper) -> None:
    deadline = time.monotonic() + 120
    while reaper._process.is_running:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_says_in_its_log_why_it_failed_and_the_next_one_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regular_reaper, "EVERY_S", 0.0)
    go = program(tmp_path, monkeypatch)
    layout = FleetLayout.of(tmp_path / "nowhere", tmp_path)
    reaper = RegularReaper(layout)
    try:
        reaper.look()
        first = reaper._process.pid
        assert first is not None
        reaper.look()
        assert reaper._process.pid == first  # one at a time
        go.touch()
        wait_until_over(reaper)
        assert "no such file" in (layout.logs / "reaper.log").read_text()
        reaper.look()
        assert reaper._process.pid not in (None, first)
    finally:
        reaper.stop()


def test_a_run_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regular_reaper, "EVERY_S", 0.0)
    monkeypatch.setattr(regular_reaper, "LONGEST_RUN_S", 0.0)
    program(tmp_path, monkeypatch)
    reaper = RegularReaper(FleetLayout.of(tmp_path / "nowhere", tmp_path))
    try:
        reaper.look()
        assert reaper._process.is_running
        reaper.look()
        assert not reaper._process.is_running
    finally:
        reaper.stop()
