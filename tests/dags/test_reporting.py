"""The report says which organization failed, why, and what to do."""

from __future__ import annotations

import pytest

from cellferry.errors import Unreachable
from cellferry.orchestration.reporting import (
    START_CLEAN_UP_RUN,
    START_NEXT_RUN,
    Lane,
    complaint,
    keep_evidence,
    lane,
    not_handed_on,
    plan_row,
    table,
)

STEPS = ("plan", "copy", "sync")


def states(index: int, *values: str | None) -> dict[str, str | None]:
    return {
        f"organization.{step}_{index}": value for step, value in zip(STEPS, values, strict=True)
    }


def test_skipped_tasks_are_no_failure() -> None:
    found = lane(0, "acme", "organization", STEPS, states(0, "success", "skipped", "skipped"))
    assert found.ok


def test_the_first_failed_step_is_named() -> None:
    found = lane(
        1, "acme", "organization", STEPS, states(1, "success", "failed", "upstream_failed")
    )
    assert (found.failed_step, found.ok) == ("copy", False)


def test_a_task_that_never_started_is_a_failure() -> None:
    found = lane(1, "acme", "organization", STEPS, states(1, "success", "success", None))
    assert found.failed_step == "sync"


def test_lanes_are_not_mixed_up() -> None:
    found = lane(
        1,
        "acme",
        "organization",
        STEPS,
        states(11, "failed", "failed", "failed") | states(1, "success", "success", "success"),
    )
    assert found.ok


def test_no_complaint_when_all_went_well() -> None:
    assert complaint([Lane(0, "acme", None)], "organization") is None


def test_the_complaint_says_which_why_and_what_to_do() -> None:
    text = complaint(
        [
            Lane(0, "acme", None),
            Lane(1, "globex", "cutover", "failed", "a transaction is open", "end it"),
        ],
        "organization",
    )
    assert text is not None
    assert "1 of 2 organizations failed" in text
    assert "globex at cutover: a transaction is open" in text
    assert "Remedy: end it" in text
    assert "clear organization.cutover with map index 1" in text
    assert "acme" not in text


@pytest.mark.parametrize(
    "lanes", [[], [Lane(0, "acme", None)], [Lane(0, "acme", "copy", "failed")]]
)
@pytest.mark.parametrize("task", [START_NEXT_RUN, START_CLEAN_UP_RUN])
def test_a_run_that_was_not_handed_on_is_a_failure(task: str, lanes: list[Lane]) -> None:
    handing_on = not_handed_on({START_NEXT_RUN: "success", START_CLEAN_UP_RUN: "skipped"})
    assert handing_on == not_handed_on({}) == []

    handing_on = not_handed_on({task: "failed", "organization.plan_0": "failed"})
    text = complaint(lanes, "organization", handing_on)
    assert text is not None
    assert f"{task} ended as failed: the " in text
    assert f"Clear {task}" in text


def test_a_killed_task_without_a_message_is_still_explained() -> None:
    text = complaint([Lane(0, "acme", "copy", "failed")], "organization")
    assert text is not None
    assert "left no message; see its log" in text


def test_table_aligns_and_leaves_empty_columns_out() -> None:
    assert table(
        [
            {"organization": "acme", "rows": "1,234", "deleted": ""},
            {"organization": "hooli-inc", "rows": "5", "deleted": ""},
        ]
    ).splitlines() == [
        "organization   rows",
        "------------  -----",
        "acme          1,234",
        "hooli-inc         5",
    ]


def test_a_blocked_plan_shows_its_blockers() -> None:
    plan = {
        "source": "cell-1",
        "destination": "cell-2",
        "strategy": "online",
        "copy_s": 4.0,
        "pause_s": 0.04,
        "totals": {"postgres": {"count": 1200, "unit": "rows", "bytes": 5_000_000}},
        "blockers": ["schema-differs"],
    }
    row = plan_row("acme", plan)
    assert row["outcome"] == "blocked: schema-differs"
    assert (row["rows"], row["size"], row["write pause"]) == ("1,200", "4.8 MiB", "about 40 ms")


def test_a_pack_that_cannot_be_written_fails_no_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def export(_: object, migration: int) -> None:
        asked.append(migration)
        raise Unreachable("the topology does not answer")

    monkeypatch.setattr("cellferry.evidence.export_pack", export)
    monkeypatch.delenv("CELLFERRY_EVIDENCE", raising=False)
    keep_evidence(object(), [1, 2])  # type: ignore[arg-type]
    assert asked == [], "this deployment keeps none"
    monkeypatch.setenv("CELLFERRY_EVIDENCE", "/srv/evidence")
    with caplog.at_level("WARNING"):
        keep_evidence(object(), [1, 2])  # type: ignore[arg-type]
    assert asked == [1, 2]
    assert "no evidence pack of migration 2: the topology does not answer" in caplog.text
