"""What an application sees of a move: the route client against real servers and real gates."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
import redis

from cellferry.model import Organization, Route
from cellferry.routing import (
    BeingMoved,
    Moved,
    NotCommitted,
    RouteClient,
    RouteUnavailable,
    UnknownOrganization,
    UnknownOutcome,
    marker_key,
    redis_answers,
    transaction,
    translate,
)
from cellferry.routing.listener import RouteListener
from fixtures.cells import TwoCells
from fixtures.severed_network import SeveredNetwork
from fixtures.topology import ACTOR, Bench, patient

Sever = Callable[[str], SeveredNetwork]
COMMIT = b"COMMIT\0"
SOON_S = 60.0


def eventually(condition: Callable[[], bool], seconds: float = SOON_S) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def move(bench: Bench, organization: str = "1", destination: str = "cell-2") -> Route:
    """The flip of a whole move."""
    migration, attempt = bench.cutting_over(organization, destination)
    route = bench.topology.flip(migration.id, attempt, ACTOR, 0, {})
    bench.topology.transition(migration.id, attempt, "soaking", "retained", ACTOR)
    return route


@pytest.fixture
def client(bench: Bench) -> Iterator[RouteClient]:
    with RouteClient(patient(bench.url), application="tests") as made:
        yield made


# --- look-up ------------------------------------------------------------------------------------


def test_a_route_is_read_from_the_topology(client: RouteClient) -> None:
    assert client.route("1") == Route("1", "cell-1", 1)


def test_a_known_route_costs_microseconds(client: RouteClient) -> None:
    client.route("1")
    best = min(_seconds_for(client, 2000) for _ in range(20))

    assert best / 2000 < 5e-6


def _seconds_for(client: RouteClient, times: int) -> float:
    """The processor's time in this thread: how long others had the processor is not counted."""
    begun = time.thread_time()
    for _ in range(times):
        client.route("1")
    return time.thread_time() - begun


def test_an_unknown_organization_is_said_to_be_unknown(client: RouteClient) -> None:
    with pytest.raises(UnknownOrganization, match="'77'"):
        client.route("77")


def test_an_organization_that_is_registered_later_is_found(
    client: RouteClient, bench: Bench
) -> None:
    with pytest.raises(UnknownOrganization):
        client.route("4")
    bench.topology.register_organization(Organization("4", "dog"), "cell-3", ACTOR)

    assert client.route("4").cell == "cell-3"


