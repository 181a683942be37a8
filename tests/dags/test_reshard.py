"""What `reshard` and `roll_back_resharding` accept and refuse, and the shape of their runs."""

from __future__ import annotations

import multiprocessing
from itertools import pairwise
from typing import Any

import pytest

from cellferry.errors import InvalidInput, WrongState
from cellferry.model import Actor
from cellferry.orchestration import reshard_params as forms
from cellferry.orchestration.reshard_lane import Approval, insist_on_approval, lanes
from cellferry.orchestration.reshard_reporting import complaint, instances, plan_checks
from cellferry.orchestration.reshard_return import go_back, is_rolled_back
from cellferry.orchestration.reshard_validation import check_reshard_request, check_way_back
from cellferry.orchestration.shard_run import (
    RUN,
    WAY_BACK_RUN,
    going_on,
    is_past_the_cutover,
    may_have_children,
    note,
)
from cellferry.shards import reshard as steps
from cellferry.shards.context import Context
from cellferry.shards.placement import Rendezvous, Ring, Shard
from cellferry.shards.planning import plan
from cellferry.shards.record import Resharding
from cellferry.shards.settings import ShardSet
from cellferry.shards.states import ENDING, ShardState
from fixtures.shards import ShardWorld, ring

RUN_1, RUN_2 = "reshard/manual__1", "reshard/manual__2"
FOUR = ["shard-0", "shard-1", "shard-2", "shard-3=dedup-3"]
GOOD: dict[str, Any] = {"shard_set": "dedup", "shards": FOUR}
BACK: dict[str, Any] = {"shard_set": "dedup", "reason": "errors since the cutover"}
FORMS = {
    "reshard": (forms.reshard_params(), forms.ReshardRequest),
    "roll_back_resharding": (
        forms.roll_back_resharding_params(),
        forms.RollBackReshardingRequest,
    ),
}
FIELDS = [(name, field) for name, (form, _) in FORMS.items() for field in form]
ORDER = [
    *("validate", "plan", "approve_copy", "begin", "copy", "dual_write", "catch_up", "verify"),
    *("approve_cutover", "cutover", "watch", "wait_for_ttl", "cleanup", "report"),
]


# --- the shape ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dag_id", "order"),
    [
        ("reshard", ORDER),
        ("roll_back_resharding", ["validate", "bring_back", "remove_copies", "report"]),
    ],
)
def test_the_steps_are_a_chain_in_order(bag: Any, dag_id: str, order: list[str]) -> None:
    dag = bag.dags[dag_id]
    assert {task.task_id for task in dag.tasks} == set(order)
    for before, after in pairwise(order):
        assert before in dag.get_task(after).upstream_task_ids


def test_the_copy_is_mapped_over_sources_named_by_where_their_keys_go(bag: Any) -> None:
    copy = bag.dags["reshard"].get_task("copy")
    assert copy.is_mapped
    assert "['lane']['name']" in copy.map_index_template


@pytest.mark.parametrize(
    ("dag_id", "step"), [("reshard", "cutover"), ("roll_back_resharding", "bring_back")]
)
def test_a_killed_switch_is_tried_again_within_seconds(bag: Any, dag_id: str, step: str) -> None:
    assert bag.dags[dag_id].get_task(step).retry_delay.total_seconds() <= 2


# --- the forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "name"), FIELDS)
def test_every_field_explains_itself(form: str, name: str) -> None:
    field = FORMS[form][0][name]
    assert field.description
    assert field.schema["title"]
    assert field.schema["section"]


@pytest.mark.parametrize(("form", "name"), FIELDS)
def test_form_and_request_agree(form: str, name: str) -> None:
    fields, request = FORMS[form]
    assert set(fields) == set(request.model_fields)
    schema = request.model_json_schema()["properties"][name]
    schema = next((one for one in schema.get("anyOf", ()) if one.get("type") != "null"), schema)
    bounds = (
        *("minimum", "maximum", "exclusiveMinimum", "enum", "minLength", "maxLength"),
        *("minItems", "maxItems"),
    )
    field = fields[name]
    assert {key: field.schema[key] for key in bounds if key in field.schema} == {
        key: schema[key] for key in bounds if key in schema
    }
    if not request.model_fields[name].is_required():
        assert field.value == request.model_fields[name].default


