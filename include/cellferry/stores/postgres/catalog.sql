-- What the catalog says about the application's schema. Read with search_path = pg_catalog, so
-- that every printed type, expression and definition is qualified the same way in every cell.
-- to_jsonb(row) ->> 'column' reads a column that only newer servers have, NULL on older ones.

-- name: state
-- A digest of all that the other queries here read, without printing any of it: which row versions
-- the catalogs have. A version has its place and its transaction for itself as long as the server
-- runs; a crash may take back what was not durable and use a transaction id again, and resets the
-- statistics. Estimates of rows are changed in place, and only their magnitude counts. The settings
-- change how definitions are printed. What initdb pins has numbers below 12000 and stays as it is.
-- The conditions are plain, for every new session plans them. The hashes are linear; a sum of them
-- will do, since a change either brings a new transaction id into it or takes lines away.
--
-- Of cellferry's own schema, which no query here tells of, tables and types do not count: each gate
-- has a type there, and comes and goes with a move. Of dependencies count those that are read below:
-- on extensions, on columns (sequences), of defaults.
WITH own AS (
    SELECT oid FROM pg_namespace WHERE nspname = 'cellferry'
), entry (hash) AS (
    SELECT hash_record_extended(ROW(t.tableoid, t.xmin, t.ctid), 0) FROM pg_namespace AS t
    WHERE NOT starts_with(t.nspname, 'pg_')
    UNION ALL
    SELECT hash_record_extended(ROW(t.tableoid, t.xmin, t.ctid), 0) FROM pg_class AS t
    WHERE t.oid >= 12000 AND t.relnamespace IS DISTINCT FROM (SELECT oid FROM own)
    UNION ALL
    SELECT hash_record_extended(ROW(t.tableoid, t.xmin, t.ctid), 0) FROM pg_attribute AS t
    WHERE t.attrelid >= 12000
    UNION ALL
    SELECT hash_record_extended(ROW(t.tableoid, t.xmin, t.ctid), 0) FROM pg_attrdef AS t
    WHERE t.adrelid >= 12000
    UNION ALL
    SELECT hash_record_extended(ROW(t.tableoid, t.xmin, t.ctid), 0) FROM pg_constraint AS t
    WHERE t.oid >= 12000
    UNION ALL
    SELECT hash_record_extended(ROW(t.tableoid, t.xmin, t.ctid), 0) FROM pg_index AS t
    WHERE t.indexrelid >= 12000
    UNION ALL
    SELECT hash_record_extended(ROW(t.tableoid, t.xmin, t.ctid), 0) FROM pg_trigger AS t
    WHERE t.oid >= 12000
    UNION ALL
    SELECT hash_record_extended(ROW(t.tableoid, t.xmin, t.ctid), 0) FROM pg_rewrite AS t
    WHERE t.oid >= 12000
    UNION ALL
    SELECT hash_record_extended(ROW(t.tableoid, t.xmin, t.ctid), 0) FROM pg_inherits AS t
    UNION ALL
    SELECT hash_record_extended(ROW(t.tableoid, t.xmin, t.ctid), 0) FROM pg_partitioned_table AS t
    UNION ALL
    SELECT hash_record_extended(ROW(t.tableoid, t.xmin, t.ctid), 0) FROM pg_type AS t
    WHERE t.oid >= 12000 AND t.typnamespace IS DISTINCT FROM (SELECT oid FROM own)
    UNION ALL
    SELECT hash_record_extended(ROW(t.tableoid, t.xmin, t.ctid), 0) FROM pg_enum AS t
    UNION ALL
    SELECT hash_record_extended(ROW(t.tableoid, t.xmin, t.ctid), 0) FROM pg_range AS t
    UNION ALL
    SELECT hash_record_extended(ROW(t.tableoid, t.xmin, t.ctid), 0) FROM pg_sequence AS t
    UNION ALL
    SELECT hash_record_extended(ROW(t.tableoid, t.xmin, t.ctid), 0) FROM pg_extension AS t
    UNION ALL
    SELECT hash_record_extended(ROW(t.tableoid, t.xmin, t.ctid), 0) FROM pg_depend AS t
    WHERE t.objid >= 12000
        AND (t.deptype = 'e' OR t.refobjsubid > 0 OR t.classid = 'pg_attrdef'::regclass)
    UNION ALL
    SELECT hash_record_extended(ROW(t.tableoid, t.xmin, t.ctid), 0) FROM pg_proc AS t
    WHERE t.oid >= 12000
    UNION ALL
    SELECT hash_record_extended(ROW(t.tableoid, t.xmin, t.ctid), 0) FROM pg_operator AS t
    WHERE t.oid >= 12000
    UNION ALL
    SELECT hash_record_extended(ROW(t.tableoid, t.xmin, t.ctid), 0) FROM pg_opclass AS t
    WHERE t.oid >= 12000
    UNION ALL
    SELECT hash_record_extended(ROW(t.tableoid, t.xmin, t.ctid), 0) FROM pg_cast AS t
    WHERE t.oid >= 12000
    UNION ALL
    SELECT hash_record_extended(ROW(t.tableoid, t.xmin, t.ctid), 0) FROM pg_collation AS t
    WHERE t.oid >= 12000
    UNION ALL
    SELECT hash_record_extended(ROW(t.tableoid, t.xmin, t.ctid), 0) FROM pg_ts_config AS t
    WHERE t.oid >= 12000
    UNION ALL
    SELECT hash_record_extended(ROW(t.tableoid, t.xmin, t.ctid), 0) FROM pg_ts_dict AS t
    WHERE t.oid >= 12000
    UNION ALL
    SELECT hash_record_extended(ROW(t.tableoid, t.xmin, t.ctid), 0) FROM pg_database AS t
    WHERE t.datname = current_database()
    UNION ALL
    SELECT hashfloat8extended(round(ln(greatest(t.reltuples, 1))), t.oid::bigint) FROM pg_class AS t
    WHERE t.oid >= 12000 AND t.relkind IN ('r', 'p', 'm', 'f')
        AND t.relnamespace IS DISTINCT FROM (SELECT oid FROM own)
    UNION ALL
    SELECT hashtextextended(ROW(pg_postmaster_start_time(), stats_reset)::text, 0)
    FROM pg_stat_bgwriter
    UNION ALL
    SELECT hashtextextended(ROW(name, current_setting(name))::text, 0)
    FROM unnest(ARRAY[
        'TimeZone', 'DateStyle', 'IntervalStyle', 'extra_float_digits', 'bytea_output',
        'xmloption', 'lc_monetary', 'quote_all_identifiers', 'standard_conforming_strings'
    ]) AS name
)
SELECT format('%%s lines, sum %%s', count(*), sum(hash)) AS state
FROM entry;

