"""Clients of a sharded dedup store, each a process, each with a ledger outside the shards.

Several clients offer the same id at about the same time; ids are offered again later, and so are
some that were there before any client began. Beside claims each client claims and releases ids of
its own, counts with the others, and writes values that nobody else writes. `dedup_checker` reads
what they recorded, and the shards.

A ledger is a file of JSON lines. The intent is written before the operation, the outcome after it,
each with one `write` to a file opened for appending: a client that is killed leaves an intent
without an outcome at most.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from cellferry import settings
from cellferry.errors import CellferryError

COUNTERS = 200
VALUES = 50
#: Every so many ids one with a short life, which is not offered again.
SHORT_EVERY = 10
#: Of the ids with a long life, how many clients offer one, at least.
LEAST_OFFERS = 2


@dataclass(frozen=True)
class Spec:
    """What one client process is to do.

    Attributes:
        ledger: its ledger's file.
        clients: how many clients there are; `number` is this one's, from 0.
        ids_per_s: how many new ids all clients together are offered in a second.
        seeded: how many ids `seeded_id(0…)` were there before; offered again now and then.
        begin: when the first id is due, seconds since 1970; the same for all clients.
    """

    set_name: str
    topology: str
    ledger: str
    number: int
    clients: int
    ids_per_s: float
    seeded: int
    begin: float
    lease_s: float
    ttl_s: float = 3600.0
    short_ttl_s: float = 15.0


class Store(Protocol):
    """What a client of the store can do; `ShardedStore` is one."""

    def claim(self, key: bytes, ttl_s: float) -> Any: ...  # noqa: D102
    def release(self, key: bytes, token: bytes) -> Any: ...  # noqa: D102
    def get(self, key: bytes) -> bytes | None: ...  # noqa: D102
    def set(self, key: bytes, value: bytes, ttl_s: float | None = None) -> None: ...  # noqa: D102
    def delete(self, key: bytes) -> Any: ...  # noqa: D102
    def increment(self, key: bytes, by: int = 1) -> int: ...  # noqa: D102


def seeded_id(number: int) -> bytes:
    """An id that was accepted before any client began."""
    return b"pcs-seed-%d" % number


def shared_id(slot: int) -> bytes:
    """An id that several clients are offered."""
    return b"pcs-%d" % slot


class Recorder:
    """One client's ledger."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._number = 0

    def intend(self, what: str, key: bytes, argument: Any = None) -> None:
        """Write down what is to be done now."""
        self._number += 1
        self._write("i", what, key.decode(), argument)

    def conclude(self, outcome: str, answer: Any = None) -> None:
        """Write down what became of it."""
        self._write("o", outcome, answer)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _write(self, *words: Any) -> None:
        line = json.dumps([words[0], self._number, _now_ms(), *words[1:]]) + "\n"
        os.write(self._file, line.encode())


def _now_ms() -> float:
    return round(time.time() * 1000, 3)


