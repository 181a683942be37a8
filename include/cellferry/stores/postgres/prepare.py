"""Install what a cell's database needs for moves, without stalling it, and take it out again.

One table a transaction. Each waits for its lock for a moment only, because whoever writes queues
behind it for as long; if it does not get it, it lets everybody go on and tries again (hazard 10).
A table whose trigger is right is not touched.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any, LiteralString

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from cellferry.errors import Blocked, NotPrepared, TransientError
from cellferry.model import Blocker, Cell, Progress
from cellferry.stores.postgres import sessions
from cellferry.stores.postgres.schema import DataMap, Name, Placement
from cellferry.stores.postgres.triggers import (
    CAPTURE_TRIGGER,
    GATE_TRIGGER,
    TRUNCATE_TRIGGER,
    Installation,
    create_truncate_trigger,
    drop_trigger,
    function_name,
    installations,
)

Connection = psycopg.Connection[Any]

OLDEST_VERSION = 150_000
"""`GRANT SET ON PARAMETER`, which the mover needs, came with 15."""

#: One preparation of a database at a time; 'CELL' in the high half, as for the gates.
LOCK = (1128614988 << 32) - 1

STORE = "postgres"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a table's lock is waited for. Seconds.

    Attributes:
        attempt_s: one wait; other writers of the table queue as long.
        deadline_s: all waits for one table.
        rest_s: longest rest between two attempts.
    """

    attempt_s: float = 0.1
    deadline_s: float = 120.0
    rest_s: float = 2.0


@dataclass
class _Done:
    """What a preparation did, for people."""

    gated: int = 0
    right_already: int = 0
    attempts_that_waited: int = 0
    granted: int = 0


# ── prepare ─────────────────────────────────────────────────────────────────────────────────────


def prepare(
    connection: Connection,
    data_map: DataMap,
    cell: Cell,
    progress: Progress,
    patience: Patience = Patience(),
) -> Mapping[str, Any]:
    """Install schema `cellferry`, every table's gate and the mover's grants. Repeatable.

    Args:
        connection: of a role that may do it: the tables' owner with CREATEROLE, or a superuser.
        data_map: what is owned and referenced.
        cell: names the mover's role, in its connection.
        progress: told of each table; its `check` is asked between attempts.
        patience: how long to wait for a table.

    Raises:
        NotPrepared: a prerequisite is missing, with its remedy.
        TransientError: a table's lock was not to be had; names who holds it.
    """
    _autocommit(connection)
    where = f"{cell.name}/{STORE}"
    mover = mover_role(cell)
    _require(connection, data_map, mover, where)
    done = _Done()
    with _alone(connection, where):
        _install_schema(connection, progress, patience, where)
        wanted = installations(data_map)
        for number, installation in enumerate(wanted):
            progress.check()
            progress.report(
                STORE, "prepare", number, len(wanted), "tables", str(installation.table)
            )
            _install_table(connection, installation, progress, patience, done, where)
        _take_out(
            connection,
            [one.table for one in wanted],
            progress,
            patience,
            where,
        )
        done.granted = _grant(connection, data_map, mover)
        progress.report(STORE, "prepare", len(wanted), len(wanted), "tables")
    return {
        "tables gated": done.gated,
        "tables right already": done.right_already,
        "attempts that had to wait": done.attempts_that_waited,
        "grants made": done.granted,
        "mover's role": mover,
    }


def mover_role(cell: Cell) -> str:
    """Return the role that the mover connects as."""
    parameters = conninfo_to_dict(cell.stores[STORE].url)
    role = parameters.get("user")
    if not role:
        raise NotPrepared(
            "the mover's connection names no role",
            hint="write it into the connection: postgresql://cellferry_mover:…@host/database",
            where=f"{cell.name}/{STORE}",
        )
    return str(role)


def _autocommit(connection: Connection) -> None:
    if not connection.autocommit:
        connection.commit()
        connection.autocommit = True


