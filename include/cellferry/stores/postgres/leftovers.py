"""What moves left in a cell's database: found, removed, and gates put right after a failover.

Everything here is a compare-and-set: what changed since it was found is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, LiteralString

import psycopg

from cellferry.errors import InvalidInput, WrongState
from cellferry.model import Cell, GateState, Leftover, Move, Resource, Resources, Route, Side
from cellferry.stores.postgres import gate, sessions
from cellferry.stores.postgres.transactions import snapshot

KIND = "postgres"

#: How long older transactions are waited for when a gate was made anew (seconds).
SETTLE_S = 10.0

Connection = psycopg.Connection[Any]

# One step of the index for each value, however many rows have it.
_LOGGED_WITHOUT_GATE: LiteralString = """
WITH RECURSIVE logged AS (
    (SELECT organization FROM cellferry.key_log ORDER BY organization LIMIT 1)
    UNION ALL
    SELECT (SELECT log.organization FROM cellferry.key_log AS log
            WHERE log.organization > logged.organization ORDER BY log.organization LIMIT 1)
    FROM logged WHERE logged.organization IS NOT NULL
)
SELECT organization FROM logged
WHERE organization IS NOT NULL
    AND NOT EXISTS (SELECT FROM cellferry.gate WHERE gate.organization = logged.organization)
"""
_IMPORTED: LiteralString = """
WITH RECURSIVE imported AS (
    (SELECT migration FROM cellferry.imported_row ORDER BY migration LIMIT 1)
    UNION ALL
    SELECT (SELECT one.migration FROM cellferry.imported_row AS one
            WHERE one.migration > imported.migration ORDER BY one.migration LIMIT 1)
    FROM imported WHERE imported.migration IS NOT NULL
)
SELECT migration FROM imported WHERE migration IS NOT NULL
"""


def find(cell: Cell) -> tuple[Leftover, ...]:
    """See `Store.leftovers`."""
    with _session(cell) as connection, snapshot(connection):
        prepared = connection.execute(
            "SELECT to_regclass('cellferry.imported_row') IS NOT NULL"
        ).fetchone()
        return tuple(_found(connection)) if prepared == (True,) else ()


def _found(connection: Connection) -> Iterator[Leftover]:
    for row in connection.execute(
        "SELECT organization, migration, attempt, state, epoch, moved_to, armed"
        " FROM cellferry.gate ORDER BY organization"
    ):
        organization, migration, attempt, state, *rest = row
        found = GateState(state)
        yield Leftover(KIND, "gate", organization, organization, migration, attempt, found, *rest)
    for (organization,) in connection.execute(_LOGGED_WITHOUT_GATE):
        yield Leftover(KIND, "key_log", organization, organization)
    for migration, organization, attempt in connection.execute(
        "SELECT migration, organization, attempt FROM cellferry.lease ORDER BY migration"
    ):
        yield Leftover(KIND, "lease", str(migration), organization, migration, attempt)
    for (migration,) in connection.execute("SELECT DISTINCT migration FROM cellferry.checkpoint"):
        yield Leftover(KIND, "checkpoint", str(migration), None, migration)
    for (migration,) in connection.execute(_IMPORTED):
        yield Leftover(KIND, "imported_row", str(migration), None, migration)


_REMOVALS: dict[str, LiteralString] = {
    # a writer in flight may add to a log whose gate was just removed
    "key_log": "DELETE FROM cellferry.key_log AS log WHERE organization = %(organization)s"
    " AND NOT EXISTS"
    " (SELECT FROM cellferry.gate WHERE gate.organization = log.organization)",
    "lease": "DELETE FROM cellferry.lease"
    " WHERE migration = %(migration)s AND attempt = %(attempt)s",
    "checkpoint": "DELETE FROM cellferry.checkpoint WHERE migration = %(migration)s",
    "imported_row": "DELETE FROM cellferry.imported_row WHERE migration = %(migration)s",
}

_REMOVE_GATE: LiteralString = """
DELETE FROM cellferry.gate
WHERE organization = %(organization)s AND migration = %(migration)s AND attempt = %(attempt)s
    AND state = %(state)s AND epoch = %(epoch)s
RETURNING lock_key
"""
_TURN_AWAY: LiteralString = """
UPDATE cellferry.gate SET state = 'moved', armed = false, epoch = %(new_epoch)s,
    moved_to = %(moved_to)s, changed_at = now()
WHERE organization = %(organization)s AND migration = %(migration)s AND attempt = %(attempt)s
    AND state = %(state)s AND epoch = %(epoch)s
