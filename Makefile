# `make quickstart` and `make test` need Python >= 3.11, git and make; everything else goes into .venv.
#
# PYTHON=python3.12 chooses the interpreter of a new .venv. pip's own settings apply: on a machine without a GPU,
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves the download of CUDA.

PYTHON ?= python3
SHARED ?= ../shared
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
BASE := .baton/models/smollm2-135m

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint types smollm2 clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   install into .venv, then train recipes/micro from pretraining to RLHF"
	@echo "make test         the test suite"
	@echo "make lint types   ruff and mypy"
	@echo "make smollm2      recipes/smollm2, on local files where $(SHARED) is there"
	@echo "make clean        remove .venv and caches; the registry and runs in .baton stay"

quickstart: .venv/installed
	$(BIN)/baton run recipes/micro

test: .venv/installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: .venv/installed-dev
	$(BIN)/ruff check .

types: .venv/installed-dev
	$(BIN)/mypy

# the same pipeline on local copies of such data: dolly and OASST dialogues, HH pairs and their prompts
DIALOGUES := $(abspath $(SHARED))/data/dialogues
PAIRS := $(abspath $(SHARED))/data/preferences/hh_helpful_en_4000.jsonl.gz
LOCAL := pretrain.base=$(abspath $(BASE)) \
    'sft.data.train=[{path: $(DIALOGUES)/dolly_hhrlhf_en_1000.jsonl.gz, rows: [0, 900]}, {path: $(DIALOGUES)/oasst_en_100_trees.jsonl.gz, rows: [0, 90]}]' \
    'sft.data.eval=[{path: $(DIALOGUES)/dolly_hhrlhf_en_1000.jsonl.gz, rows: [900, 1000]}, {path: $(DIALOGUES)/oasst_en_100_trees.jsonl.gz, rows: [90, 100]}]' \
    'reward.data.train=[{path: $(PAIRS), rows: [0, 3500]}]' 'reward.data.eval=[{path: $(PAIRS), rows: [3500, 3800]}]' \
    'ppo.data.train=[{path: $(PAIRS), rows: [0, 3500]}]' 'ppo.data.eval=[{path: $(PAIRS), rows: [3800, 3848]}]'

smollm2: .venv/installed
	@if [ -d $(SHARED) ]; then \
	    $(BIN)/python $(SHARED)/models/make_smollm2.py $(BASE) && $(BIN)/baton run recipes/smollm2 $(LOCAL); \
	else \
	    $(BIN)/baton run recipes/smollm2; \
	fi

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache

# The stamps hold what was asked for: a change in either file installs again, and nothing else does.
# setuptools comes first and pinned, so that the build of the package itself takes nothing newer.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON) is older than 3.11; try make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "installing into .venv (pinned by constraints.txt) …"
	$(PYTHON) -m venv .venv
	$(PIP) setuptools
	$(PIP) --no-build-isolation -e '.[ui]'
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "installing what the tests need …"
	$(PIP) --no-build-isolation -e '.[test,dev]'
	@touch $@
