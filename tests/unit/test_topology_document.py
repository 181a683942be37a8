"""What may be written into the topology's documents: plain values, no secrets."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellferry.errors import InvalidInput
from cellferry.model import Endpoint, Inventory, Part, State
from cellferry.topology.document import plain, without_secrets

#: What a password in a URL can hold without being percent-encoded.
PASSWORDS = st.text(
    alphabet="abcdefghijklmnopqrstuvwxyzABCXYZ0123456789-._~!$&()*+,;=:%", min_size=8
)
TEXT = st.text(alphabet=st.characters(codec=None))  # NUL and lone surrogates too
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
)


@given(PASSWORDS)
def test_a_password_in_a_url_is_hidden(password: str) -> None:
    shown = without_secrets(f"could not reach postgresql://mover:{password}@cell-1:5432/app: no")

    assert shown == "could not reach postgresql://mover:***@cell-1:5432/app: no"


@pytest.mark.parametrize(
    "text",
    [
        "host=cell-1 password=hunter22 user=mover",
        "host=cell-1 password='hunter22 and more' user=mover",
        "redis://:hunter22@cell-1:6379/0",
        "postgresql://cell-1/app?user=mover&password=hunter22",
    ],
)
def test_a_password_in_any_connection_string_is_hidden(text: str) -> None:
    assert "hunter22" not in without_secrets(text)


def test_a_value_with_the_name_of_a_secret_is_hidden() -> None:
    assert plain({"admin_password": "hunter22", "rows": 3}) == {"admin_password": "***", "rows": 3}


def test_an_endpoint_is_kept_without_its_urls() -> None:
    endpoint = Endpoint("postgresql://a:hunter22@h/d", "postgresql://b:hunter23@h/d", {"x": 1})

    assert plain(endpoint) == {"options": {"x": 1}}


def test_results_of_steps_become_plain_json() -> None:
    facts = {
        "inventory": Inventory("postgres", "rows", (Part("public.issues", 3, 100),)),
        "at": datetime(2026, 1, 2, tzinfo=UTC),
        "hash": Decimal(12345678901234567890),
        "state": State.READY,
        "seen": frozenset({"b", "a"}),
    }

    assert plain(facts) == {
        "inventory": {
            "store": "postgres",
            "unit": "rows",
            "parts": [{"name": "public.issues", "count": 3, "bytes": 100, "placement": "owned"}],
            "blockers": [],
            "write_rate_per_s": None,
        },
        "at": "2026-01-02T00:00:00+00:00",
        "hash": 12345678901234567890,
        "state": "ready",
        "seen": ["a", "b"],
    }


@given(JSON)
def test_whatever_is_plain_is_json_that_a_server_takes(value: object) -> None:
    text = json.dumps(plain(value), allow_nan=False)

    assert "\\u0000" not in text
    json.dumps(json.loads(text), ensure_ascii=False).encode()  # no half of a surrogate pair


def test_a_value_without_a_json_form_is_refused() -> None:
    with pytest.raises(InvalidInput, match="object"):
        plain({"x": object()})
