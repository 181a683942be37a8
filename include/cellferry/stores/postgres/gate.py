"""The gate of one organization in one cell: arming, freezing, handing over, and who may do it.

The gate is a row of `cellferry.gate`; without a row the organization's writers pass unhindered. The
triggers that obey it are in `triggers` and `gate.sql`. Every change is a compare-and-set on
migration, attempt, epoch and state, so that a controller that was presumed dead changes nothing.

What makes it correct:

*Arming* is complete when every transaction older than the gate's row has ended: one that did not
see the row neither takes the lock nor logs a key. `arm` and `import_gate` wait for them.

*Freezing* takes the exclusive side of the lock whose shared side every writer of an armed
organization holds to the end of its transaction; then writes `frozen`, and goes on holding the
lock, so that writers wait instead of failing. The lock dies with its session, `frozen` stays.

*Waiting for the disk* happens beside other work as long as writers wait. A crash before
`keep_frozen` may leave the gate open, and writers may have written: `keep_frozen` then refuses, and
nothing flips. A crash after the flip and before the hand-over is kept leaves the source `frozen`
and the destination `importing` (`moved` on the way back): both refuse. A write that was
acknowledged comes later in the log than the change of the gate that let it in, and never survives
without it.

The functions expect a connection in autocommit mode and commit what they do, unless a transaction
is open: then they take part in it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg
from psycopg.pq import TransactionStatus

from cellferry.errors import (
    AuthorityViolation,
    CellferryError,
    DrainTimeout,
    LeaseLost,
    TransientError,
    WrongState,
)
from cellferry.model import GateState, Move, Progress, Side
from cellferry.stores.postgres import sessions

Connection = psycopg.Connection[Any]

TAKEOVER_DEADLINE_S = 10.0
"""How long an older attempt's transaction may go on after its session was told to end."""

LONGEST_DRAIN_ATTEMPT_S = 1.0
"""Attempts get longer, so that writers that need longer than one attempt drain, too."""

POLL_S = 0.02

LOOSE_LOCK = 1128614988 << 32
"""What `cellferry.enter_loosely` takes the shared side of; no gate has this number."""

LONGEST_STANDSTILL_S = 5
"""How long a controller may stand still between the locks and the freeze."""

STANDSTILL_S = 20
"""How long a controller may stand still while it makes a gate."""


@dataclass(frozen=True, slots=True)
class Gate:
    """A row of `cellferry.gate`."""

    organization: str
    state: GateState
    armed: bool
    settled: bool
    migration: int
    attempt: int
    epoch: int
    moved_to: str | None
    lock_key: int


def state(connection: Connection, organization: str) -> Gate | None:
    """Return the gate of `organization` in this cell; None means open and not armed."""
    row = connection.execute(
        "SELECT organization, state, armed, settled, migration, attempt, epoch, moved_to, lock_key"
        " FROM cellferry.gate WHERE organization = %s",
        (organization,),
    ).fetchone()
    if row is None:
        return None
    name, text, *rest = row
    return Gate(name, GateState(text), *rest)


# ── the lease ───────────────────────────────────────────────────────────────────────────────────


def take_lease(connection: Connection, move: Move) -> None:
    """Make `move.attempt` the only attempt that may write in this cell (hazard 1). Repeatable.

    Ends the sessions of older attempts, and returns when none of their transactions is left.

    Raises:
        LeaseLost: a newer attempt has the lease.
        TransientError: an older attempt's transaction did not end in time.
    """
    deadline = time.monotonic() + TAKEOVER_DEADLINE_S
    while True:
        is_late = time.monotonic() > deadline  # what is found after a standstill counts, not before
        ended = _end_older_sessions(connection, move)
        try:
            with connection.transaction():
                sessions.set_locally(connection, "lock_timeout", "200ms")
                _insist_on_attempt(_upsert_lease(connection, move), move)
                # An older attempt's compare-and-set of the gate must fail, too.
                connection.execute(
                    "UPDATE cellferry.gate SET attempt = %(attempt)s"
                    " WHERE organization = %(organization)s AND migration = %(migration)s"
                    " AND attempt < %(attempt)s",
                    _facts(move),
                )
        except psycopg.errors.LockNotAvailable as error:
            if is_late:
                raise TransientError(
                    f"an older attempt at migration {move.migration} is still writing"
                    f" (sessions {', '.join(map(str, ended)) or 'of another role'})",
                    hint="end that session on the server, then retry",
                    organization=move.organization.slug,
                ) from error
        else:
            if not ended:
                return
        if is_late:
            raise TransientError(
                f"sessions {', '.join(map(str, ended))} of an older attempt do not end",
                hint="end them on the server, then retry",
                organization=move.organization.slug,
            )
        time.sleep(POLL_S)