def _require(connection: Connection, data_map: DataMap, mover: str, where: str) -> None:
    version = connection.info.server_version
    if version < OLDEST_VERSION:
        raise NotPrepared(
            f"the server is PostgreSQL {version // 10_000}",
            hint="cellferry needs version 15 or later",
            where=where,
        )
    if connection.execute("SELECT FROM pg_roles WHERE rolname = %s", (mover,)).rowcount != 1:
        raise NotPrepared(
            f"the mover's role {mover} does not exist",
            hint=f"CREATE ROLE {mover} LOGIN PASSWORD '…' on this server; prepare grants the rest",
            where=where,
        )
    parents = sorted(
        {str(hop.parent.identifier.as_string(None))
         for table in data_map.owned for path in table.owners for hop in path.hops}
    )  # fmt: skip
    hidden = connection.execute(
        "SELECT name FROM unnest(%s::text[]) AS name WHERE row_security_active(name::regclass)",
        (parents,),
    ).fetchall()
    if hidden:
        raise NotPrepared(
            f"row-level security hides rows of {', '.join(row[0] for row in hidden)} from the"
            " preparing role, and the gates would not find whose a row is",
            hint="prepare as a superuser or as a role with BYPASSRLS",
            where=where,
        )


@contextmanager
def _alone(connection: Connection, where: str) -> Iterator[None]:
    row = connection.execute("SELECT pg_try_advisory_lock(%s)", (LOCK,)).fetchone()
    if row != (True,):
        raise TransientError(
            "another session is preparing this database", hint="wait for it", where=where
        )
    try:
        yield
    finally:
        if not connection.closed:
            connection.execute("SELECT pg_advisory_unlock(%s)", (LOCK,))


def schema_sql() -> str:
    """Return the text of `gate.sql`, and of `probe.sql`, which needs its schema."""
    files = resources.files(__package__)
    return "\n".join(
        files.joinpath(name).read_text(encoding="utf-8") for name in ("gate.sql", "probe.sql")
    )


def _schema_version() -> str:
    return hashlib.sha256(schema_sql().encode()).hexdigest()


def _installed(connection: Connection) -> dict[str, str]:
    row = connection.execute("SELECT to_regclass('cellferry.installed') IS NOT NULL").fetchone()
    if row != (True,):
        return {}
    return dict(connection.execute("SELECT what, definition FROM cellferry.installed").fetchall())


def _note(connection: Connection, what: str, definition: str) -> None:
    connection.execute(
        "INSERT INTO cellferry.installed (what, definition) VALUES (%s, %s)"
        " ON CONFLICT (what) DO UPDATE SET definition = EXCLUDED.definition, installed_at = now()",
        (what, definition),
    )


def _install_schema(
    connection: Connection, progress: Progress, patience: Patience, where: str
) -> None:
    version = _schema_version()
    if _installed(connection).get("schema") == version and _marks_are_right(connection):
        return

    def install() -> None:
        # Where there are moves already, their writers use these tables.
        _bound_waits(connection, patience)
        connection.execute(schema_sql().encode())
        _note(connection, "schema", version)

    _patiently(connection, Name("cellferry", "key_log"), install, progress, patience, where)


def _install_table(
    connection: Connection,
    installation: Installation,
    progress: Progress,
    patience: Patience,
    done: _Done,
    where: str,
) -> None:
    if _is_right(connection, installation):
        done.right_already += 1
        return

    def install() -> None:
        connection.execute(installation.function_sql.encode())
        if not _row_trigger_is_right(connection, installation):
            _lock_table(connection, installation.table, patience)
            for trigger in (GATE_TRIGGER, CAPTURE_TRIGGER):
                connection.execute(drop_trigger(trigger, installation.table))
            connection.execute(installation.create_row_trigger())
        for table in _without_truncate_trigger(connection, installation):
            _lock_table(connection, table, patience)
            connection.execute(drop_trigger(TRUNCATE_TRIGGER, table))
            connection.execute(create_truncate_trigger(table))
        _note(connection, str(installation.table), installation.definition)

    done.attempts_that_waited += _patiently(
        connection, installation.table, install, progress, patience, where
    )
    done.gated += 1


