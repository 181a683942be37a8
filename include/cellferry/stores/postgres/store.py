"""The PostgreSQL store: wires gate, copier, rounds, verifier and cleaner to the Store interface."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import psycopg
from psycopg import sql

from cellferry.errors import (
    Blocked,
    CellferryError,
    InvalidInput,
    LeaseLost,
    NotPrepared,
    Unreachable,
    UnsupportedSchema,
    VerificationFailed,
    WrongState,
)
from cellferry.model import (
    Activity,
    Blocker,
    Cell,
    Cleaned,
    Copied,
    Endpoint,
    Finished,
    GateState,
    Inventory,
    Landmark,
    Leftover,
    Move,
    Part,
    Progress,
    Repaired,
    Resource,
    Resources,
    Round,
    Route,
    Side,
    Strategy,
    Verification,
)
from cellferry.stores.base import Store, StoreMove
from cellferry.stores.pace import FULL_SPEED, Pace, Paced
from cellferry.stores.postgres import (
    cell_conditions,
    checkpoints,
    data_map,
    data_map_file,
    gate,
    layout,
    leftovers,
    preflight,
    prepare,
    questions,
    rounds,
    sequences,
    sessions,
    statistics,
    timeline,
)
from cellferry.stores.postgres import inventory as stock
from cellferry.stores.postgres.apply import Applier
from cellferry.stores.postgres.catalog import read_catalog
from cellferry.stores.postgres.cleaner import Cleaner
from cellferry.stores.postgres.copier import Connect, Copier
from cellferry.stores.postgres.crossings import find_crossings
from cellferry.stores.postgres.examination import Examination, Site, examples
from cellferry.stores.postgres.probe import PostgresProbe
from cellferry.stores.postgres.references import LEFT_TO_OTHERS, ReferencedRows
from cellferry.stores.postgres.repair import BUCKETS, Repairer
from cellferry.stores.postgres.rounds import Rounds
from cellferry.stores.postgres.schema import DataMap
from cellferry.stores.postgres.schema_differences import find_differences
from cellferry.stores.postgres.scope import Scope
from cellferry.stores.postgres.transactions import write
from cellferry.stores.postgres.verifier import Verifier
from cellferry.stores.postgres.wire import Wire, wires
from cellferry.stores.questions import Answer, Question
from cellferry.stores.throttle import Throttle

KIND = "postgres"

#: Log rows that are deleted in one transaction when a log is given up.
LOG_BATCH = 50_000

#: Least keys of one part of a round, where the cells ask for a slow pace.
PART_KEYS = 500

#: Prepared statements that a session keeps around a cutover: a small round has about four for each
#: table, and with psycopg's 100 a larger schema's would be gone when the last delta needs them. Not
#: in the rounds of a copy: psycopg also keeps the texts of as many that it does not prepare.
MAX_PREPARED = 1_000

#: Names the checkpoint that says of which attempt the destination has the last delta.
LAST_DELTA = "last delta of attempt"

#: The purpose of the session at each cell that every step has.
MAIN = "move"

#: A step that took longer (seconds) leaves no sessions: connecting is little of it, and the cell
#: may have failed over meanwhile.
SHORT_STEP_S = 10.0

#: How long (seconds) to see whether it was a newer attempt that ended our session.
LEASE_WAIT_S = 1.0

Connection = psycopg.Connection[Any]
T = TypeVar("T")


class PostgresStore(Store):
    """Organizations' rows in PostgreSQL.

    Args:
        data_map_file: completes what the catalog says; None when the catalog says it all.
    """

    kind: ClassVar[str] = KIND

    def __init__(self, data_map_file: Path | None = None) -> None:
        self._file = data_map_file
        self.kept: sessions.Kept | None = None
        """Sessions of the last step, for the next one; see `keeping_sessions`."""

    @cached_property
    def completion(self) -> data_map_file.DataMapFile | None:
        """The data map's file, read once."""
        return None if self._file is None else data_map_file.load(self._file)

    def discover(self, connection: Connection) -> DataMap:
        """Read the data map from the catalog that `connection` sees."""
        return data_map.discover(connection, self.completion)

    def prepare_cell(self, cell: Cell, progress: Progress) -> Mapping[str, Any]:
        """Install schema `cellferry`, the gates and the grants; see `Store.prepare_cell`."""
        endpoint = _endpoint(cell)
        with (
            sessions.translate_errors(f"{cell.name}/{KIND}"),
            _closing(endpoint.admin_url or endpoint.url, "prepare", cell=cell) as connection,
        ):
            found = self.discover(connection)
            data_map.require_supported(found)
            return prepare.prepare(connection, found, cell, progress)

    def unprepare_cell(self, cell: Cell, progress: Progress) -> Mapping[str, Any]:
        """Take everything out again; see `Store.unprepare_cell`."""
        endpoint = _endpoint(cell)
        with (
            sessions.translate_errors(f"{cell.name}/{KIND}"),
            _closing(endpoint.admin_url or endpoint.url, "unprepare", cell=cell) as connection,
        ):
            return prepare.unprepare(connection, cell, progress)

    def check_cell(self, cell: Cell) -> tuple[Blocker, ...]:
        """Say whether the cell is prepared; read-only."""
        with (
            sessions.translate_errors(f"{cell.name}/{KIND}"),
            _closing(_endpoint(cell).url, "check", cell=cell) as connection,
        ):
            return prepare.check(connection, self.discover(connection), cell)

    def activity(self, cell: Cell) -> Activity | None:
        """Return what the cell's database has counted; see `Store.activity`."""
        with (
            sessions.translate_errors(f"{cell.name}/{KIND}"),
            _closing(_endpoint(cell).url, "activity", cell=cell) as connection,
        ):
            row = connection.execute(
                "SELECT xact_commit, xact_rollback, deadlocks, conflicts FROM pg_stat_database"
                " WHERE datname = current_database()"
            ).fetchone()
        return None if row is None else Activity(*row)

    def leftovers(self, cell: Cell) -> tuple[Leftover, ...]:
        """Return everything of cellferry's in a cell; see `Store.leftovers`."""
        return leftovers.find(cell)

    def remove_leftover(self, cell: Cell, leftover: Leftover) -> bool:
        """Remove what was found, if it still is as found; see `Store.remove_leftover`."""
        return leftovers.remove(cell, leftover)

    def turn_away(self, cell: Cell, gate: Leftover, route: Route) -> bool:
        """Make a stale gate say `moved`; see `Store.turn_away`."""
        return leftovers.turn_away(cell, gate, route)

    def reconcile(self, move: Move, side: Side, wanted: GateState, resources: Resources) -> bool:
        """Bring one side's gate to what the topology says; see `Store.reconcile`."""
        return leftovers.reconcile(move, side, wanted, resources)

    def check_question(self, question: Question) -> None:
        """See `Store.check_question`."""
        questions.statement(question)

    @contextmanager
    def open(
        self,
        move: Move,
        resources: Resources,
        progress: Progress,
        pace: Pace = FULL_SPEED,
        *,
        continues: bool = False,
    ) -> Iterator[StoreMove]:
        """Give this store's part of one attempt; connections are made when first needed."""
        opened = PostgresMove(self, move, resources, progress, pace, continues=continues)
        try:
            yield opened
            opened.leave_sessions()
        finally:
            opened.close()

    @contextmanager
    def keeping_sessions(self) -> Iterator[None]:
        """See `Store.keeping_sessions`."""
        kept = self.kept = sessions.Kept()
        try:
            yield
        finally:
            self.kept = None
            kept.close()

    def probe(self, cell: Cell, move: Move) -> PostgresProbe:
        """Return what asks the cell's server how it does; see `Store.probe`."""
        return PostgresProbe(cell, move)


