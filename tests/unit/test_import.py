"""The library is light: applications and every task import it."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.strip()


def test_the_library_imports_no_airflow() -> None:
    loaded = run(
        "import sys, cellferry, cellferry.migration, cellferry.routing, cellferry.cli\n"
        "import cellferry.stores.postgres.store, cellferry.stores.redis.store\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('airflow', 'sqlalchemy')])"
    )
    assert loaded == "[]"


def test_the_import_takes_little_processor_time() -> None:
    """The least of five, in seconds of the processor: a busy machine cannot make it longer.

    A slow one can: so the driver, which is most of it, is left out.
    """
    code = (
        "import time, psycopg; before = time.process_time(); import cellferry, cellferry.routing;"
        "print(time.process_time() - before)"
    )
    assert min(float(run(code)) for _ in range(5)) < 0.5
