"""Orders tables so that parents come before children, also where foreign keys run in circles."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from cellferry.stores.postgres.schema import Name


def parents_first(
    parents: Mapping[Name, Collection[Name]], owners: Mapping[Name, Collection[Name]]
) -> list[Name]:
    """Return every table once, parents before children; the same for the same tables.

    A circle is entered at one of its members, never at a table that only hangs on it: at one
    whose owners are placed already, so that the paths of ownership keep their order as long as
    they are no circle themselves.

    Args:
        parents: for every table, what its foreign keys lead to.
        owners: those parents through which the table is owned.
    """
    missing = {name: {one for one in above if one != name} for name, above in parents.items()}
    for above in missing.values():
        above.intersection_update(missing)
    ordered: list[Name] = []
    while missing:
        ready = sorted((name for name, above in missing.items() if not above), key=str)
        placed = ready or [_entrance(missing, owners)]
        for name in placed:
            del missing[name]
        for above in missing.values():
            above.difference_update(placed)
        ordered.extend(placed)
    return ordered


def _entrance(
    missing: Mapping[Name, Collection[Name]], owners: Mapping[Name, Collection[Name]]
) -> Name:
    """Return where to enter the circles: every table that is left has a parent that is left."""
    above = {name: _ancestors(missing, name) for name in missing}
    # in a circle that hangs on no other: all of its ancestors have it as theirs
    top = [name for name in missing if all(name in above[one] for one in above[name])]

    def preference(name: Name) -> tuple[int, int, str]:
        waiting = sum(1 for owner in owners.get(name, ()) if owner in missing and owner != name)
        return waiting, len(missing[name]), str(name)

    return min(top, key=preference)


def _ancestors(missing: Mapping[Name, Collection[Name]], name: Name) -> set[Name]:
    found: set[Name] = set()
    todo = [name]
    while todo:
        for parent in missing[todo.pop()]:
            if parent not in found:
                found.add(parent)
                todo.append(parent)
    return found
