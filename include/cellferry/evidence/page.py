"""The readable page of a pack: made from the document alone, so that it can be made again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from importlib import resources
from typing import Any

import jinja2

from cellferry.readable import size

#: Geometry of the drawings, in units of their own.
WIDTH, LANE, LABEL, ROOM = 960.0, 26.0, 118.0, 92.0
_ENDED = frozenset({"completed", "aborted", "rolled_back"})

#: Where there is no figure.
NOTHING = "-"


def render(document: Mapping[str, Any]) -> str:
    """Return the page of a document; the same document gives the same page.

    Everything is escaped, and nothing is loaded from anywhere.
    """
    return _template().render(
        document=document,
        drawing=_timeline(document),
        pause=_pause(document["pause"]),
        copies=_copies(document["observed"]),
    )


@cache
def _template() -> jinja2.Template:
    text = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "count": _count,
        "duration": duration,
        "figure": figure,
        "moment": moment,
        "state": lambda name: str(name).replace("_", " "),
        "json": lambda value: json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True),
        "line": lambda value: json.dumps(value, ensure_ascii=False, sort_keys=True),
        "change": change,
    }
    return environment.from_string(text)


# ── words ───────────────────────────────────────────────────────────────────────────────────────


def _count(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Return a time as a person would say it: `38 ms`, `2.4 s`, `3 min 5 s`, `1 h 0 min`."""
    if seconds is None:
        return NOTHING
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, name, smaller, its in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // smaller} {its}"
    return f"{whole // 60} min {whole % 60} s"


def figure(value: float | None, unit: str) -> str:
    """Return a figure in its unit."""
    if value is None:
        return NOTHING
    if unit == "s":
        return duration(value) if value else "under 0.1 s"
    return size(int(value)) if unit == "bytes" else f"{value:,.0f}"


def change(planned: float | None, happened: float | None, unit: str) -> str:
    """Return how far what happened is from what was planned, for people."""
    if planned is None or happened is None:
        return ""
    if planned == happened:
        return "as planned"
    if unit == "s" and not planned:
        return ""  # plans are in tenths of a second
    if not planned or happened / planned >= 10:
        return "far more"
    return f"{(happened - planned) / planned:+.0%}"


def moment(text: str | None) -> str:
    """Return a moment in UTC to the millisecond."""
    if not text:
        return NOTHING
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    except ValueError:
        return text


# ── drawings ────────────────────────────────────────────────────────────────────────────────────


def _timeline(document: Mapping[str, Any]) -> dict[str, Any]:
    """Place the states in lanes; widths follow the square root of the time."""
    spans: Sequence[Mapping[str, Any]] = document["states"]
    weights = [
        0.0 if one["state"] in _ENDED and not one["until"] else math.sqrt(one["seconds"])
        for one in spans
    ]
    least = 0.004 * (sum(weights) or 1.0)
    weights = [max(one, least) for one in weights]
    total = sum(weights) or 1.0
    inner = WIDTH - LABEL - ROOM
    edges = [LABEL]
    for weight in weights:
        edges.append(edges[-1] + inner * weight / total)
    lanes = list(dict.fromkeys(one["state"] for one in spans))
    bars = []
    for one, left, right in zip(spans, edges, edges[1:], strict=False):
        ended = one["state"] in _ENDED and not one["until"]
        bars.append(
            {
                "state": one["state"],
                "x": round(left, 2),
                "width": round(max(right - left, 2.0), 2),
                "y": lanes.index(one["state"]) * LANE,
                "text": "" if ended else duration(one["seconds"]) + ("" if one["until"] else " …"),
                "title": f"{one['state'].replace('_', ' ')} since {moment(one['since'])} UTC",
            }
        )
    last_of = {bar["state"]: bar for bar in bars}
    for bar in bars:
        # a state that came again has its durations together, behind its last bar
        again = [one["text"] for one in bars if one["state"] == bar["state"] and one["text"]]
        bar["label"] = " + ".join(again[:3]) if bar is last_of[bar["state"]] else ""
        bar["mid"] = bar["y"] + LANE / 2
    return {
        "lanes": [{"state": name, "y": number * LANE} for number, name in enumerate(lanes)],
        "bars": bars,
        "marks": _marks(document, edges),
        "height": max(1, len(lanes)) * LANE,
        "width": WIDTH,
        "label": LABEL,
        "right": WIDTH - ROOM,
        "lane": LANE,
    }


