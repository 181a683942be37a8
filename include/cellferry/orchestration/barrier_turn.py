"""One barrier at a time on a machine.

Writers wait for a barrier, and two that share a processor make them wait for longer. Airflow lets a
few tasks of cutovers and roll-backs run at a time; those of one machine take turns here.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cellferry.orchestration.cancellation import unwinding_when_cancelled

log = logging.getLogger(__name__)

#: A turn is waited for so long, seconds. One may last for hours: a cutover that finds that a server
#: lost commits compares everything first; and users may be waiting for a roll-back.
LONGEST_WAIT_S = 60.0
#: Between two looks whether the turn is free, seconds.
LOOK_EVERY_S = 0.05


@contextmanager
def barrier_turn(file: Path | None = None, *, try_number: int = 1) -> Iterator[None]:
    """Wait for this machine's turn, and hold it for the block.

    It ends with the process, however that ends. Nothing is wrong without a turn, only slower for
    the writers: where the file cannot be opened, or the turn does not come within
    `LONGEST_WAIT_S`, the block runs all the same.

    Args:
        file: whose lock it is; None for one of this user in the folder for temporary files.
        try_number: the task's; a later one waits for nobody. The try before it may have been
            killed, and left its organization frozen.

    Raises:
        Cancelled: the task was told to end while it waited.
    """
    if try_number > 1:
        yield
        return
    path = file or Path(tempfile.gettempdir()) / f"cellferry-barrier-{os.getuid()}.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        log.warning("other barriers on this machine may run at the same time: %s", error)
        yield
        return
    try:
        # Airflow's own handler lets a task that is told to end wait on: its turn could come, and
        # the barrier begin, seconds before it is killed.
        with unwinding_when_cancelled():
            _wait_for(descriptor)
        yield
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int) -> None:
    """Return with the lock, or without it where it cannot be had in time."""
    deadline = time.monotonic() + LONGEST_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(LOOK_EVERY_S)
                continue
            log.warning("another barrier on this machine lasts for long; this one runs beside it")
        except OSError as error:
            log.warning("other barriers on this machine may run at the same time: %s", error)
        return
