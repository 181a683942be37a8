"""Questions to Redis: one cheap reading command about one key of one organization."""

from __future__ import annotations

import re
from typing import Any

from cellferry.stores.questions import PARAMETER, Answer, BadQuestion, Question

#: Commands of which no answer is long to find; the mover's reading user may send them.
COMMANDS = (
    *("exists", "type", "ttl", "pttl"),
    *("get", "strlen", "getrange"),
    *("hget", "hexists", "hlen"),
    *("llen", "lindex"),
    *("scard", "sismember"),
    *("zcard", "zscore", "zcount"),
    "xlen",
)
_OTHER_PARAMETER = re.compile(r"\{:(?!organization\})\w*\}|\A:(?!organization\Z)[A-Za-z_]\w*\Z")


def words(question: Question) -> tuple[str, ...]:
    """Return the command's words, still with `:organization` in them.

    Raises:
        BadQuestion: it is no reading command about a key of `:organization`.
    """
    found = question.text.split() if isinstance(question.text, str) else list(question.text)
    if len(found) < 2:
        raise BadQuestion(
            "it is no command with a key", f'write for example LLEN "org:{{{PARAMETER}}}:queue"'
        )
    if found[0].lower() not in COMMANDS:
        raise BadQuestion(
            f"{found[0].upper()} is not one of the commands that only read",
            "use one of " + ", ".join(command.upper() for command in COMMANDS),
        )
    for word in found[1:]:
        other = _OTHER_PARAMETER.search(word)
        if other is not None:
            raise BadQuestion(
                f"there is no parameter {other.group()}", f"the only parameter is {PARAMETER}"
            )
    if PARAMETER not in found[1]:
        raise BadQuestion(
            f"its key {found[1]!r} does not name {PARAMETER}",
            f'write for example LLEN "org:{{{PARAMETER}}}:queue"',
        )
    return tuple(found)


def command(question: Question, organization: str) -> tuple[str, ...]:
    """Return the words to send: each is an argument of its own, whatever the id holds."""
    name, *arguments = words(question)
    return (name, *(one.replace(PARAMETER, organization) for one in arguments))


def answer(reply: Any) -> Answer:
    """Return a reply as a plain value."""
    if isinstance(reply, bytes):
        return reply.decode("utf-8", "backslashreplace")
    if reply is None or isinstance(reply, int | float | str):
        return reply
    return str(reply)
