"""The audit: who did what, when and why. Written in the transaction of the change itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg
from psycopg.rows import class_row

from cellferry.model import Actor
from cellferry.topology.document import document, without_secrets


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One row of the audit."""

    id: int
    at: datetime
    action: str
    """`created`, `transition`, `flip`, `lease`, `paused`, `resumed`, `halted`, `halt cleared`,
    `superseded`, `registered`, …"""
    migration: int | None
    organization: str | None
    actor: str
    role: str
    from_state: str | None
    to_state: str | None
    epoch: int | None
    attempt: int | None
    reason: str | None
    evidence: Mapping[str, Any]
    dag_run: str | None
    try_number: int | None


_INSERT = """
INSERT INTO topology.audit (action, migration, organization, actor, role, from_state, to_state,
                            epoch, attempt, reason, evidence, dag_run, try_number, request)
VALUES (%(action)s, %(migration)s, %(organization)s, %(actor)s, %(role)s, %(from_state)s,
        %(to_state)s, %(epoch)s, %(attempt)s, %(reason)s, %(evidence)s, %(dag_run)s,
        %(try_number)s, %(request)s)
"""
_SELECT = """
SELECT id, at, action, migration, organization, actor, role, from_state, to_state, epoch, attempt,
       reason, evidence, dag_run, try_number
FROM topology.audit
WHERE (%(migration)s::bigint IS NULL OR migration = %(migration)s)
  AND (%(organization)s::text IS NULL OR organization = %(organization)s)
ORDER BY id
"""


def write(
    connection: psycopg.Connection[Any],
    action: str,
    actor: Actor,
    *,
    migration: int | None = None,
    organization: str | None = None,
    from_state: str | None = None,
    to_state: str | None = None,
    epoch: int | None = None,
    attempt: int | None = None,
    reason: str | None = None,
    evidence: Mapping[str, Any] | None = None,
    request: UUID | None = None,
) -> None:
    """Write one row in the open transaction."""
    connection.execute(
        _INSERT,
        {
            "action": action,
            "migration": migration,
            "organization": organization,
            "actor": actor.name,
            "role": actor.role,
            "from_state": from_state,
            "to_state": to_state,
            "epoch": epoch,
            "attempt": attempt,
            "reason": without_secrets(reason) if reason else None,
            "evidence": document(evidence),
            "dag_run": actor.dag_run,
            "try_number": actor.try_number,
            "request": request,
        },
    )


def read(
    connection: psycopg.Connection[Any],
    *,
    migration: int | None = None,
    organization: str | None = None,
) -> list[AuditEntry]:
    """Return the rows of a migration or an organization, oldest first."""
    with connection.cursor(row_factory=class_row(AuditEntry)) as cursor:
        cursor.execute(_SELECT, {"migration": migration, "organization": organization})
        return cursor.fetchall()


def was_committed(connection: psycopg.Connection[Any], request: UUID) -> bool:
    """Whether the transaction that carried `request` is committed and visible."""
    row = connection.execute(
        "SELECT 1 FROM topology.audit WHERE request = %s", [request]
    ).fetchone()
    return row is not None
