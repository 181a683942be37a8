"""Hooks that Airflow loads in every component: settings that its configuration cannot say.

In the scheduler it imports, once, what every task would import after the fork: a task's start
then costs 0.06 CPU-seconds of imports instead of 0.34. Restart the scheduler after changing the
library. Airflow itself is not imported here: this module is part of its import.

Everywhere it lets Python look for garbage less often. Cycles are few, and what is imported stays:
with the usual threshold of 700 objects the looking takes 4 % of a task's processor time, and more
of the API server's. Cycles wait longer meanwhile, in some megabytes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys

_EVERY_TASK_IMPORTS = (
    "hiredis",
    "psycopg",
    "pydantic",
    "redis",
    "yaml",
    "cellferry.migration.steps",
    "cellferry.migration.context",
    "cellferry.settings",
    "cellferry.stores.postgres.store",
    "cellferry.stores.redis.store",
    "cellferry.topology",
)


_OBJECTS_BETWEEN_COLLECTIONS = 20_000


def loopback() -> str:
    """Host name of the local fleet's components: `[core] hostname_callable` names it.

    Nothing of the local fleet is reachable from elsewhere, and no name service is asked.
    """
    return "127.0.0.1"


gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS, *gc.get_threshold()[1:])

if "scheduler" in sys.argv[1:2]:
    for _module in _EVERY_TASK_IMPORTS:
        # A task that really needs a missing module will say so itself.
        with contextlib.suppress(ImportError):
            importlib.import_module(_module)
