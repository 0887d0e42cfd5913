# `make run` shows the product, `make test` tests it; both set up .venv first if need be.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROTOS := $(wildcard proto/prefixcache/v1/*.proto)

.PHONY: run test check lint types contracts proto proto-check bench format clean help
.DEFAULT_GOAL := run

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (the first time takes a minute or two) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[engine,dev]'
	@$(BIN)/python -m engine.native
	@touch $@

run: $(STAMP)  ## serve the embedded model and let eight agents share a system prompt
	@$(BIN)/python examples/eight_agents.py

test: $(STAMP)  ## all tests
	@$(BIN)/python -m pytest

check: lint types contracts proto-check  ## everything that is not a test

lint: $(STAMP)  ## ruff: mistakes and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy, strict
	@$(BIN)/mypy

contracts: $(STAMP)  ## import-linter: who may import whom
	@$(BIN)/lint-imports

proto: $(STAMP)  ## generate prefixcache/v1 from proto/
	@$(BIN)/python -m grpc_tools.protoc -Iproto \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. $(PROTOS)

proto-check: proto  ## the generated code is that of proto/
	@git diff --exit-code -- prefixcache/v1 || (echo "prefixcache/v1 differs from proto/: run 'make proto' and commit the result"; exit 1)

bench: $(STAMP)  ## the benchmarks of the README, in their quick form
	@$(BIN)/python -m benchmarks.bench_tree --quick
	@$(BIN)/python -m benchmarks.bench_ttft --quick
	@$(BIN)/python -m benchmarks.bench_quality --quick
	@$(BIN)/python -m benchmarks.bench_warm --quick
	@$(BIN)/python -m benchmarks.bench_hints --quick
	@$(BIN)/python -m benchmarks.bench_redis --quick
	@$(BIN)/python -m benchmarks.bench_routing --quick

format: $(STAMP)  ## rewrite the sources as `make lint` wants them
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## remove everything that was made here
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1 \t/' | expand -t 14
