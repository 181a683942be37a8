"""Cells, organizations and routes: who lives where."""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg

from cellferry.errors import InvalidInput, WrongState
from cellferry.model import Actor, Organization, Route, State
from cellferry.topology import audit
from cellferry.topology.connection import Database, connect, translated
from cellferry.topology.document import without_secrets

#: Channel on which each change of a route is announced, as JSON {organization, cell, epoch}.
ROUTE_CHANNEL = "cellferry_route"


@dataclass(frozen=True, slots=True)
class CellRow:
    """A cell as the topology knows it; its endpoints are the deployment's settings."""

    name: str
    region: str
    legacy: bool
    cordoned: str | None
    """Why no organization may be placed here."""
    halted: str | None
    """Why no step may run on it."""
    organizations: int


@dataclass(frozen=True, slots=True)
class OrganizationRow:
    """An organization with its route and, if one is live, its migration."""

    organization: Organization
    route: Route
    migration: int | None
    state: State | None


@dataclass(frozen=True, slots=True)
class RouteChange:
    """One entry of a route's history."""

    route: Route
    migration: int | None
    actor: str
    changed_at: datetime


class Directory:
    """The part of the topology that says who lives where."""

    _database: Database

    def register_cell(
        self, name: str, region: str = "local", legacy: bool = False, actor: Actor | None = None
    ) -> None:
        """Make a cell known, or bring its region and legacy mark up to date. Repeatable.

        Raises:
            InvalidInput: the name is empty.
        """
        if not name.strip():
            raise InvalidInput("a cell needs a name")
        who = actor or Actor("cellferry", role="system")

        def work(connection: psycopg.Connection[Any]) -> None:
            changed = connection.execute(
                """
                INSERT INTO topology.cell (name, region, legacy) VALUES (%s, %s, %s)
                ON CONFLICT (name) DO UPDATE SET region = excluded.region, legacy = excluded.legacy
                WHERE (cell.region, cell.legacy) IS DISTINCT FROM (excluded.region, excluded.legacy)
                """,
                [name, region, legacy],
            ).rowcount
            if changed:
                evidence = {"cell": name, "region": region, "legacy": legacy}
                audit.write(connection, "cell registered", who, evidence=evidence)

        self._database.run(work)

    def cells(self) -> list[CellRow]:
        """Return all cells, by name."""

        def work(connection: psycopg.Connection[Any]) -> list[CellRow]:
            rows = connection.execute(
                """
                SELECT c.name, c.region, c.legacy, c.cordoned, c.halted,
                       (SELECT count(*) FROM topology.route AS r WHERE r.cell = c.name)
                FROM topology.cell AS c ORDER BY c.name
                """
            )
            return [CellRow(*row) for row in rows]

        return self._database.run(work)

    def set_cordoned(self, cell: str, reason: str | None, actor: Actor) -> None:
        """Cordon a cell: no new placements in it; None lifts the cordon.

        Raises:
            InvalidInput: no such cell.
        """
        action = "cordoned" if reason else "cordon lifted"
        statement = "UPDATE topology.cell SET cordoned = %s WHERE name = %s"
        self._mark_cell(statement, cell, reason, action, actor)

    def _mark_cell(
        self, statement: str, cell: str, reason: str | None, action: str, actor: Actor
    ) -> None:
        text = without_secrets(reason) if reason else None

        def work(connection: psycopg.Connection[Any]) -> None:
            check_cell_known(connection, cell)
            connection.execute(statement.encode(), [text, cell])
            audit.write(connection, action, actor, reason=text, evidence={"cell": cell})

        self._database.run(work)

    def register_organization(self, org: Organization, cell: str, actor: Actor) -> Route:
        """Make an organization known, living in `cell` at epoch 1. Repeatable.

        Raises:
            InvalidInput: unknown cell, or id or slug empty or in use by another organization.
            WrongState: it is known already and lives in another cell; only a move changes that.
        """
        return self.register_organizations([(org, cell)], actor)[0]

    def register_organizations(
        self, placements: Iterable[tuple[Organization, str]], actor: Actor
    ) -> list[Route]:
        """Register many organizations in one transaction, all or none; see the singular."""
        wanted = list(placements)

        def work(connection: psycopg.Connection[Any]) -> list[Route]:
            for cell in {cell for _, cell in wanted}:
                check_cell_known(connection, cell)
            return [_register(connection, org, cell, actor) for org, cell in wanted]

        return self._database.run(work)

    def organization(self, id_or_slug: str) -> Organization:
        """Return the organization with this id, else with this slug.

        Raises:
            InvalidInput: unknown (near matches are named), or the id of one organization and
                the slug of another.
        """
        return self._database.run(lambda connection: find_organization(connection, id_or_slug))

    def organizations(
        self, search: str | None = None, cell: str | None = None, limit: int = 1000
    ) -> list[OrganizationRow]:
        """Return organizations with cell and live migration, by slug.

        Args:
            search: part of the slug (any case), or an exact id.
            cell: only those whose route points there.
            limit: at most so many.
        """

        def work(connection: psycopg.Connection[Any]) -> list[OrganizationRow]:
            if cell is not None:
                check_cell_known(connection, cell)
            rows = connection.execute(
                """
                SELECT o.id, o.slug, r.cell, r.epoch, m.id, m.state
                FROM topology.organization AS o
                JOIN topology.route AS r ON r.organization = o.id
                LEFT JOIN topology.migration AS m ON m.organization = o.id AND m.state IN
                    ('planned', 'copying', 'syncing', 'ready', 'cutting_over', 'soaking')
                WHERE (%(search)s::text IS NULL OR o.id = %(search)s
                       OR position(lower(%(search)s) IN lower(o.slug)) > 0)
                  AND (%(cell)s::text IS NULL OR r.cell = %(cell)s)
                ORDER BY o.slug LIMIT %(limit)s
                """,
                {"search": search, "cell": cell, "limit": limit},
            )
            return [
                OrganizationRow(
                    Organization(id_, slug),
                    Route(id_, where, epoch),
                    migration,
                    State(state) if state else None,
                )
                for id_, slug, where, epoch, migration, state in rows
            ]

        return self._database.run(work)

    def route(self, organization_id: str) -> Route:
        """Return where an organization lives.

        Raises:
            InvalidInput: it is unknown.
        """

        def work(connection: psycopg.Connection[Any]) -> Route:
            row = connection.execute(
                "SELECT organization, cell, epoch FROM topology.route WHERE organization = %s",
                [organization_id],
            ).fetchone()
            if row is None:
                raise _unknown(connection, organization_id)
            return Route(*row)

        return self._database.run(work)

    def routes(self) -> list[Route]:
        """Return every route, by organization."""

        def work(connection: psycopg.Connection[Any]) -> list[Route]:
            rows = connection.execute(
                "SELECT organization, cell, epoch FROM topology.route ORDER BY organization"
            )
            return [Route(*row) for row in rows]

        return self._database.run(work)

    def route_history(self, organization_id: str) -> list[RouteChange]:
        """Return every change of authority of an organization, oldest first."""
        return self._database.run(lambda session: read_route_history(session, organization_id))

    def wait_for_route_change(
        self, organization_id: str, after_epoch: int, timeout_s: float
    ) -> Route | None:
        """Wait until the route has an epoch above `after_epoch`; None when the time is over.

        Raises:
            InvalidInput: the organization is unknown.
            Unreachable: the topology does not answer.
        """
        deadline = time.monotonic() + timeout_s
        try:
            listener = connect(self._database.parameters)
        except psycopg.Error as error:
            raise translated(error, self._database.where) from None
        try:
            listener.autocommit = True
            listener.execute("LISTEN cellferry_route")
            while True:
                # Read after LISTEN, and again after each wait: a notification is only a hint.
                route = self.route(organization_id)
                if route.epoch > after_epoch:
                    return route
                if not _wait_for_notification(listener, organization_id, deadline):
                    return None
        except psycopg.Error as error:
            raise translated(error, self._database.where) from error
        finally:
            listener.close()


