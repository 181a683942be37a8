"""The cache of routes: bounded, expiring, and never going back an epoch."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cellferry.model import Route
from cellferry.routing.cache import RouteCache

SIZE = 3
ORGANIZATIONS = st.sampled_from(["a", "b", "c", "d", "e"])


class CacheMachine(RuleBasedStateMachine):
    """Compares the cache with a model that is slow and obvious."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.cache = RouteCache(SIZE, clock=lambda: self.now)
        self.known: list[tuple[Route, float]] = []  # least recently used first
        self.confirmed = 0.0

    def _find(self, organization: str) -> tuple[Route, float] | None:
        return next((entry for entry in self.known if entry[0].organization == organization), None)

    @rule(seconds=st.floats(min_value=0.1, max_value=100))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(organization=ORGANIZATIONS, epoch=st.integers(1, 6), only_known=st.booleans())
    def put(self, organization: str, epoch: int, only_known: bool) -> None:
        route = Route(organization, f"cell-{epoch}", epoch)
        before = self._find(organization)

        was_news = self.cache.put(route, only_known=only_known)

        assert was_news == (not only_known if before is None else epoch > before[0].epoch)
        if before is not None:
            newest = route if epoch > before[0].epoch else before[0]
            self.known[self.known.index(before)] = (newest, self.now)
        elif not only_known:
            self.known = [*self.known, (route, self.now)][-SIZE:]

    @rule(organization=ORGANIZATIONS)
    def get(self, organization: str) -> None:
        before = self._find(organization)

        found = self.cache.get(organization)

        if before is None:
            assert found is None
        else:
            assert found == (before[0], max(before[1], self.confirmed))
            self.known.remove(before)
            self.known.append(before)

    @rule(organization=ORGANIZATIONS)
    def discard(self, organization: str) -> None:
        self.cache.discard(organization)
        self.known = [entry for entry in self.known if entry[0].organization != organization]

    @rule(ago=st.floats(min_value=0, max_value=50))
    def confirm(self, ago: float) -> None:
        self.cache.confirm(self.now - ago)
        self.confirmed = max(self.confirmed, self.now - ago)

    @rule()
    def fork(self) -> None:
        self.cache = self.cache.forked()

    @invariant()
    def it_holds_what_the_model_holds(self) -> None:
        assert [self.cache.peek(entry[0].organization) for entry in self.known] == [
            entry[0] for entry in self.known
        ]
        assert len(self.cache) == len(self.known) <= SIZE


TestRouteCache = CacheMachine.TestCase
