"""What a person may set when triggering a run: the forms' fields, and their strict reading.

Airflow checks the JSON schema of each Param, but accepts Params it does not know and starts with
the defaults of those that were meant. So the first task of a run reads them again, strictly.

A `Param` is written out here rather than derived from `MoveOptions`, because DAG files must not
import the steps; tests/dags/test_params.py checks that both agree.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from airflow.sdk import Param
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cellferry.errors import InvalidInput

if TYPE_CHECKING:
    from cellferry.migration import MoveOptions

#: A run of Airflow grows slow with the square of its size (docs/decisions/0003-runs-of-25.md).
ORGANIZATIONS_PER_RUN = 25
#: What one form may hold; it is split into runs of `ORGANIZATIONS_PER_RUN`.
ORGANIZATIONS_PER_REQUEST = 500
#: A run waits for TTLs up to this many seconds; longer ones get a clean-up run of their own.
LONGEST_TTL_IN_RUN_S = 3_600

#: Airflow's own section for fields without one: the only one that is open when the form appears.
WHAT = "Run Parameters"
SPEED = "How fast"
PAUSE = "Write pause"
AFTER = "Afterwards"
_WAVE = "When to stop"


def dry_run_param(what: str) -> Param:
    """Return the field that keeps a run from changing anything, unless it is switched off."""
    return Param(
        True,
        type="boolean",
        title="Dry run",
        description=what,
        section=WHAT,
    )


def migrate_organizations_params() -> dict[str, Param]:
    """Return the form of `migrate_organizations`."""
    return {
        "organizations": Param(
            [],
            type="array",
            items={"type": "string", "minLength": 1, "maxLength": 200},
            minItems=1,
            maxItems=ORGANIZATIONS_PER_REQUEST,
            uniqueItems=True,
            title="Organizations",
            description=(
                "Ids or slugs, one a line. At most "
                f"{ORGANIZATIONS_PER_REQUEST}; more than {ORGANIZATIONS_PER_RUN} are split into "
                "several runs."
            ),
            section=WHAT,
        ),
        "destination": Param(
            type="string",
            minLength=1,
            maxLength=63,
            title="Destination cell",
            description="Where they will live: a cell of cells.yaml.",
            examples=["cell-2", "cell-3"],
            section=WHAT,
        ),
        "dry_run": dry_run_param(
            "On: only plan. The report says what would move, how long it would take and what "
            "blocks it; nothing is changed. Switch it off to move."
        ),
        "strategy": Param(
            "auto",
            type="string",
            enum=["auto", "online", "freeze-first"],
            values_display={
                "auto": "auto: freeze-first for tiny organizations, else online",
                "online": "online: copied while they write, short write pause",
                "freeze-first": "freeze-first: writers wait for the whole copy",
            },
            title="Strategy",
            description="auto is right unless you know better.",
            section=WHAT,
        ),
        "rows_per_s": Param(
            None,
            type=["null", "number"],
            exclusiveMinimum=0,
            maximum=10_000_000,
            title="Rows per second, at most",
            description="Throttle of each organization's copy. Empty: none. Example: 20000.",
            section=SPEED,
        ),
        "keys_per_s": Param(
            None,
            type=["null", "number"],
            exclusiveMinimum=0,
            maximum=10_000_000,
            title="Redis keys per second, at most",
            description="Throttle of each organization's copy. Empty: none. Example: 5000.",
            section=SPEED,
        ),
        "latency_target_ms": Param(
            None,
            type=["null", "number"],
            minimum=0,
            maximum=60_000,
            title="Latency target (ms)",
            description="Moving slows down while the p95 of small writes and reads at one of the "
            "two cells is over it. Empty: never. 0: over 1.25 times what they take while nothing "
            "moves there.",
            section=SPEED,
        ),
        "batch_rows": Param(
            50_000,
            type="integer",
            minimum=100,
            maximum=500_000,
            title="Rows in a batch",
            description="Rows copied in one transaction; with rows_per_s about those of a "
            "second, at least 100. A killed copy repeats at most one batch of each stream.",
            section=SPEED,
        ),
        "copy_lanes": Param(
            2,
            type="integer",
            minimum=1,
            maximum=4,
            title="Tables copied at once",
            description="When an organization has more than 50,000 rows beside its largest table; "
            "each table has a connection of its own to each cell. 1 is gentler. With rows_per_s or "
            "latency_target_ms it is 1.",
            section=SPEED,
        ),
        "pause_budget_ms": Param(
            1_000,
            type="integer",
            minimum=20,
            maximum=600_000,
            title="Pause budget (ms)",
            description="A cutover starts only when its write pause is predicted to be shorter.",
            section=PAUSE,
        ),
        "drain_attempt_ms": Param(
            100,
            type="integer",
            minimum=10,
            maximum=5_000,
            title="One drain attempt (ms)",
            description="How long one attempt waits for the organization's open transactions; its "
            "other writers wait meanwhile.",
            section=PAUSE,
        ),
        "drain_deadline_s": Param(
            10,
            type="number",
            exclusiveMinimum=0,
            maximum=600,
            title="Drain deadline (s)",
            description="All attempts together. Past it the cutover gives up, the source serves "
            "on, and the task tries again later.",
            section=PAUSE,
        ),
        "freeze_deadline_s": Param(
            10,
            type="number",
            exclusiveMinimum=0,
            maximum=3_600,
            title="Freeze deadline (s)",
            description="From the freeze to the flip. Past it the source is opened again.",
            section=PAUSE,
        ),
        "arm_deadline_s": Param(
            60,
            type="number",
            exclusiveMinimum=0,
            maximum=3_600,
            title="Capture deadline (s)",
            description="How long the copy's start waits for transactions that were open before "
            "capture was.",
            section=PAUSE,
        ),
        "max_rounds": Param(
            50,
            type="integer",
            minimum=1,
            maximum=10_000,
            title="Rounds, at most",
            description="Sync gives up when so many rounds have not caught up with the writers.",
            section=PAUSE,
        ),
        "log_budget_rows": Param(
            10_000_000,
            type="integer",
            minimum=1_000,
            maximum=1_000_000_000,
            title="Key log budget (rows)",
            description="Changes that may wait in the old cell's key log, about 100 bytes each. "
            "Over it the migration is halted; a paused one gives its log up, and after the resume "
            "everything is compared and repaired.",
            section=_WAVE,
        ),
        "cohort": Param(
            None,
            type=["null", "string"],
            minLength=1,
            maxLength=200,
            title="Cohort",
            description="Name of the wave: a halt of it stops all its migrations, and no others. "
            "Empty: the name of this run.",
            section=_WAVE,
        ),
        "max_failures": Param(
            3,
            type="integer",
            minimum=1,
            maximum=1_000,
            title="Failures, at most",
            description="With so many failed organizations the whole cohort is halted.",
            section=_WAVE,
        ),
        "one_way": Param(
            False,
            type="boolean",
            title="Give the roll-back up",
            description="Cut over although a roll-back would lose writes, for example because the "
            "old cell's engine is older. Plan says why it would.",
            section=AFTER,
        ),
        "soak_s": Param(
            2,
            type="number",
            minimum=0,
            maximum=86_400,
            title="Soak (s)",
            description="How long the moved organization is watched at its new cell.",
            section=AFTER,
        ),
        "roll_back_on_breach": Param(
            False,
            type="boolean",
            title="Roll back by itself",
            description="When soak finds the organization unwell at its new cell, the migration is "
            "halted. On: it is also rolled back, once, without loss.",
            section=AFTER,
        ),
        "breach_s": Param(
            15,
            type="number",
            minimum=0,
            maximum=3_600,
            title="Breach (s)",
            description="How long a check of soak must fail before it counts. Soak does not end "
            "while one fails.",
            section=AFTER,
        ),
        "soak_operations": Param(
            100,
            type="integer",
            minimum=10,
            maximum=1_000_000,
            title="Operations to judge by",
            description="Errors and latency are judged only when clients have reported so many "
            "operations in a minute.",
            section=AFTER,
        ),
        "soak_error_factor": Param(
            2,
            type="number",
            minimum=1,
            maximum=1_000,
            title="Errors, times before",
            description="An error rate is too high when it is surely over so many times what it "
            "may have been before, and over 1%.",
            section=AFTER,
        ),
        "soak_latency_factor": Param(
            3,
            type="number",
            minimum=1,
            maximum=1_000,
            title="Latency, times before",
            description="The 95th percentile is too long when it is surely over so many times what "
            "it was before, and 50 ms over it.",
            section=AFTER,
        ),
        "soak_lag_keys": Param(
            100_000,
            type="integer",
            minimum=0,
            maximum=1_000_000_000,
            title="Lag (changes)",
            description="Changes that may wait for the old cell; more make a roll-back slow.",
            section=AFTER,
        ),
        "soak_lag_s": Param(
            120,
            type="number",
            exclusiveMinimum=0,
            maximum=86_400,
            title="Lag (s)",
            description="Longest time in which no reverse round ended, for example because a cell "
            "does not answer.",
            section=AFTER,
        ),
        "route_ttl_s": Param(
            30,
            type="number",
            minimum=0,
            maximum=86_400,
            title="Age of routes (s)",
            description="The ttl_s of the applications' route clients. Who is turned away at the "
            "old cell later than this after the flip does not follow its routes.",
            section=AFTER,
        ),
        "ttl_s": Param(
            3_600,
            type="number",
            minimum=0,
            maximum=90 * 86_400,
            title="TTL (s)",
            description=(
                "From the flip to the clean-up of the old copy: how long stale readers can live. "
                f"Up to {LONGEST_TTL_IN_RUN_S} the run waits for it; a longer one gets a clean-up "
                "run of its own. Example: 604800 (a week)."
            ),
            section=AFTER,
        ),
    }


def roll_back_organizations_params() -> dict[str, Param]:
    """Return the form of `roll_back_organizations`."""
    return {
        "organizations": migrate_organizations_params()["organizations"],
        "reason": Param(
            type="string",
            minLength=3,
            maxLength=1_000,
            title="Reason",
            description="Why. It goes into the audit.",
            examples=["errors since the move"],
            section=WHAT,
        ),
        "dry_run": dry_run_param(
            "On: only say what would keep an organization, or stay behind; nothing is changed. "
            "Switch it off to go back."
        ),
        "ttl_s": Param(
            None,
            type=["null", "number"],
            minimum=0,
            maximum=90 * 86_400,
            title="TTL (s)",
            description="From the way back to the clean-up of the new cell's copy. Empty: as for "
            "the move.",
            section=AFTER,
        ),
    }


def prepare_cell_params() -> dict[str, Param]:
    """Return the form of `prepare_cell`."""
    return {
        "cells": Param(
            [],
            type="array",
            items={"type": "string", "minLength": 1, "maxLength": 63},
            minItems=1,
            maxItems=ORGANIZATIONS_PER_RUN,
            uniqueItems=True,
            title="Cells",
            description="Cells of cells.yaml, one a line.",
            section=WHAT,
        ),
        "dry_run": dry_run_param("On: only say what each cell lacks. Switch it off to install it."),
    }


def clean_up_organizations_params() -> dict[str, Param]:
    """Return the form of `clean_up_organizations`."""
    return {
        "migrations": Param(
            [],
            type="array",
            items={"type": "integer", "minimum": 1},
            minItems=1,
            maxItems=ORGANIZATIONS_PER_RUN,
            uniqueItems=True,
            title="Migrations",
            description="Numbers of retained migrations, as cellferry status shows them: [17].",
            section=WHAT,
        ),
    }


def steer_organizations_params() -> dict[str, Param]:
    """Return the form of `steer_organizations`."""
    names: dict[str, Any] = {
        "type": "array",
        "maxItems": ORGANIZATIONS_PER_REQUEST,
        "uniqueItems": True,
    }
    return {
        "action": Param(
            type="string",
            enum=["pause", "resume", "abort", "halt", "clear-halt"],
            values_display={
                "pause": "pause: stop at the next batch, keep everything",
                "resume": "resume: what was paused may go on",
                "abort": "abort: give the move up, delete the copy (before the flip)",
                "halt": "halt: stop until somebody clears it",
                "clear-halt": "clear-halt: the cause of a halt is gone",
            },
            title="Action",
            description="What to do with each of them. There is no default.",
            section=WHAT,
        ),
        "reason": Param(
            type="string",
            minLength=3,
            maxLength=1_000,
            title="Reason",
            description="Why. It goes into the audit, and others see it.",
            section=WHAT,
        ),
        "organizations": Param(
            [],
            **names,
            items={"type": "string", "minLength": 1, "maxLength": 200},
            title="Organizations",
            description="Ids or slugs, one a line.",
            section=WHAT,
        ),
        "cohorts": Param(
            [],
            **names,
            items={"type": "string", "minLength": 1, "maxLength": 200},
            title="Cohorts",
            description="Waves, for halt and clear-halt: names of runs, unless they were given "
            "another.",
            section=WHAT,
        ),
        "cells": Param(
            [],
            **names,
            items={"type": "string", "minLength": 1, "maxLength": 63},
            title="Cells",
            description="Cells of cells.yaml, for halt and clear-halt.",
            section=WHAT,
        ),
    }


def reverse_rounds_params() -> dict[str, Param]:
    """Return the form of `reverse_rounds`."""
    return {
        "at_most": Param(
            20,
            type="integer",
            minimum=1,
            maximum=500,
            title="At most",
            description="Retained migrations that one run looks at; the next run takes the next.",
            section=SPEED,
        ),
    }


def reap_cells_params() -> dict[str, Param]:
    """Return the form of `reap_cells`."""
    return {
        "dry_run": Param(
            False,
            type="boolean",
            title="Dry run",
            description="Only say what would be done. Every minute's run does it.",
            section=WHAT,
        ),
        "expired_after_s": Param(
            15,
            type="number",
            minimum=1,
            maximum=3_600,
            title="Expired after",
            description="Seconds for which a migration's controller must have been silent. One "
            "that lives and is only slow is taken over, too: safe, but it must be repeated.",
            section=SPEED,
        ),
    }


class StrictRequest(BaseModel):
    """Refuses what it does not know, and takes no value for another type's."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Choice(StrictRequest):
    organizations: list[str] = Field(min_length=1, max_length=ORGANIZATIONS_PER_REQUEST)
    destination: str = Field(min_length=1)
    dry_run: bool = True


