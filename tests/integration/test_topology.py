"""The topology keeps the record straight: routes, migrations, audit, resources, progress."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import psycopg
import pytest

from cellferry.errors import (
    CellferryError,
    Halted,
    InvalidInput,
    LeaseLost,
    Paused,
    PermanentError,
    Stopped,
    Unreachable,
    WrongState,
)
from cellferry.model import (
    LIVE_STATES,
    TRANSITIONS,
    Actor,
    Organization,
    Resource,
    Route,
    State,
    Strategy,
)
from cellferry.topology import Topology, schema
from cellferry.topology.progress import ProgressSink
from fixtures.topology import ACTOR, Bench

GATE = Resource("cell-1", "postgres", "gate", "1")


def as_someone_else(bench: Bench, statement: str) -> None:
    """Somebody with SQL access and good intentions."""
    with psycopg.connect(bench.url) as connection:
        connection.execute(statement.encode())


# --- schema ---------------------------------------------------------------------------------


def test_install_is_repeatable(fresh_database: str) -> None:
    with Topology(fresh_database) as topology:
        assert topology.install() == [file.name for file in schema.files()]
        assert topology.install() == []


def test_the_database_has_the_same_states_as_the_library(bench: Bench) -> None:
    with psycopg.connect(bench.url) as connection:
        transitions = connection.execute(
            "SELECT from_state, to_state FROM topology.allowed_transition"
        )
        index = connection.execute(
            "SELECT pg_get_indexdef('topology.migration_one_live'::regclass)"
        ).fetchone()

        assert set(transitions) == {(a.value, b.value) for a in State for b in TRANSITIONS[a]}
    assert set(re.findall(r"'(\w+)'::text", str(index))) == {state.value for state in LIVE_STATES}


def test_installers_take_turns(fresh_database: str) -> None:
    def install(_: int) -> list[str]:
        with Topology(fresh_database) as topology:
            return topology.install()

    with ThreadPoolExecutor(4) as pool:
        applied = list(pool.map(install, range(4)))

    assert sorted(map(len, applied)) == [0, 0, 0, len(schema.files())]


def test_a_topology_of_a_newer_version_is_refused(bench: Bench) -> None:
    as_someone_else(
        bench,
        "INSERT INTO topology.schema_version VALUES (9999, '9999_future.sql', 'x', now())",
    )

    with pytest.raises(PermanentError, match="newer than this cellferry"):
        bench.topology.install()


def test_a_schema_file_that_changed_after_it_was_applied_is_refused(bench: Bench) -> None:
    as_someone_else(bench, "UPDATE topology.schema_version SET digest = 'other' WHERE version = 1")

    with pytest.raises(PermanentError, match=r"0001_foundation\.sql differs"):
        bench.topology.install()


# --- cells, organizations, routes -------------------------------------------------------------


def test_an_organization_is_found_by_id_and_by_slug(bench: Bench) -> None:
    assert bench.topology.organization("2") == bench.topology.organization("bee")


def test_an_unknown_organization_is_answered_with_near_ones(bench: Bench) -> None:
    with pytest.raises(InvalidInput, match=r"no organization 'aunt'.*did you mean ant"):
        bench.topology.organization("aunt")


def test_the_slug_that_is_an_id_of_another_organization_is_ambiguous(bench: Bench) -> None:
    bench.topology.register_organization(Organization("9", "1"), "cell-1", ACTOR)

    with pytest.raises(InvalidInput, match=r"'1' is the id of one .* and the slug of another"):
        bench.topology.organization("1")


def test_registering_again_changes_nothing(bench: Bench) -> None:
    again = bench.topology.register_organization(Organization("1", "ant"), "cell-1", ACTOR)

    assert again == Route("1", "cell-1", 1)
    assert [row.action for row in bench.topology.organization_audit("1")] == ["registered"]


def test_registering_does_not_move_an_organization(bench: Bench) -> None:
    with pytest.raises(WrongState, match="lives in cell-1 at epoch 1, not in cell-2"):
        bench.topology.register_organization(Organization("1", "ant"), "cell-2", ACTOR)


def test_registering_many_is_all_or_none(bench: Bench) -> None:
    with pytest.raises(InvalidInput, match="no cell 'cell-9'"):
        bench.topology.register_organizations(
            [(Organization("7", "gnu"), "cell-1"), (Organization("8", "hen"), "cell-9")], ACTOR
        )

    assert len(bench.topology.routes()) == 3


def test_a_slug_belongs_to_one_organization(bench: Bench) -> None:
    with pytest.raises(InvalidInput, match="slug 'ant' belongs to the organization with id 1"):
        bench.topology.register_organization(Organization("7", "ant"), "cell-1", ACTOR)


def test_organizations_are_listed_by_cell_with_their_live_migration(bench: Bench) -> None:
    migration = bench.planned("2")

    rows = bench.topology.organizations(cell="cell-1")

    assert [(row.organization.slug, row.migration, row.state) for row in rows] == [
        ("ant", None, None),
        ("bee", migration.id, State.PLANNED),
        ("cat", None, None),
    ]


def test_organizations_are_searched_by_part_of_the_slug(bench: Bench) -> None:
    assert [row.organization.slug for row in bench.topology.organizations(search="A")] == [
        "ant",
        "cat",
    ]


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE topology.route SET epoch = 1 WHERE organization = '2'", "rises by one"),
        ("UPDATE topology.route SET epoch = epoch - 1", "rises by one"),
        ("UPDATE topology.route SET epoch = epoch + 2", "rises by one"),
        ("UPDATE topology.route SET cell = 'cell-3'", "rises by one"),
        ("DELETE FROM topology.route", "never deleted"),
        ("TRUNCATE topology.route", "never deleted"),
        ("UPDATE topology.audit SET reason = 'other'", "never changed"),
        ("DELETE FROM topology.audit", "never changed"),
        ("TRUNCATE topology.audit", "never changed"),
        ("DELETE FROM topology.route_history", "never changed"),
    ],
)
def test_history_and_epochs_hold_against_anyone_with_sql(
    bench: Bench, statement: str, message: str
) -> None:
    with pytest.raises(psycopg.errors.IntegrityConstraintViolation, match=message):
        as_someone_else(bench, statement)


def test_an_epoch_does_not_start_again_after_the_route_was_removed_by_force(bench: Bench) -> None:
    as_someone_else(
        bench,
        "ALTER TABLE topology.route DISABLE TRIGGER guard_route;"
        "DELETE FROM topology.route WHERE organization = '1';"
        "ALTER TABLE topology.route ENABLE TRIGGER guard_route",
    )

    with pytest.raises(PermanentError, match="has had epoch 1 before"):
        bench.topology.register_organization(Organization("1", "ant"), "cell-2", ACTOR)


def test_waiting_for_a_route_change_ends_with_the_new_route(bench: Bench) -> None:
    migration, attempt = bench.cutting_over()
    flip = threading.Timer(
        0.2, lambda: Topology(bench.url).flip(migration.id, attempt, ACTOR, 0, {})
    )
    flip.start()
    begun = time.monotonic()

    route = bench.topology.wait_for_route_change("1", after_epoch=1, timeout_s=240)

    flip.join()
    assert route == Route("1", "cell-2", 2)
    assert time.monotonic() - begun < 120


def test_waiting_for_a_route_change_ends_without_one(bench: Bench) -> None:
    assert bench.topology.wait_for_route_change("1", after_epoch=1, timeout_s=0.2) is None


# --- migrations -------------------------------------------------------------------------------


def test_a_new_migration_starts_from_the_route(bench: Bench) -> None:
    migration = bench.planned()

    assert (migration.source, migration.destination, migration.epoch) == ("cell-1", "cell-2", 1)
    assert (migration.state, migration.attempt) == (State.PLANNED, 0)
    assert migration.strategy is Strategy.ONLINE
    assert migration.facts == {"plan": {"rows": 5}}


@pytest.mark.parametrize(
    ("organization", "destination", "strategy", "error", "message"),
    [
        ("7", "cell-2", "online", InvalidInput, "no organization '7'"),
        ("1", "cell-9", "online", InvalidInput, "no cell 'cell-9'.*cell-1, cell-2, cell-3"),
        ("1", "cell-1", "online", InvalidInput, "source and destination are the same"),
        ("1", "cell-2", "quickly", InvalidInput, "no strategy 'quickly'.*online, freeze-first"),
    ],
)
def test_a_migration_that_makes_no_sense_is_refused(
    bench: Bench,
    organization: str,
    destination: str,
    strategy: str,
    error: type[CellferryError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        bench.topology.create_migration(organization, destination, strategy, {}, None, ACTOR)

    assert bench.topology.migrations() == []


def test_an_organization_moves_once_at_a_time(bench: Bench) -> None:
    first = bench.planned()

    with pytest.raises(
        WrongState, match=rf"already moving: migration {first.id} \(cell-1 -> cell-2\) is planned"
    ):
        bench.planned(destination="cell-3")


def test_of_many_who_start_a_migration_at_once_one_wins(bench: Bench) -> None:
    def create(_: int) -> str:
        with Topology(bench.url) as topology:
            try:
                topology.create_migration("1", "cell-2", "online", {}, None, ACTOR)
            except WrongState:
                return "refused"
            return "created"

    with ThreadPoolExecutor(6) as pool:
        results = sorted(pool.map(create, range(6)))

    assert results == ["created", *["refused"] * 5]


def test_one_live_migration_is_also_what_the_database_says(bench: Bench) -> None:
    bench.planned()

    with pytest.raises(psycopg.errors.UniqueViolation, match="migration_one_live"):
        as_someone_else(
            bench,
            "INSERT INTO topology.migration (organization, source, destination, epoch, strategy)"
            " VALUES ('1', 'cell-1', 'cell-3', 1, 'online')",
        )


def test_a_cordoned_cell_takes_nobody_in(bench: Bench) -> None:
    bench.topology.set_cordoned("cell-2", "disk is being replaced", ACTOR)

    with pytest.raises(WrongState, match="cell-2 is cordoned: disk is being replaced"):
        bench.planned()


def test_a_transition_and_its_audit_row_are_one(bench: Bench) -> None:
    migration = bench.planned()
    attempt = bench.topology.take_lease(migration.id, "host:1", ACTOR)

    bench.topology.transition(
        migration.id, attempt, "planned", "copying", ACTOR, {"rows": 3}, "as planned"
    )

    row = bench.topology.audit(migration.id)[-1]
    assert (row.from_state, row.to_state, row.epoch, row.attempt) == ("planned", "copying", 1, 1)
    assert (row.actor, row.role, row.reason) == ("ada", "operator", "as planned")
    assert (row.dag_run, row.try_number, row.evidence) == ("manual__1", 1, {"rows": 3})


def test_a_state_change_without_an_audit_row_does_not_commit(bench: Bench) -> None:
    migration = bench.planned()

    with pytest.raises(psycopg.errors.IntegrityConstraintViolation, match="without an audit row"):
        as_someone_else(bench, "UPDATE topology.migration SET state = 'copying'")

    assert bench.topology.migration(migration.id).state is State.PLANNED


def test_a_transition_from_another_state_is_refused(bench: Bench) -> None:
    migration = bench.planned()
    attempt = bench.topology.take_lease(migration.id, "test", ACTOR)

    with pytest.raises(WrongState, match="the migration is planned, not syncing"):
        bench.topology.transition(migration.id, attempt, "syncing", "ready", ACTOR)


def test_a_transition_that_does_not_exist_is_refused(bench: Bench) -> None:
    migration = bench.planned()
    attempt = bench.topology.take_lease(migration.id, "test", ACTOR)

    with pytest.raises(WrongState, match="never goes from planned to ready"):
        bench.topology.transition(migration.id, attempt, "planned", "ready", ACTOR)


def test_repeating_a_transition_is_harmless(bench: Bench) -> None:
    migration = bench.planned()
    attempt = bench.topology.take_lease(migration.id, "test", ACTOR)
    bench.topology.transition(migration.id, attempt, "planned", "copying", ACTOR)
    rows = len(bench.topology.audit(migration.id))

    again = bench.topology.transition(migration.id, attempt, "planned", "copying", ACTOR)

    assert again.state is State.COPYING
    assert len(bench.topology.audit(migration.id)) == rows


def test_facts_of_several_steps_add_up(bench: Bench) -> None:
    migration = bench.planned()
    attempt = bench.topology.take_lease(migration.id, "test", ACTOR)

    bench.topology.record(migration.id, attempt, {"copied": 1, "rounds": [1]})
    recorded = bench.topology.record(migration.id, attempt, {"rounds": [1, 2]})

    assert recorded.facts == {"plan": {"rows": 5}, "copied": 1, "rounds": [1, 2]}


def test_no_secret_reaches_the_database(bench: Bench) -> None:
    migration = bench.topology.create_migration(
        "1", "cell-2", "online", {"url": "postgresql://mover:hunter22@h/d"}, None, ACTOR
    )
    attempt = bench.topology.take_lease(migration.id, "test", ACTOR)
    text = "cannot reach redis://:hunter22@cell-1:6379"
    bench.topology.set_error(migration.id, text)
    bench.topology.set_paused(migration.id, True, ACTOR, text)
    bench.topology.set_halted(migration.id, text, ACTOR)
    bench.topology.record(migration.id, attempt, {"token": "hunter22"})
    bench.topology.transition(
        migration.id, attempt, "planned", "copying", ACTOR, {"error": text}, text
    )
    bench.topology.progress_sink(migration.id).report("redis", "copy", 1, 2, "keys", text)

    with psycopg.connect(bench.url) as connection:
        leaks = [
            table
            for table in ("migration", "audit", "progress", "resource")
            if connection.execute(
                psycopg.sql.SQL("SELECT 1 FROM topology.{} AS t WHERE t::text ~ 'hunter'").format(
                    psycopg.sql.Identifier(table)
                )
            ).fetchone()
        ]
    assert leaks == []


# --- lease --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [
        lambda topology, id_: topology.transition(id_, 1, "planned", "copying", ACTOR),
        lambda topology, id_: topology.record(id_, 1, {"late": True}),
        lambda topology, id_: topology.flip(id_, 1, ACTOR, 0, {}),
        lambda topology, id_: topology.check_lease(id_, 1),
    ],
    ids=["transition", "record", "flip", "check"],
)
def test_an_attempt_that_was_superseded_can_do_nothing(
    bench: Bench, write: Callable[[Topology, int], object]
) -> None:
    migration = bench.planned()
    assert bench.topology.take_lease(migration.id, "first", ACTOR) == 1
    assert bench.topology.take_lease(migration.id, "second", ACTOR) == 2

    with pytest.raises(LeaseLost, match=r"attempt 1 .* superseded by attempt 2"):
        write(bench.topology, migration.id)


def test_the_error_of_a_superseded_attempt_does_not_hide_the_newer_ones(bench: Bench) -> None:
    migration = bench.planned()
    bench.topology.take_lease(migration.id, "first", ACTOR)
    bench.topology.take_lease(migration.id, "second", ACTOR)
    bench.topology.set_error(migration.id, "mine", attempt=2)

    bench.topology.set_error(migration.id, "of a zombie", attempt=1)

    assert bench.topology.migration(migration.id).last_error == "mine"


def test_concurrent_takers_get_different_attempts(bench: Bench) -> None:
    migration = bench.planned()

    def take(number: int) -> int:
        with Topology(bench.url) as topology:
            return topology.take_lease(migration.id, f"taker {number}", ACTOR)

    with ThreadPoolExecutor(6) as pool:
        attempts = sorted(pool.map(take, range(6)))

    assert attempts == [1, 2, 3, 4, 5, 6]


def test_a_paused_migration_stops_at_the_next_check(bench: Bench) -> None:
    migration = bench.planned()
    attempt = bench.topology.take_lease(migration.id, "test", ACTOR)
    bench.topology.set_paused(migration.id, True, Actor("bob"), "lunch")

    with pytest.raises(Paused, match="paused by bob: lunch"):
        bench.topology.check_lease(migration.id, attempt)


def test_a_resumed_migration_goes_on(bench: Bench) -> None:
    migration = bench.planned()
    attempt = bench.topology.take_lease(migration.id, "test", ACTOR)
    bench.topology.set_paused(migration.id, True, ACTOR)
    bench.topology.set_paused(migration.id, False, ACTOR)

    bench.topology.check_lease(migration.id, attempt)

    actions = [row.action for row in bench.topology.audit(migration.id)]
    assert actions == ["created", "lease", "paused", "resumed"]


def test_a_halted_cell_stops_the_migrations_that_touch_it(bench: Bench) -> None:
    migration = bench.planned()
    attempt = bench.topology.take_lease(migration.id, "test", ACTOR)
    bench.topology.halt("cell", "cell-2", "replication is behind", ACTOR)

    with pytest.raises(Halted, match="cell-2 is halted by ada: replication is behind"):
        bench.topology.check_lease(migration.id, attempt)


def test_a_halt_lasts_until_it_is_cleared(bench: Bench) -> None:
    migration = bench.planned()
    attempt = bench.topology.take_lease(migration.id, "test", ACTOR)
    bench.topology.set_halted(migration.id, "mismatch", ACTOR)
    newer = bench.topology.take_lease(migration.id, "again", ACTOR)
    with pytest.raises(Halted, match="halted by ada: mismatch"):
        bench.topology.check_lease(migration.id, newer)

    bench.topology.clear_halt("migration", str(migration.id), "it was looked at", ACTOR)

    bench.topology.check_lease(migration.id, newer)
    assert attempt < newer


def test_only_a_silent_holder_is_taken_over(bench: Bench) -> None:
    silent, attempt = bench.cutting_over("1")
    alive, _ = bench.cutting_over("2")
    as_someone_else(
        bench,
        "UPDATE topology.migration SET heartbeat_at = now() - interval '1 minute'"
        f" WHERE id = {silent.id}",
    )

    assert bench.topology.take_over_silent(silent.id, "reaper", ACTOR, 30) == attempt + 1
    with pytest.raises(LeaseLost, match="works on migration"):
        bench.topology.take_over_silent(alive.id, "reaper", ACTOR, 30)


def test_a_check_keeps_the_lease_alive(bench: Bench) -> None:
    migration, attempt = bench.cutting_over()
    as_someone_else(
        bench, "UPDATE topology.migration SET heartbeat_at = now() - interval '1 minute'"
    )

    bench.topology.check_lease(migration.id, attempt)

    with pytest.raises(LeaseLost, match="works on migration"):
        bench.topology.take_over_silent(migration.id, "reaper", ACTOR, 30)


def test_a_holder_heard_of_in_the_future_is_silent(bench: Bench) -> None:
    """The topology's clock was set back: a dead holder must not hold on for as long."""
    dead, attempt = bench.cutting_over("1")
    alive, living = bench.cutting_over("2")
    as_someone_else(bench, "UPDATE topology.migration SET heartbeat_at = now() + interval '1 hour'")

    bench.topology.check_lease(alive.id, living)

    known = bench.topology.standing(dead.id)
    assert known is not None
    assert known.silent_s > 3_000
    assert bench.topology.take_over_silent(dead.id, "reaper", ACTOR, 30) == attempt + 1
    with pytest.raises(LeaseLost, match="works on migration"):
        bench.topology.take_over_silent(alive.id, "reaper", ACTOR, 30)


