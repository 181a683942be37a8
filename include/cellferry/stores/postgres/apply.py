"""Make the destination's rows of some keys equal to the source's, in one transaction.

Deletes the keys, copies their current rows as of one snapshot of the source, compares both sides,
commits. What a key went through meanwhile (swapped unique values, a changed key, a rolled back
savepoint) does not matter: only its current row does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import psycopg
from psycopg import sql

from cellferry.errors import VerificationFailed
from cellferry.model import Move
from cellferry.stores.postgres import checkpoints, gate
from cellferry.stores.postgres.applied import Applied, Keys, dangling, deletes, digests
from cellferry.stores.postgres.checkpoints import Checkpoint
from cellferry.stores.postgres.children import (
    Ties,
    children_of,
    strays_of,
    tie,
    tie_columns,
    turn_of,
)
from cellferry.stores.postgres.conflicts import WAITING_ROOM, admit, clear_the_way, waiting_room
from cellferry.stores.postgres.delta import REFUSED, Delta, UnusualError
from cellferry.stores.postgres.ownership import awaits_parent, owner_text
from cellferry.stores.postgres.references import Held, Needs, ReferencedRows, leading_out
from cellferry.stores.postgres.row_keys import key_array, key_text
from cellferry.stores.postgres.schema import ForeignKey, Hop, Placement, Table
from cellferry.stores.postgres.scope import (
    ChildHop,
    Key,
    Scope,
    keys_join,
    keys_match,
    keys_relation,
    present_keys,
    row_hash,
)
from cellferry.stores.postgres.transactions import snapshot, write
from cellferry.stores.postgres.wire import Wire

#: Among the checkpoints: see `Applier._is_settled`.
SETTLED = "a complete round since the copy"


@dataclass
class _Family:
    """What was found below the rows that a round applies.

    Args:
        arrivals: rows that came, below which their children at the source were looked for, and
            these.
        strays: rows of nobody that the copy can have brought.
    """

    arrivals: list[tuple[Table, ChildHop, set[Key], set[Key]]] = field(default_factory=list)
    strays: dict[Table, set[Key]] = field(default_factory=dict)


class Applier:
    """Applies keys from the source to the destination.

    Args:
        source: a connection in autocommit mode. For `apply` and `delete_waiting` the caller has a
            `snapshot` open on it; the others open their own.
        destination: a connection in autocommit mode with the replica role.
    """

    def __init__(
        self,
        source: psycopg.Connection[Any],
        destination: psycopg.Connection[Any],
        scope: Scope,
        wires: Mapping[str, Wire],
        move: Move,
        *,
        refuses_crossings: bool = True,
    ) -> None:
        self._source = source
        self._destination = destination
        self._scope = scope
        self._move = move
        self._references = ReferencedRows(source, destination, scope, wires, move)
        self._refuses_crossings = refuses_crossings
        self._delta = Delta(
            source,
            destination,
            scope,
            move,
            self._references,
            lambda: self._is_settled,
            refuses_crossings=refuses_crossings,
        )

    @cached_property
    def _is_settled(self) -> bool:
        """Whether a complete round has been applied since the copy, or since a repair."""
        return not self._scope.has_loose_children or SETTLED in checkpoints.read(
            self._destination, self._move.migration
        )

    def unsettle(self) -> None:
        """Let rows count as new until the next complete round: others may have been lost."""
        with write(self._destination, self._move):
            checkpoints.remove(self._destination, self._move.migration, SETTLED)

    def settle(self) -> None:
        """Note that a complete round has been applied, unless that is known already."""
        if self._is_settled:
            return
        marks = checkpoints.read(self._destination, self._move.migration)
        copied = {name for name, mark in marks.items() if mark.done}
        if self._move.returning or copied >= {str(table.name) for table in self._scope.tables}:
            with write(self._destination, self._move):
                checkpoints.write(self._destination, self._move.migration, Checkpoint(SETTLED))
            self._is_settled = True

    def apply(
        self,
        keys: Keys,
        *,
        complete: bool,
        before_commit: Callable[[], None] | None = None,
    ) -> Applied:
        """Apply `keys` of owned tables and commit.

        Args:
            keys: dirty keys; those of other tables are left alone.
            complete: whether these are all keys that are dirty in the snapshot. If not, the keys
                that these depend on are applied too.
            before_commit: more work at the destination in the same transaction.

        Raises:
            VerificationFailed: both sides differ although the keys were applied.
            LeaseLost: another attempt took over.
            PermanentError: another organization's row stands in the way.
        """
        applied = self._delta.apply(keys, before_commit) if complete else None
        if applied is None:
            try:
                applied = self._attempt(
                    keys, complete=complete, careful=False, before_commit=before_commit
                )
            except (psycopg.errors.UniqueViolation, psycopg.errors.ExclusionViolation):
                applied = self._attempt(
                    keys, complete=complete, careful=True, before_commit=before_commit
                )
        if complete:
            self.settle()
        return applied

    def may_follow(self, keys: Keys) -> Mapping[Table, set[Key]]:
        """Return those of `keys` that are shared rows which this migration may have brought."""
        return self._references.may_follow(keys)

    def follow(self, candidates: Mapping[Table, set[Key]]) -> Applied:
        """Bring the shared rows up to date that this migration brought, and commit.

        Outside of any snapshot: the source is read when the rows are locked.

        Args:
            candidates: what `may_follow` returned.

        Raises:
            VerificationFailed, LeaseLost, PermanentError: as `apply`.
            TransientError: a row is locked.
        """
        # Carefully twice: another move may have brought one of the rows just now (`renew`).
        for careful in (False, True, True):
            try:
                return self._follow(candidates, careful=careful)
            except (psycopg.errors.UniqueViolation, psycopg.errors.ExclusionViolation) as error:
                refused = error
        raise refused

    def _follow(self, candidates: Mapping[Table, set[Key]], *, careful: bool) -> Applied:
        applied = Applied()
        with self._holding(candidates) as held:
            if held:
                with snapshot(self._source):
                    done = {
                        str(table.name): self._references.follow(table, one, careful=careful)
                        for table, one in held.items()
                    }
                    self._compare(done, applied)
                applied.keys = sum(len(some) for some in done.values())
        return applied

    def apply_and_follow(
        self,
        candidates: Mapping[Table, set[Key]],
        read_keys: Callable[[], Keys | None],
        before_commit: Callable[[], None] | None,
    ) -> Applied | None:
        """Do `follow` and `apply` for a few keys, in one transaction; or change nothing.

        Outside of any snapshot, as `follow`.

        Args:
            candidates: what `may_follow` returned.
            read_keys: reads all keys that are dirty in the snapshot that is open when it is called;
                None if these are too many.
            before_commit: as for `apply`.

        Returns:
            None where it takes the general way, which is `follow` and then `apply`.

        Raises:
            LeaseLost: another attempt took over.
            PermanentError: another row has a unique value of a shared row that is missing.
            TransientError: a shared row is locked.
        """
        if not self._delta.may_go_with(candidates):
            return None
        try:
            with self._holding(candidates) as held:
                with snapshot(self._source):
                    keys = read_keys()
                    if keys is None:
                        raise UnusualError
                    applied = self._delta.apply_with(held, keys)
                if before_commit is not None:
                    before_commit()
        except (*REFUSED, psycopg.errors.DeadlockDetected):
            # The shared rows were locked for longer than the general way locks them.
            return None
        return applied

    @contextmanager
    def _holding(self, candidates: Mapping[Table, set[Key]]) -> Iterator[Mapping[Table, Held]]:
        """Write while shared rows are locked: only then may the source be read."""
        with write(self._destination, self._move):
            if self._move.returning:
                gate.hold_retained(self._destination, self._move)
            yield self._references.hold(candidates)

    def take_over(self, keys: Keys) -> Applied:
        """Bring shared rows that the applied rows came to need, and that nobody else uses.

        Outside of any snapshot, as `follow`. Not under the gate, where there is no time for it, and
        not on the way back. An attempt that dies before it repeats the round: its log rows are not
        forgotten yet.
        """
        applied = Applied()
        for table in self._scope.tables:
            needs = self._references.needed_by(table, keys.get(str(table.name), set()))
            rows, size = self._references.bring(
                [(foreign_key, values) for foreign_key, values in needs if values],
                self._in_transaction,
            )
            applied.rows += rows
            applied.bytes += size
        return applied

    def bring_left(self) -> None:
        """Bring the shared rows that were left to another move, which may have ended since."""
        self._references.bring_left(self._in_transaction)

    def _in_transaction(self, work: Callable[[], None]) -> None:
        with write(self._destination, self._move):
            work()

    def delete_waiting(self, keys: Keys) -> None:
        """Delete rows of `keys`, and below them, whose parent the copy did not bring."""
        waiting = {
            table: set(keys[str(table.name)])
            for table in self._scope.tables
            if keys.get(str(table.name))
        }
        family = _Family()
        with write(self._destination, self._move):
            self._add_dependents(waiting, {}, family, complete=True)
            self._delete_orphans(waiting, family.strays)

    def _attempt(
        self,
        keys: Keys,
        *,
        complete: bool,
        careful: bool,
        before_commit: Callable[[], None] | None,
    ) -> Applied:
        with write(self._destination, self._move):
            applied = self._converge(keys, complete=complete, careful=careful)
            if before_commit is not None:
                before_commit()
        return applied

    def _converge(self, keys: Keys, *, complete: bool, careful: bool) -> Applied:
        applied = Applied()
        done: dict[str, set[Key]] = {}
        family = _Family()
        pending = {
            table: set(keys[str(table.name)])
            for table in self._scope.tables
            if keys.get(str(table.name))
        }
        while pending:
            self._add_dependents(pending, done, family, complete=complete)
            if not complete:
                self._add_missing_parents(pending, done)
                self._add_dependents(pending, done, family, complete=complete)
            self._delete_orphans(pending, family.strays)
            self._delete(pending)
            in_the_way: dict[Table, set[Key]] = {}
            for table in self._scope.tables:
                if table in pending:
                    cleared = self._insert(
                        table, pending[table], applied, in_the_way, careful=careful
                    )
                    in_the_way.setdefault(table, set()).update(cleared)
            for table, some in pending.items():
                done.setdefault(str(table.name), set()).update(some)
            pending = {
                table: fresh
                for table, some in in_the_way.items()
                if (fresh := some - done[str(table.name)])
            }
        if done:
            brought, size = self._bring_references(done, complete=complete)
            applied.rows += brought
            applied.bytes += size
            self._compare(done, applied)
        if complete and self._is_settled and self._refuses_crossings:
            # Before the first complete round a verification is still to come.
            self._insist_on_arrivals(family)
        applied.keys = sum(len(some) for some in done.values())
        return applied

    def _delete(self, pending: Mapping[Table, set[Key]]) -> None:
        """Delete all keys with one statement, each guarded by the organization."""
        self._destination.execute(deletes(self._scope, pending), prepare=False)

    def _delete_orphans(
        self, pending: Mapping[Table, set[Key]], strays: Mapping[Table, set[Key]]
    ) -> None:
        """Delete rows of `pending` of which the destination cannot tell whose they are.

        A child that was copied after its parent's turn waits for the parent; when both are gone
        at the source before that, the parent never comes and the guard of `_delete` would keep
        the child for ever. It goes unless the source says that it is another organization's, of
        which a move may be under way as well, or nobody's; such a one goes if it is of `strays`.
        A row that awaits no parent was not copied: it is nobody's, and stays.
        """
        asked = {table: keys for table, keys in pending.items() if not table.has_direct_owner}
        orphans = self._select_hashes(
            self._destination,
            asked,
            lambda table: sql.SQL("({}) IS NULL AND {}").format(
                owner_text(table, "t"), awaits_parent(table, "t")
            ),
        )
        others = self._select_hashes(
            self._source,
            {table: set(found) for table, found in orphans.items()},
            lambda table: sql.SQL("({}) IS NOT TRUE").format(self._scope.owned(table)),
        )
        for table, here in orphans.items():
            there = others.get(table, {})
            if mine := here.keys() - (there.keys() - strays.get(table, set())):
                self._destination.execute(
                    sql.SQL("DELETE FROM {} AS t USING {} WHERE {}").format(
                        table.name.identifier, keys_relation(table, mine), keys_match(table)
                    ),
                    prepare=False,
                )

    def _select_hashes(
        self,
        connection: psycopg.Connection[Any],
        asked: Mapping[Table, set[Key]],
        condition: Callable[[Table], sql.Composable],
    ) -> dict[Table, dict[Key, int]]:
        """Return the hashes of the rows that fulfil `condition`."""
        if not asked:
            return {}
        tables = list(asked)
        statement = sql.SQL(" UNION ALL ").join(
            sql.SQL("SELECT {}, {}, {} FROM {} AS t {} WHERE {}").format(
                sql.Literal(number),
                key_array(table, "t"),
                row_hash(table),
                table.name.identifier,
                keys_join(table, asked[table]),
                condition(table),
            )
            for number, table in enumerate(tables)
        )
        found: dict[Table, dict[Key, int]] = {}
        for number, key, value in connection.execute(statement, prepare=False):
            found.setdefault(tables[number], {})[tuple(key)] = int(value)
        return found

    def _insert(
        self,
        table: Table,
        keys: set[Key],
        applied: Applied,
        stranded: dict[Table, set[Key]],
        *,
        careful: bool,
    ) -> set[Key]:
        """Copy the current rows of `keys`; return the keys of rows that were in their way.

        Args:
            stranded: gets the children that those leave behind.
        """
        body = sql.SQL("FROM {} AS t {} WHERE {}").format(
            table.name.identifier, keys_join(table, keys), self._scope.owned(table)
        )
        cleared: set[Key] = set()
        if careful or any(unique.deferrable for unique in table.uniques):
            if not table.has_direct_owner:
                # Its parents have come meanwhile: now a row that the copy brought before them
                # can be told to be the organization's.
                self._delete({table: keys})
            with waiting_room(self._destination, table):
                rows, size = self._references.carry(table, body, WAITING_ROOM)
                cleared = clear_the_way(
                    self._destination, self._scope, table, partial(self._strand, stranded, table)
                )
                admit(self._destination, table)
        else:
            rows, size = self._references.carry(table, body)
        applied.rows += rows
        applied.bytes += size
        return cleared

    def _strand(self, stranded: dict[Table, set[Key]], table: Table, gone: set[Key]) -> None:
        # Asked while the rows are there: without them nothing tells whose their children are.
        for hop in self._scope.loose_children(table):
            below = self._children(self._destination, hop, table, gone)
            stranded.setdefault(hop.child, set()).update(below)

    def _add_dependents(
        self,
        pending: dict[Table, set[Key]],
        done: Mapping[str, set[Key]],
        family: _Family,
        *,
        complete: bool,
    ) -> None:
        """Add the destination's children of rows that are gone at the source, and the reverse.

        Usually the children's own changes are dirty keys as well. They are not when no constraint
        is declared, or when a bounded round sees the parent's key and not yet the children's; a
        child without its parent could not be told to be the organization's any more. So a child
        at the source whose parent comes only now may have no dirty key, either.
        """
        unseen = {table: set(some) for table, some in pending.items()}
        is_logged = True
        while unseen:
            found: dict[Table, set[Key]] = {}
            for child, below in self._below(unseen, family, complete=complete, is_logged=is_logged):
                known = pending.get(child, set()) | done.get(str(child.name), set())
                if keys := below - known:
                    found.setdefault(child, set()).update(keys)
            for table, some in found.items():
                pending.setdefault(table, set()).update(some)
            unseen, is_logged = found, False  # below these no change need be in the log

    def _below(
        self, rows: Mapping[Table, set[Key]], family: _Family, *, complete: bool, is_logged: bool
    ) -> Iterator[tuple[Table, set[Key]]]:
        """Yield the destination's children of rows that are gone, the source's of new ones.

        Args:
            family: gets the latter, below new rows, and what only the copy can have brought.
            is_logged: whether the rows' own changes are in the log, and so those of children that
                constraints tie to them.
        """
        asked = {
            table: some
            for table, some in rows.items()
            if self._hops(table, loose_only=complete and is_logged)
        }
        there = self._ties(self._source, asked)
        here = self._ties(self._destination, asked)
        for table, some in asked.items():
            for hop in self._hops(table, loose_only=complete and is_logged):
                turn = turn_of(
                    self._scope,
                    table,
                    hop,
                    some,
                    there.get(table, {}),
                    here.get(table, {}),
                    is_settled=self._is_settled,
                )
                if turn.went:
                    yield hop.child, self._children(self._destination, hop, table, turn.went)
                gone = some - there.get(table, {}).keys()
                if gone and not self._is_settled:
                    # They may have come and gone while they were not copied, and their children
                    # were.
                    strays = self._strays(hop, table, gone, family.strays.get(table, set()))
                    family.strays.setdefault(hop.child, set()).update(strays)
                    yield hop.child, strays
                if turn.came and (hop.is_loose or not is_logged):
                    below = self._children(self._source, hop, table, turn.came)
                    family.arrivals.append((table, hop, turn.came, below))
                    yield hop.child, below

    def _ties(
        self, connection: psycopg.Connection[Any], asked: Mapping[Table, set[Key]]
    ) -> Mapping[Table, Ties]:
        """Return which of the keys have a row of the organization, and its `tie_columns`."""
        if not asked:
            return {}
        tables = list(asked)
        statement = sql.SQL(" UNION ALL ").join(
            sql.SQL("SELECT {}, {}, ARRAY[{}]::text[] FROM {} AS t {} WHERE {}").format(
                sql.Literal(number),
                key_array(table, "t"),
                sql.SQL(", ").join(
                    key_text(table.column(name), "t") for name in tie_columns(self._scope, table)
                ),
                table.name.identifier,
                keys_join(table, asked[table]),
                self._scope.owned(table),
            )
            for number, table in enumerate(tables)
        )
        found: dict[Table, dict[Key, tuple[str | None, ...]]] = {}
        for number, key, values in connection.execute(statement, prepare=False):
            found.setdefault(tables[number], {})[tuple(key)] = tuple(values)
        return found

    def _insist_on_arrivals(self, family: _Family) -> None:
        """See that no row that was here came to be the organization's below a new one."""
        for table, hop, came, below in family.arrivals:
            if strange := self._children(self._destination, hop, table, came) - below:
                raise VerificationFailed(
                    f"row {', '.join(min(strange))} of {hop.child.name} at the destination did not"
                    f" come with organization {self._scope.organization}, but refers to a row of"
                    f" {table.name} that does",
                    hint="delete it or let it refer to another row; then run the step again",
                    organization=self._scope.organization,
                    where=str(hop.child.name),
                )

    def _hops(self, table: Table, *, loose_only: bool) -> tuple[ChildHop, ...]:
        if loose_only:
            return self._scope.loose_children(table)
        return self._scope.children.get(table.name, ())

    def _add_missing_parents(
        self, pending: dict[Table, set[Key]], done: Mapping[str, set[Key]]
    ) -> None:
        unseen = {table: set(some) for table, some in pending.items()}
        while unseen:
            found: dict[Table, set[Key]] = {}
            for child, some in unseen.items():
                for hop in {path.hops[0] for path in child.owners if path.hops}:
                    parent = self._scope.data_map.by_name.get(hop.parent)
                    if parent is None or parent.placement is not Placement.OWNED:
                        continue
                    missing = self._parents_missing(child, hop, parent, some)
                    missing -= pending.get(parent, set())
                    missing -= done.get(str(parent.name), set())
                    if missing:
                        found.setdefault(parent, set()).update(missing)
            for table, keys in found.items():
                pending.setdefault(table, set()).update(keys)
            unseen = found

    def _children(
        self, connection: psycopg.Connection[Any], hop: ChildHop, parent: Table, keys: set[Key]
    ) -> set[Key]:
        statement = children_of(self._scope, hop.child, hop.hop, parent, keys)
        return {tuple(key) for (key,) in connection.execute(statement, prepare=False)}

    def _strays(self, hop: ChildHop, parent: Table, keys: set[Key], astray: set[Key]) -> set[Key]:
        """Return rows of nobody at the destination, below `keys`, that the copy can have brought.

        Args:
            keys: rows that are not the organization's at the source.
            astray: those of `parent` that go because they are such rows themselves.
        """
        if not hop.is_loose or not set(hop.hop.parent_columns) <= set(parent.primary_key):
            return set()
        astray = astray & keys
        others = keys - astray
        others -= present_keys(self._source, parent, others)  # they stand, so they are nobody's
        found = self._below_missing(hop, parent, astray | others)
        # One that the destination has alone, or has otherwise, cannot be told from the cell's own.
        here, there = (
            self._select_hashes(
                connection,
                {hop.child: found} if found else {},
                lambda table: sql.SQL("({}) IS NULL").format(owner_text(table, "t")),
            ).get(hop.child, {})
            for connection in (self._destination, self._source)
        )
        strays = {key for key, value in here.items() if there.get(key) == value}
        if astray and self._scope.data_map.is_tied(hop.child.name, hop.hop):
            strays |= self._below_missing(hop, parent, astray)  # the constraint takes them along
        return strays

    def _below_missing(self, hop: ChildHop, parent: Table, keys: set[Key]) -> set[Key]:
        if not keys:
            return set()
        statement = strays_of(hop.child, hop.hop, parent, keys)
        return {tuple(key) for (key,) in self._destination.execute(statement, prepare=False)}

    def _parents_missing(self, child: Table, hop: Hop, parent: Table, keys: set[Key]) -> set[Key]:
        wanted = {
            tuple(key)
            for (key,) in self._source.execute(
                sql.SQL("SELECT DISTINCT {} FROM {} AS t {} JOIN {} AS p ON {} WHERE {}").format(
                    key_array(parent, "p"),
                    child.name.identifier,
                    keys_join(child, keys),
                    parent.name.identifier,
                    tie(hop),
                    self._scope.owned(child),
                ),
                prepare=False,
            )
        }
        return wanted - present_keys(self._destination, parent, wanted)

    def _bring_references(self, done: Mapping[str, set[Key]], *, complete: bool) -> tuple[int, int]:
        """Insert the referenced rows that the applied rows need and the destination lacks.

        A row may not come to refer to one of another organization (hazard 3); in a bounded
        round its parent may still be on its way.
        """
        checks: list[tuple[Table, ForeignKey]] = [
            (table, foreign_key)
            for table in self._scope.tables
            if done.get(str(table.name))
            for foreign_key in (
                leading_out(self._scope, table, with_crossing=complete and self._refuses_crossings)
            )
        ]
        if not checks:
            return 0, 0
        statement = sql.SQL(" UNION ALL ").join(
            dangling(number, table, foreign_key, keys_join(table, done[str(table.name)]))
            for number, (table, foreign_key) in enumerate(checks)
        )
        needs: Needs = []
        for number, values in _grouped(self._destination.execute(statement, prepare=False)):
            table, foreign_key = checks[number]
            parent = self._scope.data_map.by_name[foreign_key.parent]
            if parent.placement is Placement.REFERENCED:
                needs.append((foreign_key, values))
            elif parent.placement is Placement.OWNED:
                raise VerificationFailed(
                    f"{table.name} came to refer to {parent.name} row {', '.join(min(values))},"
                    f" which does not move ({foreign_key.name})",
                    hint="another organization owns that row; clear the reference, then run the"
                    " step again",
                    organization=self._scope.organization,
                    where=str(table.name),
                )
            elif foreign_key.declared and foreign_key.trusted:
                raise VerificationFailed(
                    f"{table.name} refers to {parent.name} row {', '.join(min(values))},"
                    f" which the destination lacks ({parent.placement})",
                    hint=f"make {parent.name} equal in both cells, or declare it as referenced in"
                    " the data map",
                    organization=self._scope.organization,
                    where=str(table.name),
                )
        return self._references.bring(needs)

    def _compare(self, done: Mapping[str, set[Key]], applied: Applied) -> None:
        keys = {self._scope.by_relation[name]: some for name, some in done.items() if some}
        if not keys:
            return
        statement = digests(self._scope, keys)
        here = {row[0]: row[1:] for row in self._source.execute(statement, prepare=False)}
        there = {row[0]: row[1:] for row in self._destination.execute(statement, prepare=False)}
        for relation, (count, total) in here.items():
            if there[relation] != (count, total):
                raise VerificationFailed(
                    f"{relation} differs after a round: {count} rows at the source,"
                    f" {there[relation][0]} at the destination of {len(done[relation])} keys",
                    hint="nothing was committed; run verify to see the rows",
                    organization=self._scope.organization,
                    where=relation,
                )
            applied.compared += len(done[relation])
            applied.hashes[relation] = {"count": str(count), "hash": str(total)}


def _grouped(rows: Any) -> list[tuple[int, set[Key]]]:
    groups: dict[int, set[Key]] = {}
    for number, values in rows:
        groups.setdefault(number, set()).add(tuple(values))
    return list(groups.items())
