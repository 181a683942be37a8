"""Who is waited for when a gate is made, so that no transaction passes it unseen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from psycopg import IsolationLevel, sql

from cellferry.errors import DrainTimeout
from fixtures.gated import GatedCell


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
