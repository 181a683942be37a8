"""Complete comparison of both sides, while writers write.

Independent of the copier: rows are counted and hashed in buckets of the hash of their key's text,
so neither an order nor a collation nor a range of keys that the copier used is trusted. Buckets
that differ are taken apart into keys. A key that differs is excused only if the key log *of the
same snapshot of the source* has it: a round will copy and compare it. Everything else is a
mismatch.

What hides from a comparison of an organization's rows is looked for besides: rows of a foreign-key
path whose parents are gone belong to nobody, and the replica role checks no foreign keys.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql

from cellferry.model import Mismatch, Move, Progress, Verification
from cellferry.stores.postgres.applied import dangling
from cellferry.stores.postgres.ownership import awaits_parent, owner_text
from cellferry.stores.postgres.references import is_comparable
from cellferry.stores.postgres.row_keys import key_array
from cellferry.stores.postgres.schema import ForeignKey, Placement, Table
from cellferry.stores.postgres.scope import (
    Key,
    Scope,
    key_hash,
    keys_join,
    row_hash,
    text_array,
)
from cellferry.stores.postgres.statistics import estimate_rows
from cellferry.stores.postgres.transactions import snapshot
from cellferry.stores.postgres.usage import Usage

#: At most so many mismatches are told one by one.
EXAMPLES = 100

#: Keys of differing buckets are compared in pieces of about so many rows.
DRILL_ROWS = 100_000

BUCKETS = 1024

#: Orphans are not looked for where more rows than both of these lie between the organization's
#: lowest and highest key: this many, and this many times its own. The planner's estimate counts. A
#: verify must not take longer the more the cell holds of others.
ORPHAN_ROWS = 500_000
ORPHAN_TIMES = 10

MISSING = "missing at destination"
EXTRA = "extra at destination"
DIFFERS = "differs"
ORPHAN = "orphan"
DANGLING = "refers to a row that the destination lacks"


@dataclass
class _Findings:
    compared: int = 0
    count: int = 0
    examples: list[Mismatch] = field(default_factory=list)
    hashes: dict[str, dict[str, Any]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    keeps_keys: bool = False
    keys: set[Key] = field(default_factory=set)

    def add(self, part: str, key: Key, reason: str) -> None:
        self.count += 1
        if self.keeps_keys:
            self.keys.add(key)
        if len(self.examples) < EXAMPLES:
            self.examples.append(Mismatch(part, ", ".join(key), reason))


@dataclass(frozen=True)
class _Digest:
    count: int
    hash: int


class Verifier:
    """Compares an organization's rows on both sides; reads only.

    Args:
        source: where the key log is; in autocommit mode.
        destination: nobody but this attempt writes the organization's rows there; in autocommit
            mode.
        buckets: a power of two; the more, the fewer rows are compared one by one.
        excuses_dirty: whether a key in the log may differ, as a round brings it later. Under the
            gate no round comes any more.
    """

    def __init__(
        self,
        source: psycopg.Connection[Any],
        destination: psycopg.Connection[Any],
        scope: Scope,
        move: Move,
        progress: Progress,
        *,
        buckets: int = BUCKETS,
        excuses_dirty: bool = True,
    ) -> None:
        self._source = source
        self._destination = destination
        self._scope = scope
        self._move = move
        self._progress = progress
        self._bucket_count = buckets
        self._excuses_dirty = excuses_dirty
        self._usage = Usage(destination, source, scope, move.migration)

    def run(self) -> Verification:
        """Compare every table, then look for orphans and dangling references."""
        started = time.monotonic()
        findings = _Findings()
        for table in self._scope.tables:
            self._progress.check()
            with snapshot(self._source), snapshot(self._destination):
                dirty = self._dirty(table)
                self._compare(table, dirty, findings)
                self._orphans(table, dirty, findings)
                self._references(table, dirty, findings)
            self._progress.report(
                "postgres", "verify", findings.compared, None, "rows", str(table.name)
            )
        for table in self._scope.data_map.referenced:
            with snapshot(self._source), snapshot(self._destination):
                self._imported(table, findings)
        return Verification(
            store="postgres",
            compared=findings.compared,
            mismatch_count=findings.count,
            mismatches=tuple(findings.examples),
            hashes=findings.hashes,
            seconds=time.monotonic() - started,
            remarks=tuple(findings.remarks),
        )

    # ── for repair: the same comparison, piece by piece, telling every key ──────────────────────

    def suspects(self, table: Table) -> tuple[int, list[list[int]]]:
        """Compare `table` by buckets; return the source's rows and, in pieces, what differs."""
        with snapshot(self._source), snapshot(self._destination):
            here, there = self._both_buckets(table)
        return _sum(here).count, list(_pieces(_differing(here, there), here, there))

    def differing(self, table: Table, buckets: list[int]) -> set[Key]:
        """Return the keys in `buckets` that differ and that no log row of the snapshot names.

        In the caller's snapshots of both sides.
        """
        findings = _Findings(keeps_keys=True)
        self._drill(table, buckets, self._dirty(table), findings)
        return findings.keys

    def astray(self, table: Table) -> set[Key]:
        """Return keys of rows that a comparison does not see to be wrong.

        Those whose owner cannot be told at the destination, those that refer to rows which it
        lacks, and shared rows that this migration brought and that differ now. In the caller's
        snapshots of both sides.
        """
        findings = _Findings(keeps_keys=True)
        if self._scope.is_owned(table):
            dirty = self._dirty(table)
            self._orphans(table, dirty, findings, is_bounded=False)
            self._references(table, dirty, findings)
        else:
            self._imported(table, findings)
        return findings.keys

    def _dirty(self, table: Table) -> set[Key]:
        if not self._excuses_dirty:
            return set()
        return {
            tuple(key)
            for (key,) in self._source.execute(
                "SELECT DISTINCT key FROM cellferry.key_log"
                " WHERE organization = %s AND relation = %s",
                (self._move.organization.id, str(table.name)),
            )
        }

    # ── rows ────────────────────────────────────────────────────────────────────────────────────

    def _compare(self, table: Table, dirty: set[Key], findings: _Findings) -> None:
        here, there = self._both_buckets(table)
        total, other = _sum(here), _sum(there)
        findings.compared += total.count
        part = {
            "count": total.count,
            "source": str(total.hash),
            "destination": str(other.hash),
        }
        if table.placement is not Placement.OWNED:
            part["placement"] = table.placement.value
        findings.hashes[str(table.name)] = part
        excused = 0
        for buckets in _pieces(_differing(here, there), here, there):
            excused += self._drill(table, buckets, dirty, findings)
        if excused:
            part["dirty"] = excused

    def _both_buckets(self, table: Table) -> tuple[Mapping[int, _Digest], Mapping[int, _Digest]]:
        with ThreadPoolExecutor(max_workers=1) as other_side:
            pending = other_side.submit(self._buckets, self._destination, table)
            here = self._buckets(self._source, table)
            return here, pending.result()

    def _buckets(self, connection: psycopg.Connection[Any], table: Table) -> Mapping[int, _Digest]:
        statement = sql.SQL(
            "SELECT {bucket}, count(*), sum({hash}) FROM {table} AS t WHERE {owned} GROUP BY 1"
        ).format(
            bucket=self._bucket(table),
            hash=row_hash(table),
            table=table.name.identifier,
            owned=self._scope.owned(table),
        )
        return {
            bucket: _Digest(count, int(total))
            for bucket, count, total in connection.execute(statement)
        }

    def _drill(self, table: Table, buckets: list[int], dirty: set[Key], findings: _Findings) -> int:
        """Compare the keys of `buckets` one by one; return how many differ and are dirty."""
        here = self._keys(self._source, table, buckets)
        there = self._keys(self._destination, table, buckets)
        excused = 0
        for key in sorted(here.keys() | there.keys()):
            if here.get(key) == there.get(key):
                continue
            if key in dirty:
                excused += 1
            elif key not in there:
                findings.add(str(table.name), key, MISSING)
            elif key not in here:
                findings.add(str(table.name), key, EXTRA)
            else:
                findings.add(str(table.name), key, DIFFERS)
        return excused

    def _keys(
        self, connection: psycopg.Connection[Any], table: Table, buckets: list[int]
    ) -> dict[Key, tuple[int, int]]:
        # Counted as well: where a key is not unique (no constraint there), a doubled row shows.
        statement = sql.SQL(
            "SELECT {key}, count(*), sum({hash}) FROM {table} AS t"
            " WHERE {owned} AND {bucket} = ANY({buckets}::int[]) GROUP BY 1"
        ).format(
            key=key_array(table, "t"),
            hash=row_hash(table),
            table=table.name.identifier,
            owned=self._scope.owned(table),
            bucket=self._bucket(table),
            buckets=text_array([str(bucket) for bucket in buckets]),
        )
        return {
            tuple(key): (count, int(total)) for key, count, total in connection.execute(statement)
        }

    def _bucket(self, table: Table) -> sql.Composed:
        return sql.SQL("(({}) & {})::int").format(
            key_hash(table), sql.Literal(self._bucket_count - 1)
        )

    # ── what a comparison does not see ──────────────────────────────────────────────────────────

    def _orphans(
        self, table: Table, dirty: set[Key], findings: _Findings, *, is_bounded: bool = True
    ) -> None:
        """Find rows at the destination whose path to an organization breaks off.

        A row that names no parent, or one of nobody, is nobody's and was not copied. Only among
        keys between the organization's lowest and highest, which the mover wrote. One that the
        source has as another organization's is not ours: its own move is under way, and its parent
        comes later. One that it has as nobody's is nobody's here as well. One that it does not have
        is what applications leave where no constraint ties it; where one does, it could be that of
        any move under way, and is looked at when there is no other.

        A net below others: the round that brings a key looks for a row that is gone at the source,
        and a row that is not here is missing in the comparison. So it is not held among more rows
        than both `ORPHAN_ROWS` and `ORPHAN_TIMES` the organization's; a remark says so. A repair
        does not rely on the log, so there it is held, however many they are.
        """
        if table.has_direct_owner or not any(path.hops for path in table.owners):
            return
        row = self._source.execute(_extremes(table, self._scope.owned(table))).fetchone()
        if row is None or row[0] is None:
            return
        low, high, count = row
        data_map = self._scope.data_map
        between = _between(table, low, high)
        if is_bounded:
            among = estimate_rows(self._destination, table, between)
            if among > max(ORPHAN_ROWS, ORPHAN_TIMES * count):
                findings.remarks.append(
                    f"orphans not looked for in {table.name}, among about {among:,} rows"
                )
                return
        statement = sql.SQL(
            "SELECT {key}, {tied} FROM {table} AS t"
            " WHERE {between} AND ({owner}) IS NULL AND {awaits}"
        ).format(
            key=key_array(table, "t"),
            tied=awaits_parent(table, "t", without=lambda *hop: not data_map.is_tied(*hop)),
            table=table.name.identifier,
            between=between,
            owner=owner_text(table, "t"),
            awaits=awaits_parent(table, "t"),
        )
        orphans = {
            tuple(key): is_tied
            for key, is_tied in self._destination.execute(statement)
            if tuple(key) not in dirty
        }
        if not orphans:
            return
        there = {
            tuple(key): is_ours
            for key, is_ours in self._source.execute(
                sql.SQL("SELECT {}, ({}) IS TRUE FROM {} AS t {}").format(
                    key_array(table, "t"),
                    self._scope.owned(table),
                    table.name.identifier,
                    keys_join(table, orphans),
                )
            )
        }
        others_import = self._others_import()
        for key, is_tied in sorted(orphans.items()):
            if there.get(key, is_tied and not others_import):
                findings.add(str(table.name), key, ORPHAN)

    def _others_import(self) -> bool:
        row = self._destination.execute(
            "SELECT EXISTS (SELECT FROM cellferry.gate"
            " WHERE state = 'importing' AND organization <> %s)",
            (self._move.organization.id,),
        ).fetchone()
        return row == (True,)

    def _references(self, table: Table, dirty: set[Key], findings: _Findings) -> None:
        """Check every foreign key of the organization's rows at the destination."""
        for foreign_key in self._scope.data_map.foreign_keys:
            if foreign_key.child != table.name or not is_comparable(foreign_key):
                continue
            lost = self._dangling(self._destination, table, foreign_key)
            lost = {key for key in lost if key not in dirty}
            if lost:
                # What leads nowhere at the source as well is not the move's fault.
                lost -= self._dangling(self._source, table, foreign_key, lost)
            for key in sorted(lost):
                findings.add(str(table.name), key, f"{DANGLING} ({foreign_key.name})")

    def _dangling(
        self,
        connection: psycopg.Connection[Any],
        table: Table,
        foreign_key: ForeignKey,
        among: set[Key] | None = None,
    ) -> set[Key]:
        join = sql.SQL("") if among is None else keys_join(table, among)
        statement = dangling(
            0,
            table,
            foreign_key,
            join,
            condition=self._scope.owned(table),
            select=key_array(table, "t"),
        )
        return {tuple(key) for _, key in connection.execute(statement)}

    def _imported(self, table: Table, findings: _Findings) -> None:
        """Compare the referenced rows that this migration brought.

        Those that came with another organization as well, which has arrived, may differ: it may
        change them at the destination.
        """
        # The destination's snapshot is the older of the two: what other moves bring meanwhile the
        # source has as well, in the row or in the log.
        imported = {
            tuple(key)
            for (key,) in self._destination.execute(
                "SELECT key FROM cellferry.imported_row WHERE migration = %s AND relation = %s",
                (self._move.migration, str(table.name)),
            )
        }
        if not imported:
            return
        dirty = self._dirty(table)
        here, there = (
            self._hashes(connection, table, imported)
            for connection in (self._source, self._destination)
        )
        # A row that is gone at the source stays at the destination: nobody's row is deleted.
        different = {key for key in here if here[key] != there.get(key)} - dirty
        arrived: set[Key] = set()
        if not self._move.returning:
            arrived = self._usage.by_arrived(table, different)
        for key in sorted(different - arrived):
            findings.add(str(table.name), key, DIFFERS if key in there else MISSING)
        for key in arrived:
            del here[key]
        findings.compared += len(here)
        findings.hashes[str(table.name)] = {
            "count": len(here),
            "source": str(sum(here.values())),
            "destination": str(sum(there[key] for key in there if key in here)),
            "placement": table.placement.value,
            **({"left to others that arrived": len(arrived)} if arrived else {}),
        }

    def _hashes(
        self, connection: psycopg.Connection[Any], table: Table, keys: set[Key]
    ) -> dict[Key, int]:
        statement = sql.SQL("SELECT {}, {} FROM {} AS t {}").format(
            key_array(table, "t"),
            row_hash(table),
            table.name.identifier,
            keys_join(table, keys),
        )
        return {tuple(key): int(value) for key, value in connection.execute(statement)}


