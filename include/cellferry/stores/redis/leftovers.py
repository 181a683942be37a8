"""What moves left in a cell's server: found, removed, and gates put right after a restart.

Everything here is one transaction of the server on what was found: a marker that changed since is
left alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import hiredis

from cellferry.errors import InvalidInput
from cellferry.model import Cell, GateState, Leftover, Move, Resource, Resources, Route, Side
from cellferry.stores.redis import acl_users
from cellferry.stores.redis.acl_users import AccessRules
from cellferry.stores.redis.gate import Gate, Marker
from cellferry.stores.redis.key_prefix import (
    MARKERS,
    PLACEHOLDER,
    KeyPrefix,
    application_user,
)
from cellferry.stores.redis.wire import Address, Command, ServerError, Wire, explain

KIND = "redis"

#: Up to so many keys a server is searched for markers; above it they are looked up by
#: organization, which finds all but those of a user that was deleted.
SEARCHED_KEYS = 200_000
_PAGE = 1_000
_MARKED = ("gate", "lease", "checkpoint")


def find(cell: Cell, admin_address: Address) -> tuple[Leftover, ...]:
    """See `Store.leftovers`."""
    with Wire(admin_address, "cellferry:reap") as admin:
        users = [name.decode() for name in admin.call("ACL", "USERS")]
        return (
            *_found_markers(cell, admin, users),
            *_found_users(users),
            *_found_closed(cell, admin),
        )


def _found_users(users: Iterable[str]) -> Iterator[Leftover]:
    for name in sorted(users):
        attempt = acl_users.attempt_of(name)
        if attempt is not None:
            yield Leftover(KIND, "acl_user", name, None, *attempt)


def _found_markers(cell: Cell, admin: Wire, users: Iterable[str]) -> Iterator[Leftover]:
    for organization in _marked_organizations(cell, admin, users):
        names = {what: f"{MARKERS}{what}:{{{organization}}}" for what in _MARKED}
        user = application_user(cell.stores[KIND].options, organization, where=_where(cell))
        values, rules, again = admin.checked(
            [("MGET", *names.values()), ("ACL", "GETUSER", user), ("GET", names["gate"])]
        )
        gate, lease, checkpoint = values
        holder = None if lease is None else json.loads(lease)
        migration = None if holder is None else int(holder["migration"])
        attempt = None if holder is None else int(holder["attempt"])
        marker = Marker.parse(gate)
        if marker is not None:
            now = None if rules is None else AccessRules.of(rules)
            prefix = _prefix(cell, organization)
            yield Leftover(
                KIND,
                "gate",
                names["gate"],
                organization,
                marker.migration,
                marker.attempt,
                marker.state,
                marker.epoch,
                marker.cell if marker.state is GateState.MOVED else None,
                # A change of both is one transaction: what differs only now is under way.
                obeyed=gate != again or _is_obeyed(marker, now, prefix),
            )
        if lease is not None:
            yield Leftover(KIND, "lease", names["lease"], organization, migration, attempt)
        if checkpoint is not None:
            yield Leftover(
                KIND, "checkpoint", names["checkpoint"], organization, migration, attempt
            )


def _marked_organizations(cell: Cell, admin: Wire, users: Iterable[str]) -> list[str]:
    """Organizations that may have markers here."""
    found: set[str] = set()
    if admin.call("DBSIZE") <= SEARCHED_KEYS:
        cursor = 0
        while True:
            following, page = admin.call("SCAN", cursor, "MATCH", f"{MARKERS}*", "COUNT", _PAGE)
            found |= {name for key in page if (name := _organization_of(key.decode()))}
            cursor = int(following)
            if cursor == 0:
                return sorted(found)
    names = sorted(_organizations_of(cell, users))
    for start in range(0, len(names), _PAGE):
        some = names[start : start + _PAGE]
        keys = [f"{MARKERS}{what}:{{{name}}}" for name in some for what in _MARKED]
        values = admin.call("MGET", *keys)
        for number, name in enumerate(some):
            if any(value is not None for value in values[number * 3 : number * 3 + 3]):
                found.add(name)
    return sorted(found)


def _organization_of(key: str) -> str | None:
    for what in _MARKED:
        head = f"{MARKERS}{what}:{{"
        if key.startswith(head) and key.endswith("}"):
            return key[len(head) : -1]
    return None


def _organizations_of(cell: Cell, users: Iterable[str]) -> set[str]:
    """The organizations whose application users have these names."""
    template = str(cell.stores[KIND].options.get("application_user", ""))
    if PLACEHOLDER not in template:
        return set()
    head, _, tail = template.partition(PLACEHOLDER)
    return {
        name[len(head) : len(name) - len(tail)]
        for name in users
        if name.startswith(head) and name.endswith(tail) and len(name) > len(head) + len(tail)
    }


def _found_closed(cell: Cell, admin: Wire) -> Iterator[Leftover]:
    """Application users that a gate closed, where no marker says what they were allowed before."""
    suspects: dict[str, str] = {}
    for line in admin.call("ACL", "LIST"):
        words = line.decode(errors="replace").split()
        keys = [word for word in words if word.startswith(("~", "%"))]
        if len(words) < 2 or not keys or any(not key.startswith("%R~") for key in keys):
            continue
        for organization in _organizations_of(cell, [words[1]]):
            suspects[organization] = words[1]
    for organization, user in sorted(suspects.items()):
        prefix = _prefix(cell, organization)
        reply, value = admin.checked(
            [("ACL", "GETUSER", user), ("GET", f"{MARKERS}gate:{{{organization}}}")]
        )
        if reply is None or value is not None or prefix is None:
            continue
        if _is_closed(AccessRules.of(reply), prefix):
            yield Leftover(KIND, "closed_user", user, organization)


def _is_obeyed(marker: Marker, rules: AccessRules | None, prefix: KeyPrefix | None) -> bool:
    if rules is None or prefix is None:
        return True  # nobody to let in, or nothing that a gate could have made
    if marker.state is GateState.OPEN:
        is_known = marker.rules is not None and not _is_closed(marker.rules, prefix)
        return not (is_known and _is_closed(rules, prefix))
    return rules.is_read_only


def _is_closed(rules: AccessRules, prefix: KeyPrefix) -> bool:
    """Whether these are rules as a closed gate makes them."""
    gate = f"%R~{prefix.marker_pattern('gate')}"
    return gate in rules.keys and set(rules.keys) <= {gate, f"%R~{prefix.pattern}"}


def remove(cell: Cell, admin_address: Address, leftover: Leftover) -> bool:
    """See `Store.remove_leftover`."""
    with Wire(admin_address, "cellferry:reap") as admin:
        if leftover.kind == "acl_user":
            gone = bool(admin.call("ACL", "DELUSER", leftover.name))
            if gone:
                acl_users.save(admin)
            return gone
        if leftover.organization is None or leftover.kind not in _MARKED:
            raise InvalidInput(f"{KIND} removes nothing of the kind {leftover.kind!r}")
        lease = f"{MARKERS}lease:{{{leftover.organization}}}"
        _, value, held = admin.checked(
            [("WATCH", leftover.name, lease), ("GET", leftover.name), ("GET", lease)]
        )
        marker = None
        if leftover.kind == "gate":
            marker = Marker.parse(value)
            is_there = _is_as_found(marker, leftover)
        else:
            is_there = value is not None and _is_held_by(held, leftover)
        if not is_there:
            admin.call("UNWATCH")
            return False
        commands: list[Command] = []
        if marker is not None and marker.state is not GateState.OPEN and marker.rules is not None:
            commands += _rules_for(cell, admin, leftover, marker.rules)
        return _run(admin, [*commands, ("UNLINK", leftover.name)], saves=bool(commands))


def turn_away(cell: Cell, admin_address: Address, found: Leftover, route: Route) -> bool:
    """See `Store.turn_away`."""

    def moved(marker: Marker) -> Marker:
        return replace(marker, state=GateState.MOVED, cell=route.cell, epoch=route.epoch)

    return _enforce(cell, admin_address, found, moved)


def obey(cell: Cell, admin_address: Address, found: Leftover) -> bool:
    """See `Store.obey`."""
    return _enforce(cell, admin_address, found, lambda marker: marker)


def _enforce(cell: Cell, admin_address: Address, found: Leftover, change: Any) -> bool:
    """Write the changed marker and the rules that belong to it, if it is as it was found."""
    prefix = _prefix(cell, str(found.organization))
    if prefix is None:
        return False
    with Wire(admin_address, "cellferry:reap") as admin:
        _, value = admin.checked([("WATCH", found.name), ("GET", found.name)])
        marker = Marker.parse(value)
        if marker is None or not _is_as_found(marker, found):
            admin.call("UNWATCH")
            return False
        wanted: Marker = change(marker)
        user = _user(cell, found)
        now = acl_users.read_rules(admin, user)
        commands: list[Command] = []
        if now is not None:
            known = marker.rules or (None if _is_closed(now, prefix) else now)
            wanted = replace(wanted, rules=known)
            rules = known
            if wanted.state is not GateState.OPEN:
                rules = (known or now).closed(
                    prefix,
                    acl_users.unstoppable_commands(admin),
                    reads=wanted.state is not GateState.IMPORTING,
                )
            if rules is not None:
                commands.append(("ACL", "SETUSER", user, *rules.arguments()))
        commands.append(("SET", found.name, wanted.to_json()))
        return _run(admin, commands, saves=True)


def reconcile(
    move: Move,
    side: Side,
    wanted: GateState,
    resources: Resources,
    admin_address: Address,
) -> bool:
    """See `Store.reconcile`."""
    cell, organization = move.cell(side), move.organization.id
    options, where = cell.stores[KIND].options, _where(cell)
    prefix = KeyPrefix.of(options, organization, where=where)
    for what in ("lease", "gate"):
        resources.intend(Resource(cell.name, KIND, what, prefix.marker(what)))
    name = f"cellferry:{move.migration}:{move.attempt}:reap"
    with Wire(admin_address, name) as admin:
        user = application_user(options, organization, where=where)
        gate = Gate(admin, move, side, prefix, user)
        for gone in gate.fence():
            resources.forget(Resource(cell.name, KIND, "acl_user", gone))
        before = gate.read()
        if wanted is GateState.MOVED and side is Side.SOURCE:
            gate.restore_moved()
        elif wanted is GateState.OPEN and side is Side.SOURCE:
            gate.thaw()
        elif wanted is GateState.OPEN:
            gate.open_destination()
        else:
            raise InvalidInput(f"a {side} is never reconciled to {wanted}")
        after = gate.read()
    return (before and (before.state, before.epoch)) != (after and (after.state, after.epoch))


def _is_as_found(marker: Marker | None, found: Leftover) -> bool:
    return marker is not None and (
        marker.migration,
        marker.attempt,
        marker.state,
        marker.epoch,
    ) == (found.migration, found.attempt, found.state, found.epoch)


def _is_held_by(lease: bytes | None, found: Leftover) -> bool:
    holder: Mapping[str, int | None] = {} if lease is None else json.loads(lease)
    return (holder.get("migration"), holder.get("attempt")) == (found.migration, found.attempt)


def _rules_for(cell: Cell, admin: Wire, found: Leftover, rules: AccessRules) -> list[Command]:
    user = _user(cell, found)
    # SETUSER would make a user that the application has deleted meanwhile
    if acl_users.read_rules(admin, user) is None:
        return []
    return [("ACL", "SETUSER", user, *rules.arguments())]


def _run(admin: Wire, commands: list[Command], *, saves: bool) -> bool:
    """Run MULTI … EXEC; False when a watched key changed."""
    admin.send([("MULTI",), *commands, ("EXEC",)])
    *_, results = replies = admin.receive(len(commands) + 2)
    if results is None:
        return False
    for reply in [*replies, *(results if isinstance(results, list) else [])]:
        if isinstance(reply, hiredis.ReplyError) and "EXECABORT" not in str(reply):
            raise explain(ServerError(str(reply)), admin.address.where)
    if saves:
        acl_users.save(admin)
    return True


def _user(cell: Cell, found: Leftover) -> str:
    options = cell.stores[KIND].options
    return application_user(options, str(found.organization), where=_where(cell))


def _prefix(cell: Cell, organization: str) -> KeyPrefix | None:
    """The organization's prefix; None where none can be had of such a name."""
    try:
        return KeyPrefix.of(cell.stores[KIND].options, organization, where=_where(cell))
    except InvalidInput:
        return None


def _where(cell: Cell) -> str:
    return f"{cell.name}/{KIND}"
