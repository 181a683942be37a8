"""Rows on their way from one cell to the other: COPY out of one server, COPY into the other.

Rows travel as PostgreSQL sends them, in its binary form: nothing looks into a row but the last one
of a batch, whose key is the batch's checkpoint. Where that cannot be, the first column of what is
read is the row's key as text, and is cut off before the row goes on. Either way a row's last key
and the row itself come from one statement and cannot disagree.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from types import TracebackType
from typing import Any, Self

import psycopg
from psycopg import sql
from psycopg.abc import Buffer
from psycopg.adapt import Dumper
from psycopg.errors import error_from_result
from psycopg.generators import fetch_many
from psycopg.pq import ExecStatus, Format

from cellferry.stores.pace import FULL_SPEED, Pace
from cellferry.stores.postgres.rendering import PARAMETER, with_parameters
from cellferry.stores.postgres.row_keys import key_array
from cellferry.stores.postgres.schema import Table
from cellferry.stores.postgres.scope import Key, column_list, parse_key

#: What begins every binary COPY stream, and what ends it.
BINARY_HEADER = b"PGCOPY\n\xff\r\n\x00" + b"\x00" * 8
BINARY_TRAILER = b"\xff\xff"

#: Rows are handed to libpq in pieces of this many bytes.
PIECE_BYTES = 64 * 1024

#: The same where the cells ask for a slow pace: short pieces of work, and a rest after each.
SHORT_PIECE_BYTES = 8 * 1024

#: Types whose binary form is an OID of this server, which means something else in the other.
_OID_TYPES = (
    "regclass", "regtype", "regproc", "regprocedure", "regoper", "regoperator", "regrole",
    "regnamespace", "regconfig", "regdictionary", "regcollation",
)  # fmt: skip


@dataclass(frozen=True)
class _Received:
    """A value as a server sent it, in its binary form."""

    value: bytes


class _ReceivedDumper(Dumper):
    """Sends it back as it came; the statement says its type."""

    format = Format.BINARY

    def dump(self, obj: _Received) -> bytes:
        return obj.value


@dataclass(frozen=True)
class Wire:
    """How one table's rows travel. `binary` unless a column's type forbids it."""

    table: Table
    binary: bool = True

    @cached_property
    def is_keyed(self) -> bool:
        """Whether each row comes with its key before it: it cannot be read from the row."""
        travelling = {column.name for column in self.table.copied_columns}
        return not self.binary or not travelling.issuperset(self.table.primary_key)

    @property
    def _format(self) -> sql.SQL:
        return sql.SQL("binary" if self.binary else "text")

    def out(self, body: sql.Composable, *, row: str = "t") -> sql.Composed:
        """Return `COPY (SELECT columns FROM …) TO STDOUT`; `body` begins with FROM."""
        columns: sql.Composable = column_list(self.table.copied_columns, row)
        if self.is_keyed:
            key = sql.SQL("({})::text").format(key_array(self.table, row))
            if not self.binary:
                key = sql.SQL("encode(convert_to({}, 'UTF8'), 'hex')").format(key)
            columns = sql.SQL("{}, {}").format(key, columns)
        return sql.SQL("COPY (SELECT {} {}) TO STDOUT (FORMAT {})").format(
            columns, body, self._format
        )

    def into(self, target: sql.Composable | None = None) -> sql.Composed:
        """Return `COPY table (columns) FROM STDIN`."""
        return sql.SQL("COPY {} ({}) FROM STDIN (FORMAT {})").format(
            target if target is not None else self.table.name.identifier,
            column_list(self.table.copied_columns, None),
            self._format,
        )

    def _key_in(self, row: Buffer) -> list[_Received]:
        """Return the values of the key's columns in a binary row."""
        view = memoryview(row)
        wanted = set(self.table.primary_key)
        found: dict[str, _Received] = {}
        start = 2  # the number of columns; then each one's length and value
        for column in self.table.copied_columns:
            length = int.from_bytes(view[start : start + 4], "big", signed=True)
            start += 4
            if column.name in wanted:
                found[column.name] = _Received(bytes(view[start : start + length]))
                if len(found) == len(wanted):
                    break
            start += max(0, length)
        return [found[name] for name in self.table.primary_key]

    def key_of(self, connection: psycopg.Connection[Any], row: Buffer) -> Key:
        """Return the key of a binary row that came without it; a server prints its values."""
        columns = [self.table.column(name) for name in self.table.primary_key]
        statement = sql.SQL("SELECT {} FROM (SELECT {}) AS t").format(
            key_array(self.table, "t"),
            sql.SQL(", ").join(
                sql.SQL("{}::{} AS {}").format(
                    PARAMETER,
                    sql.SQL(column.type),
                    sql.Identifier(column.name),
                )
                for column in columns
            ),
        )
        with connection.cursor() as cursor:
            cursor.adapters.register_dumper(_Received, _ReceivedDumper)
            found = cursor.execute(
                with_parameters(statement, "%b"), self._key_in(row), prepare=True
            ).fetchone()
        if found is None:
            raise RuntimeError("SELECT without FROM gave no row")
        return tuple(found[0])


