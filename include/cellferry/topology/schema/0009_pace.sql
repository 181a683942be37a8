-- Who works at which cell's store now, and at what pace: movers share a cell's budget. Written a
-- few times a second by each of them. Losing it is harmless (each tells again), so it is not
-- logged. A row counts until `live_until`, and only for the attempt that holds the lease.

CREATE UNLOGGED TABLE topology.pace (
    cell          text NOT NULL,
    store         text NOT NULL,
    migration     bigint NOT NULL,
    attempt       integer NOT NULL,
    step          text NOT NULL,
    share         double precision NOT NULL,  -- of its time that this mover may work, as this cell
                                              -- sees it; the lower one of its two cells counts
    target_s      double precision,           -- what the probes' p95 is kept under
    p95_s         double precision,
    idle_s        double precision,           -- p95 while no mover worked there
    idle_at       timestamptz,                -- when that was measured
    lag_s         double precision,           -- of the standby that is furthest behind
    log_bytes_s   double precision,           -- growth of the server's log of changes
    active        integer,                    -- sessions at work there, movers not counted
    note          text NOT NULL DEFAULT '',   -- the last decision
    decided_at    timestamptz,
    told_at       timestamptz NOT NULL,
    live_until    timestamptz NOT NULL,
    PRIMARY KEY (cell, store, migration)
);