def check_cell_known(connection: psycopg.Connection[Any], cell: str) -> None:
    """Raise InvalidInput, naming the cells there are, when `cell` is not one of them."""
    names = [name for (name,) in connection.execute("SELECT name FROM topology.cell ORDER BY name")]
    if cell not in names:
        raise InvalidInput(
            f"there is no cell {cell!r}",
            hint=f"choose one of {', '.join(names)}" if names else "register the cells first",
        )


def find_organization(connection: psycopg.Connection[Any], id_or_slug: str) -> Organization:
    """See `Directory.organization`; inside the caller's transaction."""
    found = connection.execute(
        "SELECT id, slug FROM topology.organization WHERE id = %(text)s OR slug = %(text)s",
        {"text": id_or_slug},
    ).fetchall()
    if not found:
        raise _unknown(connection, id_or_slug)
    if len(found) > 1:
        names = " and ".join(f"{slug} (id {id_})" for id_, slug in found)
        raise InvalidInput(
            f"{id_or_slug!r} is the id of one organization and the slug of another: {names}",
            hint="name the organization by the one that is not ambiguous",
        )
    return Organization(*found[0])


def _unknown(connection: psycopg.Connection[Any], text: str) -> InvalidInput:
    candidates = connection.execute(
        """
        SELECT slug, id FROM topology.organization
        ORDER BY left(lower(slug), 2) = left(lower(%(text)s), 2) DESC, slug
        LIMIT 5000
        """,
        {"text": text},
    ).fetchall()
    by_name = {name.lower(): slug for slug, id_ in candidates for name in (slug, id_)}
    near = difflib.get_close_matches(text.lower(), by_name, n=3, cutoff=0.6)
    near += [name for name in by_name if text and text.lower() in name][:3]
    names = list(dict.fromkeys(by_name[name] for name in near))[:3]
    return InvalidInput(
        f"there is no organization {text!r}",
        hint=f"did you mean {' or '.join(names)}?" if names else "give its id or its slug",
    )


