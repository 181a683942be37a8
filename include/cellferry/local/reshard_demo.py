"""`make demo-reshard`: three shards become four while clients of the store go on.

Starts a topology and the shards, puts ids into them, lets client processes loose, and then types
what an operator types. In the end the checker, which shares no code with what moved the keys, reads
the clients' ledgers and every shard. Exit status 0 only when every number is as it should be.

Environment: `WAY=4-3` (from so many shards to so many), `KEYS`, `CLIENTS`, `IDS_PER_S`, `KILL=1`
(SIGKILL of the copier in the middle, and of a client in the middle of the cutover), `ROLL_BACK=1`
(back again after the cutover), `KEEP=1` (leave the folder).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import redis
from rich.console import Console
from rich.table import Table

from cellferry import settings
from cellferry.errors import CellferryError, InvalidInput
from cellferry.local import dedup_checker
from cellferry.local.dedup_checker import PREFIX, Seeds, Verdict
from cellferry.local.dedup_traffic import Spec, write_spec
from cellferry.local.postgres_server import DURABLE, PostgresServer
from cellferry.local.server_process import ServerProcess
from cellferry.local.valkey_server import ValkeyServer
from cellferry.local.wishes import is_set, whole_number
from cellferry.shards.control import ShardControl

SET = "dedup"
TOPOLOGY = "cellferry-topology"
COPY_KEYS_S = 20_000
"""Slow enough to be killed in the middle."""
STEP_WITHIN_S = 300.0
_LAST_CLIENT = 1
"""The client that is killed."""


@dataclass(frozen=True)
class Wishes:
    """What the person asked for on the command line of make."""

    before: int = 3
    after: int = 4
    keys: int = 300_000
    clients: int = 4
    ids_per_s: int = 150
    kill: bool = False
    roll_back: bool = False
    keep: bool = False
    calm_s: float = 3.0
    """How long the traffic goes on between the steps, seconds."""
    lease_s: float = 3.0
    """How long a client may stand still before what it does then is not confirmed, seconds."""
    brief: bool = False
    """One command, `run`, for all from the copy to the watch."""

    @classmethod
    def from_environment(cls) -> Wishes:
        """Read the environment.

        Raises:
            InvalidInput: a value is no number or out of bounds.
        """
        before, after = _way(os.environ.get("WAY", "") or "3-4")
        return cls(
            before=before,
            after=after,
            keys=whole_number("KEYS", cls.keys, 1_000, 20_000_000),
            clients=whole_number("CLIENTS", cls.clients, 2, 32),
            ids_per_s=whole_number("IDS_PER_S", cls.ids_per_s, 1, 5_000),
            kill=is_set("KILL"),
            roll_back=is_set("ROLL_BACK"),
            keep=is_set("KEEP"),
        )


def _way(text: str) -> tuple[int, int]:
    try:
        before, after = (int(part) for part in text.split("-"))
    except ValueError:
        raise InvalidInput(f"WAY={text} is no way", hint="write WAY=3-4 or WAY=4-3") from None
    if not (1 <= before <= 16 and 1 <= after <= 16 and before != after):
        raise InvalidInput(f"WAY={text} is out of bounds", hint="from 1 to 16 shards, not the same")
    return before, after


@dataclass
class Outcome:
    """Everything the last line and the JSON say."""

    before: int
    after: int
    verdict: Verdict = field(default_factory=Verdict)
    rolled_back: bool = False
    pause_s: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    """What the steps up to the cutover recorded."""
    faults: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        """The last line of the demo."""
        found = self.verdict
        share = found.moved / found.seeded if found.seeded else 0.0
        what = (
            f"re-sharded {self.before} → {self.after} and rolled back: {found.moved}"
            if self.rolled_back
            else f"re-sharded {self.before} → {self.after}: moved {found.moved}"
        )
        return (
            f"{what} of {found.seeded} keys ({share:.1%}); duplicates accepted"
            f" {found.duplicates}, ids wrongly refused {found.wrongly_refused}; mismatches"
            f" {found.mismatches}"
        )


class Demo:
    """Servers, clients and the operator's commands, in one folder."""

    def __init__(self, folder: Path, wishes: Wishes, console: Console, stack: ExitStack) -> None:
        self._folder = folder
        self._wishes = wishes
        self._console = console
        self._stack = stack
        self._started = time.monotonic()
        self._clients: dict[int, ServerProcess] = {}
        self._killed: set[int] = set()
        self._urls: dict[str, str] = {}
        self._outcome = Outcome(wishes.before, wishes.after)
        self._environment: dict[str, str] = {}

    def run(self) -> Outcome:
        """Go through everything."""
        wishes, outcome = self._wishes, self._outcome
        self._start_servers()
        seeds = Seeds(wishes.keys, round(time.time() * 1000))
        before, after = self._names(wishes.before), self._names(wishes.after)
        self._say(f"putting {wishes.keys:,} ids with TTLs of 1 h to 14 d into {len(before)} shards")
        dedup_checker.seed(seeds, self._urls, before)
        self._command("register", str(self._file("now", before)))
        self._start_clients()
        self._rest()
        self._re_shard(self._file("wanted", after))
        self._rest()
        self._stop_clients()
        self._say("clients stopped; the checker compares their ledgers with every shard")
        outcome.rolled_back = wishes.roll_back
        outcome.verdict = dedup_checker.check(
            sorted((self._folder / "ledgers").glob("*.jsonl")),
            seeds,
            shards=self._urls,
            before=after if wishes.roll_back else before,
            now=before if wishes.roll_back else after,
            is_clean=True,
        )
        self._judge()
        return outcome

    # --- the operator ------------------------------------------------------------------------

    def _re_shard(self, wanted: Path) -> None:
        wishes = self._wishes
        plan = self._folder / "plan.json"
        self._command("plan", str(wanted), "--output", str(plan), "--throttle", str(COPY_KEYS_S))
        self._command("begin", str(plan), "--ttl", "2s")
        if wishes.kill:
            self._kill_in_the_middle_of_the_copy()
        # A client less offers fewer ids again: that is no fault of the shards.
        watched = ("--hit-ratio-drop", "0.4") if wishes.kill else ()
        meanwhile = self._kill_a_client if wishes.kill else None
        if wishes.brief:
            self._command(
                *("run", str(wanted), "--yes", "--watch-for", f"{wishes.calm_s:g}s", *watched),
                meanwhile=meanwhile,
            )
            self._note_the_pause()
            self._rest()
            self._command("cleanup", SET, "--wait-ttl", "2s", "--delete-kept")
            self._command("report", SET)
            return
        self._command("copy", SET, "--throttle", str(COPY_KEYS_S))
        self._command("dual-write", SET)
        self._command("catch-up", SET)
        self._command("verify", SET)
        self._command("cutover", SET, "--dry-run")
        self._command("cutover", SET, meanwhile=meanwhile)
        self._note_the_pause()
        self._rest()
        if wishes.roll_back:
            self._command("roll-back", SET, "--reason", "the demo was asked to")
            self._rest()
            self._command("cleanup", SET)
        else:
            self._command("watch", SET, "--for", f"{wishes.calm_s:g}s", *watched)
            self._rest()
            self._command("cleanup", SET, "--wait-ttl", "2s", "--delete-kept")
        self._command("report", SET)

    def _command(
        self, *words: str, meanwhile: Callable[[subprocess.Popen[bytes]], None] | None = None
    ) -> None:
        """Type a command of `cellferry reshard`; what it prints is shown."""
        self._say(f"[bold]$ cellferry reshard {' '.join(self._short(word) for word in words)}[/]")
        begun = time.monotonic()
        process = self._launch(*words)
        try:
            if meanwhile is not None:
                meanwhile(process)
            printed, _ = process.communicate(timeout=STEP_WITHIN_S)
        except BaseException:
            process.kill()
            process.wait()
            raise
        self._outcome.seconds[words[0]] = round(time.monotonic() - begun, 2)
        for line in printed.decode().splitlines():
            self._console.print(f"          {line}", markup=False, soft_wrap=True)
        if process.returncode:
            raise CellferryError(f"`cellferry reshard {' '.join(words)}` failed")

    def _launch(self, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "cellferry.cli", "reshard", *words],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _kill_in_the_middle_of_the_copy(self) -> None:
        self._say(f"[bold]$ cellferry reshard copy {SET}[/]  (to be killed in the middle)")
        expected = json.loads((self._folder / "plan.json").read_text())["total_keys_to_move"]
        present = self._keys_at_new_owners()
        process = self._launch("copy", SET, "--throttle", str(COPY_KEYS_S))
        deadline = time.monotonic() + STEP_WITHIN_S
        while self._keys_at_new_owners() - present < expected * 0.4:
            if process.poll() is not None or time.monotonic() > deadline:
                raise CellferryError("the copy was over before it could be killed")
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        done = self._keys_at_new_owners() - present
        self._say(f"SIGKILL of the copier, with about {done:,} of {expected:,} keys copied")

    def _keys_at_new_owners(self) -> int:
        """Count what is at the shards that get keys: the added one, or all that stay."""
        before, after = self._names(self._wishes.before), self._names(self._wishes.after)
        names = [name for name in after if name not in before] or after
        total = 0
        for name in names:
            with redis.Redis.from_url(self._urls[name]) as client:
                total += int(client.dbsize())
        return total

    def _kill_a_client(self, process: subprocess.Popen[bytes]) -> None:
        url = settings.resolve(TOPOLOGY, settings.from_environment(self._environment))
        with ShardControl(url) as control:
            while (live := control.live(SET)) is None or live.step != "cutover":
                if process.poll() is not None:
                    raise CellferryError("the cutover was over before a client could be killed")
                time.sleep(0.02)
        time.sleep(0.2)
        self._clients[_LAST_CLIENT].kill()
        self._killed.add(_LAST_CLIENT)
        self._say(f"SIGKILL of client-{_LAST_CLIENT} in the middle of the cutover")

    def _note_the_pause(self) -> None:
        process = self._launch("status", SET, "--json")
        printed, _ = process.communicate(timeout=STEP_WITHIN_S)
        self._outcome.facts = json.loads(printed)["resharding"]["facts"]
        self._outcome.pause_s = self._outcome.facts["switched_to_new"]["pause_s"]

    # --- servers and clients -----------------------------------------------------------------

    def _start_servers(self) -> None:
        wishes = self._wishes
        names = self._names(max(wishes.before, wishes.after))
        self._say(f"starting the topology and {len(names)} Valkey servers")
        topology = PostgresServer(self._folder / "topology", settings=DURABLE, die_with_parent=True)
        self._stack.callback(topology.stop)
        topology.start()
        for name in names:
            server = ValkeyServer(
                self._folder / name, settings={"maxmemory": "1gb"}, die_with_parent=True
            )
            self._stack.callback(server.stop)
            self._urls[name] = server.start().url()
        connections = self._folder / "connections.yaml"
        connections.touch(mode=0o600)
        urls = {TOPOLOGY: topology.url(), **{f"{SET}-{name}": u for name, u in self._urls.items()}}
        connections.write_text("".join(f'{name}: "{url}"\n' for name, url in urls.items()))
        self._environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("CELLFERRY_")},
            "CELLFERRY_CONNECTIONS": str(connections),
            "CELLFERRY_CONFIG": str(self._folder / "cells.yaml"),  # there is none
            "COLUMNS": "160",
        }

    def _start_clients(self) -> None:
        wishes = self._wishes
        self._say(f"{wishes.clients} clients begin, {wishes.ids_per_s} new ids/s, each for several")
        begin = time.time() + 1.5
        for number in range(wishes.clients):
            spec = Spec(
                set_name=SET,
                topology=TOPOLOGY,
                ledger=str(self._folder / "ledgers" / f"client-{number}.jsonl"),
                number=number,
                clients=wishes.clients,
                ids_per_s=wishes.ids_per_s,
                seeded=wishes.keys,
                begin=begin,
                lease_s=wishes.lease_s,
            )
            path = self._folder / f"client-{number}.json"
            write_spec(spec, path)
            process = ServerProcess(
                f"client-{number}", self._folder / f"client-{number}.log", die_with_parent=True
            )
            self._stack.callback(process.kill)
            process.start(
                [sys.executable, "-m", "cellferry.local.dedup_traffic", path],
                cwd=self._folder,
                environment=self._environment,
            )
            self._clients[number] = process

    def _stop_clients(self) -> None:
        for number, client in self._clients.items():
            if number in self._killed:
                continue
            if not client.is_running:
                self._outcome.faults.append(f"client-{number} ended: {client.log_tail()}")
            client.stop((signal.SIGTERM, 30.0))

    # --- the end -----------------------------------------------------------------------------

    def _judge(self) -> None:
        found, outcome = self._outcome.verdict, self._outcome
        self._show(found)
        lost = len(self._killed)  # each may have left one operation without an answer
        for wrong, text in (
            (found.duplicates, f"{found.duplicates} ids were accepted twice"),
            (found.wrongly_refused, f"{found.wrongly_refused} ids were wrongly refused"),
            (found.mismatches, f"{found.mismatches} mismatches"),
            (found.left_behind, f"{found.left_behind} keys are at a shard that does not own them"),
            (found.unknown > lost, f"{found.unknown} operations failed: {dict(found.errors)}"),
            (found.undecided > lost, f"{found.undecided} ids are undecided"),
            (not found.moved, "nothing was moved"),
            (not found.accepted or not found.refused, "the clients did nothing"),
        ):
            if wrong:
                outcome.faults.append(text)
        outcome.faults.extend(found.examples)

    def _show(self, found: Verdict) -> None:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column()
        table.add_column(justify="right")
        for name, value in (
            ("operations of clients", f"{found.operations:,}"),
            ("claims", f"{found.offers:,}"),
            ("accepted", f"{found.accepted:,}"),
            ("refused", f"{found.refused:,}"),
            ("without an answer (of killed clients)", f"{found.unknown:,}"),
            ("values waited at most", f"{self._outcome.pause_s * 1000:,.0f} ms"),
        ):
            table.add_row(name, value)
        self._console.print(table)

    # --- small things ------------------------------------------------------------------------

    def _names(self, count: int) -> list[str]:
        return [f"shard-{number}" for number in range(count)]

    def _file(self, name: str, shards: Sequence[str]) -> Path:
        """Write the YAML of a set."""
        path = self._folder / f"{name}.yaml"
        lines = [f"name: {SET}", "kind: redis", f'key_prefix: "{PREFIX.decode()}"', "shards:"]
        lines += [f"  {shard}: {{connection: {SET}-{shard}}}" for shard in shards]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def _rest(self) -> None:
        time.sleep(self._wishes.calm_s)

    def _short(self, word: str) -> str:
        return word.removeprefix(f"{self._folder}/")

    def _say(self, text: str) -> None:
        seconds = time.monotonic() - self._started
        self._console.print(f"[dim]{seconds:6.1f} s[/]  {text}", soft_wrap=True)


