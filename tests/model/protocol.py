"""A model of the protocol that moves one organization: its states, and what may happen next.

Read it from the top: first what there is (`State` and its parts), then what applications do, then
what a controller does, step by step in the words of `cellferry.migration` and
`cellferry.stores.postgres`, at last what can go wrong. Every function below is one *action*: it
changes what is durable, or what somebody remembers, at one moment. Between two actions anything
else may happen. `explore.py` tries every order.

Cell A is the migration's source and cell B its destination. Epochs count from 0: the route says A
at epoch 0, B at epoch 1 (after the flip), A again at epoch 2 (after a switchback or a return).

A name in `Model.broken` leaves one precaution out (see `variants.py`); with none this is the
protocol as it is implemented.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

A, B = 0, 1
CELLS = "AB"
KEYS = "ab"
US, LATER = 1, 2
"""Migrations: the one that is explored, and a later one that brings the organization back to A."""

Row = str | None
"""A row's value: the operations that it contains, in their order; None where there is no row."""


class Gate(NamedTuple):
    """The row of `cellferry.gate`; a cell has None where there is no row."""

    state: str  # open, frozen, moved, importing
    armed: bool
    settled: bool
    by: int  # the migration
    attempt: int
    epoch: int
    awaits: int = 0  # writers whose transactions are older than the row, as bits


class Cell(NamedTuple):
    """What a cell's PostgreSQL has; all of it is durable but `lock`."""

    rows: tuple[Row, ...]
    gate: Gate | None = None
    log: tuple[tuple[int, int], ...] = ()  # committed log rows: (id, key)
    next_id: int = 1
    lease: int = 0  # newest attempt of our migration; 0 means no row
    copied: int = 0  # checkpoints of the copy: how many keys
    lock: int = 0  # the attempt whose session holds the exclusive side of the gate's lock
    # Only in variants where a standby lags: the gate's row, or the rows, as it has them.
    standby: Gate | None = None
    standby_rows: tuple[Row, ...] | None = None


class Writer(NamedTuple):
    """One client of the application, and its transaction."""

    phase: str = "idle"  # idle, begun (has a snapshot), written (not committed)
    done: int = 0  # operations committed
    known: int = 0  # oldest epoch that its route may have
    cell: int = A
    epoch: int = 0  # of the route that the transaction came with
    saw: Gate | None = None  # the gate in the transaction's snapshot
    stale: bool = False  # the gate's state, or the row, has changed since that snapshot
    stale_row: bool = False
    shared: bool = False  # holds the shared side of the gate's lock
    log_id: int = 0  # the log row that it wrote, 0 for none


class Topology(NamedTuple):
    """The topology's record of the migration, and the route (cell A where `epoch` is even)."""

    state: str
    epoch: int = 0
    attempt: int = 0
    verified: bool = False  # facts: a complete verification succeeded
    handed: bool = False  # facts: both gates were handed over after the last flip
    in_flight: int = 0  # a flip of this attempt whose commit got no answer; it holds the row's lock
    ttl_passed: bool = False
    standby: str = ""  # only where a standby lags: the state before the flip, as it has it
    paused: bool = False  # by a roll-back, so that no clean-up takes its way away
    later: int = 0  # how far a later migration back to A has come


class Controller(NamedTuple):
    """A process that runs steps; `at` is its next action. It remembers one snapshot."""

    attempt: int
    goal: str
    at: str
    step: str = ""  # what it began as, when it took the lease
    back: bool = False  # the cells are swapped: a reverse round or a switchback
    seen: tuple[int, ...] = ()  # log rows that its snapshot showed
    rows: tuple[tuple[int, Row], ...] = ()  # (key, value) that its snapshot showed


class State(NamedTuple):
    """Everything. `wrong` says which invariant the last action broke."""

    topology: Topology
    cells: tuple[Cell, Cell]
    writers: tuple[Writer, ...]
    controllers: tuple[Controller, ...] = ()
    ledger: tuple[Row, ...] = ("", "")  # what was committed, in order: the truth
    faults: int = 0  # how many may still happen
    wrong: str = ""


# ── invariants ──────────────────────────────────────────────────────────────────────────────────

ONE_CELL = "1: two cells accept writes, or one without authority took a write"
EPOCHS = "2: an epoch fell"
VERIFIED = "3: the route flipped without complete verification"
GATED = "5: before clean-up the old copy is not gated, or it is deleted"
LEDGER = "lost or doubled: the cell with authority differs from the ledger"
RETURN = "way back: a change at the new cell is neither at the old one nor in the log"
LEFTOVERS = "9: a migration that has ended makes a gate anew"
WRITABLE = "10: the organization never becomes writable again"
INVARIANTS = frozenset({ONE_CELL, EPOCHS, VERIFIED, GATED, LEDGER, RETURN, LEFTOVERS, WRITABLE})


class Step(NamedTuple):
    """One possible action.

    `hope` is whether the organization's return to service may rely on it: not on faults, on
    controllers that were given up, or on what an operator might do.
    """

    text: str
    state: State
    hope: bool = True


Scripts = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Model:
    """Bounds of an exploration.

    Attributes:
        scripts: for each writer its isolation level and its operations: the key, and whether it
            deletes the row (`-`) or adds to it (`+`).
        goals: what controllers are started for: forward, abort, back, clean.
        broken: precautions that are left out.
        failing: kinds of faults: crash (a controller), cell (a crash or promotion of a cell),
            error (a step gives up), unknown (a flip's answer is lost), zombie (a second controller
            takes over while the first lives).
        last: the state of the migration in which `forward` has reached its aim.
        returns: whether a later migration may bring the organization back.
        watches: the invariants that are asserted.
    """

    scripts: Scripts
    goals: tuple[str, ...] = ("forward",)
    broken: frozenset[str] = frozenset()
    failing: frozenset[str] = frozenset({"crash", "cell", "error", "unknown", "zombie"})
    last: str = "soaking"
    returns: bool = False
    watches: frozenset[str] = INVARIANTS


def authority(s: State) -> int:
    """The cell that the route names."""
    return s.topology.epoch % 2


def broken_invariants(s: State) -> Iterator[str]:
    """Which invariants do not hold in `s`."""
    if s.wrong:
        yield s.wrong
    topology, (a, b) = s.topology, s.cells
    if s.cells[authority(s)].rows != s.ledger:
        yield LEDGER
    if a.gate and b.gate and a.gate.state == "open" and b.gate.state == "open":
        yield ONE_CELL
    if topology.state in {"soaking", "retained", "rolling_back"}:
        if not (a.gate and a.gate.state in {"frozen", "moved"}):
            yield GATED
        logged = {key for _, key in b.log}
        if any(a.rows[key] != b.rows[key] and key not in logged for key in range(len(KEYS))):
            yield RETURN


