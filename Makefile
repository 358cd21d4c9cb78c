# Every target does its own set-up in a fresh clone. `make` alone lists them.
#
#   PYTHON=python3.12 make test     another interpreter for the environments
#   make test ARGS="-k linear -x"   more arguments for the command a target runs

PYTHON ?= python3
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo full test test-oldest aot bench targets lint format

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.installed  ## adapt a small CLIP to handwritten digits: a table and figures in runs/glyphs, about three minutes
	.venv/bin/complora train $(ARGS)

full: .venv/.installed  ## the whole front of the README in runs/glyphs-full, about an hour; goes on where it was stopped
	.venv/bin/complora train --preset glyphs-full $(ARGS)

test: .venv/.installed  ## run the tests
	.venv/bin/python -m pytest $(ARGS)

test-oldest: .venv-oldest/.installed  ## run the tests on the oldest supported versions
	.venv-oldest/bin/python -m pytest $(ARGS)

aot: .venv/.installed  ## compile every Triton kernel for every chip it ships for, without a GPU: registers, spills, shared memory
	.venv/bin/python -m benchmarks.aot $(ARGS)

bench: .venv/.installed  ## run the benchmarks
	.venv/bin/python -m pytest benchmarks $(ARGS)

targets: .venv/.installed  ## which targets of the benchmarks are met, missed or not yet measured
	.venv/bin/python -m benchmarks.targets

lint: .venv/.installed  ## check style, formatting and types
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright

format: .venv/.installed  ## rewrite the files in the project's format
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

# An environment is installed when its stamp is newer than what declares its contents. torch and torchvision come
# out of one pip command and so from one index: a torchvision built for another build of torch does not import.
.venv/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --editable '.[dev]'
	@touch $@

.venv-oldest/.installed: pyproject.toml setup.py requirements/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --constraint requirements/oldest.txt --editable '.[dev]'
	@touch $@
