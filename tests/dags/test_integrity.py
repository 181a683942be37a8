"""The DAG files load, quickly, without the library's weight, and the same each time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

IDS = [
    *("clean_up_organizations", "migrate_organizations", "prepare_cell", "reap_cells"),
    *("reshard", "reverse_rounds"),
    *("roll_back_organizations", "roll_back_resharding", "steer_organizations"),
]

#: Loads the DAG files as the DAG processor does, and says what that took and gave.
LOAD = """
import json, sys, time
from airflow.dag_processing.dagbag import DagBag
import airflow.providers.standard.operators.trigger_dagrun
before = set(sys.modules)
started = time.process_time()
bag = DagBag(sys.argv[1])
seconds = time.process_time() - started
modules = sorted(set(sys.modules) - before)
from airflow.serialization.serialized_objects import DagSerialization
from airflow.models.serialized_dag import SerializedDagModel
hashes = {
    name: SerializedDagModel.hash(DagSerialization.to_dict(dag)) for name, dag in bag.dags.items()
}
print("RESULT" + json.dumps({
    "seconds": seconds, "modules": modules, "hashes": hashes,
}))
"""


def load_in_new_process(root: Path, home: Path, seed: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(root / "dags")],
        env={
            **os.environ,
            "PYTHONHASHSEED": seed,
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__CORE__PLUGINS_FOLDER": str(root / "plugins"),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


@pytest.fixture(scope="module")
def loaded(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    home = tmp_path_factory.mktemp("airflow")
    return [load_in_new_process(root, home, seed) for seed in ("1", "2")]


def test_every_dag_file_loads(bag: Any) -> None:
    assert not bag.import_errors
    assert sorted(bag.dags) == IDS


def test_loading_takes_little_time(loaded: list[dict[str, Any]]) -> None:
    # the DAG processor and every task process load them: 0.1 s here, on one busy core
    assert min(one["seconds"] for one in loaded) < 1.0


@pytest.mark.parametrize(
    "heavy",
    [
        "cellferry.migration",
        "cellferry.shards",
        "cellferry.topology",
        "cellferry.stores",
        "psycopg",
        "redis",
        "hiredis",
        "numpy",
        "pandas",
        "rich",
    ],
)
def test_loading_does_not_import(loaded: list[dict[str, Any]], heavy: str) -> None:
    imported = [name for name in loaded[0]["modules"] if name.split(".")[0] != "airflow"]
    assert [one for one in imported if one == heavy or one.startswith(f"{heavy}.")] == []


@pytest.mark.parametrize("dag_id", IDS)
def test_serialization_is_the_same_each_time(loaded: list[dict[str, Any]], dag_id: str) -> None:
    # one that differs makes a new DAG version with every start of the DAG processor
    assert loaded[0]["hashes"][dag_id] == loaded[1]["hashes"][dag_id]


def test_plugin_loads(root: Path) -> None:
    source = (root / "plugins" / "cellferry_plugin.py").read_text(encoding="utf-8")
    module: dict[str, Any] = {"__name__": "cellferry_plugin"}
    exec(compile(source, "cellferry_plugin.py", "exec"), module)
    assert module["CellferryPlugin"].name == "cellferry"


def test_importing_cellferry_imports_no_airflow() -> None:
    subprocess.run(
        [sys.executable, "-c", "import cellferry, sys; sys.exit('airflow' in sys.modules)"],
        check=True,
    )


def test_reference_is_up_to_date(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cellferry.orchestration.dag_reference", "--check"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
