"""The registry of what migrations make in cells, so that nothing is left behind (invariant 9)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg

from cellferry.errors import LeaseLost
from cellferry.model import Resource, State
from cellferry.topology.connection import Database


@dataclass(frozen=True, slots=True)
class RegisteredResource:
    """Something that a migration made, or was about to make, and has not removed."""

    resource: Resource
    migration: int
    organization: str
    state: State
    """Of its migration; a reaper removes what no live or retained migration owns."""
    intended_at: datetime


class MigrationResources:
    """`cellferry.model.Resources` of one migration."""

    def __init__(self, database: Database, migration_id: int, attempt: int | None = None) -> None:
        self._database = database
        self._migration_id = migration_id
        self._attempt = attempt

    def intend(self, resource: Resource) -> None:
        """Record `resource` durably *before* it is made; repeating is harmless.

        Raises:
            LeaseLost: another attempt took over. It may have removed everything since, and what
                is recorded now would stay recorded for ever.
        """

        def work(connection: psycopg.Connection[Any]) -> None:
            if self._attempt is not None:
                self._insist_on_lease(connection, self._attempt)
            connection.execute(
                """
                INSERT INTO topology.resource (migration, cell, store, kind, name)
                VALUES (%s, %s, %s, %s, %s)
                ON CONFLICT (migration, cell, store, kind, name)
                DO UPDATE SET intended_at = now(), forgotten_at = NULL
                WHERE resource.forgotten_at IS NOT NULL
                """,
                self._key(resource),
            )

        self._database.run(work)

    def forget(self, resource: Resource) -> None:
        """Record that `resource` is gone, *after* it was removed; repeating is harmless.

        Raises:
            LeaseLost: another attempt took over. It may have made it anew since, and that would
                be nobody's.
        """

        def work(connection: psycopg.Connection[Any]) -> None:
            # An attempt's users are its own alone: no other makes them anew.
            if self._attempt is not None and resource.kind != "acl_user":
                self._insist_on_lease(connection, self._attempt)
            connection.execute(
                """
                UPDATE topology.resource SET forgotten_at = now()
                WHERE (migration, cell, store, kind, name) = (%s, %s, %s, %s, %s)
                  AND forgotten_at IS NULL
                """,
                self._key(resource),
            )

        self._database.run(work)

    def _insist_on_lease(self, connection: psycopg.Connection[Any], attempt: int) -> None:
        row = connection.execute(
            "SELECT attempt FROM topology.migration WHERE id = %s FOR SHARE", [self._migration_id]
        ).fetchone()
        if row is None or row[0] != attempt:
            raise LeaseLost(
                f"attempt {attempt} of migration {self._migration_id} was superseded",
                hint="nothing to do: the newer attempt goes on",
            )

    def _key(self, resource: Resource) -> list[Any]:
        return [self._migration_id, resource.cell, resource.store, resource.kind, resource.name]


class Registry:
    """The part of the topology that knows what was made where."""

    _database: Database

    def resources(self, migration_id: int, attempt: int | None = None) -> MigrationResources:
        """Return the registry of one migration, as the stores want it.

        Args:
            migration_id: the migration.
            attempt: who records; a superseded attempt records nothing. None for those who only
                look, or who forget what they have just seen gone.
        """
        return MigrationResources(self._database, migration_id, attempt)

    def live_resources(self, migration_id: int) -> list[Resource]:
        """Return what a migration intended and has not forgotten, oldest first."""
        return [row.resource for row in self._live(migration_id, None)]

    def registered_resources(self, cell: str | None = None) -> list[RegisteredResource]:
        """Return what all migrations intended and have not forgotten, with whose it is."""
        return self._live(None, cell)

    def _live(self, migration_id: int | None, cell: str | None) -> list[RegisteredResource]:
        def work(connection: psycopg.Connection[Any]) -> list[RegisteredResource]:
            rows = connection.execute(
                """
                SELECT r.cell, r.store, r.kind, r.name, m.id, m.organization, m.state,
                       r.intended_at
                FROM topology.resource AS r JOIN topology.migration AS m ON m.id = r.migration
                WHERE r.forgotten_at IS NULL
                  AND (%(migration)s::bigint IS NULL OR r.migration = %(migration)s)
                  AND (%(cell)s::text IS NULL OR r.cell = %(cell)s)
                ORDER BY r.intended_at, r.cell, r.store, r.kind, r.name
                """,
                {"migration": migration_id, "cell": cell},
            )
            return [
                RegisteredResource(
                    Resource(place, store, kind, name), migration, organization, State(state), at
                )
                for place, store, kind, name, migration, organization, state, at in rows
            ]

        return self._database.run(work)
