"""Rolling an organization back after its flip: nothing is lost, whatever happens on the way."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from psycopg import sql

from cellferry import phases, settings
from cellferry.errors import (
    Blocked,
    CellferryError,
    DrainTimeout,
    Halted,
    Paused,
    TransientError,
    Unreachable,
    VerificationFailed,
    WrongState,
)
from cellferry.migration import MoveOptions, steps
from cellferry.migration.result import StepResult
from cellferry.model import Actor, Organization, State
from cellferry.phases import Phase
from cellferry.stores.redis import inventory
from cellferry.topology import Topology
from fixtures.cells import (
    APPLICATION_PASSWORD,
    MOVER_PASSWORD,
    NO_TRACES,
    PATIENT,
    SCHEMA,
    TwoCells,
)
from fixtures.gated import wait_long_at_the_gate
from fixtures.postgres import FreshDatabases
from fixtures.severed_network import SeveredNetwork
from fixtures.valkey import MakeValkey

MOVED, BEING_MOVED, SERIALIZATION = "CF001", "CF002", "40001"
BEFORE_FLIP_BACK = (
    Phase.CAUGHT_UP,
    Phase.BARRIER_BEGUN,
    Phase.FROZEN_ONE,
    Phase.FROZEN_ALL,
    Phase.FINISHED,
)
AFTER_FLIP_BACK = (
    Phase.FLIPPED,
    Phase.HANDED_OVER_ONE,
    Phase.RELEASED,
    Phase.HAND_OVER_KEPT,
)


class KilledError(BaseException):
    """The controller's process ends here."""


@pytest.fixture
def acme(cells: TwoCells) -> Organization:
    cells.add_organization(8)  # a neighbour that stays
    return cells.add_organization(7)


def move(cells: TwoCells, organization: Organization, **options: Any) -> int:
    """Move to cell-2, to the end of the soak."""
    migration = cells.plan(organization, **options)
    with cells.context() as context:
        for step in (steps.copy, steps.sync, steps.verify, steps.cutover, steps.soak):
            step(context, migration)
    return migration


def roll_back(cells: TwoCells, migration: int, **options: Any) -> StepResult:
    with cells.context() as context:
        return steps.roll_back(context, migration, "the test wants it", **options)


@contextmanager
def at(phase: Phase, act: Callable[[], None]) -> Iterator[list[Phase]]:
    """Do something when a step first gets to `phase`; gives the phases that it passed."""
    passed: list[Phase] = []
    lock = threading.Lock()

    def hook(reached: Phase) -> None:
        with lock:
            is_first = reached is phase and phase not in passed
            passed.append(reached)
        if is_first:
            act()

    phases.listen(hook)
    try:
        yield passed
    finally:
        phases.listen(None)
    assert phase in passed, f"the step never got to {phase!r}: the test shows nothing"


def die() -> None:
    raise KilledError


def touch(cells: TwoCells, cell: str, organization: int = 7) -> str | None:
    """Write as the application does; return the SQLSTATE it was refused with, if it was."""
    try:
        with cells.application(cell) as connection:
            connection.execute(
                "UPDATE issues SET counter = counter + 1 WHERE organization_id = %s"
                " AND title = 'issue 1'",
                (organization,),
            )
    except psycopg.Error as error:
        return error.sqlstate
    return None


def redis_writes(cells: TwoCells, cell: str) -> bool:
    """Whether the application may write the organization's keys there."""
    with cells.organization_redis(cell, "7") as client:
        try:
            client.incr("org:{7}:counter")
        except redis.exceptions.NoPermissionError:
            return False
    return True


def expiries(cells: TwoCells, cell: str) -> dict[str, Any]:
    """When each key expires, and each field of a hash that can."""
    found: dict[str, Any] = {}
    with cells.redis(cell) as client:
        for key in client.scan_iter(match="org:\\{7\\}:*", count=1000):
            found[key] = client.pexpiretime(key)
            if client.type(key) == "hash" and has_field_ttls(client):
                fields = sorted(client.hkeys(key))
                found[f"{key} fields"] = client.execute_command(
                    "HPEXPIRETIME", key, "FIELDS", len(fields), *fields
                )
    return found


def has_field_ttls(client: redis.Redis) -> bool:
    return bool(client.execute_command("COMMAND", "INFO", "HPEXPIRE").get("hpexpire"))


def stream(cells: TwoCells, cell: str) -> Any:
    with cells.redis(cell) as client:
        name = "org:{7}:stream"
        groups = [
            {key: one[key] for key in ("name", "pending", "last-delivered-id")}
            for one in client.xinfo_groups(name)
        ]
        pending = [
            (one["message_id"], one["consumer"], one["times_delivered"])
            for one in client.xpending_range(name, "workers", "-", "+", 10)
        ]
        return client.xrange(name), groups, pending


