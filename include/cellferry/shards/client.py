"""The client of a shard set: dedup keys, values and counters, also while the shards change.

Its rules, by state, are in `cellferry.shards.states`; how it knows the state, in `membership`. What
it promises:

- An id is accepted once, whatever the state and whoever lags by one, dies or sleeps. A verdict
  counts only if this process was still confirmed when the answer had come; else the claim is
  decided again under what holds then, with its own token, which makes that harmless.
- A value or a counter is read and written at one place in each state. Between the two places it
  waits. A write is sent once: when its outcome is unknown, that is said, and nothing is repeated.
- Without a confirmation nothing is done: `Unavailable`.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from cellferry.closing import Closing
from cellferry.errors import (
    CellferryError,
    InvalidInput,
    OutcomeUnknown,
    PermanentError,
    TransientError,
    Unreachable,
)
from cellferry.settings import ConnectionSource
from cellferry.shards.claims import Verdict, claim
from cellferry.shards.clock import now_s
from cellferry.shards.figures import ShardFigures
from cellferry.shards.membership import Membership, Unavailable, View, Way
from cellferry.shards.server import ShardServer, open_shard
from cellferry.shards.states import ShardState

T = TypeVar("T")
#: Shards, each as its name and its connection's.
Places = set[tuple[str, str]]

_FIRST_PAUSE_S = 0.005
_LONGEST_PAUSE_S = 0.25
#: A server that did not answer a mirror is left out for so long, in seconds: nothing depends on it.
#: One that let a client wait for it is left out for so many times as long.
_REST_S = 1.0
_REST_FACTOR = 10.0
#: How long a claim that has won at one owner waits for the other to let go of what was given back.
_STALE_COPY_S = 1.0
#: Figures go out with a confirmation at most so often, in seconds.
_REPORT_EVERY_S = 1.0
_LEASES_S = (0.5, 300.0)

_stores: weakref.WeakSet[ShardedStore] = weakref.WeakSet()
_inherited: list[object] = []


class ClaimUndecided(Unavailable):
    """Nobody knows whether the claim was accepted.

    Attributes:
        token: claim again with it; or release it, if it is not wanted any more.
    """

    def __init__(self, message: str, token: bytes = b"", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.token = token


@dataclass(frozen=True, slots=True)
class Claim:
    """The answer to a claim.

    Attributes:
        accepted: whether the id is this claim's; for the whole TTL, nobody else's is accepted.
        token: the claim's own value, by which it is repeated or released.
        holder: the token of the claim that holds the id.
    """

    accepted: bool
    token: bytes
    holder: bytes


class ShardedStore(Closing):
    """Claims ids, and reads and writes values and counters, of one shard set.

    One for each process; threads may share it, a forked process registers as a client of its own.
    Ids and values are bytes; the set's key prefix is put in front of an id.

    Args:
        control_url: of the topology. The role needs USAGE on schema `topology`, EXECUTE on
            `topology.confirm_shard_client` and `topology.leave_shard_set`.
        set_name: of the set, as it is registered.
        connections: gives the URL of a shard's connection by its name.
        client_name: for the people who wait for this client.
        lease_s: how long this process may act without a confirmation; so long a change of state
            waits for it when it dies. Between 0.5 and 300 seconds.
        patience_s: how long an operation may wait for a state or a shard. Where it is not given,
            half as long again as the lease, from 10 to 30 s. A switch waits until the lease of a
            client that died is over, and then for the last changes: that mostly fits where leases
            are short and alike. `close` waits no longer, either.

    Raises:
        InvalidInput: no such set, or a value is out of its range.
        Unreachable, AccessDenied, NotPrepared: of the topology.
    """

    def __init__(
        self,
        control_url: str,
        set_name: str,
        connections: ConnectionSource,
        *,
        client_name: str,
        lease_s: float = 10.0,
        patience_s: float | None = None,
    ) -> None:
        low, high = _LEASES_S
        if not low <= lease_s <= high:
            raise InvalidInput(
                f"lease_s is {lease_s}", hint=f"it is between {low:g} and {high:g} seconds"
            )
        self._url = control_url
        self._set_name = set_name
        self._source = connections
        self._client_name = client_name
        self._lease_s = lease_s
        usual_s = min(max(10.0, 1.5 * lease_s), 30.0)
        self._patience_s = usual_s if patience_s is None else patience_s
        self._closed = False
        self._beginning = threading.Lock()
        self._begin()
        _stores.add(self)

    def _begin(self) -> None:
        """Everything that a forked child needs anew."""
        self._lock = threading.Lock()
        self._idle: dict[str, list[ShardServer]] = {}
        self._rests_until: dict[str, float] = {}
        self._figures = ShardFigures()
        self._figures_sent_at = now_s()
        membership = Membership(
            self._url, self._set_name, self._client_name, self._lease_s, self._take_figures
        )
        membership.start()
        self._membership = membership
        self._process = os.getpid()

    def close(self) -> None:
        """Wait for what is under way, unregister, and close all connections."""
        if self._closed or self._process != os.getpid():
            return
        self._closed = True
        self._membership.stop(self._patience_s)
        with self._lock:
            servers = [one for many in self._idle.values() for one in many]
            self._idle.clear()
        for server in servers:
            server.close()

    @property
    def epoch(self) -> int:
        """The epoch that this process follows; 0 while it knows of none."""
        view = self._membership.view
        return 0 if view is None else view.epoch

    @property
    def state(self) -> ShardState | None:
        """The state that this process follows; None without a re-sharding."""
        view = self._membership.view
        return None if view is None else view.state

    # -- dedup keys

    def claim(self, id_: bytes, ttl_s: float, *, token: bytes | None = None) -> Claim:
        """Claim an id for `ttl_s` seconds: it is accepted unless somebody holds it.

        Args:
            token: of an earlier try of the same claim, whose outcome is unknown.

        Raises:
            ClaimUndecided: no verdict within the patience; it has the token.
            AccessDenied, PermanentError: of a shard.
        """
        ttl_ms = _milliseconds(ttl_s)
        mine = secrets.token_bytes(16) if token is None else token
        if not mine:
            raise InvalidInput("a claim's token is empty", hint="leave it out to get one")

        won = Places()
        patient_until = now_s() + _STALE_COPY_S

        def decide(view: View, way: Way, key: bytes) -> Claim | None:
            try:
                verdict = self._decide(view, way, key, mine, ttl_ms, won)
            except PermanentError:
                if won and token is None:
                    self._give_back(view, way, key, mine, won)
                raise
            if not view.session.is_valid:
                return None
            if not verdict.accepted and won and now_s() < patient_until:
                # The other owner may hold what was given back, until the copier has been there.
                time.sleep(_FIRST_PAUSE_S)
                return None
            if verdict.accepted:
                self._mirror(view, way, key, verdict)
            elif won and token is None:  # this call's own: nobody was told that it was accepted
                self._give_back(view, way, key, mine, won)
            with self._lock:
                self._figures.claims += 1
                self._figures.hits += not verdict.accepted
            return Claim(verdict.accepted, mine, verdict.holder.token)

        try:
            return self._repeat(id_, decide)
        except Unavailable as error:
            raise ClaimUndecided(
                f"the claim was not decided: {error.message}",
                mine,
                hint="claim again with this error's token, or release it",
            ) from error

    def release(self, id_: bytes, token: bytes) -> bool:
        """Give an id back; only a claim with this token. Returns whether it was held. Repeatable.

        Raises:
            Unavailable: no answer within the patience; it may be given back all the same.
        """

        def decide(view: View, way: Way, key: bytes) -> bool | None:
            was_held = False
            # Where a claim begins is freed last: the other way round, somebody could win there and
            # be refused by what is still at the other owner. While the shards switch, the copier
            # may put it back there in between, and end.
            first = way.rule.claims[0]
            for owner in (first.other, first, *way.rule.claims[1:]):
                if owner in way.rule.claims:
                    with self._server(view, way.connections[owner]) as server:
                        was_held |= server.delete(key, token=token)
                elif owner is way.rule.mirror:
                    place = way.connections[owner]
                    self._try(view, place, lambda one: one.delete(key, token=token))
            return was_held if view.session.is_valid else None

        done = self._repeat(id_, decide)
        with self._lock:
            self._figures.writes += 1
        return done

    # -- values and counters

    def get(self, id_: bytes) -> bytes | None:
        """Return a value, None for an absent id.

        Raises:
            Unavailable: no answer within the patience.
        """

        def read(view: View, way: Way, key: bytes) -> tuple[bytes | None] | None:
            with self._server(view, _place_of_values(way)) as server:
                value = server.get(key)
            return (value,) if view.session.is_valid else None

        (value,) = self._repeat(id_, read, values=True)
        with self._lock:
            self._figures.reads += 1
            self._figures.found += value is not None
        return value

    def set(self, id_: bytes, value: bytes, ttl_s: float | None = None) -> None:
        """Set a value; None keeps it for ever.

        Raises:
            Unavailable: nothing was done.
            OutcomeUnknown: it may be set or not, now or a little later.
        """
        ttl_ms = None if ttl_s is None else _milliseconds(ttl_s)
        self._write(id_, lambda server, key: server.set(key, value, ttl_ms=ttl_ms))

    def delete(self, id_: bytes) -> bool:
        """Delete a value or a counter; returns whether it was there.

        Raises:
            Unavailable, OutcomeUnknown: as `set`.
        """
        return self._write(id_, lambda server, key: server.delete(key))

    def increment(self, id_: bytes, by: int = 1, ttl_s: float | None = None) -> int:
        """Add to a counter and return it; `ttl_s` counts for one that begins with this call.

        Raises:
            Unavailable, OutcomeUnknown: as `set`.
        """
        ttl_ms = None if ttl_s is None else _milliseconds(ttl_s)
        return self._write(id_, lambda server, key: server.increment(key, by, ttl_ms=ttl_ms))

    # -- inside

    def _repeat(
        self,
        id_: bytes,
        operation: Callable[[View, Way, bytes], T | None],
        *,
        values: bool = False,
    ) -> T:
        """Run a repeatable operation until it is done under a state that is still confirmed."""
        begun = now_s()
        deadline = begun + self._patience_s
        pause = _FIRST_PAUSE_S
        with self._counted(begun):
            while True:
                trouble: CellferryError | None = None
                try:
                    with self._acting(id_, deadline, values=values) as (view, way, key):
                        done = operation(view, way, key)
                        if done is not None:
                            return done
                except Unavailable:
                    raise
                except TransientError as error:  # it does not answer, starts, or is no primary yet
                    trouble = error
                if now_s() >= deadline:
                    raise Unavailable(
                        "no confirmed answer in time" if trouble is None else trouble.message,
                        hint="try again" if trouble is None else trouble.hint,
                        where=None if trouble is None else trouble.where,
                    ) from trouble
                if trouble is not None:
                    time.sleep(pause)
                    pause = min(pause * 2, _LONGEST_PAUSE_S)

    def _write(self, id_: bytes, operation: Callable[[ShardServer, bytes], T]) -> T:
        """Send one write, once."""
        begun = now_s()
        with (
            self._counted(begun),
            self._acting(id_, begun + self._patience_s, values=True) as (view, way, key),
            self._server(view, _place_of_values(way), not_sent=True) as server,
        ):
            try:
                done = operation(server, key)
            except Unreachable as error:
                raise OutcomeUnknown(
                    f"the answer to a write was lost: {error.message}",
                    hint="read before anything else; a counter may have been raised or not",
                    where=error.where,
                ) from error
            except TransientError as error:
                raise _unwritten(error) from error
            if not view.session.is_valid:
                raise OutcomeUnknown(
                    "this process was not confirmed any more when its write was answered",
                    hint="read before anything else; the write may have been too late to count",
                )
            with self._lock:
                self._figures.writes += 1
            return done

    @contextmanager
    def _acting(
        self, id_: bytes, deadline: float, *, values: bool
    ) -> Iterator[tuple[View, Way, bytes]]:
        """Count an operation under the state that holds at its beginning, and under no other."""
        if self._process != os.getpid():
            with self._beginning:
                if self._process != os.getpid():
                    self._begin()
        waited_since: float | None = None
        while True:
            view = self._membership.enter(deadline)
            try:
                key = view.old.stored(id_)
                way = view.way(key)
                if not values or way.rule.values is not None:
                    if waited_since is not None:
                        with self._lock:
                            self._figures.waits += 1
                            self._figures.waited_s += now_s() - waited_since
                    yield view, way, key
                    return
            finally:
                self._membership.leave(view)
            waited_since = waited_since or now_s()
            if not self._membership.wait_for_another(view, deadline):
                raise Unavailable(
                    "values and counters wait for the shards to switch, for longer than"
                    f" {self._patience_s:g} s",
                    hint="nothing was done; try again, or see what holds the re-sharding up",
                )

    def _decide(
        self,
        view: View,
        way: Way,
        key: bytes,
        token: bytes,
        ttl_ms: int,
        won: Places,
    ) -> Verdict:
        """Lead the dialogue; note in `won` where the claim holds the key."""
        dialogue = claim(way.rule, token)
        try:
            ask = next(dialogue)
            while True:
                place, expires = way.connections[ask.owner], ask.expires_ms
                with self._server(view, place) as server:
                    held = server.claim(
                        key,
                        token,
                        ttl_ms=ttl_ms if expires is None else None,
                        expires_ms=expires,
                    )
                if held.token == token:
                    won.add(place)
                ask = dialogue.send(held)
        except StopIteration as end:
            verdict: Verdict = end.value
            return verdict

    def _give_back(self, view: View, way: Way, key: bytes, token: bytes, won: Places) -> None:
        """Free what a claim has won that is not accepted, and what the copier made of it."""
        places = [*won, *(way.connections[owner] for owner in way.rule.claims)]
        for place in dict.fromkeys(places):
            with suppress(CellferryError), self._server(view, place) as server:
                server.delete(key, token=token)

    def _mirror(self, view: View, way: Way, key: bytes, verdict: Verdict) -> None:
        mirror = verdict.mirror
        if mirror is None or mirror.expires_ms is None:
            return
        expires_ms = mirror.expires_ms
        self._try(
            view,
            way.connections[mirror.owner],
            lambda server: server.claim(key, mirror.token, expires_ms=expires_ms),
        )

    def _try(self, view: View, place: tuple[str, str], write: Callable[[ShardServer], Any]) -> None:
        """Write where nothing is decided; that it fails changes nothing."""
        if now_s() < self._rests_until.get(place[1], 0.0):
            return
        began = now_s()
        try:
            with self._server(view, place) as server:
                write(server)
        except CellferryError:
            failed = now_s()
            rest = max(_REST_S, _REST_FACTOR * (failed - began))
            self._rests_until[place[1]] = failed + rest

    @contextmanager
    def _server(
        self, view: View, place: tuple[str, str], *, not_sent: bool = False
    ) -> Iterator[ShardServer]:
        """Lend a connection to a shard; one that fails is closed."""
        shard, name = place
        with self._lock:
            idle = self._idle.get(name)
            server = idle.pop() if idle else None
        if server is None:
            server = self._opened(view.old.kind, shard, name, not_sent=not_sent)
        try:
            yield server
        except BaseException:
            server.close()
            raise
        newest = self._membership.view or view
        with self._lock:
            if not self._closed and name in newest.connections():
                self._idle.setdefault(name, []).append(server)
                return
        server.close()

    def _opened(self, kind: str, shard: str, name: str, *, not_sent: bool) -> ShardServer:
        try:
            return open_shard(kind, shard, {shard: name}, self._source)
        except TransientError as error:
            if not not_sent:
                raise
            raise _unwritten(error) from error

    @contextmanager
    def _counted(self, begun: float) -> Iterator[None]:
        try:
            yield
        except CellferryError:
            with self._lock:
                self._figures.failures += 1
            raise
        with self._lock:
            self._figures.took(now_s() - begun)

    def _take_figures(self) -> dict[str, Any] | None:
        now = now_s()
        with self._lock:
            if not self._figures.operations or now - self._figures_sent_at < _REPORT_EVERY_S:
                return None
            taken, self._figures = self._figures, ShardFigures()
            self._figures_sent_at = now
        return taken.as_dict()

    def _after_fork(self) -> None:
        """Leave to the parent what is the parent's; the next operation begins anew."""
        _inherited.append((self._idle, self._membership))  # so that nobody says goodbye on them
        self._beginning = threading.Lock()


def _place_of_values(way: Way) -> tuple[str, str]:
    owner = way.rule.values
    if owner is None:
        raise Unavailable("values wait for the shards to switch", hint="try again")
    return way.connections[owner]


def _unwritten(error: TransientError) -> Unavailable:
    return Unavailable(f"nothing was written: {error.message}", hint=error.hint, where=error.where)


def _milliseconds(seconds: float) -> int:
    found = round(seconds * 1000)
    if found < 1:
        raise InvalidInput(f"the TTL is {seconds} s", hint="it is at least a millisecond")
    return found


def _forked() -> None:
    for store in list(_stores):
        store._after_fork()  # noqa: SLF001 of this module


os.register_at_fork(after_in_child=_forked)
