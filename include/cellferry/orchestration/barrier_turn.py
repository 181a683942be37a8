"""One barrier at a time on a machine.

Writers wait for a barrier, and two that share a processor make them wait for longer. Airflow lets
one cutover task run at a time, and one roll-back; between the two they take turns here.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


@contextmanager
def barrier_turn(file: Path | None = None) -> Iterator[None]:
    """Wait for this machine's turn, and hold it for the block.

    It ends with the process, however that ends. Nothing is wrong without a turn, only slower for
    the writers: where the file cannot be opened, the block runs at once.

    Args:
        file: whose lock it is; None for one of this user in the folder for temporary files.
    """
    path = file or Path(tempfile.gettempdir()) / f"cellferry-barrier-{os.getuid()}.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        log.warning("other barriers on this machine may run at the same time: %s", error)
        yield
        return
    try:
        # told to end, a waiting task raises in its signal handler, and with it here
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
