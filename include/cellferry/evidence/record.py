"""Reading a migration's evidence: from the topology, and from the cells where a copy is kept."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import unquote, urlsplit

import psycopg
from psycopg.conninfo import conninfo_to_dict

from cellferry import __version__
from cellferry.errors import CellferryError, InvalidInput
from cellferry.evidence.document import Evidence
from cellferry.migration.context import Context
from cellferry.migration.positions import FACT, positions
from cellferry.model import Cell, Migration, State
from cellferry.settings import STORE_ORDER
from cellferry.stores.observed import Observed
from cellferry.topology.audit import AuditEntry
from cellferry.topology.document import plain
from cellferry.topology.records import EVIDENCE, MigrationRecord

#: An action of the audit with one of these in its name stopped the move or let it go on.
STOPS = ("paused", "resumed", "halt")
#: Names of fields whose text comes from a server or a person and could quote anything.
_FREE_TEXT = frozenset(
    {"reason", "last_error", "error", "message", "note", "notes", "halted", "remedy", "basis"}
)
#: A shorter one is part of too many words; a long one is hidden wherever it stands.
_SHORTEST_SECRET, _LONG_SECRET = 4, 8
#: No secrets, whatever the connections say: hiding these would hide what the pack is about.
_WORDS = frozenset({"postgres", "redis", "cellferry", "password", "operator"})

Pauses = Mapping[str, float | Sequence[float]] | Sequence[float]


def gather(context: Context, migration_id: int, writers: Pauses | None = None) -> Evidence:
    """Read everything about a migration. Changes nothing.

    While an old copy is kept (`soaking`, `retained`, `rolled_back`), both copies are counted and
    hashed, which reads all of them.

    Args:
        context: topology and cells.
        migration_id: the migration.
        writers: what writers waited, in seconds: a list, or by writer's name.

    Raises:
        InvalidInput: there is no such migration, or `writers` are not seconds.
    """
    record = context.topology.migration_record(migration_id)
    migration = record.migration
    clean = cleaner(context, migration)
    gaps: list[str] = []
    observed = observe_sides(context, migration)
    now = positions(_cells(context, migration, gaps), context.stores)
    facts = clean(plain(migration.facts))
    audit = [event(entry, clean) for entry in record.audit]
    core: dict[str, Any] = {
        "made": {
            "at": record.read_at.isoformat(),
            "by": context.actor.name,
            "role": context.actor.role,
            "cellferry": __version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "organization": {"id": migration.organization.id, "slug": migration.organization.slug},
        "migration": migration_facts(record, clean),
        "observed": clean(plain(observed)),
        "routes": route_facts(record),
        "pause": {
            "controller": facts.get("pause"),
            "controller_back": facts.get("pause_back"),
            "writers": writers_pause(writers),
        },
        "stops": [
            one
            for one in sorted(
                audit + [event(entry, clean) for entry in record.cell_audit],
                key=lambda one: int(one["id"]),
            )
            if any(word in one["action"] for word in STOPS)
        ],
        "resources": resource_facts(record),
        "audit": audit,
        "facts": facts,
    }
    core["positions"] = _positions(facts, now)
    core["versions"] = _versions(core, record)
    core["gaps"] = gaps + _gaps(core)
    return Evidence.model_validate(core | derived(core))


def derived(core: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of the document that follow from facts and audit, and from nothing else."""
    facts, audit = core["facts"], core["audit"]
    return {
        "plan": facts.get("plan", {}),
        "estimates": _estimates(facts),
        "states": _spans(audit, core["made"]["at"]),
        "timeline": [one for one in audit if one["action"] not in ("lease", EVIDENCE)],
        "stores": _stores(facts),
        "approvals": [one for one in audit if "approv" in one["action"]],
    }


# ── what the topology says ──────────────────────────────────────────────────────────────────────

Clean = Callable[[Any], Any]


def cleaner(context: Context, migration: Migration) -> Clean:
    """Return what takes the passwords of every configured connection out of a value.

    The topology has hidden what looks like a password already; this hides what does not.
    """
    secrets = sorted(_passwords(context, migration), key=len, reverse=True)

    def clean(value: Any, *, free: bool = False) -> Any:
        if isinstance(value, Mapping):
            return {key: clean(item, free=free or key in _FREE_TEXT) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item, free=free) for item in value]
        if isinstance(value, str):
            for secret in secrets:
                if free or len(secret) >= _LONG_SECRET:
                    value = value.replace(secret, "***")
        return value

    return clean


