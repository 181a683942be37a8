-- Makes one organization with about `wanted` rows, on the server: faster than sending them.
-- Run with session_replication_role = replica; counters that triggers keep are set here.
-- Rows called hot-… (external_ref) are changed by writers; all others never are.
CREATE FUNCTION pg_temp.next_ids(relation regclass, wanted bigint) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    sequence text := pg_get_serial_sequence(relation::text, 'id');
    first bigint := nextval(sequence::regclass);
BEGIN
    PERFORM setval(sequence::regclass, first + wanted);
    RETURN first;
END $$;

CREATE FUNCTION pg_temp.seed_organization(org bigint, org_slug text, wanted integer, hot integer)
RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    n_users integer := greatest(3, wanted / 400);
    n_groups integer := greatest(1, wanted / 5000);
    n_projects integer := greatest(2, wanted / 1500);
    n_labels integer := greatest(4, least(400, wanted / 100));
    n_issues integer := greatest(5, wanted * 20 / 100);
    n_notes integer := greatest(6, wanted * 37 / 100);
    n_links integer := greatest(3, wanted * 19 / 100);
    n_merges integer := greatest(2, wanted * 4 / 100);
    n_events integer := greatest(5, wanted * 13 / 100);
    n_emoji integer := greatest(2, wanted * 2 / 100);
    n_cards integer := greatest(4, least(500, wanted / 200));
    users0 bigint := pg_temp.next_ids('users', n_users);
    groups0 bigint := pg_temp.next_ids('namespaces', n_groups);
    projects0 bigint := pg_temp.next_ids('projects', n_projects);
    labels0 bigint := pg_temp.next_ids('labels', n_labels);
    issues0 bigint := pg_temp.next_ids('issues', n_issues);
    notes0 bigint := pg_temp.next_ids('notes', n_notes);
    links0 bigint := pg_temp.next_ids('label_links', n_links);
    merges0 bigint := pg_temp.next_ids('merge_requests', n_merges);
    events0 bigint := pg_temp.next_ids('events', n_events);
    emoji0 bigint := pg_temp.next_ids('award_emoji', n_emoji);
    audit0 bigint := pg_temp.next_ids('audit_entries', n_merges);
    total bigint;
