-- A roll-back is a cutover in the other direction, with a state of its own from its first freeze to
-- its flip, as `cutting_over` is for the way out: so that a controller that dies in it is noticed.
INSERT INTO topology.allowed_transition VALUES
    ('soaking', 'rolling_back'), ('retained', 'rolling_back'),
    ('rolling_back', 'rolled_back'), ('rolling_back', 'retained');
DELETE FROM topology.allowed_transition
WHERE (from_state, to_state) IN (('soaking', 'rolled_back'), ('retained', 'rolled_back'));

-- Invariant 4: one live migration for each organization. `retained` is not live.
DROP INDEX topology.migration_one_live;
CREATE UNIQUE INDEX migration_one_live ON topology.migration (organization)
    WHERE state IN ('planned', 'copying', 'syncing', 'ready', 'cutting_over', 'soaking',
                    'rolling_back');

-- Why a migration cannot be rolled back; NULL when it can.
CREATE FUNCTION topology.why_not_roll_back(migration_id bigint) RETURNS text
LANGUAGE sql STABLE SET search_path = topology, pg_temp AS $$
    SELECT CASE
        WHEN m.state NOT IN ('soaking', 'retained', 'rolling_back') THEN
            format('it is %s', m.state)
        WHEN (r.cell, r.epoch) IS DISTINCT FROM (m.destination, m.epoch + 1) THEN
            format('the route has changed since: %s at epoch %s', r.cell, r.epoch)
        WHEN s.id IS NOT NULL THEN
            format('migration %s (%s -> %s, %s) has taken over', s.id, s.source, s.destination, s.state)
    END
    FROM migration AS m
    JOIN route AS r ON r.organization = m.organization
    LEFT JOIN LATERAL (
        SELECT later.id, later.source, later.destination, later.state
        FROM migration AS later
        WHERE later.organization = m.organization AND later.id > m.id
            -- One that gave up is in the way until it has taken everything out again: it armed the
            -- gate and the log that the way back needs.
            AND (later.state <> 'aborted' OR EXISTS (
                SELECT FROM resource
                WHERE resource.migration = later.id AND forgotten_at IS NULL))
        ORDER BY later.id LIMIT 1
    ) AS s ON true
    WHERE m.id = migration_id
$$;

-- Why the copy that a migration leaves behind must not be deleted now; NULL when it may (hazard 4):
-- the source's after a cutover, the destination's after a roll-back. A return to that very cell is
-- in its way, under way or done; the gate there is asked again for each batch.
CREATE OR REPLACE FUNCTION topology.why_not_clean(migration_id bigint) RETURNS text
LANGUAGE sql STABLE SET search_path = topology, pg_temp AS $$
    SELECT CASE
        WHEN m.state NOT IN ('retained', 'cleaning', 'rolled_back') THEN
            format('it is %s, not retained', m.state)
        WHEN s.id IS NOT NULL THEN
            format('migration %s (%s -> %s) took its retention over', s.id, s.source, s.destination)
        WHEN r.cell = m.left_cell OR r.epoch < m.left_at
            OR (r.epoch = m.left_at AND r.cell <> m.went_to) THEN
            format('the route has changed since: %s at epoch %s', r.cell, r.epoch)
        WHEN m.ttl_until > clock_timestamp() THEN
            format('its retention lasts until %s UTC',
                   to_char(m.ttl_until AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS'))
    END
    FROM (
        SELECT migration.*,
               CASE state WHEN 'rolled_back' THEN destination ELSE source END AS left_cell,
               CASE state WHEN 'rolled_back' THEN source ELSE destination END AS went_to,
               epoch + CASE state WHEN 'rolled_back' THEN 2 ELSE 1 END AS left_at
        FROM migration
    ) AS m
    JOIN route AS r ON r.organization = m.organization
    LEFT JOIN LATERAL (
        SELECT later.id, later.source, later.destination
        FROM migration AS later
        WHERE later.organization = m.organization AND later.id > m.id
            AND later.destination = m.left_cell
            -- One that gave up is in the way until it has taken everything out again.
            AND (later.state <> 'aborted' OR EXISTS (
                SELECT FROM resource
                WHERE resource.migration = later.id AND forgotten_at IS NULL))
        ORDER BY later.id LIMIT 1
    ) AS s ON true
    WHERE m.id = migration_id
$$;

-- Invariants 3, 5 and 6 at commit: a state change has its audit row in the same transaction, and
-- the state says the same as the route.
CREATE OR REPLACE FUNCTION topology.confirm_state() RETURNS trigger
LANGUAGE plpgsql SET search_path = topology, pg_temp AS $$
DECLARE
    authority record;
    refusal text;
BEGIN
    IF NOT EXISTS (
        SELECT FROM audit AS a
        WHERE a.migration = NEW.id AND a.to_state = NEW.state
            AND a.transaction = pg_current_xact_id()
    ) THEN
        RAISE EXCEPTION 'migration % became % without an audit row', NEW.id, NEW.state
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    SELECT r.cell, r.epoch INTO authority FROM route AS r WHERE r.organization = NEW.organization;
    IF (NEW.state IN ('planned', 'copying', 'syncing', 'ready', 'cutting_over')
            AND (authority.cell, authority.epoch) IS DISTINCT FROM (NEW.source, NEW.epoch))
        OR (NEW.state IN ('soaking', 'rolling_back')
            AND (authority.cell, authority.epoch) IS DISTINCT FROM (NEW.destination, NEW.epoch + 1))
        OR (NEW.state = 'rolled_back'
            AND (authority.cell, authority.epoch) IS DISTINCT FROM (NEW.source, NEW.epoch + 2))
    THEN
        RAISE EXCEPTION 'migration % cannot be % while the route is % at epoch %',
            NEW.id, NEW.state, authority.cell, authority.epoch
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    refusal := CASE NEW.state
        WHEN 'cleaning' THEN why_not_clean(NEW.id)
        WHEN 'rolling_back' THEN why_not_roll_back(NEW.id)
    END;
    IF refusal IS NOT NULL THEN
        RAISE EXCEPTION 'migration % must not be %: %', NEW.id, NEW.state, refusal
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END
$$;
