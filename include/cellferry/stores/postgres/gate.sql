-- What prepare_cell installs in a cell's database, besides one small trigger function a table.
--
-- Functions that applications reach run with their owner's rights (SECURITY DEFINER): an
-- application needs no grant on these tables, and cannot open a gate or empty a log. They look up
-- every name in pg_catalog, and nowhere that a caller could choose.

CREATE SCHEMA IF NOT EXISTS cellferry;
COMMENT ON SCHEMA cellferry IS 'cellferry: gates, key log and leases of moving organizations';

-- What was installed, as the hash of its definition: a second prepare skips what is right.
CREATE TABLE IF NOT EXISTS cellferry.installed (
    what text PRIMARY KEY,
    definition text NOT NULL,
    installed_at timestamptz NOT NULL DEFAULT now()
);

-- Grants that prepare_cell made, as the statement that takes each back.
CREATE TABLE IF NOT EXISTS cellferry.granted (
    revoke text PRIMARY KEY
);

CREATE SEQUENCE IF NOT EXISTS cellferry.lock_number AS bigint MAXVALUE 4294967295 CYCLE;

-- The write fence. No row: open, not armed, the path of every organization that does not move.
CREATE TABLE IF NOT EXISTS cellferry.gate (
    organization text PRIMARY KEY,
    -- advisory locks are shared with the application: ours are 'CELL' in the high half
    lock_key bigint NOT NULL UNIQUE
        DEFAULT ((1128614988::bigint << 32) | nextval('cellferry.lock_number')),
    state text NOT NULL CHECK (state IN ('open', 'frozen', 'moved', 'importing')),
    armed boolean NOT NULL,
    -- whether every transaction older than this row has ended, so that none can have missed it
    settled boolean NOT NULL DEFAULT false,
    migration bigint NOT NULL,
    attempt int NOT NULL,
    epoch bigint NOT NULL,
    moved_to text,
    changed_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50, autovacuum_vacuum_threshold = 20, autovacuum_vacuum_scale_factor = 0);
CREATE INDEX IF NOT EXISTS gate_armed ON cellferry.gate (organization) WHERE armed;
-- Not for looking up: it makes `state` part of a key, so that a change of it is one that FOR KEY
-- SHARE does not overlook (see `enter`), while a new attempt stays one that it does.
CREATE UNIQUE INDEX IF NOT EXISTS gate_state ON cellferry.gate (organization, state);

-- Which organizations may have a gate: a hint that costs a trigger no query. Each is also an empty
-- type "@<organization>", because the server answers by itself, from a cache that every commit keeps
-- right, whether a name exists. A mark without a gate costs a look; a gate without a mark would let
-- writers pass unseen, so marks are made by a trigger of the gate's own table.
CREATE TABLE IF NOT EXISTS cellferry.mark (
    organization text PRIMARY KEY,
    gone xid8 -- what removed the gate; NULL while there is one
);

CREATE OR REPLACE FUNCTION cellferry.put_mark(p_organization text) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- A name holds 63 bytes. Triggers take longer ones for marked.
    IF octet_length(p_organization) > 60 THEN
        RETURN;
    END IF;
    INSERT INTO cellferry.mark AS mark (organization) VALUES (p_organization)
        ON CONFLICT (organization) DO UPDATE SET gone = NULL WHERE mark.gone IS NOT NULL;
    IF to_regclass(format('cellferry.%I', '@' || p_organization)) IS NULL THEN
        EXECUTE format('CREATE TYPE cellferry.%I AS ()', '@' || p_organization);
    END IF;
END $$;

-- Take away marks of gates that no snapshot shows any more: a transaction that keeps an older one
-- still has to be told by `enter` that the organization went.
CREATE OR REPLACE FUNCTION cellferry.sweep_marks() RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    candidates cellferry.mark[];
    candidate cellferry.mark;
    oldest int;
