-- What the latency-driven throttle asks, beside gate.sql.

-- Written and committed by movers' probes, and by nobody else: how long that takes is how the cell
-- does. Each mover begins at a row of its own, so that probes seldom wait for each other.
CREATE TABLE IF NOT EXISTS cellferry.probe (
    slot int PRIMARY KEY,
    probed_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 10, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0);
INSERT INTO cellferry.probe (slot) SELECT generate_series(0, 63) ON CONFLICT DO NOTHING;

-- What the server says of its load; ordinary roles do not see the sessions of others.
CREATE OR REPLACE FUNCTION cellferry.load()
RETURNS TABLE (lag_s double precision, log_bytes bigint, active int)
LANGUAGE sql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT (SELECT max(extract(epoch FROM COALESCE(r.replay_lag, '0'::interval)))
            FROM pg_stat_replication AS r
            LEFT JOIN pg_replication_slots AS s ON s.active_pid = r.pid
            WHERE COALESCE(s.slot_type, 'physical') = 'physical' AND r.state = 'streaming'),
           pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint,
           (SELECT count(*)::int FROM pg_stat_activity AS a
            WHERE a.datname = current_database() AND a.state = 'active'
                AND a.application_name NOT LIKE 'cellferry:%')
$$;

REVOKE ALL ON FUNCTION cellferry.load() FROM PUBLIC;
