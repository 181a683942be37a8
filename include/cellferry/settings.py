"""What a deployment configures: cells, stores, the topology; validated before anything runs.

`cells.yaml`::

    topology: {connection: cellferry-topology}
    organization: {data_map: data_maps/app.yaml}
    cells:
      cell-1:
        region: eu
        legacy: true
        stores:
          postgres: {connection: cell-1-postgres, admin_connection: cell-1-postgres-admin}
          redis:
            connection: cell-1-redis
            admin_connection: cell-1-redis-admin
            key_prefix: "org:{$organization}:"
            application_user: "org-$organization"

Names of connections, never URLs: secrets come from Airflow Connections, or without Airflow from
the environment (`CELLFERRY_CONN_CELL_1_POSTGRES`) or a file of `name: url` lines that only its
owner may read (`CELLFERRY_CONNECTIONS`).
"""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cellferry.errors import InvalidInput
from cellferry.model import Cell, Endpoint

#: Gives a connection's URL, or None when it does not know the name.
ConnectionSource = Callable[[str], str | None]

STORE_ORDER = ("postgres", "redis")
"""Order in which the stores of a move act; the first drains writers."""

STORE_OPTIONS: Mapping[str, frozenset[str]] = {
    "postgres": frozenset(
        {"capacity_bytes", "standbys_may_lag", "failover_candidates", "failover_wait_s"}
    ),
    "redis": frozenset({"key_prefix", "application_user", "failover", "trusted_users"}),
}
"""The options of each kind of store: a misspelt one must not go unnoticed."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StoreSettings(BaseModel):
    """One store of one cell; further keys are the store's own options."""

    model_config = ConfigDict(extra="allow", frozen=True)
    connection: str
    admin_connection: str | None = None


class ErrorLimits(_Strict):
    """From which rise of its servers' errors on a cell is halted; None watches nothing."""

    rollbacks_percent: float | None = Field(None, gt=0, le=100)
    """Percentage points by which the share of transactions that are rolled back may rise."""
    deadlocks_per_min: float | None = Field(None, gt=0)
    conflicts_per_min: float | None = Field(None, gt=0)
    """Queries cancelled on a standby for its recovery."""
    over_s: float = Field(60, ge=1, le=1_800)
    """How long a rise must be looked at, in seconds."""
    least_transactions: int = Field(200, ge=1)
    """With fewer transactions in that time a share says nothing."""


class CellSettings(_Strict):
    """One cell."""

    region: str = "local"
    legacy: bool = False
    stores: dict[str, StoreSettings] = Field(min_length=1)
    halts_at: ErrorLimits | None = None


class TopologySettings(_Strict):
    """Where the topology database is."""

    connection: str = "cellferry-topology"


class OrganizationSettings(_Strict):
    """How organizations are found in the stores."""

    data_map: Path | None = None
    smoke_queries: Path | None = None


class Settings(_Strict):
    """The whole of `cells.yaml`."""

    topology: TopologySettings = TopologySettings()
    organization: OrganizationSettings = OrganizationSettings()
    cells: dict[str, CellSettings] = Field(min_length=1)

    @model_validator(mode="after")
    def _same_stores_everywhere(self) -> Settings:
        kinds = {name: sorted(cell.stores) for name, cell in self.cells.items()}
        if len({tuple(kind) for kind in kinds.values()}) > 1:
            raise ValueError(f"every cell must have the same stores, found {kinds}")
        return self

    @model_validator(mode="after")
    def _options_are_known(self) -> Settings:
        faults = [
            f"cells.{name}.stores.{kind}.{option}: there is no such option"
            + _guess(option, STORE_OPTIONS[kind] | set(StoreSettings.model_fields))
            for name, cell in self.cells.items()
            for kind, store in cell.stores.items()
            if kind in STORE_OPTIONS
            for option in sorted(set(store.model_extra or {}) - STORE_OPTIONS[kind])
        ]
        for name, cell in self.cells.items():
            found = (cell.stores["postgres"].model_extra or {}) if "postgres" in cell.stores else {}
            capacity = found.get("capacity_bytes", 1)
            if type(capacity) is not int or capacity < 1:
                faults.append(
                    f"cells.{name}.stores.postgres.capacity_bytes: {capacity!r} is not a whole "
                    "number of bytes"
                )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def store_kinds(self) -> tuple[str, ...]:
        """Kinds of the configured stores, in the order in which they act."""
        found = set(next(iter(self.cells.values())).stores)
        return tuple(kind for kind in STORE_ORDER if kind in found) + tuple(
            sorted(found - set(STORE_ORDER))
        )

    def cell(self, name: str, connections: ConnectionSource) -> Cell:
        """Return the cell called `name` with its endpoints resolved.

        Raises:
            InvalidInput: no such cell, or a connection that nobody knows.
        """
        if name not in self.cells:
            raise InvalidInput(
                f"there is no cell {name!r}", hint=f"choose one of {', '.join(sorted(self.cells))}"
            )
        settings = self.cells[name]
        return Cell(
            name=name,
            region=settings.region,
            legacy=settings.legacy,
            stores={
                kind: Endpoint(
                    url=resolve(store.connection, connections),
                    admin_url=resolve(store.admin_connection, connections)
                    if store.admin_connection
                    else None,
                    options=store.model_extra or {},
                )
                for kind, store in settings.stores.items()
            },
        )


