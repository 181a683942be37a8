"""What cells hold of an organization, as the checker sees it: read with its own queries.

Rows and keys are of two kinds. *Tracked* ones have an `external_ref` (in Redis: `live` in their
name): writers change them, and the ledger says what they must be. All others are *untouched*:
they must stay exactly as they were seeded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, LiteralString

import psycopg
import redis
from psycopg import sql

from cellferry.local.application.places import gate_key, key

Connection = psycopg.Connection[tuple[Any, ...]]

#: Condition that makes a row `t` of a table the organization's.
OWNED: Mapping[LiteralString, LiteralString] = {
    "organizations": "t.id = %(organization)s",
    "memberships": "t.organization_id = %(organization)s",
    "users": "t.id IN (SELECT user_id FROM memberships WHERE organization_id = %(organization)s)",
    "namespaces": "t.organization_id = %(organization)s",
    "projects": "t.organization_id = %(organization)s",
    "project_statistics": (
        "t.project_id IN (SELECT id FROM projects WHERE organization_id = %(organization)s)"
    ),
    "issues": "t.organization_id = %(organization)s",
    "notes": "t.project_id IN (SELECT id FROM projects WHERE organization_id = %(organization)s)",
    "labels": "t.organization_id = %(organization)s",
    "label_links": "t.label_id IN (SELECT id FROM labels WHERE organization_id = %(organization)s)",
    "merge_requests": (
        "t.project_id IN (SELECT id FROM projects WHERE organization_id = %(organization)s)"
    ),
    "merge_request_diffs": (
        "t.merge_request_id IN (SELECT m.id FROM merge_requests AS m"
        " JOIN projects AS p ON p.id = m.project_id WHERE p.organization_id = %(organization)s)"
    ),
    "audit_entries": (
        "t.merge_request_id IN (SELECT m.id FROM merge_requests AS m"
        " JOIN projects AS p ON p.id = m.project_id WHERE p.organization_id = %(organization)s)"
    ),
    "award_emoji": (
        "(t.awardable_type = 'Issue' AND t.awardable_id IN"
        " (SELECT id FROM issues WHERE organization_id = %(organization)s)"
        " OR t.awardable_type = 'MergeRequest' AND t.awardable_id IN"
        " (SELECT m.id FROM merge_requests AS m JOIN projects AS p ON p.id = m.project_id"
        " WHERE p.organization_id = %(organization)s))"
    ),
    "board_cards": "t.organization_id = %(organization)s",
    "preferences": "t.organization_id = %(organization)s",
    "events": "t.organization_id = %(organization)s",
}

#: Condition that makes a row untouched, where it is not the absence of an external_ref.
_UNTOUCHED: Mapping[str, LiteralString] = {
    "organizations": "true",
    "namespaces": "true",
    "project_statistics": (
        "t.project_id NOT IN (SELECT id FROM projects WHERE external_ref IS NOT NULL)"
    ),
    "audit_entries": (
        "t.merge_request_id NOT IN (SELECT id FROM merge_requests WHERE external_ref IS NOT NULL)"
    ),
}

#: What a tracked row says, as text; its digest is in the ledger.
CONTENT: Mapping[LiteralString, LiteralString] = {
    "users": "t.name",
    "memberships": "t.access_level::text",
    "issues": "t.title",
    "notes": "t.body",
    "labels": "t.title || ' ' || t.\"position\"",
    "label_links": "(SELECT external_ref FROM issues WHERE id = t.issue_id)",
    "merge_requests": "t.title",
    "merge_request_diffs": "t.diff",
    "award_emoji": "t.name",
    "board_cards": "t.board || ':' || t.slot",
    "preferences": "t.value->>'v'",
    "events": "t.payload->>'v'",
}

#: Rows whose columns the application's triggers keep, when they contradict what they summarize.
_DERIVED: Mapping[str, LiteralString] = {
    "issues_count of project": (
        "SELECT p.path FROM projects AS p WHERE p.organization_id = %(organization)s"
        " AND p.issues_count <> (SELECT count(*) FROM issues WHERE project_id = p.id)"
    ),
    "audit entries of merge request": (
        "SELECT m.external_ref FROM merge_requests AS m WHERE m.project_id IN"
        " (SELECT id FROM projects WHERE organization_id = %(organization)s)"
        " AND m.external_ref IS NOT NULL AND (m.lock_version + 1, m.lock_version + 1) <>"
        " (SELECT count(*), count(DISTINCT lock_version) FROM audit_entries"
        " WHERE merge_request_id = m.id)"
    ),
}

#: A row's version and content.
Tracked = tuple[int, str | None]


@dataclass(slots=True)
class Stream:
    """A stream and its consumer group: entry ids by operation, what was delivered, what pends."""

    entries: list[tuple[str, str]] = field(default_factory=list)
    last_delivered: str = "0-0"
    pending: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Contents:
    """What one cell holds of one organization.

    Attributes:
        untouched: per table, and `keys`: number and sum of hashes of what no writer touches.
        tracked: per part and name the rows found; more than one is a fault.
        counters: shared counters by part and name.
    """

    untouched: dict[str, tuple[int, str]] = field(default_factory=dict)
    tracked: dict[str, dict[str, list[Tracked]]] = field(default_factory=dict)
    counters: dict[tuple[str, str], int] = field(default_factory=dict)
    queues: dict[str, list[str]] = field(default_factory=dict)
    streams: dict[str, Stream] = field(default_factory=dict)
    expiries: dict[str, int] = field(default_factory=dict)
    derived_faults: list[str] = field(default_factory=list)


def connect(url: str) -> Connection:
    """Connect for reading, with the settings that a row's text depends on pinned."""
    return psycopg.connect(
        url,
        autocommit=True,
        connect_timeout=10,
        options="-c TimeZone=UTC -c DateStyle=ISO,YMD -c IntervalStyle=postgres"
        " -c extra_float_digits=1 -c bytea_output=hex -c work_mem=64MB"
        " -c default_transaction_read_only=on",
    )


