# Two commands set everything up on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup quickstart test test-slow mutants bench-gpu check clean

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
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile -m 'not slow and not gpu and not network'

test-slow: setup
	$(BIN)/python -m pytest -m 'slow'

# Breaks the kernels in every way and counts which breaks no test notices; takes an hour or so.
mutants: setup
	$(BIN)/python -m tests.kernel_ops.mutate

bench-gpu: setup
	$(BIN)/python -m pytest -m gpu
	$(BIN)/lora-ft bench kernels
	$(BIN)/python benchmarks/bench_lora_linear.py --dtypes bfloat16 float16

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs dist
