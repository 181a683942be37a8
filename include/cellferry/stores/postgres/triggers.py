"""The trigger function of each table: looks for the organization's gate, and passes it.

Each is generated for its table, so that it holds no dynamic SQL and its plans stay cached. What
runs for an organization that does not move is one expression: whether it has a mark (see
`gate.sql`), which needs no query. Where there is one, `cellferry.gate` is looked into by its
primary key; everything else is in `gate.sql`. The decision and its measurements are in
`docs/decisions/0001`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import LiteralString

from psycopg import sql

from cellferry.stores.postgres.ownership import awaits_parent, owner_text
from cellferry.stores.postgres.row_keys import key_array
from cellferry.stores.postgres.schema import (
    Column,
    DataMap,
    Name,
    Placement,
    Table,
    once_for_each_definition,
)

GATE_TRIGGER = "zz_cellferry_gate"
"""On owned tables. Named to fire last: other triggers may still change the row's key."""

CAPTURE_TRIGGER = "zz_cellferry_capture"
"""On referenced tables: records keys and refuses nothing."""

TRUNCATE_TRIGGER = "zz_cellferry_truncate"

_PLAIN_TYPES = frozenset({"smallint", "integer", "bigint", "uuid"})
"""Types of organizations' keys whose text never needs quotes in a name."""


@dataclass(frozen=True)
class Installation:
    """What one table gets: a trigger function and its triggers.

    Attributes:
        table: the table, the root if it is partitioned.
        trigger: name of its row trigger.
        function: name of the trigger function in schema `cellferry`.
        function_sql: creates or replaces the function.
        timing: `BEFORE`; `AFTER` where the key or the owner is a generated column, which a
            trigger that fires before does not see.
    """

    table: Name
    trigger: str
    function: str
    function_sql: str
    timing: str

    @cached_property
    def definition(self) -> str:
        """Changes when anything changes that this table got."""
        text = f"{self.function_sql}\n{self.trigger}\n{self.timing}"
        return hashlib.sha256(text.encode()).hexdigest()

    def create_row_trigger(self) -> sql.Composed:
        """Return the statement that makes the row trigger; partitions get it by themselves."""
        return sql.SQL(
            "CREATE TRIGGER {} {} INSERT OR UPDATE OR DELETE ON {} FOR EACH ROW"
            " EXECUTE FUNCTION {}()"
        ).format(
            sql.Identifier(self.trigger),
            sql.SQL(self.timing),
            self.table.identifier,
            sql.Identifier("cellferry", self.function),
        )


def create_truncate_trigger(table: Name) -> sql.Composed:
    """Return the statement that guards `table` against TRUNCATE; each partition needs its own."""
    return sql.SQL(
        "CREATE TRIGGER {} BEFORE TRUNCATE ON {} FOR EACH STATEMENT"
        " EXECUTE FUNCTION cellferry.refuse_truncate()"
    ).format(sql.Identifier(TRUNCATE_TRIGGER), table.identifier)


def drop_trigger(trigger: str, table: Name) -> sql.Composed:
    """Return the statement that drops `trigger` from `table`, if it is there."""
    return sql.SQL("DROP TRIGGER IF EXISTS {} ON {}").format(
        sql.Identifier(trigger), table.identifier
    )


@once_for_each_definition
def installations(data_map: DataMap) -> tuple[Installation, ...]:
    """Return what every owned and referenced table of `data_map` gets."""
    parents = {hop.parent for table in data_map.owned for path in table.owners for hop in path.hops}
    return tuple(
        _gate(data_map, table, is_parent=table.name in parents)
        if table.placement is Placement.OWNED
        else _capture(table)
        for table in (*data_map.owned, *data_map.referenced)
        if table.primary_key
    )


def function_name(kind: str, table: Name) -> str:
    """Return the trigger function's name: a hash, because names may be long and alike."""
    return f"{kind}_{hashlib.sha256(str(table).encode()).hexdigest()[:20]}"


def _gate(data_map: DataMap, table: Table, *, is_parent: bool) -> Installation:
    if table.has_direct_owner:
        look = _DIRECT_LOOK.format(**_words(table), **_hints(table))
        body = sql.Composed([look, _pass_gate(table, is_parent)])
        options: sql.Composable = sql.SQL("")
    else:
        body = sql.Composed([_path_look(data_map, table), _pass_gate(table, is_parent)])
        options = _search_path(data_map, table)
    text = sql.SQL(
        "DECLARE\n    owner_old text;\n    owner_new text;\n"
        "    is_loose boolean := false;\n"
        "    key_old text[];\n    key_new text[];\nBEGIN\n{}END"
    ).format(body)
    return _installation("gate", GATE_TRIGGER, table, text, options)


