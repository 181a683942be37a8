"""Referenced rows: what an organization's rows point at and shares with others (users, plans).

The rule of authority: a row that others use at the destination is left alone. One that it lacks is
copied, one that nobody else uses there is made as it is at the source; both are recorded in
`cellferry.imported_row`, and follow later changes at the source until the flip. None is ever
deleted, except by an abort when the move brought it and nobody else refers to it.

Organizations that move together share rows. Each of their migrations records a row that one of
them brought and follows it, as they read the same row at the same cell. When one has arrived, the
row is in use at the destination, and the others give it up.

On the way back the old cell has the row already. One that the move took along comes back as it is
now if this organization alone uses it at the old cell; one that others use there stays as it is.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import psycopg
from psycopg import sql

from cellferry.errors import PermanentError
from cellferry.model import Move
from cellferry.stores.postgres import checkpoints
from cellferry.stores.postgres.checkpoints import Checkpoint
from cellferry.stores.postgres.conflicts import WAITING_ROOM, waiting_room
from cellferry.stores.postgres.crossings import is_inside
from cellferry.stores.postgres.row_keys import key_array, key_text
from cellferry.stores.postgres.schema import ForeignKey, Placement, Table
from cellferry.stores.postgres.scope import (
    Key,
    Scope,
    has_one_spelling,
    keys_join,
    keys_relation,
    once_for_each_scope,
    present_keys,
    row_hash,
    texts_columns,
    texts_match,
    texts_relation,
    values_relation,
)
from cellferry.stores.postgres.taking_over import BATCH as LOCKED
from cellferry.stores.postgres.taking_over import TakeOver
from cellferry.stores.postgres.usage import Usage, recorded
from cellferry.stores.postgres.wire import Inlet, Outlet, Wire

BATCH = 10_000

#: Names the checkpoint that says that rows were left to another move which brings them.
LEFT_TO_OTHERS = "shared rows left to another move"


@dataclass(frozen=True)
class Held:
    """Rows of one table that are to be as they are at the source.

    Attributes:
        keys: which.
        locked: those that the destination has, locked.
        fresh: those that are not recorded yet.
    """

    keys: set[Key]
    locked: set[Key]
    fresh: set[Key]


#: Values of a foreign key that some rows need, by the foreign key.
Needs = list[tuple[ForeignKey, set[Key]]]


class ReferencedRows:
    """Brings the referenced rows that moved rows need to the destination.

    Every method works in the transactions that the caller has open on the two connections.
    """

    def __init__(
        self,
        source: psycopg.Connection[Any],
        destination: psycopg.Connection[Any],
        scope: Scope,
        wires: Mapping[str, Wire],
        move: Move,
    ) -> None:
        self._source = source
        self._destination = destination
        self._scope = scope
        self._wires = wires
        self._migration = move.migration
        self._returning = move.returning
        self._came_from = move.source.name
        self._usage = Usage(destination, source, scope, move.migration, came_from=move.source.name)
        self._take_over = TakeOver(destination, scope, self._usage, self.carry)
        #: Rows of which it was looked what they point at in turn.
        self._followed_up: set[tuple[str, Key]] = set()
        #: Values that were looked at for all rows of some table, by what they refer to.
        self._looked_at_for_all: defaultdict[tuple[object, ...], set[Key]] = defaultdict(set)
        self._has_left = False

    def foreign_keys(self, table: Table) -> tuple[ForeignKey, ...]:
        """Return the foreign keys of `table` that lead to referenced rows."""
        return self._scope.data_map.references(table)

    def needed_by_all(self, table: Table) -> Iterator[tuple[ForeignKey, set[Key]]]:
        """Yield what all rows of the organization in `table` point at, foreign key by key."""
        body = sql.SQL("WHERE {}").format(self._scope.owned(table))
        for foreign_key in self.foreign_keys(table):
            yield foreign_key, self._pointed_at(table, foreign_key, body)

    def bring_for_all(
        self, table: Table, batch: Callable[[Callable[[], None]], None]
    ) -> tuple[int, int]:
        """Bring what all rows of the organization in `table` need; see `bring`.

        Tables refer to the same users and plans: a value is looked at once.
        """
        rows = volume = 0
        for foreign_key, values in self.needed_by_all(table):
            looked_at = self._looked_at_for_all[foreign_key.parent, foreign_key.parent_columns]
            if fresh := values - looked_at:
                some, size = self.bring([(foreign_key, fresh)], batch)
                looked_at |= fresh
                rows += some
                volume += size
        return rows, volume

    def needed_by(self, table: Table, keys: Collection[Key]) -> Needs:
        """Return what the rows `keys` of `table` point at; the source is read.

        Of an owned table only the organization's: a key of which it could not be told whose it is
        was logged for everybody.
        """
        if not keys:
            return []
        body = sql.SQL("{} WHERE {}").format(
            keys_join(table, keys),
            self._scope.concerned(table),
        )
        return [
            (foreign_key, self._pointed_at(table, foreign_key, body))
            for foreign_key in self.foreign_keys(table)
        ]

    def _pointed_at(self, table: Table, foreign_key: ForeignKey, body: sql.Composable) -> set[Key]:
        texts = sql.SQL(", ").join(
            key_text(table.column(column), "t") for column in foreign_key.columns
        )
        present = sql.SQL(" AND ").join(
            sql.SQL("{} IS NOT NULL").format(sql.Identifier("t", column))
            for column in foreign_key.columns
        )
        # Made distinct before they are printed: there are far more rows than values.
        statement = sql.SQL(
            "SELECT {} FROM (SELECT DISTINCT {} FROM {} AS t {} AND {}) AS t"
        ).format(
            texts,
            sql.SQL(", ").join(sql.Identifier("t", column) for column in foreign_key.columns),
            table.name.identifier,
            body,
            present,
        )
        return {tuple(row) for row in self._source.execute(statement)}

    def bring(
        self, needs: Needs, batch: Callable[[Callable[[], None]], None] | None = None
    ) -> tuple[int, int]:
        """Insert those of `needs` that the destination lacks, and what these point at in turn.

        With `batch`, also take over those that are there and that nobody else uses.

        Args:
            needs: what moved rows point at.
            batch: runs its argument in a transaction of its own; None when one is open.

        Returns:
            Rows inserted or changed, and their bytes.

        Raises:
            PermanentError: a row cannot come, because another row with its unique values is at the
                destination already.
            TransientError: a row that nobody uses is locked.
        """
        inserted_rows = inserted_bytes = 0
        waiting = deque(needs)
        seen: set[tuple[str, Key]] = set()
        while waiting:
            foreign_key, values = waiting.popleft()
            parent = self._scope.data_map.by_name[foreign_key.parent]
            fresh = [value for value in values if (foreign_key.name, value) not in seen]
            seen.update((foreign_key.name, value) for value in fresh)
            for some in _batches(fresh, BATCH):
                came: set[Key] = set()
                if batch is not None:
                    # First: a row may have got the value by which it is referred to only since.
                    came, rows, size = self._take_unused(parent, foreign_key, some, batch)
                    inserted_rows += rows
                    inserted_bytes += size
                columns: Sequence[str] = foreign_key.parent_columns
                asked: Collection[Key] = some
                if foreign_key.optional:
                    # What belongs to a row is many rows: some of them may be there.
                    columns = parent.primary_key
                    asked = self._at_source(parent, foreign_key, some)
                result: list[tuple[list[Key], int]] = []

                def work(
                    parent: Table = parent,
                    columns: Sequence[str] = columns,
                    asked: Collection[Key] = asked,
                    result: list[tuple[list[Key], int]] = result,
                ) -> None:
                    result.append(
                        self._insert_absent(parent, columns, asked, takes=batch is not None)
                    )

                if batch is None:
                    work()
                elif self._absent(parent, columns, asked):
                    batch(work)
                keys, size = result[-1] if result else ([], 0)
                inserted_rows += len(keys)
                inserted_bytes += size
                came.update(keys)
                waiting.extend(self.needed_by(parent, came))
                if batch is not None:
                    self._followed_up.update((str(parent.name), key) for key in came)
        return inserted_rows, inserted_bytes

    def _at_source(
        self, parent: Table, foreign_key: ForeignKey, values: Collection[Key]
    ) -> set[Key]:
        """Return the primary keys of the source's rows to which `values` refer."""
        columns = foreign_key.parent_columns
        statement = sql.SQL("SELECT {} FROM {} AS t JOIN {} ON {}").format(
            key_array(parent, "t"),
            parent.name.identifier,
            texts_relation(values, len(columns)),
            texts_match([parent.column(column) for column in columns]),
        )
        return {tuple(key) for (key,) in self._source.execute(statement, prepare=False)}

    def _take_unused(
        self,
        parent: Table,
        foreign_key: ForeignKey,
        values: Collection[Key],
        batch: Callable[[Callable[[], None]], None],
    ) -> tuple[set[Key], int, int]:
        """Take over rows that are there and that nobody else uses.

        Returns:
            What came with this migration, now or before an attempt of it ended, and was not
            followed up; rows that were changed, and their bytes.
        """
        name = str(parent.name)
        wanted = self._at_source(parent, foreign_key, values)
        wanted = {key for key in wanted if (name, key) not in self._followed_up}
        present = present_keys(self._destination, parent, wanted)
        came = self._imported(parent, present)
        changed = volume = 0
        for some in _batches(sorted(self._take_over.unused(parent, present - came)), LOCKED):

            def work(some: Sequence[Key] = some) -> None:
                nonlocal changed, volume
                taken, rows, size = self._take_over.take(parent, some)
                self._record_taken(parent, taken)
                came.update(taken)
                changed += rows
                volume += size

            batch(work)
        if self._usage.brought_by_others(parent, present - came):
            batch(self._note_left)
        return came, changed, volume

    def _note_left(self) -> None:
        checkpoints.write(self._destination, self._migration, Checkpoint(LEFT_TO_OTHERS))
        self._has_left = True

    def bring_left(self, batch: Callable[[Callable[[], None]], None]) -> tuple[int, int]:
        """Look again at everything, if rows were left to another move that brought them.

        That move may have been aborted since: then nobody brings what changes.

        Returns:
            Rows inserted or changed, and their bytes.

        Raises:
            PermanentError, TransientError: as `bring`.
        """
        if LEFT_TO_OTHERS not in checkpoints.read(self._destination, self._migration):
            return 0, 0
        self._has_left = False
        count = volume = 0
        for table in self._scope.tables:
            for foreign_key, values in self.needed_by_all(table):
                rows, size = self.bring([(foreign_key, values)], batch)
                count += rows
                volume += size
        if not self._has_left:
            batch(lambda: checkpoints.remove(self._destination, self._migration, LEFT_TO_OTHERS))
        return count, volume

    def _absent(self, parent: Table, columns: Sequence[str], values: Collection[Key]) -> list[Key]:
        statement = sql.SQL(
            "SELECT {} FROM {} WHERE NOT EXISTS (SELECT 1 FROM {} AS t WHERE {})"
        ).format(
            texts_columns(len(columns)),
            texts_relation(values, len(columns)),
            parent.name.identifier,
            texts_match([parent.column(column) for column in columns]),
        )
        return [tuple(row) for row in self._destination.execute(statement)]

    def _insert_absent(
        self, parent: Table, columns: Sequence[str], values: Collection[Key], *, takes: bool
    ) -> tuple[list[Key], int]:
        """Insert the rows of the source that the destination lacks.

        With `takes`, also take over unused rows that have their unique values: those may have
        changed at the source, and other rows of ours that refer to them come later.

        Returns:
            The keys that came, and their bytes.
        """
        absent = self._absent(parent, columns, values)
        if not absent:
            return [], 0
        ties = [parent.column(column) for column in columns]
        body = sql.SQL("FROM {} AS t JOIN {} ON {}").format(
            parent.name.identifier, values_relation(ties, absent), texts_match(ties)
        )
        with waiting_room(self._destination, parent):
            sent, size = self.carry(parent, body, WAITING_ROOM)
            inserted, in_the_way = self._take_over.insert_waiting(parent, sent)
        if in_the_way and takes:
            taken, _, volume = self._take_over.take(parent, in_the_way)
            self._record(parent, inserted)
            self._record_taken(parent, taken)
            more, more_volume = self._insert_absent(parent, columns, values, takes=False)
            return [*inserted, *taken, *more], size + volume + more_volume
        if len(inserted) < sent:
            self._insist(parent, columns, absent)
            if not self._returning:
                self._note_left()  # somebody was quicker: another move, perhaps
        self._record(parent, inserted)
        return inserted, size

    def _insist(self, parent: Table, columns: Sequence[str], values: Collection[Key]) -> None:
        # A row that somebody else inserted meanwhile is fine; one that is still absent could not
        # be inserted, because of another unique key. (The source lacks it: nothing was sent.)
        still = set(self._absent(parent, columns, values))
        at_source = {
            tuple(row)
            for row in self._source.execute(
                sql.SQL("SELECT {} FROM {} AS t JOIN {} ON {}").format(
                    sql.SQL(", ").join(key_text(parent.column(column), "t") for column in columns),
                    parent.name.identifier,
                    texts_relation(values, len(columns)),
                    texts_match([parent.column(column) for column in columns]),
                )
            )
        }
        refused = sorted(still & at_source)
        if refused:
            raise PermanentError(
                f"key collision: {parent.name} row {', '.join(refused[0])} cannot be copied:"
                " another row at the destination has one of its unique values"
                f" ({len(refused)} such rows)",
                hint="make both cells agree on this row (same key, same unique values),"
                " then run the step again",
                organization=self._scope.organization,
                where=str(parent.name),
            )

    def carry(
        self, table: Table, body: sql.Composable, target: sql.Composable | None = None
    ) -> tuple[int, int]:
        """Copy rows from the source into `target`; return how many, and their bytes."""
        wire = self._wires[str(table.name)]
        with (
            self._source.cursor() as cursor,
            cursor.copy(wire.out(body)) as stream,
            Inlet(self._destination, wire, target) as inlet,
        ):
            inlet.fill(Outlet(wire, stream).rows)
        return inlet.rows, inlet.bytes

    # ── following the source ────────────────────────────────────────────────────────────────────

    def may_follow(self, keys: Mapping[str, set[Key]]) -> dict[Table, set[Key]]:
        """Return those of `keys`, by relation, that may be this migration's to bring up to date.

        Those that it brought, and those that belong to rows which it brought: a new e-mail
        address of such a user.
        """
        found = {}
        for table in self._scope.data_map.referenced:
            if asked := keys.get(str(table.name)):
                some = self._imported(table, asked) | self._took_along(table, asked)
                some |= self._belonging(table, asked - some)
                if some:
                    found[table] = some
        return found

    def hold(self, candidates: Mapping[Table, set[Key]]) -> dict[Table, Held]:
        """Lock rows before the source is read, and decide which of them follow it.

        Other moves bring the same rows from the same cell. Who writes one has read the source
        after whoever wrote it before: nobody puts an older content in the place of a newer.

        Args:
            candidates: what `may_follow` returned.

        Raises:
            TransientError: a transaction holds one of them.
        """
        locked = {
            table: self._take_over.lock(table, candidates[table])
            for table in self._scope.data_map.referenced
            if table in candidates
        }
        held = {}
        for table, here in locked.items():
            some = candidates[table]
            mine = self._imported(table, some)
            gone = self._arrived(table, mine)
            if gone:
                self._give_up(table, gone)
            mine = (mine - gone) | self._ours_alone(table, some - mine)
            belonging = self._belonging(table, some - mine - gone)
            alongside = self._usage.brought_alongside(table, belonging)
            fresh = {key for key in belonging if key not in here or key in alongside}
            if belonging - fresh and not self._returning:
                self._note_left()  # a move that brought one may have been aborted
            if mine or fresh:
                held[table] = Held(mine | fresh, here, fresh)
        return held

    def follow(self, table: Table, held: Held, *, careful: bool) -> set[Key]:
        """Make the rows of `held` as they are at the source; return those that are there.

        A row that is gone at the source stays: nobody's row is deleted by a move.

        Raises:
            psycopg.errors.UniqueViolation: as `TakeOver.renew`.
        """
        present = present_keys(self._source, table, held.keys)
        if present:
            self._take_over.renew(table, present, held.locked, careful=careful)
            if not has_one_spelling(table):
                self._spell_anew(table, present)
            self._record(table, (held.fresh & present) - held.locked)
            self._record_taken(table, held.fresh & present & held.locked)
        return present

    def _spell_anew(self, table: Table, keys: set[Key]) -> None:
        """Keep the records of rows findable by the keys that the log will have from now on."""
        columns = [table.column(name) for name in table.primary_key]
        key = sql.SQL("ARRAY[{}]").format(texts_columns(len(columns)))
        equal = sql.SQL(" AND ").join(
            sql.SQL("i.key[{0}]::{1} = {2}::{1}").format(
                sql.Literal(number), sql.SQL(column.type), sql.Identifier("k", f"k{number}")
            )
            for number, column in enumerate(columns, start=1)
        )
        self._destination.execute(
            sql.SQL(
                "UPDATE cellferry.imported_row AS i SET key = {key} FROM {keys}"
                " WHERE i.migration = {migration} AND i.relation = {relation} AND i.key <> {key}"
                # Keys of other relations may not be of this type.
                " AND CASE WHEN i.relation = {relation} THEN {equal} END"
            ).format(
                key=key,
                keys=keys_relation(table, keys),
                migration=sql.Literal(self._migration),
                relation=sql.Literal(str(table.name)),
                equal=equal,
            ),
            prepare=False,
        )

    def _give_up(self, table: Table, keys: set[Key]) -> None:
        """Leave rows to an organization that they came here with, and that has arrived.

        They stay as they are here now; what they are is looked at again right before the cutover,
        in case it was rolled back.
        """
        width = len(table.primary_key)
        self._destination.execute(
            sql.SQL(
                "DELETE FROM cellferry.imported_row AS i USING {} WHERE i.key = ARRAY[{}]"
                " AND i.migration = {} AND i.relation = {}"
            ).format(
                texts_relation(keys, width),
                texts_columns(width),
                sql.Literal(self._migration),
                sql.Literal(str(table.name)),
            ),
            prepare=False,
        )
        self._note_left()

    def _following(self, table: Table, keys: Collection[Key]) -> set[Key]:
        """Return those of `keys` that are to be as the source has them."""
        mine = self._imported(table, keys)
        return (mine - self._arrived(table, mine)) | self._ours_alone(table, keys)

    def _arrived(self, table: Table, keys: Collection[Key]) -> set[Key]:
        # On the way back `_ours_alone` looks at who uses a row.
        return set() if self._returning else self._usage.by_arrived(table, keys)

    def _imported(self, table: Table, among: Collection[Key]) -> set[Key]:
        """Return those of `among` that this migration brought."""
        if not among:
            return set()
        statement = self._brought(table, among)
        return {tuple(key) for (key,) in self._destination.execute(statement, prepare=False)}

    def _took_along(self, table: Table, among: Collection[Key]) -> set[Key]:
        """On the way back: return those of `among` that this migration took to the new cell."""
        if not among or not self._returning:
            return set()
        statement = self._brought(table, among)
        return {tuple(key) for (key,) in self._source.execute(statement, prepare=False)}

    def kept(self, table: Table) -> list[Key]:
        """On the way back: return rows taken along that differ, and stay as the old cell has them.

        Others use them there, so the old cell's row counts.
        """
        keys = [
            tuple(key)
            for (key,) in self._source.execute(
                "SELECT key FROM cellferry.imported_row WHERE migration = %s AND relation = %s",
                (self._migration, str(table.name)),
            )
        ]
        different: set[Key] = set()
        for some in _batches(keys, BATCH):
            statement = sql.SQL("SELECT {}, {} FROM {} AS t {}").format(
                key_array(table, "t"),
                row_hash(table),
                table.name.identifier,
                keys_join(table, some),
            )
            here, there = (
                {tuple(key): digest for key, digest in connection.execute(statement, prepare=False)}
                for connection in (self._source, self._destination)
            )
            different |= {key for key, digest in here.items() if there.get(key, digest) != digest}
        return sorted(self._usage.by_others(table, different))

    def _ours_alone(self, table: Table, keys: Collection[Key]) -> set[Key]:
        """On the way back: those of `keys` that came along and that nobody else uses here."""
        came_along = self._took_along(table, keys)
        return came_along - self._usage.by_others(table, came_along)

    def _brought(self, table: Table, among: Collection[Key]) -> sql.Composed:
        """Return a query for those of `among` that this migration brought."""
        return sql.SQL("SELECT i.key FROM {} WHERE i.migration = {} AND i.relation = {}").format(
            recorded(table, among), sql.Literal(self._migration), sql.Literal(str(table.name))
        )

    def has_holders(self, table: Table) -> bool:
        """Whether rows of `table` may belong to other referenced rows."""
        return bool(self._holders(table))

    def _holders(self, table: Table) -> tuple[ForeignKey, ...]:
        """Return the relations by which rows of `table` belong to other referenced rows."""
        return tuple(
            key
            for key in self._scope.data_map.foreign_keys
            if key.optional and key.parent == table.name
        )

    def _belonging(self, table: Table, keys: Collection[Key]) -> set[Key]:
        """Return those of `keys` that belong to rows which follow the source."""
        return {key for holder in self._holders(table) for key in self._held(table, holder, keys)}

    def _held(self, table: Table, holder: ForeignKey, keys: Collection[Key]) -> set[Key]:
        """Return those of `keys` that belong, by one relation, to rows which follow the source."""
        if not keys:
            return set()
        shared = self._scope.data_map.by_name[holder.child]
        tie = sql.SQL(" AND ").join(
            sql.SQL("{} = {}").format(sql.Identifier("p", ours), sql.Identifier("t", theirs))
            for ours, theirs in zip(holder.columns, holder.parent_columns, strict=True)
        )
        owners = {
            tuple(key): tuple(owner)
            for key, owner in self._source.execute(
                sql.SQL("SELECT {}, {} FROM {} AS t {} JOIN {} AS p ON {}").format(
                    key_array(table, "t"),
                    key_array(shared, "p"),
                    table.name.identifier,
                    keys_join(table, keys),
                    shared.name.identifier,
                    tie,
                )
            )
        }
        following = self._following(shared, set(owners.values()))
        return {key for key, owner in owners.items() if owner in following}

    def _record(self, table: Table, keys: Collection[Key], *, was_here: bool = False) -> None:
        """Remember that this migration brought `keys`, or the content of rows that were here."""
        if not keys:
            return
        width = len(table.primary_key)
        self._destination.execute(
            sql.SQL(
                "INSERT INTO cellferry.imported_row (migration, relation, key, was_here, came_from)"
                " SELECT {}, {}, ARRAY[{}], {}, {} FROM {} ON CONFLICT DO NOTHING"
            ).format(
                sql.Literal(self._migration),
                sql.Literal(str(table.name)),
                texts_columns(width),
                sql.Literal(was_here),
                sql.Literal(self._came_from),
                texts_relation(keys, width),
            ),
            prepare=False,
        )

    def _record_taken(self, table: Table, keys: set[Key]) -> None:
        """Remember that this migration brings rows that are here, and were locked.

        Those that another migration brought stay only if they were here before that one.
        """
        alongside = self._usage.brought_alongside(table, keys)
        brought = {key for key, was_here in alongside.items() if not was_here}
        self._record(table, brought)
        self._record(table, keys - brought, was_here=True)


