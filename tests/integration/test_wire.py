"""Rows leave a server as they are, however they arrive; whatever ends a COPY early is said."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.abc import Buffer

from cellferry.stores.pace import FullSpeed
from cellferry.stores.postgres.schema import Column, Name, Placement, Table
from cellferry.stores.postgres.wire import PIECE_BYTES, Inlet, Outlet, Wire
from cellferry.stores.throttle import Throttle

#: More than the client keeps of what has arrived.
MANY = 50_000

TABLE = Table(
    Name("public", "parcels"),
    Placement.OWNED,
    (Column("id", "bigint"), Column("content", "text")),
    ("id",),
)


@pytest.fixture
def connection(fresh_database: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(fresh_database, autocommit=True) as connection:
        connection.execute("CREATE TABLE public.parcels (id bigint PRIMARY KEY, content text)")
        yield connection


def fill(connection: psycopg.Connection[Any], rows: int) -> None:
    connection.execute(
        "INSERT INTO public.parcels SELECT g, CASE WHEN g %% 3 > 0 THEN repeat('x', g %% 400) END"
        " FROM generate_series(1, %s) AS g",
        (rows,),
    )


def body(content: str = "t.content") -> sql.Composed:
    query = "FROM (SELECT t.id, {} AS content FROM public.parcels AS t ORDER BY t.id) AS t"
    return sql.SQL(query).format(sql.SQL(content))  # type: ignore[arg-type]


def arrived(
    connection: psycopg.Connection[Any],
    statement: sql.Composed,
    wire: Wire,
    after_100: Callable[[], object] = lambda: None,
) -> int:
    count = 0
    with connection.cursor() as cursor, cursor.copy(statement) as stream:
        for count, _ in enumerate(Outlet(wire, stream).rows, start=1):
            if count == 100:
                after_100()
    return count


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 2, MANY])
def test_every_row_arrives_once(
    connection: psycopg.Connection[Any], fresh_database: str, rows: int, binary: bool
) -> None:
    fill(connection, rows)
    connection.execute("CREATE TABLE public.copied (LIKE public.parcels INCLUDING ALL)")
    wire = Wire(TABLE, binary)
    target = sql.Identifier("public", "copied")
    with (
        psycopg.connect(fresh_database, autocommit=True) as other,
        connection.cursor() as cursor,
        cursor.copy(wire.out(body())) as stream,
        Inlet(other, wire, target) as inlet,
    ):
        inlet.fill(Outlet(wire, stream).rows)
    assert inlet.rows == rows
    differing = connection.execute(
        "SELECT count(*) FROM public.parcels AS a FULL JOIN public.copied AS b USING (id)"
        " WHERE a IS DISTINCT FROM b"
    ).fetchone()
    assert differing == (0,)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(
    ("rows", "rests"), [(0, []), (1, []), (100, [100]), (250, [100, 100]), (300, [100] * 3)]
)
def test_a_slow_copy_comes_in_copies_of_few_rows_and_rests_between_them(
    connection: psycopg.Connection[Any],
    fresh_database: str,
    rows: int,
    rests: list[int],
    binary: bool,
) -> None:
    fill(connection, rows)
    connection.execute("CREATE TABLE public.copied (LIKE public.parcels INCLUDING ALL)")
    wire = Wire(TABLE, binary)
    told: list[int] = []
    written: list[int] = []
    with psycopg.connect(fresh_database) as other:

        def rest(count: int) -> None:
            told.append(count)
            (here,) = other.execute("SELECT count(*) FROM public.copied").fetchone() or (0,)
            written.append(here)

        target = sql.Identifier("public", "copied")
        with (
            connection.cursor() as cursor,
            cursor.copy(wire.out(body())) as stream,
            Inlet(other, wire, target, at_once=lambda: 100, rest=rest) as inlet,
        ):
            assert not inlet.fill(Outlet(wire, stream).rows)
    assert told == rests
    assert written == [100 * number for number in range(1, len(rests) + 1)]
    assert (inlet.rows, inlet.told) == (rows, sum(rests))
    differing = connection.execute(
        "SELECT count(*) FROM public.parcels AS a FULL JOIN public.copied AS b USING (id)"
        " WHERE a IS DISTINCT FROM b"
    ).fetchone()
    assert differing == (0,)


@pytest.mark.parametrize("bounded", [False, True])
def test_a_copy_that_is_under_way_follows_a_pace_that_falls(
    connection: psycopg.Connection[Any], fresh_database: str, bounded: bool
) -> None:
    """What began at full speed is neither finished in large pieces nor as one large batch."""
    fill(connection, 8_000)
    connection.execute("CREATE TABLE public.copied (LIKE public.parcels INCLUDING ALL)")
    pace, told = FullSpeed(), list[int]()
    throttle = Throttle(None, pace=pace)

    def slowed(rows: Iterator[Buffer]) -> Iterator[Buffer]:
        for number, row in enumerate(rows, start=1):
            if number == 4_000:
                pace.share = 0.05
            yield row

    with (
        psycopg.connect(fresh_database) as other,
        connection.cursor() as cursor,
        cursor.copy(Wire(TABLE).out(body())) as stream,
        Inlet(
            other,
            Wire(TABLE),
            sql.Identifier("public", "copied"),
            pace=pace,
            at_once=lambda: throttle.piece(1_000, 100),
            rest=told.append,
        ) as inlet,
    ):
        rows = slowed(Outlet(Wire(TABLE), stream).rows)
        if bounded:
            assert inlet.fill(rows, lambda: (pace.size(8_000, 100), sys.maxsize))
            assert 4_000 <= inlet.rows < 4_000 + PIECE_BYTES // 100
            assert told == []
        assert not inlet.fill(rows)
    assert inlet.rows == 8_000
    assert 4_000 <= told[0] < 4_000 + PIECE_BYTES // 100
    assert set(told[1:]) == {100}
    differing = connection.execute(
        "SELECT count(*) FROM public.parcels AS a FULL JOIN public.copied AS b USING (id)"
        " WHERE a IS DISTINCT FROM b"
    ).fetchone()
    assert differing == (0,)


def test_whoever_is_told_to_end_between_two_copies_can_roll_back(
    connection: psycopg.Connection[Any], fresh_database: str
) -> None:
    fill(connection, 250)
    connection.execute("CREATE TABLE public.copied (LIKE public.parcels INCLUDING ALL)")

    def interrupted(_rows: int) -> None:
        raise KeyboardInterrupt

    with psycopg.connect(fresh_database) as other:
        target = sql.Identifier("public", "copied")
        with (
            connection.cursor() as cursor,
            pytest.raises(KeyboardInterrupt),
            cursor.copy(Wire(TABLE).out(body())) as stream,
            Inlet(other, Wire(TABLE), target, at_once=lambda: 100, rest=interrupted) as inlet,
        ):
            inlet.fill(Outlet(Wire(TABLE), stream).rows)
        assert not other.lock.locked()
        other.rollback()
        assert other.execute("SELECT count(*) FROM public.copied").fetchone() == (0,)


class _Interrupted:
    """A COPY's context at whose beginning or end this process is told to end, once."""

    def __init__(self, context: Any, where: str) -> None:
        self._context, self._where = context, where

    def __enter__(self) -> Any:
        copy = self._context.__enter__()
        self._interrupt("begins")
        return copy

    def __exit__(self, *error: object) -> bool | None:
        self._interrupt("ends")
        found: bool | None = self._context.__exit__(*error)
        return found

    def _interrupt(self, now: str) -> None:
        if self._where == now:
            self._where = ""
            raise KeyboardInterrupt


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("where", ["begins", "ends"])
def test_whoever_is_told_to_end_where_a_copy_begins_or_ends_can_roll_back(
    connection: psycopg.Connection[Any], fresh_database: str, where: str, which: int
) -> None:
    """A COPY that stayed open would hold the session's lock, and its roll-back wait for ever."""
    fill(connection, 250)
    connection.execute("CREATE TABLE public.copied (LIKE public.parcels INCLUDING ALL)")
    begun: list[Any] = []

    class Cursor:
        """Gives the contexts of the copies, one of which is interrupted."""

        def __init__(self, cursor: psycopg.Cursor[Any]) -> None:
            self._cursor = cursor
            self.close = cursor.close

        def copy(self, statement: sql.Composed) -> Any:
            begun.append(None)
            context = self._cursor.copy(statement)
            return _Interrupted(context, where) if len(begun) == which else context

    with psycopg.connect(fresh_database) as other:
        inlet = Inlet(other, Wire(TABLE), sql.Identifier("public", "copied"), at_once=lambda: 100)
        inlet._cursor = Cursor(inlet._cursor)  # type: ignore[assignment]
        with (
            connection.cursor() as cursor,
            pytest.raises(KeyboardInterrupt),
            cursor.copy(Wire(TABLE).out(body())) as stream,
            inlet,
        ):
            inlet.fill(Outlet(Wire(TABLE), stream).rows)
        assert len(begun) == which
        assert not other.lock.locked()
        other.rollback()
        assert other.execute("SELECT count(*) FROM public.copied").fetchone() == (0,)


