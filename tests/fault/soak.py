"""Organizations move to and fro for as long as you like, while faults strike at random.

`python -m tests.fault.soak --minutes 30 --seed 7`, or `make test-soak MINUTES=30 SEED=7`; see
docs/testing-faults.md. It goes in rounds. In a round each organization is moved there, rolled
back, aborted, paused and cleaned up after, under load, and faults strike; then they cease, what is
under way is driven to its end, the writers rest, and the checker compares the cells with what was
acknowledged since the beginning.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psycopg
from tests.fault import reaper
from tests.fault.journeys import Journey
from tests.fault.sabotage import SABOTAGE
from tests.fault.scenario import REAPED_S
from tests.fault.stepper import ROOT, Silent
from tests.fault.strikes import HOLE_S, Strikes, is_wrong
from tests.fault.world import CELLS, World, Writers, longest_gap

from cellferry.local.application import checker
from cellferry.local.application.ledger import Ledger
from cellferry.local.application.seeding import Seed
from cellferry.model import Organization, State

Say = Callable[[str], None]

#: How long an organization may be without a write: what a dead barrier may last until the reaper
#: has served it again, while the network to one place is down and servers come back.
NOT_WRITABLE_S = REAPED_S + 2 * HOLE_S[1]
ROUND_S = 120.0
#: One strike in so many seconds that nobody asked for; steps are struck at their phases besides.
EVERY_S = 6.0
#: How long a holder must have been silent, and the reaper's pause between two runs, seconds.
EXPIRED_AFTER_S, PERIOD_S = 6.0, 2.0
_CALM_S = 420.0
_ZOMBIES_S = 200.0
_SESSIONS = 2
_ROWS, _KEYS = 500, 40


@dataclass
class Outcome:
    """What came of a soak. All is well when `faults` is empty."""

    seed: int
    minutes: float
    seconds: float = 0.0
    rounds: int = 0
    moves: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    strikes: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    halts_cleared: dict[str, int] = field(default_factory=dict)
    reaped: dict[str, int] = field(default_factory=dict)
    acknowledged: int = 0
    lost: int = 0
    doubled: int = 0
    left_behind: int = 0
    not_writable_s: float = 0.0
    not_writable_since: str = ""
    faults: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all is as it should be."""
        return not self.faults

    def line(self) -> str:
        """The last line."""
        return (
            f"soak {self.minutes:g} min, seed {self.seed}: {self.moves} moves,"
            f" {sum(self.strikes.values())} faults; {self.lost} of {self.acknowledged:,}"
            f" acknowledged writes lost, {self.doubled} doubled; longest not writable"
            f" {self.not_writable_s:.0f} s; {self.left_behind} left behind"
        )

    def details(self) -> list[str]:
        """What happened, in numbers."""
        return [
            f"{name}: " + (", ".join(f"{count} {what}" for what, count in found.items()) or "none")
            for name, found in (
                ("moves", self.ends),
                ("faults", self.strikes),
                ("the reaper", self.reaped),
                ("steps that ended with an error and were tried again", self.errors),
                ("halts that a person cleared", self.halts_cleared),
            )
        ]


class Reaper:
    """Runs the reaper as a supervisor does, in processes that may be struck."""

    def __init__(self, strikes: Strikes, seed: int, say: Say) -> None:
        self.deeds: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._strikes = strikes
        self._chance = random.Random(f"{seed} reaper")
        self._say = say

    def run(self, enough: threading.Event) -> None:
        """Reap every few seconds until `enough` is set."""
        try:
            while not enough.wait(PERIOD_S):
                self._reap()
        except Exception as error:
            self.wrong.append(f"the reaper: {type(error).__name__}: {error}")

    def _reap(self) -> None:
        running = self._strikes.start(
            "reap",
            0,
            through_proxies=self._chance.random() < 0.5 and not self._strikes.is_calm,
            expired_after_s=EXPIRED_AFTER_S,
        )
        patience = self._chance.uniform(1, 10)
        ends = time.monotonic() + 150
        while running.process.ended is None:
            try:
                running.process.wait_end(0.2)
            except Silent:
                now = time.monotonic()
                since = running.suspect_since
                if since is not None and now > since + patience:
                    self._strikes.leave_alone(running)
                    return
                if now > ends:
                    self._say(f"the reaper hangs here:\n{running.process.stack()}")
                    raise
        ended = running.process.ended
        self._strikes.forget(running)
        if is_wrong(ended):
            self.wrong.append(f"the reaper ended with {ended}")
        if ended.ok:
            for deed in filter(None, ended.text.split(", ")):
                self.deeds[" ".join(deed.split()[:2])] += 1
        if ended.text:
            self._say(f"reaper: {ended}")


