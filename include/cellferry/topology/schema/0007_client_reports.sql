-- What applications say of their operations: counts for each organization and cell. Soak compares
-- those after a cutover with those before. Losing them is harmless, so they are not logged, and
-- what is older than an hour goes away with the next report.

CREATE UNLOGGED TABLE topology.client_report (
    organization  text NOT NULL,
    cell          text NOT NULL,
    epoch         bigint NOT NULL,          -- of the route that the client had
    client        text NOT NULL,
    began_at      timestamptz NOT NULL,     -- on this server's clock, from the window's length
    reported_at   timestamptz NOT NULL,
    operations    bigint NOT NULL,
    failures      bigint NOT NULL,
    conflicts     bigint NOT NULL,
    moved         bigint NOT NULL,
    being_moved   bigint NOT NULL,
    seconds       double precision NOT NULL,
    longest_s     double precision NOT NULL,
    latencies     bigint[] NOT NULL         -- see cellferry.client_figures
);
CREATE INDEX client_report_by_organization
    ON topology.client_report (organization, cell, epoch, reported_at);
CREATE INDEX client_report_by_age ON topology.client_report (reported_at);

-- All that an application's role needs: it adds its own reports, and neither reads nor changes
-- anybody's. GRANT EXECUTE ON FUNCTION topology.take_client_report(text, double precision, jsonb).
CREATE FUNCTION topology.take_client_report(
    client text, window_s double precision, reports jsonb
) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = topology, pg_temp AS $$
    -- Several clients prune at once: none waits for another.
    DELETE FROM client_report WHERE ctid = ANY (ARRAY(
        SELECT old.ctid FROM client_report AS old
        WHERE old.reported_at < clock_timestamp() - interval '1 hour'
        LIMIT 10000 FOR UPDATE SKIP LOCKED));
    INSERT INTO client_report
    SELECT one.organization, one.cell, one.epoch, left(client, 200),
           clock_timestamp() - make_interval(secs => least(greatest(window_s, 0), 3600)),
           clock_timestamp(),
           one.operations, one.failures, one.conflicts, one.moved, one.being_moved,
           one.seconds, one.longest_s, one.latencies
    FROM jsonb_to_recordset(reports) AS one(
        organization text, cell text, epoch bigint, operations bigint, failures bigint,
        conflicts bigint, moved bigint, being_moved bigint, seconds double precision,
        longest_s double precision, latencies bigint[]);
$$;
REVOKE ALL ON FUNCTION topology.take_client_report(text, double precision, jsonb) FROM PUBLIC;
