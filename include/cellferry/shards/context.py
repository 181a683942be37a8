"""What every step of a re-sharding works with."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from cellferry.closing import Closing
from cellferry.errors import WrongState
from cellferry.model import Actor
from cellferry.settings import ConnectionSource, resolve
from cellferry.shards.control import ShardControl
from cellferry.shards.leases import Lease
from cellferry.shards.progress import Moved
from cellferry.shards.record import Resharding
from cellferry.shards.settings import ShardSet
from cellferry.shards.states import ShardState

MARGIN_S = 10.0
"""How much longer than its lease a client is waited for."""
_FENCES_OF_ONE = 10**9
_FENCES_OF_ATTEMPT = 10**4


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a step is at one shard.

    Attributes:
        step: the step's name, as in the command.
        shard: which source; empty for the step as a whole.
        total: None where nobody knows.
        unit: of `done` and `total`.
        note: what else a person wants to know now.
    """

    step: str
    shard: str
    done: int
    total: int | None = None
    unit: str = "keys"
    note: str = ""

    @classmethod
    def of(cls, step: str, told: Moved) -> Self:
        """Return what a mover of keys told, as a step's."""
        return cls(step, told.shard, told.done, told.total, note=told.phase)


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        id: the re-sharding's; 0 for a step that begins none.
        state: of the re-sharding now.
        summary: one line for people.
        facts: figures for programs.
    """

    set_name: str
    id: int
    state: ShardState
    summary: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {
            "set": self.set_name,
            "resharding": self.id,
            "state": str(self.state),
            "summary": self.summary,
            **self.facts,
        }


class Context(Closing):
    """The topology, the connections, and who asks.

    Args:
        topology: URL of the topology; never shown.
        source: resolves connections' names.
        actor: for the audit.
        owner: where this process is, for whoever wants to find it.
        listener: told how far the work is, from any thread.
    """

    def __init__(
        self,
        topology: str,
        source: ConnectionSource,
        actor: Actor,
        *,
        owner: str = "",
        listener: Callable[[Progress], None] | None = None,
    ) -> None:
        self.topology = topology
        self.source = source
        self.actor = actor
        self.owner = owner or f"{socket.gethostname()}:{os.getpid()}"
        self.control = ShardControl(topology)
        self._listener = listener

    def close(self) -> None:
        """Close the connection to the topology."""
        self.control.close()

    def tell(self, progress: Progress) -> None:
        """Say how far the work is."""
        if self._listener is not None:
            self._listener(progress)

    def live(self, set_name: str) -> Resharding:
        """Return the live re-sharding of a set.

        Raises:
            InvalidInput: there is no such set.
            WrongState: it has none.
        """
        found = self.control.live(set_name)
        if found is None:
            self.control.set(set_name)
            raise WrongState(
                f"no re-sharding of {set_name} is live",
                hint="`cellferry reshard plan` and `begin` start one",
            )
        return found

    @contextmanager
    def lease(self, id_: int, step: str, *, part: str | None = None) -> Iterator[Lease]:
        """Be the one controller of the re-sharding; see `ShardControl.lease`."""
        with self.control.lease(id_, step, self.owner, self.actor, part=part) as lease:
            yield lease

    def patience_s(self, id_: int) -> float:
        """Return how long a client may take to acknowledge a state, or to be passed over."""
        leases = [one.lease_s for one in self.control.clients(id_)]
        return max(leases, default=0.0) + MARGIN_S

    def wait_acknowledged(self, id_: int, lease: Lease) -> float:
        """Wait until every client follows the present state; return how long it took, seconds.

        Raises:
            ClientsBehind: one neither acknowledged it nor fell silent for its lease.
        """
        begun = time.monotonic()
        self.tell(
            Progress(
                lease.step, "", 0, None, "s", "waiting until every client acknowledges the state"
            )
        )
        self.control.wait_acknowledged(id_, self.patience_s(id_), while_waiting=lease.check)
        return time.monotonic() - begun

    def urls(self, *sets: ShardSet) -> dict[str, str]:
        """Return the URLs of all connections of `sets`, for another process. Holds passwords."""
        names = {name for one in sets for name in one.connections.values()}
        return {name: resolve(name, self.source) for name in sorted(names)}


def fence(lease: Lease) -> int:
    """Return a number for the shards that is larger than that of any earlier lease."""
    attempts = lease.resharding * _FENCES_OF_ONE + lease.attempt * _FENCES_OF_ATTEMPT
    return attempts + lease.number
