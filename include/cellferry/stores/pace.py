"""How much of its time a mover works, so that a cell's other users get theirs.

A pace is a share of time and not a rate of rows: whoever works calls `breathe` after each small
piece of work, and rests for as long as the share asks. So the same pace fits rows, keys, rounds
and clean-ups, and no rate has to be known beforehand. What sets the share is elsewhere
(`cellferry.migration.pacing`); without it a pace is full speed and costs a comparison.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from cellferry.model import Progress


@dataclass(frozen=True, slots=True)
class Reading:
    """What one probe of a cell's store saw; durations in seconds.

    Attributes:
        write_s: a small write until its commit was confirmed.
        read_s: a small read.
    """

    write_s: float
    read_s: float

    @property
    def longest_s(self) -> float:
        """The one that users feel most."""
        return max(self.write_s, self.read_s)


@dataclass(frozen=True, slots=True)
class Load:
    """What a store's server says of its own load.

    Attributes:
        lag_s: how far the standby that is furthest behind is, in seconds; None without any.
        log_bytes: position in the log of changes: its growth is the rate of writing.
        active: sessions that are at work now, ours not counted.
    """

    lag_s: float | None = None
    log_bytes: int | None = None
    active: int | None = None


class Probe(ABC):
    """Asks one cell's store how it does, on a connection of its own. For one thread."""

    @abstractmethod
    def read(self) -> Reading:
        """Do a small write and a small read, and say how long each took.

        Raises:
            CellferryError: the store cannot be asked. A store that is slow is no error.
        """

    def load(self) -> Load:
        """Return what the server says of itself; cheap, asked about once a second.

        Raises:
            CellferryError: as `read`.
        """
        return Load()

    @abstractmethod
    def close(self) -> None:
        """Close the connection; what the probe wrote goes where it would be in the way."""


class Pace:
    """The share of its time that one store's part of a step may work.

    Worked on by one thread; another one sets `share`.

    Args:
        store: whose work it is.
        progress: told the news; its `check` is asked during a long rest, and what it raises ends
            the rest.
        begin: called by the working thread once work has gone on for `BEGIN_AFTER_S`.

    Attributes:
        share: above 0, up to 1: full speed.
        rested_s: seconds rested so far.
        news: what to tell people, once; the working thread reports it.
    """

    #: A step that works for a shorter time (seconds) is over before anything could be decided.
    BEGIN_AFTER_S = 0.25
    #: Its share until then, where work is paced: nobody knows yet how the cells do.
    UNSEEN = 0.1
    #: Rests that are shorter than this (seconds) are saved up: a sleep is not more precise.
    SHORTEST_S = 0.0005
    #: After one piece of work, however long it took, rest at most so long (seconds). A server that
    #: streams to us ends the session when nothing is taken from it for `tcp_user_timeout`, 10 s.
    LONGEST_S = 4.0
    #: Longest single sleep, so that a stop or a new share is noticed.
    SLICE_S = 0.1

    def __init__(
        self,
        store: str = "",
        progress: Progress | None = None,
        begin: Callable[[Pace], None] | None = None,
    ) -> None:
        self.share = 1.0 if begin is None else self.UNSEEN
        self.rested_s = 0.0
        self.news: str | None = None
        self._store = store
        self._progress = progress
        self._begin = begin
        self._began_at: float | None = None
        self._since = time.monotonic()
        self._debt_s = 0.0

    def start(self) -> None:
        """Say that work begins now: what came before was no work."""
        self._since = time.monotonic()
        if self._began_at is None:
            self._began_at = self._since

    def breathe(self) -> float:
        """Rest after a small piece of work, as the share asks; return the seconds rested."""
        now = time.monotonic()
        if self._begin is not None:
            if self._began_at is None:
                self._began_at = self._since
            if now - self._began_at >= self.BEGIN_AFTER_S:
                begin, self._begin = self._begin, None
                begin(self)
        if self.news is not None and self._progress is not None:
            news, self.news = self.news, None
            self._progress.report(
                self._store, "pace", round(self.share * 100), None, "% of full speed", news
            )
        share = self.share
        if share >= 1.0:
            self._since, self._debt_s = now, 0.0
            return 0.0
        self._debt_s = min(self._debt_s + (now - self._since) * (1 / share - 1), self.LONGEST_S)
        rested = 0.0
        if self._debt_s >= self.SHORTEST_S:
            rested = self._rest()
        self._since = time.monotonic()
        return rested

    def _rest(self) -> float:
        began = time.monotonic()
        asked_at = self.share
        while (left := began + self._debt_s - time.monotonic()) > 0:
            time.sleep(min(left, self.SLICE_S))
            if self.share != asked_at:
                # What is owed was worked at full speed: a new share asks for more or less of it.
                paid = time.monotonic() - began
                owed = self._debt_s / (1 / asked_at - 1)
                asked_at = self.share
                self._debt_s = max(paid, min(owed * (1 / asked_at - 1), self.LONGEST_S))
            if left > self.SLICE_S and self._progress is not None:
                self._progress.check()
        rested = time.monotonic() - began
        self._debt_s = min(self._debt_s - rested, 0.0)
        self.rested_s += rested
        return rested

    def size(self, full: int, least: int) -> int:
        """Return how large a piece of work may be: the share of `full`, at least `least`.

        So a transaction holds its locks no longer than at full speed.
        """
        share = self.share
        return full if share >= 1.0 else max(min(least, full), int(full * share))


class FullSpeed(Pace):
    """The pace of work that nobody may slow down, such as everything under the gate."""

    def breathe(self) -> float:
        """Return at once."""
        return 0.0


#: For work that nobody paces.
FULL_SPEED = FullSpeed()


class Paced:
    """A progress sink whose `check`, asked once for each piece of work, breathes as well."""

    def __init__(self, progress: Progress, pace: Pace) -> None:
        self._progress = progress
        self._pace = pace

    def report(
        self, store: str, phase: str, done: int, total: int | None, unit: str, note: str = ""
    ) -> None:
        """Pass a report on."""
        self._progress.report(store, phase, done, total, unit, note)

    def check(self) -> None:
        """Raise when the step must stop; otherwise rest as the pace asks."""
        self._progress.check()
        self._pace.breathe()
