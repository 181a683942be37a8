"""What an abort finds although nothing says any more whose it is, or that it is there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cellferry import phases
from cellferry.errors import LeaseLost
from cellferry.migration import steps
from cellferry.model import Actor, Organization, Resource, State
from cellferry.phases import Phase
from fixtures.cells import NO_TRACES, TwoCells


class KilledError(BaseException):
    """The controller's process ends here."""


@pytest.fixture
def acme(cells: TwoCells) -> Iterator[Organization]:
    yield cells.add_organization(7, issues=3)
    phases.listen(None)


def test_an_abort_deletes_a_row_that_was_copied_before_its_parent(
    cells: TwoCells, acme: Organization
) -> None:
    """No key of such a row leads to its organization: only the log says whose it is."""
    migration = cells.plan(acme)
    made = 0

    def open_issues(phase: Phase) -> None:
        nonlocal made
        if phase is Phase.COPY_DONE:
            raise KilledError
        if phase is Phase.COPY_BATCH:
            made += 1
            with cells.admin("cell-1") as connection:
                connection.execute(
                    "INSERT INTO issues VALUES (%s, 7, %s)", (7_500_000 + made, f"new {made}")
                )
                connection.execute(
                    "INSERT INTO comments VALUES (%s, %s, 'first')",
                    (750_000_000 + made, 7_500_000 + made),
                )

    phases.listen(open_issues)
    with cells.context() as context, pytest.raises(KilledError):
        steps.copy(context, migration)
    phases.listen(None)
    with cells.admin("cell-2") as connection:
        orphans = connection.execute(
            "SELECT count(*) FROM comments AS c"
            " WHERE NOT EXISTS (SELECT FROM issues AS i WHERE i.id = c.issue_id)"
        ).fetchone()
    assert orphans != (0,), "the test shows nothing: every parent came first"

    with cells.context() as context:
        steps.abort(context, migration, "enough")

    with cells.admin("cell-2") as connection:
        assert connection.execute("SELECT count(*) FROM comments").fetchone() == (0,)
    assert cells.traces("cell-2") == NO_TRACES
    assert cells.traces("cell-1") == NO_TRACES


def test_an_abort_forgets_a_user_that_died_with_its_server(
    cells: TwoCells, acme: Organization
) -> None:
    migration = cells.plan(acme)
    lost = Resource("cell-2", "redis", "acl_user", f"cellferry-{migration}-1-destination")
    with cells.context() as context:
        steps.copy(context, migration)
        context.topology.resources(migration).intend(lost)
        steps.abort(context, migration, "enough")
        assert context.topology.live_resources(migration) == []


def test_an_attempt_that_was_superseded_records_nothing_any_more(
    cells: TwoCells, acme: Organization
) -> None:
    migration = cells.plan(acme)
    gate = Resource("cell-2", "postgres", "gate", "7")
    with cells.context() as context:
        first = context.topology.take_lease(migration, "first", Actor("test"))
        context.topology.resources(migration, first).intend(gate)
        steps.abort(context, migration, "enough")
        assert context.topology.migration(migration).state is State.ABORTED
        with pytest.raises(LeaseLost):
            context.topology.resources(migration, first).intend(gate)
        assert context.topology.live_resources(migration) == []
