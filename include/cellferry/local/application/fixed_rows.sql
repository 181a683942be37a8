-- Rows that every cell has: the global table, and users that work for several organizations.
INSERT INTO plans (id, name, limits) VALUES
    (1, 'free', '{"projects": 10}'),
    (2, 'premium', '{"projects": 1000}'),
    (3, 'ultimate', '{"projects": null}')
ON CONFLICT DO NOTHING;

INSERT INTO users (id, email, name, created_at)
SELECT -n, format('consultant-%s@example.test', n), format('Consultant %s', n), '2025-01-01 Z'
FROM generate_series(1, 20) AS n
ON CONFLICT DO NOTHING;
