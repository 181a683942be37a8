-- What a preflight asks a cell about itself. An ordinary role may run all of it.

-- name: privileges
SELECT t.schema, t.name,
       ARRAY(
           SELECT p.privilege FROM unnest(t.privileges) AS p (privilege)
           WHERE NOT has_table_privilege(c.oid, p.privilege)
       ) AS missing,
       has_schema_privilege(n.oid, 'USAGE') AS schema_usable,
       row_security_active(c.oid) AS row_security
FROM (
    SELECT u.schema, u.name, string_to_array(u.privileges, ' ') AS privileges
    FROM unnest(%(schemas)s::text[], %(names)s::text[], %(privileges)s::text[])
        AS u (schema, name, privileges)
) AS t
JOIN pg_namespace AS n ON n.nspname = t.schema
JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = t.name;

-- name: role
SELECT current_user::text AS role,
       r.rolsuper,
       has_parameter_privilege('session_replication_role', 'SET') AS may_set_replica,
       r.rolconnlimit,
       (SELECT d.datconnlimit FROM pg_database AS d WHERE d.datname = current_database())
           AS database_limit
FROM pg_roles AS r
WHERE r.rolname = current_user;

-- name: connections
SELECT current_setting('max_connections')::int
           - current_setting('superuser_reserved_connections')::int
           - coalesce(current_setting('reserved_connections', true)::int, 0) AS limit,
       count(*) FILTER (WHERE backend_type = 'client backend') AS used,
       count(*) FILTER (WHERE usename = current_user) AS used_by_role,
       count(*) FILTER (WHERE datname = current_database()) AS used_in_database
FROM pg_stat_activity;

-- name: long_transactions
-- A writer holds a lock on its own transaction id, which every role may see in pg_locks; when it
-- began may be hidden from roles without pg_read_all_stats.
SELECT l.pid,
       a.usename::text,
       a.application_name,
       extract(epoch FROM clock_timestamp() - a.xact_start)::float AS seconds,
       age(l.transactionid)::bigint AS transactions_since
FROM pg_locks AS l
JOIN pg_stat_activity AS a ON a.pid = l.pid
WHERE l.locktype = 'transactionid'
  AND l.mode = 'ExclusiveLock'
  AND l.granted
  AND a.datname = current_database()
  AND l.pid <> pg_backend_pid()
  AND (a.xact_start IS NULL OR a.xact_start < clock_timestamp() - make_interval(secs => %(seconds)s))
ORDER BY age(l.transactionid) DESC
LIMIT 20;

-- name: prepared_transactions
SELECT gid, owner::text, extract(epoch FROM clock_timestamp() - prepared)::float
FROM pg_prepared_xacts
WHERE database = current_database()
ORDER BY prepared;

-- name: standbys
-- Physical replication only; a logical slot's walsender feeds no server that could be promoted.
SELECT coalesce(r.application_name, '')::text, coalesce(r.client_addr::text, 'local'),
       coalesce(r.sync_state, 'unknown')
FROM pg_stat_replication AS r
LEFT JOIN pg_replication_slots AS s ON s.active_pid = r.pid
WHERE coalesce(s.slot_type, 'physical') = 'physical'
  AND coalesce(r.state, 'streaming') <> 'backup';

-- name: may_see_standbys
-- A prepared cell tells the mover what pg_stat_replication hides from ordinary roles.
SELECT coalesce(has_function_privilege(p.oid, 'EXECUTE'), false)
FROM (SELECT to_regprocedure('cellferry.standbys()')::oid AS oid) AS p;

-- name: seen_standbys
SELECT name, address, sync_state FROM cellferry.standbys();

-- name: publications
-- Those of all tables count before there are any of ours.
SELECT pubname::text FROM pg_publication WHERE puballtables
UNION
SELECT pubname::text FROM pg_publication_tables WHERE schemaname = 'cellferry'
ORDER BY 1;

-- name: settings
SELECT current_setting('synchronous_standby_names'),
       current_setting('synchronous_commit'),
       current_setting('transaction_read_only') = 'on' AND pg_is_in_recovery(),
       pg_database_size(current_database())::bigint,
       current_setting('fsync'),
       current_setting('full_page_writes');

-- name: sequence_positions
-- NULL for one that was never used, or that this role may not read.
SELECT u.schema, u.name,
       CASE WHEN has_sequence_privilege(c.oid, 'SELECT, USAGE')
            THEN pg_sequence_last_value(c.oid) END
FROM unnest(%(schemas)s::text[], %(names)s::text[]) AS u (schema, name)
JOIN pg_namespace AS n ON n.nspname = u.schema
JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = u.name AND c.relkind = 'S';