def test_nothing_is_changed_unless_one_says_so() -> None:
    assert forms.read_reshard_request(GOOD).dry_run is True
    assert forms.read_roll_back_resharding_request(BACK).dry_run is True


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"shards": FOUR}, "'shard_set': Field required"),
        ({**GOOD, "shard_set": ""}, "'shard_set': String should have at least 1"),
        ({**GOOD, "shard_set": 7}, "'shard_set': Input should be a valid string, got 7"),
        ({"shard_set": "dedup"}, "'shards': Field required"),
        ({**GOOD, "shards": []}, "'shards': List should have at least 1 item"),
        ({**GOOD, "shards": "shard-0"}, "'shards': Input should be a valid list"),
        ({**GOOD, "shards": [7]}, "'shards.0': Input should be a valid string"),
        ({**GOOD, "dryrun": False}, "unknown Param 'dryrun' (did you mean 'dry_run'?)"),
        ({**GOOD, "dry_run": "no"}, "'dry_run': Input should be a valid boolean, got 'no'"),
        ({**GOOD, "approval": "yes"}, "'approval': Input should be 'none', 'copy'"),
        ({**GOOD, "keys_per_s": 0}, "'keys_per_s': Input should be greater than or equal to 1"),
        ({**GOOD, "sample": 10}, "'sample': Input should be greater than or equal to 1000"),
        ({**GOOD, "headroom": 1}, "'headroom': Input should be less than or equal to 0.95"),
        ({**GOOD, "algorithm": "md5"}, "'algorithm': Input should be 'as now', 'ring'"),
        ({**GOOD, "vnodes": 0}, "'vnodes': Input should be greater than or equal to 1"),
        ({**GOOD, "label": ""}, "'label': String should have at least 1"),
        ({**GOOD, "pause_s": 0}, "'pause_s': Input should be greater than or equal to 0.1"),
        ({**GOOD, "watch_s": -1}, "'watch_s': Input should be greater than or equal to 0"),
        ({**GOOD, "watch_s": True}, "'watch_s': Input should be a valid number"),
        ({**GOOD, "hit_ratio_drop": 2}, "'hit_ratio_drop': Input should be less than or"),
        ({**GOOD, "error_rise": -0.1}, "'error_rise': Input should be greater than or equal to 0"),
        ({**GOOD, "least_claims": 0}, "'least_claims': Input should be greater than or equal to 1"),
        ({**GOOD, "ttl_s": "14d"}, "'ttl_s': Input should be a valid number"),
        ({**GOOD, "ttl_s": 1e9}, "'ttl_s': Input should be less than or equal to 7776000"),
        ({**GOOD, "clean_up_keys_per_s": 0.5}, "'clean_up_keys_per_s': Input should be greater"),
        ({**GOOD, "clean_up_batch": 0}, "'clean_up_batch': Input should be greater"),
        ({**GOOD, "delete_kept": 1}, "'delete_kept': Input should be a valid boolean"),
    ],
)  # fmt: skip
def test_bad_params_are_refused_by_name(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        forms.read_reshard_request(given)
    assert says in str(refused.value)
    assert refused.value.hint


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"shard_set": "dedup"}, "'reason': Field required"),
        ({**BACK, "reason": "x"}, "'reason': String should have at least 3"),
        ({**BACK, "reason": "   "}, "'reason' is blank"),
        ({"reason": "because"}, "'shard_set': Field required"),
        ({**BACK, "dry_run": 0}, "'dry_run': Input should be a valid boolean"),
        ({**BACK, "pause_s": 1_000}, "'pause_s': Input should be less than or equal to 600"),
        ({**BACK, "clean_up_keys_per_s": 0}, "'clean_up_keys_per_s'"),
        ({**BACK, "clean_up_batch": "all"}, "'clean_up_batch': Input should be a valid integer"),
        ({**BACK, "resaon": "because"}, "(did you mean 'reason'?)"),
    ],
)
def test_bad_params_of_the_way_back_are_refused_by_name(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        forms.read_roll_back_resharding_request(given)
    assert says in str(refused.value)


# --- the shards as lines -----------------------------------------------------------------------


def target(lines: list[str], current: ShardSet | None = None, **more: Any) -> ShardSet:
    request = forms.read_reshard_request({"shard_set": "dedup", "shards": lines, **more})
    return forms.target_of(current or ring(3), request)


def test_a_name_alone_stays_as_it_is() -> None:
    heavy = Ring((Shard("shard-0"), Shard("shard-1", 2.0)), 40, "{shard}:{vnode}")
    now = ShardSet("dedup", "redis", b"dedup:", heavy, {"shard-0": "a", "shard-1": "b"})
    assert target(["shard-0", "shard-1"], now).document() == now.document()


def test_lines_add_replace_weigh_and_leave_out() -> None:
    made = target(["shard-0*0.5", " shard-1 = dedup-9 ", "shard-3=dedup-3*2"])
    assert made.connections == {"shard-0": "dedup-0", "shard-1": "dedup-9", "shard-3": "dedup-3"}
    assert [(one.name, one.weight) for one in made.placement.shards] == [
        ("shard-0", 0.5),
        ("shard-1", 1.0),
        ("shard-3", 2.0),
    ]


def test_placement_changes_only_when_asked_to() -> None:
    assert target(FOUR).document() == ring(4).document()
    assert isinstance(target(FOUR, algorithm="rendezvous").placement, Rendezvous)
    assert target(FOUR, vnodes=40).placement.describe()["vnodes"] == 40


@pytest.mark.parametrize(
    ("lines", "more", "says"),
    [
        (["shard-0", "shard-3"], {}, "shard 'shard-3' is new: name its connection"),
        (["shard-0", "shard-0=dedup-3"], {}, "shard 'shard-0' is named twice"),
        (["shard-0=a=b"], {}, "'shard-0=a=b' cannot be read"),
        (["shard-0*two"], {}, "'shard-0*two' cannot be read"),
        (["shard-0*0"], {}, "shard-0"),
        (["shard-0", "shard-1=dedup-0"], {}, "are both connection 'dedup-0'"),
        (FOUR, {"algorithm": "jump", "vnodes": 10}, "'vnodes': jump has none"),
        (["shard-0*2"], {"algorithm": "jump"}, "jump hash knows no weights"),
    ],
)
def test_lines_that_make_no_set_are_refused(
    lines: list[str], more: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        target(lines, **more)
    assert says in str(refused.value)


# --- what exists -------------------------------------------------------------------------------


def context(world: ShardWorld, dag_run: str = RUN_1) -> Context:
    return Context(world.url, world.urls.get, Actor("ada", dag_run=dag_run, try_number=1))


def request(**more: Any) -> forms.ReshardRequest:
    return forms.read_reshard_request({**GOOD, "dry_run": False, **more})


def begun(at: Context, world: ShardWorld, dag_run: str = RUN_1) -> Resharding:
    planned = plan(ring(3), ring(4), world.urls.get)
    found = steps.begin(at, planned, ttl_s=0)
    note(at, found.id, "begin", {RUN: dag_run})
    return at.control.resharding(found.id)


def test_a_new_re_sharding_is_accepted(shard_world: ShardWorld) -> None:
    with context(shard_world) as at:
        wanted, found = check_reshard_request(at, request(), RUN_1)
    assert (wanted.document(), found) == (ring(4).document(), None)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"shard_set": "nobody"}, "no shard set 'nobody'"),
        ({"shards": ["shard-0", "shard-1", "shard-2"]}, "has these shards already"),
        ({"shards": [*FOUR[:3], "shard-3=dedup-77"]}, "dedup-77"),
        ({"shards": [*FOUR[:3], "shard-3=twin"]}, "are both server"),
    ],
)
def test_what_does_not_exist_is_refused(
    shard_world: ShardWorld, more: dict[str, Any], says: str
) -> None:
    urls = {**shard_world.urls, "twin": shard_world.urls["dedup-0"]}
    with (
        Context(shard_world.url, urls.get, Actor("ada")) as at,
        pytest.raises(InvalidInput) as refused,
    ):
        check_reshard_request(at, request(**more), RUN_1)
    assert says in str(refused.value)


