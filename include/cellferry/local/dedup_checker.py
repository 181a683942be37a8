"""Decides from the clients' ledgers and the shards' contents whether anything went wrong.

It shares no code with what moves keys: it has a ring of its own, written down from the runbook, and
looks at the servers through a client library. What it knows of the traffic is in the ledgers alone.

What must hold: an id is accepted once in its life; an id that was refused was accepted for
somebody; what was accepted, written or counted is at the shard that owns it, with the expiry that
it had; what was released or deleted is nowhere, nor what no client named. A client that was killed,
or that got no answer, leaves one operation of which both outcomes are right.
"""

from __future__ import annotations

import hashlib
import json
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

#: How far a server's reading of the clock may be from a client's on the same machine.
CLOCK_MS = 20.0
SHOWN = 10
#: The set's keys begin with it; placement hashes what follows.
PREFIX = b"dedup:"
_BATCH = 2_000

Contents = dict[bytes, tuple[bytes, int]]
"""Of one shard: key → value and absolute expiry in ms (-1: none)."""


@dataclass(frozen=True, slots=True)
class Seeds:
    """Ids that were accepted before the traffic began; all follows from their number.

    Attributes:
        count: how many.
        base_ms: the time from which their expiries are counted, ms since 1970.
    """

    count: int
    base_ms: int

    def token(self, number: int) -> bytes:
        """Who holds the id."""
        return hashlib.blake2b(b"seed %d" % number, digest_size=16).digest()

    def expires_ms(self, number: int) -> int:
        """Between one hour and fourteen days from the base."""
        spread = int.from_bytes(self.token(number)[:4], "big") % (14 * 86_400_000 - 3_600_000)
        return self.base_ms + 3_600_000 + spread

    @staticmethod
    def key(number: int) -> bytes:
        """The id."""
        return b"pcs-seed-%d" % number


class RunbookRing:
    """The runbook's ring: SHA-256, the first four bytes, 150 vnodes called `shard-vnode`."""

    def __init__(self, names: Sequence[str]) -> None:
        owners = {}
        for name in names:
            for vnode in range(150):
                digest = hashlib.sha256(f"{name}-{vnode}".encode()).digest()
                owners[int.from_bytes(digest[:4], "big")] = name
        self._points = sorted(owners)
        self._owners = [owners[point] for point in self._points]

    def owner(self, key: bytes) -> str:
        """The shard that has the first vnode at or behind the key's place."""
        place = int.from_bytes(hashlib.sha256(key).digest()[:4], "big")
        return self._owners[bisect_left(self._points, place) % len(self._points)]


@dataclass(slots=True)
class Operation:
    """One operation of one client; `outcome` is None where the ledger ends before it."""

    client: str
    what: str
    key: bytes
    argument: Any
    begun_ms: float
    outcome: str | None = None
    answer: Any = None
    ended_ms: float = float("inf")

    @property
    def is_unknown(self) -> bool:
        """Whether it may have happened or not."""
        return self.outcome in (None, "unknown")


@dataclass
class Verdict:
    """What was found. All of the counts in `faults` must be 0."""

    seeded: int = 0
    moved: int = 0
    """Seeded ids that have another owner now and are there."""
    offers: int = 0
    accepted: int = 0
    refused: int = 0
    operations: int = 0
    unknown: int = 0
    """Operations of which nobody knows whether they happened."""
    undecided: int = 0
    """Ids that everybody was refused but one who never learnt of the outcome."""
    duplicates: int = 0
    wrongly_refused: int = 0
    mismatches: int = 0
    left_behind: int = 0
    """Keys at a shard that does not own them."""
    examples: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def mismatch(self, text: str) -> None:
        """Count one, and keep the first few."""
        self.mismatches += 1
        self.example(text)

    def example(self, text: str) -> None:
        """Keep the first few."""
        if len(self.examples) < SHOWN:
            self.examples.append(text)


