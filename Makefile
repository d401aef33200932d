# Two commands do it all on a fresh machine: `make run` and `make test`. `make` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
PY := .venv/bin/python
NEEDED_GB := 5

KERNELS := $(basename $(notdir $(wildcard kernels/*.cu)))
ARCHS := sm_80 sm_86 sm_89 sm_90 sm_100 sm_120
# Barriers that are tracked: what the tool finds by itself, and 64 too, are too few, and then it reports a launch failure.
SANITIZE := PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --kernel-name kns=tiled_ --num-cuda-barriers 1024 --error-exitcode 1
SANITIZED := $(foreach tool,memcheck racecheck,sanitize-bench-$(tool)) \
  $(foreach tool,memcheck synccheck racecheck,sanitize-tiled-$(tool) sanitize-tiled-$(tool)-overlap)

.PHONY: help run test coverage lint figures notebooks paper kernels zoo gpu-test clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

run: .venv/installed  ## compress the embedded default model and print its sizes
	$(PY) run.py experiment=compression_ratio

test: .venv/installed  ## the fast tests: no GPU, no network
	$(PY) -m pytest -n 2

coverage: .venv/installed  ## how much of df11/ the fast tests reach; loops that numba compiles count as missed
	$(PY) -m coverage run -m pytest
	$(PY) -m coverage combine -q
	$(PY) -m coverage report

lint: .venv/installed  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy df11 experiments/harness

figures: .venv/installed  ## redraw every figure from results/
	$(PY) -m experiments.figures

notebooks: .venv/installed  ## run the notebooks; with what they show they go to notebooks/executed
	@mkdir -p notebooks/executed
	$(PY) -m jupyter execute --output=executed/{notebook_name} notebooks/*.ipynb

paper: .venv/installed  ## measure every table and figure, one after another; goes on where it was stopped
	$(PY) -m experiments.paper

kernels:  ## compile every kernel (needs nvcc, no GPU)
	@for arch in $(ARCHS); do for name in $(filter-out %_wgmma,$(KERNELS)); do echo "$$name $$arch"; \
	  nvcc -O3 -std=c++17 -Werror all-warnings -arch=$$arch -cubin -o /dev/null kernels/$$name.cu || exit 1; done; done
	@for name in $(filter %_wgmma,$(KERNELS)); do echo "$$name sm_90a"; \
	  nvcc -O3 -std=c++17 -Werror all-warnings -arch=sm_90a -cubin -o /dev/null kernels/$$name.cu || exit 1; done

zoo: .venv/installed  ## every class of language models that transformers has, tiny: writes docs/architectures.md
	$(PY) -m tests.test_zoo

gpu-test:  ## the tests that need a GPU, then compute-sanitizer (in an environment that has torch with CUDA and pycuda)
	$(PYTHON) -m pytest tests/test_gpu.py tests/test_tensors_gpu.py tests/test_tiled_gpu.py tests/test_fused_gpu.py tests/test_models_gpu.py -m "gpu or gpu2"
	@$(MAKE) --no-print-directory --output-sync=target --keep-going --jobs=8 $(SANITIZED)

sanitize-bench-%:
	@dir=$$(mktemp -d) && nvcc -O3 -std=c++17 -lineinfo -arch=native -o $$dir/bench kernels/bench.cu && \
	  echo "compute-sanitizer $*" && compute-sanitizer --tool $* --error-exitcode 1 $$dir/bench --check

sanitize-tiled-%-overlap:  # each kernel may begin while the one before it ends
	@echo "compute-sanitizer $*, the tiled layout, overlapping" && $(SANITIZE) --tool $* $(PYTHON) -m tests.sanitize --overlap

sanitize-tiled-%:
	@echo "compute-sanitizer $*, the tiled layout" && $(SANITIZE) --tool $* $(PYTHON) -m tests.sanitize

clean:  ## remove the virtual environment and unpromoted runs
	rm -rf .venv results/runs

.venv/installed: pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@free=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1048576)}'); [ "$$free" -ge $(NEEDED_GB) ] || \
	  { echo "$$free GB are free here, $(NEEDED_GB) are needed for the packages and the model: free some disk"; exit 1; }
	@echo "Installing into .venv (once, some minutes) ..."
	@$(PYTHON) -m venv .venv || { echo "No virtual environment could be made: install Python's venv module (Debian: python3-venv)"; exit 1; }
	@.venv/bin/pip install -qq -c constraints-cpu.txt -e '.[harness,models,evaluation,tracking,launchers,dev]' || \
	  { echo "The packages could not be installed. Is the package index reachable (proxy, PIP_INDEX_URL)? Then try again."; exit 1; }
	@touch $@
