"""Watching a moved organization: samples, what they are compared with, and when it is too much.

One bad sample is no reason for anything. A check that fails makes a *suspicion*; it becomes a
breach when it has failed for `breach_s` and in several samples, and for what clients report only
if operations that came after the suspicion confirm it. So a burst at the flip, which stays in the
figures for a while, halts nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from cellferry.client_figures import Figures
from cellferry.errors import CellferryError, InvalidInput, TransientError
from cellferry.migration import smoke_queries
from cellferry.migration.context import Attempt, Context
from cellferry.migration.health import (
    QUANTILE,
    Finding,
    Thresholds,
    Verdict,
    judge_errors,
    judge_lag,
    judge_latency,
    judge_refusals,
    milliseconds,
    percent,
)
from cellferry.migration.options import MoveOptions
from cellferry.migration.result import plain
from cellferry.migration.smoke_queries import SmokeQuery
from cellferry.model import Migration, Round, Side
from cellferry.stores.questions import Answer

#: Figures of clients are of the last so many seconds, so that what is over is forgotten.
WINDOW_S = 60.0
#: A suspicion needs so many samples, however long the time between two.
MIN_SAMPLES = 3
#: Smoke queries are asked so often, and in each sample while one fails; seconds.
SMOKE_EVERY_S = 10.0
#: Samples that are kept with the migration; a long soak keeps every second, fourth, … one.
KEPT_SAMPLES = 60
#: Checks whose figures are of clients, with what judges them.
_JUDGES = {"errors": judge_errors, "latency": judge_latency}


def take_baseline(at: Attempt) -> dict[str, Any]:
    """Return how the organization is in the cell that it is about to leave, for a fact.

    Raises:
        InvalidInput, TransientError: a smoke query cannot be answered; nothing was cut over.
    """
    queries = smoke_queries.of(at.context)
    move = at.move
    figures = at.context.topology.client_figures(move.organization.id, move.source.name, move.epoch)
    answers: dict[str, Answer] = {}
    for kind, store in at.stores.items():
        answers.update(smoke_queries.rehearse(at.context, kind, store, queries))
    return {
        "at": at.context.topology.now().isoformat(),
        "clients": figures.as_dict() if figures else None,
        "smoke": answers,
    }


@dataclass(slots=True)
class _Suspicion:
    since: float
    since_there: datetime
    """The same moment on the topology's clock."""
    samples: int = 0


@dataclass(slots=True)
class _Samples:
    """A bounded record: when it is full every second sample goes, and from then on."""

    kept: list[dict[str, Any]] = field(default_factory=list)
    _stride: int = 1
    _seen: int = 0

    def add(self, sample: dict[str, Any]) -> None:
        if self._seen % self._stride == 0:
            self.kept.append(sample)
            if len(self.kept) > KEPT_SAMPLES:
                self.kept = self.kept[::2]
                self._stride *= 2
        self._seen += 1


