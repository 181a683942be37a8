"""A whole move of PostgreSQL's part, under writers, there and back."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Self

import psycopg
import pytest

from cellferry.errors import DrainTimeout, TransientError, VerificationFailed
from cellferry.model import Finished, Side, Strategy, Throttle
from cellferry.stores import throttle
from cellferry.stores.base import StoreMove
from cellferry.stores.postgres import rounds
from cellferry.stores.postgres.references import ReferencedRows
from fixtures.ferry import Ferry, make_ferry
from fixtures.ferry_schema import ROWS, SCHEMA
from fixtures.postgres import FreshDatabases, postgres_versions

RETRY = {"CF002", "40001", "40P01", "55P03"}


@dataclass
class Writer:
    """An application: follows the gate's answers, remembers what was acknowledged."""

    ferry: Ferry
    number: int
    isolation: psycopg.IsolationLevel = psycopg.IsolationLevel.READ_COMMITTED
    side: Side = Side.SOURCE
    acknowledged: dict[int, str] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        sessions = {}
        try:
            for side in Side:
                sessions[side] = psycopg.connect(self.ferry.url(side))
                sessions[side].isolation_level = self.isolation
            count = 0
            while not self.stop.is_set():
                count += 1
                self._operate(sessions, count)
        except BaseException as error:
            self.errors.append(error)
        finally:
            for session in sessions.values():
                session.close()

    def _operate(self, sessions: dict[Side, psycopg.Connection[Any]], count: int) -> None:
        key = 10_000_000 * (self.number + 1) + count
        while True:
            session = sessions[self.side]
            try:
                with session.transaction():
                    session.execute(
                        "INSERT INTO issues (id, project_id, iid, title) VALUES (%s, %s, %s, %s)",
                        (key, 2 + 2 * random.randrange(5), key, f"w{self.number}"),
                    )
                    previous = random.choice(list(self.acknowledged) or [key])
                    session.execute(
                        "UPDATE issues SET title = %s WHERE id = %s", (f"u{count}", previous)
                    )
                    session.execute(
                        "UPDATE projects SET level = 'low' WHERE id = %s",
                        (2 + 2 * random.randrange(5),),
                    )
            except psycopg.Error as error:
                session.rollback()
                if error.sqlstate == "CF001":
                    answer = json.loads(error.diag.message_detail or "{}")
                    self.side = (
                        Side.SOURCE
                        if answer["cell"] == self.ferry.source.name
                        else Side.DESTINATION
                    )
                elif error.sqlstate not in RETRY:
                    raise
                continue
            self.acknowledged[key] = f"w{self.number}"
            self.acknowledged[previous] = f"u{count}"
            return


class Traffic:
    """Writers that run while a block runs."""

    def __init__(self, ferry: Ferry, writers: int = 4, **how: Any) -> None:
        self.writers = [Writer(ferry, number, **how) for number in range(writers)]
        self._threads = [threading.Thread(target=writer.run) for writer in self.writers]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        for writer in self.writers:
            writer.stop.set()
        for thread in self._threads:
            thread.join()

    def titles(self) -> dict[int, str]:
        """What the application was told is stored. Raises what a writer did not expect."""
        told: dict[int, str] = {}
        for writer in self.writers:
            if writer.errors:
                raise writer.errors[0]
            told.update(writer.acknowledged)
        return told


def wait_until_all_write(traffic: Traffic, more: int = 20) -> None:
    """Wait until each writer was told of so many writes more."""
    before = [len(writer.acknowledged) for writer in traffic.writers]
    until = time.monotonic() + 60
    for writer, count in zip(traffic.writers, before, strict=True):
        while len(writer.acknowledged) < count + more:
            assert time.monotonic() < until, writer.errors
            time.sleep(0.01)


def stored(ferry: Ferry, side: Side) -> dict[int, str]:
    rows = ferry.run(side, "SELECT id, title FROM issues WHERE id >= 10000000")
    return dict(rows)


