"""Where explorations start, and within which bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tests.model.protocol import US, Cell, Gate, Model, Scripts, State, Topology, Writer


@dataclass(frozen=True)
class Scenario:
    """A start and its bounds; `about` says what it is for."""

    name: str
    about: str
    start: State
    model: Model

    def bounded(self, name: str, faults: int, scripts: Scripts, **changes: Any) -> Scenario:
        """The same with other bounds."""
        model = replace(self.model, scripts=scripts, **changes)
        start = self.start._replace(faults=faults, writers=_writers(model))
        about = f"{self.about.partition(';')[0]}; writers: {len(scripts)}"
        return replace(self, name=name, about=about, start=start, model=model)


def _writers(model: Model) -> tuple[Writer, ...]:
    return tuple(Writer() for _ in model.scripts)


def planned(model: Model, faults: int) -> State:
    """Nothing has happened: rows in A only, no gate anywhere."""
    return State(
        Topology("planned"),
        (Cell(("", "")), Cell((None, None))),
        _writers(model),
        faults=faults,
    )


def copied(model: Model, faults: int) -> State:
    """Armed, copied and verified; ready to cut over."""
    return State(
        Topology("ready", attempt=1, verified=True),
        (
            Cell(("", ""), Gate("open", True, True, US, 1, 0), lease=1),
            Cell(("", ""), Gate("importing", False, True, US, 1, 0), lease=1, copied=2),
        ),
        _writers(model),
        faults=faults,
    )


def soaking(model: Model, faults: int) -> State:
    """Cut over: B serves and logs for the way back, A is kept."""
    return State(
        Topology("soaking", epoch=1, attempt=1, verified=True, handed=True),
        (
            Cell(("", ""), Gate("moved", False, True, US, 1, 1), lease=1),
            Cell(("", ""), Gate("open", True, True, US, 1, 1), lease=1, copied=2),
        ),
        _writers(model),
        faults=faults,
    )


def retained(model: Model, faults: int) -> State:
    """Soaked; the old copy waits for its clean-up."""
    start = soaking(model, faults)
    return start._replace(topology=start.topology._replace(state="retained"))


def _scenario(
    name: str,
    about: str,
    start: Callable[[Model, int], State],
    faults: int,
    scripts: Scripts,
    **bounds: Any,
) -> Scenario:
    model = Model(scripts=scripts, **bounds)
    return Scenario(name, about, start(model, faults), model)


RC, RR = "rc", "rr"
ONE = ((RC, ("a+",)),)
TWO = ((RC, ("a+",)), (RR, ("b-",)))
THREE = ((RC, ("a+", "a+")), (RR, ("b-",)))

CAPTURE = _scenario(
    "capture",
    "from nothing to the flip, and abort: arming, copy, rounds; two writers of one row",
    planned,
    1,
    ((RC, ("a+",)), (RR, ("a+",))),
    goals=("forward", "abort"),
)
CUTOVER = _scenario(
    "cutover",
    "cutover and abort; two writers, three operations on two rows",
    copied,
    1,
    THREE,
    goals=("forward", "abort"),
)
SWITCHBACK = _scenario(
    "switchback",
    "reverse rounds and the way back; two writers, three operations on two rows",
    soaking,
    1,
    THREE,
    goals=("forward", "back"),
    last="retained",
)
CLEANUP = _scenario(
    "clean-up",
    "clean-up, roll-back and a later return, old routes; two writers",
    retained,
    1,
    ((RC, ("a+",)), (RR, ("b+",))),
    goals=("clean", "back"),
    returns=True,
)
WHOLE = _scenario(
    "whole life",
    "from nothing to completed, rolled back or aborted; one writer",
    planned,
    1,
    ONE,
    goals=("forward", "abort", "back", "clean"),
    last="retained",
)

SCENARIOS = (
    CAPTURE,
    CUTOVER,
    CUTOVER.bounded("cutover, two faults", 2, ONE),
    SWITCHBACK,
    SWITCHBACK.bounded("switchback, two faults", 2, ONE),
    CLEANUP,
    WHOLE,
)
#: Minutes, and gigabytes of memory.
DEEP = (
    CAPTURE.bounded("capture, two faults", 2, ((RR, ("a+",)),)),
    CUTOVER.bounded("cutover, two faults, two writers", 2, TWO),
    SWITCHBACK.bounded("switchback, two faults, two writers", 2, TWO),
    CLEANUP.bounded("clean-up, two faults", 2, ONE),
    WHOLE.bounded("whole life, two faults", 2, ONE),
)
