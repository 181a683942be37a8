"""Progress of a running step, where an operator looks: the task's log and its state store.

The step itself only leaves its latest report here; a thread publishes it every few seconds. So a
slow API server never lengthens a write pause.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from cellferry.migration import ProgressEvent

log = logging.getLogger(__name__)

#: Seconds between two publications.
EVERY_S = 5.0
#: Where the text is in the task's state store.
STATE_KEY = "progress"


@dataclass(slots=True)
class _Track:
    """One kind of work of one store, from its first report to its latest."""

    first: ProgressEvent
    first_at: float
    last: ProgressEvent
    last_at: float


class ProgressBoard:
    """Collects a step's reports, and publishes them to people. Use as a context manager.

    Args:
        remember: `task_state_store.set`, or None where there is none.
        every_s: seconds between two publications.
    """

    def __init__(
        self, remember: Callable[[str, Any], None] | None = None, *, every_s: float = EVERY_S
    ) -> None:
        self._remember = remember
        self._every_s = every_s
        self._tracks: dict[str, _Track] = {}
        self._published: dict[str, str] = {}
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._publish_often, name="progress", daemon=True)

    def __call__(self, event: ProgressEvent) -> None:
        """Take one report; costs microseconds."""
        now = time.monotonic()
        with self._lock:
            track = self._tracks.get(event.store)
            if track is None or track.last.phase != event.phase or event.done < track.last.done:
                self._tracks[event.store] = _Track(event, now, event, now)
            else:
                track.last, track.last_at = event, now

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join(timeout=self._every_s)
        self._publish()

    def _publish_often(self) -> None:
        while not self._done.wait(self._every_s):
            self._publish()

    def _publish(self) -> None:
        with self._lock:
            texts = {
                store: describe(track.last, track.first, track.last_at - track.first_at)
                for store, track in sorted(self._tracks.items())
            }
        if not texts or texts == self._published:
            return
        self._published = texts
        for store, text in texts.items():
            log.info("%s: %s", store, text)
        if self._remember is None:
            return
        try:
            self._remember(STATE_KEY, texts)
        except Exception as error:  # noqa: BLE001 - a picture for people must not fail a move
            log.warning("progress is shown in this log only: %s", error)
            self._remember = None


def describe(last: ProgressEvent, first: ProgressEvent, seconds: float) -> str:
    """Return progress in words: what, how much of how much, rate, time left.

    Args:
        seconds: time between the two reports.
    """
    text = f"{last.phase} {last.done:,}"
    if last.total:
        text += f" of {last.total:,} {last.unit} ({100 * last.done / last.total:.0f}%)"
    else:
        text += f" {last.unit}"
    moved = last.done - first.done
    if moved > 0 and seconds > 0 and last.unit != "s":
        rate = moved / seconds
        text += f", {rate:,.0f} {last.unit}/s" if rate >= 1 else f", {rate:.2f} {last.unit}/s"
        if last.total and last.total > last.done:
            text += f", {duration((last.total - last.done) / rate)} left"
    return f"{text}; {last.note}" if last.note else text


def duration(seconds: float) -> str:
    """Return `seconds` as people say it: `45 s`, `12 min`, `3.5 h`, `2.0 days`."""
    for bound, unit, size in ((100, "s", 1.0), (6_000, "min", 60.0), (172_800, "h", 3_600.0)):
        if seconds < bound:
            amount = seconds / size
            return f"{amount:.0f} {unit}" if unit != "h" else f"{amount:.1f} h"
    return f"{seconds / 86_400:.1f} days"
