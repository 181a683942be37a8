"""Registers the fixture plugins: one file for each kind of server, in `tests/fixtures`."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from tests.in_memory import use_memory

use_memory()

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

#: Folders in which a test takes longest, in this order; files elsewhere come by their length.
_LONG = ("e2e", "fault", "model", "integration")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let files that take long begin first, so that in the end no process waits for one."""
    sizes = Counter(item.path for item in items)

    def place(item: pytest.Item) -> tuple[int, int, str]:
        folder = item.path.parent.name
        rank = _LONG.index(folder) if folder in _LONG else len(_LONG)
        return rank, -sizes[item.path], str(item.path)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let one process run a file; and one all of `e2e`, whose Airflow is the largest thing here."""
    from xdist.scheduler import LoadFileScheduling

    if config.getvalue("dist") != "loadfile":
        return None

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/e2e" if nodeid.startswith("tests/e2e/") else super()._split_scope(nodeid)

    return ByFile(config, log)
