"""What a review feared would go wrong: see docs/hazards.md for which hazard is tested where."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import psycopg
import pytest
from psycopg import sql

from cellferry.errors import (
    Blocked,
    CellferryError,
    DrainTimeout,
    LeaseLost,
    TransientError,
    VerificationFailed,
)
from cellferry.local.postgres_binaries import available
from cellferry.migration import Context, MoveOptions, steps
from cellferry.model import Limits, Organization, Route, Side
from cellferry.routing import BeingMoved, Moved, RouteClient, transaction
from cellferry.stores.postgres import copier
from cellferry.topology import Topology
from fixtures.cells import TwoCells
from fixtures.ferry import Ferry, make_ferry
from fixtures.gated import wait_long_at_the_gate
from fixtures.postgres import FreshDatabases

MOVED, BEING_MOVED, CONFLICT = "CF001", "CF002", "40001"


@pytest.fixture
def acme(cells: TwoCells) -> Organization:
    cells.add_organization(8)  # a neighbour that stays
    return cells.add_organization(7)


def ready(cells: TwoCells, organization: Organization, **options: Any) -> int:
    """Bring a migration to `ready`."""
    migration = cells.plan(organization, **options)
    with cells.context() as context:
        for step in (steps.copy, steps.sync, steps.verify):
            step(context, migration)
    return migration


def cut_over(cells: TwoCells, organization: Organization, **options: Any) -> int:
    """Bring a migration to `retained`."""
    migration = ready(cells, organization, **options)
    with cells.context() as context:
        steps.cutover(context, migration)
        steps.soak(context, migration)
    return migration


def around(kind: str, verb: str, wrapper: Callable[[Callable[..., Any]], Any]) -> type[Context]:
    """A context in which `wrapper(real)` runs in the place of a store's verb."""

    class Wrapped(Context):
        @classmethod
        def from_settings(cls, *arguments: Any, **named: Any) -> Context:
            made = super().from_settings(*arguments, **named)
            store = made.stores[kind]
            opened = store.open

            @contextmanager
            def open_wrapped(*arguments: Any, **options: Any) -> Iterator[Any]:
                with opened(*arguments, **options) as move:
                    real: Callable[..., Any] = getattr(move, verb)
                    setattr(move, verb, lambda *args: wrapper(lambda: real(*args)))
                    yield move

            store.open = open_wrapped  # type: ignore[method-assign]
            return made

    return Wrapped


def route_of(cells: TwoCells, organization: Organization) -> Route:
    with cells.context() as context:
        return context.topology.route(organization.id)


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


# ── 1: zombie attempts ──────────────────────────────────────────────────────────────────────────


