"""A whole Airflow re-shards a dedup store under load, is killed at it, and goes back again."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from cellferry.errors import InvalidInput
from cellferry.local import dedup_checker
from cellferry.local.airflow_api import AirflowApi
from cellferry.local.dedup_checker import PREFIX, Seeds
from cellferry.local.dedup_traffic import Spec, write_spec
from cellferry.local.fleet import Fleet
from cellferry.local.server_process import ServerProcess
from cellferry.local.valkey_server import ValkeyServer
from cellferry.model import Actor
from cellferry.shards.control import ShardControl
from cellferry.shards.placement import Ring, Shard
from cellferry.shards.settings import ShardSet
from cellferry.shards.states import ShardState

SET = "dedup"
KEYS = 6_000
CLIENTS = 3
SHARDS = [f"shard-{number}" for number in range(4)]
FOUR = ["shard-0", "shard-1", "shard-2", f"shard-3={SET}-3"]
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@dataclass
class Store:
    """Four Valkeys, three of them the registered set, with ids in them and clients at work."""

    control: ShardControl
    topology: str
    urls: Mapping[str, str]
    seeds: Seeds
    folder: Path
    clients: list[ServerProcess]

    def keys(self, shard: str) -> int:
        with redis.Redis.from_url(self.urls[shard]) as client:
            return int(client.dbsize())

    def stop_clients(self) -> None:
        for client in self.clients:
            assert client.is_running, client.log_tail()
            client.stop((signal.SIGTERM, 30.0))

    def holder(self, part: str) -> int | None:
        """Return the process that copies from a shard."""
        with psycopg.connect(self.topology) as connection:
            row = connection.execute(
                "SELECT holder FROM topology.resharding_part WHERE part = %s", [part]
            ).fetchone()
        return int(row[0].split(":")[1]) if row else None


@pytest.fixture(scope="module")
def api(fleet: Fleet) -> Iterator[AirflowApi]:
    with AirflowApi(fleet.airflow_url, *fleet.airflow_credentials) as made:
        for name in ("reshard", "roll_back_resharding"):
            made.wait_for_dag(name)
        yield made


@pytest.fixture(scope="module")
def store(
    fleet: Fleet, api: AirflowApi, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("shards")
    topology = fleet.connections()["cellferry-topology"]
    with ExitStack() as stack:
        urls = {}
        for shard in SHARDS:
            server = ValkeyServer(folder / shard, die_with_parent=True)
            stack.callback(server.remove)
            urls[shard] = server.start().url()
            api.add_connection(f"{SET}-{shard[6:]}", urls[shard])
        seeds = Seeds(KEYS, round(time.time() * 1000))
        dedup_checker.seed(seeds, urls, SHARDS[:3])
        control = stack.enter_context(ShardControl(topology))
        control.install()
        ring = Ring(tuple(Shard(name) for name in SHARDS[:3]))
        connections = {name: f"{SET}-{name[6:]}" for name in SHARDS[:3]}
        control.register_set(ShardSet(SET, "redis", PREFIX, ring, connections), Actor("test"))
        made = Store(control, topology, urls, seeds, folder, [])
        _start_clients(made, stack)
        yield made


def _start_clients(store: Store, stack: ExitStack) -> None:
    file = store.folder / "connections.yaml"
    file.touch(mode=0o600)
    urls = {f"{SET}-{name[6:]}": url for name, url in store.urls.items()}
    file.write_text(json.dumps({"cellferry-topology": store.topology, **urls}))
    environment = {**os.environ, "CELLFERRY_CONNECTIONS": str(file)}
    begin = time.time() + 1.0
    for number in range(CLIENTS):
        ledger = store.folder / "ledgers" / f"client-{number}.jsonl"
        spec = Spec(SET, "cellferry-topology", str(ledger), number, CLIENTS, 40.0, KEYS, begin, 5.0)
        path = store.folder / f"client-{number}.json"
        write_spec(spec, path)
        client = ServerProcess(
            f"client-{number}", store.folder / f"client-{number}.log", die_with_parent=True
        )
        stack.callback(client.kill)
        client.start(
            [sys.executable, "-m", "cellferry.local.dedup_traffic", path],
            cwd=store.folder,
            environment=environment,
        )
        store.clients.append(client)


def wait_until(is_so: Callable[[], bool], what: str, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            pytest.fail(what)
        time.sleep(0.1)


def state_of(api: AirflowApi, dag: str, run: str, task: str) -> str | None:
    return next((one.state for one in api.tasks(dag, run) if one.task_id == task), None)


def kill_the_copy(store: Store, shard: str) -> None:
    """SIGKILL the task that copies from `shard`, with some of it copied."""

    def is_under_way() -> bool:
        live = store.control.live(SET)
        return (
            live is not None and store.control.checkpoint(live.id, (shard, SHARDS[3])) is not None
        )

    wait_until(is_under_way, "the copy never got that far")
    pid = store.holder(shard)
    assert pid is not None
    assert "airflow" in " ".join(psutil.Process(pid).cmdline())
    os.kill(pid, signal.SIGKILL)


def test_it_re_shards_under_load_and_goes_back(api: AirflowApi, store: Store) -> None:
    _dry_run_is_the_default(api, store)
    _three_become_four(api, store)
    _back_after_the_cutover(api, store)
    store.stop_clients()
    verdict = dedup_checker.check(
        sorted((store.folder / "ledgers").glob("*.jsonl")),
        store.seeds,
        shards=store.urls,
        before=SHARDS[:3],
        now=SHARDS,
        is_clean=True,
    )
    faults = (verdict.duplicates, verdict.wrongly_refused, verdict.mismatches, verdict.unknown)
    assert faults == (0, 0, 0, 0), verdict
    assert verdict.left_behind == 0, verdict
    assert verdict.moved > KEYS / 5
    assert min(verdict.accepted, verdict.refused) > 100


def _dry_run_is_the_default(api: AirflowApi, store: Store) -> None:
    run = api.trigger("reshard", {"shard_set": SET, "shards": FOUR})
    assert api.wait_for_run("reshard", run, 300) == "success", api.log("reshard", run, "plan")
    assert "✓ All shards healthy" in api.log("reshard", run, "plan")
    assert "shard-0 → shard-3" in api.log("reshard", run, "report")
    assert (store.control.reshardings(SET), store.keys("shard-3")) == ([], 0)


def answer(api: AirflowApi, run: str, task: str, option: str) -> None:
    """Answer as a person would: not within the second in which Airflow begins to wait.

    It takes such an answer for a task that ended by itself, and asks again.
    """

    def is_over() -> bool:
        state = state_of(api, "reshard", run, task)
        if state == "awaiting_input":
            time.sleep(2)
            with suppress(InvalidInput):  # it was answered already
                api.answer("reshard", run, task, option)
        return state in ("success", "failed", "upstream_failed")

    wait_until(is_over, f"{task} does not ask")


def _three_become_four(api: AirflowApi, store: Store) -> None:
    conf = {
        "shard_set": SET,
        "shards": FOUR,
        "dry_run": False,
        "approval": "cutover",
        "keys_per_s": 150,
        "watch_s": 1,
        "ttl_s": 3,
        "delete_kept": True,
    }
    run = api.trigger("reshard", conf)
    kill_the_copy(store, "shard-1")
    answer(api, run, "approve_cutover", "Approve")
    assert api.wait_for_run("reshard", run, 300) == "success", api.log("reshard", run, "report")
    copies = {one.name: one.try_number for one in api.tasks("reshard", run) if one.name}
    assert copies == {
        "shard-0 → shard-3": 1,
        "shard-1 → shard-3": 2,
        "shard-2 → shard-3": 1,
    }
    (done,) = store.control.reshardings(SET)
    assert done.ended == "completed"
    assert done.facts["copied shard-1"]["resumed"]
    assert done.facts["approved_cutover"]
    assert list(store.control.set(SET).connections) == SHARDS


def _back_after_the_cutover(api: AirflowApi, store: Store) -> None:
    conf = {
        "shard_set": SET,
        "shards": SHARDS[:3],
        "dry_run": False,
        "watch_s": 0,
        "ttl_s": 3_600,
    }
    forward = api.trigger("reshard", conf)
    wait_until(
        lambda: state_of(api, "reshard", forward, "wait_for_ttl") == "deferred",
        "it never waited for its TTL",
    )
    live = store.control.live(SET)
    assert live is not None
    assert live.state is ShardState.NEW
    run = api.trigger(
        "roll_back_resharding", {"shard_set": SET, "reason": "the test wants it", "dry_run": False}
    )
    assert api.wait_for_run("roll_back_resharding", run, 300) == "success", api.log(
        "roll_back_resharding", run, "report"
    )
    assert store.control.resharding(live.id).ended == "rolled_back"
    assert list(store.control.set(SET).connections) == SHARDS