def read_contents(postgres: Connection, client: redis.Redis, organization: str) -> Contents:
    """Read everything that one cell holds of `organization`."""
    found = Contents()
    _read_rows(postgres, organization, found)
    _read_keys(client, organization, found)
    return found


def count_rows(postgres: Connection, organization: str) -> int:
    """Return how many rows of `organization` a cell holds; referenced users do not count."""
    return sum(
        _one(
            postgres,
            sql.SQL("SELECT count(*) FROM {} AS t WHERE ").format(sql.Identifier(table))
            + sql.SQL(condition),
            organization,
        )[0]
        for table, condition in OWNED.items()
        if table != "users"
    )


def count_keys(client: redis.Redis, organization: str) -> int:
    """Return how many keys of `organization` a cell holds."""
    return sum(1 for _ in client.scan_iter(key(organization, "*"), count=2_000))


def dangling_rows(postgres: Connection) -> Mapping[str, int]:
    """Return foreign keys of a cell that point nowhere, with the number of such rows.

    Rows that lost their parent belong to nobody, so that no query by organization finds them.
    """
    keys = postgres.execute(
        "SELECT k.conname::text, c.relname::text, p.relname::text,"
        " (SELECT array_agg(a.attname::text ORDER BY n.number) FROM unnest(k.conkey)"
        "  WITH ORDINALITY AS n (attribute, number) JOIN pg_attribute AS a"
        "  ON a.attrelid = k.conrelid AND a.attnum = n.attribute),"
        " (SELECT array_agg(a.attname::text ORDER BY n.number) FROM unnest(k.confkey)"
        "  WITH ORDINALITY AS n (attribute, number) JOIN pg_attribute AS a"
        "  ON a.attrelid = k.confrelid AND a.attnum = n.attribute)"
        " FROM pg_constraint AS k JOIN pg_class AS c ON c.oid = k.conrelid"
        " JOIN pg_class AS p ON p.oid = k.confrelid"
        " WHERE k.contype = 'f' AND k.connamespace = 'public'::regnamespace"
        " AND k.conparentid = 0"
    ).fetchall()
    found = {}
    for name, child, parent, ours, theirs in keys:
        pairs = list(zip(ours, theirs, strict=True))
        query = sql.SQL(
            "SELECT count(*) FROM {} AS c WHERE {} AND NOT EXISTS (SELECT FROM {} AS p WHERE {})"
        ).format(
            sql.Identifier(child),
            sql.SQL(" AND ").join(
                sql.SQL("c.{} IS NOT NULL").format(sql.Identifier(one)) for one, _ in pairs
            ),
            sql.Identifier(parent),
            sql.SQL(" AND ").join(
                sql.SQL("p.{} = c.{}").format(sql.Identifier(their), sql.Identifier(our))
                for our, their in pairs
            ),
        )
        row = postgres.execute(query).fetchone()
        if row and row[0]:
            found[name] = int(row[0])
    emoji = postgres.execute(
        "SELECT count(*) FROM award_emoji AS t WHERE CASE t.awardable_type"
        " WHEN 'Issue' THEN NOT EXISTS (SELECT FROM issues WHERE id = t.awardable_id)"
        " ELSE NOT EXISTS (SELECT FROM merge_requests WHERE id = t.awardable_id) END"
    ).fetchone()
    if emoji and emoji[0]:
        found["award_emoji (awardable)"] = int(emoji[0])
    return found


