# Everything sets itself up from nothing in .venv: `make demo`, `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/installed          ## the whole pipeline on the built-in dataset
	$(BIN)/python run_pipeline.py

test: lint                     ## ruff, then every test
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt requirements-blip.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

clean:                         ## remove the environment and what the demo and the notebook made
	rm -rf .venv data/shapes data/notebook runs/shapes