-- name: relations
SELECT c.oid::bigint AS oid,
       n.nspname::text AS schema,
       c.relname::text AS name,
       c.relkind::text AS kind,
       c.relpersistence::text AS persistence,
       c.relispartition AS is_partition,
       CASE WHEN c.relispartition THEN pg_partition_root(c.oid)::oid::bigint END AS root,
       ARRAY(
           SELECT i.inhparent::bigint FROM pg_inherits AS i
           WHERE i.inhrelid = c.oid ORDER BY i.inhseqno
       ) AS parents,
       greatest(c.reltuples, 0)::bigint AS estimated_rows,
       c.relrowsecurity AS row_security,
       CASE WHEN c.relkind = 'p' THEN pg_get_partkeydef(c.oid) END AS partition_key,
       pg_get_expr(c.relpartbound, c.oid) AS partition_bound,
       EXISTS (
           SELECT FROM pg_depend AS d
           WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'
       ) AS of_extension
FROM pg_class AS c
JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f')
  AND c.relpersistence <> 't'
  AND NOT starts_with(n.nspname, 'pg_')
  AND n.nspname <> 'information_schema'
ORDER BY n.nspname COLLATE "C", c.relname COLLATE "C";

-- name: columns
SELECT a.attrelid::bigint AS relation,
       a.attnum::int AS number,
       a.attname::text AS name,
       format_type(a.atttypid, a.atttypmod) AS type,
       a.atttypid::bigint AS type_oid,
       ((a.attnotnull AND NOT EXISTS (
           -- a NOT NULL that was added NOT VALID (18 and later) promises nothing of older rows
           SELECT FROM pg_constraint AS k
           WHERE k.conrelid = a.attrelid AND k.contype = 'n' AND k.conkey = ARRAY[a.attnum]
             AND NOT k.convalidated
       )) OR t.typnotnull) AS not_null,
       a.attgenerated::text AS generated,
       a.attidentity::text AS identity,
       pg_get_expr(d.adbin, d.adrelid) AS expression,
       CASE WHEN a.attcollation <> 0 THEN format('%%I.%%I', cn.nspname, co.collname) END
           AS collation,
       coalesce(co.collisdeterministic, true) AS deterministic