@pytest.mark.parametrize("stop", ["pause", "halt"])
def test_a_step_that_a_stop_does_not_concern_keeps_its_lease(bench: Bench, stop: str) -> None:
    migration, attempt = bench.cutting_over()
    if stop == "pause":
        bench.topology.set_paused(migration.id, True, ACTOR, "lunch")
    else:
        bench.topology.halt("cell", "cell-2", "disk", ACTOR)
    as_someone_else(
        bench, "UPDATE topology.migration SET heartbeat_at = now() - interval '1 minute'"
    )

    with pytest.raises(Stopped):
        bench.topology.check_lease(migration.id, attempt)

    with pytest.raises(LeaseLost, match="works on migration"):
        bench.topology.take_over_silent(migration.id, "reaper", ACTOR, 30)


# --- flip, retention ----------------------------------------------------------------------------


def test_the_flip_changes_everything_at_once(bench: Bench) -> None:
    migration, attempt = bench.cutting_over()
    before = bench.topology.now()

    route = bench.topology.flip(migration.id, attempt, ACTOR, 60, {"pause_s": 0.03})

    flipped = bench.topology.migration(migration.id)
    assert route == bench.topology.route("1") == Route("1", "cell-2", 2)
    assert flipped.state is State.SOAKING
    assert flipped.ttl_until is not None
    assert timedelta(seconds=59) < flipped.ttl_until - before < timedelta(seconds=62)
    assert [change.route for change in bench.topology.route_history("1")] == [
        Route("1", "cell-1", 1),
        Route("1", "cell-2", 2),
    ]
    row = bench.topology.audit(migration.id)[-1]
    assert (row.action, row.epoch, row.evidence) == ("flip", 2, {"pause_s": 0.03})
    assert bench.topology.flip_outcome(migration.id) is True


