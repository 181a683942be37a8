"""The record of shard sets and re-shardings, in the topology; and who must have heard of them.

A set's epoch rises with each change that its clients must know of. Every change waits until all
clients have acknowledged the epoch before it, so that two clients are never more than one state
apart (why that is enough: `cellferry.shards.states`). The database refuses what breaks this.

A client that is dead does not hold up a change for ever: it may act only for its lease after it
*sent* its last confirmation, on a clock of its own. A controller that has watched it for so long,
on its own clock, and has not seen another, takes its row away; a client without a row has to begin
anew. No clock of a server is compared with any other, and none may jump.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from cellferry.closing import Closing
from cellferry.errors import (
    CellferryError,
    InvalidInput,
    LeaseLost,
    TransientError,
    WrongState,
)
from cellferry.model import Actor
from cellferry.shards.clock import now_s
from cellferry.shards.figures import ShardFigures
from cellferry.shards.settings import ShardSet
from cellferry.shards.states import RULES, Owner, ShardState, neighbours
from cellferry.topology import schema
from cellferry.topology.connection import Database
from cellferry.topology.document import document, without_secrets

T = TypeVar("T")

#: On this channel the topology announces that a set has changed; the payload is its name.
SHARDS_CHANNEL = "cellferry_shards"

#: How often a controller looks who has acknowledged, in seconds.
_LOOK_EVERY_S = 0.02

_ACKNOWLEDGED = "acknowledged the present state"
_HEARD = "given a sign of life"

OUTCOMES: Mapping[str, ShardState] = {
    "completed": ShardState.NEW,
    "aborted": ShardState.OLD,
    "rolled_back": ShardState.OLD,
}
"""How a re-sharding may end, and the state in which it then is."""


class ClientsBehind(TransientError):
    """Clients have not acknowledged the present state yet.

    Attributes:
        names: whose.
    """

    def __init__(self, message: str, names: Sequence[str] = (), **place: str | None) -> None:
        super().__init__(message, **place)
        self.names = tuple(names)


class TakenOver(LeaseLost):
    """Another controller works on the re-sharding; this one must do no more."""


@dataclass(frozen=True, slots=True)
class Resharding:
    """A change of a set's shards, as the topology knows it.

    Attributes:
        authority: whose values count; in `switching`, whose counted until then.
        epoch: the set's, since this re-sharding's last change.
        ttl_until: until when the old owners keep their copies; None before it became `new`.
        ttl_left_s: how long that was when this was read, on the topology's clock.
        ended: `completed`, `aborted`, `rolled_back`, or None while it is live.
        attempt: the newest controller's number, which rises over all re-shardings of the set;
            `holder` and `step` say who and what.
    """

    id: int
    set_name: str
    old: ShardSet
    new: ShardSet
    state: ShardState
    authority: Owner
    epoch: int
    plan: Mapping[str, Any]
    facts: Mapping[str, Any]
    begun_at: datetime
    ttl_s: float
    ttl_until: datetime | None
    ttl_left_s: float | None = field(compare=False)
    ended: str | None
    ended_at: datetime | None
    attempt: int
    holder: str | None
    step: str | None


@dataclass(frozen=True, slots=True)
class RegisteredClient:
    """A process that acts on a set.

    Attributes:
        session: one run of it; a client that begins anew has another.
        silent_s: since it was last heard of, on the topology's clock: for people only.
    """

    session: uuid.UUID
    name: str
    acknowledged: int
    is_behind: bool
    beat: int
    lease_s: float
    registered_at: datetime
    silent_s: float


@dataclass(frozen=True)
class Lease:
    """The right to work on a re-sharding. Picklable; see `ShardControl.adopt`."""

    resharding: int
    step: str
    attempt: int
    part: str | None = None
    number: int = 0
    _control: ShardControl | None = field(default=None, repr=False, compare=False)

    def check(self) -> None:
        """Return while nobody has taken over.

        Raises:
            TakenOver: another controller has.
        """
        if self._control is None:
            raise WrongState("this lease came from another process", hint="adopt it first")
        self._control.check(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Lease, (self.resharding, self.step, self.attempt, self.part, self.number)


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One change of a set or a re-sharding."""

    id: int
    at: datetime
    action: str
    resharding: int | None
    actor: str
    role: str
    from_state: str | None
    to_state: str | None
    epoch: int | None
    attempt: int | None
    reason: str | None
    evidence: Mapping[str, Any]


