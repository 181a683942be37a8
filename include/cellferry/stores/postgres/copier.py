"""The bulk copy: every table streamed in batches, each with its checkpoint in its own transaction.

A table is read by long statements in the order of its key and cut into batches where they arrive,
so that nothing is sorted or looked up again for each batch. A statement is given up and begun anew
behind the last committed key when it gets old: a copy never holds a snapshot for long.

What changes while a table is read is in the key log; rounds repair it. So a copy may be killed at
any moment and goes on behind its last checkpoint: at most one batch of each table that was being
copied is sent twice.

Each backend that writes is bound by one processor. So a large organization is copied in lanes, of
which each has a table and two connections of its own (see `lanes`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from typing import Any, Protocol

import psycopg
from psycopg import sql

from cellferry.errors import PermanentError
from cellferry.model import Copied, Move, Progress
from cellferry.phases import Phase, reach
from cellferry.stores.pace import FULL_SPEED
from cellferry.stores.postgres import checkpoints
from cellferry.stores.postgres.checkpoints import Checkpoint
from cellferry.stores.postgres.conflicts import WAITING_ROOM, admit, clear_the_way, waiting_room
from cellferry.stores.postgres.lanes import Agenda, Lane, Lanes
from cellferry.stores.postgres.references import ReferencedRows
from cellferry.stores.postgres.schema import Name, Table
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

#: A batch at a fixed rate takes about this long (seconds), or is the least piece.
LONGEST_BATCH_S = 1.0

#: Rows that a slow copy has the server write in one go, at most and at the slowest pace.
PIECE_ROWS = 1_000
LEAST_PIECE_ROWS = 100

#: A lane is worth its connections if so many rows can be copied beside those of the largest table:
#: they take about as long as ten times connecting, at 150,000 rows a second.
LANE_ROWS = 50_000

#: Marks the checkpoint of the referenced rows of an owned table.
REFERENCES_OF = "references of "

Connection = psycopg.Connection[Any]

#: Opens two sessions as `Copier` takes them, at the source and at the destination; closes them.
Connect = Callable[[], AbstractContextManager[tuple[Connection, Connection]]]


class _GivenUp(Exception):
    """Ends a statement at the source early; never leaves this module."""


class _Teller(Protocol):
    """To whom a copy of tables tells what it did, and who says whether it may go on."""

    def check(self) -> None:
        """Raise when the copy must stop; called before each batch."""

    def committed(self, table: Table, before: Checkpoint, after: Checkpoint) -> None:
        """Take note of a batch; what this raises ends the copy."""

    def recopied(self, rows: int) -> None:
        """Take note of rows that an earlier attempt had sent."""


class _Account(_Teller):
    """What all of a copy has done so far, as it is reported. For the step's own thread."""

    def __init__(self, progress: Progress, marks: Mapping[str, Checkpoint], expected: int) -> None:
        self._progress = progress
        self.count = sum(mark.rows for mark in marks.values())
        self.bytes = sum(mark.bytes for mark in marks.values())
        self.batches = 0
        self.sent_again = 0
        self._total = self.count + expected

    def check(self) -> None:
        self._progress.check()

    def committed(self, table: Table, before: Checkpoint, after: Checkpoint) -> None:
        rows = after.rows - before.rows
        self.count += rows
        self.bytes += after.bytes - before.bytes
        self.batches += 1 if rows else 0
        self.report(str(table.name))
        reach(Phase.COPY_BATCH)

    def recopied(self, rows: int) -> None:
        self.sent_again += rows

    def report(self, note: str) -> None:
        total = max(self._total, self.count)
        self._progress.report("postgres", "copy", self.count, total, "rows", note)


class _FromLane(_Teller):
    """Passes on what one lane does to the account, in the step's own thread."""

    def __init__(self, lane: Lane, account: _Account) -> None:
        self._lane = lane
        self._account = account

    def check(self) -> None:
        self._lane.check()  # the account is asked with each batch that it is told of

    def committed(self, table: Table, before: Checkpoint, after: Checkpoint) -> None:
        def tell() -> None:
            self._account.committed(table, before, after)
            self._account.check()

        self._lane.send(tell)

    def recopied(self, rows: int) -> None:
        self._lane.send(lambda: self._account.recopied(rows))


