"""The proxy does to connections what the matrix says it does."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from tests.fault.proxy import Proxy

from cellferry.local.ports import HOST


@pytest.fixture
def door() -> Iterator[socket.socket]:
    """Where a server listens."""
    with socket.create_server((HOST, 0)) as door:
        yield door


@pytest.fixture
def proxy(door: socket.socket) -> Iterator[Proxy]:
    made = Proxy(f"redis://user:secret@{HOST}:{door.getsockname()[1]}/0")
    yield made
    made.close()


def connect(proxy: Proxy, door: socket.socket) -> tuple[socket.socket, socket.socket]:
    client = socket.create_connection((HOST, int(proxy.url.rpartition(":")[2].split("/")[0])))
    server, _ = door.accept()
    for one in (client, server):
        one.settimeout(20)
    return client, server


def test_a_cut_resets_the_connection_and_lets_new_ones_pass(
    proxy: Proxy, door: socket.socket
) -> None:
    client, server = connect(proxy, door)
    client.sendall(b"one")
    assert server.recv(10) == b"one"
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        client.recv(10)
    client, server = connect(proxy, door)
    server.sendall(b"two")
    assert client.recv(10) == b"two"


def test_what_is_held_arrives_late(proxy: Proxy, door: socket.socket) -> None:
    client, server = connect(proxy, door)
    proxy.hold()
    client.sendall(b"late")
    server.settimeout(0.3)
    with pytest.raises(TimeoutError):
        server.recv(10)
    proxy.let_go()
    server.settimeout(20)
    assert server.recv(10) == b"late"


def test_a_lost_answer_was_asked_for(proxy: Proxy, door: socket.socket) -> None:
    client, server = connect(proxy, door)
    proxy.lose_answer()
    client.sendall(b"Q\x00\x00\x00\x0bCOMMIT\x00")
    assert b"COMMIT" in server.recv(100)
    server.sendall(b"done")
    assert client.recv(10) == b"", "the answer came through"
    assert proxy.cuts == 1


def test_the_client_hears_that_its_server_was_reset(proxy: Proxy, door: socket.socket) -> None:
    client, server = connect(proxy, door)
    client.sendall(b"never read")
    server.recv(1)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    server.close()
    assert client.recv(10) == b""
