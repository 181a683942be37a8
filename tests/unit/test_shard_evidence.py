"""What a sample proves, and what a checkpoint file keeps."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from cellferry.errors import InvalidInput
from cellferry.shards.checkpoints import Checkpoint, FileCheckpoints
from cellferry.shards.verify import upper_bound

PAIR = ("shard-0", "shard-3")


def test_without_a_wrong_key_the_bound_is_the_rule_of_three() -> None:
    for drawn in (100, 1_000, 10_000):
        assert upper_bound(0, drawn, 10**9) == pytest.approx(1 - 0.05 ** (1 / drawn), rel=1e-9)
        assert upper_bound(0, drawn, 10**9) == pytest.approx(3 / drawn, rel=0.03)


@pytest.mark.parametrize(
    ("wrong", "drawn", "bound"),
    # one-sided 95% limits of Clopper and Pearson: beta quantiles from a table
    [(1, 10, 0.39416), (1, 100, 0.04656), (5, 100, 0.10225), (10, 1000, 0.01687)],
)
def test_with_wrong_keys_it_is_the_exact_limit(wrong: int, drawn: int, bound: float) -> None:
    assert upper_bound(wrong, drawn, 10**9) == pytest.approx(bound, abs=2e-4)


def test_of_all_keys_the_share_itself_is_known() -> None:
    assert upper_bound(0, 500, 500) == 0
    assert upper_bound(5, 500, 500) == 0.01
    assert upper_bound(0, 0, 0) == 0
    assert upper_bound(0, 0, 10) == 1
    assert upper_bound(3, 3, 10) == 1


def test_a_bound_is_rarely_exceeded() -> None:
    chance = random.Random(4)
    share, drawn = 0.02, 200
    exceeded = sum(
        upper_bound(sum(chance.random() < share for _ in range(drawn)), drawn, 10**9) < share
        for _ in range(400)
    )
    assert exceeded <= 400 * 0.08


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    points = FileCheckpoints(tmp_path / "new folder")
    assert points.load(PAIR) is None
    point = Checkpoint("plan", "run-1", "run-2", step=3, cursor="77", keys=5, size=50)
    points.save(PAIR, point.document())
    points.save(("shard-0", "shard_3"), Checkpoint("plan", "x", "y").document())
    found = Checkpoint.parse(points.load(PAIR), plan="plan", source="run-1", destination="run-2")
    assert found == point
    assert not list(tmp_path.glob("**/*.tmp"))


@pytest.mark.parametrize(("source", "destination"), [("other", "run-2"), ("run-1", "other")])
def test_after_a_restart_of_either_server_it_begins_anew(source: str, destination: str) -> None:
    saved = Checkpoint("plan", "run-1", "run-2", step=3, cursor="77", keys=5, done=True)
    found = Checkpoint.parse(saved.document(), plan="plan", source=source, destination=destination)
    assert found == Checkpoint("plan", source, destination)


def test_a_checkpoint_of_another_plan_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    saved = Checkpoint("plan", "run-1", "run-2").document()
    with pytest.raises(InvalidInput, match="one of another plan"):
        Checkpoint.parse(saved, plan="other", source="run-1", destination="run-2")
    with pytest.raises(InvalidInput, match="cannot be read"):
        Checkpoint.parse({"cursor": 1}, plan="plan", source="a", destination="b")
    points = FileCheckpoints(tmp_path)
    points.save(PAIR, saved)
    (file,) = tmp_path.iterdir()
    file.write_text("{", encoding="utf-8")
    with pytest.raises(InvalidInput, match="cannot be read"):
        points.load(PAIR)
    file.write_text(json.dumps([1]), encoding="utf-8")
    with pytest.raises(InvalidInput, match="no checkpoint"):
        points.load(PAIR)
