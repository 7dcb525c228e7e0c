# Everything runs from a virtual environment that these targets make themselves.
#   make demo           scene, training, map and report in under four minutes
#   make test           the fast suite        make slow    the rest
#   make check          lint, format, types, dependency rule
#   make wheel          dist/perf_vit-VERSION-py3-none-any.whl, without installing anything else
# VENV=DIR puts the environment elsewhere; PYTHON=python3.12 chooses its interpreter;
# PROCESSES=8 runs the tests in eight processes.
VENV ?= .venv
PYTHON ?= python3
PROCESSES ?= 2
PY := $(VENV)/bin/python
STAMP := $(VENV)/.perf_vit_installed

.PHONY: demo test slow check format install wheel clean

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

clean:
	rm -rf .venv demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