def outward(scope: Scope, table: Table) -> tuple[ForeignKey, ...]:
    """Return the foreign keys of `table` to rows that do not move with the organization."""
    by_name = scope.data_map.by_name
    return tuple(
        foreign_key
        for foreign_key in scope.data_map.foreign_keys
        if foreign_key.child == table.name
        and is_comparable(foreign_key)
        and foreign_key.parent in by_name
        and by_name[foreign_key.parent].placement is not Placement.OWNED
    )


def crossing(scope: Scope, table: Table) -> tuple[ForeignKey, ...]:
    """Return the foreign keys of `table` by which a row may refer to another organization's.

    Only those that the source enforces: a row without its parent is then the move's doing.
    """
    by_name = scope.data_map.by_name
    return tuple(
        foreign_key
        for foreign_key in scope.data_map.foreign_keys
        if foreign_key.child == table.name
        and foreign_key.declared
        and foreign_key.trusted
        and is_comparable(foreign_key)
        and foreign_key.parent in by_name
        and by_name[foreign_key.parent].placement is Placement.OWNED
        and not is_inside(scope.data_map, foreign_key, table, by_name[foreign_key.parent])
    )


@once_for_each_scope
def leading_out(scope: Scope, table: Table, *, with_crossing: bool) -> tuple[ForeignKey, ...]:
    """Return the foreign keys whose parents an application of keys must look for.

    Args:
        with_crossing: also those by which a row may come to refer to another organization's.
    """
    return (*outward(scope, table), *(crossing(scope, table) if with_crossing else ()))


def is_comparable(foreign_key: ForeignKey) -> bool:
    """Whether every row of the child must find its parent by equality."""
    return not (foreign_key.optional or foreign_key.partial or foreign_key.temporal)


def _batches(values: Sequence[Key], size: int) -> Iterator[list[Key]]:
    iterator = iter(values)
    while some := list(islice(iterator, size)):
        yield some
