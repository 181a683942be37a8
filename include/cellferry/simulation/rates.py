"""What a move costs: by step, in seconds and processor seconds, and where each figure comes from.

A step costs something for every organization, something for a million rows and something for a
million keys. Of each: the seconds it takes when nobody is in its way, and processor seconds of the
mover, of both cells and of the topology. `make bench` measures them (section `simulation`, on real
cells) and writes them to `docs/benchmarks/simulation.json`; `default_rates.yaml` has cautious
figures for one small machine, for where that file is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

STAGES = ("plan", "copy", "sync", "verify", "cutover", "soak", "cleanup")
"""Steps that cost something; between soak and cleanup the TTL only passes."""

PARTS = ("mover", "source", "destination", "topology")
"""Whose processors a step uses."""

TABLE = "Rates"
"""Title of the table of measured rates in `simulation.json`."""

AIRFLOW_TABLE, WAVES_TABLE = "Where the processor time goes: ", "Organizations per hour"
"""Titles in `orchestration.json`; after the first one comes the name of a row of the second."""

_SCHEDULER = "scheduler"
_NOT_AIRFLOW = ("PostgreSQL: cells", "Valkey", "fleet", "all")
"""How the names of parts begin that are no part of Airflow."""

_OF_POSTGRES = ("rows", "wall s", "CPU s: client", "source", "destination")
_OF_REDIS = ("Keys", "Seconds", "CPU client s", "CPU source s", "CPU destination s")
LARGE = {
    "copying": ("copy", "per_million_rows", _OF_POSTGRES),
    "verifying": ("verify", "per_million_rows", _OF_POSTGRES),
    "redis_copy": ("copy", "per_million_keys", _OF_REDIS),
}
"""Sections that measure one large organization: the step, of what, and the columns with the count,
the seconds and the processor seconds of mover, source and destination."""

DEFAULT_ORIGIN = "default (default_rates.yaml)"

_MILLION = 1e6
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError)


class Cost(BaseModel):
    """Seconds that something takes alone, and processor seconds by part."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    seconds: float = Field(default=0.0, ge=0)
    mover: float = Field(default=0.0, ge=0)
    source: float = Field(default=0.0, ge=0)
    destination: float = Field(default=0.0, ge=0)
    topology: float = Field(default=0.0, ge=0)

    def plus(self, other: Cost, times: float = 1.0) -> Cost:
        """Return this and so many times the other."""
        return Cost.model_construct(  # sums of what was validated
            **{name: getattr(self, name) + times * getattr(other, name) for name in COST_FIELDS}
        )


COST_FIELDS = ("seconds", *PARTS)


class StageRates(BaseModel):
    """What one step costs."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    fixed: Cost = Cost()
    per_million_rows: Cost = Cost()
    per_million_keys: Cost = Cost()

    def cost(self, rows: float, keys: float) -> Cost:
        """Return the cost for an organization of this size."""
        found = self.fixed.plus(self.per_million_rows, rows / _MILLION)
        return found.plus(self.per_million_keys, keys / _MILLION)


class Orchestration(BaseModel):
    """What Airflow costs around the steps.

    Attributes:
        scheduler_s: processor seconds of the scheduler for one task; one scheduler does them one
            after the other.
        task_s: processor seconds of a worker for one task, before and after the step.
        latency_s: from the end of a task to the start of the next with nothing else to do.
        run_s: processor seconds for a run: its first task and its report.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    scheduler_s: float = Field(default=0.0, ge=0)
    task_s: float = Field(default=0.0, ge=0)
    latency_s: float = Field(default=0.0, ge=0)
    run_s: float = Field(default=0.0, ge=0)


class Rates(BaseModel):
    """All rates; `origins` says of each step, and of `orchestration`, where they come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    stages: Mapping[str, StageRates] = {}
    orchestration: Orchestration = Orchestration()
    origins: Mapping[str, str] = {}

    def of(self, stage: str) -> StageRates:
        """Return the rates of a step; what nobody measured costs nothing."""
        return rates_of(self.stages, stage)

    def over(self, other: Rates) -> Rates:
        """Return these, and the other's for what these do not say."""
        mine = "orchestration" in self.origins
        return Rates(
            stages={**other.stages, **self.stages},
            orchestration=self.orchestration if mine else other.orchestration,
            origins={**other.origins, **self.origins},
        )


def defaults() -> Rates:
    """Return the cautious rates of one small machine."""
    text = resources.files(__package__).joinpath("default_rates.yaml").read_text("utf-8")
    raw = yaml.safe_load(text)
    return Rates(
        stages=raw["stages"],
        orchestration=raw["orchestration"],
        origins=dict.fromkeys((*raw["stages"], "orchestration"), DEFAULT_ORIGIN),
    )


