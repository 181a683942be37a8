"""What goes into the topology's jsonb columns: plain values, and never a secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from math import isfinite
from pathlib import PurePath
from typing import Any

from psycopg.types.json import Jsonb

from cellferry.errors import InvalidInput

_HIDDEN = "***"
#: The password of a URL, and of a libpq connection string.
_URL_PASSWORD = re.compile(
    r"(?P<head>\b[a-z][a-z0-9+.-]*://[^\s/@:]*:)[^\s@/]+(?=@)", re.IGNORECASE
)
_DSN_PASSWORD = re.compile(r"(?P<head>\bpassword\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&]+)", re.IGNORECASE)
_SECRET_NAME = re.compile(r"passw(or)?d|secret|token|api_?key|credential", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """Return `text` with the passwords of URLs and connection strings hidden."""
    text = _URL_PASSWORD.sub(rf"\g<head>{_HIDDEN}", text)
    return _DSN_PASSWORD.sub(rf"\g<head>{_HIDDEN}", text)


def document(values: Mapping[str, Any] | None) -> Jsonb:
    """Return `values` as a jsonb parameter: dataclasses, enums and times become plain JSON.

    Raises:
        InvalidInput: a value has no JSON form.
    """
    return Jsonb(plain(values or {}))


def plain(value: Any) -> Any:  # noqa: C901 one branch for each kind of value
    """Return the plain JSON form of `value`, secrets hidden."""
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float):
        return value if isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {
            _text(str(key)): _HIDDEN
            if isinstance(item, str) and item and _SECRET_NAME.search(str(key))
            else plain(item)
            for key, item in value.items()
        }
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        # Fields that `repr` hides are secrets: URLs with passwords.
        return {
            field.name: plain(getattr(value, field.name)) for field in fields(value) if field.repr
        }
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, PurePath):
        return str(value)
    raise InvalidInput(f"a value of type {type(value).__name__} cannot be kept in the topology")


def _text(value: str) -> str:
    """Return what jsonb takes: no NUL, no half of a surrogate pair."""
    storable = value.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
    return without_secrets(storable)
