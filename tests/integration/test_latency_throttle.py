"""The latency-driven throttle on real cells: probes, targets, and work at a slow pace."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis

from cellferry import phases
from cellferry.errors import CellferryError
from cellferry.migration import pacing, steps
from cellferry.migration.context import Context
from cellferry.model import Cell, Endpoint, Move, Organization, Side
from cellferry.phases import Phase
from cellferry.stores.pace import Pace
from cellferry.stores.postgres import copier
from cellferry.stores.postgres import store as postgres_store
from cellferry.stores.postgres.probe import PostgresProbe
from cellferry.stores.redis.probe import RedisProbe
from cellferry.stores.redis.wire import Address
from cellferry.topology import pace as pace_board
from cellferry.topology.pace import PaceRow
from fixtures.cells import TwoCells
from fixtures.ferry import Ferry, make_ferry
from fixtures.postgres import FreshDatabases
from fixtures.valkey import ValkeyPair

PATIENCE_S = 90.0


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
    return cells.plan(organization, **{"batch_rows": 100, **options})


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
    assert found[0]["target_ms"] >= found[0]["idle_ms"] + 5
    assert found[1]["idle_ms"] == found[0]["idle_ms"]


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


def test_a_postgres_probe_connects_again_after_its_session_was_ended(ferry: Ferry) -> None:
    probe = PostgresProbe(ferry.destination, ferry.move())
    try:
        probe.read()
        ferry.run(
            Side.DESTINATION,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'cellferry:1:1:probe' AND datname = current_database()",
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
