"""Registers the fixture plugins: one file for each kind of server, in `tests/fixtures`."""

pytest_plugins = [
    "fixtures.postgres",
    "fixtures.valkey",
    "fixtures.ferry",
    "fixtures.sample",
    "fixtures.cells",
    "fixtures.topology",
    "fixtures.severed_network",
    "fixtures.gated",
    "fixtures.standby",
    "fixtures.shards",
    "fixtures.moving_shards",
]
