"""Shared rows that the destination has and nobody else uses there come as they are at the source.

An organization leaves a cell for good; its users stay behind. They change where it lives now, and
a new migration brings it back: what was acknowledged meanwhile must not be lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cellferry import phases
from cellferry.errors import NotPrepared, PermanentError, TransientError
from cellferry.migration import MoveOptions, steps
from cellferry.migration.plan import Plan
from cellferry.model import Organization, Side
from cellferry.phases import Phase
from cellferry.stores.postgres import taking_over
from cellferry.stores.postgres.taking_over import TakeOver
from fixtures.cells import NO_TRACES, PATIENT, TwoCells
from fixtures.ferry import Ferry, ferry_with
from fixtures.postgres import FreshDatabases

SEVEN, EIGHT = Organization("7", "org-7"), Organization("8", "org-8")
THERE = ("copy", "sync", "verify", "cutover", "soak", "cleanup")


@pytest.fixture
def home(cells: TwoCells) -> TwoCells:
    """Organizations 7 and 8 in cell-1, whose users have names."""
    for cell in ("cell-1", "cell-2"):
        with cells.admin(cell) as connection:
            connection.execute("ALTER TABLE users ADD name text NOT NULL DEFAULT 'as made'")
    for one in (7, 8):
        cells.add_organization(one, issues=3)
    return cells


def plan(cells: TwoCells, organization: Organization, cell: str) -> Plan:
    with cells.context() as context:
        return steps.plan(
            context,
            organization.slug,
            cell,
            options=MoveOptions(strategy="online", ttl_s=0, soak_s=0, **PATIENT),
            record=True,
        )


def run(cells: TwoCells, migration: int | None, *names: str) -> None:
    assert migration is not None
    for name in names:
        with cells.context() as context:
            getattr(steps, name)(context, migration)


def move(cells: TwoCells, organization: Organization, cell: str, *names: str) -> int:
    migration = plan(cells, organization, cell).migration
    run(cells, migration, *(names or THERE))
    assert migration is not None
    return migration


def rename(cells: TwoCells, cell: str, user: int, name: str) -> None:
    with cells.application(cell, autocommit=True) as connection:
        found = connection.execute("UPDATE users SET name = %s WHERE id = %s", (name, user))
        assert found.rowcount == 1


def name_of(cells: TwoCells, cell: str, user: int) -> str:
    with cells.admin(cell) as connection:
        row = connection.execute("SELECT name FROM users WHERE id = %s", (user,)).fetchone()
    assert row is not None
    return str(row[0])


def warnings(found: Plan) -> dict[str, str]:
    return {
        one.code: one.reason
        for one in found.blockers
        if one.code.startswith("referenced-row") or one.fatal
    }


# --- whole migrations ---------------------------------------------------------------------------


def test_a_user_renamed_at_the_new_cell_has_the_new_name_back_home(home: TwoCells) -> None:
    move(home, SEVEN, "cell-2")
    assert name_of(home, "cell-1", 7000001) == "as made", "its old users stay behind"
    rename(home, "cell-2", 7000001, "renamed")

    back = plan(home, SEVEN, "cell-1")

    found = warnings(back)
    assert list(found) == ["referenced-row-taken-over"]
    assert "(7000001)" in found["referenced-row-taken-over"]
    run(home, back.migration, *THERE)
    assert name_of(home, "cell-1", 7000001) == "renamed"
    assert home.traces("cell-1") == home.traces("cell-2") == NO_TRACES


def test_a_user_renamed_after_the_copy_follows(home: TwoCells) -> None:
    move(home, SEVEN, "cell-2")
    migration = plan(home, SEVEN, "cell-1").migration
    run(home, migration, "copy")
    rename(home, "cell-2", 7000001, "renamed late")  # the rows were equal when it was copied

    run(home, migration, *THERE[1:])

    assert name_of(home, "cell-1", 7000001) == "renamed late"


def test_a_user_that_others_use_here_stays_and_plan_says_so(home: TwoCells) -> None:
    with home.admin("cell-1") as connection:
        connection.execute("INSERT INTO memberships VALUES (8, 7000002)")
    move(home, SEVEN, "cell-2")
    for user in (7000001, 7000002):
        rename(home, "cell-2", user, "renamed")

    back = plan(home, SEVEN, "cell-1")

    found = warnings(back)
    assert set(found) == {"referenced-row-taken-over", "referenced-row-differs"}
    assert "(7000002)" in found["referenced-row-differs"]
    assert "(7000001)" in found["referenced-row-taken-over"]
    run(home, back.migration, *THERE)
    assert name_of(home, "cell-1", 7000001) == "renamed"
    assert name_of(home, "cell-1", 7000002) == "as made"


def test_two_organizations_that_share_a_user_bring_it_back_together(home: TwoCells) -> None:
    with home.admin("cell-1") as connection:
        connection.execute("INSERT INTO memberships VALUES (8, 7000001)")
    for one in (SEVEN, EIGHT):
        move(home, one, "cell-2")
    rename(home, "cell-2", 7000001, "renamed")
    both = [plan(home, one, "cell-1").migration for one in (SEVEN, EIGHT)]

    for migration in both:
        run(home, migration, "copy")
    rename(home, "cell-2", 7000001, "renamed again")
    for migration in both:
        run(home, migration, *THERE[1:])

    assert name_of(home, "cell-1", 7000001) == "renamed again"
    assert home.traces("cell-1") == home.traces("cell-2") == NO_TRACES


def test_a_copy_that_waits_to_be_deleted_uses_nothing(home: TwoCells) -> None:
    with home.admin("cell-1") as connection:
        connection.execute("INSERT INTO memberships VALUES (8, 7000001)")
    move(home, SEVEN, "cell-2")
    retained = move(home, EIGHT, "cell-2", *THERE[:-1])
    rename(home, "cell-2", 7000001, "renamed")

    move(home, SEVEN, "cell-1")

    assert name_of(home, "cell-1", 7000001) == "renamed"
    run(home, retained, "cleanup")
    assert name_of(home, "cell-1", 7000001) == "renamed"


def test_a_user_that_was_taken_over_goes_back_with_a_roll_back(home: TwoCells) -> None:
    with home.admin("cell-2") as connection:
        connection.execute("INSERT INTO users VALUES (7000001, 'user7000001', 'stale')")
    migration = move(home, SEVEN, "cell-2", *THERE[:-1])
    assert name_of(home, "cell-2", 7000001) == "as made"
    rename(home, "cell-2", 7000001, "renamed")

    with home.context() as context:
        steps.roll_back(context, migration, "the test wants it")

    assert name_of(home, "cell-1", 7000001) == "renamed"
    run(home, migration, "cleanup")
    assert name_of(home, "cell-2", 7000001) == "renamed", "it was there before, and stays"
    assert home.traces("cell-1") == home.traces("cell-2") == NO_TRACES


def test_a_user_that_the_organization_comes_to_use_during_the_move_is_brought(
    home: TwoCells,
) -> None:
    for cell, name in (("cell-1", "as it is"), ("cell-2", "stale")):
        with home.admin(cell) as connection:
            connection.execute("INSERT INTO users VALUES (1, 'someone', %s)", (name,))
    migration = plan(home, SEVEN, "cell-2").migration
    run(home, migration, "copy")
    with home.application("cell-1", autocommit=True) as connection:
        connection.execute("INSERT INTO memberships VALUES (7, 1)")

    run(home, migration, *THERE[1:])

    assert name_of(home, "cell-2", 1) == "as it is"


# --- beside writers -----------------------------------------------------------------------------


@contextmanager
def copying(cells: TwoCells, migration: int | None) -> Iterator[None]:
    """Copy in a thread, to its end."""
    with ThreadPoolExecutor(1) as pool:
        copy = pool.submit(run, cells, migration, "copy")
        yield
        copy.result(120)


def wait_for_lock(cells: TwoCells, cell: str, who: str) -> None:
    """Wait until a session of the role waits for another's row."""
    with cells.admin(cell) as connection:
        for _ in range(3000):
            row = connection.execute(
                "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE usename = %s"
                " AND datname = current_database() AND wait_event_type = 'Lock')",
                (who,),
            ).fetchone()
            if row == (True,):
                return
            time.sleep(0.01)
    pytest.fail(f"{who} never waited")