def _lock_table(connection: Connection, table: Name, patience: Patience) -> None:
    """Lock a table and its partitions; the whole wait is bounded, not that for each of them."""
    milliseconds = _bound_waits(connection, patience)
    sessions.set_locally(connection, "statement_timeout", milliseconds)
    # What CREATE TRIGGER and DROP TRIGGER take. Both need the strong lock at once: a weaker one
    # that is raised later can deadlock with a writer.
    connection.execute(
        sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(table.identifier)
        if _has_our_trigger(connection, table)
        else sql.SQL("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE").format(table.identifier)
    )
    sessions.set_locally(connection, "statement_timeout", "0")


def _bound_waits(connection: Connection, patience: Patience) -> str:
    milliseconds = f"{max(1, round(patience.attempt_s * 1000))}ms"
    sessions.set_locally(connection, "lock_timeout", milliseconds)
    return milliseconds


def _has_our_trigger(connection: Connection, table: Name, name: str = "zz_cellferry%") -> bool:
    found = connection.execute(
        "SELECT FROM pg_trigger WHERE tgrelid = %s::regclass AND tgname LIKE %s",
        (table.identifier.as_string(None), name),
    )
    return found.rowcount > 0


def _patiently(
    connection: Connection,
    table: Name,
    attempt: Callable[[], None],
    progress: Progress,
    patience: Patience,
    where: str,
) -> int:
    """Run `attempt` in a transaction until it gets its locks; return how often it did not."""
    deadline = time.monotonic() + patience.deadline_s
    waited = 0
    rest = patience.attempt_s
    while True:
        try:
            with connection.transaction():
                attempt()
        except (
            psycopg.errors.LockNotAvailable,
            psycopg.errors.QueryCanceled,
            psycopg.errors.DeadlockDetected,
        ) as error:
            waited += 1
            if time.monotonic() > deadline:
                raise TransientError(
                    f"table {table} stays locked by {_holders(connection, table)}",
                    hint="wait for these transactions, or end them; then prepare again, it goes on"
                    " with this table",
                    where=where,
                ) from error
        else:
            return waited
        progress.check()
        # Longer than the wait, so that the table's writers get on with their work in between.
        time.sleep(random.uniform(0.5, 1.5) * rest)  # noqa: S311
        rest = min(rest * 1.5, patience.rest_s)


