"""Starts, watches and stops the writer processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self


@dataclass(frozen=True, slots=True)
class Share:
    """The traffic of one organization.

    Attributes:
        writes_per_s: of all its sessions in all processes together.
        sessions: in all processes together; each waits for itself alone.
        urls: of the application, per cell: PostgreSQL and this organization's Redis user.
    """

    organization: str
    writes_per_s: float
    sessions: int
    urls: Mapping[str, tuple[str, str]] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Assignment:
    """Everything that a writer process is told; holds secrets, so it travels as a private file."""

    run: int
    processes: int
    topology: str = field(repr=False)
    shares: tuple[Share, ...]
    directory: str
    seed: int = 0
    die_with_parent: bool = True

    def write(self, path: Path) -> None:
        """Write it for the processes of this user only."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file)

    @classmethod
    def read(cls, path: Path) -> Assignment:
        """Read what `write` wrote."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        shares = tuple(
            Share(**{**share, "urls": {cell: tuple(urls) for cell, urls in share["urls"].items()}})
            for share in raw.pop("shares")
        )
        return cls(shares=shares, **raw)


class Traffic:
    """Writer processes that run until they are stopped. Their ledgers outlive them."""

    def __init__(self, assignment: Assignment) -> None:
        self.directory = Path(assignment.directory)
        self._assignment = assignment
        self._processes: list[subprocess.Popen[bytes]] = []
        self._logs: list[IO[bytes]] = []
        self._last: tuple[float, Mapping[str, int]] | None = None
        self._rates: Mapping[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self, seconds: float = 30.0) -> Self:
        """Start the processes and wait until every organization is written to.

        Raises:
            RuntimeError: one ended, or an organization took no write within `seconds`.
        """
        plan = self.directory / "assignment.json"
        self._assignment.write(plan)
        for number in range(self._assignment.processes):
            log = (self.directory / f"writer-{number}.log").open("ab")
            self._logs.append(log)
            self._processes.append(
                subprocess.Popen(
                    [
                        *(sys.executable, "-m", "cellferry.local.application.traffic"),
                        *("--assignment", str(plan), "--writer", str(number)),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
        deadline = time.monotonic() + seconds
        while silent := self._silent():
            ended = any(one.poll() is not None for one in self._processes)
            if ended or time.monotonic() > deadline:
                with contextlib.suppress(RuntimeError):
                    self.stop()
                raise RuntimeError(
                    ("a writer ended at once" if ended else f"no write of {', '.join(silent)}")
                    + f"; see {self.directory}/writer-*.log"
                )
            time.sleep(0.05)
        return self

    @property
    def pids(self) -> Sequence[int]:
        """Process ids of the writers, for those who want to kill one."""
        return [one.pid for one in self._processes]

    def stop(self, seconds: float = 45.0) -> None:
        """Let each writer end its operation in flight; kill what does not end in `seconds`.

        Raises:
            RuntimeError: a writer had failed by itself.
        """
        for process in self._processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + seconds
        for process in self._processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for log in self._logs:
            log.close()
        self._logs.clear()
        (self.directory / "assignment.json").unlink(missing_ok=True)
        failed = [one.returncode for one in self._processes if one.returncode > 0]
        self._processes.clear()
        if failed:
            raise RuntimeError(f"a writer failed; see {self.directory}/writer-*.log")

    def stats(self) -> Mapping[str, Mapping[str, int]]:
        """Return counts per organization so far: acknowledged, refused, unknown, reads."""
        total: dict[str, Counter[str]] = {}
        for one in self._stats():
            for organization, counts in one["organizations"].items():
                total.setdefault(organization, Counter()).update(counts)
        return total

    def rates(self) -> Mapping[str, float]:
        """Return acknowledged writes per second of each organization since the last call."""
        now = time.monotonic()
        counts = {name: one["acknowledged"] for name, one in self.stats().items()}
        if self._last is not None and now - self._last[0] >= 1.0:
            before, earlier = self._last
            self._rates = {
                name: (count - earlier.get(name, 0)) / (now - before)
                for name, count in counts.items()
            }
        if self._last is None or now - self._last[0] >= 1.0:
            self._last = (now, counts)
        return self._rates

    def _silent(self) -> list[str]:
        stats = self.stats()
        return [
            share.organization
            for share in self._assignment.shares
            if not stats.get(share.organization, {}).get("acknowledged")
        ]

    def _stats(self) -> list[dict[str, dict[str, dict[str, int]]]]:
        found = []
        for number in range(self._assignment.processes):
            path = stats_path(self.directory, self._assignment.run, number)
            if path.exists():
                found.append(json.loads(path.read_text(encoding="utf-8")))
        return found


def ledger_path(directory: Path, run: int, writer: int) -> Path:
    """Where a writer process keeps its ledger."""
    return directory / "ledger" / f"run-{run:03}-writer-{writer}.jsonl"


def stats_path(directory: Path, run: int, writer: int) -> Path:
    """Where a writer process says how it goes."""
    return directory / "stats" / f"run-{run:03}-writer-{writer}.json"
