"""Two cells, a topology and the sample application, on servers that may be killed.

Servers stay from scenario to scenario; each scenario gets organizations of its own: one that
moves, one that stays beside it and is written to, and it shares two that nobody ever touches.
"""

from __future__ import annotations

import contextlib
import json
import random
import resource
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psutil
import psycopg
import redis
from psycopg import sql
from tests.fault.proxy import Proxy
from tests.fault.step import ACTOR
from tests.fault.stepper import ROOT, Stepper

from cellferry import settings
from cellferry.local.application import checker, seeding
from cellferry.local.application.checker import Baseline, Checked
from cellferry.local.application.keyspace import Keyspace
from cellferry.local.application.ledger import Ledger, LedgerWriter, Outcome, read_ledger
from cellferry.local.application.places import places
from cellferry.local.application.provisioning import provision, provision_organizations
from cellferry.local.application.relational import Relational
from cellferry.local.application.seeding import Seed
from cellferry.local.application.session import Session
from cellferry.local.application.traffic import Writer
from cellferry.local.postgres_server import FAST, PostgresServer
from cellferry.local.privileges import popen_arguments, service_account
from cellferry.local.valkey_server import ValkeyServer
from cellferry.migration import Context, MoveOptions, steps
from cellferry.model import Organization
from cellferry.routing import RouteClient

CELLS = ("cell-1", "cell-2")
MOVER_PASSWORD = "mover"  # of servers that live for one run
#: Sound against the death of processes, which is what the matrix does to them: every commit is
#: with the operating system before it is acknowledged. A crash of the machine is not in it.
POSTGRES = {**FAST, "synchronous_commit": "on"}
#: `always`, so that what Valkey acknowledged is exact (hazard 15).
VALKEY = {"appendfsync": "always"}

_BATCH = 8
_ROWS, _KEYS = 500, 40
_SESSIONS, _WRITES_PER_S = 3, 36.0
_FULL_FROM = 16 * 1024 * 1024
"""A "full" file system refuses to let a file grow beyond this: the size of a file of WAL."""


@dataclass
class Cast:
    """The organizations of one scenario, with what they held before."""

    moved: Organization
    neighbour: Organization
    baseline: Baseline

    @property
    def parts(self) -> tuple[tuple[Organization, int], ...]:
        """Who writes, and in how many sessions."""
        return (self.moved, _SESSIONS), (self.neighbour, 1)


