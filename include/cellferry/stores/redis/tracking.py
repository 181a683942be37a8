"""The change feed: names of changed keys, pushed by the server.

CLIENT TRACKING in broadcast mode on one connection. It lives exactly as long as that connection:
when it is lost, or the server says that it flushed everything, what changed meanwhile is unknown
and `lost` says so; only a complete comparison helps then. Changes of a stream's groups are never
pushed; the caller copies every stream again under the gate.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any, Protocol

import hiredis

from cellferry.closing import Closing
from cellferry.errors import CellferryError, TransientError
from cellferry.stores.redis.wire import Address, Wire

_IDLE_PING_S = 5.0
"""A feed that is silent for so long is asked whether it still lives."""


class Watched(Protocol):
    """Which keys a feed hears of."""

    @property
    def encoded(self) -> bytes:
        """What their names begin with; empty for all keys of the server's database."""
        ...

    def marker(self, what: str) -> str:
        """Return the name of a key of ours; `gate` is pushed too, and counted by itself."""
        ...

    def owns(self, key: bytes) -> bool:
        """Whether a key with that beginning is one that the feed keeps."""
        ...


class Feed(Closing):
    """Collects dirty keys in a thread, from construction until `close`.

    Raises:
        Unreachable: no connection.
        AccessDenied: the user may not track.
    """

    def __init__(self, address: Address, name: str, prefix: Watched) -> None:
        self._prefix = prefix
        self._gate = prefix.marker("gate").encode()
        self._where = address.where
        self._changed = threading.Condition()
        self._dirty: set[bytes] = set()
        self._pongs = 0
        self._pings = 0
        self._gates = 0
        self._lost: str | None = None
        self._closing = False
        self._wire = Wire(address, name, protocol=3)
        try:
            prefixes: tuple[str | bytes, ...] = ("PREFIX", prefix.encoded)
            if not self._gate.startswith(prefix.encoded):  # the server refuses an overlap
                prefixes += ("PREFIX", self._gate)
            self._wire.call("CLIENT", "TRACKING", "ON", "BCAST", *prefixes, "NOLOOP")
            self._wire.wait_at_most(_IDLE_PING_S)
        except BaseException:
            self._wire.close()
            raise
        self._thread = threading.Thread(target=self._listen, name=f"feed {name}", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> str | None:
        """Why changes may have been missed; None while the feed is complete."""
        return self._lost

    def __len__(self) -> int:
        return len(self._dirty)

    def __contains__(self, key: bytes) -> bool:
        return key in self._dirty

    def take(self, limit: int | None = None) -> set[bytes]:
        """Take at most `limit` dirty keys out; keys that change again come again."""
        with self._changed:
            if limit is None or len(self._dirty) <= limit:
                taken, self._dirty = self._dirty, set()
            else:
                taken = {self._dirty.pop() for _ in range(limit)}
            return taken

    def put_back(self, keys: Iterable[bytes]) -> None:
        """Mark `keys` as dirty again."""
        with self._changed:
            self._dirty.update(keys)

    def give_up(self, reason: str) -> None:
        """Mark the feed as lost: dirty keys were taken and not applied."""
        with self._changed:
            self._lost = self._lost or reason
            self._changed.notify_all()

    @property
    def gate_changes(self) -> int:
        """How often the gate's marker key was pushed."""
        return self._gates

    def wait_for_gate(self, seen: int, timeout: float) -> None:
        """Wait until the gate's marker was pushed more than `seen` times.

        The gate's own change is the marker of the barrier: it proves that the server still
        pushes. A PING after it brings what was pushed in the same turn of the server.

        Raises:
            TransientError: it did not come; the feed counts as lost.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while self._gates <= seen and self._lost is None:
                if not self._changed.wait(deadline - time.monotonic()):
                    break
            if self._gates <= seen and self._lost is None:
                self._lost = f"the gate's change was not pushed within {timeout} s"
        self.barrier(timeout)

    def barrier(self, timeout: float) -> None:
        """Return when every change made before this call is among the dirty keys.

        Two round trips: the server pushes at the end of its turn, so the first answer can
        overtake pushes of the turn in which it was written; the second cannot.

        Raises:
            TransientError: the feed is lost.
        """
        for _ in range(2):
            self._ping()
            deadline = time.monotonic() + timeout
            with self._changed:
                target = self._pings
                while self._pongs < target and self._lost is None:
                    if not self._changed.wait(deadline - time.monotonic()):
                        self._lost = f"no answer within {timeout} s"
                if self._lost is not None:
                    raise TransientError(
                        f"the change feed was lost: {self._lost}",
                        hint="the step compares everything again when it is repeated",
                        where=self._where,
                    )

    def close(self) -> None:
        """End the feed."""
        self._closing = True
        self._wire.shut()
        self._thread.join(timeout=5)
        self._wire.close()

    def _ping(self) -> None:
        with self._changed:
            if self._lost is not None:
                return
            self._pings += 1
            try:
                self._wire.send([("PING",)])
            except CellferryError as error:
                self._lost = error.message

    def _listen(self) -> None:
        silent = 0
        try:
            while self._lost is None:
                complete, message = self._wire.next_parsed()
                if complete:
                    silent = 0
                    self._handle(message)
                    continue
                try:
                    self._wire.fill()
                except CellferryError as error:
                    if not isinstance(error.__cause__, TimeoutError) or silent:
                        raise
                    silent += 1
                    self._ping()
        except CellferryError as error:
            if not self._closing:
                self.give_up(error.message)
        except Exception as error:  # noqa: BLE001 - the feed must never end without a word
            self.give_up(f"{type(error).__name__}: {error}")

    def _handle(self, message: Any) -> None:
        with self._changed:
            if isinstance(message, hiredis.PushNotification):
                if message[0] == b"invalidate":
                    self._invalidate(message[1])
            elif isinstance(message, hiredis.ReplyError):
                self._lost = self._lost or str(message)
            else:
                self._pongs += 1
            self._changed.notify_all()

    def _invalidate(self, keys: list[bytes] | None) -> None:
        if keys is None:
            self._lost = self._lost or "the server's data were flushed"
            return
        for key in keys:
            if key == self._gate:
                self._gates += 1
            elif self._prefix.owns(key):
                self._dirty.add(key)
