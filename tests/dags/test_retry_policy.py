"""Each error of the library meets the right answer of Airflow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from airflow.sdk import RetryAction

from cellferry import errors
from cellferry.orchestration.cancellation import Cancelled
from cellferry.orchestration.retry_policy import RETRY_POLICY


def below(root: type[errors.CellferryError]) -> Iterator[type[errors.CellferryError]]:
    yield root
    for child in root.__subclasses__():
        yield from below(child)


@pytest.mark.parametrize("kind", below(errors.PermanentError))
def test_permanent_errors_fail_at_once(kind: type[errors.CellferryError]) -> None:
    decision = RETRY_POLICY.evaluate(kind("x"), try_number=1, max_tries=6)
    assert decision.action is RetryAction.FAIL


@pytest.mark.parametrize("kind", below(errors.TransientError))
def test_transient_errors_are_retried_with_the_tasks_own_back_off(
    kind: type[errors.CellferryError],
) -> None:
    decision = RETRY_POLICY.evaluate(kind("x"), try_number=1, max_tries=6)
    assert (decision.action, decision.retry_delay) == (RetryAction.RETRY, None)


@pytest.mark.parametrize("error", [OSError("gone"), KeyError("bug"), Cancelled("told to end")])
def test_unknown_errors_are_retried(error: BaseException) -> None:
    decision = RETRY_POLICY.evaluate(error, try_number=1, max_tries=6)
    assert decision.action is RetryAction.DEFAULT