@dataclass
class Writers:
    """Threads that write to organizations until they are stopped."""

    path: Path
    sessions: list[Session] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _writers: list[Writer] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _ledger: LedgerWriter | None = None

    def start(self, world: World, parts: Sequence[tuple[Organization, int]], seed: int) -> None:
        """Start so many sessions for each organization; returns when all take writes."""
        self._ledger = LedgerWriter(self.path)
        for organization, sessions in parts:
            for slot in range(sessions):
                session = Session(
                    f"w{seed}-{organization.id}-{slot}",
                    organization.id,
                    world.router,
                    {
                        name: (place.app_postgres, place.app_redis(organization.id))
                        for name, place in world.places.items()
                    },
                    self._ledger,
                    random.Random(f"{seed} {organization.id} {slot}"),
                )
                self.sessions.append(session)
                self._writers.append(
                    Writer(session, Relational(session, slot, sessions, 1), Keyspace(session))
                )
        self.go()

    def go(self) -> None:
        """Let them write, again after a `rest`; returns when all organizations take writes."""
        self._stop.clear()
        self._threads = [
            threading.Thread(
                target=self._run, args=(writer, _WRITES_PER_S / _SESSIONS), daemon=True
            )
            for writer in self._writers
        ]
        for thread in self._threads:
            thread.start()
        self.wait_for_writes(2)

    def rest(self) -> None:
        """Let each end its operation in flight and begin no other."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def wait_for_writes(self, more: int, seconds: float = 60.0) -> None:
        """Wait until every session has had `more` further writes acknowledged.

        Raises:
            TimeoutError: one has not.
        """
        wanted = {one.name: one.tally.acknowledged + more for one in self.sessions}
        deadline = time.monotonic() + seconds
        while silent := [s for s in self.sessions if s.tally.acknowledged < wanted[s.name]]:
            if self.failures:
                raise RuntimeError(f"a writer failed: {self.failures[0]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{silent[0].name} wrote nothing for {seconds:.0f} s")
            time.sleep(0.02)

    def stop(self) -> None:
        """Let each end its operation in flight, for good."""
        self.rest()
        for session in self.sessions:
            session.close()
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def ledger(self) -> Ledger:
        """What they recorded."""
        return read_ledger([self.path])

    def _run(self, writer: Writer, rate: float) -> None:
        try:
            writer.run(rate, self._stop)
        except Exception as error:
            self.failures.append(f"{writer.session.name}: {type(error).__name__}: {error}")


def longest_gap(
    ledger: Ledger, organization: str, until: float, since: float = 0.0
) -> tuple[float, str]:
    """Return the longest time without an acknowledged write of an organization, and when it began.

    In each store by itself: an organization that can write only half of what it is, cannot work.
    Seconds; the beginning is the wall clock's time of day. `until` is when the writers were
    stopped, in seconds since 1970: an organization that never came back is found, too. Only what
    was acknowledged after `since` counts.
    """
    longest, began = 0.0, 0.0
    for store in ("postgres", "redis"):
        acknowledged = sorted(
            at
            for one in ledger.of(organization)
            if one.store == store and one.outcome is Outcome.ACKNOWLEDGED and not one.is_read
            if since <= (at := one.wall + one.seconds) <= until
        )
        if since:
            acknowledged.insert(0, since)
        ends = [*acknowledged[1:], until]
        for earlier, later in zip(acknowledged, ends, strict=False):
            if later - earlier > longest:
                longest, began = later - earlier, earlier
    return longest, time.strftime("%H:%M:%S", time.gmtime(began))


class World:
    """Everything that the scenarios of one worker share. Use it in one thread: servers end with it.

    Args:
        directory: for data and logs; deleted when it closes.
        sabotage: how the product is broken on purpose, if it is.
        standby_of: the cell whose PostgreSQL gets a synchronous standby, or `topology`; to fail
            over to once. There are no proxies then.
        with_casts: make organizations for scenarios.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        sabotage: str | None = None,
        standby_of: str | None = None,
        with_casts: bool = True,
    ) -> None:
        self._sabotage = sabotage
        self._with_casts = with_casts
        self._standby_of = standby_of
        self._standby: PostgresServer | None = None
        self.directory = directory or Path(tempfile.mkdtemp(prefix="cellferry-fault-"))
        self.directory.mkdir(parents=True, exist_ok=True)
        self._stack = ExitStack()
        self._casts: list[Cast] = []
        self._next_organization = 1001
        self._full: set[str] = set()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End every process, delete everything."""
        self._stack.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _start(self) -> None:
        self.postgres: dict[str, PostgresServer] = {}
        self.valkey: dict[str, ValkeyServer] = {}
        for name in ("topology", *CELLS):
            server = PostgresServer(
                self.directory / f"{name}-postgres", settings=POSTGRES, die_with_parent=True
            )
            self._stack.callback(server.remove)
            self.postgres[name] = server.start()
        for name in CELLS:
            valkey = ValkeyServer(
                self.directory / f"{name}-valkey", settings=VALKEY, die_with_parent=True
            )
            self._stack.callback(valkey.remove)
            self.valkey[name] = valkey.start()
        self._make_databases()
        if self._standby_of is not None:
            self._follow(self._standby_of)
        self.connections = self._urls()
        self.proxies = {name: Proxy(url) for name, url in self._proxied().items()}
        for proxy in self.proxies.values():
            self._stack.callback(proxy.close)
        self.config = self.directory / "cells.yaml"
        self.config.write_text(json.dumps(deployment()), encoding="utf-8")
        self.settings = settings.load(self.config)
        self.places = places(CELLS, self.connections.get, self.directory / "app")
        with self.context() as context:
            context.topology.install()
            for place in self.places.values():
                provision(place)
            for cell in CELLS:
                steps.prepare_cell(context, cell)
        self.router = RouteClient(
            self.connections["cellferry-topology"], application="sample", ttl_s=1.0
        )
        self._stack.callback(self.router.close)
        self.stepper = Stepper(self.directory, self.config, self._sabotage)
        self._stack.callback(self.stepper.close)
        self._still: dict[str, str] = {}
        if self._with_casts:
            self._make_casts(still=True)
            self._pad()

    def _make_databases(self) -> None:
        for cell in CELLS:
            with psycopg.connect(self.postgres[cell].url(), autocommit=True) as connection:
                connection.execute("CREATE DATABASE app")
                connection.execute(
                    sql.SQL("CREATE ROLE mover LOGIN PASSWORD {}").format(
                        sql.Literal(MOVER_PASSWORD)
                    )
                )

    def _follow(self, place: str) -> None:
        primary = self.postgres[place]
        standby = PostgresServer(
            self.directory / f"{place}-standby", settings=POSTGRES, die_with_parent=True
        )
        self._stack.callback(standby.remove)
        standby.follow(primary, "standby-1")
        with psycopg.connect(primary.url(), autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET synchronous_standby_names = '\"standby-1\"'")
            connection.execute("SELECT pg_reload_conf()")
            deadline = time.monotonic() + 30
            while not connection.execute(
                "SELECT FROM pg_stat_replication WHERE sync_state = 'sync'"
            ).fetchall():
                if time.monotonic() > deadline:
                    raise RuntimeError("the standby does not stream")
                time.sleep(0.02)
        self._standby = standby

    def fail_over(self) -> None:
        """Kill the PostgreSQL that has a standby for good and promote the standby. Once."""
        if self._standby is None or self._standby_of is None:
            raise RuntimeError("this world has no standby any more")
        self.postgres[self._standby_of].kill()
        self._standby.promote()
        with psycopg.connect(self._standby.url(), autocommit=True) as connection:
            # It has no standby of its own: its commits must not wait for one.
            connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
            connection.execute("SELECT pg_reload_conf()")
        self.postgres[self._standby_of], self._standby = self._standby, None

    def _urls(self) -> dict[str, str]:
        urls = {"cellferry-topology": self._found_by_libpq("topology", {})}
        for cell in CELLS:
            urls[f"{cell}-postgres-admin"] = self._found_by_libpq(cell, {"dbname": "app"})
            urls[f"{cell}-postgres"] = self._found_by_libpq(
                cell, {"user": "mover", "password": MOVER_PASSWORD, "dbname": "app"}
            )
            urls[f"{cell}-redis"] = urls[f"{cell}-redis-admin"] = self.valkey[cell].url()
        return urls

    def _found_by_libpq(self, place: str, parameters: Mapping[str, str]) -> str:
        """Return the URL of a server; with a standby, of whichever of the two takes writes."""
        url = self.postgres[place].url(**parameters)
        if self._standby is None or place != self._standby_of:
            return url
        parts = urlsplit(url)
        return urlunsplit(
            parts._replace(
                netloc=f"{parts.netloc},{parts.hostname}:{self._standby.port}",
                query="target_session_attrs=primary",
            )
        )

    def _proxied(self) -> dict[str, str]:
        return {} if self._standby_of else dict(self.connections)

    @property
    def connections_through_proxies(self) -> dict[str, str]:
        """The mover's URLs, each through its proxy."""
        return {name: self.proxies[name].url for name in self.connections}

    def proxies_to(self, place: str) -> list[Proxy]:
        """The proxies before a cell's stores, or before the topology."""
        prefix = "cellferry-topology" if place == "topology" else f"{place}-"
        return [proxy for name, proxy in self.proxies.items() if name.startswith(prefix)]

    @contextlib.contextmanager
    def context(self) -> Iterator[Context]:
        """A controller of the harness's own, for looking."""
        with Context.from_settings(self.settings, self.connections.get, actor=ACTOR) as context:
            yield context

    # --- organizations -----------------------------------------------------------------------

    def cast(self) -> Cast:
        """Organizations for the next scenario."""
        if not self._casts:
            self._make_casts()
        return self._casts.pop(0)

    def _make_casts(self, *, still: bool = False) -> None:
        seeds = []
        if still:
            self._still = {"901": "cell-1", "902": "cell-2"}
            seeds += [
                Seed(Organization(id_, f"still-{id_}"), cell, 60, 12)
                for id_, cell in self._still.items()
            ]
        pairs = []
        for _ in range(_BATCH):
            moved, neighbour = (
                Organization(str(self._next_organization + n), f"org-{self._next_organization + n}")
                for n in (0, 1)
            )
            self._next_organization += 2
            pairs.append((moved, neighbour))
            seeds.append(Seed(moved, "cell-1", _ROWS, _KEYS))
            seeds.append(Seed(neighbour, "cell-1", 60, 12))
        self.settle(seeds)
        routes = {seed.organization.id: seed.cell for seed in seeds}
        found = checker.take_baseline(self.places, {**self._still, **routes})
        for moved, neighbour in pairs:
            wanted = {*self._still, moved.id, neighbour.id}
            self._casts.append(
                Cast(
                    moved,
                    neighbour,
                    Baseline(
                        {id_: found.organizations[id_] for id_ in wanted},
                        found.cells,
                    ),
                )
            )

    def settle(self, seeds: Sequence[Seed]) -> None:
        """Make organizations in their cells and tell the topology of them."""
        for place in self.places.values():
            provision_organizations(place, [seed.organization.id for seed in seeds])
        for name, place in self.places.items():
            seeding.seed_cell(place, [seed for seed in seeds if seed.cell == name])
        with self.context() as context:
            context.topology.register_organizations(
                [(seed.organization, seed.cell) for seed in seeds], ACTOR
            )

    def _pad(self) -> None:
        """Let two tables of cell-2 be so long that they cannot grow when its disk is "full"."""
        with psycopg.connect(self.places["cell-2"].postgres, autocommit=True) as connection:
            connection.execute("SET session_replication_role = replica")
            rows = _FULL_FROM // 2_000 + 400
            row = connection.execute(
                "SELECT p.id, p.organization_id, u.user_id FROM projects AS p JOIN memberships AS u"
                " ON u.organization_id = p.organization_id WHERE p.external_ref IS NULL LIMIT 1"
            ).fetchone()
            assert row is not None
            project, organization, user = row
            connection.execute(
                "INSERT INTO issues (organization_id, project_id, iid, author_id, title)"
                " SELECT %s, %s, 1000000 + n, %s, rpad('padding ' || n, 1900, md5(n::text))"
                " FROM generate_series(1, %s) AS n",
                (organization, project, user, rows),
            )
            connection.execute(
                "UPDATE projects SET issues_count = issues_count + %s WHERE id = %s",
                (rows, project),
            )
            connection.execute(
                "INSERT INTO notes (project_id, author_id, noteable_type, noteable_id, body)"
                " SELECT %s, %s, 'Issue', 0, rpad('padding ' || n, 1900, md5(n::text))"
                " FROM generate_series(1, %s) AS n",
                (project, user, rows),
            )
        found = checker.take_baseline(self.places, self._still)
        for cast in self._casts:
            cast.baseline.organizations.update(found.organizations)  # type: ignore[attr-defined]

    def plan(self, organization: Organization, destination: str = CELLS[1], **options: Any) -> int:
        """Record a migration and return its id."""
        with self.context() as context:
            found = steps.plan(
                context,
                organization.slug,
                destination,
                options=MoveOptions(**options),
                record=True,
            )
        assert found.migration is not None
        return found.migration

    def check(self, ledger: Ledger, baseline: Baseline) -> Checked:
        """Compare the ledger with the cells; the checker shares no code with the mover."""
        history = checker.read_history(self.connections["cellferry-topology"])
        return checker.check(ledger, self.places, history, baseline)

    # --- what is left in the cells ---------------------------------------------------------------

    def traces(self) -> frozenset[str]:
        """Everything of cellferry's in the cells that is not part of a prepared cell, by name."""
        left: set[str] = set()
        for cell in CELLS:
            with psycopg.connect(self.places[cell].postgres, autocommit=True) as connection:
                for table in ("gate", "key_log", "lease", "checkpoint", "imported_row"):
                    rows = connection.execute(
                        sql.SQL("SELECT to_jsonb(t)::text FROM cellferry.{} AS t LIMIT 50").format(
                            sql.Identifier(table)
                        )
                    ).fetchall()
                    left |= {f"{cell}/postgres {table}: {row[0]}" for row in rows}
            with redis.Redis.from_url(self.places[cell].redis, decode_responses=True) as client:
                left |= {f"{cell}/redis key {key}" for key in client.scan_iter(match="cellferry:*")}
                left |= {
                    f"{cell}/redis user {user}"
                    for user in client.acl_users()
                    if user.startswith("cellferry-") and user != "cellferry-admin"
                }
        return frozenset(left)

    # --- a disk that is full ---------------------------------------------------------------------

    def fill_disk(self, cell: str) -> None:
        """Let the cell's PostgreSQL write no file beyond 16 MB, and its Valkey take no more.

        A real file system of its own needs a mount, which an ordinary user has not. RLIMIT_FSIZE
        makes the same call of the server (extending a table's file) fail with a real error; WAL,
        whose files have that size already, goes on, as on a server with WAL on a disk of its own.
        """
        self._full.add(cell)
        self._limit(cell, _FULL_FROM)
        with redis.Redis.from_url(self.places[cell].redis) as client:
            client.config_set("maxmemory", 1)

    def free_disk(self, cell: str) -> None:
        """Undo `fill_disk`."""
        self._limit(cell, resource.RLIM_INFINITY)
        with redis.Redis.from_url(self.places[cell].redis) as client:
            client.config_set("maxmemory", 0)
        self._full.discard(cell)

    def _limit(self, cell: str, size: int) -> None:
        identity = self.postgres[cell].identity
        if identity is None:
            return
        postmaster = psutil.Process(identity.pid)
        for process in (postmaster, *postmaster.children()):
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                title = " ".join(process.cmdline())
                # The mover's sessions, and all that are to come, meet the limit. The server's own
                # processes do not: they write what is in memory already.
                if (
                    process == postmaster
                    or size == resource.RLIM_INFINITY
                    or title.startswith(("postgres: mover ", "postgres: postgres "))
                ):
                    self._limit_process(process.pid, size)

    @staticmethod
    def _limit_process(pid: int, size: int) -> None:
        # As the server's own account: root without CAP_SYS_RESOURCE may not do it to others.
        soft = "unlimited" if size == resource.RLIM_INFINITY else str(size)
        subprocess.run(
            ["prlimit", "--pid", str(pid), f"--fsize={soft}:"],
            check=False,  # a session may have ended meanwhile
            cwd="/",
            capture_output=True,
            **popen_arguments(service_account()),  # type: ignore[call-overload]
        )

    # --- health --------------------------------------------------------------------------------

    def heal(self) -> None:
        """Start what is down, let everything pass, free the disks."""
        for proxy in self.proxies.values():
            proxy.heal()
        for server in (*self.postgres.values(), *self.valkey.values()):
            port = server.port
            server.start()
            if server.port != port:
                raise RuntimeError(f"{server.directory.name} lost its port")
        for cell in list(self._full):
            self.free_disk(cell)


def deployment() -> Mapping[str, Any]:
    """Return the settings of both cells, as a deployment writes them in `cells.yaml`."""

    def cell(name: str) -> dict[str, Any]:
        return {
            "legacy": name == CELLS[0],
            "stores": {
                "postgres": {
                    "connection": f"{name}-postgres",
                    "admin_connection": f"{name}-postgres-admin",
                },
                "redis": {
                    "connection": f"{name}-redis",
                    "admin_connection": f"{name}-redis-admin",
                    "key_prefix": "org:{$organization}:",
                    "application_user": "org-$organization",
                },
            },
        }

    return {
        "topology": {"connection": "cellferry-topology"},
        "organization": {"data_map": str(ROOT / "include/config/data_maps/app.yaml")},
        "cells": {name: cell(name) for name in CELLS},
    }
