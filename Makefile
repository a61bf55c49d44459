# Two commands matter: `make demo` and `make test`. Everything else is a part of one of them.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
export PYTHONUNBUFFERED = 1
OFFSCREEN := $(if $(filter Linux,$(shell uname)),MUJOCO_GL=$(or $(MUJOCO_GL),egl))
DEMO   := out/demo/pdfa_adamw out/demo/pdfa out/demo/text_adamw out/demo/text

.PHONY: setup setup-dev demo test test-full check bench kernel-report bench-gpu study width-study humanoid clean

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

demo: setup            ## train AdamW and DoPr-AdamW on two tasks, grade their rollouts, write a page; minutes
	OMP_NUM_THREADS=1 $(PY) train.py config/ttf.py --lr=8e-3 --out_dir=out/demo/pdfa_adamw
	OMP_NUM_THREADS=1 $(PY) train.py config/ttf.py --lr=8e-3 --out_dir=out/demo/pdfa --dopr=true --sigma_beta=0.95 --refresh_every=10
	OMP_WAIT_POLICY=passive $(PY) train.py config/demo.py --out_dir=out/demo/text_adamw --dopr=false
	OMP_WAIT_POLICY=passive $(PY) train.py config/demo.py
	$(PY) -m eval.sample out/demo/text --prompt "def " --num_samples 2 --temperature 0.8
	$(PY) -m eval.rollout.ttf $(DEMO)
	$(PY) -m studies.report $(DEMO) --out out/demo

check: setup-dev       ## lint, format, types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

test: check            ## 5 to 15 minutes on 2 cores
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup -m "not slow"

test-full: check       ## everything, the slow ones included
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup

bench: setup           ## what a step costs, on this machine
	$(PY) -m bench.train_throughput
	$(PY) -m bench.step_overhead

kernel-report: setup-dev  ## registers, spills, shared memory of the Triton kernels; needs no GPU
	$(PY) -m bench.kernel_report

bench-gpu: setup-dev   ## kernels and GPT-2 124M on a GPU, into bench/results; NANOGPT=checkout; one to two hours
	$(PY) -m bench.gpu $(if $(NANOGPT),--nanogpt $(NANOGPT))

study: setup           ## the rollout study of docs/results.md; hours of CPU, continues where it was stopped
	$(PY) -m studies.rollout.all_stages

width-study: setup     ## muP's coordinate checks and sweeps of docs/mup.md; two hours of a core, continues, too
	$(PY) -m studies.mup.all_stages

humanoid: setup-dev    ## train an expert, clone another one by AdamW and DoPr-AdamW, draw the figure; minutes
	mkdir -p out/humanoid_demo
	OMP_NUM_THREADS=1 $(PY) -m studies.humanoid.train_expert --seed 0 --out out/humanoid_demo/expert.npz
	OMP_NUM_THREADS=1 $(PY) -m studies.humanoid.trial --task humanoid,expert=walk-1 --optimizer adamw --lr 4e-3
	OMP_NUM_THREADS=1 $(PY) -m studies.humanoid.trial --task humanoid,expert=walk-1 --optimizer fast-dopr-adamw --lr 2e-3
	$(OFFSCREEN) $(PY) -m studies.humanoid.figure studies/results/humanoid_matched.json --out out/humanoid_demo/figure.png

clean:
	rm -rf out data/*/prepared
