"""One process among the clients of a shard set: what it follows now, and whether it still may.

A thread confirms again and again, and whenever the topology announces a change, that this process
is there; each answer says what the set is and in which state. From the moment a confirmation is
*sent*, the process may act for somewhat less than its lease; nobody passes it over before that has
run out. A new state is used at once for what begins then, and acknowledged when nothing that began
under the one before is still under way.

When its row is gone (it was silent for too long), it begins anew: with a new session, so that what
was begun in the old one is never confirmed afterwards.
"""

from __future__ import annotations

import logging
import os
import random
import select
import threading
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import conninfo, sql
from psycopg.types.json import Jsonb

from cellferry.errors import (
    CellferryError,
    InvalidInput,
    PermanentError,
    TransientError,
    Unreachable,
)
from cellferry.shards.clock import now_s
from cellferry.shards.control import SHARDS_CHANNEL
from cellferry.shards.settings import ShardSet
from cellferry.shards.states import RULES, Owner, Rule, ShardState, rule
from cellferry.topology.connection import Database, connect, translated

_log = logging.getLogger(__name__)

#: A process acts for this share of its lease: clocks of two machines do not run equally fast.
_SHARE = 0.9
_CONFIRM = """
SELECT topology.confirm_shard_client(
    %(set)s, %(session)s, %(name)s, %(lease_s)s, %(acknowledges)s, %(window_s)s, %(figures)s)
"""
#: What the topology's connections are opened with unless the URL says otherwise.
_PARAMETERS: Mapping[str, Any] = {"connect_timeout": 2, "tcp_user_timeout": 3_000}
_FIRST_BACK_OFF_S = 0.05
_ALONE = RULES[ShardState.OLD]


class Unavailable(TransientError):
    """This process does not know what holds now, or a shard does not answer; nothing was done."""


class Session:
    """One registration of this process."""

    __slots__ = ("id", "is_lost", "valid_until")

    def __init__(self) -> None:
        self.id = uuid.uuid4()
        self.valid_until = float("-inf")
        self.is_lost = False

    @property
    def is_valid(self) -> bool:
        """Whether nobody can have passed this process over yet."""
        return not self.is_lost and now_s() < self.valid_until


@dataclass(frozen=True, slots=True)
class Way:
    """Where one key is decided: a rule, and the connection of each owner."""

    rule: Rule
    connections: Mapping[Owner, tuple[str, str]]
    """By owner: the shard's name and its connection's."""


@dataclass(eq=False)
class View:
    """What holds for operations that begin now. Never changes.

    Attributes:
        in_flight: operations that began under it and have not ended; under the lock.
    """

    epoch: int
    old: ShardSet
    new: ShardSet | None
    state: ShardState | None
    authority: Owner
    session: Session
    in_flight: int = field(default=0, compare=False)

    def way(self, key: bytes) -> Way:
        """Return where a server's key is decided."""
        name = self.old.owner(key)
        old = (name, self.old.connections[name])
        if self.new is None or self.state is None:
            return Way(_ALONE, {Owner.OLD: old})
        name = self.new.owner(key)
        new = (name, self.new.connections[name])
        # Another name of the same server moves nothing.
        if old[1] == new[1]:
            return Way(_ALONE, {Owner.OLD: old})
        return Way(rule(self.state, self.authority), {Owner.OLD: old, Owner.NEW: new})

    def connections(self) -> set[str]:
        """Return the names of all connections that it may use."""
        return {
            *self.old.connections.values(),
            *(self.new.connections.values() if self.new else ()),
        }


