"""Rows on their way from one cell to the other: COPY out of one server, COPY into the other.

Rows travel as PostgreSQL sends them. The first column of what is read is the row's key as text,
for checkpoints; it is cut off before the row goes on, so a row's last key and the row itself come
from one statement and cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import psycopg
from psycopg import sql

from cellferry.stores.pace import FULL_SPEED, Pace
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
class Wire:
    """How one table's rows travel. `binary` unless a column's type forbids it."""

    table: Table
    binary: bool = True

    @property
    def _format(self) -> sql.SQL:
        return sql.SQL("binary" if self.binary else "text")

    def out(self, body: sql.Composable, *, row: str = "t") -> sql.Composed:
        """Return `COPY (SELECT key, columns FROM …) TO STDOUT`; `body` begins with FROM."""
        key = sql.SQL("({})::text").format(key_array(self.table, row))
        if not self.binary:
            key = sql.SQL("encode(convert_to({}, 'UTF8'), 'hex')").format(key)
        return sql.SQL("COPY (SELECT {}, {} {}) TO STDOUT (FORMAT {})").format(
            key, column_list(self.table.copied_columns, row), body, self._format
        )

    def into(self, target: sql.Composable | None = None) -> sql.Composed:
        """Return `COPY table (columns) FROM STDIN`."""
        return sql.SQL("COPY {} ({}) FROM STDIN (FORMAT {})").format(
            target if target is not None else self.table.name.identifier,
            column_list(self.table.copied_columns, None),
            self._format,
        )

    def rows(self, stream: psycopg.Copy) -> Iterator[tuple[bytes, bytes]]:
        """Yield each row of `stream` as its raw key and what goes on to the other side."""
        if not self.binary:
            for message in stream:
                key, _, rest = bytes(message).partition(b"\t")
                yield key, rest
            return
        head = (len(self.table.copied_columns)).to_bytes(2, "big")
        first = True
        for message in stream:
            line = bytes(message)
            if first:
                # The server sends one message a row, the first one with the header before it.
                line = line[len(BINARY_HEADER) :]
                first = False
            if line == BINARY_TRAILER or not line:
                continue
            end = 6 + int.from_bytes(line[2:6], "big")
            yield line[6:end], head + line[end:]

    def key(self, raw: bytes) -> Key:
        """Return the key that `rows` gave with a row."""
        text = raw if self.binary else bytes.fromhex(raw.decode("ascii"))
        return parse_key(text.decode("utf-8"))


class Inlet:
    """The receiving end: collects rows into pieces and counts them.

    Use as a context manager around the rows of one batch; an exception inside cancels the COPY.

    Args:
        pace: rests after each piece.
    """

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        wire: Wire,
        target: sql.Composable | None = None,
        *,
        pace: Pace = FULL_SPEED,
    ) -> None:
        self._pace = pace
        self._piece_bytes = pace.size(PIECE_BYTES, SHORT_PIECE_BYTES)
        self._cursor = connection.cursor()
        self._context = self._cursor.copy(wire.into(target))
        self._wire = wire
        self._pieces: list[bytes] = []
        self._pending = 0
        self.rows = 0
        self.bytes = 0

    def __enter__(self) -> Self:
        self._copy = self._context.__enter__()
        if self._wire.binary:
            self._pieces.append(BINARY_HEADER)
        return self

    def put(self, row: bytes) -> None:
        """Send one row, as `Wire.rows` gave it."""
        self._pieces.append(row)
        size = len(row)
        self._pending += size
        self.rows += 1
        self.bytes += size
        if self._pending >= self._piece_bytes:
            self._flush()
            self._pace.breathe()

    def _flush(self) -> None:
        self._copy.write(b"".join(self._pieces))
        self._pieces.clear()
        self._pending = 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                if self._wire.binary:
                    self._pieces.append(BINARY_TRAILER)
                self._flush()
            self._context.__exit__(kind, error, trace)
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