def live_at_the_new_cell(cells: TwoCells) -> None:
    """What the organization does there: every kind of change, in both stores."""
    with cells.application("cell-2") as connection:
        connection.execute("UPDATE issues SET counter = 77 WHERE id = 7000001")
        connection.execute("DELETE FROM issues WHERE id = 7000002")  # and its comments
        connection.execute("INSERT INTO issues VALUES (7900001, 7, 'written at the new cell', 1)")
        connection.execute("INSERT INTO comments VALUES (790000101, 7900001, 'as well')")
        connection.execute("UPDATE comments SET issue_id = 7900001 WHERE id = 700000301")
        connection.execute("INSERT INTO users VALUES (7900001, 'added there')")
        connection.execute("INSERT INTO memberships VALUES (7, 7900001)")
        connection.execute("UPDATE organizations SET slug = 'renamed' WHERE id = 7")
        connection.commit()
    with cells.organization_redis("cell-2", "7") as client:
        client.incrby("org:{7}:counter", 5)
        client.lpop("org:{7}:queue")
        client.rpush("org:{7}:queue", "d")
        client.delete("org:{7}:scores")
        client.pexpire("org:{7}:session", 500_000)
        client.set("org:{7}:new", "n", px=400_000)
        client.hset("org:{7}:hash", mapping={"a": "1", "b": "2", "c": "3"})
        if has_field_ttls(client):
            client.execute_command("HPEXPIRE", "org:{7}:hash", 900_000, "FIELDS", 2, "a", "b")
        client.xadd("org:{7}:stream", {"second": "one"})
        client.xreadgroup("workers", "worker-1", {"org:{7}:stream": ">"}, count=1)


# ── what comes back ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("strategy", ["online", "freeze-first"])
def test_it_comes_back_with_everything_that_was_written_since(
    cells: TwoCells, acme: Organization, strategy: str
) -> None:
    neighbour = cells.rows("cell-1", "8"), cells.keys("cell-1", "8")
    migration = move(cells, acme, strategy=strategy)
    live_at_the_new_cell(cells)
    rows, keys = cells.rows("cell-2", "7"), cells.keys("cell-2", "7")
    times, entries = expiries(cells, "cell-2"), stream(cells, "cell-2")

    roll_back(cells, migration)

    assert cells.rows("cell-1", "7") == rows
    assert sorted(cells.keys("cell-1", "7")) == sorted(keys)
    assert expiries(cells, "cell-1") == times
    assert stream(cells, "cell-1") == entries
    with cells.admin("cell-1") as connection:
        assert connection.execute("SELECT email FROM users WHERE id = 7900001").fetchall() == [
            ("added there",)
        ]
    with cells.context() as context:
        route = context.topology.route("7")
    assert (route.cell, route.epoch) == ("cell-1", 3)
    assert cells.migration(migration).state is State.ROLLED_BACK
    assert not cells.migration(migration).paused
    assert touch(cells, "cell-1") is None
    assert touch(cells, "cell-2") == MOVED
    assert redis_writes(cells, "cell-1")
    assert not redis_writes(cells, "cell-2")

    with cells.context() as context:
        steps.cleanup(context, migration)
        assert context.topology.live_resources(migration) == []
        assert steps.cleanup(context, migration).repeated
    assert not any(cells.rows("cell-2", "7").values())
    assert cells.keys("cell-2", "7") == {}
    assert cells.traces("cell-1") == NO_TRACES
    assert cells.traces("cell-2") == NO_TRACES
    assert (cells.rows("cell-1", "8"), cells.keys("cell-1", "8")) == neighbour
    with cells.admin("cell-2") as connection:
        assert connection.execute("SELECT count(*) FROM users").fetchall() == [(0,)], (
            "users that only it used went with it; they would grow stale there"
        )


def test_a_shared_user_that_changed_at_the_new_cell_comes_back_if_nobody_else_uses_it(
    cells: TwoCells, acme: Organization
) -> None:
    with cells.admin("cell-1") as connection:
        connection.execute("INSERT INTO memberships VALUES (8, 7000002)")  # used by both
    migration = move(cells, acme)
    with cells.application("cell-2", autocommit=True) as connection:
        connection.execute("UPDATE users SET email = 'changed 1' WHERE id = 7000001")
        connection.execute("UPDATE users SET email = 'changed 2' WHERE id = 7000002")

    result = roll_back(cells, migration)

    with cells.admin("cell-1") as connection:
        found = dict(
            connection.execute("SELECT id, email FROM users WHERE id IN (7000001, 7000002)")
        )
    assert found == {7000001: "changed 1", 7000002: "user7000002"}
    assert "1 rows differ that other organizations use there" in result.summary