class PostgresMove(StoreMove):
    """PostgreSQL's part of one attempt at one migration; see `StoreMove`."""

    asks_early: ClassVar[bool] = True

    def __init__(
        self,
        store: PostgresStore,
        move: Move,
        resources: Resources,
        progress: Progress,
        pace: Pace = FULL_SPEED,
        *,
        continues: bool = False,
    ) -> None:
        self.move = move
        self._continues = continues
        self._began = time.monotonic()
        self._pace = pace
        self._store = store
        self._resources = resources
        self._progress = progress
        self._stack = ExitStack()
        self._connections: dict[str, Connection] = {}
        self._leaves: sessions.Kept | None = None
        self._barrier: gate.Barrier | None = None
        self._layouts: dict[Side, str] = {}
        self._confirms: dict[Side, bool] = {}
        self._at_freeze: tuple[Connection, Landmark] | None = None
        self._positions: tuple[sequences.Position, ...] = ()
        self._crossings_allowed = move.returning

    def leave_sessions(self) -> None:
        """Leave the cells' first sessions to the next step, after a short one that went well.

        After one that did not, a request to cancel a statement may still be under way.
        """
        if self._continues and time.monotonic() - self._began <= SHORT_STEP_S:
            self._leaves = self._store.kept

    def close(self) -> None:
        """Close every connection; a gate that is still locked lets its writers go."""
        self._stack.close()
        self._connections.clear()

    # ── connections and what is known of the schema ─────────────────────────────────────────────

    def _where(self, side: Side) -> str:
        return f"{self.move.cell(side).name}/{KIND}"

    def _connection(self, side: Side, purpose: str = MAIN) -> Connection:
        """A session of the mover's role in autocommit mode; made when first asked for.

        One that was lost is made anew: a thaw and a hand-over must not fail for it.
        """
        key = f"{side} {purpose}"
        if key not in self._connections or self._connections[key].closed:
            url = _endpoint(self.move.cell(side)).url
            connection = self._kept(url) if purpose == MAIN else None
            if connection is None:
                connection = sessions.connect(
                    url,
                    purpose=purpose,
                    move=self.move,
                    autocommit=True,
                    where=self._where(side),
                )
            self._stack.callback(self._put_away, url, purpose, connection)
            self._connections[key] = connection
        return self._connections[key]

    def _kept(self, url: str) -> Connection | None:
        """The session that the step before left at this cell, if this step may use it."""
        kept = self._store.kept
        if kept is None:
            return None
        if not self._continues:
            kept.drop(url)
            return None
        return kept.take(url, purpose=MAIN, move=self.move)

    def _put_away(self, url: str, purpose: str, connection: Connection) -> None:
        if self._leaves is not None and purpose == MAIN:
            self._leaves.leave(url, connection)
        else:
            connection.close()

    @cached_property
    def _source(self) -> Connection:
        return self._mover(Side.SOURCE)

    @cached_property
    def _destination(self) -> Connection:
        return self._mover(Side.DESTINATION)

    def _mover(self, side: Side) -> Connection:
        """A session in the replica role: no trigger, rule or foreign key of the application acts.

        Its search path has the application's schemas besides, so that operators of extension
        types (case-insensitive equality) are found before those of the types they cast to.
        """
        return self._made_mover(side, self._connection(side))

    def _made_mover(self, side: Side, connection: Connection) -> Connection:
        with sessions.translate_errors(self._where(side)):
            sessions.set_for_session(connection, "session_replication_role", "replica")
            connection.execute(
                sql.SQL("SET search_path = pg_catalog, {}").format(
                    sql.SQL(", ").join(map(sql.Identifier, self._map.search_path))
                )
            )
        return connection

    @contextmanager
    def _lane(self) -> Iterator[tuple[Connection, Connection]]:
        """Two more such sessions, at the very servers of the first two; closed at the end.

        What is copied must be where the checkpoints were read, and read where keys are logged.
        """
        with ExitStack() as stack:
            made = []
            for side, first in ((Side.SOURCE, self._source), (Side.DESTINATION, self._destination)):
                where = self._where(side)
                connection = stack.enter_context(
                    _closing(
                        _endpoint(self.move.cell(side)).url,
                        "copy",
                        self.move,
                        cell=self.move.cell(side),
                    )
                )
                made.append(self._made_mover(side, connection))
                with sessions.translate_errors(where):
                    timeline.insist_on_one_server(connection, first, where)
            yield made[0], made[1]

    @cached_property
    def _map(self) -> DataMap:
        """The data map, discovered anew by each step: the schema may have changed since."""
        with sessions.translate_errors(self._where(Side.SOURCE)):
            found = self._store.discover(self._connection(Side.SOURCE))
        data_map.require_supported(found)
        return found

    @cached_property
    def _scope(self) -> Scope:
        return Scope(self._map, self.move.organization.id)

    @cached_property
    def _wires(self) -> Mapping[str, Wire]:
        return wires(self._source, (*self._scope.tables, *self._map.referenced))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Name both cells in errors of which the driver does not say whose they are.

        A newer attempt ends the sessions of older ones: that is a lost lease, and trying again
        would only take it back.
        """
        where = f"{self._where(Side.SOURCE)} to {self._where(Side.DESTINATION)}"
        try:
            with sessions.translate_errors(where):
                yield
        except Unreachable as error:
            if _broke(error.__cause__):
                try:
                    self._insist_on_lease()
                except LeaseLost:
                    raise
                except CellferryError:
                    raise error from error.__cause__
            raise

    def _insist_on_lease(self) -> None:
        """Raise if a newer attempt is the reason; a server that failed over may know of none."""
        with (
            sessions.translate_errors(self._where(Side.SOURCE)),
            # Without the attempt's name: it would be ended, too.
            _closing(_endpoint(self.move.source).url, "lease") as connection,
        ):
            # A newer attempt ends older sessions first, then takes its lease.
            deadline = time.monotonic() + LEASE_WAIT_S
            while time.monotonic() < deadline:
                gate.insist_on_newest(connection, self.move)
                time.sleep(gate.POLL_S)

    # ── plan ────────────────────────────────────────────────────────────────────────────────────

    def inventory(self) -> Inventory:
        """Count what would move and find what blocks it."""
        organization = self.move.organization.id
        with self._errors():
            source = self._connection(Side.SOURCE)
            destination = self._connection(Side.DESTINATION)
            found = self._store.discover(source)
            denied: psycopg.Error | None = None
            unfit: CellferryError | None = None
            parts: tuple[Part, ...] = ()
            theirs = found
            try:
                theirs = self._store.discover(destination)
            except (InvalidInput, UnsupportedSchema) as error:
                unfit = error  # the blockers say what differs, if it is of what moves
                places = (self._where(Side.DESTINATION), unfit.where)
                unfit.where = ", ".join(place for place in places if place)
            try:
                parts = stock.inventory(source, found, organization)
            except psycopg.errors.InsufficientPrivilege as error:
                denied = error  # the blockers name the role, all its tables and the remedy
            blockers = preflight.preflight(
                source,
                destination,
                found,
                theirs,
                organization,
                source_cell=self.move.source,
                destination_cell=self.move.destination,
                parts=parts or None,
            )
            if not any(blocker.fatal for blocker in blockers):
                for failure in (denied, unfit):
                    if failure is not None:
                        raise failure
        return Inventory(store=KIND, unit="rows", parts=parts, blockers=blockers)

    # ── capture, copy, rounds ───────────────────────────────────────────────────────────────────

    def fence(self) -> None:
        """Take the lease in both cells; older attempts fail from now on."""
        for side in Side:
            self._intend(side, "lease", str(self.move.migration))
            with self._errors(), sessions.translate_errors(self._where(side)):
                gate.take_lease(self._connection(side), self.move)

    def landmark(self, side: Side) -> Landmark | None:
        """Say where the server of `side` stands."""
        with sessions.translate_errors(self._where(side)):
            return timeline.read(self._connection(side))

    def open_capture(self) -> None:
        """Gate the destination, arm the source, and note what the key log does not see."""
        organization = self.move.organization.id
        self._insist_on_prepared_cells()
        if self.move.returning:
            self._open_reverse_capture()
            return
        self._intend(Side.DESTINATION, "gate", organization)
        self._intend(Side.DESTINATION, "key_log", organization)
        self._intend(Side.DESTINATION, "checkpoint", str(self.move.migration))
        with sessions.translate_errors(self._where(Side.DESTINATION)):
            gate.import_gate(self._connection(Side.DESTINATION), self.move, self._progress)
        self._intend(Side.SOURCE, "gate", organization)
        self._intend(Side.SOURCE, "key_log", organization)
        with sessions.translate_errors(self._where(Side.SOURCE)):
            gate.arm(self._connection(Side.SOURCE), self.move, self._progress)
        with self._errors():
            if not layout.noted(self._destination, self.move.migration):
                self._note_layouts(self._read_layouts())

    def _open_reverse_capture(self) -> None:
        """Arm the new cell again after its failover; the old cell's gate is still this move's.

        Raises:
            WrongState: the new cell has lost its gate, or has another: an older state is there.
        """
        for kind in ("gate", "key_log"):
            self._intend(Side.SOURCE, kind, self.move.organization.id)
        with sessions.translate_errors(self._where(Side.DESTINATION)):
            gate.hold_retained(self._connection(Side.DESTINATION), self.move)
        with sessions.translate_errors(self._where(Side.SOURCE)):
            found = gate.state(self._connection(Side.SOURCE), self.move.organization.id)
        # Arming would make a gate where there is none: a state without it must not be followed.
        if (
            found is None
            or found.migration != self.move.migration
            or found.epoch != self.move.epoch
        ):
            shown = (
                "absent"
                if found is None
                else f"{found.state} by migration {found.migration} at epoch {found.epoch}"
            )
            raise WrongState(
                f"the gate of {self.move.source.name} is {shown}, and not this migration's at"
                f" epoch {self.move.epoch}: an older state of the server may be there",
                hint=f"nothing was changed in {self.move.destination.name}, which has everything"
                " until the last reverse round. Bring the newer state back, with its gate; or let"
                " the reaper finish the hand-over, if the gate is only older",
                organization=self.move.organization.slug,
                where=self._where(Side.SOURCE),
            )
        with sessions.translate_errors(self._where(Side.SOURCE)):
            gate.arm(self._connection(Side.SOURCE), self.move, self._progress)

    def _insist_on_prepared_cells(self) -> None:
        for side in Side:
            where = self._where(side)
            with sessions.translate_errors(where):
                missing = prepare.is_prepared(self._connection(side), self._map)
            if missing:
                raise NotPrepared(
                    f"{where} lacks {missing[0]}"
                    + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
                    hint=f"cellferry prepare-cell {self.move.cell(side).name}",
                    where=where,
                )

    def copy(self) -> Copied:
        """Copy everything from the last checkpoints on."""
        self._pace.start()
        with self._errors():
            return self._copier(self._lane).run()

    def sync(self) -> Round:
        """Run one round; at a slow pace in parts, so that none holds its locks for longer.

        The rests between them are not counted: they tell nothing of the next pause.
        """
        self._pace.start()
        done = Round(0, 0, 0, 0.0)
        with self._errors():
            while True:
                at_most = self._pace.size(rounds.MAX_KEYS, PART_KEYS)
                part = self._round(at_most)
                done = Round(
                    done.applied + part.applied,
                    part.remaining,
                    done.bytes + part.bytes,
                    done.seconds + part.seconds,
                )
                if part.applied < at_most or done.applied >= rounds.MAX_KEYS:
                    # No rest behind the last: what changes meanwhile would keep it from converging.
                    return done
                self._pace.breathe()
                self._progress.check()

    def _round(self, max_keys: int = rounds.MAX_KEYS) -> Round:
        if not self.move.returning:
            done, _ = self._rounds().run(max_keys=max_keys)
            return done
        gate.hold_capture(self._source, self.move)
        done, _ = self._rounds().run(
            max_keys=max_keys,
            before_commit=lambda: gate.hold_retained(self._destination, self.move),
        )
        return done

    def repair(self) -> Repaired:
        """Compare everything and apply what differs.

        Rows that the key log names are left to the rounds. After the flip the source is closed
        and needs no capture; the destination's gate is made again where a failover lost it.
        """
        with self._errors():
            if not self.move.returning:
                gate.import_gate(self._connection(Side.DESTINATION), self.move, self._progress)
            repairer = Repairer(
                self._source,
                self._destination,
                self._scope,
                self._verifier(buckets=BUCKETS),
                Applier(
                    self._source,
                    self._destination,
                    self._scope,
                    self._wires,
                    self.move,
                    refuses_crossings=not self._crossings_allowed,
                ),
                Paced(self._progress, self._pace),
                before_commit=(
                    (lambda: gate.hold_retained(self._destination, self.move))
                    if self.move.returning
                    else None
                ),
            )
            return repairer.run()

    def backlog(self, at_most: int) -> int:
        """Count the key log of the source."""
        with sessions.translate_errors(self._where(Side.SOURCE)):
            return rounds.backlog(self._connection(Side.SOURCE), self.move.organization.id, at_most)

    def drop_capture(self) -> None:
        """Disarm the source and empty its key log; the destination's gate and copy stay."""
        with self._errors():
            connection = self._connection(Side.SOURCE)
            found = gate.state(connection, self.move.organization.id)
            if found is not None and found.migration == self.move.migration and found.armed:
                while self._rounds().give_up(LOG_BATCH):
                    self._progress.check()
            gate.disarm(connection, self.move)  # and what was logged meanwhile
        for kind in ("gate", "key_log"):
            self._resources.forget(self._resource(Side.SOURCE, kind, self.move.organization.id))

    def verify(self) -> Verification:
        """Compare everything; a success is what a layout is compared with later."""
        self._pace.start()
        with self._errors():
            before = self._read_layouts()
            found = self._verifier().run()
            if found.ok:
                self._note_layouts(before)
            return found

    def catch_up(self) -> Round:
        """Do what need not happen under the gate: connect, warm up, statistics, one round."""
        with self._errors():
            self._insist_on_equal_schemas()
            freeze_first = self.move.strategy is Strategy.FREEZE_FIRST
            if freeze_first:
                # What an attempt before this one copied is compared under the gate.
                self._note_layouts(self._read_layouts())
            self._layouts = layout.noted(self._destination, self.move.migration)
            self._insist_on_layouts()
            behind = sequences.positions(self._destination, self._scope)
            sequences.advance(self._destination, self._scope, behind)
            # Under the gate only keys above these are looked at.
            self._positions = sequences.positions(self._destination, self._scope)
            if not freeze_first:
                self._analyze()
            for connection in (self._source, self._destination):
                connection.prepared_max = MAX_PREPARED
            for side in Side:
                self._wait_for_candidates(side)
            self._barrier = self._make_barrier()
            if not self.move.returning:
                self._rounds().bring_left()
            return Round(0, 0, 0, 0.0) if freeze_first else self._round()

    def _copier(self, connect: Connect | None = None, throttle: Throttle | None = None) -> Copier:
        return Copier(
            self._source,
            self._destination,
            self._scope,
            self._wires,
            self.move,
            self._progress,
            throttle or self._paced_throttle(),
            connect,
        )

    def _paced_throttle(self) -> Throttle:
        return Throttle(self.move.throttle.rows_per_s, pace=self._pace)

    def _rounds(self) -> Rounds:
        # While an organization only could come back, whether its rows refer to others' is nobody's
        # business; from `check_return` of the way back on it must be refused.
        return Rounds(
            self._source,
            self._destination,
            self._scope,
            self._wires,
            self.move,
            refuses_crossings=not self._crossings_allowed,
        )

    def _verifier(self, **arguments: Any) -> Verifier:
        return Verifier(
            self._source,
            self._destination,
            self._scope,
            self.move,
            Paced(self._progress, self._pace),
            **arguments,
        )

    def _read_layouts(self) -> dict[Side, str]:
        return {
            Side.SOURCE: layout.read(self._source, self._scope),
            Side.DESTINATION: layout.read(self._destination, self._scope),
        }

    def _note_layouts(self, found: Mapping[Side, str]) -> None:
        self._intend(Side.DESTINATION, "checkpoint", str(self.move.migration))
        with write(self._destination, self.move):
            for side, text in found.items():
                layout.note(self._destination, self.move.migration, side, text)

    def _insist_on_layouts(self) -> None:
        for side in Side:
            # Under the gate it is read once more on this session, and then nothing is planned.
            self._connection(side, "layout").execute("SET plan_cache_mode = force_generic_plan")
            now = self._read_layout_aside(side)
            layout.insist(side, self._where(side), self._layouts.get(side), now)

    def _insist_on_equal_schemas(self) -> None:
        source, destination = (
            Site(self.move.cell(side), connection, read_catalog(connection))
            for side, connection in (
                (Side.SOURCE, self._source),
                (Side.DESTINATION, self._destination),
            )
        )
        examination = Examination(source, destination, self._map, self.move.organization.id)
        for blocker in find_differences(examination):
            if blocker.fatal:
                raise Blocked(blocker.reason, hint=blocker.remedy, where=blocker.where)

    def _analyze(self) -> None:
        """Give the destination's planner statistics of the moved rows, where these weigh."""
        admin_url = _endpoint(self.move.destination).admin_url
        if admin_url is None:
            return
        planned = self.move.planned.get(KIND, {})
        tables = statistics.outdated(self._destination, self._scope.tables, planned)
        if not tables:
            return
        with _closing(admin_url, "analyze", self.move) as connection:
            for table in tables:
                self._progress.check()
                connection.execute(sql.SQL("ANALYZE {}").format(table.name.identifier))

    # ── cutover ─────────────────────────────────────────────────────────────────────────────────

    def _make_barrier(self) -> gate.Barrier:
        barrier = gate.Barrier(_endpoint(self.move.source).url, self.move)
        self._stack.callback(barrier.release)
        return barrier

    def freeze(self, deadline_s: float) -> None:
        """Lock the gate, drain the writers, write `frozen`; `finish` waits until it is durable."""
        if self._barrier is None:
            self._barrier = self._make_barrier()
        with sessions.translate_errors(self._where(Side.SOURCE)):
            timeline.insist_on_one_server(
                self._barrier.session, self._source, self._where(Side.SOURCE)
            )
        with sessions.translate_errors(self._where(Side.DESTINATION)):
            self._at_freeze = self._destination, timeline.read(self._destination)
        with sessions.translate_errors(self._where(Side.SOURCE)):
            self._barrier.freeze(deadline_s)

    def _wait_for_candidates(self, side: Side) -> float:
        """Wait until what is committed on `side` by now would survive the failover of its cell."""
        cell = self.move.cell(side)
        named = timeline.candidates(cell)
        with sessions.translate_errors(self._where(side)):
            if side not in self._confirms:
                self._confirms[side] = bool(named) or timeline.is_replicated(self._connection(side))
            if not self._confirms[side]:
                return 0.0
            return timeline.wait_for_candidates(
                self._connection(side, "candidates"),
                named,
                deadline_s=timeline.wait_s(cell),
                where=self._where(side),
            )

    def finish(self) -> Finished:
        """Apply and verify the last delta; arm reverse capture with it, in one transaction."""
        started = time.monotonic()
        evidence: dict[str, Any] = {}
        with self._errors(), ThreadPoolExecutor(len(Side) + 1) as pool:
            if not self._layouts:
                self._layouts = layout.noted(self._destination, self.move.migration)
            if not self._positions:  # after a loss there was no catch-up
                self._positions = sequences.positions(self._destination, self._scope)
            # Under the gate time counts: the layouts are read beside the round, and looked at
            # before it commits.
            layouts = {side: pool.submit(self._read_layout_aside, side) for side in Side}
            frozen = pool.submit(self._keep_frozen)

            def before_commit() -> None:
                frozen.result()  # what was read of the source is on its disk by then
                for side, future in layouts.items():
                    layout.insist(side, self._where(side), self._layouts.get(side), future.result())
                # A standby that has the last delta has this, too: it is earlier in the log.
                if advanced := self._advance_sequences():
                    evidence["sequences"] = advanced
                gate.arm_reverse(self._destination, self.move)
                checkpoints.write(
                    self._destination,
                    self.move.migration,
                    checkpoints.Checkpoint(LAST_DELTA, (str(self.move.attempt),)),
                )

            if self.move.strategy is Strategy.FREEZE_FIRST:
                # No new connections under the gate, and no rests: writers wait.
                copied = self._copier(throttle=Throttle(None)).run()
                evidence["copied"] = copied.count
            _, applied = self._rounds().run_last(before_commit)
            compared = applied.compared
            if self.move.strategy is Strategy.FREEZE_FIRST:
                compared += self._verify_under_the_gate(evidence)
            # The flip may rely on both after any failover: the frozen gate and the last delta.
            confirmed = frozen.result() + self._wait_for_candidates(Side.DESTINATION)
            if confirmed >= timeline.POLL_S:
                evidence["candidates_confirmed_after_s"] = round(confirmed, 4)
        if self._map.materialized_views:
            evidence["to_refresh"] = [str(name) for name in self._map.materialized_views]
        evidence["delta"] = applied.hashes
        return Finished(
            applied=applied.keys,
            compared=compared,
            seconds=time.monotonic() - started,
            evidence=evidence,
        )

    def _keep_frozen(self) -> float:
        """See that the frozen gate survives a crash and a failover; return seconds of waiting."""
        if self._barrier is not None:  # after the flip an earlier attempt's freeze is kept already
            self._barrier.keep_frozen()
        return self._wait_for_candidates(Side.SOURCE)

    def _advance_sequences(self) -> dict[str, int]:
        """Advance those that rows of the last delta may have come near to."""
        all_came_now = self.move.strategy is Strategy.FREEZE_FIRST
        if not all_came_now and not any(position.is_shared for position in self._positions):
            return {}
        return sequences.advance(self._destination, self._scope, self._positions)

    def _read_layout_aside(self, side: Side) -> str:
        """Read a side's layout on a session of its own, beside the mover's."""
        return layout.read(self._connection(side, "layout"), self._scope)

    def _verify_under_the_gate(self, evidence: dict[str, Any]) -> int:
        # The last delta's keys are in the log still, and excuse nothing.
        found = self._verifier(excuses_dirty=False).run()
        if not found.ok:
            raise VerificationFailed(
                f"{found.mismatch_count} rows differ, such as {found.mismatches[0].part}"
                f" {found.mismatches[0].key}: {found.mismatches[0].reason}",
                hint="the source serves again; look at the rows, then try again",
                where=self._where(Side.DESTINATION),
            )
        evidence["hashes"] = found.hashes
        if found.remarks:
            evidence["remarks"] = list(found.remarks)
        return found.compared

    def hand_over(self) -> None:
        """Source `moved`, destination open, both with the new epoch. Repeatable.

        Without waiting for the disk, since writers wait: `keep_handed_over` does.
        """
        self._hand_over(durable=False)

    def keep_handed_over(self) -> None:
        """Wait until what `hand_over` did survives a crash of either server. Repeatable."""
        self._hand_over(durable=True)

    def _hand_over(self, *, durable: bool) -> None:
        # The destination may have failed over, also since it was opened.
        self._bring_last_delta_again()
        # The source is frozen durably: in which order the two become visible does not matter.
        connections = {side: self._connection(side) for side in Side}

        def source() -> None:
            with sessions.translate_errors(self._where(Side.SOURCE)):
                gate.hand_over_source(connections[Side.SOURCE], self.move, durable=durable)

        def destination() -> None:
            with sessions.translate_errors(self._where(Side.DESTINATION)):
                gate.hand_over_destination(
                    connections[Side.DESTINATION], self.move, durable=durable
                )

        with ThreadPoolExecutor(len(Side)) as pool:
            for done in [pool.submit(source), pool.submit(destination)]:
                done.result()

    def _bring_last_delta_again(self) -> None:
        """See that the server to be opened has the last delta; bring it again where it has not.

        Its cell may have failed over since it was committed there. The source is closed and has
        everything.
        """
        connection = self._connection(Side.DESTINATION)
        if self._at_freeze is None or connection is self._at_freeze[0]:
            return
        with sessions.translate_errors(self._where(Side.DESTINATION)):
            if timeline.read(connection).break_since(self._at_freeze[1]) is None:
                return
            mark = checkpoints.read(connection, self.move.migration).get(LAST_DELTA)
        # A standby has everything up to a moment: with this mark, all that came before it.
        if mark is not None and mark.last_key == (str(self.move.attempt),):
            return
        self.__dict__.pop("_destination", None)  # gone already if this is tried again
        self.fence()
        self.repair()
        self.finish()

    def release(self) -> None:
        """Unlock the gate."""
        if self._barrier is not None:
            self._barrier.release()

    def thaw(self) -> None:
        """Open the source again, if this migration froze it."""
        if self._barrier is not None:
            self._barrier.thaw()
            return
        with sessions.translate_errors(self._where(Side.SOURCE)):
            gate.thaw(self._connection(Side.SOURCE), self.move)

    def check_return(self) -> tuple[Blocker, ...]:
        """Look at the way back: privileges and gates at the old cell, and equal schemas.

        Asked of a move on its way back it also looks at the rows that would come along: from here
        on none of them may refer to another organization's.
        """
        new, old = Side.DESTINATION, Side.SOURCE
        if self.move.returning:
            new, old = old, new
            self._crossings_allowed = False
        with self._errors():
            sessions_at = {Side.SOURCE: self._source, Side.DESTINATION: self._destination}
            there, home = (
                Site(self.move.cell(side), sessions_at[side], read_catalog(sessions_at[side]))
                for side in (new, old)
            )
            back = Examination(there, home, self._map, self.move.organization.id)
            found = [
                # A candidate that is away for a moment is worth a wait: `catch_up` asks.
                *(
                    blocker
                    for blocker in cell_conditions.check_cell(
                        back, back.destination, Side.DESTINATION, [self._map]
                    )
                    if blocker.code != "candidate-missing"
                ),
                *find_differences(back),
            ]
            if self.move.returning and not any(blocker.fatal for blocker in found):
                found += [*self._check_gates(), *self._check_rows(back)]
            return tuple(blocker for blocker in found if blocker.fatal or self.move.returning)

    def _check_gates(self) -> Iterator[Blocker]:
        """See that the new cell still logs, and the old one still waits, for this migration."""
        here = gate.state(self._source, self.move.organization.id)
        if here is None or here.migration != self.move.migration or not here.armed:
            yield Blocker(
                "capture-ended",
                self._where(Side.SOURCE),
                "the log of changes since the cutover is no longer this migration's: a later"
                " migration of the organization began, and ended it",
                "clean the old copy up when its TTL is over, then move the organization back as any"
                " other",
            )
        there = gate.state(self._destination, self.move.organization.id)
        if there is None or (there.state, there.migration, there.epoch) != (
            GateState.MOVED,
            self.move.migration,
            self.move.epoch,
        ):
            yield Blocker(
                "old-copy-taken",
                self._where(Side.DESTINATION),
                "the gate of the old copy is "
                + (f"{there.state} by migration {there.migration}" if there else "gone"),
                "look at `cellferry status`; move the organization back as any other",
            )

    def _check_rows(self, back: Examination) -> Iterator[Blocker]:
        for blocker in find_crossings(back):
            if blocker.code == "inbound-reference":
                # They stay where they are; the clean-up of the new cell refuses while they do.
                yield replace(blocker, fatal=False)
            else:
                yield blocker
        references = ReferencedRows(
            self._source, self._destination, self._scope, self._wires, self.move
        )
        for table in self._map.referenced:
            if kept := references.kept(table):
                yield Blocker(
                    "shared-row-stays",
                    f"{self._where(Side.DESTINATION)} {table.name}",
                    f"{len(kept)} rows differ that other organizations use there as well; they stay"
                    f" as they are there, for example {examples([*kept])}",
                    "make them agree by hand if the application expects so",
                    fatal=False,
                )

    # ── the end ─────────────────────────────────────────────────────────────────────────────────

    def ask(self, side: Side, question: Question) -> Answer:
        """Ask in a read-only transaction of a session of its own; see `StoreMove.ask`."""
        where = self._where(side)
        with sessions.translate_errors(where):
            return questions.ask(
                self._connection(side, "smoke"), self.move.organization.id, question, where
            )

    def cleanup(self, side: Side) -> Cleaned:
        """Delete the copy on `side`, then its gate, log, checkpoints and lease."""
        connection = self._source if side is Side.SOURCE else self._destination
        with sessions.translate_errors(self._where(side)):
            found = gate.state(connection, self.move.organization.id)
            if found is None or (
                side is Side.DESTINATION and found.migration != self.move.migration
            ):
                # The gate goes last: without it there is nothing of this migration, or nothing
                # left of it. Where another's keeps it out, nothing of it came in.
                cleaned = Cleaned(deleted=0, seconds=0.0, notes=("there was nothing to delete",))
            else:
                if self.move.returning and side is Side.SOURCE:
                    self._give_up_shared_rows()
                cleaner = Cleaner(
                    connection,
                    self._scope,
                    self.move,
                    side,
                    self._progress,
                    self._paced_throttle(),
                )
                self._pace.start()
                cleaned = cleaner.run()
                gate.remove(connection, self.move)
        self._retire(side)
        return cleaned

    def _give_up_shared_rows(self) -> None:
        """Let the new cell's clean-up take what was made there and went back with a roll-back.

        As with rows that the move brought: only if nobody else refers to them. They would grow
        stale there, and the next move to this cell would leave them as they are.
        """
        went_back = self._destination.execute(
            "SELECT migration, relation, key FROM cellferry.imported_row"
            " WHERE migration = %s AND NOT was_here",
            (self.move.migration,),
        ).fetchall()
        with write(self._source, self.move):
            self._source.cursor().executemany(
                "INSERT INTO cellferry.imported_row (migration, relation, key)"
                " VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
                went_back,
            )

    def close_capture(self) -> None:
        """End capture on both sides; a copy that is to be deleted keeps its gate till then."""
        for side in Side:
            connection = self._connection(side)
            with sessions.translate_errors(self._where(side)):
                found = gate.state(connection, self.move.organization.id)
                if (
                    side is Side.DESTINATION
                    and found is not None
                    and found.state in {GateState.OPEN, GateState.FROZEN}
                ):
                    self._arrive(connection)
                if found is not None and found.migration == self.move.migration:
                    if found.state is not GateState.OPEN:
                        continue
                    if side is Side.SOURCE:
                        self._delete_waiting()
                    gate.disarm(connection, self.move)
            self._retire(side)

    def _arrive(self, connection: Connection) -> None:
        """Take shared rows from other migrations that brought them to the destination as well.

        The organization lives with them there now. Until here the others could see it; when the
        records of this migration go, only this tells them. They look at the rows once more.
        """
        with write(connection, self.move):
            connection.execute(
                "WITH gone AS (DELETE FROM cellferry.imported_row AS i"
                " USING cellferry.imported_row AS mine"
                " WHERE mine.migration = %(migration)s AND i.migration <> %(migration)s"
                " AND i.relation = mine.relation AND i.key = mine.key AND EXISTS"
                " (SELECT FROM cellferry.gate AS g"
                " WHERE g.migration = i.migration AND g.state = 'importing')"
                " RETURNING i.migration)"
                " INSERT INTO cellferry.checkpoint (migration, relation)"
                " SELECT DISTINCT migration, %(left)s FROM gone ON CONFLICT DO NOTHING",
                {"migration": self.move.migration, "left": LEFT_TO_OTHERS},
            )

    def _delete_waiting(self) -> None:
        """Before the log goes, delete the copied rows of which only the log says whose they are."""
        found = gate.state(self._destination, self.move.organization.id)
        if (
            found is not None
            and found.migration == self.move.migration
            and found.state is GateState.IMPORTING
        ):
            self._rounds().delete_waiting()

    def _retire(self, side: Side) -> None:
        """Remove what is left of this migration on a side where it has no gate any more."""
        connection = self._connection(side)
        migration, organization = self.move.migration, self.move.organization.id
        with sessions.translate_errors(self._where(side)):
            for statement in (
                "DELETE FROM cellferry.checkpoint WHERE migration = %s",
                "DELETE FROM cellferry.imported_row WHERE migration = %s",
            ):
                connection.execute(statement, (migration,))
            gate.drop_lease(connection, self.move)
        for kind, name in (
            ("gate", organization),
            ("key_log", organization),
            ("checkpoint", str(migration)),
            ("lease", str(migration)),
        ):
            self._resources.forget(self._resource(side, kind, name))

    def _resource(self, side: Side, kind: str, name: str) -> Resource:
        return Resource(self.move.cell(side).name, KIND, kind, name)

    def _intend(self, side: Side, kind: str, name: str) -> None:
        self._resources.intend(self._resource(side, kind, name))


def _endpoint(cell: Cell) -> Endpoint:
    return cell.stores[KIND]


def _broke(error: BaseException | None) -> bool:
    """Whether a session ended that had been made. What the server said last may be lost on its way.

    Of one that was ended by a newer attempt we are told so, or only that it is gone.
    """
    if not isinstance(error, psycopg.OperationalError) or error.sqlstate is not None:
        return isinstance(error, psycopg.errors.AdminShutdown)
    return not (
        isinstance(error, psycopg.errors.ConnectionTimeout)
        or str(error).startswith("connection failed")
    )


@contextmanager
def _closing(
    url: str, purpose: str, move: Move | None = None, *, cell: Cell | None = None
) -> Iterator[Connection]:
    where = "" if cell is None else f"{cell.name}/{KIND}"
    connection = sessions.connect(url, purpose=purpose, move=move, autocommit=True, where=where)
    try:
        yield connection
    finally:
        connection.close()