BEGIN
    -- In this order: who takes a snapshot after this one sees that these gates are gone.
    candidates := ARRAY(SELECT mark FROM cellferry.mark WHERE gone IS NOT NULL LIMIT 100);
    -- Without this right the oldest snapshot is not told; the marks stay.
    IF cardinality(candidates) = 0 OR NOT pg_has_role('pg_read_all_stats', 'USAGE') THEN
        RETURN;
    END IF;
    PERFORM pg_stat_clear_snapshot();
    SELECT COALESCE(max(age(backend_xmin)), 0) INTO oldest FROM pg_stat_activity
        WHERE datname = current_database();
    FOREACH candidate IN ARRAY candidates LOOP
        IF age(candidate.gone::xid) > oldest THEN
            DELETE FROM cellferry.mark WHERE organization = candidate.organization;
            EXECUTE format('DROP TYPE IF EXISTS cellferry.%I', '@' || candidate.organization);
        END IF;
    END LOOP;
END $$;

CREATE OR REPLACE FUNCTION cellferry.keep_marks() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- One at a time; to get a lock is also to learn of what others made and dropped.
    LOCK TABLE cellferry.mark IN SHARE ROW EXCLUSIVE MODE;
    IF TG_OP <> 'INSERT' THEN
        UPDATE cellferry.mark SET gone = pg_current_xact_id() WHERE organization = OLD.organization;
    END IF;
    IF TG_OP <> 'DELETE' THEN
        PERFORM cellferry.put_mark(NEW.organization);
    END IF;
    PERFORM cellferry.sweep_marks();
    RETURN NULL;
END $$;
CREATE OR REPLACE TRIGGER keep_marks AFTER INSERT OR DELETE OR UPDATE OF organization
    ON cellferry.gate FOR EACH ROW EXECUTE FUNCTION cellferry.keep_marks();
-- a mover's session may have the replica role
ALTER TABLE cellferry.gate ENABLE ALWAYS TRIGGER keep_marks;
LOCK TABLE cellferry.mark IN SHARE ROW EXCLUSIVE MODE;
SELECT cellferry.put_mark(organization) FROM cellferry.gate;

-- Keys that changed. Append-only; a round deletes exactly the rows that it saw.
CREATE TABLE IF NOT EXISTS cellferry.key_log (
    id bigint GENERATED ALWAYS AS IDENTITY,
    organization text NOT NULL,
    relation text NOT NULL,
    key text[] NOT NULL
);
CREATE INDEX IF NOT EXISTS key_log_order ON cellferry.key_log (organization, id);
-- Where somebody publishes all tables, for a change stream, rows without an identity cannot go.
ALTER TABLE cellferry.key_log REPLICA IDENTITY FULL;

-- The newest attempt at each migration; who writes holds its row (hazard 1).
CREATE TABLE IF NOT EXISTS cellferry.lease (
    migration bigint PRIMARY KEY,
    organization text NOT NULL,
    attempt int NOT NULL,
    taken_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);

-- How far the copy of each table got, written with the batch.
CREATE TABLE IF NOT EXISTS cellferry.checkpoint (
    migration bigint NOT NULL,
    relation text NOT NULL,
    last_key text[],
    rows bigint NOT NULL DEFAULT 0,
    bytes bigint NOT NULL DEFAULT 0,
    done boolean NOT NULL DEFAULT false,
    PRIMARY KEY (migration, relation)
);

-- Referenced rows that a migration brought here. One that was here before, and that nobody else
-- used, became as it was at the source; it stays whatever comes of the migration. Migrations that
-- come from the same cell read the same row there: each of them brings it.
CREATE TABLE IF NOT EXISTS cellferry.imported_row (
    migration bigint NOT NULL,
    relation text NOT NULL,
    key text[] NOT NULL,
    was_here boolean NOT NULL DEFAULT false,
    came_from text, -- the cell's name; an older version did not say
    PRIMARY KEY (migration, relation, key)
);
ALTER TABLE cellferry.imported_row ADD COLUMN IF NOT EXISTS was_here boolean NOT NULL DEFAULT false;
ALTER TABLE cellferry.imported_row ADD COLUMN IF NOT EXISTS came_from text;
CREATE INDEX IF NOT EXISTS imported_row_key ON cellferry.imported_row (relation, key);

