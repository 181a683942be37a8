"""Writes `docs/benchmarks.md` from the JSON of the sections in `docs/benchmarks/`."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from tests.bench.harness import Section, Value

from cellferry.local import postgres_binaries
from cellferry.local.processors import withheld_share

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs/benchmarks"
PAGE = ROOT / "docs/benchmarks.md"

_HEAD = """# Benchmarks

Written by `make bench` from `docs/benchmarks/*.json`; no figure here was typed by hand. Each
section runs on servers of its own, with its peers in the same run, one after the other in a
turning order; figures are medians where several runs are named. Ratios travel between machines,
seconds do not.

"""


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def yardstick() -> float:
    """Return the processor time of a fixed loop, in seconds.

    Hosts lend the same processor faster and slower: figures of two runs compare by this one.
    """
    took = []
    for _ in range(3):
        began = time.process_time()
        total = 0
        for number in range(3_000_000):
            total += number * number & 7
        took.append(time.process_time() - began)
    return statistics.median(took)


def circumstances(
    load_before: float,
    cpu_before: Any,
    began: float,
    scale: float,
    runs: int,
    yardsticks: Sequence[float],
) -> dict[str, Any]:
    """Return what the figures of a section depend on: machine, versions, load, size."""
    memory = psutil.virtual_memory().total / 2**30
    commit = _git("rev-parse", "--short", "HEAD")
    # What an earlier section wrote into the page changes nothing that is measured.
    if _git("status", "--porcelain", "--", ".", *(f":(exclude){one}" for one in (FOLDER, PAGE))):
        commit += "-dirty"
    return {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(began)),
        "took_s": round(time.time() - began),
        "machine": f"{os.cpu_count()} cores ({_processor()}), {memory:.0f} GiB",
        "system": platform.system(),
        "python": platform.python_version(),
        "postgresql": str(postgres_binaries.major_version(postgres_binaries.wheel_bin_dir())),
        "load_before": round(load_before, 2),
        "withheld": round(withheld_share(cpu_before, psutil.cpu_times()), 3),
        "yardstick_s": [round(one, 3) for one in yardsticks],
        "commit": commit or "unknown",
        "scale": scale,
        "runs": runs,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def save(name: str, section: Section, around: Mapping[str, Any], folder: Path = FOLDER) -> Path:
    """Write the JSON of a section; returns its file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {"circumstances": dict(around), **asdict(section)}
    for target, told in zip(section.targets, content["targets"], strict=True):
        told["holds"] = target.holds
    text = json.dumps(content, indent=1, ensure_ascii=False, default=float)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def page(order: Sequence[str], folder: Path = FOLDER) -> str:
    """Return the page of all sections that have been run, in this order."""
    sections = {
        name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in order
        if (folder / f"{name}.json").is_file()
    }
    parts = [_HEAD, _targets(sections)]
    parts += [_section(name, content) for name, content in sections.items()]
    return "".join(parts).rstrip() + "\n"


def _targets(sections: Mapping[str, Any]) -> str:
    rows = [
        [
            f"[{content['title']}](#{_anchor(content['title'])})",
            one["what"],
            f"{'≥' if one['at_least'] else '≤'} {_figure(one['limit'])} {one['unit']}",
            f"{_figure(one['found'])} {one['unit']}",
            "yes" if one["holds"] else "**no**",
            one["why"],
        ]
        for content in sections.values()
        for one in content["targets"]
    ]
    headings = ("Section", "Target", "Wanted", "Measured", "Holds", "What limits it")
    return "## Targets\n\n" + _table(headings, rows) + "\n"


def _section(name: str, content: Mapping[str, Any]) -> str:
    around = content["circumstances"]
    lines = [f"\n## {content['title']}\n\n", " ".join(content["method"].split()), "\n\n"]
    for table in content["tables"]:
        if table["title"]:
            lines.append(f"**{table['title']}**\n\n")
        lines += [_table(table["headings"], table["rows"]), "\n"]
    lines += [f"- {remark}\n" for remark in content["remarks"]]
    if content["remarks"]:
        lines.append("\n")
    lines.append(
        f"*{around['when']}, commit {around['commit']}, {around['machine']},"
        f" PostgreSQL {around['postgresql']}, Python {around['python']}; load before"
        f" {around['load_before']}{_withheld(around)}{_yardstick(around)};"
        f" scale {_figure(around['scale'])}, {_runs(around['runs'])}, {around['took_s']} s."
        f" Data: `docs/benchmarks/{name}.json`.*\n"
    )
    return "".join(lines)


def _runs(count: int) -> str:
    return "each once" if count == 1 else f"{count} runs"


def _withheld(around: Mapping[str, Any]) -> str:
    """Say how much slower the machine's host made everything, by what it gave to others."""
    if (share := around.get("withheld")) is None:
        return ""
    return f", {share:.0%} of the processors withheld by the host"


def _yardstick(around: Mapping[str, Any]) -> str:
    """Say how fast the processors were before and after."""
    if not (found := around.get("yardstick_s")):
        return ""
    return f", a fixed loop took {' and '.join(f'{one:.2f}' for one in found)} s before and after"


def _anchor(title: str) -> str:
    kept = "".join(one for one in title.lower() if one.isalnum() or one in " -")
    return kept.replace(" ", "-")


def _table(headings: Sequence[str], rows: Sequence[Sequence[Value]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    lines += ["| " + " | ".join(_figure(one) for one in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _figure(value: Value) -> str:
    """Show a figure with as many digits as carry meaning."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
