-- A shard that is a table: what its clients ask. A row whose time is over counts as absent.

-- name: table
CREATE TABLE IF NOT EXISTS cellferry_shard (
    key        bytea PRIMARY KEY,
    value      bytea NOT NULL,
    expires_at timestamptz
) WITH (fillfactor = 80)

-- name: claim
-- A living holder's row is only locked and read; an expired one's is taken over.
-- One moment for both columns: between two, an expired holder would get the other's time.
INSERT INTO cellferry_shard AS held (key, value, expires_at)
VALUES (%(key)s, %(value)s, COALESCE(
    timestamptz 'epoch' + %(expires_ms)s::bigint * interval '1 ms',
    date_trunc('milliseconds', clock_timestamp()) + %(ttl_ms)s::bigint * interval '1 ms'))
ON CONFLICT (key) DO UPDATE SET
    value = CASE WHEN held.expires_at <= statement_timestamp() THEN EXCLUDED.value
                 ELSE held.value END,
    expires_at = CASE WHEN held.expires_at <= statement_timestamp() THEN EXCLUDED.expires_at
                      ELSE held.expires_at END
RETURNING value, (extract(epoch FROM expires_at) * 1000)::bigint

-- name: get
SELECT value FROM cellferry_shard
WHERE key = %(key)s AND (expires_at IS NULL OR expires_at > clock_timestamp())

-- name: set
INSERT INTO cellferry_shard (key, value, expires_at)
VALUES (%(key)s, %(value)s, clock_timestamp() + %(ttl_ms)s::bigint * interval '1 ms')
ON CONFLICT (key) DO UPDATE SET value = EXCLUDED.value, expires_at = EXCLUDED.expires_at

-- name: increment
INSERT INTO cellferry_shard AS held (key, value, expires_at)
VALUES (%(key)s, convert_to(%(by)s::bigint::text, 'UTF8'),
        clock_timestamp() + %(ttl_ms)s::bigint * interval '1 ms')
ON CONFLICT (key) DO UPDATE SET
    value = CASE WHEN held.expires_at <= statement_timestamp() THEN EXCLUDED.value
                 ELSE convert_to((convert_from(held.value, 'UTF8')::bigint
                                  + %(by)s::bigint)::text, 'UTF8') END,
    expires_at = CASE WHEN held.expires_at <= statement_timestamp() THEN EXCLUDED.expires_at
                      ELSE held.expires_at END
RETURNING convert_from(value, 'UTF8')::bigint

-- name: delete
DELETE FROM cellferry_shard
WHERE key = %(key)s AND (%(token)s::bytea IS NULL OR value = %(token)s)
RETURNING expires_at IS NULL OR expires_at > clock_timestamp()

-- name: ping
SELECT 1
