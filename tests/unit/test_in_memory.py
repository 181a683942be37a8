"""Temporary folders in memory: one for each run, gone with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
USE = """
import sys, tempfile
from pathlib import Path
from tests import in_memory
in_memory.MEMORY, in_memory.ROOM = Path(sys.argv[1]), int(sys.argv[2])
in_memory.CONTAINER = Path(sys.argv[1]).parent / "container"
print(in_memory.use_memory(), tempfile.gettempdir(), flush=True)
sys.stdin.read()
"""


def started(memory: Path, room: int = 1, **environment: str) -> subprocess.Popen[str]:
    """Return a process that uses memory until its standard input ends."""
    plain = {name: value for name, value in os.environ.items() if name != "TMPDIR"}
    return subprocess.Popen(
        [sys.executable, "-c", USE, memory, str(room)],
        cwd=ROOT,
        env={**plain, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().split()


def test_a_run_has_a_folder_of_its_own_until_it_ends(tmp_path: Path) -> None:
    first, second = started(tmp_path), started(tmp_path)
    folders = [said(first)[0], said(second)[0]]
    assert len(set(folders)) == 2
    assert sorted(str(one) for one in tmp_path.iterdir()) == sorted(folders)
    first.communicate()
    assert [str(one) for one in tmp_path.iterdir()] == folders[1:]
    second.communicate()
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_are_made_there_by_children_too(tmp_path: Path) -> None:
    parent = started(tmp_path)
    folder, used = said(parent)
    assert used == folder
    child = started(tmp_path, TMPDIR=folder)
    assert said(child) == ["None", folder]
    child.communicate()
    assert Path(folder).is_dir()
    parent.communicate()


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    killed = started(tmp_path)
    left = Path(said(killed)[0])
    (left / "data").mkdir()
    killed.kill()
    killed.communicate()
    assert left.is_dir()
    following = started(tmp_path)
    said(following)
    assert not left.exists()
    following.communicate()


def test_where_there_is_no_room_they_stay(tmp_path: Path) -> None:
    process = started(tmp_path, room=2**60)
    assert said(process)[0] == "None"
    process.communicate()
    assert list(tmp_path.iterdir()) == []


def test_a_container_that_may_take_little_is_no_room(tmp_path: Path) -> None:
    memory, limits = tmp_path / "memory", tmp_path / "container"
    memory.mkdir()
    limits.mkdir()
    (limits / "memory.current").write_text("1000000\n")
    for limit, used in (("1000100\n", False), ("9000000\n", True), ("max\n", True)):
        (limits / "memory.max").write_text(limit)
        process = started(memory, room=1_000)
        assert (said(process)[0] != "None") is used, limit
        process.communicate()
