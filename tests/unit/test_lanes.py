"""Lanes end together and speak with one voice; their agenda keeps parents before children."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from cellferry.errors import LeaseLost, Paused
from cellferry.stores.postgres.lanes import Abandoned, Agenda, Lane, Lanes
from cellferry.stores.postgres.schema import Hop, Name, OwnerPath, Placement, Table


def nothing() -> None:
    """Neither waits for another nor asks."""


def left() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("copy lane")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not left()


def busy(lane: Lane) -> None:
    """Work on until the step ends."""
    while True:
        lane.check()
        time.sleep(0.001)


def test_errands_are_done_by_the_steps_own_thread() -> None:
    here = threading.current_thread()
    seen: list[threading.Thread] = []
    answers: list[int] = []

    def errand() -> int:
        seen.append(threading.current_thread())
        return len(seen)

    def work(lane: Lane) -> None:
        answers.extend(lane.send(errand) for _ in range(50))

    Lanes(3).run(work, nothing, nothing)

    assert sorted(answers) == list(range(1, 151))
    assert set(seen) == {here}


@pytest.mark.parametrize("error", [LeaseLost("gone"), Paused("wait"), KeyboardInterrupt()])
def test_what_an_errand_raises_ends_all_lanes_and_is_raised_untouched(
    error: BaseException,
) -> None:
    ended: list[type[BaseException]] = []

    def raises() -> None:
        raise error

    def work(lane: Lane) -> None:
        try:
            lane.send(raises)
        except BaseException as met:
            ended.append(type(met))
            raise

    with pytest.raises(type(error)) as raised:
        Lanes(3).run(work, nothing, nothing)

    assert raised.value is error
    assert ended == [Abandoned] * 3


def test_the_first_error_of_a_lane_is_the_one_that_is_raised() -> None:
    failed = threading.Event()
    first = PermissionError("the first")

    def work(lane: Lane) -> None:
        if not failed.is_set():
            failed.set()
            raise first
        try:
            busy(lane)
        except Abandoned:
            raise RuntimeError("only because the step ends") from None

    with pytest.raises(PermissionError) as raised:
        Lanes(2).run(work, nothing, nothing)

    assert raised.value is first


def test_lanes_that_wait_for_each_other_are_woken_at_the_end() -> None:
    parent, child = table("parent"), table("child", "parent")
    agenda = Agenda([parent, child], {})
    waiting = threading.Barrier(2)

    def work(_: Lane) -> None:
        if agenda.take() is parent:
            waiting.wait()
            raise PermissionError
        raise AssertionError("the child was given out before its parent")

    def wait(lane: Lane) -> None:
        if threading.current_thread().name.endswith("1"):
            work(lane)
        else:
            waiting.wait()
            assert agenda.take() is None

    with pytest.raises(PermissionError):
        Lanes(2).run(wait, nothing, agenda.close)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_all_lanes_work_ends_them() -> None:
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt):
        Lanes(2).run(busy, nothing, nothing)


def test_the_step_looks_up_while_all_lanes_work() -> None:
    stop = Paused("meanwhile")

    def meanwhile() -> None:
        raise stop

    with pytest.raises(Paused) as raised:
        Lanes(2).run(busy, meanwhile, nothing)

    assert raised.value is stop


def test_a_thread_that_cannot_be_started_ends_those_that_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        if self.name == "copy lane 2":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse)

    with pytest.raises(RuntimeError, match="new thread"):
        Lanes(3).run(busy, nothing, nothing)


# ── the agenda ──────────────────────────────────────────────────────────────────────────────────


def name(relation: str) -> Name:
    return Name("public", relation)


def table(relation: str, *parents: str) -> Table:
    hops = tuple(Hop(("parent_id",), name(parent), ("id",)) for parent in parents)
    return Table(
        name(relation), Placement.OWNED, (), ("id",), owners=(OwnerPath(hops, "organization_id"),)
    )


def taken(agenda: Agenda, done: Callable[[Table], None]) -> list[str]:
    order = []
    while (one := agenda.take()) is not None:
        order.append(one.name.name)
        done(one)
    return order


def test_the_largest_table_goes_first() -> None:
    tables = [table("a"), table("b"), table("c")]
    agenda = Agenda(tables, {name("a"): 1, name("b"): 30, name("c"): 2})

    assert taken(agenda, agenda.done) == ["b", "c", "a"]


def test_a_small_table_that_a_large_one_waits_for_goes_before_it() -> None:
    tables = [table("middle"), table("parent"), table("child", "parent"), table("small")]
    agenda = Agenda(tables, {name("middle"): 50, name("child"): 100, name("small"): 3})

    assert taken(agenda, agenda.done) == ["parent", "child", "middle", "small"]


def test_a_table_waits_for_all_through_which_it_is_owned() -> None:
    grandparent, parent = table("grandparent"), table("parent", "grandparent")
    child = table("child", "parent", "grandparent")
    agenda = Agenda([grandparent, parent, child], {name("child"): 9})
    given: list[Table | None] = [agenda.take()]
    waits = threading.Thread(target=lambda: given.append(agenda.take()))
    waits.start()
    waits.join(0.2)
    assert waits.is_alive()

    agenda.done(grandparent)
    waits.join(10)
    agenda.done(parent)

    assert [*given, agenda.take()] == [grandparent, parent, child]
    assert agenda.take() is None


def test_paths_of_ownership_in_a_circle_do_not_wait_for_each_other() -> None:
    tables = [table("a", "b"), table("b", "a"), table("tree", "tree")]
    agenda = Agenda(tables, {})

    assert taken(agenda, agenda.done) == ["a", "b", "tree"]


def test_a_parent_that_is_copied_already_is_not_waited_for() -> None:
    agenda = Agenda([table("child", "parent")], {})

    assert taken(agenda, agenda.done) == ["child"]