class Soak:
    """One run. Made, run and closed by one thread.

    Args:
        seed: of everything that is left to chance.
        minutes: how long, the checks included; a round that has begun ends.
        organizations: how many move. They share users, and two neighbours never move.
        say: told a line a minute.
        log: gets everything.
        sabotage: how the product is broken on purpose, if it is.
        stop: ends it early, with its checks.
    """

    def __init__(
        self,
        seed: int,
        minutes: float,
        *,
        organizations: int = 4,
        every_s: float = EVERY_S,
        say: Say = lambda _text: None,
        log: Path | None = None,
        sabotage: str | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self.outcome = Outcome(seed, minutes)
        self._tell_all = say
        self._stop = stop or threading.Event()
        self._begun = time.monotonic()
        self._stack = ExitStack()
        self._log = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            self._log = self._stack.enter_context(log.open("w", encoding="utf-8"))
        self._last: list[str] = []
        self.world = World(sabotage=sabotage, with_casts=False)
        self._stack.callback(self.world.close)
        self._moving, self._neighbours = self._settle(organizations)
        self._before = self.world.traces()
        self._strikes = Strikes(self.world, seed, every_s, self._note)
        self._reaper = Reaper(self._strikes, seed, self._note)
        self._journeys = [
            Journey(self.world, self._strikes, one, seed, self._note) for one in self._moving
        ]
        self._writers = Writers(self.world.directory / "ledger" / "soak.jsonl")
        self._checked_at = 0.0

    def close(self) -> None:
        """End every process, delete everything but the log."""
        self._stack.close()

    def run(self) -> Outcome:
        """Go through the rounds; stops at the first that is not well."""
        outcome = self.outcome
        parts = [(one, _SESSIONS) for one in self._moving] + [(one, 1) for one in self._neighbours]
        self._begun = time.monotonic()
        try:
            since = time.time()
            self._writers.start(self.world, parts, outcome.seed)
            ends = self._begun + outcome.minutes * 60
            while not outcome.faults and not self._stop.is_set():
                left = ends - time.monotonic()
                if outcome.rounds and left < 20:
                    break
                outcome.rounds += 1
                self._round(min(ROUND_S, max(left, 5)), since)
                since = time.time()
                if not outcome.faults:
                    self._writers.go()
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")
        finally:
            self.world.heal()
            self._writers.stop()
            for failure in self._writers.failures:
                self._fail(f"a writer failed: {failure}")
            outcome.seconds = round(time.monotonic() - self._begun, 1)
            self._count()
        return outcome

    # --- one round -----------------------------------------------------------------------------

    def _round(self, seconds: float, since: float) -> None:
        enough, no_reaper = threading.Event(), threading.Event()
        threads = [
            threading.Thread(target=one.run, args=(enough,), daemon=True) for one in self._journeys
        ]
        reaps = threading.Thread(target=self._reaper.run, args=(no_reaper,), daemon=True)
        for thread in (*threads, reaps):
            thread.start()
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0 and not self._stop.is_set():
            self._strikes.work(min(left, 0.5))
            self._speak()
            if any(one.wrong for one in self._journeys) or self._reaper.wrong:
                break
        self._note("the faults cease")
        enough.set()
        self._strikes.make_calm()
        deadline = time.monotonic() + _CALM_S
        while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
            self._strikes.work(0.5, calm=True)
            self._speak()
        self._strikes.work(0.1, calm=True)
        for one, thread in zip(self._journeys, threads, strict=True):
            if thread.is_alive():
                self._fail(f"organization {one.organization.id} does not come to an end")
            for text in one.wrong:
                self._fail(text)
        for text in self._strikes.wait_for_zombies(_ZOMBIES_S):
            self._fail(text)
        no_reaper.set()
        reaps.join(200)
        for text in self._reaper.wrong:
            self._fail(text)
        self._judge(since)

    def _judge(self, since: float) -> None:
        """Compare everything with what was acknowledged since the beginning."""
        try:
            self._writers.wait_for_writes(3)
        except (TimeoutError, RuntimeError) as error:
            self._fail(f"{error}")
        for _ in range(3):
            if not reaper.act(self.world, self._note).deeds:
                break
        self._writers.rest()
        stopped = time.time()
        self._look_for_leftovers()
        ledger = self._writers.ledger()
        history = checker.read_history(self.world.connections["cellferry-topology"])
        checked = checker.check(ledger, self.world.places, history, self._baseline)
        outcome = self.outcome
        outcome.acknowledged = checked.acknowledged
        outcome.lost, outcome.doubled = checked.lost, checked.doubled
        for text in checked.faults:
            self._fail(text)
        recent = Ledger([one for one in ledger.operations if one.wall + one.seconds >= since])
        for one in (*self._moving, *self._neighbours):
            gap, began = longest_gap(recent, one.id, stopped, since)
            if gap > outcome.not_writable_s:
                outcome.not_writable_s = round(gap, 2)
                outcome.not_writable_since = f"organization {one.id} from {began} on"
            if gap > NOT_WRITABLE_S:
                self._fail(
                    f"organization {one.id} was not writable for {gap:.1f} s of"
                    f" {NOT_WRITABLE_S:.0f} s allowed, from {began} on"
                )
        self._checked_at = time.monotonic() - self._begun
        self._note(
            f"round {outcome.rounds}: {checked.acknowledged:,} acknowledged,"
            f" {checked.unknown} unknown, {checked.refused} refused; {checked.lost} lost,"
            f" {checked.doubled} doubled; checked in {checked.seconds:.1f} s"
        )

    def _look_for_leftovers(self) -> None:
        left = sorted(self.world.traces() - self._before)
        with self.world.context() as context:
            for journey in self._journeys:
                for number in journey.migrations:
                    left += [f"topology: {one}" for one in context.topology.live_resources(number)]
            for halt in context.topology.halts():
                left.append(f"topology: {halt.what} is halted: {halt.reason}")
        self.outcome.left_behind += len(left)
        for one in left[:8]:
            self._fail(f"left behind: {one}")

    # --- the organizations ---------------------------------------------------------------------

    def _settle(self, count: int) -> tuple[list[Organization], list[Organization]]:
        """Make them, in both cells by turns; users of several organizations among them."""
        moving = [Organization(str(1001 + n), f"moving-{1001 + n}") for n in range(count)]
        neighbours = [Organization(str(1101 + n), f"neighbour-{1101 + n}") for n in (0, 1)]
        still = [Organization(str(901 + n), f"still-{901 + n}") for n in (0, 1)]
        seeds = [
            Seed(one, CELLS[n % 2], *((_ROWS, _KEYS) if group is moving else (60, 12)))
            for group in (moving, neighbours, still)
            for n, one in enumerate(group)
        ]
        self.world.settle(seeds)
        self._share(seeds, {one.id for one in (*moving, *neighbours)})
        self._baseline = checker.take_baseline(
            self.world.places, {seed.organization.id: seed.cell for seed in seeds}
        )
        return moving, neighbours

    def _share(self, seeds: Sequence[Seed], sharing: set[str]) -> None:
        """Let the organizations of a cell share users that only that cell has."""
        for number, cell in enumerate(CELLS, start=1):
            with psycopg.connect(self.world.places[cell].postgres) as connection:
                connection.execute("SET session_replication_role = replica")
                connection.execute(
                    "INSERT INTO users (id, email, name, created_at)"
                    " SELECT -(%(first)s + n), format('shared-%%s@example.test', %(first)s + n),"
                    " format('Shared %%s', %(first)s + n), '2025-01-01 Z'"
                    " FROM generate_series(1, 5) AS n",
                    {"first": 1000 * number},
                )
                for seed in seeds:
                    if seed.cell == cell and seed.organization.id in sharing:
                        connection.execute(
                            "INSERT INTO memberships (organization_id, user_id, access_level)"
                            " SELECT %s, -(%s + n), 20 FROM generate_series(1, 5) AS n",
                            (seed.organization.id, 1000 * number),
                        )

    # --- words ---------------------------------------------------------------------------------

    def _count(self) -> None:
        outcome = self.outcome
        ends: Counter[State] = Counter()
        errors: Counter[str] = Counter()
        cleared: Counter[str] = Counter()
        for journey in self._journeys:
            ends += journey.ends
            errors += journey.errors
            cleared += journey.cleared
        outcome.ends = {str(state): count for state, count in ends.most_common()}
        outcome.moves = sum(ends.values())
        outcome.errors = dict(errors.most_common())
        outcome.halts_cleared = dict(cleared)
        outcome.strikes = dict(self._strikes.counts.most_common())
        outcome.reaped = dict(self._reaper.deeds.most_common())

    _spoken = 0

    def _speak(self) -> None:
        """A line a minute."""
        minute = int((time.monotonic() - self._begun) / 60)
        if minute <= self._spoken:
            return
        self._spoken = minute
        self._count()
        outcome = self.outcome
        written = sum(one.tally.acknowledged for one in self._writers.sessions)
        ends = ", ".join(f"{count} {state}" for state, count in outcome.ends.items())
        self._tell_all(
            f"minute {minute}: {outcome.moves} moves ({ends or 'none over yet'}),"
            f" {sum(outcome.strikes.values())} faults, {written:,} acknowledged writes; "
            + (
                f"{outcome.lost} lost, {outcome.doubled} doubled,"
                f" {outcome.left_behind} left behind when checked at {self._checked_at / 60:.1f}"
                f" min; longest not writable {outcome.not_writable_s:.0f} s"
                if self._checked_at
                else "not checked yet"
            )
        )

    def _note(self, text: str) -> None:
        line = (
            f"{time.strftime('%H:%M:%S', time.gmtime())} +{time.monotonic() - self._begun:7.2f} s"
            f"  {text}"
        )
        if self._log is not None and not self._log.closed:
            self._log.write(line + "\n")
            self._log.flush()

    def _fail(self, text: str) -> None:
        self.outcome.faults.append(text)
        self._note(f"FAULT: {text}")


def soak(seed: int, minutes: float, **options: object) -> Outcome:
    """Soak once; see `Soak`."""
    one = Soak(seed, minutes, **options)  # type: ignore[arg-type]
    try:
        return one.run()
    finally:
        one.close()


def main() -> int:
    """Soak; 0 when all is well."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fault.soak", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="how long, checks included")
    parser.add_argument("--seed", type=int, default=None, help="of everything left to chance")
    parser.add_argument("--organizations", type=int, default=4, help="that move")
    parser.add_argument(
        "--every", type=float, default=EVERY_S, help="seconds between two faults, on average"
    )
    parser.add_argument("--sabotage", choices=list(SABOTAGE), help="break the product on purpose")
    parser.add_argument("--output", type=Path, default=ROOT / ".local/fault-soak.json")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    log = arguments.output.with_suffix(".log")
    # Route clients say that the topology is away; in a soak it often is.
    logging.getLogger("cellferry").addHandler(logging.NullHandler())
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    print(
        f"soak: {arguments.minutes:g} min, seed {seed}, {arguments.organizations} organizations"
        f" that move; everything is told in {log}",
        flush=True,
    )
    outcome = soak(
        seed,
        arguments.minutes,
        organizations=arguments.organizations,
        every_s=arguments.every,
        say=lambda text: print(text, flush=True),
        log=log,
        sabotage=arguments.sabotage,
        stop=stop,
    )
    arguments.output.write_text(
        json.dumps({**asdict(outcome), "ok": outcome.ok}, indent=1), encoding="utf-8"
    )
    print("\n".join(outcome.details()))
    for text in outcome.faults:
        print(f"fault: {text}")
    if not outcome.ok:
        print(f"again: make test-soak MINUTES={arguments.minutes:g} SEED={seed}")
    print(outcome.line())
    return 0 if outcome.ok else 1


if __name__ == "__main__":
    sys.exit(main())
