"""The data map's YAML file: what the catalog cannot say about a schema.

Everything in it is optional. Unknown keys, tables and columns are errors that name the place in
the file. See `docs/data-map.md` for the reference.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from cellferry import plain_yaml
from cellferry.errors import InvalidInput

DOCUMENTATION = "see docs/data-map.md"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class OrganizationKey(_Strict):
    """Which table and column hold the organization's key."""

    table: str | None = None
    column: str | None = None
    key_columns: list[str] = Field(default_factory=list)
    """Names that always mean the organization's key, whether or not a constraint says so."""


class PlacementGlobs(BaseModel):
    """Tables by placement, as `schema.table` or globs such as `audit.*`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)
    global_: list[str] = Field(default_factory=list, alias="global")
    cell_local: list[str] = Field(default_factory=list, alias="cell-local")
    referenced: list[str] = Field(default_factory=list)


class StatedForeignKey(_Strict):
    """A foreign key that no constraint declares."""

    table: str
    columns: list[str] = Field(min_length=1)
    references: str
    referenced_columns: list[str] | None = None
    """The parent's primary key, when left out."""

    @model_validator(mode="after")
    def _same_length(self) -> StatedForeignKey:
        theirs = self.referenced_columns
        if theirs is not None and len(theirs) != len(self.columns):
            raise ValueError("columns and referenced_columns must have the same length")
        return self


class StatedOwner(_Strict):
    """One way from a row to its organization: a key column, or a parent that has an owner."""

    column: str | None = None
    through: str | None = None
    columns: list[str] | None = None
    """Columns that refer to `through`; found by themselves when one foreign key leads there."""
    through_columns: list[str] | None = None
    """The parent's primary key, when left out."""
    when: str | None = None
    """SQL condition over the row, which is written `{row}`."""

    @model_validator(mode="after")
    def _one_way(self) -> StatedOwner:
        if (self.column is None) == (self.through is None):
            raise ValueError("give either column or through")
        if self.column is not None and (self.columns or self.through_columns):
            raise ValueError("columns and through_columns belong to through, not to column")
        if self.columns and self.through_columns and len(self.columns) != len(self.through_columns):
            raise ValueError("columns and through_columns must have the same length")
        if self.when is not None:
            if "{row}" not in self.when:
                raise ValueError("when must name the row as {row}, for example {row}.kind = 'x'")
            if ";" in self.when or "%" in self.when:
                raise ValueError(
                    "when is one condition without ; and %: write starts_with() instead of LIKE"
                )
        return self


class StatedTable(_Strict):
    """What the file says about one table."""

    owners: list[StatedOwner] | None = Field(default=None, min_length=1)
    """Ways to the organization; the first that gives one wins."""
    key: list[str] | None = Field(default=None, min_length=1)
    """Columns of the unique index that identifies a row, instead of the primary key."""
    plain_numbers: list[str] = Field(default_factory=list)
    """Columns of type `oid` that hold numbers, not large objects or catalog entries."""


class DataMapFile(_Strict):
    """The whole file."""

    version: Literal[1] = 1
    organization: OrganizationKey = OrganizationKey()
    ignore_schemas: list[str] = Field(default_factory=list)
    unplaced: Literal["refuse", "global", "cell-local"] = "refuse"
    """Placement of tables that nothing else places."""
    placement: PlacementGlobs = PlacementGlobs()
    foreign_keys: list[StatedForeignKey] = Field(default_factory=list)
    tables: dict[str, StatedTable] = Field(default_factory=dict)

    _source: str = PrivateAttr(default="data map")

    @property
    def source(self) -> str:
        """Where it was read from, for messages."""
        return self._source

    def read_from(self, source: str) -> DataMapFile:
        """Remember where the file was read from."""
        self._source = source
        return self

    def fault(self, place: str, message: str, remedy: str = DOCUMENTATION) -> InvalidInput:
        """Return the error for a fault at `place` of this file."""
        return InvalidInput(f"{self.source}: {place}: {message}", hint=remedy, where=self.source)


def load(path: Path) -> DataMapFile:
    """Read and check the file's form; names are checked against a catalog by `discover`.

    Raises:
        InvalidInput: the file is missing or wrong; names the place in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput(
            f"cannot read the data map {path}: {error.strerror}",
            hint="set organization.data_map in cells.yaml",
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"the data map {path} is not UTF-8", hint=DOCUMENTATION) from error
    return parse(text, source=str(path))


def parse(text: str, *, source: str = "data map") -> DataMapFile:
    """Check the form of a data map's text.

    Raises:
        InvalidInput: it is not YAML or does not follow the reference.
    """
    try:
        raw: Any = plain_yaml.read(text)
    except yaml.YAMLError as error:
        raise InvalidInput(f"{source} is not YAML: {error}", hint=DOCUMENTATION) from error
    try:
        found = DataMapFile.model_validate({} if raw is None else raw)
    except ValidationError as error:
        faults = "; ".join(
            f"{_place(fault['loc'])}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        )
        raise InvalidInput(f"{source}: {faults}", hint=DOCUMENTATION, where=source) from error
    return found.read_from(source)


def near(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean …" for a mistyped name, or nothing."""
    names = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {', '.join(names)}?" if names else ""


def _place(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "file"
