"""Explores every reachable state of the protocol's model, breadth first.

python -m tests.model.explore             the honest protocol in all scenarios: states, seconds
python -m tests.model.explore --deep      the same with wider bounds
python -m tests.model.explore --variants  the table of broken variants
python -m tests.model.explore --trace "freeze does not drain"      one counterexample, readable
"""

from __future__ import annotations

import argparse
import itertools
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.model.protocol import WRITABLE, Model, State, broken_invariants, is_writable, steps

if TYPE_CHECKING:
    from tests.model.scenarios import Scenario
    from tests.model.variants import Variant


@dataclass
class Found:
    """What an exploration found.

    Attributes:
        states: how many different states are reachable; all of them unless `broken`.
        steps: how many steps lead from one to another.
        depth: the longest shortest way to a state, in steps.
        broken: the invariant that does not hold; empty when all hold.
        trace: the shortest way there, in words.
    """

    states: int = 0
    steps: int = 0
    depth: int = 0
    broken: str = ""
    trace: list[str] = field(default_factory=list)
    seconds: float = 0.0


def explore(model: Model, start: State, *, progress: bool = True, most: int = 20_000_000) -> Found:
    """Visit every state that `model` reaches from `start`; stop at the first broken invariant.

    Breadth first, so that a counterexample is a shortest one. When every state is safe it is asked
    of each whether a state in which the organization is writable can be reached from it without
    further faults (`progress`).

    Raises:
        OverflowError: there are more than `most` states.
    """
    began = time.process_time()
    numbers: dict[State, int] = {start: 0}
    parents = array("l", [-1])
    sources, targets = array("l"), array("l")  # the steps that hope may rely on
    writable = bytearray([is_writable(start)])
    found = Found()
    level, states = [start], 0
    while level:
        found.depth += 1
        following: list[State] = []
        for state in level:
            number = numbers[state]
            for step in steps(model, state):
                found.steps += 1
                after = step.state
                known = numbers.get(after)
                if known is None:
                    known = len(numbers)
                    numbers[after] = known
                    parents.append(number)
                    following.append(after)
                    writable.append(is_writable(after))
                    wrong = [one for one in broken_invariants(after) if one in model.watches]
                    if wrong:
                        found.broken = wrong[0]
                        return _finished(found, model, numbers, parents, after, began)
                if step.hope and progress and known != number:
                    sources.append(number)
                    targets.append(known)
            if len(numbers) > most:
                raise OverflowError(f"more than {most} states")
        level = following
    if progress:
        states = len(numbers)
        stuck = _stuck(states, sources, targets, writable)
        if stuck is not None:
            found.broken = WRITABLE
            last = next(state for state, number in numbers.items() if number == stuck)
            return _finished(found, model, numbers, parents, last, began)
    return _finished(found, model, numbers, parents, None, began)


def _stuck(
    states: int, sources: array[int], targets: array[int], writable: bytearray
) -> int | None:
    """Return the first state from which no writable state can be reached."""
    count = array("l", bytes(8 * (states + 1)))
    for target in targets:
        count[target + 1] += 1
    for number in range(states):
        count[number + 1] += count[number]
    place = array("l", count)
    before = array("l", bytes(8 * len(sources)))
    for source, target in zip(sources, targets, strict=True):
        before[place[target]] = source
        place[target] += 1
    reaches = bytearray(writable)
    pending = [number for number in range(states) if reaches[number]]
    while pending:
        number = pending.pop()
        for at in range(count[number], count[number + 1]):
            source = before[at]
            if not reaches[source]:
                reaches[source] = 1
                pending.append(source)
    stuck = reaches.find(0)
    return None if stuck < 0 else stuck


def _finished(
    found: Found,
    model: Model,
    numbers: dict[State, int],
    parents: array[int],
    last: State | None,
    began: float,
) -> Found:
    found.states = len(numbers)
    found.seconds = time.process_time() - began
    if last is None:
        return found
    order = list(numbers)
    way = [numbers[last]]
    while parents[way[-1]] >= 0:
        way.append(parents[way[-1]])
    way.reverse()
    for before, after in itertools.pairwise(way):
        text = next(step.text for step in steps(model, order[before]) if step.state == order[after])
        found.trace.append(text)
    return found


def _print_honest(scenarios: Sequence[Scenario]) -> bool:
    print("| scenario | what it explores | faults | states | steps | longest way | seconds |")
    print("|---|---|---|---|---|---|---|")
    holds, states, seconds = True, 0, 0.0
    for scenario in scenarios:
        found = explore(scenario.model, scenario.start)
        states, seconds = states + found.states, seconds + found.seconds
        print(
            f"| {scenario.name} | {scenario.about} | {scenario.start.faults} | {found.states:,} |"
            f" {found.steps:,} | {found.depth} | {found.seconds:.0f} |",
            flush=True,
        )
        if found.broken:
            holds = False
            _print_trace(found)
    print(f"\n{states:,} states, {seconds:.0f} s: ", end="")
    print("every invariant holds in every state" if holds else "AN INVARIANT IS BROKEN")
    return holds


def _print_variants(variants: Sequence[Variant]) -> bool:
    print("| left out | what happens instead | breaks | faults | steps of the trace | states |")
    print("|---|---|---|---|---|---|")
    bites = True
    for variant in variants:
        found = explore(variant.scenario.model, variant.scenario.start)
        bites = bites and found.broken == variant.breaks
        print(
            f"| {variant.name} | {variant.what} | {found.broken.partition(':')[0] or 'NOTHING'} |"
            f" {variant.scenario.start.faults} | {len(found.trace)} | {found.states:,} |",
            flush=True,
        )
    return bites


def _print_trace(found: Found) -> None:
    print(f"\n{found.broken or 'nothing is broken'}")
    for number, text in enumerate(found.trace, start=1):
        print(f"  {number:3} {text}")


def main() -> int:
    """Run from the command line; 0 when everything is as it must be."""
    from tests.model.scenarios import DEEP, SCENARIOS
    from tests.model.variants import VARIANTS

    parser = argparse.ArgumentParser(prog="python -m tests.model.explore")
    parser.add_argument("--deep", action="store_true", help="wider bounds: minutes, gigabytes")
    parser.add_argument("--variants", action="store_true", help="the table of broken variants")
    parser.add_argument("--trace", metavar="VARIANT", help="the counterexample of one variant")
    chosen = parser.parse_args()
    if chosen.trace:
        variant = next((one for one in VARIANTS if one.name == chosen.trace), None)
        if variant is None:
            parser.error(f"no such variant; there are: {', '.join(one.name for one in VARIANTS)}")
        _print_trace(explore(variant.scenario.model, variant.scenario.start))
        return 0
    if chosen.variants:
        return 0 if _print_variants(VARIANTS) else 1
    return 0 if _print_honest(DEEP if chosen.deep else SCENARIOS) else 1


if __name__ == "__main__":
    raise SystemExit(main())
