"""The topology when things break: lost connections, lost commits, wrong passwords, restarts."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import psycopg
import pytest
from psycopg import sql

from cellferry.errors import (
    AccessDenied,
    InvalidInput,
    LeaseLost,
    NotPrepared,
    OutcomeUnknown,
    Unreachable,
    WrongState,
)
from cellferry.local.ports import HOST, free_ports
from cellferry.model import Route, State
from cellferry.topology import Topology
from fixtures.postgres import MakeServer
from fixtures.severed_network import SeveredNetwork
from fixtures.topology import ACTOR, Bench, furnish

#: As it is on the wire; BEGIN … READ COMMITTED must not be taken for it.
COMMIT = b"COMMIT\0"
Sever = Callable[[str], SeveredNetwork]


def terminate_backends(url: str) -> int:
    """What an administrator, or a failing server, does to connections."""
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        ).fetchone()
    return int(row[0]) if row else 0


# --- wrong settings -----------------------------------------------------------------------------


def test_a_wrong_password_is_access_denied_and_not_shown(fresh_database: str) -> None:
    with psycopg.connect(fresh_database) as connection:
        right = connection.info.password
    wrong = fresh_database.replace(quote(right), "hunter22")

    with pytest.raises(AccessDenied, match="password authentication failed") as caught:
        Topology(wrong).now()

    assert "hunter22" not in str(caught.value)


def test_a_server_that_is_not_there_is_unreachable() -> None:
    (port,) = free_ports(1)

    with pytest.raises(Unreachable, match="does not answer") as caught:
        Topology(f"postgresql://ferry:hunter22@{HOST}:{port}/topology").now()

    assert f"{HOST}:{port}/topology" in str(caught.value)
    assert "hunter22" not in str(caught.value)


def test_a_server_that_hangs_up_is_unreachable_in_one_line(
    bench: Bench, severed_network: Sever
) -> None:
    network = severed_network(bench.url)
    network.is_up = False

    with pytest.raises(Unreachable, match="closed the connection unexpectedly") as caught:
        Topology(network.url).now()

    assert "\n" not in str(caught.value)


def test_a_role_without_grants_is_access_denied(bench: Bench) -> None:
    role = f"nobody_{os.getpid()}_{threading.get_native_id()}"
    with psycopg.connect(bench.url, autocommit=True) as connection:
        connection.execute(
            sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'pw'").format(sql.Identifier(role))
        )
        password = connection.info.password
    try:
        with (
            Topology(bench.url.replace("postgres:" + quote(password), f"{role}:pw")) as topology,
            pytest.raises(AccessDenied, match="permission denied for schema topology"),
        ):
            topology.routes()
    finally:
        with psycopg.connect(bench.url, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


def test_a_database_without_the_schema_is_not_prepared(fresh_database: str) -> None:
    with (
        Topology(fresh_database) as topology,
        pytest.raises(NotPrepared, match=r"not installed.*cellferry topology install"),
    ):
        topology.routes()


def test_a_database_that_does_not_exist_is_not_prepared(fresh_database: str) -> None:
    with pytest.raises(NotPrepared, match="database does not exist"):
        Topology(fresh_database + "_not").now()


def test_a_connection_string_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidInput, match="not a valid PostgreSQL URL") as caught:
        Topology("postgresql://ferry:hunter22@[host/topology")

    assert "hunter22" not in str(caught.value)


# --- lost connections -----------------------------------------------------------------------------


def test_a_connection_lost_between_transactions_is_replaced(bench: Bench) -> None:
    assert bench.topology.now()

    assert terminate_backends(bench.url) == 1

    assert bench.topology.route("1") == Route("1", "cell-1", 1)


def test_a_change_whose_connection_was_lost_before_the_commit_happens_once(
    bench: Bench, severed_network: Sever
) -> None:
    migration = bench.planned()
    network = severed_network(bench.url)
    with Topology(network.url) as topology:
        attempt = topology.take_lease(migration.id, "test", ACTOR)
        network.cut_before(b"INSERT INTO topology.audit")

        topology.transition(migration.id, attempt, "planned", "copying", ACTOR)

    assert network.cuts == 1
    assert [row.to_state for row in bench.topology.audit(migration.id)] == [
        "planned",
        None,
        "copying",
    ]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_transition_whose_commit_was_lost_settles_and_happens_once(
    bench: Bench, severed_network: Sever, when: str
) -> None:
    migration = bench.planned()
    network = severed_network(bench.url)
    with Topology(network.url) as topology:
        attempt = topology.take_lease(migration.id, "test", ACTOR)
        (network.cut_before if when == "before" else network.cut_after)(COMMIT)

        changed = topology.transition(migration.id, attempt, "planned", "copying", ACTOR)

    assert network.cuts == 1
    assert changed.state is State.COPYING
    transitions = [row for row in bench.topology.audit(migration.id) if row.action == "transition"]
    assert len(transitions) == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_record_in_the_same_state_whose_commit_was_lost_is_written_once(
    bench: Bench, severed_network: Sever, when: str
) -> None:
    migration = bench.planned()
    network = severed_network(bench.url)
    with Topology(network.url) as topology:
        attempt = topology.take_lease(migration.id, "test", ACTOR)
        (network.cut_before if when == "before" else network.cut_after)(COMMIT)

        topology.transition(
            migration.id, attempt, "planned", "planned", ACTOR, reason="looked at it"
        )

    assert network.cuts == 1
    reasons = [row.reason for row in bench.topology.audit(migration.id)]
    assert reasons.count("looked at it") == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_migration_whose_commit_was_lost_is_created_once(
    bench: Bench, severed_network: Sever, when: str
) -> None:
    network = severed_network(bench.url)
    with Topology(network.url) as topology:
        topology.now()
        (network.cut_before if when == "before" else network.cut_after)(COMMIT)

        created = topology.create_migration("1", "cell-2", "online", {}, None, ACTOR)

    assert network.cuts == 1
    assert [one.id for one in bench.topology.migrations()] == [created.id]


# --- the flip ---------------------------------------------------------------------------------


def test_a_flip_whose_answer_was_lost_is_unknown_and_then_known_to_have_happened(
    bench: Bench, severed_network: Sever
) -> None:
    migration, attempt = bench.cutting_over()
    network = severed_network(bench.url)
    with Topology(network.url) as topology:
        topology.now()
        network.cut_after(COMMIT)
        with pytest.raises(OutcomeUnknown):
            topology.flip(migration.id, attempt, ACTOR, 0, {})

        assert topology.flip_outcome(migration.id) is True

    assert bench.topology.route("1") == Route("1", "cell-2", 2)


def test_a_flip_whose_commit_was_lost_is_unknown_and_then_known_not_to_have_happened(
    bench: Bench, severed_network: Sever
) -> None:
    migration, attempt = bench.cutting_over()
    network = severed_network(bench.url)
    with Topology(network.url) as topology:
        topology.now()
        network.cut_before(COMMIT)
        with pytest.raises(OutcomeUnknown):
            topology.flip(migration.id, attempt, ACTOR, 0, {})

        assert topology.flip_outcome(migration.id) is False

    assert bench.topology.route("1") == Route("1", "cell-1", 1)


def test_while_a_flip_is_in_flight_its_outcome_waits_for_it(bench: Bench) -> None:
    migration, attempt = bench.cutting_over()
    in_flight = psycopg.connect(bench.url)
    in_flight.execute("SELECT FROM topology.migration WHERE id = %s FOR UPDATE", [migration.id])
    answers: list[bool] = []
    asking = threading.Thread(
        target=lambda: answers.append(bench.topology.flip_outcome(migration.id))
    )

    asking.start()
    asking.join(0.3)
    said_before = list(answers)
    in_flight.rollback()
    asking.join()
    in_flight.close()

    assert (said_before, answers) == ([], [False])
    assert attempt == 1


def test_without_the_topology_the_outcome_of_a_flip_stays_unknown(
    bench: Bench, severed_network: Sever
) -> None:
    migration, attempt = bench.cutting_over()
    network = severed_network(bench.url)
    with Topology(network.url, patience_s=0.3) as topology:
        topology.now()
        network.cut_after(COMMIT)
        with pytest.raises(OutcomeUnknown):
            topology.flip(migration.id, attempt, ACTOR, 0, {})
        network.go_down()

        with pytest.raises(Unreachable):
            topology.flip_outcome(migration.id)


def test_a_transition_is_not_repeated_when_the_topology_stays_away(
    bench: Bench, severed_network: Sever
) -> None:
    migration = bench.planned()
    network = severed_network(bench.url)
    with Topology(network.url, patience_s=0.3) as topology:
        attempt = topology.take_lease(migration.id, "test", ACTOR)
        network.cut_after(COMMIT)
        network.is_up = False

        with pytest.raises(OutcomeUnknown):
            topology.transition(migration.id, attempt, "planned", "copying", ACTOR)


def test_a_lost_flip_cannot_happen_after_a_newer_attempt_took_over(bench: Bench) -> None:
    migration, old = bench.cutting_over()
    new = bench.topology.take_lease(migration.id, "reaper", ACTOR)
    assert bench.topology.flip_outcome(migration.id) is False
    bench.topology.transition(migration.id, new, "cutting_over", "aborted", ACTOR)

    with pytest.raises(LeaseLost):
        bench.topology.flip(migration.id, old, ACTOR, 0, {})


# --- restarts, forks, silence ---------------------------------------------------------------------


def test_a_restart_of_the_server_is_waited_for(own_postgres: MakeServer) -> None:
    server = own_postgres()
    with Topology(server.url(), patience_s=120) as topology:
        topology.install()
        furnish(topology)
        server.stop()
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(topology.route, "1")
            time.sleep(0.3)
            server.start()

            assert asking.result() == Route("1", "cell-1", 1)


def test_progress_does_not_fail_a_step_while_the_topology_is_away(
    bench: Bench, severed_network: Sever
) -> None:
    migration = bench.planned()
    network = severed_network(bench.url)
    with Topology(network.url, patience_s=0.2) as topology:
        attempt = topology.take_lease(migration.id, "test", ACTOR)
        sink = topology.progress_sink(migration.id, attempt)
        network.go_down()

        sink.report("postgres", "copy", 1, 10, "rows")
        sink.check()


def test_a_check_that_gets_no_answer_for_long_stops_the_step(
    bench: Bench, severed_network: Sever
) -> None:
    migration = bench.planned()
    network = severed_network(bench.url)
    with Topology(network.url, patience_s=0.2) as topology:
        attempt = topology.take_lease(migration.id, "test", ACTOR)
        sink = topology.progress_sink(migration.id, attempt, grace_s=0.3)
        network.go_down()
        time.sleep(0.4)

        with pytest.raises(Unreachable):
            sink.check()


def test_a_forked_process_gets_its_own_connection(bench: Bench) -> None:
    bench.topology.now()
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if bench.topology.route("1").epoch == 1 else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)

    assert os.waitstatus_to_exitcode(status) == 0
    assert bench.topology.route("1").epoch == 1


def test_a_reaper_whose_server_ends_while_it_waits_for_its_lock_hears_that_in_our_words(
    bench: Bench,
) -> None:
    def wait() -> None:
        with Topology(bench.url) as waiting, waiting.only_reaper(30):
            pass

    with (
        bench.topology.only_reaper(0) as alone,
        psycopg.connect(bench.url, autocommit=True) as admin,
        ThreadPoolExecutor(1) as pool,
    ):
        assert alone
        waits = pool.submit(wait)
        while not waits.done():
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND query ~ '^SELECT pg_try_advisory_lock'"
                " AND pid NOT IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory')"
            )
            time.sleep(0.05)
        with pytest.raises(Unreachable):
            waits.result()


def test_threads_may_share_a_topology(bench: Bench) -> None:
    migration = bench.planned()
    attempt = bench.topology.take_lease(migration.id, "test", ACTOR)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(20):
                bench.topology.record(migration.id, attempt, {f"{number}": turn})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    facts = bench.topology.migration(migration.id).facts
    assert {key: facts[key] for key in "01234"} == dict.fromkeys("01234", 19)


def test_a_refused_change_leaves_the_connection_usable(bench: Bench) -> None:
    migration = bench.planned()
    attempt = bench.topology.take_lease(migration.id, "test", ACTOR)
    with pytest.raises(WrongState):
        bench.topology.transition(migration.id, attempt, "ready", "cutting_over", ACTOR)

    assert bench.topology.route("1").epoch == 1


def test_no_transaction_is_left_open(bench: Bench) -> None:
    bench.topology.routes()

    with psycopg.connect(bench.url) as connection:
        states = connection.execute(
            "SELECT state FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'cellferry-topology'"
        ).fetchall()
    assert states == [("idle",)]