def _passwords(context: Context, migration: Migration) -> set[str]:
    urls = []
    for name in (migration.source, migration.destination):
        cell = _cell(context, name)
        for endpoint in cell.stores.values() if cell else ():
            urls += [endpoint.url, endpoint.admin_url or ""]
    urls.append(context.connections(context.settings.topology.connection) or "")
    found: set[str] = set()
    for url in urls:
        try:
            passwords = {_in_url(url), str(conninfo_to_dict(url).get("password") or "")}
        except psycopg.Error:  # of another kind of server
            passwords = {_in_url(url)}
        found |= {form for one in passwords if one for form in (one, unquote(one))}
    return {one for one in found - _WORDS if len(one) >= _SHORTEST_SECRET}


def _in_url(url: str) -> str | None:
    try:
        return urlsplit(url).password
    except ValueError:
        return None


def event(entry: AuditEntry, clean: Clean) -> dict[str, Any]:
    """Return a row of the audit as it stands in a pack."""
    row: dict[str, Any] = clean(
        {
            "id": entry.id,
            "at": entry.at.isoformat(),
            "action": entry.action,
            "actor": entry.actor,
            "role": entry.role,
            "from_state": entry.from_state,
            "to_state": entry.to_state,
            "epoch": entry.epoch,
            "attempt": entry.attempt,
            "reason": entry.reason,
            "evidence": plain(entry.evidence),
            "dag_run": entry.dag_run,
            "try_number": entry.try_number,
        }
    )
    return row


def migration_facts(record: MigrationRecord, clean: Clean) -> dict[str, Any]:
    """Return the migration's own columns as they stand in a pack."""
    one = record.migration
    row: dict[str, Any] = clean(
        {
            "id": one.id,
            "source": one.source,
            "destination": one.destination,
            "strategy": one.strategy.value,
            "state": one.state.value,
            "epoch": one.epoch,
            "attempt": one.attempt,
            "created_at": one.created_at.isoformat(),
            "updated_at": one.updated_at.isoformat(),
            "ttl_until": one.ttl_until.isoformat() if one.ttl_until else None,
            "superseded_by": record.superseded_by,
            "paused": one.paused,
            "halted": one.halted,
            "last_error": one.last_error,
            "options": plain(one.options),
        }
    )
    return row


def route_facts(record: MigrationRecord) -> list[dict[str, Any]]:
    """Return the organization's route history as it stands in a pack."""
    return [
        {
            "epoch": one.route.epoch,
            "cell": one.route.cell,
            "migration": one.migration,
            "actor": one.actor,
            "changed_at": one.changed_at.isoformat(),
        }
        for one in record.routes
    ]


def resource_facts(record: MigrationRecord) -> list[dict[str, Any]]:
    """Return what the migration made as it stands in a pack."""
    return [
        {
            "cell": one.resource.cell,
            "store": one.resource.store,
            "kind": one.resource.kind,
            "name": one.resource.name,
            "made_at": one.intended_at.isoformat(),
            "removed_at": one.forgotten_at.isoformat() if one.forgotten_at else None,
        }
        for one in record.resources
    ]


def writers_pause(writers: Pauses | None) -> dict[str, Any] | None:
    """Sum up what writers waited.

    Raises:
        InvalidInput: they are not seconds.
    """
    if writers is None:
        return None
    given: list[Any] = list(writers.values() if isinstance(writers, Mapping) else writers)
    seconds: list[Any] = []
    for one in given:
        seconds += one if isinstance(one, list | tuple) else [one]
    wrong = [
        one
        for one in seconds
        if isinstance(one, bool) or not isinstance(one, int | float) or not 0 <= one < float("inf")
    ]
    if wrong or not seconds:
        raise InvalidInput(
            f"the writers' pauses hold {wrong[0]!r}, which is no number of seconds"
            if wrong
            else "the writers' pauses are empty",
            hint="give a JSON list of seconds, or an object of seconds by writer",
        )
    return {
        "writers": len(given),
        "seconds": sorted(seconds, reverse=True),
        "median": statistics.median(seconds),
        "longest": max(seconds),
    }


# ── what follows from it ────────────────────────────────────────────────────────────────────────


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _total(found: Iterable[Any]) -> float | None:
    numbers = [number for number in map(_number, found) if number is not None]
    return sum(numbers) if numbers else None


