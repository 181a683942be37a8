"""Around every task: whose step is waited for goes first, and all others give way."""

from __future__ import annotations

import pytest

from cellferry.niceness import ONE_MACHINE
from cellferry.orchestration import step_run


@pytest.mark.parametrize(
    ("waited_for", "shared", "expected"),
    [
        (False, False, ["give way"]),
        (False, True, ["give way"]),
        (True, True, ["go first"]),
        # Elsewhere Airflow's workers have a machine, and their session, for themselves.
        (True, False, []),
    ],
)
def test_a_step_that_writers_wait_for_goes_first_where_all_share_a_machine(
    monkeypatch: pytest.MonkeyPatch, waited_for: bool, shared: bool, expected: list[str]
) -> None:
    done: list[str] = []
    monkeypatch.setattr(step_run, "give_way", lambda: done.append("give way"))
    monkeypatch.setattr(step_run, "go_first", lambda: done.append("go first"))
    monkeypatch.delenv(ONE_MACHINE, raising=False)
    if shared:
        monkeypatch.setenv(ONE_MACHINE, "1")
    with pytest.raises(RuntimeError), step_run.running_task(waited_for=waited_for):
        pass  # no task runs here
    assert done == expected