def test_the_flip_is_repeatable(bench: Bench) -> None:
    migration, attempt = bench.cutting_over()
    first = bench.topology.flip(migration.id, attempt, ACTOR, 60, {})

    assert bench.topology.flip(migration.id, attempt, ACTOR, 60, {}) == first
    assert bench.topology.route("1").epoch == 2


@pytest.mark.parametrize(
    "until", [State.PLANNED, State.COPYING, State.SYNCING, State.READY], ids=str
)
def test_only_a_migration_that_cuts_over_can_flip(bench: Bench, until: State) -> None:
    migration = bench.planned()
    attempt = bench.topology.take_lease(migration.id, "test", ACTOR)
    bench.advance(migration.id, attempt, until)

    with pytest.raises(WrongState, match=f"the migration is {until}"):
        bench.topology.flip(migration.id, attempt, ACTOR, 0, {})

    assert bench.topology.route("1") == Route("1", "cell-1", 1)


def test_a_transition_cannot_stand_in_for_the_flip(bench: Bench) -> None:
    migration, attempt = bench.cutting_over()

    with pytest.raises(WrongState, match="only a flip"):
        bench.topology.transition(migration.id, attempt, "cutting_over", "soaking", ACTOR)


def test_a_flip_is_refused_when_the_route_has_changed(bench: Bench) -> None:
    migration, attempt = bench.cutting_over()
    as_someone_else(
        bench,
        "UPDATE topology.route SET cell = 'cell-3', epoch = 2, actor = 'break-glass'"
        " WHERE organization = '1'",
    )

    with pytest.raises(WrongState, match="no longer cell-1 at epoch 1"):
        bench.topology.flip(migration.id, attempt, ACTOR, 0, {})

    assert bench.topology.flip_outcome(migration.id) is False


