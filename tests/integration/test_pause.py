"""Pause and resume; a key log over its budget, given up and made good."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from cellferry import phases
from cellferry.errors import Halted, InvalidInput, LeaseLost, Paused, WrongState
from cellferry.migration import pause as pausing
from cellferry.migration import steps
from cellferry.migration.context import StepProgress
from cellferry.model import Organization, State
from cellferry.phases import Phase
from cellferry.stores.postgres import gate, store
from fixtures.cells import NO_TRACES, TwoCells

WHY = "release tonight"


@pytest.fixture
def acme(cells: TwoCells) -> Organization:
    cells.add_organization(8)  # a neighbour that stays
    return cells.add_organization(7, issues=400)


@contextmanager
def listening(hook: Callable[[Phase], None]) -> Iterator[None]:
    phases.listen(hook)
    try:
        yield
    finally:
        phases.listen(None)


def pause(cells: TwoCells, migration: int) -> None:
    """As somebody else does it."""
    with cells.context() as context:
        steps.pause(context, migration, WHY)


def resume(cells: TwoCells, migration: int) -> str:
    with cells.context() as context:
        return steps.resume(context, migration, "released").summary


def ready(cells: TwoCells, organization: Organization, **options: Any) -> int:
    migration = cells.plan(organization, **options)
    with cells.context() as context:
        for step in (steps.copy, steps.sync, steps.verify):
            step(context, migration)
    return migration


def change(cells: TwoCells, statement: str = "") -> None:
    """Write as the application does, every kind of change."""
    with cells.application("cell-1") as connection:
        if statement:
            connection.execute(statement.encode())
            return
        connection.execute(
            "UPDATE issues SET counter = counter + 1 WHERE organization_id = 7 AND id % 7 = 0"
        )
        connection.execute("DELETE FROM comments WHERE id % 11 = 0 AND issue_id / 1000000 = 7")
        connection.execute(
            "INSERT INTO issues SELECT 7000000 + 5000 + n, 7, 'later ' || n"
            " FROM generate_series(1, 50) n"
        )
        connection.execute(
            "INSERT INTO comments SELECT 700500000 + n, 7005001, 'later' FROM generate_series(1, 9)"
            " n"
        )


def log_rows(cells: TwoCells, cell: str = "cell-1") -> int:
    with cells.admin(cell) as connection:
        row = connection.execute(
            "SELECT count(*) FROM cellferry.key_log WHERE organization = '7'"
        ).fetchone()
    return row[0] if row else 0


def gates(cells: TwoCells, cell: str) -> list[tuple[Any, ...]]:
    with cells.admin(cell) as connection:
        return connection.execute(
            "SELECT state, armed FROM cellferry.gate WHERE organization = '7'"
        ).fetchall()


def insist_on_equal_cells(cells: TwoCells) -> None:
    assert cells.rows("cell-2", "7") == cells.rows("cell-1", "7")
    assert sorted(cells.keys("cell-2", "7")) == sorted(cells.keys("cell-1", "7"))


# ── pause and resume ────────────────────────────────────────────────────────────────────────────


def test_a_paused_copy_stops_at_its_next_batch_and_goes_on_from_there(
    cells: TwoCells, acme: Organization
) -> None:
    migration = cells.plan(acme, rows_per_s=400, batch_rows=100)
    batches: list[Phase] = []

    def hook(phase: Phase) -> None:
        if phase is Phase.COPY_BATCH:
            batches.append(phase)
            if len(batches) == 1:
                pause(cells, migration)

    with listening(hook), cells.context() as context, pytest.raises(Paused, match=WHY) as stopped:
        steps.copy(context, migration)
    assert "paused by test: release tonight" in str(stopped.value)
    assert "cellferry resume" in str(stopped.value)
    paused_at = len(batches)
    change(cells)  # the organization goes on, and its changes are logged
    assert log_rows(cells) > 0
    found = cells.migration(migration)
    assert (found.state, found.paused, found.paused_by) == (State.COPYING, True, "test")
    assert found.paused_at is not None

    assert "run the step that stopped again" in resume(cells, migration)
    with listening(hook), cells.context() as context:
        result = steps.copy(context, migration)
        assert result.facts["postgres"]["recopied"] <= 100
        for step in (steps.sync, steps.verify):
            step(context, migration)
        insist_on_equal_cells(cells)
        steps.cutover(context, migration)
    assert len(batches) > paused_at


def test_pausing_and_resuming_twice_is_harmless(cells: TwoCells, acme: Organization) -> None:
    migration = cells.plan(acme)
    with cells.context() as context:
        assert not steps.pause(context, migration, WHY).repeated
        assert steps.pause(context, migration, "another reason").repeated
        assert cells.migration(migration).paused_reason == WHY
        with pytest.raises(Paused):
            steps.copy(context, migration)
        assert not steps.resume(context, migration, "released").repeated
        again = steps.resume(context, migration, "released")
        assert (again.repeated, again.summary) == (True, "is not paused")
        steps.copy(context, migration)
        actions = [
            (row.action, row.reason)
            for row in context.topology.audit(migration)
            if row.action in {"paused", "resumed"}
        ]
    assert actions == [("paused", WHY), ("resumed", "released")]


def test_two_who_resume_at_once_agree(cells: TwoCells, acme: Organization) -> None:
    migration = cells.plan(acme)
    pause(cells, migration)
    start = threading.Barrier(3)

    def work(_: int) -> None:
        with cells.context() as context:
            context.topology.now()
            start.wait()
            steps.resume(context, migration, "released")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    with cells.context() as context:
        resumed = [row for row in context.topology.audit(migration) if row.action == "resumed"]
    assert len(resumed) == 1
    assert not cells.migration(migration).paused


@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_a_reason_is_needed(cells: TwoCells, acme: Organization, verb: str) -> None:
    migration = cells.plan(acme)
    with cells.context() as context, pytest.raises(InvalidInput, match="needs a reason"):
        getattr(steps, verb)(context, migration, "  ")


@pytest.mark.parametrize(
    "phase", [Phase.BARRIER_BEGUN, Phase.FROZEN_ONE, Phase.FROZEN_ALL, Phase.FINISHED]
)
@pytest.mark.parametrize("strategy", ["online", "freeze-first"])
def test_a_pause_during_the_barrier_does_not_interrupt_it(
    cells: TwoCells,
    acme: Organization,
    monkeypatch: pytest.MonkeyPatch,
    phase: Phase,
    strategy: str,
) -> None:
    from cellferry.migration.context import StepProgress

    # asked at every batch, so that whatever asks under the gate hears of it
    monkeypatch.setattr(StepProgress, "CHECK_EVERY_S", 0.0)
    migration = ready(cells, acme, strategy=strategy, pause_budget_ms=600_000)
    said: list[str] = []

    def hook(reached: Phase) -> None:
        if reached is phase and not said:
            with cells.context() as other:
                said.append(steps.pause(other, migration, WHY).summary)

    with listening(hook), cells.context() as context:
        steps.cutover(context, migration)
        assert said == ["paused: the cutover that is under way ends first"]
        assert context.topology.route("7").cell == "cell-2"
        with pytest.raises(Paused):
            steps.soak(context, migration)
        resume(cells, migration)
        steps.soak(context, migration)


def test_a_pause_before_the_barrier_freezes_nobody(cells: TwoCells, acme: Organization) -> None:
    migration = ready(cells, acme)
    reached: list[Phase] = []

    def hook(phase: Phase) -> None:
        reached.append(phase)
        if phase is Phase.CAUGHT_UP:
            pause(cells, migration)

    with listening(hook), cells.context() as context, pytest.raises(Paused):
        steps.cutover(context, migration)
    assert Phase.BARRIER_BEGUN not in reached
    assert cells.migration(migration).state is State.READY


def test_a_paused_retained_migration_is_not_cleaned_up(cells: TwoCells, acme: Organization) -> None:
    migration = ready(cells, acme)
    with cells.context() as context:
        for step in (steps.cutover, steps.soak):
            step(context, migration)
        assert "not cleaned up" in steps.pause(context, migration, WHY).summary
        with pytest.raises(Paused):
            steps.cleanup(context, migration)
        assert any(cells.rows("cell-1", "7").values())
        steps.resume(context, migration, "released")
        steps.cleanup(context, migration)
        with pytest.raises(WrongState, match="nothing to pause"):
            steps.pause(context, migration, WHY)


def test_a_paused_migration_can_be_aborted(cells: TwoCells, acme: Organization) -> None:
    migration = ready(cells, acme)
    pause(cells, migration)
    with cells.context() as context:
        steps.abort(context, migration, "no more")
    assert (cells.traces("cell-1"), cells.traces("cell-2")) == (NO_TRACES, NO_TRACES)


# ── the key log's budget ────────────────────────────────────────────────────────────────────────


def overfill(cells: TwoCells, rows: int = 1_200) -> None:
    """Changes that wait in the log: more than the smallest budget."""
    with cells.application("cell-1") as connection:
        for _ in range(-(-rows // 400)):
            connection.execute("UPDATE issues SET counter = counter + 1 WHERE organization_id = 7")


@pytest.mark.parametrize("state", [State.COPYING, State.SYNCING, State.READY])
def test_a_paused_log_over_its_budget_is_given_up_and_made_good_after_the_resume(
    cells: TwoCells, acme: Organization, state: State
) -> None:
    migration = cells.plan(acme, log_budget_rows=1_000, rows_per_s=4000, batch_rows=200)
    neighbour = cells.rows("cell-1", "8")
    paused: list[Phase] = []

    def hook(phase: Phase) -> None:
        if phase is Phase.COPY_BATCH and state is State.COPYING and not paused:
            if not cells.rows("cell-2", "7")["issues"]:
                return  # what will have changed unseen is to be among what was copied
            paused.append(phase)
            pause(cells, migration)
            time.sleep(StepProgress.CHECK_EVERY_S)  # the next batch asks

    with listening(hook), cells.context() as context:
        if state is State.COPYING:
            with pytest.raises(Paused):
                steps.copy(context, migration)
        else:
            steps.copy(context, migration)
        if state is State.READY:
            steps.sync(context, migration)
            steps.verify(context, migration)
        assert cells.migration(migration).state is state
        steps.pause(context, migration, WHY)

        change(cells)
        assert steps.watch(context, quiet_s=0).given_up == (), "within its budget it is kept"
        assert gates(cells, "cell-1") == [("open", True)]
        overfill(cells)
        (given_up,) = steps.watch(context, quiet_s=0).given_up
        assert given_up.startswith("org-7: the key log in postgres at cell-1 holds 1,001")

        assert (log_rows(cells), gates(cells, "cell-1")) == (0, [])
        assert gates(cells, "cell-2") == [("importing", False)], "the copy stays closed"
        found = cells.migration(migration)
        assert found.state is (State.COPYING if state is State.COPYING else State.SYNCING)
        assert "over its budget of 1,000" in found.facts["capture_lost"]["reason"]
        assert steps.watch(context, quiet_s=0).given_up == (), "once"
        (row,) = [r for r in context.topology.audit(migration) if r.action == "key log given up"]
        assert (row.actor, row.role) == ("cellferry", "system")

        change(
            cells,
            "UPDATE issues SET title = title || ' unseen' WHERE id IN (7000003, 7000004);"
            "DELETE FROM comments WHERE issue_id = 7000009; DELETE FROM issues WHERE id = 7000009",
        )
        assert log_rows(cells) == 0, "nobody logs"
        assert "sync compares everything and repairs" in resume(cells, migration)
        for step in (steps.copy, steps.sync, steps.verify):
            step(context, migration)
        found = cells.migration(migration)
        assert found.facts["capture_lost"] is None
        assert 0 < found.facts["repaired"]["postgres"]["repaired"] < 1_500
        insist_on_equal_cells(cells)
        change(cells, "UPDATE issues SET counter = -1 WHERE id = 7000005")
        steps.cutover(context, migration)
        with cells.admin("cell-2") as connection:
            row_ = connection.execute("SELECT counter FROM issues WHERE id = 7000005").fetchone()
        assert row_ == (-1,)
        steps.soak(context, migration)
        steps.cleanup(context, migration)
    assert cells.rows("cell-1", "8") == neighbour
    assert (cells.traces("cell-1"), cells.traces("cell-2")) == (NO_TRACES, NO_TRACES)


def test_writers_go_on_while_a_log_is_given_up(cells: TwoCells, acme: Organization) -> None:
    """And none of what they write is lost, on whichever side of the closing it falls."""
    migration = ready(cells, acme)
    pause(cells, migration)
    stop = threading.Event()
    written = [0, 0, 0]

    def write(number: int) -> None:
        with cells.application("cell-1", autocommit=True) as connection:
            while not stop.is_set():
                connection.execute(
                    "UPDATE issues SET counter = counter + 1 WHERE id = %s", (7000001 + number,)
                )
                written[number] += 1

    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(write, number) for number in range(3)]
        try:
            with cells.context() as context:
                for _ in range(3):
                    assert pausing.give_up_log(context, migration, "by hand")
                resume(cells, migration)
                steps.sync(context, migration)
                steps.verify(context, migration)
        finally:
            stop.set()
        for writer in writers:
            writer.result(30)
    with cells.context() as context:
        steps.cutover(context, migration)
    with cells.admin("cell-2") as connection:
        found = connection.execute(
            "SELECT counter FROM issues WHERE id BETWEEN 7000001 AND 7000003 ORDER BY id"
        ).fetchall()
    assert [counter for (counter,) in found] == written


def test_a_long_log_is_deleted_in_batches(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "LOG_BATCH", 100)
    migration = ready(cells, acme)
    pause(cells, migration)
    overfill(cells)
    with cells.context() as context:
        assert pausing.give_up_log(context, migration, "by hand")
    assert (log_rows(cells), gates(cells, "cell-1")) == (0, [])


def test_a_killed_giving_up_is_finished_by_the_next_look(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = ready(cells, acme, log_budget_rows=1_000)
    pause(cells, migration)
    overfill(cells)
    real = gate.disarm

    class Killed(BaseException):
        pass

    def killed(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(gate, "disarm", killed)
    with cells.context() as context, pytest.raises(Killed):
        steps.watch(context, quiet_s=0)
    found = cells.migration(migration)
    assert (found.state, bool(found.facts["capture_lost"])) == (State.SYNCING, True)
    monkeypatch.setattr(gate, "disarm", real)
    change(cells)  # still armed: it goes on growing
    with cells.context() as context:
        assert len(steps.watch(context, quiet_s=0).given_up) == 1
        assert (log_rows(cells), gates(cells, "cell-1")) == (0, [])
        resume(cells, migration)
        for step in (steps.sync, steps.verify, steps.cutover):
            step(context, migration)
    with cells.admin("cell-2") as connection:
        row = connection.execute("SELECT count(*) FROM issues WHERE organization_id = 7").fetchone()
    assert row == (450,)


def test_who_resumes_meanwhile_keeps_the_log(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log is given up in the topology, and before it is closed somebody resumes and syncs."""
    migration = ready(cells, acme)
    pause(cells, migration)
    change(cells)
    real = store.PostgresMove.drop_capture

    def late(self: store.PostgresMove) -> None:
        monkeypatch.undo()
        resume(cells, migration)
        with cells.context() as context:
            steps.sync(context, migration)
        change(cells, "UPDATE issues SET counter = 1000 WHERE id = 7000002")
        assert log_rows(cells) == 1
        real(self)

    monkeypatch.setattr(store.PostgresMove, "drop_capture", late)
    with cells.context() as context, pytest.raises(LeaseLost):
        pausing.give_up_log(context, migration, "by hand")
    assert (log_rows(cells), gates(cells, "cell-1")) == (1, [("open", True)])
    with cells.context() as context:
        for step in (steps.sync, steps.verify):
            step(context, migration)
        insist_on_equal_cells(cells)


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "cutting over"])
def test_no_log_is_given_up_under_a_migration_that_goes_on(
    cells: TwoCells, acme: Organization, stopped: bool
) -> None:
    migration = ready(cells, acme)
    given_up: list[bool] = []

    def hook(phase: Phase) -> None:
        if phase is Phase.FROZEN_ALL:
            with cells.context() as other:
                if stopped:
                    steps.pause(other, migration, WHY)
                given_up.append(pausing.give_up_log(other, migration, "by hand"))

    with cells.context() as context:
        assert not pausing.give_up_log(context, migration, "by hand")
        with listening(hook):
            steps.cutover(context, migration)
    assert given_up == [False]
    assert cells.migration(migration).state is State.SOAKING


