"""The latency-driven throttle on real cells: it slows down for a slow cell, and never stops."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
import redis

from cellferry import phases
from cellferry.errors import CellferryError
from cellferry.migration import governor, pacing, steps
from cellferry.migration.context import Context
from cellferry.migration.governor import FLOOR, Aim, Governor
from cellferry.migration.reporting import describe_pace
from cellferry.model import Actor, Cell, Endpoint, Move, Organization, Side, State
from cellferry.phases import Phase
from cellferry.stores.pace import FullSpeed, Pace
from cellferry.stores.postgres import copier, wire
from cellferry.stores.postgres import store as postgres_store
from cellferry.stores.postgres.checkpoints import Checkpoint
from cellferry.stores.postgres.probe import SLOTS, PostgresProbe
from cellferry.stores.redis.probe import RedisProbe
from cellferry.stores.redis.wire import Address
from cellferry.topology import pace as pace_board
from cellferry.topology.pace import PaceRow
from fixtures.cells import NO_TRACES, TwoCells
from fixtures.ferry import Ferry, make_ferry
from fixtures.postgres import FreshDatabases
from fixtures.standby import Failover
from fixtures.valkey import ValkeyPair

#: What no probe on a busy test machine reaches by itself, and what a brake makes of it.
TARGET_MS = 1_000
BRAKE_S = 2.5
PATIENCE_S = 90.0

#: A cell where a commit of the probe takes as long as table `brake` says.
BRAKE = """
CREATE TABLE cellferry.brake (seconds float NOT NULL);
INSERT INTO cellferry.brake VALUES (0);
CREATE FUNCTION cellferry.brake() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    PERFORM pg_sleep(seconds) FROM cellferry.brake WHERE seconds > 0;
    RETURN NULL;
END $$;
CREATE TRIGGER brake AFTER UPDATE ON cellferry.probe
    FOR EACH STATEMENT EXECUTE FUNCTION cellferry.brake();
"""


@pytest.fixture
def acme(cells: TwoCells) -> Organization:
    cells.add_organization(8)  # a neighbour that stays
    return cells.add_organization(7, issues=400)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pace short work as well, rest briefly, and let a busy test machine take its time."""
    monkeypatch.setattr(Pace, "BEGIN_AFTER_S", 0.0)
    monkeypatch.setattr(Pace, "LONGEST_S", 0.2)
    monkeypatch.setattr(pace_board, "LIVE_S", 300.0)
    monkeypatch.setattr(pacing, "IDLE_FOR_S", 60.0)


@contextmanager
def listening(hook: Callable[[Phase], None]) -> Iterator[None]:
    phases.listen(hook)
    try:
        yield
    finally:
        phases.listen(None)


def plan(cells: TwoCells, organization: Organization, **options: Any) -> int:
    return cells.plan(
        organization, **{"latency_target_ms": TARGET_MS, "batch_rows": 100, **options}
    )


def brake(cells: TwoCells, cell: str, seconds: float) -> None:
    with cells.admin(cell) as connection:
        if connection.execute("SELECT to_regclass('cellferry.brake')").fetchone() == (None,):
            connection.execute(BRAKE)
        connection.execute("UPDATE cellferry.brake SET seconds = %s", (seconds,))