def test_a_row_that_somebody_is_about_to_refer_to_is_waited_for_and_left_alone(
    home: TwoCells, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taking_over, "LOCK_TIMEOUT_S", 60)
    move(home, SEVEN, "cell-2")
    rename(home, "cell-2", 7000001, "renamed")
    migration = plan(home, SEVEN, "cell-1").migration
    with home.application("cell-1") as writer:

        def refer(phase: Phase) -> None:
            if phase is Phase.COPY_ARMED:  # which waits for older transactions
                writer.execute("INSERT INTO memberships VALUES (8, 7000001)")

        phases.listen(refer)
        try:
            with copying(home, migration):
                wait_for_lock(home, "cell-1", home.mover_role)
                writer.commit()
        finally:
            phases.listen(None)

    assert name_of(home, "cell-1", 7000001) == "as made"
    with home.admin("cell-1") as connection:
        found = connection.execute("SELECT key FROM cellferry.imported_row ORDER BY 1").fetchall()
    assert found == [(["7000002"],), (["7000003"],)]


def test_who_refers_to_a_row_while_it_is_taken_over_finds_the_new_content(
    home: TwoCells, monkeypatch: pytest.MonkeyPatch
) -> None:
    move(home, SEVEN, "cell-2")
    rename(home, "cell-2", 7000001, "renamed")
    migration = plan(home, SEVEN, "cell-1").migration
    update, seen = TakeOver._update, []

    def refer() -> None:
        with home.application("cell-1") as writer:
            writer.execute("INSERT INTO memberships VALUES (8, 7000001)")
            seen.append(writer.execute("SELECT name FROM users WHERE id = 7000001").fetchone())

    with ThreadPoolExecutor(1) as pool:
        waiting = []

        def update_beside_a_writer(self: TakeOver, *arguments: Any) -> None:
            update(self, *arguments)
            waiting.append(pool.submit(refer))
            wait_for_lock(home, "cell-1", f"app_{home.databases.suffix}")

        monkeypatch.setattr(TakeOver, "_update", update_beside_a_writer)
        run(home, migration, "copy")
        waiting[0].result(60)

    assert seen == [("renamed",)]


