"""A copy that is killed goes on from its checkpoint; one that is refused says why."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from cellferry.errors import LeaseLost, PermanentError
from cellferry.model import Endpoint, Limits, Move, Side, Throttle
from cellferry.stores import throttle
from cellferry.stores.postgres import copier
from cellferry.stores.postgres.checkpoints import Checkpoint
from cellferry.stores.postgres.store import PostgresStore
from fixtures.ferry import Ferry, Quiet, Registry, make_ferry
from fixtures.patience import be_patient
from fixtures.postgres import FreshDatabases, postgres_versions

BATCH = 100


def copy_in_a_process(move: Move, reports: Any) -> None:
    """What the killed process runs: reports each committed batch, and stops in the middle."""

    class Telling(Quiet):
        def report(self, *what: Any, **more: Any) -> None:
            reports.put(what[2])
            if what[2] >= 1200:
                time.sleep(600)

    be_patient(pytest.MonkeyPatch())
    with PostgresStore().open(move, Registry(), Telling()) as opened:
        opened.fence()
        opened.copy()


def small_batches(ferry: Ferry, **changes: Any) -> Move:
    return ferry.move(limits=Limits(batch_rows=BATCH), **changes)


@postgres_versions
def test_a_killed_copy_goes_on_from_its_checkpoint(
    fresh_databases: Callable[[], FreshDatabases],
) -> None:
    ferry = make_ferry(fresh_databases())
    with ferry.opened() as move:
        move.open_capture()
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    process = context.Process(
        target=copy_in_a_process, args=(small_batches(ferry, attempt=2), reports)
    )
    process.start()
    while reports.get(timeout=120) < 1200:
        pass
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (committed,) = ferry.run(
        Side.DESTINATION, "SELECT sum(rows)::int, bool_and(done) FROM cellferry.checkpoint"
    )

    with ferry.opened(small_batches(ferry, attempt=3)) as move:
        copied = move.copy()
        assert move.verify().ok

    assert committed[1] is False, "it was killed in the middle"
    assert copied.count >= committed[0] >= 1200
    assert 0 < copied.recopied <= BATCH
    assert ferry.content(Side.DESTINATION, 1) == ferry.content(Side.SOURCE, 1)


def test_a_finished_copy_copies_nothing_again(ferry: Ferry) -> None:
    with ferry.opened() as move:
        move.open_capture()
        first = move.copy()
        second = move.copy()

    assert second.count == first.count
    assert second.batches == 0


def test_a_batch_is_bounded_by_bytes(ferry: Ferry) -> None:
    ferry.run(Side.SOURCE, "UPDATE notes SET body = repeat(md5(body), 1000)")
    with ferry.opened(ferry.move(limits=Limits(batch_bytes=1_000_000))) as move:
        move.open_capture()
        copied = move.copy()

    assert copied.bytes > 40_000_000
    assert copied.batches > 40


def test_an_old_statement_is_begun_anew(ferry: Ferry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copier, "STRETCH_S", 0.0)
    with ferry.opened(small_batches(ferry)) as move:
        move.open_capture()
        move.copy()
        assert move.verify().ok


def test_a_throttled_copy_keeps_its_rate(ferry: Ferry) -> None:
    throttled = small_batches(ferry, throttle=Throttle(rows_per_s=2000))
    started = time.monotonic()
    with ferry.opened(throttled) as move:
        move.open_capture()
        copied = move.copy()

    assert copied.count / (time.monotonic() - started) < 2300


def test_a_slow_copy_never_has_the_server_write_many_rows_in_one_go(
    ferry: Ferry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours wait for the longest piece of work, not for how many there are."""
    taken: list[float] = []
    batches: list[int] = []
    committed = copier._Account.committed

    def note(account: Any, table: Any, before: Checkpoint, after: Checkpoint) -> None:
        batches.append(after.rows - before.rows)
        committed(account, table, before, after)

    monkeypatch.setattr(copier._Account, "committed", note)
    monkeypatch.setattr(throttle.Throttle, "take", lambda _self, n, *_: taken.append(n) or 0.0)
    slow = ferry.move(throttle=Throttle(rows_per_s=400))
    with ferry.opened(slow) as move:
        move.open_capture()
        copied = move.copy()
        assert move.verify().ok

    assert sum(taken) == copied.count
    assert max(taken) == copier.LEAST_PIECE_ROWS
    assert max(batches) == 400


