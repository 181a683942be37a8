"""What writers meant to do and what was acknowledged, kept outside the cells.

Each writer process appends to one file of JSON lines. The intent is written before the first
attempt; afterwards comes exactly one outcome. Each line is one `write` to a file opened for
appending, so that a killed writer loses nothing that it had recorded (only a crash of the whole
machine could) and threads do not mix their lines.

Times are those of the machine: `wall` in seconds since 1970, durations from the monotonic clock.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Outcome(StrEnum):
    """What became of an operation."""

    ACKNOWLEDGED = "acknowledged"
    REFUSED = "refused"
    """It surely had no effect: the server said so, or it was never sent."""
    UNKNOWN = "unknown"
    """The connection was lost while it was committed: it may have had its effect, once."""


#: One change that an operation makes, in words that the checker understands without knowing
#: the operation: `[verb, part, name, value…]`. Verbs are documented in `checker`.
Effect = Sequence[Any]


@dataclass(slots=True)
class Operation:
    """One operation as the ledger tells it.

    Attributes:
        session: the sequential writer that did it; its operations never overlap.
        store: `postgres` or `redis`.
        cell, epoch: where and under which authority it was acknowledged.
        result: what the server answered, where that matters.
        wall: when it began; `seconds` is how long its writer waited, retries included.
    """

    id: str
    session: str
    organization: str
    store: str
    kind: str
    effects: Sequence[Effect]
    wall: float
    outcome: Outcome = Outcome.UNKNOWN
    cell: str | None = None
    epoch: int | None = None
    seconds: float = 0.0
    attempts: int = 0
    result: Any = None
    reason: str | None = None

    @property
    def is_read(self) -> bool:
        """Whether it changes nothing."""
        return not self.effects


@dataclass(slots=True)
class Ledger:
    """Everything that all writers recorded."""

    operations: list[Operation] = field(default_factory=list)

    def of(self, organization: str) -> list[Operation]:
        """The operations of one organization, each session's in its order."""
        return [one for one in self.operations if one.organization == organization]

    @property
    def organizations(self) -> tuple[str, ...]:
        """Organizations that had traffic."""
        return tuple(sorted({one.organization for one in self.operations}))

    @property
    def acknowledged(self) -> int:
        """Number of acknowledged writes."""
        return sum(
            one.outcome is Outcome.ACKNOWLEDGED and not one.is_read for one in self.operations
        )


class LedgerWriter:
    """Appends to one ledger file; safe for threads."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._descriptor = os.open(path, flags, 0o644)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def intend(
        self,
        operation: str,
        session: str,
        organization: str,
        store: str,
        kind: str,
        effects: Sequence[Effect],
    ) -> None:
        """Record that an operation is about to be sent."""
        self._append(["i", operation, session, organization, store, kind, effects, time.time()])

    def conclude(
        self,
        operation: str,
        outcome: Outcome,
        *,
        seconds: float,
        attempts: int,
        cell: str | None = None,
        epoch: int | None = None,
        result: Any = None,
        reason: str | None = None,
    ) -> None:
        """Record what became of it."""
        self._append(
            ["o", operation, outcome, round(seconds, 6), attempts, cell, epoch, result, reason]
        )

    def _append(self, record: Sequence[Any]) -> None:
        line = json.dumps(record, separators=(",", ":"), default=str).encode() + b"\n"
        if os.write(self._descriptor, line) != len(line):
            raise OSError("the ledger's disk is full: its last line is cut")


def read_ledger(paths: Iterable[Path]) -> Ledger:
    """Read ledger files; an operation without an outcome is unknown.

    Raises:
        ValueError: a line other than the last of a file is broken.
    """
    ledger = Ledger()
    for path in sorted(paths):
        by_id: dict[str, Operation] = {}
        for record in _records(path):
            if record[0] == "i":
                _, name, session, organization, store, kind, effects, wall = record
                operation = Operation(name, session, organization, store, kind, effects, wall)
                operation.reason = "its writer ended before the answer"
                by_id[name] = operation
                ledger.operations.append(operation)
            else:
                _, name, outcome, seconds, attempts, cell, epoch, result, reason = record
                operation = by_id[name]
                operation.outcome = Outcome(outcome)
                operation.seconds, operation.attempts = seconds, attempts
                operation.cell, operation.epoch = cell, epoch
                operation.result, operation.reason = result, reason
    return ledger


def write_pauses(ledger: Ledger, windows: Mapping[str, tuple[float, float]]) -> Mapping[str, float]:
    """Return the longest time, in seconds, for which a write waited during each window.

    Args:
        ledger: what the writers recorded.
        windows: per organization the wall-clock time from shortly before its gate closed to
            shortly after it opened. Each write that overlaps the window counts with the whole of
            its latency, all its retries included.
    """
    longest: dict[str, float] = {}
    for one in ledger.operations:
        window = windows.get(one.organization)
        if window is None or one.is_read:
            continue
        if one.wall <= window[1] and one.wall + one.seconds >= window[0]:
            longest[one.organization] = max(longest.get(one.organization, 0.0), one.seconds)
    return longest


def write_rate(ledger: Ledger, organizations: Iterable[str], start: float, end: float) -> float:
    """Return acknowledged writes per second of `organizations` between two wall-clock times."""
    wanted = set(organizations)
    if end <= start:
        return 0.0
    acknowledged = sum(
        one.organization in wanted
        and one.outcome is Outcome.ACKNOWLEDGED
        and not one.is_read
        and start <= one.wall + one.seconds < end
        for one in ledger.operations
    )
    return acknowledged / (end - start)


def _records(path: Path) -> Iterator[list[Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except ValueError:
                if line.endswith(b"\n"):
                    raise ValueError(f"{path}:{number} is no ledger record") from None
                return  # the writer was killed in the middle of its last line