class ShardControl(Closing):
    """The record of shard sets and their re-shardings. Every change carries its audit row.

    Threads may share it; a lease belongs to the thread that took or adopted it.

    Args:
        dsn: URL of the topology; never shown.
        patience_s: how long a connection that was lost may take to come back, seconds.
    """

    def __init__(self, dsn: str, *, patience_s: float = 5.0) -> None:
        self._database = Database(dsn, patience_s=patience_s)
        self._mine = threading.local()
        self._watched: dict[uuid.UUID, tuple[int, float]] = {}

    def close(self) -> None:
        """Close the connection; a later call opens another."""
        self._database.close()

    def install(self) -> list[str]:
        """Create the topology's schema or bring it up to date; returns the files applied."""
        return self._database.run(schema.install)

    # -- sets

    def register_set(self, shard_set: ShardSet, actor: Actor) -> ShardSet:
        """Record a set with the placement that its clients have now; repeatable.

        Raises:
            InvalidInput: it is recorded otherwise; only a re-sharding changes a set.
        """

        def work(connection: psycopg.Connection[Any]) -> None:
            inserted = connection.execute(
                """
                INSERT INTO topology.shard_set (name, document) VALUES (%s, %s)
                ON CONFLICT DO NOTHING RETURNING epoch
                """,
                [shard_set.name, Jsonb(shard_set.document())],
            ).fetchone()
            if inserted is not None:
                _audit(connection, "shard set registered", actor, shard_set.name, epoch=1)
            elif _load_set(connection, shard_set.name).document() != shard_set.document():
                raise InvalidInput(
                    f"shard set {shard_set.name!r} is recorded with other shards or settings",
                    hint="correct the file; or begin a re-sharding, which alone changes a set",
                )

        self._database.run(work)
        return shard_set

    def set(self, name: str) -> ShardSet:
        """Return a set as it is; while a re-sharding is live, as it was before.

        Raises:
            InvalidInput: there is none of this name.
        """
        return self._database.run(lambda connection: _load_set(connection, name))

    def sets(self) -> list[ShardSet]:
        """Return all sets by name."""

        def work(connection: psycopg.Connection[Any]) -> list[ShardSet]:
            rows = connection.execute("SELECT document FROM topology.shard_set ORDER BY name")
            return [ShardSet.from_document(row[0]) for row in rows]

        return self._database.run(work)

    # -- re-shardings

    def begin(
        self,
        name: str,
        target: ShardSet,
        plan: Mapping[str, Any],
        actor: Actor,
        ttl_s: float,
        *,
        planned_on: ShardSet | None = None,
    ) -> Resharding:
        """Record a new re-sharding of set `name`, in state `old`. Clients act as before.

        Args:
            target: the set as it will be.
            plan: what was planned; kept as it is.
            ttl_s: how long the old owners keep their copies after the change, seconds.
            planned_on: the set that the plan was made for.

        Raises:
            InvalidInput: no such set; the target is of another name or kind or changes nothing;
                the plan was made for other shards.
            WrongState: a re-sharding of this set is live.
            ClientsBehind: a client has not heard of the last one's end.
        """
        if ttl_s < 0:
            raise InvalidInput(f"the TTL is {ttl_s} s", hint="it is 0 or more")
        request = uuid.uuid4()

        def work(connection: psycopg.Connection[Any]) -> int:
            done = connection.execute(
                "SELECT resharding FROM topology.audit WHERE request = %s", [request]
            ).fetchone()
            if done is not None:  # an earlier commit whose answer was lost
                return int(done[0])
            epoch = _lock_set(connection, name)
            old = _load_set(connection, name)
            _check_target(old, target, planned_on)
            live = connection.execute(
                "SELECT id, state FROM topology.resharding"
                " WHERE shard_set = %s AND outcome IS NULL",
                [name],
            ).fetchone()
            if live is not None:
                raise WrongState(
                    f"re-sharding {live[0]} of this set is live, in state {live[1]}",
                    hint="finish, abort or roll it back first",
                    where=f"shard set {name}",
                )
            epoch = _raise_epoch(connection, name, epoch)
            row = connection.execute(
                """
                INSERT INTO topology.resharding (attempt, shard_set, old, new, epoch, plan, ttl_s)
                VALUES (COALESCE((SELECT max(attempt) FROM topology.resharding
                                  WHERE shard_set = %s), 0), %s, %s, %s, %s, %s, %s) RETURNING id
                """,
                [
                    name,
                    name,
                    Jsonb(old.document()),
                    Jsonb(target.document()),
                    epoch,
                    document(plan),
                    ttl_s,
                ],
            ).fetchone()
            id_ = int(row[0]) if row else 0
            _audit(
                connection,
                "re-sharding begun",
                actor,
                name,
                resharding=id_,
                to_state=ShardState.OLD,
                epoch=epoch,
                evidence={"old": old.document(), "new": target.document()},
                request=request,
            )
            return id_

        return self.resharding(self._database.run(work))

    def resharding(self, id_: int) -> Resharding:
        """Return a re-sharding.

        Raises:
            InvalidInput: there is none with this id.
        """
        return self._database.run(lambda connection: _load(connection, id_))

    def live(self, name: str) -> Resharding | None:
        """Return the one live re-sharding of a set."""
        found = [one for one in self.reshardings(name) if one.ended is None]
        return found[0] if found else None

    def reshardings(self, name: str | None = None) -> list[Resharding]:
        """Return re-shardings, newest first; of one set or of all."""

        def work(connection: psycopg.Connection[Any]) -> list[Resharding]:
            with connection.cursor(row_factory=dict_row) as cursor:
                cursor.execute(
                    _RESHARDING + "WHERE %(name)s::text IS NULL OR shard_set = %(name)s"
                    " ORDER BY id DESC LIMIT 1000",
                    {"name": name},
                )
                return [_resharding(row) for row in cursor]

        return self._database.run(work)

    def advance(
        self, id_: int, from_: ShardState, to: ShardState, actor: Actor, reason: str = ""
    ) -> Resharding:
        """Take a re-sharding one state on or back. Repeatable: being in `to` already is success.

        Raises:
            WrongState: it is in neither state, `to` is no neighbour, or it has ended; or this
                thread has no lease.
            ClientsBehind: a client has not acknowledged the present state.
            TakenOver: another controller works on it.
        """
        if to not in neighbours(from_):
            raise WrongState(
                f"a re-sharding does not go from {from_} to {to}", hint="one state at a time"
            )

        def work(connection: psycopg.Connection[Any]) -> Resharding:
            one, epoch = self._locked(connection, id_)
            if one.state is to:
                return one
            if one.state is not from_:
                raise WrongState(
                    f"re-sharding {id_} is in state {one.state}, not {from_}",
                    hint="look at its status before anything else",
                )
            epoch = _raise_epoch(connection, one.set_name, epoch)
            connection.execute(
                """
                UPDATE topology.resharding
                SET state = %(to)s, authority = %(authority)s, epoch = %(epoch)s,
                    ttl_until = CASE WHEN %(to)s = 'new'
                        THEN clock_timestamp() + make_interval(secs => ttl_s) END
                WHERE id = %(id)s
                """,
                {
                    "to": to.value,
                    "authority": (RULES[to].authority or one.authority).value,
                    "epoch": epoch,
                    "id": id_,
                },
            )
            _audit(
                connection,
                "re-sharding advanced",
                actor,
                one.set_name,
                resharding=id_,
                from_state=from_,
                to_state=to,
                epoch=epoch,
                attempt=one.attempt,
                reason=reason,
            )
            return _load(connection, id_)

        return self._database.run(work)

    def finish(self, id_: int, actor: Actor, outcome: str, reason: str = "") -> Resharding:
        """End a re-sharding; after `completed` the set is the new one. Repeatable.

        Raises:
            InvalidInput: no such outcome.
            WrongState: the state does not fit the outcome, or it has ended otherwise.
            ClientsBehind, TakenOver: as `advance`.
        """
        if outcome not in OUTCOMES:
            raise InvalidInput(
                f"a re-sharding does not end as {outcome!r}",
                hint=f"choose one of {', '.join(OUTCOMES)}",
            )

        def work(connection: psycopg.Connection[Any]) -> Resharding:
            one, epoch = self._locked(connection, id_, may_have_ended=True)
            if one.ended == outcome:
                return one
            if one.ended is not None or one.state is not OUTCOMES[outcome]:
                raise WrongState(
                    f"re-sharding {id_} is {one.ended or f'in state {one.state}'}"
                    f" and cannot be {outcome}",
                    hint=f"bring it to state {OUTCOMES[outcome]} first",
                )
            epoch = _raise_epoch(
                connection, one.set_name, epoch, one.new if outcome == "completed" else None
            )
            connection.execute(
                """
                UPDATE topology.resharding
                SET outcome = %s, ended_at = clock_timestamp(), epoch = %s WHERE id = %s
                """,
                [outcome, epoch, id_],
            )
            _audit(
                connection,
                f"re-sharding {outcome.replace('_', ' ')}",
                actor,
                one.set_name,
                resharding=id_,
                from_state=one.state,
                to_state=one.state,
                epoch=epoch,
                attempt=one.attempt,
                reason=reason,
            )
            return _load(connection, id_)

        return self._database.run(work)

    def record(self, id_: int, facts: Mapping[str, Any]) -> None:
        """Merge `facts` into the re-sharding's, by their top-level names.

        Raises:
            TakenOver, WrongState: as `advance`.
        """

        def work(connection: psycopg.Connection[Any]) -> None:
            self._insist_on_lease(connection, id_)
            connection.execute(
                "UPDATE topology.resharding SET facts = facts || %s WHERE id = %s",
                [document(facts), id_],
            )

        self._database.run(work)

    # -- checkpoints

    def checkpoint(self, id_: int, pair: tuple[str, str]) -> Mapping[str, Any] | None:
        """Return what was saved last for a source and a destination, None for nothing."""

        def work(connection: psycopg.Connection[Any]) -> Mapping[str, Any] | None:
            row = connection.execute(
                """
                SELECT document FROM topology.resharding_checkpoint
                WHERE (resharding, source, destination) = (%s, %s, %s)
                """,
                [id_, *pair],
            ).fetchone()
            return None if row is None else dict(row[0])

        return self._database.run(work)

    def save_checkpoint(
        self, id_: int, pair: tuple[str, str], checkpoint: Mapping[str, Any]
    ) -> None:
        """Save how far the copy from a source to a destination is.

        Raises:
            TakenOver, WrongState: as `advance`.
        """

        def work(connection: psycopg.Connection[Any]) -> None:
            self._insist_on_lease(connection, id_)
            connection.execute(
                """
                INSERT INTO topology.resharding_checkpoint
                    (resharding, source, destination, document)
                VALUES (%s, %s, %s, %s)
                ON CONFLICT (resharding, source, destination)
                DO UPDATE SET document = excluded.document, saved_at = clock_timestamp()
                """,
                [id_, *pair, document(checkpoint)],
            )

        self._database.run(work)

    def checkpoints(self, id_: int) -> TopologyCheckpoints:
        """Return the checkpoints of one re-sharding, as its copier uses them."""
        return TopologyCheckpoints(self, id_)

    # -- leases

    @contextmanager
    def lease(
        self, id_: int, step: str, owner: str, actor: Actor, *, part: str | None = None
    ) -> Iterator[Lease]:
        """Take the re-sharding over for the block; who had it before is `TakenOver`.

        Args:
            owner: what a person needs to find the holder: host, process, DAG run and try.
            part: what of the step is done here. Parts of one step work side by side: only the
                same part's older worker is taken over, and whoever did another step.

        Raises:
            InvalidInput: there is no such re-sharding.
        """
        taken = self._database.run(lambda c: _take(c, id_, step, owner, actor, part))
        with self.adopt(taken) as lease:
            try:
                yield lease
            finally:
                if part is None:
                    with suppress(CellferryError):
                        self._database.run(lambda c: _give_back(c, taken))

    @contextmanager
    def adopt(self, lease: Lease) -> Iterator[Lease]:
        """Work under a lease that another thread or process took, in this thread."""
        mine: dict[int, Lease] = self._mine.__dict__.setdefault("leases", {})
        before = mine.get(lease.resharding)
        bound = Lease(lease.resharding, lease.step, lease.attempt, lease.part, lease.number, self)
        mine[lease.resharding] = bound
        try:
            yield bound
        finally:
            if before is None:
                del mine[lease.resharding]
            else:
                mine[lease.resharding] = before

    def check(self, lease: Lease) -> None:
        """Return while nobody has taken over; one small query.

        Raises:
            TakenOver: another controller has.
        """
        self._database.run(lambda connection: _check(connection, lease))

    # -- clients

    def clients(self, of: str | int) -> list[RegisteredClient]:
        """Return the clients of a set, or of a re-sharding's set, by name."""

        def work(connection: psycopg.Connection[Any]) -> list[RegisteredClient]:
            name = of if isinstance(of, str) else _load(connection, of).set_name
            return _clients(connection, name)

        return self._database.run(work)

    def wait_acknowledged(
        self, id_: int, timeout_s: float, *, while_waiting: Callable[[], None] | None = None
    ) -> None:
        """Wait until every client has acknowledged the present state.

        A client that sends no sign of life for as long as its lease, while it is watched here, is
        passed over: it may no longer act, and must register anew.

        Args:
            while_waiting: called now and then; what it raises ends the wait.

        Raises:
            ClientsBehind: some had not after `timeout_s` seconds; names them.
        """
        self._wait_for(id_, lambda one: one.is_behind, _ACKNOWLEDGED, timeout_s, while_waiting)

    def wait_heard(
        self, id_: int, timeout_s: float, *, while_waiting: Callable[[], None] | None = None
    ) -> None:
        """Wait until every client has given a sign of life since this call.

        Before a state in which clients wait: one that died long ago is passed over here, as in
        `wait_acknowledged`, and not while the others wait.

        Args:
            while_waiting: called now and then; what it raises ends the wait.

        Raises:
            ClientsBehind: some had not after `timeout_s` seconds; names them.
        """

        def ask(connection: psycopg.Connection[Any]) -> dict[uuid.UUID, int]:
            name = _load(connection, id_).set_name
            beats = {one.session: one.beat for one in _clients(connection, name)}
            connection.execute("SELECT pg_notify(%s, %s)", [SHARDS_CHANNEL, name])
            return beats

        before = self._database.run(ask)
        self._wait_for(
            id_, lambda one: before.get(one.session) == one.beat, _HEARD, timeout_s, while_waiting
        )

    def figures(
        self,
        name: str,
        *,
        since: datetime | None = None,
        within_s: float | None = None,
        epochs: tuple[int, int] | None = None,
    ) -> ShardFigures:
        """Return what the clients of a set reported, summed.

        Args:
            since: only what happened wholly after this moment, on the topology's clock.
            within_s: only what was reported in the last so many seconds.
            epochs: only what was done under these epochs, both included.
        """
        low, high = epochs or (None, None)

        def work(connection: psycopg.Connection[Any]) -> ShardFigures:
            rows = connection.execute(
                """
                SELECT figures FROM topology.shard_report
                WHERE shard_set = %(name)s
                  AND (%(since)s::timestamptz IS NULL OR began_at >= %(since)s)
                  AND (%(within_s)s::float8 IS NULL
                       OR reported_at > clock_timestamp() - make_interval(secs => %(within_s)s))
                  AND (%(low)s::bigint IS NULL OR epoch BETWEEN %(low)s AND %(high)s)
                """,
                {"name": name, "since": since, "within_s": within_s, "low": low, "high": high},
            )
            return ShardFigures.sum(ShardFigures.from_dict(row[0]) for row in rows)

        return self._database.run(work)

    def audit(self, name: str) -> list[AuditRow]:
        """Return what happened to a set, oldest first."""

        def work(connection: psycopg.Connection[Any]) -> list[AuditRow]:
            rows = connection.execute(
                """
                SELECT id, at, action, resharding, actor, role, from_state, to_state, epoch,
                       attempt, reason, evidence
                FROM topology.audit WHERE shard_set = %s ORDER BY id
                """,
                [name],
            )
            return [AuditRow(*row) for row in rows]

        return self._database.run(work)

    # -- inside

    def _locked(
        self, connection: psycopg.Connection[Any], id_: int, *, may_have_ended: bool = False
    ) -> tuple[Resharding, int]:
        """Lock a re-sharding for a change of state; return it and its set's epoch."""
        # Always the set first: clients' confirmations wait there.
        epoch = _lock_set(connection, _load(connection, id_).set_name)
        one = _load(connection, id_, lock=True)
        self._insist_on_lease(connection, id_)
        if one.ended is not None and not may_have_ended:
            raise WrongState(f"re-sharding {id_} is {one.ended}", hint="begin another one")
        return one, epoch

    def _insist_on_lease(self, connection: psycopg.Connection[Any], id_: int) -> None:
        mine: dict[int, Lease] = self._mine.__dict__.get("leases", {})
        lease = mine.get(id_)
        if lease is None:
            raise WrongState(
                f"re-sharding {id_} is changed by nobody without its lease",
                hint="take the lease for the block in which it is changed",
            )
        _check(connection, lease, lock=True)

    def _wait_for(
        self,
        id_: int,
        is_awaited: Callable[[RegisteredClient], bool],
        what: str,
        timeout_s: float,
        while_waiting: Callable[[], None] | None,
    ) -> None:
        def look(connection: psycopg.Connection[Any]) -> tuple[str, list[RegisteredClient]]:
            name = _load(connection, id_).set_name
            return name, [one for one in _clients(connection, name) if is_awaited(one)]

        begun = now_s()
        while True:
            name, found = self._database.run(look)
            looked = now_s()
            awaited = [one for one in found if not self._pass_over(id_, name, one, looked)]
            if not awaited:
                return
            if looked - begun >= timeout_s:
                raise _behind_error(name, awaited, f"{what} after {looked - begun:.1f} s")
            if while_waiting is not None:
                while_waiting()
            time.sleep(_LOOK_EVERY_S)

    def _pass_over(self, id_: int, name: str, client: RegisteredClient, looked: float) -> bool:
        """Take a client's row away if it was silent for its lease; whether it was."""
        beat, since = self._watched.get(client.session, (None, looked))
        if beat != client.beat:
            self._watched[client.session] = (client.beat, looked)
            return False
        if looked - since < client.lease_s:
            return False

        def work(connection: psycopg.Connection[Any]) -> bool:
            gone = connection.execute(
                "DELETE FROM topology.shard_client WHERE session = %s AND beat = %s RETURNING name",
                [client.session, client.beat],
            ).fetchone()
            if gone is None:  # it has spoken since, or has left
                return False
            _audit(
                connection,
                "client passed over",
                Actor("cellferry", role="system"),
                name,
                resharding=id_,
                epoch=client.acknowledged,
                reason=f"client {client.name} was silent for {looked - since:.1f} s,"
                f" its lease is {client.lease_s:g} s",
            )
            return True

        gone = self._database.run(work)
        if gone:
            del self._watched[client.session]
        return gone