def test_a_live_one_is_gone_on_with_unless_a_run_works_on_it(shard_world: ShardWorld) -> None:
    with context(shard_world) as at:
        mine = begun(at, shard_world)
        for run, running in ((RUN_1, True), (RUN_2, False)):
            _, found = check_reshard_request(at, request(), run, lambda _, r=running: r)
            assert found is not None
            assert found.id == mine.id
        with pytest.raises(InvalidInput, match="is under way in the run reshard/manual__1"):
            check_reshard_request(at, request(), RUN_2, lambda _: True)
        with pytest.raises(InvalidInput, match="is live and goes to other shards"):
            check_reshard_request(at, request(shards=FOUR[:2]), RUN_2)


def test_a_run_cleared_as_a_whole_after_its_end_finds_what_it_did(shard_world: ShardWorld) -> None:
    with context(shard_world) as at:
        mine = begun(at, shard_world)
        shard_world.go_until(ShardState.NEW)
        shard_world.finish("completed")
        wanted, found = check_reshard_request(at, request(), RUN_1)
        assert found is not None
        assert (found.id, found.ended) == (mine.id, "completed")
        assert wanted.document() == ring(4).document()
        with pytest.raises(InvalidInput, match="has these shards already"):
            check_reshard_request(at, request(), RUN_2)


