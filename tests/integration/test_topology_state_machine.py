"""Whatever operators and controllers do, in whatever order, the record stays straight.

Hypothesis runs arbitrary sequences of calls, by current and superseded attempts, against a real
topology, beside a model that is one page long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cellferry.errors import CellferryError, InvalidInput, LeaseLost, WrongState
from cellferry.model import BEFORE_FLIP, LIVE_STATES, TRANSITIONS, Organization, Route, State
from cellferry.topology import Topology
from cellferry.topology.migrations import FLIPS
from fixtures.topology import ACTOR

WAY = (
    State.COPYING,
    State.SYNCING,
    State.READY,
    State.CUTTING_OVER,
    State.SOAKING,
    State.RETAINED,
    State.ROLLING_BACK,
)
CELLS = ("cell-1", "cell-2", "cell-3")


@dataclass
class Moving:
    """What the model knows of a migration."""

    id: int
    organization: str
    source: str
    destination: str
    epoch: int
    state: State = State.PLANNED
    attempt: int = 0
    transitions: int = 0


@dataclass
class World:
    """What the model knows of the topology."""

    routes: dict[str, Route] = field(default_factory=dict)
    migrations: dict[int, Moving] = field(default_factory=dict)


def machine(topology: Topology, url: str) -> type[RuleBasedStateMachine]:
    """The machine over one topology; each run takes new organizations."""
    names = iter(range(1, 1_000_000))

    class TopologyMachine(RuleBasedStateMachine):
        organizations: Bundle[str] = Bundle("organizations")
        leases: Bundle[tuple[int, int]] = Bundle("leases")

        def __init__(self) -> None:
            super().__init__()
            self.world = World()

        def refused(self, kind: type[CellferryError], call: Callable[[], object]) -> None:
            with pytest.raises(kind):
                call()

        @initialize(target=organizations)
        def two_organizations(self) -> object:
            ids = [f"o{next(names)}" for _ in range(2)]
            for id_ in ids:
                self.world.routes[id_] = topology.register_organization(
                    Organization(id_, id_), "cell-1", ACTOR
                )
            return multiple(*ids)

        @rule(organization=organizations, destination=st.sampled_from(CELLS))
        def create(self, organization: str, destination: str) -> None:
            def call() -> int:
                return topology.create_migration(
                    organization, destination, "online", {}, None, ACTOR
                ).id

            route = self.world.routes[organization]
            live = any(
                one.organization == organization and one.state in LIVE_STATES
                for one in self.world.migrations.values()
            )
            is_cleaned = any(
                (one.organization, one.state, one.source)
                == (organization, State.CLEANING, destination)
                for one in self.world.migrations.values()
            )
            if live:
                self.refused(WrongState, call)
            elif route.cell == destination:
                self.refused(InvalidInput, call)
            elif is_cleaned:
                self.refused(WrongState, call)
            else:
                id_ = call()
                self.world.migrations[id_] = Moving(
                    id_, organization, route.cell, destination, route.epoch
                )

        @precondition(lambda self: self.world.migrations)
        @rule(target=leases, number=st.integers(0, 9))
        def take_lease(self, number: int) -> tuple[int, int]:
            return self.take_it(number)

        def take_it(self, number: int) -> tuple[int, int]:
            ids = sorted(self.world.migrations)
            one = self.world.migrations[ids[number % len(ids)]]
            attempt = topology.take_lease(one.id, "machine", ACTOR)
            assert attempt == one.attempt + 1
            one.attempt = attempt
            return one.id, attempt

        @rule(lease=leases, from_=st.sampled_from(sorted(State)), to=st.sampled_from(sorted(State)))
        def transition_anywhere(self, lease: tuple[int, int], from_: State, to: State) -> None:
            self._transition(lease, from_, to)

        @rule(lease=leases, choice=st.integers(0, 5))
        def transition_onward(self, lease: tuple[int, int], choice: int) -> None:
            state = self.world.migrations[lease[0]].state
            if allowed := sorted(TRANSITIONS[state]):
                self._transition(lease, state, allowed[choice % len(allowed)])

        def _transition(self, lease: tuple[int, int], from_: State, to: State) -> None:
            one = self.world.migrations[lease[0]]

            def call() -> object:
                return topology.transition(lease[0], lease[1], from_, to, ACTOR)

            if (from_, to) in FLIPS or (to is not from_ and to not in TRANSITIONS[from_]):
                self.refused(WrongState, call)
            elif lease[1] != one.attempt:
                self.refused(LeaseLost, call)
            elif (
                one.state not in {from_, to}
                or (to is State.ROLLING_BACK and one.state is from_ is not to and self.went_on(one))
                or (to is State.CLEANING and one.state is State.RETAINED and self.came_back(one))
            ):
                self.refused(WrongState, call)
            else:
                call()
                one.transitions += one.state is from_
                one.state = to

        def came_back(self, one: Moving) -> bool:
            return self.world.routes[one.organization].cell == one.source or any(
                later.organization == one.organization
                and later.id > one.id
                and later.destination == one.source
                and later.state is not State.ABORTED
                for later in self.world.migrations.values()
            )

        def went_on(self, one: Moving) -> bool:
            route = self.world.routes[one.organization]
            return (route.cell, route.epoch) != (one.destination, one.epoch + 1) or any(
                later.organization == one.organization
                and later.id > one.id
                and later.state is not State.ABORTED
                for later in self.world.migrations.values()
            )

        @rule(lease=leases)
        def flip_back(self, lease: tuple[int, int]) -> None:
            one = self.world.migrations[lease[0]]

            def call() -> Route:
                return topology.flip_back(lease[0], lease[1], ACTOR, 0, {}, "to test it")

            if lease[1] != one.attempt:
                self.refused(LeaseLost, call)
            elif one.state is State.ROLLING_BACK:
                self.world.routes[one.organization] = call()
                one.state = State.ROLLED_BACK
                one.transitions += 1
            elif one.state is State.ROLLED_BACK:
                assert call() == Route(one.organization, one.source, one.epoch + 2)
            else:
                self.refused(WrongState, call)

        @rule(lease=leases)
        def flip(self, lease: tuple[int, int]) -> None:
            self.flip_it(lease)

        def flip_it(self, lease: tuple[int, int]) -> None:
            one = self.world.migrations[lease[0]]

            def call() -> Route:
                return topology.flip(lease[0], lease[1], ACTOR, 0, {})

            if lease[1] != one.attempt:
                self.refused(LeaseLost, call)
            elif one.state is State.CUTTING_OVER:
                self.world.routes[one.organization] = call()
                one.state = State.SOAKING
                one.transitions += 1
            elif one.state is State.SOAKING:
                assert call() == self.world.routes[one.organization]
            else:
                self.refused(WrongState, call)

        @precondition(lambda self: self.world.migrations)
        @rule(
            target=leases,
            number=st.integers(0, 9),
            until=st.sampled_from(
                [State.CUTTING_OVER, State.SOAKING, State.RETAINED, State.ROLLING_BACK]
            ),
        )
        def a_controller_takes_it_far(self, number: int, until: State) -> tuple[int, int]:
            lease = self.take_it(number)
            one = self.world.migrations[lease[0]]
            for state in WAY[: WAY.index(until) + 1]:
                if (one.state, state) == (State.CUTTING_OVER, State.SOAKING):
                    self.flip_it(lease)
                elif state in TRANSITIONS[one.state]:
                    self._transition(lease, one.state, state)
            return lease

        @rule(lease=consumes(leases))
        def forget_a_lease(self, lease: tuple[int, int]) -> None:
            del lease

        @invariant()
        def states_are_what_the_model_says(self) -> None:
            for one in self.world.migrations.values():
                found = topology.migration(one.id)
                assert (found.state, found.attempt) == (one.state, one.attempt)
                assert topology.flip_outcome(one.id) == (
                    one.state not in BEFORE_FLIP | {State.ABORTED}
                )
                assert topology.flip_outcome(one.id, back=True) == (one.state is State.ROLLED_BACK)

        @invariant()
        def routes_are_what_the_model_says_and_epochs_rise_by_one(self) -> None:
            for organization, route in self.world.routes.items():
                assert topology.route(organization) == route
                history = [change.route for change in topology.route_history(organization)]
                assert [one.epoch for one in history] == list(range(1, route.epoch + 1))
                assert history[-1] == route

        @invariant()
        def every_transition_has_one_audit_row(self) -> None:
            for one in self.world.migrations.values():
                rows = [row for row in topology.audit(one.id) if row.from_state is not None]
                assert len(rows) == one.transitions
                if rows:
                    assert rows[-1].to_state == one.state

        def teardown(self) -> None:
            with psycopg.connect(url) as connection:
                twice = connection.execute(
                    "SELECT organization FROM topology.migration WHERE state = ANY (%s)"
                    " GROUP BY organization HAVING count(*) > 1",
                    [sorted(LIVE_STATES)],
                ).fetchall()
            assert twice == []

    return TopologyMachine


def test_the_record_stays_straight(fresh_database: str) -> None:
    with Topology(fresh_database) as topology:
        topology.install()
        for cell in CELLS:
            topology.register_cell(cell)
        run_state_machine_as_test(
            machine(topology, fresh_database),
            settings=settings(
                max_examples=40,
                stateful_step_count=25,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