class TopologyCheckpoints:
    """The checkpoints of one re-sharding, kept in the topology."""

    def __init__(self, control: ShardControl, resharding: int) -> None:
        self._control = control
        self._resharding = resharding

    def load(self, pair: tuple[str, str]) -> Mapping[str, Any] | None:
        """Return what was saved last, None for nothing."""
        return self._control.checkpoint(self._resharding, pair)

    def save(self, pair: tuple[str, str], checkpoint: Mapping[str, Any]) -> None:
        """Save; see `ShardControl.save_checkpoint`."""
        self._control.save_checkpoint(self._resharding, pair, checkpoint)


_RESHARDING = """
SELECT id, shard_set, old, new, state, authority, epoch, plan, facts, begun_at, ttl_s, ttl_until,
       extract(epoch FROM ttl_until - clock_timestamp())::float8 AS ttl_left_s,
       outcome, ended_at, attempt, holder, step
FROM topology.resharding
"""


def _resharding(row: Mapping[str, Any]) -> Resharding:
    return Resharding(
        id=row["id"],
        set_name=row["shard_set"],
        old=ShardSet.from_document(row["old"]),
        new=ShardSet.from_document(row["new"]),
        state=ShardState(row["state"]),
        authority=Owner(row["authority"]),
        epoch=row["epoch"],
        plan=row["plan"],
        facts=row["facts"],
        begun_at=row["begun_at"],
        ttl_s=row["ttl_s"],
        ttl_until=row["ttl_until"],
        ttl_left_s=row["ttl_left_s"],
        ended=row["outcome"],
        ended_at=row["ended_at"],
        attempt=row["attempt"],
        holder=row["holder"],
        step=row["step"],
    )