# --- one store, step by step --------------------------------------------------------------------

MORE = """
ALTER TABLE public.users ADD login text UNIQUE;
CREATE TABLE public.user_emails (
    id bigint PRIMARY KEY,
    user_id bigint NOT NULL REFERENCES public.users,
    address text NOT NULL UNIQUE,
    confirmed boolean NOT NULL DEFAULT false
);
"""
STALE = """
INSERT INTO plans VALUES (2, 'plan 2') ON CONFLICT DO NOTHING;
INSERT INTO users VALUES (2, 'user2@example.com', NULL, 'old 2'),
    (4, 'user4@example.com', NULL, 'old 4');
INSERT INTO user_emails VALUES (20, 2, 'a@2'), (40, 4, 'a@4');
"""


@pytest.fixture
def stale(fresh_databases: Callable[[], FreshDatabases], tmp_path: Path) -> Ferry:
    """The destination has old rows of users 2 and 4, with one e-mail address of each."""
    placement = "placement: {referenced: [user_emails]}"
    made = ferry_with(fresh_databases(), MORE, tmp_path / "map.yaml", placement)
    made.run(
        Side.SOURCE,
        "UPDATE users SET login = 'login ' || id;"
        "INSERT INTO user_emails VALUES (20, 2, 'a@2', true), (21, 2, 'b@2', false),"
        " (40, 4, 'a@4', false)",
    )
    made.run(Side.DESTINATION, STALE)
    return made


def logins(ferry: Ferry) -> dict[int, str]:
    return dict(ferry.run(Side.DESTINATION, "SELECT id, login FROM users WHERE id IN (2, 4, 9001)"))


def copy(ferry: Ferry, attempt: int = 1) -> None:
    with ferry.opened(ferry.move(attempt=attempt)) as move:
        move.open_capture()
        move.copy()


def taken(ferry: Ferry) -> list[tuple[Any, ...]]:
    return ferry.run(
        Side.DESTINATION,
        "SELECT relation, key[1] FROM cellferry.imported_row WHERE was_here ORDER BY 1, 2",
    )