def _capture(table: Table) -> Installation:
    text = sql.SQL("DECLARE\n    key_old text[];\n    key_new text[];\nBEGIN\n{}{}END").format(
        _log_for_all(table, sql.SQL("true")), _RETURN
    )
    return _installation("capture", CAPTURE_TRIGGER, table, text, sql.SQL(""))


def _installation(
    kind: str, trigger: str, table: Table, body: sql.Composed, options: sql.Composable
) -> Installation:
    name = function_name(kind, table.name)
    function = sql.SQL(
        "CREATE OR REPLACE FUNCTION {} RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER{}\n"
        "AS {};\nREVOKE ALL ON FUNCTION {} FROM PUBLIC;\nCOMMENT ON FUNCTION {} IS {}"
    )
    call = sql.SQL("{}()").format(sql.Identifier("cellferry", name))
    return Installation(
        table=table.name,
        trigger=trigger,
        function=name,
        function_sql=function.format(
            call, options, sql.Literal(body.as_string(None)), call, call,
            sql.Literal(f"{kind} of {table.name}"),
        ).as_string(None),
        timing="AFTER" if _is_settled_late(table) else "BEFORE",
    )  # fmt: skip


def _is_settled_late(table: Table) -> bool:
    """Whether the key or the owner depends on a generated column."""
    generated = [column.name for column in table.columns if column.generated]
    used = set(table.primary_key)
    for path in table.owners:
        used |= set(path.hops[0].columns) if path.hops else {path.column}
        if path.when is not None:
            used |= {name for name in generated if name in path.when}
    return not used.isdisjoint(generated)


#: Where no gate is found: nothing of all this concerns the row.
_RETURN = sql.SQL(
    """
    IF TG_OP = 'DELETE' THEN
        RETURN OLD;
    END IF;
    RETURN NEW;
"""
)

# The row carries its organization. Nearly every call ends at the first RETURN; it is one
# expression, because each is made ready anew in every transaction. Operators are qualified instead
# of setting a search path: a SET clause costs more than the look.
_DIRECT_LOOK = sql.SQL(
    """
    IF ({same} OR TG_OP OPERATOR(pg_catalog.=) 'INSERT') AND {unmarked} THEN
        RETURN NEW;
    END IF;
    IF TG_OP = 'INSERT' THEN
        PERFORM FROM cellferry.gate
            WHERE organization OPERATOR(pg_catalog.=) {owner_new};
        IF NOT FOUND THEN
            RETURN NEW;
        END IF;
        owner_new := {owner_new};
        owner_old := owner_new;
    ELSIF TG_OP = 'DELETE' THEN
        IF {unmarked_old} THEN
            RETURN OLD;
        END IF;
        PERFORM FROM cellferry.gate
            WHERE organization OPERATOR(pg_catalog.=) {owner_old};
        IF NOT FOUND THEN
            RETURN OLD;
        END IF;
        owner_old := {owner_old};
        owner_new := owner_old;
    ELSIF {owner_new} OPERATOR(pg_catalog.=) {owner_old} THEN
        PERFORM FROM cellferry.gate
            WHERE organization OPERATOR(pg_catalog.=) {owner_new};
        IF NOT FOUND THEN
            RETURN NEW;
        END IF;
        owner_old := {owner_old};
        owner_new := owner_old;
    ELSE
        owner_old := {owner_old};
        owner_new := {owner_new};
        PERFORM FROM cellferry.gate
            WHERE organization OPERATOR(pg_catalog.=) owner_old
                OR organization OPERATOR(pg_catalog.=) owner_new;
        IF NOT FOUND THEN
            RETURN NEW;
        END IF;
    END IF;
"""
)

_UNKNOWN = sql.SQL("owner_old IS NULL AND owner_new IS NULL")


def _words(table: Table) -> dict[str, sql.Composable]:
    return {"owner_old": owner_text(table, "OLD"), "owner_new": owner_text(table, "NEW")}