def _upsert_lease(connection: Connection, move: Move) -> int | None:
    row = connection.execute(
        "INSERT INTO cellferry.lease AS lease (migration, organization, attempt)"
        " VALUES (%(migration)s, %(organization)s, %(attempt)s)"
        " ON CONFLICT (migration) DO UPDATE"
        " SET attempt = EXCLUDED.attempt, taken_at = now()"
        " WHERE lease.attempt <= EXCLUDED.attempt RETURNING attempt",
        _facts(move),
    ).fetchone()
    return None if row is None else int(row[0])


def _insist_on_attempt(attempt: int | None, move: Move) -> None:
    if attempt != move.attempt:
        raise _lease_lost(move)


def _lease_lost(move: Move) -> LeaseLost:
    return LeaseLost(
        f"another attempt at migration {move.migration} took over from attempt {move.attempt}",
        hint="nothing; the newer attempt goes on",
        organization=move.organization.slug,
    )


def _end_older_sessions(connection: Connection, move: Move) -> list[int]:
    """Ask older attempts' sessions to end; return those that are there.

    A session's name says whose attempt it is; a role may end its own sessions.
    """
    rows = connection.execute(
        r"""
        SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE usename = current_user AND pid <> pg_backend_pid() AND datname = current_database()
            AND substring(application_name FROM %(pattern)s)::int < %(attempt)s
        """,
        {"pattern": rf"^cellferry:{move.migration}:(\d{{1,9}}):", "attempt": move.attempt},
    ).fetchall()
    return [int(row[0]) for row in rows]


def hold_lease(connection: Connection, move: Move) -> None:
    """Hold this attempt's lease to the end of the current transaction.

    A takeover waits for, or ends, the transaction.

    Raises:
        LeaseLost: a newer attempt has it.
        WrongState: no transaction is open.
    """
    if connection.autocommit and connection.info.transaction_status is TransactionStatus.IDLE:
        raise WrongState("a lease is held by a transaction, and none is open")
    insist_on_lease(ask_for_lease(connection, move), move)


def ask_for_lease(connection: Connection, move: Move) -> psycopg.Cursor[Any]:
    """Lock the lease as `hold_lease`, in a transaction that the caller has begun.

    Apart from `insist_on_lease`, which looks at the answer, so that BEGIN and this go in one
    message (a pipeline).
    """
    return connection.execute(
        "SELECT FROM cellferry.lease WHERE migration = %s AND attempt = %s FOR SHARE",
        (move.migration, move.attempt),
        prepare=True,
    )


def insist_on_lease(answer: psycopg.Cursor[Any], move: Move) -> None:
    """See that the answer to `ask_for_lease` is yes.

    Raises:
        LeaseLost: a newer attempt has it.
    """
    if answer.rowcount != 1:
        raise _lease_lost(move)


def insist_on_newest(connection: Connection, move: Move) -> None:
    """Return unless a newer attempt has the lease. Where nobody has it, nobody took over.

    Raises:
        LeaseLost: one has.
    """
    row = connection.execute(
        "SELECT attempt FROM cellferry.lease WHERE migration = %s", (move.migration,)
    ).fetchone()
    if row is not None and row[0] > move.attempt:
        raise _lease_lost(move)


def drop_lease(connection: Connection, move: Move) -> None:
    """Remove the lease of a migration that has ended in this cell. Repeatable."""
    connection.execute(
        "DELETE FROM cellferry.lease WHERE migration = %s AND attempt <= %s",
        (move.migration, move.attempt),
    )


# ── capture ─────────────────────────────────────────────────────────────────────────────────────


