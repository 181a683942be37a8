"""Writing a pack: all of it or nothing, with its hash in the audit before anybody can see it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellferry.errors import InvalidInput
from cellferry.evidence.document import SCHEMA, Evidence, canonical, json_schema
from cellferry.evidence.page import render
from cellferry.evidence.record import Pauses, gather
from cellferry.migration.context import Context

DOCUMENT, PAGE, MANIFEST = "evidence.json", "evidence.html", "manifest.json"
JSON_SCHEMA = "cellferry-evidence-1.schema.json"
#: Where packs go unless told otherwise.
DIRECTORY_VARIABLE = "CELLFERRY_EVIDENCE"


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack that was written. `hash` is that of the audit."""

    directory: Path
    migration: int
    organization: str
    hash: str
    files: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {
            "directory": str(self.directory),
            "migration": self.migration,
            "organization": self.organization,
            "hash": self.hash,
            "files": dict(self.files),
        }


def default_directory() -> Path:
    """Return where packs go: `CELLFERRY_EVIDENCE`, else `evidence` in the current directory."""
    return Path(os.environ.get(DIRECTORY_VARIABLE) or "evidence")


def is_kept() -> bool:
    """Whether this deployment keeps packs: a run's report then exports them by itself."""
    return bool(os.environ.get(DIRECTORY_VARIABLE))


def pack_name(migration: int, slug: str) -> str:
    """Return the name of a migration's pack; a slug can be no path."""
    return f"migration-{migration}-{re.sub(r'[^A-Za-z0-9_-]+', '-', slug)[:60].strip('-') or 'x'}"


def export_pack(
    context: Context, migration_id: int, to: Path | None = None, *, writers: Pauses | None = None
) -> Pack:
    """Write the pack of a migration to a directory of its own in `to`; may be repeated.

    Guarantees that what has the pack's name is a whole pack, and that its hash is in the audit.
    (A machine that dies just when a pack replaces an earlier one may leave none under that name:
    export again.) Changes nothing in the cells.

    Args:
        context: topology, cells and who asks.
        migration_id: the migration.
        to: where packs are kept; made if it is missing. Default: `default_directory()`.
        writers: what writers waited, in seconds: a list, or by writer's name.

    Raises:
        InvalidInput: no such migration, or what stands in its place is not a pack.
        Unreachable, AccessDenied: the topology does not answer or refuses.
    """
    parent = (to or default_directory()).absolute()
    evidence = gather(context, migration_id, writers)
    target = parent / pack_name(migration_id, evidence.organization.slug)
    if target.exists() and not (target / MANIFEST).is_file():
        raise InvalidInput(
            f"{target} is there and is not an evidence pack",
            hint="choose another directory, or move it away",
            organization=evidence.organization.slug,
        )
    try:
        parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
    except OSError as error:
        raise InvalidInput(
            f"{parent} cannot be written: {error.strerror}", hint="choose another directory"
        ) from error
    try:
        made.chmod(0o755)
        manifest = _write_files(made, evidence)
        pack = Pack(
            directory=target,
            migration=migration_id,
            organization=evidence.organization.slug,
            hash=pack_hash(manifest),
            files=manifest["files"],
        )
        # Before it can be seen: a pack without its hash in the audit would look like a forgery.
        context.topology.write_evidence(
            migration_id, context.actor, {"hash": pack.hash, "files": manifest["files"]}
        )
        _put_in_place(made, target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return pack


def pack_hash(manifest: Mapping[str, Any]) -> str:
    """Return the hash of a pack: SHA-256 over its manifest as canonical JSON."""
    return hashlib.sha256(canonical(manifest)).hexdigest()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_files(directory: Path, evidence: Evidence) -> dict[str, Any]:
    document = evidence.model_dump(mode="json", by_alias=True)
    # Keys in the order of the schema, so that people find their way.
    _write(directory / DOCUMENT, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    _write(directory / JSON_SCHEMA, json_schema())
    _write(directory / PAGE, render(document))
    manifest = {
        "schema": SCHEMA,
        "migration": evidence.migration.id,
        "organization": evidence.organization.id,
        "made_at": evidence.made.at,
        "files": {name: file_hash(directory / name) for name in (DOCUMENT, PAGE, JSON_SCHEMA)},
    }
    _write(directory / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return manifest


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _put_in_place(made: Path, target: Path) -> None:
    """Let `made` take the place of an earlier pack, if there is one; one export at a time."""
    earlier = made.with_name(f"{made.name}.replaced")
    parent = os.open(target.parent, os.O_RDONLY)
    try:
        fcntl.flock(parent, fcntl.LOCK_EX)
        # A directory that is not empty cannot be renamed over: the earlier one steps aside.
        replaces = target.exists()
        if replaces:
            target.rename(earlier)
        try:
            made.rename(target)
        except OSError:
            if replaces:
                earlier.rename(target)
            raise
        os.fsync(parent)
    finally:
        os.close(parent)
    shutil.rmtree(earlier, ignore_errors=True)
