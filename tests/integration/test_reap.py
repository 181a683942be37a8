"""What dead controllers leave behind is finished, undone or removed; what lives is left alone."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
import yaml

from cellferry import phases, settings
from cellferry.errors import CellferryError, WrongState
from cellferry.migration import reap_table, steps
from cellferry.migration.reap import Reaped, reap
from cellferry.model import Actor, Organization, State
from cellferry.phases import Phase
from cellferry.topology import Topology, heartbeat
from cellferry.topology.reaping import Known
from fixtures.cells import NO_TRACES, TwoCells
from fixtures.gated import eventually

BEING_MOVED, HAS_MOVED = "CF002", "CF001"

BEFORE_FLIP = [
    Phase.CAUGHT_UP,
    Phase.BARRIER_BEGUN,
    Phase.FROZEN_ONE,
    Phase.FROZEN_ALL,
    Phase.FINISHED,
]
AFTER_FLIP = [
    Phase.FLIPPED,
    Phase.HANDED_OVER_ONE,
    Phase.RELEASED,
    Phase.HAND_OVER_KEPT,
]
GIVEN_UP = [Phase.UNDONE, Phase.THAWED_ONE]


@pytest.fixture
def acme(cells: TwoCells) -> Organization:
    return cells.add_organization(7, issues=3)


def ready(cells: TwoCells, organization: Organization, **options: Any) -> int:
    migration = cells.plan(organization, **options)
    with cells.context() as context:
        for step in (steps.copy, steps.sync, steps.verify):
            step(context, migration)
    return migration


def moved(cells: TwoCells, organization: Organization, **options: Any) -> int:
    """A migration that is retained."""
    migration = ready(cells, organization, **{"ttl_s": 3_600, **options})
    with cells.context() as context:
        steps.cutover(context, migration)
        steps.soak(context, migration)
    return migration


def refusal(cells: TwoCells, cell: str) -> str | None:
    """Write to both stores as the application does; return what refused it."""
    try:
        with cells.application(cell) as connection:
            connection.execute("UPDATE issues SET counter = counter + 1 WHERE organization_id = 7")
    except psycopg.Error as error:
        return error.sqlstate
    try:
        with cells.organization_redis(cell, "7") as client:
            client.incr("org:{7}:counter")
    except redis.exceptions.NoPermissionError:
        return "NOPERM"
    return None


def reaped(cells: TwoCells, **arguments: Any) -> Reaped:
    with cells.context() as context:
        return reap(context, **{"expired_after_s": 0.0, **arguments})


def verbs(done: Reaped) -> list[str]:
    return sorted({deed.verb for deed in done.deeds})


def running(cells: TwoCells, step: str, migration: int, *arguments: str) -> Callable[[], object]:
    """A step, to be run by a controller of its own."""

    def run() -> None:
        with cells.context() as context:
            getattr(steps, step)(context, migration, *arguments)

    return run


def dies(work: Callable[[], object], at: Phase) -> None:
    """Run `work` in a process of its own that is killed when it gets to `at`."""
    pid = os.fork()
    if pid == 0:
        given_up = False

        def die(phase: Phase) -> None:
            nonlocal given_up
            given_up = given_up or phase is Phase.UNDONE
            # a cutover begins with a thaw; that one is not meant
            if phase is at and (at is not Phase.THAWED_ONE or given_up):
                os.kill(os.getpid(), signal.SIGKILL)

        phases.listen(die)
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), f"it never got to {at!r}"


def state_of(cells: TwoCells) -> dict[str, str]:
    """A hash of everything in both cells and of what the topology says."""
    found = {}
    for cell in ("cell-1", "cell-2"):
        with cells.admin(cell) as connection:
            tables = [
                row[0]
                for row in connection.execute(
                    "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables"
                    " WHERE schemaname IN ('public', 'cellferry') ORDER BY 1"
                )
            ]
            rows = [
                connection.execute(f"SELECT t::text FROM {name} AS t ORDER BY 1").fetchall()
                for name in tables
            ]
        with redis.Redis.from_url(cells.connections[f"{cell}-redis-admin"]) as client:
            keys = {key: client.dump(key) for key in sorted(client.scan_iter(count=1_000))}
            users = sorted(client.acl_list())
        found[cell] = hashlib.sha256(repr((tables, rows, keys, users)).encode()).hexdigest()
    with psycopg.connect(cells.connections["cellferry-topology"]) as connection:
        rows = [
            connection.execute(f"SELECT t::text FROM topology.{name} AS t ORDER BY 1").fetchall()
            for name in ("migration", "route", "resource", "audit")
        ]
    found["topology"] = hashlib.sha256(repr(rows).encode()).hexdigest()
    return found


def assert_settled(cells: TwoCells) -> None:
    """A second run has nothing to do and changes nothing."""
    before = state_of(cells)
    again = reaped(cells)
    assert (again.deeds, again.attention, again.failed) == ([], [], [])
    assert state_of(cells) == before


# ── finisher ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("phase", [*BEFORE_FLIP, *AFTER_FLIP], ids=lambda phase: phase.name)
def test_an_organization_is_served_after_its_cutover_was_killed(
    cells: TwoCells, acme: Organization, phase: Phase
) -> None:
    migration = ready(cells, acme, ttl_s=3_600)

    dies(running(cells, "cutover", migration), phase)
    if phase not in (Phase.CAUGHT_UP, Phase.BARRIER_BEGUN):
        assert refusal(cells, "cell-1") is not None

    done = reaped(cells)

    assert done.failed == []
    serves, other = ("cell-1", "cell-2") if phase in BEFORE_FLIP else ("cell-2", "cell-1")
    assert refusal(cells, serves) is None
    assert refusal(cells, other) is not None
    after = cells.migration(migration)
    assert after.state is (State.READY if phase in BEFORE_FLIP else State.SOAKING)
    assert_settled(cells)
    with cells.context() as context:  # and the move goes on from there
        steps.cutover(context, migration)
        steps.soak(context, migration)
    assert refusal(cells, "cell-2") is None


@pytest.mark.parametrize("phase", [*BEFORE_FLIP, *AFTER_FLIP], ids=lambda phase: phase.name)
def test_an_organization_is_served_after_its_roll_back_was_killed(
    cells: TwoCells, acme: Organization, phase: Phase
) -> None:
    migration = moved(cells, acme)

    dies(running(cells, "roll_back", migration, "test"), phase)
    if phase not in (Phase.CAUGHT_UP, Phase.BARRIER_BEGUN):
        assert refusal(cells, "cell-2") is not None

    done = reaped(cells)

    assert done.failed == []
    serves, other = ("cell-2", "cell-1") if phase in BEFORE_FLIP else ("cell-1", "cell-2")
    assert refusal(cells, serves) is None
    assert refusal(cells, other) is not None
    after = cells.migration(migration)
    assert after.state is (State.RETAINED if phase in BEFORE_FLIP else State.ROLLED_BACK)
    assert_settled(cells)
    with cells.context() as context:
        steps.roll_back(context, migration, "again")
    assert refusal(cells, "cell-1") is None


@pytest.mark.parametrize("phase", GIVEN_UP, ids=lambda phase: phase.name)
@pytest.mark.parametrize("back", [False, True], ids=["cutover", "roll-back"])
def test_a_controller_that_died_between_giving_up_and_thawing_leaves_nothing_frozen(
    cells: TwoCells, acme: Organization, phase: Phase, back: bool
) -> None:
    limit = {"freeze_deadline_s": 1e-9}
    migration = moved(cells, acme) if back else ready(cells, acme, **limit)
    if back:
        with psycopg.connect(cells.connections["cellferry-topology"]) as connection:
            connection.execute(
                "UPDATE topology.migration SET options = options || %s", [json.dumps(limit)]
            )

    def gives_up() -> None:
        with cells.context() as context:
            if back:
                steps.roll_back(context, migration, "test")
            else:
                steps.cutover(context, migration)

    dies(gives_up, phase)
    serves = "cell-2" if back else "cell-1"
    assert cells.migration(migration).state is (State.RETAINED if back else State.READY)
    if phase is Phase.UNDONE:
        assert refusal(cells, serves) == BEING_MOVED

    done = reaped(cells)

    assert done.failed == []
    assert refusal(cells, serves) is None
    assert_settled(cells)


@pytest.mark.parametrize("by", ["reaper", "clean-up"])
def test_a_clean_up_leaves_nobody_frozen_whom_a_roll_back_left(
    cells: TwoCells, acme: Organization, by: str
) -> None:
    migration = moved(cells, acme, ttl_s=0.0)
    with psycopg.connect(cells.connections["cellferry-topology"]) as connection:
        connection.execute(
            "UPDATE topology.migration SET options = options || %s",
            [json.dumps({"freeze_deadline_s": 1e-9})],
        )

    dies(running(cells, "roll_back", migration, "test"), Phase.UNDONE)
    assert refusal(cells, "cell-2") == BEING_MOVED
    with cells.context() as context:
        steps.resume(context, migration, "the way back is not needed")
        if by == "reaper":
            number = context.topology.take_lease(migration, "clean-up", Actor("test"))
            context.topology.transition(
                migration, number, State.RETAINED, State.CLEANING, Actor("test")
            )
            done = reaped(cells)
            assert done.failed == []
            assert "thawed" in verbs(done)
            assert refusal(cells, "cell-2") is None
        steps.cleanup(context, migration)

    assert refusal(cells, "cell-2") is None
    assert cells.migration(migration).state is State.COMPLETED
    assert cells.traces("cell-1") == cells.traces("cell-2") == NO_TRACES


def test_an_abort_that_died_is_finished(cells: TwoCells, acme: Organization) -> None:
    migration = ready(cells, acme)

    def cutover() -> None:
        with cells.context() as context:
            steps.cutover(context, migration)

    def abort() -> None:
        with cells.context() as context:
            steps.abort(context, migration, "test")

    dies(cutover, Phase.FROZEN_ALL)
    dies(abort, Phase.ABORTED)
    assert refusal(cells, "cell-1") == BEING_MOVED

    done = reaped(cells)

    assert done.failed == []
    assert {"thawed", "abort finished"} <= set(verbs(done))
    assert refusal(cells, "cell-1") is None
    assert not any(cells.rows("cell-2", "7").values())
    assert cells.traces("cell-1") == cells.traces("cell-2") == NO_TRACES
    assert_settled(cells)


def test_an_abort_goes_on_in_the_next_run_when_its_time_is_over(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = ready(cells, acme)

    dies(running(cells, "abort", migration, "test"), Phase.ABORTED)
    monkeypatch.setattr("cellferry.migration.reap.ABORTS_FOR_S", 0.02)
    first = reaped(cells)
    assert first.failed == []
    assert "abort finished" not in verbs(first)
    assert any(cells.rows("cell-2", "7").values())

    monkeypatch.undo()
    assert "abort finished" in verbs(reaped(cells))
    assert cells.traces("cell-1") == cells.traces("cell-2") == NO_TRACES


def test_nobody_is_taken_over_who_was_heard_of(cells: TwoCells, acme: Organization) -> None:
    migration = ready(cells, acme)

    dies(running(cells, "cutover", migration), Phase.FROZEN_ALL)
    before = state_of(cells)

    done = reaped(cells, expired_after_s=3_600.0)

    assert done.deeds == []
    assert state_of(cells) == before
    assert refusal(cells, "cell-1") == BEING_MOVED


def test_a_copy_that_died_waits_for_its_retry(cells: TwoCells, acme: Organization) -> None:
    migration = cells.plan(acme)

    dies(running(cells, "copy", migration), Phase.COPY_BATCH)
    traces = {cell: cells.traces(cell) for cell in ("cell-1", "cell-2")}

    done = reaped(cells)

    assert (done.deeds, done.attention, done.failed) == ([], [], [])
    assert {cell: cells.traces(cell) for cell in ("cell-1", "cell-2")} == traces
    with cells.context() as context:
        for step in (steps.copy, steps.sync, steps.verify, steps.cutover):
            step(context, migration)
    assert refusal(cells, "cell-2") is None


def test_a_cutover_whose_drain_takes_longer_than_the_expiry_is_not_taken_over(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.1)
    migration = ready(cells, acme, drain_deadline_s=240)
    outcome: list[BaseException | None] = []

    def cutover() -> None:
        try:
            with cells.context() as context:
                steps.cutover(context, migration)
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=cutover)
    with cells.application("cell-1") as connection:
        connection.execute("UPDATE issues SET counter = 9 WHERE organization_id = 7")
        thread.start()
        with (
            cells.admin("cell-1") as watching,
            psycopg.connect(cells.connections["cellferry-topology"], autocommit=True) as topology,
        ):
            eventually(
                lambda: bool(
                    watching.execute(
                        "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
                        " AND mode = 'ExclusiveLock' AND database ="
                        " (SELECT oid FROM pg_database WHERE datname = current_database())"
                    ).fetchall()
                )
            )
            for _ in range(5):  # it says that it lives, again and again while writers drain
                topology.execute(
                    "UPDATE topology.migration SET heartbeat_at = now() - interval '1 hour'"
                    " WHERE id = %s",
                    (migration,),
                )
                eventually(
                    lambda: bool(
                        topology.execute(
                            "SELECT FROM topology.migration WHERE id = %s"
                            " AND heartbeat_at > now() - interval '10 minutes'",
                            (migration,),
                        ).fetchall()
                    )
                )
                assert reaped(cells, expired_after_s=120.0).deeds == []
    thread.join()
    assert outcome == [None]


def test_a_dead_destination_does_not_keep_the_source_frozen(
    cells: TwoCells, acme: Organization
) -> None:
    migration = ready(cells, acme)

    dies(running(cells, "cutover", migration), Phase.FROZEN_ALL)
    with unreachable(cells, "cell-2"):
        done = reaped(cells)

    assert refusal(cells, "cell-1") is None
    assert verbs(done) == ["thawed"]
    assert {(one.cell, one.store) for one in done.failed} == {
        ("cell-2", "postgres"),
        ("cell-2", "redis"),
    }
    assert done.exit_code == 75


def test_a_dead_source_does_not_keep_the_destination_closed_after_the_flip(
    cells: TwoCells, acme: Organization
) -> None:
    migration = ready(cells, acme, ttl_s=3_600)

    dies(running(cells, "cutover", migration), Phase.FLIPPED)
    assert refusal(cells, "cell-2") is not None
    with unreachable(cells, "cell-1"):
        reaped(cells)
        assert refusal(cells, "cell-2") is None
    assert not cells.migration(migration).facts.get("handed_over")

    assert reaped(cells).failed == []
    assert cells.migration(migration).facts["handed_over"]
    assert refusal(cells, "cell-1") == HAS_MOVED


def restarted_since_the_last_delta(cells: TwoCells, migration: int) -> None:
    """Let the new cell's Valkey be another process than the one that the cutover wrote to."""
    with psycopg.connect(cells.connections["cellferry-topology"], autocommit=True) as connection:
        changed = connection.execute(
            "UPDATE topology.migration SET facts = jsonb_set(facts, %(path)s, '\"another\"')"
            " WHERE id = %(id)s AND facts #> %(path)s IS NOT NULL",
            {
                "id": migration,
                "path": ["finished", "redis", "evidence", "destination_run_id"],
            },
        )
        assert changed.rowcount == 1


