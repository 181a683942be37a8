"""The document of an evidence pack, and the page made from it."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from importlib import resources
from typing import Any

import jsonschema
import pytest

from cellferry.errors import InvalidInput
from cellferry.evidence import page
from cellferry.evidence.document import Evidence, canonical, json_schema
from cellferry.evidence.pack import pack_hash, pack_name
from cellferry.evidence.record import derived, writers_pause

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7*7 }}</td>"


def event(id_: int, second: int, action: str, before: str | None, to: str | None) -> dict[str, Any]:
    return {
        "id": id_,
        "at": f"2026-01-02T03:04:{second:02}.000000+00:00",
        "action": action,
        "actor": "alice",
        "role": "operator",
        "from_state": before,
        "to_state": to,
        "epoch": 1,
        "attempt": 1,
        "reason": "because",
        "evidence": {"holder": "host:1:copy"},
        "dag_run": "manual__1",
        "try_number": 1,
    }


def sample() -> dict[str, Any]:
    """A document of a move that took a few seconds."""
    part = {"part": "public.issues", "count": 20, "hash": "12", "first_expiry": None}
    side = {"store": "postgres", "unit": "rows", "at_work": 0, "parts": [part], "error": None}
    audit = [
        event(1, 1, "created", None, "planned"),
        event(2, 2, "lease", None, None),
        event(3, 2, "transition", "planned", "copying"),
        event(4, 9, "approved", None, None),
        event(5, 10, "flip", "cutting_over", "soaking"),
        event(6, 11, "paused", None, None),
        event(7, 12, "evidence", None, None),
    ]
    core: dict[str, Any] = {
        "schema": "cellferry-evidence/1",
        "made": {
            "at": "2026-01-02T03:05:00+00:00",
            "by": "alice",
            "role": "operator",
            "cellferry": "0.1.0",
            "python": "3.11",
            "system": "Linux x86_64",
        },
        "organization": {"id": "7", "slug": "acme"},
        "migration": {
            "id": 3,
            "source": "cell-1",
            "destination": "cell-2",
            "strategy": "online",
            "state": "soaking",
            "epoch": 1,
            "attempt": 1,
            "created_at": "2026-01-02T03:04:01+00:00",
            "updated_at": "2026-01-02T03:04:12+00:00",
            "ttl_until": None,
            "superseded_by": None,
            "paused": True,
            "halted": "for a reason",
            "last_error": "an error",
            "options": {"strategy": "online"},
        },
        "observed": [
            {**side, "cell": "cell-1", "copy_of": "kept", "position": {}},
            {**side, "cell": "cell-2", "copy_of": "serving", "position": {}},
        ],
        "positions": [
            {
                "when": "verified",
                "cell": "cell-1",
                "store": "postgres",
                "position": {"lsn": "0/1", "system_identifier": "9", "timeline": 1},
            },
            {"when": "now", "cell": "cell-2", "store": "redis", "position": {"error": "gone"}},
        ],
        "routes": [
            {"epoch": 1, "cell": "cell-1", "migration": None, "actor": "a", "changed_at": "x"}
        ],
        "pause": {
            "controller": {"seconds": 0.03, "parts": {"flip": 0.01, "freeze postgres": 0.02}},
            "controller_back": None,
            "writers": writers_pause([0.02, 0.05]),
        },
        "stops": [audit[5]],
        "resources": [
            {
                "cell": "cell-1",
                "store": "postgres",
                "kind": "gate",
                "name": "7",
                "made_at": "2026-01-02T03:04:02+00:00",
                "removed_at": None,
            }
        ],
        "versions": {
            "cellferry": "0.1.0",
            "python": "3.11",
            "topology": {"version": "PostgreSQL 18"},
            "servers": {"cell-1/postgres": "PostgreSQL 18"},
        },
        "audit": audit,
        "facts": {
            "plan": {
                "totals": {"postgres": {"count": 20, "unit": "rows", "bytes": 900}},
                "copy_s": 0.1,
                "pause_s": 0.2,
                "basis": "not measured yet",
                "inventories": {
                    "postgres": {"unit": "rows", "parts": [{"name": "public.issues", "count": 20}]}
                },
            },
            "copied": {"postgres": {"count": 20, "bytes": 800, "seconds": 0.2}},
            "verified": {
                "postgres": {
                    "compared": 20,
                    "mismatch_count": 0,
                    "seconds": 0.1,
                    "hashes": {"public.issues": {"count": 20, "source": "12", "destination": "12"}},
                }
            },
            "pause": {"seconds": 0.03},
        },
        "gaps": ["something"],
    }
    return Evidence.model_validate(core | derived(core)).model_dump(mode="json", by_alias=True)


class Elements(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


def test_the_shipped_schema_is_that_of_the_types_and_fits_a_document() -> None:
    shipped = resources.files("cellferry.evidence").joinpath("cellferry-evidence-1.schema.json")
    assert shipped.read_text(encoding="utf-8") == json_schema()
    validator = jsonschema.Draft202012Validator(json.loads(json_schema()))
    validator.check_schema(json.loads(json_schema()))
    validator.validate(sample())
    wrong = sample()
    wrong["migration"]["attempts"] = 3
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(wrong)


def test_what_follows_from_facts_and_audit_is_put_in_words_and_figures() -> None:
    found = sample()
    assert [(one["state"], one["seconds"]) for one in found["states"]] == [
        ("planned", 1.0),
        ("copying", 8.0),
        ("soaking", 50.0),
    ]
    assert [one["action"] for one in found["timeline"]] == [
        *("created", "transition", "approved", "flip", "paused")
    ]
    assert [one["action"] for one in found["approvals"]] == ["approved"]
    pause = next(one for one in found["estimates"] if one["what"] == "write pause")
    assert (pause["planned"], pause["happened"]) == (0.2, 0.03)


def test_a_page_loads_nothing_and_escapes_everything() -> None:
    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: poison(one) for name, one in value.items()}
        if isinstance(value, list):
            return [poison(one) for one in value]
        is_free = isinstance(value, str) and not re.match(r"\d{4}-\d\d-\d\dT", value)
        return f"{value}{HOSTILE}" if is_free else value

    clean, found = sample(), copy.deepcopy(sample())
    for name, value in found.items():
        # the drawing looks these up by name; they are words of cellferry's own
        if name not in ("states", "observed", "schema", "estimates"):
            found[name] = poison(value)
    for one in (*found["states"], *found["estimates"]):
        one["source" if "source" in one else "state"] += HOSTILE
    text = page.render(found)
    elements = Elements(text)
    assert "script" not in elements.tags
    assert "img" not in elements.tags
    names = {name for name, _ in elements.attributes}
    assert not names & {"src", "href", "onerror", "onload", "srcset"}
    assert "url(" not in text
    assert "@import" not in text
    assert "{{ 7*7 }}" in text, "no template of the value's own"
    assert sorted(set(elements.tags)) == sorted(set(Elements(page.render(clean)).tags))


def test_the_same_document_gives_the_same_page() -> None:
    found = sample()
    again = json.loads(json.dumps(found))
    assert page.render(found) == page.render(again)
    assert "freeze postgres 20 ms" in page.render(found)


def test_a_page_of_a_migration_that_did_nothing_yet() -> None:
    found = sample()
    for name in ("observed", "routes", "stops", "resources", "positions", "stores", "estimates"):
        found[name] = []
    found |= {"states": [], "timeline": [], "audit": [], "plan": {}}
    found["pause"] = {"controller": None, "controller_back": None, "writers": None}
    assert "acme: cell-1 → cell-2" in page.render(found)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0004, "0.4 ms"),
        (0.038, "38 ms"),
        (2.44, "2.4 s"),
        (185, "3 min 5 s"),
        (3600, "1 h 0 min"),
        (90_000, "1 d 1 h"),
        (None, "-"),
    ],
)
def test_times_are_told_as_people_do(seconds: float | None, words: str) -> None:
    assert page.duration(seconds) == words


def test_a_pack_has_a_name_that_is_no_path() -> None:
    assert pack_name(3, "../../etc/passwd") == "migration-3-etc-passwd"
    assert pack_name(3, "…") == "migration-3-x"
    assert "/" not in pack_name(3, "a/b\0c" * 50)
    assert len(pack_name(3, "a" * 500)) < 100


def test_the_hash_depends_on_values_and_not_on_how_they_are_written() -> None:
    assert pack_hash({"a": 1, "b": "ü"}) == pack_hash(json.loads('{"b": "\\u00fc",  "a": 1}'))
    assert pack_hash({"a": 1}) != pack_hash({"a": 2})
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical({"a": float("nan")})


def test_writers_pauses_are_seconds() -> None:
    assert writers_pause(None) is None
    found = writers_pause({"a": 0.01, "b": [0.02, 0.5]})
    assert found == {"writers": 2, "seconds": [0.5, 0.02, 0.01], "median": 0.02, "longest": 0.5}
    for wrong in ([], [-1], ["1"], [True], [float("nan")], [None], [{"a": 1}]):
        with pytest.raises(InvalidInput):
            writers_pause(wrong)  # type: ignore[arg-type]
