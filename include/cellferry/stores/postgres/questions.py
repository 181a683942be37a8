"""Questions to PostgreSQL: one SELECT about one organization, in a read-only transaction."""

from __future__ import annotations

import datetime as dt
import decimal
import re
import uuid
from typing import Any

import psycopg

from cellferry.errors import InvalidInput, TransientError
from cellferry.stores.postgres import sessions
from cellferry.stores.questions import PARAMETER, Answer, BadQuestion, Question

_READING = frozenset({"SELECT", "WITH", "VALUES", "TABLE"})
#: Texts in which a colon means nothing, casts, parameters, and what has a meaning for us.
_TOKEN = re.compile(
    r"""
    (?P<text> [eE]'(?:[^'\\]|\\.|'')*' | '(?:[^']|'')*' | "(?:[^"]|"")*"
        | \$(?P<tag>[A-Za-z_]\w*)?\$.*?\$(?P=tag)\$ | \$\$.*?\$\$
        | --[^\n]* | /\*.*?\*/ | :: | := )
    | :(?P<parameter>[A-Za-z_]\w*)
    | (?P<end>;)
    | (?P<percent>%)
    """,
    re.VERBOSE | re.DOTALL,
)
_COMMENTS = re.compile(r"\A(?:\s|\(|--[^\n]*(?:\n|\Z)|/\*.*?\*/)*", re.DOTALL)


def statement(question: Question) -> str:
    """Return the question as psycopg takes it, with `%(organization)s` for the parameter.

    Raises:
        BadQuestion: it is no single reading statement about `:organization`.
    """
    if not isinstance(question.text, str):
        raise BadQuestion("it is a list of words, not SQL", "write the query as one text")
    text = question.text.strip()
    word = re.match(r"[A-Za-z]*", _COMMENTS.sub("", text, count=1))
    first = word.group().upper() if word else ""
    if first not in _READING:
        raise BadQuestion(
            f"it begins with {first or text[:20]!r}; a smoke query only reads",
            "write one SELECT",
        )
    parts: list[str] = []
    position = asked = 0
    for found in _TOKEN.finditer(text):
        parts.append(text[position : found.start()])
        position = found.end()
        if found["end"]:
            if text[found.end() :].strip():
                raise BadQuestion("it holds more than one statement", "write one SELECT")
        elif found["percent"]:
            parts.append("%%")
        elif found["parameter"] is None:
            parts.append(found.group().replace("%", "%%"))
        elif found.group() == PARAMETER:
            parts.append("%(organization)s")
            asked += 1
        else:
            raise BadQuestion(
                f"there is no parameter {found.group()}", f"the only parameter is {PARAMETER}"
            )
    parts.append(text[position:])
    if not asked:
        raise BadQuestion(
            f"it does not name {PARAMETER}, so it would ask about every organization of the cell",
            f"add for example WHERE organization_id = {PARAMETER}",
        )
    return "".join(parts)


#: Classes of SQLSTATE that blame the query: what it reads, its values, its privileges, that it
#: writes, that a cursor cannot have it.
_BLAMED = frozenset({"0A", "21", "22", "25", "42", "P0"})


def ask(
    connection: psycopg.Connection[Any], organization: str, question: Question, where: str
) -> Answer:
    """Return the first value of the first row; None when there is no row.

    Nothing can be changed: the transaction is read-only, is rolled back, and the query is that of
    a cursor, which can be nothing but a SELECT.

    Args:
        connection: a session of the mover in autocommit mode, of no other use.
        where: cell and store, for errors.

    Raises:
        InvalidInput: the server refuses such a query.
        TransientError: it took too long.
        psycopg.Error: anything else.
    """
    try:
        return _ask(connection, organization, question)
    except psycopg.errors.QueryCanceled as error:
        raise TransientError(
            f"it did not answer within {question.timeout_s:g} s",
            hint="raise its `timeout_s`, or give it an index",
            where=where,
        ) from error
    except psycopg.Error as error:
        if (error.sqlstate or "")[:2] not in _BLAMED:
            raise
        raise InvalidInput(
            " ".join((error.diag.message_primary or str(error)).split()),
            hint="correct the query: one SELECT of tables with their schema's name, which the "
            "mover's role may read",
            where=where,
        ) from error


def _ask(connection: psycopg.Connection[Any], organization: str, question: Question) -> Answer:
    query = statement(question)
    with connection.transaction(force_rollback=True):
        connection.execute("SET TRANSACTION READ ONLY")
        milliseconds = max(1, round(question.timeout_s * 1000))
        sessions.set_locally(connection, "statement_timeout", str(milliseconds))
        with connection.cursor(name="smoke_query") as cursor:
            cursor.execute(query.encode(), {"organization": organization})
            row = cursor.fetchone()
    return None if row is None or not row else _plain(row[0])


def _plain(value: Any) -> Answer:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, dt.datetime | dt.date | dt.time):
        return value.isoformat()
    if isinstance(value, uuid.UUID):
        return str(value)
    return str(value)
