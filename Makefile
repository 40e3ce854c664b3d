# Two commands on a fresh clone: `make quickstart` and `make test`. Both make .venv first.
# GPU users: `make CONSTRAINTS= quickstart`, after installing the torch build you want into .venv, or let pip choose.
PYTHON ?= python3
CONSTRAINTS ?= -c constraints.txt
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
# Ray starts dozens of processes: without kept bytecode each of them compiles torch, transformers and Ray again.
unexport PYTHONDONTWRITEBYTECODE

# --no-compile: compiling all 25 000 modules takes a minute; Python compiles the few it imports, and keeps them.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qskd needs Python 3.11 or later, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile $(CONSTRAINTS) -e '.[dev]'
	touch $@

.PHONY: install quickstart test test-fast style lint gpu-check clean
install: .venv/installed

quickstart: install
	$(BIN)/qskd quickstart

style: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint: style
	$(BIN)/mypy

# A file stays on one worker: what it builds once (a Ray cluster, a teacher, a cache) is built once. The files that take
# longest come first (tests/conftest.py); xdist's own order would start them last. Three workers for two cores: those with a
# Ray cluster wait half of their time. A worker that dies ends the run and its test is named: xdist would start another one, and
# then wait without end for files that were done.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# mypy takes half a minute of one core where it has no cache: it works beside the tests, and is heard after them.
TYPES := .mypy_cache/said
# On a fresh clone Python compiles what the tests import, and pytest rewrites their asserts: 22 s. Three workers that begin together
# would each do all of it, so that one process does it before them, while mypy works. What is wrong in it the workers say.
COMPILED := .pytest_cache/compiled
test: style
	@mkdir -p $(dir $(TYPES)) $(dir $(COMPILED))
	$(BIN)/mypy >$(TYPES) 2>&1 & types=$$!; \
	[ $(COMPILED) -nt .venv/installed ] || $(BIN)/python -m pytest -qq --collect-only -p no:xdist >$(COMPILED) 2>&1; \
	$(PYTEST); tests=$$?; \
	wait $$types; typed=$$?; \
	echo "mypy:"; cat $(TYPES); \
	exit $$((tests ? tests : typed))

test-fast: lint
	$(PYTEST) -m "not slow"

# For machines with a GPU: is it right there, how fast is a step. Without one every part runs at toy size.
gpu-check: install
	$(BIN)/python -m benchmarks.gpu --out gpu-check.json

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache *.egg-info
