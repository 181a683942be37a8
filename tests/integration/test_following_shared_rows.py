"""Shared rows that a move brought follow the source beside their neighbours' writes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from cellferry.model import Side
from cellferry.stores.postgres.delta import Delta
from cellferry.stores.postgres.references import ReferencedRows
from fixtures.ferry import Ferry
from fixtures.gated import eventually


@pytest.mark.parametrize("email", [False, True], ids=["another column", "a unique column"])
@pytest.mark.parametrize("quickly", [False, True], ids=["the general way", "the quick way"])
def test_who_refers_to_a_row_while_it_is_brought_up_to_date_finds_it(
    ferry: Ferry, monkeypatch: pytest.MonkeyPatch, quickly: bool, email: bool
) -> None:
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
    change = "email = 'changed'" if email else "plan_id = NULL"
    ferry.run(Side.SOURCE, f"UPDATE users SET {change} WHERE id = 2")
    if quickly:
        ferry.run(Side.SOURCE, "UPDATE issues SET title = 'x' WHERE id = 1")
    kind, name = (Delta, "_bring") if quickly else (ReferencedRows, "follow")
    original = getattr(kind, name)

    def refer() -> None:
        with ferry.session(Side.DESTINATION) as neighbour:
            neighbour.execute("SET application_name = 'neighbour'")
            neighbour.execute("INSERT INTO memberships VALUES (3, 2, 'member')")

    with ThreadPoolExecutor(1) as pool:
        referring: list[Future[None]] = []

        def beside_a_neighbour(self: Any, *arguments: Any) -> Any:
            result = original(self, *arguments)
            referring.append(pool.submit(refer))
            waits = (
                "SELECT 1 FROM pg_stat_activity"
                " WHERE application_name = 'neighbour' AND wait_event_type = 'Lock'"
            )
            eventually(lambda: referring[0].done() or bool(ferry.run(Side.DESTINATION, waits)), 60)
            return result

        with ferry.opened(ferry.move(attempt=2)) as move:
            monkeypatch.setattr(kind, name, beside_a_neighbour)
            move.sync()
        referring[0].result(60)

    found = ferry.run(Side.DESTINATION, "SELECT email, plan_id FROM users WHERE id = 2")
    assert found == [("changed", 3) if email else ("user2@example.com", None)]