"""


def remove(cell: Cell, leftover: Leftover) -> bool:
    """See `Store.remove_leftover`."""
    with _session(cell) as connection:
        if leftover.kind != "gate":
            if leftover.kind not in _REMOVALS:
                raise InvalidInput(f"{KIND} makes nothing of the kind {leftover.kind!r}")
            statement = _REMOVALS[leftover.kind]
            return connection.execute(statement, _facts(leftover)).rowcount > 0
        gone = connection.execute(_REMOVE_GATE, _facts(leftover)).fetchone()
        if gone is None:
            return False
        gate.await_last_writers(connection, int(gone[0]))
        connection.execute(_REMOVALS["key_log"], _facts(leftover))
        return True


def turn_away(cell: Cell, found: Leftover, route: Route) -> bool:
    """See `Store.turn_away`."""
    with _session(cell) as connection:
        changed = connection.execute(
            _TURN_AWAY,
            {**_facts(found), "new_epoch": route.epoch, "moved_to": route.cell},
        )
        return changed.rowcount == 1


def reconcile(move: Move, side: Side, wanted: GateState, resources: Resources) -> bool:
    """See `Store.reconcile`."""
    cell = move.cell(side)
    for kind, name in (("lease", str(move.migration)), ("gate", move.organization.id)):
        resources.intend(Resource(cell.name, KIND, kind, name))
    with _session(cell, move) as connection:
        gate.take_lease(connection, move)
        before = gate.state(connection, move.organization.id)
        if wanted is GateState.MOVED and side is Side.SOURCE:
            _restore_moved(connection, move)
        elif wanted is GateState.OPEN and side is Side.SOURCE:
            gate.thaw(connection, move)
        elif wanted is GateState.OPEN:
            gate.hand_over_destination(connection, move)
        else:
            raise InvalidInput(f"a {side} is never reconciled to {wanted}")
        after = gate.state(connection, move.organization.id)
        return (before and (before.state, before.epoch)) != (after and (after.state, after.epoch))


def _restore_moved(connection: Connection, move: Move) -> None:
    """Make the source's gate say `moved`, from whatever a crash or a failover left there.

    Raises:
        WrongState: it is another migration's, or later than this one.
    """
    with gate.fenced(connection, move):
        changed = connection.execute(
            """
            INSERT INTO cellferry.gate AS gate
                (organization, state, armed, migration, attempt, epoch, moved_to)
            VALUES (%(organization)s, 'moved', false, %(migration)s, %(attempt)s, %(epoch)s + 1,
                    %(moved_to)s)
            ON CONFLICT (organization) DO UPDATE SET
                state = 'moved', armed = false, migration = EXCLUDED.migration,
                attempt = EXCLUDED.attempt, epoch = EXCLUDED.epoch, moved_to = EXCLUDED.moved_to,
                changed_at = now()
            WHERE gate.migration = EXCLUDED.migration AND (
                    gate.state = 'frozen' AND gate.epoch = %(epoch)s
                    OR gate.state = 'moved' AND gate.epoch = EXCLUDED.epoch)
                -- a failover lost the freeze, or everything since the last move to here
                OR gate.migration <= EXCLUDED.migration AND gate.state = 'open'
                    AND gate.epoch <= %(epoch)s
            """,
            {
                "organization": move.organization.id,
                "migration": move.migration,
                "attempt": move.attempt,
                "epoch": move.epoch,
                "moved_to": move.destination.name,
            },
        ).rowcount
        if changed != 1:
            found = gate.state(connection, move.organization.id)
            text = "gone" if found is None else f"{found.state} by migration {found.migration}"
            raise WrongState(
                f"the gate cannot become moved by migration {move.migration}: it is {text}",
                hint="compare the gate with the organization's route in the topology",
                organization=move.organization.slug,
                where=f"{move.source.name}/{KIND}",
            )
    _await_who_may_not_have_heard(connection, move)


def _await_who_may_not_have_heard(connection: Connection, move: Move) -> None:
    """Wait for transactions that may pass a gate which was made anew: its mark is new to them.

    Raises:
        DrainTimeout: some did not end; names them. The gate is closed to everybody else.
    """
    found = gate.state(connection, move.organization.id)
    if found is None or found.settled:
        return
    gate.wait_for_older_transactions(
        connection,
        deadline_s=SETTLE_S,
        where=f"{move.source.name}/{KIND}",
        organization=move.organization.slug,
    )
    connection.execute(
        "UPDATE cellferry.gate SET settled = true WHERE organization = %s AND migration = %s"
        " AND attempt = %s",
        (move.organization.id, move.migration, move.attempt),
    )


def _facts(leftover: Leftover) -> dict[str, Any]:
    return {
        "organization": leftover.organization,
        "migration": leftover.migration,
        "attempt": leftover.attempt,
        "state": None if leftover.state is None else leftover.state.value,
        "epoch": leftover.epoch,
    }


@contextmanager
def _session(cell: Cell, move: Move | None = None) -> Iterator[Connection]:
    where = f"{cell.name}/{KIND}"
    with sessions.translate_errors(where):
        connection = sessions.connect(
            cell.stores[KIND].url, purpose="reap", move=move, autocommit=True, where=where
        )
        try:
            yield connection
        finally:
            connection.close()
