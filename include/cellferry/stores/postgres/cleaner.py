"""Deletes one side's copy of an organization in paced batches, and nothing else.

Each batch holds the gate's row and requires the state that says that this copy is dead: `moved` by
this migration at this epoch at the source, `importing` by it at the destination. When the
organization returns, the gate changes and a late clean-up stops at its next batch (hazard 4).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import sql

from cellferry.errors import Blocked, WrongState
from cellferry.model import Cleaned, GateState, Move, Progress, Side
from cellferry.phases import Phase, reach
from cellferry.stores.postgres.references import is_comparable
from cellferry.stores.postgres.row_keys import key_array
from cellferry.stores.postgres.schema import ForeignKey, Placement, Table
from cellferry.stores.postgres.scope import (
    Key,
    Scope,
    keys_join,
    keys_match,
    keys_relation,
    parse_key,
    texts_columns,
)
from cellferry.stores.postgres.transactions import write
from cellferry.stores.postgres.usage import recorded
from cellferry.stores.throttle import Throttle

BATCH = 20_000

#: A batch at the slowest pace.
LEAST = 500

#: Keys are read so many at a time, by one statement.
STRETCH = 200_000


SPACE_NOTE = (
    "the space is reused by new rows; VACUUM gives none back to the disk where other"
    " organizations' rows are in between"
)


class Cleaner:
    """Deletes the organization's rows on one side; see `run`.

    Args:
        connection: to the side's cell, in autocommit mode, with the replica role: no trigger of
            the application fires and nothing cascades to other organizations.
        side: which side of the move it is.
    """

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        scope: Scope,
        move: Move,
        side: Side,
        progress: Progress,
        throttle: Throttle | None = None,
    ) -> None:
        self._connection = connection
        self._scope = scope
        self._move = move
        self._side = side
        self._progress = progress
        self._throttle = throttle or Throttle(move.throttle.rows_per_s)
        self._deleted = 0

    def run(self) -> Cleaned:
        """Delete everything of the organization on this side; repeatable until the gate is gone.

        Raises:
            WrongState: the gate does not say that this copy is dead.
            Blocked: rows of others refer to rows that would go.
            LeaseLost: another attempt took over.
        """
        started = time.monotonic()
        with self._batch():
            self._refuse_if_referred_to()
        self._delete_entangled()
        for table in reversed(self._scope.tables):
            if table not in self._scope.entangled:
                self._delete_table(table)
        notes = self._delete_imported()
        if self._deleted:
            notes = (
                *notes,
                SPACE_NOTE,
            )
        return Cleaned(deleted=self._deleted, seconds=time.monotonic() - started, notes=notes)

    @contextmanager
    def _batch(self) -> Iterator[None]:
        with write(self._connection, self._move):
            self._hold_gate()
            yield

    def _hold_gate(self) -> None:
        """Hold the gate's row to the end of the transaction; it must say that this copy is dead."""
        if self._side is Side.SOURCE:
            state, epoch = GateState.MOVED, self._move.epoch + 1
        else:
            state, epoch = GateState.IMPORTING, self._move.epoch
        row = self._connection.execute(
            "SELECT state, migration, epoch FROM cellferry.gate WHERE organization = %s FOR SHARE",
            (self._move.organization.id,),
        ).fetchone()
        if row == (state.value, self._move.migration, epoch):
            return
        found = "no gate" if row is None else f"{row[0]} by migration {row[1]} at epoch {row[2]}"
        raise WrongState(
            f"this copy must not be deleted: its gate is not {state.value} by migration"
            f" {self._move.migration} at epoch {epoch} but {found}",
            hint="the organization came back or was taken over; nothing more was deleted",
            organization=self._move.organization.slug,
            step="cleanup",
            where=f"{self._move.cell(self._side).name}/postgres",
        )

    def _refuse_if_referred_to(self) -> None:
        """Refuse when a row that stays refers to a row that goes (hazard 3)."""
        for foreign_key in self._scope.data_map.foreign_keys:
            parent = self._scope.data_map.by_name.get(foreign_key.parent)
            child = self._scope.data_map.by_name.get(foreign_key.child)
            if parent is None or child is None or not is_comparable(foreign_key):
                continue
            if not self._scope.is_owned(parent):
                continue
            row = self._connection.execute(self._referring(child, parent, foreign_key)).fetchone()
            if row is not None:
                raise Blocked(
                    f"row {', '.join(row[0])} of {child.name} stays and refers to row"
                    f" {', '.join(row[1])} of {parent.name}, which would be deleted"
                    f" ({foreign_key.name})",
                    hint=f"delete or change these rows of {child.name}, or own the table in the"
                    " data map; then run the step again",
                    organization=self._move.organization.slug,
                    step="cleanup",
                    where=f"{self._move.cell(self._side).name}/postgres {child.name}",
                )

    def _referring(self, child: Table, parent: Table, foreign_key: ForeignKey) -> sql.Composed:
        stays: sql.Composable = sql.SQL("true")
        if child.placement is Placement.OWNED:
            stays = sql.SQL("NOT COALESCE({}, false)").format(self._scope.owned(child, "c"))
        child_key = key_array(child, "c") if child.primary_key else sql.SQL("ARRAY[c::text]")
        return sql.SQL(
            "SELECT {child_key}, {parent_key} FROM {parent} AS p JOIN {child} AS c ON {tie}"
            " WHERE {owned} AND {stays} LIMIT 1"
        ).format(
            child_key=child_key,
            parent_key=key_array(parent, "p"),
            parent=parent.name.identifier,
            child=child.name.identifier,
            tie=_tie(foreign_key),
            owned=self._scope.owned(parent, "p"),
            stays=stays,
        )

    def _delete_entangled(self) -> None:
        """Delete from all tables at once of which none can go first.

        Every part of the statement sees the tables as before.
        """
        tables = self._scope.entangled
        if not tables:
            return
        self._progress.check()
        numbers = range(len(tables))
        with self._batch():
            row = self._connection.execute(
                sql.SQL("WITH {} SELECT {}").format(
                    sql.SQL(", ").join(
                        sql.SQL("d{} AS (DELETE FROM {} AS t WHERE {} RETURNING 1)").format(
                            sql.SQL(str(number)),
                            tables[number].name.identifier,
                            self._scope.owned(tables[number]),
                        )
                        for number in numbers
                    ),
                    sql.SQL(" + ").join(
                        sql.SQL("(SELECT count(*) FROM d{})").format(sql.SQL(str(number)))
                        for number in numbers
                    ),
                )
            ).fetchone()
            deleted = int(row[0]) if row else 0
        reach(Phase.CLEANUP_BATCH)
        self._deleted += deleted
        self._progress.report(
            "postgres", "cleanup", self._deleted, None, "rows", str(tables[0].name)
        )
        self._throttle.take(deleted, self._progress.check)

    def _delete_table(self, table: Table) -> None:
        after: Key | None = None
        while keys := self._keys(table, after):
            after = keys[-1]
            start = 0
            while start < len(keys):
                self._progress.check()
                some = keys[start : start + self._throttle.pace.size(BATCH, LEAST)]
                start += len(some)
                with self._batch():
                    deleted = self._connection.execute(
                        sql.SQL("DELETE FROM {} AS t USING {} WHERE {} AND {}").format(
                            table.name.identifier,
                            keys_relation(table, some),
                            keys_match(table),
                            self._scope.owned(table),
                        )
                    ).rowcount
                reach(Phase.CLEANUP_BATCH)
                self._deleted += deleted
                self._progress.report(
                    "postgres", "cleanup", self._deleted, None, "rows", str(table.name)
                )
                self._throttle.take(deleted, self._progress.check)

    def _keys(self, table: Table, after: Key | None) -> list[Key]:
        """Return the next keys of the organization in the key's order."""
        behind: sql.Composable = sql.SQL("true")
        columns = sql.SQL(", ").join(sql.Identifier("t", name) for name in table.primary_key)
        if after is not None:
            behind = sql.SQL("({}) > ({})").format(
                columns,
                sql.SQL(", ").join(
                    sql.SQL("{}::{}").format(sql.Literal(text), sql.SQL(table.column(name).type))
                    for name, text in zip(table.primary_key, after, strict=True)
                ),
            )
        statement = sql.SQL(
            "SELECT ({})::text FROM {} AS t WHERE {} AND {} ORDER BY {} LIMIT {}"
        ).format(
            key_array(table, "t"),
            table.name.identifier,
            self._scope.owned(table),
            behind,
            columns,
            sql.Literal(STRETCH),
        )
        return [parse_key(text) for (text,) in self._connection.execute(statement)]

    # ── referenced rows that this migration brought ─────────────────────────────────────────────

    def _delete_imported(self) -> tuple[str, ...]:
        """Delete the referenced rows that this migration imported and nobody refers to.

        Those that other migrations brought as well are left to them.
        """
        left = {
            table: count
            for table in self._scope.data_map.referenced
            if (count := self._leave_to_others(table))
        }
        kept: dict[str, int] = {}
        changed = True
        while changed:
            # Referenced rows refer to each other: those that only kept ones need go next time.
            changed = False
            kept.clear()
            for table in self._scope.data_map.referenced:
                imported = self._imported(table)
                for start in range(0, len(imported), BATCH):
                    self._progress.check()
                    with self._batch():
                        some = imported[start : start + BATCH]
                        deleted = self._delete_unreferenced(table, some)
                    self._deleted += deleted
                    changed = changed or deleted > 0
                    if len(some) > deleted:
                        kept[str(table.name)] = kept.get(str(table.name), 0) + len(some) - deleted
        return (
            *(
                f"{count} rows of {table.name} that the move brought stay: others bring them, too"
                for table, count in left.items()
            ),
            *(
                f"{count} rows of {relation} that the move brought stay: others refer to them"
                for relation, count in kept.items()
            ),
        )

    def _leave_to_others(self, table: Table) -> int:
        """Leave the rows to other migrations that brought them as well; return how many.

        In small batches: these migrations may be waiting for the rows, with writers waiting for
        them.
        """
        count = 0
        common = sorted(self._brought_by_others(table, self._imported(table)))
        for start in range(0, len(common), LEAST):
            self._progress.check()
            with self._batch():
                count += len(self._leave_locked(table, common[start : start + LEAST]))
        return count

    def _leave_locked(self, table: Table, keys: Collection[Key]) -> set[Key]:
        """Lock rows, and forget those of them that other migrations brought as well.

        Who forgets last deletes them: of two that end at once, one sees that the other has gone.
        """
        if not keys:
            return set()
        self._connection.execute(
            sql.SQL("SELECT FROM {} AS t {} ORDER BY {} FOR UPDATE OF t").format(
                table.name.identifier,
                keys_join(table, keys),
                sql.SQL(", ").join(sql.Identifier("t", name) for name in table.primary_key),
            ),
            prepare=False,
        )
        left = self._brought_by_others(table, keys)
        self._forget(table, left)
        return left

    def _brought_by_others(self, table: Table, keys: Collection[Key]) -> set[Key]:
        statement = sql.SQL(
            "SELECT DISTINCT i.key FROM {} WHERE i.relation = {} AND i.migration <> {}"
        ).format(
            recorded(table, keys),
            sql.Literal(str(table.name)),
            sql.Literal(self._move.migration),
        )
        return {tuple(key) for (key,) in self._connection.execute(statement, prepare=False)}

    def _forget(self, table: Table, keys: Collection[Key]) -> None:
        self._connection.cursor().executemany(
            "DELETE FROM cellferry.imported_row"
            " WHERE migration = %s AND relation = %s AND key = %s",
            [(self._move.migration, str(table.name), list(key)) for key in keys],
        )

    def _imported(self, table: Table) -> list[Key]:
        return [
            tuple(key)
            for (key,) in self._connection.execute(
                "SELECT key FROM cellferry.imported_row"
                " WHERE migration = %s AND relation = %s AND NOT was_here ORDER BY key",
                (self._move.migration, str(table.name)),
            )
        ]

    def _delete_unreferenced(self, table: Table, keys: Collection[Key]) -> int:
        # First lock and delete, which waits for transactions that are about to refer to a row; then
        # look, in a new snapshot, who refers to what was deleted; such rows come back with the
        # savepoint. The other order would miss a reference that commits between.
        doomed = set(keys) - self._referred_to(table, keys)
        doomed -= self._leave_locked(table, doomed)
        while doomed:
            self._connection.execute("SAVEPOINT doomed")
            deleted = self._connection.execute(
                sql.SQL("DELETE FROM {} AS t USING {} WHERE {}").format(
                    table.name.identifier, keys_relation(table, doomed), keys_match(table)
                )
            ).rowcount
            referred = self._dangling_on(table, doomed)
            if not referred:
                self._connection.execute("RELEASE SAVEPOINT doomed")
                self._forget(table, doomed)
                return deleted
            self._connection.execute("ROLLBACK TO SAVEPOINT doomed")
            doomed -= referred
        return 0

    def _inbound(self, table: Table) -> Iterator[tuple[ForeignKey, Table, sql.Composable]]:
        """Yield what may refer to `table`, with a condition on the rows `c` that do.

        A row that belongs to a shared row (an e-mail address to its user) goes after it: the user
        holds it, and those that this migration brought do not hold the user.
        """
        foreign_keys = self._scope.data_map.foreign_keys
        belonging = {key.parent for key in foreign_keys if key.optional and key.child == table.name}
        for foreign_key in foreign_keys:
            child = self._scope.data_map.by_name.get(foreign_key.child)
            if foreign_key.parent != table.name or child is None:
                continue
            condition: sql.Composable = sql.SQL("true")
            if child.name in belonging:
                condition = sql.SQL(
                    "NOT EXISTS (SELECT 1 FROM cellferry.imported_row AS i"
                    " WHERE i.migration = {} AND i.relation = {} AND i.key = {} AND NOT i.was_here)"
                ).format(
                    sql.Literal(self._move.migration),
                    sql.Literal(str(child.name)),
                    key_array(child, "c"),
                )
            yield foreign_key, child, condition

    def _referred_to(self, table: Table, keys: Collection[Key]) -> set[Key]:
        referred: set[Key] = set()
        for foreign_key, child, condition in self._inbound(table):
            statement = sql.SQL(
                "SELECT {} FROM {} AS p JOIN {} ON {}"
                " WHERE EXISTS (SELECT 1 FROM {} AS c WHERE {} AND {})"
            ).format(
                key_array(table, "p"),
                table.name.identifier,
                keys_relation(table, keys),
                keys_match(table, "p"),
                child.name.identifier,
                _tie(foreign_key),
                condition,
            )
            referred |= {tuple(key) for (key,) in self._connection.execute(statement)}
        return referred

    def _dangling_on(self, table: Table, keys: Collection[Key]) -> set[Key]:
        """Return those of `keys`, deleted just now, that some row refers to by the primary key."""
        referred: set[Key] = set()
        for foreign_key, child, condition in self._inbound(table):
            if foreign_key.parent_columns != table.primary_key:
                continue
            matches = sql.SQL(" AND ").join(
                sql.SQL("c.{} = k.{}::{}").format(
                    sql.Identifier(column),
                    sql.Identifier(f"k{number}"),
                    sql.SQL(table.column(theirs).type),
                )
                for number, (column, theirs) in enumerate(
                    zip(foreign_key.columns, foreign_key.parent_columns, strict=True), start=1
                )
            )
            statement = sql.SQL(
                "SELECT {} FROM {} WHERE EXISTS (SELECT 1 FROM {} AS c WHERE {} AND {})"
            ).format(
                texts_columns(len(table.primary_key)),
                keys_relation(table, keys),
                child.name.identifier,
                matches,
                condition,
            )
            referred |= {tuple(row) for row in self._connection.execute(statement)}
        return referred


def _tie(foreign_key: ForeignKey) -> sql.Composed:
    return sql.SQL(" AND ").join(
        sql.SQL("{} = {}").format(sql.Identifier("c", ours), sql.Identifier("p", theirs))
        for ours, theirs in zip(foreign_key.columns, foreign_key.parent_columns, strict=True)
    )
