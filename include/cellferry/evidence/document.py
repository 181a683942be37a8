"""The JSON document of a pack, `cellferry-evidence/1`, as types; the JSON Schema comes from them.

Counts, hashes and positions are as recorded; nothing in it is a secret. A later cellferry may add
schema `/2`, and still reads `/1`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA: Literal["cellferry-evidence/1"] = "cellferry-evidence/1"

Json = dict[str, Any]
Moment = Annotated[str, Field(description="A moment in UTC, ISO 8601.")]
Seconds = Annotated[float, Field(ge=0, description="Seconds.")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Made(_Part):
    """When, by whom and with what the pack was made."""

    at: Moment
    by: str
    role: str
    cellferry: str
    python: str
    system: str


class OrganizationOf(_Part):
    """The organization that moved."""

    id: str
    slug: str


class MigrationOf(_Part):
    """The migration, as the topology had it."""

    id: int
    source: str
    destination: str
    strategy: str
    state: str
    epoch: Annotated[int, Field(description="Of the source's authority; the flip adds one.")]
    attempt: Annotated[int, Field(description="How often a controller took the migration over.")]
    created_at: Moment
    updated_at: Moment
    ttl_until: Moment | None
    superseded_by: int | None
    paused: bool
    halted: str | None
    last_error: str | None
    options: Json


class Estimate(_Part):
    """One figure of the plan against what happened; None where nothing was said or measured."""

    what: str
    unit: Literal["rows", "keys", "bytes", "s"]
    planned: float | None
    happened: float | None
    source: Annotated[str, Field(description="What the second figure is.")]


class Event(_Part):
    """One row of the audit."""

    id: int
    at: Moment
    action: str
    actor: str
    role: str
    from_state: str | None
    to_state: str | None
    epoch: int | None
    attempt: int | None
    reason: str | None
    evidence: Json
    dag_run: str | None
    try_number: int | None


class Span(_Part):
    """How long the migration was in one state; `until` is None for the last."""

    state: str
    since: Moment
    until: Moment | None
    seconds: Seconds


class VerifiedPart(_Part):
    """One table or kind of key, as it was planned and as both sides were compared."""

    part: str
    placement: str | None
    planned: int | None
    count: int | None
    source: str | None
    destination: str | None
    dirty: Annotated[int, Field(ge=0, description="Differed because being written just then.")]
    delta: Annotated[Json | None, Field(description="Count and hash of the last changes.")]


class StoreOf(_Part):
    """What one store's part of the move was."""

    store: str
    unit: str
    copied: Json | None
    rounds: list[Json]
    compared: int | None
    mismatches: int | None
    seconds: float | None
    under_the_gate: Annotated[Json | None, Field(description="The last delta, under the gate.")]
    deleted: int | None
    parts: list[VerifiedPart]


class ObservedPartOf(_Part):
    """One table or kind of key, counted and hashed when the pack was made."""

    part: str
    count: int
    hash: str
    first_expiry: Moment | None


class ObservedSide(_Part):
    """What one store of one cell held when the pack was made."""

    cell: str
    copy_of: Annotated[
        Literal["serving", "kept"],
        Field(description="Whether the organization writes here, or it is the old copy."),
    ]
    store: str
    unit: str
    position: Json
    at_work: Annotated[int, Field(description="Sessions of this migration's controllers then.")]
    parts: list[ObservedPartOf]
    error: str | None


class Position(_Part):
    """Where a server stood: LSN and timeline, or replication id and offset."""

    when: str
    cell: str
    store: str
    position: Json


class RouteChangeOf(_Part):
    """One change of authority of the organization."""

    epoch: int
    cell: str
    migration: int | None
    actor: str
    changed_at: Moment


class WritersPause(_Part):
    """What writers waited in the cutover, as they measured it."""

    writers: int
    seconds: list[Seconds]
    median: Seconds
    longest: Seconds


class Pause(_Part):
    """The write pause: as the controller saw it, and as writers did."""

    controller: Json | None
    controller_back: Annotated[Json | None, Field(description="Of a roll-back.")]
    writers: WritersPause | None


class ResourceOf(_Part):
    """Something that the migration made in a cell, and when it was removed."""

    cell: str
    store: str
    kind: str
    name: str
    made_at: Moment
    removed_at: Moment | None


class Versions(_Part):
    """What was running."""

    cellferry: str
    python: str
    topology: Json
    servers: Annotated[dict[str, str], Field(description="By cell/store.")]


class Evidence(_Part):
    """Everything that is known of one migration."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, title="Evidence of a migration"
    )

    schema_: Annotated[Literal["cellferry-evidence/1"], Field(alias="schema")] = SCHEMA
    made: Made
    organization: OrganizationOf
    migration: MigrationOf
    plan: Json
    estimates: list[Estimate]
    states: list[Span]
    timeline: Annotated[list[Event], Field(description="The audit's rows but the leases.")]
    stores: list[StoreOf]
    observed: Annotated[list[ObservedSide], Field(description="Empty unless an old copy is kept.")]
    positions: list[Position]
    routes: list[RouteChangeOf]
    pause: Pause
    approvals: list[Event]
    stops: Annotated[list[Event], Field(description="Pauses and halts, of its cells as well.")]
    resources: list[ResourceOf]
    versions: Versions
    audit: Annotated[list[Event], Field(description="All of the migration's, oldest first.")]
    facts: Annotated[Json, Field(description="What the steps recorded, as it is.")]
    gaps: Annotated[list[str], Field(description="What this pack cannot say, in plain words.")]


def json_schema() -> str:
    """Return the JSON Schema of `Evidence`, as it is shipped and put into each pack."""
    schema = Evidence.model_json_schema(by_alias=True)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["$id"] = f"urn:{SCHEMA.replace('/', ':')}"
    return json.dumps(schema, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def canonical(value: Any) -> bytes:
    """Return `value` as canonical JSON: sorted names, no white space, UTF-8, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()
