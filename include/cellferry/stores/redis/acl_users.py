"""ACL users: what the application's user may do while its gate is closed, and the mover's own.

The gate of an organization is its application user: with read-only key patterns it cannot write
any more, at once, for live connections, queued transactions and scripts alike. One thing the key
patterns do not stop: write commands whose keys the server counts as read (XREADGROUP changes the
group of a stream) or that name no keys (FLUSHALL). Those are taken from the user by name.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from cellferry.errors import PermanentError
from cellferry.model import Move, Side
from cellferry.stores.redis.key_prefix import KeyPrefix
from cellferry.stores.redis.questions import COMMANDS
from cellferry.stores.redis.wire import Argument, ServerError, Wire, explain

USERS = "cellferry-"
"""Every user that this store makes begins with it."""

_CONNECTION = (
    "+hello",
    "+ping",
    "+select",
    "+client|setname",
    "+client|tracking",
)
_READ = (
    "+dump",
    "+pexpiretime",
    "+scan",
    "+type",
    "+exists",
    "+time",
    "+memory|usage",
    "+get",
    "+lrange",
    "+smembers",
    "+hgetall",
    "+zrange",
    "+xrange",
    "+xinfo|stream",
)
_ASK = tuple(f"+{command}" for command in COMMANDS if f"+{command}" not in _READ)
"""What smoke queries may ask for besides."""
_WHERE_KNOWN = ("client|no-touch", "hpexpiretime")
"""Younger commands, which older engines refuse to have in a rule."""
_WRITE = ("+restore", "+unlink", "+set", "+watch", "+unwatch", "+multi", "+exec")


@dataclass(frozen=True, slots=True)
class AccessRules:
    """The part of a user's rules that a gate changes, as arguments of ACL SETUSER.

    Passwords, channels and the on/off flag are left alone: a password that is changed while the
    organization moves stays changed.
    """

    keys: tuple[str, ...]
    commands: tuple[str, ...]
    selectors: tuple[str, ...]

    @classmethod
    def of(cls, reply: Any) -> Self:
        """Read the reply of ACL GETUSER (protocol 2)."""
        user = _pairs(reply)
        selectors = []
        for selector in user.get("selectors", ()):
            found = _pairs(selector)
            words = [*found["keys"].split(), "resetchannels", *found["channels"].split()]
            databases = found.get("databases", "alldbs")
            if databases != "alldbs":
                words.append(databases)
            words += found["commands"].split()
            selectors.append("(" + " ".join(words) + ")")
        return cls(tuple(user["keys"].split()), tuple(user["commands"].split()), tuple(selectors))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        return cls(
            tuple(value["keys"]), tuple(value["commands"]), tuple(value.get("selectors", ()))
        )

    def to_json(self) -> dict[str, list[str]]:
        """For the marker key; holds no secret."""
        return {
            "keys": list(self.keys),
            "commands": list(self.commands),
            "selectors": list(self.selectors),
        }

    @property
    def is_read_only(self) -> bool:
        """Whether no key may be written."""
        return not self.selectors and all(key.startswith("%R~") for key in self.keys)

    def arguments(self) -> tuple[str, ...]:
        """Arguments of ACL SETUSER that give a user exactly these rules."""
        return (
            "resetkeys",
            *self.keys,
            "nocommands",
            *self.commands,
            "clearselectors",
            *self.selectors,
        )

    def closed(self, prefix: KeyPrefix, unstoppable: Iterable[str], *, reads: bool) -> AccessRules:
        """These rules with writing taken away; with `reads` the keys may still be read."""
        patterns = (prefix.pattern,) if reads else ()
        readable = (*patterns, prefix.marker_pattern("gate"))
        return AccessRules(
            tuple(f"%R~{pattern}" for pattern in readable),
            (*self.commands, *(f"-{command}" for command in unstoppable)),
            (),
        )


def read_rules(admin: Wire, user: str) -> AccessRules | None:
    """Rules of `user` now; None when there is no such user."""
    reply = admin.call("ACL", "GETUSER", user)
    return None if reply is None else AccessRules.of(reply)


def unstoppable_commands(admin: Wire) -> tuple[str, ...]:
    """Write commands that a read-only key pattern does not stop, in this server's version.

    They are read from the server's own table of commands, because it differs by engine.
    """
    found: list[str] = []

    def look(command: Any) -> None:
        name, flags, specs, subcommands = command[0], command[2], command[8], command[9]
        if b"write" in _bytes(flags):
            marks = {mark for spec in specs for mark in _bytes(_pairs(spec, decode=False)["flags"])}
            if not marks & {b"RW", b"OW", b"RM"}:
                found.append(name.decode())
        for subcommand in subcommands:
            look(subcommand)

    for command in admin.call("COMMAND"):
        look(command)
    return tuple(sorted(found))


def user_name(move: Move, side: Side, *, writer: bool) -> str:
    """Name of the mover's user of one attempt: `cellferry-<migration>-<attempt>-<side>`."""
    suffix = "-writer" if writer and side is Side.SOURCE else ""
    return f"{USERS}{move.migration}-{move.attempt}-{side.value}{suffix}"


def attempt_of(name: str) -> tuple[int, int] | None:
    """Migration and attempt of a mover's user; None for other users."""
    parts = name.removeprefix(USERS).split("-")
    if not name.startswith(USERS) or len(parts) < 3 or not all(p.isdigit() for p in parts[:2]):
        return None
    return int(parts[0]), int(parts[1])


def younger_commands(admin: Wire) -> tuple[str, ...]:
    """Those of the younger commands that this server has."""
    replies = admin.call("COMMAND", "INFO", *_WHERE_KNOWN)
    return tuple(name for name, reply in zip(_WHERE_KNOWN, replies, strict=True) if reply)


def mover_rules(
    prefix: KeyPrefix, password: str, *, writer: bool, younger: Iterable[str]
) -> tuple[Argument, ...]:
    """Arguments of ACL SETUSER for a user that reads, or writes, one organization's keys only."""
    commands = [*_CONNECTION, *_READ, *(f"+{name}" for name in younger)]
    gate = prefix.marker_pattern("gate")
    if writer:
        patterns = [f"~{prefix.pattern}", f"~{prefix.marker_pattern('checkpoint')}"]
        commands += _WRITE
    else:
        patterns = [f"%R~{prefix.pattern}"]
        commands += _ASK
    return (
        "reset",
        "on",
        f">{password}",
        *patterns,
        f"%R~{gate}",
        "-@all",
        *commands,
    )


def new_password() -> str:
    """A random password; it lives in this process's memory only."""
    return secrets.token_urlsafe(24)


def save(admin: Wire) -> None:
    """Write the ACL file, so that gates survive a restart (hazard 2).

    Raises:
        NotPrepared: the server has no ACL file.
    """
    try:
        admin.try_call("ACL", "SAVE")
    except ServerError as error:
        if "not configured" in str(error) or error.code == "NOPERM":
            raise explain(error, admin.address.where) from error
        raise PermanentError(
            f"the server cannot write its ACL file: {error}",
            hint="see the server's log; a gate must survive a restart",
            where=admin.address.where,
        ) from error


def _pairs(reply: Any, *, decode: bool = True) -> dict[str, Any]:
    items = list(reply)
    return {
        key.decode(): value.decode() if decode and isinstance(value, bytes) else value
        for key, value in zip(items[::2], items[1::2], strict=True)
    }


def _bytes(values: Any) -> list[bytes]:
    return [value if isinstance(value, bytes) else str(value).encode() for value in values]
