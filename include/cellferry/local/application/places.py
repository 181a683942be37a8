"""Where the sample application's cells are and who it is there: URLs, users, passwords.

The application has its own credentials: role `app` in PostgreSQL, and one ACL user for each
organization in Redis. Their passwords derive from one secret in a file of mode 600.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from cellferry.settings import ConnectionSource, resolve

OWNER = "app_owner"
APP = "app"


@dataclass(frozen=True, slots=True)
class Place:
    """One cell as the application's deployer sees it. The URLs are an administrator's."""

    name: str
    number: int
    """1 for the first cell; chooses the range of its sequences."""
    postgres: str = field(repr=False)
    redis: str = field(repr=False)
    secret: str = field(repr=False)

    @property
    def app_postgres(self) -> str:
        """URL of the application's role in this cell's database."""
        return as_user(self.postgres, APP, password(self.secret, APP))

    def app_redis(self, organization: str) -> str:
        """URL of `organization`'s ACL user in this cell's Redis."""
        user = acl_user(organization)
        return as_user(self.redis, user, password(self.secret, user))


def places(
    cells: Sequence[str], connections: ConnectionSource, directory: Path
) -> Mapping[str, Place]:
    """Return the cells by name; makes the application's secret in `directory` if absent."""
    secret = _secret(directory / "secret")
    return {
        name: Place(
            name=name,
            number=number,
            postgres=resolve(f"{name}-postgres-admin", connections),
            redis=resolve(f"{name}-redis-admin", connections),
            secret=secret,
        )
        for number, name in enumerate(cells, start=1)
    }


def acl_user(organization: str) -> str:
    """Name of the organization's user in Redis."""
    return f"org-{organization}"


def key(organization: str, *parts: str) -> str:
    """Name of a key in Redis; the braces keep an organization's keys in one slot."""
    return ":".join((f"org:{{{organization}}}", *parts))


def gate_key(organization: str) -> str:
    """Name of the key in which the mover says who has authority."""
    return f"cellferry:gate:{{{organization}}}"


def password(secret: str, user: str) -> str:
    """Derive a user's password."""
    return hmac.new(secret.encode(), user.encode(), hashlib.sha256).hexdigest()[:32]


def as_user(url: str, user: str, secret: str) -> str:
    """Return `url` with another user."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{quote(user, safe='')}:{quote(secret)}@{host}"))


def _secret(path: Path) -> str:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
    return path.read_text(encoding="ascii").strip()
