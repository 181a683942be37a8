"""The forms agree with the library, and bad input is refused in plain words."""

from __future__ import annotations

from typing import Any

import pytest

from cellferry.errors import InvalidInput
from cellferry.migration.options import MoveOptions
from cellferry.orchestration import params
from cellferry.orchestration.validation import split

FORMS = {
    "migrate_organizations": params.migrate_organizations_params(),
    "prepare_cell": params.prepare_cell_params(),
    "clean_up_organizations": params.clean_up_organizations_params(),
    "reap_cells": params.reap_cells_params(),
    "reverse_rounds": params.reverse_rounds_params(),
    "roll_back_organizations": params.roll_back_organizations_params(),
    "steer_organizations": params.steer_organizations_params(),
}
GOOD = {"organizations": ["acme"], "destination": "cell-2"}


@pytest.mark.parametrize(
    ("form", "name"), [(form, name) for form, fields in FORMS.items() for name in fields]
)
def test_every_field_explains_itself(form: str, name: str) -> None:
    field = FORMS[form][name]
    assert field.description
    assert field.schema["title"]
    assert field.schema["section"]


@pytest.mark.parametrize("name", MoveOptions.model_fields)
def test_the_form_has_each_option_with_its_default_and_bounds(name: str) -> None:
    field = params.migrate_organizations_params()[name]
    schema = MoveOptions.model_json_schema()["properties"][name]
    numbers = next((one for one in schema.get("anyOf", ()) if one.get("type") != "null"), schema)
    bounds = ("minimum", "maximum", "exclusiveMinimum", "enum")
    assert {key: field.schema[key] for key in bounds if key in field.schema} == {
        key: numbers[key] for key in bounds if key in numbers
    }
    assert field.value == MoveOptions.model_fields[name].default


def test_the_form_has_nothing_that_the_request_does_not() -> None:
    form = set(params.migrate_organizations_params())
    assert form == set(MoveOptions.model_fields) | {"organizations", "destination", "dry_run"}


def test_a_good_request_is_read() -> None:
    request = params.read_move_request({**GOOD, "ttl_s": 60})
    assert request.organizations == ("acme",)
    assert request.dry_run is True
    assert request.move_options.ttl_s == 60


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({**GOOD, "dryrun": False}, "unknown Param 'dryrun' (did you mean 'dry_run'?)"),
        ({**GOOD, "zzz": 1, "yyy": 2}, "unknown Params 'yyy', 'zzz'"),
        ({**GOOD, "dry_run": "no"}, "'dry_run': Input should be a valid boolean, got 'no'"),
        ({**GOOD, "organizations": "acme"}, "'organizations': Input should be a valid list"),
        ({**GOOD, "organizations": [7]}, "'organizations.0': Input should be a valid string"),
        ({**GOOD, "organizations": []}, "'organizations': List should have at least 1 item"),
        ({"organizations": ["acme"]}, "'destination': Field required"),
        ({**GOOD, "ttl_s": -1}, "'ttl_s': Input should be greater than or equal to 0, got -1"),
        ({**GOOD, "ttl_s": True}, "'ttl_s': Input should be a valid number"),
        ({**GOOD, "batch_rows": "many"}, "'batch_rows': Input should be a valid integer"),
        ({**GOOD, "strategy": "fast"}, "'strategy': Input should be 'auto', 'online'"),
    ],
)
def test_bad_input_is_refused_by_name(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        params.read_move_request(given)
    assert says in str(refused.value)
    assert refused.value.hint


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(InvalidInput) as refused:
        params.read_move_request({"organizations": [], "dry_run": 1, "ttl_s": -1})
    for name in ("organizations", "destination", "dry_run", "ttl_s"):
        assert f"'{name}'" in str(refused.value)


def organizations(count: int) -> list[dict[str, str]]:
    return [{"id": str(number), "slug": f"o{number}"} for number in range(count)]


def test_a_full_run_starts_no_other() -> None:
    first, rest = split(organizations(25), GOOD, "manual__1")
    assert (len(first), rest) == (25, {})


def test_a_long_list_becomes_a_chain_of_runs_that_together_hold_it() -> None:
    left, run_id, conf = organizations(60), "manual__2026-11-21T04:00:00+00:00", {**GOOD, "x": 1}
    seen: list[str] = []
    names = [run_id]
    while True:
        first, rest = split(left, conf, run_id)
        assert len(first) <= 25
        seen += [one["id"] for one in first]
        if not rest:
            break
        run_id, conf = rest["run_id"], rest["conf"]
        assert conf["x"] == 1
        left = [one for one in left if one["id"] in conf["organizations"]]
        names.append(run_id)
    assert seen == [str(number) for number in range(60)]
    assert names[1:] == [f"{names[0]}.part-2-of-3", f"{names[0]}.part-3-of-3"]
