"""What a cell itself must offer to a move: preparation, privileges, room, connections, sequences.

Every check is read-only and needs no more than an ordinary role.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from psycopg import sql

from cellferry.model import Blocker, Side
from cellferry.stores.postgres import prepare, timeline
from cellferry.stores.postgres.catalog import (
    Catalog,
    CatalogSequence,
    queries,
)
from cellferry.stores.postgres.examination import Examination, Site, listed, warning
from cellferry.stores.postgres.schema import DataMap, Name, Placement, Table

LONG_TRANSACTION_S = 10.0
"""Writing transactions older than this are named; the arming of a gate waits for all of them."""

CONNECTIONS_NEEDED = 6
"""Sessions that one move holds in one cell at its busiest moment; a copy of four tables, five."""


def check_cell(
    examination: Examination, site: Site, side: Side, data_maps: Iterable[DataMap]
) -> Iterator[Blocker]:
    """Yield what this cell lacks. Tables that cannot be read become unusable for later checks.

    Args:
        data_maps: say which of this cell's tables need which gate.
    """
    for data_map in data_maps:
        yield from _prepared(data_map, site)
    yield from _privileges(examination, site)
    yield from _role(site)
    yield from _connections(site)
    yield from _transactions(site, side)
    yield from _standbys(site)
    yield from _publications(site)


def _rows(site: Site, name: str, **arguments: Any) -> list[tuple[Any, ...]]:
    with site.reading() as cursor:
        return cursor.execute(queries("cell_conditions.sql")[name], arguments).fetchall()


def _prepared(data_map: DataMap, site: Site) -> Iterator[Blocker]:
    moved = (*data_map.owned, *data_map.referenced)
    if all(table.name in site.catalog.by_name for table in moved):  # else the schemas differ
        with site.connection.transaction():
            found = prepare.check(site.connection, data_map, site.cell)
        yield from found


_NEEDED = {
    Placement.OWNED: "SELECT INSERT DELETE",
    Placement.REFERENCED: "SELECT INSERT UPDATE DELETE",
    Placement.GLOBAL: "SELECT",
}


def _privileges(examination: Examination, site: Site) -> Iterator[Blocker]:
    tables = [table for table in examination.data_map.tables if table.name in site.catalog.by_name]
    found = _rows(
        site,
        "privileges",
        schemas=[table.name.schema for table in tables],
        names=[table.name.name for table in tables],
        privileges=[_NEEDED.get(table.placement, "SELECT") for table in tables],
    )
    # other cell-local tables are only looked at if they happen to be readable
    needed = {table.name for table in examination.data_map.beside}
    needless = {table.name for table in tables if table.placement not in _NEEDED} - needed
    lacking: dict[str, list[str]] = {}
    schemas: set[str] = set()
    hidden: list[str] = []
    for schema, table, missing, schema_usable, row_security in found:
        name = Name(schema, table)
        if not schema_usable or "SELECT" in missing or row_security:
            examination.unusable.add(name)
        if name in needless:
            continue
        if not schema_usable:
            schemas.add(schema)
        for privilege in missing:
            lacking.setdefault(privilege, []).append(str(name))
        if row_security:
            hidden.append(str(name))
    remedy = f"cellferry prepare-cell {site.cell.name}, which grants it; or grant it yourself"
    if schemas:
        yield Blocker(
            "missing-privilege",
            site.where(),
            f"role {site.connection.info.user} has no USAGE on schema {listed(sorted(schemas))}",
            remedy,
        )
    for privilege, names in sorted(lacking.items()):
        yield Blocker(
            "missing-privilege",
            site.where(),
            f"role {site.connection.info.user} has no {privilege} on {len(names)} "
            f"{'table' if len(names) == 1 else 'tables'}: {listed(sorted(names))}",
            remedy,
        )
    if hidden:
        yield Blocker(
            "row-security",
            site.where(),
            f"row-level security hides rows of {listed(sorted(hidden))} from the mover's role",
            "ALTER ROLE … BYPASSRLS, by a superuser",
        )


def _role(site: Site) -> Iterator[Blocker]:
    for role, superuser, may_set_replica, _, _ in _rows(site, "role"):
        if not may_set_replica:
            yield Blocker(
                "missing-privilege",
                site.where(),
                f"role {role} may not set session_replication_role",
                f"GRANT SET ON PARAMETER session_replication_role TO {role}",
            )
        if superuser:
            yield warning(
                "superuser",
                site.where(),
                f"the mover connects as superuser {role}",
                "use the role that cellferry prepare-cell sets up, which can do less harm",
            )


def _connections(site: Site) -> Iterator[Blocker]:
    ((limit, used, by_role, in_database),) = _rows(site, "connections")
    ((_, _, _, role_limit, database_limit),) = _rows(site, "role")
    free = {"max_connections": limit - used}
    if role_limit >= 0:
        free["the role's connection limit"] = role_limit - by_role
    if database_limit >= 0:
        free["the database's connection limit"] = database_limit - in_database
    for name, left in free.items():
        if left < CONNECTIONS_NEEDED:
            yield Blocker(
                "connection-limit",
                site.where(),
                f"{name} leaves {max(left, 0)} connections; a move needs {CONNECTIONS_NEEDED}",
                "raise the limit, or end sessions that are not needed",
            )


def _transactions(site: Site, side: Side) -> Iterator[Blocker]:
    if side is Side.SOURCE:
        for pid, user, application, seconds, age in _rows(
            site, "long_transactions", seconds=LONG_TRANSACTION_S
        ):
            since = f"for {seconds:,.0f} s" if seconds is not None else f"{age} transactions ago"
            if seconds is None and age < 10_000:
                continue
            yield warning(
                "long-transaction",
                site.where(),
                f"session {pid} ({user or 'unknown'}, {application or 'unnamed'}) has had a"
                f" transaction open {since}: capture starts when it has ended",
                f"wait, or SELECT pg_terminate_backend({pid})",
            )
    for gid, owner, seconds in _rows(site, "prepared_transactions"):
        yield warning(
            "prepared-transaction",
            site.where(),
            f"transaction {gid!r} of {owner} has been prepared for {seconds:,.0f} s and holds its"
            " locks; a move waits for it",
            "COMMIT PREPARED or ROLLBACK PREPARED it",
        )


def _publications(site: Site) -> Iterator[Blocker]:
    names = [name for (name,) in _rows(site, "publications")]
    if names:
        yield warning(
            "publishes-cellferry",
            site.where(),
            f"{listed(names)} {'publishes' if len(names) == 1 else 'publish'} cellferry's own"
            " tables too: a subscriber that is a PostgreSQL server stops at the first change of a"
            " table that it lacks",
            "publish the application's schemas only (CREATE PUBLICATION … FOR TABLES IN SCHEMA …),"
            " or make the tables of schema cellferry at the subscriber",
        )


def _standbys(site: Site) -> Iterator[Blocker]:
    ((synchronous, commit, in_recovery, _, fsync, full_pages),) = _rows(site, "settings")
    if in_recovery:
        yield Blocker(
            "standby",
            site.where(),
            "the connection leads to a standby",
            "point the connection at the primary",
        )
        return
    if fsync == "off" or full_pages == "off":
        yield warning(
            "durability",
            site.where(),
            "fsync or full_page_writes is off: a crash of the machine can lose acknowledged writes"
            " and gates",
            "switch both on, unless the data may be lost",
        )
    ((may_see,),) = _rows(site, "may_see_standbys")
    standbys = _rows(site, "seen_standbys" if may_see else "standbys")
    candidates = timeline.candidates(site.cell)
    if missing := sorted(candidates - {name for name, _, _ in standbys}):
        yield Blocker(
            "candidate-missing",
            site.where(),
            f"failover candidates do not stream from this server: {listed(missing)}. A cutover"
            " would wait for them in vain",
            "start them, or correct failover_candidates in cells.yaml: it holds the"
            " application_name of each standby's primary_conninfo",
        )
    unconfirmed = [
        f"{name or 'unnamed'} ({address})"
        for name, address, state in standbys
        if state not in {"sync", "quorum"} and name not in candidates
    ]
    if unconfirmed and site.cell.stores["postgres"].options.get("standbys_may_lag") is not True:
        yield Blocker(
            "standby-may-be-promoted",
            site.where(),
            f"{len(unconfirmed)} standbys do not confirm commits: {listed(unconfirmed)}. If one is"
            " promoted, a gate or moved rows that were acknowledged are gone",
            "name them in synchronous_standby_names; or in failover_candidates of the store in"
            " cells.yaml, and each cutover waits for them; or set standbys_may_lag: true there if"
            " they are never promoted",
        )
    elif any(name in candidates and state == "async" for name, _, state in standbys):
        yield warning(
            "candidate-is-asynchronous",
            site.where(),
            "a cutover waits until each failover candidate has the frozen gate and the moved rows;"
            " other commits, the application's too, may be lost when one is promoted",
            "nothing, if the product accepts that; otherwise synchronous_standby_names",
        )
    elif standbys and not synchronous:
        yield warning(
            "standby-may-be-promoted",
            site.where(),
            "standbys follow asynchronously, which cells.yaml accepts (standbys_may_lag)",
            "never promote them while a migration is live",
        )
    if sum(state == "quorum" for _, _, state in standbys) > 1:
        yield warning(
            "quorum-of-standbys",
            site.where(),
            f"a commit is confirmed by some of these standbys, not by all: {synchronous}",
            "promote only the one that is furthest, or name them in failover_candidates too, and"
            " each cutover waits for all of them",
        )
    if synchronous and commit in {"off", "local"}:
        yield warning(
            "durability",
            site.where(),
            f"synchronous_commit is {commit} by default: writers do not wait for the standbys",
            "the mover waits; the application's own writes may be lost with the server",
        )


def check_room(site: Site, incoming_bytes: int) -> Iterator[Blocker]:
    """Yield a blocker when the destination's database would pass its `capacity_bytes`.

    Args:
        incoming_bytes: estimate of what the move adds, indexes included.
    """
    capacity = site.cell.stores["postgres"].options.get("capacity_bytes")
    if capacity is None:
        return
    ((_, _, _, size, _, _),) = _rows(site, "settings")
    if size + incoming_bytes > int(capacity):
        yield Blocker(
            "destination-full",
            site.where(),
            f"the database has {size:,} bytes and would have about {size + incoming_bytes:,} with"
            f" this organization; its capacity is {int(capacity):,}",
            "move organizations out of the cell, or raise capacity_bytes after enlarging it",
        )


def check_sequences(examination: Examination) -> Iterator[Blocker]:
    """Yield warnings about ranges of keys: nearly used up, or shared by both cells."""
    theirs = _sequences(examination.destination.catalog, examination)
    overlapping: list[str] = []
    for site in examination.sites:
        found = _sequences(site.catalog, examination)
        last_values = _last_values(site, {one.name for one in found.values()})
        for sequence in found.values():
            last_value = last_values.get(sequence.name)
            if last_value is None or sequence.increment < 0:
                continue
            used = (last_value - sequence.minimum + 1) / (sequence.maximum - sequence.minimum + 1)
            if used >= 0.9:
                yield warning(
                    "sequence-range-used",
                    site.where(sequence.name),
                    f"{used:.0%} of the range {sequence.minimum} to {sequence.maximum} is used",
                    "give the cell a new, disjoint range before it ends",
                )
    for key, ours in _sequences(examination.source.catalog, examination).items():
        other = theirs.get(key)
        if other and ours.minimum <= other.maximum and other.minimum <= ours.maximum:
            overlapping.append(str(ours.name))
    if overlapping:
        yield warning(
            "sequence-ranges-overlap",
            examination.destination.where(),
            f"{len(overlapping)} sequences give out the same values in both cells:"
            f" {listed(overlapping)}",
            "give each cell its own range (ALTER SEQUENCE … MINVALUE … MAXVALUE … START …), so that"
            " keys of organizations never collide",
        )


def _last_values(site: Site, names: Collection[Name]) -> dict[Name, int | None]:
    ordered = sorted(names, key=str)
    rows = _rows(
        site,
        "sequence_positions",
        schemas=[one.schema for one in ordered],
        names=[one.name for one in ordered],
    )
    return {Name(schema, name): last_value for schema, name, last_value in rows}


def _sequences(
    catalog: Catalog, examination: Examination
) -> dict[tuple[Name, str], CatalogSequence]:
    wanted = {(one.table, one.column) for one in examination.data_map.sequences}
    found: dict[tuple[Name, str], CatalogSequence] = {}
    for sequence in catalog.sequences:
        table = catalog.root(catalog.by_oid[sequence.relation]).name
        if (table, sequence.column) in wanted:
            found.setdefault((table, sequence.column), sequence)
    return found


def check_organization(examination: Examination) -> Iterator[Blocker]:
    """Yield a blocker when the source does not know the organization."""
    data_map = examination.data_map
    table: Table = data_map.by_name[data_map.organization_table]
    if not examination.is_usable(table.name):
        return
    site = examination.source
    with site.reading() as cursor:
        # compared as text: a value that is no key of this type is simply unknown
        found = cursor.execute(
            sql.SQL("SELECT 1 FROM {} AS t WHERE {}::text = %s").format(
                table.name.identifier, sql.Identifier("t", data_map.organization_column)
            ),
            (examination.organization,),
        ).fetchone()
    if not found:
        yield Blocker(
            "unknown-organization",
            site.where(table.name),
            f"{site.cell.name} has no organization whose {data_map.organization_column} is"
            f" {examination.organization!r}",
            "check the id, and which cell the organization is in (cellferry status)",
        )
