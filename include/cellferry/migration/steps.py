"""All steps, by name. Each may be repeated, and none needs Airflow."""

from __future__ import annotations

from datetime import datetime

from cellferry.errors import WrongState
from cellferry.migration.abort import abort
from cellferry.migration.cleanup import cleanup
from cellferry.migration.context import Context
from cellferry.migration.copy import copy
from cellferry.migration.cutover import cutover
from cellferry.migration.halts import clear_halt, halt, halts, watch
from cellferry.migration.pause import give_up_log, pause, resume
from cellferry.migration.plan import plan
from cellferry.migration.prepare import check_cell, prepare_cell, unprepare_cell
from cellferry.migration.reap import reap
from cellferry.migration.roll_back import examine_return, migration_to_roll_back, roll_back
from cellferry.migration.soak import reverse_round, soak
from cellferry.migration.status import status, unfinished
from cellferry.migration.sync import sync
from cellferry.migration.verify import verify

__all__ = [
    "abort",
    "check_cell",
    "cleanup",
    "clear_halt",
    "copy",
    "cutover",
    "examine_return",
    "give_up_log",
    "halt",
    "halts",
    "migration_to_roll_back",
    "pause",
    "plan",
    "prepare_cell",
    "reap",
    "resume",
    "reverse_round",
    "roll_back",
    "soak",
    "status",
    "sync",
    "ttl_until",
    "unfinished",
    "unprepare_cell",
    "verify",
    "watch",
]


def ttl_until(context: Context, migration_id: int) -> datetime:
    """Return when clean-up may start: an absolute time in UTC, set by the flip.

    Raises:
        WrongState: the route has not been flipped.
    """
    migration = context.topology.migration(migration_id)
    if migration.ttl_until is None:
        raise WrongState(
            f"migration {migration_id} is {migration.state}: there is no TTL before the flip",
            organization=migration.organization.slug,
            step="wait_for_ttl",
        )
    return migration.ttl_until