class Watch:
    """One soak's watch over one organization; it outlives a lost attempt.

    Args:
        migration: flipped; its facts hold the baseline that `verify` took.

    Raises:
        InvalidInput: the file of smoke queries has become wrong.
    """

    def __init__(self, context: Context, migration: Migration) -> None:
        self._context = context
        self._topology = context.topology
        self._migration = migration
        self._options = MoveOptions.model_validate(dict(migration.options))
        self._thresholds = Thresholds.of(self._options)
        self._queries = smoke_queries.of(context)
        kept = migration.facts.get("baseline") or {}
        self._answers_before: Mapping[str, Answer] = kept.get("smoke", {})
        self.before = self._figures_before(kept.get("clients"))
        self._suspicions: dict[str, _Suspicion] = {}
        self._samples = _Samples()
        self._followed_at = time.monotonic()
        self._asked_at: float | None = None
        self._smoke: list[Finding] = []
        self._after: Figures | None = None
        self._waiting = 0
        self.findings: list[Finding] = []
        self.breach: Finding | None = None

    @property
    def is_suspicious(self) -> bool:
        """Whether a check fails now; soak does not end well before that is decided."""
        return bool(self._suspicions)

    def sample(self, at: Attempt, rounds: Mapping[str, Round], *, last: bool) -> None:
        """Look at everything once, after a reverse round; `last` asks the smoke queries, too."""
        now = time.monotonic()
        age_s, self._followed_at = now - self._followed_at, now
        remaining = {kind: one.remaining for kind, one in rounds.items()}
        self._waiting = sum(remaining.values())
        self._ask(at, last=last)
        self._conclude(
            [*self._clients(), judge_lag(remaining, age_s, self._thresholds), *self._smoke]
        )

    def sample_without(self, trouble: CellferryError) -> None:
        """Look at what can be seen while a cell does not answer."""
        age_s = time.monotonic() - self._followed_at
        lag = judge_lag({"known": self._waiting}, age_s, self._thresholds, str(trouble))
        self._smoke = []
        self._conclude([*self._clients(), lag])

    def note(self) -> str:
        """Say how it is, in a line."""
        after, before = self._after, self.before
        if after is None or not after.operations:
            words = "no reports of its clients"
        else:
            words = f"errors {percent(after.error_rate)}"
            words += f" (before {percent(before.error_rate)})" if before else " (before unknown)"
            words += f", p95 {milliseconds(after.quantile_s(QUANTILE))}"
            words += f" (before {milliseconds(before.quantile_s(QUANTILE))})" if before else ""
        words += f", lag {self._waiting:,} keys"
        if self._suspicions:
            words += f"; suspicious: {', '.join(sorted(self._suspicions))}"
        return words

    def warnings(self) -> list[str]:
        """What could not be judged, in words, each once."""
        return list(
            dict.fromkeys(one.text for one in self.findings if one.verdict is Verdict.UNKNOWN)
        )

    def facts(self) -> dict[str, Any]:
        """Return samples, verdicts and what they were compared with as JSON's types."""
        return {
            "before": self.before.as_dict() if self.before else None,
            "after": self._after.as_dict() if self._after else None,
            "findings": plain(self.findings),
            "samples": list(self._samples.kept),
        }

    # ── one sample ──────────────────────────────────────────────────────────────────────────────

    def _clients(self) -> Iterable[Finding]:
        migration, options = self._migration, self._options
        new, old = migration.destination, migration.source
        within_s = self._window_s
        self._after = self._topology.client_figures(
            migration.organization.id, new, migration.epoch + 1, within_s=within_s
        )
        for judge in _JUDGES.values():
            yield judge(self.before, self._after, self._thresholds, new, old)
        refused = self._refused()
        is_known = refused or self._after is not None or self.before is not None
        yield judge_refusals(refused if is_known else None, old, options.route_ttl_s)

    def _refused(self, since: datetime | None = None) -> int:
        """Count clients' tries in the old cell that came too late to be no surprise."""
        return self._topology.late_refusals(
            self._migration.organization.id,
            self._migration.source,
            self._migration.epoch,
            after_s=self._options.route_ttl_s,
            within_s=self._window_s,
            since=since,
        )

    def _ask(self, at: Attempt, *, last: bool) -> None:
        now = time.monotonic()
        failing = any(one.verdict is not Verdict.WELL for one in self._smoke)
        if self._asked_at is None or last or failing or now - self._asked_at >= SMOKE_EVERY_S:
            self._asked_at = now
            self._smoke = [
                self._smoke_finding(at, query, side)
                for query in self._queries
                for side in _sides(query)
            ]

    def _smoke_finding(self, at: Attempt, query: SmokeQuery, side: Side) -> Finding:
        """Ask one query on one side of a turned move: its source is the new cell."""
        cell = at.move.cell(side).name
        check = f"smoke query {query.name!r} in {cell}"
        before = self._answers_before.get(query.name)
        helps = side is Side.SOURCE
        if query.compare == "before" and query.name not in self._answers_before:
            return Finding(check, Verdict.UNKNOWN, f"{check}: it was not asked before the cutover")
        try:
            answer = at.stores[query.store].ask(side, query.question)
        except (InvalidInput, TransientError) as error:
            if isinstance(error, TransientError) and side is Side.DESTINATION:
                return Finding(check, Verdict.UNKNOWN, f"{check}: {error}")
            return Finding(check, Verdict.UNWELL, f"{check}: {error}", returning_helps=helps)
        complaint = query.complaint(answer, before)
        return Finding(
            check,
            Verdict.UNWELL if complaint else Verdict.WELL,
            f"{check}: {complaint or 'it answers as expected'}",
            smoke_queries.kept(answer),
            before,
            plain(query.model_dump()["expect"]),
            returning_helps=helps,
        )

    def _conclude(self, findings: Iterable[Finding]) -> None:
        self.findings = list(findings)
        now = time.monotonic()
        failing = {one.check: one for one in self.findings if one.verdict is Verdict.UNWELL}
        for check in list(self._suspicions):
            if check not in failing:
                del self._suspicions[check]
        for check, finding in failing.items():
            suspicion = self._suspicions.get(check)
            if suspicion is None:
                suspicion = self._suspicions[check] = _Suspicion(now, self._topology.now())
            suspicion.samples += 1
            if now - suspicion.since < self._options.breach_s or suspicion.samples < MIN_SAMPLES:
                continue
            confirmed = self._confirmed(finding, suspicion)
            if confirmed.verdict is Verdict.UNWELL:
                self.breach = self.breach or confirmed
            elif confirmed.verdict is Verdict.WELL:
                del self._suspicions[check]  # it is over
        self._samples.add(
            {
                "at": self._topology.now().isoformat(),
                "operations": self._after.operations if self._after else None,
                "failures": self._after.failures if self._after else None,
                "p95_s": self._after.quantile_s(QUANTILE) if self._after else None,
                "lag": self._waiting,
                "unwell": sorted(failing),
            }
        )

    def _confirmed(self, finding: Finding, suspicion: _Suspicion) -> Finding:
        """Judge again by what came after the suspicion alone."""
        migration = self._migration
        if finding.check == "refusals":
            refused = self._refused(suspicion.since_there)
            return judge_refusals(refused, migration.source, self._options.route_ttl_s)
        judge = _JUDGES.get(finding.check)
        if judge is None:
            return finding  # each sample of these has looked anew
        fresh = self._topology.client_figures(
            migration.organization.id,
            migration.destination,
            migration.epoch + 1,
            since=suspicion.since_there,
        )
        new, old = migration.destination, migration.source
        return judge(self.before, fresh, self._thresholds, new, old)

    @property
    def _window_s(self) -> float:
        return max(WINDOW_S, 2 * self._options.breach_s)

    def _figures_before(self, kept: Mapping[str, Any] | None) -> Figures | None:
        """The larger of what `verify` kept and what the topology still knows of the old cell."""
        migration = self._migration
        known = self._topology.client_figures(
            migration.organization.id, migration.source, migration.epoch
        )
        earlier = Figures.from_dict(kept) if kept else None
        return max(
            (one for one in (known, earlier) if one is not None and one.operations),
            key=lambda one: one.operations,
            default=None,
        )


def _sides(query: SmokeQuery) -> tuple[Side, ...]:
    return {
        "new": (Side.SOURCE,),
        "old": (Side.DESTINATION,),
        "both": (Side.SOURCE, Side.DESTINATION),
    }[query.side]
