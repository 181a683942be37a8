"""What a set of shards is: a YAML file, validated before anything runs.

::

    name: dedup
    kind: redis                      # or postgres
    key_prefix: "dedup:"             # in front of each id, in the servers' keys
    placement: {algorithm: ring, vnodes: 150, label: "{shard}-{vnode}"}
    shards:
      shard-0: {connection: dedup-0}
      shard-1: {connection: dedup-1, weight: 2.0}

Names of connections, never URLs (see `cellferry.settings`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from psycopg import ProgrammingError, conninfo
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cellferry import plain_yaml
from cellferry.errors import InvalidInput
from cellferry.settings import ConnectionSource, resolve
from cellferry.shards.placement import (
    LABEL,
    VNODES,
    Indexes,
    Jump,
    Placement,
    Rendezvous,
    Ring,
    Shard,
    placement,
)
from cellferry.shards.server import KINDS
from cellferry.stores.redis.wire import Address

OWN_KEYS = b"cellferry:shards:"
"""What our own keys in a server begin with: never moved."""
_GUIDE = "docs/resharding.md shows a whole file"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PlacementFile(_Strict):
    """How keys are placed."""

    algorithm: Literal["ring", "jump", "rendezvous"] = "ring"
    vnodes: int | None = Field(default=None, ge=1, le=100_000)
    label: str | None = None


class ShardFile(_Strict):
    """One shard."""

    connection: str = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)


class ShardSetFile(_Strict):
    """The whole file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    kind: Literal["redis", "postgres"]
    placement: PlacementFile = Field(default_factory=PlacementFile)
    key_prefix: str = ""
    shards: dict[str, ShardFile] = Field(min_length=1)


