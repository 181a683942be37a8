"""What nobody should do to an organization that moves, and what the operator sees when it is done.

Each test ends with the organization whole and writable, and its neighbour untouched.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from cellferry.errors import (
    Blocked,
    CellferryError,
    Halted,
    InvalidInput,
    VerificationFailed,
)
from cellferry.migration import MoveOptions, steps
from cellferry.model import Actor, Organization, State
from fixtures.cells import NO_TRACES, PATIENT, TwoCells

MOVED, BEING_MOVED, NO_TRUNCATE = "CF001", "CF002", "CF004"


@pytest.fixture
def acme(cells: TwoCells) -> Organization:
    return cells.add_organization(7)


@pytest.fixture
def neighbour(cells: TwoCells) -> Organization:
    return cells.add_organization(8)


def run(cells: TwoCells, migration: int, *names: str) -> None:
    for name in names:
        with cells.context() as context:
            getattr(steps, name)(context, migration)


def refusal(cells: TwoCells, cell: str, statement: str) -> str | None:
    """Do what the application does; return the SQLSTATE of a refusal."""
    try:
        with cells.application(cell) as connection:
            connection.execute(statement.encode())
    except psycopg.Error as error:
        return error.sqlstate
    return None


def bypassing(cells: TwoCells, cell: str, statement: str) -> None:
    """Do what only a superuser can: write past every trigger."""
    with cells.admin(cell) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute(statement.encode())


# --- rogue writes at the destination ------------------------------------------------------------


def test_an_application_cannot_write_at_the_destination_before_the_cutover(
    cells: TwoCells, acme: Organization
) -> None:
    migration = cells.plan(acme)
    run(cells, migration, "copy", "sync")

    rogue = "UPDATE issues SET title = 'rogue' WHERE id = 7000001"
    assert refusal(cells, "cell-2", rogue) == BEING_MOVED
    run(cells, migration, "verify")


@pytest.mark.parametrize(
    ("rogue", "what"),
    [
        ("UPDATE issues SET title = 'rogue' WHERE id = 7000001", "differs"),
        ("DELETE FROM comments WHERE issue_id = 7000002", "missing at destination"),
        ("INSERT INTO issues VALUES (7999999, 7, 'rogue')", "extra at destination"),
    ],
)
def test_a_superusers_write_at_the_destination_is_found_and_halts(
    cells: TwoCells, acme: Organization, rogue: str, what: str
) -> None:
    migration = cells.plan(acme)
    run(cells, migration, "copy", "sync")
    bypassing(cells, "cell-2", rogue)

    with cells.context() as context, pytest.raises(VerificationFailed, match=what):
        steps.verify(context, migration)
    with cells.context() as context, pytest.raises(Halted, match="verification failed"):
        steps.verify(context, migration)
    assert refusal(cells, "cell-1", "UPDATE issues SET counter = 1 WHERE id = 7000001") is None
    with cells.context() as context:
        steps.abort(context, migration, "a rogue write")
    assert not any(cells.rows("cell-2", "7").values())


def test_a_rogue_key_at_the_destination_is_found_and_halts(
    cells: TwoCells, acme: Organization
) -> None:
    migration = cells.plan(acme)
    run(cells, migration, "copy", "sync")
    real_open = cells.redis

    # The compare pass of a new process repairs what differs; a write after it is found.
    with cells.context() as context:
        from cellferry.stores.redis.store import RedisMove

        verify = RedisMove.verify

        def rogue_first(self: RedisMove) -> Any:
            self.sync()
            with real_open("cell-2") as client:
                client.set("org:{7}:counter", "rogue")
            return verify(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RedisMove, "verify", rogue_first)
            with pytest.raises(VerificationFailed, match=r"org:\{7\}:counter"):
                steps.verify(context, migration)
    with cells.context() as context:
        assert context.topology.migration(migration).halted


# --- two moves that share rows ------------------------------------------------------------------


def test_two_organizations_that_share_users_pass_each_other(cells: TwoCells) -> None:
    for key in (7, 8):
        cells.add_organization(key)
    eight = cells.plan(Organization("8", "org-8"))
    run(cells, eight, "copy", "sync", "verify", "cutover", "soak", "cleanup")
    for cell in ("cell-1", "cell-2"):
        with cells.admin(cell) as connection:
            connection.execute(
                "INSERT INTO users VALUES (1, 'shared'), (2, 'also shared') ON CONFLICT DO NOTHING"
            )
    with cells.admin("cell-1") as connection:
        connection.execute("INSERT INTO memberships SELECT 7, n FROM generate_series(1, 2) AS n")
    with cells.admin("cell-2") as connection:
        connection.execute("INSERT INTO memberships SELECT 8, n FROM generate_series(1, 2) AS n")

    there = cells.plan(Organization("7", "org-7"))
    with cells.context() as context:
        options = MoveOptions(strategy="online", ttl_s=0, soak_s=0, **PATIENT)
        back = steps.plan(context, "org-8", "cell-1", options=options, record=True).migration
    assert back is not None
    errors: list[BaseException] = []

    def move(migration: int) -> None:
        try:
            run(cells, migration, "copy", "sync", "verify", "cutover", "soak", "cleanup")
        except BaseException as error:
            errors.append(error)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(move, [there, back]))

    assert errors == []
    for cell, key in (("cell-2", 7), ("cell-1", 8)):
        with cells.admin(cell) as connection:
            members = connection.execute(
                "SELECT u.id FROM memberships AS m JOIN users AS u ON u.id = m.user_id"
                " WHERE m.organization_id = %s AND u.id < 10 ORDER BY 1",
                (key,),
            ).fetchall()
        assert members == [(1,), (2,)]
    assert cells.traces("cell-1") == cells.traces("cell-2") == NO_TRACES


# --- the organization or its schema changes -----------------------------------------------------


def test_an_organization_deleted_during_its_move_is_deleted_where_it_arrives(
    cells: TwoCells, acme: Organization, neighbour: Organization
) -> None:
    before = cells.rows("cell-1", neighbour.id)
    migration = cells.plan(acme)
    run(cells, migration, "copy")
    with cells.application("cell-1") as connection:
        connection.execute("DELETE FROM issues WHERE organization_id = 7")
        connection.execute("DELETE FROM memberships WHERE organization_id = 7")
        connection.execute("DELETE FROM organizations WHERE id = 7")

    run(cells, migration, "sync", "verify", "cutover", "soak", "cleanup")

    assert not any(cells.rows("cell-1", "7").values())
    assert not any(cells.rows("cell-2", "7").values())
    assert cells.rows("cell-1", neighbour.id) == before


def test_an_organization_leaves_and_enters_cells_that_publish_all_tables(cells: TwoCells) -> None:
    """As a change stream does it (Debezium's default): no row without an identity may go then."""
    organization = cells.add_organization(7)
    for cell in ("cell-1", "cell-2"):
        with cells.admin(cell) as connection:
            connection.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    migration = cells.plan(organization)
    with cells.context() as context:
        steps.copy(context, migration)
        with cells.application("cell-1", autocommit=True) as writer:
            writer.execute("UPDATE issues SET counter = counter + 1 WHERE organization_id = 7")
        before = cells.rows("cell-1", "7")
        for step in (steps.sync, steps.verify, steps.cutover, steps.soak, steps.cleanup):
            step(context, migration)
    assert cells.rows("cell-2", "7") == before
    assert cells.traces("cell-1") == NO_TRACES


def test_a_column_added_at_one_side_stops_the_cutover_and_names_it(
    cells: TwoCells, acme: Organization
) -> None:
    migration = cells.plan(acme)
    run(cells, migration, "copy", "sync", "verify")
    with cells.admin("cell-1") as connection:
        connection.execute("ALTER TABLE issues ADD COLUMN severity int")

    with cells.context() as context, pytest.raises(CellferryError, match="severity"):
        steps.cutover(context, migration)

    assert refusal(cells, "cell-1", "UPDATE issues SET severity = 1 WHERE id = 7000001") is None
    assert cells.migration(migration).state is State.READY
    with cells.admin("cell-2") as connection:
        connection.execute("ALTER TABLE issues ADD COLUMN severity int")
    run(cells, migration, "sync", "verify", "cutover")
    assert cells.rows("cell-2", "7") == cells.rows("cell-1", "7")


def test_nobody_truncates_a_table_while_an_organization_moves(
    cells: TwoCells, acme: Organization
) -> None:
    migration = cells.plan(acme)
    run(cells, migration, "copy")

    for cell in ("cell-1", "cell-2"):
        with cells.admin(cell) as connection, pytest.raises(psycopg.Error) as refused:
            connection.execute("TRUNCATE comments")
        assert refused.value.sqlstate == NO_TRUNCATE
    run(cells, migration, "sync", "verify", "cutover")


def test_a_truncate_past_the_triggers_stops_the_cutover(
    cells: TwoCells, acme: Organization
) -> None:
    migration = cells.plan(acme)
    run(cells, migration, "copy", "sync", "verify")
    bypassing(cells, "cell-1", "TRUNCATE comments")

    with cells.context() as context, pytest.raises(VerificationFailed, match="truncated"):
        steps.cutover(context, migration)

    assert cells.migration(migration).state is State.READY
    assert refusal(cells, "cell-1", "UPDATE issues SET counter = 1 WHERE id = 7000001") is None


# --- applications that do not listen ------------------------------------------------------------


def test_an_application_that_ignores_the_gates_answer_changes_nothing(
    cells: TwoCells, acme: Organization, neighbour: Organization
) -> None:
    stop = threading.Event()
    answers: dict[str | None, int] = {}
    acknowledged = 0

    def hammer() -> None:
        nonlocal acknowledged
        while not stop.is_set():
            answer = refusal(
                cells, "cell-1", "UPDATE issues SET counter = counter + 1 WHERE id = 7000001"
            )
            answers[answer] = answers.get(answer, 0) + 1
            acknowledged += answer is None

    migration = cells.plan(acme)
    with ThreadPoolExecutor(1) as pool:
        hammering = pool.submit(hammer)
        try:
            run(cells, migration, "copy", "sync", "verify", "cutover", "soak")
            refused = answers.get(MOVED, 0)
            until = time.monotonic() + 30
            while answers.get(MOVED, 0) < refused + 20 and time.monotonic() < until:
                time.sleep(0.05)
        finally:
            stop.set()
        hammering.result()

    with cells.admin("cell-2") as connection:
        counter = connection.execute("SELECT counter FROM issues WHERE id = 7000001").fetchone()
    assert counter == (acknowledged,)
    assert answers[MOVED] >= 20
    assert set(answers) <= {None, MOVED, BEING_MOVED}
    assert refusal(cells, "cell-1", "UPDATE issues SET counter = 1 WHERE id = 8000001") is None
    run(cells, migration, "cleanup")
    # It is told nothing any more, and there is nothing left that it could change.
    with cells.application("cell-1") as connection:
        connection.execute("UPDATE issues SET counter = 0 WHERE id = 7000001")
    with cells.admin("cell-2") as connection:
        assert connection.execute("SELECT counter FROM issues WHERE id = 7000001").fetchone() == (
            acknowledged,
        )


def test_a_transaction_that_goes_on_after_a_refusal_commits_nothing(
    cells: TwoCells, acme: Organization
) -> None:
    migration = cells.plan(acme)
    run(cells, migration, "copy", "sync", "verify", "cutover")
    before = cells.rows("cell-1", "7")

    with cells.application("cell-1", autocommit=True) as connection:
        connection.execute("BEGIN")
        for statement in (
            "UPDATE issues SET counter = 99 WHERE id = 7000001",
            "INSERT INTO comments VALUES (1, 7000001, 'late')",
            "COMMIT",
        ):
            try:
                connection.execute(statement.encode())
            except psycopg.Error:
                continue

    assert cells.rows("cell-1", "7") == before


# --- many gates ---------------------------------------------------------------------------------


def test_two_thousand_gated_organizations_leave_the_others_alone(
    cells: TwoCells, acme: Organization
) -> None:
    with cells.admin("cell-1") as connection:
        connection.execute(
            "INSERT INTO organizations SELECT n, 'many-' || n FROM generate_series(10001, 12000) n"
        )
        connection.execute(
            "INSERT INTO issues SELECT n * 1000, n, 'one' FROM generate_series(10001, 12000) AS n"
        )
        connection.execute(
            "INSERT INTO cellferry.gate"
            " (organization, state, armed, settled, migration, attempt, epoch)"
            " SELECT n::text, 'open', true, true, 100000 + n, 1, 1"
            " FROM generate_series(10001, 12000) AS n"
        )
    try:
        # One statement over all of them takes a lock for each.
        with cells.application("cell-1") as connection:
            touched = connection.execute(
                "UPDATE issues SET counter = counter + 1 WHERE organization_id > 10000"
            ).rowcount
        assert touched == 2_000
        with cells.admin("cell-1") as connection:
            logged = connection.execute("SELECT count(*) FROM cellferry.key_log").fetchone()
        assert logged == (2_000,)
        migration = cells.plan(acme)
        run(cells, migration, "copy", "sync", "verify", "cutover", "soak", "cleanup")
    finally:
        with cells.admin("cell-1") as connection:
            connection.execute("DELETE FROM cellferry.gate WHERE organization::int > 10000")
            connection.execute("DELETE FROM cellferry.key_log")
    assert cells.migration(migration).state is State.COMPLETED


# --- clocks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump_s", [-86_400.0, 86_400.0])
def test_a_controllers_clock_that_jumps_changes_nothing(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    wall = time.time

    def jumped() -> float:
        return wall() + jump_s

    migration = cells.plan(acme, ttl_s=3_600)
    run(cells, migration, "copy")
    monkeypatch.setattr(time, "time", jumped)
    run(cells, migration, "sync", "verify", "cutover", "soak")

    # A day ahead by this clock the TTL of an hour is long over; the topology's clock counts.
    with cells.context() as context, pytest.raises(CellferryError, match="retention lasts until"):
        steps.cleanup(context, migration)
    assert any(cells.rows("cell-1", "7").values())


# --- names --------------------------------------------------------------------------------------

EVIL = "o'); DROP TABLE issues; --"


@pytest.mark.parametrize(
    "name",
    [
        EVIL,
        'x" OR "1"="1',
        "%s %(organization)s {0} {organization}",
        "$$; DELETE FROM issues; $$",
        "\\'; SELECT 1",
        "redis.call('FLUSHALL')",
        "x" * 300,
    ],
)
def test_a_hostile_name_is_only_a_name(
    cells: TwoCells, acme: Organization, neighbour: Organization, name: str
) -> None:
    before = cells.rows("cell-1", neighbour.id)
    for ask in asking(cells, name):
        with pytest.raises((InvalidInput, Blocked)) as refused:
            ask()
        assert name[:60] in str(refused.value)
        assert len(str(refused.value)) < 2_000
    assert cells.rows("cell-1", neighbour.id) == before


def asking(cells: TwoCells, name: str) -> list[Callable[[], object]]:
    """Each place where a person may type a name."""

    def plan(organization: str, destination: str) -> None:
        with cells.context() as context:
            steps.plan(context, organization, destination, options=MoveOptions())

    def status() -> None:
        with cells.context() as context:
            steps.status(context, name)

    return [lambda: plan(name, "cell-2"), lambda: plan("org-7", name), status]


def test_an_organization_with_a_hostile_slug_moves_like_any_other(cells: TwoCells) -> None:
    organization = cells.add_organization(7)
    with cells.context() as context:
        named = context.topology.register_organization(
            Organization("9", EVIL), "cell-1", Actor("test")
        )
    del named
    with cells.admin("cell-1") as connection:
        connection.execute("INSERT INTO organizations VALUES (9, %s)", (EVIL,))
        connection.execute("INSERT INTO issues VALUES (9000001, 9, %s)", (EVIL,))
        connection.execute("INSERT INTO comments VALUES (9000001, 9000001, %s)", (EVIL,))
    for cell in ("cell-1", "cell-2"):
        with cells.redis(cell) as client:
            client.execute_command(
                *("ACL", "SETUSER", "org-9", "on", ">application", "~org:{9}:*", "+@all"),
                *("%R~cellferry:gate:{9}", "-@admin", "-@dangerous"),
            )
    key = "org:{9}:" + EVIL + "\r\n*3\r\n$3\r\nSET\r\n\x00\xff"
    with cells.redis("cell-1") as client:
        client.set(key, EVIL)
    migration = cells.plan(Organization("9", EVIL))

    run(cells, migration, "copy", "sync", "verify", "cutover", "soak", "cleanup")

    assert cells.rows("cell-2", "9")["issues"] == [(9000001, 9, EVIL, 0)]
    with cells.redis("cell-2") as client:
        assert client.get(key) == EVIL
    assert any(cells.rows("cell-1", organization.id).values())
