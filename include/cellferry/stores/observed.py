"""What a look at one side of a move tells: where its server stands, and what it holds.

For evidence. A look changes nothing, needs no lease, and may be taken at any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ObservedPart:
    """One part of what a store holds of an organization: a table, a kind of key.

    Attributes:
        hash: of everything in it, whatever the order in which it was read.
        first_expiry: UTC in ISO 8601; before it nothing in this part disappears by itself. None
            where nothing expires.
    """

    name: str
    count: int
    hash: str
    first_expiry: str | None = None


@dataclass(frozen=True, slots=True)
class Observed:
    """What one store of one cell holds of an organization at one moment.

    Attributes:
        position: where the server stood; see `position` of each store's `observation`.
        at_work: sessions of this migration's controllers that were there at that moment.
    """

    unit: str
    position: Mapping[str, Any]
    parts: tuple[ObservedPart, ...]
    at_work: int
