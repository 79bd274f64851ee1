# make demo    from nothing to a model of your own, and a chat with it
# make test    every check: style, types, imports, help pages, tests
# make test-processors  the numerically sensitive tests as on other processors, under 10 minutes
# make slow    the tests that take minutes
# make format  put the style right
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-processors slow format

demo: $(READY)
	$(BIN)/minimind demo

test: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m minimind.cli.help_pages --check
	$(BIN)/pytest
	$(BIN)/python -m tests.processors avx2-1 --pytest "tests/inference tests/model tests/training/objectives"

test-processors: $(READY)
	$(BIN)/python -m tests.processors

slow: $(READY)
	$(BIN)/pytest -m slow --timeout 3600

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/python -m minimind.cli.help_pages

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "minimind needs Python 3.11 or newer. On Debian: apt install python3 python3-venv." \
	  "Or name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo \
	  "This Python cannot make virtual environments. On Debian: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	@touch $@
