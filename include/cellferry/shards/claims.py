"""How a claim is decided: a dialogue with shards, without the sending.

`claim` is a generator: it yields what to ask which owner, and is sent the answer. The client
sends these over the network; `tests/unit/test_shard_states.py` lets them meet in every order.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from cellferry.shards.states import Owner, Rule


@dataclass(frozen=True, slots=True)
class Ask:
    """Set the key to `token` unless it exists, and say who holds it.

    Attributes:
        owner: whom to ask.
        token: this claim's own value.
        expires_ms: absolute expiry in milliseconds; None where the claim's TTL begins here.
    """

    owner: Owner
    token: bytes
    expires_ms: int | None


@dataclass(frozen=True, slots=True)
class Held:
    """The answer: who holds the key now, and until when.

    Attributes:
        token: the holder's; the asker's own when it won, now or with an earlier try.
        expires_ms: absolute, on that server's clock; None when the key does not expire.
    """

    token: bytes
    expires_ms: int | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the claim was accepted; where it is to be mirrored; who holds the key otherwise."""

    accepted: bool
    holder: Held
    mirror: Ask | None = None


def claim(rule: Rule, token: bytes) -> Generator[Ask, Held, Verdict]:
    """Decide one claim under one state's rule. Repeating it with the same token is harmless.

    Every owner named by the rule must be won, in its order. What was won before another owner
    refused stays there until it expires: the claim that holds the refusing owner is the one that
    counts, so nobody could be accepted there anyway.
    """
    expires: int | None = None
    held = Held(token, None)
    for number, owner in enumerate(rule.claims):
        held = yield Ask(owner, token, expires if number else None)
        if held.token != token:
            return Verdict(False, held)
        expires = held.expires_ms
    mirror = None if rule.mirror is None else Ask(rule.mirror, token, expires)
    return Verdict(True, held, mirror)