def is_writable(s: State) -> bool:
    """Whether a client that asks the topology now can write and commit."""
    cell = s.cells[authority(s)]
    if cell.gate is None:
        return True
    held = cell.lock and cell.gate.armed  # who meets a gate that is not armed takes no lock
    return cell.gate.state == "open" and not held and cell.gate.epoch >= s.topology.epoch


# ── changing parts of a state ───────────────────────────────────────────────────────────────────


def with_cell(s: State, which: int, cell: Cell) -> State:
    """Replace one cell."""
    return s._replace(cells=(cell, s.cells[B]) if which == A else (s.cells[A], cell))


def with_gate(s: State, which: int, gate: Gate | None, **others: Any) -> State:
    """Commit a change of a gate's row, with `others` of the cell in the same transaction.

    A change of its state is seen by no snapshot that is older, and makes these stale.
    """
    cell = s.cells[which]
    old = cell.gate
    if old and gate and gate.epoch < old.epoch:
        s = s._replace(wrong=EPOCHS)
    if (old and old.state) != (gate and gate.state):
        s = s._replace(
            writers=tuple(
                w._replace(stale=True) if w.phase == "begun" and w.cell == which else w
                for w in s.writers
            )
        )
    return with_cell(s, which, cell._replace(gate=gate, **others))


def with_rows(s: State, which: int, rows: tuple[Row, ...], **others: Any) -> State:
    """Commit rows of a cell; snapshots of writers that are older are stale."""
    old = s.cells[which].rows
    if rows != old and any(w.phase == "begun" and w.cell == which for w in s.writers):
        s = s._replace(
            writers=tuple(
                w._replace(stale_row=True) if w.phase == "begun" and w.cell == which else w
                for w in s.writers
            )
        )
    return with_cell(s, which, s.cells[which]._replace(rows=rows, **others))


def with_controller(s: State, old: Controller, new: Controller | None) -> State:
    """Replace a controller; None ends its process, and the locks of its sessions."""
    if new is not None:
        return s._replace(controllers=tuple(new if c is old else c for c in s.controllers))
    s = s._replace(controllers=tuple(c for c in s.controllers if c is not old))
    for which in (A, B):
        if s.cells[which].lock == old.attempt:
            s = with_cell(s, which, s.cells[which]._replace(lock=0))
    return s


def open_transactions(s: State, which: int) -> int:
    """Writers with a transaction in this cell that has a snapshot or has written, as bits."""
    return sum(1 << n for n, w in enumerate(s.writers) if w.phase != "idle" and w.cell == which)


# ── applications ────────────────────────────────────────────────────────────────────────────────


def write_steps(model: Model, s: State, number: int) -> Iterator[Step]:
    """What one writer may do: begin, write, commit. It may wait anywhere for any time."""
    w = s.writers[number]
    isolation, script = model.scripts[number]
    name = f"writer {number + 1}"

    def become(state: State, new: Writer) -> State:
        writers = list(state.writers)
        writers[number] = new
        return state._replace(writers=tuple(writers))

    def end(state: State, new: Writer) -> State:
        """The transaction ends: nobody needs to wait for it any more."""
        gate = state.cells[w.cell].gate
        if gate and gate.awaits & (1 << number):
            awaits = gate.awaits & ~(1 << number)
            cell = state.cells[w.cell]
            state = with_cell(state, w.cell, cell._replace(gate=gate._replace(awaits=awaits)))
        return become(state, new)

    rested = Writer(done=w.done, known=w.known)
    if w.phase == "idle":
        if w.done == len(script):
            return
        for epoch in range(w.known, s.topology.epoch + 1):
            # Its cached route, or any newer one that it may have heard of.
            which = epoch % 2
            if isolation == "rr":
                new = w._replace(
                    phase="begun", cell=which, epoch=epoch, known=epoch, saw=s.cells[which].gate
                )
                yield Step(
                    f"{name} begins REPEATABLE READ in {CELLS[which]} (route of epoch {epoch})",
                    become(s, new),
                )
            else:
                new = w._replace(cell=which, epoch=epoch, known=epoch)
                yield from _write(model, s, number, new, rested, become, end)
    elif w.phase == "begun":
        yield from _write(model, s, number, w, rested, become, end)
    else:
        key, deletes = KEYS.index(script[w.done][0]), script[w.done][1] == "-"
        operation = chr(ord("0") + number * 3 + w.done)
        cell = s.cells[w.cell]
        after = s._replace(
            ledger=_changed(s.ledger, key, deletes, operation),
            wrong="" if w.cell == authority(s) else ONE_CELL,
        )
        log = cell.log
        if w.log_id:
            log = tuple(sorted((*log, (w.log_id, key))))
        after = with_rows(after, w.cell, _changed(cell.rows, key, deletes, operation), log=log)
        yield Step(
            f"{name} commits in {CELLS[w.cell]}; acknowledged",
            end(after, rested._replace(done=w.done + 1)),
        )


def _changed(rows: tuple[Row, ...], key: int, deletes: bool, operation: str) -> tuple[Row, ...]:
    value = None if deletes else (rows[key] or "") + operation
    return (*rows[:key], value, *rows[key + 1 :])


def _write(
    model: Model,
    s: State,
    number: int,
    w: Writer,
    rested: Writer,
    become: Callable[[State, Writer], State],
    end: Callable[[State, Writer], State],
) -> Iterator[Step]:
    """The statement that writes: `cellferry.enter` of gate.sql, then the row."""
    script = model.scripts[number][1]
    key = script[w.done][0]
    cell = s.cells[w.cell]
    is_old = w.phase == "begun"
    name = f"writer {number + 1}"
    gate = w.saw if is_old else cell.gate
    shared = False
    if gate and (gate.armed or gate.state == "frozen"):
        if cell.lock:
            return  # it waits at the gate
        shared = True
        if not is_old:
            gate = cell.gate
        elif w.stale and "stale snapshot passes" not in model.broken:
            yield Step(f"{name} is refused with 40001: the gate has changed", end(s, rested))
            return
    if gate and (gate.state != "open" or gate.epoch < w.epoch):
        if is_old:  # a READ COMMITTED transaction that is refused leaves no trace
            yield Step(f"{name} is refused: {CELLS[w.cell]} is {gate.state}", end(s, rested))
        return
    if any(
        o is not s.writers[number]
        and o.phase == "written"
        and o.cell == w.cell
        and model.scripts[n][1][o.done][0] == key
        for n, o in enumerate(s.writers)
    ):
        return  # it waits for the row
    if is_old and w.stale_row:
        yield Step(f"{name} is refused with 40001: the rows have changed", end(s, rested))
        return
    logs = bool(gate and gate.armed)
    text = f"{name} writes {key} in {CELLS[w.cell]}" + ("" if logs else ", not logged")
    if not is_old:
        text += f" (route of epoch {w.epoch})"
    new = w._replace(
        phase="written",
        saw=None,
        stale=False,
        stale_row=False,
        shared=shared,
        log_id=cell.next_id if logs else 0,
    )
    after = s
    if logs:
        after = with_cell(s, w.cell, cell._replace(next_id=cell.next_id + 1))
    yield Step(text, become(after, new))


