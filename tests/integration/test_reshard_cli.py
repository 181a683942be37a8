"""What an operator types and reads."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cellferry.cli import main
from fixtures.shards import ShardWorld

Cli = Callable[..., Result]


@pytest.fixture
def cli(shard_world: ShardWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Types a command of `cellferry reshard`; the connections are in the environment."""
    monkeypatch.setenv("CELLFERRY_CONN_CELLFERRY_TOPOLOGY", shard_world.url)
    monkeypatch.setenv("CELLFERRY_CONFIG", str(tmp_path / "none.yaml"))
    monkeypatch.setenv("COLUMNS", "200")
    for name, url in shard_world.urls.items():
        monkeypatch.setenv("CELLFERRY_CONN_" + name.upper().replace("-", "_"), url)
    monkeypatch.chdir(tmp_path)
    for count in (3, 4):
        shards = "".join(f"  shard-{n}: {{connection: dedup-{n}}}\n" for n in range(count))
        Path(f"{count}.yaml").write_text(
            f'name: dedup\nkind: redis\nkey_prefix: "dedup:"\nshards:\n{shards}'
        )

    def run(*words: str, code: int = 0) -> Result:
        result = CliRunner().invoke(main, ["reshard", *words])
        assert result.exit_code == code, result.output
        return result

    return run


def answer(result: Result) -> Any:
    return json.loads(result.stdout)


def test_from_plan_to_report(cli: Cli, shard_world: ShardWorld) -> None:
    with shard_world.store() as store:
        for number in range(200):
            assert store.claim(b"id-%d" % number, 3600).accepted
        planned = cli("plan", "4.yaml", "--output", "plan.json").stdout
        assert re.search(r"dedup: 3 → 4 shards; \d\d of 200 keys move", planned)
        assert "nothing blocks it; nothing was changed" in planned
        assert "next: cellferry reshard begin plan.json" in planned
        assert "OLD" in cli("begin", "plan.json", "--ttl", "0s").stdout
        assert "it has begun already" in cli("begin", "plan.json").stdout
        assert "✗ Keys copied" in cli("cutover", "dedup", "--dry-run", code=1).stdout
        assert "copied" in cli("copy", "dedup", "--throttle", "100000").stdout
        assert "DUAL_WRITE (read old)" in cli("dual-write", "dedup").stdout
        assert "keys were waiting in the end" in cli("catch-up", "dedup").stdout
        sample = cli("verify", "dedup", "--sample", "5").stdout
        assert "with 95% confidence at most" in sample
        assert "✗ No mismatch" in cli("cutover", "dedup", "--dry-run", code=1).stdout
        assert "all equal" in cli("verify", "dedup").stdout
        assert "✓ Ready for cutover; nothing was changed" in (
            cli("cutover", "dedup", "--dry-run").stdout
        )
        assert "DUAL_WRITE (read new)" in cli("cutover", "dedup").stdout
        status = cli("status", "dedup").stdout
        assert "re-sharding 1: 3 → 4 shards, DUAL_WRITE (read new) at epoch" in status
        assert "next: cellferry reshard watch dedup" in status
        cli("watch", "dedup", "--for", "0s")
        for number in range(200):
            assert not store.claim(b"id-%d" % number, 3600).accepted
        assert "completed: removed" in cli("cleanup", "dedup", "--wait-ttl", "0s").stdout
        report = cli("report", "dedup").stdout
        assert "completed, state NEW" in report
        assert "re-sharding advanced: values wait" in report
        assert answer(cli("report", "dedup", "--json"))["ended"] == "completed"
        assert "no re-sharding of dedup is live" in cli("verify", "dedup", code=1).stderr


def test_everything_at_once_and_the_way_back(cli: Cli, shard_world: ShardWorld) -> None:
    with shard_world.store() as store:
        store.set(b"a", b"1")
        assert "Ready for cutover" in cli("run", "4.yaml", "--ttl", "1h", "--watch-for", "0").stdout
        assert answer(cli("status", "dedup", "--json"))["resharding"]["state"] == (
            "dual_write_read_old"  # nobody said yes
        )
        cli("run", "4.yaml", "--watch-for", "0", "--yes")
        store.increment(b"n", 5)
        too_early = cli("cleanup", "dedup", code=1).stderr
        assert "the old copies are kept until" in too_early
        assert "remedy: wait with --wait-ttl" in too_early
        assert "rolled" not in cli("roll-back", "dedup", "--reason", "a doubt").stdout
        assert (store.get(b"a"), store.get(b"n")) == (b"1", b"5")
        assert "rolled back: removed" in cli("cleanup", "dedup").stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("status", "dedub"), 2, "there is no shard set 'dedub'"),
        (("copy", "dedup"), 1, "no re-sharding of dedup is live"),
        (("plan", "5.yaml"), 2, "cannot read 5.yaml"),
        (("begin", "5.json"), 2, "cannot read the plan 5.json"),
        (("begin", "4.yaml"), 2, "cannot read the plan 4.yaml"),
        (("report", "dedup"), 2, "dedup was never re-sharded"),
        (("abort", "dedup"), 2, "Missing option '--reason'"),
        (("cleanup", "dedup", "--wait-ttl", "2x"), 2, "'2x' is no duration"),
        (("register", "4.yaml"), 2, "is recorded with other shards"),
        (("plan", "3.yaml"), 2, ""),
    ],
)
def test_what_is_wrong_is_named(cli: Cli, words: tuple[str, ...], code: int, message: str) -> None:
    assert message in cli(*words, code=code).stderr


def test_an_error_is_json_where_json_was_asked_for(cli: Cli) -> None:
    found = answer(cli("copy", "dedup", "--json", code=1))
    assert found["error"] == "WrongState"
    assert "reshard plan" in found["remedy"]


def test_a_plan_that_is_older_than_the_ring_is_refused(cli: Cli) -> None:
    cli("plan", "4.yaml", "--output", "old.json")
    cli("run", "4.yaml", "--ttl", "0", "--watch-for", "0", "--yes")
    cli("cleanup", "dedup")
    assert "older than" in cli("begin", "old.json", code=2).stderr


def test_a_client_that_hangs_is_named(
    cli: Cli, client_process: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_process("ingest-7", lease_s=60.0)
    cli("plan", "4.yaml", "--output", "plan.json")
    cli("begin", "plan.json")
    client.ask("sleep before", "claim", 1)
    client.answer()
    client.ask("claim", b"x", 60.0)
    client.wait_until_asleep()
    monkeypatch.setattr("cellferry.shards.context.MARGIN_S", -59.0)
    started = time.monotonic()
    named = cli("dual-write", "dedup", code=75).stderr
    assert "1 client(s) have not acknowledged the present state" in named
    assert "ingest-7 (last heard of" in named
    assert time.monotonic() - started < 30
    client.wake()
    client.answer()
    assert "DUAL_WRITE (read old)" in cli("dual-write", "dedup").stdout