-- A controller holds or awaits the exclusive side. Wait with everybody, but not for ever: a waiting
-- writer occupies a connection that other organizations may need.
CREATE OR REPLACE FUNCTION cellferry.wait_at_gate(p_organization text, p_lock_key bigint)
RETURNS void LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '3s'
AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(p_lock_key);
EXCEPTION WHEN lock_not_available THEN
    RAISE EXCEPTION '% is being moved',
        COALESCE('organization ' || p_organization, 'an organization that the row may belong to')
        USING ERRCODE = 'CF002',
              DETAIL = json_build_object('organization', p_organization)::text,
              HINT = 'Try again.';
END $$;

-- Pass the gate of one organization, and log the key of the row. Called only where the cheap look
-- found a gate row. Returns the gate's epoch, or NULL when there is no gate any more.
CREATE OR REPLACE FUNCTION cellferry.enter(
    p_organization text, p_relation text, p_old text[], p_new text[]
) RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    gate cellferry.gate;
    holds_up_freezes boolean := false;
BEGIN
    SELECT * INTO gate FROM cellferry.gate WHERE organization = p_organization;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    IF gate.armed OR gate.state = 'frozen' THEN
        -- Who entered loosely holds up every freeze by that, and must not wait at a gate that one has
        -- locked while it waits for this transaction. The setting may be anybody's; the lock counts.
        -- Not in one condition: nobody else is to try for it.
        IF gate.state = 'open' THEN
            IF current_setting('cellferry.loose', true) = pg_current_xact_id_if_assigned()::text THEN
                holds_up_freezes := pg_try_advisory_xact_lock_shared(1128614988::bigint << 32);
            END IF;
        END IF;
        IF NOT holds_up_freezes AND NOT pg_try_advisory_xact_lock_shared(gate.lock_key) THEN
            PERFORM cellferry.wait_at_gate(p_organization, gate.lock_key);
        END IF;
        -- Only now does the state hold still. A new snapshot shows it; a transaction that keeps an
        -- older one must not go on with what it saw then: locking the row raises 40001 there when
        -- the state has changed since, because the state is part of a key.
        IF current_setting('transaction_isolation') IN ('read committed', 'read uncommitted') THEN
            SELECT * INTO gate FROM cellferry.gate WHERE organization = p_organization;
        ELSIF current_setting('transaction_read_only') = 'off' THEN
            SELECT * INTO gate FROM cellferry.gate WHERE organization = p_organization
                FOR KEY SHARE;
        END IF; -- one that only reads may not lock rows, and is as old as its snapshot anyway
        IF NOT FOUND THEN
            RETURN NULL;
        END IF;
    END IF;
    IF gate.state = 'moved' THEN
        RAISE EXCEPTION 'organization % has moved to %', p_organization, gate.moved_to
            USING ERRCODE = 'CF001',
                  DETAIL = json_build_object('organization', p_organization,
                                             'cell', gate.moved_to, 'epoch', gate.epoch)::text,
                  HINT = 'Refresh the route and go to that cell.';
    ELSIF gate.state <> 'open' THEN
        RAISE EXCEPTION 'organization % is being moved', p_organization
            USING ERRCODE = 'CF002',
                  DETAIL = json_build_object('organization', p_organization)::text,
                  HINT = 'Try again.';
    END IF;
    IF gate.armed AND p_relation IS NOT NULL THEN
        IF p_old IS NOT NULL THEN
            INSERT INTO cellferry.key_log (organization, relation, key)
                VALUES (p_organization, p_relation, p_old);
        END IF;
        IF p_new IS NOT NULL AND p_new IS DISTINCT FROM p_old THEN
            INSERT INTO cellferry.key_log (organization, relation, key)
                VALUES (p_organization, p_relation, p_new);
        END IF;
    END IF;
    RETURN gate.epoch;
END $$;

