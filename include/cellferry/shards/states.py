"""The states of a re-sharding, and what each asks of clients and of the copier.

A moved key has an old and a new owner. Two clients may be one state apart, since each state is
acknowledged by every client before the next is set. So what must hold is that **any two adjacent
states decide a claim at a common place**:

=================  ==================  ==================  =========================
state              a claim must win    values live at      the copier follows
=================  ==================  ==================  =========================
old                old                 old                 old → new
dual, read old     old (new mirrors)   old                 old → new
switching          both: see below     nowhere: they wait  what is left, to the end
dual, read new     new (old mirrors)   new                 new → old
new                new                 new                 new → old, until clean-up
=================  ==================  ==================  =========================

Two clients that both won would both have won at the common place, and a server gives a key that
does not exist to one of them only. That is why nothing is accepted twice; that a claim carries a
token of its own, by which its client knows it again, is why a copy or a mirror of it that arrives
first is not taken for somebody else's.

Values and counters cannot be decided at two places at once. They have one authority in each state;
`switching` lies between the two, for as long as it takes to hear from every client and to bring the
last changes over; the copier has ended before the next state is set. A copier is the one writer of
the side that has no authority, so it may overwrite and delete there, and what was deleted at the
authority is not brought back.

In `switching` a claim must win at both owners, first at the one that has had the authority: from
there the copier reads, so it learns of every claim that it could have undone at the other one by a
late write, and writes again. With one fixed order a roll-back would accept an id twice: a claim
wins at the old owner, the copier, which saw the key absent at the new one, removes it, ends, and
another claim wins at the old owner in the next state. So `switching` knows from where it was
entered (`rule`); clients in both directions of it never meet.

The requirements' own cutover has no `switching`, changes the ring and ends dual writing in one
rolling restart, and so has clients that decide at the old owner beside such as decide at the new
one. A test keeps its counterexample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class ShardState(StrEnum):
    """Where a re-sharding is. It goes one step at a time, onward or back."""

    OLD = "old"
    DUAL_READ_OLD = "dual_write_read_old"
    SWITCHING = "switching"
    DUAL_READ_NEW = "dual_write_read_new"
    NEW = "new"


ORDER: tuple[ShardState, ...] = tuple(ShardState)

ENDING = "ending"
"""The fact of a re-sharding that says how it is to end, once it is back in `old`."""


class Owner(StrEnum):
    """One of the two shards of a moved key."""

    OLD = "old"
    NEW = "new"

    @property
    def other(self) -> Owner:
        """The other one."""
        return Owner.NEW if self is Owner.OLD else Owner.OLD


@dataclass(frozen=True, slots=True)
class Rule:
    """What a state asks.

    Attributes:
        claims: where a claim must win, in this order.
        mirror: where a claim that was won is written as well, so that the next state begins
            warm; nothing depends on it.
        values: where values and counters are read and written; None: they wait.
        authority: from which owner the copier brings changes to the other.
    """

    claims: tuple[Owner, ...]
    mirror: Owner | None
    values: Owner | None
    authority: Owner | None


RULES: Mapping[ShardState, Rule] = {
    ShardState.OLD: Rule((Owner.OLD,), None, Owner.OLD, Owner.OLD),
    ShardState.DUAL_READ_OLD: Rule((Owner.OLD,), Owner.NEW, Owner.OLD, Owner.OLD),
    # Both owners in one order for everybody: two claims cannot each win one of them.
    ShardState.SWITCHING: Rule((Owner.OLD, Owner.NEW), None, None, None),  # see `rule`
    ShardState.DUAL_READ_NEW: Rule((Owner.NEW,), Owner.OLD, Owner.NEW, Owner.NEW),
    ShardState.NEW: Rule((Owner.NEW,), None, Owner.NEW, Owner.NEW),
}


def rule(state: ShardState, authority: Owner = Owner.OLD) -> Rule:
    """Return what `state` asks.

    Args:
        authority: for `switching`: the side that had the authority before it; ignored otherwise.
    """
    if state is ShardState.SWITCHING:
        return Rule((authority, authority.other), None, None, None)
    return RULES[state]


def neighbours(state: ShardState) -> tuple[ShardState, ...]:
    """Return the states to which a re-sharding may go from `state`."""
    at = ORDER.index(state)
    return tuple(ORDER[i] for i in (at - 1, at + 1) if 0 <= i < len(ORDER))