def cut_over(ferry: Ferry, attempt: int = 2) -> Finished:
    """Cut over as the steps do; return what was done while the gate was closed."""
    with ferry.opened(ferry.move(attempt=attempt)) as move:
        move.catch_up()
        for _ in range(5):
            move.sync()
        move.freeze(60.0)
        finished = move.finish()
        move.hand_over()
        move.release()
        return finished


@postgres_versions
def test_nothing_acknowledged_is_lost_and_writers_hardly_wait(
    fresh_databases: Callable[[], FreshDatabases],
) -> None:
    ferry = make_ferry(fresh_databases())
    neighbours = ferry.content(Side.SOURCE, 2), ferry.content(Side.DESTINATION, 3)
    with Traffic(ferry) as traffic:
        time.sleep(0.3)
        with ferry.opened() as move:
            move.open_capture()
            move.copy()
            while move.sync().remaining > 200:
                pass
            assert move.verify().ok
        finished = cut_over(ferry)
        wait_until_all_write(traffic)

    assert stored(ferry, Side.DESTINATION) == traffic.titles()
    assert all(writer.side is Side.DESTINATION for writer in traffic.writers)
    assert finished.applied < len(traffic.titles()) / 3, (
        "the gate was closed for more than the rest"
    )
    assert (ferry.content(Side.SOURCE, 2), ferry.content(Side.DESTINATION, 3)) == neighbours


def test_reverse_rounds_bring_every_later_write_back(ferry: Ferry) -> None:
    with Traffic(ferry, writers=2) as traffic:
        with ferry.opened() as move:
            move.open_capture()
            move.copy()
        cut_over(ferry)
        with ferry.opened(ferry.move(attempt=3).turned()) as move:
            for _ in range(5):
                move.sync()
    with ferry.opened(ferry.move(attempt=4).turned()) as move:
        while move.sync().remaining:
            pass

    assert stored(ferry, Side.SOURCE) == traffic.titles()
    assert ferry.content(Side.SOURCE, 1) == ferry.content(Side.DESTINATION, 1)


def test_a_reverse_round_does_not_write_where_the_gate_is_not_moved(ferry: Ferry) -> None:
    from cellferry.errors import WrongState

    with ferry.opened() as move:
        move.open_capture()
        move.copy()
    cut_over(ferry)
    ferry.run(Side.DESTINATION, "UPDATE issues SET title = 'new' WHERE id = 1")
    ferry.run(Side.SOURCE, "UPDATE cellferry.gate SET migration = 99, state = 'importing'")

    with ferry.opened(ferry.move(attempt=3).turned()) as move, pytest.raises(WrongState):
        move.sync()

    assert ferry.run(Side.SOURCE, "SELECT title FROM issues WHERE id = 1") != [("new",)]


def test_freeze_first_moves_everything_under_the_gate(ferry: Ferry) -> None:
    frozen = ferry.move(strategy=Strategy.FREEZE_FIRST)
    with Traffic(ferry, writers=2) as traffic:
        with ferry.opened(frozen) as move:
            move.open_capture()
            move.freeze(60.0)
            finished = move.finish()
            move.hand_over()
            move.release()
        time.sleep(0.2)

    assert stored(ferry, Side.DESTINATION) == traffic.titles()
    assert finished.evidence["hashes"]["public.issues"]["count"] >= 1000


