"""What a killed PostgreSQL leaves in the kernel: a small segment of System V shared memory.

The next start in the same data folder takes it away, but a folder that is deleted has none. By
default a machine has 4,096 of them; when they are used up no PostgreSQL starts on it any more.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

_SEGMENTS = Path("/proc/sysvipc/shm")
_IPC_RMID = 0


def release(data: Path) -> bool:
    """Remove the segment of the postmaster that was killed in the folder `data`, if it left one.

    The postmaster's own record names the segment; it goes only if it is still that postmaster's,
    and no process is attached to it.
    """
    try:
        record = (data / "postmaster.pid").read_text(encoding="utf-8", errors="replace")
        segments = _SEGMENTS.read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        return False  # an orderly shutdown removes both; other systems than Linux do not list them
    lines = record.splitlines()
    if len(lines) < 7 or len(lines[6].split()) != 2:
        return False  # killed before it had one
    key, number = lines[6].split()
    for segment in segments:
        found_key, found_number, _, _, creator, _, attached, *_ = segment.split()
        if (found_key, found_number, creator, attached) == (key, number, lines[0].strip(), "0"):
            libc = ctypes.CDLL(None, use_errno=True)
            return int(libc.shmctl(int(number), _IPC_RMID, None)) == 0
    return False