def test_a_newer_attempt_stops_an_older_copy(ferry: Ferry) -> None:
    with ferry.opened(small_batches(ferry, attempt=1)) as older:
        older.open_capture()
        with ferry.opened(small_batches(ferry, attempt=2)):
            pass
        with pytest.raises(LeaseLost):
            older.copy()

    assert ferry.content(Side.DESTINATION, 1)["projects"] == []


@pytest.mark.parametrize("in_pieces", [False, True])
def test_a_unique_value_that_moves_between_batches_is_no_collision(
    ferry: Ferry, monkeypatch: pytest.MonkeyPatch, in_pieces: bool
) -> None:
    rate = None
    if in_pieces:
        monkeypatch.setattr(copier, "PIECE_ROWS", 2)
        monkeypatch.setattr(copier, "LEAST_PIECE_ROWS", 2)
        rate = 1_000_000
    # project 2 is copied with its name; then project 40 takes the name over, before its batch
    swapped: list[bool] = []

    def swap() -> None:
        if not swapped and ferry.content(Side.DESTINATION, 1)["projects"]:
            swapped.append(True)
            ferry.run(
                Side.SOURCE,
                "UPDATE projects SET name = 'other' WHERE id = 2;"
                "UPDATE projects SET name = 'project 2' WHERE id = 40",
            )
        elif swapped:
            monkeypatch.setattr(copier, "STRETCH_S", 60.0)

    # each batch of projects reads anew, so that a later one sees the change
    ferry.run(Side.SOURCE, "DELETE FROM events; DELETE FROM issues WHERE id > 50")
    monkeypatch.setattr(copier, "STRETCH_S", 0.0)
    ferry.progress.on_check = swap
    limits, pieces = Limits(batch_rows=5), Throttle(rows_per_s=rate)
    with ferry.opened(ferry.move(limits=limits, throttle=pieces)) as move:
        move.open_capture()
        move.copy()
        assert swapped
        while move.sync().remaining:
            pass
        assert move.verify().ok


def test_a_row_of_another_organization_with_the_same_key_is_a_collision(ferry: Ferry) -> None:
    ferry.run(
        Side.DESTINATION,
        "INSERT INTO issues (id, project_id, iid, title) VALUES (1, 900001, 77, 'theirs')",
    )
    before = ferry.content(Side.DESTINATION, 3)
    with ferry.opened() as move:
        move.open_capture()
        with pytest.raises(PermanentError, match=r"row 1 of public\.issues .* organization 3"):
            move.copy()

    assert ferry.content(Side.DESTINATION, 3) == before


def test_a_shared_row_whose_unique_value_is_taken_is_a_collision(ferry: Ferry) -> None:
    ferry.run(Side.DESTINATION, "INSERT INTO users VALUES (5000, 'user2@example.com')")
    with ferry.opened() as move:
        move.open_capture()
        with pytest.raises(PermanentError, match=r"public\.users row 2 cannot be copied"):
            move.copy()


def test_a_full_destination_is_told_with_its_remedy(ferry: Ferry) -> None:
    endpoint = ferry.destination.stores["postgres"]
    ferry.destination = type(ferry.destination)(
        ferry.destination.name,
        {
            "postgres": Endpoint(
                url=endpoint.url, admin_url=endpoint.admin_url, options={"capacity_bytes": 1000}
            )
        },
    )
    with ferry.opened() as move:
        move.open_capture()
        with pytest.raises(PermanentError, match="raise capacity_bytes"):
            move.copy()


def test_triggers_of_the_application_do_not_fire_for_moved_rows(ferry: Ferry) -> None:
    ferry.run(
        Side.DESTINATION,
        """
        CREATE FUNCTION public.spoil() RETURNS trigger LANGUAGE plpgsql
            AS $$ BEGIN NEW.title := 'spoilt'; RETURN NEW; END $$;
        CREATE TRIGGER spoil BEFORE INSERT ON public.issues
            FOR EACH ROW EXECUTE FUNCTION public.spoil();
        """,
    )
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        assert move.verify().ok