def arm(connection: Connection, move: Move, progress: Progress | None = None) -> None:
    """Start logging the organization's keys at the source; complete when it returns. Repeatable.

    Raises:
        DrainTimeout: transactions older than the arming did not end within
            `limits.arm_deadline_s`; names them. The gate stays armed: repeat to go on waiting.
        LeaseLost: a newer attempt has the lease.
        AuthorityViolation: the cell's gate says that another cell has authority.
        WrongState: the gate is not open.
    """
    with fenced(connection, move):
        changed = connection.execute(
            """
            INSERT INTO cellferry.gate AS gate
                (organization, state, armed, migration, attempt, epoch)
            VALUES (%(organization)s, 'open', true, %(migration)s, %(attempt)s, %(epoch)s)
            ON CONFLICT (organization) DO UPDATE SET
                armed = true, settled = gate.settled AND gate.armed, changed_at = now(),
                migration = EXCLUDED.migration, attempt = EXCLUDED.attempt
            -- a retained move that ended here leaves its gate to the next one
            WHERE gate.state = 'open' AND gate.epoch = EXCLUDED.epoch
                AND gate.migration <= EXCLUDED.migration
            """,
            _facts(move),
        ).rowcount
        if changed != 1:
            raise _refusal(connection, move, Side.SOURCE, "armed")
    _settle(connection, move, Side.SOURCE, progress)


def import_gate(connection: Connection, move: Move, progress: Progress | None = None) -> None:
    """Gate the destination: nobody but the mover writes this organization there. Repeatable.

    Raises:
        DrainTimeout: older transactions did not end; one might write past the gate, or later
            past the reverse capture.
        LeaseLost: a newer attempt has the lease.
        WrongState: another migration's gate is there.
    """
    with fenced(connection, move):
        changed = connection.execute(
            """
            INSERT INTO cellferry.gate AS gate
                (organization, state, armed, migration, attempt, epoch)
            VALUES (%(organization)s, 'importing', false, %(migration)s, %(attempt)s, %(epoch)s)
            ON CONFLICT (organization) DO UPDATE SET attempt = EXCLUDED.attempt
            WHERE gate.state = 'importing' AND gate.migration = EXCLUDED.migration
                AND gate.epoch = EXCLUDED.epoch
            """,
            _facts(move),
        ).rowcount
        if changed != 1:
            raise _refusal(connection, move, Side.DESTINATION, "importing")
    _settle(connection, move, Side.DESTINATION, progress)


def arm_reverse(connection: Connection, move: Move) -> None:
    """Make the destination log keys from its first write on. Part of the last delta's commit.

    A return arms nothing: it ends its migration, and the next one arms for itself.
    """
    if move.returning:
        hold_retained(connection, move)
        return
    _change(
        connection,
        move,
        Side.DESTINATION,
        "armed for the way back",
        "UPDATE cellferry.gate SET armed = true WHERE organization = %(organization)s"
        " AND migration = %(migration)s AND attempt = %(attempt)s AND epoch = %(epoch)s"
        " AND state = 'importing'",
    )


def hold_capture(connection: Connection, move: Move) -> None:
    """See that keys are logged for this migration; inside a transaction it stays so.

    A retained migration leaves gate and log to the next one, which must find every key in it.

    Raises:
        WrongState: they are logged for another migration, or not at all.
    """
    held = connection.execute(
        "SELECT FROM cellferry.gate WHERE organization = %s AND migration = %s AND armed FOR SHARE",
        (move.organization.id, move.migration),
        prepare=True,
    )
    if held.rowcount != 1:
        raise WrongState(
            f"no keys are logged for migration {move.migration} any more",
            hint="a newer migration of this organization took its gate over; rounds of this one"
            " have ended",
            organization=move.organization.slug,
        )


def hold_retained(connection: Connection, move: Move) -> None:
    """Hold the gate of the old cell, to which a return goes: `moved` by this very migration.

    Raises:
        WrongState: it is not; the copy behind it is not this migration's to write.
    """
    held = connection.execute(
        "SELECT FROM cellferry.gate WHERE organization = %(organization)s"
        " AND migration = %(migration)s AND state = 'moved' AND epoch = %(epoch)s FOR SHARE",
        _facts(move),
        prepare=True,
    )
    if held.rowcount != 1:
        raise WrongState(
            f"the gate at {move.destination.name} is not moved by migration {move.migration} any"
            " more",
            hint="the organization came back or was taken over; reverse rounds have ended",
            organization=move.organization.slug,
            where=f"{move.destination.name}/postgres",
        )


