"""The first tasks of `reshard` and `roll_back_resharding`, asked of the record of shard sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cellferry.errors import InvalidInput
from cellferry.orchestration.reshard_params import target_of
from cellferry.orchestration.shard_run import RUN, WAY_BACK_RUN, ask_connections
from cellferry.shards.states import ENDING

if TYPE_CHECKING:
    from cellferry.orchestration.reshard_params import ReshardRequest
    from cellferry.shards.context import Context
    from cellferry.shards.record import Resharding
    from cellferry.shards.settings import ShardSet


def check_reshard_request(
    at: Context,
    request: ReshardRequest,
    dag_run: str,
    is_running: Callable[[str], bool] = lambda _: False,
) -> tuple[ShardSet, Resharding | None]:
    """Return the set as it is wanted, and the re-sharding to go on with, if there is one.

    One that this very run has begun is gone on with, so that a run may be cleared as a whole; so
    is one to the same shards that a run which ended, or a command, has left.

    Args:
        dag_run: who asks, as `<dag>/<run>`.
        is_running: whether such a run is still under way.

    Raises:
        InvalidInput: no such set; a shard cannot be read, has no connection, or shares its server;
            the set is as wanted already; another re-sharding of it is live, is given up, or is
            another run's.
    """
    from cellferry.shards.settings import check_servers

    own = of_run(at, request.shard_set, RUN, dag_run)
    if own is not None and own.ended is not None:
        _refuse_given_up(own)
        return own.new, own
    current = at.control.set(request.shard_set)
    target = target_of(current, request)
    check_servers((current, target), at.source)
    live = at.control.live(request.shard_set)
    where = f"shard set {request.shard_set}"
    if live is None:
        if target.document() == current.document():
            raise InvalidInput(
                "the set has these shards already",
                hint="name all shards as they should be",
                where=where,
            )
        return target, None
    _refuse_given_up(live)
    if live.new.document() != target.document():
        raise InvalidInput(
            f"re-sharding {live.id} of this set is live and goes to other shards: "
            + ", ".join(f"{name}={one}" for name, one in live.new.connections.items()),
            hint="finish it, or bring it back with roll_back_resharding",
            where=where,
        )
    other = live.facts.get(RUN)
    if isinstance(other, str) and other != dag_run and is_running(other):
        raise InvalidInput(
            f"re-sharding {live.id} is under way in the run {other}",
            hint="clear the failed task there, with downstream, instead of starting another run",
            where=where,
        )
    return target, live


def _refuse_given_up(found: Resharding) -> None:
    ending = found.ended or found.facts.get(ENDING)
    if ending in (None, "completed"):
        return
    raise InvalidInput(
        f"re-sharding {found.id} of this set "
        + (f"was {ending}" if found.ended else f"is being {ending}").replace("_", " "),
        hint="trigger a new run"
        if found.ended
        else "run roll_back_resharding once more: it removes the copies and ends it",
        where=f"shard set {found.set_name}",
    )


def check_way_back(at: Context, set_name: str, dag_run: str) -> Resharding:
    """Return the re-sharding that can be brought back, or was by this very run.

    Raises:
        InvalidInput: no such set; no re-sharding of it is live; its clean-up has begun.
    """
    own = of_run(at, set_name, WAY_BACK_RUN, dag_run)
    if own is not None and own.ended is not None:
        return own
    at.control.set(set_name)
    live = at.control.live(set_name)
    if live is None:
        latest = at.control.reshardings(set_name)
        last = f"; re-sharding {latest[0].id} is {latest[0].ended}" if latest else ""
        raise InvalidInput(
            f"no re-sharding of this set is live{last}".replace("_", " "),
            hint="after a clean-up re-shard the other way: reshard, with the shards as they were",
            where=f"shard set {set_name}",
        )
    if live.facts.get("cleaning"):
        raise InvalidInput(
            f"clean-up of re-sharding {live.id} has begun: the old copies are not complete any "
            "more",
            hint="let it end, then re-shard the other way",
            where=f"shard set {set_name}",
        )
    ask_connections(at, live)
    return live


def of_run(at: Context, set_name: str, fact: str, dag_run: str) -> Resharding | None:
    """Return the newest re-sharding of a set that `dag_run` has left its name in."""
    for one in at.control.reshardings(set_name):
        if one.facts.get(fact) == dag_run:
            return one
    return None
