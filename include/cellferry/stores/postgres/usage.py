"""Who uses shared rows in a cell, besides the organization that moves there.

Rows that refer to them by any foreign key of the data map count, whoever's they are: another
organization's, nobody's, or a global table's. Three kinds do not: those of organizations of which
this cell only has a copy (it is being made, or waits to be deleted: nobody works with it), those
of cell-local tables, which the mover may not even read, and shared rows that nobody uses in turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from typing import Any

import psycopg
from psycopg import sql

from cellferry.stores.postgres.ownership import owner_text
from cellferry.stores.postgres.row_keys import key_array
from cellferry.stores.postgres.schema import ForeignKey, Name, Placement, Table
from cellferry.stores.postgres.scope import (
    Key,
    Scope,
    keys_join,
    keys_match,
    keys_relation,
    text_array,
    texts_columns,
    texts_relation,
)

#: More rows of nobody than this that refer to some rows are not looked at one by one.
MOST_UNOWNED = 100_000


class Usage:
    """Looks at one cell, for one organization.

    Args:
        cell: where the shared rows are.
        elsewhere: where the organization's rows come from. A row that was copied before its parent
            is nobody's in `cell` for a while; there it can be told whose it is.
        migration: whose own imported rows do not count as another's; None before there is one.
        came_from: the cell where the organization's rows come from. What other migrations bring
            from there is the same for all of them.
        looks_at: which of the tables that refer to shared rows can be read; by default all.
    """

    def __init__(
        self,
        cell: psycopg.Connection[Any],
        elsewhere: psycopg.Connection[Any],
        scope: Scope,
        migration: int | None = None,
        *,
        came_from: str | None = None,
        looks_at: Callable[[Table], bool] = lambda _table: True,
    ) -> None:
        self._cell = cell
        self._elsewhere = elsewhere
        self._scope = scope
        self._migration = migration
        self._came_from = came_from
        self._looks_at = looks_at
        self._indexed: dict[tuple[Name, tuple[str, ...]], bool] = {}

    def by_others(self, table: Table, keys: Collection[Key]) -> set[Key]:
        """Return those of `keys` that somebody else uses, or a move from another cell brings.

        A shared row that refers to one of them counts if it is itself used by others.
        """
        if not keys:
            return set()
        idle = self._idle()
        brought = self.brought_by_others(table, keys)
        used: set[tuple[str, Key]] = {(str(table.name), key) for key in brought}
        refers_to: dict[tuple[str, Key], set[tuple[str, Key]]] = {}
        known: dict[str, set[Key]] = {str(table.name): set(keys)}
        waiting = deque([(table, set(keys) - brought)])
        while waiting:
            parent, some = waiting.popleft()
            name = str(parent.name)
            for child, foreign_key in self._children(parent):
                if child.placement is not Placement.REFERENCED:
                    # What is used by one table's rows need not be looked for in the next.
                    some = {key for key in some if (name, key) not in used}
                    used |= {
                        (name, key)
                        for key in self._used_directly(parent, some, child, foreign_key, idle)
                    }
                    continue
                fresh: set[Key] = set()
                for key, user in self._referring(parent, some, child, foreign_key):
                    refers_to.setdefault((str(child.name), user), set()).add((name, key))
                    fresh.add(user)
                fresh -= known.setdefault(str(child.name), set())
                known[str(child.name)] |= fresh
                if fresh:
                    waiting.append((child, fresh))
        through = list(used)
        while through:
            for more in refers_to.get(through.pop(), set()) - used:
                used.add(more)
                through.append(more)
        return {key for name, key in used if name == str(table.name)} & set(keys)

    def _children(self, parent: Table) -> list[tuple[Table, ForeignKey]]:
        """Return who may refer to `parent`: small tables first, they may save us the large ones."""
        by_name = self._scope.data_map.by_name
        found = [
            (by_name[foreign_key.child], foreign_key)
            for foreign_key in self._scope.data_map.foreign_keys
            if foreign_key.parent == parent.name
            and foreign_key.child in by_name
            and not foreign_key.temporal
        ]
        return sorted(
            (
                one
                for one in found
                if one[0].placement is not Placement.CELL_LOCAL and self._looks_at(one[0])
            ),
            key=lambda one: (one[0].placement is Placement.REFERENCED, one[0].estimated_rows),
        )

    def _is_prepared(self) -> bool:
        # Asked of the catalog: an error would end the caller's transaction.
        row = self._cell.execute(
            "SELECT count(*) FROM pg_catalog.pg_class AS c"
            " JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace"
            " WHERE n.nspname = 'cellferry' AND c.relname IN ('gate', 'imported_row')"
            " AND has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')"
            " AND (c.relname = 'gate' OR EXISTS (SELECT FROM pg_catalog.pg_attribute AS a"
            " WHERE a.attrelid = c.oid AND a.attname = 'came_from' AND NOT a.attisdropped))"
        ).fetchone()
        return row == (2,)

    def _idle(self) -> list[str]:
        """Return the organizations of which nobody uses the rows here, and ours."""
        if not self._is_prepared():
            return [self._scope.organization]
        return [
            self._scope.organization,
            *(
                organization
                for (organization,) in self._cell.execute(
                    "SELECT organization FROM cellferry.gate WHERE state IN ('importing', 'moved')"
                )
            ),
        ]

    def brought_by_others(self, table: Table, keys: Collection[Key]) -> set[Key]:
        """Return those of `keys` that a migration under way brings here from another cell.

        It follows their changes there; both would never agree.
        """
        if not self._is_prepared():
            return set()
        statement = sql.SQL(
            "SELECT DISTINCT i.key FROM {} WHERE {} AND {} AND i.came_from IS DISTINCT FROM {}"
        ).format(
            recorded(table, keys),
            self._by_another(table),
            _UNDER_WAY,
            sql.Literal(self._came_from),
        )
        return {tuple(key) for (key,) in self._cell.execute(statement, prepare=False)}

    def brought_alongside(self, table: Table, keys: Collection[Key]) -> dict[Key, bool]:
        """Return those of `keys` that other migrations under way bring from the same cell.

        Returns:
            By key whether the row was here before any of them.
        """
        if not keys:
            return {}
        statement = sql.SQL(
            "SELECT i.key, bool_or(i.was_here) FROM {} WHERE {} AND {} AND i.came_from = {}"
            " GROUP BY i.key"
        ).format(
            recorded(table, keys),
            self._by_another(table),
            _UNDER_WAY,
            sql.Literal(self._came_from),
        )
        found = self._cell.execute(statement, prepare=False)
        return {tuple(key): was_here for key, was_here in found}

    def by_arrived(self, table: Table, keys: Collection[Key]) -> set[Key]:
        """Return those of `keys` that others use, having come here with them by another migration.

        Costs one statement where there are none, however many rows refer to others: it is asked
        under the gate.
        """
        if not keys:
            return set()
        statement = sql.SQL(
            "SELECT DISTINCT i.key FROM {} WHERE {} AND EXISTS"
            " (SELECT FROM cellferry.lease AS l"
            " JOIN cellferry.gate AS g ON g.organization = l.organization"
            " WHERE l.migration = i.migration AND g.state IN ('open', 'frozen'))"
        ).format(recorded(table, keys), self._by_another(table))
        came = {tuple(key) for (key,) in self._cell.execute(statement, prepare=False)}
        return self.by_others(table, came)

    def _by_another(self, table: Table) -> sql.Composed:
        return sql.SQL("i.relation = {} AND i.migration IS DISTINCT FROM {}").format(
            sql.Literal(str(table.name)), sql.Literal(self._migration)
        )

    def _used_directly(
        self,
        parent: Table,
        keys: Collection[Key],
        child: Table,
        foreign_key: ForeignKey,
        idle: list[str],
    ) -> set[Key]:
        if not keys:
            return set()
        if child.placement is Placement.OWNED and not child.has_direct_owner:
            used = self._used_through_parents(parent, keys, child, foreign_key, idle)
            return used | self._used_by_nobodys(parent, set(keys) - used, child, foreign_key)
        counts: sql.Composable = sql.SQL("true")
        if child.placement is Placement.OWNED:
            counts = sql.SQL("({} = ANY({}::text[])) IS NOT TRUE").format(
                owner_text(child, "c"), text_array(idle)
            )
        users = sql.SQL("SELECT FROM {} AS c WHERE {} AND {}").format(
            child.name.identifier, tie(foreign_key), counts
        )
        statement = _having(parent, keys, users)
        return {tuple(key) for (key,) in self._cell.execute(statement, prepare=False)}

    def _used_through_parents(
        self,
        parent: Table,
        keys: Collection[Key],
        child: Table,
        foreign_key: ForeignKey,
        idle: list[str],
    ) -> set[Key]:
        """Return those of `keys` that rows use whose parents know that they are others'.

        Finding out whose a row is costs a look into other tables. PostgreSQL does that for every
        row of the child before it compares keys, unless OFFSET keeps the two apart: a second for
        each hundred thousand rows of the cell.
        """
        # not true of nobody's rows
        others = sql.SQL("f.owner <> ALL({}::text[])").format(text_array(idle))
        if self._finds(child, foreign_key):
            # by the index, and of each key only until one is another's
            users = sql.SQL(
                "SELECT FROM (SELECT {} AS owner FROM {} AS c WHERE {} OFFSET 0) AS f WHERE {}"
            ).format(owner_text(child, "c"), child.name.identifier, tie(foreign_key), others)
            statement = _having(parent, keys, users)
        else:
            # The child is read once for all keys. Those that a column's collation takes for equal
            # are different keys.
            statement = sql.SQL('SELECT DISTINCT f.key COLLATE "C" FROM ({}) AS f WHERE {}').format(
                _users(parent, keys, child, foreign_key), others
            )
        return {tuple(key) for (key,) in self._cell.execute(statement, prepare=False)}

    def _finds(self, child: Table, foreign_key: ForeignKey) -> bool:
        """Whether an index of `child` leads to the rows that refer to a given key."""
        asked = (child.name, foreign_key.columns)
        if asked not in self._indexed:
            row = self._cell.execute(
                "SELECT EXISTS (SELECT FROM pg_catalog.pg_index AS i"
                " JOIN pg_catalog.pg_attribute AS a"
                " ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]"
                " WHERE i.indrelid = pg_catalog.to_regclass(%s) AND i.indisvalid"
                " AND i.indpred IS NULL AND a.attname = ANY(%s))",
                (child.name.identifier.as_string(self._cell), list(foreign_key.columns)),
            ).fetchone()
            self._indexed[asked] = row == (True,)
        return self._indexed[asked]

    def _used_by_nobodys(
        self, parent: Table, keys: Collection[Key], child: Table, foreign_key: ForeignKey
    ) -> set[Key]:
        """Return those of `keys` that rows use of which it cannot be told here whose they are."""
        statement = sql.SQL("SELECT f.* FROM ({}) AS f WHERE f.owner IS NULL LIMIT {}").format(
            _users(parent, keys, child, foreign_key), sql.Literal(MOST_UNOWNED + 1)
        )
        unowned = self._pairs(statement) if keys else []
        if len(unowned) > MOST_UNOWNED:
            return set(keys)
        if not unowned:
            return set()
        statement = sql.SQL("SELECT {} FROM {} AS t {} WHERE {}").format(
            key_array(child, "t"),
            child.name.identifier,
            keys_join(child, {row for _, row in unowned}),
            self._scope.owned(child),
        )
        ours = {tuple(key) for (key,) in self._elsewhere.execute(statement, prepare=False)}
        return {key for key, row in unowned if row not in ours}

    def _referring(
        self, parent: Table, keys: Collection[Key], child: Table, foreign_key: ForeignKey
    ) -> list[tuple[Key, Key]]:
        if not keys:
            return []
        return self._pairs(_users(parent, keys, child, foreign_key))

    def _pairs(self, statement: sql.Composed) -> list[tuple[Key, Key]]:
        found = self._cell.execute(statement, prepare=False)
        return [(tuple(key), tuple(user)) for key, user, _owner in found]


def _asked(parent: Table, keys: Collection[Key]) -> sql.Composed:
    """Return what follows FROM: the rows `p` of some keys."""
    return sql.SQL("{} AS p JOIN {} ON {}").format(
        parent.name.identifier, keys_relation(parent, keys), keys_match(parent, "p")
    )


def _having(parent: Table, keys: Collection[Key], users: sql.Composed) -> sql.Composed:
    """Return the query for those of `keys` for whose row `p` the query `users` finds anything."""
    return sql.SQL("SELECT {} FROM {} WHERE EXISTS ({})").format(
        key_array(parent, "p"), _asked(parent, keys), users
    )


def _users(
    parent: Table, keys: Collection[Key], child: Table, foreign_key: ForeignKey
) -> sql.Composed:
    """Return the query for who refers to `keys`: `key`, `user_key` and `owner`, if they have one.

    Whose a row is is asked only of those that refer to one of `keys`.
    """
    return sql.SQL(
        "SELECT {} AS key, {} AS user_key, {} AS owner FROM {} JOIN {} AS c ON {} OFFSET 0"
    ).format(
        key_array(parent, "p"),
        key_array(child, "c"),
        owner_text(child, "c") if child.owners else sql.NULL,
        _asked(parent, keys),
        child.name.identifier,
        tie(foreign_key),
    )


def recorded(table: Table, keys: Collection[Key]) -> sql.Composed:
    """Return what follows FROM: the records `i` of some keys, whatever their relation."""
    width = len(table.primary_key)
    return sql.SQL("cellferry.imported_row AS i JOIN {} ON i.key = ARRAY[{}]").format(
        texts_relation(keys, width), texts_columns(width)
    )


#: The migration of a record `i` brings its organization here now.
_UNDER_WAY = sql.SQL(
    "EXISTS (SELECT FROM cellferry.gate AS g"
    " WHERE g.migration = i.migration AND g.state = 'importing')"
)


def tie(foreign_key: ForeignKey) -> sql.Composed:
    """Return the condition that the child `c` refers to the parent `p`."""
    return sql.SQL(" AND ").join(
        sql.SQL("{} = {}").format(sql.Identifier("c", ours), sql.Identifier("p", theirs))
        for ours, theirs in zip(foreign_key.columns, foreign_key.parent_columns, strict=True)
    )