@pytest.mark.parametrize("at", [1, 2, MANY // 2, MANY])
@pytest.mark.parametrize("binary", [True, False])
def test_a_server_that_fails_amid_its_rows_is_heard(
    connection: psycopg.Connection[Any], at: int, binary: bool
) -> None:
    fill(connection, MANY)
    wire = Wire(TABLE, binary)
    with pytest.raises(psycopg.errors.DivisionByZero):
        arrived(connection, wire.out(body(f"(1 / (t.id - {at}))::text")), wire)
    # and nothing is left of that COPY: the session does the next
    assert arrived(connection, wire.out(body()), wire) == MANY


def test_a_session_that_is_ended_amid_its_rows_is_no_end_of_the_table(
    connection: psycopg.Connection[Any], fresh_database: str
) -> None:
    fill(connection, MANY)
    pid = connection.info.backend_pid
    with psycopg.connect(fresh_database, autocommit=True) as other:

        def end_it() -> None:
            other.execute("SELECT pg_terminate_backend(%s)", (pid,))

        with pytest.raises(psycopg.OperationalError):
            arrived(connection, Wire(TABLE).out(body()), Wire(TABLE), end_it)


def test_a_copy_that_is_given_up_leaves_a_session_for_the_next(
    connection: psycopg.Connection[Any],
) -> None:
    fill(connection, MANY)

    def give_up() -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        arrived(connection, Wire(TABLE).out(body()), Wire(TABLE), give_up)
    assert arrived(connection, Wire(TABLE).out(body()), Wire(TABLE)) == MANY


def test_what_a_server_says_amid_its_rows_is_no_row(connection: psycopg.Connection[Any]) -> None:
    fill(connection, 500)
    connection.execute(
        "CREATE FUNCTION public.noted(text) RETURNS text LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE NOTICE '%', $1; RETURN repeat($1, 5000); END $$"
    )
    said: list[object] = []
    connection.add_notice_handler(said.append)
    statement = Wire(TABLE).out(body("public.noted('amid ' || t.id)"))
    assert arrived(connection, statement, Wire(TABLE)) == 500
    assert len(said) == 500


def test_a_copy_whose_last_piece_is_not_sent_is_closed(
    connection: psycopg.Connection[Any], fresh_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to end just then, a task must be able to roll its session back."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with psycopg.connect(fresh_database) as other:
        inlet = Inlet(other, Wire(TABLE))
        with pytest.raises(KeyboardInterrupt), inlet:
            monkeypatch.setattr(inlet, "_flush", interrupted)
        assert not other.lock.locked()
        other.rollback()
        assert other.execute("SELECT count(*) FROM public.parcels").fetchone() == (0,)
