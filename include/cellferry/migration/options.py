"""What an operator may set for a move, validated before anything is changed."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from cellferry.model import Limits, Throttle


class MoveOptions(BaseModel):
    """Bounds and choices of one move; the same fields are the DAG's Params.

    Units are in the names: `_s` seconds, `_ms` milliseconds, `_per_s` per second.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Literal["auto", "online", "freeze-first"] = Field(
        "auto", description="How to move; `auto` lets plan choose from size and budget."
    )
    rows_per_s: float | None = Field(
        None, gt=0, le=10_000_000, description="Upper bound of copied rows per second."
    )
    keys_per_s: float | None = Field(
        None, gt=0, le=10_000_000, description="Upper bound of copied Redis keys per second."
    )
    latency_target_ms: float | None = Field(
        None,
        ge=0,
        le=60_000,
        description="What the p95 of small writes and reads at both cells is kept under, by moving "
        "more slowly. Empty: no such throttle. 0: derived from what they take while nothing moves "
        "there.",
    )
    batch_rows: int = Field(50_000, ge=100, le=500_000, description="Rows in one batch.")
    copy_lanes: int = Field(
        2, ge=1, le=4, description="Tables of a large organization that are copied at once."
    )
    pause_budget_ms: int = Field(
        1_000, ge=20, le=600_000, description="Longest write pause that may be predicted."
    )
    drain_attempt_ms: int = Field(
        100, ge=10, le=5_000, description="One attempt at draining writers in flight."
    )
    drain_deadline_s: float = Field(
        10, gt=0, le=600, description="All attempts at draining; then the cutover gives up."
    )
    freeze_deadline_s: float = Field(
        10, gt=0, le=3_600, description="From the freeze to the flip; then the source is thawed."
    )
    arm_deadline_s: float = Field(
        60, gt=0, le=3_600, description="Longest wait for transactions older than the capture."
    )
    max_rounds: int = Field(50, ge=1, le=10_000, description="Rounds before sync gives up.")
    soak_s: float = Field(2, ge=0, le=86_400, description="How long soak watches.")
    roll_back_on_breach: bool = Field(
        False,
        description="When soak finds the organization unwell at its new cell: not only halt, but "
        "also roll it back, once.",
    )
    breach_s: float = Field(
        15, ge=0, le=3_600, description="How long a check of soak must fail before it counts."
    )
    soak_operations: int = Field(
        100, ge=10, le=1_000_000, description="Operations that clients must have reported to judge."
    )
    soak_error_factor: float = Field(
        2, ge=1, le=1_000, description="Errors that are too many: so many times what they were."
    )
    soak_latency_factor: float = Field(
        3, ge=1, le=1_000, description="Latency that is too long: so many times what it was."
    )
    soak_lag_keys: int = Field(
        100_000, ge=0, le=1_000_000_000, description="Changes that may wait for the old cell."
    )
    soak_lag_s: float = Field(
        120, gt=0, le=86_400, description="Longest time without a reverse round that ended."
    )
    route_ttl_s: float = Field(
        30, ge=0, le=86_400, description="How old a route may be: `ttl_s` of the route clients."
    )
    ttl_s: float = Field(
        3_600,
        ge=0,
        le=90 * 86_400,
        description="From the flip to clean-up: how long stale readers can live.",
    )

    log_budget_rows: int = Field(
        10_000_000,
        ge=1_000,
        le=1_000_000_000,
        description="Changes that may wait in the source's key log. A migration whose log grows "
        "longer is halted; one that is paused gives its log up and later compares everything.",
    )
    cohort: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="Name of the wave: a halt of it stops all its migrations.",
    )
    max_failures: int = Field(
        3, ge=1, le=1_000, description="Failed migrations that halt their whole cohort."
    )
    one_way: bool = Field(
        False,
        description="Cut over although a roll-back would lose writes; plan says why it would.",
    )

    @property
    def limits(self) -> Limits:
        """The bounds as the stores take them."""
        return Limits(
            pause_budget_s=self.pause_budget_ms / 1_000,
            drain_attempt_s=self.drain_attempt_ms / 1_000,
            drain_deadline_s=self.drain_deadline_s,
            freeze_deadline_s=self.freeze_deadline_s,
            arm_deadline_s=self.arm_deadline_s,
            batch_rows=self.batch_rows,
            copy_lanes=self.copy_lanes,
        )

    @property
    def throttle(self) -> Throttle:
        """The bounds of the mover's own work."""
        return Throttle(rows_per_s=self.rows_per_s, keys_per_s=self.keys_per_s)
