"""Who moves, and on what: the file that `cellferry simulate` reads.

`cellferry simulate --write cohorts.yaml` writes the one of the project's requirements, to change.
"""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from cellferry.errors import InvalidInput
from cellferry.simulation.rates import STAGES, Cost, Orchestration, Rates, StageRates

_GUIDE = "cellferry simulate --write cohorts.yaml writes a file to start from"
#: A standard normal variable exceeds this in one case of 20.
_P95 = 1.6448536269514722


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spread(_Strict):
    """A size that differs between organizations: log-normal, given by median and 95th percentile.

    A plain number stands for all alike.
    """

    median: float = Field(ge=0)
    p95: float = Field(ge=0)
    most: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _in_order(self) -> Spread:
        if self.p95 < self.median:
            raise ValueError(f"p95 {self.p95:g} is under the median {self.median:g}")
        if self.median == 0 and self.p95 > 0:
            raise ValueError("a median of 0 allows no p95 over it")
        if self.most is not None and self.most < self.median:
            raise ValueError(f"most {self.most:g} is under the median {self.median:g}")
        return self

    def draw(self, chance: random.Random) -> float:
        """Return the size of one organization."""
        deviation = chance.gauss(0.0, 1.0)
        if self.median == 0:
            return 0.0
        value = self.median * math.exp(math.log(self.p95 / self.median) / _P95 * deviation)
        return value if self.most is None else min(value, self.most)


def _as_spread(value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"median": value, "p95": value} if is_number else value


Size = Annotated[Spread, BeforeValidator(_as_spread)]


class Options(_Strict):
    """Options of the moves: the same names as the DAG's Params."""

    strategy: Literal["online", "freeze-first"] = "online"
    rows_per_s: float | None = Field(default=None, gt=0)
    keys_per_s: float | None = Field(default=None, gt=0)
    pause_budget_ms: float = Field(default=1_000, ge=20)
    soak_s: float = Field(default=60, ge=0, le=86_400)
    ttl_s: float = Field(default=86_400, ge=0, le=90 * 86_400)


class Cohort(_Strict):
    """Organizations that are alike."""

    name: str = Field(min_length=1, max_length=100)
    what: str = ""
    count: int = Field(ge=1, le=1_000_000)
    source: str
    destinations: tuple[str, ...] = Field(min_length=1)
    rows: Size
    keys: Size = Spread(median=0, p95=0)
    changed_rows_per_s: Size = Spread(median=0, p95=0)
    after: tuple[str, ...] = ()
    options: Options = Options()


class Cell(_Strict):
    """What moves may use of a cell. None: as much as they ask for."""

    cores: float | None = Field(default=None, gt=0)
    rows_per_s: float | None = Field(default=None, gt=0)
    keys_per_s: float | None = Field(default=None, gt=0)
    moves_at_once: int | None = Field(default=None, ge=1)


class AtOnce(_Strict):
    """Tasks of one kind at once over all runs, as the DAG has them; None for no limit."""

    plan: int | None = Field(default=4, ge=1)
    copy_: int | None = Field(default=4, ge=1, alias="copy")
    sync: int | None = Field(default=None, ge=1)
    verify: int | None = Field(default=4, ge=1)
    cutover: int | None = Field(default=4, ge=1)
    soak: int | None = Field(default=None, ge=1)
    cleanup: int | None = Field(default=2, ge=1)


class Machines(_Strict):
    """The mover's machines and Airflow's limits."""

    name: str = Field(min_length=1, max_length=100)
    what: str = ""
    workers: int = Field(default=1, ge=1, le=10_000)
    cores: float = Field(default=2, gt=0)
    """Of each worker."""
    slots: int = Field(default=16, ge=1)
    """Tasks at once on each worker."""
    schedulers: int = Field(default=1, ge=1)
    scheduler_apart: bool = False
    """Schedulers have a core each, beside those of the workers."""
    cells_here: bool = False
    """The cells' and the topology's servers run on the workers' cores, too: a trial at home."""
    airflow: bool = True
    """False: the library alone, without Airflow's cost."""
    runs_at_once: int = Field(default=8, ge=1)
    wave: int = Field(default=25, ge=1, le=25)
    barriers: int = Field(default=1, ge=1)
    """Cutovers at the barrier at once; those that wait for their turn hold up nobody else."""
    small: int = Field(default=10_000, ge=0)
    """Up to so many rows and keys, copy, sync and verify are done in the task of plan."""
    short_soak_s: float = Field(default=2, ge=0)
    """A soak up to so long is done in the task of cutover."""
    wait_in_run_s: float = Field(default=3_600, ge=0)
    """With a longer TTL a run ends when its organizations are retained."""
    at_once: AtOnce = AtOnce()