BEGIN
    INSERT INTO organizations (id, slug, name, plan_id, settings)
    VALUES (org, org_slug, initcap(replace(org_slug, '-', ' ')), 1 + org % 3,
            jsonb_build_object('theme', 'light', 'seats', n_users));

    INSERT INTO users (id, email, name, preferred_languages)
    SELECT users0 + i, format('user-%s@%s.example.test', i, org_slug), format('User %s', i),
           ARRAY['en', CASE i % 3 WHEN 0 THEN 'de' WHEN 1 THEN 'ja' ELSE 'pt' END]
    FROM generate_series(0, n_users - 1) AS i;
    INSERT INTO memberships (organization_id, user_id, access_level)
    SELECT org, users0 + i, (ARRAY[10, 30, 40, 50])[1 + i % 4]
    FROM generate_series(0, n_users - 1) AS i
    UNION ALL
    -- consultants work for several organizations
    SELECT org, -(1 + (org + i) % 20), 20 FROM generate_series(0, 2) AS i;

    INSERT INTO namespaces (id, organization_id, parent_id, path, traversal_ids)
    SELECT groups0 + i, org, CASE WHEN i > 0 THEN groups0 + (i - 1) / 3 END,
           format('group-%s', i), ARRAY[groups0, groups0 + i]
    FROM generate_series(0, n_groups - 1) AS i;
    -- project 0 is hot: writers change what is in it
    INSERT INTO projects (id, organization_id, namespace_id, path, external_ref, settings)
    SELECT projects0 + i, org, groups0 + i % n_groups, format('project-%s', i),
           CASE WHEN i < 1 THEN format('hot-%s-%s', org, i) END, jsonb_build_object('wiki', i % 2 = 0)
    FROM generate_series(0, n_projects - 1) AS i;
    INSERT INTO project_statistics (project_id, page_views)
    SELECT projects0 + i, 0 FROM generate_series(0, n_projects - 1) AS i;

    INSERT INTO labels (id, organization_id, title, color, "position")
    SELECT labels0 + i, org, format('label %s', i), format('#%s', lpad(to_hex(i), 6, '0')), i
    FROM generate_series(0, n_labels - 1) AS i;

    -- hot issues are spread over the whole range of keys, so that copied chunks change too
    INSERT INTO issues (id, organization_id, project_id, iid, author_id, title, state, tags,
                        custom_fields, weight, external_ref, created_at, updated_at)
    SELECT issues0 + i, org,
           projects0 + CASE WHEN h THEN 0 ELSE 1 + i % (n_projects - 1) END, i + 1,
           users0 + i % n_users, format('Issue %s of %s', i, org_slug),
           (ARRAY['opened', 'closed', 'locked']::issue_state[])[1 + i % 3],
           ARRAY['t' || i % 7, 'u' || i % 11],
           jsonb_build_object('priority', i % 5, 'customer', md5(i::text)),
           (i % 100) / 4.0, CASE WHEN h THEN format('hot-%s-%s', org, i) END,
           now() - i % 500 * interval '1 day', now() - i % 500 * interval '1 day'
    FROM (SELECT i, i % greatest(2, n_issues / greatest(1, hot)) = 1 AS h
          FROM generate_series(0, n_issues - 1) AS i) AS one;
    UPDATE projects AS p SET issues_count = counted.n, latest_issue_id = counted.latest
    FROM (SELECT project_id, count(*) AS n, max(id) AS latest FROM issues
          WHERE organization_id = org GROUP BY project_id) AS counted
    WHERE p.id = counted.project_id;

    -- one note in 400 is large enough to be stored apart
    INSERT INTO notes (id, project_id, author_id, noteable_type, noteable_id, body)
    SELECT notes0 + i, projects0 + 1 + i % (n_projects - 1), users0 + i % n_users, 'Issue',
           issues0 + i % n_issues,
           CASE WHEN i % 400 = 0
                THEN (SELECT string_agg(md5((i * 1000 + part)::text), '')
                      FROM generate_series(1, 500) AS part)
                ELSE format('Note %s: %s', i, repeat(md5(i::text) || ' ', 1 + i % 6)) END
    FROM generate_series(0, n_notes - 1) AS i;

    INSERT INTO label_links (id, label_id, issue_id)
    SELECT links0 + i, labels0 + (i + i / n_issues) % n_labels, issues0 + i % n_issues
    FROM generate_series(0, n_links - 1) AS i
    -- hot issues are deleted and keyed anew: no cold row may hang on them
    WHERE NOT EXISTS (SELECT FROM issues WHERE id = issues0 + i % n_issues
                      AND external_ref IS NOT NULL);

    INSERT INTO merge_requests (id, project_id, iid, author_id, title, reviewer_ids, merge_params)
    SELECT merges0 + i, projects0 + 1 + i % (n_projects - 1), i + 1, users0 + i % n_users,
           format('Merge %s', i), ARRAY[users0, users0 + i % n_users],
           jsonb_build_object('squash', i % 2 = 0)
    FROM generate_series(0, n_merges - 1) AS i;
    INSERT INTO merge_request_diffs (merge_request_id, relative_order, head_sha, diff)
    SELECT merges0 + i, 0, decode(md5(i::text), 'hex'),
           decode(repeat(md5(format('diff %s', i)), 20), 'hex')
    FROM generate_series(0, n_merges - 1) AS i;
    INSERT INTO audit_entries (id, merge_request_id, lock_version, details)
    OVERRIDING SYSTEM VALUE
    SELECT audit0 + i, merges0 + i, 0, '{}' FROM generate_series(0, n_merges - 1) AS i;
    INSERT INTO award_emoji (id, awardable_type, awardable_id, user_id, name)
    SELECT emoji0 + i, CASE WHEN i % 2 = 0 THEN 'MergeRequest' ELSE 'Issue' END,
           CASE WHEN i % 2 = 0 THEN merges0 + i % n_merges ELSE issues0 + i % n_issues END,
           users0 + i % n_users, (ARRAY['thumbsup', 'eyes', 'tada'])[1 + i % 3]
    FROM generate_series(0, n_emoji - 1) AS i
    WHERE i % 2 = 0 OR NOT EXISTS (SELECT FROM issues WHERE id = issues0 + i % n_issues
                                   AND external_ref IS NOT NULL);

    INSERT INTO board_cards (organization_id, board, slot, title)
    SELECT org, 'archive', i, format('Card %s', i) FROM generate_series(0, n_cards - 1) AS i;
    INSERT INTO preferences (organization_id, user_id, name, value)
    SELECT org, users0 + i, 'layout', jsonb_build_object('columns', ARRAY['title', 'state'])
    FROM generate_series(0, n_users - 1) AS i;
    INSERT INTO events (id, organization_id, project_id, author_id, action, payload, created_at)
    SELECT events0 + i, org, projects0 + 1 + i % (n_projects - 1), users0 + i % n_users,
           (ARRAY['pushed', 'commented', 'closed'])[1 + i % 3],
           jsonb_build_object('sha', md5(i::text)), now() - i % 500 * interval '1 day'
    FROM generate_series(0, n_events - 1) AS i;

    total := 1 + 3 * n_users + 3 + n_groups + 2 * n_projects + n_labels + n_issues + n_notes
             + n_links + 3 * n_merges + n_emoji + n_cards + n_events;
    RETURN total;
END $$;
