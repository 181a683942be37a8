"""Halts of migrations, cohorts and cells: what sets them, what they stop, how they are cleared."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from cellferry import phases
from cellferry.errors import (
    Halted,
    InvalidInput,
    LeaseLost,
    NotConverging,
    TransientError,
    VerificationFailed,
    WrongState,
)
from cellferry.migration import Context, MoveOptions, barrier, halts, steps
from cellferry.model import Activity, Actor, Organization, State
from cellferry.phases import Phase
from cellferry.settings import ErrorLimits
from cellferry.topology import HaltScope
from fixtures.cells import TwoCells
from fixtures.topology import ACTOR, Bench

BOSS = Actor("boss")


# ── in the topology ─────────────────────────────────────────────────────────────────────────────


def in_cohort(bench: Bench, organization: str, cohort: str | None, **options: Any) -> int:
    return bench.topology.create_migration(
        organization, "cell-2", "online", options, None, ACTOR, cohort=cohort
    ).id


def stopped_by(bench: Bench, migration: int) -> str | None:
    attempt = bench.topology.take_lease(migration, "test", ACTOR)
    try:
        bench.topology.check_lease(migration, attempt)
    except Halted as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("scope", "name", "says"),
    [
        ("migration", "1", "the migration is halted by boss: look at it"),
        ("cohort", "wave-1", "cohort wave-1 is halted by boss: look at it"),
        ("cell", "cell-1", "cell cell-1 is halted by boss: look at it"),
        ("cell", "cell-2", "cell cell-2 is halted by boss: look at it"),
    ],
)
def test_a_halt_stops_who_it_is_for_until_it_is_cleared(
    bench: Bench, scope: str, name: str, says: str
) -> None:
    migration = in_cohort(bench, "1", "wave-1")
    assert bench.topology.halt(scope, name, "look at it", BOSS)

    message = stopped_by(bench, migration) or ""
    assert says in message
    assert "cellferry clear-halt" in message

    cleared = bench.topology.clear_halt(scope, name, "it is gone", ACTOR)
    assert cleared is not None
    assert (cleared.scope, cleared.name, cleared.reason, cleared.by) == (
        HaltScope(scope), name, "look at it", "boss",
    )  # fmt: skip
    assert stopped_by(bench, migration) is None


def test_a_halted_cohort_leaves_other_cohorts_alone(bench: Bench) -> None:
    one, other, alone = (
        in_cohort(bench, organization, cohort)
        for organization, cohort in (("1", "wave-1"), ("2", "wave-2"), ("3", None))
    )
    bench.topology.halt("cohort", "wave-1", "look at it", BOSS)

    assert stopped_by(bench, one)
    assert [stopped_by(bench, each) for each in (other, alone)] == [None, None]


def test_nothing_starts_in_a_halted_cohort_or_cell(bench: Bench) -> None:
    in_cohort(bench, "1", "wave-1")
    bench.topology.halt("cohort", "wave-1", "look at it", BOSS)
    with pytest.raises(Halted, match=r"cohort wave-1 is halted by boss: look at it.*clear-halt"):
        in_cohort(bench, "2", "wave-1")
    in_cohort(bench, "2", "wave-2")

    bench.topology.halt("cell", "cell-1", "disk", BOSS)
    with pytest.raises(Halted, match="cell cell-1 is halted"):
        in_cohort(bench, "3", "wave-2")


def test_the_first_reason_stays_and_another_is_in_the_audit(bench: Bench) -> None:
    migration = in_cohort(bench, "1", "wave-1")
    assert bench.topology.set_halted(migration, "the first", BOSS)
    assert not bench.topology.set_halted(migration, "the second", ACTOR)
    assert not bench.topology.set_halted(migration, "the first", ACTOR)

    (found,) = bench.topology.halts()
    assert (found.reason, found.by, found.organization) == ("the first", "boss", "ant")
    assert found.at is not None
    audit = [row for row in bench.topology.audit(migration) if "halt" in row.action]
    assert [(row.action, row.actor, row.reason) for row in audit] == [
        ("halted", "boss", "the first"),
        ("halted again", "ada", "the second"),
    ]


@pytest.mark.parametrize("reason", ["", "   "])
def test_a_halt_and_its_end_need_a_reason(bench: Bench, reason: str) -> None:
    migration = in_cohort(bench, "1", "wave-1")
    with pytest.raises(InvalidInput, match="needs a reason"):
        bench.topology.halt("cohort", "wave-1", reason, BOSS)
    bench.topology.set_halted(migration, "look", BOSS)
    with pytest.raises(InvalidInput, match="needs a reason"):
        bench.topology.clear_halt("migration", str(migration), reason, BOSS)
    assert stopped_by(bench, migration)


@pytest.mark.parametrize(
    ("scope", "name", "says"),
    [
        ("cohort", "wave-l", "no cohort 'wave-l'.*did you mean wave-1"),
        ("cell", "cell-9", "no cell 'cell-9'.*cell-1, cell-2"),
        ("migration", "99", "no migration 99"),
        ("migration", "1; DROP", "no migration 1; DROP"),
        ("migration", "9" * 40, "no migration 9"),
        ("planet", "x", "no scope 'planet'"),
    ],
)
def test_what_is_not_there_is_named(bench: Bench, scope: str, name: str, says: str) -> None:
    in_cohort(bench, "1", "wave-1")
    for act in (bench.topology.halt, bench.topology.clear_halt):
        with pytest.raises(InvalidInput, match=says):
            act(scope, name, "because", BOSS)


def test_of_two_who_clear_at_once_one_does(bench: Bench) -> None:
    in_cohort(bench, "1", "wave-1")
    for _ in range(5):
        bench.topology.halt("cohort", "wave-1", "look at it", BOSS)
        gate = threading.Barrier(4)

        def clear(number: int, gate: threading.Barrier = gate) -> bool:
            from cellferry.topology import Topology

            with Topology(bench.url) as topology:
                topology.now()  # connected
                gate.wait()
                who = Actor(f"person {number}")
                return topology.clear_halt("cohort", "wave-1", "looked", who) is not None

        with ThreadPoolExecutor(4) as pool:
            assert sorted(pool.map(clear, range(4))) == [False, False, False, True]
    with psycopg.connect(bench.url) as connection:
        rows = connection.execute(
            "SELECT action, evidence ->> 'cohort', evidence ->> 'earlier' FROM topology.audit"
            " WHERE action LIKE '%halt cleared'"
        ).fetchall()
    assert rows == [("cohort halt cleared", "wave-1", "look at it")] * 5


def test_failures_of_different_migrations_halt_their_cohort(bench: Bench) -> None:
    first, second = in_cohort(bench, "1", "wave-1"), in_cohort(bench, "2", "wave-1")
    other = in_cohort(bench, "3", "wave-2")
    note = bench.topology.note_failure
    assert not note(first, "copy", "it broke", 2, ACTOR)
    assert not note(first, "copy", "it broke again", 2, ACTOR), "one migration counts once"
    assert not note(other, "copy", "elsewhere", 2, ACTOR)
    assert note(second, "verify", "this one, too", 2, ACTOR)

    message = stopped_by(bench, first) or ""
    assert "2 of its migrations failed" in message
    assert "ant at copy: it broke; bee at verify: this one, too" in message
    assert stopped_by(bench, other) is None

    bench.topology.clear_halt("cohort", "wave-1", "repaired", BOSS)
    assert not note(first, "copy", "it broke", 2, ACTOR), "counted anew after the clearance"


def test_failures_at_once_are_all_counted(bench: Bench) -> None:
    from cellferry.topology import Topology

    migrations = [in_cohort(bench, organization, "wave-1") for organization in ("1", "2", "3")]
    gate = threading.Barrier(3)

    def fail(migration: int) -> bool:
        with Topology(bench.url) as topology:
            topology.now()
            gate.wait()
            return topology.note_failure(migration, "copy", "it broke", 3, ACTOR)

    with ThreadPoolExecutor(3) as pool:
        assert sorted(pool.map(fail, migrations)) == [False, False, True]
    assert stopped_by(bench, migrations[0])


def test_a_migration_without_a_cohort_halts_nobody_else(bench: Bench) -> None:
    alone = in_cohort(bench, "1", None)
    assert not bench.topology.note_failure(alone, "copy", "it broke", 1, ACTOR)
    assert bench.topology.halt_cohort_of(alone, "too slow", ACTOR) is None
    assert bench.topology.halts() == []


def test_no_secret_stands_in_a_halt(bench: Bench) -> None:
    in_cohort(bench, "1", "wave-1")
    bench.topology.halt("cohort", "wave-1", "postgresql://mover:hunter22@h/d", BOSS)
    assert "hunter22" not in bench.topology.halts()[0].reason


# ── in the steps ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def pair(cells: TwoCells) -> tuple[Organization, Organization]:
    """Organizations 7 and 8."""
    return cells.add_organization(7, issues=400), cells.add_organization(8, issues=400)


@contextmanager
def listening(hook: Callable[[Phase], None]) -> Iterator[None]:
    phases.listen(hook)
    try:
        yield
    finally:
        phases.listen(None)


def halt(cells: TwoCells, scope: str, name: str, reason: str = "look at it") -> None:
    """As somebody else does it."""
    with cells.context() as context:
        context.topology.halt(scope, name, reason, BOSS)


def clear(cells: TwoCells, scope: str, name: str) -> None:
    with cells.context() as context:
        steps.clear_halt(context, scope, name, "it was looked at")


def test_a_halted_cohort_stops_its_running_copies_and_no_others(
    cells: TwoCells, pair: tuple[Organization, Organization]
) -> None:
    one, other = pair
    third = cells.add_organization(9, issues=400)
    slow = {"rows_per_s": 400, "batch_rows": 100}
    moves = {
        organization.slug: cells.plan(organization, cohort=cohort, **slow)
        for organization, cohort in ((one, "wave-1"), (third, "wave-1"), (other, "wave-2"))
    }
    copying = threading.Barrier(4)
    seen = threading.local()

    def hook(phase: Phase) -> None:
        if phase is Phase.COPY_BATCH and not hasattr(seen, "batch"):
            seen.batch = True
            copying.wait(150)  # every copy is under way
            copying.wait(150)  # and the halt is set

    def run(migration: int) -> str:
        with cells.context() as context:
            try:
                return steps.copy(context, migration).state
            except Halted as error:
                return f"halted: {error.message}"

    with listening(hook), ThreadPoolExecutor(3) as pool:
        running = {slug: pool.submit(run, migration) for slug, migration in moves.items()}
        copying.wait(150)
        halt(cells, "cohort", "wave-1")
        copying.wait(150)
        ended = {slug: future.result(120) for slug, future in running.items()}
    stopped = "halted: cohort wave-1 is halted by boss: look at it"
    assert ended == {one.slug: stopped, third.slug: stopped, other.slug: "syncing"}
    assert {cells.migration(moves[org.slug]).state for org in (one, third)} == {State.COPYING}

    clear(cells, "cohort", "wave-1")
    with cells.context() as context:
        result = steps.copy(context, moves[one.slug])
        assert result.state == "syncing"
        for step in (steps.sync, steps.verify, steps.cutover):
            step(context, moves[one.slug])
    assert cells.rows("cell-2", "7") == cells.rows("cell-1", "7")


def test_a_halt_between_plan_and_copy_keeps_the_copy_from_starting(
    cells: TwoCells, pair: tuple[Organization, Organization]
) -> None:
    migration = cells.plan(pair[0], cohort="wave-1")
    halt(cells, "cohort", "wave-1")
    with cells.context() as context, pytest.raises(Halted):
        steps.copy(context, migration)
    found = cells.migration(migration)
    assert (found.state, found.attempt) == (State.PLANNED, 0)
    with cells.admin("cell-1") as connection:
        assert connection.execute("SELECT count(*) FROM cellferry.gate").fetchone() == (0,)


@pytest.mark.parametrize(
    ("scope", "name"), [("cohort", "wave-1"), ("cell", "cell-1"), ("cell", "cell-2")]
)
def test_plan_refuses_what_is_halted(
    cells: TwoCells, pair: tuple[Organization, Organization], scope: str, name: str
) -> None:
    cells.plan(pair[1], cohort="wave-1")
    halt(cells, scope, name)
    for record in (False, True):
        with cells.context() as context, pytest.raises(Halted, match=f"{name} is halted.*boss"):
            steps.plan(
                context,
                pair[0].slug,
                "cell-2",
                options=MoveOptions(cohort="wave-1"),
                record=record,
            )


def ready(cells: TwoCells, organization: Organization, **options: Any) -> int:
    migration = cells.plan(organization, **options)
    with cells.context() as context:
        for step in (steps.copy, steps.sync, steps.verify):
            step(context, migration)
    return migration


@pytest.mark.parametrize("strategy", ["online", "freeze-first"])
@pytest.mark.parametrize("phase", [Phase.BARRIER_BEGUN, Phase.FROZEN_ONE, Phase.FROZEN_ALL])
def test_a_cutover_past_its_beginning_is_not_interrupted_by_a_halt(
    cells: TwoCells,
    pair: tuple[Organization, Organization],
    monkeypatch: pytest.MonkeyPatch,
    phase: Phase,
    strategy: str,
) -> None:
    from cellferry.migration.context import StepProgress

    # asked at every batch, so that whatever asks under the gate hears of it
    monkeypatch.setattr(StepProgress, "CHECK_EVERY_S", 0.0)
    migration = ready(cells, pair[0], strategy=strategy, cohort="wave-1", pause_budget_ms=600_000)

    def hook(reached: Phase) -> None:
        if reached is phase and not cells.migration(migration).halted:
            for scope, name in (("migration", str(migration)), ("cohort", "wave-1"),
                                ("cell", "cell-1")):  # fmt: skip
                halt(cells, scope, name)

    with listening(hook), cells.context() as context:
        steps.cutover(context, migration)
        assert context.topology.route("7").cell == "cell-2"
        with pytest.raises(Halted):
            steps.soak(context, migration)
    assert cells.migration(migration).state is State.SOAKING


def test_a_halt_before_the_barrier_freezes_nobody(
    cells: TwoCells, pair: tuple[Organization, Organization]
) -> None:
    migration = ready(cells, pair[0])
    reached: list[Phase] = []

    def hook(phase: Phase) -> None:
        reached.append(phase)
        if phase is Phase.CAUGHT_UP:
            halt(cells, "migration", str(migration))

    with listening(hook), cells.context() as context, pytest.raises(Halted):
        steps.cutover(context, migration)
    assert Phase.BARRIER_BEGUN not in reached
    assert cells.migration(migration).state is State.READY


def test_a_difference_halts_the_migration_and_its_cohort(
    cells: TwoCells, pair: tuple[Organization, Organization]
) -> None:
    migration, other = (cells.plan(organization, cohort="wave-1") for organization in pair)
    with cells.context() as context:
        steps.copy(context, migration)
        with cells.admin("cell-2") as connection:
            connection.execute("SET session_replication_role = replica")
            connection.execute("UPDATE issues SET counter = 99 WHERE id = 7000001")
        with pytest.raises(VerificationFailed):
            steps.verify(context, migration)
        found = {(one.scope, one.name): one for one in context.topology.halts()}
        assert set(found) == {("migration", str(migration)), ("cohort", "wave-1")}
        assert found["cohort", "wave-1"].by == "cellferry"
        assert "org-7 differs at verify" in found["cohort", "wave-1"].reason
        assert "7000001" in found["migration", str(migration)].reason
        with pytest.raises(Halted, match="org-7 differs"):
            steps.copy(context, other)
        clear(cells, "cohort", "wave-1")
        steps.copy(context, other)
        with pytest.raises(Halted, match="verification failed"):
            steps.sync(context, migration)


def test_failed_migrations_halt_the_wave(
    cells: TwoCells, pair: tuple[Organization, Organization], monkeypatch: pytest.MonkeyPatch
) -> None:
    moves = [cells.plan(one, cohort="wave-1", max_failures=2) for one in pair]
    failing: list[Exception] = []

    def fails(*_: Any) -> None:
        raise failing[0]

    monkeypatch.setattr("cellferry.stores.postgres.store.PostgresMove.copy", fails)
    with cells.context() as context:
        for uncounted in (TransientError("busy"), LeaseLost("gone"), Halted("stop")):
            failing[:] = [uncounted]
            for migration in moves:
                with pytest.raises(type(uncounted)):
                    steps.copy(context, migration)
            assert context.topology.halts() == []
        failing[:] = [WrongState("broken")]
        with pytest.raises(WrongState):
            steps.copy(context, moves[0])
        assert context.topology.halts() == []
        context.last_try = True
        failing[:] = [NotConverging("too many writes")]
        with pytest.raises(NotConverging):
            steps.copy(context, moves[1])
        (found,) = context.topology.halts()
    assert (found.scope, found.name) == (HaltScope.COHORT, "wave-1")
    assert "org-7 at copy: broken; org-8 at copy: too many writes" in found.reason


@pytest.mark.parametrize("slow", ["finish", "flip"])
def test_a_pause_over_its_budget_halts_the_cohort_and_the_move_goes_on(
    cells: TwoCells,
    pair: tuple[Organization, Organization],
    monkeypatch: pytest.MonkeyPatch,
    slow: str,
) -> None:
    migration = ready(cells, pair[0], cohort="wave-1", pause_budget_ms=5_000)
    monkeypatch.setattr(barrier, "_catch_up", lambda at: [s.catch_up() for s in at.stores.values()])
    at_which = {"finish": Phase.FROZEN_ALL, "flip": Phase.FINISHED}[slow]

    def hook(phase: Phase) -> None:
        if phase is at_which:
            time.sleep(5.1)

    with listening(hook), cells.context() as context:
        steps.cutover(context, migration)
        (found,) = context.topology.halts()
        assert (found.scope, found.name, found.by) == (HaltScope.COHORT, "wave-1", "cellferry")
        assert "the write pause of org-7 was" in found.reason
        assert "budget of 5000 ms" in found.reason
        clear(cells, "cohort", "wave-1")
        steps.soak(context, migration)


def test_a_pause_within_its_budget_halts_nothing(
    cells: TwoCells, pair: tuple[Organization, Organization]
) -> None:
    migration = ready(cells, pair[0], cohort="wave-1", pause_budget_ms=600_000)
    with cells.context() as context:
        steps.cutover(context, migration)
        assert context.topology.halts() == []


def test_a_long_freeze_that_was_undone_counts_as_a_pause(
    cells: TwoCells, pair: tuple[Organization, Organization]
) -> None:
    migration = ready(cells, pair[0], cohort="wave-1", pause_budget_ms=5_000, freeze_deadline_s=5)

    def hook(phase: Phase) -> None:
        if phase is Phase.FROZEN_ALL:
            time.sleep(5.1)

    with listening(hook), cells.context() as context:
        with pytest.raises(TransientError):
            steps.cutover(context, migration)
        assert [one.name for one in context.topology.halts()] == ["wave-1"]
    assert cells.migration(migration).state is State.READY


def test_draining_is_counted_as_one_attempt() -> None:
    timings = barrier.Timings(started=100.0, last=103.5)
    timings.parts = {"freeze postgres": 3.0, "freeze redis": 0.1, "hand over": 0.1}
    assert timings.closed_s(0.1) == pytest.approx(0.6)
    assert barrier.Timings().closed_s(0.1) == 0.0


# ── a cell's errors ─────────────────────────────────────────────────────────────────────────────

USUAL = Activity(commits=9_900, rollbacks=100, deadlocks=3, conflicts=0)
SHARE = ErrorLimits(rollbacks_percent=5, least_transactions=100)


@pytest.mark.parametrize(
    ("limits", "commits", "rollbacks", "deadlocks", "conflicts", "says"),
    [
        (SHARE, 95, 5, 0, 0, None),  # 5 % now, 1 % usually: 4 points
        (SHARE, 93, 7, 0, 0, "7.0 % of its transactions were rolled back"),
        (SHARE, 40, 50, 0, 0, None),  # too few to say anything
        (SHARE, 1000, 0, 50, 50, None),  # not watched
        (ErrorLimits(deadlocks_per_min=5), 0, 0, 10, 0, None),  # in two minutes
        (ErrorLimits(deadlocks_per_min=5), 0, 0, 11, 0, "11 deadlocks in the last 120 s"),
        (ErrorLimits(conflicts_per_min=1), 0, 0, 0, 3, "3 conflicts with recovery"),
        (SHARE, -5000, 90, 0, 0, None),  # counted anew
    ],
)
def test_a_rise_is_told_from_what_is_usual(
    limits: ErrorLimits,
    commits: int,
    rollbacks: int,
    deadlocks: int,
    conflicts: int,
    says: str | None,
) -> None:
    now = Activity(9_900 + commits, 100 + rollbacks, 3 + deadlocks, conflicts)
    found = halts.rise(limits, USUAL, USUAL, now, 120.0)
    assert (says in (found or "")) if says else found is None


def counted_rollbacks(cells: TwoCells, context: Context, cell: str) -> int:
    """What the server has counted; sessions report it when they end, or a little later."""
    known = context.settings.cell(cell, context.connections)
    found = context.stores["postgres"].activity(known)
    assert found is not None
    return found.rollbacks


def test_a_cell_whose_error_rate_rises_is_halted(
    cells: TwoCells, pair: tuple[Organization, Organization]
) -> None:
    one = cells.settings.cells["cell-1"]
    limits = ErrorLimits(rollbacks_percent=20, over_s=1, least_transactions=50)
    cells.settings.cells["cell-1"] = one.model_copy(update={"halts_at": limits})
    migration, other = (cells.plan(organization) for organization in pair)
    with cells.context() as context:
        steps.copy(context, migration)
        facts = cells.migration(migration).facts
        assert list(facts["activity"]["cells"]) == ["cell-1"], "only where limits are set"
        time.sleep(1.1)
        assert steps.watch(context).halted == ()

        before = counted_rollbacks(cells, context, "cell-1")
        with cells.application("cell-1") as connection:
            for _ in range(2_000):
                connection.execute("SELECT 1")
                connection.rollback()
        deadline = time.monotonic() + 60
        while counted_rollbacks(cells, context, "cell-1") < before + 2_000:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        while not steps.watch(context).halted:
            assert time.monotonic() < deadline
            time.sleep(0.3)
        (found,) = context.topology.halts()
        assert (found.scope, found.name, found.by) == (HaltScope.CELL, "cell-1", "cellferry")
        assert "rolled back" in found.reason
        for each in (migration, other):
            with pytest.raises(Halted, match="cell cell-1"):
                (steps.sync if each == migration else steps.copy)(context, each)
        assert steps.watch(context).halted == (), "said once"


def test_a_cell_without_limits_is_not_watched(
    cells: TwoCells, pair: tuple[Organization, Organization]
) -> None:
    migration = cells.plan(pair[0])
    with cells.context() as context:
        steps.copy(context, migration)
        assert "activity" not in cells.migration(migration).facts
        found = steps.watch(context)
    assert (found.looked, found.halted, found.failed) == (1, (), ())


# ── by hand ─────────────────────────────────────────────────────────────────────────────────────


def test_status_and_the_list_show_who_halted_what_and_why(
    cells: TwoCells, pair: tuple[Organization, Organization]
) -> None:
    from rich.console import Console

    from cellferry.migration.reporting import render_halts, render_migrations, render_status

    migration = cells.plan(pair[0], cohort="wave-1")
    cells.plan(pair[1])
    halt(cells, "migration", str(migration), "too odd [really]")
    halt(cells, "cohort", "wave-1", "too slow")
    with cells.context() as context:
        shown = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
        render_status(steps.status(context, "org-7"), shown)
        text = shown.export_text()
        assert "the migration by boss" in text
        assert "too odd [really]" in text
        assert "cohort wave-1 by boss" in text
        render_halts(steps.halts(context), shown)
        text = shown.export_text()
        assert "organization org-7" in text
        assert "too slow" in text
        render_migrations(steps.unfinished(context), shown, halts=steps.halts(context))
        lines = {
            line.split()[1]: line for line in shown.export_text().splitlines() if "org-" in line
        }
    assert "too odd" in lines["org-7"]
    assert "halted" not in lines["org-8"]


def test_an_organization_is_halted_and_cleared_by_its_name(
    cells: TwoCells, pair: tuple[Organization, Organization]
) -> None:
    migration = cells.plan(pair[0])
    with cells.context() as context:
        assert not steps.halt(context, "organization", "org-7", "wait for legal").repeated
        assert steps.halt(context, "organization", "org-7", "wait for legal").repeated
        with pytest.raises(Halted, match="clear-halt organization org-7"):
            steps.copy(context, migration)
        assert not steps.clear_halt(context, "organization", "7", "legal agrees").repeated
        assert steps.clear_halt(context, "organization", "7", "legal agrees").repeated
        steps.copy(context, migration)
        with pytest.raises(WrongState, match="no migration"):
            steps.halt(context, "organization", "org-8", "why not")


def test_a_halt_keeps_nobody_from_going_back(
    cells: TwoCells, pair: tuple[Organization, Organization]
) -> None:
    moved, begun = ready(cells, pair[0]), ready(cells, pair[1])
    with cells.context() as context:
        steps.cutover(context, moved)
        halt(cells, "cell", "cell-2")
        halt(cells, "migration", str(moved))
        steps.roll_back(context, moved, "it is unwell there")
        assert context.topology.route("7").cell == "cell-1"
        steps.abort(context, begun, "no more")
        assert context.topology.live_resources(begun) == []