def _load(connection: psycopg.Connection[Any], id_: int, *, lock: bool = False) -> Resharding:
    with connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(
            _RESHARDING + "WHERE id = %s" + (" FOR UPDATE" if lock else ""), [id_]
        ).fetchone()
    if row is None:
        raise _no_resharding(id_)
    return _resharding(row)


def _no_resharding(id_: int) -> InvalidInput:
    return InvalidInput(
        f"there is no re-sharding {id_}", hint="`cellferry reshard status` lists them"
    )


def _load_set(connection: psycopg.Connection[Any], name: str) -> ShardSet:
    row = connection.execute(
        "SELECT document FROM topology.shard_set WHERE name = %s", [name]
    ).fetchone()
    if row is None:
        raise _no_set(name)
    return ShardSet.from_document(row[0])


def _no_set(name: str) -> InvalidInput:
    return InvalidInput(
        f"there is no shard set {name!r} in the topology", hint="register it with its file first"
    )


def _lock_set(connection: psycopg.Connection[Any], name: str) -> int:
    """Return a set's epoch; until the transaction ends nobody changes or confirms it."""
    row = connection.execute(
        "SELECT epoch FROM topology.shard_set WHERE name = %s FOR UPDATE", [name]
    ).fetchone()
    if row is None:
        raise _no_set(name)
    return int(row[0])


