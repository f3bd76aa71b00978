# mltrading: `make` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export MLTRADING_ROOT := $(CURDIR)
unexport PYTHONDONTWRITEBYTECODE # a hundred processes import the package; it is made into bytecode once

.PHONY: help
help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  \033[1m%-10s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ------------------------------------------------------------------ set-up

$(READY): constraints.txt pyproject.toml
	@command -v git >/dev/null || { echo "git is needed: install it and run make again" >&2; exit 1; }
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11.5 or later is needed and '$(PYTHON)' was not found: install it, or name one with make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 5))' || { echo "Python 3.11.5 or later is needed and $(PYTHON) is $$($(PYTHON) -V 2>&1 | cut -d" " -f2): name a newer one with make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is needed and $(PYTHON) lacks it: install it (Debian, Ubuntu: apt install python3-venv) and run make again" >&2; exit 1; }
	@echo "Installing exact versions from constraints.txt into $(VENV) (once, some minutes) …"
	@$(PYTHON) -m venv $(VENV)
	@PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --progress-bar on -e '.[dev]'
	@echo "Fetching the archives that the embedded prices are rebuilt from (once, 50 MB) …"
	@$(BIN)/mltrading archives
	@touch $@

.PHONY: setup
setup: $(READY) ## create .venv with the exact versions of constraints.txt (the other targets call it)

# ------------------------------------------------------------------ the main job

.PHONY: repro
repro: $(READY) ## from the locked prices to reports/index.html; runs only what changed
	@$(BIN)/mltrading repro

DATA_OPTIONS := FROM SYMBOLS UNIVERSE START END FREQUENCY CALENDAR STAMP MANIFEST MACRO NEWS POLICY

.PHONY: data
data: $(READY) ## make a snapshot: SOURCE= FROM= SYMBOLS= UNIVERSE= START= END= … (see nbs/market/90_own_data.ipynb)
	@$(foreach v,$(filter-out SOURCE=% $(DATA_OPTIONS:%=%=%) PYTHON=%,$(MAKEOVERRIDES)),$(if $(findstring =,$(v)),echo "make data: unknown option $(v); there are: SOURCE $(DATA_OPTIONS)" >&2; exit 1;))
	@$(BIN)/mltrading data --source $(or $(SOURCE),embedded) $(foreach o,$(DATA_OPTIONS),$(if $($(o)),--$(shell echo $(o) | tr A-Z a-z) '$($(o))'))

.PHONY: universe
universe: $(READY) ## run all stages on symbols of your folder, into build/NAME: MLTRADING_DATA=… make universe NAME=published|etf230|etf65|sp500
	@$(BIN)/mltrading universe '$(NAME)'

.PHONY: audit
audit: $(READY) ## prove for every feature that it does not look ahead
	@test -d data || $(BIN)/dvc pull --quiet data
	@$(BIN)/mltrading audit

.PHONY: leaks
leaks: $(READY) ## plant leaks over the whole pipeline and count those that the audit finds
	@$(BIN)/mltrading leaks

.PHONY: smoke
smoke: $(READY) ## run every pipeline notebook once on a small configuration, into build/smoke
	@$(BIN)/mltrading run --profile smoke

# ------------------------------------------------------------------ tests

.PHONY: test
test: $(READY) ## everything that has to hold, in minutes
	@$(BIN)/python -m pytest -q -n 2 -m "not slow and not whole" $(ARGS)

.PHONY: test-all
test-all: test ## the long proofs and the pages' long cells, too
	@$(BIN)/python -m pytest -q -n 2 -m "slow or whole" $(ARGS)

.PHONY: coverage
coverage: $(READY) ## which lines of the package the tests reach
	@$(BIN)/python -m pytest -q -n 2 --cov --cov-report=term $(ARGS)

.PHONY: lint
lint: $(READY) ## ruff on notebooks and tests, mypy on the exported package
	@$(BIN)/ruff check nbs tests benchmarks
	@$(BIN)/mypy

.PHONY: bench
bench: $(READY) ## run benchmarks/NAME.py beside its peer: make bench NAME=features
	@test -n "$(NAME)" || { echo "name one: make bench NAME=… with $$(cd benchmarks && ls *.py | sed 's/\.py//' | paste -sd' ')" >&2; exit 1; }
	@test -f benchmarks/$(NAME).py || { echo "there is no benchmarks/$(NAME).py; there are: $$(cd benchmarks && ls *.py | sed 's/\.py//' | paste -sd' ')" >&2; exit 1; }
	@$(BIN)/python benchmarks/$(NAME).py $(ARGS)

# ------------------------------------------------------------------ work on the notebooks

.PHONY: lab
lab: $(READY) ## open JupyterLab with the project's kernel
	@$(BIN)/jupyter lab --notebook-dir=nbs $(ARGS)

.PHONY: refresh
refresh: $(READY) ## after editing notebooks: export the package, clean the notebooks, write README.md
	@$(BIN)/mltrading refresh

.PHONY: hooks
hooks: $(READY) ## install the git hooks that clean, export and lint before a commit
	@$(BIN)/pre-commit install

.PHONY: lock
lock: ## resolve all dependencies afresh and write constraints.txt
	@rm -rf build/lock && $(PYTHON) -m venv build/lock
	@build/lock/bin/python -m pip install -q -e '.[dev]' setuptools
	@{ echo "# Written by make lock: every package that an install uses, at its exact version."; \
	   build/lock/bin/python -m pip freeze --exclude-editable --all | grep -v '^pip==' | sed 's/+cpu$$//'; } > constraints.txt
	@rm -rf build/lock && wc -l constraints.txt

.PHONY: clean
clean: ## remove what can be rebuilt (build/, caches); keeps .venv, data and reports
	@rm -rf build _docs .mypy_cache .pytest_cache .ruff_cache .hypothesis
