"""Two tables of a large organization are copied at once; whatever ends one lane ends both."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest

from cellferry import phases
from cellferry.errors import CellferryError, LeaseLost, Paused, PermanentError, TransientError
from cellferry.model import Endpoint, Limits, Move, Side, Throttle
from cellferry.phases import Phase
from cellferry.stores.pace import FULL_SPEED, Pace
from cellferry.stores.postgres import copier
from cellferry.stores.postgres.cell_conditions import CONNECTIONS_NEEDED
from cellferry.stores.postgres.store import PostgresStore
from fixtures.ferry import Ferry, Quiet, Registry, make_ferry
from fixtures.postgres import FreshDatabases, postgres_versions

BATCH = 100

#: Tables that lanes get first: none of them waits for the other.
ISSUES, EVENTS = "issues", "events"


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the ferry's organization for a large one."""
    monkeypatch.setattr(copier, "LANE_ROWS", 100)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    phases.listen(None)
    assert not [one for one in threading.enumerate() if one.name.startswith("copy lane")]


def batches(ferry: Ferry, rows: int = BATCH, **changes: Any) -> Move:
    limits = Limits(batch_rows=rows, copy_lanes=changes.pop("copy_lanes", 2))
    return ferry.move(limits=limits, **changes)


SESSIONS = (
    "SELECT application_name, query, state, coalesce(wait_event_type, '') FROM pg_stat_activity"
    " WHERE datname = current_database() AND application_name LIKE 'cellferry:1:%' ORDER BY 1"
)


def copying(ferry: Ferry, side: Side) -> list[tuple[Any, ...]]:
    """The sessions of lanes."""
    return [row for row in ferry.run(side, SESSIONS) if row[0].endswith(":copy")]


