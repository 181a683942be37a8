"""Other organizations at a Redis server: a process that sends small commands at a fixed rate."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

from cellferry.stores.redis.wire import Address, Command, Wire

ORGANIZATIONS = 20
KEYS_EACH = 200


def key(organization: int, number: int) -> bytes:
    """Return the name of a neighbour's key."""
    return b"org:{n%d}:session:%d" % (organization, number)


def fill(wire: Wire) -> None:
    """Make the keys that neighbours read and write."""
    for organization in range(ORGANIZATIONS):
        wire.checked(
            [("SET", key(organization, number), b"v" * 100) for number in range(KEYS_EACH)]
        )


@dataclass
class Neighbours:
    """Sends `per_second` commands to the server at `url`, in a process of its own, in a block.

    What a command took is counted from when it was due, if the one before was still unanswered
    then: a server that stalls delays all who wait, not one.
    """

    url: str
    per_second: int = 500

    def __enter__(self) -> Self:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(self.url, self.per_second, theirs), daemon=True
        )
        self._process.start()
        theirs.close()
        self._pipe.recv()  # it is under way
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.join()

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid or 0

    def take(self) -> list[float]:
        """Return what each command took since the last call, in milliseconds."""
        self._pipe.send(None)
        return list(self._pipe.recv())


def _serve(url: str, per_second: int, pipe: Connection) -> None:
    chance = random.Random(7)
    took: list[float] = []
    with Wire(Address.parse(url, "neighbours"), "bench:neighbours") as wire:
        wire.call("PING")
        pipe.send("ready")
        due = time.monotonic()
        while True:
            if pipe.poll(0):
                pipe.recv()
                pipe.send(took)
                took, due = [], time.monotonic()  # what was late before is not this run's
            due += 1 / per_second
            now = time.monotonic()
            if due > now:
                time.sleep(due - now)
                began = time.monotonic()
            else:
                began = due
            wire.call(*_command(chance))
            took.append((time.monotonic() - began) * 1000)


def _command(chance: random.Random) -> Command:
    one = key(chance.randrange(ORGANIZATIONS), chance.randrange(KEYS_EACH))
    if chance.random() < 0.7:
        return ("GET", one)
    return ("SET", one, b"w" * 100)