def test_after_an_abort_nobody_flips(bench: Bench) -> None:
    migration, attempt = bench.cutting_over()
    bench.topology.transition(migration.id, attempt, "cutting_over", "aborted", ACTOR)

    with pytest.raises(WrongState, match="is aborted"):
        bench.topology.flip(migration.id, attempt, ACTOR, 0, {})


def test_of_a_flip_and_an_abort_at_the_same_time_one_happens(bench: Bench) -> None:
    migration, attempt = bench.cutting_over()

    def flip() -> str:
        with Topology(bench.url) as topology:
            try:
                topology.flip(migration.id, attempt, ACTOR, 0, {})
            except WrongState:
                return "refused"
            return "flipped"

    def abort() -> str:
        with Topology(bench.url) as topology:
            try:
                topology.transition(migration.id, attempt, "cutting_over", "aborted", ACTOR)
            except WrongState:
                return "refused"
            return "aborted"

    with ThreadPoolExecutor(2) as pool:
        flipped, aborted = pool.submit(flip), pool.submit(abort)
        results = {flipped.result(), aborted.result()}

    expected = {"flipped", "refused"} if "flipped" in results else {"aborted", "refused"}
    assert results == expected
    assert bench.topology.flip_outcome(migration.id) is ("flipped" in results)


