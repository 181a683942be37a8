"""Airflow Connections become URLs that the drivers read back as they were meant."""

from __future__ import annotations

import json

import pytest
from airflow.sdk import Connection
from psycopg.conninfo import conninfo_to_dict
from redis.connection import parse_url

from cellferry.errors import InvalidInput
from cellferry.orchestration.connections import url_of

AWKWARD = "p@ss/w:rd ?#%é"


def test_postgres_keeps_every_part() -> None:
    url = url_of(
        Connection(
            conn_id="c",
            conn_type="postgres",
            host="127.0.0.1",
            port=5433,
            login="mo ver",
            password=AWKWARD,
            schema="app db",
            extra=json.dumps({"sslmode": "require", "connect_timeout": 3, "nested": {"a": 1}}),
        )
    )
    assert conninfo_to_dict(url) == {
        "host": "127.0.0.1",
        "port": "5433",
        "user": "mo ver",
        "password": AWKWARD,
        "dbname": "app db",
        "sslmode": "require",
        "connect_timeout": 3,
    } | {"connect_timeout": "3"}


def test_postgres_reads_what_airflow_reads_from_a_uri() -> None:
    connection = Connection(conn_id="c", uri="postgres://u:p%40ss@db.example:5432/app")
    assert conninfo_to_dict(url_of(connection)) == {
        "host": "db.example",
        "port": "5432",
        "user": "u",
        "password": "p@ss",
        "dbname": "app",
    }


def test_a_socket_folder_is_a_host() -> None:
    connection = Connection(
        conn_id="c", conn_type="postgres", schema="app", extra=json.dumps({"host": "/run/pg"})
    )
    assert conninfo_to_dict(url_of(connection)) == {"host": "/run/pg", "dbname": "app"}


def test_an_ipv6_address_is_bracketed() -> None:
    connection = Connection(conn_id="c", conn_type="postgres", host="::1", port=5432)
    assert conninfo_to_dict(url_of(connection))["host"] == "::1"


@pytest.mark.parametrize("place", [{"schema": "3"}, {"extra": json.dumps({"db": 3})}])
def test_redis_keeps_every_part(place: dict[str, str]) -> None:
    connection = Connection(
        conn_id="c", conn_type="redis", host="h", port=6380, login="m", password=AWKWARD, **place
    )
    parsed = parse_url(url_of(connection))
    assert (parsed["host"], parsed["port"], parsed["db"]) == ("h", 6380, 3)
    assert (parsed["username"], parsed["password"]) == ("m", AWKWARD)


def test_redis_over_tls() -> None:
    connection = Connection(
        conn_id="c", conn_type="redis", host="h", extra=json.dumps({"ssl": True})
    )
    assert url_of(connection).startswith("rediss://h")


def test_another_type_is_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match="'cell-1-postgres' has the type 'mysql'"):
        url_of(Connection(conn_id="cell-1-postgres", conn_type="mysql"))
