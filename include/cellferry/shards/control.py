"""The record of shard sets and re-shardings, in the topology; and who must have heard of them.

A set's epoch rises with each change that its clients must know of. Every change waits until all
clients have acknowledged the epoch before it, so that two clients are never more than one state
apart (why that is enough: `cellferry.shards.states`). The database refuses what breaks this.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, TypeVar

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from cellferry.closing import Closing
from cellferry.errors import (
    CellferryError,
    InvalidInput,
    WrongState,
)
from cellferry.model import Actor
from cellferry.shards import leases, record
from cellferry.shards.figures import ShardFigures
from cellferry.shards.leases import Lease
from cellferry.shards.record import OUTCOMES, AuditRow, RegisteredClient, Resharding
from cellferry.shards.roll_call import RollCall
from cellferry.shards.settings import ShardSet
from cellferry.shards.states import RULES, ShardState, neighbours
from cellferry.topology import schema
from cellferry.topology.connection import Database
from cellferry.topology.document import document

T = TypeVar("T")

#: On this channel the topology announces that a set has changed; the payload is its name.
SHARDS_CHANNEL = "cellferry_shards"

_HEARD = "given a sign of life"


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
        self._roll_call = RollCall(self._database)

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
                record.note(connection, "shard set registered", actor, shard_set.name, epoch=1)
            elif record.load_set(connection, shard_set.name).document() != shard_set.document():
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
        return self._database.run(lambda connection: record.load_set(connection, name))

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
            epoch = record.lock_set(connection, name)
            old = record.load_set(connection, name)
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
            epoch = record.raise_epoch(connection, name, epoch)
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
            record.note(
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
        return self._database.run(lambda connection: record.load(connection, id_))

    def live(self, name: str) -> Resharding | None:
        """Return the one live re-sharding of a set."""
        found = [one for one in self.reshardings(name) if one.ended is None]
        return found[0] if found else None

    def reshardings(self, name: str | None = None) -> list[Resharding]:
        """Return re-shardings, newest first; of one set or of all."""

        def work(connection: psycopg.Connection[Any]) -> list[Resharding]:
            with connection.cursor(row_factory=dict_row) as cursor:
                cursor.execute(
                    record.RESHARDING + "WHERE %(name)s::text IS NULL OR shard_set = %(name)s"
                    " ORDER BY id DESC LIMIT 1000",
                    {"name": name},
                )
                return [record.resharding_of(row) for row in cursor]

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
            epoch = record.raise_epoch(connection, one.set_name, epoch)
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
            record.note(
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
            return record.load(connection, id_)

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
            epoch = record.raise_epoch(
                connection, one.set_name, epoch, one.new if outcome == "completed" else None
            )
            connection.execute(
                """
                UPDATE topology.resharding
                SET outcome = %s, ended_at = clock_timestamp(), epoch = %s WHERE id = %s
                """,
                [outcome, epoch, id_],
            )
            record.note(
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
            return record.load(connection, id_)

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
        taken = self._database.run(lambda c: leases.take(c, id_, step, owner, actor, part))
        with self.adopt(taken) as lease:
            try:
                yield lease
            finally:
                if part is None:
                    with suppress(CellferryError):
                        self._database.run(lambda c: leases.give_back(c, taken))

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
        self._database.run(lambda connection: leases.check(connection, lease))

    # -- clients

    def clients(self, of: str | int) -> list[RegisteredClient]:
        """Return the clients of a set, or of a re-sharding's set, by name."""

        def work(connection: psycopg.Connection[Any]) -> list[RegisteredClient]:
            name = of if isinstance(of, str) else record.load(connection, of).set_name
            return record.clients(connection, name)

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
        self._roll_call.wait_for(
            id_, lambda one: one.is_behind, record.ACKNOWLEDGED, timeout_s, while_waiting
        )

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
            name = record.load(connection, id_).set_name
            beats = {one.session: one.beat for one in record.clients(connection, name)}
            connection.execute("SELECT pg_notify(%s, %s)", [SHARDS_CHANNEL, name])
            return beats

        before = self._database.run(ask)
        self._roll_call.wait_for(
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
        epoch = record.lock_set(connection, record.load(connection, id_).set_name)
        one = record.load(connection, id_, lock=True)
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
        leases.check(connection, lease, lock=True)


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
