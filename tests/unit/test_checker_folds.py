"""The checker's reading of a ledger, without servers: what it must see, and what it may not."""

from __future__ import annotations

import time
from typing import Any

from cellferry.local.application.checker import (
    Authority,
    Findings,
    check_authority,
    check_contents,
    check_untouched,
)
from cellferry.local.application.contents import Contents, Stream
from cellferry.local.application.ledger import Operation, Outcome

EMPTY: dict[str, Any] = {"hot": {}, "untouched": {}}
QUEUE, STREAM, COUNTER = "org:{7}:live:queue", "org:{7}:live:stream", "org:{7}:live:counter:x"


def operation(
    name: str,
    *effects: list[Any],
    outcome: Outcome = Outcome.ACKNOWLEDGED,
    result: Any = None,
    reason: str | None = None,
    wall: float = 10.0,
    cell: str = "cell-1",
    epoch: int = 1,
) -> Operation:
    return Operation(
        name, "s1", "7", "postgres", "test", effects, wall,
        outcome=outcome, result=result, reason=reason, cell=cell, epoch=epoch,
    )  # fmt: skip


def found(operations: list[Operation], contents: Contents, hot: Any = None) -> dict[str, int]:
    findings = Findings()
    check_contents("7", operations, contents, {**EMPTY, "hot": hot or {}}, findings)
    return dict(findings.counts)


def rows(*versions: tuple[int, str]) -> Contents:
    return Contents(tracked={"issues": {"a": list(versions)}} if versions else {})


MAKE = operation("1", ["make", "issues", "a", "d1"])
CHANGE = operation("2", ["change", "issues", "a", "d2"])
DROP = operation("3", ["drop", "issues", "a"])


def unknown(of: Operation) -> Operation:
    return operation(of.id, *of.effects, outcome=Outcome.UNKNOWN)


def refused(of: Operation) -> Operation:
    return operation(of.id, *of.effects, outcome=Outcome.REFUSED)


def test_what_was_acknowledged_and_is_there_is_no_fault() -> None:
    assert found([MAKE, CHANGE], rows((1, "d2"))) == {}


def test_an_acknowledged_row_that_is_missing_is_lost_with_each_of_its_writes() -> None:
    assert found([MAKE, CHANGE], rows()) == {"lost": 2}


def test_an_update_that_is_missing_is_lost() -> None:
    assert found([MAKE, CHANGE], rows((0, "d1"))) == {"lost": 1}


def test_an_update_that_another_text_replaced_is_lost() -> None:
    assert found([MAKE, CHANGE], rows((1, "d1"))) == {"lost": 1}


def test_a_deleted_row_that_is_back_is_a_lost_delete() -> None:
    assert found([MAKE, DROP], rows((0, "d1"))) == {"lost": 1}


def test_an_update_applied_twice_is_doubled() -> None:
    assert found([MAKE, CHANGE], rows((2, "d2"))) == {"doubled": 1}


def test_a_row_that_is_there_twice_is_doubled() -> None:
    assert found([MAKE], rows((0, "d1"), (0, "d1"))) == {"doubled": 1}


def test_an_insert_of_unknown_outcome_may_be_there_or_not() -> None:
    assert found([unknown(MAKE)], rows((0, "d1"))) == {}
    assert found([unknown(MAKE)], rows()) == {}


def test_an_insert_of_unknown_outcome_may_not_be_there_twice() -> None:
    assert found([unknown(MAKE)], rows((0, "d1"), (0, "d1"))) == {"doubled": 1}


def test_an_update_of_unknown_outcome_may_not_count_twice() -> None:
    assert found([MAKE, unknown(CHANGE)], rows((1, "d2"))) == {}
    assert found([MAKE, unknown(CHANGE)], rows((2, "d2"))) == {"doubled": 1}


def test_a_refused_insert_that_is_there_is_a_phantom() -> None:
    assert found([refused(MAKE)], rows((0, "d1"))) == {"phantom": 1}


def test_a_row_that_nobody_wrote_is_a_phantom() -> None:
    assert found([], rows((0, "d1"))) == {"phantom": 1}


def test_a_seeded_row_keeps_its_version_until_it_is_changed() -> None:
    hot = {"issues": {"a": [0, "seed"]}}
    assert found([], rows((0, "seed")), hot) == {}
    assert found([], rows((0, "other")), hot) == {"lost": 1}
    assert found([CHANGE], rows((1, "d2")), hot) == {}


def test_a_counter_is_between_what_is_sure_and_what_is_possible() -> None:
    adds = [operation(str(n), ["add", "counter", COUNTER, 1]) for n in range(3)]
    adds.append(unknown(operation("4", ["add", "counter", COUNTER, 1])))

    def counted(value: int) -> dict[str, int]:
        return found(adds, Contents(counters={("counter", COUNTER): value}))

    assert counted(3) == {}
    assert counted(4) == {}
    assert counted(2) == {"lost": 1}
    assert counted(5) == {"doubled": 1}


def test_a_job_is_queued_or_taken_once() -> None:
    push = operation("1", ["push", "queue", QUEUE, "job"])
    pop = operation("2", ["pop", "queue", QUEUE], result="job")
    assert found([push], Contents(queues={QUEUE: ["job"]})) == {}
    assert found([push, pop], Contents()) == {}
    assert found([push], Contents()) == {"lost": 1}
    assert found([push], Contents(queues={QUEUE: ["job", "job"]})) == {"doubled": 1}
    assert found([push, pop], Contents(queues={QUEUE: ["job"]})) == {"doubled": 1}
    assert found([], Contents(queues={QUEUE: ["job"]})) == {"phantom": 1}


