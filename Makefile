# Two commands on a fresh machine: `make demo` runs the whole pipeline, `make test` passes the tests.
# CUDA works out of the box. For a smaller installation without CUDA: make demo TORCH_BACKEND=cpu

VENV := .venv
BIN  := $(VENV)/bin
PYTHON ?= python3
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONDONTWRITEBYTECODE :=  # images of containers often set it; every process would compile all code again
export UV_CACHE_DIR ?= $(CURDIR)/.cache/uv

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check format docs notebook site build constraints

help:                ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.stamp  ## Build .venv with the exact set of packages in constraints.txt.

$(VENV)/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("vqvae2 needs Python 3.11 or newer, \
	$(PYTHON) is %d.%d. Use a newer one: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q uv
	links=$$($(BIN)/python -m pip config get global.find-links 2>/dev/null || true); \
	$(BIN)/uv pip install -p $(VENV) --compile-bytecode $${links:+--find-links "$$links"} \
	    $(if $(TORCH_BACKEND),--torch-backend=$(TORCH_BACKEND)) -c constraints.txt -e '.[dev]'
	touch $@

# The demo uses the settings of conf/: overrides and edits in params.yaml are dropped, and the command prints which, with
# the options that repeat them.
demo: setup          ## Run every stage on the embedded data; ends with the path of the report.
	vqvae2 config --write
	vqvae2 run

test: setup          ## Run all tests except the slow ones: 15 to 17 minutes on two cores.
	pytest -q -rs -m "not slow" --numprocesses=logical --maxprocesses=8 --dist=loadgroup --no-loadscope-reorder

test-slow: setup     ## Run the slow tests: clusters, fault injection, compilation.
	pytest -q -rs -m slow

check: setup         ## Check format, lint and types.
	ruff format --check .
	ruff check .
	mypy

format: setup        ## Format the code and apply ruff's automatic fixes.
	ruff format .
	ruff check --fix .

docs: setup          ## Regenerate docs/reference from the code.
	python docs/reference/generate.py

notebook: setup      ## Run the tutorial's Python on artifacts/, and write docs/tutorial.ipynb with its pictures.
	python docs/notebook.py .

site: setup          ## Build the pages of docs/ as a site in site/.
	test -x $(BIN)/zensical || $(BIN)/uv pip install -q -p $(VENV) zensical
	zensical build --config-file mkdocs.yml

build: setup         ## Build the wheel and the source distribution in dist/.
	$(BIN)/python -m hatchling build -t sdist -t wheel

constraints: setup   ## Resolve the versions in constraints.txt again.
	links=$$($(BIN)/python -m pip config get global.find-links 2>/dev/null || true); \
	printf 'torch==2.13.0\nboto3<1.43.118\nmlflow<3.18\n' | \
	$(BIN)/uv pip compile -q $${links:+--find-links "$$links"} -c - --extra dev --no-header --no-annotate pyproject.toml | \
	sed 's/+cpu$$//; 1i # The exact set the tests pass with. Regenerate: make constraints' > constraints.txt.new
	mv constraints.txt.new constraints.txt