def _register(
    connection: psycopg.Connection[Any], org: Organization, cell: str, actor: Actor
) -> Route:
    if not org.id or not org.slug:
        raise InvalidInput(f"an organization needs an id and a slug, got {org!r}")
    namesake = connection.execute(
        "SELECT id FROM topology.organization WHERE slug = %s AND id <> %s", [org.slug, org.id]
    ).fetchone()
    if namesake is not None:
        raise InvalidInput(f"slug {org.slug!r} belongs to the organization with id {namesake[0]}")
    connection.execute(
        """
        INSERT INTO topology.organization (id, slug) VALUES (%s, %s)
        ON CONFLICT (id) DO UPDATE SET slug = excluded.slug
        WHERE organization.slug <> excluded.slug
        """,
        [org.id, org.slug],
    )
    created = connection.execute(
        """
        INSERT INTO topology.route (organization, cell, epoch, actor) VALUES (%s, %s, 1, %s)
        ON CONFLICT (organization) DO NOTHING RETURNING organization, cell, epoch
        """,
        [org.id, cell, actor.name],
    ).fetchone()
    if created is not None:
        audit.write(
            connection,
            "registered",
            actor,
            organization=org.id,
            epoch=1,
            evidence={"cell": cell, "slug": org.slug},
        )
        return Route(*created)
    row = connection.execute(
        "SELECT organization, cell, epoch FROM topology.route WHERE organization = %s", [org.id]
    ).fetchone()
    if row is None or row[1] != cell:
        where = f"{row[1]} at epoch {row[2]}" if row else "another cell"
        raise WrongState(
            f"the organization lives in {where}, not in {cell}",
            organization=org.slug,
            hint="only a migration changes where an organization lives",
        )
    return Route(*row)


def _wait_for_notification(
    listener: psycopg.Connection[Any], organization_id: str, deadline: float
) -> bool:
    """Wait for news of the organization; False when the time is over."""
    while (left := deadline - time.monotonic()) > 0:
        # A second at most: the route is read again even if a notification was lost.
        wait = min(left, 1.0)
        for notification in listener.notifies(timeout=wait, stop_after=1):
            try:
                if json.loads(notification.payload)["organization"] == organization_id:
                    return True
            except (ValueError, KeyError, TypeError):
                return True
        if wait == 1.0:
            return True
    return False


def read_route_history(
    connection: psycopg.Connection[Any], organization_id: str
) -> list[RouteChange]:
    """Return every change of authority of an organization, oldest first."""
    rows = connection.execute(
        """
        SELECT organization, cell, epoch, migration, actor, changed_at
        FROM topology.route_history WHERE organization = %s ORDER BY epoch
        """,
        [organization_id],
    )
    return [
        RouteChange(Route(organization, cell, epoch), migration, actor, at)
        for organization, cell, epoch, migration, actor, at in rows
    ]