class Outlet:
    """The sending end: the rows of one COPY, as they go on to the other side.

    Attributes:
        rows: to be taken once, in the order of the COPY.
    """

    def __init__(self, wire: Wire, stream: psycopg.Copy) -> None:
        self._wire = wire
        self._key = b""
        messages = _binary_rows(stream) if wire.binary else iter(stream)
        self.rows: Iterator[Buffer] = self._without_keys(messages) if wire.is_keyed else messages

    def key(self, connection: psycopg.Connection[Any], row: Buffer) -> Key:
        """Return the key of `row`, the last one taken. Asks the server of `connection`."""
        if not self._wire.is_keyed:
            return self._wire.key_of(connection, row)
        text = self._key if self._wire.binary else bytes.fromhex(self._key.decode("ascii"))
        return parse_key(text.decode("utf-8"))

    def _without_keys(self, messages: Iterator[Buffer]) -> Iterator[Buffer]:
        if not self._wire.binary:
            for message in messages:
                self._key, _, rest = bytes(message).partition(b"\t")
                yield rest
            return
        head = len(self._wire.table.copied_columns).to_bytes(2, "big")
        for message in messages:
            line = bytes(message)
            end = 6 + int.from_bytes(line[2:6], "big")
            self._key = line[6:end]
            yield head + line[end:]


def _binary_rows(stream: psycopg.Copy) -> Iterator[Buffer]:
    """Yield the rows of a binary COPY without its header and trailer.

    Those that have arrived are taken without waiting: `Copy.read` waits for each message anew,
    which costs more than all else that is done with one.

    Raises:
        psycopg.Error: as `Copy.read`.
    """
    connection = stream.connection.pgconn
    take, no_row = connection.get_copy_data, len(BINARY_TRAILER)
    # The server sends one message a row, the first one with the header before it.
    size, message = 0, stream.read()[len(BINARY_HEADER) :]
    while True:
        while len(message) > no_row:  # a row has columns
            yield message
            size, message = take(1)
        if size < 0:
            break
        if not (message := stream.read()):
            return
    # It ended without its trailer: what the server says of that is still to be read.
    for result in stream.connection.wait(fetch_many(connection)):
        if result.status == ExecStatus.FATAL_ERROR:
            raise error_from_result(result)
    raise psycopg.DataError("the COPY ended without its trailer")


def _go_on(_rows: int) -> None:
    """Rest not at all."""


def _all_at_once() -> int:
    return sys.maxsize


def _unbounded() -> tuple[int, int]:
    return sys.maxsize, sys.maxsize