def test_a_pop_whose_answer_was_lost_may_have_taken_one_job_and_no_more() -> None:
    pushes = [operation(str(n), ["push", "queue", QUEUE, f"job{n}"]) for n in range(2)]
    pop = unknown(operation("9", ["pop", "queue", QUEUE]))
    assert found([*pushes, pop], Contents(queues={QUEUE: ["job1"]})) == {}
    assert found([*pushes, pop], Contents()) == {"lost": 1}


ENTRY = operation("1", ["entry", "stream", STREAM, "1"])
DELIVER = operation("2", ["deliver", "stream", STREAM], result=["5-0"])
ACK = operation("3", ["ack", "stream", STREAM, ["5-0"]])


def stream(*pending: str, last: str = "5-0", entries: Any = (("5-0", "1"),)) -> Contents:
    return Contents(streams={STREAM: Stream(list(entries), last, set(pending))})


def test_a_stream_keeps_entries_position_and_pending_entries_of_its_group() -> None:
    assert found([ENTRY], stream(last="0-0")) == {}
    assert found([ENTRY, DELIVER], stream("5-0")) == {}
    assert found([ENTRY, DELIVER, ACK], stream()) == {}


def test_a_lost_or_doubled_entry_is_seen() -> None:
    assert found([ENTRY], stream(last="0-0", entries=())) == {"lost": 1}
    assert found([ENTRY], stream(last="0-0", entries=[("5-0", "1"), ("6-0", "1")])) == {
        "doubled": 1
    }


def test_a_group_that_forgot_what_was_delivered_is_seen() -> None:
    # copied before the delivery: XREADGROUP and XACK announce no change of the key
    assert found([ENTRY, DELIVER], stream(last="0-0")) == {"lost": 2}
    assert found([ENTRY, DELIVER, ACK], stream("5-0")) == {"lost": 1}
    assert found([ENTRY, DELIVER, DELIVER], stream("5-0")) == {"doubled": 1}


def test_an_expiring_key_keeps_its_expiry() -> None:
    expires = int((time.time() + 1000) * 1000)
    log_in = operation("1", ["make", "string", "k", "v", expires])

    def there(at: int) -> Contents:
        return Contents(tracked={"string": {"k": [(0, "v")]}}, expiries={"k": at})

    assert found([log_in], there(expires)) == {}
    assert found([log_in], there(-1)) == {"changed": 1}
    assert found([log_in], Contents()) == {"lost": 1}


def test_an_expired_key_may_be_gone() -> None:
    log_in = operation("1", ["make", "string", "k", "v", 1000])
    assert found([log_in], Contents()) == {}


def test_a_read_that_goes_backwards_is_seen() -> None:
    reads = [operation(str(value), result=[["page_views", "p", value, 0]]) for value in (3, 5, 4)]
    assert found(reads[:2], Contents()) == {}
    assert found(reads, Contents()) == {"backwards": 1}


def test_a_read_below_what_its_session_wrote_is_seen() -> None:
    assert found([operation("1", result=[["issues", "a", 1, 2]])], Contents()) == {"backwards": 1}
    assert found([operation("1", result=[["issues", "a", None, 2]])], Contents()) == {
        "backwards": 1
    }


def test_a_write_that_did_not_find_its_row_is_seen() -> None:
    gone = operation("2", ["change", "issues", "a", "d"], outcome=Outcome.REFUSED,
                     reason="RowGone: 0 rows: a")  # fmt: skip
    assert found([MAKE, gone], rows((0, "d1"))) == {"backwards": 1}


HISTORY = [Authority("7", 1, "cell-1", 0.0), Authority("7", 2, "cell-2", 100.0)]


def judged(*operations: Operation) -> dict[str, int]:
    findings = Findings()
    check_authority(operations, HISTORY, findings)
    return dict(findings.counts)


def test_writes_under_their_authority_are_no_fault() -> None:
    before = operation("1", ["add", "c", "n", 1], wall=99.0)
    after = operation("2", ["add", "c", "n", 1], wall=99.0, cell="cell-2", epoch=2)
    assert judged(before, after) == {}


def test_a_write_at_a_cell_that_had_no_authority_is_misplaced() -> None:
    assert judged(operation("1", ["add", "c", "n", 1], cell="cell-2")) == {"misplaced": 1}
    assert judged(operation("1", ["add", "c", "n", 1], cell="cell-3", epoch=3)) == {"misplaced": 1}


def test_a_write_at_the_old_cell_after_the_flip_is_misplaced() -> None:
    assert judged(operation("1", ["add", "c", "n", 1], wall=100.5)) == {"misplaced": 1}


def test_an_untouched_row_that_differs_is_foreign_unless_its_organization_moved() -> None:
    findings = Findings()
    contents = Contents(untouched={"notes": (2, "11")})
    check_untouched("7", contents, {"untouched": {"notes": [2, "10"]}}, False, findings)
    check_untouched("8", contents, {"untouched": {"notes": [2, "10"]}}, True, findings)
    check_untouched("9", contents, {"untouched": {"notes": [2, "11"]}}, True, findings)
    assert dict(findings.counts) == {"foreign": 1, "changed": 1}
