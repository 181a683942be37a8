"""Whatever writers do and however rounds are cut, the destination ends up equal to the source."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cellferry.model import Side
from cellferry.stores.postgres.rounds import Rounds
from cellferry.stores.postgres.store import PostgresMove
from fixtures.ferry import Ferry

#: Each example has keys of its own, so that examples do not depend on each other.
offsets = itertools.count(1)


@dataclass
class Voyage:
    """A move that has been copied and goes on in rounds."""

    ferry: Ferry
    move: PostgresMove
    sessions: tuple[psycopg.Connection[Any], psycopg.Connection[Any]]

    def rounds(self) -> Rounds:
        return self.move._rounds()

    def converge(self) -> None:
        for _ in range(100):
            if self.rounds().run()[0].remaining == 0:
                return
        pytest.fail("rounds do not end")


@pytest.fixture
def voyage(ferry: Ferry) -> Iterator[Voyage]:
    with (
        ferry.session(Side.SOURCE) as first,
        ferry.session(Side.SOURCE) as second,
        ferry.opened() as move,
    ):
        for session in (first, second):
            session.execute("SET lock_timeout = '30ms'; SET deadlock_timeout = '1s'")
        move.open_capture()
        move.copy()
        yield Voyage(ferry, move, (first, second))


def small(limit: int) -> st.SearchStrategy[int]:
    return st.integers(0, limit - 1)


#: Statements of the application; {b} is the example's own base key, other letters small numbers.
STATEMENTS = """
INSERT INTO projects (id, organization_id, name) VALUES ({b} + {x}, 1, 'p{b} {y}')

INSERT INTO issues (id, project_id, iid, title) VALUES ({b} + {x}, {b} + {y}, {z}, 'new')

INSERT INTO issues (id, project_id, iid, title) VALUES ({b} + {x}, {b} + {y}, {z}, 'again') ON
CONFLICT (id) DO UPDATE SET title = issues.title || '!'

INSERT INTO notes (id, issue_id, body) VALUES (md5('{b} {x}')::uuid, {b} + {y}, repeat('large ',
1000 * {z}))

UPDATE issues SET project_id = {b} + {x} WHERE id = {b} + {y}

UPDATE issues SET iid = iid + 1000 WHERE project_id = {b} + {x};
UPDATE issues SET iid = 1003 - iid WHERE project_id = {b} + {x}

UPDATE issues SET id = {b} + {x} WHERE id = {b} + {y}

UPDATE notes SET issue_id = {b} + {x} WHERE issue_id = {b} + {y}

UPDATE notes SET id = md5('{b} {x}')::uuid WHERE id = md5('{b} {y}')::uuid

DO $$ DECLARE a text;
b text;
BEGIN SELECT name INTO a FROM projects WHERE id = {b} + {x};
SELECT name INTO b FROM projects WHERE id = {b} + {y};
UPDATE projects SET name = 'tmp{b}' WHERE id = {b} + {x};
UPDATE projects SET name = a WHERE id = {b} + {y};
UPDATE projects SET name = b WHERE id = {b} + {x};
END $$

DELETE FROM issues WHERE id = {b} + {x}

DELETE FROM notes WHERE issue_id = {b} + {x}

DELETE FROM projects WHERE id = {b} + {x}

DELETE FROM projects WHERE id = {b} + {x};
INSERT INTO projects (id, organization_id, name) VALUES ({b} + {x}, 1, 'p{b} {y}');
INSERT INTO issues (id, project_id, iid, title) VALUES ({b} + {z}, {b} + {x}, 1, 'back')

SAVEPOINT s;
UPDATE issues SET title = 'never' WHERE id = {b} + {x};
DELETE FROM issues WHERE id = {b} + {y};
ROLLBACK TO s;
UPDATE issues SET title = 'kept' WHERE id = {b} + {x}

UPDATE slots SET position = 61 - position WHERE organization_id = 1

UPDATE "Odd Labels" SET color = 'c' || {x} WHERE organization_id = 1 AND "Key" LIKE '%{y},%'

UPDATE "Odd Labels" SET "Key" = "Key" || {x} WHERE organization_id = 1 AND "Key" LIKE '%3%'

INSERT INTO users VALUES ({b} + {x}, '{b} {x}@example.com', {z});
INSERT INTO memberships VALUES (1, {b} + {x}, 'new')

