"""The control plane's database: cells, routes, migrations, audit, resources."""

from cellferry.topology.audit import AuditEntry
from cellferry.topology.directory import (
    ROUTE_CHANNEL,
    CellRow,
    OrganizationRow,
    RouteChange,
)
from cellferry.topology.document import without_secrets
from cellferry.topology.halts import Halt, HaltScope
from cellferry.topology.migrations import Lease
from cellferry.topology.progress import ProgressRow, ProgressSink
from cellferry.topology.registry import MigrationResources, RegisteredResource
from cellferry.topology.topology import Topology

__all__ = [
    "ROUTE_CHANNEL",
    "AuditEntry",
    "CellRow",
    "Halt",
    "HaltScope",
    "Lease",
    "MigrationResources",
    "OrganizationRow",
    "ProgressRow",
    "ProgressSink",
    "RegisteredResource",
    "RouteChange",
    "Topology",
    "without_secrets",
]
