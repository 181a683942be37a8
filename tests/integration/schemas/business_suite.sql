-- A product like a business suite: the company column is nullable (NULL means shared by all), every
-- row names who made it, many-to-many tables have no primary key, attachments hang on anything.
CREATE EXTENSION IF NOT EXISTS btree_gist;
CREATE DOMAIN money_amount AS numeric(16, 2) CHECK (VALUE >= 0);
CREATE TYPE address AS (street text, town text);

CREATE TABLE company (id serial PRIMARY KEY, name varchar NOT NULL,
    parent_id integer REFERENCES company);
CREATE TABLE account (id serial PRIMARY KEY, login varchar NOT NULL UNIQUE,
    company_id integer NOT NULL REFERENCES company);
CREATE TABLE country (id serial PRIMARY KEY, code char(2) NOT NULL UNIQUE);
CREATE TABLE partner (id serial PRIMARY KEY, company_id integer REFERENCES company,
    parent_id integer REFERENCES partner, country_id integer REFERENCES country,
    create_uid integer REFERENCES account, parent_path varchar, home address);
CREATE TABLE sale (id serial PRIMARY KEY, company_id integer NOT NULL REFERENCES company,
    partner_id integer NOT NULL REFERENCES partner, create_uid integer REFERENCES account,
    write_uid integer REFERENCES account, total money_amount NOT NULL);
CREATE TABLE sale_line (id serial PRIMARY KEY, sale_id integer NOT NULL
    REFERENCES sale ON DELETE CASCADE, company_id integer REFERENCES company, price money_amount);
CREATE TABLE tag (id serial PRIMARY KEY, company_id integer REFERENCES company, name varchar);
CREATE TABLE sale_tag_rel (sale_id integer NOT NULL REFERENCES sale ON DELETE CASCADE,
    tag_id integer NOT NULL REFERENCES tag ON DELETE CASCADE, UNIQUE (sale_id, tag_id));
CREATE TABLE attachment (id serial PRIMARY KEY, res_model varchar, res_id integer,
    company_id integer REFERENCES company, data bytea);
CREATE TABLE booking (id serial PRIMARY KEY, company_id integer NOT NULL REFERENCES company,
    room integer NOT NULL, during tstzrange NOT NULL,
    EXCLUDE USING gist (company_id WITH =, room WITH =, during WITH &&));
CREATE TABLE parameter (id serial PRIMARY KEY, key varchar NOT NULL UNIQUE, value text);

INSERT INTO company (id, name) VALUES (1, 'acme'), (2, 'globex');
INSERT INTO account (id, login, company_id) VALUES (1, 'ann', 1), (2, 'bob', 2);
INSERT INTO country (id, code) VALUES (1, 'DE');
INSERT INTO partner (id, company_id, country_id, create_uid) VALUES
    (1, 1, 1, 1), (2, 2, 1, 2), (3, NULL, 1, 1);
INSERT INTO sale (id, company_id, partner_id, create_uid, total) VALUES
    (1, 1, 1, 1, 5), (2, 2, 2, 1, 5);
INSERT INTO sale_line (id, sale_id, company_id, price) VALUES (1, 1, NULL, 5), (2, 2, 2, 5);
INSERT INTO tag (id, company_id, name) VALUES (1, 1, 'vip'), (2, 2, 'vip');
INSERT INTO sale_tag_rel VALUES (1, 1), (2, 2);
INSERT INTO attachment (id, res_model, res_id, company_id) VALUES
    (1, 'sale', 1, NULL), (2, 'partner', 2, NULL), (3, NULL, NULL, 1), (4, 'sale', 2, 1);
INSERT INTO booking (id, company_id, room, during) VALUES
    (1, 1, 1, '[2025-01-01, 2025-01-02)'), (2, 2, 1, '[2025-01-01, 2025-01-02)');
