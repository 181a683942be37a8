"""Asks a cell's Redis or Valkey how it does: a small write and a small read."""

from __future__ import annotations

import time
from contextlib import suppress

from cellferry.errors import CellferryError
from cellferry.model import Move
from cellferry.stores.pace import Load, Probe, Reading
from cellferry.stores.redis.key_prefix import MARKERS
from cellferry.stores.redis.wire import Address, Wire

#: The probe's key goes by itself after so long (milliseconds), whatever becomes of the prober.
KEPT_MS = 10_000
#: A probe that takes longer (seconds) has failed.
LONGEST_S = 5.0


class RedisProbe(Probe):
    """Sets and gets one key of cellferry's own, as the role that manages gates.

    Args:
        address: the server, as a user that may write cellferry's own keys.
        move: names the connection and the key.
    """

    def __init__(self, address: Address, move: Move) -> None:
        self._address = address
        self._name = f"cellferry:{move.migration}:{move.attempt}:probe"
        self._key = f"{MARKERS}probe:{move.migration}"
        self._wire: Wire | None = None

    def read(self) -> Reading:
        """See `Probe.read`."""
        wire = self._connected()
        began = time.monotonic()
        wire.call("SET", self._key, "1", "PX", KEPT_MS)
        written = time.monotonic()
        wire.call("GET", self._key)
        return Reading(written - began, time.monotonic() - written)

    def load(self) -> Load:
        """See `Probe.load`. The lag is how long the replica furthest behind has been silent."""
        facts: dict[str, str] = {}
        for line in self._connected().call("INFO", "replication").decode().splitlines():
            name, _, value = line.partition(":")
            facts[name] = value.strip()
        lags = [
            float(lag)
            for name, value in facts.items()
            if name.startswith("slave") and "state=online" in value
            for lag in [value.rpartition("lag=")[2].partition(",")[0]]
            if lag.isdigit()
        ]
        offset = facts.get("master_repl_offset", "")
        return Load(max(lags, default=None), int(offset) if offset.isdigit() else None)

    def _connected(self) -> Wire:
        if self._wire is None or self._wire.is_lost:
            self.close()
            self._wire = Wire(self._address, self._name)
            self._wire.wait_at_most(LONGEST_S)
        return self._wire

    def close(self) -> None:
        """Delete the key and close the connection."""
        wire, self._wire = self._wire, None
        if wire is not None:
            if not wire.is_lost:
                with suppress(CellferryError):
                    wire.call("UNLINK", self._key)
            wire.close()
