# What a user types. `make test` and `make demo` need nothing but Python 3.10 to 3.13, make and a network for pip:
# everything is installed into .venv beside this file, at the versions of requirements.lock, and only when that changed.

SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.DEFAULT_GOAL := help
.PHONY: help setup test demo bench lint

help:
	@echo "make demo    simulated data -> teacher -> student -> student + RDD -> table and pictures in runs/demo"
	@echo "make test    run the tests"
	@echo "make setup   only make the virtual environment $(VENV) (the other commands do it by themselves)"
	@echo "make bench   measure the speed against others: table, results/bench.json, docs/bench.png (see benchmarks/)"
	@echo "make lint    ruff: style and likely mistakes"
	@echo "The commands behind them: $(BIN)/python train.py --help, evaluate.py --help, plot.py --help"

setup: $(INSTALLED)
	@echo "$(VENV) is ready. To use it by hand: source $(BIN)/activate"

test: $(INSTALLED)
	@$(BIN)/python -m pytest -q

demo: $(INSTALLED)
	@$(BIN)/python experiments.py demo

bench: $(INSTALLED)
	@$(BIN)/python -m benchmarks --json results/bench.json --figure docs/bench.png

lint: $(INSTALLED)
	@$(BIN)/python -m ruff check .

# The stamp is written last, so an interrupted or failed installation is taken up again. pip's own words go to a log;
# what shows is what a person waits for: the large downloads, and the end.
$(INSTALLED): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
		echo "error: Python 3.10 to 3.13 is needed, \`$(PYTHON)\` is $$($(PYTHON) -V 2>&1);" \
		"name another with: make PYTHON=python3.12 setup" >&2; exit 2; }
	@echo "Installing requirements.lock into $(VENV) with $$($(PYTHON) -V) (the first time takes some minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@set -o pipefail; PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -r requirements.lock 2>&1 \
		| tee $(VENV)/install.log \
		| awk '/\([0-9.]+ [MG]B\)$$/ { print "  " $$1, $$2, $$3, $$4; fflush() }; \
			/^Installing collected/ { print "  Unpacking"; fflush() }' \
		|| { grep -i error $(VENV)/install.log >&2; echo "error: pip failed; all it said: $(VENV)/install.log" >&2; exit 1; }
	@touch $@
