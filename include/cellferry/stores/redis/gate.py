"""The gate of one organization in one cell: a marker key, the application's user, the lease.

Every change is one transaction of the server: WATCH on the marker and the lease, a check of
migration, attempt, epoch and state, then MULTI with ACL SETUSER and SET (the server runs no ACL
command in a script). Then ACL SAVE makes it survive a restart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import hiredis

from cellferry.errors import (
    AuthorityViolation,
    CellferryError,
    LeaseLost,
    NotPrepared,
    TransientError,
    WrongState,
)
from cellferry.model import GateState, Move, Side
from cellferry.stores.redis import acl_users
from cellferry.stores.redis.acl_users import AccessRules
from cellferry.stores.redis.key_prefix import KeyPrefix
from cellferry.stores.redis.wire import Command, ServerError, Wire, explain

_TRIES = 20


@dataclass(frozen=True, slots=True)
class Marker:
    """What the key `cellferry:gate:{<organization>}` says; the application's user may read it."""

    state: GateState
    cell: str
    """Where the organization is, as far as this cell knows: for `moved` the new cell."""
    epoch: int
    migration: int
    attempt: int
    rules: AccessRules | None = None
    """What the application's user may do when the gate is open."""

    @classmethod
    def parse(cls, value: bytes | None) -> Marker | None:
        """Read the key's value."""
        if value is None:
            return None
        found = json.loads(value)
        rules = found.get("rules")
        return cls(
            GateState(found["state"]),
            found["cell"],
            found["epoch"],
            found["migration"],
            found["attempt"],
            AccessRules.from_json(rules) if rules else None,
        )

    def to_json(self) -> str:
        """The key's value."""
        return json.dumps(
            {
                "state": self.state.value,
                "cell": self.cell,
                "epoch": self.epoch,
                "migration": self.migration,
                "attempt": self.attempt,
                "rules": self.rules.to_json() if self.rules else None,
            }
        )


@dataclass(frozen=True, slots=True)
class Change:
    """What a transaction shall do: the new marker (None removes it) and the user's new rules."""

    marker: Marker | None
    rules: AccessRules | None = None
    also: tuple[Command, ...] = ()


Decision = Callable[[Marker | None, AccessRules | None], Change | None]


