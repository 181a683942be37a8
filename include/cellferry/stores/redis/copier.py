"""The bulk copy: SCAN, DUMP, RESTORE over raw connections, reading and writing overlapped."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from cellferry.model import Copied, Progress
from cellferry.stores.redis import payloads
from cellferry.stores.redis.key_prefix import KeyPrefix
from cellferry.stores.redis.wire import Command, Wire
from cellferry.stores.throttle import Throttle

BATCH_KEYS = 512
"""Keys between two checkpoints, about; a stopped copy repeats at most so many."""
BATCH_BYTES = 1024 * 1024
"""Bytes sent together, about: a server is busy for some milliseconds with them."""
HUGE_KEY = 2 * 1024 * 1024
"""A key larger than this keeps a server busy for tens of milliseconds: worth a warning."""
SCAN_COUNT = 1000
_AHEAD = 1
"""Batches that the source, and the destination, have to work on while this process does. More are
no faster, and neighbours wait behind them."""
_REPORT_S = 0.3


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """How far a copy is; kept in a key at the destination, written after each batch.

    A SCAN cursor means something only to the server process that gave it: after a restart of the
    source the copy begins anew.
    """

    run_id: str
    cursor: int = 0
    keys: int = 0
    size: int = 0
    """Bytes of the payloads."""
    batches: int = 0
    done: bool = False

    @classmethod
    def parse(cls, value: bytes | None, run_id: str) -> Checkpoint:
        """The checkpoint to go on from."""
        if value is not None:
            found = cls(**json.loads(value))
            if found.run_id == run_id or found.done:
                return found
        return cls(run_id)

    def to_json(self) -> str:
        """The key's value."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class _Batch:
    keys: list[bytes]
    sizes: int
    cursor: int | None
    """The cursor to go on from once this batch is there; None in the middle of a page."""


class Copier:
    """Copies every key of one organization.

    Args:
        scanner: connection to the source for names and sizes.
        reader: another one for the values.
        writer: connection to the destination.
        run_id: of the source's server process.
        planned: how many keys are expected, for the total of the progress; 0 when nobody knows.
    """

    def __init__(
        self,
        scanner: Wire,
        reader: Wire,
        writer: Wire,
        *,
        prefix: KeyPrefix,
        run_id: str,
        throttle: Throttle,
        progress: Progress,
        planned: int = 0,
    ) -> None:
        self._scanner = scanner
        self._reader = reader
        self._writer = writer
        self._prefix = prefix
        self._checkpoint_key = prefix.marker("checkpoint")
        self._run_id = run_id
        self._throttle = throttle
        self._progress = progress
        self._planned = planned
        self._reading: deque[_Batch] = deque()
        self._writing: deque[int] = deque()
        self._reported = 0.0
        self.huge: list[tuple[str, int]] = []

    def run(self) -> Copied:
        """Copy from the last checkpoint to the end.

        Every batch is one pipeline: values, then the checkpoint, which therefore never runs
        ahead of them.
        """
        started = time.monotonic()
        point = Checkpoint.parse(self._writer.call("GET", self._checkpoint_key), self._run_id)
        resumed = point.keys > 0
        self._point = point
        recopied = 0
        if not point.done:
            for batch in self._batches(point.cursor):
                if resumed:
                    recopied = self._already_there(batch.keys)
                    resumed = False
                payloads.ask(self._reader, batch.keys)
                self._reading.append(batch)
                if len(self._reading) > _AHEAD:
                    self._pass_on()
            while self._reading:
                self._pass_on()
            self._point = replace(self._point, cursor=0, done=True)
            self._save()
            self._writing.append(1)
            while self._writing:
                self._settle()
        self._report(final=True)
        return Copied(
            count=self._point.keys,
            bytes=self._point.size,
            seconds=time.monotonic() - started,
            batches=self._point.batches,
            recopied=recopied,
        )

    def _batches(self, cursor: int) -> Iterator[_Batch]:
        """Batches bounded by count and bytes; the next SCAN is under way while one is copied."""
        scanner = self._scanner
        gathered: list[bytes] = []
        scan: Command = ("SCAN", cursor, "MATCH", self._prefix.pattern, "COUNT", SCAN_COUNT)
        scanner.send([scan])
        while True:
            next_cursor, found = scanner.check(scanner.receive(1)[0])
            cursor = int(next_cursor)
            gathered += self._prefix.owned(found)
            if gathered and (cursor == 0 or len(gathered) >= BATCH_KEYS):
                keys = list(dict.fromkeys(gathered))
                gathered = []
                sizes = payloads.sizes(scanner, keys)
                if cursor:
                    scan = ("SCAN", cursor, "MATCH", self._prefix.pattern, "COUNT", SCAN_COUNT)
                    scanner.send([scan])
                yield from self._split(keys, sizes, cursor)
            elif cursor:
                scan = ("SCAN", cursor, "MATCH", self._prefix.pattern, "COUNT", SCAN_COUNT)
                scanner.send([scan])
            self._progress.check()
            if cursor == 0:
                return

    def _split(self, keys: list[bytes], sizes: list[int], cursor: int) -> Iterator[_Batch]:
        start, total = 0, 0
        for index, size in enumerate(sizes):
            if size > HUGE_KEY:
                self.huge.append((keys[index].decode(errors="replace"), size))
            if total and total + size > BATCH_BYTES:
                yield _Batch(keys[start:index], total, None)
                start, total = index, 0
            total += size
        yield _Batch(keys[start:], total, cursor)

    def _pass_on(self) -> None:
        """Take the values of the oldest batch from the source and send them on."""
        batch = self._reading.popleft()
        snapshots = payloads.answers(self._reader, len(batch.keys))
        self._throttle.take(len(batch.keys), while_waiting=self._progress.check)
        sent = payloads.send(self._writer, batch.keys, snapshots)
        commands = len(batch.keys)
        point = self._point
        self._point = replace(
            point,
            keys=point.keys + len(batch.keys),
            size=point.size + sent,
            batches=point.batches + 1,
        )
        if batch.cursor is not None:
            self._point = replace(self._point, cursor=batch.cursor)
            self._save()
            commands += 1
        self._writing.append(commands)
        if len(self._writing) > _AHEAD:
            self._settle()
        self._report()

    def _save(self) -> None:
        """Send the checkpoint behind the values: the server obeys one connection in order."""
        self._writer.send([("SET", self._checkpoint_key, self._point.to_json())])

    def _settle(self) -> None:
        self._writer.answers(self._writing.popleft())

    def _already_there(self, keys: list[bytes]) -> int:
        return sum(self._writer.checked([("EXISTS", key) for key in keys]))

    def _report(self, *, final: bool = False) -> None:
        now = time.monotonic()
        if final or now - self._reported >= _REPORT_S:
            self._reported = now
            note = (
                f"{len(self.huge)} huge keys, the largest {max(s for _, s in self.huge)} bytes"
                if self.huge
                else ""
            )
            total: int | None = self._point.keys
            if not self._point.done:
                total = max(self._planned, self._point.keys) if self._planned else None
            self._progress.report("redis", "copy", self._point.keys, total, "keys", note)