def test_a_change_is_heard_of_without_asking(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with RouteClient(patient(bench.url), ttl_s=3600) as client:
        client.route("1")
        assert eventually(lambda: client.is_listening)
        monkeypatch.setattr(RouteListener, "_ask", lambda *_: None)

        move(bench)

        assert eventually(lambda: client.route("1") == Route("1", "cell-2", 2))


def test_a_change_that_nobody_announced_is_seen_after_the_time_to_live(bench: Bench) -> None:
    with RouteClient(bench.url, ttl_s=0.2, listen=False) as client:
        client.route("1")
        move(bench)
        time.sleep(0.25)

        assert client.route("1") == Route("1", "cell-2", 2)


def test_routes_are_confirmed_without_being_read_one_by_one(bench: Bench) -> None:
    with RouteClient(bench.url, ttl_s=0.4) as client:
        client.route("1")
        assert eventually(lambda: client.is_listening)
        asked_at = client._cache.get("1")

        assert asked_at is not None
        assert eventually(lambda: (client._cache.get("1") or asked_at)[1] > asked_at[1] + 1)


def test_the_memory_for_routes_is_bounded(bench: Bench) -> None:
    with RouteClient(bench.url, max_entries=2) as client:
        for organization in ("1", "2", "3"):
            client.route(organization)

        assert len(client._cache) == 2


def test_an_older_epoch_never_replaces_a_newer_one(client: RouteClient) -> None:
    client.learn("1", "cell-2", 5)

    assert client.learn("1", "cell-3", 4) == Route("1", "cell-2", 5)
    assert client.refresh("1") == Route("1", "cell-2", 5)


# --- without the topology -----------------------------------------------------------------------


def test_the_last_known_route_is_served_while_the_topology_is_down(
    bench: Bench, severed_network: Sever, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = severed_network(bench.url)
    asked = []
    with RouteClient(network.url, ttl_s=0.1, listen=False) as client:
        client.route("1")
        network.go_down()
        time.sleep(0.2)
        query = client._query
        monkeypatch.setattr(client, "_query", lambda name: (asked.append(name), query(name))[1])

        routes = {client.route("1") for _ in range(1000)}

    assert routes == {Route("1", "cell-1", 1)}
    assert 1 <= len(asked) < 20, "each of them asked a topology that does not answer"


def test_what_a_store_says_is_learnt_while_the_topology_is_down(
    bench: Bench, severed_network: Sever
) -> None:
    network = severed_network(bench.url)
    with RouteClient(network.url, ttl_s=0.1) as client:
        client.route("1")
        network.go_down()
        visited = []

        def operation(route: Route) -> str:
            visited.append(route.cell)
            if route.cell == "cell-1":
                raise Moved("1", "cell-2", 2)
            return "done"

        assert client.run("1", operation) == "done"

    assert visited == ["cell-1", "cell-2"]


def test_a_route_that_was_never_known_is_unavailable(bench: Bench, severed_network: Sever) -> None:
    network = severed_network(bench.url)
    network.go_down()
    with (
        RouteClient(network.url) as client,
        pytest.raises(RouteUnavailable, match="not known here") as caught,
    ):
        client.route("1")

    assert "postgresql://" not in str(caught.value)


def test_a_route_is_not_served_longer_than_allowed(bench: Bench, severed_network: Sever) -> None:
    network = severed_network(bench.url)
    with RouteClient(network.url, ttl_s=0.1, max_stale_s=0.4) as client:
        client.route("1")
        network.go_down()
        time.sleep(0.5)

        with pytest.raises(RouteUnavailable, match="too old"):
            client.route("1")


def test_changes_made_while_it_was_cut_off_are_known_when_it_is_back(
    bench: Bench, severed_network: Sever, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    network = severed_network(bench.url)
    with RouteClient(network.url, ttl_s=3600) as client:
        client.route("1")
        assert eventually(lambda: client.is_listening)
        network.go_down()
        assert eventually(lambda: not client.is_listening)
        move(bench)
        network.come_up()

        assert eventually(lambda: client.route("1") == Route("1", "cell-2", 2))


def test_an_operation_waits_for_a_topology_that_comes_back(
    bench: Bench, severed_network: Sever
) -> None:
    network = severed_network(bench.url)
    network.go_down()
    back = threading.Timer(0.3, network.come_up)
    with RouteClient(network.url) as client:
        back.start()

        assert client.run("1", lambda route: route.cell, deadline_s=120) == "cell-1"
    back.join()


def test_closing_leaves_no_thread_and_no_connection(bench: Bench) -> None:
    with RouteClient(bench.url, application="closing") as client:
        client.route("1")
        assert eventually(lambda: client.is_listening)

    assert not [one for one in threading.enumerate() if one.name == "cellferry-routes"]
    assert eventually(lambda: _sessions(bench.url, "cellferry-routes:closing") == 0)


def _sessions(url: str, application: str) -> int:
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", [application]
        ).fetchone()
    return int(row[0]) if row else 0


def test_a_forked_process_hears_of_changes_by_itself(client: RouteClient, bench: Bench) -> None:
    client.route("1")
    assert eventually(lambda: client.is_listening)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            client.route("2")
            listens = eventually(lambda: client.is_listening)
            os.write(write, b"ready\n")
            hears = eventually(lambda: client.route("1") == Route("1", "cell-2", 2))
            os.write(write, json.dumps([listens, hears]).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answers:
        assert answers.readline() == "ready\n"
        move(bench)
        assert json.loads(answers.readline()) == [True, True]
    os.waitpid(child, 0)

    assert eventually(lambda: client.route("1").cell == "cell-2")


# --- run: the gate's answers ----------------------------------------------------------------------


def test_an_operation_goes_where_it_is_told_at_once(
    client: RouteClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(
        "cellferry.routing.client._Attempts.next_pause", lambda _: pauses.append(0) or 0.0
    )
    visited = []

    def operation(route: Route) -> Route:
        visited.append(route)
        if route.epoch == 1:
            raise Moved("1", "cell-2", 2)
        return route

    assert client.run("1", operation) == Route("1", "cell-2", 2)
    assert len(visited) == 2
    assert pauses == []
    assert client.route("1") == Route("1", "cell-2", 2)


def test_an_operation_that_is_told_to_wait_tries_again_soon(
    client: RouteClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.route("1")
    tries, pauses = [], []
    wait = client._wait_for_news
    monkeypatch.setattr(
        client,
        "_wait_for_news",
        lambda route, seconds: (pauses.append(seconds), wait(route, seconds))[1],
    )

    def operation(route: Route) -> int:
        tries.append(route)
        if len(tries) < 4:
            raise BeingMoved(route.organization)
        return len(tries)

    assert client.run("1", operation, deadline_s=120) == 4
    assert len(pauses) == 3
    assert 0 < pauses[0] < 0.01  # 5 ms


def test_an_operation_that_waits_wakes_up_at_the_flip(
    client: RouteClient, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cellferry.routing.client._FIRST_PAUSE_S", 200.0)
    monkeypatch.setattr("cellferry.routing.client._LONGEST_PAUSE_S", 200.0)
    client.route("1")
    assert eventually(lambda: client.is_listening)
    flip = threading.Timer(0.3, lambda: move(bench))

    def operation(route: Route) -> str:
        if route.epoch == 1:
            raise BeingMoved("1")
        return route.cell

    flip.start()
    begun = time.monotonic()
    cell = client.run("1", operation, deadline_s=240)
    flip.join()

    assert cell == "cell-2"
    assert time.monotonic() - begun < 120


def test_an_operation_finds_out_by_itself_when_no_news_arrive(bench: Bench) -> None:
    with RouteClient(bench.url, ttl_s=3600, listen=False) as client:
        client.route("1")
        move(bench)

        def operation(route: Route) -> str:
            if route.epoch == 1:
                raise BeingMoved("1")
            return route.cell

        assert client.run("1", operation, deadline_s=120) == "cell-2"


@pytest.mark.parametrize("answer", [BeingMoved("1"), Moved("1", "cell-1", 1)], ids=str)
def test_an_operation_gives_up_at_its_deadline(client: RouteClient, answer: Exception) -> None:
    def operation(_: Route) -> None:
        raise answer

    begun = time.monotonic()
    with pytest.raises(type(answer)):
        client.run("1", operation, deadline_s=0.3)

    assert 0.3 <= time.monotonic() - begun < 60


def test_cells_that_send_an_operation_to_and_fro_do_not_make_it_spin(client: RouteClient) -> None:
    tries = 0

    def operation(route: Route) -> None:
        nonlocal tries
        tries += 1
        raise Moved("1", "cell-2" if route.cell == "cell-1" else "cell-1", route.epoch + 1)

    with pytest.raises(Moved):
        client.run("1", operation, deadline_s=0.5)

    assert tries < 60


def test_a_cell_that_fell_back_does_not_send_an_operation_to_an_older_epoch(
    client: RouteClient,
) -> None:
    client.learn("1", "cell-2", 5)
    visited = set()

    def operation(route: Route) -> None:
        visited.add(route.cell)
        raise Moved("1", "cell-1", 4)

    with pytest.raises(Moved):
        client.run("1", operation, deadline_s=0.2)

    assert visited == {"cell-2"}


def test_an_answer_about_another_organization_is_not_retried(client: RouteClient) -> None:
    tries = []

    def operation(route: Route) -> None:
        tries.append(route)
        raise Moved("2", "cell-3", 2)

    with pytest.raises(Moved, match="organization 2 moved to cell-3"):
        client.run("1", operation)

    assert len(tries) == 1


def test_an_error_of_the_operation_is_its_own(client: RouteClient) -> None:
    def operation(_: Route) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        client.run("1", operation)


@pytest.mark.parametrize(
    ("error", "allowed", "tries"),
    [
        (NotCommitted("lost"), {}, 1),
        (NotCommitted("lost"), {"retry_lost": True}, 2),
        (NotCommitted("lost"), {"idempotent": True}, 2),
        (UnknownOutcome("lost"), {}, 1),
        (UnknownOutcome("lost"), {"retry_lost": True}, 1),
        (UnknownOutcome("lost"), {"idempotent": True}, 2),
        (psycopg.OperationalError("lost"), {}, 1),
        (psycopg.OperationalError("lost"), {"retry_lost": True}, 1),
        (psycopg.OperationalError("lost"), {"idempotent": True}, 2),
        (psycopg.errors.SerializationFailure("conflict"), {}, 2),
        (psycopg.errors.DeadlockDetected("conflict"), {}, 2),
        (psycopg.errors.UniqueViolation("double"), {"idempotent": True}, 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_only_what_is_safe_is_tried_again(
    client: RouteClient, error: Exception, allowed: dict[str, bool], tries: int
) -> None:
    seen = []

    def operation(route: Route) -> str:
        seen.append(route)
        if len(seen) == 1:
            raise error
        return "done"

    if tries == 1:
        with pytest.raises(type(error)):
            client.run("1", operation, **allowed)
    else:
        assert client.run("1", operation, **allowed) == "done"
    assert len(seen) == tries


# --- real gates -----------------------------------------------------------------------------------


def gate(cells: TwoCells, state: str, cell: str = "cell-1") -> None:
    """Set the gate of organization 7 as a move would."""
    with cells.admin(cell) as connection:
        connection.execute(
            "INSERT INTO cellferry.gate (organization, state, armed, migration, attempt, epoch,"
            " moved_to) VALUES ('7', %(state)s, false, 1, 1, 2, %(to)s)"
            " ON CONFLICT (organization) DO UPDATE SET state = %(state)s, moved_to = %(to)s",
            {"state": state, "to": "cell-2" if state == "moved" else None},
        )


@pytest.fixture
def seven(cells: TwoCells) -> TwoCells:
    """Two cells with organization 7 in cell-1."""
    cells.add_organization(7, issues=2)
    return cells


def renamed(cells: TwoCells) -> bool:
    return any(row[2] == "renamed" for row in cells.rows("cell-1", "7")["issues"])


RENAME = "UPDATE issues SET title = 'renamed' WHERE organization_id = 7 AND id = 7000001"


def test_a_moved_answer_of_a_real_gate_names_cell_and_epoch(seven: TwoCells) -> None:
    gate(seven, "moved")
    with seven.application("cell-1") as connection, pytest.raises(psycopg.Error) as caught:
        connection.execute(RENAME)

    answer = translate(caught.value)

    assert isinstance(answer, Moved)
    assert (answer.organization, answer.cell, answer.epoch) == ("7", "cell-2", 2)


@pytest.mark.parametrize("state", ["frozen", "importing"])
def test_a_being_moved_answer_of_a_real_gate_names_the_organization(
    seven: TwoCells, state: str
) -> None:
    gate(seven, state)
    with seven.application("cell-1") as connection, pytest.raises(psycopg.Error) as caught:
        connection.execute(RENAME)

    answer = translate(caught.value)

    assert isinstance(answer, BeingMoved)
    assert answer.organization == "7"


def test_an_answer_is_understood_behind_the_error_of_a_framework(seven: TwoCells) -> None:
    def save(connection: psycopg.Connection[Any]) -> None:
        try:
            connection.execute(RENAME)
        except psycopg.Error as error:
            raise RuntimeError("the ORM failed") from error

    gate(seven, "moved")
    with seven.application("cell-1") as connection, pytest.raises(RuntimeError) as caught:
        save(connection)

    assert isinstance(translate(caught.value), Moved)


def test_a_read_of_a_stale_client_is_sent_on(seven: TwoCells) -> None:
    gate(seven, "moved")
    with (
        seven.application("cell-1") as connection,
        pytest.raises(Moved),
        transaction(connection, Route("7", "cell-1", 1)),
    ):
        connection.execute("SELECT * FROM issues WHERE organization_id = 7")


def test_an_update_that_would_meet_no_row_is_sent_on(seven: TwoCells) -> None:
    gate(seven, "moved")
    with seven.admin("cell-1") as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute("DELETE FROM issues WHERE organization_id = 7")
    with (
        seven.application("cell-1") as connection,
        pytest.raises(Moved),
        transaction(connection, Route("7", "cell-1", 1)),
    ):
        connection.execute(RENAME)


def test_a_transaction_commits(seven: TwoCells) -> None:
    with seven.application("cell-1") as connection:
        with transaction(connection, Route("7", "cell-1", 1)):
            connection.execute(RENAME)

        assert connection.info.transaction_status is psycopg.pq.TransactionStatus.IDLE
    assert renamed(seven)


def test_a_transaction_that_fails_leaves_nothing(seven: TwoCells) -> None:
    def fail(connection: psycopg.Connection[Any]) -> None:
        with transaction(connection, Route("7", "cell-1", 1)):
            connection.execute(RENAME)
            raise KeyError("mine")

    with seven.application("cell-1") as connection:
        with pytest.raises(KeyError):
            fail(connection)

        assert connection.info.transaction_status is psycopg.pq.TransactionStatus.IDLE
    assert not renamed(seven)


def test_a_transaction_inside_another_is_refused(seven: TwoCells) -> None:
    with seven.application("cell-1") as connection:
        connection.execute("SELECT 1")
        with (
            pytest.raises(ValueError, match="already open"),
            transaction(connection, Route("7", "cell-1", 1)),
        ):
            pass


def test_a_connection_that_breaks_before_the_commit_did_nothing(seven: TwoCells) -> None:
    def lose(connection: psycopg.Connection[Any]) -> None:
        with transaction(connection, Route("7", "cell-1", 1)):
            connection.execute(RENAME)
            with seven.admin("cell-1") as admin:
                admin.execute("SELECT pg_terminate_backend(%s)", [connection.info.backend_pid])
            connection.execute("SELECT 1")

    with seven.application("cell-1") as connection, pytest.raises(NotCommitted):
        lose(connection)

    assert not renamed(seven)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_connection_that_breaks_while_committing_says_that_nobody_knows(
    seven: TwoCells, severed_network: Sever, when: str
) -> None:
    network = severed_network(seven.connections["cell-1-postgres-admin"])

    def lose(connection: psycopg.Connection[Any]) -> None:
        with transaction(connection, Route("7", "cell-1", 1)):
            connection.execute(RENAME)
            (network.cut_before if when == "before" else network.cut_after)(COMMIT)

    with psycopg.connect(network.url) as connection, pytest.raises(UnknownOutcome):
        lose(connection)

    assert renamed(seven) == (when == "after")


def test_a_writer_that_comes_during_a_freeze_is_served_after_it(seven: TwoCells) -> None:
    gate(seven, "frozen")
    thaw = threading.Timer(0.3, lambda: gate(seven, "open"))

    def rename(route: Route) -> int:
        with (
            seven.application(route.cell) as connection,
            transaction(connection, route),
        ):
            return connection.execute(RENAME).rowcount

    with RouteClient(seven.connections["cellferry-topology"]) as client:
        thaw.start()
        assert client.run("7", rename, deadline_s=120) == 1
    thaw.join()


# --- Redis ----------------------------------------------------------------------------------------


def redis_gate(cells: TwoCells, marker: dict[str, Any] | None) -> None:
    """Make organization 7 read-only in cell-1, with this marker."""
    with cells.redis("cell-1") as admin:
        admin.execute_command(
            *("ACL", "SETUSER", "org-7", "resetkeys", "%R~org:{7}:*", "%R~cellferry:gate:{7}")
        )
        if marker is not None:
            admin.set(marker_key("7"), json.dumps(marker))


MOVED = {"state": "moved", "cell": "cell-2", "epoch": 2}


def test_a_refused_command_becomes_the_markers_answer(seven: TwoCells) -> None:
    redis_gate(seven, MOVED)
    with (
        seven.organization_redis("cell-1", "7") as client,
        pytest.raises(Moved, match="moved to cell-2 at epoch 2"),
        redis_answers(client, "7"),
    ):
        client.incr("org:{7}:counter")


@pytest.mark.parametrize("state", ["frozen", "importing"])
def test_a_refused_command_of_a_frozen_organization_is_to_try_again(
    seven: TwoCells, state: str
) -> None:
    redis_gate(seven, {"state": state, "cell": "cell-1", "epoch": 1})
    with (
        seven.organization_redis("cell-1", "7") as client,
        pytest.raises(BeingMoved),
        redis_answers(client, "7"),
    ):
        client.incr("org:{7}:counter")


def test_a_refused_block_of_commands_is_understood(seven: TwoCells) -> None:
    redis_gate(seven, MOVED)
    with seven.organization_redis("cell-1", "7") as client:
        pipeline = client.pipeline(transaction=True)
        pipeline.incr("org:{7}:counter")
        pipeline.rpush("org:{7}:queue", "d")

        with pytest.raises(Moved), redis_answers(client, "7"):
            pipeline.execute()


def test_a_refused_script_is_understood(seven: TwoCells) -> None:
    redis_gate(seven, MOVED)
    with (
        seven.organization_redis("cell-1", "7") as client,
        pytest.raises(Moved),
        redis_answers(client, "7"),
    ):
        client.eval("return redis.call('INCR', KEYS[1])", 1, "org:{7}:counter")


def test_a_refusal_that_is_none_of_the_gates_stays_what_it_is(seven: TwoCells) -> None:
    with (
        seven.organization_redis("cell-1", "7") as client,
        pytest.raises(redis.exceptions.NoPermissionError),
        redis_answers(client, "7"),
    ):
        client.get("org:{8}:counter")


def test_a_refusal_by_a_gate_that_has_opened_since_is_to_try_again(seven: TwoCells) -> None:
    redis_gate(seven, {"state": "open", "cell": "cell-1", "epoch": 1})
    with (
        seven.organization_redis("cell-1", "7") as client,
        pytest.raises(BeingMoved),
        redis_answers(client, "7"),
    ):
        client.incr("org:{7}:counter")


def test_a_read_from_a_copy_that_was_left_is_sent_on(seven: TwoCells) -> None:
    redis_gate(seven, MOVED)
    with (
        seven.organization_redis("cell-1", "7") as client,
        pytest.raises(Moved),
        redis_answers(client, "7", assert_authority=True),
    ):
        client.get("org:{7}:counter")


def test_an_open_gate_lets_commands_through(seven: TwoCells) -> None:
    with (
        seven.organization_redis("cell-1", "7") as client,
        redis_answers(client, "7", assert_authority=True),
    ):
        assert client.incr("org:{7}:counter") == 6