def test_what_is_given_up_is_not_taken_up_again(shard_world: ShardWorld) -> None:
    with context(shard_world) as at:
        mine = begun(at, shard_world)
        assert going_on(at, mine.id).id == mine.id
        note(at, mine.id, "abort", {ENDING: "aborted", "reason": "not today"})
        with pytest.raises(WrongState, match="is aborted: not today"):
            going_on(at, mine.id)
        with pytest.raises(InvalidInput, match="is being aborted"):
            check_reshard_request(at, request(), RUN_2)
        steps.abort(at, mine.id, "not today")
        with pytest.raises(WrongState, match="is aborted"):
            going_on(at, mine.id)
        with pytest.raises(InvalidInput, match="was aborted"):
            check_reshard_request(at, request(), RUN_1)
        assert check_reshard_request(at, request(), RUN_2)[1] is None


def test_before_the_cutover_the_way_back_is_an_abort(shard_world: ShardWorld) -> None:
    with context(shard_world) as at:
        mine = begun(at, shard_world)
        shard_world.go(ShardState.DUAL_READ_OLD)
        found = check_way_back(at, "dedup", "roll_back_resharding/1")
        assert not is_rolled_back(found)
        assert not is_past_the_cutover(found)
        go_back(at, mine.id, "the test wants it", 10)
        assert at.control.resharding(mine.id).ended == "aborted"


def test_after_the_cutover_the_way_back_is_a_roll_back(shard_world: ShardWorld) -> None:
    with context(shard_world) as at:
        mine = begun(at, shard_world)
        shard_world.go_until(ShardState.NEW)
        assert is_rolled_back(check_way_back(at, "dedup", "roll_back_resharding/1"))
        for _ in range(2):  # may be repeated
            go_back(at, mine.id, "the test wants it", 10)
        found = at.control.resharding(mine.id)
        assert (found.state, found.facts[ENDING]) == (ShardState.OLD, "rolled_back")
        assert is_rolled_back(found)


