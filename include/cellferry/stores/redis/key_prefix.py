"""Which keys are an organization's: the prefix, as text, as a pattern, and its marker keys.

A cell says `key_prefix: "org:{$organization}:"`. The braces are a hash tag and literal;
`$organization` is replaced by the organization's id. What follows it, the terminator, keeps the
keys of organization 4 apart from those of organization 42 (invariant 8).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from cellferry.errors import InvalidInput

PLACEHOLDER = "$organization"
MARKERS = "cellferry:"
"""Every key that this store makes for itself begins with it."""

_GLOB = frozenset("*?[]\\^")


def escape(text: str) -> str:
    r"""Return `text` so that MATCH and ACL patterns take it literally: `a*` becomes `a\*`."""
    return "".join("\\" + letter if letter in _GLOB else letter for letter in text)


def checked_id(organization: str) -> str:
    """Return `organization` if it may be part of a key pattern and of a user's name.

    Raises:
        InvalidInput: it is empty, or holds white space or control characters, which the server
            cannot have in an ACL rule.
    """
    if not organization:
        raise InvalidInput("the organization's id is empty", hint="register it with an id")
    for letter in organization:
        if letter.isspace() or unicodedata.category(letter) in ("Cc", "Cs"):
            raise InvalidInput(
                f"organization id {organization!r} holds white space or a control character",
                hint="an ACL rule of the server cannot express such a key pattern; "
                "rename the organization's keys or leave this store out of its cells",
                organization=organization,
            )
    return organization


@dataclass(frozen=True, slots=True)
class KeyPrefix:
    """The prefix of one organization's keys.

    Attributes:
        head: text before the organization's id.
        organization: the id, as it is.
        terminator: text after the id; never empty.
    """

    head: str
    organization: str
    terminator: str

    @classmethod
    def of(cls, options: Mapping[str, Any], organization: str, *, where: str) -> Self:
        """Read the option `key_prefix` of a cell's store.

        Raises:
            InvalidInput: the option or the organization's id cannot be used; says why.
        """
        template = options.get("key_prefix")
        hint = f'write for example key_prefix: "org:{{{PLACEHOLDER}}}:"'
        if not isinstance(template, str) or template.count(PLACEHOLDER) != 1:
            raise InvalidInput(
                f"key_prefix must hold {PLACEHOLDER} exactly once, not {template!r}",
                hint=hint,
                where=where,
            )
        head, terminator = template.split(PLACEHOLDER)
        if not terminator or terminator[0].isalnum():
            raise InvalidInput(
                f"key_prefix {template!r} has no terminator after {PLACEHOLDER}: "
                "the keys of organization 4 would match those of organization 42",
                hint=hint,
                where=where,
            )
        if any(letter.isspace() for letter in template):
            raise InvalidInput(f"key_prefix {template!r} holds white space", hint=hint, where=where)
        text = head + organization + terminator
        if text.startswith(MARKERS) or MARKERS.startswith(text):
            raise InvalidInput(
                f"key_prefix {template!r} meets the keys that cellferry makes ({MARKERS}…)",
                hint=hint,
                where=where,
            )
        checked_id(organization)
        if terminator in organization:
            raise InvalidInput(
                f"organization id {organization!r} holds {terminator!r}, which ends the prefix: "
                "its keys would match those of another organization",
                hint="choose a key_prefix whose end is in no id",
                where=where,
                organization=organization,
            )
        return cls(head, organization, terminator)

    @property
    def text(self) -> str:
        """The prefix as it stands in keys."""
        return self.head + self.organization + self.terminator

    @property
    def encoded(self) -> bytes:
        """The prefix as bytes."""
        return self.text.encode()

    @property
    def pattern(self) -> str:
        """Glob that matches exactly this organization's keys, for MATCH and ACL rules."""
        return escape(self.text) + "*"

    def owns(self, key: bytes) -> bool:
        """Whether `key` is one of this organization's."""
        return key.startswith(self.encoded)

    def owned(self, keys: Iterable[bytes]) -> list[bytes]:
        """Return those of `keys` that are this organization's."""
        head = self.encoded
        return [key for key in keys if key.startswith(head)]

    def marker(self, what: str) -> str:
        """The key `cellferry:<what>:{<organization>}`: `gate`, `lease`, `checkpoint`."""
        return f"{MARKERS}{what}:{{{self.organization}}}"

    def marker_pattern(self, what: str) -> str:
        """Glob that matches exactly the key `marker(what)`."""
        return escape(self.marker(what))


def application_user(options: Mapping[str, Any], organization: str, *, where: str) -> str:
    """Return the name of the ACL user with which the application works for `organization`.

    Raises:
        InvalidInput: the option `application_user` is missing or does not name one user for
            each organization.
    """
    template = options.get("application_user")
    if not isinstance(template, str) or PLACEHOLDER not in template:
        raise InvalidInput(
            f"application_user must hold {PLACEHOLDER}, not {template!r}: the gate closes one "
            "organization's user, so each needs its own",
            hint=f'write for example application_user: "org-{PLACEHOLDER}"',
            where=where,
        )
    return template.replace(PLACEHOLDER, checked_id(organization))