def test_a_ttl_that_lies_in_the_past_is_refused(bench: Bench) -> None:
    migration, attempt = bench.cutting_over()

    with pytest.raises(InvalidInput, match="cannot be negative"):
        bench.topology.flip(migration.id, attempt, ACTOR, -1, {})


def test_the_source_may_be_cleaned_after_its_ttl(bench: Bench) -> None:
    migration, attempt = bench.retained()

    bench.topology.may_clean(migration.id)
    cleaning = bench.topology.transition(
        migration.id, attempt, State.RETAINED, State.CLEANING, ACTOR
    )

    bench.topology.may_clean(cleaning.id)


def test_the_source_is_kept_until_its_ttl(bench: Bench) -> None:
    migration, attempt = bench.retained(ttl_s=3600)

    with pytest.raises(WrongState, match="its retention lasts until"):
        bench.topology.may_clean(migration.id)
    with pytest.raises(WrongState, match="its retention lasts until"):
        bench.topology.transition(migration.id, attempt, "retained", "cleaning", ACTOR)


def test_a_migration_that_has_not_flipped_is_not_cleaned(bench: Bench) -> None:
    migration, _ = bench.cutting_over()

    with pytest.raises(WrongState, match="cutting_over, not retained"):
        bench.topology.may_clean(migration.id)