def test_a_user_made_at_the_new_cell_is_up_to_date_there_the_next_time(
    cells: TwoCells, acme: Organization
) -> None:
    migration = move(cells, acme)
    live_at_the_new_cell(cells)  # makes user 7900001
    roll_back(cells, migration)
    with cells.context() as context:
        steps.cleanup(context, migration)
    with cells.application("cell-1", autocommit=True) as connection:
        connection.execute("UPDATE users SET email = 'changed at home' WHERE id = 7900001")

    again = move(cells, acme)
    with cells.application("cell-2", autocommit=True) as connection:
        found = connection.execute("SELECT email FROM users WHERE id = 7900001").fetchall()
        assert found == [("changed at home",)]
        connection.execute("UPDATE users SET email = 'changed there' WHERE id = 7900001")
    roll_back(cells, again)
    with cells.admin("cell-1") as connection:
        found = connection.execute("SELECT email FROM users WHERE id = 7900001").fetchall()
    assert found == [("changed there",)]


def test_writers_follow_it_there_and_back(cells: TwoCells, acme: Organization) -> None:
    """Acknowledged writes are counted on both sides of both flips."""
    with writers(cells, 3) as acknowledged:
        for _ in range(2):
            migration = move(cells, acme, soak_s=0.5)
            roll_back(cells, migration)
            with cells.context() as context:
                steps.cleanup(context, migration)
        time.sleep(0.2)
    with cells.admin("cell-1") as connection:
        found = dict(
            connection.execute(
                "SELECT title, counter FROM issues WHERE organization_id = 7 AND counter > 0"
            ).fetchall()
        )
    assert found == acknowledged
    assert sum(acknowledged.values()) > 50


@contextmanager
def writers(cells: TwoCells, count: int) -> Iterator[dict[str, int]]:
    """Writers that count what was acknowledged, and go where the gates send them."""
    acknowledged: dict[str, int] = {}
    stop = threading.Event()
    faults: list[BaseException] = []

    def work(title: str) -> None:
        cell, connection = "cell-1", cells.application("cell-1", autocommit=True)
        while not stop.is_set():
            try:
                connection.execute(
                    "UPDATE issues SET counter = counter + 1"
                    " WHERE organization_id = 7 AND title = %s",
                    (title,),
                )
            except psycopg.Error as error:
                if error.sqlstate not in {MOVED, BEING_MOVED}:
                    faults.append(error)
                    return
                if error.sqlstate == MOVED:
                    connection.close()
                    cell = json.loads(error.diag.message_detail or "")["cell"]
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
    assert not faults


