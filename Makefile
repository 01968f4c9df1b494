# Two commands on a fresh machine: `make demo` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1

.PHONY: install demo test test-all test-processors test-lowest chromium check format bench bench-gpu clean

install: $(STAMP)

# torch is pinned in constraints.txt: unpinned, the registry hands out gigabytes of CUDA.
$(RUNTIME): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[embedded]'
	touch $@

$(STAMP): $(RUNTIME)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# What the demo needs and no more: tests and their tools come with `make test`.
demo: $(RUNTIME)
	$(BIN)/tanzaku demo $(ARGS)

# Every law of every method, and every kind of method under every condition, on one family; test-all: all on all families.
test: $(STAMP) chromium
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-all: $(STAMP) chromium
	$(BIN)/python -m pytest -n 2 --dist worksteal --all $(ARGS)

# What is compared with what, as other processors would round it: about an hour.
test-processors: $(STAMP)
	PYTHON=$(BIN)/python .ci/processors $(ARGS)

# The laws on the lowest version of each library that pyproject.toml allows, in an environment of their own.
LOWEST ?= .venv-lowest
test-lowest:
	$(PYTHON) .ci/lowest > .lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -q -c .lowest.txt -e '.[embedded]' pytest pytest-timeout pytest-xdist hypothesis
	rm .lowest.txt
	$(LOWEST)/bin/python -m pytest -n 2 --dist worksteal tests/laws $(ARGS)

# The browser that looks at report.html, where it can be had.
chromium:
	@.ci/chromium

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python -m bench $(ARGS)

bench-gpu: $(STAMP)
	$(BIN)/python -m bench gpu

clean:
	rm -rf $(VENV) $(LOWEST) build runs .mypy_cache .ruff_cache .pytest_cache
