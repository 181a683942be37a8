"""Cutovers that die, are stopped or are overtaken at the wrong moment."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from cellferry import phases
from cellferry.errors import (
    CellferryError,
    LeaseLost,
    NotConverging,
    Paused,
    Unreachable,
    WrongState,
)
from cellferry.migration import barrier as barrier_module
from cellferry.migration import steps
from cellferry.model import Actor, Organization, Round, State
from cellferry.phases import Phase
from cellferry.stores.postgres.store import PostgresMove
from cellferry.stores.redis.store import RedisMove
from cellferry.topology import Topology
from fixtures.cells import TwoCells

MOVED, BEING_MOVED = "CF001", "CF002"


class KilledError(BaseException):
    """The controller's process ends here."""


@pytest.fixture
def acme(cells: TwoCells) -> Organization:
    return cells.add_organization(7, issues=3)


def ready(cells: TwoCells, organization: Organization) -> int:
    migration = cells.plan(organization)
    with cells.context() as context:
        for step in (steps.copy, steps.sync, steps.verify):
            step(context, migration)
    return migration


def refusal(cells: TwoCells, cell: str) -> str | None:
    """Write as the application does; return the SQLSTATE of a refusal."""
    try:
        with cells.application(cell) as connection:
            connection.execute("UPDATE issues SET counter = counter + 1 WHERE organization_id = 7")
    except psycopg.Error as error:
        return error.sqlstate
    return None


def killed(*_arguments: Any, **_named: Any) -> None:
    raise KilledError


def killed_later(verb: Any) -> Any:
    """Thaws and releases at the start of a cutover are harmless; the next one is the end."""
    harmless = {"thaw": 1, "_release_one": 2}.get(verb.__name__, 0)

    def wrapped(*arguments: Any) -> None:
        nonlocal harmless
        if not harmless:
            raise KilledError
        harmless -= 1
        verb(*arguments)

    return wrapped


def kill_in(
    cells: TwoCells, migration: int, monkeypatch: pytest.MonkeyPatch, where: str, after: str
) -> None:
    """Run a cutover whose process ends in `where`, because the store's verb `after` failed."""
    with monkeypatch.context() as patch:
        patch.setattr(PostgresMove, after, killed)
        patch.setattr(barrier_module, where, killed_later(getattr(barrier_module, where)))
        with cells.context() as context, pytest.raises(KilledError):
            steps.cutover(context, migration)


def test_writers_go_on_though_a_cutover_that_gave_up_hangs(
    cells: TwoCells, acme: Organization
) -> None:
    """Open gates tell nobody of a lock that somebody keeps: it goes in the same moment."""
    migration = ready(cells, acme)
    begun = threading.Event()
    thawed: list[Phase] = []
    answers: list[str | None] = []

    def hang(phase: Phase) -> None:
        if phase is Phase.FROZEN_ALL:
            begun.set()
            raise RuntimeError("gives up")
        if phase is Phase.THAWED_ONE and begun.is_set():
            thawed.append(phase)
            if len(thawed) == 2:  # both stores, and nothing was released yet
                answers.append(refusal(cells, "cell-1"))

    phases.listen(hang)
    try:
        with cells.context() as context, pytest.raises(RuntimeError, match="gives up"):
            steps.cutover(context, migration)
    finally:
        phases.listen(None)
    assert answers == [None]
    assert cells.migration(migration).state is State.READY


@pytest.mark.parametrize(
    ("lasted", "expected"), [([0.0], 1), ([1.0, 0.0], 2), ([1.0] * 9, barrier_module.LAST_ROUNDS)]
)
def test_a_long_round_before_the_freeze_is_followed_by_another(
    cells: TwoCells,
    acme: Organization,
    monkeypatch: pytest.MonkeyPatch,
    lasted: list[float],
    expected: int,
) -> None:
    """What becomes dirty during the last round is what writers wait for."""
    migration = ready(cells, acme)
    came: list[Phase | str] = []
    took = iter(lasted)
    sync = PostgresMove.sync

    def timed(self: PostgresMove) -> Round:
        done = sync(self)
        if Phase.BARRIER_BEGUN not in came:
            return done
        came.append("round")
        return replace(done, seconds=next(took))

    monkeypatch.setattr(PostgresMove, "sync", timed)
    phases.listen(came.append)
    try:
        with cells.context() as context:
            steps.cutover(context, migration)
    finally:
        phases.listen(None)
    assert came[: came.index(Phase.FROZEN_ONE)].count("round") == expected