def test_rows_that_belong_to_a_row_come_with_it(stale: Ferry) -> None:
    copy(stale)

    assert logins(stale) == {2: "login 2", 4: "login 4", 9001: None}
    emails = stale.run(Side.DESTINATION, "SELECT id, confirmed FROM user_emails ORDER BY id")
    assert emails == [(20, True), (21, False), (40, False)]
    assert taken(stale) == [
        ("public.plans", "2"),
        ("public.user_emails", "20"),
        ("public.user_emails", "40"),
        ("public.users", "2"),
        ("public.users", "4"),
    ]


def test_an_abort_deletes_nothing_that_was_there(stale: Ferry) -> None:
    copy(stale)
    with stale.opened(stale.move(attempt=9)) as move:
        move.close_capture()
        move.cleanup(Side.DESTINATION)

    assert logins(stale).keys() == {2, 4, 9001}
    assert stale.run(Side.DESTINATION, "SELECT id FROM users ORDER BY 1") == [
        (1,), (2,), (4,), (9001,),
    ]  # fmt: skip
    dangling = stale.run(
        Side.DESTINATION,
        "SELECT u.id FROM users AS u LEFT JOIN plans AS p ON p.id = u.plan_id"
        " WHERE u.plan_id IS NOT NULL AND p.id IS NULL",
    )
    assert dangling == []
    assert stale.run(Side.DESTINATION, "SELECT count(*) FROM cellferry.imported_row") == [(0,)]


class KilledError(BaseException):
    """The controller's process ends here."""


def test_a_copy_that_is_killed_after_it_took_a_row_brings_what_the_row_needs(stale: Ferry) -> None:
    stale.run(Side.SOURCE, "INSERT INTO plans VALUES (77, 'new'); UPDATE users SET plan_id = 77")

    def die(phase: Phase) -> None:
        if phase is Phase.COPY_BATCH and ("public.users", "2") in taken(stale):
            raise KilledError

    phases.listen(die)
    try:
        with pytest.raises(KilledError):
            copy(stale)
    finally:
        phases.listen(None)
    assert not stale.run(Side.DESTINATION, "SELECT 1 FROM plans WHERE id = 77"), "nothing is shown"

    copy(stale, attempt=2)

    assert logins(stale) == {2: "login 2", 4: "login 4", 9001: None}
    assert stale.run(Side.DESTINATION, "SELECT name FROM plans WHERE id = 77") == [("new",)]
    assert stale.run(Side.DESTINATION, "SELECT count(*) FROM user_emails") == [(3,)]
    with stale.opened(stale.move(attempt=3)) as move:
        assert move.verify().ok


def test_a_value_that_another_row_has_is_a_collision_in_plan_and_copy(stale: Ferry) -> None:
    stale.run(Side.DESTINATION, "UPDATE users SET login = 'login 2' WHERE id = 9001")
    with stale.opened() as move:
        found = [one for one in move.inventory().blockers if one.fatal]
    assert [one.code for one in found] == ["key-collision"]
    assert "users_login_key" in found[0].reason

    with pytest.raises(PermanentError, match=r"public\.users row 2 .* row 9001 .*users_login_key"):
        copy(stale)

    assert logins(stale)[9001] == "login 2"


def test_two_rows_that_swapped_a_value_are_no_collision(stale: Ferry) -> None:
    stale.run(
        Side.DESTINATION,
        "UPDATE users SET login = NULL; UPDATE users SET login = 'login 4' WHERE id = 2;"
        "UPDATE users SET login = 'login 2' WHERE id = 4",
    )
    with stale.opened() as move:
        assert not [one for one in move.inventory().blockers if one.fatal]

    copy(stale)

    assert logins(stale) == {2: "login 2", 4: "login 4", 9001: None}


def test_another_person_under_the_same_id_is_not_overwritten(stale: Ferry) -> None:
    stale.run(Side.DESTINATION, "UPDATE users SET email = 'zoe@example.com' WHERE id = 2")

    copy(stale)

    assert logins(stale) == {2: "old 2", 4: "login 4", 9001: None}
    assert ("public.users", "2") not in taken(stale)


