"""The one moment in which the authority over values changes sides, for `cutover` and `roll_back`.

::

    feeds open → everything compared → rounds until little is left       clients work
    → `switching` set → acknowledged → the last changes → copiers end    values wait, claims go on
    → the other side has the authority → acknowledged                    clients work

Whatever fails before the last line goes back: `switching` to the state that it came from. That is
right at any moment of it. Values and counters did not change meanwhile, so the side that had the
authority is complete. A claim that was accepted in `switching` had won at both owners, so it is at
that side as well. What the copier wrote is at the other side alone, and the next attempt compares
that anew.

A controller that is killed in `switching` cannot go back by itself. A child process of its own
(`Warden`) does it in its place, as soon as its parent's end of a pipe closes. Should both die with
their machine, claims go on, values fail with `Unavailable` after the clients' own deadline, and any
later step (`cutover`, `roll_back`, `abort`) goes back first.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from cellferry.errors import LeaseLost, NotConverging, TransientError
from cellferry.model import Actor
from cellferry.shards.context import Context, Progress, fence
from cellferry.shards.follower import Follower
from cellferry.shards.leases import Lease
from cellferry.shards.plan import Plan
from cellferry.shards.points import Point, reach
from cellferry.shards.record import Resharding
from cellferry.shards.states import Owner, ShardState

T = TypeVar("T")

#: With so few changed keys waiting, what is left is brought over while values wait.
SMALL_KEYS = 2_000
MAX_ROUNDS = 60
PAUSE_S = 10.0
"""How long the last changes may take, in seconds. Values wait for that, and for the clients to
acknowledge two states: some milliseconds, or the lease of one that dies just then."""

_WARDEN_STARTS_S = 60.0
_WARDEN_TRIES = 600

#: Where each side's authority is exercised with everybody following both.
READ: dict[Owner, ShardState] = {
    Owner.OLD: ShardState.DUAL_READ_OLD,
    Owner.NEW: ShardState.DUAL_READ_NEW,
}


def switch(at: Context, found: Resharding, lease: Lease, *, pause_s: float = PAUSE_S) -> Resharding:
    """Give the authority over values to the other side, losing nothing.

    Args:
        found: in the state in which one side is read and both are written.
        pause_s: after how long the last changes must be over; clients' leases not counted.

    Raises:
        TransientError: it did not work out and the side that had the authority has it; or, from
            the topology, that nobody knows yet.
        NotConverging: keys change faster than rounds can follow; nobody waited.
    """
    authority = Owner.OLD if found.state is READ[Owner.OLD] else Owner.NEW
    before, after = READ[authority], READ[authority.other]
    plan = Plan.from_document(found.plan)
    if authority is Owner.NEW:
        plan = plan.turned()
    with _warden(at, found.id, lease, before) as warden, following(at, plan, lease) as followers:
        figures = followers.catch_up()
        reach(Point.SWEPT)
        # Of clients that died long ago nobody is to wait for the lease while values wait.
        at.control.wait_heard(found.id, at.patience_s(found.id), while_waiting=lease.check)
        warden.watch(pause_s + 2 * at.patience_s(found.id))
        begun = time.monotonic()
        try:
            at.control.advance(found.id, before, ShardState.SWITCHING, at.actor, "values wait")
            reach(Point.SWITCHING_SET)
            at.wait_acknowledged(found.id, lease)
            heard = time.monotonic()
            reach(Point.SWITCHING_ACKNOWLEDGED)
            last = followers.finish(heard + pause_s)
            reach(Point.LAST_BROUGHT)
            followers.close()
            at.control.advance(found.id, ShardState.SWITCHING, after, at.actor, "all is over")
        except LeaseLost:
            raise  # whoever took over has seen `switching`, and goes back or on by itself
        except BaseException:
            followers.close()
            go_back(at, found.id, before)
            raise
        over = time.monotonic()
        reach(Point.SWITCHED)
        warden.dismiss()
        at.wait_acknowledged(found.id, lease)
        figures |= {
            "last": last,
            "acknowledged_s": round(heard - begun, 4),
            "brought_s": round(over - heard, 4),
            "pause_s": round(time.monotonic() - begun, 4),
        }
    reach(Point.SWITCH_DONE)
    at.control.record(found.id, {f"switched_to_{authority.other}": figures})
    return at.control.resharding(found.id)


def go_back(at: Context, id_: int, before: ShardState) -> None:
    """Leave `switching` to where it came from, if the re-sharding is in it.

    Who has not acknowledged `switching` is waited for: the topology lets nobody be two epochs
    behind, on the way back as well.
    """
    if at.control.resharding(id_).state is not ShardState.SWITCHING:
        return
    at.control.wait_acknowledged(id_, at.patience_s(id_))
    at.control.advance(id_, ShardState.SWITCHING, before, at.actor, "given up")
    reach(Point.GONE_BACK)


def put_right(at: Context, found: Resharding) -> Resharding:
    """Go back from a `switching` that somebody's death has left; needs the lease.

    What the dead controller's feeds had heard is gone with it, so it cannot be gone on with.
    """
    if found.state is not ShardState.SWITCHING:
        return found
    go_back(at, found.id, READ[found.authority])
    return at.control.resharding(found.id)


class Followers:
    """The followers of all sources of a plan, each in a thread."""

    def __init__(self, at: Context, plan: Plan, lease: Lease) -> None:
        self._at = at
        self._lease = lease
        self._followers = {
            shard: Follower(
                plan,
                shard,
                at.source,
                fence=fence(lease),
                progress=lambda told: at.tell(Progress.of(lease.step, told)),
            )
            for shard in plan.sources
        }
        self._pool = ThreadPoolExecutor(max(1, len(self._followers)), "follow")

    def __getitem__(self, shard: str) -> Follower:
        return self._followers[shard]

    def __iter__(self) -> Iterator[Follower]:
        return iter(self._followers.values())

    def open_feeds(self) -> None:
        """Hear of every change from now on."""
        self.each(lambda one: one.open_feed())
        reach(Point.FEEDS_OPENED)

    def catch_up(self, small: int = SMALL_KEYS) -> dict[str, Any]:
        """Open the feeds, compare everything, and follow until little is left.

        Raises:
            NotConverging: it does not become little.
        """
        self.open_feeds()
        self._lease.check()  # a server that lost its data has lost the fence as well
        swept = self.each(lambda one: one.sweep())
        self._lease.check()
        rounds = 0
        left = self.pending()
        while left > small:
            if rounds == MAX_ROUNDS:
                raise NotConverging(
                    f"{left:,} changed keys are left after {rounds} rounds, more than {small:,}",
                    hint="raise the throttle, or try in a quieter hour; nothing was changed",
                    step=self._lease.step,
                )
            self._at.tell(Progress(self._lease.step, "", rounds, None, "rounds", f"{left:,} left"))
            self.each(lambda one: one.round())
            self._lease.check()
            rounds += 1
            left = self.pending()
        return {"swept": sum_up(swept), "rounds": rounds, "pending": left}

    def pending(self) -> int:
        """Keys that have changed and are not over yet."""
        return sum(one.pending() for one in self)

    def finish(self, deadline: float) -> dict[str, Any]:
        """Bring over everything that has changed until now, and compare it.

        Raises:
            TransientError: it took until after `deadline`, of the monotonic clock.
        """
        figures = sum_up(self.each(lambda one: one.finish()))
        if time.monotonic() > deadline:
            raise TransientError(
                "the last changes took longer than values may wait",
                hint="nothing is lost; try in a quieter hour, or allow a longer pause",
                step=self._lease.step,
            )
        return figures

    def close(self) -> None:
        """End every copier: nothing is under way when this returns."""
        for one in self:
            one.close()
        self._pool.shutdown(cancel_futures=True)

    def each(self, work: Callable[[Follower], T]) -> list[T]:
        """Let every follower do `work` at the same time; raise the first error when all ended."""
        futures = [self._pool.submit(work, one) for one in self]
        wait(futures)
        return [one.result() for one in futures]


@contextmanager
def following(at: Context, plan: Plan, lease: Lease) -> Iterator[Followers]:
    """Have a follower for each source, and none when the block ends."""
    followers = Followers(at, plan, lease)
    try:
        yield followers
    finally:
        followers.close()


def sum_up(figures: Sequence[Any]) -> dict[str, Any]:
    """Add up what several followers counted."""
    total: dict[str, Any] = {}
    for one in figures:
        for name, count in asdict(one).items():
            if isinstance(count, int | float):
                total[name] = total.get(name, 0) + count
    return total


class Warden:
    """A process that goes back from `switching` when the one that began it dies or hangs."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def watch(self, limit_s: float) -> None:
        """From now on it acts, if this process dies or takes longer than `limit_s`.

        Raises:
            TransientError: it did not start.
        """
        if not self._pipe.poll(_WARDEN_STARTS_S) or self._pipe.recv() != "ready":
            raise TransientError(
                "the process that would put things right after a crash did not start",
                hint="run the step again",
            )
        self._pipe.send(limit_s)

    def dismiss(self) -> None:
        """Let it go: nothing is left that it could put right."""
        with suppress(OSError):
            self._pipe.send(None)


