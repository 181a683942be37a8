"""Every difference is found; a key that is dirty is not a difference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cellferry.model import Side
from cellferry.stores.postgres import verifier
from cellferry.stores.postgres.store import PostgresMove
from fixtures.ferry import Ferry


@pytest.fixture
def copied(ferry: Ferry) -> Iterator[tuple[Ferry, PostgresMove]]:
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        yield ferry, move


def damage(ferry: Ferry, statement: str) -> None:
    """Change the destination as no application could: past its gate and its foreign keys."""
    ferry.run(Side.DESTINATION, f"SET session_replication_role = replica; {statement}")


FAULTS = {
    "a changed byte": (
        "UPDATE issues SET raw = set_byte(raw, 0, get_byte(raw, 0) # 1) WHERE id = 1",
        ("public.issues", "1", "differs"),
    ),
    "a changed last digit": (
        "UPDATE issues SET score = score + 1e-14 WHERE id = 1",
        ("public.issues", "1", "differs"),
    ),
    "an empty text for NULL": (
        "UPDATE issues SET raw = NULL WHERE id = 1",
        ("public.issues", "1", "differs"),
    ),
    "a missing row": (
        "DELETE FROM events WHERE organization_id = 1 AND id = 2",
        ("public.events", "1, 2", "missing at destination"),
    ),
    "an extra row": (
        "INSERT INTO events VALUES (1, 5000, 'extra')",
        ("public.events", "1, 5000", "extra at destination"),
    ),
    "a row of another organization": (
        "UPDATE projects SET organization_id = 3 WHERE id = 40",
        ("public.projects", "40", "missing at destination"),
    ),
    "a parent of another organization": (
        "UPDATE issues SET project_id = 900001, iid = 99 WHERE id = 1",
        ("public.issues", "1", "missing at destination"),
    ),
    "swapped values": (
        (
            "UPDATE events SET what = CASE id WHEN 2 THEN 'event 4' ELSE 'event 2' END"
            " WHERE organization_id = 1 AND id IN (2, 4)"
        ),
        ("public.events", "1, 2", "differs"),
    ),
    "an orphan": (
        "UPDATE issues SET project_id = 555 WHERE id = 1999",
        ("public.issues", "1999", "orphan"),
    ),
    "a missing shared row": (
        "DELETE FROM users WHERE id = 2",
        ("public.memberships", "1, 2", "refers to a row that the destination lacks"),
    ),
    "a changed shared row": (
        "UPDATE users SET email = 'x' WHERE id = 2",
        ("public.users", "2", "differs"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(copied: tuple[Ferry, PostgresMove], fault: str) -> None:
    ferry, move = copied
    assert move.verify().ok
    statement, (part, key, reason) = FAULTS[fault]

    damage(ferry, statement)

    found = move.verify()
    assert any(
        one.part == part and one.key == key and one.reason.startswith(reason)
        for one in found.mismatches
    ), found.mismatches


def test_a_doubled_row_is_found(copied: tuple[Ferry, PostgresMove]) -> None:
    ferry, move = copied
    damage(
        ferry,
        "ALTER TABLE events DROP CONSTRAINT events_pkey;"
        "INSERT INTO events SELECT * FROM events WHERE organization_id = 1 AND id = 2",
    )

    (mismatch,) = move.verify().mismatches
    assert (mismatch.part, mismatch.key, mismatch.reason) == ("public.events", "1, 2", "differs")


ORPHAN = "INSERT INTO issues (id, project_id, iid, title) VALUES (1000, 555, 1, 'left behind')"


def leave_an_orphan(ferry: Ferry) -> None:
    """Let the destination alone have a row whose parent nobody has."""
    ferry.run(Side.SOURCE, "DELETE FROM issues WHERE id = 1000")
    damage(ferry, ORPHAN)


def take_any_row_for_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a verify look for orphans among no rows at all."""
    monkeypatch.setattr(verifier, "ORPHAN_ROWS", 0)
    monkeypatch.setattr(verifier, "ORPHAN_TIMES", 0)


def test_an_orphan_that_the_source_does_not_have_is_found(
    copied: tuple[Ferry, PostgresMove],
) -> None:
    ferry, move = copied
    leave_an_orphan(ferry)

    (mismatch,) = move.verify().mismatches
    assert (mismatch.key, mismatch.reason) == ("1000", "orphan")