def in_time(what: Callable[[], Any], seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


@contextmanager
def held(ferry: Ferry, *tables: str) -> Iterator[None]:
    """Nobody may write these tables at the destination while the block is open."""
    with ExitStack() as stack:
        for table in tables:
            session = stack.enter_context(ferry.session(Side.DESTINATION))
            stack.enter_context(session.transaction())
            session.execute(f"LOCK TABLE {table} IN SHARE MODE".encode())
        yield


def blocked(ferry: Ferry, *tables: str) -> bool:
    """Whether a lane each waits to write these tables."""
    waiting = [query for _, query, _, event in copying(ferry, Side.DESTINATION) if event == "Lock"]
    return len(waiting) == len(tables) and all(
        any(f'COPY "public"."{table}"' in query for query in waiting) for table in tables
    )


def finish(ferry: Ferry, move: Any) -> None:
    while move.sync().remaining:
        pass
    assert move.verify().ok
    assert ferry.content(Side.DESTINATION, 1) == ferry.content(Side.SOURCE, 1)


@postgres_versions
def test_two_tables_are_copied_at_the_same_time(
    fresh_databases: Callable[[], FreshDatabases], lanes: None
) -> None:
    ferry = make_ferry(fresh_databases())
    with ferry.opened(batches(ferry)) as move, ThreadPoolExecutor(1) as pool:
        move.open_capture()
        with held(ferry, ISSUES, EVENTS):
            done = pool.submit(move.copy)
            in_time(lambda: blocked(ferry, ISSUES, EVENTS))
            reading = {query.split('FROM "public".')[1].split()[0] for _, query, _, _ in
                       copying(ferry, Side.SOURCE) if query.startswith("COPY")}  # fmt: skip
        copied = done.result(60)

        assert reading == {'"issues"', '"events"'}
        assert not copying(ferry, Side.DESTINATION), "lanes close what they opened"
        assert not copying(ferry, Side.SOURCE)
        counts = [done for phase, done, *_ in ferry.progress.reports if phase == "copy"]
        assert counts == sorted(counts)
        assert counts[-1] == copied.count
        finish(ferry, move)


@pytest.mark.parametrize("why", ["small", "copy_lanes=1", "rows_per_s", "paced"])
def test_one_lane_is_used_where_a_second_one_would_not_pay_or_press(
    ferry: Ferry, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why != "small":
        monkeypatch.setattr(copier, "LANE_ROWS", 100)
    move = batches(ferry, copy_lanes=1 if why == "copy_lanes=1" else 2)
    if why == "rows_per_s":
        move = replace(move, throttle=Throttle(rows_per_s=1_000_000))
    seen: set[str] = set()
    ferry.progress.on_check = lambda: seen.update(
        name for side in Side for name, *_ in ferry.run(side, SESSIONS)
    )
    pace = Pace("postgres", ferry.progress) if why == "paced" else FULL_SPEED
    with ferry.store.open(move, ferry.registry, ferry.progress, pace) as opened:
        opened.fence()
        opened.open_capture()
        opened.copy()

    assert seen == {"cellferry:1:1:move"}
    assert ferry.content(Side.DESTINATION, 1) == ferry.content(Side.SOURCE, 1)


def test_the_most_lanes_stay_within_the_connections_that_plan_asks_for(
    ferry: Ferry, lanes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copier, "LANE_ROWS", 1)
    most = dict.fromkeys(Side, 0)

    def look(_: Phase) -> None:
        for side in Side:
            most[side] = max(most[side], len(ferry.run(side, SESSIONS)))

    phases.listen(look)
    with ferry.opened(batches(ferry, 10, copy_lanes=4)) as move:
        move.open_capture()
        move.copy()

    assert most == dict.fromkeys(Side, 5)
    assert CONNECTIONS_NEEDED >= 5


# ── killed, stopped, taken over ─────────────────────────────────────────────────────────────────


def copy_in_a_process(move: Move, told: Any) -> None:
    """What the killed process runs: says which table had a batch, slowly; then how it ended."""
    copier.LANE_ROWS = 100

    class Telling(Quiet):
        def report(self, *what: Any, **_: Any) -> None:
            told.put(what[-1])
            time.sleep(0.02)

    try:
        with PostgresStore().open(move, Registry(), Telling()) as opened:
            opened.fence()
            opened.copy()
    except CellferryError as error:
        told.put(type(error).__name__)


@contextmanager
def process_amid_two_tables(ferry: Ferry, move: Move) -> Iterator[tuple[Any, Any]]:
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    process = context.Process(target=copy_in_a_process, args=(move, told), daemon=True)
    process.start()
    amid = {f"public.{ISSUES}": 0, f"public.{EVENTS}": 0}
    try:
        while min(amid.values()) < 2:
            table = told.get(timeout=60)
            assert table != "done"
            if table in amid:
                amid[table] += 1
        yield process, told
    finally:
        process.kill()
        process.join()


def committed(ferry: Ferry) -> dict[str, tuple[int, bool]]:
    return {
        relation: (rows, done)
        for relation, rows, done in ferry.run(
            Side.DESTINATION,
            "SELECT relation, rows::int, done FROM cellferry.checkpoint"
            f" WHERE relation IN ('public.{ISSUES}', 'public.{EVENTS}')",
        )
    }


def inserted(ferry: Ferry, table: str) -> int:
    """How many rows the destination's server counted, with those of partitions.

    A database that was copied from another begins at 0, whatever rows it has.
    """
    return ferry.run(
        Side.DESTINATION,
        "SELECT pg_stat_force_next_flush(), coalesce(sum(n_tup_ins), 0)::int"
        f" FROM pg_stat_user_tables WHERE relname ~ '^{table}(_[01])?$'",
    )[0][1]


@postgres_versions
def test_a_copy_that_is_killed_in_two_tables_goes_on_in_both(
    fresh_databases: Callable[[], FreshDatabases], lanes: None
) -> None:
    ferry = make_ferry(fresh_databases())
    before = {table: inserted(ferry, table) for table in (ISSUES, EVENTS)}
    with ferry.opened() as move:
        move.open_capture()
    with process_amid_two_tables(ferry, batches(ferry, 10, attempt=2)) as (process, _):
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    in_time(lambda: not copying(ferry, Side.DESTINATION))
    marks = committed(ferry)

    with ferry.opened(batches(ferry, 10, attempt=3)) as move:
        copied = move.copy()
        assert move.verify().ok

    assert len(marks) == 2
    assert all(rows > 0 and not done for rows, done in marks.values()), "killed amid both"
    assert 0 < copied.recopied <= 2 * 10
    assert ferry.content(Side.DESTINATION, 1) == ferry.content(Side.SOURCE, 1)
    for table in (ISSUES, EVENTS):
        sent = inserted(ferry, table) - before[table]
        rows = len(ferry.content(Side.DESTINATION, 1)[table])
        assert rows <= sent <= rows + 10, "at most one batch of each table is sent twice"


def test_a_stopped_process_that_wakes_up_late_changes_nothing(ferry: Ferry, lanes: None) -> None:
    with ferry.opened() as move:
        move.open_capture()
    with process_amid_two_tables(ferry, batches(ferry, 10, attempt=2)) as (process, told):
        os.kill(process.pid, signal.SIGSTOP)
        with ferry.opened(batches(ferry, attempt=3)) as newer:
            newer.copy()
            os.kill(process.pid, signal.SIGCONT)
            in_time(lambda: told.get(timeout=30) == "LeaseLost")
            finish(ferry, newer)


@pytest.mark.parametrize("amid", [0, 1, 3, 10])
def test_a_newer_attempt_ends_both_lanes(ferry: Ferry, lanes: None, amid: int) -> None:
    with ferry.opened(batches(ferry, 10)) as older, ThreadPoolExecutor(1) as pool:
        older.open_capture()
        if amid == 0:
            with held(ferry, ISSUES, EVENTS):
                done = pool.submit(older.copy)
                in_time(lambda: blocked(ferry, ISSUES, EVENTS))
                with ferry.opened(batches(ferry, attempt=2)):
                    assert not copying(ferry, Side.DESTINATION)
                    assert not copying(ferry, Side.SOURCE)
                with pytest.raises(LeaseLost):
                    done.result(60)
        else:
            seen: list[Phase] = []

            def take_over(phase: Phase) -> None:
                seen.append(phase)
                if len(seen) == amid:
                    with ferry.opened(batches(ferry, attempt=2)):
                        pass

            phases.listen(take_over)
            with pytest.raises(LeaseLost):
                older.copy()
    phases.listen(None)
    with ferry.opened(batches(ferry, attempt=3)) as move:
        move.copy()
        finish(ferry, move)


def test_whoever_is_ended_in_the_middle_of_anything_knows_that_the_lease_is_lost(
    ferry: Ferry, lanes: None
) -> None:
    """Trying again would take it back from the newer attempt, which would try again, too."""
    with ferry.opened() as move:
        move.open_capture()
    for attempt in range(2, 18, 2):
        takers: list[threading.Thread] = []

        def take_over(_: Phase, attempt: int = attempt, takers: list[Any] = takers) -> None:
            if not takers:
                takers.append(threading.Thread(target=fence, args=(attempt + 1,)))
                takers[0].start()

        def fence(attempt: int) -> None:
            with ferry.opened(batches(ferry, attempt=attempt)):
                pass

        with ferry.opened(batches(ferry, 10, attempt=attempt)) as older:
            phases.listen(take_over)
            with pytest.raises(LeaseLost):
                older.copy()
        takers[0].join()
    phases.listen(None)
    with ferry.opened(batches(ferry, attempt=20)) as move:
        move.copy()
        finish(ferry, move)


# ── one lane ends, and the other with it ────────────────────────────────────────────────────────


def test_an_error_in_one_lane_ends_the_other_that_is_blocked(ferry: Ferry, lanes: None) -> None:
    ferry.run(
        Side.DESTINATION,
        "INSERT INTO issues (id, project_id, iid, title) VALUES (1, 900001, 77, 'theirs')",
    )
    with ferry.opened(batches(ferry)) as move:
        move.open_capture()
        with held(ferry, EVENTS):
            with pytest.raises(PermanentError, match=r"row 1 of public\.issues .* organization 3"):
                move.copy()
            assert not copying(ferry, Side.DESTINATION), "nothing of it is left in the server"
            assert not copying(ferry, Side.SOURCE)

        ferry.run(Side.DESTINATION, "DELETE FROM issues WHERE id = 1")
        move.copy()
        finish(ferry, move)


@pytest.mark.parametrize("in_the_way", [(EVENTS,), (ISSUES, EVENTS)], ids=["one", "both"])
def test_a_pause_ends_both_lanes_though_they_are_blocked(
    ferry: Ferry, lanes: None, in_the_way: tuple[str, ...]
) -> None:
    pause = Paused("paused by somebody")

    def check() -> None:
        if blocked(ferry, *in_the_way):
            raise pause

    with ferry.opened(batches(ferry, 10)) as move:
        move.open_capture()
        with held(ferry, *in_the_way):
            ferry.progress.on_check = check
            with pytest.raises(Paused) as raised:
                move.copy()
            assert raised.value is pause
            assert not copying(ferry, Side.DESTINATION)
        ferry.progress.on_check = None
        move.copy()
        finish(ferry, move)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_two_blocked_lanes(ferry: Ferry, lanes: None) -> None:
    def interrupt() -> None:
        in_time(lambda: blocked(ferry, ISSUES, EVENTS))
        os.kill(os.getpid(), signal.SIGINT)

    with ferry.opened(batches(ferry)) as move:
        move.open_capture()
        with held(ferry, ISSUES, EVENTS):
            threading.Thread(target=interrupt).start()
            with pytest.raises(KeyboardInterrupt):
                move.copy()
            assert not copying(ferry, Side.DESTINATION)
        move.copy()
        finish(ferry, move)


@pytest.mark.parametrize("at", [1, 2, 7])
def test_a_hook_that_raises_at_a_batch_stops_the_copy_there(
    ferry: Ferry, lanes: None, at: int
) -> None:
    class Stop(BaseException):
        pass

    seen: list[threading.Thread] = []

    def stop(phase: Phase) -> None:
        assert phase is Phase.COPY_BATCH
        seen.append(threading.current_thread())
        if len(seen) == at:
            raise Stop

    phases.listen(stop)
    with ferry.opened(batches(ferry, 10)) as move:
        move.open_capture()
        with pytest.raises(Stop):
            move.copy()
        assert len(seen) == at, "no other batch is told of after it"
        assert set(seen) == {threading.current_thread()}
        phases.listen(None)
        move.copy()
        finish(ferry, move)


def test_a_lane_that_would_reach_another_server_ends_the_copy(ferry: Ferry, lanes: None) -> None:
    """As after a failover between two connections of a cell with several hosts."""
    with ferry.opened(batches(ferry)) as move:
        move.open_capture()
        before = ferry.content(Side.SOURCE)
        there = replace(
            ferry.destination,
            stores={"postgres": Endpoint(url=ferry.source.stores["postgres"].url)},
        )

        def fail_over() -> None:
            move.move = replace(move.move, destination=there)

        ferry.progress.on_check = fail_over
        with pytest.raises(TransientError, match="failed over"):
            move.copy()

    assert ferry.content(Side.SOURCE) == before
    assert ferry.content(Side.DESTINATION, 1)[ISSUES] == []


# ── rows in each other's way ────────────────────────────────────────────────────────────────────


def test_unique_values_that_move_between_batches_of_both_lanes_are_no_collisions(
    ferry: Ferry, lanes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # each batch reads anew, so that a later one sees the change
    monkeypatch.setattr(copier, "STRETCH_S", 0.0)
    ferry.run(Side.SOURCE, "DELETE FROM events; DELETE FROM issues WHERE id > 300")
    monkeypatch.setattr(copier, "LANE_ROWS", 20)
    swaps = {
        # issues are owned through their projects: whose a copied row is, the destination must know
        "public.issues": "UPDATE issues SET iid = 5000 WHERE id = 3;"
        "UPDATE issues SET iid = 3, project_id = (SELECT project_id FROM issues WHERE id = 3)"
        " WHERE id = (SELECT max(i.id) FROM issues AS i JOIN projects AS p ON p.id = i.project_id"
        " WHERE organization_id = 1)",
        "public.Odd Labels": """
            UPDATE "Odd Labels" SET color = 'other' WHERE "Key" =
                (SELECT "Key" FROM "Odd Labels" WHERE organization_id = 1 ORDER BY 1 LIMIT 1);
            UPDATE "Odd Labels" SET color = 'Color' || (SELECT substring("Key" FROM '[0-9]+')
                FROM "Odd Labels" WHERE organization_id = 1 ORDER BY "Key" LIMIT 1)
                WHERE "Key" = (SELECT "Key" FROM "Odd Labels" WHERE organization_id = 1
                               ORDER BY 1 DESC LIMIT 1)""",
    }
    careful: list[str] = []
    meets = copier._TableCopier._careful_batch

    def note(self: Any, table: Any, *more: Any) -> Any:
        careful.append(str(table.name))
        return meets(self, table, *more)

    monkeypatch.setattr(copier._TableCopier, "_careful_batch", note)

    def swap() -> None:
        table = ferry.progress.reports[-1][-1] if ferry.progress.reports else ""
        if statement := swaps.pop(table, None):
            ferry.run(Side.SOURCE, statement)

    ferry.progress.on_check = swap
    with ferry.opened(batches(ferry, 5)) as move:
        move.open_capture()
        move.copy()
        assert not swaps
        assert {"public.issues", "public.Odd Labels"} <= set(careful)
        finish(ferry, move)