@contextmanager
def _warden(at: Context, id_: int, lease: Lease, before: ShardState) -> Iterator[Warden]:
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(
        target=_stand_by, args=(there, at.topology, id_, lease, before, at.actor), daemon=True
    )
    process.start()
    there.close()
    try:
        yield Warden(here)
    finally:
        here.close()
        process.join(5)  # it may go on longer: what is wrong then is wrong with the topology


def _stand_by(
    pipe: Connection, topology: str, id_: int, lease: Lease, before: ShardState, actor: Actor
) -> None:
    """Wait until the parent says that it is done, is gone, or takes too long."""
    os.setsid()  # what is sent to the parent's group is not for us
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    owner = f"warden of {lease.step}"
    with Context(topology, lambda _: None, actor, owner=owner) as at:
        try:
            at.control.resharding(id_)  # connected, so that it need not be done then
            pipe.send("ready")
            limit_s = pipe.recv()
            if limit_s is None or (pipe.poll(limit_s) and pipe.recv() is None):
                return
        except (EOFError, OSError):
            pass
        for _ in range(_WARDEN_TRIES):
            try:
                # Under the dead one's own lease: whoever took over meanwhile is left alone.
                with at.control.adopt(lease):
                    go_back(at, id_, before)
            except TransientError:
                time.sleep(1)
            else:
                return
