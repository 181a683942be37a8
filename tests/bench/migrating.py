"""The peer of every copy between two Redis servers: MIGRATE … COPY, in batches, pipelined."""

from __future__ import annotations

from collections.abc import Iterable

from cellferry.stores.redis.wire import Address, Command, Wire


def migrate(wire: Wire, to: Address, pages: Iterable[list[bytes]], batch: int) -> int:
    """Copy the keys of `pages` from the server of `wire`; returns how many.

    As `redis-cli --cluster` does, but with two batches under way, so that the server never waits
    for this client.

    Args:
        to: the destination, as the source reaches it.
        batch: keys in one MIGRATE. The source serves nobody else until the destination has
            answered for all of them.
    """
    login: Command = ("AUTH2", to.user or "default", to.password or "")
    head: Command = ("MIGRATE", to.host, to.port, "", to.database, 60_000, "COPY", "REPLACE")
    waiting: list[bytes] = []
    count = under_way = 0
    for page in pages:
        waiting += page
        while len(waiting) >= batch:
            wire.send([(*head, *login, "KEYS", *waiting[:batch])])
            waiting = waiting[batch:]
            count += batch
            under_way += 1
            if under_way > 1:
                wire.check(wire.receive(1)[0])
                under_way -= 1
    if waiting:
        wire.send([(*head, *login, "KEYS", *waiting)])
        count += len(waiting)
        under_way += 1
    for reply in wire.receive(under_way):
        wire.check(reply)
    return count
