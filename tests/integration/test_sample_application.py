"""The sample application on real servers: provisioning, seeds, writers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import psycopg
import pytest
import redis

from cellferry.local.application.ledger import Outcome
from cellferry.local.application.provisioning import RANGE, provision, provision_organizations
from cellferry.local.application.writers import Traffic
from fixtures.postgres import postgres_versions
from fixtures.sample import Sample


def test_provisioning_again_changes_nothing(sample: Sample) -> None:
    place = sample.application.places["cell-1"]
    with sample.postgres() as connection:
        connection.execute("SELECT nextval('issues_id_seq')")
        before = connection.execute("SELECT * FROM pg_sequences ORDER BY sequencename").fetchall()
        provision(place)
        after = connection.execute("SELECT * FROM pg_sequences ORDER BY sequencename").fetchall()
    assert before == after


def test_provisioning_again_does_not_open_a_gated_organization(sample: Sample) -> None:
    sample.freeze("102")
    provision_organizations(sample.application.places["cell-1"], ["102"])
    client = redis.Redis.from_url(sample.application.places["cell-1"].app_redis("102"))
    with client, pytest.raises(redis.exceptions.NoPermissionError):
        client.set("org:{102}:live:x", 1)


def test_each_cell_gives_ids_of_its_own_range(sample: Sample) -> None:
    for cell, number in (("cell-1", 1), ("cell-2", 2)):
        with sample.postgres(cell) as connection:
            ranges = connection.execute(
                "SELECT DISTINCT min_value, max_value FROM pg_sequences"
            ).fetchall()
        assert ranges == [(number * RANGE + 1, (number + 1) * RANGE)]


def test_an_organizations_redis_user_reaches_its_own_keys_only(sample: Sample) -> None:
    client = redis.Redis.from_url(sample.application.places["cell-1"].app_redis("102"))
    with client:
        client.set("org:{102}:live:x", 1)
        assert client.get("cellferry:gate:{102}") is None
        for forbidden in ("org:{103}:live:x", "cellferry:gate:{103}"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.get(forbidden)
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.set("cellferry:gate:{102}", "open")


def test_the_applications_role_is_no_owner(sample: Sample) -> None:
    url = sample.application.places["cell-1"].app_postgres
    with psycopg.connect(url) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("DROP TABLE notes")


def test_provisioning_again_keeps_seeds_and_ledgers(sample: Sample) -> None:
    sample.write("102", 20)
    sample.application.provision()
    assert len(sample.application.organizations()) == 4
    assert sample.application.ledger().acknowledged > 0


def test_what_is_left_of_another_fleet_is_forgotten(sample: Sample) -> None:
    sample.write("102", 20)
    with psycopg.connect(sample.topology_url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA topology CASCADE")
    sample.topology.install()
    sample.application.provision()
    assert sample.application.organizations() == []
    assert sample.application.ledger().operations == []


def test_seeding_more_keeps_what_is_there(sample: Sample) -> None:
    sample.write("102", 100)
    made = sample.application.seed(organizations=6, rows=1_500)
    assert sorted(made) == ["105", "106"]
    assert sample.check().faults == []


def test_seeded_rows_are_about_as_many_as_were_asked_for(sample: Sample) -> None:
    with sample.postgres() as connection:
        rows = connection.execute(
            "SELECT (SELECT count(*) FROM issues WHERE organization_id = 101)"
            " + (SELECT count(*) FROM notes n JOIN projects p ON p.id = n.project_id"
            "    WHERE p.organization_id = 101)"
            " + (SELECT count(*) FROM events WHERE organization_id = 101)"
            " + (SELECT count(*) FROM label_links k JOIN labels l ON l.id = k.label_id"
            "    WHERE l.organization_id = 101)"
        ).fetchone()
    assert 1_100 < rows[0] < 1_600


def acknowledged(traffic: Traffic) -> int:
    """How many operations its writers say were acknowledged so far."""
    return sum(one["acknowledged"] for one in traffic.stats().values())


def wait_until(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_job_refused_by_redis_after_its_commit_is_queued_later_and_once(sample: Sample) -> None:
    """Hazard 9: the SQL is not done again, and the job is not lost."""
    writer = sample.writer("102")
    _ = writer.relational.ground
    sample.freeze("102")
    thread = threading.Thread(target=writer.close_and_enqueue)
    with sample.redis() as client:
        client.acl_log_reset()
        thread.start()
        wait_until(lambda: bool(client.acl_log()))  # its first try was refused
    assert thread.is_alive()
    sample.thaw("102")
    thread.join()
    edit, push = (one for one in sample.application.ledger().operations if not one.is_read)
    assert (edit.kind, edit.outcome, edit.attempts) == ("edit_issue", Outcome.ACKNOWLEDGED, 1)
    assert (push.kind, push.outcome) == ("enqueue", Outcome.ACKNOWLEDGED)
    assert push.attempts > 1
    with sample.redis() as client:
        assert client.llen("org:{102}:live:queue") == 1
    assert sample.check().faults == []


def test_a_job_is_queued_once_although_its_answer_was_lost(sample: Sample) -> None:
    writer = sample.writer("102")
    writer.keyspace.enqueue("job")
    writer.keyspace.enqueue("job")  # as after a lost connection
    with sample.redis() as client:
        assert client.lrange("org:{102}:live:queue", 0, -1) == ["job"]


def test_a_connection_lost_before_commit_is_tried_again(sample: Sample) -> None:
    writer = sample.write("102", 20)
    with sample.postgres() as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name LIKE 'sample%' AND datname = current_database()"
        )
    writer.relational.view_page()
    assert writer.session.tally.refused == 0
    assert sample.check().faults == []


def test_writers_of_one_organization_do_not_wait_for_another(sample: Sample) -> None:
    waiting, free = sample.writer("102"), sample.writer("103")
    free.keyspace.count()
    sample.freeze("102")
    thread = threading.Thread(target=waiting.keyspace.count)
    thread.start()
    for _ in range(20):
        free.keyspace.count()
    assert thread.is_alive()  # it waits for the thaw: the other one was served during the freeze
    sample.thaw("102")
    thread.join()
    assert waiting.session.tally.acknowledged == 1


def test_traffic_writes_to_every_organization_and_all_of_it_is_there(sample: Sample) -> None:
    with sample.application.start_traffic(200) as traffic:
        traffic.rates()
        wait_until(lambda: acknowledged(traffic) > 50)
        wait_until(lambda: sum(traffic.rates().values()) > 0)
    checked = sample.check()
    assert checked.faults == []
    assert checked.refused == 0
    assert checked.acknowledged == sum(one["acknowledged"] for one in traffic.stats().values())


def test_a_killed_writer_loses_nothing_that_was_acknowledged(sample: Sample) -> None:
    with sample.application.start_traffic(200) as traffic:
        wait_until(lambda: acknowledged(traffic) > 50)
        for pid in traffic.pids:
            os.kill(pid, signal.SIGKILL)
    checked = sample.check()
    assert checked.faults == []
    assert checked.acknowledged > 50


def test_a_second_run_goes_on_where_the_first_ended(sample: Sample) -> None:
    for _ in range(2):
        with sample.application.start_traffic(
            150, only=sample.application.organizations()[1:]
        ) as traffic:
            wait_until(lambda traffic=traffic: acknowledged(traffic) > 50)
    assert sample.check().faults == []
    assert {one.session[:2] for one in sample.application.ledger().operations} == {"r1", "r2"}


def test_connections_cut_while_they_commit_lose_and_double_nothing(sample: Sample) -> None:
    with sample.application.start_traffic(300) as traffic:
        cuts = 0
        until = time.monotonic() + 60
        # A cut loses an outcome only when it falls between a command and its answer.
        while cuts < 10 or (not lost_outcomes(traffic) and time.monotonic() < until):
            time.sleep(0.15)
            cuts += 1
            with sample.postgres() as connection, sample.redis() as client:
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name LIKE 'sample%' AND datname = current_database()"
                )
                client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    checked = sample.check()
    assert checked.faults == []
    assert checked.unknown > 0, "no outcome was lost: the test shows nothing"


def lost_outcomes(traffic: Traffic) -> int:
    return sum(one["unknown"] for one in traffic.stats().values())


@postgres_versions
def test_writers_work_on_every_version(sample: Sample) -> None:
    sample.write("101")
    sample.write("104")
    assert sample.check().faults == []
