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

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cellferry.errors import InvalidInput
from cellferry.model import Cell, Endpoint

#: Gives a connection's URL, or None when it does not know the name.
ConnectionSource = Callable[[str], str | None]

STORE_ORDER = ("postgres", "redis")
"""Order in which the stores of a move act; the first drains writers."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StoreSettings(BaseModel):
    """One store of one cell; further keys are the store's own options."""

    model_config = ConfigDict(extra="allow", frozen=True)
    connection: str
    admin_connection: str | None = None


class CellSettings(_Strict):
    """One cell."""

    region: str = "local"
    legacy: bool = False
    stores: dict[str, StoreSettings] = Field(min_length=1)


class TopologySettings(_Strict):
    """Where the topology database is."""

    connection: str = "cellferry-topology"


class OrganizationSettings(_Strict):
    """How organizations are found in the stores."""

    data_map: Path | None = None


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
                    admin_url=connections(store.admin_connection)
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
    except yaml.YAMLError as error:
        raise InvalidInput(f"{path} is not YAML: {error}") from error
    try:
        settings = Settings.model_validate(raw)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in fault['loc']) or 'file'}: {fault['msg']}"
            for fault in error.errors()
        )
        raise InvalidInput(f"{path}: {faults}", hint="see docs/platform-guide.md") from error
    data_map = settings.organization.data_map
    if data_map is not None and not data_map.is_absolute():
        resolved = OrganizationSettings(data_map=path.parent / data_map)
        settings = settings.model_copy(update={"organization": resolved})
    return settings


def default_path() -> Path:
    """`CELLFERRY_CONFIG`, else `include/config/cells.yaml` below the working directory."""
    return Path(os.environ.get("CELLFERRY_CONFIG", "include/config/cells.yaml"))


def resolve(name: str, connections: ConnectionSource) -> str:
    """Return the URL of connection `name`.

    Raises:
        InvalidInput: nobody knows it.
    """
    url = connections(name)
    if url is None:
        raise InvalidInput(
            f"connection {name!r} is not defined",
            hint=f"define an Airflow Connection {name!r} or the variable {variable(name)}",
        )
    return url


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
            raise InvalidInput(f"CELLFERRY_CONNECTIONS names no file: {path}")
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise InvalidInput(
                f"{path} holds secrets and others may read it", hint=f"chmod 600 {path}"
            )
        file_urls = yaml.safe_load(path.read_text(encoding="utf-8")) or {}

    def source(name: str) -> str | None:
        return env.get(variable(name)) or file_urls.get(name)

    return source
