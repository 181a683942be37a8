"""The checker finds each kind of fault when it is put into real cells."""

from __future__ import annotations

import pytest

from cellferry.local.application.ledger import Outcome
from fixtures.sample import Sample

QUEUE, STREAM = "org:{102}:live:queue", "org:{102}:live:stream"


def test_an_honest_run_has_no_faults(sample: Sample) -> None:
    for organization in ("101", "102", "104"):
        sample.write(organization)
    checked = sample.check()
    assert checked.faults == []
    assert checked.acknowledged > 600
    assert checked.reads > 20


@pytest.mark.parametrize(
    ("statement", "fault"),
    [
        pytest.param("DELETE FROM notes WHERE ctid = (SELECT ctid FROM notes"
                     " WHERE external_ref LIKE 't0%' LIMIT 1)", "lost", id="a row is gone"),
        pytest.param("UPDATE issues SET lock_version = lock_version - 1 WHERE external_ref ="
                     " (SELECT max(external_ref) FROM issues WHERE lock_version > 1)",
                     "lost", id="an update is gone"),
        pytest.param("UPDATE notes SET body = 'older' WHERE external_ref ="
                     " (SELECT max(external_ref) FROM notes)", "lost", id="an older text"),
        pytest.param("UPDATE project_statistics SET page_views = page_views - 1"
                     " WHERE page_views > 0", "lost", id="a shared counter lost one"),
        pytest.param("INSERT INTO events (organization_id, author_id, action, payload,"
                     " external_ref) SELECT organization_id, author_id, action, payload,"
                     " external_ref FROM events WHERE external_ref IS NOT NULL LIMIT 1",
                     "doubled", id="an insert twice"),
        pytest.param("UPDATE preferences SET lock_version = lock_version + 1 WHERE external_ref ="
                     " (SELECT max(external_ref) FROM preferences)", "doubled",
                     id="an update twice"),
        pytest.param("INSERT INTO board_cards (organization_id, board, slot, title, external_ref)"
                     " VALUES (102, 'x', 1, 'x', 'nobody')", "phantom", id="nobody wrote it"),
        pytest.param("UPDATE notes SET body = body || '!' WHERE id = (SELECT min(n.id) FROM notes n"
                     " JOIN projects p ON p.id = n.project_id WHERE organization_id = 103)",
                     "foreign", id="another organization's row changed"),
        pytest.param("DELETE FROM label_links WHERE id = (SELECT min(k.id) FROM label_links k"
                     " JOIN labels l ON l.id = k.label_id WHERE l.organization_id = 103)",
                     "foreign", id="another organization's row deleted"),
        pytest.param("UPDATE plans SET name = 'gratis' WHERE id = 1", "foreign",
                     id="the global table changed"),
        pytest.param("UPDATE projects SET issues_count = issues_count + 1"
                     " WHERE external_ref = 'hot-102-0'", "inconsistent",
                     id="a trigger counted a moved row"),
        pytest.param("INSERT INTO audit_entries (merge_request_id, lock_version, details)"
                     " SELECT id, lock_version, '{}' FROM merge_requests"
                     " WHERE external_ref IS NOT NULL LIMIT 1", "inconsistent",
                     id="a trigger wrote for a moved row"),
    ],
)  # fmt: skip
def test_a_fault_in_postgres_is_found(written_sample: Sample, statement: str, fault: str) -> None:
    before = written_sample.faults()
    with written_sample.postgres() as connection:
        connection.execute("SET session_replication_role = replica")
        assert connection.execute(statement.encode()).rowcount == 1
    assert set(written_sample.new_faults(before)) == {fault}


def test_a_lost_counter_increment_in_redis_is_found(written_sample: Sample) -> None:
    before = written_sample.faults()
    with written_sample.redis() as client:
        client.decr("org:{102}:live:counter:requests")
    assert written_sample.new_faults(before) == {"lost": 1}


def test_a_job_that_is_queued_twice_is_found(written_sample: Sample) -> None:
    before = written_sample.faults()
    with written_sample.redis() as client:
        client.lpush(QUEUE, client.lindex(QUEUE, 0))
    assert written_sample.new_faults(before) == {"doubled": 1}


