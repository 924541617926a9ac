# The two commands: `make train` and `make test`. Each sets up what it needs, once, in .venv.

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
RUN := runs/gpt2

.PHONY: train test test-slow lint format penny clean

## train: GPT-2 (124M) on Tiny Shakespeare until it is known on the grid; goes on if it was interrupted
train: $(VENV)/.installed
	@if [ -e $(RUN)/record.json ]; then \
		echo "$(RUN) is finished: see $(RUN)/record.json, or remove the folder to train again"; \
	elif [ -e $(RUN)/identity.json ]; then \
		$(BIN)/groundling train --resume --out $(RUN); \
	else \
		$(BIN)/groundling train --preset gpt2 --out $(RUN); \
	fi

## penny: the same path with a small model, in under five minutes
penny: $(VENV)/.installed
	$(BIN)/groundling train --preset penny

## test: everything that needs no GPU, no network and not much time
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
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(VENV)/.installed $@