class DedupClient:
    """One client: offers ids when they are due, until it is told to stop."""

    def __init__(self, store: Store, spec: Spec, recorder: Recorder) -> None:
        self._store = store
        self._spec = spec
        self._recorder = recorder
        self._choice = random.Random(f"client {spec.number}")  # noqa: S311 - not a secret
        self._written = 0
        self._private = 0
        self._stopping = False

    def stop(self, *_: object) -> None:
        """Stop after the operation under way."""
        self._stopping = True

    def run(self) -> None:
        """Work until `stop`."""
        spec = self._spec
        slot = max(0, int((time.time() - spec.begin) * spec.ids_per_s))
        while not self._stopping:
            time.sleep(max(0.0, min(0.2, spec.begin + slot / spec.ids_per_s - time.time())))
            if time.time() < spec.begin + slot / spec.ids_per_s:
                continue
            if self._is_offered(slot):
                short = slot % SHORT_EVERY == 0
                self._claim(shared_id(slot), spec.short_ttl_s if short else spec.ttl_s)
                self._something_else(slot)
            slot += 1

    def _is_offered(self, slot: int) -> bool:
        """Two clients in turn are offered an id surely, each other one every second time."""
        count, number = self._spec.clients, self._spec.number
        if (number - slot) % count < LEAST_OFFERS:
            return True
        return random.Random(f"{slot} {number}").random() < 0.5  # noqa: S311

    def _something_else(self, slot: int) -> None:
        chance = self._choice.random()
        if chance < 0.25 and slot:
            older = self._choice.randrange(slot)
            if older % SHORT_EVERY:
                self._claim(shared_id(older), self._spec.ttl_s)
        elif chance < 0.5 and self._spec.seeded:
            self._claim(seeded_id(self._choice.randrange(self._spec.seeded)), self._spec.ttl_s)
        elif chance < 0.6:
            self._count()
        elif chance < 0.75:
            self._write_value()
        elif chance < 0.8:
            self._claim_again_after_release()

    def _claim(self, key: bytes, ttl_s: float) -> bytes | None:
        """Return the token of an accepted claim."""
        self._recorder.intend("claim", key, round(ttl_s * 1000))
        try:
            found = self._store.claim(key, ttl_s)
        except CellferryError as error:
            self._recorder.conclude("unknown", str(error))
            return None
        token: bytes = found.token
        self._recorder.conclude("accepted" if found.accepted else "refused", token.hex())
        return token if found.accepted else None

    def _claim_again_after_release(self) -> None:
        """Of an id of its own: now and again one that it released long ago."""
        self._private += 1
        number = self._choice.randrange(self._private)
        key = b"own-%d-%d" % (self._spec.number, number)
        token = self._claim(key, self._spec.ttl_s)
        if token is None or number % 4 == 0:  # some stay
            return
        self._recorder.intend("release", key)
        try:
            self._store.release(key, token)
        except CellferryError as error:
            self._recorder.conclude("unknown", str(error))
        else:
            self._recorder.conclude("done")

    def _count(self) -> None:
        by = self._choice.randrange(1, 10)
        key = b"count-%d" % self._choice.randrange(COUNTERS)
        self._recorder.intend("increment", key, by)
        try:
            self._store.increment(key, by)
        except CellferryError as error:
            self._recorder.conclude("unknown", str(error))
        else:
            self._recorder.conclude("done")

    def _write_value(self) -> None:
        key = b"value-%d-%d" % (self._spec.number, self._choice.randrange(VALUES))
        chance = self._choice.random()
        self._written += 1
        value = f"{self._spec.number}:{self._written}"
        try:
            if chance < 0.5:
                self._recorder.intend("set", key, value)
                self._store.set(key, value.encode())
                self._recorder.conclude("done")
            elif chance < 0.65:
                self._recorder.intend("delete", key)
                self._store.delete(key)
                self._recorder.conclude("done")
            else:
                self._recorder.intend("get", key)
                found = self._store.get(key)
                self._recorder.conclude("done", None if found is None else found.decode())
        except CellferryError as error:
            self._recorder.conclude("unknown", str(error))


def main(path: str) -> int:
    """Work as the client that the file describes, until SIGTERM."""
    from cellferry.shards.client import ShardedStore

    spec = Spec(**json.loads(Path(path).read_text(encoding="utf-8")))
    source = settings.from_environment()
    recorder = Recorder(Path(spec.ledger))
    store = ShardedStore(
        settings.resolve(spec.topology, source),
        spec.set_name,
        source,
        client_name=f"client-{spec.number}",
        lease_s=spec.lease_s,
    )
    try:
        client = DedupClient(store, spec, recorder)
        signal.signal(signal.SIGTERM, client.stop)
        client.run()
    finally:
        store.close()
        recorder.close()
    return 0


def write_spec(spec: Spec, path: Path) -> None:
    """Write the file for `main`."""
    path.write_text(json.dumps(asdict(spec)), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
