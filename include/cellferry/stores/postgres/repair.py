"""Compare everything and make good only what differs.

For a key log that was lost or given up, and for a server that lost commits with a failover: what
was copied before is nearly all right, and copying it again would need it to be deleted first. It
takes as long as a verification, and writes only what differs. The comparison is the verifier's, so
it shares nothing with the enumeration of the copier; what it finds is applied as a round would
apply it, each piece in a snapshot of the source of its own.

Capture is armed before the first comparison. A key that changes later is in the log of the very
snapshot in which it is seen to differ: it is left to the rounds.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial

import psycopg

from cellferry.model import Progress, Repaired
from cellferry.stores.postgres.apply import Applier
from cellferry.stores.postgres.schema import Placement, Table
from cellferry.stores.postgres.scope import Key, Scope
from cellferry.stores.postgres.transactions import snapshot
from cellferry.stores.postgres.verifier import Verifier

#: So many that a few rows that differ do not make all rows be compared one by one.
BUCKETS = 32_768

#: At most so many keys are applied in one transaction.
MAX_KEYS = 50_000


class Repairer:
    """Makes the destination's rows of one organization equal to the source's.

    Args:
        source: in autocommit mode; its key log is armed.
        destination: in autocommit mode with the replica role; closed to everybody else.
        verifier: of the same two connections, with `BUCKETS`.
        applier: of the same two connections; it holds the lease in each of its transactions.
        before_commit: more to check in each transaction at the destination.
    """

    def __init__(
        self,
        source: psycopg.Connection[tuple[object, ...]],
        destination: psycopg.Connection[tuple[object, ...]],
        scope: Scope,
        verifier: Verifier,
        applier: Applier,
        progress: Progress,
        *,
        before_commit: Callable[[], None] | None = None,
    ) -> None:
        self._source = source
        self._destination = destination
        self._scope = scope
        self._verifier = verifier
        self._applier = applier
        self._progress = progress
        self._before_commit = before_commit
        self._repaired = 0

    def run(self) -> Repaired:
        """Repair every table, parents first. Repeatable; a killed one begins anew.

        Raises:
            LeaseLost: another attempt took over.
            VerificationFailed: rows differ although they were applied.
            PermanentError: another organization's row stands in the way.
        """
        started = time.monotonic()
        self._repaired = 0
        compared = 0
        self._applier.unsettle()
        for table in self._scope.tables:
            self._progress.check()
            rows, pieces = self._verifier.suspects(table)
            compared += rows
            for buckets in pieces:
                self._repair(table, partial(self._verifier.differing, table, buckets))
            self._report(compared, table)
        # When all rows are there: those of which only other rows tell that they are wrong.
        for table in (*self._scope.tables, *self._scope.data_map.referenced):
            self._repair(table, partial(self._verifier.astray, table))
            self._report(compared, table)
        return Repaired(compared, self._repaired, time.monotonic() - started)

    def _repair(self, table: Table, find: Callable[[], set[Key]]) -> None:
        """Apply the keys that `find` returns, as of the snapshot of the source it saw.

        Shared rows are read anew when they are locked: other moves may write them, too.
        """
        self._progress.check()
        with snapshot(self._source):
            with snapshot(self._destination):
                keys = find()
            if table.placement is Placement.OWNED:
                for some in _pieces(keys):
                    self._progress.check()
                    # Not complete: what these keys depend on may differ as well and come later.
                    applied = self._applier.apply(
                        {str(table.name): some}, complete=False, before_commit=self._before_commit
                    )
                    self._repaired += max(applied.keys, len(some))
        for some in _pieces(keys):
            self._progress.check()
            if table.placement is not Placement.OWNED:
                self._applier.follow(self._applier.may_follow({str(table.name): some}))
                self._repaired += len(some)
            elif self._before_commit is None:
                self._applier.take_over({str(table.name): some})

    def _report(self, compared: int, table: Table) -> None:
        self._progress.report(
            "postgres", "repair", compared, None, "rows", f"{table.name}: {self._repaired} repaired"
        )


def _pieces(keys: set[Key]) -> Iterator[set[Key]]:
    iterator = iter(sorted(keys))
    while some := set(itertools.islice(iterator, MAX_KEYS)):
        yield some