def test_a_destination_that_restarted_is_not_opened_alone(
    cells: TwoCells, acme: Organization
) -> None:
    migration = ready(cells, acme, ttl_s=3_600)
    dies(running(cells, "cutover", migration), Phase.FLIPPED)
    restarted_since_the_last_delta(cells, migration)

    with unreachable(cells, "cell-1"):
        done = reaped(cells)
        assert refusal(cells, "cell-2") is not None, "only cell-1 has what it may have lost"
    assert any("it was restarted" in one.remedy for one in done.failed)

    assert reaped(cells).failed == []
    assert refusal(cells, "cell-2") is None
    evidence = cells.migration(migration).facts["finished"]["redis"]["evidence"]
    assert evidence["destination_run_id"] != "another", "what it has now was brought to this one"


def test_what_was_written_at_the_new_cell_outlives_the_loss_of_its_marker(
    cells: TwoCells, acme: Organization
) -> None:
    """A killed Valkey has the rules of its users, and not the last second of its keys."""
    migration = ready(cells, acme, ttl_s=3_600)
    with cells.redis("cell-2") as client:
        importing = client.get("cellferry:gate:{7}")
    with cells.context() as context:
        steps.cutover(context, migration)
        steps.soak(context, migration)
    restarted_since_the_last_delta(cells, migration)
    with cells.redis("cell-2") as client:
        client.set("cellferry:gate:{7}", importing)
    with cells.organization_redis("cell-2", "7") as client:
        client.set("org:{7}:later", "acknowledged")

    done = reaped(cells)

    assert (done.failed, done.attention) == ([], [])
    with cells.organization_redis("cell-2", "7") as client:
        assert client.get("org:{7}:later") == "acknowledged"
        assert json.loads(client.get("cellferry:gate:{7}"))["state"] == "open"
    assert_settled(cells)


