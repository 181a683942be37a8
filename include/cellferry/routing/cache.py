"""The last known routes: bounded, with a time to live, and never going back an epoch."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from cellferry.model import Route


class RouteCache:
    """Routes by organization; the least recently used one goes when it is full. Thread-safe.

    Args:
        max_entries: bound of its size.
        clock: seconds, monotonic.
    """

    def __init__(self, max_entries: int, clock: Callable[[], float] = time.monotonic) -> None:
        if max_entries < 1:
            raise ValueError(f"max_entries is {max_entries}, it must be at least 1")
        self._max_entries = max_entries
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, tuple[Route, float]] = OrderedDict()
        self._confirmed_at = clock()

    @property
    def confirmed_at(self) -> float:
        """When every route here was right for certain."""
        return self._confirmed_at

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, organization: str) -> tuple[Route, float] | None:
        """Return the route and when it was confirmed, and mark it as used."""
        with self._lock:
            entry = self._entries.get(organization)
            if entry is None:
                return None
            self._entries.move_to_end(organization)
            route, read_at = entry
            return route, max(read_at, self._confirmed_at)

    def peek(self, organization: str) -> Route | None:
        """Return the route without marking it as used."""
        entry = self._entries.get(organization)
        return None if entry is None else entry[0]

    def put(self, route: Route, *, only_known: bool = False) -> bool:
        """Take `route` in unless a newer epoch is known; return whether it was news.

        An older epoch never replaces a newer one (invariant 2), but it confirms that somebody
        looked: the entry lives on.

        Args:
            route: what somebody read or was told.
            only_known: ignore organizations that are not in the cache.
        """
        with self._lock:
            entry = self._entries.get(route.organization)
            if entry is None and only_known:
                return False
            is_news = entry is None or route.epoch > entry[0].epoch
            kept = route if entry is None or is_news else entry[0]
            self._entries[route.organization] = (kept, self._clock())
            if entry is None:
                while len(self._entries) > self._max_entries:
                    self._entries.popitem(last=False)
            return is_news

    def discard(self, organization: str) -> None:
        """Forget an organization."""
        with self._lock:
            self._entries.pop(organization, None)

    def confirm(self, as_of: float) -> None:
        """Note that every route here was right at `as_of` on the clock."""
        with self._lock:
            self._confirmed_at = max(self._confirmed_at, as_of)

    def forked(self) -> RouteCache:
        """Return a copy for a forked child: another thread may have held the lock at the fork."""
        copy = RouteCache(self._max_entries, self._clock)
        copy._entries.update(self._entries)
        copy._confirmed_at = self._confirmed_at
        return copy
