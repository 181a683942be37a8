"""Migrations: the state machine, the lease, and the flip."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg import errors
from psycopg.rows import dict_row

from cellferry.errors import (
    InvalidInput,
    LeaseLost,
    OutcomeUnknown,
    Paused,
    Stopped,
    Unreachable,
    WrongState,
)
from cellferry.model import (
    BEFORE_FLIP,
    LIVE_STATES,
    TRANSITIONS,
    Actor,
    Migration,
    Organization,
    Route,
    State,
    Strategy,
)
from cellferry.topology import audit
from cellferry.topology.audit import AuditEntry
from cellferry.topology.connection import Database
from cellferry.topology.directory import check_cell_known, find_organization
from cellferry.topology.document import document, without_secrets
from cellferry.topology.halts import check_may_start, halt_migration, halts_on, join_cohort

#: A lease's heartbeat is written at most so often, in seconds.
HEARTBEAT_S = 5.0

#: States in which the source's key log grows, and may be given up.
CAPTURING = frozenset({State.COPYING, State.SYNCING, State.READY})

#: Transitions that change the route as well.
FLIPS = {(State.CUTTING_OVER, State.SOAKING), (State.ROLLING_BACK, State.ROLLED_BACK)}

#: Begins the reason of the pause that keeps clean-ups away from a roll-back; its flip lifts it.
ROLL_BACK_PAUSE = "it is being rolled back"

_COLUMNS = """
SELECT m.id, m.organization, o.slug, m.source, m.destination, m.state, m.epoch, m.attempt,
       m.strategy, m.paused, m.halted, m.last_error, m.ttl_until, m.options, m.facts,
       m.created_at, m.updated_at, m.cohort, m.paused_reason, m.paused_by, m.paused_at
