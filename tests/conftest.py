"""Registers the fixture plugins: one file for each kind of server, in `tests/fixtures`."""

from hypothesis import settings

# A test that searches is not to fail because the machine is slow.
settings.register_profile("cellferry", deadline=None)
settings.load_profile("cellferry")

pytest_plugins = [
    "fixtures.postgres",
    "fixtures.valkey",
    "fixtures.ferry",
    "fixtures.topology",
    "fixtures.sample",
    "fixtures.cells",
    "fixtures.severed_network",
    "fixtures.gated",
    "fixtures.standby",
    "fixtures.shards",
    "fixtures.moving_shards",
]
