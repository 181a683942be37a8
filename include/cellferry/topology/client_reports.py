"""What applications reported of their operations, summed for one organization in one cell."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import psycopg

from cellferry.client_figures import Figures
from cellferry.topology.connection import Database

_SUM = """
WITH chosen AS MATERIALIZED (
    SELECT * FROM topology.client_report
    WHERE organization = %(organization)s AND cell = %(cell)s AND epoch = %(epoch)s
      AND (%(since)s::timestamptz IS NULL OR began_at >= %(since)s)
      AND (%(within_s)s::float8 IS NULL
           OR reported_at > clock_timestamp() - make_interval(secs => %(within_s)s))
)
SELECT count(*),
       coalesce(sum(operations), 0)::bigint, coalesce(sum(failures), 0)::bigint,
       coalesce(sum(conflicts), 0)::bigint, coalesce(sum(moved), 0)::bigint,
       coalesce(sum(being_moved), 0)::bigint, coalesce(sum(seconds), 0),
       coalesce(max(longest_s), 0),
       (SELECT coalesce(array_agg(counted ORDER BY bucket), '{}') FROM (
            SELECT bucket, sum(latency)::bigint AS counted
            FROM chosen, unnest(latencies) WITH ORDINALITY AS one (latency, bucket)
            GROUP BY bucket) AS buckets)
FROM chosen
"""
_COLUMNS = (
    *("operations", "failures", "conflicts", "moved", "being_moved", "seconds", "longest_s"),
    "latencies",
)
# The flip's time and the reports' are on the same clock, the topology's.
_STILL_REFUSED = """
SELECT coalesce(sum(report.moved), 0)::bigint
FROM topology.client_report AS report
JOIN topology.route_history AS flip
    ON flip.organization = report.organization AND flip.epoch = %(epoch)s + 1
WHERE report.organization = %(organization)s AND report.cell = %(cell)s
  AND report.epoch = %(epoch)s
  AND report.began_at > flip.changed_at + make_interval(secs => %(after_s)s)
  AND report.reported_at > clock_timestamp() - make_interval(secs => %(within_s)s)
  AND (%(since)s::timestamptz IS NULL OR report.began_at >= %(since)s)
"""


class ClientReports:
    """The part of the topology that knows what applications saw. Nothing here is sure to exist."""

    _database: Database

    def client_figures(
        self,
        organization_id: str,
        cell: str,
        epoch: int,
        *,
        within_s: float | None = None,
        since: datetime | None = None,
    ) -> Figures | None:
        """Return what was reported of an organization in a cell under an epoch; None if nothing.

        Args:
            within_s: only what was reported in the last so many seconds.
            since: only what happened wholly after this moment, on the topology's clock.
        """
        asked = {
            "organization": organization_id,
            "cell": cell,
            "epoch": epoch,
            "within_s": within_s,
            "since": since,
        }

        def work(connection: psycopg.Connection[Any]) -> Figures | None:
            row = connection.execute(_SUM, asked).fetchone()
            if row is None or not row[0]:
                return None
            values = zip(_COLUMNS, row[1:], strict=True)
            return Figures.from_dict(dict(values))

        return self._database.run(work)

    def late_refusals(
        self,
        organization_id: str,
        cell: str,
        epoch: int,
        *,
        after_s: float,
        within_s: float,
        since: datetime | None = None,
    ) -> int:
        """Count tries that a left cell's gate turned away although every route should be newer.

        Args:
            cell: where the organization lived until `epoch` ended.
            after_s: seconds after the end of `epoch` in which an old route is no surprise.
            within_s: only what was reported in the last so many seconds.
            since: only what happened wholly after this moment, on the topology's clock.
        """
        values = {
            "organization": organization_id,
            "cell": cell,
            "epoch": epoch,
            "after_s": after_s,
            "within_s": within_s,
            "since": since,
        }

        def work(connection: psycopg.Connection[Any]) -> int:
            row = connection.execute(_STILL_REFUSED, values).fetchone()
            return int(row[0]) if row else 0

        return self._database.run(work)