class Membership:
    """Registers this process with a set and follows it.

    Args:
        url: the topology's.
        take_figures: called before a confirmation; what it returns is reported with it.
    """

    def __init__(
        self,
        url: str,
        set_name: str,
        client_name: str,
        lease_s: float,
        take_figures: Callable[[], Mapping[str, Any] | None],
    ) -> None:
        parameters = {
            **_PARAMETERS,
            "application_name": f"cellferry-shards:{client_name}"[:63],
            **conninfo.conninfo_to_dict(url),
        }
        self._parameters = parameters
        self._where = Database(conninfo.make_conninfo(**parameters)).where
        self._connection: psycopg.Connection[Any] | None = None
        self._is_unconfirmed = False
        self._has_heard = False
        self._set_name = set_name
        self._client_name = client_name
        self._lease_s = lease_s
        self._take_figures = take_figures
        self._changed = threading.Condition()
        self._view: View | None = None
        self._old_views: list[View] = []
        self._session = Session()
        self._trouble: CellferryError | None = None
        self._reported_at = now_s()
        self._stopping = False
        self._is_closed = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._thread = threading.Thread(target=self._run, name="cellferry-shards", daemon=True)

    def start(self) -> None:
        """Register and start following.

        Raises:
            InvalidInput: the topology has no such set.
            Unreachable, AccessDenied, NotPrepared: of the topology.
        """
        try:
            self._confirm(self._connected())
        except BaseException:
            self._close()
            raise
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Wait for what is under way, then leave.

        What does not end in time holds the next state up until the lease has run out.
        """
        until = now_s() + timeout_s
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            while (left := until - now_s()) > 0 and self._under_way():
                self._changed.wait(left)
            quiet = not self._under_way()
        self._wake()
        self._thread.join(max(0.1, until - now_s()))
        if quiet and not self._thread.is_alive():
            with suppress(CellferryError, psycopg.Error):
                self._connected().execute("SELECT topology.leave_shard_set(%s)", [self._session.id])
        self._session.is_lost = True
        if not self._thread.is_alive():
            self._close()

    def _close(self) -> None:
        self._disconnect()
        with self._changed:
            self._is_closed = True
            os.close(self._wake_read)
            os.close(self._wake_write)

    @property
    def view(self) -> View | None:
        """What it follows now, confirmed or not."""
        return self._view

    def enter(self, deadline: float) -> View:
        """Return what holds now and count an operation under it; `leave` must follow.

        Args:
            deadline: until when to wait for a confirmation, see `clock.now_s`.

        Raises:
            Unavailable: there was none.
        """
        with self._changed:
            while True:
                view = self._view
                if self._stopping:
                    raise Unavailable("the sharded store is closed", hint="open another one")
                if view is not None and view.session.is_valid:
                    view.in_flight += 1
                    return view
                left = deadline - now_s()
                if left <= 0:
                    why = "" if self._trouble is None else f": {self._trouble.message}"
                    raise Unavailable(
                        f"the state of shard set {self._set_name} is not confirmed{why}",
                        hint="nothing was done; try again when the topology answers",
                    )
                self._changed.wait(left)

    def leave(self, view: View) -> None:
        """End an operation."""
        with self._changed:
            view.in_flight -= 1
            if view.in_flight == 0 and (view is not self._view or self._stopping):
                self._changed.notify_all()
                self._wake()

    def wait_for_another(self, view: View, deadline: float) -> bool:
        """Wait until something newer than `view` holds; whether it does."""
        with self._changed:
            while self._view is view and not self._stopping:
                left = deadline - now_s()
                if left <= 0:
                    return False
                self._changed.wait(left)
            return True

    # -- the thread

    def _run(self) -> None:
        back_off = _FIRST_BACK_OFF_S
        while not self._stopping:
            try:
                connection = self._connected()
                self._confirm(connection)
                back_off = _FIRST_BACK_OFF_S
                self._follow(connection)
            except (CellferryError, psycopg.Error, OSError) as error:
                self._disconnect()
                self._note(error)
            if not self._stopping:
                self._sleep(back_off * random.uniform(0.5, 1.0))  # noqa: S311 jitter
                back_off = min(back_off * 2, self._lease_s / 4)

    def _connected(self) -> psycopg.Connection[Any]:
        """Return a connection that listens; each of its statements is a transaction.

        A process that is stopped in the middle of one must not hold a lock meanwhile: the state
        could not be changed.
        """
        if self._connection is None or self._connection.closed:
            try:
                connection = connect(self._parameters)
            except psycopg.Error as error:
                raise translated(error, self._where) from None
            self._connection = connection
            connection.autocommit = True
            connection.add_notice_handler(self._heed)
            # Announcements may arrive among the answers to a statement.
            connection.add_notify_handler(self._hear)
            connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(SHARDS_CHANNEL)))
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _hear(self, notify: psycopg.Notify) -> None:
        self._has_heard |= notify.payload == self._set_name

    def _heed(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        """Notice that a synchronous standby did not confirm: a failover would forget this beat."""
        if diagnostic.source_function == "SyncRepWaitForLSN":
            self._is_unconfirmed = True

    def _follow(self, connection: psycopg.Connection[Any]) -> None:
        pgconn = connection.pgconn
        poll = select.poll()
        poll.register(pgconn.socket, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        next_at = now_s()
        while not self._stopping:
            ready = {file for file, _ in poll.poll(max(0.0, next_at - now_s()) * 1000)}
            if self._wake_read in ready:
                os.read(self._wake_read, 4096)
            if pgconn.socket in ready:
                pgconn.consume_input()
                while (news := pgconn.notifies()) is not None:
                    self._has_heard |= news.extra == self._set_name.encode()
            if self._has_heard or self._wake_read in ready or now_s() >= next_at:
                self._confirm(connection)
                next_at = now_s() + self._lease_s / 4

    def _confirm(self, connection: psycopg.Connection[Any]) -> None:
        """Confirm until there is nothing to acknowledge that has not been."""
        while True:
            acknowledges, self._has_heard = self._acknowledgeable(), False
            answer, sent = self._ask(connection, acknowledges)
            if answer.get("lost"):
                self._begin_anew()
                continue
            if answer.get("unknown"):
                raise InvalidInput(
                    f"there is no shard set {self._set_name!r} in the topology",
                    hint="register it with its file first",
                )
            with self._changed:
                self._take_in(answer)
                self._session.valid_until = sent + _SHARE * self._lease_s
                self._trouble = None
                self._changed.notify_all()
            acknowledged = answer["epoch"] if acknowledges is None else acknowledges
            if self._acknowledgeable() in {None, acknowledged} and not self._has_heard:
                return

    def _ask(
        self, connection: psycopg.Connection[Any], acknowledges: int | None
    ) -> tuple[Mapping[str, Any], float]:
        """Return the topology's answer, and when it was asked."""
        figures = self._take_figures()
        self._is_unconfirmed = False
        sent = now_s()
        window_s, self._reported_at = sent - self._reported_at, sent
        given = {
            "set": self._set_name,
            "session": self._session.id,
            "name": self._client_name,
            "lease_s": self._lease_s,
            "acknowledges": acknowledges,
            "window_s": window_s,
            "figures": None if figures is None else Jsonb(figures),
        }

        try:
            row = connection.execute(_CONFIRM, given).fetchone()
        except psycopg.Error as error:
            raise translated(error, self._where) from error
        if self._is_unconfirmed or row is None:
            raise Unreachable(
                "the topology's synchronous standby did not confirm", where=self._where
            )
        answer: Mapping[str, Any] = row[0]
        return answer, sent

    def _take_in(self, answer: Mapping[str, Any]) -> None:
        """Follow what the topology said; under the lock.

        Raises:
            PermanentError: it says less than it did: it has lost commits.
        """
        view, epoch, live = self._view, int(answer["epoch"]), answer["resharding"]
        state = None if live is None else ShardState(live["state"])
        if view is not None and (
            epoch < view.epoch or (epoch == view.epoch and state is not view.state)
        ):
            raise PermanentError(
                f"the topology says that shard set {self._set_name} is {state} at epoch {epoch};"
                f" before, it said {view.state} at epoch {view.epoch}",
                hint="it has lost commits; do nothing until a person has looked",
            )
        if view is not None and view.session is self._session and view.epoch == epoch:
            return
        if view is not None:
            self._old_views = [one for one in (*self._old_views, view) if one.in_flight]
        self._view = View(
            epoch=epoch,
            old=ShardSet.from_document(answer["set"]),
            new=None if live is None else ShardSet.from_document(live["new"]),
            state=state,
            authority=Owner.OLD if live is None else Owner(live["authority"]),
            session=self._session,
        )

    def _acknowledgeable(self) -> int | None:
        """Return the epoch up to which nothing older is under way; None without a session."""
        with self._changed:
            view = self._view
            if view is None or view.session is not self._session:
                return None
            self._old_views = [one for one in self._old_views if one.in_flight]
            return min(
                [view.epoch, *(v.epoch for v in self._old_views if v.session is self._session)]
            )

    def _begin_anew(self) -> None:
        with self._changed:
            _log.warning("this process was silent for too long and registers anew")
            self._session.is_lost = True
            self._session = Session()

    def _note(self, error: CellferryError | psycopg.Error | OSError) -> None:
        with self._changed:
            if self._trouble is None:
                _log.warning("the state of the shards is not confirmed: %s", type(error).__name__)
            self._trouble = (
                error
                if isinstance(error, CellferryError)
                else Unreachable("the topology does not answer")
            )

    def _under_way(self) -> bool:
        views = [*self._old_views, *([] if self._view is None else [self._view])]
        return any(one.in_flight for one in views)

    def _sleep(self, seconds: float) -> None:
        if select.select([self._wake_read], [], [], seconds)[0]:
            os.read(self._wake_read, 4096)

    def _wake(self) -> None:
        with self._changed, suppress(BlockingIOError):
            if not self._is_closed:  # the number may be another file's by then
                os.write(self._wake_write, b"x")
