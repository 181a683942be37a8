"""The kill matrix: every phase, with every fault, with every aftermath, on real servers.

`make test-fault [SEED=n] [ONLY='text[;text…]'] [JOBS=n]` runs it; see docs/testing-faults.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from queue import Empty
from typing import Any

from tests.fault.faults import FAULTS
from tests.fault.sabotage import SABOTAGE
from tests.fault.scenario import NOT_WRITABLE_S, REAPED_S, Outcome, Scenario, run, scenarios
from tests.fault.stepper import ROOT
from tests.fault.world import World
from tests.in_memory import use_memory

from cellferry.parent_process import end_with_parent

#: A worker's servers are made anew after so many scenarios, so that what stays in the cells (the
#: neighbours, and organizations that have arrived) does not slow the next ones down.
_WORLD_LASTS = 60
#: A worker that says nothing for so long hangs: a fault that the steps' own deadlines miss.
_SILENT_S = 600.0


def chosen(everything: Sequence[Scenario], only: str | None) -> list[Scenario]:
    """Return the scenarios whose name contains one of the texts in `only`, between semicolons."""
    if not only:
        return list(everything)
    wanted = [text.strip() for text in only.split(";") if text.strip()]
    exact = [one for one in everything if one.name in wanted]
    return exact or [one for one in everything if any(text in one.name for text in wanted)]


def sample(everything: Sequence[Scenario], count: int, seed: int) -> list[Scenario]:
    """Choose about `count` scenarios: each fault once or more, phases and aftermaths by chance."""
    chance = random.Random(seed)
    by_fault: dict[str, list[Scenario]] = defaultdict(list)
    for one in everything:
        by_fault[one.fault.name].append(one)
    picked = [chance.choice(group) for group in by_fault.values()]
    rest = [one for one in everything if one not in picked]
    return picked + chance.sample(rest, max(0, min(len(rest), count - len(picked))))


def play(todo: Sequence[Scenario], jobs: int, *, sabotage: str | None = None) -> Iterator[Outcome]:
    """Run scenarios, each worker on servers of its own; outcomes come as they are done."""
    context = multiprocessing.get_context("spawn")
    tasks: Any = context.Queue()
    results: Any = context.Queue()
    # In any order, so that a run that is ended early says something of everything; worlds with a
    # standby last for one scenario and come last.
    order = random.Random(todo[0].seed if todo else 0).sample(list(todo), len(todo))
    for one in sorted(order, key=lambda one: one.fault.standby_of or ""):
        tasks.put((one.name, one.seed))
    jobs = max(1, min(jobs, len(todo)))
    for _ in range(jobs):
        tasks.put(None)
    workers = [
        context.Process(target=_work, args=(tasks, results, sabotage), name=f"fault-{number}")
        for number in range(jobs)
    ]
    for worker in workers:
        worker.start()
    left = len(todo)
    heard = time.monotonic()
    try:
        while left:
            try:
                outcome = results.get(timeout=1)
            except Empty:
                if not any(worker.is_alive() for worker in workers):
                    raise RuntimeError(
                        f"every worker ended; {left} scenarios were not run"
                    ) from None
                if time.monotonic() - heard > _SILENT_S:
                    raise RuntimeError(f"nothing for {_SILENT_S:.0f} s") from None
                continue
            heard = time.monotonic()
            left -= 1
            yield outcome
    finally:
        tasks.cancel_join_thread()
        for worker in workers:
            worker.join(0 if left else 30)
            if worker.is_alive():
                worker.terminate()
                worker.join(20)


def _work(tasks: Any, results: Any, sabotage: str | None) -> None:

    def end(_number: int, _frame: object) -> None:
        results.cancel_join_thread()  # nobody may be there to read
        sys.exit(1)

    signal.signal(signal.SIGTERM, end)
    if (parent := multiprocessing.parent_process()) is not None and parent.pid is not None:
        end_with_parent(parent.pid, signal.SIGTERM)  # and with this worker its servers
    world: World | None = None
    played = 0
    try:
        while (task := tasks.get()) is not None:
            name, seed = task
            scenario = next(one for one in scenarios(seed) if one.name == name)
            fails_over = scenario.fault.standby_of is not None
            if world is not None and (played >= _WORLD_LASTS or fails_over):
                world.close()
                world, played = None, 0
            try:
                world = world or World(sabotage=sabotage, standby_of=scenario.fault.standby_of)
                outcome = run(world, scenario)
            except Exception:
                outcome = Outcome(
                    name,
                    scenario.row,
                    scenario.fault.name,
                    scenario.aftermath,
                    seed,
                    faults=[f"the harness failed: {traceback.format_exc()}"],
                )
            played += 1
            if (fails_over or not outcome.ok) and world is not None:
                # What a failure left behind would show again in the next scenario.
                world.close()
                world, played = None, 0
            results.put(outcome)
    finally:
        if world is not None:
            world.close()


def table(outcomes: Iterable[Outcome]) -> str:
    """Rows are phases, columns faults; a cell says ok and how long nothing could be written."""
    cells: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    rows: dict[str, None] = {}
    for one in outcomes:
        cells[one.row, one.fault].append(one)
    order = list(dict.fromkeys(one.row for one in scenarios(0)))
    rows = dict.fromkeys(row for row in order if any(key[0] == row for key in cells))
    columns = [one.name for one in FAULTS if any(key[1] == one.name for key in cells)]
    width = max((len(row) for row in rows), default=0)
    heads = [column.split() for column in columns]
    height = max((len(head) for head in heads), default=0)
    short = {"destination": "dest.", "postgres": "pg", "topology": "topol."}
    lines = [
        " " * width
        + "".join(
            f" {short.get(head[level], head[level]) if level < len(head) else '':>9}"
            for head in heads
        )
        for level in range(height)
    ]
    for row in rows:
        text = f"{row:<{width}}"
        for column in columns:
            found = cells.get((row, column), [])
            if not found:
                text += f" {'-':>9}"
            elif all(one.ok for one in found):
                text += f" {'ok ' + format(max(one.not_writable_s for one in found), '.1f'):>9}"
            else:
                text += f" {'FAILED':>9}"
        lines.append(text)
    return "\n".join(lines)


def story(one: Outcome) -> str:
    """What a failed scenario's reader needs: what is wrong, what happened, how to see it again."""
    return "\n".join(
        [
            f"FAILED {one.name} (seed {one.seed}, {one.strategy})",
            *(f"  fault: {text}" for text in one.faults),
            "  what happened:",
            *(f"    {text}" for text in one.timeline),
            "  audit:",
            *(f"    {text}" for text in one.audit),
            f"  alone: make test-fault SEED={one.seed} ONLY='{one.name}'",
        ]
    )


