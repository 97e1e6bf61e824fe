# Each target sets up all it needs on a machine with Python >= 3.10, a C++ compiler and make: a virtual
# environment in .venv, torch, the other dependencies, and csrc/ compiled as fastalign._C. What is up to
# date is not done again.

PYTHON ?= python3
VENV ?= .venv
# A CPU or a CUDA build, whatever the package index in use gives. Another one, with pip's options if need
# be:  make install TORCH='torch==2.13.0 --index-url ...'
TORCH ?= torch==2.13.0
# OMP_WAIT_POLICY=PASSIVE for the tests: on cores shared with other work, threads that spin while they wait
# for each other make everything ten times slower. On idle cores spinning is the faster way to train.
# More arguments for pytest and for the benchmarks.
PYTEST_ARGS ?=
BENCH_ARGS ?= --repeats 5

# make's own default is g++; c++ is what the build takes when nothing else is said.
ifeq ($(origin CXX),default)
CXX := c++
endif
export CXX

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
# One stamp per choice of torch, so that another choice is installed.
WITH_TORCH := $(VENV)/.torch-$(shell printf '%s' '$(TORCH)' | cksum | cut -d ' ' -f 1)
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart test lint bench wheel-check clean FORCE

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

quickstart: $(INSTALLED)  ## align a small model on the built-in task; report in runs/quickstart
	$(VENV)/bin/fastalign quickstart --output runs/quickstart --overwrite

test: $(INSTALLED)  ## all tests; those marked gpu are skipped where there is no GPU
	OMP_WAIT_POLICY=PASSIVE FASTALIGN_REQUIRE=cpp,triton $(RUN) -m pytest -p no:cacheprovider --durations=15 $(PYTEST_ARGS)

install: $(INSTALLED)  ## only the set-up

lint: $(INSTALLED)  ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(INSTALLED)  ## all benchmarks on the CPU; tables and plots in benchmarks/results/cpu
	$(RUN) -m benchmarks.all --out benchmarks/results/cpu $(BENCH_ARGS)

wheel-check: $(INSTALLED)  ## build sdist and wheel, and use the wheel in a fresh environment
	PYTHON=$(RUN) TORCH='$(TORCH)' sh scripts/check_wheel.sh

clean:  ## remove the environment and all that was built; runs/ stays
	rm -rf $(VENV) build dist *.egg-info fastalign/_C*.so .pytest_cache .mypy_cache .ruff_cache
	find benchmarks fastalign kernels tests -name __pycache__ -prune -exec rm -rf {} +

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "fastalign needs Python >= 3.10; $(PYTHON) is not. Name one: make PYTHON=python3.12" >&2; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null || { \
	  echo "fastalign needs a C++17 compiler; $(CXX) is not there. Install one, or name it: make CXX=g++" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(WITH_TORCH): | $(RUN)
	rm -f $(VENV)/.torch-*
	$(PIP) install $(TORCH)
	$(PIP) install -q 'setuptools>=77' wheel ninja
	touch $@

$(INSTALLED): $(WITH_TORCH) pyproject.toml setup.py $(wildcard csrc/*) $(if $(wildcard fastalign/_C*.so),,FORCE)
	$(PIP) install -q --no-build-isolation -e '.[dev]'
	touch $@