def hand_over_source(connection: Connection, move: Move, *, durable: bool = True) -> None:
    """After the flip: the source says `moved`, with the new epoch and cell. Repeatable.

    Args:
        durable: whether to wait for the disk; a repetition that does makes it durable.
    """
    _change(
        connection,
        move,
        Side.SOURCE,
        "handed over",
        "UPDATE cellferry.gate SET state = 'moved', armed = false, epoch = %(epoch)s + 1,"
        " moved_to = %(moved_to)s, changed_at = now() WHERE organization = %(organization)s"
        " AND migration = %(migration)s AND attempt = %(attempt)s"
        " AND (state = 'frozen' AND epoch = %(epoch)s"
        " OR state = 'moved' AND epoch = %(epoch)s + 1)",
        durable=durable,
    )


def hand_over_destination(connection: Connection, move: Move, *, durable: bool = True) -> None:
    """After the flip: the destination is open, with the new epoch. Repeatable.

    Args:
        durable: as of `hand_over_source`.
    """
    _change(
        connection,
        move,
        Side.DESTINATION,
        "opened",
        _OPEN_RETAINED if move.returning else _OPEN_IMPORTED,
        durable=durable,
    )


_OPEN_IMPORTED: LiteralString = (
    "UPDATE cellferry.gate SET state = 'open', epoch = %(epoch)s + 1, changed_at = now()"
    " WHERE organization = %(organization)s"
    " AND migration = %(migration)s AND attempt = %(attempt)s AND armed"
    " AND (state = 'importing' AND epoch = %(epoch)s"
    " OR state = 'open' AND epoch = %(epoch)s + 1)"
)
_OPEN_RETAINED: LiteralString = (
    "UPDATE cellferry.gate SET state = 'open', epoch = %(epoch)s + 1, moved_to = NULL,"
    " changed_at = now() WHERE organization = %(organization)s"
    " AND migration = %(migration)s AND attempt = %(attempt)s"
    " AND (state = 'moved' AND epoch = %(epoch)s"
    " OR state = 'open' AND epoch = %(epoch)s + 1)"
)


#: An open gate is written as well: a freeze whose session was lost may still be committing.
_THAW: LiteralString = """
UPDATE cellferry.gate SET state = 'open', changed_at = now()
WHERE organization = %(organization)s AND migration = %(migration)s
  AND attempt = %(attempt)s AND epoch = %(epoch)s AND state IN ('open', 'frozen')
"""
_THAW_AND_UNLOCK: LiteralString = "BEGIN;" + _THAW + "; COMMIT; SELECT pg_advisory_unlock_all()"


def thaw(connection: Connection, move: Move) -> None:
    """Before the flip: open the source again. Harmless where this migration froze nothing.

    Raises:
        LeaseLost: a newer attempt has the lease.
        WrongState: this migration handed over already.
    """
    if connection.execute(_THAW, _facts(move)).rowcount != 1:
        _insist_on_open(connection, move)


def _insist_on_open(connection: Connection, move: Move) -> None:
    found = state(connection, move.organization.id)
    if found is None or found.migration != move.migration or found.state is GateState.OPEN:
        return
    raise _refusal(connection, move, Side.SOURCE, "thawed")


def disarm(connection: Connection, move: Move) -> None:
    """End capture where the gate is open: the gate goes, and its log. Repeatable."""
    _remove(connection, move, ("open",))


def remove(connection: Connection, move: Move) -> None:
    """Remove this migration's gate and its key log from a cell. Repeatable.

    Raises:
        WrongState: the gate is frozen; thaw it or hand over first.
    """
    _remove(connection, move, ("open", "moved", "importing"))


