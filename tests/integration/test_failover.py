"""Real standbys are promoted at the worst moments: what is confirmed stays, the rest is said.

In each case the organization can write again, the move completes after retries, and both sides are
equal. With a synchronous standby nothing that was acknowledged is lost.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import psycopg
import pytest

from cellferry import phases
from cellferry.errors import (
    Blocked,
    CellferryError,
    Halted,
    OutcomeUnknown,
    TransientError,
    WrongState,
)
from cellferry.migration import history, soak, steps
from cellferry.migration.barrier import hand_over
from cellferry.migration.context import attempt
from cellferry.model import Actor, Organization, Route, State
from cellferry.phases import Phase
from cellferry.settings import Settings
from cellferry.topology.connection import Database
from fixtures.cells import TwoCells
from fixtures.standby import STANDBY, Failover

MakeFailover = Callable[..., Failover]
BEING_MOVED, MOVED = "CF002", "CF001"

ORDER = (steps.copy, steps.sync, steps.verify, steps.cutover)


def acme(cells: TwoCells) -> Organization:
    return cells.add_organization(7, issues=400, comments=3)


@contextmanager
def during(acts: dict[Phase, Callable[[], object]]) -> Iterator[None]:
    """Do each act once, the first time that a step gets to its phase."""
    left = dict(acts)

    def hook(reached: Phase) -> None:
        if reached in left:
            left.pop(reached)()

    phases.listen(hook)
    try:
        yield
    finally:
        phases.listen(None)
    assert not left, f"nothing reached {list(left)}"


def drive(cells: TwoCells, migration: int, tries: int = 12) -> list[str]:
    """Run the steps as Airflow does: again while trying again may help. Return the errors."""
    errors: list[str] = []
    for step in ORDER:
        while True:
            try:
                with cells.context() as context:
                    step(context, migration)
            except TransientError as error:
                errors.append(f"{step.__name__}: {error.message}")
                assert len(errors) < tries, errors
                time.sleep(0.2)
            else:
                break
    return errors


def write(cells: TwoCells, cell: str, title: str = "issue 1") -> str | None:
    """Write as the application does; return the SQLSTATE of a refusal."""
    try:
        with cells.application(cell) as connection:
            connection.execute(
                "UPDATE issues SET counter = counter + 1 WHERE organization_id = 7 AND title = %s",
                (title,),
            )
    except psycopg.Error as error:
        return error.sqlstate or str(error)
    return None


class Writer:
    """A client that counts what was acknowledged, goes where the gate says, and reconnects."""

    def __init__(self, cells: TwoCells, title: str = "issue 2") -> None:
        self.acknowledged = 0
        self.unknown = 0
        self._cells = cells
        self._title = title
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.wait_for(5)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def wait_for(self, more: int) -> None:
        """Wait until `more` writes have been acknowledged."""
        wanted, deadline = self.acknowledged + more, time.monotonic() + 60
        while self.acknowledged < wanted:
            assert time.monotonic() < deadline, "the organization cannot write"
            time.sleep(0.01)

    def _work(self) -> None:
        cell = "cell-1"
        connection: psycopg.Connection[Any] | None = None
        while not self._stop.is_set():
            try:
                if connection is None or connection.closed:
                    connection = self._cells.application(cell, autocommit=True, connect_timeout=3)
                connection.execute(
                    "UPDATE issues SET counter = counter + 1"
                    " WHERE organization_id = 7 AND title = %s",
                    (self._title,),
                )
            except psycopg.Error as error:
                if error.sqlstate in {MOVED, BEING_MOVED}:
                    if error.sqlstate == MOVED:
                        connection.close()
                        cell = "cell-2"
                elif connection is not None and (connection.closed or connection.broken):
                    self.unknown += 1  # it may have been committed
                    connection.close()
                time.sleep(0.02)
            else:
                self.acknowledged += 1
                time.sleep(0.002)
        if connection is not None:
            connection.close()


def counter(cells: TwoCells, cell: str, title: str) -> int:
    with cells.admin(cell) as connection:
        row = connection.execute(
            "SELECT counter FROM issues WHERE organization_id = 7 AND title = %s", (title,)
        ).fetchone()
    assert row is not None
    return int(row[0])


def require_moved(cells: TwoCells, migration: int) -> None:
    """The route, both gates and the contents agree that it moved, and it can write there."""
    with cells.context() as context:
        assert context.topology.migration(migration).state is State.SOAKING
        assert context.topology.migration(migration).facts["handed_over"]
        assert context.topology.route("7").cell == "cell-2"
    assert cells.rows("cell-2", "7") == cells.rows("cell-1", "7")
    assert sorted(cells.keys("cell-2", "7")) == sorted(cells.keys("cell-1", "7"))
    assert write(cells, "cell-1") == MOVED
    assert write(cells, "cell-2") is None


PHASES = (
    Phase.COPY_BATCH,
    Phase.ROUND_DONE,
    Phase.FROZEN_ALL,
    Phase.FINISHED,
    Phase.FLIPPED,
)
#: From here on the cutover needs nothing of a cell but its gate, and goes through.
AFTER_LAST_DELTA = {Phase.FINISHED, Phase.FLIPPED}


# ── synchronous: nothing acknowledged is lost ───────────────────────────────────────────────────


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
@pytest.mark.parametrize("role", ["source", "destination"])
def test_a_synchronous_standby_is_promoted_and_nothing_acknowledged_is_lost(
    failover: MakeFailover, role: str, phase: Phase
) -> None:
    fail = failover(role, synchronous=True)
    cells = fail.cells
    migration = cells.plan(acme(cells))
    with Writer(cells) as writer:
        with during({phase: fail}):
            errors = drive(cells, migration)
        writer.wait_for(5)
    assert fail.happened
    assert errors or phase in AFTER_LAST_DELTA
    found = counter(cells, "cell-2", "issue 2")
    assert writer.acknowledged <= found <= writer.acknowledged + writer.unknown
    with cells.context() as context:
        assert context.topology.route("7").cell == "cell-2"
    assert write(cells, "cell-1") == MOVED
    repaired = cells.migration(migration).facts.get("repaired")
    assert repaired or phase in AFTER_LAST_DELTA, "the step that follows compares everything"
    assert not cells.migration(migration).facts.get("capture_lost")
    if repaired:
        assert repaired["postgres"]["compared"] > 1600


def test_after_the_hand_over_the_promoted_source_says_moved(failover: MakeFailover) -> None:
    fail = failover("source", synchronous=True)
    cells = fail.cells
    migration = cells.plan(acme(cells))
    drive(cells, migration)
    fail()
    require_moved(cells, migration)


# ── asynchronous: what was lost is lost on both sides, and the move still completes ─────────────


@pytest.mark.parametrize(
    "phase", [Phase.COPY_BATCH, Phase.ROUND_DONE], ids=lambda phase: phase.name
)
def test_a_source_that_lost_commits_is_followed_and_the_destination_has_no_row_too_many(
    failover: MakeFailover, phase: Phase
) -> None:
    fail = failover("source", synchronous=False)
    cells = accepting_lag(fail)
    migration = cells.plan(acme(cells))
    with cells.context() as context:
        if phase is Phase.ROUND_DONE:
            steps.copy(context, migration)
    fail.stop_streaming()
    # Acknowledged, and copied to the destination, and lost.
    with cells.application("cell-1") as connection:
        connection.execute("INSERT INTO issues VALUES (7999999, 7, 'lost', 1)")
        connection.execute("DELETE FROM issues WHERE organization_id = 7 AND title = 'issue 9'")
        connection.execute("UPDATE issues SET title = 'older' WHERE id = 7000011")
    with during({phase: fail}):
        errors = drive(cells, migration)
    assert any("may have lost commits" in error for error in errors) or phase is Phase.COPY_BATCH
    require_moved(cells, migration)
    titles = {row[2] for row in cells.rows("cell-2", "7")["issues"]}
    assert "lost" not in titles
    assert {"issue 9", "issue 11"} <= titles
    repaired = cells.migration(migration).facts["repaired"]["postgres"]["repaired"]
    assert repaired >= (3 if phase is Phase.ROUND_DONE else 0)


def test_a_failover_between_two_steps_is_noticed_before_anything_is_frozen(
    failover: MakeFailover,
) -> None:
    """Every connection is new, so nothing raises an error by itself."""
    fail = failover("source", synchronous=False)
    cells = accepting_lag(fail)
    migration = cells.plan(acme(cells))
    with cells.context() as context:
        for step in (steps.copy, steps.sync):
            step(context, migration)
        fail.stop_streaming()
        assert write(cells, "cell-1", "issue 3") is None
        for step in (steps.sync, steps.verify):
            step(context, migration)
        assert counter(cells, "cell-2", "issue 3") == 1
    fail()
    frozen: list[Phase] = []
    phases.listen(lambda phase: frozen.append(phase) if phase is Phase.FROZEN_ALL else None)
    try:
        with cells.context() as context, pytest.raises(TransientError, match="timeline 1 to 2"):
            steps.cutover(context, migration)
    finally:
        phases.listen(None)
    assert not frozen
    assert cells.migration(migration).facts["capture_lost"]["store"] == "cell-1/postgres"
    assert drive(cells, migration) == []
    require_moved(cells, migration)
    assert counter(cells, "cell-1", "issue 3") == 0


@pytest.mark.parametrize(
    "phase", [Phase.COPY_BATCH, Phase.ROUND_DONE], ids=lambda phase: phase.name
)
def test_a_destination_that_lost_moved_rows_gets_them_again(
    failover: MakeFailover, phase: Phase
) -> None:
    fail = failover("destination", synchronous=False)
    cells = accepting_lag(fail)
    migration = cells.plan(acme(cells), batch_rows=100)
    fail.stop_streaming()  # all that is moved from now on is lost: rows, gate, lease, checkpoints
    with during({phase: fail}):
        drive(cells, migration)
    require_moved(cells, migration)


@pytest.mark.parametrize("phase", [Phase.FLIPPED, Phase.RELEASED])
def test_a_destination_that_lost_the_last_delta_is_not_opened_without_it(
    failover: MakeFailover, phase: Phase
) -> None:
    """The controller lives: it brings the delta again before it opens the cell."""
    fail = failover("destination", synchronous=False)
    cells, migration = ready(fail)
    with (
        during({Phase.BARRIER_BEGUN: losing_the_delta(fail), phase: fail}),
        cells.context() as context,
    ):
        steps.cutover(context, migration)
    require_moved(cells, migration)
    assert counter(cells, "cell-2", "issue 5") == 1


@pytest.mark.parametrize("phase", [Phase.FLIPPED, Phase.RELEASED])
def test_an_old_cell_that_lost_the_last_delta_is_not_opened_without_it(
    failover: MakeFailover, phase: Phase
) -> None:
    """The same on the way back, where the gate says no more than `moved`."""
    fail = failover("source", synchronous=False)
    cells = accepting_lag(fail)
    migration = cells.plan(acme(cells), soak_s=0)
    drive(cells, migration)
    with cells.context() as context:
        steps.soak(context, migration)
        with during({Phase.BARRIER_BEGUN: losing_the_delta(fail, "cell-2"), phase: fail}):
            steps.roll_back(context, migration, "back")
        assert context.topology.migration(migration).facts["handed_back"]
    assert counter(cells, "cell-1", "issue 5") == 1
    assert cells.rows("cell-1", "7") == cells.rows("cell-2", "7")
    assert write(cells, "cell-1") is None


def test_a_retry_brings_the_last_delta_again_before_it_opens_the_destination(
    failover: MakeFailover,
) -> None:
    """The controller dies with the destination, after the flip."""
    fail = failover("destination", synchronous=False)
    cells, migration = ready(fail)

    def dies() -> None:
        fail()
        raise KilledError

    with (
        during({Phase.BARRIER_BEGUN: losing_the_delta(fail), Phase.FLIPPED: dies}),
        cells.context() as context,
        pytest.raises(KilledError),
    ):
        steps.cutover(context, migration)
    assert write(cells, "cell-1") == BEING_MOVED
    assert write(cells, "cell-2") is not None, "nobody is let in before the delta is there"
    with cells.context() as context:
        steps.cutover(context, migration)
    assert cells.migration(migration).facts["restored"]
    require_moved(cells, migration)
    assert counter(cells, "cell-2", "issue 5") == 1


# ── after the flip: the new cell has authority, and loses commits ───────────────────────────────


def soaking(fail: Failover) -> tuple[TwoCells, int]:
    """Moved, with a row written since, of which the old copy has heard and the standby has not."""
    cells = accepting_lag(fail)
    migration = cells.plan(acme(cells), soak_s=0)
    drive(cells, migration)
    with cells.context() as context:
        steps.soak(context, migration)
        fail.stop_streaming()
        with cells.application("cell-2") as connection:
            connection.execute("INSERT INTO issues VALUES (7999999, 7, 'only here', 1)")
        soak.reverse_round(context, migration)
    return cells, migration


def titles(cells: TwoCells, cell: str) -> set[str]:
    return {row[2] for row in cells.rows(cell, "7")["issues"]}


def test_what_the_new_cell_lost_is_not_deleted_in_the_old_copy_unless_a_person_accepts_it(
    failover: MakeFailover,
) -> None:
    fail = failover("destination", synchronous=False)
    cells, migration = soaking(fail)
    fail()
    assert "only here" not in titles(cells, "cell-2")
    with cells.context() as context:
        with pytest.raises(Halted, match="has authority, so what it lost cannot be told"):
            soak.reverse_round(context, migration)
        for _ in range(2):  # a roll-back works on a halted migration, and must not repair either
            with pytest.raises(Halted, match="Clearing it accepts"):
                steps.roll_back(context, migration, "it lost rows")
        assert context.topology.migration(migration).facts["capture_lost"]["halted"]
        assert "only here" in titles(cells, "cell-1")
        assert context.topology.route("7").cell == "cell-2"

        context.topology.clear_halt("migration", str(migration), "accepted", Actor("ada"))
        steps.roll_back(context, migration, "it lost rows")
        assert context.topology.route("7").cell == "cell-1"
        assert not context.topology.migration(migration).facts["capture_lost"]
    assert "only here" not in titles(cells, "cell-1")


def test_clearing_another_halt_accepts_no_loss(failover: MakeFailover) -> None:
    fail = failover("destination", synchronous=False)
    cells, migration = soaking(fail)
    with cells.context() as context:
        context.topology.set_halted(migration, "something else", Actor("ada"))
        fail()
        with pytest.raises(Halted, match="Clearing it accepts"):
            steps.roll_back(context, migration, "it lost rows")
        context.topology.clear_halt("migration", str(migration), "that is over", Actor("ada"))
        with pytest.raises(Halted, match="Clearing it accepts"):
            steps.roll_back(context, migration, "it lost rows")
        halted = context.topology.migration(migration).halted
        assert halted is not None
        assert "Clearing it accepts" in halted
    assert "only here" in titles(cells, "cell-1")


def test_a_new_cell_without_its_gate_is_not_followed(failover: MakeFailover) -> None:
    """A backup from before the migration: no gate row, and no rows."""
    fail = failover("destination", synchronous=False)
    cells, migration = soaking(fail)
    fail()
    with cells.admin("cell-2") as connection:
        connection.execute("DELETE FROM cellferry.gate")
        connection.execute("DELETE FROM comments")
        connection.execute("DELETE FROM issues")
    before = cells.rows("cell-1", "7")
    with cells.context() as context:
        with pytest.raises(Halted):
            soak.reverse_round(context, migration)
        context.topology.clear_halt("migration", str(migration), "too early", Actor("ada"))
        with pytest.raises(WrongState, match="the gate of cell-2 is absent"):
            soak.reverse_round(context, migration)
    with cells.admin("cell-2") as connection:
        assert connection.execute("SELECT count(*) FROM cellferry.gate").fetchone() == (0,)
    assert cells.rows("cell-1", "7") == before


def test_a_failover_that_lost_the_open_is_restored_although_soak_saw_it_first(
    failover: MakeFailover,
) -> None:
    fail = failover("destination", synchronous=False)
    cells, migration = ready(fail)
    with (
        during({Phase.BARRIER_BEGUN: losing_the_delta(fail)}),
        cells.context() as context,
    ):
        steps.cutover(context, migration)
    fail()
    assert write(cells, "cell-2") is not None, "the open is lost"
    with cells.context() as context:
        with pytest.raises(Halted):
            steps.soak(context, migration)
        assert context.topology.migration(migration).facts["handed_over"]
        with attempt(
            context, migration, "reap", frozenset({State.SOAKING}), stoppable=False
        ) as at:  # as the reaper does, which finds the gate of cell-2 not opened
            history.restore(at)
            hand_over(at)
        assert not context.topology.migration(migration).facts["capture_lost"]
    require_moved(cells, migration)
    assert counter(cells, "cell-2", "issue 5") == 1


def test_soak_leaves_an_unfinished_hand_over_to_the_cutover(failover: MakeFailover) -> None:
    fail = failover("destination", synchronous=False)
    cells, migration = ready(fail)

    def dies() -> None:
        fail()
        raise KilledError

    with (
        during({Phase.BARRIER_BEGUN: losing_the_delta(fail), Phase.FLIPPED: dies}),
        cells.context() as context,
        pytest.raises(KilledError),
    ):
        steps.cutover(context, migration)
    with cells.context() as context:
        with pytest.raises(WrongState, match="hand-over after the flip was not finished"):
            steps.soak(context, migration)
        steps.cutover(context, migration)
    require_moved(cells, migration)
    assert counter(cells, "cell-2", "issue 5") == 1


def test_an_old_cell_that_was_opened_before_its_failover_counts_as_handed_back(
    failover: MakeFailover,
) -> None:
    """The controller died after the hand-over, before it recorded it."""
    fail = failover("source", synchronous=True)
    cells = fail.cells
    migration = cells.plan(acme(cells))
    drive(cells, migration)

    def dies() -> None:
        raise KilledError

    with cells.context() as context:
        steps.soak(context, migration)
        with during({Phase.HAND_OVER_KEPT: dies}), pytest.raises(KilledError):
            steps.roll_back(context, migration, "back")
        assert not context.topology.migration(migration).facts.get("handed_back")
    fail()
    with cells.context() as context:
        steps.roll_back(context, migration, "back")
        assert context.topology.migration(migration).facts["handed_back"]
    assert write(cells, "cell-1") is None


# ── asynchronous candidates that a cutover waits for ────────────────────────────────────────────


def test_plan_says_what_an_asynchronous_standby_means(failover: MakeFailover) -> None:
    fail = failover("source", synchronous=False)
    organization = acme(fail.cells)
    with pytest.raises(Blocked, match="standbys do not confirm commits: standby-1"):
        fail.cells.plan(organization)
    with_options(fail, failover_candidates=["standby-2"])
    with pytest.raises(Blocked, match="do not stream from this server: standby-2"):
        fail.cells.plan(organization)
    with_options(fail, failover_candidates=[STANDBY])
    migration = fail.cells.migration(fail.cells.plan(organization))
    warnings = {blocker["code"] for blocker in migration.facts["plan"]["blockers"]}
    assert "candidate-is-asynchronous" in warnings


def test_a_named_candidate_has_the_frozen_gate_before_the_route_is_flipped(
    failover: MakeFailover,
) -> None:
    """Its primary dies right after the flip, before `moved` was written."""
    fail = failover("source", synchronous=False)
    cells = with_options(fail, failover_candidates=[STANDBY])
    migration = cells.plan(acme(cells))
    found: list[str | None] = []

    def looks() -> None:
        fail()
        found.append(write(cells, "cell-1"))

    with during({Phase.FLIPPED: looks}):
        drive(cells, migration)
    assert found == [BEING_MOVED]
    require_moved(cells, migration)


def test_a_candidate_that_does_not_confirm_keeps_the_route_where_it_is(
    failover: MakeFailover,
) -> None:
    fail = failover("source", synchronous=False)
    cells = with_options(fail, failover_candidates=[STANDBY], failover_wait_s=0.5)
    migration = cells.plan(acme(cells))
    with cells.context() as context:
        for step in (steps.copy, steps.sync, steps.verify):
            step(context, migration)
        with (
            during({Phase.BARRIER_BEGUN: fail.stop_streaming}),
            pytest.raises(TransientError, match=r"did not confirm within 0\.5 s: standby-1"),
        ):
            steps.cutover(context, migration)
        assert context.topology.migration(migration).state is State.READY
        assert context.topology.route("7").cell == "cell-1"
        assert write(cells, "cell-1") is None
        reached: list[Phase] = []
        phases.listen(reached.append)
        try:
            with pytest.raises(TransientError, match=r"did not confirm within 0\.5 s: standby-1"):
                steps.cutover(context, migration)
        finally:
            phases.listen(None)
    assert Phase.FROZEN_ALL not in reached, "the next cutover asks before it stops anybody"


# ── the topology ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "phase", [Phase.COPY_BATCH, Phase.FINISHED, Phase.FLIPPED], ids=lambda phase: phase.name
)
def test_the_topologys_synchronous_standby_is_promoted(
    failover: MakeFailover, phase: Phase
) -> None:
    fail = failover("topology", synchronous=True)
    cells = fail.cells
    migration = cells.plan(acme(cells))
    with Writer(cells) as writer:
        with during({phase: fail}):
            drive(cells, migration)
        writer.wait_for(5)
    assert counter(cells, "cell-2", "issue 2") == writer.acknowledged
    with cells.context() as context:
        assert context.topology.route("7") == Route("7", "cell-2", 2)
        audit = [entry.action for entry in context.topology.audit(migration)]
    assert audit.count("flip") <= 1
    assert write(cells, "cell-1") == MOVED


def test_a_flip_that_an_asynchronous_topology_lost_does_not_open_the_old_cell(
    failover: MakeFailover,
) -> None:
    """Where the guarantee ends: the topology forgot the flip, and the gates remember it.

    Applications go on: a route that is too old is corrected by the gate's answer.
    """
    fail = failover("topology", synchronous=False)
    cells = fail.cells
    migration = cells.plan(acme(cells))
    with cells.context() as context:
        for step in (steps.copy, steps.sync, steps.verify):
            step(context, migration)
    with (
        during({Phase.BARRIER_BEGUN: fail.stop_streaming, Phase.RELEASED: fail}),
        cells.context() as context,
        contextlib.suppress(CellferryError),
    ):
        steps.cutover(context, migration)
    with cells.context() as context:
        assert context.topology.route("7") == Route("7", "cell-1", 1)
        with pytest.raises(WrongState, match="cannot be thawed"):
            steps.cutover(context, migration)
        with pytest.raises(CellferryError):
            steps.abort(context, migration, "the topology says that it was not flipped")
    assert write(cells, "cell-1") == MOVED
    assert write(cells, "cell-2") is None


def test_a_change_that_the_topologys_standby_does_not_confirm_is_not_taken_for_made(
    failover: MakeFailover,
) -> None:
    """A commit waits for the standby; if somebody cancels that, it ends without an error."""
    fail = failover("topology", synchronous=True)
    fail.stop_streaming()
    stop = threading.Event()

    def cancel() -> None:
        with psycopg.connect(fail.primary.url(), autocommit=True) as connection:
            while not stop.wait(0.05):
                connection.execute(
                    "SELECT pg_cancel_backend(pid) FROM pg_stat_activity"
                    " WHERE wait_event = 'SyncRep'"
                )

    def change(connection: psycopg.Connection[Any]) -> None:
        connection.execute("UPDATE topology.cell SET region = 'elsewhere'")

    impatient = threading.Thread(target=cancel)
    impatient.start()
    database = Database(fail.cells.connections["cellferry-topology"])
    try:
        with pytest.raises(OutcomeUnknown, match="standby did not confirm"):
            database.run(change, repeatable=False)
    finally:
        stop.set()
        impatient.join()
        database.close()


class KilledError(BaseException):
    """The controller's process ends here."""


def ready(fail: Failover) -> tuple[TwoCells, int]:
    """Bring a migration to `ready`, with a standby that may lag."""
    cells = accepting_lag(fail)
    migration = cells.plan(acme(cells))
    with cells.context() as context:
        for step in (steps.copy, steps.sync, steps.verify):
            step(context, migration)
    return cells, migration


def losing_the_delta(fail: Failover, cell: str = "cell-1") -> Callable[[], None]:
    """Return an act: the standby gets nothing any more, and then `cell` has something to bring."""

    def act() -> None:
        fail.stop_streaming()
        assert write(fail.cells, cell, "issue 5") is None

    return act


def accepting_lag(fail: Failover) -> TwoCells:
    """The deployment says in cells.yaml that its standby may lag."""
    return with_options(fail, standbys_may_lag=True)


def with_options(fail: Failover, **options: Any) -> TwoCells:
    """Set options of the store that has the standby, as in cells.yaml."""
    cells = fail.cells
    document = cells.settings.model_dump()
    for name, cell in document["cells"].items():
        if f":{fail.standby.port}" in cells.connections[f"{name}-postgres"]:
            cell["stores"]["postgres"].update(options)
    cells.settings = Settings.model_validate(document)
    return cells
