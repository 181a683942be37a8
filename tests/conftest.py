"""Registers the fixture plugins: one file for each kind of server, in `tests/fixtures`."""

from hypothesis import HealthCheck, settings

# A test that searches is not to fail because the machine is slow, or stands still for a moment.
settings.register_profile("cellferry", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cellferry")

pytest_plugins = [
    "fixtures.patience",
    "fixtures.interrupts",
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
