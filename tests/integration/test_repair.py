"""Verify-and-repair: whatever differs is found and made good, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cellferry.errors import LeaseLost
from cellferry.model import Side
from cellferry.stores.postgres import repair
from cellferry.stores.postgres.store import PostgresMove
from fixtures.ferry import Ferry


@pytest.fixture
def copied(ferry: Ferry) -> Iterator[tuple[Ferry, PostgresMove]]:
    """Copied once; then the key log was given up, as after a long pause."""
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        ferry.run(Side.SOURCE, "DELETE FROM cellferry.gate; DELETE FROM cellferry.key_log")
        yield ferry, move


def damage(ferry: Ferry, statement: str) -> None:
    """Change the destination past its gate and its foreign keys, as a lost commit would."""
    ferry.run(Side.DESTINATION, f"SET session_replication_role = replica; {statement}")


def repaired(move: PostgresMove) -> int:
    """Arm again, repair, and see that a complete verification agrees."""
    move.open_capture()
    found = move.repair()
    verification = move.verify()
    assert verification.ok, verification.mismatches
    assert found.compared == sum(
        part["count"] for part in verification.hashes.values() if "placement" not in part
    )
    return found.repaired


MISSED = """
UPDATE issues SET title = title || '!' WHERE id % 100 = 1;
DELETE FROM notes WHERE id = md5('11')::uuid;
DELETE FROM issues WHERE id = 5;
INSERT INTO projects (id, organization_id, name) VALUES (77, 1, 'new');
INSERT INTO issues (id, project_id, iid, title) VALUES (90001, 77, 1, 'in a new project');
INSERT INTO notes (issue_id, author_id, body) VALUES (90001, 3, 'in a new issue');
UPDATE "Odd Labels" SET "Key" = 'renamed, "oddly"' WHERE organization_id = 1 AND color = 'Color2';
UPDATE events SET what = 'changed' WHERE organization_id = 1 AND id = 4;
DELETE FROM projects WHERE id = 39 AND organization_id = 2;
BEGIN; UPDATE slots SET position = position + 1 WHERE organization_id = 1; COMMIT;
"""


def test_what_nobody_logged_at_the_source_arrives(copied: tuple[Ferry, PostgresMove]) -> None:
    ferry, move = copied
    neighbours = ferry.content(Side.DESTINATION, 3)
    ferry.run(Side.SOURCE, MISSED)
    assert repaired(move) > 20
    assert ferry.content(Side.DESTINATION, 1) == ferry.content(Side.SOURCE, 1)
    assert ferry.content(Side.DESTINATION, 3) == neighbours


#: Users that the destination had before; the move leaves them alone.
OWN_USERS = {"(1,user1@example.com,1)", "(9001,nine@example.com,)"}

LOSSES = {
    "a lost row": "DELETE FROM events WHERE organization_id = 1 AND id = 2",
    "a lost batch": "DELETE FROM issues WHERE id < 900000 AND id % 3 = 1",
    "an older row": "UPDATE issues SET title = 'older' WHERE id = 1",
    "a row too many": "INSERT INTO events VALUES (1, 5000, 'lost at the source')",
    "a parent without its children": "DELETE FROM notes WHERE issue_id IN (1, 2, 3, 5, 7)",
    "children without their parent": "DELETE FROM projects WHERE id = 40",
    "a whole branch too many": (
        "INSERT INTO projects (id, organization_id, name) VALUES (501, 1, 'lost');"
        "INSERT INTO issues (id, project_id, iid, title) VALUES (90501, 501, 1, 'lost');"
        "INSERT INTO notes (issue_id, body) VALUES (90501, 'lost')"
    ),
    "an orphan": "INSERT INTO notes (id, issue_id, body) VALUES (md5('x')::uuid, 808, 'lost')",
    "a swapped unique value": (
        "UPDATE projects SET name = 'aside' WHERE id = 2;"
        "UPDATE projects SET name = 'project 2' WHERE id = 4;"
        "UPDATE projects SET name = 'project 4' WHERE id = 2"
    ),
    "a lost shared row": "DELETE FROM users WHERE id = 3",
    "an older shared row": "UPDATE users SET email = 'older' WHERE id = 3",
    "everything": (
        "DELETE FROM notes WHERE issue_id < 900000; DELETE FROM issues WHERE id < 900000;"
        "DELETE FROM projects WHERE organization_id = 1; DELETE FROM events WHERE"
        " organization_id = 1; DELETE FROM slots WHERE organization_id = 1;"
        'DELETE FROM "Odd Labels" WHERE organization_id = 1;'
        "DELETE FROM memberships WHERE organization_id = 1; DELETE FROM organizations WHERE id = 1"
    ),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_what_the_destination_lost_or_has_too_many_is_made_good(
    copied: tuple[Ferry, PostgresMove], loss: str
) -> None:
    ferry, move = copied
    neighbours = ferry.content(Side.DESTINATION, 3)
    damage(ferry, loss)
    assert repaired(move) > 0
    assert ferry.content(Side.DESTINATION, 1) == ferry.content(Side.SOURCE, 1)
    assert ferry.content(Side.DESTINATION, 3) == neighbours
    moved = {row for row in ferry.content(Side.DESTINATION)["users"] if row not in OWN_USERS}
    assert moved <= set(ferry.content(Side.SOURCE)["users"])
    assert repaired(move) == 0, "a second repair finds nothing"


def test_equal_sides_are_compared_and_nothing_is_written(
    copied: tuple[Ferry, PostgresMove],
) -> None:
    ferry, move = copied
    before = ferry.run(Side.DESTINATION, "SELECT sum(xmin::text::bigint) FROM issues")
    assert repaired(move) == 0
    assert ferry.run(Side.DESTINATION, "SELECT sum(xmin::text::bigint) FROM issues") == before


def test_what_changes_during_a_repair_is_left_to_the_rounds_and_not_lost(
    copied: tuple[Ferry, PostgresMove],
) -> None:
    """Each time the repair looks up, the application changes rows that it was about to compare."""
    ferry, move = copied
    ferry.run(Side.SOURCE, MISSED)
    move.open_capture()
    writes = 0

    def write() -> None:
        nonlocal writes
        writes += 1
        ferry.run(
            Side.SOURCE,
            f"UPDATE issues SET title = 'during {writes}' WHERE id IN (1, 101, {writes * 2 + 1});"
            f"INSERT INTO events VALUES (1, {9000 + writes}, 'during');"
            f"DELETE FROM notes WHERE id = md5('{writes * 2 + 3}')::uuid",
        )

    ferry.progress.on_check = write
    move.repair()
    ferry.progress.on_check = None
    assert writes > 10
    while move.sync().remaining:
        pass
    assert move.verify().ok
    assert ferry.content(Side.DESTINATION, 1) == ferry.content(Side.SOURCE, 1)


def test_a_repair_in_small_pieces_repairs_everything(
    copied: tuple[Ferry, PostgresMove], monkeypatch: pytest.MonkeyPatch
) -> None:
    ferry, move = copied
    monkeypatch.setattr(repair, "MAX_KEYS", 7)
    damage(ferry, LOSSES["everything"])
    assert repaired(move) > 2000
    assert ferry.content(Side.DESTINATION, 1) == ferry.content(Side.SOURCE, 1)


def test_an_older_attempt_repairs_nothing(copied: tuple[Ferry, PostgresMove]) -> None:
    ferry, move = copied
    damage(ferry, LOSSES["a lost batch"])
    move.open_capture()
    with ferry.opened(ferry.move(attempt=2)), pytest.raises(LeaseLost):
        move.repair()


def test_a_return_is_repaired_behind_its_moved_gate(ferry: Ferry) -> None:
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        move.catch_up()
        move.freeze(10)
        move.finish()
        move.hand_over()
        move.release()
    ferry.run(Side.DESTINATION, "UPDATE issues SET title = 'there' WHERE id = 1")
    ferry.run(Side.DESTINATION, "DELETE FROM cellferry.key_log")  # the log was lost
    with ferry.opened(ferry.move(attempt=2).turned()) as back:
        back.open_capture()
        assert back.repair().repaired == 1
        assert back.verify().ok
    assert ferry.run(Side.SOURCE, "SELECT title FROM issues WHERE id = 1") == [("there",)]
