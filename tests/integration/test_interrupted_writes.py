"""A step that is told to end while the server does not answer: what told it comes through."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from cellferry.model import Side
from cellferry.orchestration.cancellation import Cancelled, unwinding_when_cancelled
from cellferry.stores.postgres.transactions import write
from fixtures.ferry import Ferry
from fixtures.gated import eventually

WAITING = (
    "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    " AND query LIKE 'SELECT FROM cellferry.lease%'"
)


@pytest.fixture
def told_to_end(ferry: Ferry) -> Iterator[None]:
    """SIGTERM for this process, once a session of the mover waits for its lease."""

    def tell() -> None:
        eventually(lambda: bool(ferry.run(Side.DESTINATION, WAITING)), 60)
        time.sleep(0.05)  # back in the wait for the answer
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    teller = threading.Thread(target=tell)
    teller.start()
    yield
    teller.join(60)


def test_a_writer_that_waits_for_its_lease_can_be_told_to_end(
    ferry: Ferry, told_to_end: None
) -> None:
    with ferry.opened() as move:
        move.open_capture()
        with ferry.session(Side.DESTINATION) as other, other.transaction():
            other.execute("LOCK TABLE cellferry.lease")
            with (
                pytest.raises(Cancelled),
                unwinding_when_cancelled(),
                write(move._destination, move.move),
            ):
                raise AssertionError("nobody holds the lease yet")
        assert move._destination.closed