def test_orphans_are_not_looked_for_among_too_many_rows_of_others(
    copied: tuple[Ferry, PostgresMove], monkeypatch: pytest.MonkeyPatch
) -> None:
    ferry, move = copied
    leave_an_orphan(ferry)
    take_any_row_for_too_many(monkeypatch)

    found = move.verify()

    assert found.ok
    assert any("orphans not looked for in public.issues" in one for one in found.remarks)
    assert not any("public.projects" in one for one in found.remarks), "its owner is in the row"


def test_a_repair_looks_for_orphans_among_however_many(
    copied: tuple[Ferry, PostgresMove], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made where the log was lost, from which a round would know of them."""
    ferry, move = copied
    leave_an_orphan(ferry)
    take_any_row_for_too_many(monkeypatch)

    move.repair()

    assert ferry.run(Side.DESTINATION, "SELECT id FROM issues WHERE id = 1000") == []


def test_a_row_of_ours_that_lost_its_parent_is_found_among_however_many(
    copied: tuple[Ferry, PostgresMove], monkeypatch: pytest.MonkeyPatch
) -> None:
    ferry, move = copied
    damage(ferry, "UPDATE issues SET project_id = 555 WHERE id = 1999")
    take_any_row_for_too_many(monkeypatch)

    found = {(one.part, one.key): one.reason for one in move.verify().mismatches}

    assert found["public.issues", "1999"] == "missing at destination"
    assert "orphan" not in found.values()


def test_a_child_of_another_move_that_waits_for_its_parent_is_no_orphan(
    copied: tuple[Ferry, PostgresMove],
) -> None:
    ferry, move = copied
    damage(ferry, ORPHAN)  # row 1000 is organization 2's at the source

    assert move.verify().ok


def test_faults_that_cancel_each_other_out_are_found(copied: tuple[Ferry, PostgresMove]) -> None:
    ferry, move = copied
    damage(
        ferry,
        "DELETE FROM events WHERE organization_id = 1 AND id = 2;"
        "INSERT INTO events VALUES (1, 5000, 'event 2')",
    )

    assert move.verify().mismatch_count == 2


def test_a_dirty_key_is_no_mismatch(copied: tuple[Ferry, PostgresMove]) -> None:
    ferry, move = copied
    ferry.run(Side.SOURCE, "UPDATE issues SET title = 'changed' WHERE id = 1")
    ferry.run(Side.SOURCE, "DELETE FROM issues WHERE id = 3")
    ferry.run(Side.SOURCE, "UPDATE users SET email = 'changed' WHERE id = 2")

    found = move.verify()

    assert found.ok, found.mismatches
    assert found.hashes["public.issues"]["dirty"] == 2


def test_a_dirty_key_excuses_no_other_key(copied: tuple[Ferry, PostgresMove]) -> None:
    ferry, move = copied
    ferry.run(Side.SOURCE, "UPDATE issues SET title = 'changed' WHERE id = 1")
    damage(ferry, "UPDATE issues SET title = 'damaged' WHERE id = 3")

    (mismatch,) = move.verify().mismatches
    assert mismatch.key == "3"


def test_other_organizations_faults_are_not_ours(copied: tuple[Ferry, PostgresMove]) -> None:
    ferry, move = copied
    damage(ferry, "UPDATE issues SET title = 'damaged' WHERE id = 900001")

    assert move.verify().ok


def test_evidence_names_counts_and_hashes(copied: tuple[Ferry, PostgresMove]) -> None:
    _, move = copied
    found = move.verify()

    issues = found.hashes["public.issues"]
    assert issues["count"] == 1000
    assert issues["source"] == issues["destination"]
    assert found.compared >= 2800


def test_a_table_emptied_behind_the_gates_back_is_noticed_at_cutover(
    copied: tuple[Ferry, PostgresMove],
) -> None:
    from cellferry.errors import VerificationFailed

    ferry, move = copied
    assert move.verify().ok
    ferry.run(Side.SOURCE, "ALTER TABLE events ADD COLUMN more int")

    move._layouts = {}
    with pytest.raises(VerificationFailed, match="truncated, rewritten or changed"):
        move.finish()
