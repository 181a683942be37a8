"""The file of smoke queries: what is wrong with it is said before anything moves."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellferry.errors import InvalidInput
from cellferry.migration import smoke_queries
from cellferry.migration.smoke_queries import SmokeQuery
from cellferry.stores.postgres import questions as postgres
from cellferry.stores.postgres.store import PostgresStore
from cellferry.stores.questions import BadQuestion, Question
from cellferry.stores.redis import questions as redis
from cellferry.stores.redis.store import RedisStore

STORES = {"postgres": PostgresStore(), "redis": RedisStore()}
COUNT = "SELECT count(*) FROM public.issues WHERE organization_id = :organization"


def load(tmp_path: Path, text: str) -> tuple[SmokeQuery, ...]:
    path = tmp_path / "smoke.yaml"
    path.write_text(text, encoding="utf-8")
    return smoke_queries.load(path, STORES)


def one(**changes: str) -> str:
    values = {
        "name": "issues",
        "store": "postgres",
        "query": COUNT,
        "expect": "{at_least: 1}",
        **changes,
    }
    lines = "\n    ".join(f"{name}: {value}" for name, value in values.items() if value)
    return f"smoke_queries:\n  - {lines}\n"


def test_a_good_file_is_read(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        one() + '  - {name: queue, store: redis, query: "LLEN org:{:organization}:queue", '
        "side: both, expect: at_least, compare: before, timeout_s: 1}\n",
    )
    assert [query.name for query in found] == ["issues", "queue"]
    assert found[0].side == "new"


def test_the_deployments_example_is_good() -> None:
    path = Path(__file__).parents[2] / "include/config/smoke_queries.yaml"
    assert smoke_queries.load(path, STORES)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"store": "mongo"}, "there is no store 'mongo'"),
        ({"query": "DELETE FROM issues WHERE id = :organization"}, "begins with 'DELETE'"),
        ({"query": "/* x */ update issues set id = :organization"}, "begins with 'UPDATE'"),
        ({"query": f"{COUNT}; DROP TABLE issues"}, "more than one statement"),
        ({"query": "SELECT :organisation"}, "there is no parameter :organisation"),
        ({"query": "SELECT 1"}, "does not name :organization"),
        ({"query": "SELECT ':organization'"}, "does not name :organization"),
        ({"store": "redis"}, "SELECT is not one of the commands that only read"),
        ({"store": "redis", "query": '"DEL org:{:organization}:x"'}, "DEL is not one of"),
        ({"store": "redis", "query": '"GET org:{:org}:x"'}, "there is no parameter {:org}"),
        ({"store": "redis", "query": "GET counter"}, "does not name :organization"),
        ({"store": "redis", "query": "GET"}, "no command with a key"),
        ({"expect": "{}"}, "exactly one of equals"),
        ({"expect": "{at_least: 1, at_most: 2}"}, "exactly one of equals"),
        ({"expect": "at_least"}, "compare: before"),
        ({"compare": "before"}, "compare: before"),
        ({"expect": "{at_lest: 1}"}, "at_lest"),
        ({"side": "left"}, "side"),
        ({"timeout_s": "0"}, "timeout_s"),
        ({"quarry": "x"}, "there is no such setting"),
        ({"query": ""}, "query"),
    ],
)
def test_a_bad_query_is_refused_by_file_and_name(
    tmp_path: Path, changes: dict[str, str], says: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        load(tmp_path, one(**changes))
    text = str(refused.value)
    assert says in text
    assert "smoke.yaml" in text
    assert "'issues'" in text
    assert refused.value.hint


@pytest.mark.parametrize("text", ["", "[]", "x: y: z", "smoke_queries: 7", "smoke: []"])
def test_a_file_that_is_none_is_refused_by_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidInput, match=r"smoke\.yaml"):
        load(tmp_path, text)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"absent\.yaml") as refused:
        smoke_queries.load(tmp_path / "absent.yaml", STORES)
    assert "organization.smoke_queries" in str(refused.value)


def test_two_of_one_name_are_refused(tmp_path: Path) -> None:
    text = one()
    with pytest.raises(InvalidInput, match="two of this name"):
        load(tmp_path, text + text.partition("\n")[2])


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("SELECT 1 WHERE 'a' = :organization", "SELECT 1 WHERE 'a' = %(organization)s"),
        ("SELECT '10%' || :organization::text", "SELECT '10%%' || %(organization)s::text"),
        ("SELECT 7 % 2, :organization;", "SELECT 7 %% 2, %(organization)s"),
        ("SELECT ':x', \":x\", $$:x$$, $a$:x$a$, E'\\':x', :organization", None),
        ("SELECT :organization -- :x ;", None),
        ("SELECT /* :x; */ :organization", None),
        ("(SELECT :organization)", None),
        ("WITH a AS (SELECT 1) SELECT :organization FROM a", None),
    ],
)
def test_the_parameter_is_bound_and_texts_are_left_alone(text: str, sent: str | None) -> None:
    found = postgres.statement(Question("q", text))
    assert found.count("%(organization)s") == 1
    if sent is not None:
        assert found == sent
    else:
        assert found == text.replace(":organization", "%(organization)s")


@given(organization=st.text(min_size=1))
def test_an_id_stays_one_argument_whatever_it_holds(organization: str) -> None:
    question = Question("q", "HGET org:{:organization}:settings name")
    sent = redis.command(question, organization)
    assert sent == ("HGET", f"org:{{{organization}}}:settings", "name")


def test_a_list_is_no_sql() -> None:
    with pytest.raises(BadQuestion):
        postgres.statement(Question("q", ("SELECT", ":organization")))


def query(expect: object, compare: str | None = None) -> SmokeQuery:
    return SmokeQuery.model_validate(
        {"name": "q", "store": "redis", "query": "x", "expect": expect, "compare": compare}
    )


@pytest.mark.parametrize(
    ("expect", "answer", "good"),
    [
        ({"equals": 5}, "5", True),
        ({"equals": 5}, 6, False),
        ({"equals": "on"}, "on", True),
        ({"equals": True}, 1, True),
        ({"at_least": 1}, 0, False),
        ({"at_least": 1}, None, False),
        ({"at_least": 1}, "many", False),
        ({"at_most": 3}, 3, True),
        ({"not_empty": True}, "x", True),
        ({"not_empty": True}, None, False),
        ({"not_empty": True}, 0, False),
        ({"not_empty": True}, "", False),
    ],
)
def test_an_answer_is_judged(expect: object, answer: object, good: bool) -> None:
    complaint = query(expect).complaint(answer, None)  # type: ignore[arg-type]
    assert (complaint is None) == good


@pytest.mark.parametrize(
    ("expect", "before", "answer", "good"),
    [
        ("equals", 5, 5, True),
        ("equals", "a", "b", False),
        ("at_least", 5, 7, True),
        ("at_least", 5, 4, False),
        ("at_most", 5, 6, False),
        ("equals", None, None, True),
    ],
)
def test_an_answer_is_compared_with_before(
    expect: str, before: object, answer: object, good: bool
) -> None:
    complaint = query(expect, "before").complaint(answer, before)  # type: ignore[arg-type]
    assert (complaint is None) == good
