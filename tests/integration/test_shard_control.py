"""The record of a re-sharding: one state at a time, and nobody is left behind."""

from __future__ import annotations

import pickle
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import psycopg
import pytest

from cellferry.errors import InvalidInput, PermanentError, WrongState
from cellferry.model import Actor
from cellferry.shards import roll_call
from cellferry.shards.control import ShardControl
from cellferry.shards.leases import TakenOver
from cellferry.shards.placement import Ring, Shard
from cellferry.shards.record import ClientsBehind, Resharding
from cellferry.shards.settings import ShardSet
from cellferry.shards.states import ORDER, ShardState

ACTOR = Actor("ada", dag_run="manual__1", try_number=1)


def ring(count: int, name: str = "dedup") -> ShardSet:
    names = [f"shard-{number}" for number in range(count)]
    return ShardSet(
        name, "redis", b"d:", Ring(tuple(map(Shard, names))), {one: f"c-{one}" for one in names}
    )


@pytest.fixture
def control(fresh_database: str) -> Iterator[ShardControl]:
    with ShardControl(fresh_database) as one:
        one.install()
        one.register_set(ring(3), ACTOR)
        yield one


@pytest.fixture
def begun(control: ShardControl) -> Resharding:
    return control.begin("dedup", ring(4), {"keys": 5}, ACTOR, ttl_s=60, planned_on=ring(3))


def confirm(
    url: str, session: uuid.UUID, acknowledges: int | None, lease_s: float = 60
) -> dict[str, Any]:
    """Speak as a client's listener does."""
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(
            "SELECT topology.confirm_shard_client('dedup', %s, 'c1', %s, %s, 1, NULL)",
            [session, lease_s, acknowledges],
        ).fetchone()
    assert row is not None
    answer: dict[str, Any] = row[0]
    return answer


