"""Evidence packs of real moves: what is in them, and that nobody can change them unseen."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner, Result
from psycopg import sql

from cellferry import settings
from cellferry.cli import main
from cellferry.errors import InvalidInput, Unreachable
from cellferry.evidence import Check, Outcome, Pack, check_pack, export_pack
from cellferry.evidence.document import canonical
from cellferry.migration import steps
from cellferry.model import Actor, Organization
from fixtures.cells import TwoCells

SAME, DIFFERS, UNKNOWN = Outcome.SAME, Outcome.DIFFERS, Outcome.UNKNOWN
TO_SOAK = (steps.copy, steps.sync, steps.verify, steps.cutover, steps.soak)


@pytest.fixture
def acme(cells: TwoCells) -> Organization:
    cells.add_organization(8)  # a neighbour that stays
    return cells.add_organization(7)


def moved(cells: TwoCells, organization: Organization, **options: Any) -> int:
    """Move an organization; its old copy is retained."""
    migration = cells.plan(organization, **options)
    with cells.context() as context:
        for step in TO_SOAK:
            step(context, migration)
    return migration


def export(cells: TwoCells, migration: int, to: Path, **arguments: Any) -> Pack:
    with cells.context() as context:
        return export_pack(context, migration, to, **arguments)


def check(cells: TwoCells, directory: Path) -> list[Check]:
    with cells.context() as context:
        return check_pack(context, directory)


def document(pack: Pack) -> dict[str, Any]:
    found = json.loads((pack.directory / "evidence.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def outcomes(checks: list[Check], *words: str) -> set[Outcome]:
    """How the checks ended whose name has one of `words`; all when none is given."""
    found = {one.outcome for one in checks if not words or any(word in one.what for word in words)}
    assert found, [one.what for one in checks]
    return found


def differing(checks: list[Check]) -> list[str]:
    return [f"{one.what}: {one.detail}" for one in checks if one.outcome is DIFFERS]


@dataclass
class Terminal:
    """`cellferry evidence …` as an operator calls it."""

    cells: TwoCells
    file: Path

    def runs(self, *arguments: str) -> Result:
        environment = {settings.variable(name): url for name, url in self.cells.connections.items()}
        environment |= {"CELLFERRY_CONFIG": str(self.file), "COLUMNS": "300"}
        return CliRunner().invoke(main, ["evidence", *arguments], env=environment)


@pytest.fixture
def terminal(cells: TwoCells, tmp_path: Path) -> Terminal:
    return Terminal(cells, tmp_path / "cells.yaml")


# ── what is in a pack ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("strategy", ["online", "freeze-first"])
def test_a_pack_tells_the_whole_move(
    cells: TwoCells, acme: Organization, tmp_path: Path, strategy: str
) -> None:
    migration = moved(cells, acme, strategy=strategy)
    pack = export(cells, migration, tmp_path / "packs", writers={"w1": 0.021, "w2": [0.004, 0.04]})
    found = document(pack)
    schema = json.loads((pack.directory / "cellferry-evidence-1.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(found)

    assert [one["state"] for one in found["states"]] == [
        *("planned", "copying", "syncing", "ready", "cutting_over", "soaking", "retained")
    ]
    assert [(one["epoch"], one["cell"]) for one in found["routes"]] == [
        (1, "cell-1"),
        (2, "cell-2"),
    ]
    estimates = {one["what"]: one for one in found["estimates"]}
    for what in ("rows in postgres", "keys in redis", "write pause"):
        assert estimates[what]["planned"] is not None
    assert estimates["write pause"]["happened"] == found["pause"]["controller"]["seconds"]
    assert found["pause"]["writers"]["longest"] == 0.04

    postgres, redis = found["stores"]
    assert [part["part"] for part in redis["parts"]] == ["list", "stream", "string", "zset"]
    assert postgres["mismatches"] == redis["mismatches"] == 0
    issues = next(one for one in postgres["parts"] if one["part"] == "public.issues")
    assert (issues["count"], issues["planned"]) == (20, 20)
    assert issues["source"] == issues["destination"]
    assert int(issues["source"]) != 0

    sides = {(one["cell"], one["store"]): one for one in found["observed"]}
    assert sorted(sides) == [
        (cell, store) for cell in ("cell-1", "cell-2") for store in ("postgres", "redis")
    ]
    for store in ("postgres", "redis"):
        old, new = sides["cell-1", store], sides["cell-2", store]
        assert (old["copy_of"], new["copy_of"]) == ("kept", "serving")
        assert old["parts"] == new["parts"], "nobody wrote since"
    observed = {one["part"]: one for one in sides["cell-1", "postgres"]["parts"]}
    assert observed["public.issues"]["hash"] == issues["source"], "as verify had seen it"
    assert {one["part"] for one in sides["cell-1", "redis"]["parts"]} >= {
        *("stream", "string", "string (expiring)")
    }
    made = [one for one in found["resources"] if one["kind"] == "gate"]
    assert {one["cell"] for one in made} == {"cell-1", "cell-2"}
    assert {one["action"] for one in found["audit"]} >= {"created", "lease", "transition", "flip"}
    assert found["versions"]["servers"]["cell-1/postgres"].startswith("PostgreSQL ")
    page = (pack.directory / "evidence.html").read_text(encoding="utf-8")
    assert "org-7: cell-1 → cell-2" in page


def test_a_pack_has_where_the_servers_stood(
    cells: TwoCells, acme: Organization, tmp_path: Path
) -> None:
    migration = moved(cells, acme)
    found = document(export(cells, migration, tmp_path))
    positions = {
        (one["when"], one["cell"], one["store"]): one["position"] for one in found["positions"]
    }
    for cell in ("cell-1", "cell-2"):
        then, now = (positions[when, cell, "postgres"] for when in ("verified", "pack made"))
        with cells.admin(cell) as connection:
            system, timeline, behind = connection.execute(
                "SELECT (SELECT system_identifier::text FROM pg_control_system()),"
                " (SELECT timeline_id FROM pg_control_checkpoint()),"
                " %s::pg_lsn <= %s::pg_lsn AND %s::pg_lsn <= pg_current_wal_lsn()",
                (then["lsn"], now["lsn"], now["lsn"]),
            ).fetchone()
        assert (now["system_identifier"], now["timeline"], behind) == (system, timeline, True)
        with cells.redis(cell) as client:
            info = client.info()
        then, now = (positions[when, cell, "redis"] for when in ("verified", "pack made"))
        assert now["run_id"] == info["run_id"]
        assert then["offset"] <= now["offset"] <= info["master_repl_offset"]


def test_a_step_does_not_fail_for_a_position_that_nobody_tells(
    cells: TwoCells, acme: Organization, tmp_path: Path
) -> None:
    with cells.admin("cell-1") as connection:
        connection.execute("REVOKE EXECUTE ON FUNCTION pg_control_checkpoint() FROM PUBLIC")
        try:
            pack = export(cells, moved(cells, acme), tmp_path)
        finally:
            connection.execute("GRANT EXECUTE ON FUNCTION pg_control_checkpoint() TO PUBLIC")
    gaps = document(pack)["gaps"]
    assert any("cell-1/postgres did not say where it stood (verified)" in gap for gap in gaps)


def test_pauses_halts_and_reasons_are_told(
    cells: TwoCells, acme: Organization, tmp_path: Path
) -> None:
    migration = cells.plan(acme)
    alice = Actor("alice", role="approver", dag_run="manual__1", try_number=2)
    with cells.context() as context:
        context.topology.set_paused(migration, True, alice, "lunch <b>now</b>")
        context.topology.set_paused(migration, False, alice)
        context.topology.halt("cell", "cell-2", "disk", alice)
        context.topology.clear_halt("cell", "cell-2", "bigger disk", alice)
        context.topology.set_halted(migration, "who wrote there?", alice)
    pack = export(cells, migration, tmp_path)
    found = document(pack)
    assert [one["action"] for one in found["stops"]] == [
        *("paused", "resumed", "cell halted", "cell halt cleared", "halted")
    ]
    assert (found["stops"][0]["dag_run"], found["stops"][0]["try_number"]) == ("manual__1", 2)
    page = (pack.directory / "evidence.html").read_text(encoding="utf-8")
    assert "lunch &lt;b&gt;now&lt;/b&gt;" in page
    assert "<b>now" not in page
    assert differing(check(cells, pack.directory)) == []


def test_no_password_is_in_a_pack_or_in_its_audit(
    cells: TwoCells, acme: Organization, tmp_path: Path
) -> None:
    secret = "Zr7-under/the:gate%"
    quoted = "Zr7-under%2Fthe%3Agate%25"
    for cell in ("cell-1", "cell-2"):
        with cells.admin(cell) as connection:
            connection.execute(
                sql.SQL("ALTER ROLE {} PASSWORD {}").format(
                    sql.Identifier(cells.mover_role), sql.Literal(secret)
                )
            )
        url = cells.connections[f"{cell}-postgres"]
        cells.connections[f"{cell}-postgres"] = url.replace(":mover@", f":{quoted}@")
    migration = moved(cells, acme)
    with cells.context() as context:
        for text in (f"it said {secret}", f"or {quoted}", cells.connections["cell-1-postgres"]):
            context.topology.set_error(migration, text)
            context.topology.set_halted(migration, text, Actor("bob"))
    pack = export(cells, migration, tmp_path)
    assert "it said ***" in (pack.directory / "evidence.html").read_text(encoding="utf-8")
    with cells.context() as context:
        written = [one.evidence for one in context.topology.audit(migration)][-1]
    told = [path.read_text(encoding="utf-8") for path in pack.directory.iterdir()]
    for text in (*told, json.dumps(written)):
        assert secret not in text
        assert quoted not in text
    assert differing(check(cells, pack.directory)) == []


# ── changing a pack ─────────────────────────────────────────────────────────────────────────────


def another_digit(path: Path, after: str) -> None:
    """Change the first digit that follows `after` in a file."""
    text = path.read_text(encoding="utf-8")
    start = text.index(after) + len(after)
    place = next(index for index in range(start, len(text)) if text[index].isdigit())
    changed = text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]
    path.write_text(changed, encoding="utf-8")


TAMPERING: dict[str, tuple[Callable[[Path], None], str]] = {
    "a count": (
        lambda pack: another_digit(pack / "evidence.json", '"compared": '),
        "file evidence.json",
    ),
    "a hash": (
        lambda pack: another_digit(pack / "evidence.json", '"hash": "'),
        "file evidence.json",
    ),
    "the page": (
        lambda pack: another_digit(pack / "evidence.html", "gate closed"),
        "file evidence.html",
    ),
    "the schema": (
        lambda pack: another_digit(pack / "cellferry-evidence-1.schema.json", "minimum"),
        "file cellferry-evidence-1.schema.json",
    ),
    "the manifest": (lambda pack: another_digit(pack / "manifest.json", "made_at"), "hash of the"),
    "no document": (lambda pack: (pack / "evidence.json").unlink(), "file evidence.json"),
    "no page": (lambda pack: (pack / "evidence.html").unlink(), "file evidence.html"),
    "no manifest": (lambda pack: (pack / "manifest.json").unlink(), "manifest.json"),
    "a file more": (lambda pack: (pack / "notes.txt").write_text("x") and None, "file notes.txt"),
    "a document that is none": (
        lambda pack: (pack / "evidence.json").write_text("[]") and None,
        "evidence.json",
    ),
}


def test_whatever_is_changed_in_a_pack_is_found(
    cells: TwoCells, acme: Organization, tmp_path: Path, terminal: Terminal
) -> None:
    pack = export(cells, moved(cells, acme), tmp_path / "packs")
    told = terminal.runs("verify", str(pack.directory))
    assert (told.exit_code, differing(check(cells, pack.directory))) == (0, []), told.output
    for name, (tamper, where) in TAMPERING.items():
        changed = tmp_path / "changed" / pack.directory.name
        shutil.copytree(pack.directory, changed)
        tamper(changed)
        found = differing(check(cells, changed))
        assert any(one.startswith(where) for one in found), (name, found)
        told = terminal.runs("verify", str(changed), "--json")
        assert told.exit_code == 1, name
        assert json.loads(told.output)["holds"] is False
        shutil.rmtree(changed)


def forge(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the document, and make page and manifest fit, as somebody would who can read us."""
    from cellferry.evidence.page import render
    from cellferry.evidence.record import derived

    path = directory / "evidence.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    change(found)
    found |= derived(found)
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (directory / "evidence.html").write_text(render(found), encoding="utf-8")
    manifest = json.loads((directory / "manifest.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_a_forgery_with_a_manifest_that_fits_is_found_in_the_audit_and_in_the_topology(
    cells: TwoCells, acme: Organization, tmp_path: Path
) -> None:
    pack = export(cells, moved(cells, acme), tmp_path / "packs")

    def one_fact(found: dict[str, Any]) -> None:
        found["facts"]["verified"]["postgres"]["compared"] += 1

    def one_audit_row(found: dict[str, Any]) -> None:
        found["audit"][0]["actor"] = "somebody else"

    def no_audit_row(found: dict[str, Any]) -> None:
        del found["audit"][2]

    def one_epoch(found: dict[str, Any]) -> None:
        found["routes"][1]["epoch"] = 3

    def one_resource(found: dict[str, Any]) -> None:
        found["resources"][0]["name"] = "other"

    def one_row_count(found: dict[str, Any]) -> None:
        next(
            part
            for side in found["observed"]
            for part in side["parts"]
            if (side["copy_of"], part["part"]) == ("kept", "public.issues")
        )["count"] += 1

    for change, where in (
        (one_fact, "facts"),
        (one_audit_row, "audit"),
        (no_audit_row, "audit"),
        (one_epoch, "route history"),
        (one_resource, "resources"),
        (one_row_count, "cell-1/postgres, old copy: public.issues"),
    ):
        forged = tmp_path / "forged" / pack.directory.name
        shutil.copytree(pack.directory, forged)
        forge(forged, change)
        found = differing(check(cells, forged))
        assert not any(one.startswith("file ") for one in found), "the files fit the manifest"
        assert any(one.startswith("hash of the pack") for one in found), (change, found)
        assert any(one.startswith(where) for one in found), (change, found)
        shutil.rmtree(forged)


def test_the_pack_of_another_migration_is_not_taken_for_this_one(
    cells: TwoCells, acme: Organization, tmp_path: Path
) -> None:
    mine = export(cells, moved(cells, acme), tmp_path / "packs")
    other = export(cells, moved(cells, cells.add_organization(9)), tmp_path / "packs")
    swapped = tmp_path / "swapped" / mine.directory.name
    shutil.copytree(other.directory, swapped)
    assert [one[:21] for one in differing(check(cells, swapped))] == ["name of the directory"]
    shutil.rmtree(swapped)
    shutil.copytree(mine.directory, swapped)
    for name in ("evidence.json", "evidence.html"):
        shutil.copy(other.directory / name, swapped / name)
    found = differing(check(cells, swapped))
    assert any(one.startswith("file evidence.json") for one in found)
    assert any("that of another document" in one for one in found)


def test_a_pack_of_another_topology_does_not_hold(
    cells: TwoCells, acme: Organization, tmp_path: Path
) -> None:
    pack = export(cells, cells.plan(acme), tmp_path)
    found = json.loads((pack.directory / "manifest.json").read_text())
    assert hashlib.sha256(canonical(found)).hexdigest() == pack.hash
    text = (pack.directory / "evidence.json").read_text().replace('"id": 1,', '"id": 99,', 1)
    (pack.directory / "evidence.json").write_text(text)
    assert any("no migration 99" in one for one in differing(check(cells, pack.directory)))


# ── recomputing ─────────────────────────────────────────────────────────────────────────────────


def test_a_change_of_the_old_copy_is_found(
    cells: TwoCells, acme: Organization, tmp_path: Path
) -> None:
    pack = export(cells, moved(cells, acme), tmp_path)
    with cells.admin("cell-1") as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute("UPDATE issues SET title = 'other' WHERE id = 7000003")
    with cells.redis("cell-1") as client:
        client.zadd("org:{7}:scores", {"x": 9})
    found = differing(check(cells, pack.directory))
    assert any(
        "old copy: public.issues: 20 rows then, 20 now, another hash" in one for one in found
    )
    assert any("old copy: zset" in one for one in found)
    assert any("both PostgreSQL copies now" in one and "7000003" in one for one in found)
    assert len(found) == 3, found


def test_what_the_organization_writes_since_is_no_difference(
    cells: TwoCells, acme: Organization, tmp_path: Path
) -> None:
    migration = moved(cells, acme)
    pack = export(cells, migration, tmp_path)
    with cells.application("cell-2") as connection:
        connection.execute("UPDATE issues SET counter = 5 WHERE id = 7000001")
    with cells.organization_redis("cell-2", "7") as client:
        client.set("org:{7}:counter", 6)
    checks = check(cells, pack.directory)
    assert differing(checks) == []
    assert outcomes(checks, "cell-2/postgres, serving copy: public.issues") == {UNKNOWN}
    assert outcomes(checks, "cell-1/postgres", "cell-1/redis", "both PostgreSQL") == {SAME}
    with cells.context() as context:
        steps.reverse_round(context, migration)
    checks = check(cells, pack.directory)
    assert differing(checks) == []
    assert outcomes(checks, "old copy: public.issues", "cell-1/redis, old copy: string") == {
        SAME,  # the keys that expire
        UNKNOWN,
    }
    assert outcomes(checks, "both PostgreSQL") == {SAME}


def test_keys_that_expired_since_are_no_difference(
    cells: TwoCells, acme: Organization, tmp_path: Path
) -> None:
    pack = export(cells, moved(cells, acme), tmp_path)
    with cells.redis("cell-1") as client:
        client.delete("org:{7}:session")
    found = differing(check(cells, pack.directory))
    assert [one for one in found if "old copy: string (expiring)" in one], "it had ten minutes left"
    path = pack.directory / "evidence.json"
    text = json.loads(path.read_text())
    for side in text["observed"]:
        for part in side["parts"]:
            if part["first_expiry"]:
                part["first_expiry"] = "2020-01-01T00:00:00+00:00"
    path.write_text(json.dumps(text))
    assert outcomes(check(cells, pack.directory), "old copy: string (expiring)") == {UNKNOWN}


def test_after_clean_up_it_says_what_nobody_can_recompute(
    cells: TwoCells, acme: Organization, tmp_path: Path, terminal: Terminal
) -> None:
    migration = moved(cells, acme)
    before = export(cells, migration, tmp_path / "retained")
    with cells.context() as context:
        steps.cleanup(context, migration)
    after = export(cells, migration, tmp_path / "completed")
    for pack in (before, after):
        checks = check(cells, pack.directory)
        assert differing(checks) == []
        assert outcomes(checks, "counts and hashes of both copies") == {UNKNOWN}
        assert outcomes(checks, "nothing is left in cell-1") == {SAME}
        assert outcomes(checks, "audit", "route history", "facts") == {SAME}
    told = terminal.runs("verify", str(before.directory))
    assert told.exit_code == 0
    assert "clean-up has deleted the old copy" in told.output
    assert document(after)["stores"][0]["deleted"] > 0
    with cells.redis("cell-1") as client:
        client.set("org:{7}:left", "x")
    assert "nothing is left in cell-1/redis: 1 keys" in differing(check(cells, after.directory))


def test_an_aborted_migration_has_a_pack_too(
    cells: TwoCells, acme: Organization, tmp_path: Path
) -> None:
    migration = cells.plan(acme)
    with cells.context() as context:
        steps.copy(context, migration)
        steps.abort(context, migration, "customer asked to wait")
    pack = export(cells, migration, tmp_path)
    found = document(pack)
    assert [one["state"] for one in found["states"]] == ["planned", "copying", "syncing", "aborted"]
    assert found["timeline"][-1]["reason"] == "customer asked to wait"
    assert all(one["removed_at"] for one in found["resources"])
    assert differing(check(cells, pack.directory)) == []


# ── exporting ───────────────────────────────────────────────────────────────────────────────────


def test_an_export_may_be_repeated_and_replaces_the_pack_as_a_whole(
    cells: TwoCells, acme: Organization, tmp_path: Path
) -> None:
    migration = moved(cells, acme)
    first = export(cells, migration, tmp_path / "packs")
    aside = tmp_path / "aside"
    shutil.copytree(first.directory, aside)
    second = export(cells, migration, tmp_path / "packs")
    assert first.directory == second.directory
    assert first.hash != second.hash
    assert [path.name for path in (tmp_path / "packs").iterdir()] == [first.directory.name]
    for directory in (aside, second.directory):
        assert differing(check(cells, directory)) == []
    with cells.context() as context:
        hashes = [
            one.evidence["hash"]
            for one in context.topology.audit(migration)
            if one.action == "evidence"
        ]
    assert hashes == [first.hash, second.hash]


def test_exports_at_the_same_time_leave_one_whole_pack(
    cells: TwoCells, acme: Organization, tmp_path: Path
) -> None:
    migration = cells.plan(acme)
    packs: list[Pack] = []
    threads = [
        threading.Thread(target=lambda: packs.append(export(cells, migration, tmp_path / "packs")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(packs) == 4
    assert [path.name for path in (tmp_path / "packs").iterdir()] == [packs[0].directory.name]
    assert differing(check(cells, packs[0].directory)) == []


def test_an_export_that_fails_leaves_the_earlier_pack_alone(
    cells: TwoCells, acme: Organization, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = cells.plan(acme)
    pack = export(cells, migration, tmp_path / "packs")
    before = {path.name: path.read_bytes() for path in pack.directory.iterdir()}

    def unreachable(*_: object) -> None:
        raise Unreachable("the topology does not answer")

    with cells.context() as context:
        monkeypatch.setattr(context.topology, "write_evidence", unreachable)
        with pytest.raises(Unreachable):
            export_pack(context, migration, tmp_path / "packs")
    assert {path.name: path.read_bytes() for path in pack.directory.iterdir()} == before
    assert [path.name for path in (tmp_path / "packs").iterdir()] == [pack.directory.name]


def test_what_is_no_pack_is_neither_overwritten_nor_checked(
    cells: TwoCells, acme: Organization, tmp_path: Path, terminal: Terminal
) -> None:
    migration = cells.plan(acme)
    mine = tmp_path / f"migration-{migration}-org-7"
    mine.mkdir()
    (mine / "thesis.txt").write_text("three years")
    with pytest.raises(InvalidInput, match="is not an evidence pack"):
        export(cells, migration, tmp_path)
    assert (mine / "thesis.txt").read_text() == "three years"
    for arguments, words in (
        (("verify", str(mine)), "no evidence pack"),
        (("verify", str(tmp_path / "nowhere")), "no evidence pack"),
        (("export", "4711", "--to", str(tmp_path)), "there is no migration 4711"),
        (("export", str(migration), "--writers", str(tmp_path / "no")), "cannot be read as JSON"),
    ):
        told = terminal.runs(*arguments)
        assert told.exit_code == 2, told.output
        assert words in told.output


def test_the_commands_answer_in_json_too(
    cells: TwoCells, acme: Organization, tmp_path: Path, terminal: Terminal
) -> None:
    migration = moved(cells, acme)
    (tmp_path / "pauses.json").write_text("[0.01, 0.03]")
    told = terminal.runs(
        *("export", str(migration), "--to", str(tmp_path), "--json"),
        *("--writers", str(tmp_path / "pauses.json")),
    )
    assert told.exit_code == 0, told.output
    exported = json.loads(told.output)
    assert sorted(exported["files"]) == [
        *("cellferry-evidence-1.schema.json", "evidence.html", "evidence.json")
    ]
    told = terminal.runs("verify", exported["directory"], "--json")
    answer = json.loads(told.output)
    assert (told.exit_code, answer["holds"]) == (0, True)
    assert {one["outcome"] for one in answer["checks"]} == {"same", "cannot be recomputed"}
