"""Databases and roles of the fleet's PostgreSQL servers, users of its Valkey servers.

A cell's PostgreSQL has the database `app`, owned by `app_owner`; `app` logs in for the
application, `cellferry_mover` for the mover and `cellferry_admin` (in the local fleet a
superuser) to prepare the cell and manage gates. A cell's Valkey has `cellferry-admin`, and
`cellferry-mover`, which reads no key by itself: an attempt's own user does.
"""

from __future__ import annotations

from collections.abc import Mapping

import psycopg
import redis
from psycopg import sql

from cellferry.local.fleet_layout import FleetSecrets
from cellferry.local.postgres_server import PostgresServer
from cellferry.local.valkey_server import ValkeyServer

DATABASE = "app"
OWNER = "app_owner"
APPLICATION = "app"
MOVER = "cellferry_mover"
ADMIN = "cellferry_admin"
TOPOLOGY = "cellferry"
METADATA = "airflow"
VALKEY_MOVER = "cellferry-mover"


def provision_cell(
    cell: str, postgres: PostgresServer, valkey: ValkeyServer, secrets: FleetSecrets
) -> None:
    """Make the cell's database, roles and users. May be repeated; sets the passwords again."""
    with psycopg.connect(postgres.url(), autocommit=True) as connection:
        _make_role(connection, OWNER, login=False)
        _make_role(connection, APPLICATION, login=True)
        _make_role(connection, MOVER, secrets.cell(cell, "mover"), login=True)
        _make_role(connection, ADMIN, secrets.cell(cell, "admin"), login=True, superuser=True)
        _make_database(connection, DATABASE, OWNER)
    with redis.Redis.from_url(valkey.url(), decode_responses=True) as client:
        client.execute_command(
            *("ACL", "SETUSER", VALKEY_MOVER, "reset", "on"),
            f">{secrets.cell(cell, 'mover')}",
            *("-@all", "+@connection", "+info", "+dbsize", "+scan"),
        )
        client.acl_save()


def provision_topology(server: PostgresServer, secrets: FleetSecrets) -> None:
    """Make the topology's database and Airflow's. May be repeated."""
    with psycopg.connect(server.url(), autocommit=True) as connection:
        for name, password in (
            (TOPOLOGY, secrets.topology),
            (METADATA, secrets.airflow("metadata_password")),
        ):
            _make_role(connection, name, password, login=True)
            _make_database(connection, name, name)
        # A killed scheduler's session must not hold its locks until the network gives up. The
        # metadata can lose their last moment: steps may be repeated, truth is elsewhere.
        _set(
            connection,
            METADATA,
            {"idle_in_transaction_session_timeout": "60s", "synchronous_commit": "off"},
        )


def _make_role(
    connection: psycopg.Connection[tuple[object, ...]],
    name: str,
    password: str | None = None,
    *,
    login: bool,
    superuser: bool = False,
) -> None:
    exists = connection.execute("SELECT FROM pg_roles WHERE rolname = %s", (name,)).fetchone()
    words = [
        sql.SQL("CREATE ROLE" if exists is None else "ALTER ROLE"),
        sql.Identifier(name),
        sql.SQL("LOGIN" if login else "NOLOGIN"),
    ]
    if superuser:
        words.append(sql.SQL("SUPERUSER"))
    if password is not None:
        words += [sql.SQL("PASSWORD"), sql.Literal(password)]
    connection.execute(sql.SQL(" ").join(words))


def _make_database(
    connection: psycopg.Connection[tuple[object, ...]], name: str, owner: str
) -> None:
    found = connection.execute("SELECT FROM pg_database WHERE datname = %s", (name,)).fetchone()
    if found is None:
        connection.execute(
            sql.SQL("CREATE DATABASE {} OWNER {} STRATEGY wal_log").format(
                sql.Identifier(name), sql.Identifier(owner)
            )
        )


def _set(
    connection: psycopg.Connection[tuple[object, ...]], database: str, values: Mapping[str, str]
) -> None:
    for name, value in values.items():
        connection.execute(
            sql.SQL("ALTER DATABASE {} SET {} TO {}").format(
                sql.Identifier(database), sql.Identifier(name), sql.Literal(value)
            )
        )