def _remove(connection: Connection, move: Move, states: tuple[str, ...]) -> None:
    facts = {**_facts(move), "states": list(states)}
    gone = connection.execute(
        "DELETE FROM cellferry.gate WHERE organization = %(organization)s"
        " AND migration = %(migration)s AND attempt <= %(attempt)s AND state = ANY(%(states)s)"
        " RETURNING lock_key",
        facts,
    ).fetchone()
    found = state(connection, move.organization.id)
    if found is not None:
        if found.migration == move.migration:
            raise _refusal(connection, move, Side.SOURCE, "removed")
        return  # the next migration's; the log is its, too
    if gone is not None:
        await_last_writers(connection, int(gone[0]))
    connection.execute(
        "DELETE FROM cellferry.key_log AS log WHERE organization = %(organization)s"
        " AND NOT EXISTS"
        " (SELECT FROM cellferry.gate WHERE gate.organization = log.organization)",
        facts,
    )


def await_last_writers(connection: Connection, lock_key: int) -> None:
    """Writers that passed the gate may still add to its log; give them a moment."""
    try:
        with connection.transaction():
            sessions.set_locally(connection, "lock_timeout", "500ms")
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (lock_key,))
    except psycopg.errors.LockNotAvailable:
        return  # what they leave behind is the reaper's


def _change(
    connection: Connection,
    move: Move,
    side: Side,
    what: str,
    statement: LiteralString,
    *,
    durable: bool = True,
) -> None:
    send = _send if durable else _send_unawaited
    _insist_on_change(send(connection, move, statement), connection, move, side, what)


def _send_unawaited(connection: Connection, move: Move, statement: LiteralString) -> int:
    """As `_send`, without waiting for disk or standby.

    One message, so one transaction; in one that is open already, all of it would not wait.
    """
    with psycopg.ClientCursor(connection) as cursor:
        cursor.execute(_NOT_AWAITED + statement, _facts(move))
        return _updated(cursor)


_NOT_AWAITED: LiteralString = "SELECT set_config('synchronous_commit', 'off', true);"


def _send(connection: Connection, move: Move, statement: LiteralString) -> int:
    return connection.execute(statement, _facts(move), prepare=True).rowcount


def _insist_on_change(
    changed: int, connection: Connection, move: Move, side: Side, what: str
) -> None:
    if changed != 1:
        raise _refusal(connection, move, side, what)


@contextmanager
def fenced(connection: Connection, move: Move) -> Iterator[None]:
    """Make or change a gate in a transaction that holds the lease, and does not hang.

    Making a gate's mark is for one at a time in each cell: the server ends a transaction whose
    controller stands still, so that other organizations' moves go on.

    Raises:
        LeaseLost: a newer attempt has it.
    """
    with connection.transaction():
        sessions.set_locally(connection, "idle_in_transaction_session_timeout", f"{STANDSTILL_S}s")
        hold_lease(connection, move)
        yield


def _facts(move: Move) -> dict[str, Any]:
    return {
        "organization": move.organization.id,
        "migration": move.migration,
        "attempt": move.attempt,
        "epoch": move.epoch,
        "moved_to": move.destination.name,
    }


def _refusal(connection: Connection, move: Move, side: Side, what: str) -> CellferryError:
    """Say why a compare-and-set of the gate met no row."""
    found = state(connection, move.organization.id)
    where = f"{move.cell(side).name}/postgres"
    context: dict[str, Any] = {"organization": move.organization.slug, "where": where}
    if found is None:
        return WrongState(
            f"the gate cannot be {what}: there is none",
            hint="run the copy step again, which makes it",
            **context,
        )
    if found.migration == move.migration and found.attempt > move.attempt:
        return _lease_lost(move)
    text = (
        f"the gate cannot be {what} by migration {move.migration} at epoch {move.epoch}: it is"
        f" {found.state} by migration {found.migration} at epoch {found.epoch}"
    )
    if found.moved_to:
        text += f", moved to {found.moved_to}"
    if side is Side.SOURCE and (
        found.state in {GateState.MOVED, GateState.IMPORTING} and found.migration != move.migration
    ):
        return AuthorityViolation(
            text,
            hint="this cell has no authority for the organization; compare its route in the"
            " topology with the gate",
            **context,
        )
    return WrongState(
        text,
        hint=f"let migration {found.migration} end first: clean it up or abort it"
        if found.migration != move.migration
        else "see `cellferry status`; the step does not fit the gate's state",
        **context,
    )