def measured(folder: Path) -> Rates:
    """Return what `make bench` has left in `folder`; nothing where there is nothing to read.

    A file that is absent, half written or of another shape is passed over: the origin of each rate
    says what was used.
    """
    found = Rates()
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            told = _read(content, f"measured ({path.name}, {content['circumstances']['when']})")
        except (*_UNREADABLE, StopIteration):
            continue
        found = found.over(told)
    return found


def refined(rates: Rates, folder: Path) -> Rates:
    """Return rates with the slopes that were measured with one large organization.

    Small organizations say what a step costs at least, and little of what a million rows cost. What
    cannot be read is passed over, as in `measured`.
    """
    stages, origins = dict(rates.stages), dict(rates.origins)
    for name, (stage, of, columns) in LARGE.items():
        path = folder / f"{name}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            cost = _slope(content, columns)
            origin = f"measured ({path.name}, {content['circumstances']['when']})"
        except _UNREADABLE:
            continue
        if cost is not None:
            stages[stage] = rates_of(stages, stage).model_copy(update={of: cost})
            origins[f"{stage} {of.replace('_', ' ')}"] = origin
    return rates.model_copy(update={"stages": stages, "origins": origins})


def rates_of(stages: Mapping[str, StageRates], stage: str) -> StageRates:
    """Return the rates of a step; what nobody measured costs nothing."""
    return stages.get(stage, StageRates())


def _slope(content: Mapping[str, Any], columns: Sequence[str]) -> Cost | None:
    """Return what a million cost in the row of cellferry, from the first table that has one."""
    for table in content["tables"]:
        for values in table["rows"]:
            row = dict(zip(table["headings"], values, strict=True))
            if str(values[0]).startswith("cellferry") and set(columns) <= set(row):
                count, *costs = (float(row[name]) for name in columns)
                named = dict(zip(COST_FIELDS, costs, strict=False))
                return Cost(**{name: cost / count * _MILLION for name, cost in named.items()})
    return None


def _read(content: Mapping[str, Any], origin: str) -> Rates:
    tables = {table["title"]: table for table in content["tables"]}
    if TABLE in tables:
        table = tables[TABLE]
        rows = [dict(zip(table["headings"], row, strict=True)) for row in table["rows"]]
        stages = from_rows(rows)
        return Rates(stages=stages, origins=dict.fromkeys(stages, origin))
    for title, table in tables.items():
        if title.startswith(AIRFLOW_TABLE) and WAVES_TABLE in tables:
            wave = title.removeprefix(AIRFLOW_TABLE)
            return Rates(
                orchestration=_airflow(table, tables[WAVES_TABLE], wave),
                origins={"orchestration": origin},
            )
    return Rates()


def _airflow(parts: Mapping[str, Any], waves: Mapping[str, Any], wave: str) -> Orchestration:
    """Return what Airflow costs: its parts, less what the steps use of them without it."""
    place = list(waves["headings"]).index("processes each")
    processes = next(float(row[place]) for row in waves["rows"] if row[0] == wave)
    each = {str(row[0]): float(row[1]) - float(row[-1] or 0) for row in parts["rows"]}
    around = sum(cost for name, cost in each.items() if not name.startswith(_NOT_AIRFLOW))
    scheduler = each[_SCHEDULER]
    return Orchestration(
        scheduler_s=scheduler / processes,
        task_s=max(0.0, around - scheduler) / processes,
    )


def from_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, StageRates]:
    """Return the rates of a table with the headings of `to_rows`.

    Raises:
        KeyError, ValueError: it is another table.
    """
    stages: dict[str, dict[str, Any]] = {}
    for row in rows:
        cost = {name: row[name] for name in COST_FIELDS}
        stages.setdefault(row["step"], {})[row["of"]] = cost
    unknown = set(stages) - set(STAGES)
    if unknown:
        raise ValueError(f"unknown steps {unknown}")
    return {stage: StageRates.model_validate(costs) for stage, costs in stages.items()}


ROW_HEADINGS = ("step", "of", *COST_FIELDS)


def to_rows(stages: Mapping[str, StageRates]) -> list[list[str | float]]:
    """Return the rates as rows under `ROW_HEADINGS`, fit for a table of a benchmark."""
    return [
        [stage, of, *(getattr(getattr(rates, of), name) for name in COST_FIELDS)]
        for stage, rates in stages.items()
        for of in StageRates.model_fields
    ]
