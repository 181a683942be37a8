"""The reaper at regular intervals, beside the fleet: with Airflow dead, too.

Each run is a process of its own (`cellferry reap`): one that hangs is ended, and nobody waits for
it. What it says is in `.local/log/reaper.log`.
"""

from __future__ import annotations

import logging
import sys
import time

from cellferry.local import airflow_components
from cellferry.local.fleet_layout import FleetLayout
from cellferry.local.server_process import ServerProcess

log = logging.getLogger(__name__)

#: From the start of one run to the start of the next, in seconds.
EVERY_S = 60.0
#: A run that takes longer is ended; the next goes on from there. Seconds.
LONGEST_RUN_S = 120.0
#: A log that has grown over this many bytes is begun anew.
LONGEST_LOG = 1024 * 1024


class RegularReaper:
    """Starts `cellferry reap` every so often, one at a time.

    Args:
        layout: whose cells; says where the configuration, the connections and the log are.
    """

    def __init__(self, layout: FleetLayout) -> None:
        self._layout = layout
        # Ends with the supervisor: the next one starts its own.
        self._process = ServerProcess("reaper", layout.logs / "reaper.log", die_with_parent=True)
        self._started = time.monotonic()

    def look(self) -> None:
        """Start a run that is due, end one that hangs. Does not wait for it; never raises."""
        age_s = time.monotonic() - self._started
        try:
            if self._process.is_running:
                if age_s > LONGEST_RUN_S:
                    log.warning("the reaper did not end within %g s", LONGEST_RUN_S)
                    self._process.kill()
            elif age_s >= EVERY_S:
                self._started = time.monotonic()
                self._start()
        except OSError as error:
            log.warning("the reaper did not start: %s", error)

    def stop(self) -> None:
        """End a run that is under way: nothing of it is lost, the next one does it."""
        self._process.kill()

    def _start(self) -> None:
        written = self._process.log
        if written.is_file() and written.stat().st_size > LONGEST_LOG:
            written.unlink()
        self._process.start(
            [sys.executable, "-P", "-m", "cellferry.cli", "reap"],
            cwd=self._layout.state,
            environment=airflow_components.environment(self._layout),
        )
        # Behind whoever is at a gate: a run costs a second of processor for its imports alone.
        self._process.give_way()
