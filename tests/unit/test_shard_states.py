"""No order of events lets two clients that are at most one state apart accept the same id.

The claims' own code meets shards that hold one key, a copier and its late writes, and clients that
die half-way, in every order. (Expiry frees the id for everybody, at both owners; how far apart two
servers' clocks are is how long it may still be refused.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest

from cellferry.shards.claims import Ask, Held, Verdict, claim
from cellferry.shards.states import ORDER, RULES, Owner, Rule, ShardState, neighbours, rule

Shards = tuple[bytes | None, bytes | None]
"""Who holds the one key at the old and the new owner."""


@dataclass(frozen=True)
class Client:
    """A claim under way: what was answered so far stands for where its dialogue is.

    A dialogue cannot be copied, so it is played again from its answers.
    """

    name: bytes
    rule: Rule
    answers: tuple[bytes, ...] = ()
    accepted: bool | None = None
    is_dead: bool = False
    mirrors: bool = False

    def next_ask(self) -> Ask | Verdict:
        dialogue = claim(self.rule, self.name)
        try:
            ask = next(dialogue)
            for answer in self.answers:
                ask = dialogue.send(Held(answer, None))
        except StopIteration as end:
            verdict: Verdict = end.value
            return verdict
        return ask


@dataclass(frozen=True)
class World:
    shards: Shards
    clients: tuple[Client, ...]
    copied: bytes | None = None
    """What the copier has read and not yet written; `b""` for an absent key."""
    dirty: bool = False
    trace: tuple[str, ...] = field(default=(), compare=False)

    def held(self, owner: Owner) -> bytes | None:
        return self.shards[owner is Owner.NEW]

    def holding(self, owner: Owner, token: bytes | None) -> Shards:
        return (self.shards[0], token) if owner is Owner.NEW else (token, self.shards[1])


def explore(start: World, authority: Owner | None) -> tuple[int, World | None]:
    """Walk through every order of events; return how many states, and one in which two won."""
    seen = {start}
    waiting = [start]
    while waiting:
        world = waiting.pop()
        if sum(one.accepted is True for one in world.clients) > 1:
            return len(seen), world
        for after in successors(world, authority):
            if after not in seen:
                seen.add(after)
                waiting.append(after)
    return len(seen), None


def successors(world: World, authority: Owner | None) -> Iterable[World]:
    for index, one in enumerate(world.clients):
        if one.is_dead:
            continue
        if one.accepted is None:
            yield with_client(world, index, replace(one, is_dead=True), f"{one.name!r} dies")
            yield advance(world, index, one, authority)
        elif one.mirrors and one.rule.mirror is not None:
            owner = one.rule.mirror
            shards = world.shards
            if world.held(owner) is None:
                shards = world.holding(owner, one.name)
            yield replace(
                with_client(world, index, replace(one, mirrors=False), f"{one.name!r} mirrors"),
                shards=shards,
            )
    yield from copier(world, authority)


def advance(world: World, index: int, one: Client, authority: Owner | None) -> World:
    ask = one.next_ask()
    if isinstance(ask, Verdict):
        done = replace(one, accepted=ask.accepted, mirrors=ask.mirror is not None)
        what = "accepts" if ask.accepted else "refuses"
        return with_client(world, index, done, f"{one.name!r} {what}")
    holder = world.held(ask.owner) or ask.token
    asked = replace(one, answers=(*one.answers, holder))
    after = with_client(world, index, asked, f"{one.name!r} asks {ask.owner}: {holder!r}")
    if world.held(ask.owner) is not None:
        return after
    dirty = after.dirty or ask.owner is authority
    return replace(after, shards=world.holding(ask.owner, ask.token), dirty=dirty)


def copier(world: World, authority: Owner | None) -> Iterable[World]:
    """Follow one side: read a changed key; some time later make the other side equal."""
    if authority is None:
        return
    if world.dirty and world.copied is None:
        value = world.held(authority) or b""
        yield replace(
            world, copied=value, dirty=False, trace=(*world.trace, f"the copier reads {value!r}")
        )
    if world.copied is not None:
        value = world.copied or None
        yield replace(
            world,
            shards=world.holding(authority.other, value),
            copied=None,
            trace=(*world.trace, f"the copier writes {value!r} to {authority.other}"),
        )


def with_client(world: World, index: int, one: Client, what: str) -> World:
    clients = (*world.clients[:index], one, *world.clients[index + 1 :])
    return replace(world, clients=clients, trace=(*world.trace, what))


PAIRS = [*pairwise(ORDER), *((one, one) for one in ORDER)]


# The copier acknowledges states like a client, so it is in one of the two. At `switching` it brings
# over what is left, from the side that had the authority, and has ended before the next state is
# set: so it never meets a client that has gone past `switching`.
SWITCH = ShardState.SWITCHING
COPYING: Mapping[ShardState, tuple[Owner | None, ...]] = {
    **{state: (rule.authority,) for state, rule in RULES.items()},
    SWITCH: (None, Owner.OLD, Owner.NEW),
}
TOGETHER = [
    *(
        (a, b, authority)
        for a, b in PAIRS
        for authority in dict.fromkeys((RULES[a].authority, RULES[b].authority))
    ),
    *((SWITCH, SWITCH, authority) for authority in Owner),
]


@pytest.mark.parametrize(("behind", "ahead", "authority"), TOGETHER)
def test_clients_one_state_apart_never_both_accept(
    behind: ShardState, ahead: ShardState, authority: Owner | None
) -> None:
    clients = tuple(
        Client(name, RULES[state]) for name, state in ((b"a", behind), (b"b", ahead), (b"c", ahead))
    )
    states, twice = explore(World((None, None), clients, dirty=True), authority)
    assert twice is None, "\n".join(twice.trace)
    assert states > 100


@pytest.mark.parametrize("state", list(ShardState))
def test_a_lone_claim_is_never_refused(state: ShardState) -> None:
    """Whatever the copier and the mirrors do with it meanwhile."""
    world = World((None, None), (Client(b"a", RULES[state]),), dirty=True)
    authorities = COPYING[state]

    def refused(one: World) -> bool:
        return one.clients[0].accepted is False

    assert not any(find(world, authority, refused) for authority in authorities)


def test_a_claim_repeated_after_a_lost_answer_is_accepted_again() -> None:
    for one in RULES.values():
        world = World((b"a", b"a"), (Client(b"a", one),))
        assert not find(world, None, lambda one: one.clients[0].accepted is False)


def find(start: World, authority: Owner | None, wanted: Callable[[World], bool]) -> World | None:
    seen = {start}
    waiting = [start]
    while waiting:
        world = waiting.pop()
        if wanted(world):
            return world
        for after in successors(world, authority):
            if after not in seen:
                seen.add(after)
                waiting.append(after)
    return None


@dataclass(frozen=True)
class Turn(World):
    """A world in which the copier ends, and a client of the next state begins only then."""

    has_ended: bool = False


def explore_turn(start: Turn, authority: Owner, next_client: bytes) -> Turn | None:
    """Return a world in which two won, if any order of events leads to one."""
    seen = {start}
    waiting = [start]
    while waiting:
        world = waiting.pop()
        if sum(one.accepted is True for one in world.clients) > 1:
            return world
        for after in turn_successors(world, authority, next_client):
            if after not in seen:
                seen.add(after)
                waiting.append(after)
    return None


def turn_successors(world: Turn, authority: Owner, next_client: bytes) -> Iterable[Turn]:
    for after in successors(world, None if world.has_ended else authority):
        moved = {b.name for a, b in zip(world.clients, after.clients, strict=True) if a != b}
        if next_client in moved and not world.has_ended:
            continue
        turned = replace(world, clients=after.clients, shards=after.shards, copied=after.copied)
        # what changes after the copier has ended is nobody's to bring
        yield replace(turned, dirty=after.dirty and not world.has_ended, trace=after.trace)
    if not world.has_ended and not world.dirty and world.copied is None:
        yield replace(world, has_ended=True, trace=(*world.trace, "the copier ends"))


HELD = [(None, None), (None, b"s"), (b"s", None), (b"s", b"s")]


@pytest.mark.parametrize("shards", HELD)
@pytest.mark.parametrize(
    ("authority", "then"),
    [(Owner.OLD, ShardState.DUAL_READ_NEW), (Owner.NEW, ShardState.DUAL_READ_OLD)],
)
def test_what_the_copier_undid_before_it_ended_lets_nobody_win_afterwards(
    shards: Shards, authority: Owner, then: ShardState
) -> None:
    switching = rule(SWITCH, authority)
    clients = (Client(b"a", switching), Client(b"b", switching), Client(b"c", RULES[then]))
    twice = explore_turn(Turn(shards, clients, dirty=True), authority, b"c")
    assert twice is None, "\n".join(twice.trace)


def test_the_same_order_of_owners_both_ways_would_accept_an_id_twice() -> None:
    onward = rule(SWITCH, Owner.OLD)
    clients = (Client(b"a", onward), Client(b"c", RULES[ShardState.DUAL_READ_OLD]))
    assert explore_turn(Turn((None, None), clients, dirty=True), Owner.NEW, b"c") is not None


@pytest.mark.parametrize("shards", HELD)
@pytest.mark.parametrize("behind", [ShardState.DUAL_READ_NEW, SWITCH, ShardState.DUAL_READ_OLD])
def test_clients_on_their_way_back_never_both_accept(shards: Shards, behind: ShardState) -> None:
    back = rule(SWITCH, Owner.NEW)
    clients = tuple(
        Client(name, one)
        for name, one in ((b"a", rule(behind, Owner.NEW)), (b"b", back), (b"c", back))
    )
    authorities = {None, Owner.OLD} if behind is ShardState.DUAL_READ_OLD else {None, Owner.NEW}
    for authority in authorities:
        _, twice = explore(World(shards, clients, dirty=True), authority)
        assert twice is None, "\n".join(twice.trace)


def test_the_requirements_own_cutover_accepts_an_id_twice() -> None:
    """Dual writing ends and the ring changes in one rolling restart: mixed clients."""
    dual = Rule((Owner.OLD,), Owner.NEW, Owner.OLD, Owner.OLD)
    restarted = Rule((Owner.NEW,), None, Owner.NEW, None)
    clients = (Client(b"a", dual), Client(b"b", restarted))
    _, twice = explore(World((None, None), clients), Owner.OLD)
    assert twice is not None
    assert {one.accepted for one in twice.clients} == {True}


def test_a_copier_that_goes_on_past_switching_makes_an_id_accepted_twice() -> None:
    states = (SWITCH, ShardState.DUAL_READ_NEW)
    clients = tuple(
        Client(name, RULES[state]) for name, state in zip((b"a", b"b"), states, strict=True)
    )
    _, twice = explore(World((None, None), clients), Owner.OLD)
    assert twice is not None


def test_two_states_apart_is_too_far() -> None:
    for behind, ahead in zip(ORDER, ORDER[2:], strict=False):
        both = {*RULES[behind].claims} & {*RULES[ahead].claims}
        if not both:
            clients = (Client(b"a", RULES[behind]), Client(b"b", RULES[ahead]))
            assert explore(World((None, None), clients), None)[1] is not None


def test_without_one_order_for_all_two_claims_win_half_each() -> None:
    """Not accepted twice, but refused both: an id that nobody gets."""
    one, other = (Rule(order, None, None, None) for order in permutations())
    clients = (Client(b"a", one), Client(b"b", other))
    lost = find(
        World((None, None), clients), None, lambda w: all(c.accepted is False for c in w.clients)
    )
    assert lost is not None
    same = tuple(replace(client, rule=one) for client in clients)
    assert not find(
        World((None, None), same), None, lambda w: all(c.accepted is False for c in w.clients)
    )


def permutations() -> tuple[tuple[Owner, ...], tuple[Owner, ...]]:
    return (Owner.OLD, Owner.NEW), (Owner.NEW, Owner.OLD)


def test_values_have_one_authority_and_wait_between_the_two() -> None:
    for one, next_one in pairwise(ORDER):
        places = {RULES[one].values, RULES[next_one].values} - {None}
        assert len(places) <= 1
    assert RULES[ShardState.SWITCHING].values is None


def test_states_go_one_step_at_a_time() -> None:
    assert neighbours(ShardState.OLD) == (ShardState.DUAL_READ_OLD,)
    assert neighbours(ShardState.SWITCHING) == (
        ShardState.DUAL_READ_OLD,
        ShardState.DUAL_READ_NEW,
    )