# ── waiting for transactions that may not know the gate ─────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class OpenTransaction:
    """A transaction that somebody waits for. Ages are seconds; None where they are not told."""

    id: str
    pid: int | None
    application: str
    role: str
    age_s: float | None
    statement_age_s: float | None

    def __str__(self) -> str:
        if self.pid is None:
            return f"prepared transaction {self.id!r} of {self.role}, open for {_age(self.age_s)}"
        return (
            f"pid {self.pid} ({self.application or 'no application name'}, role {self.role}),"
            f" open for {_age(self.age_s)}, last statement {_age(self.statement_age_s)} ago"
        )


def _age(seconds: float | None) -> str:
    return "an unknown time" if seconds is None else f"{seconds:.1f} s"


def _seconds(interval: Any) -> float | None:
    return None if interval is None else float(interval.total_seconds())


def _settle(connection: Connection, move: Move, side: Side, progress: Progress | None) -> None:
    """Wait until no transaction is left that may have missed the gate's row."""
    found = state(connection, move.organization.id)
    if found is not None and found.settled:
        return
    wait_for_older_transactions(
        connection,
        deadline_s=move.limits.arm_deadline_s,
        progress=progress,
        where=f"{move.cell(side).name}/postgres",
        organization=move.organization.slug,
    )
    changed = connection.execute(
        "UPDATE cellferry.gate SET settled = true WHERE organization = %(organization)s"
        " AND migration = %(migration)s AND attempt = %(attempt)s",
        _facts(move),
    ).rowcount
    if changed != 1:
        raise _refusal(connection, move, side, "settled")


def wait_for_older_transactions(
    connection: Connection,
    *,
    deadline_s: float,
    progress: Progress | None = None,
    where: str | None = None,
    organization: str | None = None,
) -> None:
    """Return when every transaction of this database that is open now has ended, or is harmless.

    Harmless is one that has written nothing and holds no snapshot: it will see all that is
    committed by now. One that is past its commit record and waits for a standby still counts, and
    so does a prepared one.

    Raises:
        DrainTimeout: some did not end within `deadline_s`; names them.
    """
    deadline = time.monotonic() + deadline_s
    pending = _suspects(connection)
    pause = POLL_S / 4
    while pending:
        _check(pending, deadline, progress, where, organization)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.25)
        now = _suspects(connection)
        # One that was harmless once stays so: its later statements see the gate.
        pending = {key: now[key] for key in pending if key in now}
    # Whoever prepared meanwhile is in this list, because it had not ended before.
    prepared = _prepared(connection)
    while prepared:
        _check(prepared, deadline, progress, where, organization)
        time.sleep(pause)
        now = _prepared(connection)
        prepared = {key: now[key] for key in prepared if key in now}


def _suspects(connection: Connection) -> dict[str, OpenTransaction]:
    return {
        row[0]: OpenTransaction(row[0], row[1], row[2], row[3], _seconds(row[4]), _seconds(row[5]))
        for row in connection.execute(
            "SELECT virtual_id, pid, application, role, age, statement_age"
            " FROM cellferry.open_transactions() WHERE has_written OR has_snapshot"
        )
    }


def _prepared(connection: Connection) -> dict[str, OpenTransaction]:
    return {
        str(row[0]): OpenTransaction(row[1], None, "", row[2], _seconds(row[3]), None)
        for row in connection.execute(
            "SELECT transaction::text, gid, owner, clock_timestamp() - prepared"
            " FROM pg_prepared_xacts WHERE database = current_database()"
        )
    }


def _check(
    pending: dict[str, OpenTransaction],
    deadline: float,
    progress: Progress | None,
    where: str | None,
    organization: str | None,
) -> None:
    if progress is not None:
        progress.check()
    if time.monotonic() > deadline:
        raise DrainTimeout(
            f"{len(pending)} transactions are older than the gate and do not end: "
            + "; ".join(str(one) for one in list(pending.values())[:5]),
            hint="wait until they have ended, or end them; then retry",
            organization=organization,
            where=where,
        )


# ── the barrier ─────────────────────────────────────────────────────────────────────────────────


