"""Whether clients are as well off after the cutover as before, by what they report themselves."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cellferry.errors import Breached
from cellferry.shards.context import Context, Progress
from cellferry.shards.figures import ShardFigures
from cellferry.shards.leases import Lease
from cellferry.shards.record import Resharding

BASELINE_S = 600.0
_LEAST_CLAIMS = 200
_LOOK_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Limits:
    """From when on the clients are worse off than before the cutover.

    Attributes:
        hit_ratio_drop: share of claims by which fewer may be found taken.
        error_rise: share of operations by which more may fail; the runbook's 0.1%.
        least_claims: with fewer claims the hit ratio says nothing.
    """

    hit_ratio_drop: float = 0.1
    error_rise: float = 0.001
    least_claims: int = _LEAST_CLAIMS


def compare(
    at: Context, found: Resharding, lease: Lease, seconds: float, bounds: Limits
) -> dict[str, Any]:
    """Watch for `seconds`; return what was reported before and since.

    Raises:
        Breached: the clients are worse off than `bounds` allow.
    """
    before = ShardFigures.from_dict(found.facts.get("baseline") or {})
    begun = time.monotonic()
    while True:
        now = at.control.figures(found.set_name, epochs=(found.epoch, found.epoch))
        worse = _worse(before, now, bounds)
        past = time.monotonic() - begun
        note = (
            f"hit ratio {_percent(before.hit_ratio)} → {_percent(now.hit_ratio)},"
            f" errors {_percent(before.error_rate)} → {_percent(now.error_rate)},"
            f" p95 {_ms(before.quantile_s(0.95))} → {_ms(now.quantile_s(0.95))}"
        )
        at.tell(Progress("watch", "", int(past), int(seconds), "s", note))
        if worse:
            at.control.record(
                found.id,
                {"breached": {"why": worse, "at": _now()}},
            )
            raise Breached(
                f"since the cutover {worse}",
                hint=f"cellferry reshard roll-back {found.set_name} --reason …; or watch again",
                step="watch",
                where=f"shard set {found.set_name}",
            )
        if past >= seconds:
            enough = now.claims >= bounds.least_claims
            return {
                "note": note if enough else f"{note} (only {now.claims:,} claims)",
                "before": before.as_dict(),
                "after": now.as_dict(),
                "at": _now(),
            }
        lease.check()
        time.sleep(min(_LOOK_EVERY_S, max(0.05, seconds - past)))


def _worse(before: ShardFigures, now: ShardFigures, bounds: Limits) -> str:
    if (
        min(before.claims, now.claims) >= bounds.least_claims
        and before.hit_ratio is not None
        and now.hit_ratio is not None
    ):
        drop = before.hit_ratio - now.hit_ratio
        if drop > bounds.hit_ratio_drop:
            return (
                f"the hit ratio fell from {before.hit_ratio:.1%} to {now.hit_ratio:.1%}:"
                " ids are accepted that should be known"
            )
    if now.operations >= bounds.least_claims and now.error_rate is not None:
        rise = now.error_rate - (before.error_rate or 0.0)
        if rise > bounds.error_rise:
            return f"{now.error_rate:.2%} of the operations fail, {rise:.2%} more than before"
    return ""


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{share:.1%}"


def _ms(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds * 1000:.1f} ms"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
