"""Which keys are an organization's, and only its."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellferry.errors import InvalidInput
from cellferry.stores.redis.key_prefix import KeyPrefix, application_user, escape

OPTIONS = {"key_prefix": "org:{$organization}:", "application_user": "org-$organization"}

IDS = st.text(
    st.characters(exclude_categories=("Cc", "Cs", "Zs", "Zl", "Zp")), min_size=1, max_size=12
).filter(lambda text: "}:" not in text)


def prefix(organization: str, **options: str) -> KeyPrefix:
    return KeyPrefix.of({**OPTIONS, **options}, organization, where="cell-1/redis")


def glob_matches(pattern: str, text: str) -> bool:
    """The part of the server's glob that a prefix uses: escapes, then one star at the end."""
    assert pattern.endswith("*")
    literal, rest = "", iter(pattern[:-1])
    for letter in rest:
        assert letter not in "*?[]^" or literal is None, "a metacharacter that is not escaped"
        literal += next(rest) if letter == "\\" else letter
    return text.startswith(literal)


def test_the_keys_of_organization_4_are_not_those_of_42() -> None:
    assert not prefix("4").owns(prefix("42").encoded + b"key")
    assert not glob_matches(prefix("4").pattern, prefix("42").text + "key")


@given(IDS)
def test_a_pattern_matches_the_organizations_own_keys(organization: str) -> None:
    found = prefix(organization)
    assert glob_matches(found.pattern, found.text + "any key")


@given(IDS, IDS)
def test_no_pattern_matches_another_organizations_keys(one: str, other: str) -> None:
    if one != other:
        assert not prefix(one).owns(prefix(other).encoded + b"key")


@pytest.mark.parametrize("organization", ["", "a b", "a\tb", "a\nb", "a\x00b", "a\u00a0b"])
def test_an_id_that_no_acl_rule_can_express_is_refused(organization: str) -> None:
    with pytest.raises(InvalidInput):
        prefix(organization)


def test_an_id_that_holds_the_terminator_is_refused() -> None:
    with pytest.raises(InvalidInput, match="ends the prefix"):
        prefix("4}:x")


@pytest.mark.parametrize(
    "template",
    [
        "org:",
        "org:$organization",
        "$organization$organization:",
        "org:$organizationx:",
        "org $organization:",
        "cellferry:$organization:",
        None,
    ],
)
def test_a_template_that_does_not_set_organizations_apart_is_refused(template: str) -> None:
    with pytest.raises(InvalidInput, match="key_prefix"):
        KeyPrefix.of({"key_prefix": template}, "4", where="cell-1/redis")


def test_glob_characters_are_taken_literally() -> None:
    assert escape("a*b?[c]^\\") == "a\\*b\\?\\[c\\]\\^\\\\"


def test_one_application_user_for_all_organizations_is_refused() -> None:
    with pytest.raises(InvalidInput, match="application_user"):
        application_user({"application_user": "app"}, "4", where="cell-1/redis")
