"""The data map of a cell, for people who review it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cellferry.settings import ConnectionSource, Settings

if TYPE_CHECKING:
    from cellferry.stores.postgres.schema import DataMap


def discover_map(settings: Settings, connections: ConnectionSource, cell: str) -> DataMap:
    """Discover the data map of `cell`'s PostgreSQL, completed by the configured file. Read-only.

    Raises:
        InvalidInput: no such cell, or the file names what does not exist.
        UnsupportedSchema: the organization's table is not found or not unique.
    """
    from cellferry.stores.postgres import data_map, data_map_file, sessions

    endpoint = settings.cell(cell, connections).stores["postgres"]
    path = settings.organization.data_map
    completion = data_map_file.load(path) if path is not None else None
    with sessions.connect(
        endpoint.admin_url or endpoint.url, purpose="map", where=f"{cell}/postgres"
    ) as connection:
        return data_map.discover(connection, completion)
