"""Soak: an organization that is worse off at its new cell is noticed, halted and brought back."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

from cellferry import phases, settings
from cellferry.errors import (
    Breached,
    Halted,
    InvalidInput,
    LeaseLost,
    OutcomeUnknown,
    TransientError,
    WrongState,
)
from cellferry.local.application.keyspace import Keyspace
from cellferry.local.application.ledger import LedgerWriter
from cellferry.local.application.relational import Relational
from cellferry.local.application.session import Session
from cellferry.local.application.traffic import Writer
from cellferry.migration import Context, MoveOptions, soak, steps
from cellferry.migration.watch import Watch
from cellferry.model import Actor, Migration, Organization, Route, State
from cellferry.phases import Phase
from cellferry.routing import BeingMoved, Moved, RouteClient
from fixtures.cells import PATIENT, TwoCells
from fixtures.sample import Sample
from fixtures.topology import Bench

ORGANIZATION = "102"
#: Judged soon, for tests; the defaults are for people. A busy machine is slow where it pleases.
QUICK = {
    "soak_s": 4.0,
    "breach_s": 1.5,
    "soak_operations": 30,
    "soak_latency_factor": 50,
    "ttl_s": 0.0,
    **PATIENT,
}


class KilledError(BaseException):
    """The controller's process ends here."""


