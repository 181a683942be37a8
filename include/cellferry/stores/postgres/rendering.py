"""SQL that is put together once and used again and again.

Composing a statement for each of some fifteen tables costs more than ten milliseconds of processor
time; under the gate writers wait for it. Most of it says the same each time.
"""

from __future__ import annotations

from psycopg import sql

#: Stands for a parameter until `with_parameters`; no name holds a NUL.
PARAMETER = sql.SQL("\0")


def rendered(composed: sql.Composable) -> sql.Composed:
    """Return the same SQL as one piece of text."""
    return sql.Composed([sql.SQL(composed.as_string(None))])


def with_parameters(composed: sql.Composable, placeholder: str = "%s") -> sql.Composed:
    """Return SQL to be executed with a value for each `PARAMETER` in it.

    Tables, columns and types may have percent signs in their names, which are no placeholders.
    """
    text = composed.as_string(None).replace("%", "%%").replace("\0", placeholder)
    return sql.Composed([sql.SQL(text)])
