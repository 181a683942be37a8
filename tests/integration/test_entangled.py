"""Tables whose rows are owned through each other: a clean-up leaves none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cellferry.model import Side
from cellferry.stores.postgres import cleaner
from fixtures.ferry import ferry_with
from fixtures.postgres import FreshDatabases

TABLES = """
CREATE TABLE public.boxes (
    id bigint PRIMARY KEY,
    organization_id bigint REFERENCES public.organizations,
    shelf_id bigint
);
CREATE TABLE public.shelves (
    id bigint PRIMARY KEY,
    organization_id bigint REFERENCES public.organizations,
    box_id bigint REFERENCES public.boxes
);
ALTER TABLE public.boxes ADD FOREIGN KEY (shelf_id) REFERENCES public.shelves;
CREATE TABLE public.labels (
    id bigint PRIMARY KEY,
    box_id bigint NOT NULL REFERENCES public.boxes
);
"""
MAP = """
tables:
  public.boxes:
    owners:
      - {column: organization_id}
      - {through: public.shelves, columns: [shelf_id]}
  public.shelves:
    owners:
      - {column: organization_id}
      - {through: public.boxes, columns: [box_id]}
"""
ROWS = """
INSERT INTO boxes SELECT n, 1 FROM generate_series(1, 20) AS n;
INSERT INTO shelves SELECT 100 + n, NULL, n FROM generate_series(1, 20) AS n;
INSERT INTO shelves SELECT 200 + n, 1, NULL FROM generate_series(1, 20) AS n;
INSERT INTO boxes SELECT 20 + n, NULL, 200 + n FROM generate_series(1, 20) AS n;
INSERT INTO labels SELECT n, n FROM generate_series(1, 40) AS n;
INSERT INTO boxes VALUES (90, 2);
INSERT INTO shelves VALUES (190, NULL, 90);
INSERT INTO labels VALUES (90, 90);
"""
COUNTS = """
SELECT ARRAY(SELECT id FROM boxes ORDER BY 1), ARRAY(SELECT id FROM shelves ORDER BY 1),
    ARRAY(SELECT id FROM labels ORDER BY 1)
"""
MOVED = ([*range(1, 41)], [*range(101, 121), *range(201, 221)], [*range(1, 42)])
LEFT = ([90], [190], [90])


def test_a_clean_up_leaves_no_row_of_them(
    fresh_databases: Callable[[], FreshDatabases], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleaner, "BATCH", 7)
    monkeypatch.setattr(cleaner, "LEAST", 7)
    ferry = ferry_with(fresh_databases(), TABLES, tmp_path / "map.yaml", MAP)
    ferry.run(Side.SOURCE, ROWS)
    with ferry.opened() as move:
        move.open_capture()
        move.copy()
        assert move.verify().ok
        move.catch_up()
        ferry.run(Side.SOURCE, "INSERT INTO labels VALUES (41, 40)")
        move.freeze(60.0)
        move.finish()
        move.hand_over()
        move.release()
        assert ferry.run(Side.DESTINATION, COUNTS) == [MOVED]
        move.cleanup(Side.SOURCE)
        assert ferry.run(Side.SOURCE, COUNTS) == [LEFT]