def wait_for(found: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if (value := found()) not in (None, False):
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come")


def paces(context: Context, migration: int, cell: str) -> PaceRow | None:
    rows = context.topology.paces(migration)
    return next((row for row in rows if (row.cell, row.store) == (cell, "postgres")), None)


def probing(cells: TwoCells, cell: str) -> int:
    """Count the probes' sessions of this test's cells."""
    with cells.admin(cell) as connection:
        return len(
            connection.execute(
                "SELECT FROM pg_stat_activity WHERE application_name LIKE 'cellferry:%:probe'"
                " AND datname = current_database()"
            ).fetchall()
        )


class AtBatch:
    """Does something after the copy's second PostgreSQL batch, in the copying thread."""

    def __init__(self, work: Callable[[], None], phase: Phase = Phase.COPY_BATCH) -> None:
        self._work = work
        self._phase = phase
        self.seen = 0

    def __call__(self, phase: Phase) -> None:
        if phase is self._phase:
            self.seen += 1
            if self.seen == 2:
                self._work()


def test_a_copy_slows_down_for_a_slow_cell_and_recovers_with_it(
    cells: TwoCells, acme: Organization, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="cellferry.migration.pacing")
    migration = plan(cells, acme)
    brake(cells, "cell-2", BRAKE_S)
    seen: dict[str, Any] = {}

    def watch() -> None:
        with cells.context() as other:

            def row(act: str) -> PaceRow | None:
                found = paces(other, migration, "cell-2")
                return found if found is not None and found.note.startswith(act) else None

            # A machine that stood still slows it down as well, but not so much.
            seen["slowed"] = wait_for(
                lambda: (found := row("slowed")) and found.share < 0.2 and found, "slower work"
            )
            seen["status"] = steps.status(other, acme.slug)
            brake(cells, "cell-2", 0)
            seen["recovered"] = wait_for(lambda: row("recovered"), "faster work")

    hook = AtBatch(watch)
    with listening(hook), cells.context() as context:
        steps.copy(context, migration)
        facts = context.topology.migration(migration).facts["pace"]["copy"]["postgres"]
        assert context.topology.paces(migration) == [], "it has left"
        steps.sync(context, migration)
        steps.verify(context, migration)

    assert hook.seen >= 2
    slowed, recovered = seen["slowed"], seen["recovered"]
    assert slowed.share < 0.2
    assert "slowed to" in slowed.note
    assert "by cell-2/postgres" in slowed.note
    assert slowed.target_s == pytest.approx(TARGET_MS / 1000)
    assert "of full speed" in describe_pace(slowed)
    assert slowed.cell in {row.cell for row in seen["status"].paces}
    assert recovered.share > FLOOR
    there = facts["cells"]["cell-2"]
    assert there["slowed"] >= 1
    assert there["recovered"] >= 1
    assert there["lowest_share"] <= 0.1
    assert facts["rested_s"] > 0
    assert any("slowed to" in record.getMessage() for record in caplog.records)
    assert cells.rows("cell-2", "7") == cells.rows("cell-1", "7")


def test_a_probe_that_is_never_answered_slows_the_copy_to_its_floor_and_no_further(
    cells: TwoCells, acme: Organization
) -> None:
    migration = plan(cells, acme)
    with cells.admin("cell-1") as locking:
        locking.autocommit = False

        def wait() -> None:
            # not earlier: to arm is to wait for whoever writes already
            locking.execute("SELECT FROM cellferry.probe FOR UPDATE")
            with cells.context() as other:
                wait_for(
                    lambda: (row := paces(other, migration, "cell-1")) and row.share == FLOOR,
                    "the floor",
                )

        hook = AtBatch(wait)
        with listening(hook), cells.context() as context:
            steps.copy(context, migration)
        locking.rollback()

    assert hook.seen >= 2
    found = cells.migration(migration)
    assert found.state is State.SYNCING
    assert found.facts["pace"]["copy"]["postgres"]["cells"]["cell-1"]["lowest_share"] == FLOOR


def test_a_dead_probe_is_reported_and_stops_nothing(
    cells: TwoCells, acme: Organization, caplog: pytest.LogCaptureFixture
) -> None:
    migration = plan(cells, acme)
    with cells.admin("cell-2") as connection:
        connection.execute("DROP TABLE cellferry.probe")

    def wait() -> None:
        with cells.context() as other:
            wait_for(
                lambda: (row := paces(other, migration, "cell-2")) and "probe fails" in row.note,
                "the report",
            )

    hook = AtBatch(wait)
    with listening(hook), cells.context() as context:
        steps.copy(context, migration)

    assert hook.seen >= 2
    there = cells.migration(migration).facts["pace"]["copy"]["postgres"]["cells"]["cell-2"]
    assert there["blinded"] == 1
    assert "prepare-cell" in there["note"] or "cellferry.probe" in there["note"]
    warned = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert any("its probe fails" in one.getMessage() for one in warned)
    assert cells.rows("cell-2", "7") == cells.rows("cell-1", "7")


def test_a_controller_that_breaks_lets_the_work_go_on(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(pacing.StorePacing, "_find_aims", broken)
    migration = plan(cells, acme)

    with cells.context() as context:
        steps.copy(context, migration)

    assert cells.migration(migration).state is State.SYNCING


def test_a_process_that_may_have_no_more_threads_copies_all_the_same(
    cells: TwoCells, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("probe "):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    migration = plan(cells, acme)

    with cells.context() as context:
        steps.copy(context, migration)

    assert cells.migration(migration).state is State.SYNCING


def test_movers_at_one_cell_share_its_budget(cells: TwoCells, acme: Organization) -> None:
    """The other mover is a row in the topology, as it would be from another machine."""
    neighbour = cells.add_organization(9)
    mine, other = plan(cells, acme), plan(cells, neighbour)
    with cells.context() as context:
        attempt = context.topology.take_lease(other, "elsewhere", Actor("test"))
        teller = context.topology.pace_teller(other, attempt, "postgres")
        row = PaceRow("cell-2", "postgres", other, "copy", 0.16, note="slowed")
        alone = teller.tell(row, decided=True)
        assert alone is not None
        assert alone.others == 0

        company: list[Any] = []

        def ask() -> None:
            wait_for(lambda: paces(context, mine, "cell-2"), "my row")
            company.append(teller.tell(row, decided=False))

        with listening(AtBatch(ask)), cells.context() as mover:
            steps.copy(mover, mine)
        facts = cells.migration(mine).facts["pace"]["copy"]["postgres"]["cells"]
        teller.close()

    assert company[0].others == 1
    assert company[0].limited
    assert facts["cell-2"]["shared"] == 1
    assert facts["cell-2"]["lowest_share"] <= 0.08, "half of what the other one had"
    assert facts["cell-1"]["shared"] == 0


def test_who_is_gone_does_not_count(cells: TwoCells, acme: Organization) -> None:
    neighbour = cells.add_organization(9)
    mine, other = plan(cells, acme), plan(cells, neighbour)
    with cells.context() as context:
        topology = context.topology
        tellers = {
            one: topology.pace_teller(
                one, topology.take_lease(one, "here", Actor("test")), "postgres"
            )
            for one in (mine, other)
        }

        def tell(one: int) -> Any:
            row = PaceRow("cell-2", "postgres", one, "copy", 0.5, idle_s=0.002)
            return tellers[one].tell(row, decided=False)

        tell(other)
        assert (tell(mine).others, tell(mine).idle_s) == (1, 0.002)

        topology.take_lease(other, "another controller", Actor("test"))
        assert tell(mine).others == 0, "a newer attempt has not spoken yet"
        tell(other)
        assert tell(mine).others == 0, "an older attempt does not count"

        newer = topology.pace_teller(
            other, topology.take_lease(other, "a third", Actor("test")), "postgres"
        )
        row = PaceRow("cell-2", "postgres", other, "copy", 0.5)
        newer.tell(row, decided=False)
        assert tell(mine).others == 1
        with psycopg.connect(cells.connections["cellferry-topology"]) as connection:
            connection.execute(
                "UPDATE topology.pace SET live_until = clock_timestamp() WHERE migration = %s",
                (other,),
            )
        assert tell(mine).others == 0, "it fell silent"
        newer.tell(row, decided=False)
        assert tell(mine).others == 1
        newer.close()
        assert tell(mine).others == 0, "it said good-bye"
        tellers[mine].close()
        tellers[other].close()


@pytest.mark.parametrize("strategy", ["online", "freeze-first"])
def test_nothing_is_slowed_down_under_the_gate(
    cells: TwoCells, acme: Organization, strategy: str
) -> None:
    """Neither the last delta nor a whole copy, however slow the cells are."""
    migration = plan(
        cells,
        acme,
        strategy=strategy,
        latency_target_ms=0.001,
        freeze_deadline_s=200,
        pause_budget_ms=200_000,
    )
    with cells.context() as context:
        for step in (steps.copy, steps.sync, steps.verify):
            step(context, migration)
    looked: list[int] = []

    def look(phase: Phase) -> None:
        if phase in (Phase.COPY_BATCH, Phase.ROUND_APPLIED, Phase.FROZEN_ALL, Phase.FINISHED):
            looked.append(probing(cells, "cell-1") + probing(cells, "cell-2"))

    with listening(look), cells.context() as context:
        steps.cutover(context, migration)

    assert len(looked) >= 3
    assert not any(looked)
    assert "cutover" not in cells.migration(migration).facts.get("pace", {})


def test_nobody_who_did_not_ask_for_it_gets_it(cells: TwoCells, acme: Organization) -> None:
    migration = plan(cells, acme, latency_target_ms=None)
    looked: list[int] = []

    with (
        listening(AtBatch(lambda: looked.append(probing(cells, "cell-2")))),
        cells.context() as context,
    ):
        steps.copy(context, migration)

    assert looked == [0]
    assert "pace" not in cells.migration(migration).facts


def test_an_idle_cell_gives_the_target_and_the_next_mover_believes_it(
    cells: TwoCells, acme: Organization
) -> None:
    neighbour = cells.add_organization(9, issues=400)
    first, second = (plan(cells, one, latency_target_ms=0) for one in (acme, neighbour))

    def wait_for_aim(migration: int) -> Callable[[], None]:
        def wait() -> None:
            with cells.context() as other:
                wait_for(
                    lambda: (row := paces(other, migration, "cell-2")) and row.target_s,
                    "a target",
                )

        return wait

    found = []
    for migration in (first, second):
        with listening(AtBatch(wait_for_aim(migration))), cells.context() as context:
            steps.copy(context, migration)
        facts = cells.migration(migration).facts["pace"]["copy"]["postgres"]["cells"]["cell-2"]
        found.append(facts)

    assert found[0]["idle_ms"] > 0
    room_ms = found[0]["target_ms"] - found[0]["idle_ms"]
    assert room_ms >= Aim.LEAST_ROOM_S * 1000 - 0.02, "both are rounded"
    assert found[1]["idle_ms"] == found[0]["idle_ms"]


def test_clean_up_is_paced_and_leaves_no_trace(cells: TwoCells, acme: Organization) -> None:
    migration = plan(cells, acme)
    with cells.context() as context:
        for step in (steps.copy, steps.sync, steps.verify, steps.cutover, steps.soak):
            step(context, migration)
    brake(cells, "cell-1", BRAKE_S)

    def wait() -> None:
        with cells.context() as other:
            wait_for(
                lambda: (row := paces(other, migration, "cell-1")) and row.note.startswith("slow"),
                "slower work",
            )

    hook = AtBatch(wait, Phase.CLEANUP_BATCH)
    with listening(hook), cells.context() as context:
        steps.cleanup(context, migration)

    assert hook.seen >= 2
    assert cells.migration(migration).facts["pace"]["cleanup"]["postgres"]["rested_s"] > 0
    assert cells.traces("cell-1") == NO_TRACES
    assert cells.rows("cell-1", "7")["issues"] == []


# ── the stores at a slow pace ───────────────────────────────────────────────────────────────────


def test_a_round_at_a_slow_pace_comes_in_parts_and_misses_nothing(
    ferry: Ferry, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = Pace()
    applied: list[Phase] = []
    with ferry.store.open(ferry.move(), ferry.registry, ferry.progress, pace) as move:
        move.fence()
        move.open_capture()
        move.copy()
        ferry.run(Side.SOURCE, "UPDATE notes SET body = body || '!'")
        monkeypatch.setattr(postgres_store, "PART_KEYS", 50)
        pace.share = 0.001
        with listening(applied.append):
            done = move.sync()
        pace.share = 1.0
        while move.sync().applied:
            pass
        assert move.verify().ok

    assert applied.count(Phase.ROUND_APPLIED) > 1
    assert done.applied > 50
    assert pace.rested_s > 0
    assert ferry.content(Side.DESTINATION, 1) == ferry.content(Side.SOURCE, 1)


def test_batches_shrink_with_the_pace(
    fresh_databases: Callable[[], FreshDatabases], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copier, "LEAST_ROWS", 100)
    batches = []
    for share in (1.0, 0.002):
        ferry, pace = make_ferry(fresh_databases()), Pace()
        pace.share = share
        with ferry.store.open(ferry.move(), ferry.registry, ferry.progress, pace) as move:
            move.fence()
            move.open_capture()
            batches.append(move.copy().batches)
        assert ferry.content(Side.DESTINATION, 1) == ferry.content(Side.SOURCE, 1)

    assert batches[1] > batches[0]


def test_a_batch_that_began_at_full_speed_follows_a_pace_that_falls(
    ferry: Ferry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends soon, and until then comes in small pieces."""
    monkeypatch.setattr(copier, "LEAST_ROWS", 100)
    monkeypatch.setattr(copier, "LEAST_PIECE_ROWS", 20)
    monkeypatch.setattr(wire, "PIECE_BYTES", 2048)
    pace, batches, rests = FullSpeed(), list[int](), list[int]()
    committed, rest = copier._Account.committed, copier._TableCopier._rest
    flush = wire.Inlet._flush

    def fall(inlet: wire.Inlet, size: int, **tail: Any) -> None:
        flush(inlet, size, **tail)
        if size >= wire.PIECE_BYTES:
            pace.share = 1e-6

    def note(account: Any, table: Any, before: Checkpoint, after: Checkpoint) -> None:
        if pace.share < 1.0:
            batches.append(after.rows - before.rows)
        committed(account, table, before, after)

    def note_rest(self: Any, rows: int) -> None:
        if pace.share < 1.0:
            rests.append(rows)
        rest(self, rows)

    monkeypatch.setattr(wire.Inlet, "_flush", fall)
    monkeypatch.setattr(copier._Account, "committed", note)
    monkeypatch.setattr(copier._TableCopier, "_rest", note_rest)
    with ferry.store.open(ferry.move(), ferry.registry, ferry.progress, pace) as move:
        move.fence()
        move.open_capture()
        move.copy()
        assert move.verify().ok

    assert batches[0] == max(batches) == 100  # of a table of 250
    assert 20 < rests[0] < 100  # the piece that was under way
    assert max(rests[1:]) == 20
    assert ferry.content(Side.DESTINATION, 1) == ferry.content(Side.SOURCE, 1)


# ── probes ──────────────────────────────────────────────────────────────────────────────────────


def test_a_postgres_probe_writes_reads_and_says_how_the_server_does(ferry: Ferry) -> None:
    probe = PostgresProbe(ferry.destination, ferry.move())
    try:
        before = ferry.run(Side.DESTINATION, "SELECT max(probed_at) FROM cellferry.probe")
        reading = probe.read()
        load = probe.load()
    finally:
        probe.close()

    after = ferry.run(Side.DESTINATION, "SELECT max(probed_at) FROM cellferry.probe")
    assert after > before
    assert 0 < reading.read_s <= reading.longest_s
    assert reading.write_s > 0
    assert load.log_bytes is not None
    assert load.log_bytes > 0
    assert load.active is not None
    assert load.lag_s is None, "there is no standby"


def test_a_postgres_probe_does_not_gather_versions_in_one_row(ferry: Ferry) -> None:
    """While a snapshot lasts they stay, and each probe would pass all those before it."""
    probe = PostgresProbe(ferry.destination, ferry.move())
    try:
        for _ in range(SLOTS):
            probe.read()
    finally:
        probe.close()

    moments = "SELECT count(DISTINCT probed_at) FROM cellferry.probe"
    assert ferry.run(Side.DESTINATION, moments) == [(SLOTS,)]


def test_a_standby_that_is_meant_to_be_behind_slows_nobody_down(
    failover: Callable[..., Failover], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(governor, "LAG_LIMIT_S", 3.0)
    made = failover("destination", synchronous=False)
    with psycopg.connect(made.standby.url(), autocommit=True) as standby:
        standby.execute("ALTER SYSTEM SET recovery_min_apply_delay = '5s'")
        standby.execute("SELECT pg_reload_conf()")
    with made.cells.context() as context:
        cell = context.settings.cell("cell-2", context.connections)
    probe = PostgresProbe(cell, Move(5, Organization("7", "acme"), cell, cell, epoch=1, attempt=1))

    def lag() -> float | None:
        probe.read()
        return probe.load().lag_s

    try:
        wait_for(lambda: (lag() or 0.0) > governor.LAG_LIMIT_S, "the lag")
        mover = Governor("cell-2/postgres", 0.1, now=0.0)
        decided = [one for now in range(20) for one in mover.lagging(lag(), float(now))]
        assert decided == []
        assert mover.lagging(20.0, 20.0), "it falls further behind"
    finally:
        probe.close()


def test_a_postgres_probe_connects_again_after_its_session_was_ended(ferry: Ferry) -> None:
    probe = PostgresProbe(ferry.destination, ferry.move())
    try:
        probe.read()
        ferry.run(
            Side.DESTINATION,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'cellferry:1:1:probe'",
        )
        with pytest.raises(CellferryError):
            probe.read()
        assert probe.read().write_s > 0
    finally:
        probe.close()


def test_a_redis_probe_writes_reads_and_leaves_nothing(valkey_pair: ValkeyPair) -> None:
    url = valkey_pair.destination.url()
    cell = Cell("cell-2", {"redis": Endpoint(url=url, admin_url=url)})
    move = Move(5, Organization("7", "acme"), cell, cell, epoch=1, attempt=1)
    probe = RedisProbe(Address.parse(url, "cell-2/redis"), move)
    with redis.Redis.from_url(url) as client:
        reading = probe.read()
        assert client.pttl("cellferry:probe:5") > 0, "it goes by itself"
        load = probe.load()
        probe.close()
        assert client.exists("cellferry:probe:5") == 0

    assert reading.write_s > 0
    assert reading.read_s > 0
    assert load.log_bytes is not None