class MoveRequest(StrictRequest):
    """A checked request of `migrate_organizations`; says nothing yet of what exists."""

    organizations: tuple[str, ...]
    destination: str
    dry_run: bool
    options: Any

    @property
    def move_options(self) -> MoveOptions:
        """The options of each organization's move."""
        options: MoveOptions = self.options
        return options

    def options_of(self, wave: str) -> MoveOptions:
        """The options of each organization's move, with `wave` as cohort unless one is named."""
        options = self.move_options
        return options if options.cohort else options.model_copy(update={"cohort": wave})


class RollBackRequest(StrictRequest):
    """A checked request of `roll_back_organizations`; says nothing yet of what exists."""

    organizations: list[str] = Field(min_length=1, max_length=ORGANIZATIONS_PER_REQUEST)
    reason: str = Field(min_length=3, max_length=1_000)
    dry_run: bool = True
    ttl_s: float | None = Field(None, ge=0, le=90 * 86_400)


def read_roll_back_request(params: Mapping[str, Any]) -> RollBackRequest:
    """Read the Params of `roll_back_organizations` strictly.

    Raises:
        InvalidInput: a Param is unknown, missing, of the wrong type or out of bounds. All faults
            are named.
    """
    refuse_unknown(params, roll_back_organizations_params())
    try:
        return RollBackRequest.model_validate(dict(params))
    except ValidationError as error:
        raise InvalidInput(
            "; ".join(name_faults(error)), hint="correct the Params and trigger a new run"
        ) from None