FROM topology.migration AS m JOIN topology.organization AS o ON o.id = m.organization
"""
_BY_ID = _COLUMNS + "WHERE m.id = %s"
_BY_ID_LOCKED = _BY_ID + " FOR UPDATE OF m"


@dataclass(frozen=True, slots=True)
class Lease:
    """Who works on a migration, and when he was last heard of (topology's clock)."""

    migration: int
    attempt: int
    holder: str | None
    taken_at: datetime | None
    heartbeat_at: datetime | None


class Migrations:
    """The part of the topology that records moves. Every change carries its audit row."""

    _database: Database

    def create_migration(
        self,
        org: Organization | str,
        destination: str,
        strategy: Strategy | str,
        options: Mapping[str, Any] | None,
        plan: Mapping[str, Any] | None,
        actor: Actor,
        *,
        cohort: str | None = None,
    ) -> Migration:
        """Record a new migration of `org` from where it lives to `destination`.

        An earlier migration that is retained gets `superseded_by`: its clean-up is cancelled
        (hazard 4). `plan` becomes the fact `plan`. `cohort` names the wave it belongs to.

        Raises:
            Halted: a cell of it, or its cohort, is halted.
            InvalidInput: unknown organization, cell or strategy; source = destination.
            WrongState: the organization is already moving, or the destination is cordoned.
        """
        try:
            chosen = Strategy(strategy)
        except ValueError:
            raise InvalidInput(
                f"there is no strategy {strategy!r}", hint=f"choose one of {', '.join(Strategy)}"
            ) from None
        id_ = org.id if isinstance(org, Organization) else org
        request = uuid.uuid4()

        def work(connection: psycopg.Connection[Any]) -> int:
            done = connection.execute(
                "SELECT migration FROM topology.audit WHERE request = %s", [request]
            ).fetchone()
            if done is not None:  # an earlier commit whose answer was lost
                return int(done[0])
            return _create(
                connection, id_, destination, chosen, options, plan, actor, request, cohort
            )

        return self.migration(self._database.run(work))

    def migration(self, migration_id: int) -> Migration:
        """Return a migration.

        Raises:
            InvalidInput: there is none with this id.
        """
        return self._database.run(lambda connection: load_migration(connection, migration_id))

    def live_migration(self, organization_id: str) -> Migration | None:
        """Return the one live migration of an organization (invariant 4)."""
        found = self.migrations(states=LIVE_STATES, org=organization_id)
        return found[0] if found else None

    def migrations(
        self,
        states: Iterable[State | str] | None = None,
        org: Organization | str | None = None,
        limit: int = 1000,
    ) -> list[Migration]:
        """Return migrations, newest first.

        Raises:
            InvalidInput: unknown state.
        """
        wanted = None if states is None else sorted(str(checked_state(state)) for state in states)
        organization = org.id if isinstance(org, Organization) else org

        def work(connection: psycopg.Connection[Any]) -> list[Migration]:
            with connection.cursor(row_factory=dict_row) as cursor:
                cursor.execute(
                    _COLUMNS
                    + """
                    WHERE (%(states)s::text[] IS NULL OR m.state = ANY (%(states)s))
                      AND (%(organization)s::text IS NULL OR m.organization = %(organization)s)
                    ORDER BY m.id DESC LIMIT %(limit)s
                    """,
                    {"states": wanted, "organization": organization, "limit": limit},
                )
                return [_migration(row) for row in cursor]

        return self._database.run(work)

    def take_lease(
        self, migration_id: int, holder: str, actor: Actor, stoppable: bool = False
    ) -> int:
        """Take the migration over: return a new attempt number; every older one is lost.

        Works in every state, paused and halted ones too: `check_lease` tells.

        Args:
            migration_id: the migration.
            holder: what a person needs to find the holder: host, process, DAG run and try.
            actor: for the audit.
            stoppable: leave a paused or halted migration to whoever has it: a step that may not
                run now must not take it from one that may, such as a roll-back.

        Raises:
            Paused, Halted: only with `stoppable`; the lease stays where it was.
        """

        def work(connection: psycopg.Connection[Any]) -> int:
            row = connection.execute(
                """
                UPDATE topology.migration
                SET attempt = attempt + 1, holder = %s, taken_at = now(), heartbeat_at = now()
                WHERE id = %s RETURNING attempt, organization
                """,
                [holder, migration_id],
            ).fetchone()
            if row is None:
                raise _no_migration(migration_id)
            if stoppable:
                _insist_on_running(connection, migration_id)
            return note_lease(connection, actor, migration_id, holder, *row)

        return self._database.run(work)

    def check_lease(self, migration_id: int, attempt: int) -> None:
        """Raise when this controller must stop; cheap, called once a batch. Keeps the lease alive.

        Of a paused or halted migration as well: a step that a stop does not concern, such as an
        abort, asks here, and lives.

        Raises:
            LeaseLost: another controller took over.
            Paused: a person paused the migration.
            Halted: it is halted, or its cohort, or one of its cells.
        """

        def work(connection: psycopg.Connection[Any]) -> Stopped | None:
            row = connection.execute(
                """
                SELECT attempt, organization, holder,
                       abs(extract(epoch FROM now() - heartbeat_at)) > %s
                FROM topology.migration WHERE id = %s
                """,
                [HEARTBEAT_S, migration_id],
            ).fetchone()
            if row is None:
                raise _no_migration(migration_id)
            newest, org, holder, quiet = row
            if newest != attempt:
                raise _lease_lost(migration_id, attempt, newest, holder, org)
            if quiet:
                connection.execute("SET LOCAL synchronous_commit = off")
                connection.execute(
                    """
                    UPDATE topology.migration SET heartbeat_at = now()
                    WHERE id = %s AND attempt = %s
                    """,
                    [migration_id, attempt],
                )
            try:
                _insist_on_running(connection, migration_id)
            except Stopped as stop:
                return stop  # raised here it would take the heartbeat back
            return None

        stop = self._database.run(work)
        if stop is not None:
            raise stop

    def lease(self, migration_id: int) -> Lease:
        """Return who holds the migration.

        Raises:
            InvalidInput: there is none with this id.
        """

        def work(connection: psycopg.Connection[Any]) -> Lease:
            row = connection.execute(
                """
                SELECT id, attempt, holder, taken_at, heartbeat_at
                FROM topology.migration WHERE id = %s
                """,
                [migration_id],
            ).fetchone()
            if row is None:
                raise _no_migration(migration_id)
            return Lease(*row)

        return self._database.run(work)

    def transition(
        self,
        migration_id: int,
        attempt: int,
        from_: State | str,
        to: State | str,
        actor: Actor,
        facts: Mapping[str, Any] | None = None,
        reason: str | None = None,
    ) -> Migration:
        """Go from one state to another: a compare-and-set with its audit row in one transaction.

        `facts` are merged into the migration's and are the audit's evidence. Repeating it is
        harmless: a migration that is in `to` already stays there, without another audit row.
        `from_` = `to` records something without a change of state.

        Raises:
            WrongState: the migration is in neither state, the transition does not exist, or it is
                a flip's own (`cutting_over` to `soaking`, `rolling_back` to `rolled_back`).
            LeaseLost: `attempt` is not the newest.
            InvalidInput: unknown state or migration.
            OutcomeUnknown: the connection broke while committing and the topology does not say.
        """
        before, after = checked_state(from_), checked_state(to)
        if (before, after) in FLIPS:
            raise WrongState(
                f"only a flip makes a migration {after}",
                hint="use Topology.flip or Topology.flip_back",
            )
        if after is not before and after not in TRANSITIONS[before]:
            raise WrongState(f"a migration never goes from {before} to {after}")

        def work(connection: psycopg.Connection[Any], request: uuid.UUID) -> Migration:
            current = _locked(connection, migration_id, attempt)
            if current.state is not before:
                if current.state is after:
                    return _merge_facts(connection, current, facts)
                raise WrongState(
                    f"the migration is {current.state}, not {before}",
                    organization=current.organization.slug,
                    hint="look at its status; a step fits only its states",
                )
            if after is State.CLEANING and before is State.RETAINED:
                check_may_clean(connection, current)
            if after is State.ROLLING_BACK and before is not after:
                _check_may_roll_back(connection, current)
            audit.write(
                connection,
                "transition",
                actor,
                migration=migration_id,
                organization=current.organization.id,
                from_state=before,
                to_state=after,
                epoch=current.epoch,
                attempt=attempt,
                reason=reason,
                evidence=facts,
                request=request,
            )
            connection.execute(
                """
                UPDATE topology.migration
                SET state = %s, facts = facts || %s, heartbeat_at = now(), updated_at = now()
                WHERE id = %s
                """,
                [after, document(facts), migration_id],
            )
            return load_migration(connection, migration_id)

        return self._settled(migration_id, work)

    def record(self, migration_id: int, attempt: int, facts: Mapping[str, Any]) -> Migration:
        """Merge `facts` into the migration's (top-level keys replace). Repeatable.

        Raises:
            LeaseLost: `attempt` is not the newest.
        """

        def work(connection: psycopg.Connection[Any]) -> Migration:
            return _merge_facts(connection, _locked(connection, migration_id, attempt), facts)

        return self._database.run(work)

    def record_and_halt(
        self,
        migration_id: int,
        attempt: int,
        facts: Mapping[str, Any],
        reason: str,
        actor: Actor,
    ) -> Migration:
        """Merge `facts` and halt the migration in one transaction: never one without the other.

        A halt that was there keeps its reason; see `halt`. Repeatable.

        Raises:
            LeaseLost: `attempt` is not the newest; nothing was written.
        """

        def work(connection: psycopg.Connection[Any]) -> Migration:
            _merge_facts(connection, _locked(connection, migration_id, attempt), facts)
            halt_migration(connection, migration_id, reason, actor)
            return load_migration(connection, migration_id)

        return self._database.run(work)

    def flip(
        self,
        migration_id: int,
        attempt: int,
        actor: Actor,
        ttl_seconds: float,
        facts: Mapping[str, Any] | None = None,
    ) -> Route:
        """The commit point: the route goes from the source at epoch N to the destination at N + 1.

        One transaction: lease, state `cutting_over` to `soaking`, route and its history, the
        time until which the source's copy is kept (on the topology's clock), audit, notification.
        Repeating it after success is harmless.

        Raises:
            OutcomeUnknown: the connection broke while committing. Change nothing; ask
                `flip_outcome`.
            LeaseLost: `attempt` is not the newest.
            WrongState: not cutting over, or the route is not the source's at this epoch.
        """

        def work(connection: psycopg.Connection[Any]) -> Route:
            current = _locked(connection, migration_id, attempt)
            flipped = Route(current.organization.id, current.destination, current.epoch + 1)
            if current.state is State.SOAKING:
                return flipped
            left = Route(current.organization.id, current.source, current.epoch)
            _change_authority(
                connection,
                current,
                (State.CUTTING_OVER, State.SOAKING),
                (left, flipped),
                actor,
                ttl_seconds,
                facts,
            )
            return flipped

        return self._database.run(work, repeatable=False)

    def flip_back(
        self,
        migration_id: int,
        attempt: int,
        actor: Actor,
        ttl_seconds: float,
        facts: Mapping[str, Any] | None = None,
        reason: str | None = None,
    ) -> Route:
        """The commit point of a roll-back: the route goes back to the source, at epoch N + 2.

        As `flip`: state `rolling_back` to `rolled_back`; the copy that is kept until the TTL has
        passed is the destination's now. A pause for the sake of the roll-back ends with it; one
        that a person set for another reason stays.

        Raises:
            OutcomeUnknown, LeaseLost, WrongState: as `flip`.
        """

        def work(connection: psycopg.Connection[Any]) -> Route:
            current = _locked(connection, migration_id, attempt)
            back = Route(current.organization.id, current.source, current.epoch + 2)
            if current.state is State.ROLLED_BACK:
                return back
            left = Route(current.organization.id, current.destination, current.epoch + 1)
            _change_authority(
                connection,
                current,
                (State.ROLLING_BACK, State.ROLLED_BACK),
                (left, back),
                actor,
                ttl_seconds,
                facts,
                reason,
            )
            lifted = connection.execute(
                """
                UPDATE topology.migration
                SET paused = false, paused_reason = NULL, paused_by = NULL
                WHERE id = %s AND paused AND starts_with(paused_reason, %s)
                """,
                [current.id, ROLL_BACK_PAUSE],
            ).rowcount
            if lifted:
                _note(connection, "resumed", current, actor, "rolled back")
            return back

        return self._database.run(work, repeatable=False)

    def may_roll_back(self, migration_id: int) -> None:
        """Return if the organization can go back to the cell that this migration took it from.

        Raises:
            WrongState: not between flip and clean-up, or the organization has moved on.
        """

        def work(connection: psycopg.Connection[Any]) -> None:
            current = load_migration(connection, migration_id)
            if current.state is not State.ROLLED_BACK:
                _check_may_roll_back(connection, current)

        self._database.run(work)

    def flip_outcome(self, migration_id: int, *, back: bool = False) -> bool:
        """Whether the route was flipped; waits for a flip whose commit is still in flight.

        With `back` it is asked of a roll-back's flip.

        A False is final for the flips that were sent before: the row was locked to say so.

        Raises:
            Unreachable, TransientError: the topology cannot say yet. Change nothing; ask again.
        """

        def work(connection: psycopg.Connection[Any]) -> bool:
            current = load_migration(connection, migration_id, locked=True)
            # A write: its commit waits until a synchronous standby has the flip as well.
            connection.execute(
                "UPDATE topology.migration SET updated_at = now() WHERE id = %s", [migration_id]
            )
            if back:
                return current.state is State.ROLLED_BACK
            return current.state not in BEFORE_FLIP and current.state is not State.ABORTED

        return self._database.run(work)

    def may_clean(self, migration_id: int) -> None:
        """Return if the copy that was left behind may be deleted now (hazard 4).

        That is the source's; of a migration that was rolled back, the destination's. The TTL is
        asked of the topology's clock.

        Raises:
            WrongState: not retained or rolled back, the TTL lasts, the organization returned or
                moved on, or a newer migration took the retention over.
        """
        self._database.run(
            lambda connection: check_may_clean(connection, load_migration(connection, migration_id))
        )

    def superseded_by(self, migration_id: int) -> int | None:
        """Return the migration that took over the retention of this one."""

        def work(connection: psycopg.Connection[Any]) -> int | None:
            row = connection.execute(
                "SELECT superseded_by FROM topology.migration WHERE id = %s", [migration_id]
            ).fetchone()
            if row is None:
                raise _no_migration(migration_id)
            return None if row[0] is None else int(row[0])

        return self._database.run(work)

    def set_error(self, migration_id: int, text: str | None, attempt: int | None = None) -> None:
        """Keep the last error for people to see (None clears it); the state stays.

        With an `attempt` that is not the newest nothing is written: the newer one has the word.
        """
        shown = without_secrets(text)[:4000] if text else None

        def work(connection: psycopg.Connection[Any]) -> None:
            connection.execute(
                """
                UPDATE topology.migration SET last_error = %(text)s, updated_at = now()
                WHERE id = %(migration)s AND last_error IS DISTINCT FROM %(text)s
                  AND attempt = COALESCE(%(attempt)s, attempt)
                """,
                {"text": shown, "migration": migration_id, "attempt": attempt},
            )

        self._database.run(work)

    def set_paused(
        self, migration_id: int, paused: bool, actor: Actor, reason: str | None = None
    ) -> Migration:
        """Pause a migration, or resume it. Running steps stop at their next batch. Repeatable.

        A cutover past the beginning of its barrier ends first: it is nearly over, and writers wait.
        """
        shown = without_secrets(reason) if reason else None

        def work(connection: psycopg.Connection[Any]) -> Migration:
            current = load_migration(connection, migration_id, locked=True)
            if current.paused == paused:
                return current
            connection.execute(
                """
                UPDATE topology.migration
                SET paused = %(paused)s, paused_reason = %(reason)s, paused_by = %(by)s,
                    paused_at = CASE WHEN %(paused)s THEN clock_timestamp() END,
                    updated_at = now()
                WHERE id = %(migration)s
                """,
                {
                    "paused": paused,
                    "reason": shown if paused else None,
                    "by": actor.name if paused else None,
                    "migration": migration_id,
                },
            )
            _note(connection, "paused" if paused else "resumed", current, actor, shown)
            return load_migration(connection, migration_id)

        return self._database.run(work)

    def give_up_capture(self, migration_id: int, reason: str, actor: Actor) -> Migration | None:
        """Record that a stopped migration's key log is given up, before anything is closed.

        One transaction: every older attempt is lost, the fact `capture_lost` is there, and a
        `ready` migration is `syncing` again, because its verification does not hold any more. A
        cutover that has begun is not disturbed: then, and for a migration that is neither paused
        nor halted, nothing happens and the answer is None. Repeatable.

        Returns:
            The migration, whose `attempt` is the one that may close the capture.

        Raises:
            InvalidInput: no such migration.
        """
        shown = without_secrets(reason)

        def work(connection: psycopg.Connection[Any]) -> Migration | None:
            current = load_migration(connection, migration_id, locked=True)
            stopped = current.paused or halts_on(connection, migration_id)
            if current.state not in CAPTURING or not stopped:
                return None
            row = connection.execute("SELECT clock_timestamp()").fetchone()
            fact = current.facts.get("capture_lost") or {
                "reason": shown,
                "at": row[0] if row else None,
            }
            lose_capture(connection, current, "key log given up", "give up log", actor, fact, shown)
            return load_migration(connection, migration_id)

        return self._database.run(work)

    def audit(self, migration_id: int) -> list[AuditEntry]:
        """Return the audit of a migration, oldest first."""
        return self._database.run(lambda connection: audit.read(connection, migration=migration_id))

    def organization_audit(self, organization_id: str) -> list[AuditEntry]:
        """Return the audit of an organization over all its migrations, oldest first."""
        return self._database.run(
            lambda connection: audit.read(connection, organization=organization_id)
        )

    def _settled(
        self,
        migration_id: int,
        work: Callable[[psycopg.Connection[Any], uuid.UUID], Migration],
    ) -> Migration:
        """Run `work`; when its commit's outcome is unknown ask for it, and run again if it failed.

        The question locks the migration's row, so a commit still in flight is waited for.
        """
        request = uuid.uuid4()

        def attempt(connection: psycopg.Connection[Any]) -> Migration:
            current = load_migration(connection, migration_id, locked=True)
            if audit.was_committed(connection, request):
                return current
            return work(connection, request)

        unknown: OutcomeUnknown | None = None
        while True:
            try:
                return self._database.run(attempt, repeatable=False)
            except OutcomeUnknown as error:
                if unknown is not None:
                    raise
                unknown = error
            except Unreachable as error:
                raise unknown or error from None


def _change_authority(
    connection: psycopg.Connection[Any],
    current: Migration,
    states: tuple[State, State],
    routes: tuple[Route, Route],
    actor: Actor,
    ttl_seconds: float,
    facts: Mapping[str, Any] | None,
    reason: str | None = None,
) -> None:
    """Change route, state, retention and audit together; the caller's transaction commits it."""
    if ttl_seconds < 0:
        raise InvalidInput(f"the TTL is {ttl_seconds} seconds; it cannot be negative")
    (before, after), (left, entered) = states, routes
    if current.state is not before:
        raise WrongState(
            f"the migration is {current.state}; only one that is {before} can flip",
            organization=current.organization.slug,
        )
    with connection.pipeline():  # writers wait: one round trip, not three
        changed = connection.execute(
            """
            UPDATE topology.route SET cell = %s, epoch = epoch + 1, migration = %s, actor = %s,
                                      changed_at = clock_timestamp()
            WHERE organization = %s AND cell = %s AND epoch = %s
            """,
            [entered.cell, current.id, actor.name, left.organization, left.cell, left.epoch],
        )
        audit.write(
            connection,
            "flip",
            actor,
            migration=current.id,
            organization=current.organization.id,
            from_state=before,
            to_state=after,
            epoch=entered.epoch,
            attempt=current.attempt,
            reason=reason,
            evidence=facts,
        )
        connection.execute(
            """
            UPDATE topology.migration
            SET state = %s, facts = facts || %s, heartbeat_at = now(),
                ttl_until = clock_timestamp() + make_interval(secs => %s), updated_at = now()
            WHERE id = %s
            """,
            [after, document(facts), ttl_seconds, current.id],
        )
    if changed.rowcount != 1:
        raise WrongState(
            f"the route is no longer {left.cell} at epoch {left.epoch}",
            organization=current.organization.slug,
            hint="somebody else changed it; look at `cellferry status`, then abort this migration",
        )


def note_lease(
    connection: psycopg.Connection[Any],
    actor: Actor,
    migration_id: int,
    holder: str,
    attempt: int,
    organization: str,
) -> int:
    """Write into the audit who took a lease; return the attempt."""
    audit.write(
        connection,
        "lease",
        actor,
        migration=migration_id,
        organization=organization,
        attempt=attempt,
        evidence={"holder": holder},
    )
    return int(attempt)


def lose_capture(
    connection: psycopg.Connection[Any],
    current: Migration,
    action: str,
    holder: str,
    actor: Actor,
    fact: Mapping[str, Any],
    reason: str,
    evidence: Mapping[str, Any] | None = None,
) -> None:
    """Record that capture is of no use any more; the caller's transaction commits it.

    Every older attempt is lost, the fact `capture_lost` is `fact`, and a `ready` migration is
    `syncing` again, because its verification does not hold any more.
    """
    is_ready = current.state is State.READY
    audit.write(
        connection,
        action,
        actor,
        migration=current.id,
        organization=current.organization.id,
        from_state=State.READY if is_ready else None,
        to_state=State.SYNCING if is_ready else None,
        epoch=current.epoch,
        attempt=current.attempt + 1,
        reason=reason,
        evidence=evidence,
    )
    connection.execute(
        """
        UPDATE topology.migration
        SET state = %s, facts = facts || %s, attempt = attempt + 1, holder = %s,
            taken_at = now(), heartbeat_at = now(), updated_at = now()
        WHERE id = %s
        """,
        [
            State.SYNCING if is_ready else current.state,
            document({"capture_lost": fact}),
            holder,
            current.id,
        ],
    )


def _insist_on_running(connection: psycopg.Connection[Any], migration_id: int) -> None:
    """Raise when the migration is paused, or it, its cohort or one of its cells is halted."""
    row = connection.execute(
        """
        SELECT paused, paused_reason, paused_by, organization
        FROM topology.migration WHERE id = %s
        """,
        [migration_id],
    ).fetchone()
    if row is None:
        raise _no_migration(migration_id)
    paused, why_paused, paused_by, org = row
    for halt in halts_on(connection, migration_id):
        raise halt.error(org)
    if paused:
        raise Paused(
            f"the migration is paused{_by(paused_by)}" + (f": {why_paused}" if why_paused else ""),
            organization=org,
            hint=f"cellferry resume {org} --reason …, then run the step again",
        )


def checked_state(state: State | str) -> State:
    """Return the state of this name.

    Raises:
        InvalidInput: there is none.
    """
    try:
        return State(state)
    except ValueError:
        raise InvalidInput(
            f"there is no state {state!r}", hint=f"choose one of {', '.join(State)}"
        ) from None


def check_may_clean(connection: psycopg.Connection[Any], migration: Migration) -> None:
    """See `Migrations.may_clean`; inside the caller's transaction."""
    row = connection.execute("SELECT topology.why_not_clean(%s)", [migration.id]).fetchone()
    if row is not None and row[0] is not None:
        rolled_back = migration.state is State.ROLLED_BACK
        cell = migration.destination if rolled_back else migration.source
        raise WrongState(
            f"the copy in {cell} must not be deleted: {row[0]}",
            organization=migration.organization.slug,
            hint=f"see `cellferry status {migration.organization.slug}` for what comes first",
        )


def _check_may_roll_back(connection: psycopg.Connection[Any], migration: Migration) -> None:
    row = connection.execute("SELECT topology.why_not_roll_back(%s)", [migration.id]).fetchone()
    if row is not None and row[0] is not None:
        raise WrongState(
            f"migration {migration.id} cannot be rolled back: {row[0]}",
            organization=migration.organization.slug,
            hint="move the organization as any other, or abort what has taken over",
        )


def _create(
    connection: psycopg.Connection[Any],
    organization_id: str,
    destination: str,
    strategy: Strategy,
    options: Mapping[str, Any] | None,
    plan: Mapping[str, Any] | None,
    actor: Actor,
    request: uuid.UUID,
    cohort: str | None,
) -> int:
    org = find_organization(connection, organization_id)
    check_cell_known(connection, destination)
    # The route is locked: two migrations cannot start from the same authority.
    route = connection.execute(
        "SELECT cell, epoch FROM topology.route WHERE organization = %s FOR UPDATE", [org.id]
    ).fetchone()
    if route is None:
        raise InvalidInput("the organization has no route", organization=org.slug)
    source, epoch = route
    live = connection.execute(
        _COLUMNS + "WHERE m.organization = %s AND m.state = ANY (%s)",
        [org.id, sorted(LIVE_STATES)],
    ).fetchone()
    if live is not None:
        raise _already_moving(org, live[0], live[3], live[4], live[5])
    if source == destination:
        raise InvalidInput(
            f"source and destination are the same: it lives in {source} already",
            organization=org.slug,
        )
    cordoned = connection.execute(
        "SELECT cordoned FROM topology.cell WHERE name = %s", [destination]
    ).fetchone()
    if cordoned is not None and cordoned[0] is not None:
        raise WrongState(
            f"cell {destination} is cordoned: {cordoned[0]}",
            organization=org.slug,
            hint="choose another destination",
        )
    join_cohort(connection, cohort)
    check_may_start(connection, (source, destination), cohort)
    facts = {"plan": plan} if plan else None
    try:
        row = connection.execute(
            """
            INSERT INTO topology.migration
                (organization, source, destination, epoch, strategy, options, facts, cohort)
            VALUES (%s, %s, %s, %s, %s, %s, %s, %s) RETURNING id
            """,
            [
                *(org.id, source, destination, epoch, strategy),
                *(document(options), document(facts), cohort),
            ],
        ).fetchone()
    except errors.UniqueViolation as error:
        raise WrongState("the organization is already moving", organization=org.slug) from error
    if row is None:
        raise WrongState("the migration was not recorded", organization=org.slug)
    migration_id = int(row[0])
    audit.write(
        connection,
        "created",
        actor,
        migration=migration_id,
        organization=org.id,
        to_state=State.PLANNED,
        epoch=epoch,
        evidence={
            "source": source,
            "destination": destination,
            "strategy": strategy,
            **({"cohort": cohort} if cohort else {}),
        },
        request=request,
    )
    retained = connection.execute(
        """
        UPDATE topology.migration SET superseded_by = %s, updated_at = now()
        WHERE organization = %s AND state IN ('retained', 'cleaning') AND id <> %s
        RETURNING id, state, source
        """,
        [migration_id, org.id, migration_id],
    ).fetchall()
    for earlier, state, left in retained:
        if (state, left) == (State.CLEANING, destination):
            raise WrongState(
                f"the clean-up of migration {earlier} in {destination} has begun and not ended",
                organization=org.slug,
                hint="end it first: the DAG clean_up_organizations with migrations"
                f" [{earlier}]; then plan again",
            )
        audit.write(
            connection,
            "superseded",
            actor,
            migration=earlier,
            organization=org.id,
            epoch=epoch,
            reason=f"migration {migration_id} to {destination} takes over its retention",
        )
    return migration_id


def load_migration(
    connection: psycopg.Connection[Any], migration_id: int, locked: bool = False
) -> Migration:
    """Return a migration as the caller's transaction sees it; `locked` to its end if asked.

    Raises:
        InvalidInput: there is none with this id.
    """
    with connection.cursor(row_factory=dict_row) as cursor:
        cursor.execute(_BY_ID_LOCKED if locked else _BY_ID, [migration_id])
        row = cursor.fetchone()
    if row is None:
        raise _no_migration(migration_id)
    return _migration(row)


def _locked(connection: psycopg.Connection[Any], migration_id: int, attempt: int) -> Migration:
    """Load the migration, locked to the end of the transaction, and check the lease."""
    current = load_migration(connection, migration_id, locked=True)
    if current.attempt != attempt:
        raise _lease_lost(migration_id, attempt, current.attempt, None, current.organization.slug)
    return current


def _merge_facts(
    connection: psycopg.Connection[Any], current: Migration, facts: Mapping[str, Any] | None
) -> Migration:
    if not facts:
        return current
    connection.execute(
        """
        UPDATE topology.migration SET facts = facts || %s, updated_at = now() WHERE id = %s
        """,
        [document(facts), current.id],
    )
    return load_migration(connection, current.id)


def _note(
    connection: psycopg.Connection[Any],
    action: str,
    migration: Migration,
    actor: Actor,
    reason: str | None,
) -> None:
    audit.write(
        connection,
        action,
        actor,
        migration=migration.id,
        organization=migration.organization.id,
        epoch=migration.epoch,
        attempt=migration.attempt,
        reason=reason,
    )


def _migration(row: Mapping[str, Any]) -> Migration:
    values = dict(row)
    values["organization"] = Organization(values["organization"], values.pop("slug"))
    values["state"] = State(values["state"])
    values["strategy"] = Strategy(values["strategy"])
    return Migration(**values)


def _no_migration(migration_id: int) -> InvalidInput:
    return InvalidInput(f"there is no migration {migration_id}")


def _already_moving(
    org: Organization, migration_id: int, source: str, destination: str, state: str
) -> WrongState:
    return WrongState(
        f"the organization is already moving: migration {migration_id} "
        f"({source} -> {destination}) is {state}",
        organization=org.slug,
        hint="wait for it, or abort it",
    )


def _lease_lost(
    migration_id: int, attempt: int, newest: int, holder: str | None, organization: str
) -> LeaseLost:
    return LeaseLost(
        f"attempt {attempt} of migration {migration_id} was superseded by attempt {newest}"
        + (f" ({holder})" if holder else ""),
        organization=organization,
        hint="nothing to do: the newer attempt goes on",
    )


def _by(name: str | None) -> str:
    return f" by {name}" if name else ""
