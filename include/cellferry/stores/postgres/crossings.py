"""Foreign keys that would lead from one cell to another after the move (hazard 3).

The mover writes in the replica role, which checks no foreign key: what is not found here dangles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from psycopg import sql

from cellferry.model import Blocker
from cellferry.stores.postgres.examination import EXAMPLES, Examination, examples, warning
from cellferry.stores.postgres.row_keys import key_array, key_text
from cellferry.stores.postgres.schema import DataMap, ForeignKey, Placement, Table
from cellferry.stores.postgres.statistics import estimate_rows

#: Most parents of nobody that are looked up at the destination.
_MOST_PARENTS = 10_000

#: Rows of a table among which those of nobody are looked for.
_SAMPLED_ROWS = 200_000


def find_crossings(examination: Examination) -> Iterator[Blocker]:
    """Yield a blocker for each foreign key that rows of the organization would leave dangling."""
    data_map = examination.data_map
    for key in data_map.foreign_keys:
        if key.optional or key.temporal:
            continue
        if not (examination.is_usable(key.child) and examination.is_usable(key.parent)):
            continue
        child, parent = data_map.by_name[key.child], data_map.by_name[key.parent]
        ours = child.placement is Placement.OWNED
        theirs = parent.placement is Placement.OWNED
        if ours and not key.trusted:
            yield from _orphans(examination, key, child, parent)
        if ours and theirs and not is_inside(data_map, key, child, parent):
            yield from _outbound(examination, key, child, parent)
            yield from _inbound(examination, key, child, parent)
        elif ours and parent.placement is Placement.CELL_LOCAL:
            yield from _to_cell_local(examination, key, child)
        elif theirs and not ours:
            yield from _inbound(examination, key, child, parent)


def find_unowned(examination: Examination) -> Iterator[Blocker]:
    """Yield a warning for each owned table with rows that have no owner: they stay behind.

    Nothing but reading every row would find them all. Of a table that the planner takes for larger
    than `_SAMPLED_ROWS` a random sample of about so many is read, since a plan must not take longer
    the more the cell holds of others: few such rows may go unseen, and two plans may differ.
    """
    for table in examination.usable(Placement.OWNED):
        if is_certain(examination.data_map, table):
            continue
        with examination.source.reading() as cursor:
            total = estimate_rows(cursor.connection, table, sql.SQL("true"))
            share = min(1.0, _SAMPLED_ROWS / max(total, 1))
            rows = cursor.execute(
                sql.SQL("SELECT {} FROM {} AS t {} WHERE {} IS NULL LIMIT {}").format(
                    key_array(table, "t"),
                    table.name.identifier,
                    sql.SQL("TABLESAMPLE SYSTEM ({})").format(sql.Literal(100 * share))
                    if share < 1
                    else sql.SQL(""),
                    examination.owner(table),
                    sql.Literal(1001),
                )
            ).fetchall()
        if rows:
            count = "more than 1,000" if len(rows) > 1000 else f"{len(rows)}"
            if share < 1:
                count += f" of a sample of about {_SAMPLED_ROWS:,}"
            yield warning(
                "unowned-rows",
                examination.source.where(table.name),
                f"{count} rows belong to no organization and do not move, for example"
                f" {examples([tuple(key) for (key,) in rows])}",
                f"give tables.{table.name}.owners in the data map a further path if they should",
            )


def is_certain(data_map: DataMap, table: Table) -> bool:
    """Whether every row of `table` has an owner: NOT NULL columns and enforced keys all the way."""
    if len(table.owners) != 1 or table.owners[0].when is not None:
        return False
    path = table.owners[0]
    at = table
    for hop in path.hops:
        if hop.when is not None or not all(at.column(name).not_null for name in hop.columns):
            return False
        if not any(
            key.trusted
            and key.child == at.name
            and key.columns == hop.columns
            and key.parent == hop.parent
            for key in data_map.foreign_keys
        ):
            return False
        at = data_map.by_name[hop.parent]
    return at.column(path.column).not_null


def is_inside(data_map: DataMap, key: ForeignKey, child: Table, parent: Table) -> bool:
    """Whether the constraint itself keeps both rows in one organization."""
    if len(child.owners) != 1 or child.owners[0].when is not None:
        return False
    path = child.owners[0]
    if path.hops:
        hop = path.hops[0]
        return (hop.columns, hop.parent, hop.parent_columns) == (
            key.columns,
            key.parent,
            key.parent_columns,
        )
    if parent.name == data_map.organization_table and child.name != parent.name:
        return (key.columns, key.parent_columns) == (
            (path.column,),
            (data_map.organization_column,),
        )
    return (
        parent.has_direct_owner
        and key.declared
        and key.trusted
        and (path.column, parent.owners[0].column)
        in zip(key.columns, key.parent_columns, strict=True)
        and all(child.column(name).not_null for name in key.columns)
    )


def _join(key: ForeignKey) -> sql.Composed:
    return sql.SQL(" AND ").join(
        sql.SQL("{} = {}").format(sql.Identifier("p", theirs), sql.Identifier("c", ours))
        for ours, theirs in zip(key.columns, key.parent_columns, strict=True)
    )


def _row(table: Table, alias: str) -> sql.Composable:
    return key_array(table, alias) if table.primary_key else sql.SQL("ARRAY['?']")


def _name(key: ForeignKey) -> str:
    return f"{key.name} ({', '.join(key.columns)} to {key.parent})"


def _outbound(
    examination: Examination, key: ForeignKey, child: Table, parent: Table
) -> Iterator[Blocker]:
    """Rows of ours that refer to rows of others, or to rows of nobody that stay."""
    query = sql.SQL(
        "SELECT {child_key}, {owner} FROM {child} AS c JOIN {parent} AS p ON {join}"
        " WHERE {ours} AND {owner} {test} LIMIT {limit}"
    )

    def rows(test: sql.Composable, limit: int) -> list[tuple[Any, ...]]:
        with examination.source.reading() as cursor:
            return cursor.execute(
                query.format(
                    child_key=_row(child, "c"),
                    owner=examination.owner(parent, "p"),
                    child=child.name.identifier,
                    parent=parent.name.identifier,
                    join=_join(key),
                    ours=examination.owned(child, "c"),
                    test=test,
                    limit=sql.Literal(limit),
                )
            ).fetchall()

    # NULL is not different here: rows of nobody are looked at below
    found = rows(sql.SQL("<> {}").format(sql.Literal(examination.organization)), EXAMPLES + 1)
    if found:
        owners = sorted({owner for _, owner in found})
        yield Blocker(
            "crosses-organizations",
            examination.source.where(child.name),
            f"{_name(key)}: rows of organization {examination.organization} refer to rows of"
            f" {', '.join(owners)}, for example {examples([tuple(row) for row, _ in found])}",
            "clear these references, or move the organizations that share data as one",
        )
    if not is_certain(examination.data_map, parent):
        yield from _to_nobody(examination, key, child, parent)


def _to_nobody(
    examination: Examination, key: ForeignKey, child: Table, parent: Table
) -> Iterator[Blocker]:
    columns = [parent.column(name) for name in key.parent_columns]
    with examination.source.reading() as cursor:
        found = cursor.execute(
            sql.SQL(
                "SELECT DISTINCT {} FROM {} AS c JOIN {} AS p ON {}"
                " WHERE {} AND {} IS NULL LIMIT {}"
            ).format(
                sql.SQL(", ").join(key_text(column, "p") for column in columns),
                child.name.identifier,
                parent.name.identifier,
                _join(key),
                examination.owned(child, "c"),
                examination.owner(parent, "p"),
                sql.Literal(_MOST_PARENTS),
            )
        ).fetchall()
    if not found:
        return
    with examination.destination.reading() as cursor:
        names = [sql.Identifier(f"cellferry_{number}") for number in range(len(columns))]
        values = sql.SQL(", ").join(
            sql.SQL("({})").format(sql.SQL(", ").join(sql.Literal(value) for value in row))
            for row in found
        )
        missing = cursor.execute(
            sql.SQL(
                "SELECT k.* FROM (VALUES {}) AS k ({}) WHERE NOT EXISTS"
                " (SELECT 1 FROM {} AS p WHERE {})"
            ).format(
                values,
                sql.SQL(", ").join(names),
                parent.name.identifier,
                sql.SQL(" AND ").join(
                    sql.SQL("{} = k.{}::{}").format(
                        sql.Identifier("p", column.name), name, sql.SQL(column.type)
                    )
                    for column, name in zip(columns, names, strict=True)
                ),
            )
        ).fetchall()
    if missing:
        yield Blocker(
            "missing-parent",
            examination.destination.where(parent.name),
            f"rows of organization {examination.organization} refer to rows of nobody through"
            f" {_name(key)} that {examination.destination.cell.name} lacks, for example"
            f" {examples(missing)}",
            f"give these rows an owner (tables.{parent.name}.owners in the data map), or make them"
            " in the destination too",
        )


def _inbound(
    examination: Examination, key: ForeignKey, child: Table, parent: Table
) -> Iterator[Blocker]:
    """Rows that stay and refer to rows of ours: they dangle after clean-up."""
    conditions: list[sql.Composable] = [examination.owned(parent, "p")]
    stays = child.placement is not Placement.OWNED
    if not stays:
        conditions.append(
            sql.SQL("{} IS DISTINCT FROM {}").format(
                examination.owner(child, "c"), sql.Literal(examination.organization)
            )
        )
    with examination.source.reading() as cursor:
        found = cursor.execute(
            sql.SQL("SELECT {} FROM {} AS p JOIN {} AS c ON {} WHERE {} LIMIT {}").format(
                _row(child, "c"),
                parent.name.identifier,
                child.name.identifier,
                _join(key),
                sql.SQL(" AND ").join(conditions),
                sql.Literal(EXAMPLES + 1),
            )
        ).fetchall()
    if not found:
        return
    whose = f"{child.placement.value} rows, which stay," if stays else "rows of other organizations"
    where = examination.source.where(child.name)
    reason = (
        f"{_name(key)}: {whose} refer to rows of organization {examination.organization}, for"
        f" example {examples([tuple(row) for (row,) in found])}"
    )
    if child.placement is Placement.CELL_LOCAL or not key.declared:
        yield warning(
            "inbound-reference",
            where,
            reason,
            "clean-up refuses while they are there: delete or change them before it",
        )
    else:
        yield Blocker(
            "inbound-reference",
            where,
            reason,
            "clear these references before the move: after clean-up they would violate the"
            " constraint silently",
        )


def _to_cell_local(examination: Examination, key: ForeignKey, child: Table) -> Iterator[Blocker]:
    present = sql.SQL(" AND ").join(
        sql.SQL("{} IS NOT NULL").format(sql.Identifier("c", column)) for column in key.columns
    )
    with examination.source.reading() as cursor:
        found = cursor.execute(
            sql.SQL("SELECT {} FROM {} AS c WHERE {} AND {} LIMIT {}").format(
                _row(child, "c"),
                child.name.identifier,
                examination.owned(child, "c"),
                present,
                sql.Literal(EXAMPLES + 1),
            )
        ).fetchall()
    if found:
        yield Blocker(
            "cell-local-reference",
            examination.source.where(child.name),
            f"{_name(key)}: rows of organization {examination.organization} refer to cell-local"
            f" rows, which do not move, for example {examples([tuple(row) for (row,) in found])}",
            f"place {key.parent} as global or referenced in the data map, or clear the column",
        )


def _orphans(
    examination: Examination, key: ForeignKey, child: Table, parent: Table
) -> Iterator[Blocker]:
    present = sql.SQL(" AND ").join(
        sql.SQL("{} IS NOT NULL").format(sql.Identifier("c", column)) for column in key.columns
    )
    with examination.source.reading() as cursor:
        found = cursor.execute(
            sql.SQL(
                "SELECT {} FROM {} AS c WHERE {} AND {} AND NOT EXISTS"
                " (SELECT 1 FROM {} AS p WHERE {}) LIMIT {}"
            ).format(
                _row(child, "c"),
                child.name.identifier,
                examination.owned(child, "c"),
                present,
                parent.name.identifier,
                _join(key),
                sql.Literal(EXAMPLES + 1),
            )
        ).fetchall()
    if found:
        yield warning(
            "orphan-rows",
            examination.source.where(child.name),
            f"{_name(key)}: rows refer to rows that do not exist, for example"
            f" {examples([tuple(row) for (row,) in found])}",
            "they move as they are; repair them at the source if they should not exist",
        )
