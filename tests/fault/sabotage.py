"""Ways to break the product on purpose, to see that the matrix notices.

`make test-fault SABOTAGE=name ONLY=…` breaks it, in the steps' processes only. Each is something
that somebody might well forget; `test_matrix.py` shows that the matrix finds it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from cellferry.errors import TransientError
from cellferry.migration import barrier
from cellferry.stores.postgres.store import PostgresMove
from cellferry.stores.redis.store import RedisMove
from cellferry.topology import Topology


def _abort_does_not_thaw() -> None:
    """An abort is told to the topology, and the gates stay as the dead cutover left them."""
    for move in (PostgresMove, RedisMove):
        move.thaw = lambda _self: None  # type: ignore[method-assign]


def _unknown_flip_thaws() -> None:
    """A commit without an answer is taken for one that failed: the source serves again."""

    def thaw_at_once(at: Any, turn: Any, error: Any) -> None:
        del turn
        barrier.thaw(at)
        raise TransientError("the flip got no answer") from error

    barrier._settle_flip = thaw_at_once


def _whole_log_is_forgotten() -> None:
    """After a round the whole log goes, not only what the round saw."""
    from cellferry.stores.postgres.rounds import Rounds

    def forget(self: Any, _dirty: Any) -> None:
        time.sleep(0.1)  # somebody writes meanwhile
        self._source.execute(
            "DELETE FROM cellferry.key_log WHERE organization = %s", [self._move.organization.id]
        )

    Rounds.forget = forget  # type: ignore[method-assign]


def _attempts_share_a_number() -> None:
    """A successor takes over without a number of its own: nobody is fenced out (hazard 1)."""
    take = Topology.take_lease

    def same(self: Topology, migration_id: int, *arguments: Any) -> int:
        return self.migration(migration_id).attempt or take(self, migration_id, *arguments)

    Topology.take_lease = same  # type: ignore[method-assign]


SABOTAGE: Mapping[str, Callable[[], None]] = {
    "abort does not thaw": _abort_does_not_thaw,
    "unknown flip thaws": _unknown_flip_thaws,
    "whole log is forgotten": _whole_log_is_forgotten,
    "attempts share a number": _attempts_share_a_number,
}
