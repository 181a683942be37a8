"""`make bench [ONLY=copy,gate] [SCALE=0.01] [RUNS=3]`: measure, and write `docs/benchmarks.md`."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import psutil
from tests.bench import document
from tests.bench.harness import Bench, Section

#: Modules of this folder, in the order of the page.
SECTIONS = (
    "copying",
    "verifying",
    "pause",
    "pause_sizes",
    "neighbours",
    "gate_cost",
    "redis_copy",
    "capture",
    "orchestration",
    "simulation",
    "reshard",
)


def measure(name: str, scale: float, runs: int) -> tuple[Section, dict[str, object]]:
    """Run one section; returns it with its circumstances."""
    load, processors, began = os.getloadavg()[0], psutil.cpu_times(), time.time()
    before = document.yardstick()
    with Bench.opened(name, scale, runs) as bench:
        section = importlib.import_module(f"tests.bench.{name}").run(bench)
    speeds = (before, document.yardstick())
    around = document.circumstances(load, processors, began, scale, section.runs or runs, speeds)
    return section, around


def main() -> int:
    """Run the sections that were asked for, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    named = ", ".join(SECTIONS)
    parser.add_argument("--only", default="", help=f"sections, between commas: {named}")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full sizes")
    parser.add_argument("--runs", type=int, default=3, help="how often each contender runs")
    parser.add_argument("--folder", type=Path, help="write there, not into docs/")
    arguments = parser.parse_args()
    asked = [one.strip() for one in arguments.only.split(",") if one.strip()]
    if unknown := [one for one in asked if one not in SECTIONS]:
        parser.error(f"no section {', '.join(unknown)}; there are {named}")
    folder, page = document.FOLDER, document.PAGE
    if arguments.folder:
        folder, page = arguments.folder, arguments.folder / "benchmarks.md"
    # Told to end, it unwinds: every server and fleet that was started is stopped.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    missed, failed = 0, list[str]()
    for name in asked or SECTIONS:
        print(f"{name} …", flush=True)
        try:
            section, around = measure(name, arguments.scale, arguments.runs)
        except Exception:
            # The others' figures took long to make; the exit code tells.
            traceback.print_exc()
            failed.append(name)
            continue
        document.save(name, section, around, folder)
        page.write_text(document.page(SECTIONS, folder), encoding="utf-8")
        for target in section.targets:
            sign = "≥" if target.at_least else "≤"
            mark = "ok    " if target.holds else "MISSED"
            missed += not target.holds
            print(
                f"  {mark} {target.what}: {target.found:.4g} {target.unit}"
                f" (wanted {sign} {target.limit:g})",
                flush=True,
            )
    print(f"written: {page}; {missed} targets missed")
    if failed:
        print(f"could not be measured: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
