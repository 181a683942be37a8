"""The forms of `reshard` and `roll_back_resharding`, and their strict reading."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from airflow.sdk import Param
from pydantic import Field, ValidationError

from cellferry.errors import InvalidInput
from cellferry.orchestration.params import (
    AFTER,
    PAUSE,
    SPEED,
    WHAT,
    StrictRequest,
    dry_run_param,
    name_faults,
    refuse_unknown,
)

if TYPE_CHECKING:
    from cellferry.shards.placement import Shard
    from cellferry.shards.settings import ShardSet

#: Each is a mapped task, whose number Airflow bounds, and a server that is looked at.
SHARDS_AT_MOST = 256
_PLACEMENT = "Placement"
_CLEAN_UP = "Clean-up"
_SAME = "as now"

#: `shard-3`, `shard-3=dedup-3`, `shard-3=dedup-3*2`, `shard-3*2`.
_SHARD = re.compile(
    r"(?P<name>[^=*\s]+)\s*(?:=\s*(?P<connection>[^=*\s]+))?\s*(?:\*\s*(?P<weight>\d+(?:\.\d+)?))?"
)


def reshard_params() -> dict[str, Param]:
    """Return the form of `reshard`."""
    return {
        "shard_set": _shard_set_param(),
        "shards": Param(
            [],
            type="array",
            items={"type": "string", "minLength": 1, "maxLength": 400},
            minItems=1,
            maxItems=SHARDS_AT_MOST,
            uniqueItems=True,
            title="Shards",
            description=(
                "All shards as they should be, one a line. shard-0: stays as it is. "
                "shard-3=dedup-3: a new one, or a replaced server, behind the connection dedup-3. "
                "shard-3=dedup-3*2: with twice the weight. Who is not named goes."
            ),
            section=WHAT,
        ),
        "dry_run": dry_run_param(
            "On: only plan. The report says what would move, how long it would take and what "
            "speaks against it; nothing is changed. Switch it off to re-shard."
        ),
        "approval": Param(
            "none",
            type="string",
            enum=["none", "copy", "cutover", "both"],
            values_display={
                "none": "none: go through",
                "copy": "copy: ask before anything is copied",
                "cutover": "cutover: ask before the new owners get the authority",
                "both": "both: ask twice",
            },
            title="Approval",
            description="Where the run waits for a person: see its Required Actions.",
            section=WHAT,
        ),
        "keys_per_s": Param(
            None,
            type=["null", "number"],
            minimum=1,
            maximum=10_000_000,
            title="Moved keys per second, at most",
            description="Throttle of the copy, all sources together. Empty: none. Example: 20000.",
            section=SPEED,
        ),
        "sample": Param(
            None,
            type=["null", "integer"],
            minimum=1_000,
            maximum=1_000_000_000,
            title="Sample for the plan",
            description="Keys of each shard that the plan looks at. Empty: all. It is only an "
            "estimate then; copy and verify always take all.",
            section=SPEED,
        ),
        "headroom": Param(
            0.5,
            type="number",
            minimum=0,
            maximum=0.95,
            title="Headroom",
            description="Share of its memory that a shard must have free afterwards.",
            section=SPEED,
        ),
        "algorithm": Param(
            _SAME,
            type="string",
            enum=[_SAME, "ring", "jump", "rendezvous"],
            title="Algorithm",
            description="How keys are placed. Another one moves nearly all of them.",
            section=_PLACEMENT,
        ),
        "vnodes": Param(
            None,
            type=["null", "integer"],
            minimum=1,
            maximum=100_000,
            title="Virtual nodes",
            description="Of the ring, for each shard of weight 1. Empty: as now, or 150.",
            section=_PLACEMENT,
        ),
        "label": Param(
            None,
            type=["null", "string"],
            minLength=1,
            maxLength=200,
            title="Label of virtual nodes",
            description="Of the ring. Empty: as now, or {shard}-{vnode}.",
            section=_PLACEMENT,
        ),
        "pause_s": _pause_param(),
        "watch_s": Param(
            300,
            type="number",
            minimum=0,
            maximum=86_400,
            title="Watch (s)",
            description="How long the clients' hit ratio and errors are compared with before the "
            "cutover, while both owners are still written.",
            section=AFTER,
        ),
        "hit_ratio_drop": Param(
            0.1,
            type="number",
            minimum=0,
            maximum=1,
            title="Hit ratio, at most lower by",
            description="Of 1. More claims that are found free than before: ids were forgotten.",
            section=AFTER,
        ),
        "error_rise": Param(
            0.001,
            type="number",
            minimum=0,
            maximum=1,
            title="Errors, at most more by",
            description="Of 1: the share of the clients' operations that may fail more than "
            "before.",
            section=AFTER,
        ),
        "least_claims": Param(
            200,
            type="integer",
            minimum=1,
            maximum=1_000_000_000,
            title="Claims to judge by",
            description="With fewer reported ones nothing is judged.",
            section=AFTER,
        ),
        "ttl_s": Param(
            14 * 86_400,
            type="number",
            minimum=0,
            maximum=90 * 86_400,
            title="TTL (s)",
            description="From the watch's end to the clean-up of the old owners' copies: how long "
            "a roll-back loses nothing. The run waits for it, without a worker. Default: 14 days.",
            section=AFTER,
        ),
        **_clean_up_params(),
        "delete_kept": Param(
            False,
            type="boolean",
            title="Delete what the new owner deleted",
            description="Remove old copies, too, of keys that are no longer at their new owner. "
            "Off: they are kept, counted and named.",
            section=_CLEAN_UP,
        ),
    }


def roll_back_resharding_params() -> dict[str, Param]:
    """Return the form of `roll_back_resharding`."""
    return {
        "shard_set": _shard_set_param(),
        "reason": Param(
            type="string",
            minLength=3,
            maxLength=1_000,
            title="Reason",
            description="Why. It goes into the audit.",
            examples=["the hit ratio fell since the cutover"],
            section=WHAT,
        ),
        "dry_run": dry_run_param(
            "On: only say where the re-sharding is and what would be done; nothing is changed. "
            "Switch it off to go back."
        ),
        "pause_s": _pause_param(),
        **_clean_up_params(),
    }


def _shard_set_param() -> Param:
    return Param(
        type="string",
        minLength=1,
        maxLength=63,
        title="Shard set",
        description="Its name, as cellferry reshard status shows it.",
        examples=["dedup"],
        section=WHAT,
    )


def _pause_param() -> Param:
    return Param(
        10,
        type="number",
        minimum=0.1,
        maximum=600,
        title="Pause (s)",
        description="How long the last changes may take while values and counters wait; claims go "
        "on. Past it the old state is set again, and the task tries later.",
        section=PAUSE,
    )


def _clean_up_params() -> dict[str, Param]:
    return {
        "clean_up_keys_per_s": Param(
            None,
            type=["null", "number"],
            minimum=1,
            maximum=10_000_000,
            title="Deleted keys per second, at most",
            description="Of each shard. Empty: as fast as it goes. Example: 5000.",
            section=_CLEAN_UP,
        ),
        "clean_up_batch": Param(
            1_000,
            type="integer",
            minimum=1,
            maximum=100_000,
            title="Keys in a deletion",
            description="Keys that are deleted by one command.",
            section=_CLEAN_UP,
        ),
    }


class ReshardRequest(StrictRequest):
    """A checked request of `reshard`; says nothing yet of what exists."""

    shard_set: str = Field(min_length=1, max_length=63)
    shards: list[str] = Field(min_length=1, max_length=SHARDS_AT_MOST)
    dry_run: bool = True
    approval: Literal["none", "copy", "cutover", "both"] = "none"
    keys_per_s: float | None = Field(None, ge=1, le=10_000_000)
    sample: int | None = Field(None, ge=1_000, le=1_000_000_000)
    headroom: float = Field(0.5, ge=0, le=0.95)
    algorithm: Literal["as now", "ring", "jump", "rendezvous"] = "as now"
    vnodes: int | None = Field(None, ge=1, le=100_000)
    label: str | None = Field(None, min_length=1, max_length=200)
    pause_s: float = Field(10, ge=0.1, le=600)
    watch_s: float = Field(300, ge=0, le=86_400)
    hit_ratio_drop: float = Field(0.1, ge=0, le=1)
    error_rise: float = Field(0.001, ge=0, le=1)
    least_claims: int = Field(200, ge=1, le=1_000_000_000)
    ttl_s: float = Field(14 * 86_400, ge=0, le=90 * 86_400)
    clean_up_keys_per_s: float | None = Field(None, ge=1, le=10_000_000)
    clean_up_batch: int = Field(1_000, ge=1, le=100_000)
    delete_kept: bool = False


class RollBackReshardingRequest(StrictRequest):
    """A checked request of `roll_back_resharding`; says nothing yet of what exists."""

    shard_set: str = Field(min_length=1, max_length=63)
    reason: str = Field(min_length=3, max_length=1_000)
    dry_run: bool = True
    pause_s: float = Field(10, ge=0.1, le=600)
    clean_up_keys_per_s: float | None = Field(None, ge=1, le=10_000_000)
    clean_up_batch: int = Field(1_000, ge=1, le=100_000)


Request = TypeVar("Request", ReshardRequest, RollBackReshardingRequest)


def read_reshard_request(params: Mapping[str, Any]) -> ReshardRequest:
    """Read the Params of `reshard` strictly.

    Raises:
        InvalidInput: a Param is unknown, missing, of the wrong type or out of bounds. All faults
            are named.
    """
    return _read(ReshardRequest, params, reshard_params())


def read_roll_back_resharding_request(params: Mapping[str, Any]) -> RollBackReshardingRequest:
    """Read the Params of `roll_back_resharding` strictly.

    Raises:
        InvalidInput: as `read_reshard_request`; or the reason is blank.
    """
    request = _read(RollBackReshardingRequest, params, roll_back_resharding_params())
    if not request.reason.strip():
        raise InvalidInput("Param 'reason' is blank", hint="say why, for the audit")
    return request


def _read(kind: type[Request], params: Mapping[str, Any], form: Mapping[str, Param]) -> Request:
    refuse_unknown(params, form)
    try:
        return kind.model_validate(dict(params))
    except ValidationError as error:
        raise InvalidInput(
            "; ".join(name_faults(error)), hint="correct the Params and trigger a new run"
        ) from None


def target_of(current: ShardSet, request: ReshardRequest) -> ShardSet:
    """Return the set as `request` wants it, from the set as it is.

    Raises:
        InvalidInput: a line of the shards cannot be read, names one a second time, or a new one
            without its connection; or the placement does not fit. All lines are named.
    """
    from cellferry.shards.placement import Shard
    from cellferry.shards.settings import ShardSet

    weights = {one.name: one.weight for one in current.placement.shards}
    shards: list[Shard] = []
    connections: dict[str, str] = {}
    faults: list[str] = []
    for line in request.shards:
        found = _SHARD.fullmatch(line.strip())
        if found is None:
            faults.append(f"{line!r} cannot be read")
            continue
        name, weight = found["name"], found["weight"]
        connection = found["connection"] or current.connections.get(name)
        if name in connections:
            faults.append(f"shard {name!r} is named twice")
        elif connection is None:
            faults.append(f"shard {name!r} is new: name its connection, {name}=CONNECTION")
        else:
            connections[name] = connection
            shards.append(Shard(name, float(weight) if weight else weights.get(name, 1.0)))
    if faults:
        raise InvalidInput(
            f"Param 'shards': {'; '.join(faults)}",
            hint="write NAME, NAME=CONNECTION or NAME=CONNECTION*WEIGHT, one shard a line",
        )
    return ShardSet(
        current.name,
        current.kind,
        current.key_prefix,
        _placement(current, request, tuple(shards)),
        connections,
    )


def _placement(current: ShardSet, request: ReshardRequest, shards: tuple[Shard, ...]) -> Any:
    from cellferry.shards.placement import LABEL, VNODES, Jump, Rendezvous, Ring

    now = current.placement.describe()
    algorithm = now["algorithm"] if request.algorithm == _SAME else request.algorithm
    if algorithm == "ring":
        return Ring(
            shards,
            request.vnodes or now.get("vnodes", VNODES),
            request.label or now.get("label", LABEL),
        )
    given = [name for name in ("vnodes", "label") if getattr(request, name) is not None]
    if given:
        raise InvalidInput(
            f"Param {given[0]!r}: {algorithm} has none",
            hint="leave vnodes and label empty, or choose the ring",
        )
    return Jump(shards) if algorithm == "jump" else Rendezvous(shards)