def _estimates(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    plan, copied = facts.get("plan", {}), facts.get("copied", {})
    under = _under_the_gate(facts)
    result = []
    total_bytes: list[Any] = []
    for kind in _in_order(plan.get("totals", {})):
        total = plan["totals"][kind]
        # freeze-first copies under the gate
        late = under.get(kind, {}).get("evidence", {}).get("copied")
        result.append(
            {
                "what": f"{total['unit']} in {kind}",
                "unit": total["unit"],
                "planned": _number(total.get("count")),
                "happened": _number(copied.get(kind, {}).get("count", late)),
                "source": "copied",
            }
        )
        total_bytes.append(total.get("bytes"))
    return [
        *result,
        {
            "what": "bytes",
            "unit": "bytes",
            "planned": _total(total_bytes),
            "happened": _total(one.get("bytes") for one in copied.values()),
            "source": "sent by the copy",
        },
        {
            "what": "copy",
            "unit": "s",
            "planned": _number(plan.get("copy_s")),
            "happened": _total(one.get("seconds") for one in copied.values()),
            "source": "seconds of the last attempt at each store, together",
        },
        {
            "what": "write pause",
            "unit": "s",
            "planned": _number(plan.get("pause_s")),
            "happened": _number(facts.get("pause", {}).get("seconds")),
            "source": "the gate was closed, as the controller saw it",
        },
    ]


def _spans(audit: Sequence[Mapping[str, Any]], made_at: str) -> list[dict[str, Any]]:
    entered = [
        (one["to_state"], one["at"])
        for one in audit
        if one["to_state"] and one["to_state"] != one["from_state"]
    ]
    spans = []
    for (state, since), following in zip(entered, [*entered[1:], None], strict=True):
        until = following[1] if following else None
        lasted = datetime.fromisoformat(until or made_at) - datetime.fromisoformat(since)
        spans.append(
            {
                "state": state,
                "since": since,
                "until": until,
                "seconds": round(max(0.0, lasted.total_seconds()), 6),
            }
        )
    return spans


def _under_the_gate(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = facts.get("finished") or facts.get("pause", {}).get("finished", {})
    return found


def _stores(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    plan, verified = facts.get("plan", {}), facts.get("verified", {})
    under, rounds = _under_the_gate(facts), facts.get("rounds", {})
    copied, cleaned = facts.get("copied", {}), facts.get("cleaned", {})
    inventories = plan.get("inventories", {})
    units = {"postgres": "rows", "redis": "keys"}
    result = []
    for kind in _in_order((*inventories, *verified, *under, *copied)):
        found, last = verified.get(kind, {}), under.get(kind)
        result.append(
            {
                "store": kind,
                "unit": inventories.get(kind, {}).get("unit") or units.get(kind, "items"),
                "copied": copied.get(kind),
                "rounds": rounds.get(kind, []),
                "compared": found.get("compared", (last or {}).get("compared")),
                "mismatches": found.get("mismatch_count", 0 if last else None),
                "seconds": found.get("seconds", (last or {}).get("seconds")),
                "under_the_gate": last,
                "deleted": cleaned.get(kind, {}).get("deleted"),
                "parts": _parts(inventories.get(kind, {}), found, last or {}),
            }
        )
    return result


def _in_order(kinds: Iterable[str]) -> list[str]:
    """Sort kinds of stores as moves take them; JSON in the topology keeps no order."""
    known = {kind: number for number, kind in enumerate(STORE_ORDER)}
    return sorted(set(kinds), key=lambda kind: (known.get(kind, len(known)), kind))


def _parts(
    inventory: Mapping[str, Any], found: Mapping[str, Any], last: Mapping[str, Any]
) -> list[dict[str, Any]]:
    evidence = last.get("evidence", {})
    planned = {one["name"]: one for one in inventory.get("parts", ())}
    hashes = found.get("hashes") or evidence.get("hashes") or {}
    # what has no hash is a remark, not a part
    compared = {name: one for name, one in hashes.items() if "source" in one}
    delta = evidence.get("delta") or {}
    names = [name for name in planned if planned[name].get("count") or name in compared]
    parts = []
    for name in dict.fromkeys((*names, *compared, *delta)):
        one = compared.get(name, {})
        parts.append(
            {
                "part": name,
                "placement": one.get("placement", planned.get(name, {}).get("placement")),
                "planned": planned.get(name, {}).get("count"),
                "count": one.get("count"),
                "source": one.get("source"),
                "destination": one.get("destination"),
                "dirty": one.get("dirty", 0),
                "delta": delta.get(name),
            }
        )
    return parts


def _positions(facts: Mapping[str, Any], now: Mapping[str, Any]) -> list[dict[str, Any]]:
    moments = {
        name.removeprefix(FACT).replace("_", " "): found
        for name, found in facts.items()
        if name.startswith(FACT)
    }
    moments["pack made"] = now
    return [
        {"when": when, "cell": cell, "store": store, "position": plain(position)}
        for when, cells in moments.items()
        for cell in sorted(cells)
        for store, position in ((kind, cells[cell][kind]) for kind in _in_order(cells[cell]))
    ]


def _versions(core: Mapping[str, Any], record: MigrationRecord) -> dict[str, Any]:
    return {
        "cellferry": core["made"]["cellferry"],
        "python": core["made"]["python"],
        "topology": dict(record.topology),
        "servers": {
            f"{one['cell']}/{one['store']}": one["position"]["version"]
            for one in core["positions"]
            if "version" in one["position"]
        },
    }


def _gaps(core: Mapping[str, Any]) -> list[str]:
    facts, state = core["facts"], State(core["migration"]["state"])
    gaps = []
    if not core["observed"]:
        gaps.append(f"The copies were not counted for this pack: the migration is {state}.")
    gaps += [
        f"{one['cell']}/{one['store']} was not counted: {one['error']}"
        for one in core["observed"]
        if one["error"]
    ]
    gaps += [
        f"{one['cell']}/{one['store']} did not say where it stood ({one['when']}): "
        f"{one['position']['error']}"
        for one in core["positions"]
        if "error" in one["position"]
    ]
    if facts.get("pause") is None and not state.is_before_flip and state is not State.ABORTED:
        gaps.append("The pause was not recorded: the controller died between flip and hand-over.")
    if core["pause"]["writers"] is None:
        gaps.append("The pause as writers saw it was not given to the export.")
    return gaps


# ── what the cells say ──────────────────────────────────────────────────────────────────────────


def kept_and_serving(migration: Migration) -> tuple[str, str] | None:
    """Return the cells of the old copy and of the serving one, where both are whole."""
    if migration.state in (State.SOAKING, State.RETAINED):
        return migration.source, migration.destination
    if migration.state is State.ROLLED_BACK and "cleaned" not in migration.facts:
        return migration.destination, migration.source
    return None


def observe_sides(context: Context, migration: Migration) -> list[dict[str, Any]]:
    """Count and hash both copies, where one is kept; an error stands in place of what it hid."""
    found = kept_and_serving(migration)
    if found is None:
        return []
    return [
        observe_side(context, migration, name, kind, copy_of)
        for kind in context.stores
        for name, copy_of in zip(found, ("kept", "serving"), strict=True)
    ]


def observe_side(
    context: Context, migration: Migration, name: str, kind: str, copy_of: str
) -> dict[str, Any]:
    """Count and hash one store of one cell; `error` says why it could not be done."""
    side: dict[str, Any] = {
        "cell": name,
        "copy_of": copy_of,
        "store": kind,
        "unit": "",
        "position": {},
        "at_work": 0,
        "parts": [],
        "error": None,
    }
    try:
        cell = context.settings.cell(name, context.connections)
        observed = _observe(context, cell, kind, migration)
    except CellferryError as error:
        return side | {"error": f"{type(error).__name__}: {error.message}"}
    return side | {
        "unit": observed.unit,
        "position": dict(observed.position),
        "at_work": observed.at_work,
        "parts": [
            {
                "part": one.name,
                "count": one.count,
                "hash": one.hash,
                "first_expiry": one.first_expiry,
            }
            for one in observed.parts
        ],
    }


def _observe(context: Context, cell: Cell, kind: str, migration: Migration) -> Observed:
    if kind == "postgres":
        from cellferry.stores.postgres import observation as postgres

        path = context.settings.organization.data_map
        return postgres.observe(cell, migration.organization.id, migration.id, path)
    if kind == "redis":
        from cellferry.stores.redis import observation as redis

        return redis.observe(cell, migration.organization.id, migration.id)
    raise InvalidInput(f"store {kind} cannot be counted for evidence")


def _cell(context: Context, name: str) -> Cell | None:
    try:
        return context.settings.cell(name, context.connections)
    except CellferryError:
        return None


def _cells(context: Context, migration: Migration, gaps: list[str]) -> list[Cell]:
    found = []
    for name in (migration.source, migration.destination):
        cell = _cell(context, name)
        if cell is None:
            gaps.append(f"{name} is not configured here any more: nothing was asked of it.")
        else:
            found.append(cell)
    return found
