"""What plan and sync decide from figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cellferry.cli import parse_options
from cellferry.errors import InvalidInput
from cellferry.migration.options import MoveOptions
from cellferry.migration.plan import choose_strategy
from cellferry.migration.rates import Rates
from cellferry.migration.result import plain
from cellferry.migration.sync import is_small
from cellferry.model import Inventory, Part, Round, State, Strategy

RATES = Rates(copy_per_s={"postgres": 10_000, "redis": 10_000}, pause_s=0.05, basis="a test")


def inventories(rows: int) -> dict[str, Inventory]:
    return {"postgres": Inventory("postgres", "rows", (Part("public.issues", rows, rows * 100),))}


@pytest.mark.parametrize(
    ("one", "small"),
    [
        (Round(applied=20, remaining=25, bytes=0, seconds=0.05), True),
        (Round(applied=20, remaining=25, bytes=0, seconds=0.6), False),
        # a backlog behind a short round: the next one takes as many times longer
        (Round(applied=1_000, remaining=20_000, bytes=0, seconds=0.05), False),
        (Round(applied=0, remaining=0, bytes=0, seconds=0.01), True),
        (Round(applied=0, remaining=50_000, bytes=0, seconds=0.01), False),
    ],
)
def test_a_round_is_small_when_the_next_fits_the_budget(one: Round, small: bool) -> None:
    assert is_small(one, budget_s=0.5) is small


@given(
    applied=st.integers(0, 100_000),
    remaining=st.integers(0, 100_000),
    seconds=st.floats(0.0001, 100),
)
def test_a_longer_backlog_never_makes_a_round_small(
    applied: int, remaining: int, seconds: float
) -> None:
    if not is_small(Round(applied, remaining, 0, seconds), 0.5):
        assert not is_small(Round(applied, remaining + 1, 0, seconds), 0.5)


def test_a_tiny_organization_moves_under_the_gate_and_a_large_one_online() -> None:
    options = MoveOptions()
    assert choose_strategy(options, inventories(10), RATES)[0] is Strategy.FREEZE_FIRST
    assert choose_strategy(options, inventories(1_000_000), RATES)[0] is Strategy.ONLINE


def test_the_operator_overrules_the_choice() -> None:
    options = MoveOptions(strategy="freeze-first")
    strategy, reason = choose_strategy(options, inventories(1_000_000), RATES)
    assert (strategy, reason) == (Strategy.FREEZE_FIRST, "set by the operator")


@pytest.mark.parametrize(
    "settings",
    [("nonsense=1",), ("batch_rows=many",), ("ttl_s=-1",), ("batch_rows",)],
    ids=["unknown name", "wrong type", "out of bounds", "no value"],
)
def test_a_wrong_option_is_refused_by_name(settings: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInput, match=settings[0].split("=")[0]):
        parse_options(settings)


def test_options_do_not_change() -> None:
    with pytest.raises(ValidationError):
        MoveOptions().ttl_s = 5  # type: ignore[misc]


def test_results_are_plain_json() -> None:
    assert plain({"state": State.READY, "parts": (Part("a", 1, 2),), "other": {3}}) == {
        "state": "ready",
        "parts": [{"name": "a", "count": 1, "bytes": 2, "placement": "owned"}],
        "other": [3],
    }
