"""Where the fleet keeps what: data, logs, records, ports and secrets below `.local/`."""

from __future__ import annotations

import base64
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cellferry import settings
from cellferry.settings import Settings


@dataclass(frozen=True, slots=True)
class FleetLayout:
    """The folders and files of one fleet.

    Attributes:
        root: the project's folder, with `dags/`, `plugins/` and `include/config/`.
        state: the fleet's own folder.
    """

    root: Path
    state: Path

    @classmethod
    def of(cls, root: Path, state: Path | None = None) -> FleetLayout:
        """Layout of the project in `root`; `state` is `.local` in it if None."""
        root = root.resolve()
        return cls(root, (state or root / ".local").resolve())

    @property
    def config(self) -> Path:
        """The `cells.yaml` that says which cells the fleet has."""
        return self.root / "include" / "config" / "cells.yaml"

    @property
    def cells(self) -> Path:
        """Data of the cells' servers."""
        return self.state / "cells"

    @property
    def topology(self) -> Path:
        """Data of the topology's server."""
        return self.state / "topology"

    @property
    def airflow(self) -> Path:
        """AIRFLOW_HOME."""
        return self.state / "airflow"

    @property
    def run(self) -> Path:
        """Records of running processes."""
        return self.state / "run"

    @property
    def logs(self) -> Path:
        """Logs of the supervisor and of Airflow's components."""
        return self.state / "log"

    @property
    def events(self) -> Path:
        """What the supervisor says while it starts the fleet, one JSON object a line."""
        return self.run / "events.jsonl"

    @property
    def airflow_wanted(self) -> Path:
        """A file that is there while the fleet is to run Airflow too."""
        return self.run / "airflow.wanted"

    @property
    def connections(self) -> Path:
        """`name: url` of every connection, for `CELLFERRY_CONNECTIONS` and for Airflow."""
        return self.state / "connections.yaml"

    @property
    def secrets(self) -> Path:
        """The fleet's passwords."""
        return self.state / "secrets.yaml"

    @property
    def ports(self) -> Path:
        """Ports that were used last, preferred at the next start."""
        return self.state / "ports.yaml"

    def settings(self) -> Settings:
        """The deployment: which cells there are."""
        return settings.load(self.config)

    def read_ports(self) -> dict[str, int]:
        """Component → the port it had last."""
        return dict(_read(self.ports))

    def write_ports(self, ports: Mapping[str, int]) -> None:
        """Remember the components' ports."""
        write_private(self.ports, yaml.safe_dump(dict(ports)))

    def read_connections(self) -> dict[str, str]:
        """Name → URL of every connection; empty before the first start."""
        return dict(_read(self.connections))

    def write_connections(self, connections: Mapping[str, str]) -> None:
        """Write the connections for the command line and for Airflow."""
        write_private(self.connections, yaml.safe_dump(dict(connections)))

    def read_secrets(self, cells: Sequence[str]) -> FleetSecrets:
        """The fleet's passwords; makes those that are missing."""
        known = _read(self.secrets)
        made = FleetSecrets.completed(known, cells)
        if made.values != known:
            write_private(self.secrets, yaml.safe_dump(dict(made.values)))
        return made


@dataclass(frozen=True, slots=True, repr=False)
class FleetSecrets:
    """Random passwords and keys of one fleet."""

    values: Mapping[str, Any]

    @classmethod
    def completed(cls, known: Mapping[str, Any], cells: Sequence[str]) -> FleetSecrets:
        """Return the known secrets and new ones for whatever is missing."""
        airflow = {
            "admin_password": secrets.token_urlsafe(12),
            "metadata_password": secrets.token_urlsafe(24),
            "jwt_secret": secrets.token_urlsafe(48),
            "secret_key": secrets.token_urlsafe(32),
            "fernet_key": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
        }
        found = known.get("cells", {})
        return cls(
            {
                "airflow": {**airflow, **known.get("airflow", {})},
                "topology": known.get("topology") or secrets.token_urlsafe(24),
                "cells": {
                    **found,
                    **{
                        cell: {
                            "mover": secrets.token_urlsafe(24),
                            "admin": secrets.token_urlsafe(24),
                            **found.get(cell, {}),
                        }
                        for cell in cells
                    },
                },
            }
        )

    def airflow(self, name: str) -> str:
        """One of Airflow's secrets."""
        return str(self.values["airflow"][name])

    @property
    def topology(self) -> str:
        """Password of the topology's role."""
        return str(self.values["topology"])

    def cell(self, cell: str, role: str) -> str:
        """Password of `mover` or `admin` in a cell."""
        return str(self.values["cells"][cell][role])


def write_private(path: Path, text: str) -> None:
    """Write a file of mode 600, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.new")
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    beside.replace(path)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return content
