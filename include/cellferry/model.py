"""The words of the domain as frozen types. Nothing here talks to a server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol


class State(StrEnum):
    """State of a migration; `paused`, `halted` and the last error are attributes, not states."""

    PLANNED = "planned"
    COPYING = "copying"
    SYNCING = "syncing"
    READY = "ready"
    CUTTING_OVER = "cutting_over"
    SOAKING = "soaking"
    RETAINED = "retained"
    CLEANING = "cleaning"
    COMPLETED = "completed"
    ROLLING_BACK = "rolling_back"
    ABORTED = "aborted"
    ROLLED_BACK = "rolled_back"

    @property
    def is_before_flip(self) -> bool:
        """Whether the route still points at the source, so that abort is possible."""
        return self in BEFORE_FLIP


BEFORE_FLIP = frozenset(
    {State.PLANNED, State.COPYING, State.SYNCING, State.READY, State.CUTTING_OVER}
)
#: States that occupy the organization (invariant 4). A retained migration is not live: a new one
#: may start and takes over its retention.
LIVE_STATES = BEFORE_FLIP | {State.SOAKING, State.ROLLING_BACK}

#: Every transition that is allowed; a step may also stay where it is.
TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.PLANNED: frozenset({State.COPYING, State.ABORTED}),
    State.COPYING: frozenset({State.SYNCING, State.ABORTED}),
    State.SYNCING: frozenset({State.READY, State.ABORTED}),
    # back to syncing: the verification was invalidated (a log was given up, a mismatch repaired)
    State.READY: frozenset({State.CUTTING_OVER, State.SYNCING, State.ABORTED}),
    # back to ready: the cutover gave up before the flip and the source serves again
    State.CUTTING_OVER: frozenset({State.SOAKING, State.READY, State.ABORTED}),
    State.SOAKING: frozenset({State.RETAINED, State.ROLLING_BACK}),
    State.RETAINED: frozenset({State.CLEANING, State.ROLLING_BACK}),
    # back to retained: the roll-back gave up before its flip and the new cell serves on
    State.ROLLING_BACK: frozenset({State.ROLLED_BACK, State.RETAINED}),
    State.CLEANING: frozenset({State.COMPLETED}),
    State.COMPLETED: frozenset(),
    State.ABORTED: frozenset(),
    State.ROLLED_BACK: frozenset(),
}


class GateState(StrEnum):
    """What a store's gate says to writers of one organization. No gate row means open."""

    OPEN = "open"
    """Writers pass; if the gate is armed, what they change is recorded in the key log."""
    FROZEN = "frozen"
    """Being moved: writers are refused and told to try again."""
    MOVED = "moved"
    """Writers are refused and told the new cell and epoch."""
    IMPORTING = "importing"
    """This cell is a destination that is not authoritative yet; only the mover writes."""


class Strategy(StrEnum):
    """How an organization moves."""

    ONLINE = "online"
    FREEZE_FIRST = "freeze-first"


class Side(StrEnum):
    """One of the two cells of a move."""

    SOURCE = "source"
    DESTINATION = "destination"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one store of one cell is reached. `repr` never shows the URLs' passwords.

    Attributes:
        url: connection URL of the mover's least-privileged role.
        admin_url: connection URL that may prepare the cell and manage gates; None where the
            deployment gives none to this process.
        options: the store's settings from `cells.yaml` (for redis: `key_prefix`).
    """

    url: str = field(repr=False)
    admin_url: str | None = field(default=None, repr=False)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cell:
    """An isolated instance of the product's stack."""

    name: str
    stores: Mapping[str, Endpoint]
    region: str = "local"
    legacy: bool = False


@dataclass(frozen=True, slots=True)
class Organization:
    """The moved unit. `id` is the key's canonical text, whatever its type in the database."""

    id: str
    slug: str


