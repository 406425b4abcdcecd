# make demo | test | fast | lint | golden | beam | tpu-compiler | claims | parity | drill | speed; each makes its own environment in .venv first.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
BEAM   := $(VENV)/beam/bin/python
CUT    ?= full
JOBS   ?= 2
RUNS   ?= runs/demo
TRIALS ?= 300
OUT    ?= experiments/kill_drill

.PHONY: env demo test fast lint golden beam tpu-compiler claims parity speed drill

env: $(VENV)/.ready

$(VENV)/.ready: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lm needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@

# What the parity tests compare with: transformers 5 beside us, 4.57 in a folder of its own.
$(VENV)/.hf: $(VENV)/.ready
	$(RUN) -m pip install --quiet 'torch==2.13.0' --editable '.[dev,hf]'
	$(RUN) -m pip install --quiet --target $(VENV)/transformers-4.57 --upgrade --no-deps 'transformers==4.57.6' 'huggingface_hub==0.36.2' 'tokenizers==0.22.2'
	touch $@

# Beam cannot share the core's protobuf and pyarrow. What the file names has the core's versions: they decide a corpus's bytes.
$(VENV)/beam/.ready: requirements-beam.txt $(VENV)/.ready
	$(PYTHON) -m venv $(VENV)/beam
	$(RUN) -m pip freeze | grep -E "^($$(grep -oE '^[[:alnum:]_-]+' requirements-beam.txt | paste -sd '|'))==" > $(VENV)/beam/core.txt
	$(BEAM) -m pip install --quiet --upgrade pip
	$(BEAM) -m pip install --quiet --requirement requirements-beam.txt --constraint $(VENV)/beam/core.txt
	$(BEAM) -m pip install --quiet --no-deps --editable .
	touch $@

# The TPU compiler that the installed jax names. Beside site-packages: there every start of jax would look for a TPU.
$(VENV)/libtpu/.ready: $(VENV)/.ready
	$(RUN) -m pip install --quiet --no-deps --upgrade --target $(VENV)/libtpu "$$($(RUN) -c 'from lm.preflight import compiler; print(compiler.requirement())')"
	touch $@

demo: env  ## text to a distilled student, and runs/demo/report.html; CUT=minute for a short one
	$(RUN) -m experiments.pipeline --config=configs/demo.py:$(CUT) --config.workdir=$(RUNS)

test: $(VENV)/.hf
	-$(MAKE) --keep-going beam tpu-compiler  # where these cannot be installed their tests are skipped
	$(RUN) -m pytest --numprocesses=$(JOBS) --dist=loadfile

fast: lint  ## seconds: lint, floors, house rules, goldens
	$(RUN) -m pytest tests/test_house.py tests/test_golden.py

beam: $(VENV)/beam/.ready  ## the environment of `python -m lm corpus --runner=...`: $(VENV)/beam/bin/python

tpu-compiler: $(VENV)/libtpu/.ready  ## what `python -m lm preflight` compiles with; 660 MB

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

golden: env  ## rewrite the goldens after a change that is meant
	$(RUN) -m tests.test_golden

claims: env  ## the demo's claims over three seeds; about 40 minutes on two cores
	$(RUN) -m experiments.claims --config=configs/demo.py --config.workdir=runs/claims

parity: $(VENV)/.hf  ## logits and ids against transformers 4.57 and 5; experiments/parity.md
	$(RUN) -m experiments.parity

drill: env  ## kills, signals, damage and lost hosts; about 40 minutes on two cores; experiments/kill_drill.md
	$(RUN) -m experiments.kill_drill --trials=$(TRIALS) --out=$(OUT)

speed: $(VENV)/.hf  ## sequences a second of a training step, ours and transformers'; experiments/step_speed.md
	$(RUN) -m experiments.step_speed