def test_an_attempt_that_wakes_up_late_does_not_flip(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It froze and finished; its successor gave up and thawed; the source took more writes."""
    migration = ready(cells, acme)
    asleep, awake = threading.Event(), threading.Event()
    real = Topology.flip
    outcome: list[BaseException | None] = []

    def flip(self: Topology, *arguments: Any) -> Any:
        if not asleep.is_set():
            asleep.set()
            awake.wait(120)
        return real(self, *arguments)

    monkeypatch.setattr(Topology, "flip", flip)

    def zombie() -> None:
        try:
            with cells.context() as context:
                steps.cutover(context, migration)
        except CellferryError as error:
            outcome.append(error)
        else:
            outcome.append(None)

    def gives_up(_real: Callable[..., Any]) -> Any:
        raise TransientError("the second attempt gives up")

    thread = threading.Thread(target=zombie)
    thread.start()
    try:
        assert asleep.wait(120)
        second = around("postgres", "freeze", gives_up)
        with cells.context(kind=second) as context, pytest.raises(TransientError, match="gives up"):
            steps.cutover(context, migration)
        with cells.application("cell-1") as connection:
            connection.execute("UPDATE issues SET counter = 99 WHERE id = 7000001")
    finally:
        awake.set()
        thread.join()

    assert isinstance(outcome[0], CellferryError)
    assert route_of(cells, acme) == Route("7", "cell-1", 1)


def test_an_old_attempts_round_does_not_overwrite_newer_rows(ferry: Ferry) -> None:
    """It has read what it will write when another attempt takes over and writes newer rows."""
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
    ferry.run(Side.SOURCE, "UPDATE issues SET title = 'old' WHERE id = 1")
    with ferry.opened(ferry.move(attempt=2)) as older:
        rounds = older._rounds()

        def taken_over() -> None:
            ferry.run(Side.SOURCE, "UPDATE issues SET title = 'new' WHERE id = 1")
            with ferry.opened(ferry.move(attempt=3)) as newer:
                newer.sync()

        read = rounds._applier.apply

        def apply(*arguments: Any, **named: Any) -> Any:
            taken_over()
            return read(*arguments, **named)

        rounds._applier.apply = apply  # type: ignore[method-assign]
        with suppress(psycopg.Error, CellferryError):
            rounds.run()

    titles = ferry.run(Side.DESTINATION, "SELECT title FROM issues WHERE id = 1")
    assert titles == [("new",)]


def test_a_write_without_the_lease_is_refused(ferry: Ferry) -> None:
    """Even where an older attempt's session could not be ended."""
    with ferry.opened() as older:
        older.open_capture()
        ferry.run(Side.DESTINATION, "UPDATE cellferry.lease SET attempt = 2")
        with pytest.raises(LeaseLost):
            older.copy()

    assert ferry.content(Side.DESTINATION, 1)["projects"] == []


# ── 3: referenced and foreign rows ──────────────────────────────────────────────────────────────


DUPLICATES = "ALTER TABLE issues ADD COLUMN duplicate_of bigint REFERENCES issues"


@pytest.fixture
def duplicates(cells: TwoCells) -> TwoCells:
    """Issues may refer to issues, also to those of other organizations."""
    for cell in ("cell-1", "cell-2"):
        with cells.admin(cell) as connection:
            connection.execute(DUPLICATES)
    cells.prepare()
    return cells


def refer(cells: TwoCells, child: int, parent: int) -> None:
    with cells.application("cell-1") as connection:
        connection.execute("UPDATE issues SET duplicate_of = %s WHERE id = %s", (parent, child))


def test_a_shared_user_that_its_own_cell_changes_during_the_move_arrives_changed(
    cells: TwoCells, acme: Organization
) -> None:
    migration = ready(cells, acme)
    with cells.application("cell-1") as connection:
        connection.execute("UPDATE users SET email = 'changed' WHERE id = 7000001")
    with cells.context() as context:
        steps.cutover(context, migration)

    with cells.admin("cell-2") as connection:
        found = connection.execute("SELECT email FROM users WHERE id = 7000001").fetchone()
    assert found == ("changed",)


def test_plan_refuses_while_a_row_that_stays_refers_to_one_that_would_move(
    duplicates: TwoCells, acme: Organization
) -> None:
    refer(duplicates, child=8000001, parent=7000001)

    with (
        duplicates.context() as context,
        pytest.raises(Blocked, match=r"rows of other organizations refer to rows of .* 7"),
    ):
        steps.plan(
            context, acme.slug, "cell-2", options=MoveOptions(strategy="online"), record=True
        )


def test_verify_finds_a_row_that_came_to_refer_to_another_organization(
    duplicates: TwoCells, acme: Organization
) -> None:
    """At the destination it would refer to nothing, and the replica role would not say so."""
    migration = duplicates.plan(acme)
    with duplicates.context() as context:
        refer(duplicates, child=7000001, parent=8000001)
        steps.copy(context, migration)
        steps.sync(context, migration)
        with pytest.raises(VerificationFailed, match="refers to a row that the destination lacks"):
            steps.verify(context, migration)


def test_a_cutover_stops_at_a_row_that_came_to_refer_to_another_organization(
    duplicates: TwoCells, acme: Organization
) -> None:
    migration = ready(duplicates, acme)
    refer(duplicates, child=7000002, parent=8000001)

    with duplicates.context() as context, pytest.raises(VerificationFailed, match="8000001"):
        steps.cutover(context, migration)

    assert route_of(duplicates, acme).cell == "cell-1"
    refer(duplicates, child=7000003, parent=7000004)  # the source serves


def test_clean_up_deletes_nothing_that_others_came_to_refer_to(
    duplicates: TwoCells, acme: Organization
) -> None:
    migration = cut_over(duplicates, acme)
    refer(duplicates, child=8000001, parent=7000001)
    rows = duplicates.rows("cell-1", "7")

    with duplicates.context() as context, pytest.raises(Blocked, match="stays and refers to"):
        steps.cleanup(context, migration)

    assert duplicates.rows("cell-1", "7") == rows


# ── 5: two visible copies ───────────────────────────────────────────────────────────────────────


def authority(cells: TwoCells) -> tuple[bool, bool]:
    """What each cell tells the application's role of organization 7."""
    answers = []
    for cell in ("cell-1", "cell-2"):
        with cells.application(cell) as connection:
            row = connection.execute("SELECT cellferry.is_authoritative('7')").fetchone()
            assert row is not None
            answers.append(row[0])
    return answers[0], answers[1]


def test_cell_wide_jobs_are_told_in_which_cell_an_organization_counts(
    cells: TwoCells, acme: Organization
) -> None:
    here, there = (True, False), (False, True)
    migration = cells.plan(acme)
    with cells.context() as context:
        steps.copy(context, migration)
        assert authority(cells) == here, "the destination imports"
        steps.sync(context, migration)
        steps.verify(context, migration)
        steps.cutover(context, migration)
        assert authority(cells) == there, "the source's copy is retained"
        steps.soak(context, migration)
        steps.cleanup(context, migration)
    with cells.application("cell-2") as connection:
        assert connection.execute("SELECT cellferry.is_authoritative('7')").fetchone() == (True,)


def test_during_a_cutover_no_moment_counts_an_organization_twice(
    cells: TwoCells, acme: Organization
) -> None:
    migration = ready(cells, acme)
    seen: list[tuple[bool, bool]] = []

    def look(real: Callable[..., Any]) -> Any:
        seen.append(authority(cells))
        result = real()
        seen.append(authority(cells))
        return result

    with cells.context(kind=around("postgres", "finish", look)) as context:
        steps.cutover(context, migration)

    assert seen == [(False, False), (False, False)]


def test_a_cell_wide_update_passes_over_a_retained_copy(
    cells: TwoCells, acme: Organization
) -> None:
    cut_over(cells, acme, ttl_s=3_600)
    statement = "UPDATE issues SET counter = counter + 1"
    with cells.application("cell-1") as connection:
        with pytest.raises(psycopg.Error) as refused:
            connection.execute(statement)
        connection.rollback()
        updated = connection.execute(
            f"{statement} WHERE cellferry.is_authoritative(organization_id::text)".encode()
        ).rowcount

    assert refused.value.sqlstate == MOVED
    assert updated == 20, "those of organization 8"


# ── 6: the arming hole ──────────────────────────────────────────────────────────────────────────


def test_a_transaction_older_than_the_arming_is_waited_for_and_copied(ferry: Ferry) -> None:
    """It wrote before there was a gate row: no log row tells of it, no snapshot shows it yet."""
    done = threading.Event()

    def begin_to_move() -> None:
        with ferry.opened() as move:
            move.open_capture()
            move.copy()
        done.set()

    thread = threading.Thread(target=begin_to_move)
    with psycopg.connect(ferry.url(Side.SOURCE)) as older:
        older.execute("UPDATE issues SET title = 'in flight' WHERE id = 1")
        thread.start()
        done.wait(3)  # with the hole in it, the copy is complete by now
        older.commit()
    thread.join()

    with ferry.opened(ferry.move(attempt=2)) as move:
        while move.sync().remaining:
            pass
    assert ferry.content(Side.DESTINATION, 1) == ferry.content(Side.SOURCE, 1)


def test_an_old_transaction_that_does_not_end_is_named(ferry: Ferry) -> None:
    impatient = ferry.move(limits=Limits(arm_deadline_s=0.3))
    with psycopg.connect(ferry.url(Side.SOURCE)) as older:
        older.execute("UPDATE issues SET title = 'in flight' WHERE id = 1")
        with ferry.opened(impatient) as move, pytest.raises(DrainTimeout) as caught:
            move.open_capture()

        assert f"pid {older.info.backend_pid}" in str(caught.value)


# ── 7: locks ────────────────────────────────────────────────────────────────────────────────────


def test_one_statement_over_very_many_organizations_does_not_fill_the_lock_table(
    ferry: Ferry,
) -> None:
    ferry.run(
        Side.SOURCE,
        "INSERT INTO organizations SELECT g, 'o' || g FROM generate_series(1000, 31000) AS g",
    )
    with ferry.opened() as move:
        move.open_capture()

    ferry.run(Side.SOURCE, "UPDATE organizations SET name = 'renamed'")

    (logged,) = ferry.run(Side.SOURCE, "SELECT count(*) FROM cellferry.key_log")
    assert logged == (1,)


def test_writers_that_hold_what_others_need_do_not_lock_the_cutover_up(ferry: Ferry) -> None:
    """A writer in flight needs a row of a writer that waits at the gate.

    Only an attempt that is given up lets all three go on; nothing else comes to their help here.
    """
    ((database,),) = ferry.run(Side.SOURCE, "SELECT current_database()")
    ferry.run(Side.SOURCE, f"ALTER DATABASE {database} SET deadlock_timeout = '20s'")
    failures: list[psycopg.Error] = []

    def finish(connection: psycopg.Connection[Any], issue: int) -> None:
        try:
            connection.execute("UPDATE issues SET title = 'hot' WHERE id = %s", (issue,))
            connection.commit()
        except psycopg.Error as error:
            failures.append(error)

    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        move.catch_up()
        with (
            psycopg.connect(ferry.url(Side.SOURCE)) as in_flight,
            psycopg.connect(ferry.url(Side.SOURCE)) as late,
        ):
            in_flight.execute("UPDATE issues SET title = 'mine' WHERE id = 1")
            freezing = threading.Thread(target=lambda: move.freeze(60.0))
            freezing.start()
            waiting = threading.Thread(target=finish, args=(late, 3))
            # it must arrive while the barrier waits, and queue behind it with row 3 in its hands
            eventually(lambda: waits_for_lock(ferry) > 0)
            waiting.start()
            eventually(lambda: waits_for_lock(ferry) > 1 or not waiting.is_alive())
            finish(in_flight, 3)
            waiting.join()
            freezing.join()
        move.thaw()
        move.release()

    assert [error.sqlstate for error in failures] == []


def waits_for_lock(ferry: Ferry) -> int:
    ((count,),) = ferry.run(
        Side.SOURCE,
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted",
    )
    return int(count)


def test_a_controller_that_hangs_with_the_gate_locked_is_ended_by_the_next(ferry: Ferry) -> None:
    with ferry.opened() as hanging:
        hanging.open_capture()
        hanging.copy()
        hanging.catch_up()
        hanging.freeze(60.0)
        with ferry.opened(ferry.move(attempt=2)) as next_one:
            next_one.thaw()
            next_one.release()
            with ferry.session(Side.SOURCE) as writer:  # at a closed gate it would be refused
                writer.execute("UPDATE issues SET title = 'served' WHERE id = 1")


# ── 8: reads and writes of no row ───────────────────────────────────────────────────────────────


READ = "SELECT title FROM issues WHERE organization_id = 7"
NO_ROW = "UPDATE issues SET counter = 1 WHERE organization_id = 7 AND title = 'no such'"


def asked_by_a_stale_client(cells: TwoCells, cell: str, epoch: int, statement: str) -> Any:
    """What one whose route says `cell` at `epoch` gets as its answer."""
    with cells.application(cell, autocommit=True) as connection:
        try:
            with transaction(connection, Route("7", cell, epoch)):
                return connection.execute(statement.encode()).rowcount
        except (Moved, BeingMoved) as answer:
            return answer


@pytest.mark.parametrize("statement", [READ, NO_ROW], ids=["read", "write of no row"])
def test_a_client_with_an_old_route_is_sent_on(
    cells: TwoCells, acme: Organization, statement: str
) -> None:
    cut_over(cells, acme, ttl_s=3_600)

    answer = asked_by_a_stale_client(cells, "cell-1", 1, statement)

    assert isinstance(answer, Moved)
    assert (answer.cell, answer.epoch) == ("cell-2", 2)


@pytest.mark.parametrize("statement", [READ, NO_ROW], ids=["read", "write of no row"])
def test_a_client_that_comes_too_early_is_told_to_wait(
    cells: TwoCells, acme: Organization, statement: str
) -> None:
    ready(cells, acme)

    assert isinstance(asked_by_a_stale_client(cells, "cell-2", 2, statement), BeingMoved)


def test_a_client_that_knows_a_later_epoch_than_the_gate_does_not_believe_the_cell(
    cells: TwoCells, acme: Organization
) -> None:
    """As after a failover that lost the gate's last change."""
    ready(cells, acme)

    assert isinstance(asked_by_a_stale_client(cells, "cell-1", 3, READ), BeingMoved)


# ── 10: preparing a cell ────────────────────────────────────────────────────────────────────────


def test_preparing_a_cell_does_not_hold_writers_up_behind_a_long_transaction(
    ferry: Ferry,
) -> None:
    """The trigger's DDL waits for a report that reads; writers must not wait as long."""
    ferry.run(Side.SOURCE, "DROP TRIGGER zz_cellferry_gate ON projects")
    ferry.run(Side.SOURCE, "DELETE FROM cellferry.installed WHERE what = 'public.projects'")
    preparing = threading.Thread(
        target=lambda: ferry.store.prepare_cell(ferry.source, ferry.progress)
    )
    waits: set[tuple[Any, ...]] = set()
    with (
        psycopg.connect(ferry.url(Side.SOURCE)) as report,
        ferry.session(Side.SOURCE) as writer,
        ferry.session(Side.SOURCE) as watching,
    ):
        writer.execute("SET lock_timeout = '60s'")  # until then it would queue behind the DDL
        report.execute("UPDATE projects SET level = 'low' WHERE id = 2")
        preparing.start()
        while len(waits) < 2:
            waits |= set(
                watching.execute(
                    "SELECT waitstart FROM pg_locks WHERE NOT granted AND waitstart IS NOT NULL"
                    " AND relation = 'projects'::regclass AND mode <> 'RowExclusiveLock'"
                ).fetchall()
            )
            writer.execute("UPDATE projects SET level = 'low' WHERE id = 4")
        assert preparing.is_alive(), "the report is in its way"
        report.commit()
        preparing.join()

    (installed,) = ferry.run(
        Side.SOURCE,
        "SELECT count(*) FROM pg_trigger WHERE tgname = 'zz_cellferry_gate'"
        " AND tgrelid = 'projects'::regclass",
    )
    assert installed == (1,)


# ── 13: collations ──────────────────────────────────────────────────────────────────────────────

WORDS = ["a", "B", "c", "D", "é", "É", "Z", "z", "_x", "-x", "x-1", "x1", "X2", "ß", "10", "9", " "]

TEXT_KEYS = """
CREATE TABLE public.organizations (id text PRIMARY KEY);
CREATE TABLE public.pages (
    path text PRIMARY KEY,
    organization_id text NOT NULL REFERENCES public.organizations
);
CREATE TABLE public.links (
    "from" text NOT NULL REFERENCES public.pages,
    "to" text NOT NULL,
    PRIMARY KEY ("to", "from")
);
"""

needs_icu = pytest.mark.skipif(15 not in available(), reason="needs a server that has ICU")


@pytest.fixture
def words(request: pytest.FixtureRequest, fresh_databases: Callable[[], FreshDatabases]) -> Ferry:
    """Two databases that sort text differently: the one on PostgreSQL 15 as English speakers do."""
    databases = fresh_databases()
    for server in (databases.source_server, databases.destination_server):
        with psycopg.connect(server.url(), autocommit=True) as connection:
            if connection.info.server_version // 10_000 != 15:
                continue
            name = sql.Identifier(databases.name)
            connection.execute(sql.SQL("DROP DATABASE {}").format(name))
            connection.execute(
                sql.SQL(
                    "CREATE DATABASE {} TEMPLATE template0"
                    " LOCALE_PROVIDER icu ICU_LOCALE 'en-US' LOCALE 'C.UTF-8'"
                ).format(name)
            )
    rows = sql.SQL(
        "INSERT INTO public.organizations VALUES ('1'), ('2');"
        "INSERT INTO public.pages SELECT w, '1' FROM unnest({0}::text[]) AS w;"
        "INSERT INTO public.pages SELECT w || '/2', '2' FROM unnest({0}::text[]) AS w;"
        "INSERT INTO public.links SELECT p.path, w FROM public.pages AS p, unnest({0}::text[]) AS w"
    ).format(sql.Literal(WORDS))
    return make_ferry(databases, TEXT_KEYS, rows.as_string(None), "SELECT 1")


def links(ferry: Ferry, side: Side) -> set[tuple[Any, ...]]:
    return set(
        ferry.run(
            side,
            'SELECT l.* FROM links AS l JOIN pages AS p ON p.path = l."from"'
            " WHERE p.organization_id = '1'",
        )
    )


both_ways = pytest.mark.parametrize("postgres_pair", [(15, 18), (18, 15)], indirect=True)


@needs_icu
@both_ways
def test_a_copy_in_small_batches_goes_on_rightly_where_text_sorts_differently(
    words: Ferry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copier, "STRETCH_S", 0.0)  # every batch is looked up anew
    move = words.move(limits=Limits(batch_rows=3))
    checks = iter(range(40))

    def stop() -> None:
        if next(checks, None) is None:
            raise InterruptedError

    words.progress.on_check = stop
    with words.opened(move) as opened:
        opened.open_capture()
        with pytest.raises(InterruptedError):
            opened.copy()
    words.progress.on_check = None
    with words.opened(replace(move, attempt=2)) as opened:
        copied = opened.copy()
        found = opened.verify()

    assert found.ok, found.mismatches
    assert links(words, Side.DESTINATION) == links(words, Side.SOURCE)
    assert copied.count == 1 + len(WORDS) + len(WORDS) ** 2


@needs_icu
@both_ways
@pytest.mark.parametrize("key", ["a0", "Z0"])
def test_an_orphan_is_found_where_text_sorts_differently(words: Ferry, key: str) -> None:
    # the organization's keys are '10' to 'a1' for one server, and '10' to 'Z1' for the other
    words.run(Side.SOURCE, "DELETE FROM links WHERE \"to\" NOT IN ('10', 'a', 'Z')")
    words.run(Side.SOURCE, "UPDATE links SET \"to\" = \"to\" || '1' WHERE \"to\" IN ('a', 'Z')")
    with words.opened() as move:
        move.open_capture()
        move.copy()
        with words.session(Side.DESTINATION) as connection:
            connection.execute("SET session_replication_role = replica")
            connection.execute("INSERT INTO links VALUES ('of nobody', %s)", (key,))
        found = move.verify()

    assert [(one.part, one.reason) for one in found.mismatches] == [("public.links", "orphan")]


@needs_icu
@both_ways
def test_clean_up_deletes_every_row_where_text_sorts_differently(
    words: Ferry, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cellferry.stores.postgres import cleaner

    monkeypatch.setattr(cleaner, "STRETCH", 4)
    with words.opened() as move:
        move.open_capture()
        move.copy()
        move.catch_up()
        move.freeze(60.0)
        move.finish()
        move.hand_over()
        move.release()
        cleaned = move.cleanup(Side.SOURCE)

    assert cleaned.deleted == 1 + len(WORDS) + len(WORDS) ** 2
    assert words.run(Side.SOURCE, "SELECT count(*) FROM links") == [(len(WORDS) ** 2,)]


# ── isolation levels ────────────────────────────────────────────────────────────────────────────


@dataclass
class Waiter:
    """One operation through the route client that comes to the gate while it is closed.

    Attributes:
        reads_first: takes its snapshot before the cutover, and asserts nothing: the row
            triggers are what it meets. Otherwise it does as the client library says.
        refusals: SQLSTATE of each refused try, and its cell.
    """

    cells: TwoCells
    routes: RouteClient
    number: int
    level: psycopg.IsolationLevel
    reads_first: bool
    has_snapshot: threading.Event = field(default_factory=threading.Event)
    frozen: threading.Event = field(default_factory=threading.Event)
    refusals: list[tuple[str, str | None]] = field(default_factory=list)
    committed_in: str | None = None
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        if not self.reads_first:
            self.frozen.wait(120)
        self.committed_in = self.routes.run("7", self.operation, deadline_s=240)

    def operation(self, route: Route) -> str:
        try:
            with self.cells.application(route.cell, autocommit=True) as connection:
                connection.isolation_level = self.level
                with transaction(connection, route, assert_authority=not self.reads_first):
                    connection.execute("SELECT count(*) FROM issues")
                    self.has_snapshot.set()
                    self.frozen.wait(120)
                    connection.execute(
                        "INSERT INTO issues VALUES (%s, 7, %s)",
                        (7_900_000 + self.number, f"by writer {self.number}"),
                    )
                    connection.execute("UPDATE issues SET counter = counter + 1 WHERE id = 7000001")
        except Exception as error:
            cause = error if isinstance(error, psycopg.Error) else error.__cause__
            self.refusals.append((route.cell, getattr(cause, "sqlstate", None)))
            raise
        return route.cell


@pytest.mark.parametrize("reads_first", [False, True], ids=["asserts", "reads first"])
@pytest.mark.parametrize(
    ("level", "refused_with"),
    [
        (psycopg.IsolationLevel.READ_COMMITTED, MOVED),
        # a snapshot older than the flip: the gate must not go on with what it shows
        (psycopg.IsolationLevel.REPEATABLE_READ, CONFLICT),
        (psycopg.IsolationLevel.SERIALIZABLE, CONFLICT),
    ],
    ids=["read committed", "repeatable read", "serializable"],
)
def test_a_writer_that_waits_through_a_cutover_commits_once_at_the_new_cell(
    cells: TwoCells,
    acme: Organization,
    level: psycopg.IsolationLevel,
    refused_with: str,
    reads_first: bool,
) -> None:
    migration = ready(cells, acme)
    wait_long_at_the_gate(cells.connections["cell-1-postgres-admin"])
    with RouteClient(cells.connections["cellferry-topology"]) as routes:
        writers = [Waiter(cells, routes, number, level, reads_first) for number in range(2)]

        def let_them_come(real: Callable[..., Any]) -> Any:
            """In the pause: the gate is frozen, and the writers arrive."""
            for writer in writers:
                writer.frozen.set()
            eventually(lambda: writers_at_the_gate(cells) == len(writers))
            return real()

        try:
            if reads_first:
                assert all(writer.has_snapshot.wait(60) for writer in writers)
            with cells.context(kind=around("postgres", "finish", let_them_come)) as context:
                steps.cutover(context, migration)
        finally:
            for writer in writers:
                writer.frozen.set()
                writer.thread.join()

    for writer in writers:
        assert writer.refusals[0] == ("cell-1", refused_with), writer.refusals
        assert {state for _, state in writer.refusals} <= {MOVED, BEING_MOVED, CONFLICT}
        assert writer.committed_in == "cell-2"
    with cells.admin("cell-2") as connection:
        rows = connection.execute("SELECT count(*) FROM issues WHERE id >= 7900000").fetchone()
        counter = connection.execute("SELECT counter FROM issues WHERE id = 7000001").fetchone()
    assert (rows, counter) == ((len(writers),), (len(writers),)), "once each"
    with cells.admin("cell-1") as connection:
        old = connection.execute(
            "SELECT sum(counter), max(id) FROM issues WHERE organization_id = 7"
        )
        assert old.fetchone() == (0, 7000020), "nothing of theirs at the old cell"


def writers_at_the_gate(cells: TwoCells) -> int:
    with cells.admin("cell-1") as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        ).fetchone()
    return int(row[0]) if row else 0
