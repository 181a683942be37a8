"""Rounds: bounded passes over the keys that changed since they were last copied.

The whole of their correctness: in ONE snapshot of the source read the log rows and the current
rows of their keys; make the destination equal to these and commit there; then delete exactly the
log rows that were seen. Never "up to the highest id": ids are not in the order of commits. A crash
between the two commits repeats a round, which changes nothing.

Shared rows, which other moves under way may bring as well, are locked before the snapshot in which
they are read. Where there is more than a little to do, they come before the others, in a
transaction of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import psycopg

from cellferry.model import Move, Round
from cellferry.phases import Phase, reach
from cellferry.stores.postgres import gate
from cellferry.stores.postgres.applied import Applied, Keys
from cellferry.stores.postgres.apply import Applier
from cellferry.stores.postgres.delta import MOST_KEYS
from cellferry.stores.postgres.schema import Table
from cellferry.stores.postgres.scope import Key, Scope
from cellferry.stores.postgres.transactions import snapshot, write
from cellferry.stores.postgres.wire import Wire

#: A round's bounds: distinct keys, and rows of the log (a hot row has many).
MAX_KEYS = 50_000
MAX_LOG_ROWS = 500_000
ALL = 10**9


@dataclass
class DirtyKeys:
    """What one snapshot's log says.

    Attributes:
        keys: dirty keys by relation.
        ids: exactly the log rows that these keys come from, by relation.
        complete: whether nothing else is dirty in the snapshot.
    """

    keys: dict[str, set[Key]] = field(default_factory=dict)
    ids: dict[str, list[int]] = field(default_factory=dict)
    complete: bool = True

    @property
    def log_ids(self) -> list[int]:
        """Exactly the log rows that these keys come from."""
        return [one for some in self.ids.values() for one in some]

    @property
    def is_small(self) -> bool:
        """Whether these are all, and few enough to go together with shared rows."""
        return self.complete and self.count <= MOST_KEYS

    def leave_only(self, relations: Collection[str]) -> None:
        """Take the keys of all other relations out."""
        self.keys = {name: some for name, some in self.keys.items() if name in relations}
        self.ids = {name: some for name, some in self.ids.items() if name in relations}

    @property
    def count(self) -> int:
        """Distinct keys."""
        return sum(len(some) for some in self.keys.values())


def read_log(
    connection: psycopg.Connection[Any],
    organization: str,
    max_keys: int = MAX_KEYS,
    max_rows: int = MAX_LOG_ROWS,
) -> DirtyKeys:
    """Read the dirty keys of `organization`, oldest first, in the caller's snapshot."""
    rows = connection.execute(
        """
        SELECT relation, key, array_agg(id)
        FROM (SELECT id, relation, key FROM cellferry.key_log
              WHERE organization = %s ORDER BY id LIMIT %s) AS oldest
        GROUP BY relation, key
        ORDER BY min(id)
        LIMIT %s
        """,
        (organization, max_rows, max_keys),
        prepare=True,
    ).fetchall()
    dirty = DirtyKeys()
    for relation, key, ids in rows:
        dirty.keys.setdefault(relation, set()).add(tuple(key))
        dirty.ids.setdefault(relation, []).extend(ids)
    dirty.complete = len(rows) < max_keys and len(dirty.log_ids) < max_rows
    return dirty


def remaining(connection: psycopg.Connection[Any], organization: str) -> int:
    """Count the log rows that are visible now."""
    row = connection.execute(
        "SELECT count(*) FROM cellferry.key_log WHERE organization = %s",
        (organization,),
        prepare=True,
    ).fetchone()
    return int(row[0]) if row else 0


def backlog(connection: psycopg.Connection[Any], organization: str, at_most: int) -> int:
    """Count the log rows that are visible now, up to `at_most`: a longer log costs no more."""
    row = connection.execute(
        "SELECT count(*) FROM (SELECT FROM cellferry.key_log WHERE organization = %s LIMIT %s)"
        " AS log",
        (organization, at_most),
    ).fetchone()
    return int(row[0]) if row else 0