def test_a_return_cancels_the_older_clean_up(bench: Bench) -> None:
    there, attempt = bench.retained("1", "cell-2")
    back, _ = bench.retained("1", "cell-1")

    with pytest.raises(WrongState, match=rf"migration {back.id} .* took its retention over"):
        bench.topology.may_clean(there.id)
    with pytest.raises(WrongState, match="took its retention over"):
        bench.topology.transition(there.id, attempt, "retained", "cleaning", ACTOR)

    assert bench.topology.superseded_by(there.id) == back.id
    assert bench.topology.audit(there.id)[-1].action == "superseded"


def test_no_return_begins_while_the_old_copy_is_being_deleted(bench: Bench) -> None:
    there, attempt = bench.retained("1", "cell-2")
    bench.topology.transition(there.id, attempt, State.RETAINED, State.CLEANING, ACTOR)

    with pytest.raises(WrongState, match=rf"clean-up of migration {there.id} in cell-1 has begun"):
        bench.planned("1", "cell-1")

    assert bench.topology.superseded_by(there.id) is None
    bench.topology.may_clean(there.id)
    bench.planned("1", "cell-3")


def test_the_database_too_refuses_to_clean_what_came_back(bench: Bench) -> None:
    there, _ = bench.retained("1", "cell-2")
    bench.retained("1", "cell-1")

    with pytest.raises(psycopg.errors.IntegrityConstraintViolation, match="must not be cleaning"):
        as_someone_else(
            bench,
            "UPDATE topology.migration SET state = 'cleaning'"
            f" WHERE id = {there.id};"
            "INSERT INTO topology.audit (action, migration, actor, role, to_state)"
            f" VALUES ('transition', {there.id}, 'x', 'x', 'cleaning')",
        )


