"""What an operator gets for bad input: the value, the place, the remedy; and nothing has changed.

Each case is met twice, as an exception of the library and as the `cellferry` command's message
and exit status. Params of the DAG are in `tests/dags`, the preflight's many blockers in
`test_preflight.py`. docs/runbooks/messages.md explains the same messages to operators.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest
from click.testing import CliRunner, Result
from psycopg import sql

from cellferry import errors, settings
from cellferry.cli import main
from cellferry.migration import Context, MoveOptions, steps
from cellferry.model import Actor
from fixtures.cells import TwoCells

SECRET = "hunter2"  # the password that is wrong, and must not be shown
WRONG_INPUT, PERMANENT, TRY_AGAIN = 2, 1, 75


@dataclass
class Operator:
    """Somebody at a terminal, with connections in the environment and a `cells.yaml`."""

    cells: TwoCells
    file: Path

    def runs(self, *arguments: str, **connections: str) -> Result:
        """Run `cellferry …`; `connections` replace those of the cells."""
        urls = {**self.cells.connections, **connections}
        environment = {settings.variable(name): url for name, url in urls.items()}
        environment |= {"CELLFERRY_CONFIG": str(self.file), "COLUMNS": "1000"}
        return CliRunner().invoke(main, list(arguments), env=environment)

    def is_told(self, status: int, *words: str, by: Result) -> None:
        """Check that `by` says all `words`, in plain text, and ends with `status`."""
        assert by.exception is None or isinstance(by.exception, SystemExit), by.exception
        for word in (*words, "remedy: "):
            assert word in by.output, by.output
        assert "Traceback" not in by.output
        assert SECRET not in by.output
        assert by.exit_code == status, by.output

    def plans(self, **connections: str) -> errors.CellferryError:
        """Plan and record org-7's move through the library; return the refusal."""
        made = Context.from_settings(
            settings.load(self.file), {**self.cells.connections, **connections}.get,
            actor=Actor("test"),
        )  # fmt: skip
        with pytest.raises(errors.CellferryError) as refused, made as context:
            steps.plan(context, "org-7", "cell-2", options=MoveOptions(), record=True)
        assert SECRET not in str(refused.value)
        assert refused.value.hint
        return refused.value

    def rewrites(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change `cells.yaml`."""
        written = json.loads(self.file.read_text(encoding="utf-8"))
        change(written)
        self.file.write_text(json.dumps(written), encoding="utf-8")


@pytest.fixture
def operator(cells: TwoCells, tmp_path: Path) -> Operator:
    for key in (7, 8):
        cells.add_organization(key)
    return Operator(cells, tmp_path / "cells.yaml")


def everything(cells: TwoCells) -> dict[str, Any]:
    """What a refused command must leave as it was."""
    with cells.context() as context:
        found: dict[str, Any] = {"migrations": [one.id for one in context.topology.migrations()]}
    for cell in ("cell-1", "cell-2"):
        found[cell] = [cells.rows(cell, key) | cells.keys(cell, key) for key in ("7", "8")]
        with cells.admin(cell) as connection:
            prepared = connection.execute("SELECT to_regclass('cellferry.gate')").fetchone()[0]
        found[f"{cell} traces"] = cells.traces(cell) if prepared else "not prepared"
    return found


@contextmanager
def unchanged(cells: TwoCells) -> Iterator[None]:
    before = everything(cells)
    yield
    assert everything(cells) == before


def other(url: str, *, password: str | None = None, port: int | None = None) -> str:
    parts = urlsplit(url)
    login = f"{parts.username}:{password or parts.password}"
    return urlunsplit(parts._replace(netloc=f"{login}@{parts.hostname}:{port or parts.port}"))


PLAN = ("plan", "org-7", "--to", "cell-2")

COMMANDS = {
    "unknown organization": (
        ("plan", "org-77", "--to", "cell-2"),
        WRONG_INPUT,
        ("there is no organization 'org-77'", "did you mean org-7 or org-8?"),
    ),
    "unknown organization, to move": (
        ("move", "ogr-7", "--to", "cell-2"),
        WRONG_INPUT,
        ("there is no organization 'ogr-7'", "did you mean org-7"),
    ),
    "unknown organization, its status": (
        ("status", "nobody"),
        WRONG_INPUT,
        ("there is no organization 'nobody'", "give its id or its slug"),
    ),
    "a step without a migration": (
        ("copy", "org-7"),
        PERMANENT,
        ("organization org-7 has no migration", "cellferry plan org-7 --to CELL --record"),
    ),
    "unknown cell": (
        ("plan", "org-7", "--to", "cell-9"),
        WRONG_INPUT,
        ("there is no cell 'cell-9'", "choose one of cell-1, cell-2"),
    ),
    "unknown cell to prepare": (
        ("prepare-cell", "cell-9"),
        WRONG_INPUT,
        ("there is no cell 'cell-9'", "choose one of cell-1, cell-2"),
    ),
    "source is destination": (
        ("plan", "org-7", "--to", "cell-1", "--record"),
        WRONG_INPUT,
        ("organization org-7 lives in cell-1 already", "choose another destination"),
    ),
    "unknown option": (
        (*PLAN, "--record", "--set", "nonsense=1"),
        WRONG_INPUT,
        ("there is no option 'nonsense'", "options: arm_deadline_s, batch_rows"),
    ),
    "misspelt option": (
        (*PLAN, "--record", "--set", "max_round=3"),
        WRONG_INPUT,
        ("there is no option 'max_round' (did you mean 'max_rounds'?)",),
    ),
    "wrong type": (
        ("move", "org-7", "--to", "cell-2", "--set", "batch_rows=many"),
        WRONG_INPUT,
        ("option batch_rows = 'many': Input should be a valid integer",),
    ),
    "out of bounds": (
        ("move", "org-7", "--to", "cell-2", "--set", "batch_rows=1"),
        WRONG_INPUT,
        ("option batch_rows = '1': Input should be greater than or equal to 100",),
    ),
    "no value": (
        (*PLAN, "--set", "ttl_s"),
        WRONG_INPUT,
        ("--set 'ttl_s' is not NAME=VALUE", "for example --set"),
    ),
}


def test_what_a_person_types_is_refused_by_name(operator: Operator) -> None:
    with unchanged(operator.cells):
        for arguments, status, words in COMMANDS.values():
            operator.is_told(status, *words, by=operator.runs(*arguments))


def test_json_has_the_same_in_fields(operator: Operator) -> None:
    asked = operator.runs("plan", "org-77", "--to", "cell-2", "--json")
    assert asked.exit_code == WRONG_INPUT
    assert json.loads(asked.stdout) == {
        "error": "InvalidInput",
        "message": "there is no organization 'org-77'",
        "organization": None,
        "step": None,
        "where": None,
        "remedy": "did you mean org-7 or org-8?",
    }


def test_an_organization_that_moves_already_is_refused(operator: Operator) -> None:
    with operator.cells.context() as context:
        organization = context.topology.organization("org-7")
    migration = operator.cells.plan(organization)
    with unchanged(operator.cells):
        operator.is_told(
            WRONG_INPUT,
            "organization org-7 is already moving from cell-1 to cell-2 "
            f"(migration {migration}, planned)",
            "cellferry abort org-7",
            by=operator.runs(*PLAN),
        )


def revoke(privilege: str, table: str) -> Callable[[TwoCells, str], None]:
    def act(cells: TwoCells, cell: str) -> None:
        with cells.admin(cell) as connection:
            connection.execute(
                sql.SQL("REVOKE {} ON {} FROM {}").format(
                    sql.SQL(privilege), sql.Identifier(table), sql.Identifier(cells.mover_role)
                )
            )

    return act


def execute(*statements: str) -> Callable[[TwoCells, str], None]:
    def act(cells: TwoCells, cell: str) -> None:
        with cells.admin(cell) as connection:
            for statement in statements:
                connection.execute(statement)

    return act


def remove_preparation(cells: TwoCells, cell: str) -> None:
    with cells.context() as context:
        steps.unprepare_cell(context, cell)


def fill_memory(cells: TwoCells, cell: str) -> None:
    with cells.redis(cell) as client:
        client.config_set("maxmemory", 1)


NO_KEY = execute(
    "CREATE TABLE tags (organization_id bigint NOT NULL REFERENCES organizations, label text)"
)

BLOCKERS: dict[str, tuple[dict[str, Callable[[TwoCells, str], None]], tuple[str, ...]]] = {
    "destination not prepared": (
        {"cell-2": remove_preparation},
        ("cell-2/postgres: missing: schema cellferry", "cellferry prepare-cell cell-2"),
    ),
    "a table without a gate that the destination alone has": (
        {
            "cell-2": execute(
                "CREATE TABLE late"
                " (id int PRIMARY KEY, organization_id bigint NOT NULL REFERENCES organizations)"
            )
        },
        (
            "cell-2/postgres: missing: trigger zz_cellferry_gate on public.late",
            "cellferry prepare-cell cell-2",
        ),
    ),
    "a missing table that the data map's file names": (
        {"cell-2": execute("DROP TABLE plans")},
        ("cell-2/postgres public.plans: the table is missing in cell-2",),
    ),
    "a missing column": (
        {"cell-2": execute("ALTER TABLE issues DROP COLUMN counter")},
        (
            (
                "cell-2/postgres public.issues: column counter: cell-1 has integer NOT NULL, "
                "cell-2 has no such column"
            ),
            "run the same schema migrations in both cells",
        ),
    ),
    "another type": (
        {"cell-2": execute("ALTER TABLE issues ALTER COLUMN counter TYPE bigint")},
        ("column counter: cell-1 has integer NOT NULL, cell-2 has bigint NOT NULL",),
    ),
    "a primary key of another organization": (
        {
            "cell-2": execute(
                "INSERT INTO organizations VALUES (9, 'org-9')",
                "INSERT INTO issues VALUES (7000001, 9, 'theirs')",
            )
        },
        (
            (
                "cell-2/postgres public.issues: primary key issues_pkey (id): values of "
                "organization 7 belong to rows of organization 9 already, for example (7000001)"
            ),
            "give each cell its own range of ids",
        ),
    ),
    "a table without primary key": (
        {"cell-1": NO_KEY, "cell-2": NO_KEY},
        ("cell-1/postgres public.tags: it has no primary key", "add a primary key"),
    ),
    "no SELECT at the source": (
        {"cell-1": revoke("SELECT", "issues")},
        (
            "cell-1/postgres: role mover_",
            "has no SELECT on 1 table: public.issues",
            "cellferry prepare-cell cell-1",
        ),
    ),
    "no INSERT at the destination": (
        {"cell-2": revoke("INSERT", "issues")},
        ("cell-2/postgres: role mover_", "has no INSERT on 1 table: public.issues"),
    ),
    "Redis full": (
        {"cell-2": fill_memory},
        ("cell-2/redis: the organization needs about", "raise maxmemory"),
    ),
}


@pytest.mark.parametrize("case", BLOCKERS)
def test_what_blocks_a_move_is_named_with_its_cell_and_remedy(
    operator: Operator, case: str, request: pytest.FixtureRequest
) -> None:
    faults, words = BLOCKERS[case]
    if case == "Redis full":
        request.addfinalizer(lambda: restore_memory(operator.cells, "cell-2"))
    for cell, act in faults.items():
        act(operator.cells, cell)
    with unchanged(operator.cells):
        operator.is_told(PERMANENT, *words, "cannot move yet", by=operator.runs(*PLAN))
        operator.is_told(PERMANENT, *words, "error: ", by=operator.runs("move", *PLAN[1:]))
        refusal = operator.plans()
        assert type(refusal) is errors.Blocked
        assert all(word in str(refusal) for word in words)


def test_a_data_map_that_does_not_fit_the_destination_is_told_before_anything_moves(
    operator: Operator,
) -> None:
    """The way back would go by it, and fail."""
    execute("CREATE TABLE jobs (id int PRIMARY KEY)")(operator.cells, "cell-1")
    file = operator.cells.settings.organization.data_map
    assert file is not None
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("placement: {", "placement: {cell-local: [public.jobs], "))
    words = ("cell-2/postgres", "'public.jobs' matches no table")
    operator.is_told(WRONG_INPUT, *words, by=operator.runs(*PLAN, "--record"))


def restore_memory(cells: TwoCells, cell: str) -> None:
    with cells.redis(cell) as client:
        client.config_set("maxmemory", 0)


def test_a_destination_without_room_blocks(operator: Operator) -> None:
    def narrow(written: dict[str, Any]) -> None:
        written["cells"]["cell-2"]["stores"]["postgres"]["capacity_bytes"] = 1_000

    operator.rewrites(narrow)
    with unchanged(operator.cells):
        words = ("cell-2/postgres: the database has", "its capacity is 1,000", "move organizations")
        operator.is_told(PERMANENT, *words, by=operator.runs(*PLAN, "--record"))
        assert type(operator.plans()) is errors.Blocked


def test_a_table_without_primary_key_is_refused_when_a_cell_is_prepared(
    operator: Operator,
) -> None:
    NO_KEY(operator.cells, "cell-2")
    told = operator.runs("prepare-cell", "cell-2")
    operator.is_told(WRONG_INPUT, "public.tags: it has no primary key", by=told)


WRONG_PASSWORDS = {
    "cell-1-postgres": (errors.AccessDenied, "cell-1/postgres", "password authentication failed"),
    "cell-2-postgres": (errors.AccessDenied, "cell-2/postgres", "password authentication failed"),
    "cell-1-redis": (errors.Blocked, "cell-1/redis", "may not log in: WRONGPASS"),
    "cell-2-redis-admin": (errors.Blocked, "cell-2/redis", "may not log in: WRONGPASS"),
    "cellferry-topology": (errors.AccessDenied, "127.0.0.1", "the topology refused access"),
}


def test_a_wrong_password_names_cell_and_user_and_is_not_shown(operator: Operator) -> None:
    with unchanged(operator.cells):
        for name, (kind, place, reason) in WRONG_PASSWORDS.items():
            wrong = {name: other(operator.cells.connections[name], password=SECRET)}
            told = operator.runs(*PLAN, **wrong)
            operator.is_told(PERMANENT, place, reason, "password", by=told)
            assert isinstance(operator.plans(**wrong), kind)
            assert not isinstance(operator.plans(**wrong), errors.TransientError)


UNREACHABLE = {
    "cell-1-postgres": ("cell-1/postgres", "Connection refused"),
    "cell-2-postgres": ("cell-2/postgres", "Connection refused"),
    "cell-1-redis-admin": ("cell-1/redis", "no answer from 127.0.0.1:1"),
    "cell-2-redis": ("cell-2/redis", "no answer from 127.0.0.1:1"),
    "cellferry-topology": ("127.0.0.1:1", "the topology does not answer", "Connection refused"),
}


def test_a_server_that_does_not_answer_is_worth_another_try(operator: Operator) -> None:
    with unchanged(operator.cells):
        for name, words in UNREACHABLE.items():
            nobody = {name: other(operator.cells.connections[name], password=SECRET, port=1)}
            operator.is_told(TRY_AGAIN, *words, "check that", by=operator.runs(*PLAN, **nobody))
            told = operator.runs(*PLAN, "--record", "--json", **nobody)
            assert json.loads(told.stdout)["error"] == "Unreachable"
            assert type(operator.plans(**nobody)) is errors.Unreachable


@pytest.mark.parametrize("name", ["cell-2-postgres", "cell-2-redis", "cellferry-topology"])
def test_a_connection_that_cannot_be_read_never_shows_its_password(
    operator: Operator, name: str
) -> None:
    with unchanged(operator.cells):
        for password in (f"p@{SECRET}", f"p/{SECRET}", f"p#{SECRET}", f"1?{SECRET}"):
            broken = {name: other(operator.cells.connections[name], password=password)}
            words = (f"the URL of connection '{name}' cannot be read", "%40 for @")
            operator.is_told(WRONG_INPUT, *words, by=operator.runs(*PLAN, **broken))
        nothing = operator.runs(*PLAN, **{name: f"mysql://u:{SECRET}@h/db=1"})
        assert SECRET not in nothing.output
        assert nothing.exit_code in (WRONG_INPUT, PERMANENT)


def test_a_connection_that_nobody_defines_is_named(operator: Operator) -> None:
    for name in ("cell-2-redis", "cell-2-postgres-admin"):
        operator.is_told(
            WRONG_INPUT,
            f"connection '{name}' is not defined",
            settings.variable(name),
            by=operator.runs(*PLAN, **{name: ""}),
        )
