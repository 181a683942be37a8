"""Which errors are tried again: the one place where our error tree meets Airflow's retries.

A permanent error fails the task at once, because trying again changes nothing and an operator
should hear of it now. A transient one, and one that we do not know (a killed process, a bug that
a race brought out), is tried again with exponential back-off; every step may be repeated.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import ExceptionRetryPolicy, RetryAction, RetryRule

from cellferry.errors import PermanentError, Stopped, TransientError

RETRY_POLICY = ExceptionRetryPolicy(
    rules=[
        RetryRule(
            exception=Stopped,
            action=RetryAction.FAIL,
            reason="paused or halted: resume it or clear the halt, then clear this task",
        ),
        RetryRule(
            exception=PermanentError,
            action=RetryAction.FAIL,
            reason="trying again changes nothing; a person must act",
        ),
        RetryRule(
            exception=TransientError,
            action=RetryAction.RETRY,
            reason="trying again may help",
        ),
    ],
    default=RetryAction.DEFAULT,
)

#: Waits of about 5, 10, 20, 40, 80 and 160 s: a server may be away for five minutes.
PATIENT: dict[str, Any] = {
    "retries": 6,
    "retry_delay": timedelta(seconds=5),
    "retry_exponential_backoff": 2.0,
    "max_retry_delay": timedelta(minutes=5),
    "retry_policy": RETRY_POLICY,
}

#: A cutover that was killed may have left its organization frozen: the next try comes quickly.
PROMPT: dict[str, Any] = {
    **PATIENT,
    "retries": 8,
    "retry_delay": timedelta(seconds=1),
    "max_retry_delay": timedelta(minutes=1),
}

#: Tasks that only read and report: one more try, soon.
BRIEF: dict[str, Any] = {**PATIENT, "retries": 2, "retry_delay": timedelta(seconds=2)}