def _hints(table: Table) -> dict[str, sql.Composable]:
    """Conditions over OLD and NEW of a table whose rows carry their organization."""
    column = table.owners[0].column
    plain = table.column(column).type in _PLAIN_TYPES
    # A column's own operator saves two conversions to text.
    same: LiteralString = (
        "NEW.{0} OPERATOR(pg_catalog.=) OLD.{0}"
        if plain
        else "NEW.{0}::text OPERATOR(pg_catalog.=) OLD.{0}::text"
    )
    return {
        "same": sql.SQL(same).format(sql.Identifier(column)),
        "unmarked": _unmarked(owner_text(table, "NEW"), plain=plain),
        "unmarked_old": _unmarked(owner_text(table, "OLD"), plain=plain),
    }


def _unmarked(owner: sql.Composable, *, plain: bool = False) -> sql.Composed:
    """A condition: this organization has no gate for certain. Not true where that is unknown.

    Args:
        owner: text expression, the organization.
        plain: its text is short, and part of a name without quotes.
    """
    if plain:
        return sql.SQL(
            "pg_catalog.to_regclass('cellferry.@' OPERATOR(pg_catalog.||) {}) IS NULL"
        ).format(owner)
    return sql.SQL(
        "pg_catalog.octet_length({0}) OPERATOR(pg_catalog.<=) 60"
        " AND pg_catalog.to_regclass('cellferry.\"@'"
        " OPERATOR(pg_catalog.||) pg_catalog.replace({0}, '\"', '\"\"')"
        " OPERATOR(pg_catalog.||) '\"') IS NULL"
    ).format(owner)


def _path_look(data_map: DataMap, table: Table) -> sql.Composed:
    """The row's parents know its organization; they are asked only if there is any gate."""
    owners = _owners(table)
    return sql.SQL(
        """
    IF NOT EXISTS (SELECT FROM cellferry.gate) THEN{leave}    END IF;
{owners}{loosely}{unknown}
    IF owner_old OPERATOR(pg_catalog.=) owner_new THEN
        IF {unmarked} THEN{leave}        END IF;
        PERFORM FROM cellferry.gate
            WHERE organization OPERATOR(pg_catalog.=) owner_new;
    ELSE
        PERFORM FROM cellferry.gate
            WHERE organization OPERATOR(pg_catalog.=) owner_old
                OR organization OPERATOR(pg_catalog.=) owner_new;
    END IF;
    IF NOT FOUND THEN{leave}    END IF;
"""
    ).format(
        leave=_RETURN,
        owners=owners,
        loosely=_pass_loosely(data_map, table, owners),
        unmarked=_unmarked(sql.SQL("owner_new")),
        unknown=_log_for_all(table, _UNKNOWN),
    )


def _owners(table: Table) -> sql.Composed:
    return sql.SQL(
        """
    IF TG_OP <> 'DELETE' THEN
        owner_new := {owner_new};
    END IF;
    IF TG_OP = 'INSERT' THEN
        owner_old := owner_new;
    ELSIF TG_OP = 'DELETE' THEN
        owner_old := {owner_old};
        owner_new := owner_old;
    ELSIF {same} THEN
        owner_old := owner_new;
    ELSE
        owner_old := {owner_old};
    END IF;
"""
    ).format(same=_same_path(table), **_words(table))


def _same_path(table: Table) -> sql.Composable:
    """A condition over OLD and NEW: both lead to the same organization without asking."""
    if any(path.when is not None for path in table.owners):
        return sql.SQL("false")
    columns = sorted(
        {
            name
            for path in table.owners
            for name in (path.hops[0].columns if path.hops else (path.column,))
        }
    )
    return sql.SQL(" AND ").join(
        sql.SQL("NEW.{0}::text IS NOT DISTINCT FROM OLD.{0}::text").format(sql.Identifier(name))
        for name in columns
    )


def _keys(table: Table) -> sql.Composed:
    return sql.SQL(
        """
    IF TG_OP <> 'INSERT' THEN
        key_old := {};
    END IF;
    IF TG_OP <> 'DELETE' THEN
        key_new := {};
    END IF;
"""
    ).format(key_array(table, "OLD"), key_array(table, "NEW"))


def _log_for_all(table: Table, condition: sql.Composable) -> sql.Composed:
    return sql.SQL(
        """
    IF {condition} THEN
        IF EXISTS (SELECT FROM cellferry.gate WHERE armed) THEN{log}
        END IF;{leave}    END IF;
"""
    ).format(condition=condition, log=_log_keys_for_all(table), leave=_RETURN)


