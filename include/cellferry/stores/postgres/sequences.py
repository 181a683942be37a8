"""Sequences at the destination must not give out a key that moved there.

With disjoint ranges for each cell this never happens. Where cells share a range, or rows of the
destination's own range come back, the sequence is advanced beyond them. Sequences only ever rise:
`setval` is not transactional, and the application takes values at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from cellferry.errors import PermanentError
from cellferry.stores.postgres.schema import Placement, Sequence
from cellferry.stores.postgres.scope import Scope

#: Values left free above the highest key: what others may take while this looks and sets.
MARGIN = 1_000


@dataclass(frozen=True)
class Position:
    """Where one sequence of this cell stands."""

    sequence: Sequence
    minimum: int
    maximum: int
    increment: int
    last_value: int

    @property
    def is_shared(self) -> bool:
        """Whether the source's range overlaps this cell's: later rows may need an advance, too."""
        return self.sequence.minimum <= self.maximum and self.minimum <= self.sequence.maximum


def positions(connection: psycopg.Connection[Any], scope: Scope) -> tuple[Position, ...]:
    """Read this cell's sequences of owned tables. Those that count down are left alone."""
    found: list[Position] = []
    for sequence in scope.data_map.sequences:
        table = scope.data_map.by_name.get(sequence.table)
        if table is None or table.placement is not Placement.OWNED:
            continue
        row = connection.execute(
            "SELECT min_value, max_value, increment_by, last_value FROM pg_sequences"
            " WHERE schemaname = %s AND sequencename = %s",
            (sequence.name.schema, sequence.name.name),
        ).fetchone()
        if row is None or row[2] < 0:
            continue
        minimum, maximum, increment, last = row
        found.append(
            Position(sequence, minimum, maximum, increment, minimum - 1 if last is None else last)
        )
    return tuple(found)


def advance(
    connection: psycopg.Connection[Any], scope: Scope, at: tuple[Position, ...]
) -> dict[str, int]:
    """Advance the sequences that would give out a key of the organization; return their values.

    Raises:
        PermanentError: a range has no room above the highest key.
    """
    set_to: dict[str, int] = {}
    for position in at:
        sequence = position.sequence
        table = scope.data_map.by_name[sequence.table]
        column = sql.Identifier("t", sequence.column)
        row = connection.execute(
            sql.SQL(
                "SELECT max({column}) FROM {table} AS t"
                " WHERE {owned} AND {column} BETWEEN {low} AND {high}"
            ).format(
                column=column,
                table=table.name.identifier,
                owned=scope.owned(table),
                low=sql.Literal(position.last_value),
                high=sql.Literal(position.maximum),
            )
        ).fetchone()
        highest = row[0] if row else None
        if highest is None or highest <= position.last_value:
            continue
        target = int(highest) + MARGIN * position.increment
        if target > position.maximum:
            raise PermanentError(
                f"sequence {sequence.name} cannot be advanced beyond key {highest}:"
                f" its range ends at {position.maximum}",
                hint="give the cells disjoint ranges of keys",
                organization=scope.organization,
                where=str(sequence.name),
            )
        connection.execute(
            "SELECT setval(%s::regclass, greatest(%s, nextval(%s::regclass)))",
            (
                sequence.name.identifier.as_string(None),
                target,
                sequence.name.identifier.as_string(None),
            ),
        )
        set_to[str(sequence.name)] = target
    return set_to
