-- A shard that is a table, for bulk work. Expiries are microseconds since 1970, -1 for none; a row
-- whose time is over counts as absent.

-- name: facts
SELECT current_setting('server_version'), pg_is_in_recovery(), pg_database_size(current_database()),
       COALESCE((SELECT reltuples::bigint FROM pg_class WHERE oid = to_regclass('cellferry_shard')),
                0)

-- name: identity
SELECT system_identifier || '/' || current_database() FROM pg_control_system()

-- name: now
SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint

-- name: count
SELECT count(*) FROM cellferry_shard

-- name: scan
SELECT key FROM cellferry_shard
WHERE key > %(after)s AND substring(key FROM 1 FOR octet_length(%(prefix)s)) = %(prefix)s
  AND (expires_at IS NULL OR expires_at > clock_timestamp())
ORDER BY key LIMIT %(count)s

-- name: scan from the beginning
SELECT key FROM cellferry_shard
WHERE key >= %(prefix)s AND substring(key FROM 1 FOR octet_length(%(prefix)s)) = %(prefix)s
  AND (expires_at IS NULL OR expires_at > clock_timestamp())
ORDER BY key LIMIT %(count)s

-- name: read
SELECT key, value, CASE WHEN expires_at IS NULL OR NOT isfinite(expires_at) THEN -1
                        ELSE (extract(epoch FROM expires_at) * 1000000)::bigint END
FROM cellferry_shard
WHERE key = ANY(%(keys)s) AND (expires_at IS NULL OR expires_at > clock_timestamp())

-- name: exist
SELECT key FROM cellferry_shard
WHERE key = ANY(%(keys)s) AND (expires_at IS NULL OR expires_at > clock_timestamp())

-- name: sizes
-- The row, its header and pointer, and its entry in the index.
SELECT key, pg_column_size(held.*) + 4 + pg_column_size(key) + 16 FROM cellferry_shard AS held
WHERE key = ANY(%(keys)s)

-- name: fence table
CREATE TABLE IF NOT EXISTS cellferry_shard_fence (lane text PRIMARY KEY, number bigint NOT NULL)

-- name: raise fence
-- Waits for a statement of an older writer that is under way: it holds the row.
INSERT INTO cellferry_shard_fence AS there (lane, number) VALUES (%(lane)s, %(number)s)
ON CONFLICT (lane) DO UPDATE SET number = GREATEST(there.number, EXCLUDED.number)
RETURNING number

-- name: end others
SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity
WHERE application_name LIKE %(names)s AND pid <> pg_backend_pid() AND usename = current_user

-- name: write
WITH fence AS MATERIALIZED (
    SELECT 1 FROM cellferry_shard_fence WHERE lane = %(lane)s AND number = %(number)s FOR SHARE
), gone AS (
    DELETE FROM cellferry_shard USING fence WHERE key = ANY(%(gone)s::bytea[])
), written AS (
    INSERT INTO cellferry_shard (key, value, expires_at)
    SELECT one.key, one.value, CASE WHEN one.expires >= 0 THEN
               timestamptz 'epoch' + one.expires * interval '1 microsecond' END
    FROM fence, unnest(%(keys)s::bytea[], %(values)s::bytea[], %(expiries)s::bigint[])
                AS one (key, value, expires)
    ORDER BY one.key
    ON CONFLICT (key) DO UPDATE SET value = EXCLUDED.value, expires_at = EXCLUDED.expires_at
)
SELECT count(*) FROM fence

-- name: remove
WITH fence AS MATERIALIZED (
    SELECT 1 FROM cellferry_shard_fence WHERE lane = %(lane)s AND number = %(number)s FOR SHARE
), gone AS (
    DELETE FROM cellferry_shard USING fence WHERE key = ANY(%(keys)s::bytea[]) RETURNING 1
)
SELECT (SELECT count(*) FROM fence), (SELECT count(*) FROM gone)

-- name: purge
WITH fence AS MATERIALIZED (
    SELECT 1 FROM cellferry_shard_fence WHERE lane = %(lane)s AND number = %(number)s FOR SHARE
), over AS MATERIALIZED (
    SELECT key FROM cellferry_shard
    WHERE expires_at <= clock_timestamp()
      AND substring(key FROM 1 FOR octet_length(%(prefix)s)) = %(prefix)s
    LIMIT %(count)s FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM cellferry_shard USING fence WHERE key IN (SELECT key FROM over) RETURNING 1
)
SELECT (SELECT count(*) FROM fence), (SELECT count(*) FROM gone)

-- name: is fed
SELECT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = 'cellferry_shard'::regclass
               AND tgname = 'cellferry_shard_changed_truncate')

