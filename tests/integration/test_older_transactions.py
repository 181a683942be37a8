"""Who is waited for when a gate is made, so that no transaction passes it unseen."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psycopg
import pytest
from psycopg import IsolationLevel, sql

from cellferry.errors import DrainTimeout, Unreachable
from cellferry.model import GateState, Side
from cellferry.stores.postgres import gate, leftovers, sessions
from fixtures.ferry import Registry
from fixtures.gated import GatedCell, eventually

WRITE = "UPDATE projects SET name = 'x' WHERE id = %s"


@contextmanager
def prepared_by_an_ordinary_role(cell: GatedCell) -> Iterator[None]:
    """As if the tables' owner had prepared the cell, who may not read others' statistics."""
    owner = sql.Identifier(f"owner_{cell.application}")
    function = sql.SQL("ALTER FUNCTION cellferry.open_transactions() OWNER TO {}")
    with cell.admin() as admin:
        admin.execute(sql.SQL("CREATE ROLE {}").format(owner))
        admin.execute(function.format(owner))
        yield
        admin.execute(function.format(sql.SQL("CURRENT_USER")))
        admin.execute(sql.SQL("DROP ROLE {}").format(owner))


@pytest.mark.parametrize(
    ("level", "statement"),
    [
        (IsolationLevel.READ_COMMITTED, "UPDATE projects SET name = 'x' WHERE id = 1"),
        (IsolationLevel.READ_COMMITTED, "UPDATE projects SET name = 'x' WHERE id = -1"),
        (IsolationLevel.REPEATABLE_READ, "SELECT * FROM projects"),
    ],
    ids=["has written", "holds a writer's lock", "has a snapshot"],
)
def test_arming_waits_where_an_ordinary_role_prepared(
    gated: GatedCell, level: IsolationLevel, statement: str
) -> None:
    with prepared_by_an_ordinary_role(gated), gated.connect(autocommit=False) as session:
        session.isolation_level = level
        session.execute(statement.encode())

        with pytest.raises(DrainTimeout, match="the application"):
            gated.arm(arm_deadline_s=0.3)

        session.rollback()
        gated.arm(attempt=2)


def restore(cell: GatedCell) -> bool:
    move = cell.move()
    return leftovers.reconcile(move, Side.SOURCE, GateState.MOVED, Registry())


def test_a_gate_that_is_made_again_waits_for_who_may_not_have_heard_of_it(gated: GatedCell) -> None:
    with gated.connect(autocommit=False) as session, ThreadPoolExecutor(1) as pool:
        for _ in range(8):  # until plans are cached: making them would let it hear of the gate
            session.execute(WRITE, (1,), prepare=True)
            session.commit()
        assert session.execute(WRITE, (-1,), prepare=True).rowcount == 0

        restored = pool.submit(restore, gated)
        eventually(lambda: gate.state(gated.mover(), "1") is not None)
        with pytest.raises(psycopg.Error, match="has moved"):
            gated.run("UPDATE projects SET name = 'y' WHERE id = 1")
        assert not restored.done()
        session.execute(WRITE, (1,), prepare=True)  # does not hear of it
        session.commit()

        assert restored.result(30)
    found = gate.state(gated.mover(), "1")
    assert found is not None
    assert found.settled


def test_a_gate_that_is_made_again_closes_although_somebody_does_not_end(
    gated: GatedCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "SETTLE_S", 0.3)
    with gated.connect(autocommit=False) as session:
        session.execute(WRITE, (-1,))
        for _ in range(2):  # the next time it waits again
            with pytest.raises(DrainTimeout, match="the application"):
                restore(gated)
        session.rollback()

    assert not restore(gated), "it was closed before"
    with pytest.raises(psycopg.Error, match="has moved"):
        gated.run("UPDATE projects SET name = 'x' WHERE id = 1")


def test_a_controller_that_hangs_while_it_makes_a_gate_holds_up_no_others(
    gated: GatedCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "STANDSTILL_S", 1)
    move = gated.move(3)
    mover = gated.mover()
    gate.take_lease(mover, move)

    def hang() -> None:
        with sessions.translate_errors("cell-1"), gate.fenced(mover, move):
            mover.execute(
                "INSERT INTO cellferry.gate (organization, state, armed, migration, attempt, epoch)"
                " VALUES ('3', 'open', true, 3, 1, 1)"
            )
            gated.arm(2)  # waits for the transaction here, which is ended
            mover.execute("SELECT 1")

    with pytest.raises(Unreachable):
        hang()
    assert gate.state(gated.mover(), "2") is not None
    assert gate.state(gated.mover(), "3") is None