class Rounds:
    """Rounds from one cell to the other. Swap the connections and they go back.

    Args:
        source: where the log and the current rows are; in autocommit mode.
        destination: where they are applied; in autocommit mode, with the replica role.
        refuses_crossings: whether a row that comes to refer to another organization's row stops
            the round; on the way back it is the next plan that says so.
    """

    def __init__(
        self,
        source: psycopg.Connection[Any],
        destination: psycopg.Connection[Any],
        scope: Scope,
        wires: Mapping[str, Wire],
        move: Move,
        *,
        refuses_crossings: bool = True,
    ) -> None:
        self._source = source
        self._destination = destination
        self._scope = scope
        self._move = move
        self._shared = {str(table.name) for table in scope.data_map.referenced}
        self._applier = Applier(
            source, destination, scope, wires, move, refuses_crossings=refuses_crossings
        )

    def run(
        self,
        *,
        max_keys: int = MAX_KEYS,
        before_commit: Callable[[], None] | None = None,
    ) -> tuple[Round, Applied]:
        """Run one round and forget what it applied; repeating it is harmless.

        Args:
            max_keys: at most so many distinct keys.
            before_commit: more work in the destination's transaction; it runs, with its commit,
                even when nothing is dirty.

        Raises:
            VerificationFailed: what was applied differs; nothing was committed.
            LeaseLost: another attempt took over.
        """
        max_rows = min(MAX_LOG_ROWS, max_keys * (MAX_LOG_ROWS // MAX_KEYS))
        return self._run(max_keys, max_rows, before_commit, forget=True)

    def run_last(self, before_commit: Callable[[], None]) -> tuple[Round, Applied]:
        """Apply everything that is dirty, however much: the round under the gate.

        It leaves the log alone: there is no time for it, and no need, since applying a key again
        changes nothing.

        Raises:
            VerificationFailed, LeaseLost: as `run`.
        """
        return self._run(ALL, ALL, before_commit, forget=False)

    def _run(
        self,
        max_keys: int,
        max_rows: int,
        before_commit: Callable[[], None] | None,
        *,
        forget: bool,
    ) -> tuple[Round, Applied]:
        started = time.monotonic()
        applied = Applied()
        shared = DirtyKeys()
        with snapshot(self._source):
            dirty = self._read_log(max_keys, max_rows)
            candidates = self._applier.may_follow(dirty.keys)
            if not candidates:
                applied.add(self._apply(dirty, before_commit))
        if candidates:
            shared = dirty
            dirty, done = self._apply_with_shared(
                shared, candidates, lambda: self._read_log(max_keys, max_rows), before_commit
            )
            shared.leave_only(self._shared)
            applied.add(done)
        if before_commit is None and not self._move.returning:
            applied.add(self._applier.take_over(dirty.keys))
        reach(Phase.ROUND_APPLIED)
        left = 0
        if forget:
            self.forget(shared)
            self.forget(dirty)
            left = remaining(self._source, self._move.organization.id)
        return (
            Round(
                applied=applied.keys,
                remaining=left,
                bytes=applied.bytes,
                seconds=time.monotonic() - started,
            ),
            applied,
        )

    def _apply_with_shared(
        self,
        seen: DirtyKeys,
        candidates: Mapping[Table, set[Key]],
        read: Callable[[], DirtyKeys],
        before_commit: Callable[[], None] | None,
    ) -> tuple[DirtyKeys, Applied]:
        """Bring shared rows up to date, and apply all other keys that are dirty by then.

        Other moves write shared rows, too: they are read when they are locked, so in a newer
        snapshot than that of `seen`. The log is read again in it.

        Returns:
            The other keys, which have been applied, and what was done.
        """
        others = DirtyKeys()

        def read_others() -> Keys | None:
            nonlocal others
            others = read()
            # Of shared rows only what was seen before they were locked may be forgotten.
            others.leave_only(others.keys.keys() - self._shared)
            return others.keys if others.is_small else None

        if seen.is_small:
            together = self._applier.apply_and_follow(candidates, read_others, before_commit)
            if together is not None:
                return others, together
        applied = self._applier.follow(candidates)
        with snapshot(self._source):
            read_others()
            applied.add(self._apply(others, before_commit))
        return others, applied

    def _read_log(self, max_keys: int, max_rows: int) -> DirtyKeys:
        return read_log(self._source, self._move.organization.id, max_keys, max_rows)

    def _apply(self, dirty: DirtyKeys, before_commit: Callable[[], None] | None) -> Applied:
        if not dirty.log_ids and before_commit is None:
            if dirty.complete:
                self._applier.settle()
            return Applied()
        return self._applier.apply(dirty.keys, complete=dirty.complete, before_commit=before_commit)

    def bring_left(self) -> None:
        """Bring the shared rows that were left to another move, which may have ended since.

        Raises:
            LeaseLost: another attempt took over.
            PermanentError, TransientError: a row cannot come, or is locked.
        """
        self._applier.bring_left()

    def delete_waiting(self) -> None:
        """Delete the copied rows whose parents have not come, before their log is given up.

        A row that the copy brought before its parent is in the log, and nowhere else does anything
        say whose it is: a clean-up by owner would leave it at the destination for ever.

        Raises:
            LeaseLost: another attempt took over.
        """
        with snapshot(self._source):
            dirty = read_log(self._source, self._move.organization.id, ALL, ALL)
            self._applier.delete_waiting(dirty.keys)

    def give_up(self, max_rows: int) -> bool:
        """Forget the oldest log rows without applying them; say whether more may be left.

        A copied row whose parent has not come goes: only the log says whose it is.

        Raises:
            LeaseLost: another attempt took over.
            WrongState: the log is another migration's.
        """
        with snapshot(self._source):
            dirty = read_log(self._source, self._move.organization.id, max_rows, max_rows)
            self._applier.delete_waiting(dirty.keys)
        self.forget(dirty)
        return not dirty.complete

    def forget(self, dirty: DirtyKeys) -> None:
        """Delete exactly the log rows that were seen; the destination has committed them.

        Raises:
            WrongState: the log is another migration's by now, which has not seen these rows.
        """
        if not dirty.log_ids:
            return
        with write(self._source, self._move):
            gate.hold_capture(self._source, self._move)
            self._source.execute(
                "DELETE FROM cellferry.key_log WHERE organization = %s AND id = ANY(%s)",
                (self._move.organization.id, dirty.log_ids),
            )