def as_a_faulty_controller(url: str, change: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute(change.encode())


def go(control: ShardControl, id_: int, from_: ShardState, to: ShardState) -> Resharding:
    with control.lease(id_, "test", "here", ACTOR):
        return control.advance(id_, from_, to, ACTOR, "test")


def test_a_set_is_kept_as_it_was_given(control: ShardControl) -> None:
    assert control.set("dedup").document() == ring(3).document()
    control.register_set(ring(3), ACTOR)
    assert [one.name for one in control.sets()] == ["dedup"]
    with pytest.raises(InvalidInput, match="recorded with other shards"):
        control.register_set(ring(4), ACTOR)
    with pytest.raises(InvalidInput, match="no shard set 'other'"):
        control.set("other")


def test_a_re_sharding_goes_all_the_way_and_the_set_is_the_new_one(
    control: ShardControl, begun: Resharding
) -> None:
    assert (begun.state, begun.epoch, begun.plan["keys"]) == (ShardState.OLD, 2, 5)
    epochs = [begun.epoch]
    for before, after in pairwise(ORDER):
        one = go(control, begun.id, before, after)
        assert one.state is after
        assert (one.ttl_until is not None) == (after is ShardState.NEW)
        epochs.append(one.epoch)
    with control.lease(begun.id, "finish", "here", ACTOR):
        done = control.finish(begun.id, ACTOR, "completed")
        assert control.finish(begun.id, ACTOR, "completed") == done, "repeated"
    assert [*epochs, done.epoch] == [2, 3, 4, 5, 6, 7]
    assert done.ended == "completed"
    assert control.set("dedup").document() == ring(4).document()
    assert control.live("dedup") is None
    actions = [one.action for one in control.audit("dedup") if one.action != "lease"]
    assert actions == [
        "shard set registered",
        "re-sharding begun",
        *["re-sharding advanced"] * 4,
        "re-sharding completed",
    ]


def test_a_roll_back_leaves_the_set_as_it_was(control: ShardControl, begun: Resharding) -> None:
    for before, after in pairwise([*ORDER[:4], *reversed(ORDER[:3])]):
        go(control, begun.id, before, after)
    with control.lease(begun.id, "roll_back", "here", ACTOR):
        control.finish(begun.id, ACTOR, "rolled_back")
    assert control.set("dedup").document() == ring(3).document()
    control.begin("dedup", ring(4), {}, ACTOR, ttl_s=0)


def test_states_are_neither_skipped_nor_lost_nor_ended_early(
    control: ShardControl, begun: Resharding
) -> None:
    with control.lease(begun.id, "test", "here", ACTOR):
        with pytest.raises(WrongState, match="does not go from old to switching"):
            control.advance(begun.id, ShardState.OLD, ShardState.SWITCHING, ACTOR)
        with pytest.raises(WrongState, match="is in state old, not switching"):
            control.advance(begun.id, ShardState.SWITCHING, ShardState.DUAL_READ_OLD, ACTOR)
        with pytest.raises(WrongState, match="cannot be completed"):
            control.finish(begun.id, ACTOR, "completed")
        once = control.advance(begun.id, ShardState.OLD, ShardState.DUAL_READ_OLD, ACTOR)
        again = control.advance(begun.id, ShardState.OLD, ShardState.DUAL_READ_OLD, ACTOR)
        assert once == again, "a repetition does nothing"
        with pytest.raises(WrongState, match="cannot be aborted"):
            control.finish(begun.id, ACTOR, "aborted")
    with pytest.raises(WrongState, match=f"re-sharding {begun.id} of this set is live"):
        control.begin("dedup", ring(5), {}, ACTOR, ttl_s=0)


@pytest.mark.parametrize(
    ("target", "planned_on", "message"),
    [
        (ring(3), None, "nothing to do"),
        (ring(4, "other"), None, "target's name is 'other'"),
        (replace(ring(4), key_prefix=b"x"), None, "key_prefix"),
        (replace(ring(4), kind="postgres"), None, "kind is 'postgres'"),
        (ring(4), ring(2), "plan is older"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(
    control: ShardControl, target: ShardSet, planned_on: ShardSet | None, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        control.begin("dedup", target, {}, ACTOR, ttl_s=0, planned_on=planned_on)


def test_no_state_before_each_client_has_acknowledged_the_one_before(
    control: ShardControl, begun: Resharding, fresh_database: str
) -> None:
    session = uuid.uuid4()
    told = confirm(fresh_database, session, None)
    assert (told["epoch"], told["resharding"]["state"]) == (2, "old")
    go(control, begun.id, ShardState.OLD, ShardState.DUAL_READ_OLD)
    with pytest.raises(ClientsBehind, match="c1") as caught:
        go(control, begun.id, ShardState.DUAL_READ_OLD, ShardState.SWITCHING)
    assert caught.value.names == ("c1",)
    assert confirm(fresh_database, session, 2)["epoch"] == 3
    with pytest.raises(ClientsBehind, match=r"after 0\.\d s: c1"):
        control.wait_acknowledged(begun.id, 0.1)
    confirm(fresh_database, session, 3)
    control.wait_acknowledged(begun.id, 0)
    go(control, begun.id, ShardState.DUAL_READ_OLD, ShardState.SWITCHING)


def test_the_database_itself_refuses_what_a_faulty_controller_would_do(
    control: ShardControl, begun: Resharding, fresh_database: str
) -> None:
    confirm(fresh_database, uuid.uuid4(), None)
    go(control, begun.id, ShardState.OLD, ShardState.DUAL_READ_OLD)
    for change, message in (
        ("UPDATE topology.shard_set SET epoch = epoch + 1", "not acknowledged epoch 3"),
        ("UPDATE topology.shard_set SET epoch = 1", "rises by one"),
        ("UPDATE topology.resharding SET state = 'new', ttl_until = now()", "cannot go from"),
        ("UPDATE topology.resharding SET state = 'switching'", "without an audit row"),
        ("DELETE FROM topology.shard_set", "never deleted"),
    ):
        with pytest.raises(psycopg.errors.IntegrityError, match=message):
            as_a_faulty_controller(fresh_database, change)


def test_a_silent_client_is_passed_over_and_has_to_begin_anew(
    control: ShardControl, begun: Resharding, fresh_database: str
) -> None:
    session = uuid.uuid4()
    confirm(fresh_database, session, None, lease_s=0.5)
    go(control, begun.id, ShardState.OLD, ShardState.DUAL_READ_OLD)
    with psycopg.connect(fresh_database) as connection:
        # The topology's clock jumps: a client is not dead because of that.
        connection.execute("UPDATE topology.shard_client SET seen_at = now() - interval '1 day'")
    with pytest.raises(ClientsBehind):
        control.wait_acknowledged(begun.id, 0)
    begun_at = time.monotonic()
    control.wait_acknowledged(begun.id, 60)
    assert time.monotonic() - begun_at >= 0.3
    assert control.clients("dedup") == []
    assert confirm(fresh_database, session, 2) == {"lost": True}
    assert "client passed over" in [one.action for one in control.audit("dedup")]


def test_one_that_died_after_it_had_acknowledged_is_passed_over_before_others_wait(
    control: ShardControl, begun: Resharding, fresh_database: str
) -> None:
    dead, alive = uuid.uuid4(), uuid.uuid4()
    confirm(fresh_database, dead, None, lease_s=0.5)
    confirm(fresh_database, alive, None, lease_s=60)
    control.wait_acknowledged(begun.id, 0)
    with pytest.raises(ClientsBehind, match="not given a sign of life after") as caught:
        control.wait_heard(begun.id, 0)
    assert len(caught.value.names) == 2
    control.wait_heard(
        begun.id, 60, while_waiting=lambda: confirm(fresh_database, alive, 2, lease_s=60) and None
    )
    assert [one.session for one in control.clients("dedup")] == [alive]


def test_a_client_that_speaks_is_not_passed_over_however_long_it_lags(
    control: ShardControl, begun: Resharding, fresh_database: str
) -> None:
    session = uuid.uuid4()
    confirm(fresh_database, session, None, lease_s=0.3)
    go(control, begun.id, ShardState.OLD, ShardState.DUAL_READ_OLD)

    def speak() -> None:
        confirm(fresh_database, session, 2, lease_s=0.3)

    with pytest.raises(ClientsBehind):
        control.wait_acknowledged(begun.id, 1.5, while_waiting=speak)


def test_one_that_speaks_at_the_last_moment_is_not_passed_over(
    control: ShardControl,
    begun: Resharding,
    fresh_database: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between the controller's look at its row and what follows from it."""
    session = uuid.uuid4()
    confirm(fresh_database, session, None, lease_s=10)
    go(control, begun.id, ShardState.OLD, ShardState.DUAL_READ_OLD)
    asked: list[float] = []

    def later() -> float:
        asked.append(20.0 * len(asked))
        if len(asked) == 3:  # begun; first look; second look
            confirm(fresh_database, session, 2, lease_s=10)
        return asked[-1]

    monkeypatch.setattr(roll_call, "now_s", later)
    with pytest.raises(ClientsBehind):
        control.wait_acknowledged(begun.id, 40)
    assert len(asked) == 3
    assert len(control.clients("dedup")) == 1


def test_without_a_lease_nothing_is_changed(control: ShardControl, begun: Resharding) -> None:
    for change in (
        lambda: control.advance(begun.id, ShardState.OLD, ShardState.DUAL_READ_OLD, ACTOR),
        lambda: control.record(begun.id, {"a": 1}),
        lambda: control.save_checkpoint(begun.id, ("a", "b"), {}),
        lambda: control.finish(begun.id, ACTOR, "aborted"),
    ):
        with pytest.raises(WrongState, match="without its lease"):
            change()


def test_a_second_controller_fences_the_first(
    control: ShardControl, begun: Resharding, fresh_database: str
) -> None:
    with (
        ShardControl(fresh_database) as other,
        control.lease(begun.id, "cutover", "one", ACTOR) as lease,
    ):
        lease.check()
        control.record(begun.id, {"a": 1})
        with other.lease(begun.id, "roll_back", "two", ACTOR):
            other.record(begun.id, {"b": 2})
            for change in (
                lease.check,
                lambda: control.record(begun.id, {"a": 3}),
                lambda: control.save_checkpoint(begun.id, ("a", "b"), {}),
                lambda: control.advance(begun.id, ShardState.OLD, ShardState.DUAL_READ_OLD, ACTOR),
                lambda: control.finish(begun.id, ACTOR, "aborted"),
            ):
                with pytest.raises(TakenOver, match="roll_back by two"):
                    change()
    one = control.resharding(begun.id)
    assert (one.facts, one.state, one.holder) == ({"a": 1, "b": 2}, ShardState.OLD, None)


def test_copies_work_side_by_side_until_another_step_begins(
    control: ShardControl, begun: Resharding, fresh_database: str
) -> None:
    with (
        ShardControl(fresh_database) as other,
        control.lease(begun.id, "copy", "one", ACTOR, part="shard-0") as first,
        other.lease(begun.id, "copy", "two", ACTOR, part="shard-1") as second,
    ):
        control.checkpoints(begun.id).save(("shard-0", "shard-3"), {"cursor": "7"})
        other.checkpoints(begun.id).save(("shard-1", "shard-3"), {"cursor": "8"})
        with ShardControl(fresh_database) as third:
            with third.lease(begun.id, "copy", "three", ACTOR, part="shard-1"):
                first.check()
                with pytest.raises(TakenOver):
                    second.check()
            with (
                third.lease(begun.id, "dual_write", "three", ACTOR),
                pytest.raises(TakenOver, match="dual_write by three"),
            ):
                first.check()
    assert control.checkpoint(begun.id, ("shard-0", "shard-3")) == {"cursor": "7"}
    assert control.checkpoints(begun.id).load(("shard-1", "shard-3")) == {"cursor": "8"}
    assert control.checkpoint(begun.id, ("shard-2", "shard-3")) is None


def test_another_process_works_under_a_lease_that_it_was_given(
    control: ShardControl, begun: Resharding, fresh_database: str
) -> None:
    with (
        control.lease(begun.id, "copy", "one", ACTOR, part="shard-0") as lease,
        ShardControl(fresh_database) as worker,
    ):
        given = pickle.loads(pickle.dumps(lease))
        with worker.adopt(given) as adopted:
            adopted.check()
            worker.save_checkpoint(begun.id, ("shard-0", "shard-3"), {"cursor": "7"})
        with pytest.raises(WrongState, match="adopt"):
            given.check()


def test_an_ended_re_sharding_stays_as_it_is(control: ShardControl, begun: Resharding) -> None:
    with control.lease(begun.id, "abort", "here", ACTOR):
        control.finish(begun.id, ACTOR, "aborted", "changed our minds")
        with pytest.raises(WrongState, match="is aborted"):
            control.advance(begun.id, ShardState.OLD, ShardState.DUAL_READ_OLD, ACTOR)
    with (
        pytest.raises(WrongState, match="is aborted"),
        control.lease(begun.id, "copy", "here", ACTOR),
    ):
        pass
    with pytest.raises(PermanentError, match="no re-sharding 999"):
        control.resharding(999)