-- A row that belongs to several organizations, or whose owner cannot be told (its parent is gone
-- in a cascade, or comes later in a deferred transaction): every round must look at it.
CREATE OR REPLACE FUNCTION cellferry.log_for_all(p_relation text, p_old text[], p_new text[])
RETURNS void LANGUAGE sql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    INSERT INTO cellferry.key_log (organization, relation, key)
        SELECT gate.organization, p_relation, keys.key
        FROM cellferry.gate, (SELECT p_old AS key UNION SELECT p_new) AS keys
        WHERE gate.armed AND keys.key IS NOT NULL
$$;

-- A row refers to a parent that this transaction does not see, and becomes the organization's for
-- which that one commits, whichever that is. Each freeze takes the exclusive side of this lock for a
-- moment, and so waits for these transactions as for the organization's own writers. The caller looks
-- again at whose the row is. One that keeps an older snapshot cannot: it must not have begun before a
-- freeze, and locking the rows raises 40001 there when it has. Later ones wait for it anyway, so the
-- row locks, which would hold up a thaw, go at once.
CREATE OR REPLACE FUNCTION cellferry.enter_loosely() RETURNS void LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT pg_try_advisory_xact_lock_shared(1128614988::bigint << 32) THEN
        PERFORM cellferry.wait_at_gate(NULL, 1128614988::bigint << 32);
    END IF;
    IF current_setting('cellferry.loose', true) = pg_current_xact_id()::text THEN
        RETURN;
    END IF;
    PERFORM set_config('cellferry.loose', pg_current_xact_id()::text, true);
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        BEGIN
            PERFORM FROM cellferry.gate WHERE armed AND state IN ('open', 'frozen') FOR KEY SHARE;
            RAISE EXCEPTION USING ERRCODE = 'CF000';
        EXCEPTION WHEN SQLSTATE 'CF000' THEN
            NULL; -- only these row locks are rolled back
        END;
    END IF;
END $$;