def test_under_the_gate_nobody_waits_for_a_rate(
    ferry: Ferry, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: set[float | None] = set()
    take = throttle.Throttle.take

    def note(self: throttle.Throttle, *arguments: Any) -> float:
        rates.add(self.per_second)
        return take(self, *arguments)

    monkeypatch.setattr(throttle.Throttle, "take", note)
    slow = ferry.move(strategy=Strategy.FREEZE_FIRST, throttle=Throttle(rows_per_s=100_000))
    with ferry.opened(slow) as move:
        move.open_capture()
        move.freeze(60.0)
        move.finish()
        move.thaw()

    assert rates == {None}


def work_on(ferry: Ferry) -> None:
    """More log rows of one hot row than a round may read, then a change of another."""
    for number in range(15):
        ferry.run(Side.SOURCE, f"UPDATE issues SET title = 'hot {number}' WHERE id = 1")
    ferry.run(Side.SOURCE, "UPDATE issues SET title = 'last' WHERE id = 3")


def give_up_and_freeze_again(ferry: Ferry, move: StoreMove) -> Finished:
    """Copy under the gate, thaw, go on working, and finish under a second gate."""
    move.open_capture()
    move.freeze(60.0)
    move.finish()
    move.thaw()
    move.release()
    work_on(ferry)
    move.freeze(60.0)
    return move.finish()


def test_a_freeze_first_that_is_tried_again_brings_every_change_since(
    ferry: Ferry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "MAX_LOG_ROWS", 10)
    with ferry.opened(ferry.move(strategy=Strategy.FREEZE_FIRST)) as move:
        give_up_and_freeze_again(ferry, move)
        move.hand_over()
        move.release()

    assert ferry.content(Side.DESTINATION, 1) == ferry.content(Side.SOURCE, 1)


def test_under_the_gate_a_key_in_the_log_excuses_no_difference(
    ferry: Ferry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_short(self: rounds.Rounds, before_commit: Callable[[], None]) -> Any:
        return self._run(rounds.ALL, 10, before_commit, forget=False)

    monkeypatch.setattr(rounds.Rounds, "run_last", run_short)
    with (
        ferry.opened(ferry.move(strategy=Strategy.FREEZE_FIRST)) as move,
        pytest.raises(VerificationFailed, match=r"public\.issues 3"),
    ):
        give_up_and_freeze_again(ferry, move)


def test_a_cutover_that_gives_up_leaves_the_source_serving(ferry: Ferry) -> None:
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        move.catch_up()
        with ferry.session(Side.SOURCE) as stubborn:
            stubborn.execute("BEGIN; UPDATE issues SET title = 'open' WHERE id = 1")
            with pytest.raises(DrainTimeout):
                move.freeze(0.5)
            with suppress(psycopg.Error):
                stubborn.execute("COMMIT")
        move.thaw()
        move.release()
        ferry.run(Side.SOURCE, "UPDATE issues SET title = 'serves' WHERE id = 3")
        move.freeze(60.0)
        move.finish()
        move.hand_over()
        move.release()

    titles = dict(ferry.run(Side.DESTINATION, "SELECT id, title FROM issues WHERE id IN (1, 3)"))
    assert titles == {1: "open", 3: "serves"}


def test_a_thaw_after_the_last_delta_loses_nothing_later(ferry: Ferry) -> None:
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        move.catch_up()
        move.freeze(60.0)
        move.finish()
        move.thaw()
        move.release()
        ferry.run(Side.SOURCE, "UPDATE issues SET title = 'after the thaw' WHERE id = 1")
    cut_over(ferry)

    assert ferry.content(Side.DESTINATION, 1) == ferry.content(Side.SOURCE, 1)
    titles = ferry.run(Side.DESTINATION, "SELECT title FROM issues WHERE id = 1")
    assert titles == [("after the thaw",)]


def test_a_sequence_does_not_give_out_a_key_that_moved(ferry: Ferry) -> None:
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
    cut_over(ferry)

    rows = ferry.run(
        Side.DESTINATION,
        "INSERT INTO issues (project_id, iid, title) VALUES (2, 5555, 'new') RETURNING id",
    )
    assert rows[0][0] > 2000


@pytest.mark.parametrize("lost", [False, True], ids=["", "also after a loss"])
def test_after_freeze_first_neither_does_a_sequence(ferry: Ferry, lost: bool) -> None:
    frozen = ferry.move(strategy=Strategy.FREEZE_FIRST)
    with ferry.opened(frozen) as move:
        move.open_capture()
        move.catch_up()
        move.freeze(60.0)
        finished = move.finish()
        if not lost:
            move.hand_over()
        move.release()
    if lost:
        ferry.run(Side.DESTINATION, "SELECT setval('issues_id_seq', 1)")
        with ferry.opened(replace(frozen, attempt=2)) as move:
            move.repair()  # as `history.restore`
            finished = move.finish()
            move.hand_over()

    rows = ferry.run(
        Side.DESTINATION,
        "INSERT INTO issues (project_id, iid, title) VALUES (2, 5555, 'new') RETURNING id",
    )
    assert rows[0][0] > 2000
    assert finished.evidence["sequences"]["public.issues_id_seq"] > 2000


def test_a_freeze_first_after_a_change_of_the_schema_needs_no_verify(ferry: Ferry) -> None:
    frozen = ferry.move(strategy=Strategy.FREEZE_FIRST)
    with ferry.opened(frozen) as move:
        move.open_capture()
        move.catch_up()
        move.freeze(60.0)
        move.thaw()
        move.release()
    for side in Side:
        ferry.run(side, "ALTER TABLE issues ADD severity int")

    with ferry.opened(replace(frozen, attempt=2)) as move:
        move.open_capture()
        move.catch_up()
        move.freeze(60.0)
        move.finish()
        move.hand_over()
        move.release()
    assert ferry.content(Side.DESTINATION, 1) == ferry.content(Side.SOURCE, 1)


def test_every_verb_up_to_the_flip_may_be_repeated(ferry: Ferry) -> None:
    for attempt in (1, 2):
        with ferry.opened(ferry.move(attempt=attempt)) as move:
            for _ in range(2):
                move.fence()
                move.open_capture()
                move.copy()
                move.sync()
                assert move.verify().ok
    with ferry.opened(ferry.move(attempt=3)) as move:
        move.catch_up()
        move.freeze(60.0)
        move.finish()
        move.finish()
        for _ in range(2):
            move.hand_over()
            move.release()
            move.keep_handed_over()

    assert ferry.content(Side.DESTINATION, 1) == ferry.content(Side.SOURCE, 1)


def test_a_user_of_several_tables_is_looked_at_once_in_an_attempt(
    fresh_databases: Callable[[], FreshDatabases], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that fails leaves its values to the next attempt, and to the next foreign key."""
    ferry = make_ferry(
        fresh_databases(),
        f"{SCHEMA}; CREATE TABLE reviews (id bigint PRIMARY KEY, organization_id bigint NOT NULL"
        " REFERENCES organizations, reviewer bigint REFERENCES users, asker bigint"
        " REFERENCES users);",
        f"{ROWS}; INSERT INTO reviews SELECT row_number() OVER (), organization_id, user_id,"
        " user_id FROM memberships;",
    )
    asked: list[tuple[str, Any]] = []
    bring, fails = ReferencedRows.bring, [True]

    def spied(self: ReferencedRows, needs: Any, batch: Any = None) -> tuple[int, int]:
        if batch is not None:
            ((foreign_key, values),) = needs
            asked.extend((str(foreign_key.parent), value) for value in values)
            if fails:
                raise TransientError("a lock was not to be had", hint=f"try again {fails.pop()}")
        return bring(self, needs, batch)

    monkeypatch.setattr(ReferencedRows, "bring", spied)
    with ferry.opened() as move:
        move.open_capture()
        with pytest.raises(TransientError, match="not to be had"):
            move.copy()
        first, asked[:] = set(asked), []
        move.copy()
        monkeypatch.undo()
        move.sync()
        assert move.verify().ok
    assert first, "the organization refers to users"
    assert first <= set(asked)
    assert len(asked) == len(set(asked))
