"""Writes docs/dag-reference.md from the DAGs themselves, or checks that it is up to date.

::

    python -m cellferry.orchestration.dag_reference [--check] [--dags dags] [--file docs/…]
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from cellferry.orchestration.progress import duration

HEAD = """\
# DAG reference

<!-- Generated from the DAGs by `make docs`; do not edit. `make docs-check` compares. -->

Every DAG checks its Params strictly in its first task, and its last task reports. Times are in
seconds unless the name says `_ms`.
"""


def load_dags(folder: Path) -> list[Any]:
    """Return the DAGs of the files in `folder`, by id.

    Raises:
        ClickException: a file cannot be imported.
    """
    logging.disable(logging.CRITICAL)
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(folder), collect_dags=False)
    bag.collect_dags(str(folder))
    if bag.import_errors:
        raise click.ClickException("\n".join(f"{k}: {v}" for k, v in bag.import_errors.items()))
    return [bag.dags[name] for name in sorted(bag.dags)]


def render(dags: list[Any]) -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *("\n".join(_render_dag(dag)) for dag in dags)])


def _render_dag(dag: Any) -> Iterator[str]:
    yield f"## `{dag.dag_id}`"
    yield ""
    yield str(dag.doc_md).strip()
    yield ""
    yield f"Schedule: {_schedule(dag)}. At most {dag.max_active_runs} run(s) at once."
    yield ""
    yield "### Params"
    yield ""
    yield "| Param | Type | Default | Bounds | Meaning |"
    yield "|---|---|---|---|---|"
    for name in dag.params:
        param = dag.params.get_param(name)
        yield _row(f"`{name}`", _type(param), _default(param), _bounds(param), param.description)
    yield ""
    yield "### Tasks"
    yield ""
    yield "| Task | After | What it does | Tries |"
    yield "|---|---|---|---|"
    for task in dag.topological_sort():
        before = ", ".join(f"`{name}`" for name in _direct(dag, task)) or "-"
        each = " (for each)" if task.get_closest_mapped_task_group() or _is_mapped(task) else ""
        yield _row(f"`{task.task_id}`{each}", before, _what(task), _tries(task))
    yield ""


def _direct(dag: Any, task: Any) -> list[str]:
    """Return the upstream tasks that no other upstream task stands behind."""
    upstream = set(task.upstream_task_ids)
    behind = {
        name
        for other in upstream
        for name in dag.get_task(other).get_flat_relative_ids(upstream=True)
    }
    return sorted(upstream - behind)


def _is_mapped(task: Any) -> bool:
    return bool(getattr(task, "is_mapped", False))


def _what(task: Any) -> str:
    function = getattr(task, "python_callable", None)
    if function is None and _is_mapped(task):
        function = task.partial_kwargs.get("python_callable") or task.op_kwargs_expand_input
    documented = function if getattr(function, "__doc__", None) else type(task)
    text = re.split(r"\n\s*\n", (documented.__doc__ or "").strip())[0]
    return " ".join(text.split())


def _tries(task: Any) -> str:
    if not task.retries:
        return "1"
    delay: timedelta = task.retry_delay
    return f"{task.retries + 1}, first after {duration(delay.total_seconds())}, doubling"


def _schedule(dag: Any) -> str:
    schedule = dag.schedule
    if schedule is None:
        return "none; a person or another run triggers it"
    if isinstance(schedule, timedelta):
        return f"every {duration(schedule.total_seconds())}"
    return f"`{schedule}`"


def _type(param: Any) -> str:
    schema: Mapping[str, Any] = param.schema
    if "enum" in schema:
        return " / ".join(f"`{choice}`" for choice in schema["enum"])
    kind = schema.get("type", "any")
    names = [kind] if isinstance(kind, str) else list(kind)
    text = " or ".join("empty" if name == "null" else name for name in names)
    return f"{text} of {schema['items']['type']}" if "items" in schema else text


def _default(param: Any) -> str:
    if not param.has_value:
        return "empty" if "null" in param.schema.get("type", "") else "required"
    if param.value == []:
        return "required" if param.schema.get("minItems") else "empty"
    return f"`{str(param.value).lower() if isinstance(param.value, bool) else param.value}`"


def _bounds(param: Any) -> str:
    schema: Mapping[str, Any] = param.schema
    texts = [
        text.format(schema[name])
        for name, text in (
            ("minItems", "at least {:,}"),
            ("maxItems", "at most {:,}"),
            ("exclusiveMinimum", "over {:,}"),
            ("minimum", "from {:,}"),
            ("maximum", "to {:,}"),
            ("minLength", "at least {:,} characters"),
            ("maxLength", "at most {:,} characters"),
        )
        if name in schema and (name, schema[name]) != ("minLength", 1)
    ]
    if schema.get("uniqueItems"):
        texts.append("no duplicates")
    return ", ".join(texts)


def _row(*cells: Any) -> str:
    texts = (" ".join(str(cell or "").split()).replace("|", "\\|") for cell in cells)
    return "| " + " | ".join(texts) + " |"


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; fail when the file differs.")
@click.option("--dags", type=click.Path(path_type=Path, exists=True), default=Path("dags"))
@click.option("--file", type=click.Path(path_type=Path), default=Path("docs/dag-reference.md"))
def main(*, check: bool, dags: Path, file: Path) -> None:
    """Write the DAG reference, or check it."""
    with tempfile.TemporaryDirectory(prefix="cellferry-docs-") as home:
        # importing Airflow writes a configuration into its home
        os.environ["AIRFLOW_HOME"] = home
        text = render(load_dags(dags))
    if not check:
        file.write_text(text, encoding="utf-8")
        click.echo(f"wrote {file}")
        return
    present = file.read_text(encoding="utf-8") if file.exists() else ""
    if present != text:
        difference = difflib.unified_diff(
            present.splitlines(), text.splitlines(), str(file), "from the DAGs", lineterm=""
        )
        raise click.ClickException(
            "\n".join([f"{file} is not up to date; run `make docs`", *difference])
        )
    click.echo(f"{file} is up to date")


if __name__ == "__main__":
    main()
