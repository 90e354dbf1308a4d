# Two doors: `make demo` and `make test`. Both set everything up by themselves.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/newsgroups
PRIVATE := runs/newsgroups-private
SECURE := runs/newsgroups-secure
DEPLOY := runs/deploy
STUDY := runs/studies/alignment-small

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export OMP_WAIT_POLICY := PASSIVE

.PHONY: setup demo demo-private demo-secure demo-deploy chaos study test lint bench report clean

setup: $(VENV)/.installed

# torch goes first and by its exact version: a CPU build. Any other request may pull gigabytes of CUDA packages.
$(VENV)/.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/foedus fetch
	@if [ -f $(RUN)/summary.json ]; then rm -rf $(RUN); fi
	@if [ -f $(RUN)/treaty.toml ]; then $(BIN)/foedus resume $(RUN); \
	else $(BIN)/foedus run treaties/newsgroups.toml --out $(RUN); fi

demo-private: setup
	$(BIN)/foedus fetch smollm2-135m-instruct 20newsgroups friends
	@if [ -f $(PRIVATE)/summary.json ]; then rm -rf $(PRIVATE); fi
	@if [ -f $(PRIVATE)/treaty.toml ]; then $(BIN)/foedus resume $(PRIVATE); \
	else $(BIN)/foedus run treaties/newsgroups-private.toml --out $(PRIVATE); fi
	$(BIN)/foedus privacy statement $(PRIVATE)
	$(BIN)/foedus audit $(PRIVATE)

demo-secure: setup
	$(BIN)/foedus fetch
	$(BIN)/python -m demos.secure $(SECURE)

demo-deploy: setup
	$(BIN)/foedus fetch
	$(BIN)/python -m demos.deploy $(DEPLOY)

chaos: setup
	$(BIN)/python -m benchmarks.chaos --rounds 20 --kills 20 --seed 1

study: setup
	$(BIN)/foedus fetch smollm2-135m-instruct 20newsgroups friends reuters-r8
	$(BIN)/foedus study treaties/studies/alignment-small.toml --out $(STUDY)

# Three processes, on two cores too: one is always waiting for processes of its own. The longest files go first (conftest.py).
test: setup lint
	$(BIN)/foedus fetch
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable ".[bench]"
	$(BIN)/python -m pip install --quiet --no-deps "pfl>=0.6,<0.7" multiprocess  # pfl asks for an older dp-accounting
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) runs build *.egg-info
