-- Halts of three scopes: one migration, a cohort (the migrations of one wave), a cell. They are
-- sticky: only a person clears one, with a reason. And pauses, with since when.

ALTER TABLE topology.cell ADD COLUMN halted_by text, ADD COLUMN halted_at timestamptz;

CREATE TABLE topology.cohort (
    name          text PRIMARY KEY CHECK (name <> ''),
    halted        text,                      -- why no step of its migrations may run
    halted_by     text,
    halted_at     timestamptz,
    created_at    timestamptz NOT NULL DEFAULT now()
);

ALTER TABLE topology.migration
    ADD COLUMN cohort text REFERENCES topology.cohort,
    ADD COLUMN halted_at timestamptz,
    ADD COLUMN paused_at timestamptz;
CREATE INDEX migration_by_cohort ON topology.migration (cohort) WHERE cohort IS NOT NULL;
CREATE INDEX migration_halted ON topology.migration (id) WHERE halted IS NOT NULL;

-- Which migrations of a cohort failed since its last halt was cleared: each counts once.
CREATE TABLE topology.cohort_failure (
    cohort        text NOT NULL REFERENCES topology.cohort,
    migration     bigint NOT NULL REFERENCES topology.migration,
    step          text NOT NULL,
    reason        text NOT NULL,
    failed_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (cohort, migration)
);

-- Every halt that is set, whatever its scope.
CREATE VIEW topology.halt AS
    SELECT 'migration' AS scope, m.id::text AS name, m.halted AS reason, m.halted_by, m.halted_at
    FROM topology.migration AS m WHERE m.halted IS NOT NULL
    UNION ALL
    SELECT 'cohort', c.name, c.halted, c.halted_by, c.halted_at
    FROM topology.cohort AS c WHERE c.halted IS NOT NULL
    UNION ALL
    SELECT 'cell', c.name, c.halted, c.halted_by, c.halted_at
    FROM topology.cell AS c WHERE c.halted IS NOT NULL;

-- What a cell's server had counted at some moments, so that a rise of its errors can be seen.
CREATE TABLE topology.cell_activity (
    cell          text NOT NULL REFERENCES topology.cell,
    taken_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    counted       jsonb NOT NULL,
    PRIMARY KEY (cell, taken_at)
);
