# make run    set up what the daemon needs, then run it in the foreground (ARGS="--root … --address …")
# make quick  lint, types, and the tests that start no process: under a minute on a quiet machine
# make test   set up what the tests need, then lint, types and all tests (PYTEST_ARGS="-k …")
# make test-vm only the tests in an emulated machine with systemd and cgroup version 2, which are part of make test
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run setup quick test test-vm lint bench proto lock
.DEFAULT_GOAL := run
unexport PYTHONDONTWRITEBYTECODE # tests start hundreds of daemons; compiling everything for each nearly doubles that

run:
	@$(PYTHON) scripts/setup.py run
	@exec $(BIN)/imgsvc serve $(ARGS)

setup:
	@$(PYTHON) scripts/setup.py test

test: lint
	@$(BIN)/python -m tests.run $(PYTEST_ARGS)

quick: lint
	$(BIN)/python -m pytest --quick -q -rfE $(PYTEST_ARGS)

test-vm: setup
	$(BIN)/python -m pytest tests/vm $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict imgsvc tests benchmarks

# Against the running daemon, another runtime, or nothing at all: each script says in its first lines.
BENCHMARKS ?= store scale registry unpack latency decrypt pull_encrypted compare_pull
bench: setup
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name $(ARGS) || exit 1; done

# Generated code in imgsvc/api, from the .proto files beside it.
proto: setup
	$(BIN)/python -m tests.support.genapi

# After a change of versions in pyproject.toml; with ARGS=--upgrade, whatever it allows.
lock: setup
	$(BIN)/python scripts/lock.py $(ARGS)
