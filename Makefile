# Everything sets itself up from nothing in .venv: `make demo`, `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test quick lint clean

demo: .venv/installed          ## the whole pipeline on the built-in dataset
	$(BIN)/python run_pipeline.py

test: lint                     ## ruff, then every test
	$(BIN)/python -m pytest

quick: lint                    ## ruff, then the tests that take no time
	$(BIN)/python -m pytest -m "not slow and not browser"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt requirements-app.txt requirements-blip.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt -r requirements-app.txt -r requirements-blip.txt -r requirements-dev.txt
	touch $@

clean:                         ## remove the environment and what the demo and the notebook made
	rm -rf .venv data/shapes data/notebook runs/shapes
