"""The latency-driven throttle of one step: probes at both cells, and what follows from them.

While one store of a step works, two threads ask the two cells a few times a second how long a
small write and a small read take; a third one decides by `governor`, shares the cells' budgets
with other movers through the topology, and sets the pace. The working thread only reads a number.
Nothing here may fail the step: a probe that fails is reported, and the work goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cellferry.closing import Closing
from cellferry.errors import CellferryError
from cellferry.migration.governor import WINDOW, Act, Aim, Decision, Governor, p95
from cellferry.model import Cell, Move, Progress, Side
from cellferry.stores.base import Store
from cellferry.stores.pace import FULL_SPEED, Load, Pace, Probe
from cellferry.topology.pace import Company, PaceRow, PaceTeller
from cellferry.topology.topology import Topology

log = logging.getLogger(__name__)

#: Between two probes of a cell, seconds.
PROBE_EVERY_S = 0.1
#: Between two probes while the mover rests and the idle latency is measured, seconds.
IDLE_PROBE_EVERY_S = 0.01
#: Longest time that the mover rests for that, seconds.
IDLE_FOR_S = 1.5
#: The share of a mover that rests for it.
HOLD = 0.001
#: Between two questions for a server's load, seconds.
LOAD_EVERY_S = 2.0
#: After a probe that failed, seconds.
FAILED_S = 1.0
#: Between two looks at probes that have not been answered, and two words to the topology, seconds.
LOOK_EVERY_S = 0.1
TELL_EVERY_S = 1.0
#: How long the end of a step waits for a probe that is under way, seconds.
END_WITHIN_S = 3.0


@dataclass
class _Watched:
    """One cell as this step sees it. Changed with the lock of its `StorePacing` held."""

    cell: str
    governor: Governor
    make: Callable[[], Probe]
    idle: list[float] = field(default_factory=list)
    asked_at: float | None = None
    last_load: Load = field(default_factory=Load)
    load_at: float | None = None
    log_bytes_s: float | None = None
    idle_s: float | None = None
    measures_idle: bool = False
    met: bool = False
    note: str = ""
    is_news: bool = False
    acts: dict[Act, int] = field(default_factory=lambda: dict.fromkeys(Act, 0))
    lowest: float = 1.0
    probes: int = 0


class StorePacing:
    """Paces one store's part of a step; threads begin with the work and end with `close`.

    Args:
        name: of migration and step, for the log: `migration 7 copy`.
        probes: by cell: makes the probe, in the thread that uses it.
        target_s: what the p95 is kept under; None: so much over what it is without the mover.
        progress: the working thread tells it the decisions.
    """

    def __init__(
        self,
        store: str,
        name: str,
        step: str,
        migration: int,
        probes: Mapping[str, Callable[[], Probe]],
        teller: PaceTeller,
        target_s: float | None,
        progress: Progress | None = None,
    ) -> None:
        now = time.monotonic()
        self.pace = Pace(store, progress, self._begin)
        self._store = store
        self._name = name
        self._step = step
        self._migration = migration
        self._teller = teller
        self._target_s = target_s
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []
        self._cells = [
            _Watched(cell, Governor(f"{cell}/{store}", PROBE_EVERY_S, now=now), make)
            for cell, make in probes.items()
        ]

    def facts(self) -> dict[str, Any] | None:
        """Return what was decided, as JSON's types; None if the work was over before."""
        if not self._threads:
            return None
        with self._lock:
            return {
                "rested_s": round(self.pace.rested_s, 3),
                "cells": {
                    one.cell: {
                        **{str(act): count for act, count in one.acts.items()},
                        "lowest_share": round(one.lowest, 3),
                        "probes": one.probes,
                        "target_ms": _in_ms(aim.target_s if (aim := one.governor.aim) else None),
                        "idle_ms": _in_ms(aim.idle_s if aim else None),
                        "note": one.note,
                    }
                    for one in self._cells
                },
            }

    def close(self) -> None:
        """End the threads; work that goes on does so at full speed."""
        self._ending.set()
        deadline = time.monotonic() + END_WITHIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self.pace.share = 1.0

    # ── the threads ─────────────────────────────────────────────────────────────────────────────

    def _begin(self, pace: Pace) -> None:
        """Called by the working thread, once; from here on it rests until the first decision."""
        pace.share = HOLD
        threads = [
            threading.Thread(target=self._control, name=f"pace {self._name}", daemon=True),
            *(
                threading.Thread(
                    target=self._probe, args=[one], name=f"probe {one.governor.place}", daemon=True
                )
                for one in self._cells
            ),
        ]
        try:
            for thread in threads:
                thread.start()
                self._threads.append(thread)  # one that was not started cannot be waited for
        except RuntimeError as error:  # the process may have no more threads
            log.warning("%s is not paced: %s", self._name, error)
            self._ending.set()
            pace.share = 1.0

    def _probe(self, watched: _Watched) -> None:
        probe: Probe | None = None
        try:
            while not self._ending.is_set():
                try:
                    if probe is None:
                        probe = watched.make()
                    self._ask(watched, probe)
                except CellferryError as error:
                    self._failed(watched, error.message)
                    self._ending.wait(FAILED_S)
                    continue
                waits_for_idle = watched.measures_idle
                self._ending.wait(IDLE_PROBE_EVERY_S if waits_for_idle else PROBE_EVERY_S)
        except Exception as error:  # a probe must never be the end of the work
            log.exception("the probe of %s ended", watched.governor.place)
            self._failed(watched, f"{type(error).__name__}: {error}")
        finally:
            if probe is not None:
                probe.close()

    def _ask(self, watched: _Watched, probe: Probe) -> None:
        with self._lock:
            watched.asked_at = time.monotonic()
        try:
            reading = probe.read()
        finally:
            with self._lock:
                watched.asked_at = None
        now = time.monotonic()
        with self._lock:
            watched.probes += 1
            if watched.measures_idle:
                watched.idle.append(reading.longest_s)
            self._decided(watched, watched.governor.sample(reading.longest_s, now))
        if watched.load_at is None or now - watched.load_at >= LOAD_EVERY_S:
            load = probe.load()
            with self._lock:
                self._loaded(watched, load, time.monotonic())

    def _loaded(self, watched: _Watched, load: Load, now: float) -> None:
        before, before_at = watched.last_load.log_bytes, watched.load_at
        if load.log_bytes is not None and before is not None and before_at is not None:
            # It falls when a server is replaced.
            watched.log_bytes_s = max(0.0, (load.log_bytes - before) / max(now - before_at, 1e-3))
        watched.last_load, watched.load_at = load, now
        self._decided(watched, watched.governor.lagging(load.lag_s, now))

    def _failed(self, watched: _Watched, reason: str) -> None:
        with self._lock:
            self._decided(watched, watched.governor.fail(reason, time.monotonic()))

    def _control(self) -> None:
        try:
            self._find_aims()
            told_at = time.monotonic()
            while not self._ending.wait(LOOK_EVERY_S):
                now = time.monotonic()
                with self._lock:
                    for one in self._cells:
                        if one.asked_at is not None:
                            age_s = now - one.asked_at
                            self._decided(one, one.governor.waiting(age_s, now))
                    self._set_share()
                if now - told_at >= TELL_EVERY_S:
                    told_at = now
                    for one in self._cells:
                        self._share_with_others(one)
        except Exception:  # the pace must never be the end of the work
            log.exception("%s is not paced any more", self._name)
        finally:
            self._ending.set()
            self.pace.share = 1.0
            self._teller.close()

    def _find_aims(self) -> None:
        """Learn who else is there, and how the cells do without movers; then set the targets."""
        for one in self._cells:
            company = self._share_with_others(one)
            with self._lock:
                if self._target_s is not None:
                    one.governor.aim = Aim(self._target_s)
                elif company is not None and company.idle_s is not None:
                    one.governor.aim = Aim.over(company.idle_s)
                else:
                    one.measures_idle = True
        until = time.monotonic() + IDLE_FOR_S
        while time.monotonic() < until and any(
            one.measures_idle and len(one.idle) <= WINDOW and not one.governor.is_blind
            for one in self._cells
        ):
            if self._ending.wait(IDLE_PROBE_EVERY_S):
                return
        with self._lock:
            for one in self._cells:
                # A cell that cannot be asked yet gets its target as soon as it can.
                if one.measures_idle and one.idle:
                    found = self._set_aim(one)
                    if one.governor.movers == 1 and len(one.idle) > WINDOW:
                        one.idle_s = found
            self._set_share()

    def _set_aim(self, watched: _Watched) -> float:
        # The first one connects and warms up.
        idle_s = p95(watched.idle[1:] or watched.idle)
        watched.governor.aim = Aim.over(idle_s)
        watched.measures_idle = False
        return idle_s

    def _share_with_others(self, watched: _Watched) -> Company | None:
        with self._lock:
            if watched.measures_idle and len(watched.idle) > WINDOW:
                self._set_aim(watched)  # it could not be asked in the beginning
            governor = watched.governor
            row = PaceRow(
                cell=watched.cell,
                store=self._store,
                migration=self._migration,
                step=self._step,
                share=governor.share,
                target_s=governor.aim.target_s if governor.aim else None,
                p95_s=governor.p95_s,
                idle_s=watched.idle_s,
                lag_s=watched.last_load.lag_s,
                log_bytes_s=watched.log_bytes_s,
                active=watched.last_load.active,
                note=watched.note,
            )
            decided, watched.is_news = watched.is_news, False
        company = self._teller.tell(row, decided=decided)
        if company is not None:
            with self._lock:
                begins, watched.met = not watched.met, True
                budget = company.budget if begins and company.limited else None
                self._decided(watched, governor.meet(company.others + 1, budget, time.monotonic()))
        return company

    # ── decisions ───────────────────────────────────────────────────────────────────────────────

    def _decided(self, watched: _Watched, decisions: Iterable[Decision]) -> None:
        for one in decisions:
            watched.acts[one.act] += 1
            watched.lowest = min(watched.lowest, one.after)
            watched.note = _words(one, watched.governor.place)
            watched.is_news = True
            level = {Act.BLINDED: logging.WARNING, Act.RECOVERED: logging.DEBUG}
            at_last = one.act is Act.RECOVERED and one.after >= 1.0
            log.log(
                logging.INFO if at_last else level.get(one.act, logging.INFO),
                "%s: %s",
                self._name,
                watched.note,
            )
            self.pace.news = watched.note
        if any(one.governor.aim for one in self._cells) and self.pace.share != HOLD:
            self._set_share()

    def _set_share(self) -> None:
        if not self._ending.is_set():
            self.pace.share = min(one.governor.share for one in self._cells)


