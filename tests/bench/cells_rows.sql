-- Fills one table after the other; row i of every table belongs to owner(i), so that the
-- organizations' rows lie between each other. A parent table's count is a multiple of the period
-- of owner(i): row i's parent, i modulo that count, has the same owner.
-- Placeholders: the cell's first id, and the number of rows of each table.
INSERT INTO plans VALUES (1, 'free'), (2, 'premium'), (3, 'ultimate');

INSERT INTO users (id, email, name, created_at)
SELECT {base} + i, format('user-%s@%s.example.test', i, {base}), format('User %s', i),
       '2026-01-01 Z'
FROM generate_series(0, {users} - 1) AS i;

INSERT INTO organizations (id, slug, plan_id, settings)
SELECT id, format('organization-%s', id), 1 + id % 3, jsonb_build_object('theme', 'light')
FROM (SELECT DISTINCT pg_temp.owner(i) AS id FROM generate_series(0, {period} - 1) AS i) AS o;

INSERT INTO memberships (organization_id, user_id, access_level)
SELECT pg_temp.owner(i), {base} + i, 10 + i % 4 * 10 FROM generate_series(0, {users} - 1) AS i;

INSERT INTO projects (id, organization_id, path, settings)
SELECT {base} + i, pg_temp.owner(i), format('project-%s', i), jsonb_build_object('wiki', i % 2 = 0)
FROM generate_series(0, {projects} - 1) AS i;

INSERT INTO labels (id, organization_id, project_id, title)
SELECT {base} + i, pg_temp.owner(i), {base} + i % {projects}, format('label %s', i)
FROM generate_series(0, {labels} - 1) AS i;

INSERT INTO milestones (id, organization_id, project_id, title, due_on)
SELECT {base} + i, pg_temp.owner(i), {base} + i % {projects}, format('milestone %s', i),
       '2026-01-01'::date + (i % 300)::integer
FROM generate_series(0, {milestones} - 1) AS i;

INSERT INTO issues (id, organization_id, project_id, milestone_id, author_id, iid, title, tags,
                    custom_fields, weight, created_at)
SELECT {base} + i, pg_temp.owner(i), {base} + i % {projects}, {base} + i % {milestones},
       {base} + i % {users}, i, format('Issue %s of this organization', i),
       ARRAY['t' || i % 7, 'u' || i % 11],
       jsonb_build_object('priority', i % 5, 'customer', md5(i::text)), (i % 100) / 4.0,
       '2025-01-01 Z'::timestamptz + i % 500 * interval '1 day'
FROM generate_series(0, {issues} - 1) AS i;

INSERT INTO comments (id, organization_id, issue_id, author_id, body, created_at)
SELECT {base} + i, pg_temp.owner(i), {base} + i % {issues}, {base} + i % {users},
       format('Comment %s: %s', i, repeat(md5(i::text) || ' ', (1 + i % 6)::integer)),
       '2025-01-01 Z'::timestamptz + i % 500 * interval '1 day'
FROM generate_series(0, {comments} - 1) AS i;

INSERT INTO label_links (id, label_id, issue_id)
SELECT {base} + i, {base} + (i + i / {issues} * {period}) % {labels}, {base} + i % {issues}
FROM generate_series(0, {label_links} - 1) AS i;

INSERT INTO reactions (id, organization_id, comment_id, user_id, name)
SELECT {base} + i, pg_temp.owner(i), {base} + i % {comments}, {base} + i % {users},
       (ARRAY['thumbsup', 'eyes', 'tada'])[1 + i % 3]
FROM generate_series(0, {reactions} - 1) AS i;

INSERT INTO time_entries (id, organization_id, issue_id, user_id, spent_on, hours, note)
SELECT {base} + i, pg_temp.owner(i), {base} + i % {issues}, {base} + i % {users},
       '2025-01-01'::date + (i % 500)::integer, (i % 32) / 4.0, format('work %s', i % 100)
FROM generate_series(0, {time_entries} - 1) AS i;

INSERT INTO merge_requests (id, organization_id, project_id, author_id, iid, title, reviewer_ids)
SELECT {base} + i, pg_temp.owner(i), {base} + i % {projects}, {base} + i % {users}, i,
       format('Merge %s', i), ARRAY[{base} + i % {users}]
FROM generate_series(0, {merge_requests} - 1) AS i;

INSERT INTO merge_request_files (merge_request_id, "position", path, diff)
SELECT {base} + i % {merge_requests}, i / {merge_requests}, format('src/%s.py', md5(i::text)),
       decode(repeat(md5(i::text), 12), 'hex')
FROM generate_series(0, {merge_request_files} - 1) AS i;

-- version 7 of UUIDs, in their layout: they grow with time
INSERT INTO attachments (id, organization_id, issue_id, file_name, content)
SELECT (lpad(to_hex({base} / 1000000 + i), 12, '0') || '7' || substr(md5(i::text), 14, 3) || '8'
        || substr(md5(i::text), 18, 15))::uuid,
       pg_temp.owner(i), {base} + i % {issues}, format('file-%s.png', i),
       decode(repeat(md5(i::text), 40), 'hex')
FROM generate_series(0, {attachments} - 1) AS i;

INSERT INTO events (id, organization_id, project_id, author_id, action, payload, created_at)
SELECT {base} + i, pg_temp.owner(i), {base} + i % {projects}, {base} + i % {users},
       (ARRAY['pushed', 'commented', 'closed'])[1 + i % 3],
       jsonb_build_object('sha', md5(i::text), 'ref', i % 9),
       '2025-01-01 Z'::timestamptz + i % 500 * interval '1 day'
FROM generate_series(0, {events} - 1) AS i;

INSERT INTO audit_entries (id, organization_id, user_id, details, address)
SELECT {base} + i, pg_temp.owner(i), {base} + i % {users},
       jsonb_build_object('what', 'login', 'n', i), '10.0.0.0'::inet + i % 65536
FROM generate_series(0, {audit_entries} - 1) AS i;