def test_a_cell_is_not_opened_alone_for_another_controller(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = ready(cells, acme, ttl_s=3_600)

    dies(running(cells, "cutover", migration), Phase.FLIPPED)
    ask = Topology.standing

    def overtaken(topology: Topology, migration_id: int) -> Known | None:
        with cells.context() as other:
            other.topology.take_lease(migration_id, "another", Actor("test"))
        return ask(topology, migration_id)

    monkeypatch.setattr(Topology, "standing", overtaken)
    with unreachable(cells, "cell-1"):
        reaped(cells)
    assert refusal(cells, "cell-2") is not None, "that is the other controller's to decide"


def test_a_roll_back_that_comes_too_late_does_not_pause_the_clean_up(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = moved(cells, acme, ttl_s=0.0)
    pause = Topology.set_paused

    def overtaken(topology: Topology, *arguments: Any) -> Any:
        if cells.migration(migration).state is State.RETAINED:
            number = topology.take_lease(migration, "clean-up", Actor("test"))
            topology.transition(migration, number, "retained", "cleaning", Actor("test"))
        return pause(topology, *arguments)

    monkeypatch.setattr(Topology, "set_paused", overtaken)
    with cells.context() as context:
        with pytest.raises(WrongState, match="is cleaning"):
            steps.roll_back(context, migration, "test")
        assert not cells.migration(migration).paused
        steps.cleanup(context, migration)
    assert cells.migration(migration).state is State.COMPLETED


@contextmanager
def unreachable(cells: TwoCells, cell: str) -> Iterator[None]:
    """The controllers' connections to `cell` lead nowhere."""
    before = dict(cells.connections)
    for name, url in before.items():
        if name.startswith(f"{cell}-"):
            scheme = url.split("://")[0]
            cells.connections[name] = f"{scheme}://nobody:x@127.0.0.1:1/0"
    try:
        yield
    finally:
        cells.connections.update(before)


# ── a failover or a restart forgot ──────────────────────────────────────────────────────────────


def forget_move(cells: TwoCells, cell: str, *, older: bool = False) -> None:
    """What a promotion of a standby that lagged does to a cell that had been told `moved`."""
    with cells.admin(cell) as connection:
        if older:
            connection.execute(
                "UPDATE cellferry.gate SET state = 'open', armed = true, epoch = epoch - 1,"
                " moved_to = NULL"
            )
        else:
            connection.execute("DELETE FROM cellferry.gate")
            connection.execute("DELETE FROM cellferry.lease")
    with cells.redis(cell) as client:
        if older:
            marker = json.loads(client.get("cellferry:gate:{7}"))
            marker.update(state="open", cell=cell, epoch=marker["epoch"] - 1)
            client.set("cellferry:gate:{7}", json.dumps(marker))
        else:
            client.delete("cellferry:gate:{7}", "cellferry:lease:{7}")
        reopen_user(client)


def reopen_user(client: redis.Redis) -> None:
    client.execute_command(
        *("ACL", "SETUSER", "org-7", "resetkeys", "~org:{7}:*", "%R~cellferry:gate:{7}"),
        *("+@all", "-@admin", "-@dangerous"),
    )


@pytest.mark.parametrize("older", [False, True], ids=["lost", "older"])
def test_a_cell_that_forgot_that_an_organization_left_is_told_again(
    cells: TwoCells, acme: Organization, older: bool
) -> None:
    migration = moved(cells, acme)
    forget_move(cells, "cell-1", older=older)

    done = reaped(cells)

    assert done.failed == []
    assert verbs(done) == ["gated again"]
    assert refusal(cells, "cell-1") == HAS_MOVED
    with cells.organization_redis("cell-1", "7") as client:
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.incr("org:{7}:counter")
        assert json.loads(client.get("cellferry:gate:{7}"))["cell"] == "cell-2"
    assert refusal(cells, "cell-2") is None
    assert_settled(cells)
    with cells.context() as context:  # the migration goes on owning it
        steps.reverse_round(context, migration)
        steps.roll_back(context, migration, "test")
    assert refusal(cells, "cell-1") is None


def test_a_cell_that_forgot_a_roll_back_is_told_again(cells: TwoCells, acme: Organization) -> None:
    migration = moved(cells, acme)
    with cells.context() as context:
        steps.roll_back(context, migration, "test")
    forget_move(cells, "cell-2")

    done = reaped(cells)

    assert done.failed == []
    assert verbs(done) == ["gated again"]
    assert refusal(cells, "cell-2") == HAS_MOVED
    assert refusal(cells, "cell-1") is None
    assert_settled(cells)


def test_a_user_that_a_restart_gave_its_rules_back_is_closed_again(
    cells: TwoCells, acme: Organization
) -> None:
    moved(cells, acme)
    with cells.redis("cell-1") as client:
        reopen_user(client)

    done = reaped(cells)

    assert verbs(done) == ["enforced"]
    with (
        cells.organization_redis("cell-1", "7") as client,
        pytest.raises(redis.exceptions.NoPermissionError),
    ):
        client.incr("org:{7}:counter")
    assert_settled(cells)


def test_a_user_that_a_restart_closed_again_gets_its_rules_back(
    cells: TwoCells, acme: Organization
) -> None:
    ready(cells, acme)
    with cells.redis("cell-1") as client:
        client.execute_command(
            *("ACL", "SETUSER", "org-7", "resetkeys", "%R~org:{7}:*", "%R~cellferry:gate:{7}")
        )
    assert refusal(cells, "cell-1") == "NOPERM"

    done = reaped(cells)

    assert verbs(done) == ["thawed"]
    assert refusal(cells, "cell-1") is None


@pytest.mark.parametrize("cell", ["cell-1", "cell-2"])
def test_a_migration_whose_gate_was_lost_is_marked_and_made_good_by_sync(
    cells: TwoCells, acme: Organization, cell: str
) -> None:
    migration = ready(cells, acme, ttl_s=3_600)
    with cells.admin(cell) as connection:
        connection.execute("DELETE FROM cellferry.gate")
    assert refusal(cells, "cell-1") is None  # a write that no log knows

    done = reaped(cells)

    assert verbs(done) == ["marked capture lost"]
    assert done.exit_code == 1
    after = cells.migration(migration)
    assert after.facts["capture_lost"]["reason"].startswith(f"{cell}/postgres lost the gate")
    assert after.state is State.SYNCING
    assert reaped(cells).deeds == []
    before = cells.rows("cell-1", "7")
    with cells.context() as context:
        for step in (steps.sync, steps.verify, steps.cutover):
            step(context, migration)
    assert cells.rows("cell-2", "7") == before
    assert reaped(cells).deeds == []


def test_a_copy_that_nobody_owns_and_that_opened_is_gated_and_reported(
    cells: TwoCells, acme: Organization
) -> None:
    migration = moved(cells, acme, ttl_s=0)
    with cells.admin("cell-1") as connection:
        saved = connection.execute("SELECT * FROM cellferry.gate").fetchone()
    with cells.context() as context:
        steps.cleanup(context, migration)
    assert saved is not None
    with cells.admin("cell-1") as connection:
        connection.execute(
            "INSERT INTO cellferry.gate (organization, state, armed, migration, attempt, epoch)"
            " VALUES ('7', 'open', true, %s, 1, 1)",
            [migration],
        )

    done = reaped(cells)

    assert verbs(done) == ["gated again"]
    assert refusal(cells, "cell-1") == HAS_MOVED or not any(cells.rows("cell-1", "7").values())
    with cells.admin("cell-1") as connection:
        row = connection.execute(
            "SELECT state, epoch, moved_to, armed FROM cellferry.gate"
        ).fetchone()
    assert row == ("moved", 2, "cell-2", False)
    assert done.exit_code == 1
    again = reaped(cells)
    assert again.deeds == []
    assert again.exit_code == 1


# ── leftovers ───────────────────────────────────────────────────────────────────────────────────


def completed(cells: TwoCells, organization: Organization) -> int:
    migration = moved(cells, organization, ttl_s=0)
    with cells.context() as context:
        steps.cleanup(context, migration)
    assert cells.traces("cell-1") == cells.traces("cell-2") == NO_TRACES
    return migration


def litter(cells: TwoCells, cell: str, migration: int, *, epoch: int, state: str = "open") -> None:
    """Everything that a migration may leave in a cell."""
    with cells.admin(cell) as connection:
        connection.execute(
            "INSERT INTO cellferry.gate (organization, state, armed, migration, attempt, epoch)"
            " VALUES ('7', %s, true, %s, 3, %s)",
            [state, migration, epoch],
        )
        connection.execute(
            "INSERT INTO cellferry.key_log (organization, relation, key) VALUES"
            " ('7', 'public.issues', '{1}')"
        )
        connection.execute(
            "INSERT INTO cellferry.lease (migration, organization, attempt) VALUES (%s, '7', 3)",
            [migration],
        )
        connection.execute(
            "INSERT INTO cellferry.checkpoint (migration, relation) VALUES (%s, 'public.issues')",
            [migration],
        )
        connection.execute(
            "INSERT INTO cellferry.imported_row VALUES (%s, 'public.users', '{1}')", [migration]
        )
    with cells.redis(cell) as client:
        rules = {"keys": ["~org:{7}:*"], "commands": ["+@all"], "selectors": []}
        marker = {"state": state, "cell": cell, "epoch": epoch, "migration": migration}
        client.set("cellferry:gate:{7}", json.dumps({**marker, "attempt": 3, "rules": rules}))
        client.set("cellferry:lease:{7}", json.dumps({"migration": migration, "attempt": 3}))
        client.set("cellferry:checkpoint:{7}", "{}")
        client.execute_command("ACL", "SETUSER", f"cellferry-{migration}-3-source", "on")
        if state != "open":
            client.execute_command(
                *("ACL", "SETUSER", "org-7", "resetkeys"),
                *("%R~org:{7}:*", "%R~cellferry:gate:{7}"),
            )


@pytest.mark.parametrize("state", ["open", "frozen"])
def test_what_an_ended_migration_left_is_removed(
    cells: TwoCells, acme: Organization, state: str
) -> None:
    migration = completed(cells, acme)
    litter(cells, "cell-2", migration, epoch=2, state=state)
    assert (refusal(cells, "cell-2") is None) == (state == "open")

    done = reaped(cells)

    assert (done.attention, done.failed) == ([], [])
    assert verbs(done) == ["removed"]
    assert cells.traces("cell-2") == NO_TRACES
    assert refusal(cells, "cell-2") is None
    with cells.context() as context:
        notes = [one for one in context.topology.audit(migration) if one.action == "reaped"]
    assert {note.evidence["verb"] for note in notes} == {"removed"}
    assert all(note.reason for note in notes)
    assert_settled(cells)


def test_what_the_topology_does_not_know_is_reported_and_left_alone(
    cells: TwoCells, acme: Organization
) -> None:
    completed(cells, acme)
    litter(cells, "cell-2", 999_999, epoch=2)
    before = state_of(cells)

    done = reaped(cells)

    assert done.deeds == []
    assert {deed.what.split()[0] for deed in done.attention} == {
        *("gate", "lease", "checkpoint", "imported_row", "acl_user"),
    }
    assert all(deed.remedy for deed in done.attention)
    assert done.exit_code == 1
    assert state_of(cells) == before


def test_a_gate_that_knows_more_than_the_topology_is_reported_and_left_alone(
    cells: TwoCells, acme: Organization
) -> None:
    migration = completed(cells, acme)
    litter(cells, "cell-2", migration, epoch=9, state="frozen")
    with cells.admin("cell-2") as connection:
        gate = connection.execute("SELECT g::text FROM cellferry.gate AS g").fetchall()

    done = reaped(cells)

    assert any("put back" in deed.reason for deed in done.attention)
    with cells.admin("cell-2") as connection:
        assert connection.execute("SELECT g::text FROM cellferry.gate AS g").fetchall() == gate


def test_a_log_without_a_gate_goes_and_others_stay(cells: TwoCells, acme: Organization) -> None:
    ready(cells, acme)
    refusal(cells, "cell-1")  # a write, which is logged
    with cells.admin("cell-1") as connection:
        connection.execute(
            "INSERT INTO cellferry.key_log (organization, relation, key)"
            " VALUES ('8', 'public.issues', '{1}'), ('8', 'public.issues', '{2}')"
        )
        kept = "SELECT count(*) FROM cellferry.key_log WHERE organization = '7'"
        logged = connection.execute(kept).fetchone()

        done = reaped(cells)

        assert verbs(done) == ["removed"]
        assert [deed.what for deed in done.deeds] == ["key_log 8"]
        assert connection.execute(kept).fetchone() == logged
        assert logged is not None
        assert logged[0] > 0
        left = connection.execute("SELECT FROM cellferry.key_log WHERE organization = '8'")
        assert left.rowcount == 0


def test_resources_that_are_gone_are_forgotten(cells: TwoCells, acme: Organization) -> None:
    migration = completed(cells, acme)
    with psycopg.connect(cells.connections["cellferry-topology"]) as connection:
        connection.execute("UPDATE topology.resource SET forgotten_at = NULL")

    done = reaped(cells)

    assert verbs(done) == ["forgotten"]
    with cells.context() as context:
        assert context.topology.live_resources(migration) == []
    assert_settled(cells)


def test_users_of_an_attempt_that_died_go_when_the_next_has_begun(
    cells: TwoCells, acme: Organization
) -> None:
    migration = ready(cells, acme)
    with cells.redis("cell-1") as client:
        client.execute_command("ACL", "SETUSER", f"cellferry-{migration}-1-source", "on")

    done = reaped(cells)

    assert [deed.what for deed in done.deeds] == [f"acl_user cellferry-{migration}-1-source"]
    assert cells.traces("cell-1")["redis users"] == []


def test_a_closed_user_without_a_gate_is_reported(cells: TwoCells, acme: Organization) -> None:
    assert acme.id == "7"
    with cells.redis("cell-1") as client:
        client.execute_command(
            *("ACL", "SETUSER", "org-7", "resetkeys", "%R~org:{7}:*", "%R~cellferry:gate:{7}")
        )
    before = state_of(cells)

    done = reaped(cells)

    # the organization has no migration: the topology knows its route all the same
    assert [deed.what for deed in done.attention] == ["closed_user org-7"]
    assert state_of(cells) == before


# ── manners ─────────────────────────────────────────────────────────────────────────────────────


def test_a_dry_run_says_all_and_changes_nothing(cells: TwoCells, acme: Organization) -> None:
    other = cells.add_organization(8)
    dying = ready(cells, acme)

    dies(running(cells, "cutover", dying), Phase.FROZEN_ALL)
    with cells.context() as context:
        migration = ready(cells, other)
        steps.abort(context, migration, "test")
    with cells.admin("cell-1") as connection:
        connection.execute(
            "INSERT INTO cellferry.lease (migration, organization, attempt) VALUES (%s, '8', 1)",
            [migration],
        )
    before = state_of(cells)

    done = reaped(cells, dry_run=True)

    assert state_of(cells) == before
    assert verbs(done) == ["removed", "thawed"]
    assert {row["outcome"] for row in reap_table.rows(done)} == {
        "would be removed",
        "would be thawed",
    }
    assert verbs(reaped(cells)) == ["removed", "thawed"]


def test_a_second_reaper_leaves_the_first_alone(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = ready(cells, acme)

    dies(running(cells, "cutover", migration), Phase.FROZEN_ALL)
    monkeypatch.setattr("cellferry.migration.reap.WAIT_FOR_OTHER_S", 0.1)
    with cells.context() as first, first.topology.only_reaper(0) as alone:
        assert alone
        second = reaped(cells)
    assert (second.busy, second.exit_code, second.deeds) == (True, 0, [])
    assert refusal(cells, "cell-1") == BEING_MOVED
    assert reaped(cells).busy is False
    assert refusal(cells, "cell-1") is None


def test_running_moves_are_not_disturbed(cells: TwoCells) -> None:
    organizations = [cells.add_organization(key, issues=200) for key in (7, 8)]
    done: list[Reaped] = []
    errors: list[CellferryError] = []
    over = threading.Event()

    def keep_reaping() -> None:
        while not over.is_set():
            try:
                # copies are slow to say that they live on a busy machine; nobody dies here
                done.append(reaped(cells, expired_after_s=120.0))
            except CellferryError as error:
                errors.append(error)

    thread = threading.Thread(target=keep_reaping)
    thread.start()
    try:
        for organization in organizations:
            migration = moved(cells, organization)
            with cells.context() as context:
                steps.roll_back(context, migration, "test")
                with psycopg.connect(cells.connections["cellferry-topology"]) as connection:
                    connection.execute("UPDATE topology.migration SET ttl_until = now()")
                steps.cleanup(context, migration)
            second = moved(cells, organization, ttl_s=0)
            with cells.context() as context:
                steps.cleanup(context, second)
    finally:
        over.set()
        thread.join()
    assert errors == []
    assert len(done) > 3
    assert [deed for one in done for deed in (*one.deeds, *one.attention, *one.failed)] == []
    assert cells.traces("cell-1") == cells.traces("cell-2") == NO_TRACES


def test_a_live_controller_that_is_taken_over_does_no_harm(
    cells: TwoCells, acme: Organization
) -> None:
    """With no patience at all the reaper takes cutovers over as they run: safe, and they retry."""
    migration = ready(cells, acme, ttl_s=3_600)
    over = threading.Event()

    def keep_reaping() -> None:
        while not over.is_set():
            reaped(cells)

    thread = threading.Thread(target=keep_reaping)
    thread.start()
    try:
        for _ in range(3):
            try:
                with cells.context() as context:
                    steps.cutover(context, migration)
                break
            except CellferryError:
                continue
    finally:
        over.set()
        thread.join()
    reaped(cells)
    with cells.context() as context:
        route = context.topology.route("7")
    other = "cell-1" if route.cell == "cell-2" else "cell-2"
    assert refusal(cells, route.cell) is None
    assert refusal(cells, other) is not None


def test_the_command_finishes_what_a_killed_controller_left(
    cells: TwoCells, acme: Organization, tmp_path: Path
) -> None:
    migration = ready(cells, acme)

    dies(running(cells, "cutover", migration), Phase.FROZEN_ALL)
    connections = tmp_path / "connections.yaml"
    connections.write_text(yaml.safe_dump(cells.connections), encoding="utf-8")
    connections.chmod(0o600)
    environment = {
        **os.environ,
        "CELLFERRY_CONFIG": str(tmp_path / "cells.yaml"),
        "CELLFERRY_CONNECTIONS": str(connections),
    }
    assert settings.load(tmp_path / "cells.yaml").cells

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cellferry.cli", "reap", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    looked = run("--dry-run", "--expired-after", "0")
    assert looked.returncode == 0, looked.stderr
    assert looked.stdout.endswith("dry run: 1 thawed\n")
    assert refusal(cells, "cell-1") == BEING_MOVED

    done = run("--json", "--expired-after", "0")
    assert done.returncode == 0, done.stderr
    thawed, *others = json.loads(done.stdout)["deeds"]
    assert thawed["verb"] == "thawed"
    # its Redis users are of no use to anybody any more
    assert all(deed["what"].startswith("acl_user cellferry-1-") for deed in others)
    assert refusal(cells, "cell-1") is None


def test_everything_is_audited(cells: TwoCells, acme: Organization) -> None:
    migration = ready(cells, acme)

    dies(running(cells, "cutover", migration), Phase.FROZEN_ALL)
    reaped(cells)
    with cells.context() as context:
        notes = [one for one in context.topology.audit(migration) if one.action == "reaped"]
        (note,) = [one for one in notes if one.evidence["verb"] == "thawed"]
        assert note.actor == Actor("test").name
        assert note.reason is not None
        assert "nobody was heard of" in note.reason
        assert "served again" in str(context.topology.migration(migration).last_error)
