-- A to B, B to A, A to C: the copy in A belongs to the last of these, not to the first. So every
-- later return counts, not only the latest migration.

-- Why the source's copy must not be deleted now; NULL when it may (hazard 4). A return to this very
-- cell is in its way, under way or done; the gate there is asked again for each batch.
CREATE OR REPLACE FUNCTION topology.why_not_clean(migration_id bigint) RETURNS text
LANGUAGE sql STABLE SET search_path = topology, pg_temp AS $$
    SELECT CASE
        WHEN m.state NOT IN ('retained', 'cleaning') THEN
            format('it is %s, not retained', m.state)
        WHEN s.id IS NOT NULL THEN
            format('migration %s (%s -> %s) took its retention over', s.id, s.source, s.destination)
        WHEN r.cell = m.source OR r.epoch <= m.epoch
            OR (r.epoch = m.epoch + 1 AND r.cell <> m.destination) THEN
            format('the route has changed since: %s at epoch %s', r.cell, r.epoch)
        WHEN m.ttl_until > clock_timestamp() THEN
            format('its retention lasts until %s UTC',
                   to_char(m.ttl_until AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS'))
    END
    FROM migration AS m
    JOIN route AS r ON r.organization = m.organization
    LEFT JOIN LATERAL (
        SELECT later.id, later.source, later.destination
        FROM migration AS later
        WHERE later.organization = m.organization AND later.id > m.id
            AND later.destination = m.source
            -- One that gave up is in the way until it has taken everything out again.
            AND (later.state <> 'aborted' OR EXISTS (
                SELECT FROM resource
                WHERE resource.migration = later.id AND forgotten_at IS NULL))
        ORDER BY later.id LIMIT 1
    ) AS s ON true
    WHERE m.id = migration_id
$$;
