"""One local fleet for all whole-Airflow tests: to start it takes longer than most of them.

It ends with the last of them: its Airflow takes a quarter of two processors without doing anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cellferry.local.fleet import Fleet


@pytest.fixture(scope="package")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Three cells, a topology and an Airflow."""
    made = Fleet(Path(__file__).parents[2], state=tmp_path_factory.mktemp("fleet"))
    try:
        made.up(airflow=True)
        yield made
    finally:
        made.down()
        made.wipe()
