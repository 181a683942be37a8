-- Sets of shards, their re-shardings, and the clients that follow them.
--
-- A set has an epoch, which rises with each change that clients must know of: that a re-sharding
-- begins, goes one state on or back, ends. What makes a re-sharding right is enforced here as well:
-- no state before every client has acknowledged the one before it.

CREATE TABLE topology.shard_set (
    name          text PRIMARY KEY CHECK (name <> ''),
    epoch         bigint NOT NULL DEFAULT 1 CHECK (epoch >= 1),
    document      jsonb NOT NULL,             -- cellferry.shards.settings.ShardSet; no secrets
    registered_at timestamptz NOT NULL DEFAULT now(),
    changed_at    timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE topology.resharding (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    shard_set     text NOT NULL REFERENCES topology.shard_set,
    old           jsonb NOT NULL,
    new           jsonb NOT NULL,
    state         text NOT NULL DEFAULT 'old',
    authority     text NOT NULL DEFAULT 'old' CHECK (authority IN ('old', 'new')),
                                              -- whose values count; switching: until now
    epoch         bigint NOT NULL,            -- the set's, since the last change
    attempt       integer NOT NULL DEFAULT 0, -- the lease: the newest controller's number
    holder        text,
    step          text,
    shared        boolean NOT NULL DEFAULT false,  -- whether parts of the step work side by side
    taken_at      timestamptz,
    plan          jsonb NOT NULL DEFAULT '{}',
    facts         jsonb NOT NULL DEFAULT '{}',
    ttl_s         double precision NOT NULL CHECK (ttl_s >= 0),
    ttl_until     timestamptz,                -- from the last time that it became new
    begun_at      timestamptz NOT NULL DEFAULT now(),
    outcome       text CHECK (outcome IN ('completed', 'aborted', 'rolled_back')),
    ended_at      timestamptz,
    CHECK ((outcome IS NULL) = (ended_at IS NULL)),
    CHECK (outcome IS NULL OR state = CASE outcome WHEN 'completed' THEN 'new' ELSE 'old' END),
    CHECK (state <> 'new' OR ttl_until IS NOT NULL),
    CHECK (authority = CASE WHEN state IN ('old', 'dual_write_read_old') THEN 'old'
                            WHEN state IN ('dual_write_read_new', 'new') THEN 'new'
                            ELSE authority END)
);
CREATE UNIQUE INDEX resharding_one_live ON topology.resharding (shard_set) WHERE outcome IS NULL;

-- What several do side by side under one attempt: copies, one for each source shard.
CREATE TABLE topology.resharding_part (
    resharding    bigint NOT NULL REFERENCES topology.resharding,
    part          text NOT NULL,
    number        integer NOT NULL,           -- the newest worker's; only rises
    holder        text NOT NULL,
    taken_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (resharding, part)
);

CREATE TABLE topology.resharding_checkpoint (
    resharding    bigint NOT NULL REFERENCES topology.resharding,
    source        text NOT NULL,
    destination   text NOT NULL,
    document      jsonb NOT NULL,
    saved_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (resharding, source, destination)
) WITH (fillfactor = 50);

-- One row for each client that may act. A client that begins anew has a new session, so that what
-- it had begun before is never taken for confirmed. A row goes when its client leaves, or when a
-- controller has waited for its lease in vain; such a client must register again.
CREATE TABLE topology.shard_client (
    session       uuid PRIMARY KEY,
    shard_set     text NOT NULL REFERENCES topology.shard_set,
    name          text NOT NULL,
    lease_s       double precision NOT NULL CHECK (lease_s BETWEEN 0.1 AND 3600),
    acknowledged  bigint NOT NULL,
    beat          bigint NOT NULL DEFAULT 1,
    registered_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen_at       timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 50);
CREATE INDEX shard_client_by_set ON topology.shard_client (shard_set, acknowledged);

-- What clients saw. Losing it is harmless.
CREATE UNLOGGED TABLE topology.shard_report (
    shard_set     text NOT NULL,
    client        text NOT NULL,
    epoch         bigint NOT NULL,            -- under which the client acted at the window's end
    began_at      timestamptz NOT NULL,
    reported_at   timestamptz NOT NULL,
    figures       jsonb NOT NULL
);
CREATE INDEX shard_report_by_set ON topology.shard_report (shard_set, reported_at);

ALTER TABLE topology.audit ADD COLUMN shard_set text, ADD COLUMN resharding bigint;
CREATE INDEX audit_by_shard_set ON topology.audit (shard_set, id) WHERE shard_set IS NOT NULL;

CREATE FUNCTION topology.guard_shard_set() RETURNS trigger
LANGUAGE plpgsql SET search_path = topology, pg_temp AS $$
BEGIN
    IF TG_OP IN ('DELETE', 'TRUNCATE') THEN
        RAISE EXCEPTION 'a shard set is never deleted: its epoch would start again'
            USING ERRCODE = 'integrity_constraint_violation';
    ELSIF NEW.name <> OLD.name OR NEW.epoch <> OLD.epoch + 1 THEN
        RAISE EXCEPTION 'the epoch of shard set % rises by one at each change', OLD.name
            USING ERRCODE = 'integrity_constraint_violation';
    ELSIF EXISTS (SELECT FROM shard_client AS c
                  WHERE c.shard_set = NEW.name AND c.acknowledged < OLD.epoch) THEN
        RAISE EXCEPTION 'a client of shard set % has not acknowledged epoch %', OLD.name, OLD.epoch
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    PERFORM pg_notify('cellferry_shards', NEW.name);
    RETURN NEW;
END
$$;
CREATE TRIGGER guard_shard_set BEFORE UPDATE OR DELETE ON topology.shard_set
    FOR EACH ROW EXECUTE FUNCTION topology.guard_shard_set();
CREATE TRIGGER guard_shard_set_truncate BEFORE TRUNCATE ON topology.shard_set
    FOR EACH STATEMENT EXECUTE FUNCTION topology.guard_shard_set();

CREATE FUNCTION topology.guard_resharding() RETURNS trigger
LANGUAGE plpgsql SET search_path = topology, pg_temp AS $$
DECLARE
    states constant text[] := ARRAY['old', 'dual_write_read_old', 'switching',
                                    'dual_write_read_new', 'new'];
BEGIN
    IF (NEW.id, NEW.shard_set, NEW.old, NEW.new)
        IS DISTINCT FROM (OLD.id, OLD.shard_set, OLD.old, OLD.new)
        OR NEW.attempt < OLD.attempt OR NEW.epoch < OLD.epoch OR OLD.outcome IS NOT NULL THEN
        RAISE EXCEPTION 're-sharding % must not be changed so', OLD.id
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    IF NEW.state <> OLD.state AND abs(COALESCE(array_position(states, NEW.state), 99)
                                      - array_position(states, OLD.state)) <> 1 THEN
        RAISE EXCEPTION 're-sharding % cannot go from % to %', OLD.id, OLD.state, NEW.state
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    IF NEW.state = 'switching' AND NEW.authority <> OLD.authority THEN
        RAISE EXCEPTION 're-sharding % cannot change sides in the middle', OLD.id
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER guard_resharding BEFORE UPDATE ON topology.resharding
    FOR EACH ROW EXECUTE FUNCTION topology.guard_resharding();

-- At commit: a change of state has its audit row, and the set has the same epoch.
CREATE FUNCTION topology.confirm_resharding() RETURNS trigger
LANGUAGE plpgsql SET search_path = topology, pg_temp AS $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM audit AS a
        WHERE a.shard_set = NEW.shard_set AND a.resharding = NEW.id AND a.to_state = NEW.state
            AND a.transaction = pg_current_xact_id()
    ) OR NOT EXISTS (
        SELECT FROM shard_set AS s WHERE s.name = NEW.shard_set AND s.epoch = NEW.epoch
    ) THEN
        RAISE EXCEPTION 're-sharding % became % without an audit row, or without its set',
            NEW.id, NEW.state USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END