def _raise_epoch(
    connection: psycopg.Connection[Any], name: str, epoch: int, changed: ShardSet | None = None
) -> int:
    """Raise a locked set's epoch, after everybody has acknowledged this one; return the new."""
    behind = [one for one in _clients(connection, name) if one.is_behind]
    if behind:
        raise _behind_error(name, behind, _ACKNOWLEDGED)
    connection.execute(
        """
        UPDATE topology.shard_set
        SET epoch = %s, document = COALESCE(%s, document), changed_at = clock_timestamp()
        WHERE name = %s
        """,
        [epoch + 1, None if changed is None else Jsonb(changed.document()), name],
    )
    return epoch + 1


def _check_target(old: ShardSet, target: ShardSet, planned_on: ShardSet | None) -> None:
    where = f"shard set {old.name}"
    if planned_on is not None and planned_on.document() != old.document():
        raise InvalidInput(
            "the plan is older than the set's shards: they have changed since",
            hint="plan again",
            where=where,
        )
    for what in ("name", "kind", "key_prefix"):
        if getattr(target, what) != getattr(old, what):
            raise InvalidInput(
                f"the target's {what} is {getattr(target, what)!r}, the set's is"
                f" {getattr(old, what)!r}",
                hint="a re-sharding changes shards, weights and placement only",
                where=where,
            )
    if target.document() == old.document():
        raise InvalidInput("the target is the set as it is", hint="nothing to do", where=where)