def test_a_cutover_that_ends_meanwhile_is_rolled_back(
    shard_world: ShardWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    with context(shard_world) as at:
        mine = begun(at, shard_world)
        shard_world.go(ShardState.DUAL_READ_OLD)
        abort = steps.abort

        def late(*given: Any) -> Any:
            shard_world.go_until(ShardState.DUAL_READ_NEW)
            return abort(*given)

        monkeypatch.setattr(steps, "abort", late)
        go_back(at, mine.id, "the test wants it", 10)
        assert at.control.resharding(mine.id).facts[ENDING] == "rolled_back"


def test_what_cannot_be_brought_back_is_refused(shard_world: ShardWorld) -> None:
    with context(shard_world) as at:
        with pytest.raises(InvalidInput, match="no shard set 'nobody'"):
            check_way_back(at, "nobody", RUN_1)
        with pytest.raises(InvalidInput, match="no re-sharding of this set is live"):
            check_way_back(at, "dedup", RUN_1)
        mine = begun(at, shard_world)
        note(at, mine.id, "cleanup", {"cleaning": True})
        with pytest.raises(InvalidInput, match="has begun"):
            check_way_back(at, "dedup", RUN_1)


def test_a_way_back_cleared_as_a_whole_finds_what_it_did(shard_world: ShardWorld) -> None:
    with context(shard_world) as at:
        mine = begun(at, shard_world)
        note(at, mine.id, "way back", {WAY_BACK_RUN: "roll_back_resharding/1"})
        steps.abort(at, mine.id, "the test wants it")
        assert check_way_back(at, "dedup", "roll_back_resharding/1").id == mine.id


# --- lanes, answers, reports -------------------------------------------------------------------


def test_each_source_is_a_lane_and_they_share_the_throttle(shard_world: ShardWorld) -> None:
    for number, id_ in enumerate(shard_world.moved_ids(30)):
        key = b"dedup:" + id_
        with shard_world.shard(ring(3).connections[ring(3).owner(key)]) as shard:
            shard.set(key, number)
    with context(shard_world) as at:
        found = lanes(begun(at, shard_world), 300)
    assert [one["name"] for one in found] == [f"shard-{n} → shard-3" for n in range(3)]
    assert sum(one["keys"] for one in found) == 30
    assert sum(one["keys_per_s"] for one in found) == pytest.approx(300)


def test_a_lane_names_all_destinations_of_its_source(shard_world: ShardWorld) -> None:
    with context(shard_world) as at:
        made = steps.begin(at, plan(ring(3), ring(2), shard_world.urls.get), ttl_s=0)
        found = lanes(at.control.resharding(made.id), None)
    assert [(one["name"], one["keys_per_s"]) for one in found] == [
        ("shard-2 → shard-0, shard-1", None)
    ]


def test_a_rejected_step_is_skipped() -> None:
    from airflow.sdk.exceptions import AirflowSkipException

    insist_on_approval({"answer": Approval.APPROVE, "summary": "Approve by ada"})
    insist_on_approval({})
    with pytest.raises(AirflowSkipException, match="Reject by ada"):
        insist_on_approval({"answer": Approval.REJECT, "summary": "Reject by ada"})


def test_the_check_list_names_what_blocks_and_its_remedy(shard_world: ShardWorld) -> None:
    with shard_world.shard("dedup-3") as shard:
        shard.config_set("maxmemory", 10_000_000)
        shard.config_set("maxmemory-policy", "allkeys-lru")
    try:
        planned = plan(ring(3), ring(4), shard_world.urls.get)
    finally:
        with shard_world.shard("dedup-3") as shard:
            shard.config_set("maxmemory", 0)
            shard.config_set("maxmemory-policy", "noeviction")
    wrong = [one for one in plan_checks(planned, []) if not one.ok]
    assert [one.name for one in wrong] == ["Nothing is evicted"]
    assert "noeviction" in wrong[0].remedy


class Instances:
    """Of a finished run, what its tasks left."""

    def xcom_pull(self, *, task_ids: str, key: str = "", map_indexes: int = -1) -> Any:
        return {"message": f"{task_ids} {map_indexes} {key}", "remedy": "look"}


def test_a_failed_lane_is_named_with_its_index_and_what_it_stopped_is_not() -> None:
    states = {"validate": "success", "copy_0": "success", "copy_1": "failed", "copy_10": "failed"}
    states |= {"dual_write": "upstream_failed"}
    assert instances(states, "copy") == [("copy_0", 0), ("copy_1", 1), ("copy_10", 10)]
    text = complaint(Instances(), states, ["validate", "copy", "dual_write"], "; or go back")
    assert text is not None
    assert "- copy with map index 1: copy 1 failure" in text
    assert "Then clear copy with map index 10 and downstream" in text
    assert "or go back" in text
    assert "dual_write" not in text
    assert complaint(Instances(), {"validate": "success"}, ["validate"]) is None


def _daemonic(answer: Any) -> None:
    may_have_children()
    child = multiprocessing.get_context("fork").Process(target=answer.put, args=("born",))
    child.start()
    child.join()


def test_a_worker_that_may_have_no_children_gets_its_warden() -> None:
    fork = multiprocessing.get_context("fork")
    answer = fork.Queue()
    worker = fork.Process(target=_daemonic, args=(answer,), daemon=True)
    worker.start()
    assert answer.get(timeout=120) == "born"
    worker.join()
