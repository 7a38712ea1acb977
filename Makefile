# make quickstart   install into .venv and train text-to-image on the embedded data
# make test         install the development tools and run the default tests
# make test-all     also the slow ones and those that kill processes
# make lint types   ruff, mypy          make clean   remove what these made (not runs/)

PYTHON ?= python3
VENV   ?= .venv
CORES  := $(shell getconf _NPROCESSORS_ONLN)
PIP    := $(VENV)/bin/python -m pip --disable-pip-version-check
# one thread each: two threads that wait for each other on a busy core are slower than one
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(or $(JOBS),auto) --dist loadfile

.PHONY: quickstart test test-all lint types clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed
	$(VENV)/bin/accelerate launch --config_file configs/accelerate/cpu.yaml --num_cpu_threads_per_process $(CORES) tools/train.py task=text2image $(ARGS)

test: $(VENV)/.installed-dev
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.installed-dev
	$(PYTEST) -m "" $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

types: $(VENV)/.installed-dev
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache
	find . -name __pycache__ -type d -not -path "./runs/*" -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "condgen needs Python 3.11 or later; run: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Stamps: installing again is skipped until pyproject.toml changes. -e: the code in this folder is what runs.
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(PIP) install --quiet -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(PIP) install --quiet -e ".[dev]"
	@touch $@ $(VENV)/.installed
