# What needs nothing but python3 (3.11 or newer), pip and make: `make demo`, `make serve` and `make test`.
.DEFAULT_GOAL := all

PYTHON ?= python3
VENV ?= .venv
IN := $(VENV)/bin
SOURCES := rss tests benchmarks

# What the scripts may use of Lua and Redis, and what those whose names begin with `_` give to the others.
LUA_STD := redis KEYS ARGV cjson ipairs pairs pcall tonumber type unpack math string table error
LUA_SHARED := $(shell sed -n 's/^local function \([a-z_]*\).*/\1/p' lua/_*.lua) prefix default_age max_lifetime tombstone encoding refs now

.PHONY: all demo serve test bench bench-quick lint format dist clean
.PRECIOUS: $(VENV)/.%

all: lint test

demo: $(VENV)/.demo
	$(IN)/python -m rss.demo.story

# A page of one's devices, to open in two browsers.
serve: $(VENV)/.serve
	$(IN)/python -m rss.demo $(ARGS)

test: $(VENV)/.test
	$(IN)/python -m pytest $(ARGS)

# Speed beside other libraries: minutes, or a look at it in one.
bench: $(VENV)/.bench
	$(IN)/python -m benchmarks

bench-quick: $(VENV)/.bench
	$(IN)/python -m benchmarks --quick

lint: $(VENV)/.lint
	$(IN)/ruff format --check $(SOURCES)
	$(IN)/ruff check $(SOURCES)
	$(IN)/mypy
	$(IN)/pyright --pythonpath $(IN)/python
	@if command -v luacheck >/dev/null; then \
	  luacheck --no-color -q --std none --max-line-length 120 --no-unused --read-globals $(LUA_STD) $(LUA_SHARED) -- lua/_*.lua && \
	  luacheck --no-color -q --std none --max-line-length 120 --read-globals $(LUA_STD) $(LUA_SHARED) -- lua/[!_]*.lua; \
	else echo "luacheck is not installed: the Lua files were not checked"; fi

format: $(VENV)/.lint
	$(IN)/ruff format $(SOURCES)
	$(IN)/ruff check --fix $(SOURCES)

# Wheel and sdist; then the wheel alone, in an environment of its own and outside the checkout.
dist: $(VENV)/.dist
	rm -rf dist
	$(IN)/python -m build
	$(PYTHON) tests/smoke.py dist/*.whl

# A stamp for each group of dependencies that is installed.
$(VENV)/.%: pyproject.toml | $(VENV)
	$(IN)/python -m pip install --quiet --disable-pip-version-check --group $* --editable .
	@touch $@

# With a pip of its own, from outside: the one of the machine may be too old for groups, and may not make one itself.
$(VENV):
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(IN)/python install --quiet --disable-pip-version-check pip

clean:
	rm -rf $(VENV) dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
