"""What a cell's gate answers to an application, as exceptions, whatever driver carried it.

::

    RoutingError
    ├── Moved               the organization lives elsewhere: cell and epoch
    ├── BeingMoved          try again in some milliseconds
    ├── NotCommitted        the connection broke before the commit was sent: nothing happened
    ├── UnknownOutcome      the connection broke while committing: it happened or it did not
    ├── UnknownOrganization the topology has no such organization
    └── RouteUnavailable    the topology is down and this route was never known here
"""

from __future__ import annotations

import json
from collections.abc import Iterator

MOVED = "CF001"
"""SQLSTATE: the organization has moved; DETAIL is JSON {organization, cell, epoch}."""
BEING_MOVED = "CF002"
"""SQLSTATE: the organization is being moved; try again."""
ORGANIZATION_CHANGE_REFUSED = "CF003"
"""SQLSTATE: a row of an organization that is being moved may not change its organization."""
TRUNCATE_REFUSED = "CF004"
"""SQLSTATE: no TRUNCATE while an organization is being moved."""
_CONFLICTS = frozenset({"40001", "40P01"})


class RoutingError(Exception):
    """Base of what `cellferry.routing` raises."""


class Moved(RoutingError):
    """The organization has moved to `cell`, with authority since `epoch`."""

    def __init__(self, organization: str, cell: str, epoch: int) -> None:
        super().__init__(organization, cell, epoch)
        self.organization = organization
        self.cell = cell
        self.epoch = epoch

    def __str__(self) -> str:
        return f"organization {self.organization} moved to {self.cell} at epoch {self.epoch}"


class BeingMoved(RoutingError):
    """The organization is being moved: wait some milliseconds and try again.

    `organization` is empty when the store did not name it.
    """

    def __init__(self, organization: str = "") -> None:
        super().__init__(organization)
        self.organization = organization

    def __str__(self) -> str:
        return f"organization {self.organization or '(not named)'} is being moved, try again"


class NotCommitted(RoutingError):
    """The connection broke before the commit was sent; the server rolled back."""


class UnknownOutcome(RoutingError):
    """The connection broke while committing. Look whether it happened before doing it again."""


class UnknownOrganization(RoutingError):
    """The topology has no route for this organization."""


class RouteUnavailable(RoutingError):
    """The topology does not answer, and no usable route of this organization is known here."""


def translate(error: BaseException) -> BaseException:
    """Return `Moved` or `BeingMoved` if that is what `error` means, else `error` itself.

    Understands the errors of psycopg 3 and 2, also wrapped by SQLAlchemy or Django. What Redis
    means needs a look at the gate: see `cellferry.routing.redis_answers`.
    """
    for one in causes(error):
        if isinstance(one, Moved | BeingMoved):
            return one
        state = sqlstate(one)
        if state == MOVED:
            return parse_moved(_detail(one)) or BeingMoved()
        if state == BEING_MOVED:
            return BeingMoved(_organization(_detail(one)))
    return error


def is_conflict(error: BaseException) -> bool:
    """Whether the transaction lost against another one and may simply run again."""
    return any(sqlstate(one) in _CONFLICTS for one in causes(error))


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield `error` and what it was raised from; not what merely happened before it."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        wrapped = getattr(one, "orig", None)  # SQLAlchemy
        one = wrapped if isinstance(wrapped, BaseException) else one.__cause__


def sqlstate(error: BaseException) -> str | None:
    """Return the SQLSTATE of a psycopg 3 (`sqlstate`) or psycopg 2 (`pgcode`) error."""
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return state if isinstance(state, str) else None


def parse_moved(text: str | None) -> Moved | None:
    """Return the answer in JSON `{organization, cell, epoch}`; None if it is not one."""
    try:
        answer = json.loads(text or "")
        return Moved(str(answer["organization"]), str(answer["cell"]), int(answer["epoch"]))
    except (ValueError, KeyError, TypeError):
        return None


def _organization(text: str | None) -> str:
    """The organization that the answer names; none where it may be any."""
    try:
        return str(json.loads(text or "")["organization"] or "")
    except (ValueError, KeyError, TypeError):
        return ""


def _detail(error: BaseException) -> str | None:
    detail = getattr(getattr(error, "diag", None), "message_detail", None)
    return detail if isinstance(detail, str) else None
