"""Checking a pack: its files, its hash in the audit, and all that can still be recomputed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cellferry import __version__
from cellferry.errors import CellferryError, InvalidInput
from cellferry.evidence.document import Evidence
from cellferry.evidence.pack import DOCUMENT, JSON_SCHEMA, MANIFEST, PAGE, file_hash, pack_hash
from cellferry.evidence.page import render
from cellferry.evidence.record import (
    Clean,
    cleaner,
    derived,
    event,
    kept_and_serving,
    migration_facts,
    observe_side,
    resource_facts,
    route_facts,
)
from cellferry.migration.context import Context, StepProgress
from cellferry.migration.options import MoveOptions
from cellferry.model import State
from cellferry.topology.document import plain
from cellferry.topology.records import EVIDENCE, MigrationRecord

#: What never changes of a migration.
_IDENTITY = ("id", "source", "destination", "strategy", "epoch", "created_at", "options")
_FILES = frozenset({DOCUMENT, PAGE, JSON_SCHEMA})
_SHOWN = 80


class Outcome(StrEnum):
    """How one check ended."""

    SAME = "same"
    DIFFERS = "differs"
    UNKNOWN = "cannot be recomputed"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked; `detail` says what differs, or why nobody can tell any more."""

    what: str
    outcome: Outcome
    detail: str = ""


def check_pack(context: Context, directory: Path) -> list[Check]:
    """Check a pack against itself, the audit, the topology and the cells. Changes nothing.

    While the old copy is kept, both copies are counted and hashed again, which reads all of them.

    Raises:
        InvalidInput: there is no pack in `directory`.
        Unreachable, AccessDenied: the topology does not answer or refuses.
    """
    if not any((directory / name).is_file() for name in (MANIFEST, DOCUMENT, PAGE)):
        raise InvalidInput(
            f"there is no evidence pack in {directory}",
            hint="name the directory that `cellferry evidence export` printed",
        )
    manifest, checks = _check_files(directory)
    document, found = _check_document(directory, manifest)
    checks += found
    migration = (document or {}).get("migration", {}).get("id", (manifest or {}).get("migration"))
    if not isinstance(migration, int):
        return [*checks, Check("migration", Outcome.DIFFERS, "the pack names none")]
    try:
        record = context.topology.migration_record(migration)
    except InvalidInput as error:
        return [*checks, Check("migration", Outcome.DIFFERS, f"{error.message} in this topology")]
    if manifest is not None:
        checks.append(_check_hash(manifest, record))
    if document is not None:
        clean = cleaner(context, record.migration)
        checks += _check_topology(document, record, clean)
        checks += _check_copies(context, document, record)
        checks.append(
            Check(
                "hashes of verify, pause, positions of servers",
                Outcome.UNKNOWN,
                "they are of moments that have passed; they are as the topology and the audit have "
                "them, if the lines above say so",
            )
        )
    return checks


# ── the pack itself ─────────────────────────────────────────────────────────────────────────────


def _check_files(directory: Path) -> tuple[dict[str, Any] | None, list[Check]]:
    manifest = _read_json(directory / MANIFEST)
    if manifest is None or not isinstance(manifest.get("files"), dict):
        return None, [Check(MANIFEST, Outcome.DIFFERS, "it is missing, or is not a manifest")]
    checks = []
    listed: dict[str, Any] = manifest["files"]
    present = {path.name for path in directory.iterdir()} - {MANIFEST}
    for name in sorted(_FILES | listed.keys() | present):
        what = f"file {name}"
        if name not in present or not (directory / name).is_file():
            checks.append(Check(what, Outcome.DIFFERS, "it is missing"))
        elif name not in listed:
            checks.append(Check(what, Outcome.DIFFERS, "the manifest does not know it"))
        elif file_hash(directory / name) != listed[name]:
            checks.append(Check(what, Outcome.DIFFERS, "it was changed after it was made"))
        else:
            checks.append(Check(what, Outcome.SAME))
    named = re.match(r"migration-(\d+)(-|$)", directory.resolve().name)
    if named is not None and int(named[1]) != manifest.get("migration"):
        checks.append(
            Check(
                "name of the directory",
                Outcome.DIFFERS,
                f"the pack in it is that of migration {manifest.get('migration')}",
            )
        )
    return manifest, checks


