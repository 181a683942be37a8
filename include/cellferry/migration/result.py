"""What a step answers: counts and ids only, fit for XCom, `--json` and evidence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any


def plain(value: Any) -> Any:
    """Return `value` as JSON's types: dataclasses as dicts, enums as text, times in ISO 8601."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list | frozenset | set):
        return [plain(entry) for entry in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did. `repeated` says that an earlier attempt had done it already."""

    step: str
    migration: int
    organization: str
    state: str
    summary: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    repeated: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        result: dict[str, Any] = plain(self)
        return result