class Scenario(_Strict):
    """The whole file."""

    seed: int = 1
    cohorts: tuple[Cohort, ...] = Field(min_length=1)
    cells: Mapping[str, Cell] = Field(min_length=1)
    machines: tuple[Machines, ...] = Field(min_length=1)
    rates: Mapping[str, StageRates] = {}
    orchestration: Orchestration | None = None

    @model_validator(mode="after")
    def _names_are_known(self) -> Scenario:
        names = [cohort.name for cohort in self.cohorts]
        faults = [f"cohort {name!r} is there twice" for name in _twice(names)]
        faults += [f"machines {n!r} are there twice" for n in _twice(m.name for m in self.machines)]
        for number, cohort in enumerate(self.cohorts):
            where = f"cohorts.{number} ({cohort.name})"
            for field, cells in (
                ("source", (cohort.source,)),
                ("destinations", cohort.destinations),
            ):
                faults += [
                    f"{where}.{field}: there is no cell {cell!r}{_guess(cell, self.cells)}"
                    for cell in cells
                    if cell not in self.cells
                ]
            if cohort.source in cohort.destinations:
                faults.append(f"{where}: {cohort.source!r} is its source and its destination")
            faults += [
                f"{where}.after: {name!r} is no cohort before it{_guess(name, names)}"
                for name in cohort.after
                if name not in names[:number]
            ]
        faults += [
            f"rates.{name}: there is no such step{_guess(name, STAGES)}"
            for name in self.rates
            if name not in STAGES
        ]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def narrowed(
        self, only: Sequence[str] = (), on: Sequence[str] = (), seed: int | None = None
    ) -> Scenario:
        """Return it with these cohorts and machines alone, all if none is named.

        Raises:
            InvalidInput: there is no such cohort, or no such machines.
        """
        for asked, there, what in (
            (only, [one.name for one in self.cohorts], "cohort"),
            (on, [one.name for one in self.machines], "machines"),
        ):
            for name in asked:
                if name not in there:
                    raise InvalidInput(
                        f"there is no {what} {name!r}{_guess(name, there)}",
                        hint=f"the file has {', '.join(map(repr, there))}",
                    )
        cohorts = tuple(one for one in self.cohorts if not only or one.name in only)
        machines = tuple(one for one in self.machines if not on or one.name in on)
        changes = {"cohorts": cohorts, "machines": machines}
        return self.model_copy(update=changes | ({} if seed is None else {"seed": seed}))

    def rates_over(self, other: Rates) -> Rates:
        """Return the rates that the file itself gives, and the other's for the rest."""
        stages = dict.fromkeys(self.rates, "the file")
        if self.orchestration is not None:
            stages["orchestration"] = "the file"
        own = Rates(
            stages=self.rates,
            orchestration=self.orchestration or Orchestration(),
            origins=stages,
        )
        return own.over(other)


def _twice(names: Any) -> list[str]:
    found = list(names)
    return sorted({name for name in found if found.count(name) > 1})


def _guess(name: str, known: Any) -> str:
    near = difflib.get_close_matches(str(name), [str(one) for one in known], n=1)
    return f", did you mean {near[0]!r}?" if near else ""


@dataclass(frozen=True, slots=True)
class Subject:
    """One organization that is to be moved."""

    name: str
    source: str
    destination: str
    rows: float
    keys: float
    changed_rows_per_s: float
    options: Options


def draw(cohort: Cohort, seed: int) -> Iterator[Subject]:
    """Yield the organizations of a cohort, always the same for the same seed."""
    chance = random.Random(f"{seed} {cohort.name}")  # noqa: S311 - a draw, no secret
    for number in range(cohort.count):
        yield Subject(
            name=f"{cohort.name}-{number + 1}",
            source=cohort.source,
            destination=cohort.destinations[number % len(cohort.destinations)],
            rows=cohort.rows.draw(chance),
            keys=cohort.keys.draw(chance),
            changed_rows_per_s=cohort.changed_rows_per_s.draw(chance),
            options=cohort.options,
        )


def example() -> str:
    """Return the file of the requirements' cohorts, as text."""
    return resources.files(__package__).joinpath("cohorts.yaml").read_text("utf-8")


def load(path: Path | None) -> Scenario:
    """Read and validate a file; None for the cohorts of the requirements.

    Raises:
        InvalidInput: it is missing or wrong; names the value, its place and the remedy.
    """
    where = str(path) if path is not None else "the cohorts of the requirements"
    try:
        raw: Any = yaml.safe_load(example() if path is None else path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}", hint=_GUIDE) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInput(
            f"{path} is not YAML: {' '.join(str(error).split())}", hint=_GUIDE
        ) from error
    if not isinstance(raw, dict):
        found = "is empty" if raw is None else f"holds a {type(raw).__name__}, not cohorts"
        raise InvalidInput(f"{where} {found}", hint=_GUIDE)
    try:
        return Scenario.model_validate(raw)
    except ValidationError as error:
        faults = "; ".join(_describe(fault) for fault in error.errors())
        raise InvalidInput(f"{where}: {faults}", hint=_GUIDE) from error


def _describe(fault: Any) -> str:
    place = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        text = "there is no such setting" + _guess(fault["loc"][-1], _SETTINGS)
    else:
        text = str(fault["msg"]).removeprefix("Value error, ")
        if isinstance(fault["input"], str | int | float) and fault["type"] != "value_error":
            text = f"{fault['input']!r}: {text}"
    return f"{place}: {text}" if place else text


_SETTINGS = sorted(
    {
        field.alias or name
        for model in (
            *(Scenario, Cohort, Options, Spread, Cell, Machines, AtOnce),
            *(StageRates, Cost, Orchestration),
        )
        for name, field in model.model_fields.items()
    }
)