class Gate:
    """One side's gate and lease.

    Args:
        admin: connection that may manage ACL users.
        side: which of the two cells it is in.
    """

    def __init__(
        self, admin: Wire, move: Move, side: Side, prefix: KeyPrefix, application_user: str
    ) -> None:
        self.admin = admin
        self.move = move
        self.side = side
        self.prefix = prefix
        self.user = application_user
        self.where = admin.address.where
        self._gate_key = prefix.marker("gate")
        self._lease_key = prefix.marker("lease")
        self._unstoppable: tuple[str, ...] | None = None

    def read(self) -> Marker | None:
        """The marker now."""
        return Marker.parse(self.admin.call("GET", self._gate_key))

    @property
    def unstoppable(self) -> tuple[str, ...]:
        """Write commands that only their removal stops; asked once."""
        if self._unstoppable is None:
            self._unstoppable = acl_users.unstoppable_commands(self.admin)
        return self._unstoppable

    # --- lease -------------------------------------------------------------------------------

    def lease(self) -> tuple[int, int] | None:
        """Migration and attempt that hold this organization here."""
        return _lease(self.admin.call("GET", self._lease_key))

    def holds_lease(self) -> bool:
        """Whether this attempt is the newest that this cell has seen."""
        return self.lease() == (self.move.migration, self.move.attempt)

    def fence(self) -> list[str]:
        """Make this attempt the only one; returns the users of older ones, now gone.

        Deleting a user ends its connections at once.

        Raises:
            LeaseLost: a newer attempt, or a newer migration, has this organization.
        """
        ours = (self.move.migration, self.move.attempt)
        for _ in range(_TRIES):
            _, value, users = self.admin.checked(
                [("WATCH", self._lease_key), ("GET", self._lease_key), ("ACL", "USERS")]
            )
            held = _lease(value)
            if held is not None and held > ours:
                self.admin.call("UNWATCH")
                raise self._lost(held)
            owners = {self.move.migration} | ({held[0]} if held else set())
            old = [
                name
                for name in (user.decode() for user in users)
                if (attempt := acl_users.attempt_of(name))
                and attempt[0] in owners
                and attempt < ours
            ]
            lease = json.dumps({"migration": ours[0], "attempt": ours[1]})
            commands: list[Command] = [("SET", self._lease_key, lease)]
            if old:
                commands.append(("ACL", "DELUSER", *old))
            if self._transaction(commands):
                if old:
                    acl_users.save(self.admin)
                return old
        raise self._contended()

    def create_user(self, name: str, rules: Iterable[str | bytes | int | float]) -> None:
        """Make a user of this attempt.

        Raises:
            LeaseLost: another attempt has taken over.
        """
        for _ in range(_TRIES):
            _, value = self.admin.checked([("WATCH", self._lease_key), ("GET", self._lease_key)])
            if not self._is_ours(value):
                self.admin.call("UNWATCH")
                raise self._lost(_lease(value))
            if self._transaction([("ACL", "SETUSER", name, *rules)]):
                return
        raise self._contended()

    def delete_users(self) -> list[str]:
        """Delete the users of this migration's attempts up to this one; returns their names."""
        ours = (self.move.migration, self.move.attempt)
        names = [
            name
            for name in (user.decode() for user in self.admin.call("ACL", "USERS"))
            if (attempt := acl_users.attempt_of(name)) and attempt[0] == ours[0] and attempt <= ours
        ]
        if names:
            self.admin.call("ACL", "DELUSER", *names)
            acl_users.save(self.admin)
        return names

    # --- states ------------------------------------------------------------------------------

    def record_source(self) -> Marker:
        """Source: write down what the application's user may do, before it must be restored.

        Raises:
            WrongState: the source's gate says that it has no authority.
            NotPrepared: there is no application user.
        """

        def decide(marker: Marker | None, rules: AccessRules | None) -> Change | None:
            if marker and marker.state is GateState.FROZEN and self._is_mine(marker):
                return None
            self._require_authority(marker)
            return Change(self._marker(GateState.OPEN, self._required(rules)))

        return self._required_marker(self._change(decide))

    def close_for_import(self) -> Marker:
        """Destination: `importing`; the application's user loses its keys.

        Raises:
            WrongState: the gate belongs to another migration, or this cell has authority.
            NotPrepared: there is no application user.
        """

        def decide(marker: Marker | None, rules: AccessRules | None) -> Change | None:
            rules = self._required(rules)
            if marker is None or marker.state is GateState.OPEN:
                if marker and marker.epoch > self.move.epoch:
                    raise self._wrong(marker, "importing")
                original = rules
            elif (marker.state is GateState.IMPORTING and self._is_mine(marker)) or (
                # the organization comes back: this cell's retained copy is taken over
                marker.state is GateState.MOVED
                and marker.migration <= self.move.migration
                and marker.epoch <= self.move.epoch
            ):
                original = marker.rules or rules
            else:
                raise self._wrong(marker, "importing")
            closed = original.closed(self.prefix, self.unstoppable, reads=False)
            return Change(self._marker(GateState.IMPORTING, original), closed)

        return self._required_marker(self._change(decide))

    def freeze(self) -> Marker:
        """Source: `frozen`; the application's user may only read. `keep_rules` makes it durable.

        Raises:
            WrongState: the gate is neither open nor frozen by this migration.
            NotPrepared: there is no application user: its writers could not be stopped.
        """

        def decide(marker: Marker | None, rules: AccessRules | None) -> Change | None:
            original = self._required(rules)
            if marker and marker.state is GateState.FROZEN and self._is_mine(marker):
                original = marker.rules or original
            else:
                self._require_authority(marker)
            closed = original.closed(self.prefix, self.unstoppable, reads=True)
            return Change(self._marker(GateState.FROZEN, original), closed)

        _ = self.unstoppable  # asked before anybody is stopped
        marker = self._required_marker(self._change(decide, saves=False))
        self._end_blocked_clients()
        return marker

    def keep_rules(self) -> None:
        """Write what every user may do to the server's disk; no flip may come before this."""
        acl_users.save(self.admin)

    def thaw(self) -> None:
        """Source, before the flip: open again with the original rules.

        Raises:
            WrongState: the gate is `moved`, or frozen by another migration.
        """

        def decide(marker: Marker | None, rules: AccessRules | None) -> Change | None:
            if marker is None or (marker.state is GateState.OPEN and not self._is_mine(marker)):
                return None
            if marker.state is GateState.OPEN:
                # Written again: a freeze whose connection was lost may come yet, and finds its
                # watched key changed. And the server may have lost the frozen marker with its
                # last second, but not the rules, which are saved at once.
                return Change(marker, marker.rules if self._is_closed(marker, rules) else None)
            if marker.state is not GateState.FROZEN or not self._is_mine(marker):
                raise self._wrong(marker, "open")
            return Change(replace(marker, state=GateState.OPEN), marker.rules)

        self._change(decide, needs_lease=False)

    def hand_over_source(self) -> None:
        """Source, after the flip: `moved`; the application's user stays read-only.

        Raises:
            WrongState: the gate is not frozen by this migration.
        """

        def decide(marker: Marker | None, rules: AccessRules | None) -> Change | None:
            if marker and self._is_moved_by_us(marker):
                return None
            if marker and marker.state is GateState.OPEN and self._is_closed(marker, rules):
                # The server has lost the frozen marker with its last second. Its rules were saved
                # before the flip: nobody has written since.
                marker = replace(marker, state=GateState.FROZEN)
            if (
                marker is None
                or marker.state is not GateState.FROZEN
                or not self._is_mine(marker)
                or marker.epoch != self.move.epoch
            ):
                raise self._wrong(marker, "moved")
            return Change(
                replace(
                    marker,
                    state=GateState.MOVED,
                    cell=self.move.destination.name,
                    epoch=self.move.epoch + 1,
                    attempt=self.move.attempt,
                )
            )

        self._change(decide)

    def restore_moved(self) -> None:
        """Source, after the flip: `moved`, from whatever a crash or a failover left there.

        Raises:
            WrongState: the gate is another migration's, or later than this one.
        """

        def decide(marker: Marker | None, rules: AccessRules | None) -> Change | None:
            if marker is not None and not (
                self._is_moved_by_us(marker)
                or (
                    marker.state is GateState.FROZEN
                    and self._is_mine(marker)
                    and marker.epoch == self.move.epoch
                )
                # a failover lost the freeze, or everything since the last move to here
                or (
                    marker.state is GateState.OPEN
                    and marker.migration <= self.move.migration
                    and marker.epoch <= self.move.epoch
                )
            ):
                raise self._wrong(marker, "moved")
            original = marker.rules if marker else None
            if original is None and rules is not None and not rules.is_read_only:
                original = rules  # else they are the gate's own, and nobody knows what was before
            known = original or rules
            # without a user there is nobody who could write
            closed = known.closed(self.prefix, self.unstoppable, reads=True) if known else None
            return Change(
                Marker(
                    GateState.MOVED,
                    self.move.destination.name,
                    self.move.epoch + 1,
                    self.move.migration,
                    self.move.attempt,
                    original,
                ),
                closed,
            )

        self._change(decide)

    def open_destination(self) -> None:
        """Destination, after the flip: open at the next epoch, with the original rules.

        Raises:
            WrongState: the gate is not `importing` by this migration, or the server has lost it.
        """

        def decide(marker: Marker | None, rules: AccessRules | None) -> Change | None:
            if marker is None:
                raise WrongState(
                    "the server has lost this migration's gate, and perhaps the keys: it came back"
                    " empty, or an older state of it was restored. It is not opened",
                    hint=f"{self.move.source.name} has every key up to the freeze, behind its gate."
                    " Bring this server's data back from its append-only file, a snapshot or a"
                    " replica that has the gate; then run the step again: it compares everything"
                    " and brings what is missing",
                    organization=self.move.organization.id,
                    where=self.where,
                )
            if marker.state is GateState.OPEN and marker.epoch > self.move.epoch:
                return None
            if not self._receives(marker):
                raise self._wrong(marker, "open")
            original = marker.rules or self._required(rules)
            return Change(
                replace(
                    marker,
                    state=GateState.OPEN,
                    cell=self.move.destination.name,
                    epoch=self.move.epoch + 1,
                    attempt=self.move.attempt,
                ),
                original,
            )

        self._change(decide)

    def is_frozen_by_us(self) -> bool:
        """Whether the application's user is really closed by this migration's freeze.

        Raises:
            AuthorityViolation: somebody gave the user its keys back meanwhile.
            LeaseLost: another attempt has taken over.
        """
        (value, lease), reply = self.admin.checked(
            [("MGET", self._gate_key, self._lease_key), ("ACL", "GETUSER", self.user)]
        )
        if not self._is_ours(lease):
            raise self._lost(_lease(lease))
        marker = Marker.parse(value)
        if marker is None or marker.state is not GateState.FROZEN or not self._is_mine(marker):
            return False
        rules = None if reply is None else AccessRules.of(reply)
        if rules is None or any(not key.startswith("%R~") for key in rules.keys) or rules.selectors:
            raise AuthorityViolation(
                f"the rules of user {self.user!r} were changed while it was frozen",
                hint="stop what provisions ACL users during a cutover, then start it again",
                organization=self.move.organization.id,
                where=self.where,
            )
        return True

    def receives(self) -> bool:
        """Whether this side may be written by this migration.

        It is `importing`; or, on the way back, `moved` by this very migration.

        Raises:
            LeaseLost: another attempt has taken over.
        """
        value, lease = self.admin.call("MGET", self._gate_key, self._lease_key)
        if not self._is_ours(lease):
            raise self._lost(_lease(lease))
        return self._receives(Marker.parse(value))

    def was_opened(self) -> bool:
        """Destination, after the flip: whether writers were let in, whatever the marker says.

        A killed server may lose the marker with its last second of keys, and with it only what was
        written before; the user's rules are saved in a file of their own.
        """
        value, reply = self.admin.checked([("GET", self._gate_key), ("ACL", "GETUSER", self.user)])
        marker = Marker.parse(value)
        if marker is None or not self._is_mine(marker):
            return False
        if marker.state is GateState.OPEN:
            return marker.epoch == self.move.epoch + 1
        is_closed = reply is None or AccessRules.of(reply).is_read_only
        return self._receives(marker) and not is_closed

    def insist_on_authority(self) -> None:
        """Source of a return: see that this server still has the gate that was opened here.

        A server that came back empty, or was emptied, has no keys: they were not deleted.

        Raises:
            WrongState: the gate is not this migration's, or not of this epoch.
        """
        marker = self.read()
        if (
            marker is not None
            and self._is_mine(marker)
            and (
                (
                    marker.state in (GateState.OPEN, GateState.FROZEN)
                    and marker.epoch == self.move.epoch
                )
                or self._is_moved_by_us(marker)
            )
        ):
            return
        found = (
            f"{marker.state.value} by migration {marker.migration} at epoch {marker.epoch}"
            if marker
            else "absent"
        )
        raise WrongState(
            f"the gate of {self.move.source.name} is {found}, and not open by migration"
            f" {self.move.migration} at epoch {self.move.epoch}: its server may have lost keys",
            hint=f"nothing was deleted in {self.move.destination.name} since, which has what was"
            " there until the last reverse round. Bring this server's newer state back, with the"
            " gate. If a newer migration took the gate over, reverse rounds of this one have ended",
            organization=self.move.organization.id,
            where=self.where,
        )

    def deletable(self, marker: Marker | None) -> bool:
        """Whether the copy on this side is this migration's to delete (hazard 4)."""
        if marker is None:
            return False
        if self.side is Side.SOURCE:
            return self._is_moved_by_us(marker)
        return marker.state is GateState.IMPORTING and self._is_mine(marker)

    def dismantle(self) -> bool:
        """Remove marker, lease and checkpoint once nothing here is gated; restore the user.

        Call it on a side whose copy is deleted, or that is open. Returns whether they are gone:
        a side that is still gated, or another migration's, is left as it is. So is an older one's
        open marker, which its way back asks for: only the lease goes, and the next attempt at the
        older one takes it.
        """
        done = True
        ours = self.move.migration

        def decide(marker: Marker | None, _rules: AccessRules | None) -> Change | None:
            nonlocal done
            done = True
            if marker is not None and not (
                self.deletable(marker)
                or (marker.state is GateState.OPEN and marker.migration <= ours)
            ):
                done = False
                return None
            is_older = marker is not None and marker.migration < ours
            gated = marker is not None and marker.state is not GateState.OPEN
            checkpoint = self.prefix.marker("checkpoint")
            return Change(
                marker if is_older else None,
                marker.rules if marker and gated else None,
                (("UNLINK", self._lease_key, checkpoint),),
            )

        try:
            self._change(decide, needs_lease=False)
        except LeaseLost:
            return False
        return done

    # --- inside ------------------------------------------------------------------------------

    def _change(
        self, decide: Decision, *, needs_lease: bool = True, saves: bool = True
    ) -> Marker | None:
        for _ in range(_TRIES):
            _, (gate, lease), reply = self.admin.checked(
                [
                    ("WATCH", self._gate_key, self._lease_key),
                    ("MGET", self._gate_key, self._lease_key),
                    ("ACL", "GETUSER", self.user),
                ]
            )
            try:
                if not self._is_ours(lease) and (needs_lease or lease is not None):
                    raise self._lost(_lease(lease))
                marker = Marker.parse(gate)
                change = decide(marker, None if reply is None else AccessRules.of(reply))
            except CellferryError:
                self.admin.call("UNWATCH")
                raise
            if change is None:
                self.admin.call("UNWATCH")
                if saves:
                    acl_users.save(self.admin)
                return marker
            if self._transaction(self._commands(change, user_exists=reply is not None)):
                # a change of the marker alone leaves nothing unsaved
                if saves and change.rules is not None:
                    acl_users.save(self.admin)
                return change.marker
        raise self._contended()

    def _commands(self, change: Change, *, user_exists: bool) -> list[Command]:
        commands: list[Command] = []
        # SETUSER would make a user that the application has deleted meanwhile
        if change.rules is not None and user_exists:
            commands.append(("ACL", "SETUSER", self.user, *change.rules.arguments()))
        if change.marker is None:
            commands.append(("UNLINK", self._gate_key))
        else:
            commands.append(("SET", self._gate_key, change.marker.to_json()))
        return [*commands, *change.also]

    def _transaction(self, commands: list[Command]) -> bool:
        """Run MULTI … EXEC; False when a watched key changed."""
        self.admin.send([("MULTI",), *commands, ("EXEC",)])
        replies = self.admin.receive(len(commands) + 2)
        results = replies[-1]
        if results is None:
            return False
        for reply in [*replies, *(results if isinstance(results, list) else [])]:
            if isinstance(reply, hiredis.ReplyError) and "EXECABORT" not in str(reply):
                raise explain(ServerError(str(reply)), self.where)
        return True

    def _end_blocked_clients(self) -> None:
        """Close connections that wait in BLPOP and the like: they learn the new cell."""
        try:
            self.admin.try_call("CLIENT", "KILL", "USER", self.user, "FLAGS", "b")
        except ServerError:  # an engine without the filter FLAGS
            blocked = [
                client["id"]
                for client in map(_client, self.admin.call("CLIENT", "LIST").splitlines())
                if client.get("user") == self.user and "b" in client.get("flags", "")
            ]
            if blocked:
                self.admin.send([("CLIENT", "KILL", "ID", number) for number in blocked])
                self.admin.receive(len(blocked))

    def _marker(self, state: GateState, rules: AccessRules) -> Marker:
        return Marker(
            state,
            self.move.cell(self.side).name,
            self.move.epoch,
            self.move.migration,
            self.move.attempt,
            rules,
        )

    def _is_ours(self, lease: bytes | None) -> bool:
        return _lease(lease) == (self.move.migration, self.move.attempt)

    def _receives(self, marker: Marker | None) -> bool:
        if marker is None or not self._is_mine(marker):
            return False
        if self.move.returning:
            return marker.state is GateState.MOVED and marker.epoch == self.move.epoch
        return marker.state is GateState.IMPORTING

    def _is_closed(self, marker: Marker, rules: AccessRules | None) -> bool:
        """Whether the application's user has exactly the keys that this migration's freeze left."""
        if rules is None or marker.rules is None or not self._is_mine(marker):
            return False
        # The server writes the list of commands in a form of its own.
        closed = marker.rules.closed(self.prefix, (), reads=True)
        return set(rules.keys) == set(closed.keys) and not rules.selectors

    def _is_mine(self, marker: Marker) -> bool:
        return marker.migration == self.move.migration

    def _is_moved_by_us(self, marker: Marker) -> bool:
        return (
            marker.state is GateState.MOVED
            and self._is_mine(marker)
            and marker.epoch == self.move.epoch + 1
        )

    def _require_authority(self, marker: Marker | None) -> None:
        if marker and (marker.state is not GateState.OPEN or marker.epoch > self.move.epoch):
            raise self._wrong(marker, "frozen")

    def _required(self, rules: AccessRules | None) -> AccessRules:
        if rules is None:
            raise NotPrepared(
                f"there is no ACL user {self.user!r}: the gate cannot stop its writers",
                hint="provision the application's user in this cell, then run the step again",
                organization=self.move.organization.id,
                where=self.where,
            )
        return rules

    def _required_marker(self, marker: Marker | None) -> Marker:
        if marker is None:
            raise self._wrong(None, "set")
        return marker

    def _wrong(self, marker: Marker | None, wanted: str) -> WrongState:
        found = (
            f"{marker.state.value} by migration {marker.migration} at epoch {marker.epoch}"
            if marker
            else "absent"
        )
        return WrongState(
            f"the gate cannot become {wanted} for migration {self.move.migration} "
            f"at epoch {self.move.epoch}: it is {found}",
            hint="another migration has this organization here; look at `cellferry status`",
            organization=self.move.organization.id,
            where=self.where,
        )

    def _lost(self, held: tuple[int, int] | None) -> LeaseLost:
        by = f"attempt {held[1]} of migration {held[0]}" if held else "nobody: it was cleaned up"
        return LeaseLost(
            f"attempt {self.move.attempt} of migration {self.move.migration} may not write here "
            f"any more; the lease is held by {by}",
            organization=self.move.organization.id,
            where=self.where,
        )

    def _contended(self) -> TransientError:
        return TransientError(
            "the gate kept changing under this attempt", hint="try again", where=self.where
        )


def _lease(value: bytes | None) -> tuple[int, int] | None:
    if value is None:
        return None
    found: dict[str, Any] = json.loads(value)
    return found["migration"], found["attempt"]


def _client(line: bytes) -> dict[str, str]:
    return dict(
        field.split("=", 1) for field in line.decode(errors="replace").split() if "=" in field
    )
