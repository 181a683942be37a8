"""The sample application as its deployer sees it: provision, seed, let writers loose, check."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from cellferry.errors import InvalidInput
from cellferry.local.application import checker, ledger, seeding
from cellferry.local.application.checker import Baseline, Checked
from cellferry.local.application.ledger import Ledger
from cellferry.local.application.places import Place, places
from cellferry.local.application.provisioning import provision, provision_organizations
from cellferry.local.application.seeding import Seed
from cellferry.local.application.writers import Assignment, Share, Traffic
from cellferry.model import Actor, Organization
from cellferry.settings import ConnectionSource, resolve
from cellferry.topology import Topology

CELLS = ("cell-1", "cell-2", "cell-3")
_ACTOR = Actor("sample application", role="system")
_FOCUS_SHARE = 0.85
_WRITES_PER_SESSION = 40
_MOST_SESSIONS = 8
_AROUND_FLIP_S = 2.0


class Application:
    """The sample application over all cells.

    Keeps its secret, its ledgers and what it seeded in `directory`, so that another process can
    go on with it.

    Args:
        connections: gives the administrators' URLs of the cells and the topology's.
        topology: where organizations are registered.
        cells: names of the cells; the first is the legacy cell. Their order gives each its
            range of ids, so it never changes.
    """

    def __init__(
        self,
        connections: ConnectionSource,
        topology: Topology,
        *,
        cells: Sequence[str] = CELLS,
        directory: Path = Path(".local/application"),
    ) -> None:
        self.directory = directory.resolve()
        self._topology = topology
        self._topology_url = resolve("cellferry-topology", connections)
        self._read: tuple[int, Ledger] | None = None
        self.places: Mapping[str, Place] = places(cells, connections, self.directory)

    def provision(self) -> None:
        """Make schema, roles and fixed rows in each cell, and register the cells. Repeatable.

        What `directory` tells of a fleet that is no more is deleted: its topology knew the
        organizations, this one does not.
        """
        registered = {route.organization for route in self._topology.routes()}
        if not registered.intersection(seed.organization.id for seed in self._seeds()):
            self._forget()
        known = {cell.name for cell in self._topology.cells()}
        for place in self.places.values():
            if place.name not in known:
                self._topology.register_cell(place.name, legacy=place.number == 1)
            provision(place)
        if seeds := self._seeds():
            self._provision_organizations(seeds)

    def seed(
        self, organizations: int = 12, rows: int = 300_000, *, sizes: Sequence[int] = ()
    ) -> Mapping[str, int]:
        """Make organizations and register them; repeated, it makes only what is missing.

        Args:
            organizations: how many; most live in the first cell.
            rows: size of the largest.
            sizes: makes further organizations of so many rows in the first cell.

        Returns:
            About how many rows were made of each, by id.
        """
        known = {seed.organization.id for seed in self._seeds()}
        seeds = seeding.plan_seeds(organizations, rows, list(self.places), sizes)
        missing = [seed for seed in seeds if seed.organization.id not in known]
        self._provision_organizations(missing)
        made = seeding.seed(self.places, missing)
        routes = {seed.organization.id: seed.cell for seed in missing}
        fresh = checker.take_baseline(self.places, routes)
        before = self.baseline() if known else Baseline({}, {})
        self._save("baseline", {
            "organizations": {**before.organizations, **fresh.organizations},
            "cells": fresh.cells,
        })  # fmt: skip
        self._save("seeds", [asdict(seed) for seed in (*self._seeds(), *missing)])
        self._topology.register_organizations(
            [(seed.organization, seed.cell) for seed in missing], _ACTOR
        )
        return made

    def organizations(self, cell: str | None = None) -> list[Organization]:
        """Return the seeded organizations that live in `cell`, or all."""
        cells = {route.organization: route.cell for route in self._topology.routes()}
        return [
            seed.organization
            for seed in self._seeds()
            if cell is None or cells[seed.organization.id] == cell
        ]

    def organizations_to_move(self, count: int) -> list[Organization]:
        """Return `count` organizations of the first cell: the large, the hot, tiny and others.

        Raises:
            InvalidInput: it has fewer.
        """
        legacy = next(iter(self.places))
        found = self.organizations(legacy)
        if len(found) < count:
            raise InvalidInput(f"{legacy} holds {len(found)} organizations, not {count}")
        return found[:count]

    def start_traffic(
        self,
        writes_per_s: float = 700,
        *,
        focus: Iterable[Organization] = (),
        only: Iterable[Organization] | None = None,
        processes: int = 2,
        seed: int = 0,
    ) -> Traffic:
        """Start writer processes on all organizations; returns when all have begun to write.

        Args:
            writes_per_s: acknowledged writes per second of all organizations together.
            focus: organizations that share 85% of them.
            only: write to these alone.
            processes: number of writer processes.
            seed: makes another sequence of operations.
        """
        chosen = None if only is None else {one.id for one in only}
        focused = {one.id for one in focus}
        seeds = [one for one in self._seeds() if chosen is None or one.organization.id in chosen]
        run = 1 + max((int(path.name.split("-")[1]) for path in self._ledger_files()), default=0)
        shares = []
        for one, rate in zip(seeds, _rates(seeds, writes_per_s, focused), strict=True):
            wanted = max(1 if len(seeds) > 50 else 2, math.ceil(rate / _WRITES_PER_SESSION))
            shares.append(
                Share(
                    organization=one.organization.id,
                    writes_per_s=rate,
                    sessions=min(_MOST_SESSIONS, wanted),
                    urls={
                        name: (place.app_postgres, place.app_redis(one.organization.id))
                        for name, place in self.places.items()
                    },
                )
            )
        return Traffic(
            Assignment(
                run=run,
                processes=processes,
                topology=self._topology_url,
                shares=tuple(shares),
                directory=str(self.directory),
                seed=seed,
            )
        ).start()

    def ledger(self) -> Ledger:
        """Read the ledgers of all writers of all runs; again only when they have grown."""
        size = sum(path.stat().st_size for path in self._ledger_files())
        if self._read is None or self._read[0] != size:
            self._read = (size, ledger.read_ledger(self._ledger_files()))
        return self._read[1]

    def baseline(self) -> Baseline:
        """Return what was in the cells before the first writer."""
        raw = json.loads((self.directory / "baseline.json").read_text(encoding="utf-8"))
        return Baseline(**raw)

    def check(self) -> Checked:
        """Compare every recorded operation with the cells. Writers must have stopped."""
        return checker.check(
            self.ledger(),
            self.places,
            checker.read_history(self._topology_url),
            self.baseline(),
        )

    def write_pause(self, organization: str, within_s: float = _AROUND_FLIP_S) -> float | None:
        """Return the longest wait of a write around the flips of `organization`, in seconds.

        None when it never moved, or nothing was written then.
        """
        return self.write_pauses(within_s).get(organization)

    def write_pauses(self, within_s: float = _AROUND_FLIP_S) -> Mapping[str, float]:
        """Return the longest wait of a write around the last flip of each moved organization."""
        windows = {
            organization: (at - within_s, at + within_s)
            for organization, at in self._flips().items()
        }
        return ledger.write_pauses(self.ledger(), windows)

    def cutover_rates(self, within_s: float = 1.0) -> Mapping[str, float]:
        """Return, per moved organization, acknowledged writes/s of all moved ones at its cutover.

        The time is `within_s` seconds before and after the flip.
        """
        flips = self._flips()
        recorded = self.ledger()
        return {
            organization: ledger.write_rate(recorded, flips, at - within_s, at + within_s)
            for organization, at in flips.items()
        }

    def _flips(self) -> Mapping[str, float]:
        return {
            one.organization: one.at
            for one in checker.read_history(self._topology_url)
            if one.epoch > 1
        }

    def _ledger_files(self) -> list[Path]:
        return sorted((self.directory / "ledger").glob("run-*.jsonl"))

    def _provision_organizations(self, seeds: Sequence[Seed]) -> None:
        for place in self.places.values():
            provision_organizations(place, [seed.organization.id for seed in seeds])

    def _seeds(self) -> list[Seed]:
        path = self.directory / "seeds.json"
        if not path.exists():
            return []
        return [
            Seed(**{**one, "organization": Organization(**one["organization"])})
            for one in json.loads(path.read_text(encoding="utf-8"))
        ]

    def _forget(self) -> None:
        for name in ("seeds.json", "baseline.json"):
            (self.directory / name).unlink(missing_ok=True)
        for name in ("ledger", "stats"):
            shutil.rmtree(self.directory / name, ignore_errors=True)
        self._read = None

    def _save(self, name: str, content: object) -> None:
        path = self.directory / f"{name}.json"
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _rates(seeds: Sequence[Seed], total: float, focused: set[str]) -> list[float]:
    """Divide the writes by weight; the focused organizations share most of them."""
    inside = sum(seed.weight for seed in seeds if seed.organization.id in focused)
    outside = sum(seed.weight for seed in seeds if seed.organization.id not in focused)
    share = _FOCUS_SHARE if inside and outside else 1.0
    return [
        total * share * seed.weight / inside
        if seed.organization.id in focused
        else total * (1 - share if inside else 1.0) * seed.weight / outside
        for seed in seeds
    ]
