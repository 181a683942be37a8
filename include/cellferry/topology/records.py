"""What an evidence pack needs of the topology: everything of one migration at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg.rows import class_row

from cellferry.model import Actor, Migration, Resource
from cellferry.topology import audit
from cellferry.topology.audit import AuditEntry
from cellferry.topology.connection import Database
from cellferry.topology.directory import RouteChange, read_route_history
from cellferry.topology.migrations import load_migration

#: Action of the audit rows that hold the hash of a pack.
EVIDENCE = "evidence"


@dataclass(frozen=True, slots=True)
class ResourceRecord:
    """Something that a migration made, or was about to make, and when it was gone again."""

    resource: Resource
    intended_at: datetime
    forgotten_at: datetime | None


@dataclass(frozen=True, slots=True)
class MigrationRecord:
    """Everything that the topology knows of one migration, read in one snapshot.

    Attributes:
        cell_audit: rows of the audit that concern one of its cells, or its cohort, since it began.
        topology: what the topology itself is: version, system identifier, LSN, schema.
    """

    migration: Migration
    superseded_by: int | None
    audit: list[AuditEntry]
    cell_audit: list[AuditEntry]
    routes: list[RouteChange]
    resources: list[ResourceRecord]
    topology: Mapping[str, Any]
    read_at: datetime


_AROUND = """
SELECT id, at, action, migration, organization, actor, role, from_state, to_state, epoch, attempt,
       reason, evidence, dag_run, try_number
FROM topology.audit
WHERE migration IS NULL AND at >= %(since)s
  AND (evidence ->> 'cell' = ANY (%(cells)s) OR evidence ->> 'cohort' = %(cohort)s)
ORDER BY id
"""
_TOPOLOGY = """
SELECT current_setting('server_version'), (SELECT max(version) FROM topology.schema_version),
       (SELECT system_identifier::text FROM pg_control_system()), pg_current_wal_lsn()::text
"""


class Records:
    """The part of the topology that hands out and confirms evidence."""

    _database: Database

    def migration_record(self, migration_id: int) -> MigrationRecord:
        """Return everything known of a migration, as of one moment.

        Raises:
            InvalidInput: there is none with this id.
        """

        def work(connection: psycopg.Connection[Any]) -> MigrationRecord:
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            migration = load_migration(connection, migration_id)
            around = {
                "since": migration.created_at,
                "cells": [migration.source, migration.destination],
                "cohort": migration.cohort,
            }
            with connection.cursor(row_factory=class_row(AuditEntry)) as cursor:
                cell_audit = cursor.execute(_AROUND, around).fetchall()
            own = connection.execute(
                "SELECT superseded_by, clock_timestamp() FROM topology.migration WHERE id = %s",
                [migration_id],
            ).fetchone()
            return MigrationRecord(
                migration=migration,
                superseded_by=own[0] if own else None,
                audit=audit.read(connection, migration=migration_id),
                cell_audit=cell_audit,
                routes=read_route_history(connection, migration.organization.id),
                resources=_resources(connection, migration_id),
                topology=_topology(connection),
                read_at=own[1] if own else migration.updated_at,
            )

        return self._database.run(work)

    def write_evidence(self, migration_id: int, actor: Actor, evidence: Mapping[str, Any]) -> None:
        """Write the hash of a migration's evidence pack to the audit.

        Raises:
            InvalidInput: there is no such migration.
        """

        def work(connection: psycopg.Connection[Any]) -> None:
            migration = load_migration(connection, migration_id)
            audit.write(
                connection,
                EVIDENCE,
                actor,
                migration=migration_id,
                organization=migration.organization.id,
                epoch=migration.epoch,
                attempt=migration.attempt,
                evidence=evidence,
            )

        self._database.run(work)


def _resources(connection: psycopg.Connection[Any], migration_id: int) -> list[ResourceRecord]:
    rows = connection.execute(
        """
        SELECT cell, store, kind, name, intended_at, forgotten_at FROM topology.resource
        WHERE migration = %s ORDER BY intended_at, cell, store, kind, name
        """,
        [migration_id],
    )
    return [
        ResourceRecord(Resource(cell, store, kind, name), intended, forgotten)
        for cell, store, kind, name, intended, forgotten in rows
    ]


def _topology(connection: psycopg.Connection[Any]) -> dict[str, Any]:
    row = connection.execute(_TOPOLOGY).fetchone()
    if row is None:
        return {}
    version, schema, system, lsn = row
    return {
        "version": f"PostgreSQL {version}",
        "schema": schema,
        "system_identifier": system,
        "lsn": lsn,
    }
