"""Steps of a migration in a process of their own, that stop at a named phase.

`python -m tests.fault.step --control SOCKET --config cells.yaml` connects to the harness and forks
a process for each request, which is a JSON line::

    {"id": 7, "steps": ["cutover"], "migration": 3, "connections": {"cell-1-postgres": "…", …},
     "halt_at": "barrier: all stores frozen", "nth": 1, "give_up_at": null}

`reap` is a step, too; `expired_after_s` is for it. The child connects on its own, says who it is,
and at the n-th time it reaches the phase tells the harness and waits until it is told to go on.
Forking keeps a process cheap: the modules are there.
Every process dies with the harness.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from cellferry import phases, settings
from cellferry.errors import CellferryError, TransientError
from cellferry.migration import Context, steps
from cellferry.model import Actor
from cellferry.parent_process import end_with_parent
from cellferry.phases import Phase

ACTOR = Actor("kill matrix", role="system")
REASON = "the kill matrix wants it"


class Line:
    """A socket on which JSON lines go both ways."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._file = self._socket.makefile("rb")
        self._lock = threading.Lock()

    def say(self, **message: Any) -> None:
        with self._lock:
            self._socket.sendall(json.dumps(message, default=str).encode() + b"\n")

    def hear(self) -> Any:
        line = self._file.readline()
        if not line:
            os._exit(3)  # the harness is gone
        return json.loads(line)


class Stop:
    """The hook: stops at the n-th time that the step reaches a phase, once."""

    def __init__(self, line: Line, request: dict[str, Any]) -> None:
        self._line = line
        self._halt_at = request.get("halt_at")
        self._give_up_at = request.get("give_up_at")
        self._left = request.get("nth", 1)
        self._lock = threading.Lock()

    def __call__(self, phase: Phase) -> None:
        with self._lock:
            if phase == self._give_up_at:
                self._give_up_at = None
                raise TransientError("the test makes this attempt give up")
            if phase != self._halt_at:
                return
            self._left -= 1
            if self._left != 0:
                return
        self._line.say(event="at", phase=phase)
        self._line.hear()


def run(line: Line, config: Path, request: dict[str, Any]) -> None:
    """Do the request's steps one after the other; say how it ended."""
    loaded = settings.load(config)
    urls: dict[str, str] = request["connections"]
    if request.get("halt_at") or request.get("give_up_at"):
        phases.listen(Stop(line, request))
    try:
        with Context.from_settings(loaded, urls.get, actor=ACTOR) as context:
            said = [do(context, name, request) for name in request["steps"]]
    except CellferryError as error:
        line.say(
            event="end",
            error=type(error).__name__,
            text=str(error),
            transient=isinstance(error, TransientError),
        )
    except Exception as error:
        line.say(
            event="end",
            error=type(error).__name__,
            text=f"{error}\n{traceback.format_exc()}",
            transient=False,
            unexpected=True,
        )
    else:
        line.say(event="end", error=None, text="; ".join(filter(None, said)), transient=False)


def do(context: Context, name: str, request: dict[str, Any]) -> str:
    """Run one step by its name; return what is to be said of it, mostly nothing."""
    migration = request["migration"]
    match name:
        case "abort":
            steps.abort(context, migration, REASON)
        case "roll_back":
            steps.roll_back(context, migration, REASON)
        case "reap":
            found = steps.reap(context, expired_after_s=request["expired_after_s"])
            return ", ".join(f"{one.verb} {one.what} {one.cell}".strip() for one in found.deeds)
        case _:
            getattr(steps, name)(context, migration)
    return ""


def serve(control: str, config: Path) -> int:
    """Fork a process for each request until the harness is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    line = Line(control)
    server = os.getpid()
    line.say(hello="server", pid=server)
    while True:
        request = line.hear()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            end_with_parent(server)
            code = 1
            with contextlib.suppress(BaseException):
                own = Line(control)
                # Asked by the harness for its stack when it hangs.
                faulthandler.register(signal.SIGUSR1, all_threads=True)
                own.say(hello="step", id=request["id"], pid=os.getpid())
                run(own, config, request)
                code = 0
            sys.stdout.flush()
            os._exit(code)


def main() -> int:
    """Serve until the harness closes the socket."""
    parser = argparse.ArgumentParser(prog="tests.fault.step", description=__doc__)
    parser.add_argument("--control", required=True, help="the harness's Unix socket")
    parser.add_argument("--config", type=Path, required=True, help="cells.yaml")
    parser.add_argument("--sabotage", default=None, help="how to break the product first")
    arguments = parser.parse_args()
    # What steps import late is loaded before the forks.
    import cellferry.stores.postgres.store
    import cellferry.stores.redis.store  # noqa: F401

    if arguments.sabotage:
        from tests.fault.sabotage import SABOTAGE

        SABOTAGE[arguments.sabotage]()

    return serve(arguments.control, arguments.config)


if __name__ == "__main__":
    sys.exit(main())
