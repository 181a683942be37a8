"""The Redis and Valkey store: keys of one organization, found by their prefix.

How it moves them, and why so, is in `docs/decisions/0002-redis-capture-and-gate.md`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

from cellferry.errors import (
    AccessDenied,
    Blocked,
    CellferryError,
    InvalidInput,
    LeaseLost,
    NotPrepared,
    TransientError,
    Unreachable,
    VerificationFailed,
    WrongState,
)
from cellferry.model import (
    Blocker,
    Cell,
    Cleaned,
    Copied,
    Finished,
    GateState,
    Inventory,
    Landmark,
    Leftover,
    Move,
    Progress,
    Repaired,
    Resource,
    Resources,
    Round,
    Route,
    Side,
    Strategy,
    Verification,
)
from cellferry.phases import Phase, reach
from cellferry.stores import base
from cellferry.stores.pace import FULL_SPEED, Pace, Paced
from cellferry.stores.questions import Answer, Question
from cellferry.stores.redis import acl_users, inventory, leftovers, questions
from cellferry.stores.redis.comparison import Applied, Pair, scan, settle
from cellferry.stores.redis.copier import Copier
from cellferry.stores.redis.gate import Gate, Marker
from cellferry.stores.redis.key_prefix import MARKERS, KeyPrefix, application_user
from cellferry.stores.redis.probe import RedisProbe
from cellferry.stores.redis.tracking import Feed
from cellferry.stores.redis.verifier import Verifier
from cellferry.stores.redis.wire import Address, Command, ServerError, Wire
from cellferry.stores.throttle import Throttle

KIND = "redis"

ROUND_KEYS = 50_000
"""Bound of one round."""
SMALL_ROUND = 100
"""Dirty keys that catch-up is content with."""
CATCH_UP_ROUNDS = 8
BARRIER_S = 2.0
RUN_ID = "destination_run_id"
"""In the evidence of `finish`: which process of the server has the last delta."""
CLEANUP_BATCH = 500
CLEANUP_KEYS_PER_S = 20_000
"""Pace of a clean-up where the move sets none."""


def _where(cell: Cell) -> str:
    return f"{cell.name}/{KIND}"


def _admin_address(cell: Cell) -> Address:
    """The server of `cell` as its administrator.

    Raises:
        NotPrepared: this process has no admin connection to it.
    """
    endpoint = cell.stores[KIND]
    if endpoint.admin_url is None:
        raise NotPrepared(
            "there is no admin connection: gates are ACL rules, which only it may change",
            hint="set admin_connection for this store in cells.yaml",
            where=_where(cell),
        )
    return Address.parse(endpoint.admin_url, _where(cell))


class RedisStore(base.Store):
    """Keys in a Redis or Valkey server without cluster mode.

    Options in `cells.yaml`: `key_prefix`, `application_user` (both with `$organization`), and
    `trusted_users`, a list of users that may write every key and never do for the application.
    """

    kind: ClassVar[str] = KIND

    def prepare_cell(self, cell: Cell, progress: Progress) -> Mapping[str, Any]:
        """Check that gates will hold here. Nothing needs to be installed for this store.

        A gate is a change of the application's user, made when an organization moves.
        """
        blockers = [blocker for blocker in self._blockers(cell) if blocker.fatal]
        if blockers:
            first = blockers[0]
            raise NotPrepared(
                "; ".join(blocker.reason for blocker in blockers),
                hint=first.remedy,
                where=first.where,
            )
        with Wire(_admin_address(cell), "cellferry:prepare") as admin:
            acl_users.save(admin)
            engine = inventory.Engine.of(inventory.server_facts(admin))
            commands = acl_users.unstoppable_commands(admin)
        progress.report(KIND, "prepare", 1, 1, "servers")
        return {
            "engine": str(engine),
            "installed": "nothing: the gate is the application user's ACL rules",
            "closed_by_name": list(commands),
        }

    def unprepare_cell(self, cell: Cell, progress: Progress) -> Mapping[str, Any]:
        """Remove leftovers of the mover: its users and marker keys.

        Raises:
            Blocked: an organization is still gated in this cell.
        """
        removed = 0
        with Wire(_admin_address(cell), "cellferry:unprepare") as admin:
            markers = _marker_keys(admin)
            gates = [key for key in markers if key.startswith(f"{MARKERS}gate:".encode())]
            for key in gates:
                marker = Marker.parse(admin.call("GET", key))
                if marker is not None and marker.state is not GateState.OPEN:
                    raise Blocked(
                        f"{key.decode()} is {marker.state.value} by migration {marker.migration}",
                        hint="finish or abort that migration, and clean it up, first",
                        where=_where(cell),
                    )
            users = [
                name
                for name in admin.call("ACL", "USERS")
                if acl_users.attempt_of(name.decode()) is not None
            ]
            if users:
                admin.call("ACL", "DELUSER", *users)
                acl_users.save(admin)
            if markers:
                removed = admin.call("UNLINK", *markers)
        progress.report(KIND, "unprepare", 1, 1, "servers")
        return {"removed_users": len(users), "removed_keys": removed}

    def check_cell(self, cell: Cell) -> tuple[Blocker, ...]:
        """Say what keeps this cell from being part of a move; read-only."""
        return tuple(self._blockers(cell))

    def check_question(self, question: Question) -> None:
        """See `Store.check_question`."""
        questions.words(question)

    @contextmanager
    def open(
        self,
        move: Move,
        resources: Resources,
        progress: Progress,
        pace: Pace = FULL_SPEED,
        *,
        continues: bool = False,  # noqa: ARG002 - each attempt has users of its own
    ) -> Iterator[RedisMove]:
        """Prepare one attempt; connections are made when they are needed and close on exit."""
        redis_move = RedisMove(move, resources, progress, pace)
        try:
            yield redis_move
        finally:
            redis_move.close()

    def probe(self, cell: Cell, move: Move) -> RedisProbe:
        """Return what asks the cell's server how it does; see `Store.probe`."""
        return RedisProbe(_admin_address(cell), move)

    def leftovers(self, cell: Cell) -> tuple[Leftover, ...]:
        """Return everything of cellferry's in a cell; see `Store.leftovers`."""
        return leftovers.find(cell, _admin_address(cell))

    def remove_leftover(self, cell: Cell, leftover: Leftover) -> bool:
        """Remove what was found, if it still is as found; see `Store.remove_leftover`."""
        return leftovers.remove(cell, _admin_address(cell), leftover)

    def turn_away(self, cell: Cell, gate: Leftover, route: Route) -> bool:
        """Make a stale gate say `moved`; see `Store.turn_away`."""
        return leftovers.turn_away(cell, _admin_address(cell), gate, route)

    def obey(self, cell: Cell, gate: Leftover) -> bool:
        """Give the application's user the rules that belong to its gate; see `Store.obey`."""
        return leftovers.obey(cell, _admin_address(cell), gate)

    def reconcile(self, move: Move, side: Side, wanted: GateState, resources: Resources) -> bool:
        """Bring one side's gate to what the topology says; see `Store.reconcile`."""
        return leftovers.reconcile(move, side, wanted, resources, _admin_address(move.cell(side)))

    def _blockers(self, cell: Cell) -> Iterator[Blocker]:
        try:
            options = cell.stores[KIND].options
            KeyPrefix.of(options, "x", where=_where(cell))
            application_user(options, "x", where=_where(cell))
            with Wire(_admin_address(cell), "cellferry:check") as admin:
                failover_is_manual = options.get("failover") == "manual"
                for blocker in inventory.cell_blockers(admin):
                    if not (failover_is_manual and blocker.code == "standby-could-be-promoted"):
                        yield blocker
            with Wire(Address.parse(cell.stores[KIND].url, _where(cell)), "cellferry:check"):
                pass  # it may log in
        except Unreachable:
            raise  # trying again may help, which a blocker does not say
        except CellferryError as error:
            yield inventory.failure_blocker(error, _where(cell))


