"""What applications use: the route client.

::

    from cellferry.routing import RouteClient, transaction

    routes = RouteClient("postgresql://app@topology/topology", application="web")

    def add_issue(route):
        with pools[route.cell].connection() as connection, transaction(connection, route):
            connection.execute("INSERT INTO issues …")

    routes.run(organization_id, add_issue)
"""

from cellferry.routing.answers import (
    BEING_MOVED,
    MOVED,
    ORGANIZATION_CHANGE_REFUSED,
    TRUNCATE_REFUSED,
    BeingMoved,
    Moved,
    NotCommitted,
    RouteUnavailable,
    RoutingError,
    UnknownOrganization,
    UnknownOutcome,
    is_conflict,
    translate,
)
from cellferry.routing.client import RouteClient
from cellferry.routing.redis_answers import marker_key, parse_marker, read_gate, redis_answers
from cellferry.routing.transactions import transaction

__all__ = [
    "BEING_MOVED",
    "MOVED",
    "ORGANIZATION_CHANGE_REFUSED",
    "TRUNCATE_REFUSED",
    "BeingMoved",
    "Moved",
    "NotCommitted",
    "RouteClient",
    "RouteUnavailable",
    "RoutingError",
    "UnknownOrganization",
    "UnknownOutcome",
    "is_conflict",
    "marker_key",
    "parse_marker",
    "read_gate",
    "redis_answers",
    "transaction",
    "translate",
]
