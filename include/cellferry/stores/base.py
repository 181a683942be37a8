"""The Store interface: the same few verbs for every kind of data.

A `Store` knows a kind of server. `Store.open` gives a `StoreMove`: that store's part of one
attempt at one migration, which holds its connections. Every verb of it may be repeated. Source
and destination are just two cells: rolling back is the same verbs with a `Move.turned`, whose
destination is the retained copy behind its gate `moved`.

Order of the verbs in an online move (`cellferry.migration` calls them)::

    fence, landmark                                at the start of every step
    open_capture, repair                           when a server lost commits, or the log was lost
    inventory, ask                                 plan (nothing is fenced)
    open_capture, copy                             copy
    sync, sync, …                                  sync
    verify, ask                                    verify
    thaw, check_return                             cutover, and roll back (turned), begin
    catch_up, freeze, finish, [flip], hand_over, release, keep_handed_over     cutover
    sync, ask                                      soak (turned)
    sync, verify, catch_up, freeze, …, keep_handed_over        roll back (turned)
    thaw, release, close_capture, cleanup          abort
    cleanup, close_capture                         cleanup (turned after a roll-back)
    backlog, drop_capture                          when a stopped migration's log is over its budget
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

from cellferry.model import (
    Activity,
    Blocker,
    Cell,
    Cleaned,
    Copied,
    Finished,
    GateState,
    Inventory,
    Landmark,
    Leftover,
    Move,
    Progress,
    Repaired,
    Resource,
    Resources,
    Round,
    Route,
    Side,
    Verification,
)
from cellferry.stores.pace import FULL_SPEED, Pace, Probe
from cellferry.stores.questions import Answer, BadQuestion, Question


class Store(ABC):
    """A kind of data that a cell can hold."""

    kind: ClassVar[str]
    """Name in `cells.yaml` and in evidence: `postgres`, `redis`."""

    @abstractmethod
    def prepare_cell(self, cell: Cell, progress: Progress) -> Mapping[str, Any]:
        """Install what a cell needs (gates, roles, ACLs) with the admin connection.

        Idempotent; never stalls production (hazard 10). Returns what was done, for people.

        Raises:
            NotPrepared: a prerequisite is missing, with its remedy.
            Unreachable: a server did not answer.
            AccessDenied: the admin connection may not do it.
        """

    @abstractmethod
    def unprepare_cell(self, cell: Cell, progress: Progress) -> Mapping[str, Any]:
        """Take everything that `prepare_cell` installed out again, without trace.

        Raises:
            Blocked: an organization is still gated or captured in this cell.
        """

    @abstractmethod
    def check_cell(self, cell: Cell) -> tuple[Blocker, ...]:
        """Say what keeps this cell from being part of a move; read-only, for `plan`."""

    def activity(self, cell: Cell) -> Activity | None:  # noqa: ARG002 - for stores that count
        """Return what this cell's server has counted; None where it counts no transactions."""
        return None

    def check_question(self, question: Question) -> None:
        """Return if `question` can be put to this store, as far as its text tells.

        Raises:
            BadQuestion: why not.
        """
        raise BadQuestion(f"{self.kind} cannot be asked {question.name!r}", "ask another store")

    @abstractmethod
    def open(
        self,
        move: Move,
        resources: Resources,
        progress: Progress,
        pace: Pace = FULL_SPEED,
        *,
        continues: bool = False,
    ) -> AbstractContextManager[StoreMove]:
        """Connect to both cells for one attempt at one migration; connections close on exit.

        Args:
            move: the attempt.
            resources: where what is made is recorded.
            progress: where long work is reported.
            pace: of `copy`, `sync`, `repair`, `verify` and `cleanup`. Whoever freezes gives none.
            continues: whether it may use what the step before connected, and leave it to the next,
                within `keeping_sessions`. Whoever freezes, hands over or deletes may not: after a
                failover an older session may lead to another server than a new one.
        """

    @contextmanager
    def keeping_sessions(self) -> Iterator[None]:
        """Give a block within which steps follow each other; see `open` for those that continue."""
        yield

    @abstractmethod
    def probe(self, cell: Cell, move: Move) -> Probe:
        """Return what asks this store in one cell how it does; it connects when it is first asked.

        Args:
            cell: what is asked.
            move: for whom, which names the session.
        """

    # ── for the reaper ──────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def leftovers(self, cell: Cell) -> tuple[Leftover, ...]:
        """Return everything of cellferry's in one cell, whoever it belongs to. Read-only.

        Key logs are named only where no gate is: the others belong to their gate.

        Raises:
            Unreachable, AccessDenied: the cell cannot be asked.
        """

    @abstractmethod
    def remove_leftover(self, cell: Cell, leftover: Leftover) -> bool:
        """Remove exactly what was found, if it still is as it was found; returns whether it was.

        A closed gate that goes opens: its writers pass. For what no migration owns.
        """

    @abstractmethod
    def turn_away(self, cell: Cell, gate: Leftover, route: Route) -> bool:
        """Make a gate, if it still is as it was found, say `moved` to where `route` leads.

        For a cell that does not know, after a failover, that an organization has left it, when no
        migration is there any more to say so (hazard 2).
        """

    def obey(self, cell: Cell, gate: Leftover) -> bool:  # noqa: ARG002 - for gates of two parts
        """Make the server enforce what a gate says, if it still is as it was found (hazard 2)."""
        return False

    @abstractmethod
    def reconcile(self, move: Move, side: Side, wanted: GateState, resources: Resources) -> bool:
        """Bring the gate on one side of a move to what the topology says, in that cell alone.

        Fences older attempts there first. Returns whether the gate was different. The other cell
        need not answer: what a controller that died left behind must not wait for it.

        Args:
            move: of an attempt that holds the lease; `turned` for what a roll-back left.
            side: whose gate.
            wanted: at the source `open` (before the flip: serve again) or `moved` (after it, also
                where a failover lost the gate); at the destination `open` (after the flip).
            resources: where what is made is recorded.

        Raises:
            LeaseLost: a newer attempt, or a newer migration, has this cell.
            WrongState: the gate is another's, or says something that no crash explains.
        """