def test_a_log_over_its_budget_halts_a_migration_that_is_not_paused(
    cells: TwoCells, acme: Organization
) -> None:
    migration = ready(cells, acme, log_budget_rows=1_000, cohort="wave-1")
    overfill(cells)
    with cells.context() as context:
        (halted,) = steps.watch(context, quiet_s=0).halted
        assert "holds 1,001 changes or more, over its budget of 1,000" in halted
        found = cells.migration(migration)
        assert "over its budget" in (found.halted or "")
        assert found.facts.get("capture_lost") is None
        with pytest.raises(Halted):
            steps.cutover(context, migration)
        assert steps.watch(context, quiet_s=0).given_up == (), "a person has time to clear it"
        assert log_rows(cells) >= 1_200
        overfill(cells)
        assert len(steps.watch(context, quiet_s=0).given_up) == 1, "but not without end"
        steps.clear_halt(context, "organization", "org-7", "a larger disk")
        for step in (steps.sync, steps.verify, steps.cutover):
            step(context, migration)
    with cells.admin("cell-2") as connection:
        row = connection.execute(
            "SELECT min(counter), max(counter) FROM issues WHERE organization_id = 7"
        ).fetchone()
    assert row == (6, 6)


def test_a_round_that_leaves_too_much_halts_the_migration(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = cells.plan(acme, log_budget_rows=1_000)
    with cells.context() as context:
        steps.copy(context, migration)
        written: list[Phase] = []

        def hook(phase: Phase) -> None:
            if phase is Phase.ROUND_APPLIED and not written:
                written.append(phase)
                overfill(cells)

        with listening(hook), pytest.raises(Halted, match="over its budget"):
            steps.sync(context, migration)
        assert "over its budget" in (cells.migration(migration).halted or "")


def test_a_log_is_not_given_up_while_somebody_is_heard_of(
    cells: TwoCells, acme: Organization
) -> None:
    migration = ready(cells, acme, log_budget_rows=1_000)
    pause(cells, migration)
    overfill(cells)
    with cells.context() as context:
        assert steps.watch(context, quiet_s=3_600).given_up == ()
    assert log_rows(cells) >= 1_200


def test_a_cell_that_does_not_answer_does_not_keep_the_others_from_being_looked_at(
    cells: TwoCells, acme: Organization
) -> None:
    other = cells.add_organization(9, issues=400)
    ready(cells, acme, log_budget_rows=1_000)
    ready(cells, other, log_budget_rows=1_000)
    overfill(cells)
    with cells.context() as context:
        real = context.dry_move

        def dry_move(organization: Organization, *rest: Any) -> Any:
            if organization.id == "9":
                cells.connections["cell-1-postgres"], kept = (
                    "postgresql://nobody@127.0.0.1:9/none",
                    cells.connections["cell-1-postgres"],
                )
                try:
                    return real(organization, *rest)
                finally:
                    cells.connections["cell-1-postgres"] = kept
            return real(organization, *rest)

        context.dry_move = dry_move  # type: ignore[method-assign]
        found = steps.watch(context, quiet_s=0)
    assert [line.split(":")[0] for line in found.halted] == ["org-7"]
    assert [line.split(":")[0] for line in found.failed] == ["org-9"]


def test_a_row_that_only_the_log_knew_is_not_left_behind(
    cells: TwoCells, acme: Organization
) -> None:
    """A child that was copied before its parent: without the log nobody can tell whose it is."""
    migration = ready(cells, acme)
    key = 700_000_199
    with cells.admin("cell-2") as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute("INSERT INTO comments VALUES (%s, %s, 'early')", (key, key))
    with cells.admin("cell-1") as connection:
        connection.execute(
            "INSERT INTO cellferry.key_log (organization, relation, key)"
            " VALUES ('7', 'public.comments', ARRAY[%s])",
            (str(key),),
        )
    pause(cells, migration)
    with cells.context() as context:
        assert pausing.give_up_log(context, migration, "by hand")
        steps.abort(context, migration, "no more")
    with cells.admin("cell-2") as connection:
        left = connection.execute("SELECT count(*) FROM comments WHERE id = %s", (key,)).fetchone()
    assert left == (0,)
    assert (cells.traces("cell-1"), cells.traces("cell-2")) == (NO_TRACES, NO_TRACES)


def test_a_step_that_has_not_noticed_its_pause_loses_the_migration(
    cells: TwoCells, acme: Organization
) -> None:
    """Else it would go on as if the log were whole."""
    migration = cells.plan(acme, rows_per_s=4000, batch_rows=200)
    given_up: list[bool] = []

    def hook(phase: Phase) -> None:
        if phase is Phase.COPY_BATCH and not given_up:
            pause(cells, migration)
            with cells.context() as other:
                given_up.append(pausing.give_up_log(other, migration, "by hand"))
            resume(cells, migration)

    with listening(hook), cells.context() as context, pytest.raises(LeaseLost):
        steps.copy(context, migration)
    found = cells.migration(migration)
    assert (found.state, given_up, found.attempt) == (State.COPYING, [True], 2)
    with cells.context() as context:
        for step in (steps.copy, steps.sync, steps.verify):
            step(context, migration)
    insist_on_equal_cells(cells)
