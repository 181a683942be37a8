"""Records of the fleet's running processes: what a later command or start finds them by."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from cellferry.local import process_identity, shared_memory
from cellferry.local.process_identity import ProcessIdentity


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One running component.

    Attributes:
        name: of the component.
        pid, started, boot: who it is; see `ProcessIdentity`.
        port: where it listens, 0 for nowhere.
        log: file of its output.
        since: when it was started, ISO 8601 in UTC.
        directory: its working directory, by which stray children are found.
        restarts: how often the supervisor had to start it again.
    """

    name: str
    pid: int
    started: float
    boot: str
    port: int
    log: str
    since: str
    directory: str | None = None
    restarts: int = 0

    @classmethod
    def of(
        cls,
        name: str,
        identity: ProcessIdentity,
        *,
        port: int,
        log: Path,
        directory: Path | None = None,
        restarts: int = 0,
    ) -> RunRecord:
        """Record of a component that was started now."""
        return cls(
            name=name,
            pid=identity.pid,
            started=identity.started,
            boot=identity.boot,
            port=port,
            log=str(log),
            since=datetime.now(UTC).isoformat(timespec="milliseconds"),
            directory=str(directory) if directory else None,
            restarts=restarts,
        )

    @property
    def identity(self) -> ProcessIdentity:
        """The recorded process."""
        return ProcessIdentity(self.pid, self.started, self.boot)

    @property
    def uptime_seconds(self) -> float:
        """How long ago it was started."""
        return (datetime.now(UTC) - datetime.fromisoformat(self.since)).total_seconds()


class RunRecords:
    """The records in one folder, one JSON file for each component."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, record: RunRecord) -> None:
        """Write or replace a record, whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(record.name)
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
        beside.replace(path)

    def remove(self, name: str) -> None:
        """Forget a component."""
        self._path(name).unlink(missing_ok=True)

    def read(self) -> dict[str, RunRecord]:
        """All records by name; an unreadable one (the machine died while writing) is ignored."""
        found = {}
        for path in sorted(self._folder.glob("*.json")):
            try:
                record = RunRecord(**json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                continue
            found[record.name] = record
        return found

    def clear_leftovers(self, spare: str | None = None) -> int:
        """SIGKILL what is left of the recorded processes; returns how many processes it was.

        The whole session of each goes: a killed scheduler leaves its LocalExecutor's children
        and their tasks, and a task in a session of its own ends with the child that started it.
        Backends of a killed PostgreSQL are found by their working directory.

        Args:
            spare: a component to leave alone: the supervisor that calls.
        """
        killed = 0
        for record in self.read().values():
            if record.name == spare:
                continue
            killed += process_identity.kill_all(record.identity.session())
            if record.directory and Path(record.directory).exists():
                strays = process_identity.processes_in(Path(record.directory))
                killed += process_identity.kill_all(strays)
                shared_memory.release(Path(record.directory))
            self.remove(record.name)
        return killed

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"
