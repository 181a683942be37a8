"""SQL that says whose a row is. The gate, the copier and the verifier all speak through it."""

from __future__ import annotations

from collections.abc import Callable

from psycopg import sql

from cellferry.stores.postgres.schema import DataMap, Hop, Name, OwnerPath, Table


def owner_text(table: Table, row: str) -> sql.Composed:
    """Return a text expression: the organization of the row called `row`, NULL if unknown.

    Args:
        table: an owned table.
        row: a range variable or a trigger's record: `t`, `NEW`, `OLD`.
    """
    paths = [_path_owner(path, row) for path in table.owners]
    if len(paths) == 1:
        return sql.Composed([paths[0]])
    return sql.SQL("COALESCE({})").format(sql.SQL(", ").join(paths))


def owned_by(data_map: DataMap, table: Table, row: str, organization: str | None) -> sql.Composed:
    """Return a boolean expression: whether the row called `row` is `organization`'s.

    Written so that an index on the key column, or on the path's columns, serves it.
    """
    key = sql.SQL("{}::{}").format(
        sql.Literal(organization),
        sql.SQL(data_map.organization_type),
    )
    if len(table.owners) == 1:
        return sql.Composed([_path_condition(table.owners[0], row, key)])
    conditions: list[sql.Composable] = []
    for index, path in enumerate(table.owners):
        # The first path that gives an organization wins, so the ones before must give none.
        earlier = [
            sql.SQL("({}) IS NULL").format(_path_owner(before, row))
            for before in table.owners[:index]
        ]
        conditions.append(
            sql.SQL("({})").format(
                sql.SQL(" AND ").join([_path_condition(path, row, key), *earlier])
            )
        )
    return sql.SQL("({})").format(sql.SQL(" OR ").join(conditions))


def awaits_parent(
    table: Table, row: str, *, without: Callable[[Name, Hop], bool] | None = None
) -> sql.Composed:
    """Return a boolean expression: whether a path from the row called `row` breaks off.

    It does where a row names a parent that is not there. A row that names none, or whose path ends
    at a row without an organization, awaits nothing: it is nobody's, or the cell's own.

    Args:
        without: which hops, with the table that they lead up from, do not count.
    """
    breaks = [
        _breaks_off(path, number, row)
        for path in table.owners
        for number, hop in enumerate(path.hops)
        if without is None
        or not without(path.hops[number - 1].parent if number else table.name, hop)
    ]
    if not breaks:
        return sql.Composed([sql.SQL("false")])
    return sql.SQL("({})").format(sql.SQL(" OR ").join(breaks))


def _breaks_off(path: OwnerPath, number: int, row: str) -> sql.Composed:
    """Whether all of `path`'s hops before `number` lead to a row, which names a missing parent."""
    hop = path.hops[number]
    tables, conditions, last = _joins(path, row, number)
    parts: list[sql.Composable] = [
        *conditions,
        *(sql.SQL("{} IS NOT NULL").format(_column(last, column)) for column in hop.columns),
        sql.SQL("NOT EXISTS (SELECT 1 FROM {} AS cf_parent WHERE {})").format(
            hop.parent.identifier,
            sql.SQL(" AND ").join(
                sql.SQL("{} = {}").format(_column("cf_parent", theirs), _column(last, ours))
                for ours, theirs in zip(hop.columns, hop.parent_columns, strict=True)
            ),
        ),
    ]
    if tables:
        parts = [
            sql.SQL("EXISTS (SELECT 1 FROM {} WHERE {})").format(
                sql.SQL(", ").join(tables), sql.SQL(" AND ").join(parts)
            )
        ]
    if (when := _when(path, row)) is not None:
        parts.append(when)
    return sql.SQL("({})").format(sql.SQL(" AND ").join(parts))


def _record(row: str) -> sql.Composable:
    # NEW and OLD are plpgsql names and must not be quoted.
    return sql.SQL(row) if row in {"NEW", "OLD"} else sql.Identifier(row)


def _column(row: str, column: str) -> sql.Composed:
    return sql.SQL("{}.{}").format(_record(row), sql.Identifier(column))


def _when(path: OwnerPath, row: str) -> sql.Composable | None:
    if path.when is None:
        return None
    return _condition(path.when, row)


def _condition(when: str, row: str) -> sql.Composed:
    # The condition comes from the reviewed data map file; it is SQL by design.
    return sql.SQL("({})").format(sql.SQL(when.replace("{row}", _record(row).as_string(None))))


def _joins(
    path: OwnerPath, row: str, count: int | None = None
) -> tuple[list[sql.Composable], list[sql.Composable], str]:
    """Return the parents as a FROM list has them, what ties them to `row`, and the last alias.

    Args:
        count: over how many hops, from `row` on; all of them by default.
    """
    tables: list[sql.Composable] = []
    conditions: list[sql.Composable] = []
    previous = row
    for number, hop in enumerate(path.hops[:count]):
        alias = f"cf_{number}"
        tables.append(sql.SQL("{} AS {}").format(hop.parent.identifier, sql.Identifier(alias)))
        conditions.extend(
            sql.SQL("{} = {}").format(_column(alias, theirs), _column(previous, ours))
            for ours, theirs in zip(hop.columns, hop.parent_columns, strict=True)
        )
        if hop.when is not None:
            conditions.append(_condition(hop.when, alias))
        previous = alias
    return tables, conditions, previous


def _path_owner(path: OwnerPath, row: str) -> sql.Composed:
    when = _when(path, row)
    if not path.hops:
        value = sql.SQL("{}::text").format(_column(row, path.column))
        if when is None:
            return value
        return sql.SQL("CASE WHEN {} THEN {} END").format(when, value)
    tables, conditions, last = _joins(path, row)
    if when is not None:
        conditions.append(when)
    return sql.SQL("(SELECT {}::text FROM {} WHERE {} LIMIT 1)").format(
        _column(last, path.column), sql.SQL(", ").join(tables), sql.SQL(" AND ").join(conditions)
    )


def _path_condition(path: OwnerPath, row: str, key: sql.Composable) -> sql.Composed:
    when = _when(path, row)
    if not path.hops:
        condition: sql.Composed = sql.SQL("{} = {}").format(_column(row, path.column), key)
    else:
        tables, conditions, last = _joins(path, row)
        condition = sql.SQL("EXISTS (SELECT 1 FROM {} WHERE {} AND {} = {})").format(
            sql.SQL(", ").join(tables),
            sql.SQL(" AND ").join(conditions),
            _column(last, path.column),
            key,
        )
    return condition if when is None else sql.SQL("{} AND {}").format(when, condition)