# ── controllers ─────────────────────────────────────────────────────────────────────────────────
#
# One function for each action; it is named by its place in a program and yields what may follow.

Action = Callable[[Model, State, Controller], Iterator[Step]]
ACTIONS: dict[str, Action] = {}


def action(name: str) -> Callable[[Action], Action]:
    """Register an action under the name that `Controller.at` has for it."""

    def register(function: Action) -> Action:
        ACTIONS[name] = function
        return function

    return register


def say(c: Controller, text: str) -> str:
    """Name the controller by its attempt."""
    return f"attempt {c.attempt} {text}"


def cells_of(c: Controller) -> tuple[int, int, int]:
    """Source, destination and the epoch of the source's authority, in the direction of `c`."""
    return (B, A, 1) if c.back else (A, B, 0)


def go(s: State, c: Controller, text: str, to: str, **changes: Any) -> Step:
    """The controller goes on with `to`; an empty one ends it."""
    new = c._replace(at=to, **changes) if to else None
    return Step(say(c, text), with_controller(s, c, new))


def stop(s: State, c: Controller, why: str) -> Step:
    """An error ends the step, and the process's sessions with it."""
    return go(s, c, f"stops: {why}", "")


def holds_topology(model: Model, s: State, c: Controller) -> bool:
    """`Migrations._locked`: whether this attempt is the newest."""
    return s.topology.attempt == c.attempt or "no lease in the topology" in model.broken


def holds_cell(model: Model, s: State, c: Controller, which: int) -> bool:
    """`gate.hold_lease`: whether the cell has seen no newer attempt."""
    return s.cells[which].lease == c.attempt or "no lease at the rows" in model.broken


def fits(model: Model, gate: Gate | None, c: Controller, epoch: int, *states: str) -> bool:
    """The compare-and-set of a gate's row: migration, attempt, epoch and state."""
    return (
        gate is not None
        and gate.by == US
        and (gate.attempt == c.attempt or "no lease at the gate" in model.broken)
        and gate.epoch == epoch
        and gate.state in states
    )


def transition(
    model: Model, s: State, c: Controller, before: str, after: str, to: str, **facts: Any
) -> Iterator[Step]:
    """`Topology.transition`: a compare-and-set with the lease; waits for a flip in flight."""
    if s.topology.in_flight:
        return
    if not holds_topology(model, s, c):
        yield stop(s, c, "a newer attempt has the lease")
    elif s.topology.state not in {before, after}:
        yield stop(s, c, f"the migration is {s.topology.state}, not {before}")
    else:
        topology = s.topology._replace(state=after, **facts)
        yield go(s._replace(topology=topology), c, f"moves the migration to {after}", to)


def begin(c: Controller, s: State, model: Model) -> Controller | None:
    """Where an attempt begins: its goal in the migration's state (`attempt` in context.py)."""
    state, goal = s.topology.state, c.goal
    at = ""
    back = goal == "back"
    if goal == "forward":
        at = {
            "planned": "to copying",
            "copying": "import",
            "syncing": "verify",
            "ready": "serve again",
            "cutting_over": "to ready",
            "soaking": "soak read" if s.topology.handed else "hand over",
        }.get(state, "")
        back = at == "soak read"
        if at == "soak read" and model.last == "soaking":
            at = ""
    elif goal == "abort":
        if state in {"planned", "copying", "syncing", "ready", "cutting_over"}:
            at = "to aborted"
        elif state == "aborted":
            at = "abort thaw"
    elif goal == "back":
        at = {
            "soaking": "back read" if s.topology.handed else "finish cutover",
            "retained": "serve again",
            "rolling_back": "to retained",
            "rolled_back": "" if s.topology.handed else "hand over",
        }.get(state, "")
        back = at != "finish cutover"
        if at == "back read":
            at = "serve again"
        elif at == "finish cutover":
            at = "hand over"
    elif goal == "clean":
        # Which copy is the old one was decided when the cleaner asked whether it may.
        at = {
            "retained": "to cleaning",
            "cleaning": "clean a",
            "rolled_back": "clean a",
        }.get(state, "")
        back = c.back
    return c._replace(at=at, back=back) if at else None


# ── every attempt: the lease ────────────────────────────────────────────────────────────────────