def test_moving_on_leaves_the_copy_in_the_first_cell_to_its_clean_up(bench: Bench) -> None:
    first, _ = bench.retained("1", "cell-2")
    bench.retained("1", "cell-3")

    bench.topology.may_clean(first.id)


def test_a_copy_that_a_later_move_left_is_not_the_first_ones_to_clean(bench: Bench) -> None:
    first, _ = bench.retained("1", "cell-2")
    back, _ = bench.retained("1", "cell-1")
    bench.retained("1", "cell-3")

    with pytest.raises(WrongState, match=rf"migration {back.id} .* took its retention over"):
        bench.topology.may_clean(first.id)


def test_an_aborted_return_is_in_the_way_until_it_has_cleared_up(bench: Bench) -> None:
    first, _ = bench.retained("1", "cell-2")
    back, attempt = bench.cutting_over("1", "cell-1")
    resources = bench.topology.resources(back.id)
    resources.intend(GATE)
    bench.topology.transition(back.id, attempt, "cutting_over", "aborted", ACTOR)
    with pytest.raises(WrongState, match="took its retention over"):
        bench.topology.may_clean(first.id)

    resources.forget(GATE)

    bench.topology.may_clean(first.id)


# --- resources, progress --------------------------------------------------------------------------


def test_a_resource_is_live_from_intention_to_forgetting(bench: Bench) -> None:
    migration = bench.planned()
    resources = bench.topology.resources(migration.id)

    resources.intend(GATE)
    resources.intend(GATE)
    assert bench.topology.live_resources(migration.id) == [GATE]

    resources.forget(GATE)
    resources.forget(GATE)
    assert bench.topology.live_resources(migration.id) == []


