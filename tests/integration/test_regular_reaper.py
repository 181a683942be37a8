"""The supervisor's reaper: one at a time, never waited for, ended when it hangs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cellferry.local import regular_reaper
from cellferry.local.fleet_layout import FleetLayout
from cellferry.local.regular_reaper import RegularReaper


def wait_until_over(reaper: RegularReaper) -> None:
    deadline = time.monotonic() + 60
    while reaper._process.is_running:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_says_in_its_log_why_it_failed_and_the_next_one_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regular_reaper, "EVERY_S", 0.0)
    layout = FleetLayout.of(tmp_path / "nowhere", tmp_path)
    reaper = RegularReaper(layout)
    try:
        reaper.look()
        first = reaper._process.pid
        assert first is not None
        reaper.look()
        assert reaper._process.pid == first  # one at a time
        wait_until_over(reaper)
        assert "no such file" in (layout.logs / "reaper.log").read_text()
        reaper.look()
        assert reaper._process.pid not in (None, first)
    finally:
        reaper.stop()


def test_a_run_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regular_reaper, "EVERY_S", 0.0)
    monkeypatch.setattr(regular_reaper, "LONGEST_RUN_S", 0.0)
    reaper = RegularReaper(FleetLayout.of(tmp_path / "nowhere", tmp_path))
    try:
        reaper.look()
        assert reaper._process.is_running
        reaper.look()
        assert not reaper._process.is_running
    finally:
        reaper.stop()
