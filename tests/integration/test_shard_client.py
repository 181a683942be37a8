"""Clients follow a re-sharding: nothing is accepted twice, lost or counted twice."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import psycopg
import pytest

from cellferry.errors import InvalidInput, OutcomeUnknown
from cellferry.shards.client import Claim, ClaimUndecided, ShardedStore
from cellferry.shards.control import ShardControl
from cellferry.shards.membership import Unavailable
from cellferry.shards.postgres_server import QUERIES
from cellferry.shards.record import ClientsBehind
from cellferry.shards.states import ORDER, RULES, Owner, ShardState
from fixtures.postgres import FreshDatabases
from fixtures.severed_network import SeveredNetwork
from fixtures.shards import ACTOR, PREFIX, ClientProcess, ShardWorld, ring

MakeClient = Callable[..., ClientProcess]


@pytest.fixture
def store(shard_world: ShardWorld) -> Iterator[ShardedStore]:
    with shard_world.store() as one:
        yield one


def owner_of(id_: bytes, count: int) -> str:
    found = ring(count)
    return found.connections[found.owner(PREFIX + id_)]


# -- without a re-sharding


def test_ids_values_and_counters_live_where_the_set_places_them(
    store: ShardedStore, shard_world: ShardWorld
) -> None:
    first = store.claim(b"a", 60)
    assert first.accepted
    assert store.claim(b"a", 60) != first
    assert not store.claim(b"a", 60).accepted
    assert store.claim(b"a", 60, token=first.token) == first, "repeated"
    assert shard_world.where(b"a") == [owner_of(b"a", 3)]
    assert not store.release(b"a", b"somebody else's")
    assert store.release(b"a", first.token)
    assert store.claim(b"a", 60).accepted

    store.set(b"v", b"1", 60)
    assert store.get(b"v") == b"1"
    assert [store.increment(b"n", 2), store.increment(b"n", -1)] == [2, 1]
    assert shard_world.where(b"n") == [owner_of(b"n", 3)]
    assert store.delete(b"v")
    assert store.get(b"v") is None
    assert (store.state, store.epoch) == (None, 1)


def test_what_cannot_be_is_refused(shard_world: ShardWorld, store: ShardedStore) -> None:
    with pytest.raises(InvalidInput, match="no shard set 'other'"):
        ShardedStore(shard_world.url, "other", {}.get, client_name="c")
    with pytest.raises(InvalidInput, match="lease_s is 0"):
        shard_world.store(lease_s=0)
    with pytest.raises(InvalidInput, match="TTL is 0"):
        store.claim(b"a", 0)
    with pytest.raises(InvalidInput, match="token is empty"):
        store.claim(b"a", 1, token=b"")
    store.close()
    with pytest.raises(Unavailable, match="closed"):
        store.get(b"a")
    assert shard_world.control.clients("dedup") == [], "it has left"


def test_a_client_needs_no_more_than_two_functions(shard_world: ShardWorld) -> None:
    role = f"app_{os.getpid()}"
    with psycopg.connect(shard_world.url, autocommit=True) as connection:
        for statement in (
            f"CREATE ROLE {role} LOGIN PASSWORD 'p'",
            f"GRANT USAGE ON SCHEMA topology TO {role}",
            f"GRANT EXECUTE ON FUNCTION topology.confirm_shard_client TO {role}",
            f"GRANT EXECUTE ON FUNCTION topology.leave_shard_set TO {role}",
        ):
            connection.execute(statement.encode())
        url = psycopg.conninfo.make_conninfo(shard_world.url, user=role, password="p")
        try:
            with ShardedStore(url, "dedup", shard_world.urls.get, client_name="app") as store:
                assert store.claim(b"a", 60).accepted
        finally:
            connection.execute(f"DROP OWNED BY {role}".encode())
            connection.execute(f"DROP ROLE {role}".encode())


# -- through the states


def test_a_claim_is_won_where_each_state_says(store: ShardedStore, shard_world: ShardWorld) -> None:
    shard_world.begin()
    for state in ORDER:
        shard_world.go_until(state)
        [id_] = shard_world.moved_ids(1, start=1000 * ORDER.index(state))
        assert store.claim(id_, 60).accepted
        assert store.state is state
        rule = RULES[state]
        places = {Owner.OLD: owner_of(id_, 3), Owner.NEW: owner_of(id_, 4)}
        expected = {places[owner] for owner in (*rule.claims, *([rule.mirror] * bool(rule.mirror)))}
        assert set(shard_world.where(id_)) == expected, state
        assert not store.claim(id_, 60).accepted


def test_what_was_accepted_in_one_state_is_refused_in_the_others(
    store: ShardedStore, shard_world: ShardWorld
) -> None:
    shard_world.begin()
    taken: dict[bytes, Claim] = {}
    way = [*ORDER, *reversed(ORDER[:-1])]
    for number, state in enumerate(way):
        shard_world.go_until(state)
        for id_ in taken:
            assert not store.claim(id_, 60).accepted, (state, id_)
        for id_ in shard_world.moved_ids(5, start=1000 * number):
            taken[id_] = store.claim(id_, 60)
            assert taken[id_].accepted
    shard_world.finish("rolled_back")
    for id_, claim in taken.items():
        assert store.claim(id_, 60, token=claim.token).accepted, "each has kept its own"


@pytest.mark.parametrize("state", ORDER)
def test_what_is_given_back_is_free_for_others(
    store: ShardedStore, shard_world: ShardWorld, state: ShardState
) -> None:
    shard_world.begin()
    [early, late] = shard_world.moved_ids(2)
    before = store.claim(early, 60)
    shard_world.go_until(state)
    now = store.claim(late, 60)
    for id_, claim in ((early, before), (late, now)):
        assert store.release(id_, claim.token)
        assert not store.release(id_, claim.token)
        assert store.claim(id_, 60).accepted


def test_values_and_counters_come_along_both_ways(
    store: ShardedStore, shard_world: ShardWorld
) -> None:
    ids = shard_world.moved_ids(20)
    shard_world.begin()
    for number, state in enumerate((*ORDER, *reversed(ORDER[:-1]))):
        shard_world.go_until(state)
        if state is ShardState.SWITCHING:
            continue
        for id_ in ids:
            assert store.increment(id_) == 1 + number - (number > 2) - (number > 6), state


def test_values_wait_while_the_shards_switch(store: ShardedStore, shard_world: ShardWorld) -> None:
    [id_] = shard_world.moved_ids(1)
    shard_world.begin()
    store.increment(id_)
    shard_world.go_until(ShardState.SWITCHING)
    counted: list[int] = []
    waiting = threading.Thread(target=lambda: counted.append(store.increment(id_)))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    assert not counted
    shard_world.go(ShardState.DUAL_READ_NEW)
    waiting.join()
    assert counted == [2]
    assert shard_world.where(id_) == sorted({owner_of(id_, 3), owner_of(id_, 4)})


def test_values_do_not_wait_for_ever(shard_world: ShardWorld) -> None:
    [id_] = shard_world.moved_ids(1)
    with shard_world.store(patience_s=0.3) as store:
        shard_world.begin()
        shard_world.go_until(ShardState.SWITCHING)
        for operation in (store.increment, store.get, store.delete):
            with pytest.raises(Unavailable, match="wait for the shards to switch"):
                operation(id_)
        assert store.claim(id_ + b"x", 60).accepted, "claims do not wait"


def test_after_the_end_the_new_shards_are_the_set(
    store: ShardedStore, shard_world: ShardWorld
) -> None:
    [id_] = shard_world.moved_ids(1)
    shard_world.begin()
    shard_world.go_until(ShardState.NEW)
    shard_world.finish("completed")
    one = shard_world.begin(3)
    shard_world.control.wait_acknowledged(one.id, 30)
    assert store.claim(id_, 60).accepted
    assert shard_world.where(id_) == [owner_of(id_, 4)]
    with shard_world.store("another") as other:
        assert not other.claim(id_, 60).accepted


# -- clients that lag, sleep and die


def test_the_next_state_waits_for_what_is_under_way(
    shard_world: ShardWorld, store: ShardedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cellferry.shards import client as client_module

    reached, released = threading.Event(), threading.Event()
    real = client_module.open_shard

    def slow(*given: object) -> object:
        reached.set()
        assert released.wait(60)
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(client_module, "open_shard", slow)
    shard_world.control.wait_acknowledged(shard_world.begin().id, 30)
    claiming = threading.Thread(target=store.claim, args=(b"a", 60))
    claiming.start()
    assert reached.wait(30)
    shard_world.go(ShardState.DUAL_READ_OLD, acknowledged=False)
    with pytest.raises(ClientsBehind, match="client"):
        shard_world.go(ShardState.SWITCHING, timeout_s=0.5)
    assert store.state is ShardState.DUAL_READ_OLD, "what begins now follows the new state"
    released.set()
    claiming.join()
    shard_world.go(ShardState.SWITCHING)


def sleep_from_old_to_new(
    shard_world: ShardWorld,
    sleeper: ClientProcess,
    verb: str,
    *arguments: object,
    registers_first: bool = False,
) -> None:
    """Let a client fall asleep between its look at the state and what it sends, until `new`.

    With `registers_first` it sends that when it is a client again.
    """
    shard_world.begin()
    sleeper.do("sleep before", verb, 1, *([True] * registers_first))
    sleeper.ask(verb, *arguments)
    sleeper.wait_until_asleep()
    shard_world.go_until(ShardState.NEW)
    assert [one.name for one in shard_world.control.clients("dedup")] == ["awake"]


@pytest.mark.parametrize("registers_first", [False, True])
def test_a_claim_that_slept_through_the_change_accepts_nothing_twice(
    shard_world: ShardWorld, client_process: MakeClient, registers_first: bool
) -> None:
    sleeper = client_process("sleeper", lease_s=0.5)
    [id_] = shard_world.moved_ids(1)
    with shard_world.store("awake") as awake:
        sleep_from_old_to_new(
            shard_world, sleeper, "claim", id_, 60, registers_first=registers_first
        )
        assert awake.claim(id_, 60).accepted
        sleeper.wake()
        late = sleeper.answer()
        assert isinstance(late, Claim)
        assert not late.accepted
        assert shard_world.where(id_) == [owner_of(id_, 4)], "what it won too late is given back"
        assert sleeper.do("state") is ShardState.NEW


def test_a_claim_that_slept_is_not_refused_by_its_own_traces(
    shard_world: ShardWorld, client_process: MakeClient
) -> None:
    sleeper = client_process("sleeper", lease_s=0.5)
    [id_] = shard_world.moved_ids(1)
    with shard_world.store("awake") as awake:
        sleep_from_old_to_new(shard_world, sleeper, "claim", id_, 60)
        sleeper.wake()
        assert sleeper.answer().accepted
        assert not awake.claim(id_, 60).accepted


@pytest.mark.parametrize(("verb", "arguments"), [("increment", ()), ("set", (b"late",))])
def test_a_write_that_slept_says_so_and_does_not_count(
    shard_world: ShardWorld, client_process: MakeClient, verb: str, arguments: tuple[object, ...]
) -> None:
    sleeper = client_process("sleeper", lease_s=0.5)
    [id_] = shard_world.moved_ids(1)
    with shard_world.store("awake") as awake:
        awake.set(id_, b"7")
        sleep_from_old_to_new(shard_world, sleeper, verb, id_, *arguments)
        awake.increment(id_)
        sleeper.wake()
        assert sleeper.answer() == OutcomeUnknown.__name__
        assert awake.get(id_) == b"8"


def test_a_value_is_not_read_where_it_no_longer_counts(
    shard_world: ShardWorld, client_process: MakeClient
) -> None:
    sleeper = client_process("sleeper", lease_s=0.5)
    [id_] = shard_world.moved_ids(1)
    with shard_world.store("awake") as awake:
        awake.set(id_, b"7")
        sleep_from_old_to_new(shard_world, sleeper, "get", id_)
        awake.set(id_, b"8")
        sleeper.wake()
        assert sleeper.answer() == b"8"


def test_a_client_that_was_away_for_a_whole_re_sharding_does_not_act_on_the_old_ring(
    shard_world: ShardWorld, client_process: MakeClient
) -> None:
    sleeper = client_process("sleeper", lease_s=0.5)
    [id_] = shard_world.moved_ids(1)
    with shard_world.store("awake") as awake:
        sleep_from_old_to_new(shard_world, sleeper, "claim", id_, 60)
        shard_world.finish("completed")
        assert awake.claim(id_, 60).accepted
        sleeper.wake()
        assert not sleeper.answer().accepted
        assert sleeper.do("state") is None


def test_a_killed_client_holds_nothing_up_for_longer_than_its_lease(
    shard_world: ShardWorld, client_process: MakeClient
) -> None:
    doomed = client_process("doomed", lease_s=0.5)
    shard_world.begin()
    assert doomed.do("claim", b"a", 60).accepted
    doomed.end()
    shard_world.go_until(ShardState.NEW)
    assert shard_world.control.clients("dedup") == []


def test_clients_speak_up_when_they_are_asked_to(
    store: ShardedStore, shard_world: ShardWorld
) -> None:
    with shard_world.store("slow", lease_s=300):
        shard_world.control.wait_heard(shard_world.begin().id, 30)
        assert [one.name for one in shard_world.control.clients("dedup")] == ["client", "slow"]


def test_a_stale_copy_at_the_other_owner_costs_nobody_an_id(
    store: ShardedStore, shard_world: ShardWorld
) -> None:
    """While the shards switch, the copier has not brought over yet what was given back."""
    [held, freed] = shard_world.moved_ids(2)
    one = shard_world.begin()
    shard_world.go_until(ShardState.SWITCHING)
    with shard_world.shard(owner_of(freed, 4)) as new:
        new.set(PREFIX + freed, b"stale")
        claims: list[Claim] = []
        claiming = threading.Thread(target=lambda: claims.append(store.claim(freed, 60)))
        claiming.start()
        claiming.join(0.3)
        shard_world.bring_over(shard_world.control.resharding(one.id))
        claiming.join()
        assert claims[0].accepted

        new.set(PREFIX + held, b"stays")
        assert not store.claim(held, 60).accepted
        assert shard_world.where(held) == [owner_of(held, 4)], "what it had won is given back"


# -- the same order of events, for the protocol and for the runbook's cutover


def offered_during_a_rolling_restart(
    ids: list[bytes], before: ShardedStore, after: ShardedStore
) -> list[bytes]:
    """Offer each id first to a client that has heard of the change, then to one that has not."""
    return [id_ for id_ in ids if after.claim(id_, 60).accepted & before.claim(id_, 60).accepted]


def test_the_runbooks_cutover_accepts_ids_twice(shard_world: ShardWorld) -> None:
    """The ring changes and dual writing ends in one rolling restart: two sets, nobody waits."""
    after_restart = replace(ring(4), name="restarted")
    shard_world.control.register_set(after_restart, ACTOR)
    ids = shard_world.moved_ids(20)
    with (
        shard_world.store("before") as before,
        ShardedStore(
            shard_world.url, "restarted", shard_world.urls.get, client_name="after"
        ) as after,
    ):
        assert offered_during_a_rolling_restart(ids, before, after) == ids


def test_in_the_same_order_the_protocol_accepts_each_id_once(
    shard_world: ShardWorld, client_process: MakeClient
) -> None:
    """Whatever state the two are in, and with the later one a state behind."""
    shard_world.begin()
    with shard_world.store("before") as before, shard_world.store("after") as after:
        for number, state in enumerate(ORDER[1:]):
            ids = shard_world.moved_ids(20, start=1000 * number)
            going = threading.Thread(target=shard_world.go_until, args=(state,))
            going.start()
            assert offered_during_a_rolling_restart(ids, before, after) == []
            going.join()
            assert offered_during_a_rolling_restart(ids, before, after) == []


def test_many_clients_change_sides_and_back_under_load(shard_world: ShardWorld) -> None:
    """Claims, releases and counters of several clients, and the real followers."""
    ids = [b"id-%d" % number for number in range(100_000)]
    counters = shard_world.moved_ids(3, start=500_000)
    taken: dict[bytes, list[int]] = {}
    counted = [0] * 4
    refused: list[bytes] = []
    stopping = threading.Event()
    troubles: list[BaseException] = []

    def work(name: int, store: ShardedStore, position: list[int]) -> None:
        try:
            while not stopping.is_set():
                number = position[0]
                claim = store.claim(ids[number], 600)
                if claim.accepted:
                    taken.setdefault(ids[number], []).append(name)
                store.increment(counters[number % 3])
                counted[name] += 1
                own = b"own-%d-%d" % (name, number % 10)
                mine = store.claim(own, 600)
                if not mine.accepted:
                    refused.append(own)
                store.release(own, mine.token)
                position[0] += 1
        except BaseException as error:
            troubles.append(error)
            raise

    with ExitStack() as stack:
        stores = [stack.enter_context(shard_world.store(f"c{number}")) for number in range(4)]
        positions = [[0] for _ in stores]
        threads = [
            threading.Thread(target=work, args=(number, one, positions[number]))
            for number, one in enumerate(stores)
        ]
        for thread in threads:
            thread.start()
        shard_world.begin()
        for _ in range(2):
            shard_world.go_until(ShardState.DUAL_READ_OLD)
            shard_world.switch()
            shard_world.go(ShardState.NEW)
            shard_world.go(ShardState.DUAL_READ_NEW)
            shard_world.switch()
            shard_world.go(ShardState.OLD)
        stopping.set()
        for thread in threads:
            thread.join(60)
        assert not troubles
        assert max(position[0] for position in positions) > 50
        assert [id_ for id_, who in taken.items() if len(who) > 1] == []
        behind = min(position[0] for position in positions)
        assert [id_ for id_ in ids[:behind] if id_ not in taken] == [], "wrongly refused"
        assert refused == [], "given back, and refused all the same"
        total = sum(int(stores[0].get(one) or 0) for one in counters)
        assert total == sum(counted)


def test_shards_in_postgresql_are_followed_alike(
    fresh_databases: Callable[[], FreshDatabases], fresh_database: str
) -> None:
    one, two = fresh_databases(), fresh_databases()
    urls = {"dedup-0": one.source, "dedup-1": one.destination, "dedup-2": two.source}
    for url in urls.values():
        with psycopg.connect(url) as connection:
            connection.execute(QUERIES["table"])
    with ShardControl(fresh_database) as control:
        control.install()
        control.register_set(ring(2, "postgres"), ACTOR)
        world = ShardWorld(control, fresh_database, urls)
        with world.store() as store:
            claims = {b"id-%d" % number: store.claim(b"id-%d" % number, 60) for number in range(30)}
            assert all(claim.accepted for claim in claims.values())
            control.begin("dedup", ring(3, "postgres"), {}, ACTOR, ttl_s=0)
            for change in (
                lambda: world.go(ShardState.DUAL_READ_OLD),
                world.switch,
                lambda: world.go(ShardState.NEW),
                lambda: world.go(ShardState.DUAL_READ_NEW),
                world.switch,
                lambda: world.go(ShardState.OLD),
            ):
                change()
                counted = {store.increment(b"n-%d" % number) for number in range(30)}
                assert len(counted) == 1
                for id_, claim in claims.items():
                    assert not store.claim(id_, 60).accepted
                    assert store.claim(id_, 60, token=claim.token).accepted
            assert counted == {6}


# -- without the topology


def claim_one_after_another(store: ShardedStore, accepted: list[bytes], until: float) -> None:
    while time.monotonic() < until:
        id_ = b"id-%d" % len(accepted)
        assert store.claim(id_, 60).accepted
        accepted.append(id_)


def test_without_the_topology_a_client_acts_for_its_lease_and_no_longer(
    shard_world: ShardWorld, severed_network: Callable[[str], SeveredNetwork]
) -> None:
    network = severed_network(shard_world.url)
    with ShardedStore(
        network.url,
        "dedup",
        shard_world.urls.get,
        client_name="c",
        lease_s=2,
        patience_s=0.1,
    ) as store:
        network.go_down()
        began = time.monotonic()
        accepted: list[bytes] = []
        with pytest.raises(ClaimUndecided, match="not confirmed") as caught:
            claim_one_after_another(store, accepted, began + 60)
        assert time.monotonic() - began < 30
        assert accepted
        network.come_up()
        until = time.monotonic() + 30
        while True:
            try:
                again = store.claim(b"id-%d" % len(accepted), 60, token=caught.value.token)
            except Unavailable:
                assert time.monotonic() < until
            else:
                assert again.accepted
                break


def test_a_topology_that_lost_commits_is_not_followed(shard_world: ShardWorld) -> None:
    one = shard_world.begin()
    with shard_world.store(lease_s=0.5, patience_s=2) as store:
        shard_world.go_until(ShardState.DUAL_READ_OLD)
        assert store.claim(b"a", 60).accepted
        with psycopg.connect(shard_world.url) as connection:
            connection.execute("SET session_replication_role = replica")  # no triggers
            connection.execute("UPDATE topology.shard_set SET epoch = 2")
            connection.execute(
                "UPDATE topology.resharding SET epoch = 2, state = 'old' WHERE id = %s", [one.id]
            )
        until = time.monotonic() + 60
        while store._membership._trouble is None:  # it has heard of that
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(1)  # and its lease is over
        with pytest.raises(ClaimUndecided, match="before, it said dual_write_read_old at epoch 3"):
            store.claim(b"b", 60)


# -- processes and reports


def test_a_forked_process_is_a_client_of_its_own(
    shard_world: ShardWorld, store: ShardedStore
) -> None:
    assert store.claim(b"a", 60).accepted
    child = os.fork()
    if child == 0:
        status = 1
        try:
            refused = not store.claim(b"a", 60).accepted
            both = len(shard_world.control.clients("dedup")) == 2
            status = 0 if refused and both and store.claim(b"b", 60).accepted else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not store.claim(b"b", 60).accepted


def test_what_clients_saw_is_reported(shard_world: ShardWorld) -> None:
    with shard_world.store(lease_s=1) as store:
        for id_ in (b"a", b"a", b"b", b"a"):
            store.claim(id_, 60)
        store.get(b"none")
        until = time.monotonic() + 60
        # all of it may come in more than one report
        while (found := shard_world.control.figures("dedup")).claims < 4 or not found.reads:
            assert time.monotonic() < until
            time.sleep(0.05)
    assert (found.claims, found.hits, found.reads, found.found, found.failures) == (4, 2, 1, 0, 0)
    assert found.hit_ratio == 0.5
    assert found.error_rate == 0
    assert 0 < (found.quantile_s(0.95) or 0) <= found.longest_s
    assert shard_world.control.figures("dedup", epochs=(2, 9)).claims == 0