def test_another_organizations_key_that_changed_is_found(written_sample: Sample) -> None:
    before = written_sample.faults()
    with written_sample.redis() as client:
        client.hset("org:{103}:cold:profile:4", "visits", 99)
    assert written_sample.new_faults(before) == {"foreign": 1}


def test_a_lost_stream_entry_is_found(sample: Sample) -> None:
    writer = sample.writer()
    writer.keyspace.publish()
    with sample.redis() as client:
        client.xtrim(STREAM, maxlen=0)
    assert sample.faults() == {"lost": 1}


def test_a_consumer_group_copied_before_its_last_delivery_is_found(sample: Sample) -> None:
    writer = sample.writer()
    writer.keyspace.publish()
    writer.keyspace.consume()
    with sample.redis() as client:
        client.xgroup_destroy(STREAM, "workers")
        client.xgroup_create(STREAM, "workers", id="0")
    assert set(sample.faults()) == {"lost"}


def test_a_lost_expiry_is_found(sample: Sample) -> None:
    writer = sample.writer()
    for _ in range(12):
        writer.keyspace.log_in()
    with sample.redis() as client:
        names = sorted(client.scan_iter("org:{102}:live:session:*"))
        longest = max(names, key=client.pexpiretime)
        client.persist(longest)
    assert sample.faults() == {"changed": 1}


def test_an_unacknowledged_write_may_be_there_once_or_not(sample: Sample) -> None:
    insert = (
        "INSERT INTO board_cards (organization_id, board, slot, title, external_ref)"
        " VALUES (102, 'x', %s, 'x', 'forged.1')"
    )
    sample.record(Outcome.UNKNOWN, effects=[["make", "board_cards", "forged.1", "e8f8cd57eb91"]])
    assert sample.faults() == {}
    with sample.postgres() as connection:
        digest = connection.execute("SELECT left(md5('x:1'), 12)").fetchone()
        sample.record(Outcome.UNKNOWN, effects=[["make", "board_cards", "forged.1", digest[0]]])
        connection.execute(insert, (1,))
        assert sample.faults() == {}
        connection.execute(insert, (2,))
    assert sample.faults() == {"doubled": 1}


def test_a_write_acknowledged_by_a_cell_without_authority_is_found(sample: Sample) -> None:
    sample.record(
        Outcome.ACKNOWLEDGED,
        effects=[["add", "page_views", "hot-102-0", 0]],
        cell="cell-2",
        epoch=1,
    )
    assert sample.faults() == {"misplaced": 1}


def test_a_read_that_went_backwards_is_found(sample: Sample) -> None:
    sample.record(
        Outcome.ACKNOWLEDGED,
        effects=[],
        result=[["page_views", "hot-102-0", 4, 5]],
        cell="cell-1",
        epoch=1,
    )
    assert sample.faults() == {"backwards": 1}


def test_rows_in_a_cell_without_authority_are_found_unless_its_gate_holds_them(
    sample: Sample,
) -> None:
    with sample.postgres("cell-2") as connection:
        connection.execute(
            "INSERT INTO organizations (id, slug, name, plan_id) VALUES (102, 'breeze', 'B', 1)"
        )
        assert sample.faults() == {"left_behind": 1}
        connection.execute("CREATE SCHEMA cellferry")
        connection.execute("CREATE TABLE cellferry.gate (organization text, state text)")
        assert sample.faults() == {"left_behind": 1}
        connection.execute("INSERT INTO cellferry.gate VALUES ('102', 'moved')")
    assert sample.faults() == {}


def test_keys_in_a_cell_without_authority_are_found_unless_its_gate_holds_them(
    sample: Sample,
) -> None:
    with sample.redis("cell-2") as client:
        client.set("org:{102}:live:session:x", "x")
        assert sample.faults() == {"left_behind": 1}
        client.set("cellferry:gate:{102}", '{"state": "moved"}')
    assert sample.faults() == {}


def test_rows_whose_parents_are_gone_are_found(sample: Sample) -> None:
    with sample.postgres("cell-2") as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute(
            "INSERT INTO notes (project_id, author_id, noteable_type, noteable_id, body)"
            " VALUES (1, -1, 'Issue', 1, 'orphan')"
        )
    assert sample.faults() == {"left_behind": 1}