UPDATE users SET email = '{b} {x} {z}@example.com' WHERE id = {b} + {y}

DELETE FROM memberships WHERE organization_id = 1 AND user_id = {b} + {x}

INSERT INTO events VALUES (1, {b} + {x}, 'e') ON CONFLICT DO NOTHING;
DELETE FROM events WHERE organization_id = 1 AND id = {b} + {y}

INSERT INTO projects (id, organization_id, name) VALUES ({b} + 50 + {x}, 2, 'p{b} {y}')

INSERT INTO issues (id, project_id, iid, title) VALUES ({b} + 50 + {x}, {b} + 50 + {y}, {z},
'two')

DELETE FROM projects WHERE id = {b} + 50 + {x}
""".strip().split("\n\n")

statements = st.builds(
    lambda text, x, y, z: (text, {"x": x, "y": y, "z": z}),
    st.sampled_from(STATEMENTS),
    small(4),
    small(4),
    small(4),
)
events = st.one_of(
    st.tuples(st.just("write"), small(2), statements),
    st.tuples(st.just("write and commit"), small(2), statements),
    st.tuples(st.just("write and commit"), small(2), statements),
    st.tuples(st.just("write and commit"), small(2), statements),
    st.tuples(st.sampled_from(["commit", "rollback"]), small(2), st.none()),
    st.tuples(st.just("commit"), small(2), st.none()),
    st.tuples(st.just("round"), st.sampled_from([1, 1, 2, 50_000]), st.none()),
)


@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(script=st.lists(events, min_size=10, max_size=40))
def test_rounds_make_the_destination_equal_whatever_happened(
    voyage: Voyage, script: list[tuple[str, int, Any]]
) -> None:
    base = 1_000_000 + 100 * next(offsets)
    seed(voyage, base)
    neighbour = voyage.ferry.content(Side.DESTINATION, 3)

    for action, number, what in script:
        if action == "round":
            voyage.rounds().run(max_keys=number)
        else:
            perform(voyage.sessions[number], base, action, what)
    for session in voyage.sessions:
        finish(session, "commit")
    voyage.converge()

    source = voyage.ferry.content(Side.SOURCE, 1)
    assert voyage.ferry.content(Side.DESTINATION, 1) == source
    # All rows of all owned tables: nothing of organization 2, no orphan, nobody's row changed.
    everything = voyage.ferry.content(Side.DESTINATION)
    assert {table: everything[table] for table in source} == {
        table: sorted(source[table] + neighbour[table]) for table in source
    }
    assert voyage.move.verify().ok


def seed(voyage: Voyage, base: int) -> None:
    voyage.sessions[0].execute(
        f"""
        INSERT INTO projects (id, organization_id, name)
            SELECT {base} + g, 1, 'p{base} ' || g FROM generate_series(0, 2) AS g;
        INSERT INTO issues (id, project_id, iid, title)
            SELECT {base} + g, {base} + g % 2, g, 'seed' FROM generate_series(0, 2) AS g;
        INSERT INTO notes (id, issue_id, body)
            SELECT md5('{base} ' || g)::uuid, {base} + g % 2, 'seed'
            FROM generate_series(0, 2) AS g;
        """.encode()
    )


def perform(
    session: psycopg.Connection[Any], base: int, action: str, what: tuple[str, dict[str, int]]
) -> None:
    if not action.startswith("write"):
        finish(session, action)
        return
    if session.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
        session.execute("BEGIN")
    text, numbers = what
    session.execute("SAVEPOINT statement")
    try:
        session.execute(text.format(b=base, **numbers).encode())
    except psycopg.Error:
        session.execute("ROLLBACK TO statement")
    if action == "write and commit":
        finish(session, "commit")


def finish(session: psycopg.Connection[Any], how: str) -> None:
    with suppress(psycopg.Error):
        session.execute(how.upper().encode())
    if session.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
        session.execute("ROLLBACK")


def test_a_round_that_sees_the_parents_delete_first_leaves_no_orphan(voyage: Voyage) -> None:
    voyage.sessions[0].execute("DELETE FROM projects WHERE id = 40")
    voyage.rounds().run(max_keys=1)

    assert voyage.ferry.run(Side.DESTINATION, "SELECT 1 FROM issues WHERE project_id = 40") == []


def test_a_round_that_sees_a_child_first_brings_its_parent(voyage: Voyage) -> None:
    voyage.sessions[0].execute(
        """
        BEGIN;
        SET CONSTRAINTS ALL DEFERRED;
        INSERT INTO projects (id, organization_id, name) VALUES (5000, 1, 'new');
        INSERT INTO issues (id, project_id, iid, title) VALUES (5000, 5000, 1, 'new');
        DELETE FROM cellferry.key_log WHERE relation = 'public.projects';
        INSERT INTO cellferry.key_log (organization, relation, key)
            VALUES ('1', 'public.projects', '{5000}');
        COMMIT;
        """
    )
    voyage.rounds().run(max_keys=1)

    assert voyage.ferry.run(Side.DESTINATION, "SELECT name FROM projects WHERE id = 5000")


def test_a_unique_value_that_changed_hands_between_rounds_is_no_collision(voyage: Voyage) -> None:
    voyage.sessions[0].execute(
        "UPDATE projects SET name = 'tmp' WHERE id = 2;"
        "UPDATE projects SET name = 'project 2' WHERE id = 4;"
        "UPDATE projects SET name = 'project 4' WHERE id = 2"
    )
    assert voyage.rounds().run(max_keys=1)[0].applied == 2

    voyage.converge()

    projects = voyage.ferry.content(Side.SOURCE, 1)["projects"]
    assert voyage.ferry.content(Side.DESTINATION, 1)["projects"] == projects


def test_a_log_row_that_commits_late_is_not_lost(voyage: Voyage) -> None:
    early, late = voyage.sessions
    early.execute("BEGIN; UPDATE issues SET title = 'first' WHERE id = 1")
    late.execute("UPDATE issues SET title = 'second' WHERE id = 3")
    assert voyage.rounds().run()[0].applied == 1

    early.execute("COMMIT")

    assert voyage.rounds().run()[0].applied == 1
    content = voyage.ferry.content(Side.DESTINATION, 1)["issues"]
    assert content == voyage.ferry.content(Side.SOURCE, 1)["issues"]


def test_a_round_leaves_other_migrations_log_alone(voyage: Voyage) -> None:
    session = voyage.sessions[0]
    session.execute(
        "INSERT INTO cellferry.key_log (organization, relation, key)"
        " VALUES ('2', 'public.issues', '{2}')"
    )
    session.execute("UPDATE issues SET title = 'x' WHERE id = 1")

    voyage.rounds().run()

    rows = session.execute("SELECT organization FROM cellferry.key_log").fetchall()
    assert rows == [("2",)]


def test_a_key_that_another_organization_holds_at_the_destination_stops_the_round(
    voyage: Voyage,
) -> None:
    from cellferry.errors import PermanentError

    voyage.sessions[0].execute(
        "INSERT INTO issues (id, project_id, iid, title) VALUES (900001, 2, 900001, 'ours')"
    )
    before = voyage.ferry.content(Side.DESTINATION, 3)

    with pytest.raises(PermanentError, match=r"issues.*belongs to organization 3"):
        voyage.rounds().run()

    assert voyage.ferry.content(Side.DESTINATION, 3) == before


def test_a_user_that_came_with_the_move_follows_changes_and_others_do_not(voyage: Voyage) -> None:
    session = voyage.sessions[0]
    session.execute("UPDATE users SET email = 'changed@example.com' WHERE id = 2")
    session.execute("UPDATE users SET email = 'one@example.com' WHERE id = 1")

    voyage.converge()

    emails = dict(voyage.ferry.run(Side.DESTINATION, "SELECT id, email FROM users"))
    assert emails[2] == "changed@example.com"
    assert emails[1] == "user1@example.com", "it was there before and belongs to its own cell"


def test_what_new_rows_refer_to_comes_with_them(voyage: Voyage) -> None:
    voyage.sessions[0].execute(
        "INSERT INTO plans VALUES (77, 'new plan'); INSERT INTO users VALUES (77, 'new', 77);"
        "INSERT INTO memberships VALUES (1, 77, 'member')"
    )

    voyage.converge()

    assert voyage.ferry.run(Side.DESTINATION, "SELECT plan_id FROM users WHERE id = 77") == [(77,)]
    assert voyage.ferry.run(Side.DESTINATION, "SELECT name FROM plans WHERE id = 77")