def test_no_garbage_is_collected_while_writers_wait(cells: TwoCells, acme: Organization) -> None:
    """With Airflow's objects a collection takes a tenth of a second."""
    migration = ready(cells, acme)
    seen: dict[Phase, bool] = {}
    phases.listen(lambda phase: seen.setdefault(phase, gc.isenabled()))
    try:
        with cells.context() as context:
            for step in (steps.cutover, lambda *of: steps.roll_back(*of, "test")):
                seen.clear()
                step(context, migration)
                under_the_gate = (Phase.FROZEN_ALL, Phase.FLIPPED, Phase.RELEASED)
                assert not any(seen[phase] for phase in under_the_gate)
                assert gc.isenabled()
    finally:
        phases.listen(None)


def test_writers_go_on_at_a_store_that_is_handed_over_though_another_is_not(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = ready(cells, acme)
    hand_over = RedisMove.hand_over
    answers: list[str | None] = []

    def later(move: RedisMove) -> None:
        answers.append(refusal(cells, "cell-1"))
        answers.append(refusal(cells, "cell-2"))
        hand_over(move)

    monkeypatch.setattr(RedisMove, "hand_over", later)
    with cells.context() as context:
        steps.cutover(context, migration)

    assert answers == [MOVED, None]


def test_a_cutover_that_dies_before_its_hand_over_is_durable_is_finished_by_a_retry(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = ready(cells, acme)
    with monkeypatch.context() as patch:
        patch.setattr(PostgresMove, "keep_handed_over", killed)
        with cells.context() as context, pytest.raises(KilledError):
            steps.cutover(context, migration)
    assert refusal(cells, "cell-2") is None, "writers did not wait for it"
    assert "handed_over" not in cells.migration(migration).facts

    with cells.context() as context:
        steps.cutover(context, migration)

    assert cells.migration(migration).facts["handed_over"]


def test_a_cutover_whose_source_forgot_the_freeze_does_not_flip(
    cells: TwoCells, acme: Organization
) -> None:
    """As after a crash: what was frozen in the server's memory only is open again."""
    migration = ready(cells, acme)

    def forget(phase: Phase) -> None:
        if phase is Phase.FROZEN_ALL:
            with cells.admin("cell-1") as connection:
                connection.execute("UPDATE cellferry.gate SET state = 'open'")

    phases.listen(forget)
    try:
        with cells.context() as context, pytest.raises(WrongState, match="kept frozen"):
            steps.cutover(context, migration)
    finally:
        phases.listen(None)

    assert cells.migration(migration).state is State.READY
    assert refusal(cells, "cell-1") is None


def test_a_controller_that_dies_before_it_thaws_leaves_no_frozen_source_to_a_retry_that_gives_up(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = ready(cells, acme)
    with monkeypatch.context() as patch:
        patch.setattr(PostgresMove, "finish", killed)
        patch.setattr(phases, "_hook", lambda phase: phase is Phase.UNDONE and killed())
        with cells.context() as context, pytest.raises(KilledError):
            steps.cutover(context, migration)
    assert cells.migration(migration).state is State.READY
    assert refusal(cells, "cell-1") == BEING_MOVED

    def gives_up(_at: Any) -> None:
        raise NotConverging("too many writes")

    monkeypatch.setattr(barrier_module, "_catch_up", gives_up)
    with cells.context() as context, pytest.raises(NotConverging):
        steps.cutover(context, migration)

    assert refusal(cells, "cell-1") is None


def test_a_pause_does_not_keep_a_dead_cutovers_source_frozen(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = ready(cells, acme)
    kill_in(cells, migration, monkeypatch, "_undo", after="finish")
    assert cells.migration(migration).state is State.CUTTING_OVER
    with cells.context() as context:
        context.topology.set_paused(migration, True, Actor("operator"))
        with pytest.raises(Paused):
            steps.cutover(context, migration)

    assert refusal(cells, "cell-1") is None


def test_a_halt_does_not_keep_a_flipped_organization_frozen(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = ready(cells, acme)
    kill_in(cells, migration, monkeypatch, "_release_one", after="hand_over")
    assert cells.migration(migration).state is State.SOAKING
    with cells.context() as context:
        context.topology.set_halted(migration, "look at it", Actor("operator"))
        steps.cutover(context, migration)

    assert refusal(cells, "cell-2") is None


def test_a_store_that_cannot_thaw_does_not_keep_another_frozen(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = ready(cells, acme)

    def refused(*_arguments: Any) -> None:
        raise WrongState("the route changed")

    monkeypatch.setattr(Topology, "flip", refused)
    monkeypatch.setattr(PostgresMove, "thaw", killed_later(PostgresMove.thaw))
    with cells.context() as context, pytest.raises(KilledError):
        steps.cutover(context, migration)

    with cells.organization_redis("cell-1", "7") as client:
        assert client.incr("org:{7}:counter") == 6


def end_connections(cells: TwoCells, cell: str) -> None:
    """Every connection of the mover to `cell` is lost at once."""
    with cells.admin(cell) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name LIKE 'cellferry:%' AND datname = current_database()"
        )
    with cells.redis(cell) as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


def test_connections_lost_under_the_gate_do_not_keep_the_source_frozen(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = ready(cells, acme)

    def lost(_self: Any) -> None:
        end_connections(cells, "cell-1")
        raise Unreachable("a moment")

    monkeypatch.setattr(PostgresMove, "finish", lost)
    with cells.context() as context, pytest.raises(Unreachable):
        steps.cutover(context, migration)

    assert refusal(cells, "cell-1") is None
    with cells.organization_redis("cell-1", "7") as client:
        assert client.incr("org:{7}:counter") == 6


def test_connections_lost_at_the_flip_do_not_keep_the_hand_over_waiting(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = ready(cells, acme)
    real = Topology.flip

    def flip(self: Topology, *arguments: Any) -> Any:
        route = real(self, *arguments)
        for cell in ("cell-1", "cell-2"):
            end_connections(cells, cell)
        return route

    monkeypatch.setattr(Topology, "flip", flip)
    with cells.context() as context:
        steps.cutover(context, migration)

    assert refusal(cells, "cell-2") is None
    with cells.organization_redis("cell-2", "7") as client:
        assert client.incr("org:{7}:counter") == 6


def test_an_abort_that_comes_just_too_late_lets_the_cutover_hand_over(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = ready(cells, acme)
    asked, flipped = threading.Event(), threading.Event()
    real_lease, real_flip = Topology.take_lease, Topology.flip
    outcome: list[BaseException] = []

    def late() -> None:
        try:
            with cells.context() as context:
                steps.abort(context, migration, "too slow")
        except CellferryError as error:
            outcome.append(error)

    thread = threading.Thread(target=late)

    def lease(self: Topology, *arguments: Any) -> int:
        if threading.current_thread() is thread:
            asked.set()
            assert flipped.wait(120)
        return real_lease(self, *arguments)

    def flip(self: Topology, *arguments: Any) -> Any:
        thread.start()
        assert asked.wait(120)
        route = real_flip(self, *arguments)
        flipped.set()
        thread.join()
        return route

    monkeypatch.setattr(Topology, "take_lease", lease)
    monkeypatch.setattr(Topology, "flip", flip)
    with cells.context() as context, pytest.raises(LeaseLost):
        steps.cutover(context, migration)

    assert isinstance(outcome[0], WrongState)
    assert refusal(cells, "cell-2") is None