def check(
    ledgers: Iterable[Path],
    seeds: Seeds,
    *,
    shards: Mapping[str, str],
    before: Sequence[str],
    now: Sequence[str],
    is_clean: bool,
) -> Verdict:
    """Compare everything. Call it when no client works any more.

    Args:
        shards: URL of every shard, also of those that went.
        before: names of the ring's shards before the re-sharding.
        now: names of the ring that has the authority.
        is_clean: clean-up has ended, so that no key may be at another shard than its owner.
    """
    verdict = Verdict(seeded=seeds.count)
    contents = {name: read_shard(url) for name, url in shards.items()}
    looked_ms = time.time() * 1000
    old_ring, ring = RunbookRing(before), RunbookRing(now)
    histories = read_ledgers(ledgers)
    for operations in histories.values():
        for one in operations:
            _count(verdict, one)
    held = _Held(contents, ring, looked_ms)
    _check_seeds(verdict, seeds, histories, held, old_ring)
    for key, operations in histories.items():
        if key.startswith(b"pcs-seed-"):
            continue
        if key.startswith(b"pcs-"):
            _check_shared(verdict, key, operations, held)
        elif key.startswith(b"own-"):
            _check_own(verdict, key, operations, held)
        elif key.startswith(b"count-"):
            _check_counter(verdict, key, operations, held)
        else:
            _check_value(verdict, key, operations, held)
    known = histories.keys() | {seeds.key(number) for number in range(seeds.count)}
    for name, keys in contents.items():
        for key in keys.keys() - known:
            verdict.mismatch(f"{key.decode()} is at {name}, and no client ever named it")
        strays = [key for key in keys if ring.owner(key) != name]
        verdict.left_behind += len(strays)
        if is_clean:
            for key in strays:
                verdict.mismatch(f"{key.decode()} is still at {name}")
    return verdict


@dataclass(frozen=True)
class _Held:
    contents: Mapping[str, Contents]
    ring: RunbookRing
    looked_ms: float

    def at_owner(self, key: bytes) -> tuple[bytes, int] | None:
        return self.contents[self.ring.owner(key)].get(key)


def _count(verdict: Verdict, one: Operation) -> None:
    verdict.operations += 1
    verdict.unknown += one.is_unknown
    if one.outcome == "unknown":
        verdict.errors[str(one.answer)] += 1
    if one.what == "claim":
        verdict.offers += 1
        verdict.accepted += one.outcome == "accepted"
        verdict.refused += one.outcome == "refused"


def _check_seeds(
    verdict: Verdict,
    seeds: Seeds,
    histories: Mapping[bytes, list[Operation]],
    held: _Held,
    old_ring: RunbookRing,
) -> None:
    for number in range(seeds.count):
        key = seeds.key(number)
        for one in histories.get(key, ()):
            if one.outcome == "accepted":
                verdict.duplicates += 1
                verdict.example(f"{key.decode()} was accepted again for {one.client}")
        found = held.at_owner(key)
        wanted = (seeds.token(number), seeds.expires_ms(number))
        if found == wanted:
            verdict.moved += old_ring.owner(key) != held.ring.owner(key)
        else:
            verdict.mismatch(f"{key.decode()} is {found}, not {wanted}")


def _check_shared(verdict: Verdict, key: bytes, operations: list[Operation], held: _Held) -> None:
    """An id has one life here: it is not offered again once it may have expired."""
    winners = [one for one in operations if one.outcome == "accepted"]
    unknown = [one for one in operations if one.is_unknown]
    lives: list[Operation] = []
    for one in sorted(winners, key=lambda one: one.begun_ms):
        # an id that expired is free; whoever waited for so long may have it
        if lives and one.ended_ms < lives[-1].begun_ms + lives[-1].argument - CLOCK_MS:
            verdict.duplicates += 1
            verdict.example(f"{key.decode()} was accepted for {lives[-1].client}, {one.client}")
        lives.append(one)
    if not winners:
        if unknown:
            verdict.undecided += 1
        else:
            verdict.wrongly_refused += 1
            verdict.example(f"{key.decode()} was refused {len(operations)} times, accepted never")
        return
    _check_claim(verdict, key, lives[-1], held)


def _check_claim(verdict: Verdict, key: bytes, one: Operation, held: _Held) -> None:
    earliest, latest = one.begun_ms + one.argument, one.ended_ms + one.argument
    found = held.at_owner(key)
    if found is None:
        if latest > held.looked_ms + CLOCK_MS and earliest > held.looked_ms:
            verdict.mismatch(f"{key.decode()} of {one.client} is nowhere")
        return
    value, expires = found
    if value.hex() != one.answer:
        verdict.mismatch(f"{key.decode()} of {one.client} is held by {value.hex()}")
    elif not earliest - CLOCK_MS <= expires <= latest + CLOCK_MS:
        verdict.mismatch(f"{key.decode()} expires at {expires}, not {earliest:.0f}…{latest:.0f}")