class Barrier:
    """The controller's session at the source: holds the exclusive side of the gate's lock.

    Connects at once, so that nothing needs to be done under the gate but to lock it.
    """

    def __init__(self, url: str, move: Move) -> None:
        self._url = url
        self._move = move
        self._lock_key: int | None = None
        self._held = False
        self._session: Connection | None = None
        self._where = f"{move.source.name}/postgres"
        self._connect()

    @property
    def session(self) -> Connection:
        """The session, connected anew if it was lost."""
        return self._connect()

    @property
    def lock_held(self) -> bool:
        """Whether the session lives and holds the lock, as far as this side knows."""
        return self._held and self._session is not None and not self._session.closed

    def freeze(self, deadline_s: float) -> None:
        """Drain the organization's writers and write `frozen`; new writers wait.

        Durable after `keep_frozen`. Repeatable. One attempt to get the lock is short: while it
        lasts, new writers queue behind it, and one of them may hold what a writer in flight needs.
        Between attempts they go on.

        Raises:
            DrainTimeout: a writer did not end within `deadline_s`; the gate is as before.
            LeaseLost: a newer attempt has the lease.
            WrongState: the gate is not this migration's open gate.
        """
        deadline = time.monotonic() + deadline_s
        session = self._connect()
        with sessions.translate_errors(self._where):
            if self._lock_key is None or not self._is_settled(session):
                arm(session, self._move)
                found = state(session, self._move.organization.id)
                if found is None:
                    raise _refusal(session, self._move, Side.SOURCE, "frozen")
                self._lock_key = found.lock_key
            try:
                if not self.lock_held:
                    self._lock(session, self._lock_key, deadline)
                # In one message, since writers wait, and some of them for this process.
                with psycopg.ClientCursor(session) as cursor:
                    cursor.execute(_FREEZE_AND_UNLOCK, self._lock_facts())
                    changed = _updated(cursor)
                _insist_on_change(changed, session, self._move, Side.SOURCE, "frozen")
            except BaseException:
                self.release()
                raise

    def keep_frozen(self) -> None:
        """Make `frozen` durable; nothing may flip before.

        Raises:
            WrongState: the gate is not frozen any more: the server came back from before the
                freeze, and writers may have written since.
            LeaseLost: a newer attempt has the lease.
        """
        session = self._connect()
        with sessions.translate_errors(self._where):
            _change(session, self._move, Side.SOURCE, "kept frozen", _KEEP_FROZEN)

    def thaw(self) -> None:
        """Open the source again and let waiting writers go on; see the function `thaw`.

        Both in one message: once it is sent they go on, whatever becomes of this process. A gate
        that is open gives no reason to look for somebody who keeps its lock.
        """
        session = self._connect()
        with sessions.translate_errors(self._where):
            try:
                with psycopg.ClientCursor(session) as cursor:
                    cursor.execute(_THAW_AND_UNLOCK, _facts(self._move))
                    is_open = _updated(cursor) == 1
                if not is_open:
                    _insist_on_open(session, self._move)
            finally:
                self.release()

    def release(self) -> None:
        """Let waiting writers go on, and close the session. Never fails; repeatable."""
        session, self._session, self._held = self._session, None, False
        if session is None:
            return
        try:
            if not session.closed and self._lock_key is not None:
                # The answer to it comes sooner than the end of a session.
                session.execute("SELECT pg_advisory_unlock_all()")
        except psycopg.Error:
            pass  # the lock dies with the session
        finally:
            session.close()

    def _connect(self) -> Connection:
        if self._session is None or self._session.closed:
            self._held = False
            self._session = sessions.connect(
                self._url, purpose="barrier", move=self._move, autocommit=True
            )
            with sessions.translate_errors(self._where):
                found = state(self._session, self._move.organization.id)
            self._lock_key = None if found is None else found.lock_key
        return self._session

    def _is_settled(self, session: Connection) -> bool:
        found = state(session, self._move.organization.id)
        return found is not None and found.settled and found.armed

    def _lock_facts(self) -> dict[str, Any]:
        return {**_facts(self._move), "lock_key": self._lock_key, "loose_lock": LOOSE_LOCK}

    def _lock(self, session: Connection, key: int, deadline: float) -> None:
        """Get the lock by `deadline`, and that of writers whose rows may be the organization's.

        The server ends the session if this process then stands still: loose writers of the whole
        cell wait for it.
        """
        attempt_s = self._move.limits.drain_attempt_s
        while True:
            left = deadline - time.monotonic()
            facts = {
                **self._lock_facts(),
                "attempt_ms": max(1, round(1000 * min(attempt_s, left))),
                "standstill": f"{LONGEST_STANDSTILL_S}s",
            }
            try:
                with psycopg.ClientCursor(session) as cursor:
                    cursor.execute(_LOCK, facts)
            except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
                session.execute("SELECT pg_advisory_unlock_all()")  # it may have got the first
                # Only an attempt that began too late is the last one: this process may have stood
                # still meanwhile, or have taken all the time to connect.
                if left <= 0:
                    raise self._drain_timeout(session, key) from None
                # Writers that queued go on now; not in step with anything, so that no two
                # cutovers and no writer's rhythm keep meeting.
                time.sleep(max(0.0, min(random.uniform(0.5, 1.5) * attempt_s, left)))  # noqa: S311
                attempt_s = min(attempt_s * 1.5, LONGEST_DRAIN_ATTEMPT_S)
            else:
                self._held = True
                return

    def _drain_timeout(self, session: Connection, key: int) -> DrainTimeout:
        holders = [
            OpenTransaction("", row[0], row[1], row[2], _seconds(row[3]), _seconds(row[4]))
            for row in session.execute(
                "SELECT DISTINCT ON (pid) pid, application, role, age, statement_age FROM"
                " (SELECT * FROM cellferry.gate_holders(%s)"
                " UNION ALL SELECT * FROM cellferry.gate_holders(%s)) AS holder",
                (key, LOOSE_LOCK),
            )
        ]
        named = "; ".join(map(str, holders[:5])) or "they ended just now"
        return DrainTimeout(
            f"writers in flight did not end: {named}",
            hint=f"{self._move.source.name} serves on; end these transactions or wait, then try"
            " again",
            organization=self._move.organization.slug,
            where=self._where,
        )


