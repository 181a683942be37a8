"""How far the copy of each table got: kept at the destination, in the batch's own transaction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psycopg

from cellferry.stores.postgres.scope import Key


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """State of one table's copy. `last_key` is None before the first batch."""

    relation: str
    last_key: Key | None = None
    rows: int = 0
    bytes: int = 0
    done: bool = False


def read(connection: psycopg.Connection[Any], migration: int) -> Mapping[str, Checkpoint]:
    """Return the checkpoints of `migration` by relation."""
    rows = connection.execute(
        "SELECT relation, last_key, rows, bytes, done FROM cellferry.checkpoint"
        " WHERE migration = %s",
        (migration,),
        prepare=True,
    ).fetchall()
    return {
        relation: Checkpoint(relation, None if key is None else tuple(key), count, size, done)
        for relation, key, count, size, done in rows
    }


def write(connection: psycopg.Connection[Any], migration: int, mark: Checkpoint) -> None:
    """Record `mark` in the current transaction."""
    connection.execute(
        "INSERT INTO cellferry.checkpoint AS c"
        " (migration, relation, last_key, rows, bytes, done)"
        " VALUES (%s, %s, %s, %s, %s, %s)"
        " ON CONFLICT (migration, relation) DO UPDATE"
        " SET last_key = EXCLUDED.last_key, rows = EXCLUDED.rows, bytes = EXCLUDED.bytes,"
        " done = EXCLUDED.done",
        (
            migration,
            mark.relation,
            None if mark.last_key is None else list(mark.last_key),
            mark.rows,
            mark.bytes,
            mark.done,
        ),
        prepare=True,
    )


def remove(connection: psycopg.Connection[Any], migration: int, relation: str) -> None:
    """Forget the mark of `relation` in the current transaction."""
    connection.execute(
        "DELETE FROM cellferry.checkpoint WHERE migration = %s AND relation = %s",
        (migration, relation),
    )
