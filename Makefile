# Two commands set everything up on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup quickstart test test-slow check clean

# Installs once, and again when the requirements change. torch comes first, alone: whatever is asked for after it
# must accept the pinned version.
setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("lora_ft needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch .venv/installed

quickstart: setup
	$(BIN)/lora-ft quickstart

test: setup
	$(BIN)/python -m pytest -m 'not slow and not gpu and not network'

test-slow: setup
	$(BIN)/python -m pytest -m 'slow'

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs dist
