"""How far a copy is, kept where a killed copier's successor finds it.

A scan's cursor means something only to the server process that gave it, and what was written only
to the one that took it: after a restart of either the scan begins anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from cellferry.errors import InvalidInput

PairName = tuple[str, str]
"""Source and destination."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is known to be at one destination.

    Attributes:
        plan: the plan's hash.
        source, destination: identities of the servers.
        step: rises with each checkpoint of one scan; all pairs of a source are saved one after the
            other, and the smallest of theirs is where the scan goes on.
        cursor: where it goes on.
        keys: that were sent there; `size` are their bytes.
        done: whether the scan has ended.
    """

    plan: str
    source: str
    destination: str
    step: int = 0
    cursor: str = ""
    keys: int = 0
    size: int = 0
    done: bool = False

    def document(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return asdict(self)

    @classmethod
    def parse(
        cls, document: Mapping[str, Any] | None, *, plan: str, source: str, destination: str
    ) -> Self:
        """Return what to go on from: what was saved, or the beginning.

        Raises:
            InvalidInput: it is the checkpoint of another plan.
        """
        beginning = cls(plan, source, destination)
        if document is None:
            return beginning
        try:
            found = cls(**document)
        except TypeError as error:
            raise InvalidInput(
                f"the checkpoint cannot be read: {error}", hint="remove it; the copy begins anew"
            ) from error
        if found.plan != plan:
            raise InvalidInput(
                f"the checkpoint is one of another plan: {found.plan[:12]}, this is {plan[:12]}",
                hint="give this copy a checkpoint of its own, or go on with the plan it was for",
            )
        if (found.source, found.destination) != (source, destination):
            return beginning
        return found


class Checkpoints(Protocol):
    """Where checkpoints are kept: durable once `save` has returned."""

    def load(self, pair: PairName) -> Mapping[str, Any] | None:
        """Return what was saved last; None for nothing."""
        ...

    def save(self, pair: PairName, checkpoint: Mapping[str, Any]) -> None:
        """Save it in place of the last one."""
        ...


class NoCheckpoints:
    """Keeps nothing: every copy begins anew."""

    def load(self, pair: PairName) -> None:
        """Nothing."""

    def save(self, pair: PairName, checkpoint: Mapping[str, Any]) -> None:
        """Nothing."""


class FileCheckpoints:
    """One file a pair in a folder, replaced as a whole.

    Args:
        folder: made if absent.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, pair: PairName) -> Mapping[str, Any] | None:
        """Read the pair's file.

        Raises:
            InvalidInput: it is damaged.
        """
        path = self._path(pair)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InvalidInput(
                f"{path} cannot be read: {error}", hint="remove it; the copy begins anew"
            ) from error
        if not isinstance(found, dict):
            raise InvalidInput(f"{path} is no checkpoint", hint="remove it; the copy begins anew")
        return found

    def save(self, pair: PairName, checkpoint: Mapping[str, Any]) -> None:
        """Write a new file, force it to the disk, and put it in place of the old one."""
        path = self._path(pair)
        self._folder.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}.tmp")
        with fresh.open("w", encoding="utf-8") as file:
            json.dump(dict(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _path(self, pair: PairName) -> Path:
        plain = "-to-".join("".join(c if c.isalnum() else "_" for c in name) for name in pair)
        digest = hashlib.blake2b("\0".join(pair).encode(), digest_size=4).hexdigest()
        return self._folder / f"{plain}-{digest}.json"
