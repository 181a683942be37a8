"""A question that a person puts to a store about one organization: read-only, bounded, one value.

Smoke queries (`cellferry.migration.smoke_queries`) are made of them. The organization's id is
always given apart from the question's text, never written into it.
"""

from __future__ import annotations

from dataclasses import dataclass

PARAMETER = ":organization"

Answer = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Question:
    """What to ask.

    Attributes:
        text: as the person wrote it: a query, or the words of a command.
        timeout_s: longest time that the answer may take, in seconds.
    """

    name: str
    text: str | tuple[str, ...]
    timeout_s: float = 5.0


class BadQuestion(ValueError):
    """The question cannot be put: `reason` and `remedy` in words."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy
