# make demo | test | fast | lint | golden; each makes its own environment in .venv first.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
CUT    ?= full
RUNS   ?= runs/demo

.PHONY: env demo test fast lint golden claims

env: $(VENV)/.ready

$(VENV)/.ready: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lm needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@

demo: env  ## text to a distilled student, and runs/demo/report.html; CUT=minute for a short one
	$(RUN) -m experiments.demo --config=configs/demo.py:$(CUT) --config.workdir=$(RUNS)

test: env
	$(RUN) -m pytest

fast: lint  ## seconds: lint, floors, house rules, goldens
	$(RUN) -m pytest tests/test_house.py tests/test_golden.py

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

golden: env  ## rewrite the goldens after a change that is meant
	$(RUN) -m tests.test_golden

claims: env  ## the demo's claims over three seeds; about 40 minutes on two cores
	$(RUN) -m experiments.claims --config=configs/demo.py --config.workdir=runs/claims