def load(path: Path) -> Settings:
    """Read and validate `cells.yaml`.

    Raises:
        InvalidInput: the file is missing or wrong; names the place in it.
    """
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InvalidInput(
            f"no such file: {path}", hint="set CELLFERRY_CONFIG to your cells.yaml"
        ) from error
    except OSError as error:
        raise InvalidInput(
            f"cannot read {path}: {error.strerror}",
            hint="set CELLFERRY_CONFIG to a cells.yaml that this user may read",
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInput(
            f"{path} is not YAML: {' '.join(str(error).split())}", hint=_GUIDE
        ) from error
    if not isinstance(raw, dict):
        found = "is empty" if raw is None else f"holds a {type(raw).__name__}, not settings"
        raise InvalidInput(f"{path} {found}", hint=_GUIDE)
    try:
        settings = Settings.model_validate(raw)
    except ValidationError as error:
        faults = "; ".join(
            "".join(f"{part}." for part in fault["loc"])[:-1]
            + (": " if fault["loc"] else "")
            + (
                "there is no such setting" + _guess(str(fault["loc"][-1]), _names())
                if fault["type"] == "extra_forbidden"
                else fault["msg"].removeprefix("Value error, ")
            )
            for fault in error.errors()
        )
        raise InvalidInput(f"{path}: {faults}", hint=_GUIDE) from error
    files = {
        name: path.parent / file  # an absolute one stays as it is
        for name, file in settings.organization
        if isinstance(file, Path)
    }
    return settings.model_copy(
        update={"organization": settings.organization.model_copy(update=files)}
    )


_GUIDE = "docs/platform-guide.md shows a whole cells.yaml"


def _guess(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _names() -> set[str]:
    """Names of all settings but the stores' own options."""
    models: tuple[type[BaseModel], ...] = (
        Settings, TopologySettings, OrganizationSettings, CellSettings, StoreSettings, ErrorLimits,
    )  # fmt: skip
    return {name for model in models for name in model.model_fields}


def default_path() -> Path:
    """`CELLFERRY_CONFIG`, else `include/config/cells.yaml` below the working directory."""
    return Path(os.environ.get("CELLFERRY_CONFIG", "include/config/cells.yaml"))


def resolve(name: str, connections: ConnectionSource) -> str:
    """Return the URL of connection `name`.

    Raises:
        InvalidInput: nobody knows it, or a password is written into it in a way that would make
            a part of it a host or a port, and show it. The message never shows the URL.
    """
    url = connections(name)
    if url is None:
        raise InvalidInput(
            f"connection {name!r} is not defined",
            hint=f"define an Airflow Connection {name!r} or the variable {variable(name)}",
        )
    if "://" in url and not _is_plain(url):
        raise InvalidInput(
            f"the URL of connection {name!r} cannot be read: its host or port is wrong",
            hint="write scheme://user:password@host:port/database, and in the password %40 for @, "
            "%2F for /, %23 for #, %3F for ?",
        )
    return url


def _is_plain(url: str) -> bool:
    """Whether user, password, host and port can be told apart without doubt."""
    try:
        parts = urlsplit(url)
        login, _, places = parts.netloc.rpartition("@")
        ports = [place.rpartition("]")[2].partition(":")[2] for place in places.split(",")]
    except ValueError:
        return False
    return "@" not in login + parts.path + parts.query + parts.fragment and all(
        not port or (port.isascii() and port.isdigit()) for port in ports
    )


def variable(name: str) -> str:
    """The environment variable that holds connection `name`."""
    return "CELLFERRY_CONN_" + name.upper().replace("-", "_")


def from_environment(environ: Mapping[str, str] | None = None) -> ConnectionSource:
    """Connections from the environment, then from the file that `CELLFERRY_CONNECTIONS` names."""
    env = os.environ if environ is None else environ
    file_urls: dict[str, str] = {}
    if location := env.get("CELLFERRY_CONNECTIONS"):
        path = Path(location)
        if not path.is_file():
            raise InvalidInput(
                f"CELLFERRY_CONNECTIONS names no file: {path}",
                hint="correct the variable, or remove it and define the connections one by one",
            )
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise InvalidInput(
                f"{path} holds secrets and others may read it", hint=f"chmod 600 {path}"
            )
        file_urls = _read_connections(path)

    def source(name: str) -> str | None:
        return env.get(variable(name)) or file_urls.get(name)

    return source


def _read_connections(path: Path) -> dict[str, str]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict) or not all(
        isinstance(text, str) for entry in found.items() for text in entry
    ):
        # not even the place in the file: the parser's message quotes it, and it holds secrets
        raise InvalidInput(
            f"{path} is not a file of connections", hint="write one `name: url` a line"
        )
    return found
