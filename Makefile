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

demo: setup            ## train Muon and DoPr-Muon, compare, sample; about 5 minutes on 2 cores
	$(PY) train.py config/demo.py --dopr=false --out_dir=out/demo_base
	$(PY) train.py config/demo.py
	$(PY) -m eval.sample out/demo --prompt "def " --num_samples 2 --temperature 0.8
	$(PY) -m eval.summary out/demo_base out/demo

check: setup-dev       ## lint, format, types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

test: check            ## under 10 minutes on 2 cores
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not slow"

test-full: check       ## everything, the slow ones included
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

bench: setup           ## what a step costs, on this machine
	$(PY) -m bench.train_throughput
	$(PY) -m bench.step_overhead

clean:
	rm -rf out data/*/prepared
