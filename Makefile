# Everything runs in a virtual environment that `python3 -m venv` and pip set up at first use and
# again when pyproject.toml changes.

PYTHON ?= python3
VENV ?= .venv
# Comma-separated extras of pyproject.toml: cuda, hf.
EXTRA ?=
CONFIG ?= configs/nano.yaml
# Two processes, each with whole files: compiling is what takes the time, and modules share fixtures.
PARALLEL ?= -n 2 --dist loadfile
ARGS ?=

BIN := $(VENV)/bin/python
comma := ,
EXTRAS := $(sort $(subst $(comma), ,$(EXTRA)))
# One stamp for each set of extras that was asked for: training needs no development tools.
join_extras = $(VENV)/.installed$(subst $() ,,$(foreach extra,$(1),-$(extra)))
STAMP := $(call join_extras,$(EXTRAS))
DEV_STAMP := $(call join_extras,$(sort $(EXTRAS) dev))

.PHONY: help pretrain test test-all lint wheel clean same-python
.DELETE_ON_ERROR:

help:
	@echo "make pretrain   train a language model   CONFIG=$(CONFIG)  EXTRA=cuda for a GPU  ARGS='--steps 100'"
	@echo "make test       the tests                ARGS='-k cache tests/ops'  ARGS='-m gpu' EXTRA=cuda on a GPU"
	@echo "make test-all   the tests, with the wide sweeps"
	@echo "make lint       ruff check, ruff format --check, mypy"
	@echo "make wheel      build the wheel, install it into an empty environment, import it"
	@echo "make clean      remove $(VENV), builds and caches (keeps runs/ and data/)"
	@echo "All of them: PYTHON=python3.12 and VENV=.venv312 choose the interpreter and the environment."

pretrain: $(STAMP)
	@sh scripts/gpu_notice.sh $(VENV)
	$(BIN) -m train.pretrain --config $(CONFIG) $(ARGS)

test: $(DEV_STAMP)
	$(BIN) -m pytest $(PARALLEL) $(ARGS)

test-all: $(DEV_STAMP)
	$(BIN) -m pytest $(PARALLEL) -m "" $(ARGS)

lint: $(DEV_STAMP)
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m mypy

wheel: $(DEV_STAMP)
	$(BIN) scripts/check_wheel.py

clean:
	test ! -e $(VENV)/pyvenv.cfg || rm -rf $(VENV)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .jax_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(sort $(STAMP) $(DEV_STAMP)): pyproject.toml | same-python
	@sh scripts/setup_venv.sh $(PYTHON) $(VENV) $@ $(subst -, ,$(patsubst $(VENV)/.installed%,%,$@))

# An environment keeps its interpreter: another PYTHON would silently not be used.
same-python:
ifneq ($(origin PYTHON),file)
	@sh scripts/same_python.sh $(PYTHON) $(VENV)
endif
