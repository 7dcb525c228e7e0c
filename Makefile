# Everything runs from a virtual environment that these targets make themselves.
#   make demo           scene, training, map and report in about two minutes
#   make test           the fast suite        make slow    the rest
#   make check          lint, format, types, dependency rule
#   make wheel          dist/perf_vit-VERSION-py3-none-any.whl, without installing anything else
#   make docs           the documentation site in docs/_build/html
# VENV=DIR puts the environment elsewhere; PYTHON=python3.12 chooses its interpreter;
# PROCESSES=8 runs the tests in eight processes.
VENV ?= .venv
PYTHON ?= python3
PROCESSES ?= 2
PY := $(VENV)/bin/python
STAMP := $(VENV)/.perf_vit_installed
DOCS_STAMP := $(VENV)/.perf_vit_docs_installed

.PHONY: demo test slow check format docs install wheel clean

demo: $(STAMP)
	$(PY) -m perf_vit demo --out demo --overwrite

test: $(STAMP)
	$(PY) -m pytest --numprocesses $(PROCESSES) --dist worksteal

slow: $(STAMP)
	$(PY) -m pytest -m slow

check: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/hadolint Dockerfile
	$(PY) -m mypy
	$(PY) -m pytest tests/test_dependency_rule.py

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Warnings are errors; links inside the site are checked, others are not fetched.
# After a failed build the theme would write its logo as a file in place of a missing folder _static.
docs: $(DOCS_STAMP)
	mkdir -p docs/_build/html/_static
	$(PY) -m sphinx --builder html --fail-on-warning --doctree-dir docs/_build/doctrees docs docs/_build/html
	$(PY) tools/check_site.py docs/_build/html

install: $(STAMP)

wheel: $(PY)
	$(PY) -m pip wheel --quiet --no-deps --wheel-dir dist .

$(PY):
	$(PYTHON) -m venv $(VENV)

# The stamp is written last, so an interrupted installation is repeated.
$(STAMP): pyproject.toml | $(PY)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --editable ".[dev,integrations,train,slides,ray,export,peft]"
	touch $(STAMP)

$(DOCS_STAMP): $(STAMP)
	$(PY) -m pip install --quiet --editable ".[docs]"
	touch $(DOCS_STAMP)

clean:
	rm -rf .venv demo docs/_build build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
