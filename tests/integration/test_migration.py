"""The steps of a migration between two real cells, and the cutover under faults."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from cellferry.errors import (
    Blocked,
    CellferryError,
    DrainTimeout,
    OutcomeUnknown,
    TransientError,
    Unreachable,
    VerificationFailed,
    WrongState,
)
from cellferry.migration import Context, MoveOptions, steps
from cellferry.migration import barrier as barrier_module
from cellferry.migration.context import ProgressEvent
from cellferry.model import Organization, State
from cellferry.stores.postgres.copier import Copier
from cellferry.stores.postgres.schema import Table
from cellferry.topology import Topology
from fixtures.cells import NO_TRACES, PATIENT, TwoCells
from fixtures.gated import eventually

MOVED, BEING_MOVED = "CF001", "CF002"


@pytest.fixture
def acme(cells: TwoCells) -> Organization:
    cells.add_organization(8)  # a neighbour that stays
    return cells.add_organization(7)


def ready(cells: TwoCells, organization: Organization, **options: Any) -> int:
    """Bring a migration to `ready`."""
    migration = cells.plan(organization, **options)
    with cells.context() as context:
        for step in (steps.copy, steps.sync, steps.verify):
            step(context, migration)
    return migration


def touch(cells: TwoCells, cell: str, title: str = "issue 1") -> str | None:
    """Write as the application does; return the SQLSTATE it was refused with, if it was."""
    try:
        with cells.application(cell) as connection:
            connection.execute(
                "UPDATE issues SET counter = counter + 1 WHERE organization_id = 7 AND title = %s",
                (title,),
            )
    except psycopg.Error as error:
        return error.sqlstate
    return None


@pytest.mark.parametrize("strategy", ["online", "freeze-first"])
def test_an_organization_moves_whole_and_its_neighbour_stays(
    cells: TwoCells, acme: Organization, strategy: str
) -> None:
    rows, keys = cells.rows("cell-1", "7"), cells.keys("cell-1", "7")
    neighbour = cells.rows("cell-1", "8"), cells.keys("cell-1", "8")
    migration = cells.plan(acme, strategy=strategy)
    with cells.context() as context:
        for step in (steps.copy, steps.sync, steps.verify, steps.cutover, steps.soak):
            step(context, migration)
        assert context.topology.route("7").cell == "cell-2"
        assert cells.rows("cell-1", "7") == rows, "the old copy is kept until clean-up"
        steps.cleanup(context, migration)
        assert context.topology.live_resources(migration) == []
    assert cells.rows("cell-2", "7") == rows
    assert sorted(cells.keys("cell-2", "7")) == sorted(keys)
    assert not any(cells.rows("cell-1", "7").values())
    assert cells.keys("cell-1", "7") == {}
    assert (cells.rows("cell-1", "8"), cells.keys("cell-1", "8")) == neighbour
    assert cells.traces("cell-1") == NO_TRACES
    assert cells.traces("cell-2") == NO_TRACES


def test_a_copy_expects_what_the_plan_counted_and_counts_nothing_again(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = cells.plan(acme)
    heard: list[ProgressEvent] = []

    def count(_copier: Copier, table: Table, _mark: object) -> int:
        raise AssertionError(f"{table.name} is counted again")

    with cells.context() as context:
        planned = context.topology.migration(migration).facts["plan"]["inventories"]
        monkeypatch.setattr(Copier, "_count", count)
        context.listener = heard.append
        steps.copy(context, migration)
    for store, unit in (("postgres", "rows"), ("redis", "keys")):
        owned = [p["count"] for p in planned[store]["parts"] if p["placement"] == "owned"]
        totals = [one.total for one in heard if (one.store, one.phase) == (store, "copy")]
        assert totals[0] == sum(owned), f"{unit}; shared rows come later"


def test_every_step_may_be_repeated(cells: TwoCells, acme: Organization) -> None:
    migration = cells.plan(acme)
    order = (steps.copy, steps.sync, steps.verify, steps.cutover, steps.soak, steps.cleanup)
    with cells.context() as context:
        for number, step in enumerate(order):
            step(context, migration)
            for earlier in order[: number + 1]:
                earlier(context, migration)
        assert context.topology.migration(migration).state is State.COMPLETED
        assert context.topology.route("7").epoch == 2


def test_nothing_that_writers_were_told_is_lost(cells: TwoCells, acme: Organization) -> None:
    """Three writers follow the gate's answers through a whole move."""
    with writers(cells, 3) as acknowledged:
        migration = ready(cells, acme)
        with cells.context() as context:
            steps.cutover(context, migration)
        before = dict(acknowledged)
        eventually(lambda: all(acknowledged[one] > count + 20 for one, count in before.items()))
    with cells.admin("cell-2") as connection:
        found = dict(
            connection.execute(
                "SELECT title, counter FROM issues WHERE organization_id = 7 AND counter > 0"
            ).fetchall()
        )
    assert found == acknowledged
    assert len(before) == 3


