"""The topology's tables, as numbered `.sql` files that are applied once each, in order."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

import psycopg

from cellferry.errors import PermanentError

#: Serializes installers; away from application keys ("cftopo" in hex).
_LOCK_KEY = 0x6366_746F_706F


@dataclass(frozen=True, slots=True)
class SchemaFile:
    """One numbered change of the schema."""

    version: int
    name: str
    text: str

    @property
    def digest(self) -> str:
        """SHA-256 of the text; a file that was applied must not change afterwards."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def files() -> list[SchemaFile]:
    """Return every schema file in order."""
    found = [
        SchemaFile(int(entry.name[:4]), entry.name, entry.read_text(encoding="utf-8"))
        for entry in resources.files(__name__).iterdir()
        if entry.name.endswith(".sql")
    ]
    return sorted(found, key=lambda file: file.version)


def install(connection: psycopg.Connection) -> list[str]:
    """Apply the files that this database lacks; the caller's transaction makes it all or nothing.

    Returns:
        Names of the files applied now; empty when the schema was complete.

    Raises:
        PermanentError: the database was made by a newer cellferry, or an applied file changed.
    """
    connection.execute("SELECT pg_advisory_xact_lock(%s)", [_LOCK_KEY])
    connection.execute("CREATE SCHEMA IF NOT EXISTS topology")
    connection.execute(
        """
        CREATE TABLE IF NOT EXISTS topology.schema_version (
            version    integer PRIMARY KEY,
            name       text NOT NULL,
            digest     text NOT NULL,
            applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
        )
        """
    )
    rows = connection.execute("SELECT version, name, digest FROM topology.schema_version")
    applied = {int(version): (str(name), str(digest)) for version, name, digest in rows}
    known = files()
    unknown = sorted(set(applied) - {file.version for file in known})
    if unknown:
        raise PermanentError(
            f"the topology has schema version {unknown[-1]}, newer than this cellferry",
            hint="upgrade this installation of cellferry",
        )
    done = []
    for file in known:
        if file.version in applied:
            if applied[file.version][1] != file.digest:
                raise PermanentError(
                    f"schema file {file.name} differs from what was applied to this topology",
                    hint="schema files never change once released; add a new one",
                )
            continue
        # Text of a file of this package; a prepared statement could not hold several commands.
        connection.execute(file.text.encode(), prepare=False)
        connection.execute(
            "INSERT INTO topology.schema_version (version, name, digest) VALUES (%s, %s, %s)",
            [file.version, file.name, file.digest],
        )
        done.append(file.name)
    return done
