"""The bulk copy: every table streamed in batches, each with its checkpoint in its own transaction.

A table is read by long statements in the order of its key and cut into batches where they arrive,
so that nothing is sorted or looked up again for each batch. A statement is given up and begun anew
behind the last committed key when it gets old: a copy never holds a snapshot for long.

What changes while a table is read is in the key log; rounds repair it. So a copy may be killed at
any moment and goes on behind its last checkpoint: at most one batch is sent twice.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import psycopg
from psycopg import sql

from cellferry.errors import PermanentError
from cellferry.model import Copied, Move, Progress
from cellferry.phases import Phase, reach
from cellferry.stores.postgres import checkpoints
from cellferry.stores.postgres.checkpoints import Checkpoint
from cellferry.stores.postgres.conflicts import WAITING_ROOM, admit, clear_the_way, waiting_room
from cellferry.stores.postgres.references import ReferencedRows
from cellferry.stores.postgres.schema import Table
from cellferry.stores.postgres.scope import Key, Scope
from cellferry.stores.postgres.transactions import write
from cellferry.stores.postgres.wire import Inlet, Outlet, Wire
from cellferry.stores.throttle import Throttle

#: A statement at the source older than this (seconds) is given up at the next batch's end.
STRETCH_S = 60.0

#: How often (seconds) the size of the destination is looked at.
LOOK_EVERY_S = 2.0

#: A batch at the slowest pace.
LEAST_ROWS = 1_000
LEAST_BYTES = 256 * 1024

#: Marks the checkpoint of the referenced rows of an owned table.
REFERENCES_OF = "references of "


class _GivenUp(Exception):
    """Ends a statement at the source early; never leaves this module."""


@dataclass
class _Tally:
    count: int = 0
    bytes: int = 0
    batches: int = 0
    recopied: int = 0


class Copier:
    """Copies everything of one organization; see `run`.

    Args:
        source: in autocommit mode.
        destination: in autocommit mode, with the replica role.
    """

    def __init__(
        self,
        source: psycopg.Connection[Any],
        destination: psycopg.Connection[Any],
        scope: Scope,
        wires: Mapping[str, Wire],
        move: Move,
        progress: Progress,
        throttle: Throttle | None = None,
    ) -> None:
        self._source = source
        self._destination = destination
        self._scope = scope
        self._wires = wires
        self._move = move
        self._progress = progress
        self._throttle = throttle or Throttle(move.throttle.rows_per_s)
        self._references = ReferencedRows(source, destination, scope, wires, move.migration)
        self._tally = _Tally()
        self._total: int | None = None
        self._look_again_at = 0.0

    def run(self) -> Copied:
        """Copy every table from its last checkpoint on, then the referenced rows. Repeatable.

        Raises:
            LeaseLost: another attempt took over.
            PermanentError: another organization's row has a key that comes.
        """
        started = time.monotonic()
        marks = checkpoints.read(self._destination, self._move.migration)
        self._tally = _Tally(
            count=sum(mark.rows for mark in marks.values()),
            bytes=sum(mark.bytes for mark in marks.values()),
        )
        self._total = self._expected(marks)
        for table in self._scope.tables:
            mark = marks.get(str(table.name), Checkpoint(str(table.name)))
            if not mark.done:
                self.copy_table(table, mark)
        for table in self._scope.tables:
            mark = marks.get(
                REFERENCES_OF + str(table.name), Checkpoint(REFERENCES_OF + str(table.name))
            )
            if not mark.done and self._references.foreign_keys(table):
                self._copy_references(table, mark)
        self._report("done")
        return Copied(
            count=self._tally.count,
            bytes=self._tally.bytes,
            seconds=time.monotonic() - started,
            batches=self._tally.batches,
            recopied=self._tally.recopied,
        )

    def _expected(self, marks: Mapping[str, Checkpoint]) -> int:
        """Count what is still to copy, and add what is done."""
        expected = sum(mark.rows for mark in marks.values())
        for table in self._scope.tables:
            mark = marks.get(str(table.name), Checkpoint(str(table.name)))
            if mark.done:
                continue
            row = self._source.execute(
                sql.SQL("SELECT count(*) FROM {} AS t WHERE {}").format(
                    table.name.identifier, self._range(table, mark.last_key)
                )
            ).fetchone()
            expected += int(row[0]) if row else 0
        return expected

    def copy_table(self, table: Table, mark: Checkpoint) -> Checkpoint:
        """Copy `table` behind `mark` to its end."""
        resumed = mark.last_key is not None
        while not mark.done:
            before = mark
            if any(unique.deferrable for unique in table.uniques):
                # The replica role does not enforce a deferrable key: each batch is checked.
                mark = self._careful_batch(table, mark, None)
            else:
                mark = self._stretch(table, mark)
            if resumed:
                # An attempt that was killed may have sent up to one batch that was not committed.
                self._tally.recopied += min(mark.rows - before.rows, self._move.limits.batch_rows)
                resumed = False
        return mark

    def _stretch(self, table: Table, mark: Checkpoint) -> Checkpoint:
        """Run one statement at the source, cut into batches; return how far it got."""
        wire = self._wires[str(table.name)]
        statement = wire.out(self._body(table, mark.last_key))
        deadline = time.monotonic() + STRETCH_S
        try:
            with self._source.cursor() as cursor, cursor.copy(statement) as stream:
                outlet = Outlet(wire, stream)
                while not mark.done:
                    mark = self._batch(table, wire, outlet, mark)
                    if not mark.done:
                        _give_up_after(deadline)
        except _GivenUp:
            return mark
        except _Conflict as conflict:
            return self._careful_batch(table, conflict.mark, conflict.last_key)
        return mark

    def _batch(self, table: Table, wire: Wire, outlet: Outlet, mark: Checkpoint) -> Checkpoint:
        """Send up to one batch of the rows of `outlet` and commit it with its checkpoint."""
        self._progress.check()
        self._check_room()
        max_rows, max_bytes = self._bounds()
        inlet = Inlet(self._destination, wire, pace=self._throttle.pace)
        try:
            with write(self._destination, self._move):
                with inlet:
                    done = not inlet.fill(outlet.rows, max_rows, max_bytes)
                new = Checkpoint(
                    relation=mark.relation,
                    last_key=mark.last_key
                    if inlet.last is None
                    else outlet.key(self._destination, inlet.last),
                    rows=mark.rows + inlet.rows,
                    bytes=mark.bytes + inlet.bytes,
                    done=done,
                )
                checkpoints.write(self._destination, self._move.migration, new)
        except (psycopg.errors.UniqueViolation, psycopg.errors.ExclusionViolation) as error:
            if inlet.last is None:
                raise
            raise _Conflict(mark, outlet.key(self._destination, inlet.last)) from error
        self._committed(table, mark, new)
        return new

    def _careful_batch(self, table: Table, mark: Checkpoint, end: Key | None) -> Checkpoint:
        """Copy the rows behind `mark` up to `end` past rows that stand in their way.

        The organization's own rows in the way are stale: a unique value moved between a copied
        and an uncopied batch. They go; their keys are in the log and rounds bring them back.
        """
        self._progress.check()
        self._check_room()
        wire = self._wires[str(table.name)]
        with write(self._destination, self._move):
            with waiting_room(self._destination, table):
                last, rows, size, done = self._fill_waiting_room(table, wire, mark.last_key, end)
                clear_the_way(self._destination, self._scope, table)
                admit(self._destination, table)
            new = Checkpoint(
                relation=mark.relation,
                last_key=last or mark.last_key,
                rows=mark.rows + rows,
                bytes=mark.bytes + size,
                done=done,
            )
            checkpoints.write(self._destination, self._move.migration, new)
        self._committed(table, mark, new)
        return new

    def _fill_waiting_room(
        self, table: Table, wire: Wire, after: Key | None, end: Key | None
    ) -> tuple[Key | None, int, int, bool]:
        """Send the rows behind `after` up to `end`, or one batch of them, to the waiting room.

        Returns:
            The last key, rows, bytes, and whether the table ended.
        """
        max_rows, max_bytes = self._bounds()
        with (
            suppress(_GivenUp),
            self._source.cursor() as cursor,
            cursor.copy(wire.out(self._body(table, after, end))) as stream,
        ):
            outlet = Outlet(wire, stream)
            with Inlet(self._destination, wire, WAITING_ROOM) as inlet:
                more = (
                    inlet.fill(outlet.rows, max_rows, max_bytes)
                    if end is None
                    else inlet.fill(outlet.rows)
                )
            if more:
                raise _GivenUp
        last = end
        if end is None and inlet.last is not None:
            last = outlet.key(self._destination, inlet.last)
        return last, inlet.rows, inlet.bytes, end is None and not more

    def _bounds(self) -> tuple[int, int]:
        """Return rows and bytes of one batch: it takes no longer at a slow pace."""
        limits, pace = self._move.limits, self._throttle.pace
        return (
            pace.size(limits.batch_rows, LEAST_ROWS),
            pace.size(limits.batch_bytes, LEAST_BYTES),
        )

    def _check_room(self) -> None:
        """Stop before the destination's database passes its cell's `capacity_bytes`."""
        endpoint = self._move.destination.stores.get("postgres")
        capacity = endpoint.options.get("capacity_bytes") if endpoint is not None else None
        if capacity is None or time.monotonic() < self._look_again_at:
            return
        self._look_again_at = time.monotonic() + LOOK_EVERY_S
        row = self._destination.execute("SELECT pg_database_size(current_database())").fetchone()
        if row is not None and row[0] > int(capacity):
            raise PermanentError(
                f"the database holds {row[0]:,} bytes, over the cell's capacity of"
                f" {int(capacity):,}",
                hint="move organizations out of the cell, or raise capacity_bytes after enlarging"
                " it; then retry, it goes on from here",
                where=f"{self._move.destination.name}/postgres",
            )

    def _committed(self, table: Table, before: Checkpoint, after: Checkpoint) -> None:
        rows = after.rows - before.rows
        self._tally.count += rows
        self._tally.bytes += after.bytes - before.bytes
        self._tally.batches += 1 if rows else 0
        self._report(str(table.name))
        reach(Phase.COPY_BATCH)
        self._throttle.take(rows, self._progress.check)

    def _copy_references(self, table: Table, mark: Checkpoint) -> None:
        """Bring the referenced rows that all of `table` needs."""

        def in_transaction(work: Any) -> None:
            self._progress.check()
            with write(self._destination, self._move):
                work()
            reach(Phase.COPY_BATCH)

        rows, size = 0, 0
        for foreign_key, values in self._references.needed_by_all(table):
            if values:
                brought, volume = self._references.bring([(foreign_key, values)], in_transaction)
                rows += brought
                size += volume
        with write(self._destination, self._move):
            new = replace(mark, rows=rows, bytes=size, done=True)
            checkpoints.write(self._destination, self._move.migration, new)
        self._committed(table, mark, new)

    def _report(self, note: str) -> None:
        self._progress.report("postgres", "copy", self._tally.count, self._total, "rows", note)

    def _body(self, table: Table, after: Key | None, up_to: Key | None = None) -> sql.Composable:
        return sql.SQL("FROM {} AS t WHERE {} ORDER BY {}").format(
            table.name.identifier,
            self._range(table, after, up_to),
            sql.SQL(", ").join(sql.Identifier("t", column) for column in table.primary_key),
        )

    def _range(self, table: Table, after: Key | None, up_to: Key | None = None) -> sql.Composable:
        parts: list[sql.Composable] = [self._scope.owned(table)]
        if after is not None:
            parts.append(_compared(table, ">", after))
        if up_to is not None:
            parts.append(_compared(table, "<=", up_to))
        return sql.SQL(" AND ").join(parts)


class _Conflict(Exception):
    """A batch met a row in its way; says which batch. Never leaves this module."""

    def __init__(self, mark: Checkpoint, last_key: Key) -> None:
        super().__init__()
        self.mark = mark
        self.last_key = last_key


def _give_up_after(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise _GivenUp


def _compared(table: Table, operator: str, key: Key) -> sql.Composed:
    """Return `(key columns) operator (values)`, in the source's own collation."""
    values = sql.SQL(", ").join(
        sql.SQL("{}::{}").format(sql.Literal(text), sql.SQL(table.column(name).type))
        for name, text in zip(table.primary_key, key, strict=True)
    )
    return sql.SQL("({}) {} ({})").format(
        sql.SQL(", ").join(sql.Identifier("t", column) for column in table.primary_key),
        sql.SQL(operator),
        values,
    )
