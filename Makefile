# Needs make and Python 3.11 or newer; no root.

# Whether a Python can create the environment; Debian's has `venv`, but not always `ensurepip`.
CHECK := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c '$(CHECK)' 2>/dev/null && echo $$python && break; done)
HOST ?= 127.0.0.1
PORT ?= 8000
REPLICA_PORT ?= 8001
PROMETHEUS_PORT ?= 9090
WORKERS ?= 1
PYTEST_ARGS ?= -n 6 --dist loadfile --no-loadscope-reorder
BIN := .venv/bin
AUDITOR := pip-audit==2.10.1

USABLE = "$(PYTHON)" -c '$(CHECK)' 2>/dev/null || { \
	echo "make: Python 3.11 or newer, with venv, is needed$(if $(PYTHON),: '$(PYTHON)' is not,; none was found)" >&2; exit 1; }
IDENTITY := import sys; print(sys.base_prefix, sys.version)
# Without caches of bytecode, each of the processes that the tests start would compile the package again.
unexport PYTHONDONTWRITEBYTECODE
# If PYTHON is given, .venv must have been created with it.
CHOSEN := $(if $(filter file,$(origin PYTHON)),,chosen)

.DEFAULT_GOAL := help
.PHONY: help run stack jaeger wheel check test lint format fuzz chaos bench audit clean chosen

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: .venv/.run ## Install the service and serve on 127.0.0.1:8000 with the embedded server
	$(BIN)/ktrdr serve --host $(HOST) --port $(PORT) --workers $(WORKERS)

stack: .venv/.run ## Run two replicas behind one address on 8000, with Prometheus if it is installed
	$(BIN)/python scripts/stack.py --port $(PORT) --replica-port $(REPLICA_PORT) --prometheus-port $(PROMETHEUS_PORT)

jaeger: .venv/.run ## Build Jaeger with Go (minutes, once), and find cycles on its query API by operation.id
	$(BIN)/python scripts/jaeger.py $(JAEGER_ARGS)

wheel: .venv/.made ## Build a wheel in dist/
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

check: .venv/.test lint ## Lint, check types, and run the unit tests (less than a minute): the inner loop
	$(BIN)/pytest -q -m unit -n 2

test: .venv/.test lint ## Lint, check types, and run the whole suite on real servers (minutes)
	$(BIN)/pytest $(PYTEST_ARGS)

lint: .venv/.test ## Check lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.test ## Format, and apply the fixes of the linter
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fuzz: .venv/.test ## Compare random histories with the reference model (minutes)
	KTRDR_EXAMPLES=2000 $(BIN)/pytest tests/model --timeout 3600

chaos: .venv/.test ## Inject faults into real servers under load, and write the table in docs/reliability.md (minutes)
	$(BIN)/python -m tests.chaos --markdown $(CHAOS_ARGS)

bench: .venv/.bench ## Run the benchmarks against peers, and write the table in docs/benchmarks.md
	$(BIN)/python -m benchmarks --markdown

audit: .venv/.test .venv/.audit ## Check the installed packages for known vulnerabilities; exit code 3: no network
	$(BIN)/python scripts/audit.py .venv/audit/bin/pip-audit

clean: ## Remove the output of the other targets, except data/
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/.made: | $(CHOSEN)
	@$(USABLE)
	@test ! -e .venv || { echo "make: .venv is incomplete or was not created by make: 'make clean' removes it" >&2; exit 1; }
	"$(PYTHON)" -m venv .venv || { rm -rf .venv; exit 1; }
	@touch $@

chosen:
	@$(USABLE)
	@test ! -e .venv/.made || test "$$("$(PYTHON)" -c '$(IDENTITY)')" = "$$($(BIN)/python -c '$(IDENTITY)')" || \
		{ echo "make: .venv was created with another Python than $(PYTHON): 'make clean' removes it" >&2; exit 1; }

.venv/.run: pyproject.toml Makefile | .venv/.made
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[fast,llm,server,tracing]'
	@touch $@

.venv/.test: pyproject.toml | .venv/.made
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@ .venv/.run

.venv/.bench: pyproject.toml .venv/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,bench]'
	@touch $@

.venv/.audit: Makefile | .venv/.made
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/python -m pip install --quiet --disable-pip-version-check '$(AUDITOR)'
	@touch $@
