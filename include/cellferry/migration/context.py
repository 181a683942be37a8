"""What every step needs: the topology, the stores, the two cells, and who asks."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cellferry.errors import CellferryError, InvalidInput, Stopped, TransientError, WrongState
from cellferry.migration.halts import judge_failure
from cellferry.migration.options import MoveOptions
from cellferry.migration.pacing import Pacing
from cellferry.model import Actor, Migration, Move, Organization, Progress, State, Strategy
from cellferry.settings import ConnectionSource, Settings, resolve
from cellferry.stores.base import Store, StoreMove
from cellferry.topology import Topology


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """One report of long work: `done` of `total` in `unit`, for people."""

    organization: str
    store: str
    phase: str
    done: int
    total: int | None
    unit: str
    note: str = ""


Listener = Callable[[ProgressEvent], None]


def store_for(kind: str, data_map: Path | None) -> Store:
    """Return the store called `kind`. A new kind of data is registered here.

    Raises:
        InvalidInput: no such store.
    """
    if kind == "postgres":
        from cellferry.stores.postgres.store import PostgresStore

        return PostgresStore(data_map)
    if kind == "redis":
        from cellferry.stores.redis.store import RedisStore

        return RedisStore()
    raise InvalidInput(f"there is no store called {kind!r}", hint="the stores are: postgres, redis")


@dataclass
class Context:
    """Everything ambient of a step, made explicit. Use as a context manager."""

    settings: Settings
    connections: ConnectionSource
    actor: Actor
    topology: Topology
    listener: Listener | None = None
    stores: Mapping[str, Store] = field(default_factory=dict)
    last_try: bool = False
    """Whether nobody tries again when a step fails, even if that might help."""
    until: float | None = None
    """When a step must stop between two batches (`time.monotonic`), for another run to go on."""
    _open: ExitStack = field(default_factory=ExitStack, init=False, repr=False)

    @classmethod
    def from_settings(
        cls,
        settings: Settings,
        connections: ConnectionSource,
        *,
        actor: Actor,
        listener: Listener | None = None,
    ) -> Context:
        """Connect to the topology and make the configured stores.

        Raises:
            InvalidInput: a connection is not defined.
            Unreachable, AccessDenied: the topology does not answer or refuses.
        """
        topology = Topology(resolve(settings.topology.connection, connections))
        data_map = settings.organization.data_map
        return cls(
            settings=settings,
            connections=connections,
            actor=actor,
            topology=topology,
            listener=listener,
            stores={kind: store_for(kind, data_map) for kind in settings.store_kinds},
        )

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.topology)
            for store in self.stores.values():
                stack.enter_context(store.keeping_sessions())
            self._open = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def move(self, migration: Migration, attempt: int, *, returning: bool = False) -> Move:
        """Return the move that `attempt` at `migration` makes; `returning` is the way back."""
        options = MoveOptions.model_validate(dict(migration.options))
        move = Move(
            migration=migration.id,
            organization=migration.organization,
            source=self.settings.cell(migration.source, self.connections),
            destination=self.settings.cell(migration.destination, self.connections),
            epoch=migration.epoch,
            attempt=attempt,
            strategy=migration.strategy,
            throttle=options.throttle,
            limits=options.limits,
            planned=_planned(migration),
        )
        return move.turned() if returning else move

    def dry_move(
        self, organization: Organization, source: str, destination: str, options: MoveOptions
    ) -> Move:
        """Return a move for looking only: migration and attempt 0 own nothing anywhere."""
        return Move(
            migration=0,
            organization=organization,
            source=self.settings.cell(source, self.connections),
            destination=self.settings.cell(destination, self.connections),
            epoch=0,
            attempt=0,
            strategy=Strategy.ONLINE,
            throttle=options.throttle,
            limits=options.limits,
        )


def _planned(migration: Migration) -> dict[str, dict[str, int]]:
    """Return what the recorded plan counted, as `Move.planned`."""
    inventories: Mapping[str, Any] = migration.facts.get("plan", {}).get("inventories", {})
    return {
        kind: {part["name"]: part["count"] for part in found["parts"]}
        for kind, found in inventories.items()
    }


class StepProgress(Progress):
    """Progress of one step: to the topology (for everybody) and to a listener (for this person).

    `check` asks the topology whether this attempt may go on, at most twice a second.

    Attributes:
        stoppable: whether a pause or a halt ends the step; a take-over always does.
    """

    CHECK_EVERY_S = 0.5

    def __init__(
        self,
        context: Context,
        organization: str,
        migration: int,
        attempt: int,
        *,
        stoppable: bool = True,
    ) -> None:
        self._context = context
        self._organization = organization
        self.stoppable = stoppable
        self._sink = context.topology.progress_sink(migration, attempt) if migration else None
        self._checked = time.monotonic()

    def report(
        self, store: str, phase: str, done: int, total: int | None, unit: str, note: str = ""
    ) -> None:
        """Pass a report on."""
        if self._sink is not None:
            self._sink.report(store, phase, done, total, unit, note)
        if self._context.listener is not None:
            self._context.listener(
                ProgressEvent(self._organization, store, phase, done, total, unit, note)
            )

    def check(self) -> None:
        """Raise when this attempt must stop: taken over, paused or halted."""
        now = time.monotonic()
        if self._context.until is not None and now > self._context.until:
            raise TransientError("the time of this run is over", hint="the next run goes on")
        if now - self._checked >= self.CHECK_EVERY_S:
            self.check_now()

    def check_now(self) -> None:
        """Ask the topology at once. A step that a pause cannot stop hears only of a take-over."""
        if self._sink is None:
            return
        try:
            self._sink.check()
        except Stopped:
            if self.stoppable:
                raise
        self._checked = time.monotonic()


@dataclass
class Attempt:
    """One controller's hold on a migration, with every store open and fenced."""

    context: Context
    migration: Migration
    move: Move
    stores: Mapping[str, StoreMove]
    progress: StepProgress
    pacing: Pacing | None = None

    @property
    def options(self) -> MoveOptions:
        """The migration's options."""
        return MoveOptions.model_validate(dict(self.migration.options))

    def transition(
        self, to: State, facts: Mapping[str, Any] | None = None, reason: str | None = None
    ) -> None:
        """Move the migration from its known state to `to`; facts and audit go with it."""
        self.migration = self.context.topology.transition(
            self.migration.id,
            self.move.attempt,
            self.migration.state,
            to,
            self.context.actor,
            facts,
            reason,
        )

    def pace_facts(self, step: str) -> dict[str, Any]:
        """Return the fact `pace` with what this step's throttles decided; nothing if they did not.

        Args:
            step: the key within the fact.
        """
        found = self.pacing.facts() if self.pacing is not None else {}
        return {"pace": {**self.migration.facts.get("pace", {}), step: found}} if found else {}

    def record(self, facts: Mapping[str, Any]) -> None:
        """Keep `facts` with the migration."""
        self.context.topology.record(self.migration.id, self.move.attempt, facts)
        self.migration = self.context.topology.migration(self.migration.id)