@contextmanager
def writers(cells: TwoCells, count: int) -> Iterator[dict[str, int]]:
    """Writers that count what was acknowledged, and go where the gate sends them."""
    acknowledged: dict[str, int] = {}
    stop = threading.Event()

    def work(title: str) -> None:
        cell, connection = "cell-1", cells.application("cell-1", autocommit=True)
        while not stop.is_set():
            try:
                connection.execute(
                    "UPDATE issues SET counter = counter + 1 "
                    "WHERE organization_id = 7 AND title = %s",
                    (title,),
                )
            except psycopg.Error as error:
                if error.sqlstate not in {MOVED, BEING_MOVED}:
                    raise
                if error.sqlstate == MOVED:
                    connection.close()
                    cell = "cell-2"
                    connection = cells.application(cell, autocommit=True)
            else:
                acknowledged[title] = acknowledged.get(title, 0) + 1
            time.sleep(0.002)
        connection.close()

    threads = [threading.Thread(target=work, args=(f"issue {n + 1}",)) for n in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield acknowledged
    finally:
        stop.set()
        for thread in threads:
            thread.join()


class Fault(Exception):
    """What a test throws into a step."""


def store_that_fails(kind: str, verb: str, *, after: bool, error: BaseException) -> type[Context]:
    """A context whose `kind` store raises `error` at `verb`: the first time only."""

    class Faulty(Context):
        @classmethod
        def from_settings(cls, *arguments: Any, **named: Any) -> Context:
            made = super().from_settings(*arguments, **named)
            store = made.stores[kind]
            opened = store.open
            pending = [error]

            @contextmanager
            def open_faulty(*arguments: Any, **options: Any) -> Iterator[Any]:
                with opened(*arguments, **options) as move:
                    real: Callable[..., Any] = getattr(move, verb)

                    def faulty(*arguments: Any) -> Any:
                        if not pending:
                            return real(*arguments)
                        if after:
                            real(*arguments)
                        raise pending.pop()

                    setattr(move, verb, faulty)
                    yield move

            store.open = open_faulty  # type: ignore[method-assign]
            return made

    return Faulty


@pytest.mark.parametrize("kind", ["postgres", "redis"])
@pytest.mark.parametrize("verb", ["freeze", "finish"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_failure_before_the_flip_leaves_the_source_serving(
    cells: TwoCells, acme: Organization, kind: str, verb: str, after: bool
) -> None:
    migration = ready(cells, acme)
    faulty = store_that_fails(kind, verb, after=after, error=Fault("thrown"))
    with cells.context(kind=faulty) as context, pytest.raises(Fault):
        steps.cutover(context, migration)
    assert touch(cells, "cell-1") is None
    with cells.organization_redis("cell-1", "7") as client:
        assert client.incr("org:{7}:counter") == 6
    assert cells.migration(migration).state is State.READY
    assert touch(cells, "cell-2") == BEING_MOVED
    with cells.context() as context:
        steps.cutover(context, migration)
    assert touch(cells, "cell-2") is None
    assert touch(cells, "cell-1") == MOVED
    with cells.organization_redis("cell-2", "7") as client:
        assert client.incr("org:{7}:counter") == 7


@pytest.mark.parametrize("kind", ["postgres", "redis"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_failure_after_the_flip_is_finished_by_the_next_attempt(
    cells: TwoCells, acme: Organization, kind: str, after: bool
) -> None:
    migration = ready(cells, acme)
    faulty = store_that_fails(kind, "hand_over", after=after, error=Fault("thrown"))
    with cells.context(kind=faulty) as context, pytest.raises(Fault):
        steps.cutover(context, migration)
    assert cells.migration(migration).state is State.SOAKING
    assert touch(cells, "cell-1") in {MOVED, BEING_MOVED}, "never both cells"
    with cells.context() as context, pytest.raises(WrongState):
        steps.abort(context, migration, "too late")
    with cells.context() as context:
        steps.cutover(context, migration)
    assert touch(cells, "cell-2") is None
    assert touch(cells, "cell-1") == MOVED


def test_a_transient_failure_of_the_hand_over_is_tried_again_at_once(
    cells: TwoCells, acme: Organization
) -> None:
    migration = ready(cells, acme)
    faulty = store_that_fails("redis", "hand_over", after=False, error=Unreachable("a moment"))
    with cells.context(kind=faulty) as context:
        steps.cutover(context, migration)
    assert touch(cells, "cell-2") is None


def flip_that_fails(cells: TwoCells, monkeypatch: pytest.MonkeyPatch, *, happened: bool) -> None:
    real = Topology.flip

    def flip(self: Topology, *arguments: Any) -> Any:
        if happened:
            real(self, *arguments)
        raise OutcomeUnknown("the connection broke while committing")

    monkeypatch.setattr(Topology, "flip", flip)


def test_an_unknown_flip_that_happened_goes_forward(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = ready(cells, acme)
    flip_that_fails(cells, monkeypatch, happened=True)
    with cells.context() as context:
        steps.cutover(context, migration)
    assert cells.migration(migration).state is State.SOAKING
    assert (touch(cells, "cell-1"), touch(cells, "cell-2")) == (MOVED, None)


def test_an_unknown_flip_that_did_not_happen_thaws_the_source(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = ready(cells, acme)
    flip_that_fails(cells, monkeypatch, happened=False)
    with cells.context() as context, pytest.raises(TransientError, match="did not happen"):
        steps.cutover(context, migration)
    assert cells.migration(migration).state is State.READY
    assert (touch(cells, "cell-1"), touch(cells, "cell-2")) == (None, BEING_MOVED)


def test_while_the_topology_does_not_answer_the_organization_stays_frozen(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = ready(cells, acme)
    flip_that_fails(cells, monkeypatch, happened=True)

    def silent(*_arguments: Any) -> bool:
        raise Unreachable("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(Topology, "flip_outcome", silent)
        patch.setattr(barrier_module, "ASK_FOR_S", 0.5)
        with cells.context() as context, pytest.raises(OutcomeUnknown, match="stays frozen"):
            steps.cutover(context, migration)
    assert touch(cells, "cell-1") == BEING_MOVED, "thawing could lose writes: it had flipped"
    with cells.context() as context:
        steps.cutover(context, migration)
    assert (touch(cells, "cell-1"), touch(cells, "cell-2")) == (MOVED, None)


def test_a_transaction_held_open_makes_the_cutover_give_up_and_nobody_else_waits(
    cells: TwoCells, acme: Organization
) -> None:
    migration = ready(cells, acme, drain_deadline_s=1)
    stop = threading.Event()
    waits = []

    def neighbour() -> None:
        with cells.application("cell-1", autocommit=True) as connection:
            pid.append(connection.info.backend_pid)
            while not stop.is_set():
                connection.execute(
                    "UPDATE issues SET counter = counter + 1 WHERE organization_id = 8"
                )

    def watch() -> None:
        with cells.admin("cell-1") as connection:
            while not stop.is_set():
                waits.extend(
                    connection.execute(
                        "SELECT locktype FROM pg_locks WHERE pid = ANY (%s) AND NOT granted", (pid,)
                    ).fetchall()
                )

    pid: list[int] = []
    with cells.application("cell-1") as holder, ThreadPoolExecutor(2) as pool:
        holder.execute("UPDATE issues SET counter = 1 WHERE organization_id = 7")
        beside = [pool.submit(neighbour), pool.submit(watch)]
        eventually(lambda: bool(pid))
        try:
            with cells.context() as context, pytest.raises(DrainTimeout) as caught:
                steps.cutover(context, migration)
        finally:
            stop.set()
        assert str(holder.info.backend_pid) in str(caught.value), "the blocker is named"
        holder.commit()
    for one in beside:
        one.result()
    assert waits == []
    assert cells.migration(migration).state is State.READY
    assert touch(cells, "cell-1") is None


def test_a_second_controller_takes_over_and_the_first_can_do_no_more(
    cells: TwoCells, acme: Organization
) -> None:
    migration = ready(cells, acme)
    awake = threading.Event()
    taken = threading.Event()
    outcome: list[BaseException | None] = []

    class Sleepy(Context):
        """Its PostgreSQL falls asleep before the freeze, as a paused process does."""

        @classmethod
        def from_settings(cls, *arguments: Any, **named: Any) -> Context:
            made = super().from_settings(*arguments, **named)
            store = made.stores["postgres"]
            opened = store.open

            @contextmanager
            def open_sleepy(*arguments: Any, **options: Any) -> Iterator[Any]:
                with opened(*arguments, **options) as move:
                    real = move.freeze

                    def freeze(deadline_s: float) -> None:
                        taken.set()
                        awake.wait(120)
                        real(deadline_s)

                    move.freeze = freeze  # type: ignore[method-assign]
                    yield move

            store.open = open_sleepy  # type: ignore[method-assign]
            return made

    def first() -> None:
        try:
            with cells.context(kind=Sleepy) as context:
                steps.cutover(context, migration)
        except CellferryError as error:
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=first)
    thread.start()
    assert taken.wait(120)
    with cells.context() as context:
        steps.abort(context, migration, "the first controller seems dead")
    awake.set()
    thread.join()
    assert isinstance(outcome[0], CellferryError), "the first one must not succeed"
    assert cells.migration(migration).state is State.ABORTED
    assert touch(cells, "cell-1") is None
    assert not any(cells.rows("cell-2", "7").values())
    assert cells.traces("cell-1") == NO_TRACES
    assert cells.traces("cell-2") == NO_TRACES


@pytest.mark.parametrize("after", ["plan", "copy", "sync", "verify"])
def test_abort_leaves_no_trace(cells: TwoCells, acme: Organization, after: str) -> None:
    rows, keys = cells.rows("cell-1", "7"), cells.keys("cell-1", "7")
    migration = cells.plan(acme)
    with cells.context() as context:
        for step in (steps.copy, steps.sync, steps.verify):
            if after == "plan":
                break
            step(context, migration)
            if step.__name__ == after:
                break
        steps.abort(context, migration, "changed our mind")
        steps.abort(context, migration, "once more")
        assert context.topology.live_resources(migration) == []
    assert (cells.rows("cell-1", "7"), cells.keys("cell-1", "7")) == (rows, keys)
    assert not any(cells.rows("cell-2", "7").values())
    assert cells.keys("cell-2", "7") == {}
    with cells.admin("cell-2") as connection:
        assert connection.execute("SELECT count(*) FROM users").fetchone() == (0,)
    assert cells.traces("cell-1") == NO_TRACES
    assert cells.traces("cell-2") == NO_TRACES
    assert touch(cells, "cell-1") is None


def test_clean_up_waits_for_the_ttl_on_the_topologys_clock(
    cells: TwoCells, acme: Organization
) -> None:
    migration = ready(cells, acme, ttl_s=3_600)
    with cells.context() as context:
        steps.cutover(context, migration)
        steps.soak(context, migration)
        with pytest.raises(WrongState, match="retention lasts until"):
            steps.cleanup(context, migration)
    assert any(cells.rows("cell-1", "7").values())


def test_it_returns_only_after_the_old_copy_is_gone_and_a_late_clean_up_deletes_nothing(
    cells: TwoCells, acme: Organization
) -> None:
    """Hazard 4: A to B, then B to A; a clean-up of the first move must not touch the live copy."""
    options = MoveOptions(strategy="online", ttl_s=0, soak_s=0, **PATIENT)
    first = ready(cells, acme)
    with cells.context() as context:
        steps.cutover(context, first)
        steps.soak(context, first)
        with pytest.raises(Blocked, match=f"migration {first} left behind"):
            steps.plan(context, acme.slug, "cell-1", options=options, record=True)
        steps.cleanup(context, first)
        back = steps.plan(context, acme.slug, "cell-1", options=options, record=True)
        assert back.migration is not None
        for step in (steps.copy, steps.sync, steps.verify, steps.cutover, steps.soak):
            step(context, back.migration)
        rows = cells.rows("cell-1", "7")
        assert steps.cleanup(context, first).repeated
    assert any(rows.values())
    assert cells.rows("cell-1", "7") == rows
    assert touch(cells, "cell-1") is None


def test_reverse_rounds_bring_new_writes_to_the_old_cell(
    cells: TwoCells, acme: Organization
) -> None:
    migration = ready(cells, acme, ttl_s=3_600)
    with cells.context() as context:
        steps.cutover(context, migration)
        steps.soak(context, migration)
        assert touch(cells, "cell-2", "issue 3") is None
        with cells.organization_redis("cell-2", "7") as client:
            client.set("org:{7}:new", "x")
        steps.reverse_round(context, migration)
    assert cells.rows("cell-1", "7") == cells.rows("cell-2", "7")
    assert sorted(cells.keys("cell-1", "7")) == sorted(cells.keys("cell-2", "7"))
    assert touch(cells, "cell-1") == MOVED, "the old copy stays gated"


def test_a_halted_migration_does_nothing_until_a_person_clears_it(
    cells: TwoCells, acme: Organization
) -> None:
    from cellferry.errors import Halted
    from cellferry.model import Actor

    migration = cells.plan(acme)
    with cells.context() as context:
        context.topology.set_halted(migration, "wait for legal", Actor("boss"))
        with pytest.raises(Halted, match="wait for legal"):
            steps.copy(context, migration)
        context.topology.clear_halt("migration", str(migration), "legal agrees", Actor("boss"))
        steps.copy(context, migration)


def put_orphan(cells: TwoCells, key: int) -> None:
    """A comment at the destination that was copied before its issue, as a copy may leave it."""
    with cells.admin("cell-2") as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute("INSERT INTO comments VALUES (%s, %s, 'early')", (key, key))


def comment_exists(cells: TwoCells, cell: str, key: int) -> bool:
    with cells.admin(cell) as connection:
        found = connection.execute("SELECT 1 FROM comments WHERE id = %s", (key,)).fetchone()
    return found is not None


def test_a_child_copied_before_its_parent_goes_when_both_are_deleted(
    cells: TwoCells, acme: Organization
) -> None:
    key = 700_000_199
    migration = cells.plan(acme)
    with cells.context() as context:
        steps.copy(context, migration)
        with cells.application("cell-1") as connection:
            connection.execute("INSERT INTO issues VALUES (%s, 7, 'brief')", (key,))
            connection.execute("INSERT INTO comments VALUES (%s, %s, 'early')", (key, key))
            connection.execute("DELETE FROM issues WHERE id = %s", (key,))
        put_orphan(cells, key)
        steps.sync(context, migration)
        assert not comment_exists(cells, "cell-2", key)
        steps.verify(context, migration)


def test_an_early_child_of_another_organizations_move_is_left_alone(
    cells: TwoCells, acme: Organization
) -> None:
    key = 700_000_199  # between the keys of the organization that is verified
    migration = cells.plan(acme)
    with cells.context() as context:
        steps.copy(context, migration)
        with cells.admin("cell-1") as connection:
            connection.execute("SET session_replication_role = replica")
            connection.execute("INSERT INTO issues VALUES (%s, 8, 'of the neighbour')", (key,))
            connection.execute("INSERT INTO comments VALUES (%s, %s, 'early')", (key, key))
            # logged for every moving organization, as a deferred insert of a child is
            connection.execute(
                "INSERT INTO cellferry.key_log (organization, relation, key) "
                "VALUES ('7', 'public.comments', ARRAY[%s])",
                (str(key),),
            )
        put_orphan(cells, key)
        steps.sync(context, migration)
        steps.verify(context, migration)
    assert comment_exists(cells, "cell-2", key)


def test_an_early_child_that_stays_without_its_parent_is_a_difference(
    cells: TwoCells, acme: Organization
) -> None:
    migration = cells.plan(acme)
    with cells.context() as context:
        steps.copy(context, migration)
        put_orphan(cells, 700_000_199)
        with pytest.raises(VerificationFailed, match="orphan"):
            steps.verify(context, migration)
