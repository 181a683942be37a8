"""Waiting for the clients of a set, and passing over those that are dead.

A client that is dead does not hold up a change for ever: it may act only for its lease after it
*sent* its last confirmation, on a clock of its own. A controller that has watched it for so long,
on its own clock, and has not seen another, takes its row away; a client without a row has to begin
anew. No clock of a server is compared with any other, and none may jump.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

import psycopg

from cellferry.model import Actor
from cellferry.shards import record
from cellferry.shards.clock import now_s
from cellferry.shards.record import RegisteredClient
from cellferry.topology.connection import Database

#: How often a controller looks who is still awaited, in seconds.
_LOOK_EVERY_S = 0.02


class RollCall:
    """What one controller has heard of clients, over all its waits."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._watched: dict[uuid.UUID, tuple[int, float]] = {}

    def wait_for(
        self,
        id_: int,
        is_awaited: Callable[[RegisteredClient], bool],
        what: str,
        timeout_s: float,
        while_waiting: Callable[[], None] | None,
    ) -> None:
        """Wait until no client is awaited any more; see `ShardControl.wait_acknowledged`.

        Args:
            what: what those who are awaited have not done, for the error.

        Raises:
            ClientsBehind: some were awaited after `timeout_s` seconds; names them.
        """

        def look(connection: psycopg.Connection[Any]) -> tuple[str, list[RegisteredClient]]:
            name = record.load(connection, id_).set_name
            return name, [one for one in record.clients(connection, name) if is_awaited(one)]

        begun = now_s()
        while True:
            name, found = self._database.run(look)
            looked = now_s()
            awaited = [one for one in found if not self._pass_over(id_, name, one, looked)]
            if not awaited:
                return
            if looked - begun >= timeout_s:
                raise record.clients_behind(name, awaited, f"{what} after {looked - begun:.1f} s")
            if while_waiting is not None:
                while_waiting()
            time.sleep(_LOOK_EVERY_S)

    def _pass_over(self, id_: int, name: str, client: RegisteredClient, looked: float) -> bool:
        """Take a client's row away if it was silent for its lease; whether it was."""
        beat, since = self._watched.get(client.session, (None, looked))
        if beat != client.beat:
            self._watched[client.session] = (client.beat, looked)
            return False
        if looked - since < client.lease_s:
            return False

        def work(connection: psycopg.Connection[Any]) -> bool:
            gone = connection.execute(
                "DELETE FROM topology.shard_client WHERE session = %s AND beat = %s RETURNING name",
                [client.session, client.beat],
            ).fetchone()
            if gone is None:  # it has spoken since, or has left
                return False
            record.note(
                connection,
                "client passed over",
                Actor("cellferry", role="system"),
                name,
                resharding=id_,
                epoch=client.acknowledged,
                reason=f"client {client.name} was silent for {looked - since:.1f} s,"
                f" its lease is {client.lease_s:g} s",
            )
            return True

        gone = self._database.run(work)
        if gone:
            del self._watched[client.session]
        return gone