FROM pg_attribute AS a
JOIN pg_class AS c ON c.oid = a.attrelid
JOIN pg_namespace AS n ON n.oid = c.relnamespace
JOIN pg_type AS t ON t.oid = a.atttypid
LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
LEFT JOIN pg_collation AS co ON co.oid = a.attcollation
LEFT JOIN pg_namespace AS cn ON cn.oid = co.collnamespace
WHERE a.attnum > 0
  AND NOT a.attisdropped
  AND a.attrelid = ANY(%(relations)s::oid[])
ORDER BY a.attrelid, a.attnum;

-- name: types
SELECT t.oid::bigint AS oid,
       n.nspname::text AS schema,
       format_type(t.oid, NULL) AS name,
       t.typtype::text AS kind,
       CASE WHEN t.typtype = 'd' THEN t.typbasetype::bigint END AS base,
       CASE WHEN t.typcategory = 'A' THEN t.typelem::bigint END AS element,
       ARRAY(
           SELECT a.atttypid::bigint FROM pg_attribute AS a
           WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0
             AND NOT a.attisdropped
           ORDER BY a.attnum
       ) AS attributes,
       (
           SELECT e.extname::text FROM pg_depend AS d
           JOIN pg_extension AS e ON e.oid = d.refobjid
           WHERE d.classid = 'pg_type'::regclass AND d.objid = t.oid AND d.deptype = 'e'
             AND d.refclassid = 'pg_extension'::regclass
           LIMIT 1
       ) AS extension,
       CASE t.typtype
           WHEN 'e' THEN 'enum of ' || coalesce((
               SELECT string_agg(quote_literal(l.enumlabel), ', ' ORDER BY l.enumsortorder)
               FROM pg_enum AS l WHERE l.enumtypid = t.oid), 'nothing')
           WHEN 'd' THEN 'domain over ' || format_type(t.typbasetype, t.typtypmod)
               || CASE WHEN t.typnotnull THEN ' NOT NULL' ELSE '' END
               || coalesce(' ' || (
                   SELECT string_agg(pg_get_constraintdef(k.oid), ' ' ORDER BY k.conname)
                   FROM pg_constraint AS k
                   WHERE k.contypid = t.oid AND k.contype = 'c'), '')
           WHEN 'c' THEN 'composite of ' || coalesce((
               SELECT string_agg(format('%%I %%s', a.attname,
                                        format_type(a.atttypid, a.atttypmod)),
                                 ', ' ORDER BY a.attnum)
               FROM pg_attribute AS a
               WHERE a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped), 'nothing')
           WHEN 'r' THEN 'range over ' || (
               SELECT format_type(r.rngsubtype, NULL) FROM pg_range AS r
               WHERE r.rngtypid = t.oid)
           ELSE 'base type'
       END AS definition
FROM pg_type AS t
JOIN pg_namespace AS n ON n.oid = t.typnamespace
WHERE NOT starts_with(n.nspname, 'pg_')
  AND n.nspname NOT IN ('information_schema', 'cellferry');

-- name: constraints
SELECT k.conrelid::bigint AS relation,
       k.conname::text AS name,
       k.contype::text AS kind,
       k.condeferrable AS deferrable,
       k.convalidated AS validated,
       coalesce((to_jsonb(k) ->> 'conenforced')::boolean, true) AS enforced,
       coalesce((to_jsonb(k) ->> 'conperiod')::boolean, false) AS temporal,
       k.conindid::bigint AS index,
       CASE WHEN k.confrelid <> 0 THEN k.confrelid::bigint END AS parent,
       k.confdeltype::text AS on_delete,
       k.conparentid <> 0 AS inherited,
       ARRAY(
           SELECT a.attname::text
           FROM unnest(k.conkey) WITH ORDINALITY AS c (number, position)
           JOIN pg_attribute AS a ON a.attrelid = k.conrelid AND a.attnum = c.number
           ORDER BY c.position
       ) AS columns,
       ARRAY(
           SELECT a.attname::text
           FROM unnest(k.confkey) WITH ORDINALITY AS c (number, position)
           JOIN pg_attribute AS a ON a.attrelid = k.confrelid AND a.attnum = c.number
           ORDER BY c.position
       ) AS parent_columns,
       ARRAY(
           SELECT format('OPERATOR(%%I.%%s)', n.nspname, o.oprname)
           FROM unnest(k.conexclop) WITH ORDINALITY AS c (operator, position)
           JOIN pg_operator AS o ON o.oid = c.operator
           JOIN pg_namespace AS n ON n.oid = o.oprnamespace
           ORDER BY c.position
       ) AS operators,
       pg_get_constraintdef(k.oid) AS definition
