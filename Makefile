# Two commands on a fresh machine: `make demo` runs the whole pipeline, `make test` passes the tests.
# A CUDA machine needs nothing more; for a small CPU-only install: make demo TORCH_BACKEND=cpu

VENV := .venv
BIN  := $(VENV)/bin
PYTHON ?= python3
export PATH := $(CURDIR)/$(BIN):$(PATH)
export UV_CACHE_DIR ?= $(CURDIR)/.cache/uv

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check format constraints

help:                ## List what can be made.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.stamp  ## Build .venv with the exact set of packages in constraints.txt.

$(VENV)/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("vqvae2 needs Python 3.11 or newer, and \
	$(PYTHON) is %d.%d: name a newer one, such as PYTHON=python3.12." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q uv
	links=$$($(BIN)/python -m pip config get global.find-links 2>/dev/null || true); \
	$(BIN)/uv pip install -p $(VENV) --compile-bytecode $${links:+--find-links "$$links"} \
	    $(if $(TORCH_BACKEND),--torch-backend=$(TORCH_BACKEND)) -c constraints.txt -e '.[dev]'
	touch $@

# What an earlier -S, or dvc exp run, has left in params.yaml is not the demo's. Which settings go back is said.
demo: setup          ## Run every stage on the embedded data; ends with the path of the report.
	@if ! grep -q '^# Composed from conf/' params.yaml || grep -q '^# Overrides: ' params.yaml; then \
	    vqvae2 config --write; fi
	vqvae2 run

test: setup          ## Every test that fits into fifteen minutes on two cores.
	pytest -q -m "not slow"

test-slow: setup     ## The long ones.
	pytest -q -m slow

check: setup         ## What a change must pass: format, lint, types, fast tests.
	ruff format --check .
	ruff check .
	mypy
	pytest -q -m "not ray and not slow"

format: setup        ## Mend what can be mended by itself.
	ruff format .
	ruff check --fix .

constraints: setup   ## Resolve constraints.txt anew.
	links=$$($(BIN)/python -m pip config get global.find-links 2>/dev/null || true); \
	printf 'torch==2.13.0\nboto3<1.43.118\nmlflow<3.18\n' | \
	$(BIN)/uv pip compile -q $${links:+--find-links "$$links"} -c - --extra dev --no-header --no-annotate pyproject.toml | \
	sed 's/+cpu$$//; 1i # The exact set the tests pass with. Regenerate: make constraints' > constraints.txt.new
	mv constraints.txt.new constraints.txt