def _check_document(
    directory: Path, manifest: Mapping[str, Any] | None
) -> tuple[dict[str, Any] | None, list[Check]]:
    document = _read_json(directory / DOCUMENT)
    if document is None:
        return None, [Check(DOCUMENT, Outcome.DIFFERS, "it is missing, or is not JSON")]
    try:
        Evidence.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return None, [
            Check(
                "schema", Outcome.DIFFERS, f"{place}: {first['msg']}; {error.error_count()} in all"
            )
        ]
    checks = [Check("schema", Outcome.SAME)]
    if manifest is not None and (
        manifest.get("migration") != document["migration"]["id"]
        or manifest.get("organization") != document["organization"]["id"]
        or manifest.get("made_at") != document["made"]["at"]
    ):
        checks.append(Check(MANIFEST, Outcome.DIFFERS, "it is that of another document"))
    if document["made"]["cellferry"] != __version__:
        made = document["made"]["cellferry"]
        checks.append(
            Check("figures and page", Outcome.UNKNOWN, f"cellferry {made} made them, not this one")
        )
        return document, checks
    return document, [*checks, *_check_figures(directory, document)]


def _check_figures(directory: Path, document: dict[str, Any]) -> Iterator[Check]:
    """Make again what was made from the rest of the document: derived figures and the page."""
    figures, page = "figures that follow from facts and audit", "page says what the document says"
    try:
        again = Evidence.model_validate(document | derived(document)).model_dump(by_alias=True)
        text = render(document)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        yield Check(figures, Outcome.DIFFERS, f"they cannot be made: {type(error).__name__}")
        return
    given = Evidence.model_validate(document).model_dump(by_alias=True)
    yield _verdict(figures, [name for name in given if given[name] != again[name]])
    try:
        written = (directory / PAGE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return  # the check of the files has said so
    if written == text:
        yield Check(page, Outcome.SAME)
    else:
        yield Check(page, Outcome.DIFFERS, "it was made of another document")


def _check_hash(manifest: Mapping[str, Any], record: MigrationRecord) -> Check:
    packs = [entry for entry in record.audit if entry.action == EVIDENCE]
    try:
        own = pack_hash(manifest)
    except ValueError:
        own = "not a hash"
    for number, entry in enumerate(packs):
        if entry.evidence.get("hash") == own:
            later = len(packs) - number - 1
            return Check(
                "hash of the pack in the audit",
                Outcome.SAME,
                f"row {entry.id}, by {entry.actor}" + (f"; {later} later packs" if later else ""),
            )
    return Check(
        "hash of the pack in the audit",
        Outcome.DIFFERS,
        f"none of the {len(packs)} packs of migration {record.migration.id} had {own[:16]}…",
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


# ── against the topology ────────────────────────────────────────────────────────────────────────


def _check_topology(
    document: Mapping[str, Any], record: MigrationRecord, clean: Clean
) -> Iterator[Check]:
    now = migration_facts(record, clean)
    kept = document["migration"]
    organization = record.migration.organization
    wrong = [name for name in _IDENTITY if not _equal(kept[name], now[name])]
    if document["organization"]["id"] != organization.id:
        wrong.append("organization")
    yield _verdict("migration: organization, cells, epoch, options", wrong)
    audit = [event(entry, clean) for entry in record.audit]
    yield _check_rows("audit", document["audit"], audit)
    cells = [event(entry, clean) for entry in record.cell_audit]
    known = {row["id"]: row for row in (*audit, *cells)}
    wrong = [
        f"row {row['id']}" for row in document["stops"] if not _equal(known.get(row["id"]), row)
    ]
    yield _verdict("pauses and halts", wrong)
    routes = route_facts(record)
    first = document["routes"]
    yield _verdict(
        "route history and epochs",
        [
            f"epoch {one.get('epoch')}"
            for one, other in zip(first, [*routes, *[None] * len(first)], strict=False)
            if not _equal(one, other)
        ]
        # an epoch that the topology had then, and the pack has not
        + [
            f"epoch {one['epoch']} is not in the pack"
            for one in routes[len(first) :]
            if one["changed_at"] < document["made"]["at"]
        ],
    )
    yield from _check_facts(document, record, clean)
    yield _check_resources(document["resources"], resource_facts(record))


def _check_rows(what: str, kept: list[dict[str, Any]], now: list[dict[str, Any]]) -> Check:
    there = {row["id"]: row for row in now}
    here = {row["id"]: row for row in kept}
    last = max(here, default=0)
    wrong = [f"row {id_}" for id_, row in here.items() if not _equal(there.get(id_), row)]
    wrong += [f"row {id_} is not in the pack" for id_ in there if id_ < last and id_ not in here]
    if len(here) != len(kept):
        wrong.append("a row is there twice")
    later = sum(1 for id_ in there if id_ > last)
    return _verdict(f"{what}, {len(kept)} rows", wrong, f"{later} rows came since" if later else "")


def _check_facts(
    document: Mapping[str, Any], record: MigrationRecord, clean: Clean
) -> Iterator[Check]:
    now, kept = clean(plain(record.migration.facts)), document["facts"]
    later = record.migration.attempt > document["migration"]["attempt"]
    wrong = [name for name in kept if not _equal(kept[name], now.get(name))]
    what = f"facts of the steps ({', '.join(kept)})"
    settled = _SETTLED if any(row["action"] == "flip" for row in document["audit"]) else _PLANNED
    renewed = [name for name in wrong if later and name not in settled]
    yield _verdict(what, [name for name in wrong if name not in renewed])
    if renewed:
        yield Check(
            f"facts: {', '.join(renewed)}",
            Outcome.UNKNOWN,
            f"attempts {document['migration']['attempt']} to {record.migration.attempt} recorded "
            "them anew",
        )
    pause = document["pause"]
    yield _verdict(
        "pause as the controller saw it",
        []
        if _equal(pause["controller"], kept.get("pause"))
        and _equal(pause["controller_back"], kept.get("pause_back"))
        else ["the facts say otherwise"],
    )


#: Facts that no step records anew, and those that none does after the flip.
_PLANNED = frozenset({"plan"})
_SETTLED = _PLANNED | {"copied", "verified", "finished"}


def _check_resources(kept: list[dict[str, Any]], now: list[dict[str, Any]]) -> Check:
    there = {_resource_key(row): row for row in now}
    wrong = []
    for row in kept:
        other = there.get(_resource_key(row))
        again = other is not None and other["made_at"] > row["made_at"]  # removed, and made anew
        if not again and (
            other is None
            or other["made_at"] != row["made_at"]
            or row["removed_at"] not in (None, other["removed_at"])
        ):
            wrong.append(f"{row['kind']} {row['name']} in {row['cell']}/{row['store']}")
    left = sum(1 for row in now if row["removed_at"] is None)
    return _verdict("resources made and removed", wrong, f"{left} are there still" if left else "")


def _resource_key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (row["cell"], row["store"], row["kind"], row["name"])


# ── against the cells ───────────────────────────────────────────────────────────────────────────


def _check_copies(
    context: Context, document: Mapping[str, Any], record: MigrationRecord
) -> Iterator[Check]:
    migration, observed = record.migration, document["observed"]
    sides = kept_and_serving(migration)
    if not observed:
        yield Check(
            "counts and hashes of both copies",
            Outcome.UNKNOWN,
            f"the migration was {document['migration']['state']} when the pack was made: "
            "there were no two whole copies to count",
        )
    elif sides is None:
        yield Check("counts and hashes of both copies", Outcome.UNKNOWN, _why_gone(record))
    elif {one["cell"] for one in observed if one["copy_of"] == "kept"} != {sides[0]}:
        yield Check(
            "counts and hashes of both copies",
            Outcome.UNKNOWN,
            f"the organization went back since: the copy in {sides[1]} lives again",
        )
    else:
        for side in observed:
            yield from _check_side(context, document, record, side)
    if sides is not None and "postgres" in context.stores:
        yield _compare_now(context, record, *sides)
    yield from _check_gone(context, record)


def _why_gone(record: MigrationRecord) -> str:
    state = record.migration.state
    if state is State.COMPLETED or "cleaned" in record.migration.facts:
        at = [entry.at for entry in record.audit if entry.to_state in ("completed", "cleaning")]
        return f"clean-up has deleted the old copy{f' ({at[-1]:%Y-%m-%d %H:%M} UTC)' if at else ''}"
    return f"the migration is {state}: the old copy is not whole, or is being written"


def _check_side(
    context: Context,
    document: Mapping[str, Any],
    record: MigrationRecord,
    before: Mapping[str, Any],
) -> Iterator[Check]:
    kept = before["copy_of"] == "kept"
    place = f"{before['cell']}/{before['store']}"
    where = f"{place}, {'old copy' if kept else 'serving copy'}"
    now = observe_side(
        context, record.migration, before["cell"], before["store"], before["copy_of"]
    )
    if before["error"] or now["error"]:
        yield Check(where, Outcome.UNKNOWN, now["error"] or f"not counted then: {before['error']}")
        return
    was, is_ = (one["position"].get("system_identifier") for one in (before, now))
    if was != is_:
        yield Check(f"{place} is the same server", Outcome.DIFFERS, f"system {was}, now {is_}")
    excuse = _excuse(document, record, before, now) if kept else "the organization writes here"
    then = {one["part"]: one for one in before["parts"]}
    there = {one["part"]: one for one in now["parts"]}
    for name in sorted(then | there):
        one, other = then.get(name), there.get(name)
        count, count_now = (one or {}).get("count", 0), (other or {}).get("count", 0)
        what = f"{where}: {name}"
        unit = now["unit"]
        if (count, (one or {}).get("hash")) == (count_now, (other or {}).get("hash")) or (
            not count and not count_now
        ):
            yield Check(what, Outcome.SAME, f"{count:,} {unit}")
            continue
        told = f"{count:,} {unit} then, {count_now:,} now" + (
            ", another hash" if count == count_now else ""
        )
        reason = excuse or _expired(one, record.read_at)
        if reason:
            yield Check(what, Outcome.UNKNOWN, f"{reason}: {told}")
        else:
            yield Check(what, Outcome.DIFFERS, told)


def _excuse(
    document: Mapping[str, Any],
    record: MigrationRecord,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
) -> str:
    """Say why the old copy may have changed rightly; empty when nothing may have changed it."""
    attempt, newest = document["migration"]["attempt"], record.migration.attempt
    if newest > attempt:
        return f"reverse rounds may have followed the organization (attempts {attempt} to {newest})"
    if before["at_work"] or now["at_work"]:
        return "a controller was at work on it"
    if document["migration"]["state"] == State.SOAKING:
        return "soak has followed the organization"
    return ""


def _expired(part: Mapping[str, Any] | None, now: datetime) -> str:
    first = (part or {}).get("first_expiry")
    if first and datetime.fromisoformat(first) <= now:
        return "keys have expired"
    return ""


def _compare_now(context: Context, record: MigrationRecord, kept: str, serving: str) -> Check:
    from cellferry.stores.postgres import observation

    what = "both PostgreSQL copies now, but for changes that are logged"
    migration = record.migration
    try:
        # The way back: from the cell that serves to the copy that is kept.
        move = context.dry_move(
            migration.organization, serving, kept, MoveOptions.model_validate({})
        )
        found = observation.compare(
            move.source,
            move.destination,
            move,
            context.settings.organization.data_map,
            StepProgress(context, migration.organization.slug, 0, 0),
        )
    except CellferryError as error:
        return Check(what, Outcome.UNKNOWN, f"{type(error).__name__}: {error.message}")
    if found is None:
        return Check(what, Outcome.UNKNOWN, f"the changes in {serving} are not logged any more")
    compared, differing, examples = found
    if differing:
        first = ", ".join(f"{one.part} {one.key} {one.reason}" for one in examples[:3])
        return Check(what, Outcome.DIFFERS, f"{differing:,} of {compared:,} rows, first {first}")
    return Check(what, Outcome.SAME, f"{compared:,} rows")


def _check_gone(context: Context, record: MigrationRecord) -> Iterator[Check]:
    """After clean-up: the old cell holds nothing of the organization, unless it came back."""
    migration = record.migration
    if "cleaned" not in migration.facts or migration.state is State.ABORTED:
        return
    back = migration.state is State.ROLLED_BACK
    old = migration.destination if back else migration.source
    what = f"nothing is left in {old}"
    live = context.topology.live_migration(migration.organization.id)
    if context.topology.route(migration.organization.id).cell == old or live is not None:
        yield Check(what, Outcome.UNKNOWN, "the organization has come back, or moves again")
        return
    for kind in context.stores:
        side = observe_side(context, migration, old, kind, "kept")
        left = sum(one["count"] for one in side["parts"])
        if side["error"]:
            yield Check(f"{what}/{kind}", Outcome.UNKNOWN, side["error"])
        elif left:
            yield Check(f"{what}/{kind}", Outcome.DIFFERS, f"{left:,} {side['unit']}")
        else:
            yield Check(f"{what}/{kind}", Outcome.SAME)


# ── words ───────────────────────────────────────────────────────────────────────────────────────


def _equal(one: Any, other: Any) -> bool:
    return bool(one == other)


def _verdict(what: str, wrong: Iterable[str], note: str = "") -> Check:
    named = list(wrong)
    if not named:
        return Check(what, Outcome.SAME, note)
    more = f" and {len(named) - 3} more" if len(named) > 3 else ""
    return Check(what, Outcome.DIFFERS, ", ".join(named[:3])[:_SHOWN] + more)