@pytest.mark.parametrize(
    ("isolation", "refusal"),
    [
        (psycopg.IsolationLevel.READ_COMMITTED, MOVED),
        (psycopg.IsolationLevel.REPEATABLE_READ, SERIALIZATION),
        (psycopg.IsolationLevel.SERIALIZABLE, SERIALIZATION),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_writer_that_waits_through_it_learns_where_to_go(
    cells: TwoCells, acme: Organization, isolation: psycopg.IsolationLevel, refusal: str
) -> None:
    migration = move(cells, acme)
    wait_long_at_the_gate(cells.connections["cell-2-postgres-admin"])
    outcome: list[str | None] = []

    def write() -> None:
        with cells.application("cell-2") as connection:
            connection.isolation_level = isolation
            try:
                connection.execute("SELECT count(*) FROM issues")  # takes the snapshot
                connection.execute("UPDATE issues SET counter = 99 WHERE id = 7000001")
                connection.commit()
                outcome.append(None)
            except psycopg.Error as error:
                outcome.append(error.sqlstate)

    thread = threading.Thread(target=write)

    def wait_for_the_waiter() -> None:
        thread.start()
        with cells.admin("cell-2") as connection:
            until = time.monotonic() + 60
            while time.monotonic() < until:
                waits = connection.execute(
                    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
                ).fetchone()
                if waits and waits[0]:
                    return
                time.sleep(0.01)
        raise AssertionError("nobody waits")

    with at(Phase.FROZEN_ALL, wait_for_the_waiter):
        roll_back(cells, migration)
    thread.join()

    assert outcome == [refusal]
    with cells.admin("cell-1") as connection:
        counter = connection.execute("SELECT counter FROM issues WHERE id = 7000001").fetchone()
    assert counter == (0,)


def test_a_transaction_older_than_the_cutover_cannot_write_at_the_old_cell_afterwards(
    cells: TwoCells, acme: Organization
) -> None:
    """Its snapshot shows the gate as it was open before: it must not take that for now."""
    with cells.application("cell-1") as old:
        old.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        migration = cells.plan(acme)
        with cells.context() as context:
            for step in (steps.copy, steps.sync, steps.verify):
                step(context, migration)
            old.execute("SELECT 1 FROM issues")
            for step in (steps.cutover, steps.soak):
                step(context, migration)
        roll_back(cells, migration)

        with pytest.raises(psycopg.errors.SerializationFailure):
            old.execute("UPDATE issues SET counter = 99 WHERE id = 7000001")


# ── a controller that dies ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("phase", [*BEFORE_FLIP_BACK, *AFTER_FLIP_BACK])
def test_whatever_it_fails_at_a_retry_finishes(
    cells: TwoCells, acme: Organization, phase: Phase
) -> None:
    migration = move(cells, acme)
    live_at_the_new_cell(cells)

    with at(phase, die), pytest.raises(KilledError):
        roll_back(cells, migration)

    if phase in BEFORE_FLIP_BACK:
        assert cells.migration(migration).paused, "no clean-up may take the way back away"
        assert touch(cells, "cell-2") is None
        assert redis_writes(cells, "cell-2")
    roll_back(cells, migration)
    come_back_whole(cells, migration)


@pytest.mark.parametrize(
    "phase",
    [
        Phase.ROUND_DONE,
        Phase.BARRIER_BEGUN,
        Phase.FROZEN_ONE,
        Phase.FROZEN_ALL,
        Phase.FINISHED,
        Phase.FLIPPED,
        Phase.HANDED_OVER_ONE,
        Phase.RELEASED,
    ],
)
def test_wherever_its_process_is_killed_a_retry_finishes(
    cells: TwoCells, acme: Organization, phase: Phase
) -> None:
    migration = move(cells, acme)
    live_at_the_new_cell(cells)
    kill_process_at(cells, migration, phase)

    flipped = phase in AFTER_FLIP_BACK
    assert cells.migration(migration).state is (
        State.ROLLED_BACK
        if flipped
        else State.RETAINED
        if phase is Phase.ROUND_DONE
        else State.ROLLING_BACK
    )
    if phase is Phase.FROZEN_ALL:
        assert touch(cells, "cell-2") == BEING_MOVED
        assert touch(cells, "cell-1") == MOVED, "at no time do both cells take writes"
    roll_back(cells, migration)
    come_back_whole(cells, migration)


def kill_process_at(cells: TwoCells, migration: int, phase: Phase) -> None:
    """Run the roll-back in a process of its own, which gets SIGKILL when it reaches `phase`."""

    def hook(reached: Phase) -> None:
        if reached is phase:
            os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        try:
            phases.listen(hook)
            roll_back(cells, migration)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), f"the roll-back never got to {phase!r}"


def come_back_whole(cells: TwoCells, migration: int) -> None:
    """It is at cell-1 with all that was written, and its clean-up leaves nothing."""
    assert cells.migration(migration).state is State.ROLLED_BACK
    assert not cells.migration(migration).paused
    assert cells.rows("cell-1", "7") == cells.rows("cell-2", "7")
    assert sorted(cells.keys("cell-1", "7")) == sorted(cells.keys("cell-2", "7"))
    assert expiries(cells, "cell-1") == expiries(cells, "cell-2")
    assert stream(cells, "cell-1") == stream(cells, "cell-2")
    assert touch(cells, "cell-1") is None
    assert redis_writes(cells, "cell-1")
    assert touch(cells, "cell-2") == MOVED
    assert not redis_writes(cells, "cell-2")
    with cells.context() as context:
        steps.cleanup(context, migration)
    assert cells.traces("cell-1") == NO_TRACES
    assert cells.traces("cell-2") == NO_TRACES
    assert any(cells.rows("cell-1", "7").values())


@pytest.mark.parametrize("phase", [Phase.UNDONE, Phase.THAWED_ONE])
def test_one_that_dies_while_it_gives_up_leaves_nothing_frozen_to_the_next(
    cells: TwoCells, acme: Organization, phase: Phase
) -> None:
    migration = move(cells, acme)
    live_at_the_new_cell(cells)

    def give_up_and_die(reached: Phase) -> None:
        if reached is Phase.FROZEN_ALL:
            raise TransientError("the test makes it give up")
        if reached is phase:
            os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        try:
            phases.listen(give_up_and_die)
            roll_back(cells, migration)
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert cells.migration(migration).state is State.RETAINED

    roll_back(cells, migration)
    come_back_whole(cells, migration)


def test_a_clean_up_waits_until_the_old_cell_was_opened(
    cells: TwoCells, acme: Organization
) -> None:
    migration = move(cells, acme)
    with at(Phase.FLIPPED, die), pytest.raises(KilledError):
        roll_back(cells, migration)

    with cells.context() as context, pytest.raises(WrongState, match="was not opened yet"):
        steps.cleanup(context, migration)

    roll_back(cells, migration)
    come_back_whole(cells, migration)


def test_a_cutover_that_died_after_its_flip_is_finished_first(
    cells: TwoCells, acme: Organization
) -> None:
    migration = cells.plan(acme)
    with cells.context() as context:
        for step in (steps.copy, steps.sync, steps.verify):
            step(context, migration)
        with at(Phase.FLIPPED, die), pytest.raises(KilledError):
            steps.cutover(context, migration)

    roll_back(cells, migration)
    come_back_whole(cells, migration)


# ── others at the same time ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("phase", [Phase.ROUND_DONE, Phase.CAUGHT_UP, Phase.FROZEN_ALL])
@pytest.mark.parametrize("other", ["reverse_round", "cleanup", "soak"])
def test_other_steps_do_not_take_it_from_a_roll_back(
    cells: TwoCells, acme: Organization, phase: Phase, other: str
) -> None:
    migration = cells.plan(acme)
    with cells.context() as context:
        for step in (steps.copy, steps.sync, steps.verify, steps.cutover):
            step(context, migration)
        if other != "soak":
            steps.soak(context, migration)
    outcome: list[CellferryError] = []

    def interfere() -> None:
        with cells.context() as context, pytest.raises((Paused, WrongState)) as refused:
            getattr(steps, other)(context, migration)
        outcome.append(refused.value)

    with at(phase, interfere):
        roll_back(cells, migration)

    assert outcome
    come_back_whole(cells, migration)


def test_a_clean_up_that_has_begun_cannot_be_rolled_back(
    cells: TwoCells, acme: Organization
) -> None:
    migration = move(cells, acme)
    with at(Phase.CLEANUP_BEGUN, die), cells.context() as context, pytest.raises(KilledError):
        steps.cleanup(context, migration)

    with pytest.raises(WrongState, match="its old copy is being deleted or is gone"):
        roll_back(cells, migration)
    with cells.context() as context:
        with pytest.raises(WrongState, match="no migration that could be rolled back"):
            steps.migration_to_roll_back(context, "org-7")
        steps.cleanup(context, migration)
    assert touch(cells, "cell-2") is None


def test_a_roll_back_that_begins_takes_the_way_from_a_clean_up_that_was_about_to(
    cells: TwoCells, acme: Organization
) -> None:
    """The TTL is over, and both are wanted: only one of them happens."""
    migration = move(cells, acme)
    with cells.context() as context:
        context.topology.set_paused(migration, True, Actor("test"), "it is being rolled back: now")
        with pytest.raises(Paused):
            steps.cleanup(context, migration)
    roll_back(cells, migration)
    come_back_whole(cells, migration)


def test_a_clean_up_that_a_roll_back_overtakes_deletes_nothing(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had asked whether it may, and a whole roll-back came before it went on."""
    migration = move(cells, acme)
    real = Topology.take_lease
    rows = cells.rows("cell-2", "7")

    def overtaken(self: Topology, *arguments: Any) -> int:
        monkeypatch.setattr(Topology, "take_lease", real)
        roll_back(cells, migration)
        return real(self, *arguments)

    monkeypatch.setattr(Topology, "take_lease", overtaken)
    with cells.context() as context, pytest.raises(WrongState, match="needs cleaning or retained"):
        steps.cleanup(context, migration)

    assert cells.rows("cell-1", "7") == rows
    come_back_whole(cells, migration)


def test_a_pause_that_a_person_set_for_another_reason_stays(
    cells: TwoCells, acme: Organization
) -> None:
    migration = move(cells, acme)
    with cells.context() as context:
        context.topology.set_paused(migration, True, Actor("operator"), "nobody touches this")
    roll_back(cells, migration)

    assert cells.migration(migration).paused
    with cells.context() as context, pytest.raises(Paused):
        steps.cleanup(context, migration)


# ── when it gives up, the new cell serves on ────────────────────────────────────────────────────


def serves_on(cells: TwoCells, migration: int) -> None:
    """The new cell serves, nothing is frozen, and no clean-up comes."""
    assert cells.migration(migration).state is State.RETAINED
    assert cells.migration(migration).paused
    assert touch(cells, "cell-2") is None
    assert redis_writes(cells, "cell-2")
    assert touch(cells, "cell-1") == MOVED


def test_a_transaction_that_is_held_open_makes_it_give_up(
    cells: TwoCells, acme: Organization
) -> None:
    migration = move(cells, acme, drain_deadline_s=1)
    with cells.application("cell-2") as held:
        held.execute("UPDATE issues SET counter = 5 WHERE id = 7000003")
        with pytest.raises(DrainTimeout) as given_up:
            roll_back(cells, migration)
        held.commit()
    assert "cell-2 serves on" in str(given_up.value)

    serves_on(cells, migration)
    roll_back(cells, migration)
    come_back_whole(cells, migration)


def test_a_difference_at_the_old_cell_is_found(cells: TwoCells, acme: Organization) -> None:
    migration = move(cells, acme)
    with cells.admin("cell-1") as rogue:
        rogue.execute("SET session_replication_role = replica")
        rogue.execute("UPDATE issues SET title = 'forged' WHERE id = 7000004")
    with pytest.raises(VerificationFailed, match="7000004"):
        roll_back(cells, migration)

    serves_on(cells, migration)
    with cells.admin("cell-1") as rogue:
        rogue.execute("SET session_replication_role = replica")
        rogue.execute("UPDATE issues SET title = 'issue 4' WHERE id = 7000004")
    roll_back(cells, migration)
    # The halt outlives it, as every halt: no clean-up before a person has looked.
    with cells.context() as context:
        with pytest.raises(Halted, match="7000004"):
            steps.cleanup(context, migration)
        context.topology.clear_halt("migration", str(migration), "a forged row", Actor("test"))
    come_back_whole(cells, migration)


@pytest.mark.parametrize("dead", ["cell-1", "cell-2"])
def test_a_cell_that_does_not_answer_is_named_and_nothing_changes(
    cells: TwoCells, acme: Organization, dead: str
) -> None:
    network = SeveredNetwork(cells.connections[f"{dead}-postgres"])
    cells.connections[f"{dead}-postgres"] = network.url
    try:
        migration = move(cells, acme)
        network.go_down()
        with pytest.raises(Unreachable) as unanswered:
            roll_back(cells, migration)
        hint = unanswered.value.hint or ""
        assert ("nothing can be brought back" in hint) is (dead == "cell-2")
        assert ("cell-2 serves on" in hint) is (dead == "cell-1")
        assert "Its clean-up is paused" in hint
        serves_on(cells, migration)
        with cells.context() as context:
            assert context.topology.route("7").epoch == 2

        network.come_up()
        roll_back(cells, migration)
        come_back_whole(cells, migration)
    finally:
        network.close()


@pytest.mark.parametrize("changed", ["cell-1", "cell-2"])
def test_a_schema_that_changed_on_one_side_is_named(
    cells: TwoCells, acme: Organization, changed: str
) -> None:
    migration = move(cells, acme)
    with cells.admin(changed) as connection:
        connection.execute("ALTER TABLE issues ADD COLUMN labels text")
    with pytest.raises(Blocked, match="labels"):
        roll_back(cells, migration)

    serves_on(cells, migration)
    other = {"cell-1": "cell-2", "cell-2": "cell-1"}[changed]
    with cells.admin(other) as connection:
        connection.execute("ALTER TABLE issues ADD COLUMN labels text")
    roll_back(cells, migration)
    come_back_whole(cells, migration)


# ── rows that must not come along ───────────────────────────────────────────────────────────────


@pytest.fixture
def crossing(cells: TwoCells, acme: Organization) -> int:
    """Migration of an organization at cell-2, whose issues may refer to those of organization 9."""
    for cell in ("cell-1", "cell-2"):
        with cells.admin(cell) as connection:
            connection.execute("ALTER TABLE issues ADD COLUMN same_as bigint REFERENCES issues")
    with cells.admin("cell-2") as connection:
        connection.execute("INSERT INTO organizations VALUES (9, 'org-9')")
        connection.execute("INSERT INTO issues VALUES (9000001, 9, 'of another')")
    cells.prepare()
    return move(cells, acme)


def cross(cells: TwoCells, to: int | None = 9000001) -> None:
    with cells.application("cell-2", autocommit=True) as connection:
        connection.execute("UPDATE issues SET same_as = %s WHERE id = 7000005", (to,))


@pytest.mark.parametrize("replayed", [False, True], ids=["fresh", "replayed before"])
def test_a_row_that_refers_to_another_organization_keeps_it_where_it_is(
    cells: TwoCells, crossing: int, replayed: bool
) -> None:
    cross(cells)
    if replayed:
        with cells.context() as context:
            steps.reverse_round(context, crossing)
    with pytest.raises(Blocked, match=r"same_as.* refer to rows of 9.*7000005"):
        roll_back(cells, crossing)

    serves_on(cells, crossing)
    cross(cells, None)
    roll_back(cells, crossing)
    come_back_whole(cells, crossing)


@pytest.mark.parametrize("phase", [Phase.ROUND_DONE, Phase.CAUGHT_UP])
def test_a_row_that_comes_to_refer_to_another_organization_meanwhile_stops_it(
    cells: TwoCells, crossing: int, phase: Phase
) -> None:
    with (
        at(phase, lambda: cross(cells)),
        pytest.raises(VerificationFailed, match="came to refer to"),
    ):
        roll_back(cells, crossing)
    serves_on(cells, crossing)


def test_a_row_of_others_that_refers_to_it_does_not_keep_it(cells: TwoCells, crossing: int) -> None:
    """It stays and is noted; clean-up of the new cell refuses while it is there."""
    with cells.application("cell-2", autocommit=True) as connection:
        connection.execute("UPDATE issues SET same_as = 7000005 WHERE id = 9000001")
    result = roll_back(cells, crossing)

    assert "rows of other organizations refer to rows of organization 7" in result.summary
    with cells.context() as context:
        with pytest.raises(Blocked, match="9000001"):
            steps.cleanup(context, crossing)
        with cells.application("cell-2", autocommit=True) as connection:
            connection.execute("UPDATE issues SET same_as = NULL WHERE id = 9000001")
        steps.cleanup(context, crossing)
    assert cells.traces("cell-2") == NO_TRACES


def test_a_key_that_others_took_at_the_old_cell_meanwhile_is_named(
    cells: TwoCells, acme: Organization
) -> None:
    migration = move(cells, acme)
    with cells.admin("cell-1") as connection:
        connection.execute("INSERT INTO issues VALUES (7900001, 8, 'taken')")
    live_at_the_new_cell(cells)  # which inserts 7900001 there
    with pytest.raises(CellferryError, match=r"7900001.*belongs to organization 8"):
        roll_back(cells, migration)
    serves_on(cells, migration)


def test_sequences_of_the_old_cell_go_beyond_what_comes_back(
    cells: TwoCells, acme: Organization
) -> None:
    for cell in ("cell-1", "cell-2"):
        with cells.admin(cell) as connection:
            connection.execute(
                "CREATE TABLE tickets (id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,"
                " organization_id bigint NOT NULL REFERENCES organizations)"
            )
            connection.execute(
                sql.SQL("GRANT ALL ON tickets TO {}").format(
                    sql.Identifier(f"app_{cells.databases.suffix}")
                )
            )
    cells.prepare()
    with cells.application("cell-1", autocommit=True) as connection:
        connection.execute("INSERT INTO tickets (organization_id) VALUES (7), (8)")
    migration = move(cells, acme)
    with cells.application("cell-2", autocommit=True) as connection:
        for _ in range(20):
            connection.execute("INSERT INTO tickets (organization_id) VALUES (7)")
    roll_back(cells, migration)

    with cells.application("cell-1", autocommit=True) as connection:
        highest = connection.execute("SELECT max(id) FROM tickets").fetchone()
        following = connection.execute(
            "INSERT INTO tickets (organization_id) VALUES (8) RETURNING id"
        ).fetchone()
    assert highest is not None
    assert following is not None
    assert following[0] > highest[0]


# ── a cutover without a way back ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("one_way", [False, True])
def test_a_cutover_does_not_begin_while_a_roll_back_could_not_write_at_the_old_cell(
    cells: TwoCells, acme: Organization, one_way: bool
) -> None:
    migration = cells.plan(acme, one_way=one_way)
    with cells.context() as context:
        for step in (steps.copy, steps.sync, steps.verify):
            step(context, migration)
        with cells.admin("cell-1") as connection:
            connection.execute(
                sql.SQL("REVOKE INSERT ON issues FROM {}").format(sql.Identifier(cells.mover_role))
            )
        if one_way:
            steps.cutover(context, migration)
            with pytest.raises(Blocked, match=r"no INSERT on 1 table: public\.issues"):
                steps.roll_back(context, migration, "test")
            assert touch(cells, "cell-2") is None
        else:
            with pytest.raises(Blocked, match=r"no INSERT on 1 table: public\.issues"):
                steps.cutover(context, migration)
            assert cells.migration(migration).state is State.READY
            assert touch(cells, "cell-1") is None


@pytest.mark.parametrize("step", ["cutover", "roll_back"])
def test_an_old_cell_whose_gate_is_switched_off_stops_a_cutover_and_a_roll_back(
    cells: TwoCells, acme: Organization, step: str
) -> None:
    """Without its trigger writes there are neither logged nor refused."""
    migration = cells.plan(acme)
    with cells.context() as context:
        for ready in (steps.copy, steps.sync, steps.verify):
            ready(context, migration)
        if step == "roll_back":
            steps.cutover(context, migration)
        with cells.admin("cell-1") as connection:
            connection.execute("ALTER TABLE issues DISABLE TRIGGER zz_cellferry_gate")
        refused = {
            "cutover": partial(steps.cutover, context, migration),
            "roll_back": partial(steps.roll_back, context, migration, "test"),
        }
        with pytest.raises(Blocked, match=r"trigger zz_cellferry_gate on public\.issues"):
            refused[step]()
    expected = State.READY if step == "cutover" else State.SOAKING
    assert cells.migration(migration).state is expected


@pytest.mark.parametrize("one_way", [False, True])
def test_an_older_engine_at_the_old_cell_is_no_way_back(
    cells: TwoCells, acme: Organization, one_way: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an older engine answers: only one engine is installed here."""
    migration = cells.plan(acme, one_way=one_way)
    monkeypatch.setattr(inventory, "can_go_back", lambda _old, _new: False)
    with cells.context() as context:
        for step in (steps.copy, steps.sync, steps.verify):
            step(context, migration)
        if not one_way:
            with pytest.raises(Blocked, match="its engine is older"):
                steps.cutover(context, migration)
            assert redis_writes(cells, "cell-1")
            return
        steps.cutover(context, migration)
        steps.soak(context, migration)
        with pytest.raises(Blocked, match="its engine is older"):
            steps.roll_back(context, migration, "test")
    serves_on(cells, migration)


# ── afterwards ──────────────────────────────────────────────────────────────────────────────────


def test_the_new_cells_copy_is_kept_for_its_own_ttl(cells: TwoCells, acme: Organization) -> None:
    migration = move(cells, acme)
    roll_back(cells, migration, ttl_s=3_600)

    with cells.context() as context, pytest.raises(WrongState, match="the copy in cell-2 must not"):
        steps.cleanup(context, migration)
    assert any(cells.rows("cell-2", "7").values())
    with cells.context() as context:
        assert (steps.ttl_until(context, migration) - context.topology.now()).seconds > 3_000


def test_repeating_it_is_harmless(cells: TwoCells, acme: Organization) -> None:
    migration = move(cells, acme)
    roll_back(cells, migration)
    assert roll_back(cells, migration).repeated
    with cells.context() as context:
        steps.cleanup(context, migration)
    assert roll_back(cells, migration).repeated
    assert cells.traces("cell-1") == NO_TRACES


def test_it_may_not_move_there_again_before_its_copy_there_is_gone(
    cells: TwoCells, acme: Organization
) -> None:
    migration = move(cells, acme)
    roll_back(cells, migration)
    with pytest.raises(Blocked, match="the copy that migration 1 left behind"):
        cells.plan(acme)
    with cells.context() as context:
        assert context.topology.live_migration("7") is None
        steps.cleanup(context, migration)

    again = move(cells, acme)
    with cells.context() as context:
        assert steps.migration_to_roll_back(context, "org-7").id == again
        steps.cleanup(context, again)
        with pytest.raises(WrongState):  # not the first one, which is long over
            steps.migration_to_roll_back(context, "org-7")


@pytest.fixture
def third(
    cells: TwoCells,
    fresh_databases: Callable[[], FreshDatabases],
    own_valkey: MakeValkey,
    tmp_path: Path,
) -> Iterator[TwoCells]:
    """The two cells, and a cell-3 like cell-2."""
    database = fresh_databases()
    valkey = own_valkey()
    role = f"app_{cells.databases.suffix}"
    with psycopg.connect(database.destination, autocommit=True) as connection:
        connection.execute(SCHEMA)
        connection.execute(
            sql.SQL("GRANT ALL ON ALL TABLES IN SCHEMA public TO {}").format(sql.Identifier(role))
        )
    cells.connections.update(
        {
            "cell-3-postgres-admin": database.destination,
            "cell-3-postgres": database.destination_server.url(
                cells.mover_role, MOVER_PASSWORD, database.name
            ),
            "cell-3-redis": valkey.url(),
            "cell-3-redis-admin": valkey.url(),
        }
    )
    with redis.Redis.from_url(valkey.url()) as client:
        client.execute_command(
            *("ACL", "SETUSER", "org-7", "on", f">{APPLICATION_PASSWORD}", "~org:{7}:*"),
            *("%R~cellferry:gate:{7}", "+@all", "-@admin", "-@dangerous"),
        )
    path = tmp_path / "cells.yaml"
    written = json.loads(path.read_text(encoding="utf-8"))
    written["cells"]["cell-3"] = json.loads(
        json.dumps(written["cells"]["cell-2"]).replace("cell-2", "cell-3")
    )
    path.write_text(json.dumps(written), encoding="utf-8")
    cells.settings = settings.load(path)
    with cells.context() as context:
        steps.prepare_cell(context, "cell-3")
    yield cells
    with psycopg.connect(database.destination, autocommit=True) as connection:
        for name in (cells.mover_role, role):
            connection.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))


