# make demo | test | test-fast | check | bench | clean. Each sets itself up in .venv first.
PYTHON ?= python3
CLUSTER ?= local
RUN_DIR ?= runs/demo
BIN := .venv/bin
USER_STAMP := .venv/.installed
DEV_STAMP := .venv/.installed-dev

.PHONY: demo test test-fast check bench clean

demo: $(USER_STAMP)
	$(BIN)/python -m trak_dist.launch problem=mnist cluster=$(CLUSTER) run_dir=$(RUN_DIR)

test: check-code $(DEV_STAMP)
	$(BIN)/pytest

# What to run before a commit: the code's checks, and the tests that are fast.
check: check-code test-fast

test-fast: $(DEV_STAMP)
	$(BIN)/pytest -n auto -m "not slow"

.PHONY: check-code
check-code: $(DEV_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(DEV_STAMP)
	$(BIN)/python benchmarks/store.py

$(DEV_STAMP): pyproject.toml constraints.txt $(USER_STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(USER_STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "trak_dist needs Python 3.11 or later: make PYTHON=python3.12 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (torch is large: some minutes the first time)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info runs
