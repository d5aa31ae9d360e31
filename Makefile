# What needs nothing but python3 (3.11 or newer), pip and make: `make demo`, `make serve`, `make serve-cluster` and
# `make test`.
.DEFAULT_GOAL := all

PYTHON ?= python3
VENV ?= .venv
IN := $(VENV)/bin
SOURCES := rss tests benchmarks

# Most tests wait: for a server, a deadline, a browser. The tests of a file share a server, so neighbours stay together
# until a worker has nothing left to do. A crash ends the run: pytest-xdist would repeat the test that crashed.
WORKERS := -n 3 --dist worksteal --max-worker-restart 0

.PHONY: all demo serve serve-cluster test coverage lowest bench bench-quick chaos lint format dist release-check clean
.PRECIOUS: $(VENV)/.%

all: lint test

demo: $(VENV)/.demo
	$(IN)/python -m rss.demo.story

# A page of one's devices, to open in two browsers; the same on a Redis Cluster of three masters.
serve: $(VENV)/.serve
	$(IN)/python -m rss.demo $(ARGS)

serve-cluster: $(VENV)/.serve
	RSS_SERVER=cluster $(IN)/python -m rss.demo $(ARGS)

test: $(VENV)/.test
	$(IN)/python -m pytest $(WORKERS) $(ARGS)

# The same, and which lines and branches of rss/ it runs: it fails unless that is nearly all of them.
coverage: $(VENV)/.test
	$(IN)/coverage erase
	$(IN)/coverage run -m pytest $(WORKERS) $(ARGS)
	$(IN)/coverage combine --quiet
	$(IN)/coverage report

# With the lowest versions of all dependencies and frameworks that pyproject.toml allows.
lowest: $(VENV)-lowest/.installed
	$(VENV)-lowest/bin/python -m pytest $(WORKERS) $(ARGS) --ignore=tests/integrations/test_browser.py \
	  --ignore=tests/integrations/test_dict_session.py --ignore=tests/integrations/test_readme.py

# Speed beside other libraries: minutes, or a look at it in one.
bench: $(VENV)/.bench
	$(IN)/python -m benchmarks

bench-quick: $(VENV)/.bench
	$(IN)/python -m benchmarks --quick

# Faults of one Redis, of a Redis behind Sentinels and of a cluster: ten minutes, or two with ARGS=--quick.
chaos: $(VENV)/.bench
	$(IN)/python -m benchmarks.chaos $(ARGS)

lint: $(VENV)/.lint
	$(IN)/ruff format --check $(SOURCES)
	$(IN)/ruff check $(SOURCES)
	$(IN)/mypy
	$(IN)/pyright --pythonpath $(IN)/python
	$(IN)/python -m tests.lint_lua
	$(IN)/python -m tests.documents
	$(IN)/zizmor --offline --quiet --strict-collection --min-severity medium .github/workflows

format: $(VENV)/.lint
	$(IN)/ruff format $(SOURCES)
	$(IN)/ruff check --fix $(SOURCES)

# Wheel and sdist; then the wheel alone, in an environment of its own and outside the checkout. Then its SBOM.
dist: $(VENV)/.dist
	rm -rf dist
	$(IN)/python -m build
	$(IN)/twine check --strict dist/*
	$(PYTHON) tests/smoke.py dist/*.whl
	$(IN)/python tests/sbom.py dist/*.whl

# What a release must pass besides `make all`. With TAG=v1.2.3, the version and the changelog must agree with the tag.
# Last, every public name must have a type. For that, pyright takes the Python on PATH: it ignores --pythonpath.
release-check: $(VENV)/.lint
	$(PYTHON) tests/release.py
	$(MAKE) dist
	PATH="$(abspath $(IN)):$$PATH" pyright --verifytypes rss --ignoreexternal

# A stamp for each group of dependencies that is installed.
$(VENV)/.%: pyproject.toml | $(VENV)
	$(IN)/python -m pip install --quiet --disable-pip-version-check --group $* --editable .
	@touch $@

$(VENV)-lowest/.installed: pyproject.toml tests/lowest.py | $(VENV)-lowest
	$(VENV)-lowest/bin/python tests/lowest.py >$(VENV)-lowest/requirements.txt
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check \
	  --group tools --group servers --editable . --requirement $(VENV)-lowest/requirements.txt
	@touch $@

# With a pip of its own, from outside: the one of the machine may be too old for groups, and may not make one itself.
$(VENV) $(VENV)-lowest:
	$(PYTHON) -m venv --without-pip $@
	$(PYTHON) -m pip --python $@/bin/python install --quiet --disable-pip-version-check pip

clean:
	rm -rf $(VENV) $(VENV)-lowest dist .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis
