-- A product like a team chat: integer realms, but few declared constraints; ids of messages are
-- text; case-insensitive unique names; the largest table is reached through the people of a realm.
CREATE TABLE realms (
    id integer PRIMARY KEY,
    "string_id" varchar(40) NOT NULL UNIQUE,
    date_created timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE clients (id integer PRIMARY KEY, name varchar(30) NOT NULL UNIQUE);
CREATE TABLE members (
    id char(26) PRIMARY KEY,
    realm_id integer NOT NULL,
    "eMail" varchar(254) NOT NULL,
    is_bot boolean NOT NULL DEFAULT false
);
CREATE UNIQUE INDEX members_email ON members (realm_id, upper("eMail"));
CREATE TABLE channels (
    id char(26) PRIMARY KEY,
    realm_id integer NOT NULL,
    name varchar(60) NOT NULL,
    header jsonb NOT NULL DEFAULT '{}'
);
CREATE TABLE messages (
    id char(26) PRIMARY KEY,
    channel_id char(26) NOT NULL,
    sender_id char(26) NOT NULL,
    client_id integer NOT NULL REFERENCES clients,
    root_id char(26),
    body text NOT NULL,
    words tsvector GENERATED ALWAYS AS (to_tsvector('simple', body)) STORED
);
CREATE TABLE inbox (
    member_id char(26) NOT NULL,
    message_id char(26) NOT NULL,
    flags bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (member_id, message_id)
);
CREATE TABLE preferences (
    member_id char(26) NOT NULL,
    category varchar(32) NOT NULL,
    name varchar(32) NOT NULL,
    value text,
    CONSTRAINT preferences_key UNIQUE (member_id, category, name)
);
CREATE UNLOGGED TABLE presence (member_id char(26) PRIMARY KEY, seen timestamptz NOT NULL);
CREATE TABLE schema_log (version integer PRIMARY KEY, at timestamptz NOT NULL DEFAULT now());
CREATE TABLE "order" (
    "select" uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    realm_id integer NOT NULL,
    "Amount %" numeric(12, 2) NOT NULL
);

INSERT INTO realms (id, string_id) VALUES (1, 'acme'), (2, 'globex');
INSERT INTO clients VALUES (1, 'web');
INSERT INTO members (id, realm_id, "eMail") VALUES
    (repeat('a', 26), 1, 'Ann@example.org'), (repeat('b', 26), 2, 'ann@example.org');
INSERT INTO channels (id, realm_id, name) VALUES
    (repeat('c', 26), 1, 'town'), (repeat('d', 26), 2, 'town');
INSERT INTO messages (id, channel_id, sender_id, client_id, body) VALUES
    (repeat('m', 26), repeat('c', 26), repeat('a', 26), 1, 'hello'),
    (repeat('n', 26), repeat('d', 26), repeat('b', 26), 1, 'hello');
INSERT INTO inbox (member_id, message_id) VALUES
    (repeat('a', 26), repeat('m', 26)), (repeat('b', 26), repeat('n', 26));
INSERT INTO preferences VALUES (repeat('a', 26), 'look', 'theme', 'dark');
INSERT INTO presence VALUES (repeat('a', 26), now());
INSERT INTO "order" (realm_id, "Amount %") VALUES (1, 9.99), (2, 1);