class Inlet:
    """The receiving end: collects rows into pieces and counts them.

    Use as a context manager around the rows of one batch; an exception inside cancels the COPY that
    is under way, and those before it are the caller's to roll back.

    A server keeps what a COPY brings until it has a thousand rows or 64 KiB, and writes those at
    once. So slow work is cut into several COPYs of few rows: what others wait for is the longest
    piece that a server does in one go, not how many there are.

    Args:
        pace: rests after each piece of a COPY.
        at_once: returns the rows of one COPY, at most; asked again while it is under way.
        rest: called between two COPYs with the number of rows since it was called last.

    Attributes:
        rows, bytes: how much was sent.
        last: the last row that was handed on, even if sending it failed.
        told: rows that `rest` was told of.
    """

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        wire: Wire,
        target: sql.Composable | None = None,
        *,
        pace: Pace = FULL_SPEED,
        at_once: Callable[[], int] = _all_at_once,
        rest: Callable[[int], None] = _go_on,
    ) -> None:
        self._pace = pace
        self._at_once = at_once
        self._rest = rest
        self._cursor = connection.cursor()
        self._statement = wire.into(target)
        self._wire = wire
        self._rows: list[Buffer] = []
        self.rows = 0
        self.bytes = 0
        self.last: Buffer | None = None
        self.told = 0

    def __enter__(self) -> Self:
        self._context = self._cursor.copy(self._statement)
        try:
            self._begin()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def fill(
        self, rows: Iterator[Buffer], bounds: Callable[[], tuple[int, int]] = _unbounded
    ) -> bool:
        """Send of `rows` until so many are sent; return False when they came to their end.

        Args:
            bounds: rows and bytes of all that is sent, at most; asked again after each piece, so
                that a batch that was begun at full speed ends soon when the pace falls.
        """
        while self._fill(rows, bounds):
            max_rows, max_bytes = bounds()
            if self.rows >= max_rows or self.bytes >= max_bytes:
                return True
            self._end()
            since, self.told = self.told, self.rows
            self._rest(self.rows - since)
            self._context = self._cursor.copy(self._statement)
            self._begin()
        return False

    def _fill(self, rows: Iterator[Buffer], bounds: Callable[[], tuple[int, int]]) -> bool:
        """Send what one COPY may bring; return False when the rows came to their end."""
        keep = self._rows.append
        while True:
            max_rows, max_bytes = bounds()
            left = min(max_rows, self.told + self._at_once()) - self.rows
            limit = min(self._pace.size(PIECE_BYTES, SHORT_PIECE_BYTES), max_bytes - self.bytes)
            if left <= 0 or limit <= 0:
                return True
            size = 0
            for row in islice(rows, left):
                keep(row)
                size += len(row)
                if size >= limit:
                    break
            else:
                ended = len(self._rows) < left
                self._flush(size)
                return not ended
            self._flush(size)
            self._pace.breathe()

    def _begin(self) -> None:
        # The context is known before it is entered: a COPY that stays open keeps its session for
        # ever, and whoever is told to end may be so at any line.
        self._copy = self._context.__enter__()
        self._head = BINARY_HEADER if self._wire.binary else b""

    def _end(self) -> None:
        self._flush(0, tail=BINARY_TRAILER if self._wire.binary else b"")
        self._context.__exit__(None, None, None)

    def _flush(self, size: int, *, tail: bytes = b"") -> None:
        if self._rows:
            self.last = self._rows[-1]
        self._copy.write(b"".join((self._head, *self._rows, tail)))
        self.rows += len(self._rows)
        self.bytes += size
        self._rows.clear()
        self._head = b""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                try:
                    self._end()
                except BaseException:
                    # or the COPY stays open, and whoever uses the session next waits for ever
                    self._context.__exit__(*sys.exc_info())
                    raise
            else:
                self._context.__exit__(kind, error, trace)  # harmless where it has ended
        finally:
            self._cursor.close()


def wires(connection: psycopg.Connection[Any], tables: tuple[Table, ...]) -> dict[str, Wire]:
    """Return how the rows of each of `tables` travel, by relation.

    Types without a binary form, and those whose binary form is an OID, make a table travel as
    text.
    """
    by_relation = {str(table.name): Wire(table) for table in tables}
    found = connection.execute(
        """
        SELECT DISTINCT n.nspname || '.' || c.relname
        FROM pg_attribute AS a
        JOIN pg_class AS c ON c.oid = a.attrelid
        JOIN pg_namespace AS n ON n.oid = c.relnamespace
        JOIN pg_type AS t ON t.oid = a.atttypid
        LEFT JOIN pg_type AS e ON e.oid = t.typelem AND t.typelem <> 0 AND t.typlen = -1
        LEFT JOIN pg_type AS b ON b.oid = t.typbasetype AND t.typbasetype <> 0
        WHERE a.attnum > 0 AND NOT a.attisdropped
          AND n.nspname || '.' || c.relname = ANY(%(relations)s)
          AND (t.typsend = 0 OR t.typreceive = 0
               OR COALESCE(e.typsend = 0 OR e.typreceive = 0, false)
               OR t.typname = ANY(%(oids)s) OR e.typname = ANY(%(oids)s)
               OR b.typname = ANY(%(oids)s))
        """,
        {"relations": list(by_relation), "oids": list(_OID_TYPES)},
    ).fetchall()
    for (relation,) in found:
        by_relation[relation] = Wire(by_relation[relation].table, binary=False)
    return by_relation