def _clients(connection: psycopg.Connection[Any], name: str) -> list[RegisteredClient]:
    rows = connection.execute(
        """
        SELECT c.session, c.name, c.acknowledged, c.acknowledged < s.epoch, c.beat, c.lease_s,
               c.registered_at, extract(epoch FROM clock_timestamp() - c.seen_at)::float8
        FROM topology.shard_client AS c JOIN topology.shard_set AS s ON s.name = c.shard_set
        WHERE s.name = %s ORDER BY c.name, c.registered_at
        """,
        [name],
    )
    return [RegisteredClient(*row) for row in rows]


def _behind_error(name: str, awaited: Sequence[RegisteredClient], what: str) -> ClientsBehind:
    who = ", ".join(f"{one.name} (last heard of {one.silent_s:.1f} s ago)" for one in awaited)
    return ClientsBehind(
        f"{len(awaited)} client(s) have not {what}: {who}",
        [one.name for one in awaited],
        hint="wait; a client that is gone is passed over when its lease has run out",
        where=f"shard set {name}",
    )


def _take(
    connection: psycopg.Connection[Any],
    id_: int,
    step: str,
    owner: str,
    actor: Actor,
    part: str | None,
) -> Lease:
    row = connection.execute(
        """
        UPDATE topology.resharding
        SET attempt = CASE WHEN %(part)s::text IS NOT NULL AND shared AND step = %(step)s
                      THEN attempt ELSE attempt + 1 END,
            shared = %(part)s::text IS NOT NULL, step = %(step)s, holder = %(owner)s,
            taken_at = now()
        WHERE id = %(id)s AND outcome IS NULL RETURNING shard_set, attempt
        """,
        {"part": part, "step": step, "owner": owner, "id": id_},
    ).fetchone()
    if row is None:
        ended = _load(connection, id_).ended
        raise WrongState(f"re-sharding {id_} is {ended}", hint="begin another one")
    name, attempt = row
    number = 0
    if part is not None:
        found = connection.execute(
            """
            INSERT INTO topology.resharding_part AS p (resharding, part, number, holder)
            VALUES (%s, %s, 1, %s)
            ON CONFLICT (resharding, part) DO UPDATE
            SET number = p.number + 1, holder = excluded.holder, taken_at = now()
            RETURNING number
            """,
            [id_, part, owner],
        ).fetchone()
        number = int(found[0]) if found else 0
    _audit(
        connection,
        "lease",
        actor,
        name,
        resharding=id_,
        attempt=attempt,
        reason=f"{step}{'' if part is None else f' {part}'} by {owner}",
    )
    return Lease(id_, step, attempt, part, number)


