# Everything runs from a virtual environment of its own; the first target that needs it sets it up.
# A machine needs Python 3.11 or 3.12 with venv, and make.
#
#   make demo                  fit, check and save a model on bundled data
#   make docs                  the site, which opens and searches without a server or the internet
#   make test                  format, lint, types, doctests and tests
#   make demo TORCH_INDEX=     with the platform's default build of torch (CUDA on Linux)

PYTHON      ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
WORKERS     ?= 2
DEMO_OUT    ?= runs/demo
SITE        ?= build/site
DEMO        ?= vae digits --epochs 300

VENV  := .venv
BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
DOCS  := $(VENV)/.installed-docs

# One thread for each worker: the workers share the cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help install demo test slow lint format types doctest docs coverage hooks clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*  ## /  make \1\t/p' Makefile | expand -t 18

install: $(STAMP)  ## the virtual environment, with everything in it

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "deepprob needs Python 3.11 or 3.12; $(PYTHON) is another. Try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "Python's venv module is missing. On Debian: apt-get install python3-venv" >&2; exit 1; }

# torch comes first and alone, so that its index decides which build it is and serves nothing else.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "setting up $(VENV), which takes a few minutes"
ifneq ($(TORCH_INDEX),)
	@$(PIP) install --quiet --no-deps -c constraints.txt \
	    --index-url $(TORCH_INDEX) --timeout 15 --retries 1 torch 2>/dev/null || \
	  echo "no torch at $(TORCH_INDEX): taking the same version from the default index"
endif
	@$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## fit, check and save a model on bundled data
	$(BIN)/deepprob fit $(DEMO) --out $(DEMO_OUT)
	$(BIN)/deepprob check $(DEMO_OUT)

test: lint types  ## format, lint, types, doctests and tests
	$(PYTEST) -n $(WORKERS)

slow: $(STAMP)  ## the tests again, with those that take minutes
	$(PYTEST) --slow

lint: $(STAMP)  ## formatting and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(STAMP)  ## put formatting and style right
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(STAMP)  ## mypy, strict
	$(BIN)/mypy

doctest: $(STAMP)  ## the examples in the docstrings
	$(PYTEST) deepprob

docs: $(DOCS)  ## the site in build/site; with DEEPPROB_SMOKE=1 its notebooks take short fits
	$(BIN)/python docs/site/build.py $(SITE)
	@echo "open $(SITE)/index.html"

$(DOCS): $(STAMP)
	@$(PIP) install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

coverage: $(STAMP)  ## which lines the tests reach
	$(PYTEST) -n $(WORKERS) --cov --cov-report=term-missing:skip-covered

hooks: $(STAMP)  ## run format and lint before every commit
	$(BIN)/pre-commit install

clean:  ## remove what was built, the virtual environment too
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
