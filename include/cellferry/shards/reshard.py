"""The steps of a re-sharding, each one call that may be repeated after a kill at any line.

::

    plan ─ begin ─ copy ─ dual_write ─ catch_up ─ verify ─ cutover ─ watch ─ (TTL) ─ cleanup
                     └──────── abort ────────┘         └── roll_back ──┘

No step leaves anything running. What a step knows of the servers ends with its process: a step
that follows changes opens its feeds first, then compares everything, then follows. What must
outlive a step is in the topology: the state and its epoch, the plan, checkpoints, facts.

`copy` is what makes the others short; none of them relies on it. Where the authority changes sides
(`cutover`, `roll_back`) is `cellferry.shards.switching`.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from cellferry.errors import (
    Blocked,
    InvalidInput,
    VerificationFailed,
    WrongState,
)
from cellferry.model import Actor
from cellferry.shards import cleanup as cleaning
from cellferry.shards import copier, planning
from cellferry.shards import verify as verifying
from cellferry.shards.check_list import Check, check
from cellferry.shards.context import Context, Progress, StepResult, fence
from cellferry.shards.leases import Lease
from cellferry.shards.plan import Plan
from cellferry.shards.points import Point, reach
from cellferry.shards.postgres_server import PostgresShard
from cellferry.shards.progress import Moved
from cellferry.shards.record import Resharding
from cellferry.shards.settings import ShardSet, check_servers
from cellferry.shards.states import ENDING, ShardState
from cellferry.shards.switching import PAUSE_S, following, put_right, switch
from cellferry.shards.watch import BASELINE_S, Limits, compare
from cellferry.stores.throttle import Throttle

TTL_S = 14 * 24 * 3600.0
"""How long the old owners keep their copies, as the runbook has it."""
_OLD, _DUAL_OLD, _DUAL_NEW, _NEW = (
    ShardState.OLD,
    ShardState.DUAL_READ_OLD,
    ShardState.DUAL_READ_NEW,
    ShardState.NEW,
)
_ASK_EVERY_S = 0.5


def register(at: Context, shard_set: ShardSet) -> None:
    """Record a set as its clients have it now. Repeatable. Makes the tables of PostgreSQL shards.

    Raises:
        InvalidInput: it is recorded otherwise already, or two of its connections are one server.
    """
    check_servers([shard_set], at.source)
    if shard_set.kind == "postgres":
        for name, url in at.urls(shard_set).items():
            shard = PostgresShard(url, name)
            try:
                shard.install()
            finally:
                shard.close()
    at.control.register_set(shard_set, at.actor)


def plan(
    at: Context,
    target: ShardSet,
    *,
    throttle_keys_s: float | None = None,
    sample: int | None = None,
    headroom: float = planning.HEADROOM,
) -> Plan:
    """Say what would move, how long it would take, and what speaks against it. Changes nothing.

    Args:
        throttle_keys_s: what the estimate reckons with; moved keys a second.
        sample: how many keys of each shard to look at; None looks at all.

    Raises:
        InvalidInput: the set is unknown, or another vnode label fits the live keys.
        Blocked: no known label does.
        Unreachable: a shard did not answer.
    """
    old = at.control.set(target.name)
    return planning.plan(
        old,
        target,
        at.source,
        throttle_keys_s=throttle_keys_s,
        sample=sample,
        headroom=headroom,
    )


def begin(at: Context, planned: Plan, *, ttl_s: float = TTL_S) -> StepResult:
    """Record the re-sharding, in state `old`. Clients hear of it and act as before.

    Repeated with the same plan it returns the one that is live.

    Raises:
        Blocked: the plan has blockers.
        InvalidInput: the plan is older than the set.
        WrongState: another re-sharding of the set is live.
    """
    planned.refuse()
    name = planned.old.name
    live = at.control.live(name)
    if live is not None and Plan.from_document(live.plan).hash == planned.hash:
        return _result(live, "it has begun already")
    begun = at.control.begin(
        name, planned.new, planned.document(), at.actor, ttl_s, planned_on=planned.old
    )
    reach(Point.BEGUN)
    return _result(begun, f"re-sharding {begun.id} has begun; nothing is moved yet")


def copy(at: Context, id_: int, shard: str, *, throttle_keys_s: float | None = None) -> StepResult:
    """Copy what moves from one source shard, or go on with it. Clients act as before.

    Several sources may be copied at once, each by a process.

    Args:
        throttle_keys_s: moved keys a second, of this source alone; None is as fast as it goes.

    Raises:
        InvalidInput: no such source.
        WrongState: the authority is at the new owners already.
        PermanentError: a destination has no memory left.
        Unreachable: repeat it, it goes on.
    """
    found = at.control.resharding(id_)
    planned = _plan_of(found)
    if shard not in planned.sources:
        raise InvalidInput(
            f"nothing moves from shard {shard!r}", hint=f"choose of {', '.join(planned.sources)}"
        )
    _insist(found, _OLD, _DUAL_OLD, step="copy")
    with at.lease(id_, "copy", part=shard) as lease:
        # Until the lease was ours, another step may have given the authority away.
        _insist(put_right(at, at.control.resharding(id_)), _OLD, _DUAL_OLD, step="copy")
        reach(Point.COPY_BEGUN)
        done = copier.copy(
            planned,
            shard,
            at.source,
            fence=fence(lease),
            checkpoints=at.control.checkpoints(id_),
            throttle=None if throttle_keys_s is None else Throttle(throttle_keys_s),
            progress=lambda told: at.tell(Progress.of("copy", told)),
            check=_pulse(lease),
        )
        reach(Point.COPIED)
        at.control.record(id_, {f"copied {shard}": done.document()})
    return _result(
        at.control.resharding(id_),
        f"copied {done.keys:,} keys from {shard}"
        + (", gone on from a checkpoint" if done.resumed else ""),
        done.document(),
    )


def copy_all(
    at: Context, id_: int, *, throttle_keys_s: float | None = None, processes: int | None = None
) -> StepResult:
    """Copy from all sources at once, each in a process; see `copy`.

    Args:
        throttle_keys_s: moved keys a second, of all together.
        processes: at most so many at once; None is one for each source.
    """
    found = at.control.resharding(id_)
    planned = _plan_of(found)
    begun = time.monotonic()
    rates = copier.shares(planned, throttle_keys_s)
    # One process imports everything, and each worker is forked from that.
    workers = multiprocessing.get_context("forkserver")
    workers.set_forkserver_preload([__name__])
    told = workers.Queue()
    urls = at.urls(found.old, found.new)
    with ProcessPoolExecutor(
        processes or max(1, len(planned.sources)),
        mp_context=workers,
        initializer=_begin_worker,
        initargs=(told,),
    ) as pool:
        futures = {
            shard: pool.submit(
                _copy_in_worker, at.topology, urls, at.actor, at.owner, id_, shard, rates[shard]
            )
            for shard in planned.sources
        }
        while not all(one.done() for one in futures.values()):
            try:
                at.tell(told.get(timeout=0.1))
            except queue.Empty:
                continue
    results = {shard: one.result() for shard, one in futures.items()}
    keys = sum(one.facts["keys"] for one in results.values())
    sent = sum(one.facts["sent"] for one in results.values())
    seconds = time.monotonic() - begun
    resumed = any(one.facts["resumed"] for one in results.values())
    return _result(
        at.control.resharding(id_),
        f"copied {keys:,} keys from {', '.join(results)} in {seconds:,.1f} s"
        + (f", {sent:,} of them now, gone on from checkpoints" if resumed else ""),
        {
            "keys": keys,
            "sent": sent,
            "seconds": round(seconds, 3),
            "sources": {shard: dict(one.facts) for shard, one in results.items()},
        },
    )


_told: Any = None
_parent = 0


def _begin_worker(told: Any) -> None:
    global _told, _parent
    _told, _parent = told, os.getppid()


def _copy_in_worker(
    topology: str,
    urls: Mapping[str, str],
    actor: Actor,
    owner: str,
    id_: int,
    shard: str,
    rate: float | None,
) -> StepResult:
    def tell(progress: Progress) -> None:
        if os.getppid() != _parent:
            os._exit(1)  # whoever asked for this is gone, and will ask again
        _told.put(progress)

    with Context(topology, urls.get, actor, owner=owner, listener=tell) as at:
        return copy(at, id_, shard, throttle_keys_s=rate)


def dual_write(at: Context, id_: int) -> StepResult:
    """Let clients write claims at both owners, and wait until all of them do.

    Raises:
        ClientsBehind: a client does not acknowledge it; repeat it.
        WrongState: it is past that.
    """
    with at.lease(id_, "dual-write") as lease:
        found = put_right(at, at.control.resharding(id_))
        _insist(found, _OLD, _DUAL_OLD, step="dual-write")
        at.wait_acknowledged(id_, lease)
        if found.state is _OLD:
            at.control.record(id_, {ENDING: None, "verified": None})
        at.control.advance(id_, _OLD, _DUAL_OLD, at.actor)
        reach(Point.DUAL_SET)
        seconds = at.wait_acknowledged(id_, lease)
    clients = len(at.control.clients(id_))
    return _result(
        at.control.resharding(id_),
        f"{clients} clients write at both owners since {seconds:.2f} s after it was set",
        {"clients": clients, "acknowledged_s": round(seconds, 3)},
    )


def catch_up(at: Context, id_: int) -> StepResult:
    """Compare everything, bring over what differs, and follow until little is left.

    Says how long it takes and whether it converges; the cutover does the same again.

    Raises:
        NotConverging: keys change faster than rounds can follow.
        WrongState: clients do not write at both owners.
    """
    with at.lease(id_, "catch-up") as lease:
        found = put_right(at, at.control.resharding(id_))
        _insist(found, _OLD, _DUAL_OLD, step="catch-up")
        begun = time.monotonic()
        with following(at, _plan_of(found), lease) as followers:
            facts = followers.catch_up()
        facts = {**facts, "seconds": round(time.monotonic() - begun, 3), "at": _now()}
        reach(Point.CAUGHT_UP)
        at.control.record(id_, {"caught_up": facts})
    swept = facts["swept"]
    return _result(
        at.control.resharding(id_),
        f"compared {swept['compared']:,} keys, brought {swept['brought']:,} over"
        + (f", then in {facts['rounds']} rounds what changed meanwhile" if facts["rounds"] else "")
        + f"; {facts['pending']:,} keys were waiting in the end",
        facts,
    )


def verify(at: Context, id_: int, *, sample: int | None = None) -> StepResult:
    """Compare every moved key with its copy: value and absolute expiry.

    First what has changed since the last step is brought over, and what changes meanwhile as well;
    then everything is read again. Works in every state: the side without authority is compared with
    the one that has it.

    Args:
        sample: compare so many keys of each source only. Says which share of wrong keys that can
            overlook, and is no reason for the cutover to go on.

    Raises:
        VerificationFailed: keys differ; names some.
    """
    with at.lease(id_, "verify") as lease:
        found = put_right(at, at.control.resharding(id_))
        planned = _plan_of(found)
        if found.state in (_DUAL_NEW, _NEW):
            planned = planned.turned()
        caught_up: Mapping[str, Any] = {"swept": {"brought": 0}}

        def tell(told: Moved) -> None:
            at.tell(Progress.of("verify", told))

        if sample is None:
            with following(at, planned, lease) as followers:
                caught_up = followers.catch_up()
                results = followers.each(
                    lambda one: verifying.verify(
                        planned, one.shard, at.source, follower=one, progress=tell
                    )
                )
        else:
            with ThreadPoolExecutor(max(1, len(planned.sources))) as pool:
                results = list(
                    pool.map(
                        lambda shard: verifying.verify(
                            planned, shard, at.source, sample=sample, progress=tell
                        ),
                        planned.sources,
                    )
                )
        compared = sum(one.compared for one in results)
        wrong = sum(one.mismatches for one in results)
        facts: dict[str, Any] = {
            "compared": compared,
            "mismatches": wrong,
            "in_flight": sum(one.in_flight for one in results),
            "complete": sample is None,
            "state": str(found.state),
            "at": _now(),
            "bound": max((one.bound for one in results), default=0.0),
            "brought": caught_up["swept"]["brought"],
            "names": [name for one in results for name in one.names][:20],
        }
        reach(Point.VERIFIED)
        if sample is None:
            at.control.record(id_, {"verified": facts})
    if wrong:
        some = ", ".join(f"{one['key']} ({one['what']})" for one in facts["names"][:3])
        raise VerificationFailed(
            f"{wrong:,} of {compared:,} compared keys differ, among them {some}",
            hint="run catch-up and verify again; if it stays, look for who writes past the clients",
            step="verify",
            where=f"shard set {found.set_name}",
        )
    if sample is None:
        summary = f"compared {compared:,} keys: all equal"
    else:
        summary = (
            f"compared a sample of {compared:,} keys: all equal; with 95% confidence at most"
            f" {facts['bound']:.3%} of all differ"
        )
    return _result(at.control.resharding(id_), summary, facts)


def cutover(at: Context, id_: int, *, pause_s: float = PAUSE_S) -> StepResult:
    """Give the authority to the new owners; clients go on, values wait for some milliseconds.

    The check list comes first. Repeated after it succeeded it changes nothing.

    Args:
        pause_s: after how long it is given up while values wait; see `switching`.

    Raises:
        Blocked: something of the check list is not as it must be.
        WrongState: it does not fit.
        TransientError, NotConverging: nothing has changed; repeat it.
    """
    with at.lease(id_, "cutover") as lease:
        found = put_right(at, at.control.resharding(id_))
        if found.state in (_DUAL_NEW, _NEW):
            at.wait_acknowledged(id_, lease)
            return _result(found, "the new owners have the authority already")
        _insist(found, _DUAL_OLD, step="cutover")
        at.wait_acknowledged(id_, lease)
        failed = [one for one in check(at, id_) if not one.ok]
        if failed:
            raise Blocked(
                "; ".join(f"{one.name}: {one.detail}" for one in failed),
                hint="; ".join(dict.fromkeys(one.remedy for one in failed if one.remedy)),
                step="cutover",
                where=f"shard set {found.set_name}",
            )
        before = at.control.figures(found.set_name, within_s=BASELINE_S)
        at.control.record(id_, {"baseline": before.as_dict()})
        switched = switch(at, found, lease, pause_s=pause_s)
    facts = dict(switched.facts.get("switched_to_new") or {})
    return _result(
        switched,
        "the new owners have the authority; values waited at most"
        f" {facts.get('pause_s', 0) * 1000:,.0f} ms",
        facts,
    )


def watch(at: Context, id_: int, *, seconds: float, limits: Limits | None = None) -> StepResult:
    """Compare what clients report with before the cutover; then end double writing.

    Raises:
        Breached: they are worse off; `roll_back` brings everything back.
        WrongState: before the cutover.
    """
    bounds = limits or Limits()
    with at.lease(id_, "watch") as lease:
        found = put_right(at, at.control.resharding(id_))
        if found.state is _NEW:
            at.wait_acknowledged(id_, lease)
            return _result(found, "it was watched already")
        _insist(found, _DUAL_NEW, step="watch")
        at.wait_acknowledged(id_, lease)
        facts = compare(at, found, lease, seconds, bounds)
        reach(Point.WATCHED)
        at.control.record(id_, {"watched": facts})
        at.control.advance(id_, _DUAL_NEW, _NEW, at.actor, "all is well")
        reach(Point.NEW_SET)
        at.wait_acknowledged(id_, lease)
    new = at.control.resharding(id_)
    until = f"{new.ttl_until:%Y-%m-%d %H:%M:%S} UTC" if new.ttl_until else "?"
    return _result(
        new,
        f"{facts['note']}; clients use the new owners alone, clean-up not before {until}",
        facts,
    )


def roll_back(at: Context, id_: int, reason: str, *, pause_s: float = PAUSE_S) -> StepResult:
    """Give the authority back to the old owners, with everything that happened since.

    Possible until clean-up has begun. Afterwards the re-sharding is in state `old`: `cleanup`
    removes the copies and ends it, `dual_write` tries again.

    Raises:
        InvalidInput: no reason.
        WrongState: before the cutover (`abort`), or clean-up has begun.
        TransientError, NotConverging: nothing has changed; repeat it.
    """
    _insist_on_reason(reason, "roll back")
    with at.lease(id_, "roll-back") as lease:
        found = put_right(at, at.control.resharding(id_))
        if found.facts.get("cleaning"):
            raise WrongState(
                "clean-up has begun: the old owners' copies are not complete any more",
                hint="let clean-up end; then re-shard the other way",
                step="roll-back",
            )
        if found.facts.get(ENDING) != "rolled_back":
            _insist(found, _DUAL_NEW, _NEW, step="roll-back")
            at.control.record(id_, {ENDING: "rolled_back", "reason": reason})
            reach(Point.WAY_BACK_BEGUN)
        at.wait_acknowledged(id_, lease)
        if found.state is _NEW:
            found = at.control.advance(id_, _NEW, _DUAL_NEW, at.actor, reason)
            at.wait_acknowledged(id_, lease)
        if found.state is _DUAL_NEW:
            found = switch(at, found, lease, pause_s=pause_s)
        if found.state is _DUAL_OLD:
            found = at.control.advance(id_, _DUAL_OLD, _OLD, at.actor, reason)
            reach(Point.OLD_SET)
        at.wait_acknowledged(id_, lease)
    facts = dict(found.facts.get("switched_to_old") or {})
    return _result(
        at.control.resharding(id_),
        "the old owners have the authority again, with every change since the cutover; values"
        f" waited at most {facts.get('pause_s', 0) * 1000:,.0f} ms",
        facts,
    )


def abort(at: Context, id_: int, reason: str) -> StepResult:
    """Give a re-sharding up before its cutover, remove the copies, and end it.

    Raises:
        InvalidInput: no reason.
        WrongState: after the cutover; `roll_back` loses nothing then.
    """
    _insist_on_reason(reason, "abort")
    found = at.control.resharding(id_)
    if found.ended == "aborted":
        return _result(found, "it was aborted already")
    with at.lease(id_, "abort") as lease:
        found = put_right(at, at.control.resharding(id_))
        if found.state in (_DUAL_NEW, _NEW) or found.facts.get(ENDING) == "rolled_back":
            raise WrongState(
                f"re-sharding {id_} is past its cutover, in state {found.state}",
                hint=f"cellferry reshard roll-back {found.set_name} --reason …",
                step="abort",
            )
        at.control.record(id_, {ENDING: "aborted", "reason": reason})
        at.wait_acknowledged(id_, lease)
        if found.state is _DUAL_OLD:
            at.control.advance(id_, _DUAL_OLD, _OLD, at.actor, reason)
            reach(Point.OLD_SET)
            at.wait_acknowledged(id_, lease)
        return _clean(at, at.control.resharding(id_), lease)


def cleanup(
    at: Context,
    id_: int,
    *,
    batch: int = 1000,
    throttle_keys_s: float | None = None,
    wait_s: float | None = None,
    delete_kept: bool = False,
) -> StepResult:
    """Remove the copies at the owners that have no authority any more, and end the re-sharding.

    After the cutover that waits until the TTL is over; after a roll-back it need not. Only keys
    that exist at their owner, or have expired, are removed; the others are counted and named.

    Args:
        batch: keys in one deletion.
        throttle_keys_s: keys a second, of each source.
        wait_s: wait here until so long after the clients left the old owners, instead of refusing
            before the TTL is over.
        delete_kept: also remove what their owner does not have, because it was deleted there since
            the cutover; refused where there is so much of it that the owner seems to have lost it.

    Raises:
        WrongState: it is not time for it.
    """
    found = at.control.resharding(id_)
    if found.ended is not None:
        return _result(found, f"it was {found.ended} already")
    if found.state is _OLD and found.facts.get(ENDING) is None:
        raise WrongState(
            f"re-sharding {id_} has not begun to move authority: there is nothing to clean",
            hint=f"cellferry reshard status {found.set_name}",
            step="cleanup",
        )
    _insist(found, _OLD, _NEW, step="cleanup")
    while (left := seconds_to_wait(found, wait_s)) > 0:
        if wait_s is None:
            raise WrongState(
                f"the old copies are kept until {found.ttl_until:%Y-%m-%d %H:%M:%S} UTC",
                hint="wait with --wait-ttl; until then a roll-back loses nothing",
                step="cleanup",
            )
        at.tell(Progress("cleanup", "", int(left), None, "s", "until the TTL is over"))
        time.sleep(min(left, 5.0))
        found = at.control.resharding(id_)
        _insist(found, _NEW, step="cleanup")
    with at.lease(id_, "cleanup") as lease:
        found = put_right(at, at.control.resharding(id_))
        _insist(found, _OLD, _NEW, step="cleanup")
        at.wait_acknowledged(id_, lease)
        if found.state is _NEW:
            at.control.record(id_, {"cleaning": True})
        return _clean(
            at,
            found,
            lease,
            batch=batch,
            throttle_keys_s=throttle_keys_s,
            delete_kept=delete_kept or found.state is _OLD,
        )


def run_on(
    at: Context,
    id_: int,
    *,
    throttle_keys_s: float | None = None,
    watch_s: float = 60.0,
    limits: Limits | None = None,
    may_cut_over: Callable[[Sequence[Check]], bool] = lambda _: True,
) -> Iterator[StepResult]:
    """Do what is left until the clients use the new owners alone, yielding each step's result.

    Args:
        may_cut_over: asked with the check list before the cutover; refused, it ends there.
    """
    state = at.control.resharding(id_).state
    if state is _OLD:
        yield copy_all(at, id_, throttle_keys_s=throttle_keys_s)
        yield dual_write(at, id_)
    if state in (_OLD, _DUAL_OLD, ShardState.SWITCHING):
        yield catch_up(at, id_)
        yield verify(at, id_)
        if not may_cut_over(check(at, id_)):
            return
        yield cutover(at, id_)
    yield watch(at, id_, seconds=watch_s, limits=limits)


def seconds_to_wait(found: Resharding, kept_s: float | None = None) -> float:
    """Return for how long the old owners' copies are still kept.

    Args:
        kept_s: how long they are kept in all; None is the re-sharding's TTL.
    """
    if found.state is not _NEW or found.ttl_left_s is None:
        return 0.0
    more = 0.0 if kept_s is None else kept_s - found.ttl_s
    return found.ttl_left_s + more


def _clean(
    at: Context,
    found: Resharding,
    lease: Lease,
    *,
    batch: int = 1000,
    throttle_keys_s: float | None = None,
    delete_kept: bool = True,
) -> StepResult:
    planned = _plan_of(found)
    outcome = "completed" if found.state is _NEW else str(found.facts[ENDING])
    if found.state is _OLD:
        planned = planned.turned()
    begun = time.monotonic()

    def clean(shard: str) -> cleaning.CleanupResult:
        return cleaning.cleanup(
            planned,
            shard,
            at.source,
            fence=fence(lease),
            batch=batch,
            delete_kept=delete_kept,
            throttle=None if throttle_keys_s is None else Throttle(throttle_keys_s),
            progress=lambda told: at.tell(Progress.of(lease.step, told)),
        )

    with ThreadPoolExecutor(max(1, len(planned.sources))) as pool:
        results = []
        for one in pool.map(clean, planned.sources):
            results.append(one)
            reach(Point.CLEANED_ONE)
    lease.check()
    cleaning.tidy(planned, at.source)
    facts: dict[str, Any] = {
        "removed": sum(one.removed for one in results),
        "expired": sum(one.expired for one in results),
        "kept": sum(one.kept for one in results),
        "deleted": sum(one.deleted for one in results),
        "kept_names": [name for one in results for name in one.kept_names][:20],
        "seconds": round(time.monotonic() - begun, 3),
        "at": _now(),
    }
    at.control.record(found.id, {"cleaned": facts})
    reach(Point.CLEANED)
    at.wait_acknowledged(found.id, lease)
    ended = at.control.finish(found.id, at.actor, outcome, str(found.facts.get("reason") or ""))
    kept = f"; kept {facts['kept']:,} that their owner does not have" if facts["kept"] else ""
    if facts["deleted"]:
        kept = f", and {facts['deleted']:,} that their owner does not have any more"
    return _result(
        ended, f"{outcome.replace('_', ' ')}: removed {facts['removed']:,} old copies{kept}", facts
    )


def _result(found: Resharding, summary: str, facts: Mapping[str, Any] | None = None) -> StepResult:
    return StepResult(found.set_name, found.id, found.state, summary, facts or {})


def _plan_of(found: Resharding) -> Plan:
    return Plan.from_document(found.plan)


def _insist(found: Resharding, *states: ShardState, step: str) -> None:
    if found.ended is None and found.state in states:
        return
    needed = " or ".join(str(one) for one in states)
    raise WrongState(
        f"re-sharding {found.id} is {found.ended or f'in state {found.state}'}, and {step} needs"
        f" {needed}",
        hint=f"`cellferry reshard status {found.set_name}` says what comes next",
        step=step,
        where=f"shard set {found.set_name}",
    )


def _insist_on_reason(reason: str, what: str) -> None:
    if not reason.strip():
        raise InvalidInput(f"to {what} needs a reason", hint="say why, for the audit")


def _pulse(lease: Lease) -> Callable[[], None]:
    """Return what asks a few times a second, at most, whether the lease is still ours."""
    asked = float("-inf")

    def check_lease() -> None:
        nonlocal asked
        if time.monotonic() - asked > _ASK_EVERY_S:
            asked = time.monotonic()
            lease.check()

    return check_lease


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