def _holders(connection: Connection, table: Name) -> str:
    rows = connection.execute(
        "SELECT DISTINCT a.pid, a.application_name, clock_timestamp() - a.xact_start"
        " FROM pg_locks AS l JOIN pg_stat_activity AS a ON a.pid = l.pid"
        " WHERE l.locktype = 'relation' AND l.granted AND a.pid <> pg_backend_pid()"
        " AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        " AND l.relation IN (SELECT %(table)s::regclass::oid"
        "  UNION SELECT relid::oid FROM pg_partition_tree(%(table)s::regclass)) LIMIT 5",
        {"table": table.identifier.as_string(None)},
    ).fetchall()
    return (
        "; ".join(f"pid {pid} ({name or 'no application name'}, open for {age})"
                  for pid, name, age in rows)
        or "transactions that ended just now"
    )  # fmt: skip


# ── what is there ───────────────────────────────────────────────────────────────────────────────


def _is_right(connection: Connection, installation: Installation) -> bool:
    return (
        _installed(connection).get(str(installation.table)) == installation.definition
        and _row_trigger_is_right(connection, installation)
        and not _without_truncate_trigger(connection, installation)
    )


def _row_trigger_is_right(connection: Connection, installation: Installation) -> bool:
    """Whether the root and every partition have the row trigger, enabled, with our function."""
    return _triggers(connection, (installation,))[0][0]


def _without_truncate_trigger(connection: Connection, installation: Installation) -> list[Name]:
    """Return the table and those of its partitions that lack the guard against TRUNCATE."""
    return _triggers(connection, (installation,))[0][1]


def _triggers(
    connection: Connection, wanted: Sequence[Installation]
) -> list[tuple[bool, list[Name]]]:
    """Look at the triggers of all tables, in one statement.

    Returns:
        For each, whether its root and every partition have the row trigger, enabled, with our
        function, and none of another placement; and which of them lack the guard against TRUNCATE.
    """
    rows = connection.execute(
        """
        SELECT one.number, bool_and(COALESCE(
                t.tgenabled = 'O' AND t.tgtype & 31 = 29 + one.before
                AND t.tgfoid = to_regproc(one.function), false))
            AND NOT bool_or(one.placed_differently),
            array_agg(n.nspname::text ORDER BY c.relkind DESC, n.nspname, c.relname)
                FILTER (WHERE g.oid IS NULL),
            array_agg(c.relname::text ORDER BY c.relkind DESC, n.nspname, c.relname)
                FILTER (WHERE g.oid IS NULL)
        FROM (
            SELECT number, name::regclass AS relid, trigger, function, before, EXISTS (
                SELECT FROM pg_trigger AS o
                WHERE o.tgrelid = name::regclass AND o.tgname = other) AS placed_differently
            FROM unnest(%(tables)s::text[], %(triggers)s::text[], %(functions)s::text[],
                    %(before)s::int[], %(others)s::text[]) WITH ORDINALITY
                AS given (name, trigger, function, before, other, number)
        ) AS one
        CROSS JOIN LATERAL (
            SELECT one.relid AS relid UNION SELECT relid FROM pg_partition_tree(one.relid)) AS part
        JOIN pg_class AS c ON c.oid = part.relid AND c.relkind IN ('r', 'p')
        JOIN pg_namespace AS n ON n.oid = c.relnamespace
        LEFT JOIN pg_trigger AS t ON t.tgrelid = part.relid AND t.tgname = one.trigger
        LEFT JOIN pg_trigger AS g
            ON g.tgrelid = part.relid AND g.tgname = %(guard)s AND g.tgenabled = 'O'
        GROUP BY one.number
        """,
        {
            "tables": [one.table.identifier.as_string(None) for one in wanted],
            "triggers": [one.trigger for one in wanted],
            "functions": [f"cellferry.{one.function}" for one in wanted],
            "before": [2 if one.timing == "BEFORE" else 0 for one in wanted],
            # the table had this one if it was placed differently before
            "others": [
                CAPTURE_TRIGGER if one.trigger == GATE_TRIGGER else GATE_TRIGGER for one in wanted
            ],
            "guard": TRUNCATE_TRIGGER,
        },
    ).fetchall()
    found = {
        number: (is_right, [Name(*one) for one in zip(schemas or (), names or (), strict=True)])
        for number, is_right, schemas, names in rows
    }
    return [found.get(number, (False, [])) for number in range(1, len(wanted) + 1)]


def _marks_are_right(connection: Connection) -> bool:
    """Whether every gate has its mark, and new ones will get theirs; without, writers pass it."""
    return connection.execute(_MARKS).fetchone() == (True,)


#: NOT IN is one scan of pg_class, which does not hang on what the planner thinks of the number of
#: gates: it is hashed as long as the names fit `work_mem`.
_MARKS = """
    SELECT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = 'cellferry.gate'::regclass
                   AND tgname = 'keep_marks' AND tgenabled = 'A')
        AND NOT EXISTS (SELECT FROM cellferry.gate WHERE octet_length(organization) <= 60
                        AND ('@' || organization)::name NOT IN (
                            SELECT relname FROM pg_class
                            WHERE relnamespace = 'cellferry'::regnamespace))
"""


def is_prepared(connection: Connection, data_map: DataMap) -> list[str]:
    """Return what is missing for a move, in words; empty when all is there. Read-only."""
    try:
        found = _installed(connection)
    except psycopg.errors.InsufficientPrivilege:
        return ["the mover may not read schema cellferry"]
    if "schema" not in found:
        return ["schema cellferry"]
    missing = []
    if found["schema"] != _schema_version():
        missing.append("the newest version of schema cellferry")
    elif not _marks_are_right(connection):
        missing.append("the mark of a gate")
    wanted = installations(data_map)
    for one, (is_right, unguarded) in zip(wanted, _triggers(connection, wanted), strict=True):
        if not is_right:
            missing.append(f"trigger {one.trigger} on {one.table} (missing or disabled)")
        elif found.get(str(one.table)) != one.definition:
            missing.append(f"the newest version of the gate of {one.table}")
        missing.extend(f"trigger {TRUNCATE_TRIGGER} on {table}" for table in unguarded)
    return missing


def check(connection: Connection, data_map: DataMap, cell: Cell) -> tuple[Blocker, ...]:
    """Return what keeps this cell from taking part in a move, one blocker for each thing."""
    return tuple(
        Blocker(
            code="not-prepared",
            where=f"{cell.name}/{STORE}",
            reason=f"missing: {what}",
            remedy=f"cellferry prepare-cell {cell.name}, or the DAG prepare_cell",
        )
        for what in is_prepared(connection, data_map)
    )


# ── the mover's grants ──────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Grant:
    """A privilege: how to see whether the role has it, to give it, and to take it back."""

    has: sql.Composed
    give: sql.Composed
    take: sql.Composed


def _grant(connection: Connection, data_map: DataMap, mover: str) -> int:
    """Grant what the mover lacks, and note how to take each of these grants back."""
    role = sql.Identifier(mover)
    made = 0
    with connection.transaction():
        # Schema cellferry goes as a whole; nothing of it needs to be taken back.
        if connection.execute(_HAS_OWN_GRANTS, {"role": mover}).fetchone() != (True,):
            connection.execute(_OWN_GRANTS.format(role=role))
        for grant in _needed(connection, data_map, mover):
            query = sql.SQL("SELECT {}").format(grant.has)
            if connection.execute(query).fetchone() == (True,):
                continue
            connection.execute(grant.give)
            connection.execute(
                "INSERT INTO cellferry.granted (revoke) VALUES (%s) ON CONFLICT DO NOTHING",
                (grant.take.as_string(connection),),
            )
            made += 1
    return made


_OWN_GRANTS = sql.SQL(
    """
    GRANT USAGE ON SCHEMA cellferry TO {role};
    GRANT SELECT ON cellferry.installed TO {role};
    GRANT SELECT, INSERT, UPDATE, DELETE ON
        cellferry.gate, cellferry.key_log, cellferry.lease, cellferry.checkpoint,
        cellferry.imported_row TO {role};
    GRANT SELECT, UPDATE ON cellferry.probe TO {role};
    GRANT USAGE ON SEQUENCE cellferry.lock_number TO {role};
    GRANT EXECUTE ON FUNCTION cellferry.open_transactions(), cellferry.gate_holders(bigint),
        cellferry.standbys(), cellferry.load() TO {role};
    """
)

_HAS_OWN_GRANTS = """
    SELECT bool_and(has_table_privilege(%(role)s, 'cellferry.' || name, privilege))
        AND has_table_privilege(%(role)s, 'cellferry.installed', 'SELECT')
        AND has_sequence_privilege(%(role)s, 'cellferry.lock_number', 'USAGE')
        AND has_function_privilege(%(role)s, 'cellferry.open_transactions()', 'EXECUTE')
        AND has_function_privilege(%(role)s, 'cellferry.gate_holders(bigint)', 'EXECUTE')
        AND has_function_privilege(%(role)s, 'cellferry.standbys()', 'EXECUTE')
        AND has_function_privilege(%(role)s, 'cellferry.load()', 'EXECUTE')
        AND has_table_privilege(%(role)s, 'cellferry.probe', 'SELECT')
        AND has_table_privilege(%(role)s, 'cellferry.probe', 'UPDATE')
    FROM unnest(ARRAY['gate', 'key_log', 'lease', 'checkpoint', 'imported_row']) AS name,
        unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS privilege
"""

_TABLE_PRIVILEGES: Mapping[Placement, tuple[LiteralString, ...]] = {
    Placement.OWNED: ("SELECT", "INSERT", "DELETE"),
    Placement.REFERENCED: ("SELECT", "INSERT", "UPDATE", "DELETE"),
    Placement.GLOBAL: ("SELECT",),
}


def _needed(connection: Connection, data_map: DataMap, mover: str) -> Iterator[_Grant]:
    """Yield the least privilege that moves need; see `docs/platform-guide.md`."""
    placed = [table for table in data_map.tables if table.placement in _TABLE_PRIVILEGES]
    database = connection.info.dbname
    for privilege in ("CONNECT", "TEMPORARY"):
        yield _privilege(mover, "database", privilege, sql.Identifier(database), database)
    beside = data_map.beside
    schemas = {table.name.schema for table in (*placed, *beside)} | {
        sequence.name.schema for sequence in data_map.sequences
    }
    schemas |= data_map.type_schemas - {"information_schema"}
    for schema in sorted(schemas):
        yield _privilege(mover, "schema", "USAGE", sql.Identifier(schema), schema)
    for table in placed:
        for privilege in _TABLE_PRIVILEGES[table.placement]:
            yield _privilege(mover, "table", privilege, table.name.identifier)
    for table in beside:
        yield _privilege(mover, "table", "SELECT", table.name.identifier)
    for sequence in data_map.sequences:
        for privilege in ("SELECT", "UPDATE"):
            yield _privilege(mover, "sequence", privilege, sequence.name.identifier)
    role = sql.Identifier(mover)
    parameter = sql.SQL("PARAMETER session_replication_role")
    yield _Grant(
        has=sql.SQL("has_parameter_privilege({}, 'session_replication_role', 'SET')").format(
            sql.Literal(mover)
        ),
        give=sql.SQL("GRANT SET ON {} TO {}").format(parameter, role),
        take=sql.SQL("REVOKE SET ON {} FROM {}").format(parameter, role),
    )
    if _has_row_security(connection, [table.name for table in (*placed, *beside)]):
        yield _Grant(
            has=sql.SQL(
                "(SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = {})"
            ).format(sql.Literal(mover)),
            give=sql.SQL("ALTER ROLE {} BYPASSRLS").format(role),
            take=sql.SQL("ALTER ROLE {} NOBYPASSRLS").format(role),
        )


def _privilege(
    mover: str,
    kind: LiteralString,
    privilege: LiteralString,
    identifier: sql.Identifier,
    name: str | None = None,
) -> _Grant:
    words = {
        "has": sql.SQL("has_{}_privilege").format(sql.SQL(kind)),
        "kind": sql.SQL(kind.upper()),
        "privilege": sql.SQL(privilege),
        "object": identifier,
        "role": sql.Identifier(mover),
        "asked": sql.Literal(privilege),
        "role_name": sql.Literal(mover),
        # tables and sequences are named as in SQL, databases and schemas as in the catalog
        "name": sql.Literal(identifier.as_string(None) if name is None else name),
    }
    return _Grant(
        has=sql.SQL("{has}({role_name}, {name}, {asked})").format(**words),
        give=sql.SQL("GRANT {privilege} ON {kind} {object} TO {role}").format(**words),
        take=sql.SQL("REVOKE {privilege} ON {kind} {object} FROM {role}").format(**words),
    )


def _has_row_security(connection: Connection, tables: list[Name]) -> bool:
    names = [table.identifier.as_string(None) for table in tables]
    return (
        connection.execute(
            "SELECT FROM pg_class WHERE relrowsecurity AND oid = ANY(%s::regclass[])", (names,)
        ).rowcount
        > 0
    )


# ── taking it out ───────────────────────────────────────────────────────────────────────────────


def unprepare(
    connection: Connection, cell: Cell, progress: Progress, patience: Patience = Patience()
) -> Mapping[str, Any]:
    """Take out every trigger, function, table and grant that `prepare` made. Repeatable.

    Raises:
        Blocked: an organization is gated or captured in this cell.
        TransientError: a table's lock was not to be had; names who holds it.
    """
    _autocommit(connection)
    where = f"{cell.name}/{STORE}"
    if not _exists(connection):
        return {"tables": 0, "grants": 0}
    with _alone(connection, where):
        _refuse_if_gated(connection, where)
        tables = _take_out(connection, [], progress, patience, where)
        revokes = (
            [row[0] for row in connection.execute("SELECT revoke FROM cellferry.granted")]
            if _exists(connection, "granted")
            else []
        )

        def drop() -> None:
            _bound_waits(connection, patience)
            _refuse_if_gated(connection, where)
            for revoke in revokes:
                connection.execute(revoke.encode())
            connection.execute("DROP SCHEMA cellferry CASCADE")

        _patiently(connection, Name("cellferry", "gate"), drop, progress, patience, where)
    return {"tables": tables, "grants": len(revokes)}


def _exists(connection: Connection, table: str | None = None) -> bool:
    row = connection.execute(
        "SELECT to_regnamespace('cellferry') IS NOT NULL"
        if table is None
        else sql.SQL("SELECT to_regclass({}) IS NOT NULL").format(sql.Literal(f"cellferry.{table}"))
    ).fetchone()
    return row == (True,)


def _refuse_if_gated(connection: Connection, where: str) -> None:
    if not _exists(connection, "gate"):
        return
    rows = connection.execute(
        "SELECT organization, state, migration FROM cellferry.gate ORDER BY 1 LIMIT 5"
    ).fetchall()
    if rows:
        named = ", ".join(f"{name} ({state}, migration {number})" for name, state, number in rows)
        raise Blocked(
            f"organizations are gated here: {named}",
            hint="finish, clean up or abort their migrations first",
            where=where,
        )


def _take_out(
    connection: Connection, keep: list[Name], progress: Progress, patience: Patience, where: str
) -> int:
    """Drop our triggers from every table that is not in `keep`; return how many tables had any."""
    rows = connection.execute(
        """
        SELECT n.nspname, c.relname, array_agg(t.tgname::text)
        FROM pg_trigger AS t
        JOIN pg_class AS c ON c.oid = t.tgrelid
        JOIN pg_namespace AS n ON n.oid = c.relnamespace
        JOIN pg_proc AS p ON p.oid = t.tgfoid
        WHERE p.pronamespace = 'cellferry'::regnamespace AND t.tgparentid = 0
            AND n.nspname <> 'cellferry'
            AND COALESCE(pg_partition_root(c.oid), c.oid) <> ALL(%s::regclass[])
        GROUP BY 1, 2, c.relkind ORDER BY c.relkind, 1, 2
        """,
        ([name.identifier.as_string(None) for name in keep],),
    ).fetchall()
    for schema, relation, triggers in rows:
        table = Name(schema, relation)
        progress.check()
        progress.report(STORE, "unprepare", 0, None, "tables", str(table))

        def drop(table: Name = table, triggers: list[str] = triggers) -> None:
            _lock_table(connection, table, patience)
            for trigger in triggers:
                connection.execute(drop_trigger(trigger, table))
            connection.execute("DELETE FROM cellferry.installed WHERE what = %s", (str(table),))
            for kind in ("gate", "capture"):
                connection.execute(
                    sql.SQL("DROP FUNCTION IF EXISTS {}()").format(
                        sql.Identifier("cellferry", function_name(kind, table))
                    )
                )

        _patiently(connection, table, drop, progress, patience, where)
    return len(rows)