def _marker_keys(admin: Wire) -> list[bytes]:
    cursor, found = 0, set()
    while True:
        next_cursor, page = admin.call("SCAN", cursor, "MATCH", f"{MARKERS}*", "COUNT", 1000)
        found.update(page)
        cursor = int(next_cursor)
        if cursor == 0:
            return sorted(found)


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _verb(
    method: Callable[Concatenate[RedisMove, _P], _R],
) -> Callable[Concatenate[RedisMove, _P], _R]:
    """Say LeaseLost where a newer attempt has deleted this one's users."""

    @functools.wraps(method)
    def wrapped(self: RedisMove, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return method(self, *args, **kwargs)
        except (Unreachable, AccessDenied) as error:
            self.explain_loss(error)
            raise

    return wrapped


class _Deadline:
    """A progress sink that also ends work which takes too long under the gate."""

    def __init__(self, progress: Progress, seconds: float, what: str) -> None:
        self._progress = progress
        self._until = time.monotonic() + seconds
        self._what = what

    def report(
        self, store: str, phase: str, done: int, total: int | None, unit: str, note: str = ""
    ) -> None:
        self._progress.report(store, phase, done, total, unit, note)

    def check(self) -> None:
        self._progress.check()
        if time.monotonic() > self._until:
            raise TransientError(
                f"{self._what} takes too long under the gate",
                hint="the cutover gives up and the source serves on; run it again",
            )


class RedisMove(base.StoreMove):
    """The keys' part of one attempt at one migration."""

    def __init__(
        self, move: Move, resources: Resources, progress: Progress, pace: Pace = FULL_SPEED
    ) -> None:
        self.move = move
        self._pace = pace
        self._resources = resources
        self._progress = progress
        self._prefix = self._agreed_prefix()
        self._throttle = Throttle(move.throttle.keys_per_s, pace=pace)
        self._gates: dict[Side, Gate] = {}
        self._wires: dict[tuple[Side, str], Wire] = {}
        self._users: dict[tuple[Side, bool], Address] = {}
        self._askers: dict[Side, Wire] = {}
        self._feed: Feed | None = None
        self._pair: Pair | None = None
        self._pass_s: float | None = None
        self._gate_changes = 0
        self._at_finish: tuple[Wire, str] | None = None

    # --- plan --------------------------------------------------------------------------------

    def inventory(self) -> Inventory:
        """Count and size the organization's keys, and list blockers, on both sides."""
        blockers: list[Blocker] = []
        store = RedisStore()
        for side in Side:
            blockers += store.check_cell(self.move.cell(side))
        if any(b.code in ("unreachable", "access-denied", "cannot-check") for b in blockers):
            return Inventory(KIND, "keys", (), tuple(blockers))
        source, destination = self._gate(Side.SOURCE), self._gate(Side.DESTINATION)
        parts = inventory.measure(source.admin, self._prefix)
        for gate in (source, destination):
            blockers += inventory.application_blockers(gate, self._trusted(gate))
        size = sum(part.bytes for part in parts)
        blockers += inventory.pair_blockers(source, destination, size)
        rate = inventory.measure_write_rate(source.admin, self._prefix)
        return Inventory(KIND, "keys", parts, tuple(blockers), rate)

    # --- lease -------------------------------------------------------------------------------

    def fence(self) -> None:
        """Make this attempt the only one that may write; older ones' connections end.

        Where a newer migration has one of the two cells, as it may while this one is retained,
        only writes to that cell are lost.
        """
        lost: list[LeaseLost] = []
        for side in Side:
            gate = self._gate(side)
            self._intend(side, "lease", self._prefix.marker("lease"))
            try:
                for name in gate.fence():
                    self._forget(side, "acl_user", name)
            except LeaseLost as error:
                held = gate.lease()
                if held is not None and held[0] == self.move.migration:
                    raise
                lost.append(error)
        if len(lost) == len(Side):
            raise lost[0]

    def explain_loss(self, error: CellferryError) -> None:
        """Raise LeaseLost if `error` is the effect of a newer attempt.

        Raises:
            LeaseLost: another attempt has the lease.
        """
        for side in {side for side, _ in self._users}:
            cell = self.move.cell(side)
            try:
                with Wire(_admin_address(cell), self._name("lease")) as admin:
                    held = self._new_gate(admin, side).holds_lease()
            except CellferryError:
                continue
            if not held:
                raise LeaseLost(
                    f"attempt {self.move.attempt} of migration {self.move.migration} was replaced",
                    hint="nothing to do: the newer attempt goes on",
                    organization=self.move.organization.id,
                    where=_where(cell),
                ) from error

    # --- copy --------------------------------------------------------------------------------

    @_verb
    def open_capture(self) -> None:
        """Write down the source's rules, close the destination for everybody but the mover."""
        if self.move.returning:
            self._require_importing()
            return
        for side in Side:
            self._intend(side, "gate", self._prefix.marker("gate"))
        self._gate(Side.SOURCE).record_source()
        self._gate(Side.DESTINATION).close_for_import()
        if self.move.strategy is Strategy.FREEZE_FIRST:
            self._connect_copier()  # `finish` copies under the gate; nothing to set up there

    @_verb
    def copy(self) -> Copied:
        """Copy every key, throttled, from the last checkpoint on.

        Needs no change feed: `sync` and `catch_up` compare everything before they follow one.
        """
        return self._copy(self._throttle)

    def _copy(self, throttle: Throttle) -> Copied:
        self._require_importing()
        self._connect_copier()
        self._pace.start()
        run_id = inventory.server_facts(self._gate(Side.SOURCE).admin)["run_id"]
        return Copier(
            self._wire(Side.SOURCE, "scan"),
            self._wire(Side.SOURCE, "read"),
            self._wire(Side.DESTINATION, "write", writer=True),
            prefix=self._prefix,
            run_id=run_id,
            throttle=throttle,
            progress=self._progress,
            planned=sum(self.move.planned.get("redis", {}).values()),
        ).run()

    # --- sync --------------------------------------------------------------------------------

    @_verb
    def sync(self) -> Round:
        """One round over the dirty keys.

        A feed lives in this process only. The first call, and one after the feed was lost,
        compares both sides completely and repairs what differs. Rests are not counted: they tell
        nothing of the next pause.
        """
        self._pace.start()
        started = time.monotonic() - self._pace.rested_s
        if self.move.returning and not self._can_be_read_by(Side.DESTINATION, writer=Side.SOURCE):
            note = "the old cell's engine is older: it cannot follow the new one"
            self._progress.report(KIND, "reverse", 0, None, "keys", note)
            return Round(0, 0, 0, 0.0)
        applied = self._follow()
        total = self._round(ROUND_KEYS)
        feed = self._feed_alive()
        return Round(
            applied.keys + total.keys,
            len(feed),
            applied.size + total.size,
            time.monotonic() - self._pace.rested_s - started,
        )

    @_verb
    def repair(self) -> Repaired:
        """Compare every key and bring over what differs, whatever was compared before."""
        self._pace.start()
        started = time.monotonic()
        if self.move.returning and not self._can_be_read_by(Side.DESTINATION, writer=Side.SOURCE):
            return Repaired(0, 0, 0.0)
        self._end_feed()
        applied = self._follow()
        total = self._round(ROUND_KEYS)
        return Repaired(applied.compared, applied.keys + total.keys, time.monotonic() - started)

    def landmark(self, side: Side) -> Landmark | None:  # noqa: ARG002 - the same for both
        """None: a change feed lives in one process, and each begins with a complete comparison."""
        return None

    @_verb
    def verify(self) -> Verification:
        """Compare everything on both sides, while writers write."""
        self._pace.start()
        self._follow()
        self._round(ROUND_KEYS)
        feed = self._feed_alive()
        return Verifier(
            self._following(),
            is_dirty=feed.__contains__,
            barrier=lambda: feed.barrier(BARRIER_S),
            progress=Paced(self._progress, self._pace),
        ).run()

    # --- cutover -----------------------------------------------------------------------------

    @_verb
    def catch_up(self) -> Round:
        """Open a feed, compare and repair everything, then rounds until one is small."""
        if self.move.strategy is Strategy.FREEZE_FIRST:
            return Round(0, 0, 0, 0.0)
        started = time.monotonic()
        applied = self._follow()
        first = Round(applied.keys, len(self._feed_alive()), applied.size, 0.0)
        rounds = [first]
        for _ in range(CATCH_UP_ROUNDS):
            round_started = time.monotonic()
            total = self._round(ROUND_KEYS)
            left = len(self._feed_alive())
            rounds.append(Round(total.keys, left, total.size, time.monotonic() - round_started))
            if left <= SMALL_ROUND or left >= rounds[-2].remaining:
                break
        # all that `finish` will use is there and warm before anybody is stopped
        _ = self._gate(Side.SOURCE).unstoppable
        self._gate(Side.DESTINATION).read()
        self._know_destination()
        last_started = time.monotonic()
        total = self._round(ROUND_KEYS, last=True)
        last = Round(
            total.keys,
            len(self._feed_alive()),
            sum(r.bytes for r in rounds) + total.size,
            time.monotonic() - last_started,
        )
        self._progress.report(
            KIND,
            "catch-up",
            sum(r.applied for r in rounds) + last.applied,
            None,
            "keys",
            f"{len(rounds)} rounds in {time.monotonic() - started:.1f} s",
        )
        return last

    @_verb
    def freeze(self, deadline_s: float) -> None:
        """Make the application's user read-only at the source, at once; `finish` makes it durable.

        The server runs one command at a time, so nobody has to drain: a transaction or a script
        is over or has not begun. Clients that wait in a blocking command are disconnected.
        """
        gate = self._gate(Side.SOURCE)
        self._gate_changes = self._feed.gate_changes if self._feed else 0
        gate.admin.wait_at_most(max(deadline_s, 0.1))
        try:
            gate.freeze()
        finally:
            gate.admin.wait_at_most(max(deadline_s, 15.0))

    @_verb
    def finish(self) -> Finished:
        """Apply and verify the last dirty keys, and every stream, under the gate.

        Reverse rounds need no capture to be armed: they compare both sides.
        """
        started = time.monotonic()
        if not self._gate(Side.SOURCE).is_frozen_by_us():
            raise WrongState(
                "the source is not frozen by this migration",
                hint="start the cutover again",
                organization=self.move.organization.id,
                where=_where(self.move.source),
            )
        self._gate(Side.SOURCE).keep_rules()  # here, where other stores are at work beside it
        self._require_importing()
        run_id = self._know_destination()  # before anything is written there
        found = self._finish(started)
        return replace(found, evidence={**found.evidence, RUN_ID: run_id})

    def _finish(self, started: float) -> Finished:
        if self.move.strategy is Strategy.FREEZE_FIRST:
            return self._finish_everything(started)
        feed = self._feed
        broken = self._barrier_after_freeze()
        if feed is None or broken is not None:
            return self._finish_without_feed(started, broken)
        pair = self._following()
        dirty = feed.take()
        streams = set(pair.streams)
        try:
            total = pair.bring(dirty | streams, may_wait=False)
        except BaseException:
            feed.give_up("the last delta was not applied")
            raise
        self._require_equal(total.unequal, pair)
        return Finished(
            total.keys,
            total.compared,
            time.monotonic() - started,
            {"dirty_keys": len(dirty), "streams": len(streams), "bytes": total.size},
        )

    @_verb
    def hand_over(self) -> None:
        """Source `moved`, its user read-only until clean-up; destination open, its user free."""
        self._bring_again()
        self._gate(Side.SOURCE).hand_over_source()
        self._gate(Side.DESTINATION).open_destination()
        self._end_feed()

    def keep_handed_over(self) -> None:
        """Nothing is left to do: the server has written its rules before it let anybody in."""

    def _bring_again(self) -> None:
        """Compare everything once more where the destination has restarted since `finish`."""
        gate = self._gate(Side.DESTINATION)
        if self._at_finish is None or gate.admin is self._at_finish[0]:
            return
        # without its gate `open_destination` refuses it
        is_another = self._run_id_of_destination() != self._at_finish[1]
        if is_another and gate.receives() and not gate.was_opened():
            self._end_wires(Side.DESTINATION)
            self._delete_users(Side.DESTINATION)  # it has forgotten them
            self.repair()
        self._know_destination()

    def _know_destination(self) -> str:
        """Return the destination's run_id, asked once for each connection to it."""
        admin = self._gate(Side.DESTINATION).admin
        if self._at_finish is None or admin is not self._at_finish[0]:
            self._at_finish = admin, self._run_id_of_destination()
        return self._at_finish[1]

    def _run_id_of_destination(self) -> str:
        info: bytes = self._gate(Side.DESTINATION).admin.call("INFO", "server")
        return info.partition(b"run_id:")[2].split()[0].decode()

    @_verb
    def has_restarted(self, evidence: Mapping[str, Any]) -> bool:
        """Whether the destination is another process than the one that `finish` wrote to."""
        return evidence.get(RUN_ID) not in (None, self._run_id_of_destination())

    @_verb
    def was_opened(self) -> bool:
        """Whether the application's user may write there: its rules outlive a crash."""
        return self._gate(Side.DESTINATION).was_opened()

    def release(self) -> None:
        """Nobody waits here: refused writers try again by themselves."""

    @_verb
    def thaw(self) -> None:
        """Give the application's user at the source its rules back; exactly those it had."""
        self._gate(Side.SOURCE).thaw()

    @_verb
    def check_return(self) -> tuple[Blocker, ...]:
        """Ask whether the old cell's engine reads what the new cell's writes."""
        new, old = Side.DESTINATION, Side.SOURCE
        if self.move.returning:
            new, old = old, new
        if self._can_be_read_by(old, writer=new):
            return ()
        return (
            Blocker(
                "cannot-return",
                _where(self.move.cell(old)),
                "its engine is older than that of the new cell and cannot read what it writes: a "
                "roll-back would lose the keys written after the cutover",
                "upgrade it, then roll back"
                if self.move.returning
                else "upgrade it first; or set one_way, which gives the roll-back up",
            ),
        )

    def _can_be_read_by(self, reader: Side, *, writer: Side) -> bool:
        return inventory.can_go_back(self._gate(reader).admin, self._gate(writer).admin)

    # --- the end -----------------------------------------------------------------------------

    @_verb
    def ask(self, side: Side, question: Question) -> Answer:
        """Ask as a user that can only read this organization's keys; see `StoreMove.ask`."""
        words = questions.command(question, self.move.organization.id)
        where = _where(self.move.cell(side))
        if not self._prefix.owns(words[1].encode()):
            raise InvalidInput(
                f"key {words[1]!r} is not one of the organization's",
                hint=f"its keys begin with {self._prefix.text!r}",
                where=where,
            )
        if self._askers.get(side) is None or self._askers[side].is_lost:
            self._askers[side] = self._new_asker(side)
        wire = self._askers[side]
        wire.wait_at_most(question.timeout_s)
        try:
            return questions.answer(wire.try_call(*words))
        except ServerError as error:
            raise InvalidInput(
                f"{words[0].upper()} was refused: {error}",
                hint="correct the command, or the kind of value at its key",
                where=where,
            ) from error

    def _new_asker(self, side: Side) -> Wire:
        if side is Side.SOURCE:
            return Wire(self._user(side, writer=False), self._name("ask"))
        # The attempt's own user may write there: this one may not.
        gate, cell = self._gate(side), self.move.cell(side)
        name = f"{acl_users.user_name(self.move, side, writer=False)}-ask"
        password = acl_users.new_password()
        self._intend(side, "acl_user", name)
        gate.create_user(
            name, acl_users.mover_rules(self._prefix, password, writer=False, younger=())
        )
        server = Address.parse(cell.stores[KIND].url, _where(cell))
        return Wire(server.as_user(name, password), self._name("ask"))

    @_verb
    def cleanup(self, side: Side) -> Cleaned:
        """Delete the copy on `side` in paced batches; each batch checks the gate (hazard 4)."""
        started = time.monotonic()
        gate = self._gate(side)
        marker = gate.read()
        notes: tuple[str, ...] = ()
        deleted = 0
        if marker is None:
            notes = ("no gate here: nothing of this migration to delete",)
        elif marker.state is GateState.OPEN and marker.migration < self.move.migration:
            notes = ("the gate was never closed by this migration: nothing to delete",)
        elif not gate.deletable(marker):
            raise self._late(side, marker)
        else:
            deleted = self._delete_keys(side, gate)
        self._end_wires(side)
        self._dismantle(side, cleaned=True)
        self._dismantle(_other(side), cleaned=False)
        return Cleaned(deleted, time.monotonic() - started, notes)

    @_verb
    def close_capture(self) -> None:
        """Remove this migration's users on both sides, and markers where nothing is gated."""
        self._end_feed()
        for side in Side:
            self._end_wires(side)
            self._dismantle(side, cleaned=False)

    def close(self) -> None:
        """Close every connection and remove this attempt's users, whose passwords are lost."""
        self._end_feed()
        made = {side for side, _ in self._users} | set(self._askers)
        for asker in self._askers.values():
            asker.close()
        for side in Side:
            self._end_wires(side)
        for side in made:
            try:
                self._delete_users(side)
            except CellferryError:
                continue  # the next attempt's fence, or the reaper, removes them
        for gate in self._gates.values():
            gate.admin.close()
        self._gates.clear()

    # --- inside: following -------------------------------------------------------------------

    def _follow(self) -> Applied:
        """See that a feed is open and that everything before it was compared."""
        self._require_importing()
        if self._feed is not None and self._feed.lost is None and self._pair is not None:
            return Applied()
        self._end_feed()
        if self.move.returning:
            self._gate(Side.SOURCE).insist_on_authority()
        started = time.monotonic()
        feed = Feed(self._user(Side.SOURCE, writer=False), self._name("feed"), self._prefix)
        self._feed = feed
        pair = self._new_pair()
        applied = pair.complete_pass("compare")
        self._pass_s = time.monotonic() - started
        feed.put_back(applied.unequal)  # a round decides whether they changed meanwhile
        self._pair = pair
        return applied

    def _round(self, limit: int, *, last: bool = False) -> Applied:
        """Bring dirty keys over; the `last` round does what `finish` will do."""
        feed, pair = self._feed_alive(), self._following()
        feed.barrier(BARRIER_S)
        keys = feed.take(limit)
        if last:
            keys |= pair.streams.keys()
        try:
            total = pair.bring(keys, may_wait=not last)
            if total.unequal:
                feed.barrier(BARRIER_S)
                again = [key for key in total.unequal if key not in feed]
                stuck = settle(again, lambda key: bool(pair.bring([key]).unequal))
                feed.barrier(BARRIER_S)
                self._require_equal(
                    [key for key in stuck if key not in feed and not self._is_stream(key)], pair
                )
        except BaseException:
            feed.give_up("a round was not finished")
            raise
        return total

    def _is_stream(self, key: bytes) -> bool:
        kind = self._following().origin.call("TYPE", key)
        return str(kind if not isinstance(kind, bytes) else kind.decode()) == "stream"

    def _barrier_after_freeze(self) -> TransientError | None:
        """See that every change before the freeze is among the dirty keys; why not, otherwise."""
        if self._feed is None:
            return None
        try:
            self._feed.wait_for_gate(self._gate_changes, BARRIER_S)
        except TransientError as error:
            return error
        return None

    def _finish_everything(self, started: float) -> Finished:
        full_speed = Throttle(None)  # writers wait
        copied = self._copy(full_speed)
        pair = self._new_pair(throttle=full_speed)
        applied = pair.complete_pass("compare")
        self._require_equal(applied.unequal, pair)
        verification = Verifier(
            pair, is_dirty=lambda _key: False, barrier=lambda: None, progress=self._progress
        ).run()
        if not verification.ok:
            self._require_equal([m.key.encode() for m in verification.mismatches], pair)
        return Finished(
            copied.count + applied.keys,
            verification.compared,
            time.monotonic() - started,
            {"hashes": dict(verification.hashes), "bytes": copied.bytes + applied.size},
        )

    def _finish_without_feed(self, started: float, cause: TransientError | None) -> Finished:
        """Compare everything under the gate if that is quick enough; else give up."""
        reason = cause.message if cause else "this process has no change feed"
        limits = self.move.limits
        if self._pass_s is not None and self._pass_s > limits.pause_budget_s:
            raise TransientError(
                f"{reason}; comparing everything takes {self._pass_s:.1f} s, "
                f"more than the pause budget of {limits.pause_budget_s} s",
                hint="the cutover gives up and the source serves on; run it again",
                organization=self.move.organization.id,
            ) from cause
        budget = limits.freeze_deadline_s if self._pass_s is None else limits.pause_budget_s
        pair = self._new_pair(
            progress=_Deadline(self._progress, max(budget, 0.5), "comparing everything"),
            throttle=Throttle(None),
        )
        total = pair.complete_pass("finish")
        self._require_equal(total.unequal, pair)
        return Finished(
            total.keys,
            total.compared,
            time.monotonic() - started,
            {"feed_lost": reason, "bytes": total.size, "streams": len(pair.streams)},
        )

    def _require_equal(self, keys: list[bytes], pair: Pair) -> None:
        def differs(key: bytes) -> bool:
            (_, ours, theirs), *_ = pair.read([key])
            return not (
                pair.same(ours, theirs)
                or pair.has_expired(ours, theirs)
                or pair.same_logically(key)
            )

        left = settle(keys, differs, pause_s=0.01)
        if left:
            examples = ", ".join(key.decode(errors="backslashreplace") for key in left[:5])
            raise VerificationFailed(
                f"{len(left)} keys differ after they were copied: {examples}",
                hint="look at these keys on both sides; run the step again",
                organization=self.move.organization.id,
                where=_where(self.move.destination),
            )

    def _require_importing(self) -> None:
        gate = self._gate(Side.DESTINATION)
        if not gate.receives():
            if gate.read() is None:
                raise WrongState(
                    "the server has lost this migration's gate: its keys were deleted, or an older"
                    " state of it was restored",
                    hint="nothing was written there; see what else it lost. "
                    + (
                        "The organization stays at its new cell, which has everything"
                        if self.move.returning
                        else "Abort the migration and plan it anew: the source has everything"
                    ),
                    organization=self.move.organization.id,
                    where=gate.where,
                )
            raise WrongState(
                "the destination is not gated for this migration",
                hint="the organization came back or was taken over; reverse rounds have ended"
                if self.move.returning
                else "run the copy step first",
                organization=self.move.organization.id,
                where=gate.where,
            )

    def _feed_alive(self) -> Feed:
        if self._feed is None:
            raise WrongState("the change feed is not open", organization=self.move.organization.id)
        return self._feed

    def _following(self) -> Pair:
        if self._pair is None:
            raise WrongState("the change feed is not open", organization=self.move.organization.id)
        return self._pair

    def _new_pair(
        self, *, progress: Progress | None = None, throttle: Throttle | None = None
    ) -> Pair:
        return Pair(
            self._wire(Side.SOURCE, "compare"),
            self._wire(Side.DESTINATION, "compare"),
            self._wire(Side.DESTINATION, "write", writer=True),
            prefix=self._prefix,
            throttle=throttle or self._throttle,
            progress=progress or self._progress,
            before_deleting=(
                (lambda: self._gate(Side.SOURCE).insist_on_authority())
                if self.move.returning
                else None
            ),
        )

    def _end_feed(self) -> None:
        if self._feed is not None:
            self._feed.close()
        self._feed = None
        self._pair = None

    def _connect_copier(self) -> None:
        self._intend(Side.DESTINATION, "checkpoint", self._prefix.marker("checkpoint"))
        for what in ("scan", "read", "compare"):
            self._wire(Side.SOURCE, what)
        self._wire(Side.DESTINATION, "compare")
        self._wire(Side.DESTINATION, "write", writer=True)

    # --- inside: cleaning --------------------------------------------------------------------

    def _delete_keys(self, side: Side, gate: Gate) -> int:
        scanner = self._wire(side, "clean-scan")
        writer = self._wire(side, "clean", writer=True)
        self._pace.start()
        pace = Throttle(self.move.throttle.keys_per_s or CLEANUP_KEYS_PER_S, pace=self._pace)
        gate_key = self._prefix.marker("gate")
        deleted = 0
        while True:
            found = 0
            for page in scan(scanner, self._prefix):
                for start in range(0, len(page), CLEANUP_BATCH):
                    batch = page[start : start + CLEANUP_BATCH]
                    pace.take(len(batch), while_waiting=self._progress.check)
                    self._progress.check()
                    removed = self._delete_batch(writer, gate, gate_key, batch)
                    reach(Phase.CLEANUP_BATCH)
                    deleted += removed
                    found += removed
                self._progress.report(KIND, "cleanup", deleted, None, "keys")
            if not found:
                return deleted

    def _delete_batch(self, writer: Wire, gate: Gate, gate_key: str, batch: list[bytes]) -> int:
        """One transaction: it is void if the gate is not as it must be, or changes."""
        _, value = writer.checked([("WATCH", gate_key), ("GET", gate_key)])
        marker = Marker.parse(value)
        if not gate.deletable(marker):
            writer.call("UNWATCH")
            raise self._late(gate.side, marker)
        commands: list[Command] = [("MULTI",), ("UNLINK", *batch), ("EXEC",)]
        result = writer.checked(commands)[-1]
        if result is None:
            raise self._late(gate.side, Marker.parse(writer.call("GET", gate_key)))
        return int(result[0])

    def _late(self, side: Side, marker: Marker | None) -> WrongState:
        found = (
            f"{marker.state.value} by migration {marker.migration} at epoch {marker.epoch}"
            if marker
            else "absent"
        )
        return WrongState(
            f"migration {self.move.migration} may not delete here: the gate is {found}",
            hint="the organization came back, or another migration has it; nothing was deleted "
            "after that",
            organization=self.move.organization.id,
            where=_where(self.move.cell(side)),
        )

    def _dismantle(self, side: Side, *, cleaned: bool) -> None:
        """Remove users and, unless writers are still gated there, marker and lease."""
        gate = self._gate(side)
        self._delete_users(side)
        marker = gate.read()
        is_closed = marker is not None and marker.state is not GateState.OPEN
        is_ours = marker is not None and marker.migration == self.move.migration
        held = gate.lease()
        # A newer migration took over what this one had here; it removes it, too.
        is_passed_on = held is not None and held[0] > self.move.migration
        if not is_passed_on or (is_closed and is_ours):
            if is_closed and not (cleaned and gate.deletable(marker)):
                return
            if not gate.dismantle():
                return
        for kind in ("gate", "lease", "checkpoint"):
            self._forget(side, kind, self._prefix.marker(kind))

    @_verb
    def is_gone(self, resource: Resource) -> bool:
        """Whether it is a user that the server does not have: it lost those with its memory."""
        for side in Side:
            if resource.kind == "acl_user" and resource.cell == self.move.cell(side).name:
                users = self._gate(side).admin.call("ACL", "USERS")
                return resource.name.encode() not in users
        return False

    def _delete_users(self, side: Side) -> None:
        for name in self._gate(side).delete_users():
            self._forget(side, "acl_user", name)
        for key in [key for key in self._users if key[0] is side]:
            self._forget(side, "acl_user", acl_users.user_name(self.move, side, writer=key[1]))
            del self._users[key]

    # --- inside: connections -----------------------------------------------------------------

    def _agreed_prefix(self) -> KeyPrefix:
        prefixes = {}
        for side in Side:
            cell = self.move.cell(side)
            options = cell.stores[KIND].options
            application_user(options, self.move.organization.id, where=_where(cell))
            prefixes[side] = KeyPrefix.of(options, self.move.organization.id, where=_where(cell))
        if prefixes[Side.SOURCE] != prefixes[Side.DESTINATION]:
            raise InvalidInput(
                f"key_prefix differs: {prefixes[Side.SOURCE].text!r} in {self.move.source.name}, "
                f"{prefixes[Side.DESTINATION].text!r} in {self.move.destination.name}",
                hint="keys keep their names: give both cells the same key_prefix",
                organization=self.move.organization.id,
            )
        return prefixes[Side.SOURCE]

    def _name(self, what: str) -> str:
        return f"cellferry:{self.move.migration}:{self.move.attempt}:{what}"

    def _gate(self, side: Side) -> Gate:
        if side in self._gates and self._gates[side].admin.is_lost:
            # A thaw and a hand-over must not fail for it.
            self._gates.pop(side).admin.close()
        if side not in self._gates:
            admin = Wire(_admin_address(self.move.cell(side)), self._name("gate"))
            self._gates[side] = self._new_gate(admin, side)
        return self._gates[side]

    def _new_gate(self, admin: Wire, side: Side) -> Gate:
        cell = self.move.cell(side)
        user = application_user(
            cell.stores[KIND].options, self.move.organization.id, where=_where(cell)
        )
        return Gate(admin, self.move, side, self._prefix, user)

    def _user(self, side: Side, *, writer: bool) -> Address:
        """Log-in of this attempt's user, made when it is first needed."""
        # one user reads and writes the destination; at the source they are apart
        writes = writer or side is Side.DESTINATION
        if (side, writes) not in self._users:
            gate = self._gate(side)
            cell = self.move.cell(side)
            name = acl_users.user_name(self.move, side, writer=writes)
            password = acl_users.new_password()
            self._intend(side, "acl_user", name)
            rules = acl_users.mover_rules(
                self._prefix,
                password,
                writer=writes,
                younger=acl_users.younger_commands(gate.admin),
            )
            gate.create_user(name, rules)
            server = Address.parse(cell.stores[KIND].url, _where(cell))
            self._users[side, writes] = server.as_user(name, password)
        return self._users[side, writes]

    def _wire(self, side: Side, what: str, *, writer: bool = False) -> Wire:
        if (side, what) not in self._wires:
            wire = Wire(self._user(side, writer=writer), self._name(what))
            # reading for a move shall not make keys look used; older engines cannot do it
            wire.send([("CLIENT", "NO-TOUCH", "ON")])
            wire.receive(1)
            self._wires[side, what] = wire
        return self._wires[side, what]

    def _end_wires(self, side: Side) -> None:
        for key in [key for key in self._wires if key[0] is side]:
            self._wires.pop(key).close()

    def _trusted(self, gate: Gate) -> frozenset[str]:
        cell = self.move.cell(gate.side)
        endpoint = cell.stores[KIND]
        names = set(endpoint.options.get("trusted_users", ()))
        names.add(gate.admin.call("ACL", "WHOAMI").decode())
        mover = Address.parse(endpoint.url, _where(cell))
        names.add(mover.user or "default")
        return frozenset(names)

    def _resource(self, side: Side, kind: str, name: str) -> Resource:
        return Resource(self.move.cell(side).name, KIND, kind, name)

    def _intend(self, side: Side, kind: str, name: str) -> None:
        self._resources.intend(self._resource(side, kind, name))

    def _forget(self, side: Side, kind: str, name: str) -> None:
        self._resources.forget(self._resource(side, kind, name))


def _other(side: Side) -> Side:
    return Side.DESTINATION if side is Side.SOURCE else Side.SOURCE
