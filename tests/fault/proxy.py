"""A small TCP proxy between the mover and one server: cuts connections, or lets nothing pass."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from urllib.parse import urlsplit, urlunsplit

from cellferry.local.ports import HOST

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_COMMIT = b"COMMIT\x00"


class Proxy:
    """Forwards connections to the server at `url`; `self.url` leads through it.

    Three things can be done to the connections: `cut` ends them with a reset, `hold` stops every
    byte until `let_go` (what was sent meanwhile arrives then, late, as after a healed network),
    `lose_answer` ends the next connection that commits after the server has got the commit and
    before its answer is back.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._server = (parts.hostname or HOST, parts.port or 0)
        self._door = socket.create_server((HOST, 0))
        netloc = f"{parts.netloc.rpartition('@')[0]}@{HOST}:{self._door.getsockname()[1]}"
        self.url = urlunsplit(parts._replace(netloc=netloc))
        self._passing = threading.Event()
        self._passing.set()
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._loses_answer = False
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Reset every connection; new ones pass."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            self._reset(*pair)

    def hold(self) -> None:
        """Let nothing pass, in neither direction; connections stay open, new ones hang."""
        self._passing.clear()

    def let_go(self) -> None:
        """Let everything pass again, what was held first."""
        self._passing.set()

    def lose_answer(self) -> None:
        """Cut the next connection that commits, when the server has the commit."""
        self._loses_answer = True

    def lose_no_answer(self) -> None:
        """Take `lose_answer` back, if nothing was lost yet."""
        self._loses_answer = False

    def heal(self) -> None:
        """Be a plain network again."""
        self.lose_no_answer()
        self.let_go()

    def close(self) -> None:
        """End the proxy and its connections."""
        with contextlib.suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()
        self.heal()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._door.accept()
            except OSError:
                return
            threading.Thread(target=self._open, args=(client,), daemon=True).start()

    def _open(self, client: socket.socket) -> None:
        self._passing.wait()
        try:
            server = socket.create_connection(self._server, timeout=10)
        except OSError:
            _reset(client)
            return
        server.settimeout(None)
        for one in (client, server):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pair = (client, server)
        with self._lock:
            self._pairs.append(pair)
        up = threading.Thread(target=self._forward, args=(*pair, True), daemon=True)
        up.start()
        self._forward(server, client, False)
        up.join()
        with self._lock:
            if pair in self._pairs:
                self._pairs.remove(pair)
        for one in pair:
            one.close()

    def _forward(self, source: socket.socket, target: socket.socket, is_client: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._passing.wait()
                if is_client and self._loses_answer and _COMMIT in data:
                    self._loses_answer = False
                    self.cuts += 1
                    # Nobody reads the answers any more; the server ends what it was sent first.
                    source.shutdown(socket.SHUT_WR)
                    target.sendall(data)
                    threading.Event().wait(0.2)
                    self._reset(source, target)
                    return
                target.sendall(data)
        # Also when the source was reset: whoever waits for it must hear that it is gone.
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def _reset(self, *sockets: socket.socket) -> None:
        for one in sockets:
            _reset(one)


def _reset(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RD)  # wakes the thread that reads it
    one.close()
