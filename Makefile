# The commands people and scripts use. `make help` lists them.

# The first interpreter that really runs: a version manager's shim can be there and do not.
FITS := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for one in python3.11 python3 python3.12 python3.13 /usr/bin/python3; do \
	if "$$one" -c '$(FITS)' >/dev/null 2>&1; then echo "$$one"; break; fi; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: bench docs-check lock-check help venv demo demo-reshard test test-fault test-soak lint fleet-up fleet-down fleet-status lock docs clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

venv: $(STAMP) ## install into .venv, and nothing more

$(STAMP): requirements.txt pyproject.toml
	@"$(PYTHON)" -c '$(FITS)' || { echo "cellferry needs Python 3.11 to 3.13 with venv and pip ('$(PYTHON)' does not do); set PYTHON=..."; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
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

lint: venv lock-check docs-check ## ruff, mypy, import-linter, the lock
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

test: venv ## every test, on real servers: JOBS= processes at once (2)
	$(BIN)/pytest --numprocesses $(or $(JOBS),2) --dist loadfile --no-loadscope-reorder

test-fault: venv ## the whole kill matrix: SEED=, ONLY='text;text', JOBS=, SABOTAGE=
	@$(BIN)/python -m tests.fault.matrix $(if $(SEED),--seed $(SEED)) $(if $(ONLY),--only '$(ONLY)') \
		$(if $(JOBS),--jobs $(JOBS)) $(if $(SABOTAGE),--sabotage '$(SABOTAGE)')

test-soak: venv ## random faults for a while: MINUTES= (30), SEED=, SABOTAGE=
	@$(BIN)/python -m tests.fault.soak $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) \
		$(if $(SABOTAGE),--sabotage '$(SABOTAGE)')

bench: venv ## measure beside peers, write docs/benchmarks.md: ONLY=copying,pause, SCALE=, RUNS=
	@$(BIN)/python -m tests.bench $(if $(ONLY),--only '$(ONLY)') $(if $(SCALE),--scale $(SCALE)) \
		$(if $(RUNS),--runs $(RUNS))

demo: venv ## from nothing to the report
	@$(BIN)/python -m cellferry.local.demo

demo-reshard: venv ## re-shard 3 → 4 under load: WAY=4-3, KEYS=, CLIENTS=, IDS_PER_S=, KILL=1, ROLL_BACK=1
	@$(BIN)/python -m cellferry.local.reshard_demo

docs: venv ## write the DAG reference from the DAGs
	@$(BIN)/python -m cellferry.orchestration.dag_reference

docs-check: venv ## fail when the DAG reference differs from the DAGs
	@$(BIN)/python -m cellferry.orchestration.dag_reference --check

fleet-up: venv ## start three cells, the topology and Airflow in the background
	@$(BIN)/python -m cellferry.local.fleet_command up

fleet-down: ## stop the fleet; its data stay
	@! test -x $(BIN)/python || $(BIN)/python -m cellferry.local.fleet_command down

fleet-status: venv ## show every component of the fleet, and its health
	@$(BIN)/python -m cellferry.local.fleet_command status

clean: ## stop the fleet, delete its data and the virtual environment
	@! test -x $(BIN)/python || $(BIN)/python -m cellferry.local.fleet_command wipe
	rm -rf $(VENV) .local