-- name: one at a time
-- IF NOT EXISTS does not keep two sessions from making the same table at once.
SELECT pg_advisory_xact_lock(hashtextextended('cellferry_shard', 0));

-- name: change log
-- Several feeds read it, each what its last look could not see; a crash empties it and ends them.
CREATE UNLOGGED TABLE IF NOT EXISTS cellferry_shard_changes (
    key        bytea,
    changed_by xid8 NOT NULL DEFAULT pg_current_xact_id(),
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX IF NOT EXISTS cellferry_shard_changes_by ON cellferry_shard_changes (changed_by);
CREATE INDEX IF NOT EXISTS cellferry_shard_changes_at ON cellferry_shard_changes (changed_at);

CREATE OR REPLACE FUNCTION cellferry_shard_changed() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
BEGIN
    -- Between two steps no feed forgets, for as long as a TTL or an approval takes.
    IF random() < 0.01 THEN
        EXECUTE format('DELETE FROM %1$I.cellferry_shard_changes WHERE ctid = ANY (ARRAY('
                       ' SELECT ctid FROM %1$I.cellferry_shard_changes'
                       ' WHERE changed_at < clock_timestamp() - interval ''1 hour'''
                       ' LIMIT 500 FOR UPDATE SKIP LOCKED))', TG_TABLE_SCHEMA);
    END IF;
    IF TG_OP = 'TRUNCATE' THEN
        EXECUTE format('INSERT INTO %I.cellferry_shard_changes (key) VALUES (NULL)',
                       TG_TABLE_SCHEMA);
    ELSIF TG_OP = 'INSERT' THEN
        EXECUTE format('INSERT INTO %I.cellferry_shard_changes (key) SELECT key FROM fresh',
                       TG_TABLE_SCHEMA);
    ELSIF TG_OP = 'DELETE' THEN
        EXECUTE format('INSERT INTO %I.cellferry_shard_changes (key) SELECT key FROM gone',
                       TG_TABLE_SCHEMA);
    ELSE
        EXECUTE format('INSERT INTO %I.cellferry_shard_changes (key)'
                       ' SELECT key FROM fresh UNION SELECT key FROM gone', TG_TABLE_SCHEMA);
    END IF;
    RETURN NULL;
END $$;

CREATE OR REPLACE TRIGGER cellferry_shard_changed_insert AFTER INSERT ON cellferry_shard
REFERENCING NEW TABLE AS fresh
FOR EACH STATEMENT EXECUTE FUNCTION cellferry_shard_changed();
CREATE OR REPLACE TRIGGER cellferry_shard_changed_update AFTER UPDATE ON cellferry_shard
REFERENCING NEW TABLE AS fresh OLD TABLE AS gone
FOR EACH STATEMENT EXECUTE FUNCTION cellferry_shard_changed();
CREATE OR REPLACE TRIGGER cellferry_shard_changed_delete AFTER DELETE ON cellferry_shard
REFERENCING OLD TABLE AS gone
FOR EACH STATEMENT EXECUTE FUNCTION cellferry_shard_changed();
CREATE OR REPLACE TRIGGER cellferry_shard_changed_truncate AFTER TRUNCATE ON cellferry_shard
FOR EACH STATEMENT EXECUTE FUNCTION cellferry_shard_changed();

-- name: snapshot
SELECT pg_current_snapshot()::text, to_regclass('cellferry_shard_changes')::oid::bigint

-- name: changes
-- What is visible now and was not at the last look, however late it committed.
SELECT seen.snapshot::text, log.changed_by IS NOT NULL, log.key,
       to_regclass('cellferry_shard_changes')::oid::bigint
FROM (SELECT pg_current_snapshot() AS snapshot) AS seen
LEFT JOIN cellferry_shard_changes AS log
  ON log.changed_by >= pg_snapshot_xmin(%(last)s::pg_snapshot)
 AND NOT pg_visible_in_snapshot(log.changed_by, %(last)s::pg_snapshot)

-- name: forget changes
DELETE FROM cellferry_shard_changes WHERE changed_at < clock_timestamp() - interval '1 hour'

-- name: tidy
DROP TRIGGER IF EXISTS cellferry_shard_changed_insert ON cellferry_shard;
DROP TRIGGER IF EXISTS cellferry_shard_changed_update ON cellferry_shard;
DROP TRIGGER IF EXISTS cellferry_shard_changed_delete ON cellferry_shard;
DROP TRIGGER IF EXISTS cellferry_shard_changed_truncate ON cellferry_shard;
DROP FUNCTION IF EXISTS cellferry_shard_changed();
DROP TABLE IF EXISTS cellferry_shard_changes
