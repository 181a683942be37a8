"""Makes the application's schema, roles and Redis users in a cell. May be repeated."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources

import psycopg
import redis
from psycopg import sql

from cellferry.local.application.places import (
    APP,
    OWNER,
    Place,
    acl_user,
    gate_key,
    key,
    password,
)

#: Identities and sequences of cell n give ids from n times this on: they never collide.
RANGE = 1_000_000_000_000


def provision(place: Place) -> None:
    """Make roles, schema, grants, sequence ranges and the rows that every cell has."""
    with psycopg.connect(place.postgres, connect_timeout=10) as connection:
        # Roles belong to the whole server: provisioners of several databases may meet here.
        connection.execute("SELECT pg_advisory_xact_lock(hashtext('sample application roles'))")
        _make_role(connection, OWNER, sql.SQL("NOLOGIN"))
        _make_role(
            connection,
            APP,
            sql.SQL("LOGIN PASSWORD {}").format(sql.Literal(password(place.secret, APP))),
        )
        database = sql.Identifier(connection.info.dbname)
        connection.execute(sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(_name(OWNER)))
        connection.execute(
            sql.SQL("GRANT CONNECT, TEMPORARY ON DATABASE {} TO {}").format(database, _name(APP))
        )
    with psycopg.connect(place.postgres, connect_timeout=10) as connection:
        connection.execute(sql.SQL("SET LOCAL ROLE {}").format(_name(OWNER)))
        if connection.execute("SELECT to_regclass('public.issues')").fetchone() == (None,):
            connection.execute(_script("schema.sql"))
        connection.execute(
            sql.SQL(
                "GRANT USAGE ON SCHEMA public TO {app};"
                "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {app};"
                "GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {app}"
            ).format(app=_name(APP))
        )
        connection.execute(_script("fixed_rows.sql"))
        _give_ranges(connection, place.number)
        connection.execute(
            "INSERT INTO cell_settings (name, value) VALUES ('cell', to_jsonb(%s::text))"
            " ON CONFLICT (name) DO NOTHING",
            (place.name,),
        )


def provision_organizations(place: Place, organizations: Iterable[str]) -> None:
    """Make the ACL user of each organization in this cell's Redis.

    The organization's user may do everything with the organization's keys, and read its gate.
    """
    with redis.Redis.from_url(place.redis, decode_responses=True) as client:
        pipeline = client.pipeline(transaction=False)
        known = set(client.acl_users())
        for organization in organizations:
            user = acl_user(organization)
            secret = f">{password(place.secret, user)}"
            if user in known:  # it may be gated: a repetition must not open it
                pipeline.execute_command("ACL", "SETUSER", user, "resetpass", secret)
                continue
            pipeline.execute_command(
                *("ACL", "SETUSER", user, "reset", "on", secret),
                *(f"~{key(organization, '*')}", f"%R~{gate_key(organization)}"),
                *("+@all", "-@admin", "-@dangerous", "+info"),
            )
        pipeline.execute()
        if client.config_get("aclfile").get("aclfile"):
            client.execute_command("ACL", "SAVE")


def _name(role: str) -> sql.Identifier:
    return sql.Identifier(role)


def _make_role(
    connection: psycopg.Connection[tuple[object, ...]], role: str, options: sql.Composable
) -> None:
    exists = connection.execute("SELECT FROM pg_roles WHERE rolname = %s", (role,)).fetchone()
    verb = sql.SQL("CREATE") if exists is None else sql.SQL("ALTER")
    connection.execute(sql.SQL("{} ROLE {} {}").format(verb, _name(role), options))
    if role == OWNER:
        connection.execute(sql.SQL("GRANT {} TO CURRENT_USER").format(_name(role)))


def _give_ranges(connection: psycopg.Connection[tuple[object, ...]], number: int) -> None:
    low = number * RANGE + 1
    sequences = connection.execute(
        "SELECT sequencename::text FROM pg_sequences WHERE schemaname = 'public'"
        " AND min_value <> %s ORDER BY 1",
        (low,),
    ).fetchall()
    for (sequence,) in sequences:
        connection.execute(
            sql.SQL("ALTER SEQUENCE {} MINVALUE {} MAXVALUE {} START {} RESTART").format(
                sql.Identifier(str(sequence)),
                sql.Literal(low),
                sql.Literal((number + 1) * RANGE),
                sql.Literal(low),
            )
        )


def _script(name: str) -> sql.SQL:
    text = resources.files("cellferry.local.application").joinpath(name).read_text("utf-8")
    return sql.SQL(text)
