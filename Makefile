# Every target makes what it needs in .venv first. `make help` lists them.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
BEAM   := $(VENV)/beam/bin/python
CUT    ?= full
JOBS   ?= 2
RUNS   ?= runs/demo
TRIALS ?= 300
OUT    ?= experiments/kill_drill
PYTEST := $(RUN) -m pytest --numprocesses=$(JOBS)

.DEFAULT_GOAL := help
.PHONY: help env demo fast test test-all lint golden beam tpu-compiler claims parity drill speed

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

env: $(VENV)/.ready  ## make the environment in .venv

demo: env  ## run text to a distilled student, and write runs/demo/report.html; CUT=minute for a short run
	$(RUN) -m experiments.pipeline --config=configs/demo.py:$(CUT) --config.workdir=$(RUNS)

FAST := house golden batch lookup losses metrics metrics_baselines objectives_tables optimizers_schedules
fast: lint  ## check in a minute: lint, types, house rules, goldens, the quickest laws
	$(PYTEST) $(wildcard $(FAST:%=tests/test_%.py))

test: $(VENV)/.hf  ## run the tests except the slow ones; about 12 minutes on two cores
	$(PYTEST) --dist=loadfile

test-all: $(VENV)/.hf $(VENV)/transformers-4.57/.ready  ## run all tests: two releases of transformers, Beam, TPU compiler, gs:// hosts
	-$(MAKE) --keep-going beam tpu-compiler  # tests of what cannot be installed are skipped
	$(PYTEST) --dist=loadfile -m ""

lint: env  ## run ruff and pyright
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --warnings

golden: env  ## rewrite the goldens after an intended change
	$(RUN) -m tests.test_golden

beam: $(VENV)/beam/.ready  ## make the environment of `python -m lm corpus --runner=...`: .venv/beam/bin/python

tpu-compiler: $(VENV)/libtpu/.ready  ## install the compiler of `python -m lm preflight`; 660 MB

claims: env  ## measure the demo's claims over three seeds; about 40 minutes on two cores
	$(RUN) -m experiments.claims --config=configs/demo.py --config.workdir=runs/claims

parity: $(VENV)/.hf $(VENV)/transformers-4.57/.ready  ## compare logits and ids with transformers 4.57 and 5; experiments/parity.md
	$(RUN) -m experiments.parity

drill: env  ## kill, stop, damage and resume runs; about 40 minutes on two cores; experiments/kill_drill.md
	$(RUN) -m experiments.kill_drill --trials=$(TRIALS) --out=$(OUT)

speed: $(VENV)/.hf  ## measure sequences per second of a training step, with transformers beside; experiments/step_speed.md
	$(RUN) -m experiments.step_speed

$(VENV)/.ready: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lm needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@

# The references of the parity tests: transformers 5, and 4.57 in its own folder.
$(VENV)/.hf: $(VENV)/.ready
	$(RUN) -m pip install --quiet 'torch==2.13.0' --editable '.[dev,hf]'
	touch $@

$(VENV)/transformers-4.57/.ready: $(VENV)/.hf
	$(RUN) -m pip install --quiet --target $(@D) --upgrade --no-deps 'transformers==4.57.6' 'huggingface_hub==0.36.2' 'tokenizers==0.22.2'
	touch $@

# Beam cannot share the core's protobuf and pyarrow. Its other packages have the core's versions: they decide a corpus's bytes.
$(VENV)/beam/.ready: requirements-beam.txt $(VENV)/.ready
	$(PYTHON) -m venv $(VENV)/beam
	$(RUN) -m pip freeze | grep -E "^($$(grep -oE '^[[:alnum:]_-]+' requirements-beam.txt | paste -sd '|'))==" > $(VENV)/beam/core.txt
	$(BEAM) -m pip install --quiet --upgrade pip
	$(BEAM) -m pip install --quiet --requirement requirements-beam.txt --constraint $(VENV)/beam/core.txt
	$(BEAM) -m pip install --quiet --no-deps --editable .
	touch $@

# The TPU compiler of the installed jax. It lies outside site-packages: there, jax would look for a TPU at every start.
$(VENV)/libtpu/.ready: $(VENV)/.ready
	$(RUN) -m pip install --quiet --no-deps --upgrade --target $(VENV)/libtpu "$$($(RUN) -c 'from lm.preflight import compiler; print(compiler.requirement())')"
	touch $@
