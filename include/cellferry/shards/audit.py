"""Whether live keys lie where the set's placement says: the runbook does not name vnode labels.

With another label about (N - 1) / N of the keys of N shards are misplaced, and a re-sharding would
move the wrong ones. So keys of every shard are looked up in rings with each known form of label.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

import numpy as np

from cellferry.errors import Blocked, InvalidInput
from cellferry.settings import ConnectionSource
from cellferry.shards.placement import Ring, ring_positions
from cellferry.shards.settings import ShardSet
from cellferry.shards.sides import open_side

#: Forms seen in the wild, of which `{shard}-{vnode}` is the commonest.
LABELS = (
    "{shard}-{vnode}",
    "{shard}:{vnode}",
    "{shard}#{vnode}",
    "{shard}_{vnode}",
    "{shard}/{vnode}",
    "{shard}.{vnode}",
    "{shard}{vnode}",
    "{shard}-vnode-{vnode}",
    "{shard}:vnode:{vnode}",
    "{shard}-vnode{vnode}",
    "{shard}#vnode{vnode}",
    "{shard}-v{vnode}",
    "{shard}&&VN{vnode}",
    "{shard}-replica-{vnode}",
    "{vnode}-{shard}",
    "{vnode}:{shard}",
    "{vnode}#{shard}",
    "{vnode}{shard}",
)
FITS = 0.9
"""Share of the keys that must lie right. What is left by an earlier re-sharding lies wrong."""
CERTAIN = 0.999
AUDIT_KEYS = 5000
"""Keys of each shard that are looked at."""
_CONFIGURED = "as configured"


@dataclass(frozen=True)
class AuditResult:
    """How many of the sampled keys lie where each form says.

    Attributes:
        set_name: of the shard set.
        configured: the set's own label; `as configured` for a placement without labels.
        keys: how many were looked at.
        fits: by label, the share of the keys that lie right, 0 to 1.
        shards: how many the set has; of a single one every label fits.
    """

    set_name: str
    configured: str
    keys: int
    fits: Mapping[str, float]
    shards: int

    @property
    def best(self) -> str:
        """The form that fits best; the configured one when none is better."""
        return max(self.fits, key=lambda label: (self.fits[label], label == self.configured))

    @property
    def share(self) -> float:
        """The share of the keys that lie where the set's own settings say."""
        return self.fits[self.configured]

    @property
    def note(self) -> str:
        """What an operator should know although nothing is refused; empty if nothing."""
        if self.shards == 1:
            return "a set of one shard fits every label: see that the label is what its clients use"
        if not self.keys:
            return "there are no keys: whether the label is what the clients use is not known"
        if self.share < CERTAIN:
            return f"{1 - self.share:.1%} of {self.keys} sampled keys lie on another shard"
        return ""

    def refuse(self) -> None:
        """Raise unless the set's own settings fit.

        Raises:
            InvalidInput: another known label fits.
            Blocked: none does.
        """
        if self.shards == 1 or not self.keys or self.share >= FITS:
            return
        best = self.best
        if self.fits[best] >= FITS:
            raise InvalidInput(
                f"the vnode label {self.configured!r} fits {self.share:.1%} of {self.keys} live"
                f" keys, {best!r} fits {self.fits[best]:.1%}",
                hint=f"set placement.label to {best!r}",
                where=f"shard set {self.set_name}",
            )
        raise Blocked(
            f"the placement fits {self.share:.1%} of {self.keys} live keys"
            + (
                f"; of {len(self.fits)} known vnode labels {best!r} fits best,"
                f" {self.fits[best]:.1%}"
                if len(self.fits) > 1
                else ""
            ),
            hint="give the shards the names, order, weights, vnodes, label and key_prefix that the"
            " clients use; clean up what an earlier re-sharding left",
            where=f"shard set {self.set_name}",
        )

    def document(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {
            "set": self.set_name,
            "configured": self.configured,
            "keys": self.keys,
            "fits": {label: round(share, 6) for label, share in self.fits.items()},
            "shards": self.shards,
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read what `document` wrote."""
        return cls(
            document["set"],
            document["configured"],
            document["keys"],
            document["fits"],
            document["shards"],
        )


def audit(
    shard_set: ShardSet, source: ConnectionSource, *, sample: int = AUDIT_KEYS
) -> AuditResult:
    """Look up `sample` keys of each shard in rings with every known label. Changes nothing.

    Raises:
        Unreachable, AccessDenied: of a shard, which it names.
    """

    def some(name: str) -> list[bytes]:
        side = open_side(shard_set, name, source)
        try:
            return list(islice((key for page in side.scan() for key in page.keys), sample))
        finally:
            side.close()

    names = list(shard_set.connections)
    with ThreadPoolExecutor(len(names), "audit") as pool:
        return judge(shard_set, dict(zip(names, pool.map(some, names), strict=True)))


def judge(shard_set: ShardSet, keys: Mapping[str, Sequence[bytes]]) -> AuditResult:
    """Compare where `keys` lie, by shard, with where each form says."""
    placed = shard_set.placement
    index = {one.name: at for at, one in enumerate(placed.shards)}
    names = [name for name in keys if keys[name]]
    lie = np.repeat([index[name] for name in names], [len(keys[name]) for name in names])
    skip = len(shard_set.key_prefix)
    ids = [key[skip:] for name in names for key in keys[name]]
    configured = placed.label if isinstance(placed, Ring) else _CONFIGURED
    if not ids:
        fits = {configured: 1.0}
    elif isinstance(placed, Ring):
        positions = ring_positions(ids)
        fits = {
            ring.label: float((ring.owners_at(positions) == lie).mean()) for ring in _rings(placed)
        }
    else:
        fits = {configured: float((placed.place_many(ids) == lie).mean())}
    return AuditResult(shard_set.name, configured, len(ids), fits, len(placed.shards))


def _rings(placed: Ring) -> Iterator[Ring]:
    for label in dict.fromkeys((placed.label, *LABELS)):
        yield Ring(placed.shards, placed.vnodes, label)