@contextmanager
def attempt(
    context: Context,
    migration_id: int,
    step: str,
    allowed: frozenset[State],
    *,
    stoppable: bool = True,
    returning: bool = False,
    taken: Callable[[int], None] | None = None,
    paced: bool = False,
    continues: bool = False,
) -> Iterator[Attempt]:
    """Take the migration over: a new attempt in the topology, then at every store of both cells.

    From here on nothing that an older attempt does can have an effect (hazard 1). An error that
    leaves the block is recorded with the migration, whose state stays where it is.

    Args:
        stoppable: False for steps that must work while the migration is paused or halted.
        returning: for steps after the flip that go from the new cell to the old one.
        taken: told the attempt's number, for who has to know it even if a cell does not answer.
        paced: go slowly where a cell is slow. Never for a step that freezes anything.
        continues: use the sessions of the step before. Never for a step that freezes, hands over or
            deletes.

    Raises:
        WrongState: the migration's state is not in `allowed`.
        Paused, Halted: a person stopped it; whoever works on it keeps it.
    """
    topology = context.topology
    migration = topology.migration(migration_id)
    _insist_on_state(migration, step, allowed)
    holder = f"{socket.gethostname()}:{os.getpid()}:{step}"
    number = topology.take_lease(migration_id, holder, context.actor, stoppable)
    if taken is not None:
        taken(number)
    # An older attempt may have flipped just before: it goes on at the stores if this step cannot.
    migration = topology.migration(migration_id)
    _insist_on_state(migration, step, allowed)
    move = context.move(migration, number, returning=returning)
    progress = StepProgress(
        context, migration.organization.slug, migration_id, number, stoppable=stoppable
    )
    resources = topology.resources(migration_id, number)
    try:
        progress.check_now()
        with ExitStack() as stack:
            moves: dict[str, StoreMove] = {}
            target_ms = MoveOptions.model_validate(dict(migration.options)).latency_target_ms
            pacing = stack.enter_context(
                Pacing(topology, context.stores, move, step, progress, target_ms if paced else None)
            )
            for kind, store in context.stores.items():
                opened = store.open(
                    move, resources, progress, pacing.pace(kind), continues=continues
                )
                moves[kind] = stack.enter_context(opened)
                moves[kind].fence()
            # Whoever slept before its fence, while another ended the migration, does no more. What
            # its fence left in the cells is the reaper's.
            progress.check_now()
            yield Attempt(context, topology.migration(migration_id), move, moves, progress, pacing)
    except CellferryError as error:
        error.organization = error.organization or migration.organization.slug
        error.step = error.step or step
        _remember(context, migration_id, number, str(error))
        judge_failure(context, migration, step, error)
        raise
    except Exception as error:
        _remember(context, migration_id, number, f"{type(error).__name__}: {error} [step {step}]")
        judge_failure(context, migration, step, error)
        raise
    topology.set_error(migration_id, None, attempt=number)


def _insist_on_state(migration: Migration, step: str, allowed: frozenset[State]) -> None:
    if migration.state not in allowed:
        raise WrongState(
            f"migration {migration.id} is {migration.state}, and {step} needs "
            f"{' or '.join(sorted(allowed))}",
            organization=migration.organization.slug,
            step=step,
            hint="see `cellferry status` for what to do next",
        )


def _remember(context: Context, migration_id: int, number: int, text: str) -> None:
    """Keep the error with the migration if the topology still lets this attempt speak."""
    try:
        context.topology.set_error(migration_id, text, attempt=number)
    except CellferryError:
        return  # the first error is the one that matters, and it is being raised