def test_a_row_of_nobody_that_refers_to_it_counts(stale: Ferry) -> None:
    # A note of an issue that is nobody's, as no constraint of this cell forbids.
    stale.run(
        Side.DESTINATION,
        "SET session_replication_role = replica;"
        "INSERT INTO notes (issue_id, author_id) VALUES (424242, 2)",
    )

    copy(stale)

    assert logins(stale) == {2: "old 2", 4: "login 4", 9001: None}


def test_a_child_that_came_before_its_parent_is_no_strangers(stale: Ferry) -> None:
    """A note that is copied before its issue is nobody's at the destination for a while."""
    stale.run(Side.SOURCE, "INSERT INTO notes (issue_id, author_id) VALUES (1, 2)")
    with stale.opened() as move:
        move.open_capture()
        move.copy()
        stale.run(  # as if this part of the copy were to come
            Side.DESTINATION,
            "SET session_replication_role = replica;"
            "DELETE FROM issues WHERE id = 1;"
            "UPDATE users SET login = 'old 2' WHERE id = 2;"
            "DELETE FROM cellferry.imported_row WHERE relation = 'public.users' AND key = '{2}';"
            "DELETE FROM cellferry.checkpoint WHERE relation LIKE 'references of %'",
        )
        move.copy()

    assert logins(stale)[2] == "login 2"


def test_a_row_that_stays_locked_is_named(stale: Ferry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taking_over, "LOCK_TIMEOUT_S", 1)
    with psycopg.connect(stale.url(Side.DESTINATION)) as other, stale.opened() as move:
        move.open_capture()  # which waits for older transactions
        other.execute("SELECT FROM users WHERE id = 2 FOR KEY SHARE")
        with pytest.raises(TransientError, match=r"public\.users .* is locked at the destination"):
            move.copy()

    copy(stale, attempt=2)
    assert logins(stale)[2] == "login 2"


@pytest.mark.parametrize("ending", ["sync", "abort"])
def test_a_cell_that_an_older_version_prepared_is_named(ferry: Ferry, ending: str) -> None:
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
    ferry.run(
        Side.DESTINATION,
        "ALTER TABLE cellferry.imported_row DROP was_here;"
        "UPDATE cellferry.installed SET definition = 'older' WHERE what = 'schema'",
    )
    ferry.run(
        Side.SOURCE,
        "INSERT INTO users VALUES (78, 'x'); INSERT INTO memberships VALUES (1, 78, '')",
    )

    def end(attempt: int) -> None:
        with ferry.opened(ferry.move(attempt=attempt)) as move:
            if ending == "sync":
                move.sync()
            else:
                move.close_capture()
                move.cleanup(Side.DESTINATION)

    with pytest.raises(NotPrepared, match="is not prepared") as refused:
        end(attempt=2)
    assert "prepare-cell" in str(refused.value.hint)

    ferry.store.prepare_cell(ferry.destination, ferry.progress)
    end(attempt=3)


def test_users_of_a_row_of_others_that_was_logged_for_all_stay_at_home(ferry: Ferry) -> None:
    """A note that comes before its issue is logged for everybody who moves."""
    ferry.run(Side.SOURCE, "ALTER TABLE notes ALTER CONSTRAINT notes_issue_id_fkey DEFERRABLE")
    ferry.run(Side.DESTINATION, "ALTER TABLE notes ALTER CONSTRAINT notes_issue_id_fkey DEFERRABLE")
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        with psycopg.connect(ferry.url(Side.SOURCE)) as writer:
            writer.execute("SET CONSTRAINTS ALL DEFERRED")
            writer.execute("INSERT INTO users VALUES (501, '501', 1), (502, '502', 1)")
            writer.execute(
                "INSERT INTO notes (issue_id, author_id) VALUES (5001, 501), (5002, 502)"
            )
            # project 1 is of organization 2, project 2 of ours
            writer.execute(
                "INSERT INTO issues (id, project_id, iid, title)"
                " VALUES (5001, 1, 5001, ''), (5002, 2, 5002, '')"
            )
        move.sync()
    assert ferry.run(Side.DESTINATION, "SELECT id FROM users WHERE id > 500 AND id < 600") == [
        (502,)
    ]