def onward(cells: TwoCells, organization: Organization) -> int:
    """Record a migration to cell-3."""
    with cells.context() as context:
        found = steps.plan(
            context,
            organization.slug,
            "cell-3",
            options=MoveOptions(strategy="online", ttl_s=0, soak_s=0, **PATIENT),
            record=True,
        )
    assert found.migration is not None
    return found.migration


def test_it_may_move_elsewhere_before_its_copy_at_the_new_cell_is_gone(
    third: TwoCells, acme: Organization
) -> None:
    first = move(third, acme)
    roll_back(third, first)
    rows = third.rows("cell-1", "7")
    second = onward(third, acme)
    with third.context() as context:
        steps.copy(context, second)
        steps.cleanup(context, first)  # in the middle of it
        for step in (steps.sync, steps.verify, steps.cutover, steps.soak, steps.cleanup):
            step(context, second)
        assert context.topology.route("7").cell == "cell-3"
        assert context.topology.live_resources(first) == []
    assert third.rows("cell-3", "7") == rows
    assert third.traces("cell-1") == NO_TRACES
    assert third.traces("cell-2") == NO_TRACES


def test_it_cannot_be_rolled_back_past_a_later_migration(
    third: TwoCells, acme: Organization
) -> None:
    first = move(third, acme)
    second = onward(third, acme)
    with pytest.raises(WrongState, match=f"migration {second} .* has taken over"):
        roll_back(third, first)
    assert not third.migration(first).paused
    with third.context() as context:
        steps.copy(context, second)
        steps.abort(context, second, "test")
    with pytest.raises(Blocked, match="the log of changes since the cutover"):
        roll_back(third, first)
    serves_on(third, first)


def test_a_later_migration_that_gave_up_before_it_began_is_not_in_the_way(
    third: TwoCells, acme: Organization
) -> None:
    first = move(third, acme)
    second = onward(third, acme)
    with third.context() as context:
        steps.abort(context, second, "test")
    roll_back(third, first)
    come_back_whole(third, first)