def _give_back(connection: psycopg.Connection[Any], lease: Lease) -> None:
    connection.execute(
        "UPDATE topology.resharding SET holder = NULL"
        " WHERE id = %s AND attempt = %s AND outcome IS NULL",
        [lease.resharding, lease.attempt],
    )


def _check(connection: psycopg.Connection[Any], lease: Lease, *, lock: bool = False) -> None:
    row = connection.execute(
        _HOLDER + ("FOR SHARE OF r" if lock else ""),
        {"id": lease.resharding, "part": lease.part},
    ).fetchone()
    if row is None:
        raise _no_resharding(lease.resharding)
    attempt, step, holder, number = row
    if (attempt, number) != (lease.attempt, lease.number):
        raise TakenOver(
            f"re-sharding {lease.resharding} was taken over: {step} by {holder or 'somebody'}",
            hint="let that one go on, or run the step again",
            step=lease.step,
        )


_HOLDER = """
SELECT r.attempt, r.step, r.holder, COALESCE((
    SELECT p.number FROM topology.resharding_part AS p
    WHERE p.resharding = r.id AND p.part = %(part)s), 0)
FROM topology.resharding AS r WHERE r.id = %(id)s
"""
_AUDIT = """
INSERT INTO topology.audit (action, shard_set, resharding, actor, role, from_state, to_state, epoch,
                            attempt, reason, evidence, dag_run, try_number, request)
VALUES (%(action)s, %(shard_set)s, %(resharding)s, %(actor)s, %(role)s, %(from_state)s,
        %(to_state)s, %(epoch)s, %(attempt)s, %(reason)s, %(evidence)s, %(dag_run)s,
        %(try_number)s, %(request)s)
"""


def _audit(
    connection: psycopg.Connection[Any],
    action: str,
    actor: Actor,
    shard_set: str,
    *,
    resharding: int | None = None,
    from_state: ShardState | None = None,
    to_state: ShardState | None = None,
    epoch: int | None = None,
    attempt: int | None = None,
    reason: str = "",
    evidence: Mapping[str, Any] | None = None,
    request: uuid.UUID | None = None,
) -> None:
    connection.execute(
        _AUDIT,
        {
            "action": action,
            "shard_set": shard_set,
            "resharding": resharding,
            "actor": actor.name,
            "role": actor.role,
            "from_state": from_state,
            "to_state": to_state,
            "epoch": epoch,
            "attempt": attempt,
            "reason": without_secrets(reason) or None,
            "evidence": document(evidence),
            "dag_run": actor.dag_run,
            "try_number": actor.try_number,
            "request": request,
        },
    )