-- A row goes from one organization to another, and one of them has a gate. Rows below it would
-- follow unseen, so it is refused while the organization moves.
CREATE OR REPLACE FUNCTION cellferry.refuse_change(p_old text, p_new text, p_relation text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM cellferry.enter(p_old, NULL, NULL, NULL);
    PERFORM cellferry.enter(p_new, NULL, NULL, NULL);
    RAISE EXCEPTION 'a row of % cannot go from organization % to % while one of them moves',
        p_relation, COALESCE(p_old, '(none)'), COALESCE(p_new, '(none)')
        USING ERRCODE = 'CF003',
              DETAIL = json_build_object('organization', p_old, 'to', p_new)::text,
              HINT = 'Try again when the move has ended.';
END $$;

CREATE OR REPLACE FUNCTION cellferry.refuse_truncate() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF EXISTS (SELECT FROM cellferry.gate WHERE armed OR state <> 'open') THEN
        RAISE EXCEPTION 'table % cannot be truncated: an organization of this cell is moving',
            TG_RELID::regclass
            USING ERRCODE = 'CF004',
                  HINT = 'DELETE the rows, or wait until the moves and their retention have ended.';
    END IF;
    RETURN NULL;
END $$;

-- What an application calls once a transaction: reads, and writes that meet no row, pass no
-- trigger (hazard 8). `epoch` is that of the caller's route.
CREATE OR REPLACE FUNCTION cellferry.assert_authority(organization text, epoch bigint)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- A caller that knows a later authority than this gate must not believe this cell.
    IF cellferry.enter($1, NULL, NULL, NULL) < $2 THEN
        RAISE EXCEPTION 'this cell does not know epoch % of organization %', $2, $1
            USING ERRCODE = 'CF002',
                  DETAIL = json_build_object('organization', $1)::text,
                  HINT = 'Try again.';
    END IF;
END $$;

-- Whether this cell's copy of an organization is the one that counts, for jobs over a whole cell: while
-- it is imported or retained there are two (hazard 5). Never true in two cells; at most for the length
-- of a write pause in none, as no cell takes writes then.
CREATE OR REPLACE FUNCTION cellferry.is_authoritative(organization text)
RETURNS boolean LANGUAGE plpgsql STABLE PARALLEL SAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN NOT EXISTS (
        SELECT FROM cellferry.gate WHERE gate.organization = $1 AND gate.state <> 'open'
    );
END $$;

-- Who has a transaction open in this database. A transaction without an id has written nothing, and
-- without a snapshot will see all that is committed by now. One that holds a writer's lock on a table
-- counts as one that has written: it need not look for new marks before it writes there. The mover may not see this of others by
-- itself, and gets no more of it than what names a blocker: no statements.
CREATE OR REPLACE FUNCTION cellferry.open_transactions()
RETURNS TABLE (
    virtual_id text, pid int, has_written boolean, has_snapshot boolean,
    application text, role name, age interval, statement_age interval
) LANGUAGE sql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    WITH held AS MATERIALIZED (SELECT * FROM pg_locks)
    SELECT l.virtualtransaction, a.pid,
           a.backend_xid IS NOT NULL OR EXISTS (
               SELECT FROM held AS h WHERE h.pid = a.pid AND h.locktype = 'relation'
                   AND h.mode = 'RowExclusiveLock' AND h.granted),
           a.backend_xmin IS NOT NULL,
           a.application_name, a.usename,
           clock_timestamp() - a.xact_start, clock_timestamp() - a.query_start
    FROM held AS l JOIN pg_stat_activity AS a ON a.pid = l.pid
    WHERE l.locktype = 'virtualxid' AND l.mode = 'ExclusiveLock' AND l.granted
        AND a.datname = current_database() AND a.pid <> pg_backend_pid()
        -- unknown to an owner without pg_read_all_stats: then an autovacuum is waited for, too
        AND COALESCE(a.backend_type, '') NOT IN ('autovacuum worker', 'parallel worker')
        -- these write no rows of an organization through its gate
        AND a.application_name NOT LIKE 'cellferry:%'
        AND NOT (a.application_name = 'pg_dump' AND a.backend_xid IS NULL)
        AND a.pid NOT IN (SELECT v.pid FROM pg_stat_progress_vacuum AS v)
$$;

-- Who holds the shared side of a gate.
CREATE OR REPLACE FUNCTION cellferry.gate_holders(p_lock_key bigint)
RETURNS TABLE (
    pid int, application text, role name, age interval, statement_age interval
) LANGUAGE sql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT a.pid, a.application_name, a.usename,
           clock_timestamp() - a.xact_start, clock_timestamp() - a.query_start
    FROM pg_locks AS l JOIN pg_stat_activity AS a ON a.pid = l.pid
    WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
        AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
        AND l.classid = ((p_lock_key >> 32) & 4294967295)::oid
        AND l.objid = (p_lock_key & 4294967295)::oid
        AND a.pid <> pg_backend_pid()
$$;

-- Physical standbys that stream from here, and how far each is; ordinary roles see only that there
-- are some. A logical slot's walsender feeds no server that could be promoted.
CREATE OR REPLACE FUNCTION cellferry.standbys()
RETURNS TABLE (name text, address text, sync_state text, flush_lsn pg_lsn)
LANGUAGE sql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT COALESCE(r.application_name, ''), COALESCE(r.client_addr::text, 'local'),
           COALESCE(r.sync_state, 'unknown'), r.flush_lsn
    FROM pg_stat_replication AS r
    LEFT JOIN pg_replication_slots AS s ON s.active_pid = r.pid
    WHERE COALESCE(s.slot_type, 'physical') = 'physical'
        AND COALESCE(r.state, 'streaming') <> 'backup'
$$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA cellferry FROM PUBLIC;
GRANT USAGE ON SCHEMA cellferry TO PUBLIC;
GRANT EXECUTE ON FUNCTION cellferry.assert_authority(text, bigint) TO PUBLIC;
GRANT EXECUTE ON FUNCTION cellferry.is_authoritative(text) TO PUBLIC;
