"""`steer_organizations`: what it accepts, and what it does to each target."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import RetryAction

from cellferry.errors import Halted, InvalidInput, Paused
from cellferry.migration.options import MoveOptions
from cellferry.orchestration import params, reporting
from cellferry.orchestration.retry_policy import RETRY_POLICY
from cellferry.orchestration.steering import find_targets, steer_one
from cellferry.orchestration.validation import wave
from fixtures.topology import ACTOR, Bench

GOOD: dict[str, Any] = {
    "action": "pause",
    "reason": "release tonight",
    "organizations": ["ant"],
    "cohorts": [],
    "cells": [],
}


@pytest.fixture
def ferry(bench: Bench) -> Any:
    """As much of a context as pausing and halting need."""
    return SimpleNamespace(topology=bench.topology, actor=ACTOR)


def planned(bench: Bench, organization: str = "1", cohort: str | None = None) -> int:
    return bench.topology.create_migration(
        organization, "cell-2", "online", {}, None, ACTOR, cohort=cohort
    ).id


def test_each_named_thing_becomes_a_target(bench: Bench, ferry: Any) -> None:
    migration = planned(bench)
    given = {**GOOD, "action": "halt", "cohorts": ["wave-1"], "cells": ["cell-2"]}
    assert find_targets(ferry, given) == [
        {"scope": "organization", "name": "ant", "migration": migration},
        {"scope": "cohort", "name": "wave-1", "migration": None},
        {"scope": "cell", "name": "cell-2", "migration": None},
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"organizations": []}, "nothing is named"),
        ({"organizations": ["ante"]}, "no organization 'ante'.*did you mean ant"),
        ({"organizations": ["bee"]}, "bee has never moved"),
        ({"reason": "   "}, "a reason is needed"),
        ({"cells": ["cell-2"]}, "pause is for organizations, not for cohorts and cells"),
    ],
)
def test_bad_input_changes_nothing(
    bench: Bench, ferry: Any, change: dict[str, Any], says: str
) -> None:
    planned(bench)
    with pytest.raises(InvalidInput, match=says):
        find_targets(ferry, {**GOOD, **change})


def test_pause_and_resume_reach_the_migration(bench: Bench, ferry: Any) -> None:
    migration = planned(bench)
    (target,) = find_targets(ferry, GOOD)
    for _ in range(2):
        steer_one(ferry, "pause", target, "release tonight")
        found = bench.topology.migration(migration)
        assert (found.paused, found.paused_reason) == (True, "release tonight")
    steer_one(ferry, "resume", target, "released")
    assert not bench.topology.migration(migration).paused


@pytest.mark.parametrize(
    ("scope", "name"), [("organization", "ant"), ("cohort", "wave-1"), ("cell", "cell-1")]
)
def test_halts_are_set_and_cleared(bench: Bench, ferry: Any, scope: str, name: str) -> None:
    migration = planned(bench, cohort="wave-1")
    target = {"scope": scope, "name": name, "migration": migration}
    steer_one(ferry, "halt", target, "look at it")
    assert [one.reason for one in bench.topology.halts_on(migration)] == ["look at it"]
    cleared = steer_one(ferry, "clear-halt", target, "looked")
    assert "no longer halted (look at it)" in cleared.summary
    assert bench.topology.halts() == []


def test_an_unknown_action_is_refused(ferry: Any) -> None:
    with pytest.raises(InvalidInput, match="no action 'stop'"):
        steer_one(ferry, "stop", {"scope": "cell", "name": "cell-1"}, "because")


@pytest.mark.parametrize("kind", [Paused, Halted])
def test_a_stopped_step_fails_at_once_and_says_what_to_do(kind: type[Exception]) -> None:
    decision = RETRY_POLICY.evaluate(kind("x"), try_number=1, max_tries=6)
    assert decision.action is RetryAction.FAIL
    assert "resume it or clear the halt" in (decision.reason or "")


def test_the_cohort_is_the_run_that_the_wave_began_with() -> None:
    base = "manual__2026-11-21T04:00:00+00:00"
    assert [wave(base), wave(f"{base}.part-2-of-3")] == [base, base]
    request = params.read_move_request({"organizations": ["ant"], "destination": "cell-2"})
    assert request.options_of(base) == MoveOptions(cohort=base)
    named = params.read_move_request(
        {"organizations": ["ant"], "destination": "cell-2", "cohort": "pilot"}
    )
    assert named.options_of(base).cohort == "pilot"


def test_the_report_says_who_is_paused_or_halted(bench: Bench) -> None:
    migration = planned(bench)
    lane = reporting.Lane(0, "ant", "copy", "failed")
    bench.topology.set_paused(migration, True, ACTOR, "lunch")
    bench.topology.set_halted(migration, "look", ACTOR)
    row = reporting.move_row(lane, bench.topology.migration(migration))
    assert row["outcome"] == "FAILED at copy, planned, paused, halted"


def test_the_report_lists_the_halts(
    bench: Bench, ferry: Any, caplog: pytest.LogCaptureFixture
) -> None:
    planned(bench, cohort="wave-1")
    bench.topology.halt("cohort", "wave-1", "2 of its migrations failed", ACTOR)
    reporting.say_halts(ferry)
    assert "cohort wave-1 by ada" in caplog.text
    assert "cellferry clear-halt cohort wave-1 --reason" in caplog.text
