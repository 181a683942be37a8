"""`cellferry simulate`: what it reads, what it answers, and whether that makes sense."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from rich.console import Console

from cellferry.cli import main
from cellferry.errors import InvalidInput
from cellferry.simulation import cohorts, rates, report, simulator
from cellferry.simulation.cohorts import Options, Scenario, Spread
from cellferry.simulation.rates import Cost, Rates, StageRates

ROWS_PER_S = 100_000


def scenario(**changes: Any) -> dict[str, Any]:
    """One cohort of 10 organizations of 1,000,000 rows, between two cells, without Airflow."""
    machine = {"name": "here", "cores": 100, "slots": 100, "airflow": False}
    machine |= {"at_once": dict.fromkeys(("plan", "copy", "verify", "cutover", "cleanup"), 100)}
    machine |= {"barriers": 100}
    cohort = {"name": "c", "count": 10, "source": "old", "destinations": ["new"], "rows": 1e6}
    cohort |= {"options": {"soak_s": 0, "ttl_s": 0}} | changes.pop("cohort", {})
    found = {
        "cells": {"old": {}, "new": {}} | changes.pop("cells", {}),
        "cohorts": [cohort],
        "machines": [machine | changes.pop("machine", {})],
        "rates": {
            "copy": {"per_million_rows": {"seconds": 10, "mover": 1}},
            "cutover": {"fixed": {"seconds": 1}},
        },
        "orchestration": {},
    }
    return found | changes


def forecast(**changes: Any) -> simulator.Forecast:
    made = Scenario.model_validate(scenario(**changes))
    (found,) = simulator.forecast(made, made.rates_over(Rates()))
    return found


# --- the model --------------------------------------------------------------------------------


def test_organizations_that_are_not_in_each_others_way_take_as_long_as_one() -> None:
    assert forecast().moved_s == pytest.approx(11)


def test_moves_share_the_budget_of_their_cell() -> None:
    """10 million rows at 500,000 a second are 20 s; the cutovers follow."""
    found = forecast(cells={"old": {"rows_per_s": 500_000}})
    assert found.moved_s == pytest.approx(21)
    assert next(iter(found.held_up_by)) == "rows/s of old"


def test_moves_share_the_cores() -> None:
    """10 s of processor time on a quarter of a core."""
    found = forecast(machine={"cores": 0.25})
    assert found.moved_s == pytest.approx(41)
    assert next(iter(found.held_up_by)) == "cores of the workers"


def test_a_throttle_slows_each_move() -> None:
    found = forecast(cohort={"options": {"rows_per_s": 50_000, "soak_s": 0, "ttl_s": 0}})
    assert found.moved_s == pytest.approx(21)


def test_only_so_many_moves_are_in_a_cell() -> None:
    found = forecast(cells={"new": {"moves_at_once": 5}})
    assert found.moved_s == pytest.approx(22)
    assert found.held_up_by["moves at once in new"] == pytest.approx(0.5)


def test_waves_wait_for_a_run() -> None:
    found = forecast(machine={"wave": 5, "runs_at_once": 1})
    assert found.moved_s == pytest.approx(22)
    assert found.at_once == 5


def test_cutovers_go_one_after_the_other() -> None:
    found = forecast(machine={"barriers": 1})
    assert found.moved_s == pytest.approx(20)


def test_a_short_ttl_is_waited_for_in_the_run_from_the_flip_on() -> None:
    found = forecast(cohort={"options": {"soak_s": 5, "ttl_s": 30}})
    assert found.moved_s == pytest.approx(16)
    assert found.over_s == pytest.approx(41)


def test_a_long_ttl_keeps_no_run() -> None:
    short, long = (
        forecast(
            machine={"wave": 5, "runs_at_once": 1, "wait_in_run_s": 3_600},
            cohort={"options": {"soak_s": 0, "ttl_s": ttl_s}},
        )
        for ttl_s in (3_600, 7_200)
    )
    assert short.moved_s == pytest.approx(11 + 3_600 + 11)
    assert long.moved_s == pytest.approx(22)
    assert long.over_s == pytest.approx(22 + 7_200)


def test_freeze_first_copies_under_the_gate() -> None:
    found = forecast(cohort={"options": {"strategy": "freeze-first", "soak_s": 0, "ttl_s": 0}})
    assert found.pause_s == pytest.approx(11)
    assert forecast().pause_s == pytest.approx(1)


def test_rounds_bring_what_changed_during_the_round_before() -> None:
    """10 s of copy at 1,000 changes/s, 10,000 rows/s in rounds: 1 + 0.1 s, then it is short."""
    given = scenario(cohort={"count": 1, "changed_rows_per_s": 1_000})
    given["rates"] |= {"sync": {"per_million_rows": {"seconds": 100}}}
    made = Scenario.model_validate(given)
    (found,) = simulator.forecast(made, made.rates_over(Rates()))
    assert found.moved_s == pytest.approx(10 + 1.1 + 1)


def test_an_organization_that_changes_too_fast_is_given_up_and_frees_its_place() -> None:
    given = scenario(
        cohort={"count": 3, "changed_rows_per_s": 20_000}, cells={"old": {"moves_at_once": 1}}
    )
    given["rates"] |= {"sync": {"per_million_rows": {"seconds": 100}}}
    made = Scenario.model_validate(given)
    (found,) = simulator.forecast(made, made.rates_over(Rates()))
    assert (found.given_up, found.per_hour) == (3, 0)


def test_one_scheduler_hands_tasks_out_one_after_the_other() -> None:
    """Six tasks for each organization: soak is short, and goes with the cutover."""
    found = forecast(
        cohort={"rows": 1, "count": 100},
        machine={"airflow": True, "scheduler_apart": True, "wave": 25, "small": 0},
        rates={},
        orchestration={"scheduler_s": 0.1},
    )
    assert found.over_s == pytest.approx((100 * 6 - 1) * 0.1)  # from the first plan on
    assert next(iter(found.held_up_by)) == "schedulers"


def test_small_organizations_need_fewer_tasks() -> None:
    """Plan with copy, sync and verify; cutover with soak; clean-up."""
    found = forecast(
        cohort={"rows": 1, "count": 100},
        machine={"airflow": True, "scheduler_apart": True, "wave": 25},
        rates={},
        orchestration={"scheduler_s": 0.1},
    )
    assert found.over_s == pytest.approx((100 * 3 - 1) * 0.1)


def test_small_organizations_never_wait_for_each_others_slots() -> None:
    """As many slots as moves in the cell, each of which needs a further slot to end."""
    found = forecast(
        cohort={"rows": 10, "count": 20},
        cells={"old": {"moves_at_once": 2}},
        machine={"airflow": True, "slots": 2},
        rates={"cutover": {"fixed": {"seconds": 1}}, "plan": {"fixed": {"seconds": 1}}},
    )
    assert found.per_hour > 0


def test_cells_on_the_same_cores_use_them_up() -> None:
    given = scenario(machine={"cells_here": True, "cores": 2})
    given["rates"]["copy"] = {"per_million_rows": {"seconds": 1, "source": 1, "destination": 1}}
    made = Scenario.model_validate(given)
    (found,) = simulator.forecast(made, made.rates_over(Rates()))
    assert found.moved_s == pytest.approx(11)


def test_cohorts_wait_for_those_they_come_after() -> None:
    given = scenario()
    second = given["cohorts"][0] | {"name": "d", "after": ["c"]}
    given["cohorts"].append(second)
    made = Scenario.model_validate(given)
    used = made.rates_over(Rates())
    apart = simulator.forecast(made, used)
    together = simulator.forecast(made, used, together=True)
    assert [one.moved_s for one in apart + together] == pytest.approx([11] * 4)
    given["cohorts"][1] = second | {"after": []}
    given["machines"][0]["cores"] = 0.5
    made = Scenario.model_validate(given)
    apart, together = (
        simulator.forecast(made, made.rates_over(Rates()), together=one) for one in (False, True)
    )
    assert together[0].moved_s > apart[0].moved_s


def test_the_requirements_cohorts_are_complete_and_the_same_each_time() -> None:
    made = cohorts.load(None)
    assert {one.name: one.count for one in made.cohorts} == {
        "0": 100, "A": 5_000, "B": 1_000, "C": 300, "D": 10_000,
    }  # fmt: skip
    small = made.narrowed(["0"], ["2 cores"])
    used = small.rates_over(rates.defaults())
    first, second = (simulator.forecast(small, used) for _ in range(2))
    assert first == second
    assert first[0].organizations == 100
    other = simulator.forecast(small.narrowed(seed=2), used)
    assert other[0].rows != first[0].rows


# --- what it reads ----------------------------------------------------------------------------


def test_a_spread_has_its_median_and_its_95th_percentile() -> None:
    chance = random.Random(1)
    drawn = sorted(
        Spread(median=1_000, p95=50_000, most=200_000).draw(chance) for _ in range(9_999)
    )
    assert statistics.median(drawn) == pytest.approx(1_000, rel=0.1)
    assert drawn[9_499] == pytest.approx(50_000, rel=0.15)
    assert drawn[-1] == 200_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cohort": {"count": 0}}, "cohorts.0.count: 0:"),
        ({"cohort": {"row": 5}}, "cohorts.0.row: there is no such setting, did you mean 'rows'?"),
        ({"cohort": {"source": "odl"}}, "there is no cell 'odl', did you mean 'old'?"),
        ({"cohort": {"destinations": ["old"]}}, "'old' is its source and its destination"),
        ({"cohort": {"after": ["z"]}}, "'z' is no cohort before it"),
        ({"cohort": {"rows": {"median": 9, "p95": 5}}}, "p95 5 is under the median 9"),
        ({"cohort": {"rows": "many"}}, "cohorts.0.rows: 'many':"),
        ({"machine": {"wave": 26}}, "machines.0.wave: 26:"),
        ({"machine": {"at_once": {"copie": 3}}}, "did you mean 'copy'?"),
        ({"cells": {"old": {"rows_per_s": 0}}}, "cells.old.rows_per_s: 0:"),
        ({"rates": {"copying": {}}}, "rates.copying: there is no such step, did you mean 'copy'?"),
        ({"rates": {"copy": {"fixed": {"seconds": -1}}}}, "rates.copy.fixed.seconds: -1:"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "cohorts.yaml"
    path.write_text(yaml.safe_dump(scenario(**change)), encoding="utf-8")
    with pytest.raises(InvalidInput) as caught:
        cohorts.load(path)
    assert message in caught.value.message
    assert str(path) in caught.value.message
    assert "--write" in str(caught.value.hint)


@pytest.mark.parametrize("text", ["", "- a\n", "{", "\x00", "cohorts: {"])
def test_what_is_no_file_of_cohorts_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cohorts.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidInput, match="cohorts"):
        cohorts.load(path)


# --- rates ------------------------------------------------------------------------------------


def test_measured_rates_come_back_from_the_table_they_were_written_to(tmp_path: Path) -> None:
    stages = {
        "copy": StageRates(
            fixed=Cost(seconds=0.5, mover=0.1), per_million_rows=Cost(seconds=6, source=3.5)
        ),
        "cutover": StageRates(fixed=Cost(seconds=0.25)),
    }
    table = {"title": rates.TABLE, "headings": rates.ROW_HEADINGS, "rows": rates.to_rows(stages)}
    content = {"circumstances": {"when": "2026-11-21 16:30 UTC"}, "tables": [table]}
    (tmp_path / "simulation.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    (tmp_path / "other.json").write_text('{"tables": 3, "circumstances": {}}', encoding="utf-8")
    parts = [
        ["tasks", 1.0, 0.5, 1.0, 0.4],
        ["scheduler", 0.25, 0.1, 0.25, None],
        ["API server", 0.4, 0.1, 0.4, None],
        ["PostgreSQL: topology, metadata", 0.5, 0.1, 0.5, 0.1],
        ["PostgreSQL: cells", 3.0, 0.3, 3.0, 2.0],
        ["Valkey", 0.1, 0.1, 0.1, 0.1],
        ["fleet: watch and reaper", 0.2, 0.1, 0.2, None],
        ["all", 4.65, 1.0, 4.65, 3.4],
    ]
    content = {
        "circumstances": {"when": "2026-11-21 16:20 UTC"},
        "tables": [
            {
                "title": "Organizations per hour",
                "headings": ["", "organizations", "processes each"],
                "rows": [["1 run of 10", 10, 3.0], ["8 runs of 25", 200, 2.0], ["alone", 60, None]],
            },
            {
                "title": "Where the processor time goes: 8 runs of 25",
                "headings": ["part", "CPU-s for each organization", "share", "beside", "alone"],
                "rows": parts,
            },
        ],
    }
    (tmp_path / "orchestration.json").write_text(json.dumps(content), encoding="utf-8")
    found = rates.measured(tmp_path)
    assert found.stages == stages
    assert found.orchestration.scheduler_s == pytest.approx(0.125)
    assert found.orchestration.task_s == pytest.approx((1.0 - 0.4 + 0.4 + 0.5 - 0.1) / 2)
    assert found.origins["copy"] == "measured (simulation.json, 2026-11-21 16:30 UTC)"
    filled = found.over(rates.defaults())
    assert filled.origins["plan"] == rates.DEFAULT_ORIGIN
    assert filled.of("copy") == stages["copy"]


def test_a_million_rows_cost_what_a_large_organization_cost(tmp_path: Path) -> None:
    content = {
        "circumstances": {"when": "2026-11-21 16:10 UTC"},
        "tables": [
            {"title": "", "headings": ["another"], "rows": [["table"]]},
            {
                "title": "",
                "headings": [
                    *("Contender", "rows", "wall s", "rows/s"),
                    *("CPU s: client", "source", "destination"),
                ],
                "rows": [
                    ["psql", 2_000_000, 8.0, 250_000, 1.0, 2.0, 6.0],
                    ["cellferry, with checkpoints", 2_000_000, 10.0, 200_000, 2.0, 3.0, 7.0],
                ],
            },
        ],
    }
    (tmp_path / "copying.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "verifying.json").write_text('{"tables": [], "circumstances": {}}', "utf-8")
    (tmp_path / "redis_copy.json").write_text("no JSON", encoding="utf-8")
    known = rates.defaults()
    found = rates.refined(known, tmp_path)
    slope = found.of("copy").per_million_rows
    assert slope == Cost(seconds=5.0, mover=1.0, source=1.5, destination=3.5)
    assert found.of("copy").fixed == known.of("copy").fixed
    assert found.of("verify") == known.of("verify")
    assert "copying.json" in found.origins["copy per million rows"]


def test_where_nothing_was_measured_the_defaults_say_so(tmp_path: Path) -> None:
    assert rates.measured(tmp_path / "absent") == Rates()
    found = Rates().over(rates.defaults())
    assert set(found.origins.values()) == {rates.DEFAULT_ORIGIN}
    assert set(found.stages) == set(rates.STAGES)


# --- what it answers --------------------------------------------------------------------------


def test_lengths_of_time_read_as_people_say_them() -> None:
    assert [report.span(one) for one in (1.5, 40, 300, 12_000, 864_000)] == [
        "1.5 s", "40 s", "5.0 min", "3.3 h", "10.0 d",
    ]  # fmt: skip


def test_a_sparkline_shows_little_as_something() -> None:
    assert report.sparkline([0, 0.01, 5, 10], 10) == " ▁▄█"
    assert report.sparkline([0, 0], 0) == "  "


def test_the_command_prints_a_table_and_its_rates(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(scenario()), encoding="utf-8")
    found = CliRunner().invoke(main, ["simulate", str(path)], env={"COLUMNS": "200"})
    assert found.exit_code == 0, found.output
    assert "here" in found.output
    assert "the file" in found.output
    answer = CliRunner().invoke(
        main, ["simulate", str(path), "--json", "--benchmarks", str(tmp_path)]
    )
    (one,) = json.loads(answer.output)["forecasts"]
    assert (one["cohort"], one["organizations"]) == ("c", 10)
    assert one["moved_s"] > 11  # what the file does not say is a default


def test_the_command_writes_a_file_to_start_from_and_never_over_one(tmp_path: Path) -> None:
    path = tmp_path / "cohorts.yaml"
    found = CliRunner().invoke(main, ["simulate", "--write", str(path)])
    assert found.exit_code == 0, found.output
    assert cohorts.load(path) == cohorts.load(None)
    again = CliRunner().invoke(main, ["simulate", "--write", str(path)])
    assert again.exit_code == 2
    assert "is there already" in again.output


def test_the_command_refuses_what_is_not_in_the_file() -> None:
    for arguments, wanted in (
        (["--cohort", "E"], "there is no cohort 'E'"),
        (["--machines", "8 worker"], "did you mean '8 workers'?"),
    ):
        found = CliRunner().invoke(main, ["simulate", *arguments])
        assert found.exit_code == 2
        assert wanted in found.output


def test_an_organization_that_changes_too_fast_is_pointed_out() -> None:
    given = scenario(cohort={"count": 3, "changed_rows_per_s": 20_000})
    given["rates"] |= {"sync": {"per_million_rows": {"seconds": 100}}}
    made = Scenario.model_validate(given)
    used = made.rates_over(Rates())
    console = Console(width=200, record=True)
    report.render(made, simulator.forecast(made, used), used, console)
    assert "3 change too fast" in console.export_text()


def test_options_are_the_dags() -> None:
    from cellferry.migration import MoveOptions

    assert set(Options.model_fields) <= set(MoveOptions.model_fields)


def test_the_guides_example_is_what_the_command_prints(tmp_path: Path) -> None:
    arguments = [
        "simulate",
        "--cohort",
        "0",
        "--machines",
        "2 cores",
        "--benchmarks",
        str(tmp_path),
    ]
    found = CliRunner().invoke(main, arguments, env={"COLUMNS": "100"})
    assert found.exit_code == 0, found.output
    wanted = "\n".join(f"    {line}".rstrip() for line in found.output.rstrip().splitlines())
    guide = (Path(__file__).parents[2] / "docs/operator-guide.md").read_text(encoding="utf-8")
    assert wanted in guide, "put the output of the command above, indented, into the guide"
