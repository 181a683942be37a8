"""What a person asked for in the environment of `make`: `ROWS=100000 KEEP=1 make demo`."""

from __future__ import annotations

import os

from cellferry.errors import InvalidInput


def whole_number(name: str, default: int, low: int, high: int) -> int:
    """Read a whole number.

    Raises:
        InvalidInput: it is none, or out of bounds.
    """
    text = os.environ.get(name, "") or str(default)
    try:
        value = int(text)
    except ValueError:
        raise InvalidInput(f"{name}={text} is not a whole number") from None
    if not low <= value <= high:
        raise InvalidInput(f"{name}={value} is out of bounds", hint=f"{low} to {high}")
    return value


def is_set(name: str) -> bool:
    """Whether a switch is on: anything but nothing and `0`."""
    return os.environ.get(name, "") not in {"", "0"}