class StoreMove(ABC):
    """One store's part of one attempt at a migration. All verbs may be repeated.

    Every write at the destination, and every change of a gate, first checks that `move.attempt`
    is still the newest that the cell has seen, and raises `LeaseLost` otherwise (hazard 1).
    Writes never touch another organization's data (invariant 8).
    """

    move: Move

    @abstractmethod
    def inventory(self) -> Inventory:
        """Count and size what would move, and list blockers, on both sides. Read-only.

        What `check_cell` says of the two cells is among them.
        Does not need `fence`: plan runs before a migration exists.
        """

    @abstractmethod
    def fence(self) -> None:
        """Make this attempt the only one that may write; older attempts fail from now on.

        Waits for, or ends, a destination transaction that an older attempt has in flight.
        """

    @abstractmethod
    def open_capture(self) -> None:
        """Start change capture at the source, complete from now on; gate the destination.

        The destination's gate becomes `importing` (a rogue write there is refused). Returns after
        every transaction older than the arming has ended. Raises `DrainTimeout` naming blockers.
        """

    @abstractmethod
    def copy(self) -> Copied:
        """Copy everything, throttled, resuming from the last checkpoint."""

    @abstractmethod
    def sync(self) -> Round:
        """Bring the destination up to date with the dirty keys seen now; one bounded round.

        What a round applies it also verifies, against the same snapshot.
        """

    @abstractmethod
    def repair(self) -> Repaired:
        """Compare everything, and make the destination equal to the source where it differs.

        For a capture that was lost or given up, and a server that lost commits: capture must be
        armed, so that what changes meanwhile is dirty. Takes as long as `verify`; repeatable.
        """

    @abstractmethod
    def landmark(self, side: Side) -> Landmark | None:
        """Say where the server of `side` stands; read-only.

        None where nothing durable is lost with a server's latest commits: the store compares
        everything anyway whenever it begins.
        """

    def has_restarted(self, evidence: Mapping[str, Any]) -> bool:  # noqa: ARG002 - see below
        """Say whether the destination is not the process any more that `finish` wrote to.

        For stores whose servers may lose what they had in memory only. Read-only.

        Args:
            evidence: that of `finish`.
        """
        return False

    def backlog(self, at_most: int) -> int:  # noqa: ARG002 - for stores that keep a log
        """Count the changes that wait in the log at the source, up to `at_most`. Read-only.

        0 where no log grows while nobody reads it. Does not need `fence`.
        """
        return 0

    def drop_capture(self) -> None:  # noqa: B027 - for stores that keep a log
        """End capture at the source and empty its log; the copy at the destination stays.

        Afterwards only `open_capture` and `repair` make the destination equal again: the fact
        `capture_lost` is recorded before. Repeatable.
        """

    @abstractmethod
    def verify(self) -> Verification:
        """Compare everything on both sides, while writers write.

        Independent of the copier's enumeration. A key that is dirty at the moment of comparison
        is not a mismatch (a later round verifies it); everything else must be equal.
        """

    @abstractmethod
    def catch_up(self) -> Round:
        """Get ready for a short freeze: everything that need not happen under the gate.

        Connects, warms up, re-establishes a capture that lives in a connection (redis: a complete
        compare-and-repair pass), runs one round. Its result predicts the pause. With
        `Strategy.FREEZE_FIRST` there is no round: `finish` copies, and compares everything.
        """

    @abstractmethod
    def freeze(self, deadline_s: float) -> None:
        """Gate writers at the source and drain those in flight; durable when `finish` returns.

        Writers that arrive wait (where the store can) or are refused with "try again". Only this
        organization notices.

        Raises:
            DrainTimeout: writers did not drain within `deadline_s`; the gate is as before.
        """

    @abstractmethod
    def finish(self) -> Finished:
        """Apply and verify the last delta under the gate; arm reverse capture at the destination.

        With `Strategy.FREEZE_FIRST` copies and verifies everything. Committed at the destination
        when it returns. Raises `VerificationFailed`.
        """

    @abstractmethod
    def hand_over(self) -> None:
        """After the flip: source `moved` (epoch + 1, new cell), destination open. Repeatable.

        A capture of the source is closed; the gate stays until clean-up (invariant 5). Durable
        when `keep_handed_over` returns.
        """

    @abstractmethod
    def keep_handed_over(self) -> None:
        """After `hand_over`, when nobody waits any more: see that a crash does not undo it.

        Repeatable.
        """

    @abstractmethod
    def release(self) -> None:
        """Let waiting writers go on; they learn the new cell (or that the source serves on)."""

    @abstractmethod
    def thaw(self) -> None:
        """Before the flip: open the source again. A compare-and-set on this migration's gate."""

    @abstractmethod
    def check_return(self) -> tuple[Blocker, ...]:
        """Say what would keep this move from being rolled back without loss. Read-only.

        Asked of the move on its way out, before its route may be flipped: privileges, gates and
        versions that the way back needs. Asked again of the turned move before it goes back: it
        then also says which rows must not come along, and what would stay behind (not fatal).
        """

    asks_early: ClassVar[bool] = False
    """Whether `ask` works before `fence`, so that plan can try a question out."""

    def ask(self, side: Side, question: Question) -> Answer:
        """Return one value about the organization on `side`; changes nothing there.

        Raises:
            InvalidInput: the server cannot answer such a question.
            TransientError: it did not answer in time.
        """
        raise NotImplementedError(f"{question.name} was not checked for {side}")

    def was_opened(self) -> bool:
        """After the flip: whether writers were let in at the destination, whatever its gate says.

        For a gate that a crash may set back without what writers did since. False when in doubt.
        """
        return False

    def is_gone(self, resource: Resource) -> bool:  # noqa: ARG002 - for what a restart takes away
        """Whether something that was recorded for this migration is surely not in its cell.

        Asked at the end, when no older attempt can make it any more. False when in doubt.
        """
        return False

    @abstractmethod
    def cleanup(self, side: Side) -> Cleaned:
        """Delete this organization's copy on `side` in paced batches, then what was made there.

        At the source it requires the gate to be `moved` by this migration at this epoch; at the
        destination (abort) `importing` by this migration. Each batch checks it (hazard 4).
        Removes gate rows, logs, checkpoints and credentials of this migration on that side.
        """

    @abstractmethod
    def close_capture(self) -> None:
        """End change capture on both sides and remove its traces. Repeatable."""