def gate_states(
    postgres: Connection, client: redis.Redis, organization: str
) -> tuple[str | None, str | None]:
    """Return what the gates of both stores say in a cell; None where there is none."""
    row = None
    if _exists(postgres, "cellferry.gate"):
        row = postgres.execute(
            "SELECT state::text FROM cellferry.gate WHERE organization = %s", (organization,)
        ).fetchone()
    marker: Any = client.get(gate_key(organization))
    return (row[0] if row else None, str(marker) if marker else None)


def cell_rows(postgres: Connection) -> Mapping[str, tuple[int, str]]:
    """Return number and hash of the rows that never move: global and cell-local tables."""
    return {
        table: _hash(
            postgres,
            sql.SQL("SELECT t::text AS content FROM {} AS t").format(sql.Identifier(table)),
        )
        for table in ("plans", "cell_settings", "job_runs")
    }


def _read_rows(postgres: Connection, organization: str, found: Contents) -> None:
    with postgres.transaction():
        postgres.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        for table, condition in OWNED.items():
            found.untouched[table] = _hash(
                postgres,
                sql.SQL("SELECT t::text AS content FROM {} AS t WHERE ").format(
                    sql.Identifier(table)
                )
                + sql.SQL(condition)
                + sql.SQL(" AND ")
                + sql.SQL(_UNTOUCHED.get(table, "t.external_ref IS NULL")),
                organization,
            )
        for table, content in CONTENT.items():
            rows = found.tracked.setdefault(table, {})
            for ref, version, digest in postgres.execute(
                sql.SQL("SELECT t.external_ref, t.lock_version, left(md5(")
                + sql.SQL(content)
                + sql.SQL("), 12) FROM {} AS t WHERE t.external_ref IS NOT NULL AND ").format(
                    sql.Identifier(table)
                )
                + sql.SQL(OWNED[table]),
                {"organization": organization},
            ):
                rows.setdefault(ref, []).append((version, digest))
        for ref, views in postgres.execute(
            "SELECT p.external_ref, s.page_views FROM project_statistics AS s"
            " JOIN projects AS p ON p.id = s.project_id"
            " WHERE p.organization_id = %s AND p.external_ref IS NOT NULL",
            (organization,),
        ):
            found.counters["page_views", ref] = views
        for what, query in _DERIVED.items():
            for (which,) in postgres.execute(query, {"organization": organization}):
                found.derived_faults.append(f"{what} {which}")