@action("lease")
def take_lease(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """`Topology.take_lease`; only a cleaner is here, which asked before whether it may clean."""
    if s.topology.in_flight:
        return
    yield from _leased(model, s, c)


def _leased(model: Model, s: State, c: Controller) -> Iterator[Step]:
    number = s.topology.attempt + 1
    begun = begin(c._replace(attempt=number), s, model)
    if begun is None:
        yield stop(s, c, f"the migration is {s.topology.state}")
        return
    new = begun._replace(at="fence A", step=begun.at)
    if c.goal == "abort" and "aborts at the cells first" in model.broken:
        text = f"attempt {number} (abort) goes to the cells first"
        yield Step(text, with_controller(s, c, new))
        return
    after = s._replace(topology=s.topology._replace(attempt=number))
    after = with_controller(after, c, new)
    yield Step(
        f"attempt {number} ({c.goal}) takes the lease in the topology",
        renumbered(after) if number > FEW_ATTEMPTS else after,
    )


FEW_ATTEMPTS = 4


def renumbered(s: State) -> State:
    """The same state with attempts numbered anew: only their order means anything.

    Without this, attempts that come and go without effect would make ever new states.
    """
    used = {s.topology.attempt, *(c.attempt for c in s.controllers)}
    for cell in s.cells:
        used |= {cell.lease, cell.lock}
        used |= {gate.attempt for gate in (cell.gate, cell.standby) if gate}
    order = {old: new for new, old in enumerate(sorted(used | {0}))}

    def gate(one: Gate | None) -> Gate | None:
        return one and one._replace(attempt=order[one.attempt])

    a, b = (
        cell._replace(
            lease=order[cell.lease],
            lock=order[cell.lock],
            gate=gate(cell.gate),
            standby=gate(cell.standby),
        )
        for cell in s.cells
    )
    return s._replace(
        topology=s.topology._replace(attempt=order[s.topology.attempt]),
        cells=(a, b),
        controllers=tuple(c._replace(attempt=order[c.attempt]) for c in s.controllers),
    )


def _fence(model: Model, s: State, c: Controller, which: int, to: str) -> Iterator[Step]:
    cell = s.cells[which]
    if cell.lease > c.attempt:
        yield stop(s, c, "a newer attempt has the cell's lease")
        return
    gate = cell.gate
    if gate and gate.by == US and gate.attempt < c.attempt:
        gate = gate._replace(attempt=c.attempt)
    lock = cell.lock if cell.lock >= c.attempt or "old sessions live on" in model.broken else 0
    after = with_cell(s, which, cell._replace(lease=c.attempt, gate=gate, lock=lock))
    text = f"takes the lease in {CELLS[which]}; older attempts' sessions there end"
    yield go(after, c, text, to)


@action("fence A")
def fence_a(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """`gate.take_lease` in cell A."""
    yield from _fence(model, s, c, A, "fence B")


@action("fence B")
def fence_b(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """`gate.take_lease` in cell B; then the migration's state is read, which says what to do."""
    for step in _fence(model, s, c, B, "fence B"):
        now = next((o for o in step.state.controllers if o.attempt == c.attempt), None)
        if now is None:
            yield step
            continue
        careless = {"no check after the fence", "aborts at the cells first"}
        if not careless & model.broken and not holds_topology(model, s, c):
            yield stop(step.state, now, "a newer attempt has the lease")
            continue
        if c.goal == "clean" and s.topology.paused and "the pause is lifted" not in model.broken:
            yield stop(step.state, now, "the migration is paused: it is being rolled back")
            continue
        begun = begin(now, s, model)
        if begun is None and c.step in {"to copying", "import"}:
            begun = now._replace(at="import")  # the copy step looks at its state only once
        if begun is None:
            yield stop(step.state, now, f"the migration is {s.topology.state}")
        else:
            yield Step(step.text, with_controller(step.state, now, begun._replace(step="")))


# ── copy ────────────────────────────────────────────────────────────────────────────────────────


@action("to copying")
def to_copying(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """The copy step begins."""
    yield from transition(model, s, c, "planned", "copying", "import")


@action("import")
def import_gate(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """`gate.import_gate`: the destination's gate."""
    cell = s.cells[B]
    if not holds_cell(model, s, c, B):
        yield stop(s, c, "the lease is lost")
    elif cell.gate is None:
        gate = Gate("importing", False, False, US, c.attempt, 0, open_transactions(s, B))
        s = with_gate(s, B, gate)
        if s.topology.state == "aborted":
            s = s._replace(wrong=LEFTOVERS)
        yield go(s, c, "gates B: importing", "settle B")
    elif cell.gate.by == US and cell.gate.state == "importing":
        gate = cell.gate._replace(attempt=c.attempt)
        yield go(with_gate(s, B, gate), c, "finds B importing", "settle B")
    else:
        yield stop(s, c, f"B is {cell.gate.state}")


def _settle(model: Model, s: State, c: Controller, which: int, to: str) -> Iterator[Step]:
    gate = s.cells[which].gate
    if gate is None or gate.by != US or gate.attempt != c.attempt:
        yield stop(s, c, "the gate is another's")
    elif not gate.awaits or "arming does not wait" in model.broken:
        text = f"sees every transaction in {CELLS[which]} ended that is older than the gate"
        yield go(with_gate(s, which, gate._replace(settled=True, awaits=0)), c, text, to)


@action("settle B")
def settle_b(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """`gate._settle` at the destination."""
    yield from _settle(model, s, c, B, "arm")


@action("arm")
def arm(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """`gate.arm`: the source logs keys from now on."""
    cell = s.cells[A]
    gate = cell.gate
    if not holds_cell(model, s, c, A):
        yield stop(s, c, "the lease is lost")
    elif gate is None:
        gate = Gate("open", True, False, US, c.attempt, 0, open_transactions(s, A))
        yield go(with_gate(s, A, gate), c, "arms A", "settle A")
    elif gate.state == "open" and gate.epoch == 0:
        gate = gate._replace(armed=True, attempt=c.attempt, settled=gate.settled and gate.armed)
        yield go(with_gate(s, A, gate), c, "arms A again", "settle A")
    else:
        yield stop(s, c, f"A is {gate.state}")


@action("settle A")
def settle_a(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """`gate._settle` at the source; the copy goes on from its checkpoint."""
    to = "copy read" if s.cells[B].copied < len(KEYS) else "to syncing"
    yield from _settle(model, s, c, A, to)


@action("copy read")
def copy_read(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """The copier reads a batch: here one key."""
    key = s.cells[B].copied
    if key == len(KEYS):
        yield go(s, c, "finds everything copied", "to syncing")
        return
    rows = ((key, s.cells[A].rows[key]),)
    yield go(s, c, f"reads {KEYS[key]} in A to copy it", "copy write", rows=rows)


@action("copy write")
def copy_write(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """The copier writes the batch and its checkpoint, holding the lease."""
    if not holds_cell(model, s, c, B):
        yield stop(s, c, "the lease is lost")
        return
    key = c.rows[0][0]
    after = _applied(s, B, c.rows, copied=max(s.cells[B].copied, key + 1))
    to = "copy read" if key + 1 < len(KEYS) else "to syncing"
    yield go(after, c, f"writes {KEYS[key]} in B", to, rows=())


def _applied(s: State, which: int, values: tuple[tuple[int, Row], ...], **others: Any) -> State:
    rows = list(s.cells[which].rows)
    for key, value in values:
        rows[key] = value
    return with_rows(s, which, tuple(rows), **others)


@action("to syncing")
def to_syncing(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """The copy step ends."""
    to = "unverified" if "cuts over unverified" in model.broken else "verify"
    yield from transition(model, s, c, "copying", "syncing", to)


@action("unverified")
def unverified(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """Only in the variant that cuts over what was never verified."""
    yield from transition(model, s, c, "syncing", "ready", "serve again")


# ── rounds ──────────────────────────────────────────────────────────────────────────────────────


def _read(model: Model, s: State, c: Controller, to: str, empty: str = "") -> Iterator[Step]:
    """`Rounds.run`: the log and the current rows of its keys, in one snapshot."""
    source = s.cells[cells_of(c)[0]]
    seen = tuple(number for number, _ in source.log)
    keys = sorted({key for _, key in source.log})
    rows = tuple((key, source.rows[key]) for key in keys)
    shown = ", ".join(KEYS[key] for key in keys) or "nothing"
    text = f"reads in {CELLS[cells_of(c)[0]]} what is dirty: {shown}"
    if "two snapshots" in model.broken:
        yield go(s, c, text.replace("what is dirty", "the rows that are dirty"), f"{to} log",
                 rows=rows)  # fmt: skip
    else:
        yield go(s, c, text, to if seen or not empty else empty, seen=seen, rows=rows)


def _read_log_late(model: Model, s: State, c: Controller, to: str) -> Iterator[Step]:
    source = s.cells[cells_of(c)[0]]
    keys = {key for key, _ in c.rows}
    seen = tuple(number for number, key in source.log if key in keys)
    yield go(s, c, f"reads the log rows of these keys: {list(seen)}", to, seen=seen)


def _apply(model: Model, s: State, c: Controller, to: str, **others: Any) -> Iterator[Step]:
    """`Applier.apply`: the destination becomes equal to what was read, under the lease."""
    _, destination, epoch = cells_of(c)
    gate = s.cells[destination].gate
    unleased = c.back and "reverse round without the lease" in model.broken
    if not holds_cell(model, s, c, destination) and not unleased:
        yield stop(s, c, "the lease is lost")
        return
    # A reverse round also holds the old cell's gate (`gate.hold_retained`).
    if c.back and not (gate and gate.by == US and gate.state == "moved" and gate.epoch == epoch):
        yield stop(s, c, "the old cell's gate is not moved by this migration")
        return
    shown = ", ".join(KEYS[key] for key, _ in c.rows) or "nothing"
    text = f"applies {shown} in {CELLS[destination]}"
    if "rows not on the standby" in model.broken and c.rows:
        others["standby_rows"] = s.cells[destination].standby_rows or s.cells[destination].rows
    yield go(_applied(s, destination, c.rows, **others), c, text, to, rows=())


def _forget(model: Model, s: State, c: Controller, to: str) -> Iterator[Step]:
    """`Rounds.forget`: delete exactly the log rows that were seen."""
    source = cells_of(c)[0]
    cell = s.cells[source]
    if c.seen:
        if not holds_cell(model, s, c, source):
            yield stop(s, c, "the lease is lost")
            return
        if cell.gate is None or cell.gate.by != US or not cell.gate.armed:
            yield stop(s, c, "the log is not this migration's any more")
            return
    gone: tuple[int, ...] = c.seen
    if "forgets up to the highest" in model.broken and c.seen:
        gone = tuple(range(max(c.seen) + 1))
    log = tuple(entry for entry in cell.log if entry[0] not in gone)
    text = f"forgets log rows {list(c.seen)}" if c.seen else "has nothing to forget"
    yield go(with_cell(s, source, cell._replace(log=log)), c, text, to, seen=())


def _round(name: str, then: str) -> None:
    """Register the three actions of a round called `name`."""
    first, second = (
        (f"{name} apply", f"{name} forget"),
        (f"{name} forget", f"{name} apply"),
    )

    def order(model: Model) -> tuple[str, str]:
        return second if "forgets before it applies" in model.broken else first

    @action(f"{name} read")
    def read(model: Model, s: State, c: Controller) -> Iterator[Step]:
        yield from _read(model, s, c, order(model)[0], empty=then)

    @action(f"{order_log(name)}")
    def read_log(model: Model, s: State, c: Controller) -> Iterator[Step]:
        yield from _read_log_late(model, s, c, order(model)[0])

    @action(f"{name} apply")
    def apply(model: Model, s: State, c: Controller) -> Iterator[Step]:
        is_last = order(model)[1] == f"{name} apply"
        yield from _apply(model, s, c, then if is_last else f"{name} forget")

    @action(f"{name} forget")
    def forget(model: Model, s: State, c: Controller) -> Iterator[Step]:
        is_last = order(model)[1] == f"{name} forget"
        yield from _forget(model, s, c, then if is_last else f"{name} apply")


def order_log(name: str) -> str:
    """The place of the second read in the variant that reads log and rows apart."""
    return f"{name} apply log"


_round("catch-up", "begin barrier")
_round("soak", "to retained at last")


# ── verify ──────────────────────────────────────────────────────────────────────────────────────


@action("verify")
def verify(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """The verify step: every key that is not dirty must be equal; then the migration is ready."""
    source, destination, _ = cells_of(c)
    dirty = {key for _, key in s.cells[source].log}
    differs = [
        KEYS[key]
        for key in range(len(KEYS))
        if key not in dirty and s.cells[source].rows[key] != s.cells[destination].rows[key]
    ]
    if differs:
        yield stop(s, c, f"verification found {', '.join(differs)} different: halted")
    elif c.back:
        yield go(s, c, "verifies everything", "catch-up read")
    else:
        yield from transition(model, s, c, "syncing", "ready", "serve again", verified=True)


# ── the barrier: cutover, and with the cells swapped the switchback ─────────────────────────────


def states_of(c: Controller) -> tuple[str, str, str]:
    """The barrier's state, what it gives up to, and what its flip makes."""
    return (
        ("rolling_back", "retained", "rolled_back")
        if c.back
        else ("cutting_over", "ready", "soaking")
    )


@action("to ready")
def to_ready(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """`serve_again`: an earlier cutover died before the flip."""
    yield from transition(model, s, c, "cutting_over", "ready", "serve again")


@action("to retained")
def to_retained(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """`serve_on`: an earlier switchback died before its flip."""
    yield from transition(model, s, c, "rolling_back", "retained", "serve again")


@action("serve again")
def serve_again(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """What an earlier attempt left frozen serves first."""
    if c.back:
        s = s._replace(topology=s.topology._replace(paused=True))
    yield from _thaw(model, s, c, "verify" if c.back else "catch-up read")


def _thaw(model: Model, s: State, c: Controller, to: str) -> Iterator[Step]:
    """`gate.thaw`, then the lock is released."""
    source, _, epoch = cells_of(c)
    gate = s.cells[source].gate
    if gate and "thaws whatever it finds" in model.broken:
        s = with_gate(s, source, gate._replace(state="open", epoch=epoch))
    elif fits(model, gate, c, epoch, "open", "frozen"):
        s = with_gate(s, source, gate._replace(state="open"))
    elif not (gate is None or gate.by != US or gate.state == "open"):
        yield stop(s, c, f"cannot thaw: {CELLS[source]} is {gate.state}")
        return
    cell = s.cells[source]
    if cell.lock == c.attempt:
        s = with_cell(s, source, cell._replace(lock=0))
    yield go(s, c, f"thaws {CELLS[source]}", to)


@action("begin barrier")
def begin_barrier(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """The topology knows that a freeze may follow."""
    begun, given_up, _ = states_of(c)
    before = s.topology.state if c.back and s.topology.state == "soaking" else given_up
    to = "lock"
    if c.back and "switchback without a freeze" in model.broken:
        to = "finish read"
    if "flips before the freeze" in model.broken:
        to = "flip"
    yield from transition(model, s, c, before, begun, to)


@action("lock")
def lock(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """Step 1: the exclusive side of the gate's lock; waits for the writers that passed."""
    source = cells_of(c)[0]
    cell = s.cells[source]
    busy = any(w.shared and w.phase == "written" and w.cell == source for w in s.writers)
    if cell.lock and cell.lock != c.attempt:
        yield go(s, c, "gives up: an older attempt has the lock", "undo")
        return
    if (busy and "freeze does not drain" not in model.broken) or cell.lock:
        return
    text = f"locks the gate of {CELLS[source]}; its writers have drained"
    yield go(with_cell(s, source, cell._replace(lock=c.attempt)), c, text, "freeze")


@action("freeze")
def freeze(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """Steps 2 and 3's part of it as one: `frozen`, durable, in the session that holds the lock."""
    source, _, epoch = cells_of(c)
    cell = s.cells[source]
    gate = cell.gate
    if cell.lock != c.attempt:
        yield go(s, c, "has lost the session that held the lock", "undo")
    elif fits(model, gate, c, epoch, "open", "frozen") and gate.armed and gate.settled:
        standby = gate if "gate not on the standby" in model.broken else None
        to = "finish read"
        after = with_gate(s, source, gate._replace(state="frozen"), standby=standby)
        if "flips before the freeze" in model.broken:
            to = "finish read"
        yield go(after, c, f"freezes {CELLS[source]}", to)
    else:
        yield go(s, c, "cannot freeze", "undo")


@action("finish read")
def finish_read(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """Step 3: the last delta, read under the gate."""
    yield from _read(model, s, c, "finish apply")


@action("finish apply log")
def finish_read_log(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """The second read of the variant that reads log and rows apart."""
    yield from _read_log_late(model, s, c, "finish apply")


@action("finish apply")
def finish_apply(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """Step 3: applied, verified, and the destination armed for the way back, in one commit."""
    _, destination, epoch = cells_of(c)
    gate = s.cells[destination].gate
    to = "flip"
    if "flips before the freeze" in model.broken:
        to = "hand over"
    if "opens before the flip" in model.broken and not c.back:
        to = "open early"
    others: dict[str, Any] = {}
    if not c.back and gate and "opens before it is armed" not in model.broken:
        if not fits(model, gate, c, epoch, "importing"):
            yield go(s, c, "cannot arm the way back", "undo")
            return
        others["gate"] = gate._replace(armed=True)
    for step in _apply(model, s, c, to, **others):
        armed = " and arms it for the way back" if others else ""
        yield step._replace(text=step.text + armed)


@action("open early")
def open_early(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """Only in the variant that opens the destination before the flip."""
    gate = s.cells[B].gate
    if gate is None or gate.state != "importing":
        yield go(s, c, "cannot open", "undo")
        return
    yield go(with_gate(s, B, gate._replace(state="open", epoch=1)), c, "opens B", "flip")


@action("flip")
def flip(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """Step 4, the commit point: `Topology.flip`, `Topology.flip_back`."""
    if s.topology.in_flight:
        return
    begun, _, after = states_of(c)
    epoch = cells_of(c)[2]
    to = "lock" if "flips before the freeze" in model.broken else "hand over"
    if not holds_topology(model, s, c):
        yield stop(s, c, "a newer attempt has the lease")
    elif s.topology.state == after:
        yield go(s, c, "finds the route flipped", to)
    elif s.topology.state != begun or s.topology.epoch != epoch:
        yield go(s, c, f"cannot flip: {s.topology.state}", "undo")
    else:
        lags = "flip not on the standby" in model.broken
        yield go(_flipped(s, c, lags=lags), c, f"flips the route to {CELLS[(epoch + 1) % 2]}", to)
        if s.faults and "unknown" in model.failing:
            sent = s._replace(
                topology=s.topology._replace(in_flight=c.attempt + 100 * c.back),
                faults=s.faults - 1,
            )
            to = "undo thaw" if "thaws on an unknown commit" in model.broken else "ask"
            yield go(sent, c, "sends the flip and loses the connection", to)._replace(hope=False)


def _flipped(s: State, c: Controller, *, lags: bool = False) -> State:
    topology = s.topology._replace(
        state=states_of(c)[2], epoch=cells_of(c)[2] + 1, handed=False, in_flight=0,
        ttl_passed=False,
    )  # fmt: skip
    if lags:
        topology = topology._replace(standby=s.topology.state)
    wrong = "" if s.topology.verified else VERIFIED
    return s._replace(topology=topology, wrong=s.wrong or wrong)


def commits_in_flight(s: State) -> Iterator[Step]:
    """A commit whose client has lost its connection ends by itself: either way."""
    number = s.topology.in_flight
    if number:
        c = Controller(number % 100, "", "", back=number > 100)
        yield Step(f"the flip of attempt {c.attempt} commits after all", _flipped(s, c))
        topology = s.topology._replace(in_flight=0)
        yield Step(
            f"the flip of attempt {c.attempt} turns out to be rolled back",
            s._replace(topology=topology),
        )


@action("ask")
def ask(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """`_settle_flip`: ask under the row's lock, which waits for a commit in flight."""
    begun, given_up, after = states_of(c)
    careless = "asks without the lock" in model.broken
    if s.topology.in_flight and not careless:
        return
    if s.topology.state == after or s.topology.state in {"retained", "cleaning", "completed"}:
        yield go(s, c, "asks, and hears that the route is flipped", "hand over")
    elif careless:
        yield go(s, c, "asks, and hears that the route is not flipped", "thaw first")
    else:
        # Moved back at once, so that nothing sent before can succeed later.
        yield from transition(model, s, c, begun, given_up, "undo thaw")


@action("undo")
def undo(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """`_undo`: first make a flip impossible."""
    begun, given_up, _ = states_of(c)
    yield from transition(model, s, c, begun, given_up, "undo thaw")


@action("undo thaw")
def undo_thaw(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """`_undo`: then the source serves again, and the step ends with its error."""
    yield from _thaw(model, s, c, "")


@action("thaw first")
def thaw_first(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """Only in variants: the gate is opened before the topology knows."""
    yield from _thaw(model, s, c, "undo late")


@action("undo late")
def undo_late(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """Only in variants: the topology is told after the gate was opened."""
    begun, given_up, _ = states_of(c)
    yield from transition(model, s, c, begun, given_up, "")


def _hand_over_source(model: Model, s: State, c: Controller) -> State | None:
    source, _, epoch = cells_of(c)
    gate = s.cells[source].gate
    if fits(model, gate, c, epoch + 1, "moved"):
        return s
    states = ("frozen", "open") if "switchback without a freeze" in model.broken else ("frozen",)
    if "no gate stays behind" in model.broken and (gate is None or gate.state == "frozen"):
        return with_gate(s, source, None) if gate else s
    if not fits(model, gate, c, epoch, *states):
        return None
    return with_gate(s, source, gate._replace(state="moved", armed=False, epoch=epoch + 1))


def _hand_over_destination(model: Model, s: State, c: Controller) -> State | None:
    _, destination, epoch = cells_of(c)
    gate = s.cells[destination].gate
    if fits(model, gate, c, epoch + 1, "open"):
        return s
    before = "moved" if c.back else "importing"
    armed = c.back or (gate and gate.armed) or "opens before it is armed" in model.broken
    if not fits(model, gate, c, epoch, before) or not armed:
        return None
    return with_gate(s, destination, gate._replace(state="open", epoch=epoch + 1))


@action("hand over")
def hand_over(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """Steps 5 and 7 as one: source `moved` and destination open, in either order."""
    source, destination, _ = cells_of(c)
    for verb, which, other, word in (
        (_hand_over_source, source, _hand_over_destination, "moved"),
        (_hand_over_destination, destination, _hand_over_source, "open"),
    ):
        after = verb(model, s, c)
        if after is None:
            yield stop(s, c, f"cannot hand {CELLS[which]} over")
        elif after is not s:
            yield go(after, c, f"makes {CELLS[which]} {word}", "hand over")
        elif other(model, s, c) is s:
            yield from release(model, s, c)
            return


def release(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """Step 6: waiting writers go on."""
    source = cells_of(c)[0]
    cell = s.cells[source]
    if cell.lock == c.attempt:
        s = with_cell(s, source, cell._replace(lock=0))
    to = "arm late" if "opens before it is armed" in model.broken and not c.back else "handed"
    yield go(s, c, "lets the waiting writers go", to)


@action("arm late")
def arm_late(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """Only in the variant that arms the destination after it was opened."""
    gate = s.cells[B].gate
    if gate:
        s = with_gate(s, B, gate._replace(armed=True))
    yield go(s, c, "arms B for the way back", "handed")


@action("handed")
def handed(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """The migration's facts say that the hand-over is complete."""
    if s.topology.in_flight:
        return
    if not holds_topology(model, s, c):
        yield stop(s, c, "a newer attempt has the lease")
        return
    done = c.back or model.last == "soaking"
    to, changes = ("", {}) if done else ("soak read", {"back": True})
    if c.goal == "back" and not c.back:
        to, changes = "serve again", {"back": True}
    paused = s.topology.paused and not c.back
    after = s._replace(topology=s.topology._replace(handed=True, paused=paused))
    yield go(after, c, "records the hand-over", to, **changes)


# ── soak, clean-up, abort ───────────────────────────────────────────────────────────────────────


@action("to retained at last")
def soak_ends(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """The soak step ends, after a reverse round."""
    yield from transition(model, s, c, "soaking", "retained", "")


def may_clean(s: State) -> bool:
    """`topology.why_not_clean`: the TTL has passed and nobody brings the organization back."""
    return (
        s.topology.state in {"retained", "cleaning", "rolled_back"}
        and s.topology.ttl_passed
        and not s.topology.later
    )


@action("to cleaning")
def to_cleaning(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """The clean-up step begins; the topology asks again whether it may."""
    if not may_clean(s):
        yield stop(s, c, "the copy must not be deleted")
        return
    yield from transition(model, s, c, "retained", "cleaning", "clean a")


def _clean(model: Model, s: State, c: Controller, key: int, to: str) -> Iterator[Step]:
    """One batch of `Cleaner`: the lease, the gate's row, then the rows."""
    which = B if c.back else A
    if not holds_cell(model, s, c, which):
        yield stop(s, c, "the lease is lost")
        return
    gate = s.cells[which].gate
    fits_gate = gate and gate.by == US and gate.state == "moved" and gate.epoch == 1 + c.back
    if gate is None:
        yield go(s, c, f"finds nothing to delete in {CELLS[which]}", "close capture")
    elif not fits_gate and "cleans without asking the gate" not in model.broken:
        yield stop(s, c, "the gate does not say that this copy is dead")
    else:
        yield go(
            _applied(s, which, ((key, None),)), c, f"deletes {KEYS[key]} in {CELLS[which]}", to
        )


@action("clean a")
def clean_a(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """The first batch."""
    yield from _clean(model, s, c, 0, "clean b")


@action("clean b")
def clean_b(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """The second batch."""
    yield from _clean(model, s, c, 1, "remove gate")


@action("remove gate")
def remove_gate(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """`gate.remove`: the gate goes last, and the lease with it."""
    which = B if c.back else A
    gate = s.cells[which].gate
    if gate and gate.by == US and gate.attempt <= c.attempt and gate.state != "frozen":
        s = with_gate(s, which, None, log=())
    yield go(s, c, f"removes the gate of {CELLS[which]}", "drop lease")


@action("drop lease")
def drop_lease(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """`PostgresMove._retire`: a transaction of its own, after the gate is gone."""
    which = B if c.back else A
    yield go(_without_lease(s, c, which), c, f"drops the lease in {CELLS[which]}", "close capture")


def _without_lease(s: State, c: Controller, which: int) -> State:
    cell = s.cells[which]
    if cell.lease <= c.attempt:
        s = with_cell(s, which, cell._replace(lease=0, copied=0))
    return s


@action("close capture")
def close_capture(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """Capture ends where the organization lives: its gate goes, if it is still ours and open."""
    which = A if c.back else B
    gate = s.cells[which].gate
    if gate and gate.by == US and gate.state == "open":
        s = with_gate(s, which, None, log=())
    s = _without_lease(s, c, which)
    to = "" if c.back else "to completed"
    yield go(s, c, f"ends capture in {CELLS[which]}", to)


@action("to completed")
def to_completed(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """The migration has ended."""
    yield from transition(model, s, c, "cleaning", "completed", "")


@action("to aborted")
def to_aborted(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """The abort step: the topology first."""
    if "aborts at the cells first" in model.broken:
        yield from _thaw(model, s, c, "aborted late")
    else:
        yield from transition(model, s, c, s.topology.state, "aborted", "abort thaw")


@action("aborted late")
def aborted_late(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """Only in the variant that goes to the cells first: then the topology."""
    if s.topology.epoch:
        yield stop(s, c, "the route is flipped")
    elif not s.topology.in_flight:
        s = s._replace(topology=s.topology._replace(attempt=c.attempt))
        yield from transition(model, s, c, s.topology.state, "aborted", "abort thaw")


@action("abort thaw")
def abort_thaw(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """The source serves again."""
    yield from _thaw(model, s, c, "abort disarm")


@action("abort disarm")
def abort_disarm(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """`close_capture`: the source's gate and log go."""
    gate = s.cells[A].gate
    if gate and gate.by == US and gate.attempt <= c.attempt and gate.state == "open":
        s = with_gate(s, A, None, log=())
    yield go(_without_lease(s, c, A), c, "ends capture in A", "abort clean")


@action("abort clean")
def abort_clean(model: Model, s: State, c: Controller) -> Iterator[Step]:
    """The destination's copy is deleted, and its gate goes."""
    cell = s.cells[B]
    if cell.gate is None:
        yield go(_without_lease(s, c, B), c, "finds nothing in B", "")
    elif not holds_cell(model, s, c, B):
        yield stop(s, c, "the lease is lost")
    elif cell.gate.by == US and cell.gate.state == "importing" and cell.gate.epoch == 0:
        after = with_rows(s, B, (None,) * len(KEYS))
        after = _without_lease(with_gate(after, B, None), c, B)
        yield go(after, c, "deletes B's copy and its gate", "")
    else:
        yield stop(s, c, f"B is {cell.gate.state}")


# ── who starts, what fails ──────────────────────────────────────────────────────────────────────


def start_steps(model: Model, s: State) -> Iterator[Step]:
    """A controller is started where none is, or, by mistake, where one still lives."""
    if s.topology.in_flight:
        return  # the lease is in the row that the flip in flight has locked
    current = [c for c in s.controllers if c.attempt == s.topology.attempt or c.at == "lease"]
    is_fault = bool(current)
    if is_fault and not (s.faults and "zombie" in model.failing):
        return
    for goal in model.goals:
        c = Controller(s.topology.attempt + 1, goal, "fence A")
        if begin(c, s, model) is None:
            continue
        if "aborts at the cells first" in model.broken and len(s.controllers) > 1:
            continue  # its attempt is not in the topology yet
        if goal == "clean" and (not may_clean(s) or any(o.at == "lease" for o in s.controllers)):
            continue
        after = s._replace(faults=s.faults - is_fault, controllers=(*s.controllers, c))
        if goal == "clean":
            waiting = c._replace(attempt=0, at="lease", back=s.topology.state == "rolled_back")
            yield Step(
                "a cleaner asks the topology whether it may",
                with_controller(after, c, waiting),
                hope=False,
            )
            continue
        for step in _leased(model, after, c):
            late = ", though the earlier one lives" if is_fault else ""
            yield step._replace(text=step.text + late, hope=not is_fault and goal != "clean")


def failures(model: Model, s: State) -> Iterator[Step]:
    """What may go wrong, as long as there are faults left."""
    if not s.faults:
        return
    fewer = s._replace(faults=s.faults - 1)
    for c in s.controllers:
        # A zombie that is killed is a zombie that never moves again.
        if "crash" in model.failing and c.attempt == s.topology.attempt:
            yield Step(say(c, "is killed"), with_controller(fewer, c, None), hope=False)
        barrier = {"lock", "freeze", "finish read", "finish apply", "flip", "open early"}
        if c.at in barrier and "error" in model.failing:
            yield go(fewer, c, "meets an error or its deadline", "undo")._replace(hope=False)
    topology = s.topology
    if topology.standby:
        lost = topology._replace(state=topology.standby, epoch=topology.epoch - 1, standby="")
        text = "the topology's standby is promoted, without the flip"
        yield Step(text, fewer._replace(topology=lost), hope=False)
    if "cell" in model.failing:
        for which in (A, B):
            after = crashed(fewer, which)
            if after.cells != s.cells or after.writers != s.writers:
                text = f"cell {CELLS[which]} crashes or its standby is promoted; it recovers"
                yield Step(text, after, hope=False)


def crashed(s: State, which: int) -> State:
    """Only what is durable is left: no locks, no transactions."""
    cell = s.cells[which]
    gate = cell.standby or cell.gate
    if gate and gate.awaits:
        gate = gate._replace(awaits=0)
    s = s._replace(
        writers=tuple(
            Writer(done=w.done, known=w.known) if w.phase != "idle" and w.cell == which else w
            for w in s.writers
        )
    )
    rows = cell.rows if cell.standby_rows is None else cell.standby_rows
    durable = cell._replace(lock=0, gate=gate, rows=rows, standby=None, standby_rows=None)
    return with_cell(s, which, durable)


def other_steps(model: Model, s: State) -> Iterator[Step]:
    """Time, replication, and a later migration back to A, which is honest and coarse."""
    topology = s.topology
    if topology.handed and not topology.ttl_passed and "clean" in model.goals:
        old = (topology.epoch + 1) % 2
        waits = "cleans before the TTL" not in model.broken
        if not waits or not any(w.phase != "idle" and w.cell == old for w in s.writers):
            known = topology.epoch if waits else 0
            yield Step(
                "the TTL passes: no route is older, no transaction is left at the old cell",
                s._replace(
                    topology=topology._replace(ttl_passed=True),
                    writers=tuple(w._replace(known=max(w.known, known)) for w in s.writers),
                ),
                hope=False,
            )
    for which in (A, B):
        if s.cells[which].standby or s.cells[which].standby_rows:
            level = s.cells[which]._replace(standby=None, standby_rows=None)
            text = f"the standby of {CELLS[which]} catches up"
            yield Step(text, with_cell(s, which, level), hope=False)
    if topology.standby:
        confirmed = topology._replace(standby="")
        yield Step("the topology's standby catches up", s._replace(topology=confirmed), hope=False)
    if model.returns:
        yield from _return_steps(s)


def _return_steps(s: State) -> Iterator[Step]:
    topology, (a, b) = s.topology, s.cells
    if topology.state not in {"retained", "cleaning", "completed"}:
        return
    # `plan` refuses a return while the retained copy is there.
    if topology.later == 0 and a.gate is None:
        yield Step(
            "a later migration back to A is planned",
            s._replace(topology=topology._replace(later=1)),
            hope=False,
        )
    elif topology.later == 1 and a.gate is None:
        gate = Gate("importing", False, True, LATER, 0, 1)
        yield Step("the return gates A: importing", with_gate(s, A, gate), hope=False)
    elif topology.later == 1 and not any(w.phase != "idle" for w in s.writers):
        gone = with_gate(s, B, Gate("moved", False, True, LATER, 0, 2), log=())
        back = with_gate(gone, A, Gate("open", True, True, LATER, 0, 2))
        back = with_rows(back, A, b.rows)
        yield Step(
            "the return copies, freezes, flips the route to A and opens it",
            back._replace(topology=topology._replace(epoch=2, later=2)),
            hope=False,
        )


def steps(model: Model, s: State) -> Iterator[Step]:
    """Everything that may happen next."""
    for number in range(len(s.writers)):
        yield from write_steps(model, s, number)
    for c in s.controllers:
        is_zombie = c.attempt != s.topology.attempt and c.at != "lease"
        for step in ACTIONS[c.at](model, s, c):
            yield step._replace(hope=False) if is_zombie else step
    yield from commits_in_flight(s)
    yield from start_steps(model, s)
    yield from other_steps(model, s)
    yield from failures(model, s)