def read_move_request(params: Mapping[str, Any]) -> MoveRequest:
    """Read the Params of `migrate_organizations` strictly.

    Raises:
        InvalidInput: a Param is unknown, missing, of the wrong type or out of bounds. All faults
            are named.
    """
    from cellferry.migration import MoveOptions

    refuse_unknown(params, migrate_organizations_params())
    chosen = {name: value for name, value in params.items() if name in _Choice.model_fields}
    rest = {name: value for name, value in params.items() if name not in _Choice.model_fields}
    faults: list[str] = []
    choice = options = None
    try:
        choice = _Choice.model_validate(chosen)
    except ValidationError as error:
        faults.extend(name_faults(error))
    try:
        options = MoveOptions.model_validate(rest, strict=True)
    except ValidationError as error:
        faults.extend(name_faults(error))
    if choice is None or options is None:
        raise InvalidInput("; ".join(faults), hint="correct the Params and trigger a new run")
    return MoveRequest(
        organizations=tuple(choice.organizations),
        destination=choice.destination,
        dry_run=choice.dry_run,
        options=options,
    )


def refuse_unknown(params: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse Params that the DAG does not have: a typing error must not start a run.

    Raises:
        InvalidInput: names each one, and what was probably meant.
    """
    unknown = sorted(set(params) - set(known))
    if not unknown:
        return
    named = []
    for name in unknown:
        near = difflib.get_close_matches(name, list(known), n=1)
        named.append(f"{name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    plural = "s" if len(unknown) > 1 else ""
    raise InvalidInput(
        f"unknown Param{plural} {', '.join(named)}",
        hint=f"this DAG knows: {', '.join(known)}",
    )


def name_faults(error: ValidationError) -> list[str]:
    """Return what is wrong with each Param, with the value it has."""
    return [
        f"Param {'.'.join(str(part) for part in fault['loc'])!r}: {fault['msg']}"
        + (f", got {fault['input']!r}" if fault["type"] != "missing" else "")
        for fault in error.errors()
    ]