@dataclass
class Ferried:
    """The sample application on two prepared cells, with writers that report."""

    sample: Sample
    settings: settings.Settings
    connections: Mapping[str, str]
    router: RouteClient
    directory: Path
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _sessions: list[Session] = field(default_factory=list)
    _ledger: LedgerWriter | None = None

    @contextmanager
    def context(self) -> Iterator[Context]:
        made = Context.from_settings(
            self.settings, self.connections.get, actor=Actor("test"), listener=self.notes.append
        )
        with made as context:
            yield context

    notes: list[Any] = field(default_factory=list)

    def start(self, sessions: int = 3, writes_per_s: float = 40.0) -> None:
        """Let writers loose; they write and report until `stop`."""
        path = self.sample.application.directory / "ledger" / "run-001-writer-7.jsonl"
        self._ledger = LedgerWriter(path)
        places = self.sample.application.places
        for slot in range(sessions):
            session = Session(
                f"s{slot}",
                ORGANIZATION,
                self.router,
                {
                    name: (one.app_postgres, one.app_redis(ORGANIZATION))
                    for name, one in places.items()
                },
                self._ledger,
                random.Random(slot),
            )
            writer = Writer(session, Relational(session, slot, sessions, 1), Keyspace(session))
            self._sessions.append(session)
            thread = threading.Thread(
                target=writer.run, args=(writes_per_s / sessions, self._stop), daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        for session in self._sessions:
            session.close()
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def cut_over(self, reported: int = 60, **options: Any) -> int:
        """Move the organization to cell-2 as far as the cutover."""
        with self.context() as context:
            deadline = time.monotonic() + 90
            while self._threads and self._reported(context) < reported:
                assert time.monotonic() < deadline, "nothing was reported"
                time.sleep(0.1)
            planned = steps.plan(
                context,
                ORGANIZATION,
                "cell-2",
                options=MoveOptions(**{**QUICK, "strategy": "online", **options}),
                record=True,
            )
            assert planned.migration is not None
            for step in (steps.copy, steps.sync, steps.verify, steps.cutover):
                step(context, planned.migration)
            return planned.migration

    def _reported(self, context: Context) -> int:
        found = context.topology.client_figures(ORGANIZATION, "cell-1", 1)
        return found.operations if found else 0

    def soak(self, migration: int) -> Any:
        with self.context() as context:
            return steps.soak(context, migration)

    def migration(self, migration: int) -> Migration:
        return self.sample.topology.migration(migration)

    def sabotage(self, statement: str, cell: str = "cell-2") -> None:
        with self.sample.postgres(cell) as connection:
            connection.execute(statement.encode())

    def lost(self) -> Mapping[str, int]:
        self.stop()
        return self.sample.faults()


@pytest.fixture
def ferried(sample: Sample, tmp_path: Path) -> Iterator[Ferried]:
    """The sample's cells, prepared; `smoke.yaml` beside `cells.yaml` is read if it is there."""
    connections = {"cellferry-topology": sample.topology_url}
    cells = {}
    for name, place in sample.application.places.items():
        for kind, url in (("postgres", place.postgres), ("redis", place.redis)):
            connections[f"{name}-{kind}"] = connections[f"{name}-{kind}-admin"] = url
        cells[name] = {
            "stores": {
                "postgres": {
                    "connection": f"{name}-postgres",
                    "admin_connection": f"{name}-postgres-admin",
                },
                "redis": {
                    "connection": f"{name}-redis",
                    "admin_connection": f"{name}-redis-admin",
                    "key_prefix": "org:{$organization}:",
                    "application_user": "org-$organization",
                },
            }
        }
    data_map = Path(__file__).parents[2] / "include/config/data_maps/app.yaml"
    written = {"organization": {"data_map": str(data_map)}, "cells": cells}
    (tmp_path / "cells.yaml").write_text(json.dumps(written), encoding="utf-8")
    loaded = settings.load(tmp_path / "cells.yaml")
    with RouteClient(
        sample.topology_url, application="test", ttl_s=0.5, report_every_s=0.3
    ) as router:
        made = Ferried(sample, loaded, connections, router, tmp_path)
        with made.context() as context:
            for name in cells:
                steps.prepare_cell(context, name)
        yield made
        made.stop()


BROKEN = """
CREATE FUNCTION public.broken() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'the disk of this table is broken'; END $$;
CREATE TRIGGER broken BEFORE INSERT OR UPDATE ON public.issues
    FOR EACH ROW WHEN (NEW.organization_id = 102) EXECUTE FUNCTION public.broken();
"""
REPAIRED = "DROP TRIGGER broken ON public.issues; DROP FUNCTION public.broken();"
DENIED = "REVOKE INSERT, UPDATE, DELETE ON public.issues, public.notes FROM app"
GRANTED = DENIED.replace("REVOKE", "GRANT").replace("FROM", "TO")
SLOW = BROKEN.replace("RAISE EXCEPTION 'the disk of this table is broken'", "PERFORM pg_sleep(1)")
SLOW = SLOW.replace("; END", "; RETURN NEW; END")


# ── what clients see ────────────────────────────────────────────────────────────────────────────


def test_a_healthy_organization_passes_and_its_figures_are_kept(ferried: Ferried) -> None:
    ferried.start()
    migration = ferried.cut_over()
    result = ferried.soak(migration)

    assert ferried.migration(migration).state is State.RETAINED
    facts = ferried.migration(migration).facts["soaked"]
    verdicts = {one["check"]: one["verdict"] for one in facts["findings"]}
    assert verdicts["errors"] == "well"
    assert verdicts["lag"] == "well"
    assert "unwell" not in verdicts.values()
    assert facts["before"]["operations"] >= 60
    assert facts["samples"]
    assert facts["watched_s"] >= QUICK["soak_s"]
    shown = [one for one in ferried.notes if one.phase == "soak"]
    assert shown[-1].note.startswith("errors ")
    for words in ("(before ", "p95 ", "ms", "lag "):
        assert words in shown[-1].note
    assert "the old cell can take it back" in result.summary
    assert ferried.lost() == {}


def test_a_fault_at_the_new_cell_is_found_and_halts(ferried: Ferried) -> None:
    ferried.start()
    # Of few operations before nobody can tell how many may have failed.
    migration = ferried.cut_over(reported=300, soak_s=60)  # the breach ends it
    ferried.sabotage(BROKEN)
    with pytest.raises(Breached) as breached:
        ferried.soak(migration)

    text = str(breached.value)
    for words in ("operations fail in cell-2", "in cell-1 before", "the limit is", "cell-2 serves"):
        assert words in text
    found = ferried.migration(migration)
    assert found.state is State.SOAKING
    assert found.halted
    assert "operations fail in cell-2" in found.halted
    assert ferried.sample.topology.route(ORGANIZATION).cell == "cell-2"
    with pytest.raises(Breached):  # repeated: it says so again and does nothing
        ferried.soak(migration)
    with ferried.context() as context, pytest.raises((Halted, WrongState)):
        steps.cleanup(context, migration)


def test_a_halt_that_a_person_cleared_lets_soak_watch_again(ferried: Ferried) -> None:
    ferried.start()
    migration = ferried.cut_over(reported=300, soak_s=15)
    ferried.sabotage(BROKEN)
    with pytest.raises(Breached):
        ferried.soak(migration)
    ferried.sabotage(REPAIRED)
    ferried.sample.topology.clear_halt("migration", str(migration), "repaired", Actor("ada"))
    ferried.soak(migration)

    found = ferried.migration(migration)
    assert found.state is State.RETAINED
    assert found.facts["breach"] is None


@pytest.mark.parametrize(
    ("fault", "check"),
    [pytest.param(DENIED, "errors", id="denied"), pytest.param(SLOW, "latency", id="slow")],
)
def test_a_breach_rolls_back_without_loss_when_asked_to(
    ferried: Ferried, fault: str, check: str
) -> None:
    # Enough of them that those of a machine that stood still are no 95th percentile.
    ferried.start(sessions=6, writes_per_s=120)
    migration = ferried.cut_over(
        reported=1_000,
        roll_back_on_breach=True,
        soak_s=120,  # the breach ends it
        soak_latency_factor=2 if check == "latency" else 50,
        pause_budget_ms=30_000,
    )
    ferried.sabotage(fault)
    with pytest.raises(Breached, match="rolled back without loss") as breached:
        ferried.soak(migration)

    found = ferried.migration(migration)
    assert found.facts["breach"]["check"] == check
    assert found.facts["breach"]["roll_back"] == "done"
    assert found.state is State.ROLLED_BACK
    assert found.halted
    assert "cell-1 serves again" in str(breached.value)
    route = ferried.sample.topology.route(ORGANIZATION)
    assert (route.cell, route.epoch) == ("cell-1", 3)
    time.sleep(0.5)  # writers go on at the old cell
    assert ferried.lost() == {}


def test_a_roll_back_that_fails_leaves_it_halted_with_both_reasons(ferried: Ferried) -> None:
    ferried.start()
    migration = ferried.cut_over(reported=300, roll_back_on_breach=True, soak_s=60)
    ferried.sabotage(
        "SET session_replication_role = replica; UPDATE public.labels SET color = '#123456' "
        "WHERE id = (SELECT min(id) FROM public.labels WHERE organization_id = 102)",
        "cell-1",
    )
    ferried.sabotage(DENIED)
    with pytest.raises(Breached) as breached:
        ferried.soak(migration)

    found = ferried.migration(migration)
    assert found.halted
    assert found.last_error
    for words in ("operations fail in cell-2", "rolling back automatically failed", "labels"):
        assert words in found.last_error
        assert words in str(breached.value)
    assert ferried.sample.topology.route(ORGANIZATION).cell == "cell-2"
    attempts = found.attempt
    with pytest.raises(Breached, match="automatically failed"):
        ferried.soak(migration)  # once, not again and again
    assert ferried.migration(migration).attempt == attempts


def test_a_roll_back_that_was_killed_is_finished_by_the_next_soak(ferried: Ferried) -> None:
    ferried.start()
    migration = ferried.cut_over(reported=300, roll_back_on_breach=True, soak_s=60)
    ferried.sabotage(DENIED)

    def kill(phase: Phase) -> None:
        if phase is Phase.FLIPPED:
            raise KilledError

    phases.listen(kill)
    try:
        with pytest.raises(KilledError):
            ferried.soak(migration)
    finally:
        phases.listen(None)
    with pytest.raises(Breached, match="cell-1 serves again"):
        ferried.soak(migration)

    assert ferried.migration(migration).facts["handed_back"]
    assert ferried.lost() == {}


def test_a_roll_back_that_may_yet_end_is_not_called_failed(ferried: Ferried) -> None:
    ferried.start()
    migration = ferried.cut_over(reported=300, roll_back_on_breach=True, soak_s=60)
    ferried.sabotage(DENIED)

    def unknown(phase: Phase) -> None:
        if phase is Phase.FINISHED:
            raise OutcomeUnknown("the topology does not say")

    phases.listen(unknown)
    try:
        with pytest.raises(Breached, match="is not over: the topology does not say") as breached:
            ferried.soak(migration)
    finally:
        phases.listen(None)
    assert "serves on" not in str(breached.value)
    assert ferried.migration(migration).facts["breach"]["roll_back"] == "begun"

    with pytest.raises(Breached, match="cell-1 serves again"):
        ferried.soak(migration)
    assert ferried.lost() == {}


def test_a_burst_of_errors_that_is_over_halts_nothing(
    ferried: Ferried, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays in the figures of the last minute for longer than a breach needs."""
    monkeypatch.setattr(soak, "EVERY_S", 0.2)
    ferried.start(sessions=6, writes_per_s=90)
    migration = ferried.cut_over(reported=400, soak_s=8, breach_s=2)
    ferried.sabotage(DENIED)
    figures = ferried.sample.topology.client_figures
    assert eventually(
        lambda: (seen := figures(ORGANIZATION, "cell-2", 2)) is not None and seen.failures >= 100
    )
    ferried.sabotage(GRANTED)
    ferried.soak(migration)

    samples = ferried.migration(migration).facts["soaked"]["samples"]
    suspicious = [datetime.fromisoformat(one["at"]) for one in samples if "errors" in one["unwell"]]
    assert len(suspicious) >= 4
    assert (suspicious[-1] - suspicious[0]).total_seconds() > 2, "it was over too soon to tell"
    assert ferried.migration(migration).halted is None


def test_without_reports_soak_says_so(cells: TwoCells) -> None:
    acme = cells.add_organization(7, issues=3)
    migration = move(cells, acme)
    with cells.context() as context:
        result = steps.soak(context, migration)
    assert "no reports of the organization's clients" in result.summary
    findings = cells.migration(migration).facts["soaked"]["findings"]
    verdicts = {one["check"]: one["verdict"] for one in findings}
    assert verdicts == {
        "errors": "unknown",
        "latency": "unknown",
        "refusals": "unknown",
        "lag": "well",
    }


def test_clients_that_stay_at_the_old_cell_are_found(cells: TwoCells) -> None:
    acme = cells.add_organization(7, issues=3)
    migration = move(cells, acme, breach_s=1, route_ttl_s=0.2, soak_s=120, roll_back_on_breach=True)
    stop = threading.Event()

    def ignore_the_answer() -> None:
        url = cells.connections["cellferry-topology"]
        with RouteClient(url, application="stubborn", report_every_s=0.1) as client:
            while not stop.wait(0.02):
                client.observe(Route("7", "cell-1", 1), 0.001, Moved("7", "cell-2", 2))

    thread = threading.Thread(target=ignore_the_answer)
    thread.start()
    try:
        time.sleep(0.5)
        with cells.context() as context, pytest.raises(Breached, match="turned away") as breached:
            steps.soak(context, migration)
    finally:
        stop.set()
        thread.join()
    assert "cell-2 serves on" in str(breached.value)
    assert cells.migration(migration).state is State.SOAKING, "going back would not help them"


# ── cells ───────────────────────────────────────────────────────────────────────────────────────


def move(cells: TwoCells, organization: Organization, **options: Any) -> int:
    migration = cells.plan(organization, **options)
    with cells.context() as context:
        for step in (steps.copy, steps.sync, steps.verify, steps.cutover):
            step(context, migration)
    return migration


def test_a_lost_connection_is_made_anew(cells: TwoCells, monkeypatch: pytest.MonkeyPatch) -> None:
    acme = cells.add_organization(7, issues=3)
    migration = move(cells, acme, soak_s=3)
    monkeypatch.setattr(soak, "TRY_AGAIN_S", 0.1)
    cuts = []

    def rest(seconds: float) -> None:
        """Between two rounds, once."""
        time.sleep(seconds)
        if cuts:
            return
        cuts.append(seconds)
        with cells.admin("cell-2") as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name LIKE 'cellferry:%' AND datname = current_database()"
            )

    monkeypatch.setattr(soak, "time", SimpleNamespace(monotonic=time.monotonic, sleep=rest))
    with cells.context() as context:
        steps.soak(context, migration)
    assert len(cuts) == 1
    assert cells.migration(migration).state is State.RETAINED
    assert cells.migration(migration).attempt > 5


def test_a_cell_that_does_not_answer_halts_with_its_name(
    cells: TwoCells, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = cells.add_organization(7, issues=3)
    migration = move(cells, acme, soak_s=60, breach_s=0.2, soak_lag_s=0.5)
    monkeypatch.setattr(soak, "TRY_AGAIN_S", 0.1)
    cells.connections["cell-1-postgres"] = "postgresql://nobody@127.0.0.1:1/absent"
    with cells.context() as context, pytest.raises(Breached, match="last reverse round") as found:
        steps.soak(context, migration)
    assert "cell-1/postgres" in str(found.value)
    assert cells.migration(migration).halted


def test_a_soak_that_was_superseded_halts_nothing(
    cells: TwoCells, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = cells.add_organization(7, issues=3)
    migration = move(cells, acme, soak_s=60, breach_s=0.2, soak_lag_s=0.5)
    monkeypatch.setattr(soak, "TRY_AGAIN_S", 0.1)
    found_breach = Watch.sample_without

    def taken_over(watch: Watch, error: TransientError) -> None:
        found_breach(watch, error)
        if watch.breach is not None:
            with cells.context() as other:
                other.topology.take_lease(migration, "a person's roll-back", Actor("ada"))

    monkeypatch.setattr(Watch, "sample_without", taken_over)
    cells.connections["cell-1-postgres"] = "postgresql://nobody@127.0.0.1:1/absent"
    with cells.context() as context, pytest.raises(LeaseLost):
        steps.soak(context, migration)
    assert cells.migration(migration).halted is None
    assert not cells.migration(migration).facts.get("breach")


def test_a_halt_for_another_reason_does_not_roll_back(cells: TwoCells) -> None:
    acme = cells.add_organization(7, issues=3)
    migration = move(cells, acme, soak_s=3_000, roll_back_on_breach=True)
    breach = {"check": "errors", "text": "soak: x", "halt": "soak: x", "roll_back": "begun"}

    def hear(event: Any) -> None:
        if event.phase == "soak":
            raise KilledError

    with cells.context() as context:
        topology = context.topology
        topology.record_and_halt(
            migration,
            topology.migration(migration).attempt,
            {"breach": breach},
            "soak: x",
            Actor("cellferry"),
        )
        topology.clear_halt("migration", str(migration), "it may stay", Actor("ada"))
        topology.set_halted(migration, "not before Monday", Actor("ada"))
        with pytest.raises(Halted, match="not before Monday"):
            steps.soak(context, migration)
        assert topology.route("7").cell == "cell-2"

        topology.clear_halt("migration", str(migration), "Monday", Actor("ada"))
        context.listener = hear
        with pytest.raises(KilledError):
            steps.soak(context, migration)
    assert cells.migration(migration).facts["breach"] is None


def test_a_killed_soak_goes_on_where_it_was(
    cells: TwoCells, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = cells.add_organization(7, issues=3)
    migration = move(cells, acme, soak_s=3_000)
    monkeypatch.setattr(soak, "KEEP_S", 0.0)
    shown: list[int] = []

    def watched(context: Context, kill_at: int) -> None:
        def hear(event: Any) -> None:
            if event.phase == "soak":
                shown.append(event.done)
                if event.done >= kill_at:
                    raise KilledError

        context.listener = hear
        with pytest.raises(KilledError):
            steps.soak(context, migration)

    with cells.context() as context:
        watched(context, 3)
        first = len(shown)
        watched(context, 4)
    assert shown[-1] >= 4
    assert shown[first] >= 2, "it began from the start"


# ── smoke queries ───────────────────────────────────────────────────────────────────────────────

ISSUES = "SELECT count(*) FROM public.issues WHERE organization_id = :organization"


def smoke(cells: TwoCells, tmp_path: Path, *queries: Mapping[str, Any]) -> None:
    path = tmp_path / "smoke.yaml"
    written = [
        {"name": f"query {number}", "store": "postgres", "query": ISSUES, **one}
        for number, one in enumerate(queries)
    ]
    path.write_text(json.dumps({"smoke_queries": written}), encoding="utf-8")
    cells.settings = cells.settings.model_copy(
        update={
            "organization": cells.settings.organization.model_copy(update={"smoke_queries": path})
        }
    )


def test_smoke_queries_are_asked_on_both_sides_and_leave_nothing(
    cells: TwoCells, tmp_path: Path
) -> None:
    acme = cells.add_organization(7, issues=3)
    cells.add_organization(8, issues=50)
    smoke(
        cells,
        tmp_path,
        {"expect": {"equals": 3}, "side": "both"},
        {"expect": "equals", "compare": "before"},
        {
            "store": "redis",
            "query": "LLEN org:{:organization}:queue",
            "expect": {"equals": 3},
            "side": "both",
        },
        {
            "store": "redis",
            "query": ["GET", "org:{:organization}:counter"],
            "expect": "at_least",
            "compare": "before",
        },
    )
    migration = move(cells, acme)
    before = {cell: cells.traces(cell) for cell in ("cell-1", "cell-2")}
    with cells.context() as context:
        steps.soak(context, migration)
        found = cells.migration(migration)
        assert found.facts["baseline"]["smoke"]["query 1"] == 3
        findings = [
            one
            for one in found.facts["soaked"]["findings"]
            if one["check"].startswith("smoke query")
        ]
        assert len(findings) == 6
        assert {one["verdict"] for one in findings} == {"well"}
        for cell in before:
            assert cells.traces(cell)["redis users"] == before[cell]["redis users"]
        steps.cleanup(context, migration)
        assert context.topology.live_resources(migration) == []


@pytest.mark.parametrize(
    ("query", "damage"),
    [
        ({"expect": {"at_least": 3}}, "DELETE FROM public.issues WHERE organization_id = 7"),
        (
            {"expect": "equals", "compare": "before"},
            "DELETE FROM public.issues WHERE organization_id = 7 AND title = 'issue 1'",
        ),
    ],
)
def test_a_smoke_query_that_fails_at_the_new_cell_halts(
    cells: TwoCells, tmp_path: Path, query: Mapping[str, Any], damage: str
) -> None:
    acme = cells.add_organization(7, issues=3)
    smoke(cells, tmp_path, query)
    migration = move(cells, acme, breach_s=0.5)
    with cells.admin("cell-2") as connection:
        connection.execute(damage.encode())
    with cells.context() as context, pytest.raises(Breached, match="smoke query 'query 0'") as why:
        steps.soak(context, migration)
    assert "cell-2" in str(why.value)
    assert cells.migration(migration).halted


WRITES = """
CREATE FUNCTION public.innocent(text) RETURNS bigint LANGUAGE sql AS
    $$ INSERT INTO public.plans VALUES (99, $1); SELECT 1::bigint $$
"""


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ({"query": "SELECT public.innocent(:organization)"}, "read-only transaction"),
        (
            {
                "query": "WITH gone AS (DELETE FROM public.issues WHERE organization_id = "
                ":organization RETURNING 1) SELECT count(*) FROM gone"
            },
            "WITH",
        ),
        ({"query": "SELECT * INTO public.x FROM public.issues WHERE id = :organization"}, "INTO"),
        ({"query": ISSUES + " FOR UPDATE"}, "FOR UPDATE"),
        ({"query": ISSUES.replace("public.issues", "public.absent")}, "public.absent"),
        ({"query": "SELECT count(*) FROM cell_secrets WHERE id = :organization"}, "cell_secrets"),
        ({"expect": {"at_least": 4}}, "before the move"),
        ({"store": "mongo"}, "there is no store 'mongo'"),
        ({"query": "DROP TABLE public.issues"}, "'DROP'"),
    ],
)
def test_a_bad_smoke_query_is_refused_before_anything_moves(
    cells: TwoCells, tmp_path: Path, query: Mapping[str, Any], says: str
) -> None:
    acme = cells.add_organization(7, issues=3)
    with cells.admin("cell-1") as connection:
        connection.execute(WRITES)
    smoke(cells, tmp_path, {"expect": {"at_least": 1}, **query})
    with cells.context() as context:
        for record in (False, True):
            with pytest.raises(InvalidInput) as refused:
                steps.plan(context, acme.slug, "cell-2", options=MoveOptions(), record=record)
            text = str(refused.value)
            for words in (says, "smoke.yaml", "'query 0'"):
                assert words in text
            assert refused.value.hint
        assert context.topology.migrations() == []
    assert len(cells.rows("cell-1", "7")["issues"]) == 3
    with cells.admin("cell-1") as connection:
        assert connection.execute("SELECT count(*) FROM plans").fetchone() == (2,)


def test_a_key_of_somebody_else_is_refused_before_the_cutover(
    cells: TwoCells, tmp_path: Path
) -> None:
    acme = cells.add_organization(7, issues=3)
    cells.add_organization(8)
    query = {"store": "redis", "query": "GET other:{:organization}:x", "expect": {"at_least": 0}}
    smoke(cells, tmp_path, query)
    migration = cells.plan(acme)
    with cells.context() as context:
        steps.copy(context, migration)
        steps.sync(context, migration)
        with pytest.raises(InvalidInput, match="not one of the organization's") as refused:
            steps.verify(context, migration)
    assert "smoke.yaml" in str(refused.value)
    assert cells.migration(migration).state is State.SYNCING


# ── the reports ─────────────────────────────────────────────────────────────────────────────────


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def reporter(bench: Bench) -> Iterator[RouteClient]:
    with RouteClient(bench.url, application="web", report_every_s=0.1) as client:
        yield client


def reported(bench: Bench, operations: int, cell: str = "cell-1") -> bool:
    found = bench.topology.client_figures("1", cell, 1)
    return found is not None and found.operations >= operations


def test_run_counts_what_became_of_each_try(bench: Bench, reporter: RouteClient) -> None:
    answers: list[BaseException | None] = [BeingMoved("1"), psycopg.errors.SerializationFailure()]

    def operation(_route: Route) -> int:
        if answers:
            error = answers.pop(0)
            assert error is not None
            raise error
        return 1

    def fails(_route: Route) -> None:
        raise ValueError("no such issue")

    assert reporter.run("1", operation) == 1
    with pytest.raises(ValueError, match="no such issue"):
        reporter.run("1", fails)
    assert eventually(lambda: reported(bench, 2))
    found = bench.topology.client_figures("1", "cell-1", 1)
    assert found is not None
    counts = (found.operations, found.failures, found.conflicts, found.moved, found.being_moved)
    assert counts == (2, 1, 1, 0, 1)
    assert found.answered == 1


def test_reports_of_many_are_summed_and_the_old_ones_go(bench: Bench) -> None:
    clients = [RouteClient(bench.url, application=f"web{n}", report_every_s=0.1) for n in (1, 2)]
    for client in clients:
        for _ in range(50):
            client.observe(Route("1", "cell-1", 1), 0.01)
    assert eventually(lambda: reported(bench, 100))
    with psycopg.connect(bench.url, autocommit=True) as connection:
        connection.execute(
            "UPDATE topology.client_report SET reported_at = now() - interval '2 hours'"
        )
    clients[0].observe(Route("1", "cell-2", 1), 0.01)
    assert eventually(lambda: reported(bench, 1, "cell-2"))
    for client in clients:
        client.close()
    assert bench.topology.client_figures("1", "cell-1", 1) is None


def test_an_application_may_report_and_nothing_else(bench: Bench) -> None:
    with psycopg.connect(bench.url, autocommit=True) as connection:
        role = f"web_{random.randrange(10**9)}"
        connection.execute(
            f"CREATE ROLE {role} LOGIN PASSWORD 'web';"
            f"GRANT USAGE ON SCHEMA topology TO {role};"
            f"GRANT SELECT ON topology.route TO {role};".encode()
        )
        try:
            url = psycopg.conninfo.make_conninfo(bench.url, user=role, password="web")
            with RouteClient(url, report_every_s=0.1) as client:
                assert client.run("1", lambda route: route.cell) == "cell-1"
                time.sleep(0.5)
            assert bench.topology.client_figures("1", "cell-1", 1) is None, "without the grant"
            connection.execute(
                "GRANT EXECUTE ON FUNCTION topology.take_client_report"
                f"(text, double precision, jsonb) TO {role}".encode()
            )
            with RouteClient(url, report_every_s=0.1) as client:
                client.run("1", lambda route: route.cell)
                assert eventually(lambda: reported(bench, 1))
            with psycopg.connect(url) as own:
                for statement in (
                    "SELECT * FROM topology.client_report",
                    "DELETE FROM topology.client_report",
                ):
                    with pytest.raises(psycopg.errors.InsufficientPrivilege):
                        own.execute(statement.encode())
                    own.rollback()
        finally:
            connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())


def test_a_topology_that_is_away_costs_an_operation_nothing() -> None:
    with RouteClient(
        "postgresql://nobody@127.0.0.1:1/absent", report_every_s=0.01, listen=False
    ) as client:
        client.learn("1", "cell-1", 1)
        for _ in range(500):
            assert client.run("1", lambda route: route.epoch) == 1
            time.sleep(0.000_2)


def test_reports_are_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellferry.routing.reporter.MOST", 10)
    monkeypatch.setattr("cellferry.routing.reporter._CLOSING_S", 120.0)
    with RouteClient(bench.url, report_every_s=60) as client:
        for number in range(100):
            client.observe(Route(str(number), "cell-1", 1), 0.01)
    with psycopg.connect(bench.url) as connection:  # closing sent what there was
        row = connection.execute("SELECT count(*) FROM topology.client_report").fetchone()
    assert row == (10,)


def test_without_being_asked_nothing_is_reported(bench: Bench) -> None:
    with RouteClient(bench.url) as client:
        client.run("1", lambda route: route.cell)
        assert not any(one.name == "cellferry-reports" for one in threading.enumerate())
