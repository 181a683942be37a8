"""Which history a server is on: what tells a failover, a restore, and a server that was set back.

Commits are lost without a word when an asynchronous standby is promoted, or an older state is
restored: rows that were acknowledged, log rows, a gate. Both begin a new timeline, and a server
whose disk was set back has a log that ends earlier than it did. All of it is told by three values
that an ordinary role may read.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import psycopg

from cellferry.errors import TransientError
from cellferry.model import Cell, Landmark

Connection = psycopg.Connection[Any]

POLL_S = 0.005

FAILOVER_WAIT_S = 5.0
"""How long a candidate may take to confirm, unless the store's `failover_wait_s` says otherwise."""


def read(connection: Connection) -> Landmark:
    """Return where the server of `connection` stands: what it has flushed to its disk."""
    # The timeline is that of the current segment: a checkpoint's is older after a promotion.
    row = connection.execute(
        "SELECT s.system_identifier::text, left(pg_walfile_name(pg_current_wal_lsn()), 8),"
        " (pg_current_wal_flush_lsn() - '0/0'::pg_lsn)::bigint FROM pg_control_system() AS s"
    ).fetchone()
    if row is None:
        raise TransientError("the server did not say where it stands", hint="try again")
    server, timeline, position = row
    return Landmark(str(server), str(int(timeline, 16)), int(position))


def insist_on_one_server(one: Connection, other: Connection, where: str) -> None:
    """See that two sessions lead to the same run of the same server.

    A connection with several hosts finds the new primary while an older session may still talk to
    the old one: what is frozen at one and read from the other is not the same data.

    Raises:
        TransientError: they do not.
    """
    if _run(one) != _run(other):
        raise TransientError(
            "the cell failed over during the step: its sessions lead to two servers",
            hint="run the step again; if it lasts, see that the old primary is really stopped",
            where=where,
        )


def _run(connection: Connection) -> tuple[Any, ...] | None:
    return connection.execute(
        "SELECT pg_postmaster_start_time(), current_setting('port'), s.system_identifier,"
        " left(pg_walfile_name(pg_current_wal_lsn()), 8) FROM pg_control_system() AS s",
        prepare=True,
    ).fetchone()


# ── candidates for a failover ───────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Standby:
    """A physical standby as its primary sees it.

    Attributes:
        sync_state: `sync`, `quorum`, `potential` or `async`.
        flushed: what it has on its disk, and so would have after a promotion.
    """

    name: str
    address: str
    sync_state: str
    flushed: int | None


def standbys(connection: Connection) -> list[Standby]:
    """Return the standbys that stream from this server now."""
    return [
        Standby(name, address, state, None if flushed is None else int(flushed))
        for name, address, state, flushed in connection.execute(
            "SELECT name, address, sync_state, (flush_lsn - '0/0'::pg_lsn)::bigint"
            " FROM cellferry.standbys()",
            prepare=True,
        )
    ]


def candidates(cell: Cell) -> frozenset[str]:
    """Return the standbys (`application_name`) that `cells.yaml` names as failover candidates."""
    named = cell.stores["postgres"].options.get("failover_candidates") or ()
    return frozenset([named] if isinstance(named, str) else map(str, named))


def wait_s(cell: Cell) -> float:
    """Return how long a candidate of `cell` may take to confirm, in seconds."""
    return float(cell.stores["postgres"].options.get("failover_wait_s", FAILOVER_WAIT_S))


def wait_for_candidates(
    connection: Connection, named: Collection[str], *, deadline_s: float, where: str
) -> float:
    """Return when every candidate has on its disk what this server has on its own by now.

    Candidates are the standbys called `named`, and those that are synchronous for every commit:
    a wait for one of these that somebody cancelled has returned without its confirmation.

    Returns:
        Seconds that it took.

    Raises:
        TransientError: one is not connected, or did not get there within `deadline_s`.
    """
    started = time.monotonic()
    position = read(connection).position
    while True:
        found = standbys(connection)
        behind = [
            one
            for one in found
            if (one.name in named or one.sync_state == "sync")
            and (one.flushed is None or one.flushed < position)
        ]
        missing = sorted(set(named) - {one.name for one in found})
        if not behind and not missing:
            return time.monotonic() - started
        if time.monotonic() - started > deadline_s:
            late = [
                *(f"{name} is not connected" for name in missing),
                *(
                    f"{one.name} is {position - (one.flushed or 0):,} bytes of the log behind"
                    for one in behind
                ),
            ]
            raise TransientError(
                f"failover candidates did not confirm within {deadline_s:g} s: {'; '.join(late)}",
                hint="the source serves on; see to these standbys, or take them out of"
                " failover_candidates and never promote them during a move",
                where=where,
            )
        time.sleep(POLL_S)


def is_replicated(connection: Connection) -> bool:
    """Whether commits on this server wait for a standby."""
    row = connection.execute(
        "SELECT current_setting('synchronous_standby_names') <> ''", prepare=True
    ).fetchone()
    return row == (True,)
