# Every target does its own set-up in a fresh clone. `make` alone lists them.
#
#   PYTHON=python3.12 make test     another interpreter for the environments
#   make test ARGS="-k linear -x"   more arguments for the command a target runs

PYTHON ?= python3
ARGS ?=

EXTENSION = build/.extension
BUILD = PATH="$(CURDIR)/.venv/bin:$$PATH"
CPP = $(wildcard csrc/* tests/cuda_on_cpu/*)
# Files in the order of their names: by default those of few tests, among them the longest, would come last.
# A worker that dies ends the run: pytest-xdist 3.8 waits for ever when another takes its files over.
PARALLEL = --numprocesses=auto --maxprocesses=8 --max-worker-restart=0 --dist=loadfile --no-loadscope-reorder \
	--benchmark-disable
SANITIZER = -fsanitize=address,undefined -fno-sanitize-recover=all

.DEFAULT_GOAL := help
.PHONY: help demo full ablation reproduce extension test test-browser test-long test-other-processor test-oldest sanitize aot aot-held waves bench report bench-gpu gpu gpu-cache targets model docs lint format

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.installed  ## adapt a CLIP that knows 1,900 things to photos of clothes: a table, figures and a page in runs/pictures
	.venv/bin/complora train $(ARGS)

full: .venv/.installed  ## the trade-off curves of docs/results.md in runs/glyphs-full, about an hour; goes on where it was stopped
	.venv/bin/complora train --preset glyphs-full $(ARGS)

ablation: .venv/.installed  ## sides, sizes and sources of the subspace, and LoRA's own ways to forget less, in runs/glyphs-ablation: two hours
	.venv/bin/complora sweep benchmarks/sweeps/glyphs-ablation.yaml $(ARGS)

DATA ?= /data
reproduce: .venv/.installed  ## CLIP-LoRA's recipe on the eleven data sets in DATA=/path, beside the published accuracies: runs/reproduce
	.venv/bin/python -m benchmarks.reproduce --data $(DATA) $(ARGS)

extension: $(EXTENSION)  ## build the C++/CUDA extension in place, with the newest torch

test: .venv/.installed $(EXTENSION)  ## run the tests, but for those that take ten seconds or more
	.venv/bin/python -m pytest $(PARALLEL) -m "not long and not browser" $(ARGS)

test-browser: .venv/.installed  ## open the HTML report in Chromium (Debian: apt-get install chromium chromium-driver)
	.venv/bin/python -m pytest -m browser $(ARGS) tests/fewshot/test_page.py

test-long: .venv/.installed $(EXTENSION)  ## run the tests that take ten seconds or more
	.venv/bin/python -m pytest $(PARALLEL) -m long $(ARGS)

# What rounds otherwise on another machine: torch without AVX, MKL without what it knows of this processor, two threads.
# Where oneDNN has AMX, torch without AVX refuses attention in bfloat16 ("pack_vnni2"): it is told to do without.
# The files in which most is computed by more than one way; FILES=tests for all.
FILES ?= $(NUMERICS:%=tests/%.py)
NUMERICS = $(addprefix test_,dropout functional reference subspace) \
	$(addprefix adapters/test_,apply calibration manage saved_bases save_load) \
	$(addprefix fewshot/test_,anchors evaluate images recipe) \
	$(addprefix modules/test_,block forward_scope last_block modules truncation)
test-other-processor: .venv/.installed $(EXTENSION)  ## run the tests of the numerics as another processor computes, on two threads
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive \
		.venv/bin/python -m pytest $(PARALLEL) $(FILES) $(ARGS)

# The same files that the newest torch built: what the stable ABI promises. Without the tests of what does not ship, but
# for the first run on a GPU, whose machine has an old Triton, of the CUDA source, which no version changes, and of the
# protocols, whose miniatures show nothing here that other tests of the program do not.
test-oldest: .venv-oldest/.installed $(EXTENSION)  ## run the tests of `make test` on the oldest supported versions
	.venv-oldest/bin/python -m pytest $(PARALLEL) -m "not long and not browser" --ignore-glob='tests/benchmarks/test_[!f]*' \
		--ignore=tests/backends/test_cuda_source.py --ignore=tests/fewshot/test_protocols.py $(ARGS)

# A copy of the package in build/sanitize, whose extension checks every address and every undefined operation; a report
# goes to stderr and ends the run. Python never frees everything, so leaks are not looked for. libstdc++ is loaded with
# libasan, which could not see its exceptions otherwise. Too much memory is refused, as without sanitizers. asan-stack=0:
# the emulated threads have stacks of their own. Two CPU threads, whatever the machine. pythonpath: pytest would find the
# package that lies here before the copy.
sanitize: .venv/.installed  ## test the extension, its CUDA half emulated, under the address and undefined-behaviour sanitizers
	rm -rf build/sanitize/lib
	$(BUILD) COMPLORA_WERROR=1 CFLAGS="$(SANITIZER) -g" LDFLAGS="$(SANITIZER)" COMPLORA_BUILD=cpu \
		.venv/bin/python setup.py build --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 OMP_NUM_THREADS=2 PYTHONPATH=build/sanitize/lib \
		CUDA_ON_CPU_FLAGS="$(SANITIZER) --param asan-stack=0" \
		.venv/bin/pytest --override-ini=pythonpath=tests/support --capture=no \
		tests/backends/test_extension.py tests/backends/test_cuda_source.py tests/backends/test_raw_operations.py $(ARGS)

aot: .venv/.installed  ## compile every Triton kernel for every chip it ships for, without a GPU, and hold it to benchmarks/budgets.toml
	.venv/bin/python -m benchmarks.aot $(ARGS)

aot-held: .venv/.installed  ## the same for Hopper alone and the kernels whose figures benchmarks/budgets.toml holds, in two minutes
	.venv/bin/python -m benchmarks.aot --held --chips 90 $(ARGS)

waves: .venv/.installed  ## how far the tiles of each large product fill a GPU of 132 multiprocessors, as modelled
	.venv/bin/python -m benchmarks.waves $(ARGS)

bench: .venv/.installed $(EXTENSION)  ## run what this machine can of the benchmarks, keep the results and report them
	.venv/bin/python -m pytest benchmarks -o faulthandler_timeout=3600 --results benchmarks/results $(ARGS)
	.venv/bin/python -m benchmarks.report
	.venv/bin/python -m benchmarks.readme_figure

report: .venv/.installed  ## the tables of docs/speed.md and the figures, from the results files
	.venv/bin/python -m benchmarks.report
	.venv/bin/python -m benchmarks.readme_figure

bench-gpu:  ## the benchmarks of `make gpu` alone
	STAGES="$(basename $(notdir $(wildcard benchmarks/bench_*.py))) report" benchmarks/gpu.sh

gpu:  ## all that needs a GPU, in stages, with PYTHON as it is, in two calls of LIMIT=240 and 500 s; needs no network
	benchmarks/gpu.sh

# With the Triton of the GPU's machine: .venv-oldest has 3.6, GPU_VENV=.venv the newest. ARGS="--chip 100" for another chip.
GPU_VENV ?= .venv-oldest
gpu-cache: $(GPU_VENV)/.installed  ## compile the kernels of the first call of `make gpu` without a GPU, to be taken along
	$(GPU_VENV)/bin/python -m benchmarks.gpu.cache --check $(ARGS)

targets: .venv/.installed  ## which targets of the benchmarks are met, missed or not yet measured
	.venv/bin/python -m benchmarks.targets

model: .venv/.installed  ## what an H200's steps would take by a roofline model, from the launches that the real dispatch makes
	.venv/bin/python -m benchmarks.model $(ARGS)

docs: .venv-docs/.installed  ## build the documentation into build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict $(ARGS)

lint: .venv/.installed  ## check style, formatting and types
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/clang-format --dry-run --Werror $(CPP)
	.venv/bin/pyright

format: .venv/.installed  ## rewrite the files in the project's format
	.venv/bin/ruff check --fix
	.venv/bin/ruff format
	.venv/bin/clang-format -i $(CPP)

# An environment is installed when its stamp is newer than what declares its contents. torch and torchvision come
# out of one pip command and so from one index: a torchvision built for another build of torch does not import.
# The extension is built apart from them, by `make extension`.
.venv/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	COMPLORA_BUILD=0 .venv/bin/python -m pip install --editable '.[dev]'
	@touch $@

.venv-oldest/.installed: pyproject.toml setup.py requirements/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	COMPLORA_BUILD=0 .venv-oldest/bin/python -m pip install --constraint requirements/oldest.txt --editable '.[dev]'
	@touch $@

# 25.1: the first pip that installs a dependency group.
.venv-docs/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install 'pip>=25.1'
	.venv-docs/bin/python -m pip install --group docs
	@touch $@

# ninja compiles what is out of date, headers included.
$(EXTENSION): setup.py $(wildcard csrc/*) | .venv/.installed
	$(BUILD) .venv/bin/python setup.py build_ext --inplace
	@mkdir -p $(@D) && touch $@