def run(folder: Path, wishes: Wishes, console: Console) -> Outcome:
    """Run the demo in `folder`, which is emptied first.

    Raises:
        CellferryError: a step failed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        return Demo(folder.resolve(), wishes, console, stack).run()


def main() -> int:
    """Run the demo; return the exit status."""
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    folder = Path(".local") / "demo-reshard"
    try:
        wishes = Wishes.from_environment()
        outcome = run(folder, wishes, console)
    except CellferryError as error:
        console.print(f"[red]the demo failed:[/] {error}")
        return error.exit_code
    report = Path(".local") / "demo-reshard-report.json"
    report.write_text(json.dumps(_document(outcome, wishes), indent=2) + "\n", encoding="utf-8")
    if not wishes.keep and not outcome.faults:
        shutil.rmtree(folder, ignore_errors=True)
    for fault in outcome.faults:
        console.print("[red]not as it should be:[/]", end=" ")
        console.print(fault, markup=False)
    sys.stdout.flush()
    print(outcome.line)  # noqa: T201 - the line that scripts read
    return 1 if outcome.faults else 0


def _document(outcome: Outcome, wishes: Wishes) -> Mapping[str, Any]:
    return {
        "line": outcome.line,
        "ok": not outcome.faults,
        "wishes": asdict(wishes),
        "pause_ms": round(outcome.pause_s * 1000, 1),
        "seconds": outcome.seconds,
        "facts": outcome.facts,
        "verdict": asdict(outcome.verdict),
        "faults": outcome.faults,
    }


if __name__ == "__main__":
    sys.exit(main())
