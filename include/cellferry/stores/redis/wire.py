"""A raw connection to a Redis or Valkey server.

A client library's command layer is what limits a copy (15 thousand keys a second), and it
reconnects on its own, which would lose a change feed without a word. So: one socket, hiredis to
pack and to parse, commands sent in bulk, replies read when the caller wants them. It never
reconnects; a lost connection is `Unreachable`.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import hiredis

from cellferry.closing import Closing
from cellferry.errors import (
    AccessDenied,
    CellferryError,
    InvalidInput,
    NotPrepared,
    PermanentError,
    TransientError,
    Unreachable,
)

CONNECT_TIMEOUT_S = 5.0
REPLY_TIMEOUT_S = 15.0
_READ = 256 * 1024

Argument = str | bytes | int | float
Command = tuple[Argument, ...]

_PENDING = object()

#: hiredis packs tuples of any length; its type stub speaks of one element.
_pack: Callable[[Command], bytes] = hiredis.pack_command  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is, and as whom to log in. `repr` never shows the password."""

    host: str
    port: int
    database: int = 0
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    where: str = ""
    """Cell and store, for errors."""

    @classmethod
    def parse(cls, url: str, where: str) -> Address:
        """Read `redis://user:password@host:port/database` (`rediss` for TLS).

        Raises:
            InvalidInput: it is not such a URL. The message never shows it: it holds a password.
        """
        try:
            parts = urlsplit(url)
            port = parts.port or 6379
            database = int(parts.path.strip("/") or 0)
        except ValueError as error:
            raise InvalidInput(
                "the connection's URL cannot be read",
                hint="redis://user:password@host:port/database",
                where=where,
            ) from error
        if parts.scheme not in ("redis", "rediss") or not parts.hostname:
            raise InvalidInput(
                f"the connection's URL begins with {parts.scheme!r} or names no host",
                hint="redis://user:password@host:port/database, or rediss:// for TLS",
                where=where,
            )
        return cls(
            host=parts.hostname,
            port=port,
            database=database,
            user=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
            tls=parts.scheme == "rediss",
            where=where,
        )

    def as_user(self, user: str, password: str) -> Address:
        """The same server and database as another user."""
        return Address(self.host, self.port, self.database, user, password, self.tls, self.where)