class Copier:
    """Copies everything of one organization; see `run`.

    Args:
        source: in autocommit mode.
        destination: in autocommit mode, with the replica role.
        connect: makes two more such sessions at the same servers, for one lane. Without it all
            tables are copied one after the other.
    """

    def __init__(
        self,
        source: Connection,
        destination: Connection,
        scope: Scope,
        wires: Mapping[str, Wire],
        move: Move,
        progress: Progress,
        throttle: Throttle | None = None,
        connect: Connect | None = None,
    ) -> None:
        self._source = source
        self._destination = destination
        self._scope = scope
        self._wires = wires
        self._move = move
        self._progress = progress
        self._throttle = throttle or Throttle(move.throttle.rows_per_s)
        self._connect = connect
        self._references = ReferencedRows(source, destination, scope, wires, move)

    def run(self) -> Copied:
        """Copy every table from its last checkpoint on, then the referenced rows. Repeatable.

        Raises:
            LeaseLost: another attempt took over.
            PermanentError: another organization's row has a key that comes.
        """
        started = time.monotonic()
        marks = checkpoints.read(self._destination, self._move.migration)
        tables = [table for table in self._scope.tables if not _mark(marks, table.name).done]
        expected = {table.name: self._left(table, _mark(marks, table.name)) for table in tables}
        account = _Account(self._progress, marks, sum(expected.values()))
        lanes = self._lanes(expected.values())
        if lanes > 1 and self._connect is not None:
            agenda = Agenda(tables, expected)
            self._copy_in_lanes(lanes, self._connect, agenda, marks, account)
        else:
            one = self._tables(self._source, self._destination, account)
            for table in tables:
                one.copy(table, _mark(marks, table.name))
        for table in self._scope.tables:
            mark = _mark(marks, REFERENCES_OF + str(table.name))
            if not mark.done and self._references.foreign_keys(table):
                self._copy_references(table, mark, account)
        account.report("done")
        return Copied(
            count=account.count,
            bytes=account.bytes,
            seconds=time.monotonic() - started,
            batches=account.batches,
            recopied=account.sent_again,
        )

    def _left(self, table: Table, mark: Checkpoint) -> int:
        """Return about how many rows are still to copy; only what no plan counted is counted."""
        planned = self._move.planned.get("postgres", {}).get(str(table.name))
        return self._count(table, mark) if planned is None else max(0, planned - mark.rows)

    def _count(self, table: Table, mark: Checkpoint) -> int:
        row = self._source.execute(
            sql.SQL("SELECT count(*) FROM {} AS t WHERE {}").format(
                table.name.identifier, _range(self._scope, table, mark.last_key)
            )
        ).fetchone()
        return int(row[0]) if row else 0

    def _lanes(self, expected: Collection[int]) -> int:
        """Return how many lanes pay. Whoever shall be slow has one: it keeps the pace and rate."""
        if self._throttle.pace is not FULL_SPEED or self._throttle.per_second is not None:
            return 1
        beside_the_largest = sum(expected) - max(expected, default=0)
        return min(self._move.limits.copy_lanes, 1 + beside_the_largest // LANE_ROWS)

    def _copy_in_lanes(
        self,
        lanes: int,
        connect: Connect,
        agenda: Agenda,
        marks: Mapping[str, Checkpoint],
        account: _Account,
    ) -> None:
        def copy(lane: Lane) -> None:
            with connect() as (source, destination), lane.cancellable(source, destination):
                tables = self._tables(source, destination, _FromLane(lane, account))
                while (table := agenda.take()) is not None:
                    tables.copy(table, _mark(marks, table.name))
                    agenda.done(table)

        account.check()
        Lanes(lanes).run(copy, meanwhile=account.check, on_end=agenda.close)

    def _tables(self, source: Connection, destination: Connection, teller: _Teller) -> _TableCopier:
        return _TableCopier(
            source, destination, self._scope, self._wires, self._move, self._throttle, teller
        )

    def _copy_references(self, table: Table, mark: Checkpoint, account: _Account) -> None:
        """Bring the referenced rows that all of `table` needs."""

        def in_transaction(work: Any) -> None:
            self._progress.check()
            with write(self._destination, self._move):
                work()
            reach(Phase.COPY_BATCH)

        rows, size = self._references.bring_for_all(table, in_transaction)
        with write(self._destination, self._move):
            new = replace(mark, rows=rows, bytes=size, done=True)
            checkpoints.write(self._destination, self._move.migration, new)
        account.committed(table, mark, new)
        self._throttle.take(rows, self._progress.check)


class _TableCopier:
    """Copies tables one after the other, on two connections."""

    def __init__(
        self,
        source: Connection,
        destination: Connection,
        scope: Scope,
        wires: Mapping[str, Wire],
        move: Move,
        throttle: Throttle,
        teller: _Teller,
    ) -> None:
        self._source = source
        self._destination = destination
        self._scope = scope
        self._wires = wires
        self._move = move
        self._throttle = throttle
        self._teller = teller
        self._look_again_at = 0.0

    def copy(self, table: Table, mark: Checkpoint) -> None:
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
                self._teller.recopied(min(mark.rows - before.rows, self._most_rows()))
                resumed = False

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
        self._teller.check()
        self._check_room()
        inlet = Inlet(
            self._destination,
            wire,
            pace=self._throttle.pace,
            at_once=lambda: self._throttle.piece(PIECE_ROWS, LEAST_PIECE_ROWS),
            rest=self._rest,
        )
        try:
            with write(self._destination, self._move):
                with inlet:
                    done = not inlet.fill(outlet.rows, self._bounds)
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
        self._committed(table, mark, new, paid=inlet.told)
        return new

    def _careful_batch(self, table: Table, mark: Checkpoint, end: Key | None) -> Checkpoint:
        """Copy the rows behind `mark` up to `end` past rows that stand in their way.

        The organization's own rows in the way are stale: a unique value moved between a copied
        and an uncopied batch. They go; their keys are in the log and rounds bring them back.
        """
        self._teller.check()
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
        with (
            suppress(_GivenUp),
            self._source.cursor() as cursor,
            cursor.copy(wire.out(self._body(table, after, end))) as stream,
        ):
            outlet = Outlet(wire, stream)
            with Inlet(self._destination, wire, WAITING_ROOM) as inlet:
                more = (
                    inlet.fill(outlet.rows, self._bounds)
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
        pace = self._throttle.pace
        return (
            pace.size(self._most_rows(), LEAST_ROWS),
            pace.size(self._move.limits.batch_bytes, LEAST_BYTES),
        )

    def _most_rows(self) -> int:
        """Return the rows of one batch at full speed, or at the rate that was asked for."""
        rows, rate = self._move.limits.batch_rows, self._throttle.per_second
        if rate is None:
            return rows
        return min(rows, max(LEAST_PIECE_ROWS, int(rate * LONGEST_BATCH_S)))

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

    def _committed(
        self, table: Table, before: Checkpoint, after: Checkpoint, *, paid: int = 0
    ) -> None:
        self._teller.committed(table, before, after)
        self._rest(after.rows - before.rows - paid)

    def _rest(self, rows: int) -> None:
        self._throttle.take(rows, self._teller.check)

    def _body(self, table: Table, after: Key | None, up_to: Key | None = None) -> sql.Composable:
        return sql.SQL("FROM {} AS t WHERE {} ORDER BY {}").format(
            table.name.identifier,
            _range(self._scope, table, after, up_to),
            sql.SQL(", ").join(sql.Identifier("t", column) for column in table.primary_key),
        )


class _Conflict(Exception):
    """A batch met a row in its way; says which batch. Never leaves this module."""

    def __init__(self, mark: Checkpoint, last_key: Key) -> None:
        super().__init__()
        self.mark = mark
        self.last_key = last_key


def _give_up_after(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise _GivenUp


def _mark(marks: Mapping[str, Checkpoint], relation: Name | str) -> Checkpoint:
    return marks.get(str(relation), Checkpoint(str(relation)))


def _range(
    scope: Scope, table: Table, after: Key | None, up_to: Key | None = None
) -> sql.Composable:
    parts: list[sql.Composable] = [scope.owned(table)]
    if after is not None:
        parts.append(_compared(table, ">", after))
    if up_to is not None:
        parts.append(_compared(table, "<=", up_to))
    return sql.SQL(" AND ").join(parts)


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