@dataclass(frozen=True, slots=True)
class Route:
    """Which cell has authority for an organization, and since which epoch (invariant 2)."""

    organization: str
    cell: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Throttle:
    """Upper bounds of the mover's own work; None means unbounded. Units: per second."""

    rows_per_s: float | None = None
    keys_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one move. Times are seconds."""

    pause_budget_s: float = 1.0
    """Longest write pause that may be predicted before a cutover starts."""
    drain_attempt_s: float = 0.1
    """One attempt at the exclusive side of the gate; writers in flight drain meanwhile."""
    drain_deadline_s: float = 10.0
    """All attempts together; then the cutover gives up and the source serves on."""
    freeze_deadline_s: float = 10.0
    """From the first freeze to the flip; past it, before the flip, the source is thawed."""
    arm_deadline_s: float = 60.0
    """Longest wait for transactions older than the arming of a gate."""
    batch_rows: int = 50_000
    batch_bytes: int = 8 * 1024 * 1024
    copy_lanes: int = 2
    """Tables of a large organization that are copied at once, at full speed."""


@dataclass(frozen=True, slots=True)
class Move:
    """Everything a store needs to know of one attempt at one migration.

    Attributes:
        epoch: the epoch under which the source has authority; the flip makes it `epoch + 1`.
        attempt: the lease of this controller. A store refuses a lower attempt (hazard 1).
        returning: this is the way back after a flip: `source` is the new cell, `destination` the
            old one, whose copy is there already behind a gate that says `moved`.
        planned: how much the plan counted, by store and by part of its inventory: what is expected,
            for totals and estimates only.
    """

    migration: int
    organization: Organization
    source: Cell
    destination: Cell
    epoch: int
    attempt: int
    strategy: Strategy = Strategy.ONLINE
    throttle: Throttle = Throttle()
    limits: Limits = Limits()
    returning: bool = False
    planned: Mapping[str, Mapping[str, int]] = field(default_factory=dict, compare=False)

    def turned(self) -> Move:
        """Return the way back of a move whose route was flipped: the cells swapped.

        Always online: reverse capture has been on since before the destination opened.
        """
        return replace(
            self,
            source=self.destination,
            destination=self.source,
            epoch=self.epoch + 1,
            strategy=Strategy.ONLINE,
            returning=True,
        )

    def cell(self, side: Side) -> Cell:
        """Return the cell on `side`."""
        return self.source if side is Side.SOURCE else self.destination


@dataclass(frozen=True, slots=True)
class Resource:
    """Something a migration makes in a cell and must remove again (invariant 9)."""

    cell: str
    store: str
    kind: str
    """`gate`, `key_log`, `acl_user`, `lease`, `checkpoint`, …"""
    name: str


@dataclass(frozen=True, slots=True)
class Blocker:
    """A reason why a move cannot start, and what to do about it."""

    code: str
    """Stable, kebab-case: `schema-differs`, `key-collision`, `not-prepared`, …"""
    where: str
    """Cell, store and table: `cell-2/postgres public.issues`."""
    reason: str
    remedy: str
    fatal: bool = True
    """False for a warning, which plan shows and which blocks nothing."""


@dataclass(frozen=True, slots=True)
class Part:
    """One countable part of a store's inventory: a table, a kind of key."""

    name: str
    count: int
    bytes: int
    placement: str = "owned"


@dataclass(frozen=True, slots=True)
class Inventory:
    """What one store holds of an organization, and what blocks its move. Sizes in bytes."""

    store: str
    unit: str
    """What is counted: `rows` or `keys`."""
    parts: tuple[Part, ...] = ()
    blockers: tuple[Blocker, ...] = ()
    write_rate_per_s: float | None = None
    """Measured changes per second of the organization, where the store can tell."""

    @property
    def count(self) -> int:
        """Total of all owned and referenced parts."""
        return sum(part.count for part in self.parts)

    @property
    def bytes(self) -> int:
        """Estimated bytes of all parts."""
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Copied:
    """Result of a bulk copy. `count` includes what earlier attempts had copied."""

    count: int
    bytes: int
    seconds: float
    batches: int
    recopied: int = 0
    """Rows or keys that this attempt copied although an earlier one had sent them."""