class ServerError(Exception):
    """An error reply. `code` is its first word: `NOPERM`, `WRONGPASS`, `OOM`."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = message.split(" ", 1)[0]


_DENIED = frozenset({"WRONGPASS", "NOAUTH", "NOPERM"})
_TRANSIENT = frozenset({"LOADING", "BUSY", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "READONLY"})


def explain(error: ServerError, where: str) -> CellferryError:
    """Translate an error reply into the error tree."""
    text = str(error)
    if error.code in _DENIED:
        return AccessDenied(
            text, hint="check the connection's user, password and ACL rules", where=where
        )
    if error.code == "OOM":
        return PermanentError(
            f"the server is out of memory: {text}",
            hint="raise maxmemory at the cell, or move the organization elsewhere",
            where=where,
        )
    if error.code == "MISCONF":
        return PermanentError(
            f"the server cannot write to its disk: {text}",
            hint="free space on the server's disk, then run the step again",
            where=where,
        )
    if error.code in _TRANSIENT:
        return TransientError(text, hint="the server is busy or not a primary", where=where)
    if "payload version or checksum" in text or "Bad data format" in text:
        return PermanentError(
            f"the server does not understand a key of the other cell: {text}",
            hint="upgrade this cell's engine to the version of the other one, or newer",
            where=where,
        )
    if "not configured to use an ACL file" in text:
        return NotPrepared(
            "the server keeps its ACL users in memory only: a gate would not survive a restart",
            hint="set `aclfile` in the server's configuration and restart it",
            where=where,
        )
    return PermanentError(f"unexpected answer: {text}", where=where)


class Wire(Closing):
    """One connection.

    Args:
        address: the server, and as whom.
        name: what `CLIENT LIST` shows: `cellferry:<migration>:<attempt>:<what>`.
        protocol: 2, or 3 where the server shall push.

    Raises:
        Unreachable: nobody answers.
        AccessDenied: wrong password.
    """

    def __init__(self, address: Address, name: str, *, protocol: int = 2) -> None:
        self.address = address
        self.is_lost = False
        """Whether a reply did not come: it may still, and would be taken for another's."""
        self.known_commands: dict[str, bool] = {}
        self._reader = hiredis.Reader(notEnoughData=_PENDING)
        self._socket = self._connect()
        try:
            self._greet(name, protocol)
        except BaseException:
            self.close()
            raise

    def call(self, *command: Argument) -> Any:
        """Send one command and return its reply.

        Raises:
            CellferryError: the error reply, translated.
        """
        return self.checked([command])[0]

    def try_call(self, *command: Argument) -> Any:
        """Like `call`, but raises `ServerError` for an error reply."""
        self.send([command])
        reply = self.receive(1)[0]
        if isinstance(reply, hiredis.ReplyError):
            raise ServerError(str(reply))
        return reply

    def checked(self, commands: Sequence[Command]) -> list[Any]:
        """Send `commands` together and return their replies; the first error reply is raised."""
        self.send(commands)
        return self.answers(len(commands))

    def answers(self, count: int) -> list[Any]:
        """Return the next `count` replies; the first error reply is raised, after all have come."""
        replies = self.receive(count)
        for reply in replies:
            if isinstance(reply, hiredis.ReplyError):
                self.check(reply)
        return replies

    def check(self, reply: Any) -> Any:
        """Return `reply`, or raise it translated if it is an error."""
        if isinstance(reply, hiredis.ReplyError):
            raise explain(ServerError(str(reply)), self.address.where)
        return reply

    def send(self, commands: Iterable[Command]) -> None:
        """Send `commands`; their replies are read with `receive`."""
        self.send_packed(b"".join([_pack(command) for command in commands]))

    def send_packed(self, data: bytes) -> None:
        """Send commands that are written in the protocol already."""
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise self._lost(error) from error

    def receive(self, count: int) -> list[Any]:
        """Return the next `count` replies; error replies are among them as values."""
        replies: list[Any] = []
        gets = self._reader.gets
        while len(replies) < count:
            reply = gets()
            if reply is _PENDING:
                self.fill()
            else:
                replies.append(reply)
        return replies

    def fill(self) -> None:
        """Wait for data and hand it to the parser."""
        try:
            data = self._socket.recv(_READ)
        except OSError as error:
            raise self._lost(error) from error
        if not data:
            raise self._lost(None)
        self._reader.feed(data)

    def next_parsed(self) -> tuple[bool, Any]:
        """Return (True, reply or push) if one is complete in the buffer, else (False, None)."""
        reply = self._reader.gets()
        return (False, None) if reply is _PENDING else (True, reply)

    def wait_at_most(self, seconds: float) -> None:
        """Set how long a read may take."""
        self._socket.settimeout(seconds)

    def shut(self) -> None:
        """End both directions, so that a thread that reads wakes up."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _connect(self) -> socket.socket:
        address = self.address
        try:
            raw = socket.create_connection((address.host, address.port), CONNECT_TIMEOUT_S)
            raw.settimeout(REPLY_TIMEOUT_S)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                raw.setsockopt(
                    socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(REPLY_TIMEOUT_S * 1000)
                )
            if address.tls:
                context = ssl.create_default_context()
                return context.wrap_socket(raw, server_hostname=address.host)
        except OSError as error:
            raise Unreachable(
                f"no answer from {address.host}:{address.port}: {error}",
                hint="check that the server runs and that this host may reach it",
                where=address.where,
            ) from error
        return raw

    def _greet(self, name: str, protocol: int) -> None:
        address = self.address
        greeting: list[Command] = []
        if address.password is not None:
            user = (address.user,) if address.user else ()
            greeting.append(("AUTH", *user, address.password))
        if protocol != 2:
            greeting.append(("HELLO", protocol))
        greeting.append(("CLIENT", "SETNAME", _client_name(name)))
        if address.database:
            greeting.append(("SELECT", address.database))
        self.send(greeting)
        for reply in self.receive(len(greeting)):
            if isinstance(reply, hiredis.ReplyError):
                error = ServerError(str(reply))
                if error.code in _DENIED:
                    raise AccessDenied(
                        f"user {address.user or 'default'!r} may not log in: {error}",
                        hint="check the connection's user and password",
                        where=address.where,
                    )
                raise explain(error, address.where)

    def _lost(self, error: OSError | None) -> Unreachable:
        self.is_lost = True
        reason = str(error) if error else "the server closed it"
        return Unreachable(
            f"the connection to {self.address.host}:{self.address.port} was lost: {reason}",
            hint="try again",
            where=self.address.where,
        )


def _client_name(name: str) -> str:
    return "".join(letter if "!" <= letter <= "~" else "_" for letter in name)
