"""SQL that is put together once and used again and again.

Composing a statement for each of some fifteen tables costs more than ten milliseconds of processor
time; under the gate writers wait for it. Most of it says the same each time.
"""

from __future__ import annotations

from psycopg import sql


def rendered(composed: sql.Composable) -> sql.Composed:
    """Return the same SQL as one piece of text."""
    return sql.Composed([sql.SQL(composed.as_string(None))])