def test_a_resource_that_is_made_again_is_live_again(bench: Bench) -> None:
    migration = bench.planned()
    resources = bench.topology.resources(migration.id)
    resources.intend(GATE)
    resources.forget(GATE)

    resources.intend(GATE)

    assert bench.topology.live_resources(migration.id) == [GATE]


def test_a_superseded_attempt_forgets_nothing(bench: Bench) -> None:
    migration = bench.planned()
    first = bench.topology.take_lease(migration.id, "first", ACTOR)
    second = bench.topology.take_lease(migration.id, "second", ACTOR)
    bench.topology.resources(migration.id, second).intend(GATE)

    with pytest.raises(LeaseLost):
        bench.topology.resources(migration.id, first).forget(GATE)
    assert bench.topology.live_resources(migration.id) == [GATE]

    bench.topology.resources(migration.id, second).forget(GATE)
    assert bench.topology.live_resources(migration.id) == []


def test_a_reaper_sees_whose_a_resource_is(bench: Bench) -> None:
    migration = bench.planned()
    bench.topology.resources(migration.id).intend(GATE)
    attempt = bench.topology.take_lease(migration.id, "test", ACTOR)
    bench.topology.transition(migration.id, attempt, "planned", "aborted", ACTOR)

    (found,) = bench.topology.registered_resources("cell-1")

    assert (found.resource, found.migration, found.state) == (GATE, migration.id, State.ABORTED)


def test_progress_has_a_rate_and_an_end(bench: Bench) -> None:
    migration = bench.planned()
    sink = bench.topology.progress_sink(migration.id)

    begun = time.monotonic()
    sink.report("postgres", "copy", 0, 1000, "rows")
    time.sleep(0.3)
    sink.report("postgres", "copy", 300, 1000, "rows", "public.issues")
    took_s = time.monotonic() - begun

    (row,) = bench.topology.progress(migration.id)
    assert (row.done, row.total, row.unit, row.note) == (300, 1000, "rows", "public.issues")
    assert row.rate_per_s is not None
    assert 0.95 * 300 / took_s < row.rate_per_s <= 1000
    assert row.eta_s == pytest.approx(700 / row.rate_per_s)


def test_the_end_of_a_phase_is_always_kept(bench: Bench) -> None:
    migration = bench.planned()
    sink = bench.topology.progress_sink(migration.id)

    for done in range(101):
        sink.report("postgres", "copy", done, 100, "rows")

    (row,) = bench.topology.progress(migration.id)
    assert (row.done, row.eta_s) == (100, 0)


def test_the_sink_of_an_attempt_stops_it_when_it_is_superseded(bench: Bench) -> None:
    migration = bench.planned()
    attempt = bench.topology.take_lease(migration.id, "first", ACTOR)
    sink = bench.topology.progress_sink(migration.id, attempt)
    sink.check()

    bench.topology.take_lease(migration.id, "second", ACTOR)

    with pytest.raises(LeaseLost):
        sink.check()


def test_a_stop_is_an_answer_of_the_topology(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    migration = bench.planned()
    answers: list[Exception] = [Paused("lunch"), Unreachable("gone")]
    sink = ProgressSink(
        bench.topology._database,
        migration.id,
        lambda: _raise(answers.pop(0)),
        grace_s=60.0,
    )
    now = time.monotonic()
    monkeypatch.setattr("cellferry.topology.progress.time.monotonic", lambda: now + 50)
    with pytest.raises(Paused):
        sink.check()
    monkeypatch.setattr("cellferry.topology.progress.time.monotonic", lambda: now + 100)
    sink.check()  # silent for 50 s only
    assert answers == []


def _raise(error: Exception) -> None:
    raise error