def _marks(document: Mapping[str, Any], edges: Sequence[float]) -> list[dict[str, Any]]:
    spans: Sequence[Mapping[str, Any]] = document["states"]
    starts = [datetime.fromisoformat(one["since"]) for one in spans]
    if not starts:
        return []

    def place(text: str) -> float:
        at = datetime.fromisoformat(text)
        number = max((index for index, start in enumerate(starts) if start <= at), default=0)
        seconds = spans[number]["seconds"] or 1.0
        share = min(1.0, max(0.0, (at - starts[number]).total_seconds() / seconds))
        return edges[number] + share * (edges[number + 1] - edges[number])

    marks = []
    stops = {one["id"] for one in document["stops"]}
    for one in (*document["audit"], *(x for x in document["stops"] if x["action"][:4] == "cell")):
        if one["action"] == "flip":
            kind, text = "flip", f"flip: epoch {one['epoch']}"
        elif one["id"] in stops:
            kind, text = "stop", one["action"]
        elif one["action"] == "lease":
            kind, text = "lease", f"attempt {one['attempt']}"
        else:
            continue
        x = round(place(one["at"]), 2)
        marks.append({"kind": kind, "x": x, "text": text, "title": f"{text}, {moment(one['at'])}"})
    return marks


def _moment_of_part(part: tuple[str, float]) -> int:
    """Order the parts of a pause as they happen; JSON in the topology keeps no order."""
    # "release": of moves before the hand-over let writers go by itself
    order = ("freeze postgres", "freeze", "finish", "flip", "hand", "release")
    return next((n for n, head in enumerate(order) if part[0].startswith(head)), len(order))


def _copies(observed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Put the two copies of each store side by side."""
    tables = []
    for store in dict.fromkeys(one["store"] for one in observed):
        sides = {one["copy_of"]: one for one in observed if one["store"] == store}
        parts = {
            which: {part["part"]: part for part in side["parts"]} for which, side in sides.items()
        }
        names = sorted({name for found in parts.values() for name in found})
        tables.append(
            {
                "store": store,
                "sides": sides,
                "rows": [
                    {
                        "part": name,
                        "kept": parts.get("kept", {}).get(name),
                        "serving": parts.get("serving", {}).get(name),
                    }
                    for name in names
                ],
            }
        )
    return tables


def _pause(pause: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Place the parts of each write pause on a bar, and what writers waited as dots below it."""
    bars = []
    writers = pause["writers"]
    for name, found in (
        ("cutover", pause["controller"]),
        ("roll-back", pause["controller_back"]),
    ):
        parts = (found or {}).get("parts") or {}
        if not parts:
            continue
        total = sum(parts.values())
        shown = writers if name == "cutover" else None
        full = max(total, shown["longest"] if shown else 0.0) or 1.0
        x, placed = 0.0, []
        for number, (part, seconds) in enumerate(sorted(parts.items(), key=_moment_of_part)):
            width = WIDTH * seconds / full
            placed.append(
                {
                    "name": part,
                    "seconds": seconds,
                    "x": round(x, 2),
                    "width": round(max(width, 1.0), 2),
                    "shade": number % 6,
                }
            )
            x += width
        bars.append(
            {
                "name": name,
                "total": total,
                "parts": placed,
                "full": full,
                "writers": shown,
                "dots": [
                    round(min(WIDTH - 4, max(4.0, WIDTH * one / full)), 2)
                    for one in (shown["seconds"][:500] if shown else ())
                ],
            }
        )
    return bars
