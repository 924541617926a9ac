# The two commands: `make train` and `make test`. Each sets up what it needs, once, in .venv.

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

# The run of a preset in its folder: begun, gone on with, or, if it is finished, its record printed. What was
# interrupted is saved; make calls that "Error 130".
define run_preset
	@if [ -e runs/$(1)/identity.json ]; then \
		$(BIN)/groundling train --resume --out runs/$(1); \
	else \
		$(BIN)/groundling train --preset $(1) --out runs/$(1); \
	fi
endef

.PHONY: train test test-slow lint format penny demo setup clean help

## train: GPT-2 (124M) on Tiny Shakespeare until it is known on the grid; goes on if it was interrupted
train: $(VENV)/.installed
	$(call run_preset,gpt2)

## penny: the same path with a small model, in one to five minutes (docs/record/penny)
penny: $(VENV)/.installed
	$(call run_preset,penny)

## demo: the small model's page and API at http://127.0.0.1:8000; trained first, if there is none
demo: $(VENV)/.installed-serve
	@if [ ! -e runs/penny/record.json ]; then $(MAKE) --no-print-directory -f $(firstword $(MAKEFILE_LIST)) penny; fi
	$(BIN)/groundling serve runs/penny

## test: everything that needs no GPU, no network but PyPI's and npm's, and not much time
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

## test-slow: what takes minutes each
test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

## lint: style, types, layers
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=benchmarks $(BIN)/mypy benchmarks/*.py
	$(BIN)/lint-imports

## format: mends what it can of the style
format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## setup: what `make train` installs, and nothing run
setup: $(VENV)/.installed

## clean: removes what was set up; runs stay
clean:
	rm -rf $(VENV) build dist

## help: this list
help:
	@sed -n 's/^## //p' $(firstword $(MAKEFILE_LIST))

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-serve: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[serve]'
	touch $(VENV)/.installed $@

$(VENV)/.installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(VENV)/.installed $(VENV)/.installed-serve $@