def _read_keys(client: redis.Redis, organization: str, found: Contents) -> None:
    total = 0
    count = 0
    for name, kind, expires, value in _values(client, key(organization, "cold", "*")):
        text = repr((name, kind, expires, value))
        total += int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")
        count += 1
    found.untouched["keys"] = (count, str(total))
    live = key(organization, "live", "")
    zset = found.tracked.setdefault("zset", {})
    strings = found.tracked.setdefault("string", {})
    for name, kind, expires, value in _values(client, f"{live}*"):
        match name.removeprefix(live).split(":")[0]:
            case "session":
                strings[name] = [(0, str(value))]
                found.expiries[name] = expires
            case "counter":
                found.counters["counter", name] = int(value)
            case "usage":
                found.counters["hash", name] = int(dict(value).get("bytes", 0))
            case "queue":
                found.queues[name] = list(value)
            case "ranking":
                for member, score in value:
                    zset[f"{name} {member}"] = [(0, repr(float(score)))]
            case "stream":
                found.streams[name] = _stream(value)
            case "done":
                pass  # markers of queued jobs; they expire
            case _:
                strings[name] = [(0, f"{kind} that nobody wrote")]


def _values(client: redis.Redis, pattern: str) -> Iterator[tuple[str, str, int, Any]]:
    """Yield name, type, absolute expiry (ms, -1 for none) and value of the keys of a pattern."""
    names: Iterable[str] = sorted(set(client.scan_iter(pattern, count=2_000)))
    names = iter(names)
    while batch := list(islice(names, 1_000)):
        pipeline = client.pipeline(transaction=False)
        for name in batch:
            pipeline.type(name)
            pipeline.pexpiretime(name)
        answers = pipeline.execute()
        kinds = dict(zip(batch, answers[::2], strict=True))
        expiries = dict(zip(batch, answers[1::2], strict=True))
        there = [name for name in batch if kinds[name] != "none"]
        pipeline = client.pipeline(transaction=False)
        for name in there:
            _ask(pipeline, name, kinds[name])
        for name, answer in zip(there, pipeline.execute(raise_on_error=False), strict=True):
            if isinstance(answer, redis.ResponseError) or answer is None:
                continue  # it expired between the two questions
            is_stream = kinds[name] == "stream"
            value = _stream_value(client, name, answer) if is_stream else answer
            yield name, kinds[name], expiries[name], _canonical(value)


def _ask(pipeline: Any, name: str, kind: str) -> None:
    match kind:
        case "string":
            pipeline.get(name)
        case "hash":
            pipeline.hgetall(name)
        case "list":
            pipeline.lrange(name, 0, -1)
        case "set":
            pipeline.smembers(name)
        case "zset":
            pipeline.zrange(name, 0, -1, withscores=True)
        case _:
            pipeline.xrange(name)


def _stream_value(client: redis.Redis, name: str, entries: Any) -> list[Any]:
    groups: Any = client.xinfo_groups(name)
    described = []
    for group in groups:
        pending: Any = (
            client.xpending_range(name, group["name"], "-", "+", count=1_000_000)
            if group["pending"]
            else []
        )
        described.append(
            (
                str(group["name"]),
                str(group["last-delivered-id"]),
                sorted(
                    (str(one["message_id"]), str(one["consumer"]), int(one["times_delivered"]))
                    for one in pending
                ),
            )
        )
    flat = [(str(entry), sorted(dict(fields).items())) for entry, fields in entries]
    return [flat, sorted(described)]


def _stream(value: Any) -> Stream:
    entries, groups = value
    stream = Stream(
        entries=[(entry, dict(fields).get("operation", "")) for entry, fields in entries]
    )
    for _, last, pending in groups:
        stream.last_delivered = last
        stream.pending = {one[0] for one in pending}
    return stream


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return sorted(value.items())
    if isinstance(value, set):
        return sorted(value)
    return value


def _hash(
    postgres: Connection, query: sql.Composed, organization: str | None = None
) -> tuple[int, str]:
    row = _one(
        postgres,
        sql.SQL("SELECT count(*), coalesce(sum(hashtextextended(content, 7)::numeric), 0)::text")
        + sql.SQL(" FROM (")
        + query
        + sql.SQL(") AS one"),
        organization,
    )
    return int(row[0]), str(row[1])


def _one(postgres: Connection, query: sql.Composed, organization: str | None) -> tuple[Any, ...]:
    values = {"organization": organization} if organization is not None else None
    return postgres.execute(query, values).fetchone() or ()


def _exists(postgres: Connection, relation: str) -> bool:
    row = postgres.execute("SELECT to_regclass(%s) IS NOT NULL", (relation,)).fetchone()
    return bool(row and row[0])
