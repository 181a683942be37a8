"""Smoke queries: what a deployment asks of each organization that has moved, from a file.

`smoke_queries.yaml`, named by `organization: {smoke_queries: …}` of `cells.yaml`::

    smoke_queries:
      - name: issues
        store: postgres
        side: new
        query: SELECT count(*) FROM public.issues WHERE organization_id = :organization
        expect: {at_least: 1}
      - name: queue
        store: redis
        query: LLEN org:{:organization}:queue
        expect: at_least
        compare: before

Everything that can be wrong with it is found by `plan`, before anything moves; what needs an
attempt's own credentials (Redis) by `verify`, before the cutover.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cellferry.errors import CellferryError, InvalidInput, TransientError
from cellferry.migration.context import Context
from cellferry.model import Side
from cellferry.stores.base import Store, StoreMove
from cellferry.stores.questions import Answer, BadQuestion, Question

_GUIDE = "docs/platform-guide.md shows a whole file of smoke queries"
#: Longer answers are cut before they are kept: evidence is no place for customers' texts.
LONGEST_KEPT = 200

Relation = Literal["equals", "at_least", "at_most"]
_WORDS = {"equals": "it to be", "at_least": "at least", "at_most": "at most"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Expectation(_Strict):
    """What the answer must be: exactly one of these."""

    equals: bool | int | float | str | None = None
    at_least: float | None = None
    at_most: float | None = None
    not_empty: Literal[True] | None = None

    @model_validator(mode="after")
    def _only_one(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError("give exactly one of equals, at_least, at_most, not_empty")
        return self


class SmokeQuery(_Strict):
    """One query and what it must answer."""

    name: str = Field(min_length=1, max_length=80)
    store: str
    side: Literal["new", "old", "both"] = "new"
    query: str | tuple[str, ...]
    expect: Expectation | Relation
    compare: Literal["before"] | None = None
    timeout_s: float = Field(5.0, gt=0, le=60)

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        if (self.compare == "before") != isinstance(self.expect, str):
            raise ValueError(
                "with `compare: before` write `expect: equals`, `at_least` or `at_most`; without "
                "it a value too, for example `expect: {at_least: 1}`"
            )
        return self

    @property
    def question(self) -> Question:
        """What the store is asked."""
        return Question(self.name, self.query, self.timeout_s)

    def complaint(self, answer: Answer, before: Answer) -> str | None:
        """Return what is wrong with an answer, in words; None if nothing is."""
        if isinstance(self.expect, str):
            relation: str = self.expect
            wanted, source = before, " as before the cutover"
        else:
            relation = next(iter(self.expect.model_fields_set))
            wanted, source = getattr(self.expect, relation), ""
        if relation == "not_empty":
            return None if answer not in (None, "", 0) else f"it answers {answer!r}, expected more"
        if _holds(relation, answer, wanted):
            return None
        return f"it answers {answer!r}, expected {_WORDS[relation]} {wanted!r}{source}"


class _File(_Strict):
    smoke_queries: tuple[SmokeQuery, ...]


def load(path: Path, stores: Mapping[str, Store]) -> tuple[SmokeQuery, ...]:
    """Read and check a file of smoke queries, as far as it can be without asking.

    Raises:
        InvalidInput: names the file, the query and the remedy.
    """
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InvalidInput(
            f"no such file of smoke queries: {path}",
            hint="correct organization.smoke_queries in cells.yaml, or take it out",
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidInput(
            f"{path} cannot be read: {' '.join(str(error).split())}", hint=_GUIDE
        ) from error
    try:
        found = _File.model_validate(raw).smoke_queries
    except ValidationError as error:
        faults = "; ".join(_fault(raw, fault) for fault in error.errors())
        raise InvalidInput(f"{path}: {faults}", hint=_GUIDE) from error
    names = [one.name for one in found]
    for one in found:
        if names.count(one.name) > 1:
            raise _wrong(path, one, "there are two of this name", "give each its own name")
        if one.store not in stores:
            raise _wrong(
                path, one, f"there is no store {one.store!r}", f"use one of {', '.join(stores)}"
            )
        try:
            stores[one.store].check_question(one.question)
        except BadQuestion as error:
            raise _wrong(path, one, error.reason, error.remedy) from error
    return found


def of(context: Context) -> tuple[SmokeQuery, ...]:
    """Return the deployment's smoke queries; none when no file is configured.

    Raises:
        InvalidInput: as `load`.
    """
    path = context.settings.organization.smoke_queries
    return () if path is None else load(path, context.stores)


def rehearse(
    context: Context, kind: str, opened: StoreMove, queries: tuple[SmokeQuery, ...]
) -> dict[str, Answer]:
    """Ask the cell where the organization still lives; return the answers by name.

    A query that its answer there would not please must not halt the organization later.

    Raises:
        InvalidInput: the store refuses a query, or the answer is not as expected; nothing moved.
        TransientError: it did not answer in time.
    """
    path = context.settings.organization.smoke_queries
    answers: dict[str, Answer] = {}
    for one in queries:
        if one.store != kind:
            continue
        try:
            answer = opened.ask(Side.SOURCE, one.question)
        except CellferryError as error:
            if isinstance(error, InvalidInput):
                raise _wrong(path, one, error.message, error.hint or _GUIDE) from error
            if isinstance(error, TransientError):
                error.message = f"{path}: smoke query {one.name!r}: {error.message}"
            raise
        complaint = one.complaint(answer, answer)
        if complaint is not None:
            raise _wrong(
                path,
                one,
                f"in {opened.move.source.name}, before the move, {complaint}",
                "correct what it expects: after the cutover it would halt the migration",
            )
        answers[one.name] = kept(answer)
    return answers


def kept(answer: Answer) -> Answer:
    """Return an answer as it is kept with the migration: a long text is cut."""
    return answer[:LONGEST_KEPT] if isinstance(answer, str) else answer


def _wrong(path: Path | None, query: SmokeQuery, reason: str, remedy: str) -> InvalidInput:
    return InvalidInput(f"{path}: smoke query {query.name!r}: {reason}", hint=remedy)


def _fault(raw: Any, fault: Any) -> str:
    """Say where in the file a fault is, by the query's name where it has one."""
    place = [str(part) for part in fault["loc"]]
    words = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        words = "there is no such setting"
    try:
        name = raw["smoke_queries"][int(place[1])]["name"]
    except (KeyError, IndexError, ValueError, TypeError):
        return f"{'.'.join(place)}: {words}" if place else words
    rest = ".".join(part for part in place[2:])
    return f"smoke query {name!r}: {rest + ': ' if rest else ''}{words}"


def _holds(relation: str, answer: Answer, wanted: Answer) -> bool:
    left, right = _number(answer), _number(wanted)
    if left is None or right is None:
        # Redis answers numbers as text; what is no number on both sides is compared as it is.
        return relation == "equals" and str(kept(answer)) == str(kept(wanted))
    if relation == "equals":
        return left == right
    return left >= right if relation == "at_least" else left <= right


def _number(value: Answer) -> float | None:
    if isinstance(value, bool):
        return float(value)
    try:
        return None if value is None else float(value)
    except ValueError:
        return None
