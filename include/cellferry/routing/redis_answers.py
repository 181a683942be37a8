"""What a refused Redis command means: Redis says only NOPERM, the gate's marker says why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from cellferry.routing.answers import BeingMoved, Moved, causes

_REFUSALS = ("NOPERM", "no permissions", "ACL failure in script")

C = TypeVar("C", bound="Getter")


class Getter(Protocol):
    """The one command that is needed of a Redis client."""

    def get(self, name: str, /) -> Any:
        """Return the value of a key, as bytes or text."""
        ...


def marker_key(organization: str) -> str:
    """The key in which a cell's Redis keeps the state of an organization's gate."""
    return f"cellferry:gate:{{{organization}}}"


def is_refusal(error: BaseException) -> bool:
    """Whether Redis refused a command for lack of permission: directly, in MULTI or in a script."""
    return any(
        type(one).__name__ == "NoPermissionError" or any(text in str(one) for text in _REFUSALS)
        for one in causes(error)
        if type(one).__module__.partition(".")[0] == "redis"
    )


def read_gate(client: Getter, organization: str) -> Moved | BeingMoved | None:
    """Return what the gate's marker answers now; None when it is open or there is none."""
    return parse_marker(client.get(marker_key(organization)), organization)


def parse_marker(value: str | bytes | None, organization: str) -> Moved | BeingMoved | None:
    """Return the answer in a marker's value; None when the gate is open or there is none."""
    if value is None:
        return None
    try:
        marker = json.loads(value)
        state = marker["state"]
        if state == "moved":
            return Moved(organization, str(marker["cell"]), int(marker["epoch"]))
    except (ValueError, KeyError, TypeError):
        return BeingMoved(organization)
    return BeingMoved(organization) if state in {"frozen", "importing"} else None


@contextmanager
def redis_answers(client: C, organization: str, *, assert_authority: bool = False) -> Iterator[C]:
    """Run Redis commands of one organization; a refusal by the gate becomes its answer.

    A MULTI block or script that is refused had no effect. Commands sent one by one before the
    refused one did: retry by command, not by operation (hazard 9).

    Args:
        client: connected as the organization's user.
        organization: whose keys are touched.
        assert_authority: look at the gate first. Reads are never refused, and see an old copy
            where the organization has moved away (hazard 8).

    Raises:
        Moved, BeingMoved: the gate's answer.
    """
    if assert_authority:
        answer = read_gate(client, organization)
        if answer is not None:
            raise answer
    try:
        yield client
    except Exception as error:
        if not is_refusal(error):
            raise
        marker = client.get(marker_key(organization))
        if marker is None:
            raise
        # An open gate: it was opened between the refusal and the look at it.
        raise parse_marker(marker, organization) or BeingMoved(organization) from error
