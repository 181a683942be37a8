-- A product like an error tracker: the organization is reached through the project, constraints
-- are deferred, uniqueness is composite, e-mail addresses ignore case, and the organization's key
-- is a domain over uuid.
CREATE EXTENSION IF NOT EXISTS citext;
CREATE SCHEMA core;
CREATE SCHEMA nodes;
CREATE DOMAIN core.org_id AS uuid NOT NULL;
CREATE TYPE core.level AS ENUM ('debug', 'error');

CREATE TABLE core.organization (id core.org_id PRIMARY KEY, slug citext NOT NULL UNIQUE);
CREATE TABLE core.person (id bigserial PRIMARY KEY, email citext NOT NULL UNIQUE,
    levels core.level[]);
CREATE TABLE core.membership (id bigserial PRIMARY KEY,
    organization_id core.org_id REFERENCES core.organization DEFERRABLE INITIALLY DEFERRED,
    person_id bigint REFERENCES core.person DEFERRABLE INITIALLY DEFERRED,
    inviter_id bigint REFERENCES core.membership DEFERRABLE INITIALLY DEFERRED,
    UNIQUE (organization_id, person_id));
CREATE TABLE core.project (id bigserial PRIMARY KEY,
    organization_id core.org_id REFERENCES core.organization DEFERRABLE INITIALLY DEFERRED,
    slug varchar(50), rank int, UNIQUE (organization_id, slug),
    UNIQUE (organization_id, rank) DEFERRABLE INITIALLY DEFERRED);
CREATE TABLE core.release (organization_id core.org_id, version varchar(250) NOT NULL,
    PRIMARY KEY (organization_id, version),
    FOREIGN KEY (organization_id) REFERENCES core.organization);
CREATE TABLE core.release_project (organization_id uuid NOT NULL, version varchar(250) NOT NULL,
    project_id bigint NOT NULL REFERENCES core.project,
    PRIMARY KEY (project_id, version),
    FOREIGN KEY (organization_id, version) REFERENCES core.release);
CREATE TABLE core.issue (id bigserial PRIMARY KEY,
    project_id bigint NOT NULL REFERENCES core.project DEFERRABLE INITIALLY DEFERRED,
    first_release varchar(250), level core.level NOT NULL DEFAULT 'error', short_id bigint,
    UNIQUE (project_id, short_id));
CREATE TABLE core.event (project_id bigint NOT NULL REFERENCES core.project,
    issue_id bigint NOT NULL REFERENCES core.issue ON DELETE CASCADE, at timestamptz NOT NULL,
    event_id uuid NOT NULL, PRIMARY KEY (at, event_id)) PARTITION BY RANGE (at);
CREATE TABLE nodes.event_now PARTITION OF core.event DEFAULT;
CREATE TABLE nodes.node (id varchar(40) PRIMARY KEY, event_issue bigint, data text NOT NULL);
CREATE TABLE core.relay (id bigserial PRIMARY KEY, public_key text NOT NULL UNIQUE);

INSERT INTO core.organization VALUES ('00000000-0000-0000-0000-00000000000a', 'Acme'),
    ('00000000-0000-0000-0000-00000000000b', 'Globex');
INSERT INTO core.person (id, email) VALUES (1, 'Ann@example.org');
INSERT INTO core.membership (id, organization_id, person_id)
    SELECT row_number() OVER (ORDER BY id::uuid), id, 1 FROM core.organization;
INSERT INTO core.project (id, organization_id, slug)
    SELECT row_number() OVER (ORDER BY id::uuid), id, 'web' FROM core.organization;
INSERT INTO core.release SELECT id, '1.0' FROM core.organization;
INSERT INTO core.release_project SELECT organization_id, '1.0', id FROM core.project;
INSERT INTO core.issue (id, project_id, short_id) SELECT id, id, 1 FROM core.project;
INSERT INTO core.event SELECT project_id, id, now(), gen_random_uuid() FROM core.issue;
INSERT INTO nodes.node SELECT 'n' || id, id, 'data' FROM core.issue;