@dataclass(frozen=True)
class ShardSet:
    """Servers that hold one kind of keys between them.

    A key in a server is the prefix and the id; what is placed is the id. Keys without the prefix
    are somebody else's.

    Attributes:
        name: the set's, in the topology.
        kind: `redis` or `postgres`.
        key_prefix: what every key of the set begins with.
        placement: which shard an id belongs to.
        connections: by shard, the *name* of its connection.

    Raises:
        InvalidInput: unknown kind; a shard without a connection, or one that nobody placed; two
            shards with one connection.
    """

    name: str
    kind: str
    key_prefix: bytes
    placement: Placement
    connections: Mapping[str, str] = field(hash=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidInput(
                f"there is no kind of shard {self.kind!r}", hint=f"choose {' or '.join(KINDS)}"
            )
        if self.key_prefix.startswith(OWN_KEYS):
            raise InvalidInput(
                f"key_prefix begins with {OWN_KEYS.decode()!r}, as what cellferry keeps there",
                hint="choose another prefix",
                where=f"shard set {self.name}",
            )
        placed = [one.name for one in self.placement.shards]
        for name in sorted({*placed} ^ {*self.connections}):
            raise InvalidInput(
                f"shard {name!r} has no connection"
                if name in placed
                else f"there is a connection for shard {name!r}, which is not placed",
                hint="name each shard once, with its connection",
                where=f"shard set {self.name}",
            )
        _insist_on_difference(
            ((name, f"connection {self.connections[name]!r}") for name in placed), self.name
        )

    def stored(self, id_: bytes) -> bytes:
        """Return the key of `id_` in a server.

        Raises:
            InvalidInput: it would be one of ours, which are not moved.
        """
        key = self.key_prefix + id_
        if key.startswith(OWN_KEYS):
            raise InvalidInput(
                f"an id's key begins with {OWN_KEYS.decode()!r}, as what cellferry keeps there",
                hint="give the set a key_prefix, or its ids another form",
            )
        return key

    def owns(self, key: bytes) -> bool:
        """Whether a server's key is one of this set's."""
        return key.startswith(self.key_prefix)

    def owner(self, key: bytes) -> str:
        """Return the shard that a server's key belongs to."""
        return self.placement.place(key[len(self.key_prefix) :])

    def owners(self, keys: Sequence[bytes]) -> Indexes:
        """Return for each of the servers' keys the index of its shard in `placement.shards`."""
        skip = len(self.key_prefix)
        return self.placement.place_many([key[skip:] for key in keys] if skip else keys)

    def document(self) -> dict[str, Any]:
        """Return it as JSON's types; equal documents are equal sets."""
        return {
            "name": self.name,
            "kind": self.kind,
            "key_prefix": self.key_prefix.decode("utf-8", "surrogateescape"),
            "placement": self.placement.describe(),
            "connections": [
                [one.name, self.connections[one.name]] for one in self.placement.shards
            ],
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read what `document` wrote."""
        return cls(
            name=document["name"],
            kind=document["kind"],
            key_prefix=document["key_prefix"].encode("utf-8", "surrogateescape"),
            placement=placement(document["placement"]),
            connections={str(name): str(one) for name, one in document["connections"]},
        )


def load(path: Path) -> ShardSet:
    """Read and validate a set's file.

    Raises:
        InvalidInput: the file is missing or wrong; names the place in it.
    """
    try:
        raw: Any = plain_yaml.read(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(
            f"cannot read {path}: {error.strerror}", hint="give the path of the shards' file"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInput(
            f"{path} is not YAML: {' '.join(str(error).split())}", hint=_GUIDE
        ) from error
    if not isinstance(raw, dict):
        found = "is empty" if raw is None else f"holds a {type(raw).__name__}, not a shard set"
        raise InvalidInput(f"{path} {found}", hint=_GUIDE)
    try:
        file = ShardSetFile.model_validate(raw)
    except ValidationError as error:
        faults = "; ".join(_fault(one["loc"], one["type"], one["msg"]) for one in error.errors())
        raise InvalidInput(f"{path}: {faults}", hint=_GUIDE) from error
    try:
        return _shard_set(file)
    except InvalidInput as error:
        raise InvalidInput(
            f"{path}: {error.message}", hint=error.hint, where=error.where
        ) from error


def check_servers(sets: Iterable[ShardSet], source: ConnectionSource) -> None:
    """See that each connection of `sets` can be resolved, and leads to a server of its own.

    Of two connections to one server, one is taken for the old owner of a key and one for the new:
    clean-up would delete the only copy.

    Raises:
        InvalidInput: a connection is not defined or cannot be read, or two are one server.
    """
    places: dict[str, str] = {}
    for one in sets:
        for name in sorted(set(one.connections.values())):
            places.setdefault(name, _place(one.kind, name, source))
    _insist_on_difference(
        ((f"{name}", f"server {place}") for name, place in places.items()), None, "connection"
    )


def _place(kind: str, name: str, source: ConnectionSource) -> str:
    """Return the server and database behind a connection, without its password."""
    url = resolve(name, source)
    if kind == "redis":
        address = Address.parse(url, f"connection {name}")
        return f"{_host(address.host)}:{address.port}/{address.database}"
    try:
        found = conninfo.conninfo_to_dict(url)
    except ProgrammingError as error:
        raise InvalidInput(
            f"the URL of connection {name!r} cannot be read",
            hint="write it as postgresql://user:password@host:port/database",
        ) from error
    host = _host(str(found.get("host") or found.get("hostaddr") or "localhost"))
    return f"{host}:{found.get('port') or 5432}/{found.get('dbname') or found.get('user') or ''}"


def _host(name: str) -> str:
    return "127.0.0.1" if name in {"localhost", "::1"} else name.lower()


def _insist_on_difference(
    pairs: Iterable[tuple[str, str]], set_name: str | None, what: str = "shard"
) -> None:
    first: dict[str, str] = {}
    for name, place in pairs:
        other = first.setdefault(place, name)
        if other != name:
            raise InvalidInput(
                f"{what}s {other!r} and {name!r} are both {place}",
                hint="each shard has one name and one address",
                where=None if set_name is None else f"shard set {set_name}",
            )


def _shard_set(file: ShardSetFile) -> ShardSet:
    shards = tuple(Shard(name, one.weight) for name, one in file.shards.items())
    how = file.placement
    if how.algorithm != "ring" and (how.vnodes is not None or how.label is not None):
        raise InvalidInput(
            f"placement: {how.algorithm} has neither vnodes nor a label",
            hint="leave them out, or choose the ring",
        )
    placed: Placement
    if how.algorithm == "jump":
        placed = Jump(shards)
    elif how.algorithm == "rendezvous":
        placed = Rendezvous(shards)
    else:
        placed = Ring(
            shards,
            VNODES if how.vnodes is None else how.vnodes,
            LABEL if how.label is None else how.label,
        )
    return ShardSet(
        name=file.name,
        kind=file.kind,
        key_prefix=file.key_prefix.encode(),
        placement=placed,
        connections={name: one.connection for name, one in file.shards.items()},
    )


def _fault(place: tuple[int | str, ...], kind: str, message: str) -> str:
    where = ".".join(str(part) for part in place)
    if kind != "extra_forbidden":
        return f"{where}: {message}"
    models: tuple[type[BaseModel], ...] = (ShardSetFile, PlacementFile, ShardFile)
    known = [name for model in models for name in model.model_fields]
    near = difflib.get_close_matches(str(place[-1]), known, n=1)
    return f"{where}: there is no such setting" + (f", did you mean {near[0]!r}?" if near else "")