@dataclass(frozen=True, slots=True)
class Round:
    """One bounded pass over the dirty keys.

    Attributes:
        applied: keys brought up to date (deleted keys included).
        remaining: dirty keys seen after the round; they arrived meanwhile or were over the bound.
        seconds: duration of the round; predicts the next pause.
    """

    applied: int
    remaining: int
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Repaired:
    """A complete comparison whose differences were made good at the destination."""

    compared: int
    """Rows or keys of the source that were compared."""
    repaired: int
    """Rows or keys at the destination that were wrong, missing or too many, and are not now."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Landmark:
    """Which history a server is on, and how far it is: what tells that commits may be gone.

    Attributes:
        server: identity that the server's data carry; another one is another set of data.
        timeline: changes whenever the server may have gone on from an older state: a promotion,
            a restore.
        position: never falls on one timeline.
    """

    server: str
    timeline: str
    position: int

    def break_since(self, earlier: Landmark) -> str | None:
        """Say why what was committed at `earlier` may be gone here; None when it is all there."""
        if self.server != earlier.server:
            return "other data are there: it was restored or replaced"
        if self.timeline != earlier.timeline:
            return (
                f"it went from timeline {earlier.timeline} to {self.timeline}: a standby was"
                " promoted, or it was restored"
            )
        if self.position < earlier.position:
            return (
                f"its log stands at {self.position}, and stood at {earlier.position}: it was"
                " set back"
            )
        return None


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One difference that verification found."""

    part: str
    key: str
    reason: str
    """`missing at destination`, `extra at destination`, `differs`, `orphan`."""


@dataclass(frozen=True, slots=True)
class Verification:
    """Evidence of a complete comparison of both sides.

    Attributes:
        hashes: per part `{"count": n, "source": hash, "destination": hash}`.
        mismatches: at most 100 examples; `mismatch_count` is the full number.
        remarks: what was not looked at, in words.
    """

    store: str
    compared: int
    mismatch_count: int
    mismatches: tuple[Mismatch, ...]
    hashes: Mapping[str, Mapping[str, Any]]
    seconds: float
    remarks: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether both sides are equal."""
        return self.mismatch_count == 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The last delta, applied and verified under the gate."""

    applied: int
    compared: int
    seconds: float
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What one side's clean-up removed."""

    deleted: int
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Activity:
    """What a server has counted since it began to count: transactions and their misfortunes."""

    commits: int
    rollbacks: int
    deadlocks: int
    conflicts: int


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something of cellferry's that was found in a cell.

    Whether a migration still needs it is the topology's to say, not the cell's.

    Attributes:
        kind: `gate`, `key_log`, `lease`, `checkpoint`, `imported_row`, `acl_user`, `closed_user`.
        name: as a `Resource` of this kind is called.
        migration: whose it is; None where the cell cannot tell.
        attempt: of a gate, a lease or a user: the attempt that changed it last.
        state: of a gate, as are `epoch`, `moved_to` and `armed`.
        obeyed: whether the server enforces what the gate says (redis: the user's rules).
    """

    store: str
    kind: str
    name: str
    organization: str | None = None
    migration: int | None = None
    attempt: int | None = None
    state: GateState | None = None
    epoch: int | None = None
    moved_to: str | None = None
    armed: bool = False
    obeyed: bool = True


class Progress(Protocol):
    """Where a store reports long work; called a few times a second at most."""

    def report(
        self, store: str, phase: str, done: int, total: int | None, unit: str, note: str = ""
    ) -> None:
        """Say how far `phase` is: `done` of `total` (None when unknown) in `unit`."""
        ...

    def check(self) -> None:
        """Raise `Paused`, `Halted` or `LeaseLost` when the step must stop; called once a batch."""
        ...


class Resources(Protocol):
    """Registry of what a migration makes; kept in the topology (invariant 9)."""

    def intend(self, resource: Resource) -> None:
        """Record `resource` durably *before* it is made; repeating is harmless."""
        ...

    def forget(self, resource: Resource) -> None:
        """Record that `resource` is gone, *after* it was removed; repeating is harmless."""
        ...


@dataclass(frozen=True, slots=True)
class Actor:
    """Who does something, for the audit."""

    name: str
    role: str = "operator"
    dag_run: str | None = None
    try_number: int | None = None


@dataclass(frozen=True, slots=True)
class Migration:
    """A migration as the topology knows it."""

    id: int
    organization: Organization
    source: str
    destination: str
    state: State
    epoch: int
    """Epoch of the source's authority."""
    attempt: int
    strategy: Strategy
    paused: bool
    halted: str | None
    last_error: str | None
    ttl_until: datetime | None
    """When clean-up may start; set by the flip, on the topology's clock."""
    options: Mapping[str, Any]
    facts: Mapping[str, Any]
    """Results of the steps: plan, copied, rounds, verification, pause, cleaned."""
    created_at: datetime
    updated_at: datetime
    cohort: str | None = None
    """The wave it belongs to."""
    paused_reason: str | None = None
    paused_by: str | None = None
    paused_at: datetime | None = None