FROM pg_constraint AS k
WHERE k.contype IN ('p', 'u', 'x', 'f', 'c')
  AND k.conrelid = ANY(%(relations)s::oid[])
ORDER BY k.conrelid, k.conname COLLATE "C";

-- name: indexes
SELECT i.indrelid::bigint AS relation,
       i.indexrelid::bigint AS oid,
       c.relname::text AS name,
       i.indisprimary AS is_primary,
       i.indisexclusion AS is_exclusion,
       NOT i.indimmediate AS deferrable,
       i.indisvalid AS valid,
       coalesce((to_jsonb(i) ->> 'indnullsnotdistinct')::boolean, false) AS nulls_equal,
       ARRAY(
           SELECT coalesce(a.attname::text, '')
           FROM unnest(i.indkey::smallint[]) WITH ORDINALITY AS k (number, position)
           LEFT JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.number
           WHERE k.position <= i.indnkeyatts
           ORDER BY k.position
       ) AS columns,
       ARRAY(
           SELECT pg_get_indexdef(i.indexrelid, k.position, false)
           FROM generate_series(1, i.indnkeyatts) AS k (position)
           ORDER BY k.position
       ) AS expressions,
       pg_get_expr(i.indpred, i.indrelid) AS predicate,
       pg_get_indexdef(i.indexrelid) AS definition
FROM pg_index AS i
JOIN pg_class AS c ON c.oid = i.indexrelid
WHERE (i.indisunique OR i.indisexclusion)
  AND i.indrelid = ANY(%(relations)s::oid[])
ORDER BY i.indrelid, c.relname COLLATE "C";

-- name: leading_columns
SELECT DISTINCT i.indrelid::bigint AS relation, a.attname::text AS name
FROM pg_index AS i
JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
WHERE i.indisvalid
  AND i.indpred IS NULL
  AND i.indrelid = ANY(%(relations)s::oid[])
ORDER BY 1, 2;

-- name: triggers
SELECT t.tgrelid::bigint AS relation,
       t.tgname::text AS name,
       t.tgenabled::text AS enabled,
       pg_get_triggerdef(t.oid) AS definition
FROM pg_trigger AS t
WHERE NOT t.tgisinternal
  AND t.tgparentid = 0
  AND t.tgrelid = ANY(%(relations)s::oid[])
ORDER BY t.tgrelid, t.tgname COLLATE "C";

-- name: rules
SELECT r.ev_class::bigint AS relation,
       r.rulename::text AS name,
       r.ev_enabled::text AS enabled
FROM pg_rewrite AS r
WHERE r.rulename <> '_RETURN'
  AND r.ev_class = ANY(%(relations)s::oid[])
ORDER BY r.ev_class, r.rulename COLLATE "C";

-- name: sequences
SELECT n.nspname::text AS schema,
       c.relname::text AS name,
       s.seqmin AS minimum,
       s.seqmax AS maximum,
       s.seqincrement AS increment,
       use.relation::bigint AS relation,
       a.attname::text AS column
FROM pg_sequence AS s
JOIN pg_class AS c ON c.oid = s.seqrelid
JOIN pg_namespace AS n ON n.oid = c.relnamespace
JOIN (
    SELECT d.objid AS sequence, d.refobjid AS relation, d.refobjsubid AS number
    FROM pg_depend AS d
    WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass
      AND d.deptype IN ('a', 'i') AND d.refobjsubid > 0
    UNION
    SELECT d.refobjid, f.adrelid, f.adnum
    FROM pg_depend AS d
    JOIN pg_attrdef AS f ON f.oid = d.objid
    WHERE d.classid = 'pg_attrdef'::regclass AND d.refclassid = 'pg_class'::regclass
) AS use ON use.sequence = s.seqrelid
JOIN pg_attribute AS a ON a.attrelid = use.relation AND a.attnum = use.number
WHERE use.relation = ANY(%(relations)s::oid[])
ORDER BY n.nspname COLLATE "C", c.relname COLLATE "C", use.relation, use.number;

-- name: extensions
SELECT extname::text AS name, extversion AS version
FROM pg_extension
ORDER BY extname COLLATE "C";

-- name: database
SELECT current_database()::text AS name,
       current_setting('server_version_num')::int AS server_version,
       pg_encoding_to_char(d.encoding)::text AS encoding,
       coalesce(d.datcollate, '') AS collation,
       d.datlocprovider::text AS locale_provider,
       coalesce(to_jsonb(d) ->> 'daticulocale', to_jsonb(d) ->> 'datlocale', '') AS locale,
       coalesce(d.datcollversion, '') AS collation_version
FROM pg_database AS d
WHERE d.datname = current_database();
