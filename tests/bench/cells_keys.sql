-- Keys, indexes and foreign keys of `cells_tables.sql`.
ALTER TABLE plans ADD PRIMARY KEY (id), ADD UNIQUE (name);
ALTER TABLE users ADD PRIMARY KEY (id), ADD UNIQUE (email);
ALTER TABLE organizations ADD PRIMARY KEY (id), ADD UNIQUE (slug),
    ADD FOREIGN KEY (plan_id) REFERENCES plans;

ALTER TABLE memberships ADD PRIMARY KEY (organization_id, user_id),
    ADD FOREIGN KEY (organization_id) REFERENCES organizations ON DELETE CASCADE,
    ADD FOREIGN KEY (user_id) REFERENCES users;
CREATE INDEX ON memberships (user_id);

ALTER TABLE projects ADD PRIMARY KEY (id), ADD UNIQUE (organization_id, path),
    ADD FOREIGN KEY (organization_id) REFERENCES organizations ON DELETE CASCADE;

ALTER TABLE labels ADD PRIMARY KEY (id), ADD UNIQUE (project_id, title),
    ADD FOREIGN KEY (organization_id) REFERENCES organizations ON DELETE CASCADE,
    ADD FOREIGN KEY (project_id) REFERENCES projects ON DELETE CASCADE;
CREATE INDEX ON labels (organization_id);

ALTER TABLE milestones ADD PRIMARY KEY (id), ADD UNIQUE (project_id, title),
    ADD FOREIGN KEY (organization_id) REFERENCES organizations ON DELETE CASCADE,
    ADD FOREIGN KEY (project_id) REFERENCES projects ON DELETE CASCADE;
CREATE INDEX ON milestones (organization_id);

ALTER TABLE issues ADD PRIMARY KEY (id), ADD UNIQUE (project_id, iid),
    ADD FOREIGN KEY (organization_id) REFERENCES organizations ON DELETE CASCADE,
    ADD FOREIGN KEY (project_id) REFERENCES projects ON DELETE CASCADE,
    ADD FOREIGN KEY (milestone_id) REFERENCES milestones ON DELETE SET NULL,
    ADD FOREIGN KEY (author_id) REFERENCES users;
CREATE INDEX ON issues (organization_id);
CREATE INDEX ON issues (milestone_id);
CREATE INDEX ON issues (author_id);

ALTER TABLE comments ADD PRIMARY KEY (id),
    ADD FOREIGN KEY (organization_id) REFERENCES organizations ON DELETE CASCADE,
    ADD FOREIGN KEY (issue_id) REFERENCES issues ON DELETE CASCADE,
    ADD FOREIGN KEY (author_id) REFERENCES users;
CREATE INDEX ON comments (organization_id);
CREATE INDEX ON comments (issue_id);
CREATE INDEX ON comments (author_id);

ALTER TABLE label_links ADD PRIMARY KEY (id), ADD UNIQUE (label_id, issue_id),
    ADD FOREIGN KEY (label_id) REFERENCES labels ON DELETE CASCADE,
    ADD FOREIGN KEY (issue_id) REFERENCES issues ON DELETE CASCADE;
CREATE INDEX ON label_links (issue_id);

ALTER TABLE reactions ADD PRIMARY KEY (id), ADD UNIQUE (comment_id, user_id, name),
    ADD FOREIGN KEY (organization_id) REFERENCES organizations ON DELETE CASCADE,
    ADD FOREIGN KEY (comment_id) REFERENCES comments ON DELETE CASCADE,
    ADD FOREIGN KEY (user_id) REFERENCES users;
CREATE INDEX ON reactions (organization_id);
CREATE INDEX ON reactions (user_id);

ALTER TABLE time_entries ADD PRIMARY KEY (id),
    ADD FOREIGN KEY (organization_id) REFERENCES organizations ON DELETE CASCADE,
    ADD FOREIGN KEY (issue_id) REFERENCES issues ON DELETE CASCADE,
    ADD FOREIGN KEY (user_id) REFERENCES users;
CREATE INDEX ON time_entries (organization_id, spent_on);
CREATE INDEX ON time_entries (issue_id);
CREATE INDEX ON time_entries (user_id);

ALTER TABLE merge_requests ADD PRIMARY KEY (id), ADD UNIQUE (project_id, iid),
    ADD FOREIGN KEY (organization_id) REFERENCES organizations ON DELETE CASCADE,
    ADD FOREIGN KEY (project_id) REFERENCES projects ON DELETE CASCADE,
    ADD FOREIGN KEY (author_id) REFERENCES users;
CREATE INDEX ON merge_requests (organization_id);
CREATE INDEX ON merge_requests (author_id);

ALTER TABLE merge_request_files ADD PRIMARY KEY (merge_request_id, "position"),
    ADD FOREIGN KEY (merge_request_id) REFERENCES merge_requests ON DELETE CASCADE;

ALTER TABLE attachments ADD PRIMARY KEY (id),
    ADD FOREIGN KEY (organization_id) REFERENCES organizations ON DELETE CASCADE,
    ADD FOREIGN KEY (issue_id) REFERENCES issues ON DELETE CASCADE;
CREATE INDEX ON attachments (organization_id);
CREATE INDEX ON attachments (issue_id);

ALTER TABLE events ADD PRIMARY KEY (id, created_at),
    ADD FOREIGN KEY (organization_id) REFERENCES organizations ON DELETE CASCADE,
    ADD FOREIGN KEY (project_id) REFERENCES projects ON DELETE CASCADE,
    ADD FOREIGN KEY (author_id) REFERENCES users;
CREATE INDEX ON events (organization_id, created_at);
CREATE INDEX ON events (project_id);

ALTER TABLE audit_entries ADD PRIMARY KEY (id),
    ADD FOREIGN KEY (organization_id) REFERENCES organizations ON DELETE CASCADE,
    ADD FOREIGN KEY (user_id) REFERENCES users;
CREATE INDEX ON audit_entries (organization_id, created_at);