_FREEZE: LiteralString = (
    "UPDATE cellferry.gate SET state = 'frozen', changed_at = now()"
    " WHERE organization = %(organization)s AND migration = %(migration)s"
    " AND attempt = %(attempt)s AND epoch = %(epoch)s AND armed AND settled"
    " AND state IN ('open', 'frozen')"
)

#: A server that was taken back to before the freeze has another state. Repeated after a hand-over
#: that was cut short, it may be later.
_KEEP_FROZEN: LiteralString = (
    "UPDATE cellferry.gate SET changed_at = now()"
    " WHERE organization = %(organization)s AND migration = %(migration)s"
    " AND attempt = %(attempt)s AND (state = 'frozen' AND epoch = %(epoch)s"
    " OR state = 'moved' AND epoch = %(epoch)s + 1)"
)

#: The second wait ends about when the first one would have.
_LOCK: LiteralString = """
SELECT set_config('lock_timeout', %(attempt_ms)s || 'ms', true);
SELECT pg_advisory_lock(%(lock_key)s);
SELECT set_config('lock_timeout', greatest(
    %(attempt_ms)s - 1000 * extract(epoch FROM clock_timestamp() - statement_timestamp()),
    %(attempt_ms)s / 4,
    1
)::int || 'ms', true);
SELECT pg_advisory_lock(%(loose_lock)s);
SELECT set_config('idle_session_timeout', %(standstill)s, false)
"""

#: The lock of loose writers goes when the gate is seen to be frozen: who has it does not ask for
#: the gate's.
_FREEZE_AND_UNLOCK: LiteralString = (
    "BEGIN;" + _NOT_AWAITED + _FREEZE + "; COMMIT; RESET idle_session_timeout;"
    " SELECT pg_advisory_unlock(%(loose_lock)s)"
)


def _updated(cursor: psycopg.Cursor[Any]) -> int:
    """Return how many rows the UPDATE among a message's statements met."""
    while not (cursor.statusmessage or "").startswith("UPDATE"):
        if not cursor.nextset():
            raise AssertionError("the message has no UPDATE")
    return cursor.rowcount
