# Every target sets itself up; `make help` lists them.

VENV := .venv
BIN := $(VENV)/bin
EXTRAS_RUN := torch
EXTRAS_DEV := torch,data,dev
# More for pip, such as: make quickstart PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
# More for pytest, such as: make test ARGS="-k queue"
ARGS ?=

# The first interpreter that really is 3.11 or newer; `make PYTHON=/path/to/python3` overrides.
IS_NEW := import sys; sys.exit(sys.version_info < (3, 11))
CANDIDATES := python3.11 python3 python3.12 python3.13 python3.14 python
PYTHON ?= $(shell for name in $(CANDIDATES); do $$name -c '$(IS_NEW)' 2>/dev/null && { echo $$name; break; }; done)

.DEFAULT_GOAL := help
.PHONY: help quickstart test check format soak bench clean
.DELETE_ON_ERROR:

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(VENV)/.ready-run ## learn three-digit addition on this machine, from nothing
	@$(BIN)/asyncflow run quickstart

test: $(VENV)/.ready-dev ## all tests but the soak
	@$(BIN)/python -m pytest -q -n auto $(ARGS)

check: $(VENV)/.ready-dev ## format, lint, types, layers, fast tests
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted: make format"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/python -m pytest -q tests/test_layers.py tests/test_conventions.py
	@$(BIN)/python -m pytest -q -n auto -m "not slow and not soak" \
	    --deselect tests/test_layers.py --deselect tests/test_conventions.py $(ARGS)

format: $(VENV)/.ready-dev ## format, and repair what the linter can
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

soak: $(VENV)/.ready-dev ## every test with its full counts; takes long
	@HYPOTHESIS_PROFILE=soak $(BIN)/python -m pytest -q -m "" --timeout 3600 $(ARGS)

bench: $(VENV)/.ready-dev ## every benchmark; tables here, JSON in bench-results/
	@mkdir -p bench-results
	@for file in benchmarks/[a-z]*.py; do \
	    echo "== $$file"; \
	    $(BIN)/python $$file --json bench-results/$$(basename $$file .py).json $(ARGS) || exit 1; \
	done

clean: ## remove what these targets made; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.exists:
	@test -n "$(PYTHON)" || { \
	    echo "asyncflow needs Python 3.11 or newer; none of these is: $(CANDIDATES)"; \
	    echo "Install one, or name it: make $(or $(MAKECMDGOALS),quickstart) PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c '$(IS_NEW)' || { echo "asyncflow needs Python 3.11 or newer; $(PYTHON) is `$(PYTHON) --version`"; exit 1; }
	@echo "Creating $(VENV) with `$(PYTHON) --version` ..."
	@$(PYTHON) -m venv $(VENV) || { \
	    echo "$(PYTHON) cannot create virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@touch $@

$(VENV)/.ready-run: $(VENV)/.exists pyproject.toml constraints.txt
	@echo "Installing asyncflow[$(EXTRAS_RUN)] into $(VENV) (once; torch is some hundred MB) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[$(EXTRAS_RUN)]'
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.exists pyproject.toml constraints.txt
	@echo "Installing asyncflow[$(EXTRAS_DEV)] into $(VENV) (once; torch is some hundred MB) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[$(EXTRAS_DEV)]'
	@touch $@ $(VENV)/.ready-run
