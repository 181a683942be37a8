"""A heart that beats while nothing else can say that a controller is alive.

A step says so once a batch. Under the gate there are no batches: a drain may wait for its whole
deadline, and the last delta is one statement. So a thread says it meanwhile, on a connection of its
own. It falls silent with its process, and when the step overruns what it had promised.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psycopg

from cellferry.topology.connection import Database, connect

log = logging.getLogger(__name__)

#: Seconds between two beats.
BEAT_S = 3.0


class Heartbeat:
    """The part of the topology that hears from its controllers."""

    _database: Database

    @contextmanager
    def kept_alive(self, migration_id: int, attempt: int, *, longest_s: float) -> Iterator[None]:
        """Keep an attempt's lease alive for at most `longest_s` seconds, while the block runs.

        A beat never waits for a lock, and so never makes the flip wait: who holds the row is
        alive. A beat that cannot be sent is left out; the block does not notice.
        """
        done = threading.Event()
        until = time.monotonic() + longest_s

        def beat() -> None:
            session: psycopg.Connection[tuple[object, ...]] | None = None
            while time.monotonic() < until and not done.wait(BEAT_S):
                try:
                    if session is None or session.closed:
                        session = connect(self._database.parameters)
                        session.autocommit = True
                        session.execute("SET synchronous_commit = off")
                    session.execute(_BEAT, {"migration": migration_id, "attempt": attempt})
                except psycopg.Error as error:
                    log.warning("no sign of life of migration %s: %s", migration_id, error)
                    if session is not None:
                        session.close()
            if session is not None:
                with suppress(psycopg.Error):
                    session.close()

        thread = threading.Thread(target=beat, name=f"heartbeat {migration_id}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()


_BEAT = """
UPDATE topology.migration SET heartbeat_at = clock_timestamp()
WHERE id = (SELECT id FROM topology.migration
            WHERE id = %(migration)s AND attempt = %(attempt)s FOR UPDATE SKIP LOCKED)
"""