def _log_keys_for_all(table: Table) -> sql.Composed:
    return sql.SQL(
        """{keys}
            PERFORM cellferry.log_for_all({relation}, key_old, key_new);"""
    ).format(keys=_keys(table), relation=sql.Literal(str(table.name)))


def _pass_loosely(data_map: DataMap, table: Table, owners: sql.Composable) -> sql.Composed:
    """A row whose parent is not seen here becomes the organization's that this parent commits for.

    Whose freeze must wait for this transaction. Who had to wait for a freeze looks once more. What
    belongs to nobody before and after is logged for all behind this.
    """
    return sql.SQL(
        """
    IF (owner_old IS NULL OR owner_new IS NULL)
        AND EXISTS (SELECT FROM cellferry.gate WHERE armed)
    THEN
        IF TG_OP <> 'DELETE' AND owner_new IS NULL THEN
            is_loose := COALESCE({new}, false);
        END IF;
        IF TG_OP <> 'INSERT' AND owner_old IS NULL AND NOT is_loose THEN
            is_loose := COALESCE({old}, false);
        END IF;
        IF is_loose THEN
            PERFORM cellferry.enter_loosely();
{owners}
            IF (owner_old IS NULL) OPERATOR(pg_catalog.<>) (owner_new IS NULL) THEN{log}
            END IF;
        END IF;
    END IF;
"""
    ).format(
        new=awaits_parent(table, "NEW"),
        # A parent that a constraint ties was taken away by this transaction itself, in a cascade.
        old=awaits_parent(table, "OLD", without=data_map.is_tied),
        owners=owners,
        log=_log_keys_for_all(table),
    )


def _pass_gate(table: Table, is_parent: bool) -> sql.Composed:
    """At least one of the two owners has a gate: pass it, or refuse to go from one to the other."""
    return sql.SQL(
        """{keys}
    IF owner_old OPERATOR(pg_catalog.=) owner_new THEN
        PERFORM cellferry.enter(owner_new, {relation}, key_old, key_new);
    ELSIF {refused} THEN
        PERFORM cellferry.refuse_change(owner_old, owner_new, {relation});
    ELSE
        PERFORM cellferry.enter(COALESCE(owner_old, owner_new), {relation}, key_old, key_new);
        PERFORM cellferry.log_for_all({relation}, key_old, key_new);
    END IF;{leave}"""
    ).format(
        keys=_keys(table),
        relation=sql.Literal(str(table.name)),
        refused=_is_refused(table, is_parent),
        leave=_RETURN,
    )


def _is_refused(table: Table, is_parent: bool) -> sql.Composable:
    """A condition over two owners that differ: rows below this one would change hands unseen."""
    both_known = sql.SQL("owner_old IS NOT NULL AND owner_new IS NOT NULL")
    if not is_parent:
        return both_known  # nothing is below: it may come from nobody, or go to nobody
    if table.has_direct_owner:
        return sql.SQL("true")
    # A parent whose key changes is gone under its old key when ON UPDATE CASCADE comes here; the
    # rows below stay with their organization.
    return sql.SQL("NOT (owner_old IS NULL AND owner_new IS NOT NULL AND ({}))").format(
        sql.SQL(" OR ").join(
            sql.SQL("({})").format(
                sql.SQL(" AND ").join(
                    sql.SQL("OLD.{} IS NOT NULL").format(sql.Identifier(name))
                    for name in (path.hops[0].columns if path.hops else (path.column,))
                )
            )
            for path in table.owners
        )
    )


def _search_path(data_map: DataMap, table: Table) -> sql.Composable:
    """A fixed search path, with the schemas of the operators that the path's columns need."""
    compared = (column.type_schemas for column in _compared(data_map, table))
    schemas = sorted(frozenset[str]().union(*compared))
    return sql.SQL("\nSET search_path = {}").format(
        sql.SQL(", ").join(
            [sql.SQL("pg_catalog"), *map(sql.Identifier, schemas), sql.SQL("pg_temp")]
        )
    )


def _compared(data_map: DataMap, table: Table) -> Iterable[Column]:
    """The columns that are compared on the way from a row of `table` to its organization."""
    for path in table.owners:
        child = table
        if path.when is not None:
            yield from table.columns
        for hop in path.hops:
            yield from (child.column(name) for name in hop.columns)
            child = data_map.by_name[hop.parent]
            yield from (child.column(name) for name in hop.parent_columns)
            if hop.when is not None:
                yield from child.columns