class Pacing(Closing):
    """The throttles of all stores of one step; use as a context manager.

    Args:
        target_ms: of the probes' p95 in milliseconds; 0 for one that is derived from what the
            probes take without movers; None for no such throttle.
    """

    def __init__(
        self,
        topology: Topology,
        stores: Mapping[str, Store],
        move: Move,
        step: str,
        progress: Progress,
        target_ms: float | None,
    ) -> None:
        self._stores: dict[str, StorePacing] = {}
        if target_ms is None:
            return
        for kind, store in stores.items():
            probes = {move.cell(side).name: _prober(store, move.cell(side), move) for side in Side}
            self._stores[kind] = StorePacing(
                kind,
                f"migration {move.migration} {step}",
                step,
                move.migration,
                probes,
                topology.pace_teller(move.migration, move.attempt, kind),
                target_ms / 1000 or None,
                progress,
            )

    def close(self) -> None:
        """End the probes and the controllers of all stores."""
        for one in self._stores.values():
            one.close()

    def pace(self, kind: str) -> Pace:
        """Return the pace of the store called `kind`."""
        found = self._stores.get(kind)
        return FULL_SPEED if found is None else found.pace

    def facts(self) -> dict[str, Any]:
        """Return what was decided for each store that worked for a while."""
        found = {kind: one.facts() for kind, one in self._stores.items()}
        return {kind: facts for kind, facts in found.items() if facts is not None}


def _prober(store: Store, cell: Cell, move: Move) -> Callable[[], Probe]:
    return lambda: store.probe(cell, move)


def _words(decision: Decision, place: str) -> str:
    if decision.act in (Act.BLINDED, Act.SEEING):
        return f"at {decision.after:.0%} by {place}: {decision.reason}"
    return f"{decision.act} to {decision.after:.0%} by {place}: {decision.reason}"


def _in_ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)
