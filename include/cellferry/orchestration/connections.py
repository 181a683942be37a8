"""Airflow Connections as the URLs that cellferry's stores take; their secrets are masked.

One Connection for each cell, store and role, named as in `cells.yaml` (`cell-2-postgres`,
`cell-2-postgres-admin`), and one for the topology.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlencode, urlsplit

from cellferry.errors import InvalidInput
from cellferry.settings import from_environment

if TYPE_CHECKING:
    from airflow.sdk import Connection

#: Airflow's connection type → the scheme that our clients take.
SCHEMES: Mapping[str, str] = {
    "postgres": "postgresql",
    "postgresql": "postgresql",
    "redis": "redis",
    "rediss": "rediss",
    "valkey": "redis",
}


class AirflowConnections:
    """A `ConnectionSource` that asks Airflow, then the environment.

    Each connection is asked for once. Its password, plain and as written in the URL, is masked in
    every log of the process; `hide` masks it in other texts.
    """

    def __init__(self) -> None:
        self._elsewhere = from_environment()
        self._seen: dict[str, str | None] = {}
        self._secrets: set[str] = set()

    def __call__(self, name: str) -> str | None:
        """Return the URL of connection `name`, or None when nobody knows it."""
        if name not in self._seen:
            url = self._ask_airflow(name) or self._elsewhere(name)
            if url is not None and (written := urlsplit(url).password):
                self._mask({written, unquote(written)})
            self._seen[name] = url
        return self._seen[name]

    def hide(self, text: str) -> str:
        """Return `text` without the secrets of the connections asked for."""
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text

    def _mask(self, secrets: set[str]) -> None:
        from airflow.sdk.log import mask_secret

        self._secrets |= secrets
        for secret in secrets:
            mask_secret(secret)

    @staticmethod
    def _ask_airflow(name: str) -> str | None:
        from airflow.sdk import BaseHook
        from airflow.sdk.exceptions import AirflowNotFoundException

        try:
            return url_of(BaseHook.get_connection(name))
        except AirflowNotFoundException:
            return None


def url_of(connection: Connection) -> str:
    """Return the URL of an Airflow Connection.

    The extra's text and numbers become the query (`sslmode`, `connect_timeout`); for redis, the
    schema or the extra's `db` is the database, and `ssl: true` makes it `rediss`.

    Raises:
        InvalidInput: its type is neither postgres nor redis.
    """
    kind = (connection.conn_type or "").lower()
    if kind not in SCHEMES:
        raise InvalidInput(
            f"connection {connection.conn_id!r} has the type {kind!r}",
            hint=f"its type must be one of {', '.join(sorted(SCHEMES))}",
        )
    scheme = SCHEMES[kind]
    extra: dict[str, Any] = dict(connection.extra_dejson)
    database = connection.schema or ""
    if scheme == "redis":
        database = database or str(extra.pop("db", "") or "")
        if extra.pop("ssl", False) in (True, "true", "True", "1", 1):
            scheme = "rediss"
    login = ""
    if connection.login or connection.password:
        login = quote(connection.login or "", safe="")
        if connection.password:
            login += ":" + quote(connection.password, safe="")
        login += "@"
    host = connection.host or ""
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    place = quote(host, safe="[]:,") + (f":{connection.port}" if connection.port else "")
    query = {
        key: _text(value)
        for key, value in extra.items()
        if isinstance(value, str | int | float | bool)
    }
    url = f"{scheme}://{login}{place}"
    if database:
        url += "/" + quote(database, safe="")
    return url + ("?" + urlencode(query) if query else "")


def _text(value: str | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