def verdict(outcomes: Sequence[Outcome], wanted: int) -> str:
    """The last line: how many of those that were wanted are well."""
    good = sum(one.ok for one in outcomes)
    longest = max(outcomes, key=lambda one: one.not_writable_s, default=None)
    acknowledged = sum(one.acknowledged for one in outcomes)
    return (
        f"{acknowledged:,} acknowledged writes: {sum(one.lost for one in outcomes)} lost, "
        f"{sum(one.doubled for one in outcomes)} doubled, "
        f"{sum(one.left_behind for one in outcomes)} left behind; longest time not writable "
        + (
            f"{longest.not_writable_s:.1f} s ({longest.name}; allowed {NOT_WRITABLE_S:.0f} s, "
            f"{REAPED_S:.0f} s where only the reaper acts)\n"
            if longest
            else "-\n"
        )
        + f"{good} of {wanted}"
    )


def _end_early(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run the matrix and print the table; 0 when all is well."""
    parser = argparse.ArgumentParser(prog="tests.fault.matrix", description=__doc__)
    parser.add_argument("--seed", type=int, default=None, help="chooses within scenarios")
    parser.add_argument(
        "--only", default=None, help="texts in the names of scenarios, between semicolons"
    )
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--sample", type=int, default=None, help="so many, chosen by the seed")
    parser.add_argument("--sabotage", choices=list(SABOTAGE), help="break the product on purpose")
    parser.add_argument("--list", action="store_true", help="only name the scenarios")
    parser.add_argument("--output", type=Path, default=ROOT / ".local/fault-matrix.json")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    todo = chosen(scenarios(seed), arguments.only)
    if arguments.sample:
        todo = sample(todo, arguments.sample, seed)
    if not todo:
        print(f"no scenario is called {arguments.only!r}; --list names them", file=sys.stderr)
        return 2
    if arguments.list:
        print("\n".join(one.name for one in todo))
        return 0
    place = "in memory" if use_memory() else f"below {tempfile.gettempdir()}"
    print(
        f"kill matrix: {len(todo)} scenarios, seed {seed}, {arguments.jobs} at once, data {place}",
        flush=True,
    )
    begun = time.monotonic()
    outcomes: list[Outcome] = []
    signal.signal(signal.SIGTERM, _end_early)
    try:
        for one in play(todo, arguments.jobs, sabotage=arguments.sabotage):
            outcomes.append(one)
            print(
                f"[{len(outcomes)}/{len(todo)}] {'ok    ' if one.ok else 'FAILED'} {one.name}: "
                f"{one.state}, not writable {one.not_writable_s:.1f} s, took {one.seconds:.0f} s",
                flush=True,
            )
            if not one.ok:
                print(story(one), flush=True)
            _save(arguments.output, seed, outcomes, len(todo), time.monotonic() - begun)
    except KeyboardInterrupt:
        print(f"\nended early: {len(todo) - len(outcomes)} scenarios were not run")
    print()
    print(table(outcomes))
    print()
    print(verdict(outcomes, len(todo)))
    return 0 if len(outcomes) == len(todo) and all(one.ok for one in outcomes) else 1


def _save(path: Path, seed: int, outcomes: Sequence[Outcome], wanted: int, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "seed": seed,
        "scenarios": wanted,
        "run": len(outcomes),
        "ok": sum(one.ok for one in outcomes),
        "lost": sum(one.lost for one in outcomes),
        "doubled": sum(one.doubled for one in outcomes),
        "left_behind": sum(one.left_behind for one in outcomes),
        "acknowledged": sum(one.acknowledged for one in outcomes),
        "longest_not_writable_s": max((one.not_writable_s for one in outcomes), default=0.0),
        "allowed_not_writable_s": {"retry, abort": NOT_WRITABLE_S, "reap": REAPED_S},
        "seconds": round(seconds, 1),
        "outcomes": [one.as_dict() for one in outcomes],
    }
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(document, indent=1), encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
