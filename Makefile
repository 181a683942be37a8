# The commands people and scripts use. `make help` lists them.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: docs-check help venv demo test lint fleet-up fleet-down fleet-status lock docs clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

venv: $(STAMP) ## install into .venv, and nothing more

$(STAMP): requirements.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "cellferry needs Python 3.11 ($(PYTHON) not found); set PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep -E '^uv==' requirements.txt)"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

lock: ## compile requirements.txt from pyproject.toml
	$(BIN)/uv pip compile --quiet --all-extras --python-version 3.11 --no-header --no-emit-index-url -o requirements.txt pyproject.toml

lock-check: venv ## fail when requirements.txt and pyproject.toml differ
	@mkdir -p .local && cp requirements.txt .local/requirements.txt
	@$(BIN)/uv pip compile --quiet --all-extras --python-version 3.11 --no-header --no-emit-index-url -o .local/requirements.txt pyproject.toml
	@diff -u requirements.txt .local/requirements.txt || { echo "requirements.txt is not what pyproject.toml compiles to: run make lock"; exit 1; }

lint: venv lock-check ## ruff, mypy, import-linter, the lock
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

test: venv ## every test, on real servers
	$(BIN)/pytest

demo: venv ## from nothing to the report
	@$(BIN)/python -m cellferry.local.demo

docs: venv ## write the DAG reference from the DAGs
	@$(BIN)/python -m cellferry.orchestration.dag_reference

docs-check: venv ## fail when the DAG reference differs from the DAGs
	@$(BIN)/python -m cellferry.orchestration.dag_reference --check
