-- The topology: the one record of truth of who lives where and what is moving.
-- What the invariants promise is enforced here too, so that no client can break them.

CREATE TABLE topology.cell (
    name          text PRIMARY KEY CHECK (name <> ''),
    region        text NOT NULL,
    legacy        boolean NOT NULL DEFAULT false,
    cordoned      text,                       -- why no organization may be placed here
    halted        text,                       -- why no step may run on it; a person clears it
    registered_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE topology.organization (
    id            text PRIMARY KEY CHECK (id <> ''),
    slug          text NOT NULL UNIQUE CHECK (slug <> ''),
    registered_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE topology.migration (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    organization  text NOT NULL REFERENCES topology.organization,
    source        text NOT NULL REFERENCES topology.cell,
    destination   text NOT NULL REFERENCES topology.cell,
    state         text NOT NULL DEFAULT 'planned',
    epoch         bigint NOT NULL,            -- of the source's authority
    strategy      text NOT NULL CHECK (strategy IN ('online', 'freeze-first')),
    attempt       integer NOT NULL DEFAULT 0, -- the lease: the newest controller's number
    holder        text,
    taken_at      timestamptz,
    heartbeat_at  timestamptz,
    paused        boolean NOT NULL DEFAULT false,
    paused_reason text,
    paused_by     text,
    halted        text,
    halted_by     text,
    last_error    text,
    ttl_until     timestamptz,
    superseded_by bigint REFERENCES topology.migration,
    options       jsonb NOT NULL DEFAULT '{}',
    facts         jsonb NOT NULL DEFAULT '{}',
    created_at    timestamptz NOT NULL DEFAULT now(),
    updated_at    timestamptz NOT NULL DEFAULT now(),
    CHECK (source <> destination),
    CHECK (state NOT IN ('soaking', 'retained', 'cleaning') OR ttl_until IS NOT NULL)
);

-- Invariant 4: one live migration for each organization. `retained` is not live.
CREATE UNIQUE INDEX migration_one_live ON topology.migration (organization)
    WHERE state IN ('planned', 'copying', 'syncing', 'ready', 'cutting_over', 'soaking');
CREATE INDEX migration_by_organization ON topology.migration (organization, id);
CREATE INDEX migration_by_state ON topology.migration (state);

CREATE TABLE topology.route (
    organization  text PRIMARY KEY REFERENCES topology.organization,
    cell          text NOT NULL REFERENCES topology.cell,
    epoch         bigint NOT NULL CHECK (epoch >= 1),
    migration     bigint REFERENCES topology.migration,  -- what made this change; NULL: a person
    actor         text NOT NULL,
    changed_at    timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX route_by_cell ON topology.route (cell);
CREATE INDEX route_by_change ON topology.route (changed_at);  -- what clients may have missed

CREATE TABLE topology.route_history (
    organization  text NOT NULL,
    epoch         bigint NOT NULL,
    cell          text NOT NULL,
    migration     bigint,
    actor         text NOT NULL,
    changed_at    timestamptz NOT NULL,
    PRIMARY KEY (organization, epoch)
);

CREATE TABLE topology.audit (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at            timestamptz NOT NULL DEFAULT clock_timestamp(),
    action        text NOT NULL,
    migration     bigint REFERENCES topology.migration,
    organization  text,
    actor         text NOT NULL,
    role          text NOT NULL,
    from_state    text,
    to_state      text,
    epoch         bigint,
    attempt       integer,
    reason        text,
    evidence      jsonb NOT NULL DEFAULT '{}',
    dag_run       text,
    try_number    integer,
    request       uuid,    -- tells a writer whether a commit whose answer was lost happened
    transaction   xid8 NOT NULL DEFAULT pg_current_xact_id()
);
CREATE INDEX audit_by_migration ON topology.audit (migration, id);
CREATE INDEX audit_by_organization ON topology.audit (organization, id);
CREATE UNIQUE INDEX audit_by_request ON topology.audit (request) WHERE request IS NOT NULL;

CREATE TABLE topology.resource (
    migration     bigint NOT NULL REFERENCES topology.migration,
    cell          text NOT NULL,
    store         text NOT NULL,
    kind          text NOT NULL,
    name          text NOT NULL,
    intended_at   timestamptz NOT NULL DEFAULT now(),
    forgotten_at  timestamptz,
    PRIMARY KEY (migration, cell, store, kind, name)
);
CREATE INDEX resource_live ON topology.resource (cell, migration) WHERE forgotten_at IS NULL;

CREATE TABLE topology.progress (
    migration     bigint NOT NULL REFERENCES topology.migration,
    store         text NOT NULL,
    phase         text NOT NULL,
    done          bigint NOT NULL,
    total         bigint,
    unit          text NOT NULL,
    note          text NOT NULL DEFAULT '',
    rate          double precision,           -- units per second, smoothed
    started_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (migration, store, phase)
) WITH (fillfactor = 50);

-- The state machine. A copy of cellferry.model.TRANSITIONS; a test keeps them equal.
CREATE TABLE topology.allowed_transition (
    from_state text NOT NULL,
    to_state   text NOT NULL,
    PRIMARY KEY (from_state, to_state)
);
INSERT INTO topology.allowed_transition VALUES
    ('planned', 'copying'), ('planned', 'aborted'),
    ('copying', 'syncing'), ('copying', 'aborted'),
    ('syncing', 'ready'), ('syncing', 'aborted'),
    ('ready', 'cutting_over'), ('ready', 'syncing'), ('ready', 'aborted'),
    ('cutting_over', 'soaking'), ('cutting_over', 'ready'), ('cutting_over', 'aborted'),
    ('soaking', 'retained'), ('soaking', 'rolled_back'),
    ('retained', 'cleaning'), ('retained', 'rolled_back'),
    ('cleaning', 'completed');

-- Why the source's copy must not be deleted now; NULL when it may (hazard 4).
CREATE FUNCTION topology.why_not_clean(migration_id bigint) RETURNS text
LANGUAGE sql STABLE SET search_path = topology, pg_temp AS $$
    SELECT CASE
        WHEN m.state NOT IN ('retained', 'cleaning') THEN
            format('it is %s, not retained', m.state)
        WHEN s.id IS NOT NULL THEN
            format('migration %s (%s -> %s) took its retention over', s.id, s.source, s.destination)
        WHEN r.cell <> m.destination OR r.epoch <> m.epoch + 1 THEN
            format('the route has changed since: %s at epoch %s', r.cell, r.epoch)
        WHEN m.ttl_until > clock_timestamp() THEN
            format('its retention lasts until %s UTC',
                   to_char(m.ttl_until AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS'))
    END
    FROM migration AS m
    JOIN route AS r ON r.organization = m.organization
    -- An aborted successor gives the retention back, unless it was about to use this very copy.
    LEFT JOIN migration AS s ON s.id = m.superseded_by
        AND (s.state <> 'aborted' OR s.destination = m.source)
    WHERE m.id = migration_id
$$;

CREATE FUNCTION topology.guard_migration() RETURNS trigger
LANGUAGE plpgsql SET search_path = topology, pg_temp AS $$
BEGIN
    IF (NEW.id, NEW.organization, NEW.source, NEW.destination, NEW.epoch)
        IS DISTINCT FROM (OLD.id, OLD.organization, OLD.source, OLD.destination, OLD.epoch) THEN
        RAISE EXCEPTION 'what migration % moves, from where and to where never changes', OLD.id
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    IF NEW.attempt < OLD.attempt THEN
        RAISE EXCEPTION 'attempts of migration % only rise', OLD.id
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    IF NEW.state <> OLD.state AND NOT EXISTS (
        SELECT FROM allowed_transition WHERE (from_state, to_state) = (OLD.state, NEW.state)
    ) THEN
        RAISE EXCEPTION 'migration % cannot go from % to %', OLD.id, OLD.state, NEW.state
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER guard_migration BEFORE UPDATE ON topology.migration
    FOR EACH ROW EXECUTE FUNCTION topology.guard_migration();

-- Invariants 3, 5 and 6 at commit: a state change has its audit row in the same transaction, and
-- the state says the same as the route.
CREATE FUNCTION topology.confirm_state() RETURNS trigger
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
        OR (NEW.state = 'soaking'
            AND (authority.cell, authority.epoch) IS DISTINCT FROM (NEW.destination, NEW.epoch + 1))
        OR (NEW.state = 'rolled_back'
            AND (authority.cell, authority.epoch) IS DISTINCT FROM (NEW.source, NEW.epoch + 2))
    THEN
        RAISE EXCEPTION 'migration % cannot be % while the route is % at epoch %',
            NEW.id, NEW.state, authority.cell, authority.epoch
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    IF NEW.state = 'cleaning' THEN
        refusal := why_not_clean(NEW.id);
        IF refusal IS NOT NULL THEN
            RAISE EXCEPTION 'migration % must not be cleaned: %', NEW.id, refusal
                USING ERRCODE = 'integrity_constraint_violation';
        END IF;
    END IF;
    RETURN NULL;
END
$$;
CREATE CONSTRAINT TRIGGER confirm_state AFTER UPDATE ON topology.migration
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (OLD.state IS DISTINCT FROM NEW.state)
    EXECUTE FUNCTION topology.confirm_state();
CREATE CONSTRAINT TRIGGER confirm_creation AFTER INSERT ON topology.migration
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
    EXECUTE FUNCTION topology.confirm_state();

-- Invariant 2: epochs only rise, once for each change of authority.
CREATE FUNCTION topology.guard_route() RETURNS trigger
LANGUAGE plpgsql SET search_path = topology, pg_temp AS $$
BEGIN
    IF TG_OP IN ('DELETE', 'TRUNCATE') THEN
        RAISE EXCEPTION 'a route is never deleted: its epoch would start again'
            USING ERRCODE = 'integrity_constraint_violation';
    ELSIF TG_OP = 'INSERT' THEN
        -- With a route there the primary key decides (INSERT … ON CONFLICT comes here as well).
        IF NOT EXISTS (SELECT FROM route AS r WHERE r.organization = NEW.organization)
            AND EXISTS (SELECT FROM route_history AS h
                        WHERE h.organization = NEW.organization AND h.epoch >= NEW.epoch) THEN
            RAISE EXCEPTION 'organization % has had epoch % before', NEW.organization, NEW.epoch
                USING ERRCODE = 'integrity_constraint_violation';
        END IF;
    ELSIF NEW.organization <> OLD.organization OR NEW.epoch <> OLD.epoch + 1 THEN
        RAISE EXCEPTION 'the epoch of organization % rises by one at each change, not from % to %',
            OLD.organization, OLD.epoch, NEW.epoch
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER guard_route BEFORE INSERT OR UPDATE OR DELETE ON topology.route
    FOR EACH ROW EXECUTE FUNCTION topology.guard_route();
CREATE TRIGGER guard_route_truncate BEFORE TRUNCATE ON topology.route
    FOR EACH STATEMENT EXECUTE FUNCTION topology.guard_route();

CREATE FUNCTION topology.publish_route() RETURNS trigger
LANGUAGE plpgsql SET search_path = topology, pg_temp AS $$
BEGIN
    INSERT INTO route_history (organization, epoch, cell, migration, actor, changed_at)
    VALUES (NEW.organization, NEW.epoch, NEW.cell, NEW.migration, NEW.actor, NEW.changed_at);
    PERFORM pg_notify('cellferry_route', json_build_object(
        'organization', NEW.organization, 'cell', NEW.cell, 'epoch', NEW.epoch)::text);
    RETURN NULL;
END
$$;
CREATE TRIGGER publish_route AFTER INSERT OR UPDATE ON topology.route
    FOR EACH ROW EXECUTE FUNCTION topology.publish_route();

-- What happened cannot be made to have happened otherwise.
CREATE FUNCTION topology.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'rows of topology.% are never changed or deleted', TG_TABLE_NAME
        USING ERRCODE = 'integrity_constraint_violation';
END
$$;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON topology.audit
    FOR EACH STATEMENT EXECUTE FUNCTION topology.refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON topology.route_history
    FOR EACH STATEMENT EXECUTE FUNCTION topology.refuse_change();
