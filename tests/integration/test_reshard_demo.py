"""The demo of re-sharding, with some thousand keys: real processes, killed in the middle."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from cellferry.errors import InvalidInput
from cellferry.local.reshard_demo import Wishes, run

# A client that a slow machine kept waiting for longer than its lease says that it does not know
# what became of a write, as it has to. The test counts operations that had another reason.
SMALL = {
    "keys": 6_000,
    "clients": 3,
    "ids_per_s": 60,
    "calm_s": 0.5,
    "lease_s": 15.0,
    "brief": True,
}


def play(folder: Path, **wishes: object) -> str:
    """Run it; return its last line."""
    printed = io.StringIO()
    outcome = run(folder, Wishes(**{**SMALL, **wishes}), Console(file=printed, width=160))  # type: ignore[arg-type]
    assert outcome.faults == [], printed.getvalue()
    return outcome.line


def test_three_shards_become_four_with_the_copier_and_a_client_killed(tmp_path: Path) -> None:
    line = play(tmp_path, kill=True)
    assert line.startswith("re-sharded 3 → 4: moved 1")
    assert line.endswith(
        "of 6000 keys (24.7%); duplicates accepted 0, ids wrongly refused 0; mismatches 0"
    )


def test_four_shards_become_three(tmp_path: Path) -> None:
    line = play(tmp_path, before=4, after=3)
    assert line.startswith("re-sharded 4 → 3: moved 1")
    assert line.endswith("; duplicates accepted 0, ids wrongly refused 0; mismatches 0")


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("WAY", "3", "WAY=3 is no way"),
        ("WAY", "3-3", "WAY=3-3 is out of bounds"),
        ("KEYS", "many", "KEYS=many is not a whole number"),
        ("CLIENTS", "1", "CLIENTS=1 is out of bounds"),
    ],
)
def test_wrong_wishes_are_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, match: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInput, match=match):
        Wishes.from_environment()
