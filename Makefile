# Two commands matter: `make demo` and `make test`. Everything else is a part of one of them.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
export PYTHONUNBUFFERED = 1

.PHONY: setup setup-dev demo test test-full check bench clean

$(VENV)/.installed: requirements.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), f"needs Python >= 3.10, found {sys.version}"'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

check: setup-dev       ## lint, format, types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

test: check            ## under 10 minutes on 2 cores
	$(PY) -m pytest -m "not slow"

test-full: check       ## everything, the slow ones included
	$(PY) -m pytest

clean:
	rm -rf out data/*/prepared
