"""A look at one cell's Redis, for evidence: its replication offset, what an organization has."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cellferry.model import Cell
from cellferry.stores.observed import Observed, ObservedPart
from cellferry.stores.redis import inventory, payloads
from cellferry.stores.redis.comparison import scan
from cellferry.stores.redis.key_prefix import KeyPrefix
from cellferry.stores.redis.payloads import NO_EXPIRY, Snapshot
from cellferry.stores.redis.wire import Address, Wire

KIND = "redis"
_BATCH_KEYS = 256
_MODULUS = 2**128


@dataclass(slots=True)
class _Sum:
    count: int = 0
    hash: int = 0
    first_expiry_ms: int | None = None


def position(cell: Cell) -> dict[str, Any]:
    """Return where the server of `cell` stands: run id, replication id and offset. Read-only.

    Raises:
        Unreachable, AccessDenied: the server does not answer or refuses.
    """
    with _wire(cell) as wire:
        return _position(wire)


def observe(cell: Cell, organization: str, migration: int) -> Observed:
    """Count and hash the organization's keys in `cell`, by kind. Read-only.

    The server has no snapshots: what is written meanwhile may be seen or not. Keys with an expiry
    are a part of their own, because they disappear by themselves.

    Raises:
        Unreachable, AccessDenied: the server does not answer or refuses.
    """
    prefix = KeyPrefix.of(cell.stores[KIND].options, organization, where=_where(cell))
    sums: defaultdict[str, _Sum] = defaultdict(_Sum)
    with _wire(cell) as wire:
        where = _position(wire)
        seen: set[bytes] = set()
        for page in scan(wire, prefix):
            fresh = [key for key in dict.fromkeys(page) if key not in seen]
            seen.update(fresh)
            for batch in _batches(fresh):
                payloads.ask(wire, batch)
                for key, snapshot in zip(batch, payloads.answers(wire, len(batch)), strict=True):
                    if snapshot is not None:
                        _add(sums, key, snapshot)
        clients = wire.call("CLIENT", "LIST")
    names = clients.decode(errors="replace") if isinstance(clients, bytes) else str(clients)
    return Observed(
        "keys",
        where,
        tuple(
            ObservedPart(name, one.count, f"{one.hash:032x}", _moment(one.first_expiry_ms))
            for name, one in sorted(sums.items())
        ),
        names.count(f"name=cellferry:{migration}:"),
    )


def key_hash(key: bytes, snapshot: Snapshot) -> int:
    """Return a hash of key, value and expiry that a restart of the server does not change."""
    digest = hashlib.blake2b(payloads.settled_value(snapshot.payload), digest_size=16)
    digest.update(b" %d %d " % (snapshot.expires, len(key)) + key)
    return int.from_bytes(digest.digest(), "big")


def _add(sums: defaultdict[str, _Sum], key: bytes, snapshot: Snapshot) -> None:
    expires = snapshot.expires != NO_EXPIRY
    total = sums[f"{snapshot.kind} (expiring)" if expires else snapshot.kind]
    total.count += 1
    total.hash = (total.hash + key_hash(key, snapshot)) % _MODULUS
    if expires:
        earliest = total.first_expiry_ms
        total.first_expiry_ms = snapshot.expires if earliest is None else min(
            earliest, snapshot.expires
        )  # fmt: skip


def _batches(keys: list[bytes]) -> Iterable[list[bytes]]:
    return (keys[start : start + _BATCH_KEYS] for start in range(0, len(keys), _BATCH_KEYS))


def _moment(milliseconds: int | None) -> str | None:
    if milliseconds is None:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat()


@contextmanager
def _wire(cell: Cell) -> Iterator[Wire]:
    endpoint = cell.stores[KIND]
    address = Address.parse(endpoint.admin_url or endpoint.url, _where(cell))
    with Wire(address, "cellferry:evidence") as wire:
        yield wire


def _where(cell: Cell) -> str:
    return f"{cell.name}/{KIND}"


def _position(wire: Wire) -> dict[str, Any]:
    facts = inventory.server_facts(wire)
    seconds, micros = wire.call("TIME")
    at = datetime.fromtimestamp(int(seconds) + int(micros) / 1_000_000, UTC)
    return {
        "at": at.isoformat(),
        "run_id": facts.get("run_id"),
        "replication_id": facts.get("master_replid"),
        "offset": int(facts.get("master_repl_offset", 0)),
        "standby": facts.get("role") != "master",
        "version": str(inventory.Engine.of(facts)),
    }