def _differing(here: Mapping[int, _Digest], there: Mapping[int, _Digest]) -> list[int]:
    return sorted(
        bucket for bucket in here.keys() | there.keys() if here.get(bucket) != there.get(bucket)
    )


def _collate(table: Table, column: str) -> sql.SQL:
    """What makes both cells order a column alike: they may sort text differently (hazard 13)."""
    return sql.SQL(' COLLATE "C"' if table.column(column).collation else "")


#: The first words of types for which every supported version has min() and max().
_HAVE_EXTREMES = frozenset({
    "smallint", "integer", "bigint", "numeric", "real", "double", "text", "character", "date",
    "time", "timestamp", "interval", "inet", "oid",
})  # fmt: skip


def _between(table: Table, low: str, high: str) -> sql.Composed:
    """Return the condition that the first key column is within these texts."""
    name = table.primary_key[0]
    kind = sql.SQL(table.column(name).type)
    return sql.SQL("{}{} BETWEEN {}::{} AND {}::{}").format(
        sql.Identifier("t", name), _collate(table, name), sql.Literal(low), kind,
        sql.Literal(high), kind,
    )  # fmt: skip


def _extremes(table: Table, owned: sql.Composable) -> sql.Composed:
    """Return a SELECT of the lowest and highest text of the first key column of `owned` rows.

    And of their number. The count also keeps the planner from reading an index from its one end
    through everybody's rows.
    """
    name = table.primary_key[0]
    first = sql.SQL("{}{}").format(sql.Identifier("t", name), _collate(table, name))
    rows = sql.SQL("FROM {} AS t WHERE {}").format(table.name.identifier, owned)
    if re.split(r"[ (]", table.column(name).type)[0] in _HAVE_EXTREMES:
        return sql.SQL("SELECT min({0})::text, max({0})::text, count(*) {1}").format(first, rows)
    # Fenced, for the same reason.
    return sql.SQL("SELECT {}, {}, (SELECT count(*) {})").format(
        *(
            sql.SQL(
                "(SELECT k::text FROM (SELECT {} AS k {} OFFSET 0) AS s ORDER BY k {} LIMIT 1)"
            ).format(first, rows, sql.SQL(direction))
            for direction in ("ASC", "DESC")
        ),
        rows,
    )


def _sum(buckets: Mapping[int, _Digest]) -> _Digest:
    return _Digest(
        sum(digest.count for digest in buckets.values()),
        sum(digest.hash for digest in buckets.values()),
    )


def _pieces(
    buckets: list[int], here: Mapping[int, _Digest], there: Mapping[int, _Digest]
) -> Iterator[list[int]]:
    nothing = _Digest(0, 0)
    piece: list[int] = []
    rows = 0
    for bucket in buckets:
        piece.append(bucket)
        rows += max(here.get(bucket, nothing).count, there.get(bucket, nothing).count)
        if rows >= DRILL_ROWS:
            yield piece
            piece, rows = [], 0
    if piece:
        yield piece