def _check_own(verdict: Verdict, key: bytes, operations: list[Operation], held: _Held) -> None:
    """One client claims and releases it in turn, so each answer is known beforehand."""
    holds: Operation | None = None
    is_sure = True
    for one in operations:
        if one.what == "release":
            holds, is_sure = None, is_sure and not one.is_unknown
        elif one.is_unknown:
            is_sure = False
        elif one.outcome == "accepted":
            if holds is not None and is_sure:
                verdict.duplicates += 1
                verdict.example(f"{key.decode()} was accepted twice for {one.client}")
            holds, is_sure = one, True
        elif holds is None and is_sure:
            verdict.wrongly_refused += 1
            verdict.example(f"{key.decode()} was released and refused to {one.client}")
    if not is_sure:
        return
    if holds is not None:
        _check_claim(verdict, key, holds, held)
    elif (found := held.at_owner(key)) is not None:
        verdict.mismatch(f"{key.decode()} was released, and is {found}")


def _check_counter(verdict: Verdict, key: bytes, operations: list[Operation], held: _Held) -> None:
    surely = sum(one.argument for one in operations if not one.is_unknown)
    perhaps = sum(one.argument for one in operations if one.is_unknown)
    found = held.at_owner(key)
    counted = 0 if found is None else int(found[0])
    if not surely <= counted <= surely + perhaps:
        verdict.mismatch(f"{key.decode()} is {counted}, and {surely} was counted")


def _check_value(verdict: Verdict, key: bytes, operations: list[Operation], held: _Held) -> None:
    """One client writes and reads it, so it reads what it wrote."""
    allowed: set[str | None] = {None}
    for one in operations:
        if one.what == "get":
            if one.outcome == "done" and one.answer not in allowed:
                verdict.mismatch(f"{one.client} read {one.answer} from {key.decode()}: {allowed}")
            continue
        value = one.argument if one.what == "set" else None
        allowed = allowed | {value} if one.is_unknown else {value}
    found = held.at_owner(key)
    value = None if found is None else found[0].decode()
    if value not in allowed:
        verdict.mismatch(f"{key.decode()} is {value}, not {allowed}")


def read_ledgers(ledgers: Iterable[Path]) -> dict[bytes, list[Operation]]:
    """Return the operations on each key, in the order in which they began."""
    histories: dict[bytes, list[Operation]] = defaultdict(list)
    for path in ledgers:
        begun: Operation | None = None
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                kind, _, at_ms, *words = json.loads(line)
            except ValueError:
                break  # the last line of a client that was killed
            if kind == "i":
                what, key, argument = words
                begun = Operation(path.stem, what, key.encode(), argument, at_ms)
                histories[begun.key].append(begun)
            elif begun is not None:
                begun.outcome, begun.answer = words
                begun.ended_ms = at_ms
    for operations in histories.values():
        operations.sort(key=lambda one: one.begun_ms)
    return histories


def read_shard(url: str) -> Contents:
    """Return what the server holds now of the set; ids without the prefix."""
    found: Contents = {}
    with redis.Redis.from_url(url) as client:
        cursor = 0
        while True:
            cursor, keys = client.scan(cursor, count=_BATCH)
            names = [key for key in keys if key.startswith(PREFIX)]
            pipeline = client.pipeline(transaction=False)
            for key in names:
                pipeline.get(key)
                pipeline.pexpiretime(key)
            answers = pipeline.execute()
            for key, value, expires in zip(names, answers[::2], answers[1::2], strict=True):
                if value is not None:
                    found[key.removeprefix(PREFIX)] = (value, int(expires))
            if cursor == 0:
                return found


def seed(seeds: Seeds, shards: Mapping[str, str], names: Sequence[str]) -> None:
    """Put the seeded ids where the ring of `names` has them."""
    ring = RunbookRing(names)
    placed: dict[str, list[int]] = defaultdict(list)
    for number in range(seeds.count):
        placed[ring.owner(seeds.key(number))].append(number)
    for name, numbers in placed.items():
        with redis.Redis.from_url(shards[name]) as client:
            for start in range(0, len(numbers), _BATCH):
                pipeline = client.pipeline(transaction=False)
                for number in numbers[start : start + _BATCH]:
                    key, token = PREFIX + seeds.key(number), seeds.token(number)
                    pipeline.set(key, token, pxat=seeds.expires_ms(number))
                pipeline.execute()