$$;
CREATE CONSTRAINT TRIGGER confirm_resharding AFTER UPDATE ON topology.resharding
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
    WHEN (OLD.state IS DISTINCT FROM NEW.state OR OLD.outcome IS DISTINCT FROM NEW.outcome)
    EXECUTE FUNCTION topology.confirm_resharding();
CREATE CONSTRAINT TRIGGER confirm_resharding_begun AFTER INSERT ON topology.resharding
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
    EXECUTE FUNCTION topology.confirm_resharding();

-- All that an application's role needs is EXECUTE on these two, and USAGE of the schema.

-- Registers a session (`acknowledges` NULL) or renews its lease and acknowledges an epoch; returns
-- what the client must follow, or `{"lost": true}` when it has to register anew.
CREATE FUNCTION topology.confirm_shard_client(
    set_name text, client_session uuid, client_name text, client_lease_s double precision,
    acknowledges bigint, window_s double precision, client_figures jsonb
) RETURNS jsonb
LANGUAGE plpgsql SECURITY DEFINER SET search_path = topology, pg_temp AS $$
DECLARE
    one record;
    answer jsonb;
BEGIN
    -- A change of the set and a confirmation take turns: nobody registers unseen.
    SELECT s.epoch, s.document INTO one FROM shard_set AS s WHERE s.name = set_name FOR SHARE;
    IF NOT FOUND THEN
        RETURN jsonb_build_object('unknown', true);
    END IF;
    IF acknowledges IS NULL THEN
        INSERT INTO shard_client AS c (session, shard_set, name, lease_s, acknowledged)
        VALUES (client_session, set_name, left(client_name, 200), client_lease_s, one.epoch)
        ON CONFLICT (session) DO UPDATE SET
            acknowledged = one.epoch, beat = c.beat + 1, seen_at = clock_timestamp()
        WHERE c.shard_set = set_name;
    ELSE
        UPDATE shard_client AS c
        SET beat = c.beat + 1, seen_at = clock_timestamp(),
            acknowledged = least(greatest(c.acknowledged, acknowledges), one.epoch)
        WHERE c.session = client_session AND c.shard_set = set_name;
        IF NOT FOUND THEN
            RETURN jsonb_build_object('lost', true);
        END IF;
    END IF;
    IF client_figures IS NOT NULL THEN
        DELETE FROM shard_report WHERE ctid = ANY (ARRAY(
            SELECT old.ctid FROM shard_report AS old
            WHERE old.shard_set = set_name
              AND old.reported_at < clock_timestamp() - interval '1 day'
            LIMIT 1000 FOR UPDATE SKIP LOCKED));
        INSERT INTO shard_report
        VALUES (set_name, left(client_name, 200), COALESCE(acknowledges, one.epoch),
                clock_timestamp() - make_interval(secs => least(greatest(window_s, 0), 3600)),
                clock_timestamp(), client_figures);
    END IF;
    SELECT jsonb_build_object('id', r.id, 'state', r.state, 'authority', r.authority,
                              'new', r.new) INTO answer
    FROM resharding AS r WHERE r.shard_set = set_name AND r.outcome IS NULL;
    RETURN jsonb_build_object('epoch', one.epoch, 'set', one.document, 'resharding', answer);
END
$$;
REVOKE ALL ON FUNCTION topology.confirm_shard_client(
    text, uuid, text, double precision, bigint, double precision, jsonb) FROM PUBLIC;

CREATE FUNCTION topology.leave_shard_set(client_session uuid) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = topology, pg_temp AS $$
    DELETE FROM shard_client WHERE session = client_session;
$$;
REVOKE ALL ON FUNCTION topology.leave_shard_set(uuid) FROM PUBLIC;
